"""How a model is built: what discovery finds once, and all models of the same architecture share."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from recon.model.matrices import Matrix

OTHER = {"attention": "mlp", "mlp": "attention"}


@dataclass(frozen=True)
class Output:
    """What a block returned beside hidden states."""

    kind: type  # tuple or list
    rest: tuple  # what came after the hidden states
    given: dict[int, int | str]  # index in `rest` -> number or name of the block's argument that was handed on

    @classmethod
    def of(cls, output, args: tuple, kwargs: dict) -> "Output | None":
        """None where `output` is hidden states alone. args, kwargs: the block's arguments beside its hidden states."""
        if not isinstance(output, tuple | list):
            return None
        named = [*enumerate(args), *kwargs.items()]
        tensors = ((number, value) for number, value in enumerate(output[1:]) if isinstance(value, Tensor))
        return cls(type(output), tuple(output[1:]), {n: name for n, value in tensors for name, arg in named if arg is value})

    @property
    def made(self) -> bool:
        """Whether the block computes a tensor in it, rather than handing on an argument."""
        return any(isinstance(value, Tensor) and number not in self.given for number, value in enumerate(self.rest))

    def beside(self, hidden: Tensor, args: tuple, kwargs: dict):
        """The same output with other `hidden` states, from a block that is called with `args` and `kwargs`."""
        named = {**dict(enumerate(args)), **kwargs}
        return self.kind((hidden, *(named.get(self.given.get(number), value) for number, value in enumerate(self.rest))))


def unchanged(module: nn.Module, hidden: Tensor) -> Tensor:
    """Stands in for a norm that makes no difference."""
    return hidden


@dataclass(frozen=True)
class Halves:
    """How a block divides into an attention half, which mixes tokens, and an MLP half, which does not."""

    layout: str  # "sequential": the MLP half reads the attention half's output; "parallel": both read the block's input
    children: dict[str, tuple[str, ...]]  # "attention" | "mlp" -> names of the children with matrices in that half
    # Child -> function that takes the child and its arguments, and returns zeros in the structure of its output.
    silence: dict[str, Callable] = field(compare=False, repr=False)
    parameters: dict[str, frozenset[str]] = field(default_factory=dict)  # half -> names of those that its output depends on
    idle: dict[str, tuple[str, ...]] = field(default_factory=dict)  # half -> norms of the block that make no difference to it

    def silenced(self, half: str) -> dict[str, Callable]:
        """What stands in for the children of the other half while `half` runs: zeros, and for norms what they read."""
        zeros = {child: self.silence[child] for child in self.children[OTHER[half]]}
        return zeros | dict.fromkeys(self.idle.get(half, ()), unchanged)

    def has(self, half: str, parameter: str) -> bool:
        """Whether `parameter` belongs to `half`. A bias that pruning has added goes with its weight."""
        known = self.parameters[half]
        return parameter in known or (parameter.endswith(".bias") and f"{parameter.removesuffix('bias')}weight" in known)


@dataclass(frozen=True)
class BlockStructure:
    """How a block is built. All names are relative to the block, so blocks that are built alike share one structure."""

    output: Output | None = None  # None: hidden states alone
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
