"""Tools to find out how a model is built by running it: replaced forwards, probes, distances."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from recon.errors import ReconError

PROBE_LENGTH = 8


@dataclass(frozen=True)
class Returned:
    """What a block returned beside hidden states.

    kind: a tuple or a list.
    rest: what came after the hidden states.
    given: of what the block was called with after its hidden states, by number or name, which of `rest`, by number, is the very same.
    """

    kind: type
    rest: tuple
    given: dict[int, int | str]

    @classmethod
    def of(cls, output, args: tuple, kwargs: dict) -> "Returned | None":
        """None where `output` is hidden states alone. args, kwargs: what the block was called with beside its hidden states."""
        if not isinstance(output, tuple | list):
            return None
        named = [*enumerate(args), *kwargs.items()]
        tensors = ((number, value) for number, value in enumerate(output[1:]) if isinstance(value, Tensor))
        return cls(type(output), tuple(output[1:]), {n: name for n, value in tensors for name, arg in named if arg is value})

    @property
    def made(self) -> bool:
        """Whether some tensor in it is the block's own."""
        return any(isinstance(value, Tensor) and number not in self.given for number, value in enumerate(self.rest))

    def beside(self, hidden: Tensor, args: tuple, kwargs: dict):
        """It with other `hidden` states, and what a block that is called with `args` and `kwargs` would hand on of them."""
        named = {**dict(enumerate(args)), **kwargs}
        return self.kind((hidden, *(named.get(self.given.get(number), value) for number, value in enumerate(self.rest))))


def find_blocks(model: nn.Module, run: Callable[[], object] | None, within: str = "") -> str:
    """Path of the `nn.ModuleList` that holds the most parameters, of those that run.

    run: runs the model to see which do; None: all are taken to.
    within: path of the module that it must be in.

    Raises `ReconError` that says which lists there are, where none will do.
    """
    inside = ((name, module) for name, module in model.named_modules() if name.startswith(within))
    lists = {name: module for name, module in inside if isinstance(module, nn.ModuleList) and len(module)}
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in lists.items()}
    ran = {name: 0 if run else len(children) for name, children in lists.items()}
    with contextlib.ExitStack() as hooks:
        for name, children in lists.items():
            for child in children:

                def count(module, args, name=name):
                    ran[name] += 1

                hooks.callback(child.register_forward_pre_hook(count).remove)
        if lists and run:
            try:
                run()
            except Exception as error:  # whatever a model may raise that needs more than text
                said = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
                raise ReconError(
                    f"{type(model).__name__} does not run on tokens alone ({said}); models of text are supported"
                ) from error
    running = [name for name in lists if ran[name]]
    if not running:
        raise ReconError(
            f"{type(model).__name__} cannot be taken apart: its blocks have to be a torch.nn.ModuleList whose members run one after "
            f"another, and it has {_described(lists, sizes, ran) or 'no such list'}"
        )
    path = max(running, key=sizes.__getitem__)
    if ran[path] != len(lists[path]):
        raise ReconError(
            f"{type(model).__name__} cannot be taken apart: each of its blocks has to run once in a forward pass, and it has "
            + _described(lists, sizes, ran)
        )
    return path


def _described(lists: dict[str, nn.ModuleList], sizes: dict[str, int], ran: dict[str, int]) -> str:
    """The largest of the `lists` of modules in words."""
    most = sorted(lists, key=sizes.__getitem__, reverse=True)[:5]
    return "; ".join(
        f"{name!r}, {len(lists[name])} x {type(lists[name][0]).__name__}, {sizes[name]:,} parameters, run {ran[name]} times"
        for name in most
    )


def probe_tokens(model: nn.Module) -> Tensor:
    """A few random tokens (2, PROBE_LENGTH) that models are run on to find their structure."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (2, PROBE_LENGTH), generator=torch.Generator().manual_seed(0))


def placeholder_tokens(model: nn.Module, shape: tuple[int, int]) -> Tensor:
    """Tokens (batch, length) that stand for any, none of them padding."""
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    return torch.full(shape, 1 if padding == 0 else 0)


@contextlib.contextmanager
def replaced(stubs: dict[nn.Module, Callable]) -> Iterator[None]:
    """The forward of each module is `stubs[module]` for a while."""
    # A module may already carry a forward of its own, such as that of accelerate's hooks.
    own = {module: vars(module).get("forward") for module in stubs}
    for module, stub in stubs.items():
        module.forward = stub
    try:
        yield
    finally:
        for module, forward in own.items():
            del module.forward  # the class's own forward shows again
            if forward is not None:
                module.forward = forward


@contextlib.contextmanager
def requiring_gradients(parameters: Iterable[nn.Parameter], required: bool = True) -> Iterator[None]:
    """All `parameters` require gradients, or none, for a while."""
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    for parameter, _ in before:
        parameter.requires_grad_(required)
    try:
        yield
    finally:
        for parameter, required_before in before:
            parameter.requires_grad_(required_before)


def kind_of(block: nn.Module) -> tuple:
    """Equal for blocks that are built alike: of the same modules with the same settings, their numbers apart, and the same shapes."""

    def settings(module: nn.Module) -> tuple:
        plain = {name: value for name, value in vars(module).items() if isinstance(value, str | int | float | None)}
        return tuple(sorted((name, repr(value)) for name, value in plain.items() if not re.search("idx|index|layer_?id", name)))

    modules = tuple((name, type(module), settings(module)) for name, module in block.named_modules())
    return modules, tuple((name, parameter.shape) for name, parameter in block.named_parameters())


def first(output):
    """The hidden states among what a module returned: the first of a tuple, or all of it."""
    return output[0] if isinstance(output, tuple | list) else output


def reached(tensors: Iterable[object]) -> set[Tensor]:
    """The tensors without a history, such as parameters, that those of `tensors` were computed from, where that was recorded."""
    nodes, seen, found = [], set(), set()
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            nodes.append(tensor.grad_fn) if tensor.grad_fn else found.add(tensor)
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
            if hasattr(node, "variable"):
                found.add(node.variable)
    return found


def hidden_states(args: tuple, kwargs: dict) -> Tensor:
    """The first tensor among a module's arguments: by convention the hidden states."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def silent(args: tuple, kwargs: dict, output) -> Callable:
    """A forward that returns zeros of the structure of `output`, for any batch and length; its first argument is the module that is silenced.

    That may be of another model than the one that returned `output`, and of other widths.
    """
    given = hidden_states(args, kwargs)

    def zeros(leaf, like: Tensor, module: nn.Module):
        if not isinstance(leaf, Tensor):
            return None
        width = like.shape[-1] if leaf.shape[-1] == given.shape[-1] else leaf.shape[-1]
        if isinstance(module, nn.Linear | Conv1D):
            width = module.weight.shape[isinstance(module, Conv1D)]
        if leaf.shape[:-1] == given.shape[:-1]:
            return like.new_zeros(*like.shape[:-1], width)
        if leaf.shape[:-1] == (given.shape[:-1].numel(),):  # batch and length made one axis
            return like.new_zeros(like.shape[:-1].numel(), width)
        return None

    def forward(module: nn.Module, *args, **kwargs):
        like = hidden_states(args, kwargs)
        if isinstance(output, tuple | list):
            return type(output)(zeros(leaf, like, module) for leaf in output)
        return zeros(output, like, module)

    return forward


def mixes_tokens(child: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether changing the first token's input changes the output at any other token."""
    given = hidden_states(args, kwargs)
    changed = given.clone()
    # The token axis is the last but one, also where a block flattens (batch, length) into one axis.
    changed[..., 0, :] = changed[..., 0, :].flip(-1) + 1

    def swap(value):
        return changed if value is given else value

    again = child(*map(swap, args), **{key: swap(value) for key, value in kwargs.items()})
    # `output` of the block's own run may have been changed in place since, so the child runs twice here.
    plain, other = (first(out).reshape(*given.shape[:-1], -1)[..., 1:, :].float() for out in (child(*args, **kwargs), again))
    # Experts multiply other batches of tokens once the first goes elsewhere, which rounds differently.
    return bool((plain - other).abs().max() > tolerance(first(again)) / 1000 * plain.abs().max())


def distance(found: Tensor, expected: Tensor, origin: Tensor | float = 0.0) -> float:
    """Relative error of `found`, measured against how far `expected` is from `origin`."""
    return ((found - expected).float().norm() / (expected - origin).float().norm().clamp_min(1e-30)).item()


def tolerance(tensor: Tensor) -> float:
    """The `distance` that rounding in the dtype of `tensor` may bring about."""
    return 1e-3 if tensor.dtype == torch.float32 else 5e-2
