"""How a model is built: what `recon.decompose` finds once, and all models of the same architecture share."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from recon.model.matrices import Matrix

OTHER = {"attention": "mlp", "mlp": "attention"}


@dataclass(frozen=True)
class Argument:
    """Stands, in what a block returned, for an argument that it handed on: its number, or its name."""

    name: int | str


def beside(output, args: tuple, kwargs: dict) -> tuple | None:
    """What a block returned beside hidden states, with an `Argument` for each of its arguments; None: hidden states alone.

    args, kwargs: the block's arguments beside its hidden states.
    """
    if not isinstance(output, tuple | list):
        return None
    names = {id(value): name for name, value in (*enumerate(args), *kwargs.items()) if isinstance(value, Tensor)}
    return tuple(Argument(names[id(value)]) if id(value) in names else value for value in output[1:])


@dataclass(frozen=True)
class Halves:
    """How a block divides into an attention half, which mixes tokens, and an MLP half, which does not."""

    layout: str  # "sequential": the MLP half reads the attention half's output; "parallel": both read the block's input
    children: dict[str, tuple[str, ...]]  # "attention" | "mlp" -> names of the children with matrices in that half
    # Child -> function that takes the child's arguments, and returns zeros in the structure of its output.
    silence: dict[str, Callable] = field(compare=False, repr=False)
    parameters: dict[str, frozenset[str]] = field(default_factory=dict)  # half -> names of those that its output depends on

    def silenced(self, half: str) -> dict[str, Callable]:
        """What stands in for the children of the other half while `half` runs."""
        return {child: self.silence[child] for child in self.children[OTHER[half]]}

    def has(self, half: str, parameter: str) -> bool:
        """Whether `parameter` belongs to `half`. A bias that pruning has added goes with its weight."""
        known = self.parameters[half]
        return parameter in known or (parameter.endswith(".bias") and f"{parameter.removesuffix('bias')}weight" in known)


@dataclass(frozen=True)
class BlockStructure:
    """How a block is built. All names are relative to the block, so blocks that are built alike share one structure."""

    beside: tuple | None = None  # see the function of this name
    groups: tuple[tuple[str, ...], ...] = ()  # matrices in the order in which they run; those of a group read the same input
    matrices: dict[str, Matrix] = field(default_factory=dict)  # by name, in the same order, without modules
    dense: tuple[str, ...] = ()  # linear modules that are not pruned, as they did not run as modules
    halves: Halves | str = "was not divided"  # or why the block does not divide


@dataclass(frozen=True)
class Structure:
    """How a model is built."""

    stacks: tuple[str, ...] = ()  # paths of the lists of blocks, in the order in which they run
    blocks: tuple[BlockStructure, ...] = ()  # of all stacks
    embedding: frozenset[str] = frozenset()  # names of the parameters that the first block's input depends on
