"""Pruning criteria: which weights of a matrix survive. Pure functions on tensors; `CRITERIA` lists them.

To add one, write its function, `score(weight, statistics, generator, **options)` or `method`, and enter it in `CRITERIA`.
"""

import functools
import inspect
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from recon.errors import ReconError
from recon.kernels.criteria import admm, scores, sparsegpt, structured
from recon.kernels.patterns import SCOPES, Pattern, keep_mask

INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))  # not the user's own code
STATISTICS = ("none", "norm", "gram", "moments", "gradient")
UNITS = ("half-block", "model")  # scopes of criteria that remove whole units


@dataclass(frozen=True)
class Criterion:
    """A criterion for single weights or, if its scope is larger than a matrix, for whole units: attention heads and MLP neurons.

    statistics: what it needs of the matrix's inputs X (tokens, in): "none"; "norm", (in,), sqrt(mean over tokens of x_j^2);
        "gram", (in, in), X'X / tokens; "moments", (2, in), mean and variance over tokens; or "gradient", (1 + out, in), root mean
        squares over samples: of the norm of x_j, then of the gradient of the norm of the block's output by each weight.
    scope: what weights are compared within, as published: "row" or "matrix"; for units, "half-block" (all attention halves lose
        the same share, and all MLP halves do) or "model".
    score: function that returns scores (out, in) of the weights, higher = kept; for units, scores (in,) of the columns of the
        matrix (out, in) that reads them, see `recon.kernels.criteria.structured`. A criterion has either a score or a method.
    method: function for the whole algorithm, called as `prune`; it may update the survivors.
    compensates: whether the mean of the removed units goes into the bias of the matrix that reads them.
    """

    name: str
    statistics: str
    scope: str
    description: str
    source: str
    score: Callable[..., Tensor] | None = None
    method: Callable[..., tuple[Tensor, Tensor]] | None = None
    compensates: bool = False

    def __post_init__(self):
        for what, given, known in (("statistics", self.statistics, STATISTICS), ("scope", self.scope, SCOPES + UNITS)):
            if given not in known:
                raise ReconError(f"criterion {self.name!r}: {what} is {given!r}; allowed: {', '.join(known)}")
        if callable(self.score) == callable(self.method):
            raise ReconError(f"criterion {self.name!r} has to have either a score or a method, a function")

    @property
    def source_code(self) -> str:
        """Identifies a user's criterion in the keys of runs: its statistics, its scope, its code, and the functions, values and
        objects that the code uses, except those of installed packages. Empty for this library's criteria."""
        return "" if self in _ALL else repr((self.statistics, self.scope, _content(self.score or self.method)))

    @property
    def structured(self) -> bool:
        """Whether it removes whole units."""
        return self.scope in UNITS

    @property
    def scores(self) -> bool:
        """Whether it only ranks single weights, and leaves the survivors as they are."""
        return self.score is not None and not self.structured

    def prune(
        self, weight: Tensor, statistics: Tensor | None, pattern: Pattern, scope: str, generator: Generator | None, **options
    ) -> tuple[Tensor, Tensor]:
        """The pruned weight (out, in), exactly zero outside its mask, and the mask (out, in), True = kept.

        `weight` (out, in) is left unchanged. `statistics`: see the class for shapes. `options` are the criterion's own.
        Raises `ReconError` if the score fails, has NaN, or is not one number for each weight.
        """
        if self.method:
            return self.method(weight, statistics, pattern, scope, generator, **options)
        try:
            score = self.score(weight, statistics, generator, **options)
        except Exception as error:  # a user's function may raise anything
            raise ReconError(f"criterion {self.name!r}: its score fails ({type(error).__name__}: {error})") from error
        shape = score.shape if isinstance(score, Tensor) else type(score).__name__
        if shape != weight.shape or score.dtype == torch.bool:
            raise ReconError(f"criterion {self.name!r}: its score is {shape}; allowed: a number for each weight, {weight.shape}")
        mask = keep_mask(score, pattern, scope)
        return weight.masked_fill(~mask, 0.0), mask


def _content(value: object, within: tuple = ()) -> object:
    """What decides how `value` behaves, equal in every process. within: what holds it, the criterion's function first."""
    if any(value is other for other in within):
        return "itself"
    inside = functools.partial(_content, within=(*within, value))
    if hasattr(value, "tolist"):  # tensors and arrays, whose `repr` leaves out most elements
        return str(value.dtype), value.tolist()
    if isinstance(value, Mapping):
        return [(name, inside(each)) for name, each in value.items()]
    if isinstance(value, list | tuple):
        return [inside(each) for each in value]
    if isinstance(value, functools.partial):
        return inside((value.func, value.args, value.keywords))
    if inspect.ismethod(value):
        return inside((value.__func__, value.__self__))
    if inspect.isfunction(value) and not (within and value.__code__.co_filename.startswith(INSTALLED)):
        code, used = value.__code__, inspect.getclosurevars(value)
        try:
            said = inspect.getsource(value)
        except OSError:  # no source, as for code typed at a prompt: the compiled code
            said = code.co_code, inside(code.co_consts), code.co_names
        return said, str(inspect.signature(value)), inside(used.globals), inside(used.nonlocals)
    if hasattr(value, "__name__"):  # a module or class, or a function of an installed package
        return value.__name__
    if hasattr(value, "__dict__"):
        return type(value).__name__, inside(vars(type(value))), inside(vars(value))
    said = repr(value)
    return type(value).__name__ if " at 0x" in said else said


def keep_all(weight, statistics, pattern, scope, generator) -> tuple[Tensor, Tensor]:
    """Prunes nothing."""
    return weight.clone(), torch.ones_like(weight, dtype=torch.bool)


_ALL = (
    Criterion("magnitude", "none", "matrix", "smallest weights go", "layer-wise baseline, arXiv 2306.11695", scores.magnitude),
    Criterion("none", "none", "row", "nothing goes: the dense model, as a control", "control", method=keep_all),
    Criterion("random", "none", "row", "weights go at random", "control", scores.random),
    Criterion("wanda", "norm", "row", "weight times input norm", "Sun et al. 2023, arXiv 2306.11695, equation 1", scores.wanda),
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
