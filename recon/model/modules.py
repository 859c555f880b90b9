"""Helpers for modules and models: temporary forwards, hooks and gradients; tokens with which structure is found."""

import contextlib
import re
from collections.abc import Callable, Hashable, Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Stop(Exception):
    """Ends a forward pass once everything that is needed has been seen."""


def probe_tokens(model: nn.Module) -> Tensor:
    """Random tokens (2, 8) with which a model's structure is found."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (2, 8), generator=torch.Generator().manual_seed(0))


def placeholder_tokens(model: nn.Module, shape: tuple[int, int]) -> Tensor:
    """Tokens (batch, length) for passes in which only the shape matters; none of them is padding."""
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    return torch.full(shape, 1 if padding == 0 else 0)


def first(output):
    """The hidden states in what a module returned: the first element of a tuple or list, or else all of it."""
    return output[0] if isinstance(output, tuple | list) else output


def standard(model: nn.Module, name: str) -> bool:
    """Whether the parameter `name` belongs to a standard module, such as a linear one; if not, it may hold several matrices."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear | Conv1D | nn.Embedding | nn.modules.conv._ConvNd)


def distance(output: Tensor, expected: Tensor, origin: Tensor | float = 0.0) -> float:
    """Error of `output` relative to the distance between `expected` and `origin`."""
    return ((output - expected).float().norm() / (expected - origin).float().norm().clamp_min(1e-30)).item()


def tolerance(tensor: Tensor) -> float:
    """The largest `distance` that counts as a rounding error in the dtype of `tensor`."""
    return 1e-3 if tensor.dtype == torch.float32 else 5e-2


def kind_of(block: nn.Module) -> tuple:
    """A key that is equal for blocks built alike: the same modules, settings (except block numbers) and shapes."""

    def settings(module: nn.Module) -> tuple:
        plain = {name: value for name, value in vars(module).items() if isinstance(value, str | int | float | None)}
        return tuple(sorted((name, repr(value)) for name, value in plain.items() if not re.search("idx|index|layer_?id", name)))

    modules = tuple((name, type(module), settings(module)) for name, module in block.named_modules())
    return modules, tuple((name, parameter.shape) for name, parameter in block.named_parameters())


@contextlib.contextmanager
def replaced(stubs: dict[nn.Module, Callable]) -> Iterator[None]:
    """Context in which the forward of each module is `stubs[module]`."""
    # An instance may already have a forward of its own, such as one that accelerate's hooks have set.
    carried = {module: vars(module)["forward"] for module in stubs if "forward" in vars(module)}
    for module, stub in stubs.items():
        module.forward = stub
    try:
        yield
    finally:
        for module in stubs:
            del module.forward  # the class's forward is in force again
        for module, forward in carried.items():
            module.forward = forward


@contextlib.contextmanager
def watched(modules: dict[Hashable, nn.Module], before: Callable | None = None, after: Callable | None = None) -> Iterator[None]:
    """Context in which `before(key, args, kwargs)` or `after(key, args, kwargs, output)` is called with each module's forward."""
    with contextlib.ExitStack() as hooks:
        for key, module in modules.items():
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            hook = register(lambda module, *seen, key=key: (before or after)(key, *seen), with_kwargs=True)
            hooks.callback(hook.remove)
        yield


@contextlib.contextmanager
def requiring_gradients(parameters: Iterable[nn.Parameter], required: bool = True) -> Iterator[None]:
    """Context in which all `parameters` require gradients; with `required` False, none do."""
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    for parameter, _ in before:
        parameter.requires_grad_(required)
    try:
        yield
    finally:
        for parameter, required_before in before:
            parameter.requires_grad_(required_before)
