"""Losses between a window's output and its target, (batch, length, width) each."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from recon.errors import ReconError


def relative_error(output: Tensor, target: Tensor) -> float:
    """Mean over tokens of |output - target|^2 / |target|^2; both (batch, length, width)."""
    output, target = output.float(), target.float()
    return ((output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-30)).mean().item()


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all elements, in float32."""
    return F.mse_loss(output.float(), target.float())


def cosine(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of one minus the cosine between output and target, in float32."""
    return (1 - F.cosine_similarity(output.float(), target.float(), dim=-1)).mean()


def relative(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |output - target|^2 / |target|^2, in float32.

    In the squared error, a few tokens with massive activations (Sun et al. 2024, arXiv 2402.17762) outweigh all others.
    """
    output, target = output.float(), target.float()
    return ((output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-30)).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "cosine": cosine, "relative": relative}


def get_loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss called `name`; raises `ReconError` that lists the names."""
    if name not in LOSSES:
        raise ReconError(f"unknown loss {name!r}; allowed: {', '.join(LOSSES)}")
    return LOSSES[name]
