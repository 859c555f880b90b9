"""Tools to find out how a model is built by running it: replaced forwards, probes, distances."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from recon.errors import ReconError

PROBE_LENGTH = 8


def find_blocks(model: nn.Module) -> str:
    """Path of the `nn.ModuleList` of same-class children that holds the most parameters."""
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    }
    if not sizes:
        raise ReconError(f"{type(model).__name__} has no list of blocks of one class, so it cannot be taken apart")
    return max(sizes, key=sizes.__getitem__)


def probe_tokens(model: nn.Module) -> Tensor:
    """A few random tokens (2, PROBE_LENGTH) that models are run on to find their structure."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (2, PROBE_LENGTH), generator=torch.Generator().manual_seed(0))


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


def first(output):
    """The hidden states among what a module returned: the first of a tuple, or all of it."""
    return output[0] if isinstance(output, tuple) else output


def hidden_states(args: tuple, kwargs: dict) -> Tensor:
    """The first tensor among a module's arguments: by convention the hidden states."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def silent(args: tuple, kwargs: dict, output) -> Callable:
    """A forward that returns zeros of the structure of `output`, for any batch and length."""
    given = hidden_states(args, kwargs)

    def zeros(leaf, like: Tensor):
        if isinstance(leaf, Tensor) and leaf.shape[:-1] == given.shape[:-1]:
            return like.new_zeros(*like.shape[:-1], leaf.shape[-1])
        return None

    def forward(*args, **kwargs):
        like = hidden_states(args, kwargs)
        return tuple(zeros(leaf, like) for leaf in output) if isinstance(output, tuple) else zeros(output, like)

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
    return not torch.equal(first(child(*args, **kwargs))[..., 1:, :], first(again)[..., 1:, :])


def distance(found: Tensor, expected: Tensor, origin: Tensor | float = 0.0) -> float:
    """Relative error of `found`, measured against how far `expected` is from `origin`."""
    return ((found - expected).float().norm() / (expected - origin).float().norm().clamp_min(1e-30)).item()


def tolerance(tensor: Tensor) -> float:
    """The `distance` that rounding in the dtype of `tensor` may bring about."""
    return 1e-3 if tensor.dtype == torch.float32 else 5e-2
