"""Pruning criteria: which weights of a matrix survive. Pure functions on tensors; `CRITERIA` lists them.

A criterion that only ranks weights is a function `score(weight, statistics, generator, **options)` -> (out, in), higher = kept.
One that also updates the survivors, such as SparseGPT, is a function `prune` like `Criterion.prune`. Criteria that remove whole
heads and neurons are `Structured`. To add one, write its function and enter it in `CRITERIA`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recon.errors import ReconError
from recon.kernels.criteria import scores, sparsegpt
from recon.kernels.criteria.structured import Structured, flap, wanda_sp
from recon.kernels.patterns import SCOPES, Pattern, keep_mask


@dataclass(frozen=True)
class Criterion:
    """A criterion for single weights.

    statistics: what it needs of the matrix's inputs X (tokens, in): "none"; "norm", (in,), sqrt(mean over tokens of x_j^2); or
        "gram", (in, in), X'X / tokens.
    scope: what its authors compare within, "row" or "matrix".
    score: ranks the weights. A criterion has either this or
    method: the whole algorithm, which may update the survivors.
    """

    name: str
    description: str
    source: str
    statistics: str
    scope: str
    score: Callable[..., Tensor] | None = None
    method: Callable[..., tuple[Tensor, Tensor]] | None = None

    @property
    def scores(self) -> bool:
        """Whether it only ranks weights, and leaves the survivors as they are."""
        return self.score is not None

    def prune(
        self,
        weight: Tensor,
        statistics: Tensor | None,
        pattern: Pattern,
        scope: str,
        generator: torch.Generator | None,
        **options,
    ) -> tuple[Tensor, Tensor]:
        """The pruned weight (out, in), exactly zero outside its mask, and the mask (out, in), True = kept.

        `weight` (out, in) is left as it is. `statistics` have the shape that the class names. `options` are the criterion's own.
        Raises `ReconError` for NaN or infinite input, statistics of the wrong shape, an unknown scope, and columns that do not
        divide into groups of M.
        """
        if scope not in SCOPES:
            raise ReconError(f"scope is {scope!r}; allowed: {', '.join(SCOPES)}")
        pattern.check_columns("the weight", weight.shape[1])
        columns = weight.shape[1]
        expected = {"none": None, "norm": (columns,), "gram": (columns, columns)}[self.statistics]
        shape = None if statistics is None else tuple(statistics.shape)
        if expected and shape != expected:
            raise ReconError(f"criterion {self.name!r}: statistics have shape {shape}; for this weight it needs {expected}")
        for what, tensor in {"weight": weight, **({"statistics": statistics} if expected else {})}.items():
            if not tensor.isfinite().all():
                raise ReconError(f"criterion {self.name!r}: entries of the {what} are NaN or infinite; all must be finite")
        if self.method:
            return self.method(weight, statistics, pattern, scope, generator, **options)
        mask = keep_mask(self.score(weight, statistics, generator, **options), pattern, scope)
        return weight.masked_fill(~mask, 0.0), mask


def keep_all(weight, statistics, pattern, scope, generator) -> tuple[Tensor, Tensor]:
    """Prunes nothing."""
    return weight.clone(), torch.ones_like(weight, dtype=torch.bool)


_ALL = (
    Criterion(
        "magnitude", "smallest weights go", "layer-wise baseline of Sun et al. 2023, arXiv 2306.11695",
        statistics="none", scope="matrix", score=scores.magnitude,
    ),
    Criterion(
        "none", "nothing goes: the dense model, as a control", "control",
        statistics="none", scope="row", method=keep_all,
    ),
    Criterion(
        "random", "weights go by lot", "control",
        statistics="none", scope="row", score=scores.random,
    ),
    Criterion(
        "wanda", "weight times input norm", "Sun et al. 2023, arXiv 2306.11695, equation 1",
        statistics="norm", scope="row", score=scores.wanda,
    ),
    Criterion(
        "ria", "weight relative to its row and column, times the root of the input norm", "Zhang et al., ICLR 2024, equation 4",
        statistics="norm", scope="matrix", score=scores.ria,
    ),
    Criterion(
        "sparsegpt", "optimal brain surgery column by column; survivors are updated",
        "Frantar & Alistarh 2023, arXiv 2301.00774, Algorithm 1",
        statistics="gram", scope="matrix", method=sparsegpt.prune,
    ),
    Structured(
        "wanda-sp", "whole heads and neurons by Wanda's scores", "An et al. 2023, arXiv 2312.11983",
        statistics="norm", scope="half-block", score=wanda_sp,
    ),
    Structured(
        "flap", "whole heads and neurons that fluctuate least; their mean goes into a bias",
        "An et al. 2023, arXiv 2312.11983, WIFV with AL-AM",
        statistics="moments", scope="model", score=flap, compensates=True,
    ),
)  # fmt: skip
CRITERIA: dict[str, Criterion | Structured] = {criterion.name: criterion for criterion in _ALL}


def get(name: str) -> Criterion | Structured:
    """The criterion called `name`. Raises `ReconError` for an unknown one."""
    if name not in CRITERIA:
        raise ReconError(f"criterion is {name!r}; allowed: {', '.join(CRITERIA)}")
    return CRITERIA[name]
