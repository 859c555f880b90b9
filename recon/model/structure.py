"""How a model is built. `recon.decompose` finds it once; all models of the same architecture share it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

OTHER = {"attention": "mlp", "mlp": "attention"}


@dataclass(frozen=True)
class Matrix:
    """A prunable matrix of a block, seen as (out, in): a module's weight, or one expert's part of a parameter with several."""

    name: str  # full name of the module, or of the parameter with the expert's number in brackets
    module: nn.Module | None = None  # holds the parameter; None in a `Structure`, where names are relative to the block
    expert: int | None = None  # its number among the matrices in the parameter; None: it is the only one
    experts: int = 1  # how many matrices are in the parameter
    transposed: bool = False  # stored as (in, out)
    share: float = 1.0  # mean fraction of all tokens that it reads: less than 1 for an expert
    routed: bool = False  # reads only tokens that are sent to it, as an expert does
    alone: bool = True  # used in a product of its own, not in one with the matrices of other experts

    def within(self, path: str, block: nn.Module) -> "Matrix":
        """The matrix with the same name in `block`, with its module and full name. path: the full name of the block."""
        return replace(self, name=f"{path}.{self.name}", module=block.get_submodule(self.parameter_name.rpartition(".")[0]))

    @property
    def parameter_name(self) -> str:
        """Full name of the parameter that holds the matrix."""
        return f"{self.name}.weight" if self.expert is None else self.name.rpartition("[")[0]

    @property
    def bias_name(self) -> str:
        """Full name of the parameter with the matrix's bias, if it has one."""
        return f"{self.name}.bias" if self.expert is None else f"{self.parameter_name}_bias"

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the matrix, as it is stored."""
        return getattr(self.module, self.parameter_name.rpartition(".")[2])

    def part_of(self, stored: Tensor) -> Tensor:
        """The part of `stored` that belongs to the matrix: a view. `stored` is laid out as the parameter."""
        return stored if self.expert is None else stored.view(self.experts, -1, stored.shape[-1])[self.expert]

    @property
    def weight(self) -> Tensor:
        """The matrix (out, in): a view, also if it is stored transposed."""
        return self.oriented(self.part_of(self.parameter))

    def oriented(self, stored: Tensor) -> Tensor:
        """`stored`, laid out as the matrix is stored, as (out, in), or the other way round; a view."""
        return stored.T if self.transposed else stored


def factors(mask: Tensor, device: torch.device) -> Tensor:
    """`mask` as factors of weights on `device`: bool, but float32 (0 and 1) on CPUs, where multiplying by booleans is slow."""
    return mask.to(device, torch.float32 if device.type == "cpu" else torch.bool)


def stored(matrices: dict[str, Matrix], masks: dict[str, Tensor], device: torch.device) -> list[tuple[nn.Parameter, Tensor]]:
    """The parameters that hold `matrices`, each with its mask (see `factors`), laid out as the parameter is.

    masks: bool (out, in) by matrix name.
    """
    parts: dict[nn.Parameter, list[Tensor]] = {}
    for name, matrix in matrices.items():
        parts.setdefault(matrix.parameter, []).append(factors(matrix.oriented(masks[name]), device))
    # Experts are in the same order in the parameter as in `matrices`.
    return [(p, found[0] if len(found) == 1 else torch.stack(found).view(p.shape)) for p, found in parts.items()]


@dataclass(frozen=True)
class Halves:
    """How a block divides into an attention half, which mixes tokens, and an MLP half, which does not."""

    layout: str  # "sequential": the MLP half reads the attention half's output; "parallel": both read the block's input
    children: dict[str, tuple[str, ...]]  # "attention" | "mlp" -> names of the children with matrices in that half
    # Child -> function that takes the child's arguments, and returns zeros in the structure of its output.
    silence: dict[str, Callable] = field(compare=False, repr=False)
    parameters: dict[str, frozenset[str]] = field(default_factory=dict)  # half -> names of what its output depends on

    def silenced(self, half: str) -> dict[str, Callable]:
        """Child of the other half -> what replaces its forward while `half` runs."""
        return {child: self.silence[child] for child in self.children[OTHER[half]]}

    def has(self, half: str, parameter: str) -> bool:
        """Whether `parameter` belongs to `half`. A bias that pruning has added goes with its weight."""
        known = self.parameters[half]
        return parameter in known or (parameter.endswith(".bias") and f"{parameter.removesuffix('bias')}weight" in known)


@dataclass(frozen=True)
class BlockStructure:
    """How a block is built. All names are relative to the block, so blocks built alike share one structure."""

    # What it returns besides hidden states: (number or name, None) if it is an argument of the block, else (None, value).
    beside: tuple[tuple[int | str | None, object], ...] | None = None
    groups: tuple[tuple[str, ...], ...] = ()  # matrices in running order; those of a group read the same input
    matrices: dict[str, Matrix] = field(default_factory=dict)  # by name, in the same order, without modules
    dense: tuple[str, ...] = ()  # linear modules that are not pruned, as they did not run as modules
    halves: Halves | str = "was not divided"  # a string: why the block does not divide


@dataclass(frozen=True)
class Structure:
    """How a model is built."""

    stacks: tuple[str, ...] = ()  # paths of the lists of blocks, in running order
    blocks: tuple[BlockStructure, ...] = ()  # of all stacks
    embedding: frozenset[str] = frozenset()  # names of the parameters that the first block's input depends on
    # Names of the blocks' parameters that other blocks' arguments are computed from, such as relative position biases.
    shared: frozenset[str] | None = None  # None: not yet determined
    causal: bool = True  # the model predicts after each token, and later tokens do not change the prediction
