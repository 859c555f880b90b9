"""Losses: of a window's output against its target, and of predicted tokens. All are computed in float32.

Window losses of output y and target t, (..., width), and the variance of each channel of targets, (width,); one value per token:

    whitened    mean over channels of (y - t)^2 / variance
    mse         |y - t|^2 / sum of the variances
    cosine      1 - y.t / (|y| |t|)

The mean of `whitened` over tokens is the unexplained share of a channel's variance, averaged over channels: 0 is perfect, 1 is no
better than the channel's mean. `mse` is that share for all channels together: the paper's loss up to a constant factor.

Prediction losses take logits (tokens, vocabulary) and return a value in nats for each token. Logits are large, so a few rows are
processed at a time; the only new tensor as large as the logits is their gradient, in the same dtype.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from recon.kernels.moments import add_moments, parts

ELEMENTS = 2**19  # logits in float32 at a time: they stay in a CPU core's cache
# Number of positions at the start of each sample that variances and errors leave out. Models direct attention to the first token,
# whichever it is: its activations are massive, hardly depend on the text, and would dominate the variance of their channels.
FIRST = 1
POSITIONS = ("scaled", "skipped", "full")  # how the first position counts in a loss; see `position_weights`


def whitened(output: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """The squared error of each channel relative to its variance, mean over channels.

    All channels count alike. In `mse`, a few with massive activations outweigh the others (Sun et al. 2024, arXiv 2402.17762).
    """
    return ((output.float() - target.float()) * (variance * len(variance)).rsqrt()).square().sum(-1)


def mse(output: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """The squared error summed over channels, relative to the sum of their variances."""
    return ((output.float() - target.float()) * variance.sum().rsqrt()).square().sum(-1)


def cosine(output: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """One minus the cosine between output and target: their sizes do not matter."""
    return 1 - F.cosine_similarity(output.float(), target.float(), dim=-1)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"whitened": whitened, "mse": mse, "cosine": cosine}


def channel_variance(targets: Tensor) -> Tensor:
    """Variance over tokens of each channel of `targets` (samples, length, width): (width,), positive.

    Leaves out the first position of each sample; see `FIRST`. No variance is less than a millionth of the median variance.
    If tokens have several vectors, (samples, length, vectors, width), the result has the channels of all: (vectors * width,).
    """
    total, seen = targets.new_zeros(2, targets.shape[2:].numel(), dtype=torch.float32), 0
    for sample in targets:
        add_moments(total, seen, sample[FIRST:].float().flatten(1))
        seen += len(sample) - FIRST
    return total[1].clamp_min(max(1e-6 * total[1].median().item(), 1e-30))


def position_weights(first: str, loss: Callable[[Tensor, Tensor, Tensor], Tensor], targets: Tensor, variance: Tensor) -> Tensor:
    """Weights (length,), with mean 1, of the positions of `targets` (samples, length, ...) in the mean loss.

    first: how the first position counts. full: as any other. skipped: not at all; the model then no longer predicts what follows
        a single token, as nothing limits the error at this position. scaled: 1 / k of any other, if its targets are k > 1 times
        as far from zero, measured by `loss`, as the others on average.
    """
    weights = torch.ones(targets.shape[1], device=targets.device)
    if first == "skipped":
        weights[:FIRST] = 0.0
    elif first == "scaled":
        sizes = sum(loss(torch.zeros_like(each), each, variance) for each in targets.flatten(2))
        weights[:FIRST] = (sizes[FIRST:].mean() / sizes[:FIRST].clamp_min(torch.finfo(sizes.dtype).tiny)).clamp_max(1.0)
    return weights / weights.mean()


def unexplained(output: Tensor, target: Tensor, variance: Tensor) -> float:
    """The share of the variance of `target` (samples, length, width) that `output` leaves unexplained, mean over channels.

    This is the error in reports on windows and models: the mean of `whitened` over all tokens except the first of each sample.
    variance: of the channels, from `channel_variance`.
    """
    return whitened(output[:, FIRST:].flatten(2), target[:, FIRST:].flatten(2), variance).mean().item()


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target], (tokens,), for logits (tokens, vocabulary) and targets (tokens,), none of them ignored."""
    return _Prediction.apply(logits, targets, None)


def kl_divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(wanted || found), (tokens,), for logits (tokens, vocabulary); differentiable in `found`."""
    return _Prediction.apply(found, None, wanted)


class _Prediction(torch.autograd.Function):
    """Loss (tokens,) of logits (tokens, vocabulary) against targets (tokens,), or against `wanted` logits of that shape.

    Plain torch takes 1.1 times as long for targets, 1.8 times for logits (255 tokens, 49,152 words), and keeps float32 logits.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor | None, wanted: Tensor | None) -> Tensor:
        """Losses in float32; the gradient is made on the way, so that no logits are kept."""
        tokens = len(logits)
        losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
        # Gradient of the mean over tokens: (softmax(logits) - wanted probabilities) / tokens, rounded once to the logits' dtype.
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for part in parts(logits, ELEMENTS):
            found = logits[part].float().log_softmax(-1)
            if wanted is None:
                losses[part] = F.nll_loss(found, targets[part], reduction="none")
            else:
                other = wanted[part].float().log_softmax(-1)
                differences = other - found
                losses[part] = differences.mul_(other.exp_()).sum(-1)
            if gradient is not None:
                slope = found.exp_()
                if wanted is None:
                    slope[torch.arange(len(slope), device=slope.device), targets[part]] -= 1
                else:
                    slope -= other
                gradient[part] = slope.div_(tokens)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, weights: Tensor):
        """`weights` (tokens,): the gradient of each token's loss."""
        (gradient,) = ctx.saved_tensors
        return gradient * (weights * len(weights))[:, None].to(gradient.dtype), None, None
