"""Losses: of a window's output against its target, and of predicted tokens. All are computed in float32.

Window losses take output and target (batch, length, width), and give a mean:

    mse         mean over elements of (y - t)^2
    relative    mean over tokens of |y - t|^2 / |t|^2
    cosine      mean over tokens of 1 - y.t / (|y| |t|)

Prediction losses take logits (tokens, vocabulary) and give a value in nats for each token. Logits are large: they are worked on a
few rows at a time, and of their size only a gradient in their own dtype is ever made.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from recon.errors import ReconError
from recon.kernels.rows import parts

ELEMENTS = 2**20  # logits in float32 at once


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all elements."""
    return F.mse_loss(output.float(), target.float())


def cosine(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of one minus the cosine between output and target."""
    return (1 - F.cosine_similarity(output.float(), target.float(), dim=-1)).mean()


def relative(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |output - target|^2 / |target|^2.

    All tokens count alike. In `mse`, a few with massive activations outweigh the others (Sun et al. 2024, arXiv 2402.17762).
    """
    output, target = output.float(), target.float()
    return ((output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-30)).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "cosine": cosine, "relative": relative}


def get_loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The window loss called `name`. Raises `ReconError` for an unknown one."""
    if name not in LOSSES:
        raise ReconError(f"loss is {name!r}; allowed: {', '.join(LOSSES)}")
    return LOSSES[name]


def relative_error(output: Tensor, target: Tensor) -> float:
    """`relative` as a number: the error that windows and models are reported with."""
    return relative(output, target).item()


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target], (tokens,), for logits (tokens, vocabulary) and targets (tokens,).

    Every target counts: no index means "ignore".
    """
    return _Prediction.apply(logits, targets, None)


def kl_divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(wanted || found), (tokens,), for logits (tokens, vocabulary); differentiable in `found`."""
    return _Prediction.apply(found, None, wanted)


class _Prediction(torch.autograd.Function):
    """Loss (tokens,) of logits (tokens, vocabulary) against targets (tokens,), or against `wanted` logits of that shape."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor | None, wanted: Tensor | None) -> Tensor:
        tokens = len(logits)
        losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
        # Of the mean over tokens: softmax(logits) - wanted probabilities. It is rounded to the logits' dtype once.
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for part in parts(logits, ELEMENTS):
            found = logits[part].float().log_softmax(-1)
            if wanted is None:
                losses[part] = F.nll_loss(found, targets[part], reduction="none")
            else:
                other = wanted[part].float().log_softmax(-1)
                losses[part] = F.kl_div(found, other, reduction="none", log_target=True).sum(-1)
            if gradient is not None:
                slope = found.exp_()
                if wanted is None:
                    slope[torch.arange(len(slope), device=slope.device), targets[part]] -= 1
                else:
                    slope -= other.exp_()
                gradient[part] = slope.div_(tokens)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, weights: Tensor):
        """`weights` (tokens,): the gradient of each token's loss."""
        (gradient,) = ctx.saved_tensors
        return gradient * (weights * len(weights))[:, None].to(gradient.dtype), None, None
