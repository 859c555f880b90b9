"""Pruning criteria: which weights of a matrix survive. One file each; pure functions on tensors (out, in).

A criterion that only scores weights is a function ``score(weight, statistics, generator, **options) -> (out, in)``,
higher = kept; one that also updates weights, such as SparseGPT, is a whole ``prune`` function. To add one, write its
file and enter it in CRITERIA. Criteria that remove whole units, heads and neurons, are `Structured`; `recon.methods.structured` runs them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from recon.errors import ReconError
from recon.kernels.criteria import magnitude, random, ria, sparsegpt, structured, wanda
from recon.kernels.patterns import Pattern, check_scope, keep_mask


@dataclass(frozen=True)
class Criterion:
    """A pruning criterion.

    statistics: what it must know of the matrix's inputs X (tokens, in): "none"; "norm", the vector (in,) of
    sqrt(mean over tokens of x_j^2); or "gram", the Gram matrix X'X / tokens (in, in).
    scope: what its authors compare within, "row" or "matrix".
    method: the algorithm, called as ``prune`` is.
    """

    name: str
    description: str
    source: str
    statistics: str
    scope: str
    method: Callable[..., tuple[Tensor, Tensor]]

    @property
    def scores(self) -> bool:
        """Whether it only scores weights, and leaves those that survive as they are."""
        return isinstance(self.method, partial) and self.method.func is prune_by_score

    def prune(
        self,
        weight: Tensor,
        statistics: Tensor | None,
        pattern: Pattern,
        scope: str,
        generator: torch.Generator | None,
        **options,
    ) -> tuple[Tensor, Tensor]:
        """The new weight (out, in), exactly zero outside its mask, and the mask (out, in), True = kept.

        The given ``weight`` (out, in) stays as it is. ``options`` are the criterion's own (see its file).
        Raises ReconError for NaN or infinite input, statistics of the wrong shape, an unknown scope, or columns that
        do not divide into groups of M.
        """
        check_scope(scope)
        pattern.check_columns("the weight", weight.shape[1])
        self._check_finite("weight", weight)
        columns = weight.shape[1]
        expected = {"none": None, "norm": (columns,), "gram": (columns, columns)}[self.statistics]
        if expected is not None:
            given = None if statistics is None else tuple(statistics.shape)
            if given != expected:
                raise ReconError(
                    f"criterion {self.name!r}: statistics of shape {given} do not fit a weight of shape "
                    f"{tuple(weight.shape)}; it needs {self.statistics!r} statistics of shape {expected}"
                )
            self._check_finite("statistics", statistics)
        return self.method(weight, statistics, pattern, scope, generator, **options)

    def _check_finite(self, what: str, tensor: Tensor) -> None:
        if not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise ReconError(
                f"criterion {self.name!r}: {count} of {tensor.numel()} entries of the {what} are NaN or infinite; "
                "all must be finite"
            )


def prune_by_score(score, weight, statistics, pattern, scope, generator, **options) -> tuple[Tensor, Tensor]:
    """Keeps the weights that ``score`` ranks highest, and changes none of them."""
    mask = keep_mask(score(weight, statistics, generator, **options), pattern, scope)
    return weight.masked_fill(~mask, 0.0), mask


def keep_all(weight, statistics, pattern, scope, generator) -> tuple[Tensor, Tensor]:
    """Prunes nothing."""
    return weight.clone(), torch.ones_like(weight, dtype=torch.bool)


@dataclass(frozen=True)
class Structured:
    """A criterion that removes whole units of a half-block, attention heads or MLP neurons, and never single weights.

    statistics: what it must know of the inputs X (tokens, in) of the matrix that reads the units: "norm" as above, or
    "moments": (2, in), their mean and variance over tokens.
    scope: what units compete within: a "half-block", so that the same share of each goes; or the "model".
    score: called with the matrix (out, in) and these statistics; the scores (in,) of its columns, higher = kept.
    compensates: whether the mean of what is removed goes into the matrix's bias.
    """

    name: str
    description: str
    source: str
    statistics: str
    scope: str
    score: Callable[[Tensor, Tensor], Tensor]
    compensates: bool = False
    scores = False  # single weights, that is


CRITERIA: dict[str, Criterion | Structured] = {
    criterion.name: criterion
    for criterion in (
        Criterion(
            name="magnitude",
            description="smallest weights go",
            source="layer-wise baseline of Sun et al. 2023, arXiv 2306.11695",
            statistics="none",
            scope="matrix",
            method=partial(prune_by_score, magnitude.score),
        ),
        Criterion(
            name="none",
            description="nothing goes: the dense model, as a control",
            source="control",
            statistics="none",
            scope="row",
            method=keep_all,
        ),
        Criterion(
            name="random",
            description="weights go by lot",
            source="control",
            statistics="none",
            scope="row",
            method=partial(prune_by_score, random.score),
        ),
        Criterion(
            name="wanda",
            description="weight times input norm",
            source="Sun et al. 2023, arXiv 2306.11695, equation 1",
            statistics="norm",
            scope="row",
            method=partial(prune_by_score, wanda.score),
        ),
        Criterion(
            name="ria",
            description="weight relative to its row and column, times the root of the input norm",
            source="Zhang et al., ICLR 2024, equation 4",
            statistics="norm",
            scope="matrix",
            method=partial(prune_by_score, ria.score),
        ),
        Criterion(
            name="sparsegpt",
            description="optimal brain surgery column by column; survivors are updated",
            source="Frantar & Alistarh 2023, arXiv 2301.00774, Algorithm 1",
            statistics="gram",
            scope="matrix",
            method=sparsegpt.prune,
        ),
        Structured(
            name="wanda-sp",
            description="whole heads and neurons by Wanda's scores",
            source="An et al. 2023, arXiv 2312.11983",
            statistics="norm",
            scope="half-block",
            score=structured.wanda_sp,
        ),
        Structured(
            name="flap",
            description="whole heads and neurons that fluctuate least; their mean goes into a bias",
            source="An et al. 2023, arXiv 2312.11983, WIFV with AL-AM",
            statistics="moments",
            scope="model",
            score=structured.flap,
            compensates=True,
        ),
    )
}


def get(name: str) -> Criterion | Structured:
    """The criterion called ``name``. Raises ReconError, with the names that exist, for any other."""
    if name not in CRITERIA:
        raise ReconError(f"criterion {name!r} is unknown; choose one of {', '.join(CRITERIA)}")
    return CRITERIA[name]
