"""Pruning criteria: which weights of a matrix survive. Pure functions on tensors; `CRITERIA` lists them.

To add one, write its function, `score(weight, statistics, generator, **options)` or `method`, and enter it in `CRITERIA`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from recon.errors import ReconError
from recon.kernels.criteria import admm, scores, sparsegpt, structured
from recon.kernels.patterns import Pattern, keep_mask


@dataclass(frozen=True)
class Criterion:
    """A criterion for single weights or, if it compares within more than a matrix, for whole units: heads and neurons.

    statistics: what it needs of the matrix's inputs X (tokens, in): "none"; "norm", (in,), sqrt(mean over tokens of x_j^2);
        "gram", (in, in), X'X / tokens; "moments", (2, in), mean and variance over tokens; or "gradient", (1 + out, in), of each
        sample the norm of x_j, and the gradient of the norm of the output of the matrix's block: root mean squares.
    scope: what its authors compare within: "row" or "matrix"; of units, a "half-block", which each lose the same share, or the
        "model".
    score: ranks the weights, (out, in), higher = kept; of units, the columns (in,) of the matrix (out, in) that reads them, see
        `recon.kernels.criteria.structured`. A criterion has either this or
    method: the whole algorithm, called as `prune`, which may update the survivors.
    compensates: whether the mean of the units that are removed goes into the bias of that matrix.
    """

    name: str
    statistics: str
    scope: str
    description: str
    source: str
    score: Callable[..., Tensor] | None = None
    method: Callable[..., tuple[Tensor, Tensor]] | None = None
    compensates: bool = False

    @property
    def source_code(self) -> str:
        """Of a criterion that is not this library's, so that its runs are known by it: what it reads, what it compares, its code,
        and the values that its function encloses."""
        if self in _ALL:
            return ""
        made = self.score or self.method
        try:
            said = inspect.getsource(made)
        except (OSError, TypeError):  # of what was typed at a prompt, say: its compiled code
            code = getattr(made, "__code__", None)
            said = (code.co_code, code.co_consts, code.co_names) if code else made
        enclosed = [cell.cell_contents for cell in getattr(made, "__closure__", None) or ()]
        return repr((self.statistics, self.scope, said, inspect.signature(made), enclosed))

    @property
    def structured(self) -> bool:
        """Whether it removes whole units."""
        return self.scope in ("half-block", "model")

    @property
    def scores(self) -> bool:
        """Whether it only ranks single weights, and leaves the survivors as they are."""
        return self.score is not None and not self.structured

    def prune(
        self, weight: Tensor, statistics: Tensor | None, pattern: Pattern, scope: str, generator: Generator | None, **options
    ) -> tuple[Tensor, Tensor]:
        """The pruned weight (out, in), exactly zero outside its mask, and the mask (out, in), True = kept.

        `weight` (out, in) is left as it is. `statistics` have the shape that the class names. `options` are the criterion's own.
        Raises `ReconError` for scores that are NaN, or not one for each weight.
        """
        if self.method:
            return self.method(weight, statistics, pattern, scope, generator, **options)
        score = self.score(weight, statistics, generator, **options)
        if (shape := getattr(score, "shape", type(score).__name__)) != weight.shape or score.dtype == torch.bool:
            raise ReconError(f"criterion {self.name!r}: its score is {shape}; allowed: a number for each weight, {weight.shape}")
        mask = keep_mask(score, pattern, scope)
        return weight.masked_fill(~mask, 0.0), mask


def keep_all(weight, statistics, pattern, scope, generator) -> tuple[Tensor, Tensor]:
    """Prunes nothing."""
    return weight.clone(), torch.ones_like(weight, dtype=torch.bool)


_ALL = (
    Criterion(
        "magnitude", "none", "matrix", "smallest weights go", "layer-wise baseline of Sun et al. 2023, arXiv 2306.11695",
        scores.magnitude,
    ),
    Criterion("none", "none", "row", "nothing goes: the dense model, as a control", "control", method=keep_all),
    Criterion("random", "none", "row", "weights go by lot", "control", scores.random),
    Criterion(
        "wanda", "norm", "row", "weight times input norm", "Sun et al. 2023, arXiv 2306.11695, equation 1", scores.wanda
    ),
    Criterion(
        "wanda++", "gradient", "row", "weight times input norm and gradient of the block's output",
        "Yang et al. 2025, arXiv 2503.04992", scores.wanda_plus,
    ),
    Criterion(
        "ria", "norm", "matrix", "weight relative to its row and column, times the root of the input norm",
        "Zhang et al., ICLR 2024, equation 4", scores.ria,
    ),
    Criterion(
        "sparsegpt", "gram", "matrix", "optimal brain surgery column by column; survivors are updated",
        "Frantar & Alistarh 2023, arXiv 2301.00774, Algorithm 1", method=sparsegpt.prune,
    ),
    Criterion(
        "admm", "gram", "matrix", "the whole matrix solved for, pulled towards the pattern; survivors are updated",
        "Meng et al., NeurIPS 2024 (ALPS), arXiv 2406.07831", method=admm.prune,
    ),
    Criterion(
        "wanda-sp", "norm", "half-block", "whole heads and neurons by Wanda's scores", "An et al. 2023, arXiv 2312.11983",
        structured.wanda_sp,
    ),
    Criterion(
        "flap", "moments", "model", "whole heads and neurons that fluctuate least; their mean goes into a bias",
        "An et al. 2023, arXiv 2312.11983, WIFV with AL-AM", structured.flap, compensates=True,
    ),
)  # fmt: skip
CRITERIA: dict[str, Criterion] = {criterion.name: criterion for criterion in _ALL}
