"""Gradient descent on the weights that survive: AdamW, linear schedule with warm-up, the mask applied again after every step.

    theta <- M * AdamW(theta, grad L(theta))        M: keep-mask, 1 where a weight survives

AdamW: Loshchilov & Hutter 2019, arXiv 1711.05101. Schedule as in the paper (arXiv 2510.14444): linear with 10 % warm-up.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

NORM_EVERY = 8  # steps: a norm reads all gradients once more, which costs a few per cent of a step


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    learning_rate: float = 3e-3  # at its peak
    epochs: int = 1
    batch_size: int = 1  # samples per forward pass
    accumulation: int = 1  # forward passes per optimiser step
    warmup: float = 0.1  # share of the steps in which the learning rate rises
    weight_decay: float = 0.0  # each step shrinks the weights by this times the learning rate

    def scaled(self, factor: float) -> "Schedule":
        """The same schedule with its learning rate multiplied by `factor`."""
        return replace(self, learning_rate=self.learning_rate * factor)

    @property
    def per_step(self) -> int:
        """Samples per optimiser step."""
        return self.batch_size * self.accumulation

    def steps(self, samples: int) -> int:
        """Optimiser steps for this many samples."""
        return self.epochs * -(-samples // self.per_step)

    def factor(self, step: int, steps: int) -> float:
        """Learning rate at `step` of `steps`, relative to its peak: linear warm-up, then linear decay to zero."""
        rise = max(1, round(self.warmup * steps))
        return min((step + 1) / rise, (steps - step) / max(1, steps - rise + 1))


@dataclass(frozen=True)
class Curve:
    """How a training went: `losses`, one per optimiser step, and the gradient's norm at every `NORM_EVERY`-th step from the first."""

    losses: list[float]
    gradient_norms: list[float]


@torch.enable_grad()
def descend(
    gradients: Callable[[int], Tensor],
    parameters: list[nn.Parameter],
    masks: list[tuple[nn.Parameter, Tensor]],
    schedule: Schedule,
    steps: int,
    after_step: Callable[[Tensor], None] = lambda loss: None,
) -> Curve:
    """Trains `parameters` in place by AdamW.

    Args:
        gradients: called with the number of a step; adds its gradients to those of `parameters` and returns its loss, ().
        parameters: float32 leaves that require gradients.
        masks: pairs of parameter and keep-mask of its shape, 1 = survives; dropped weights are exact zeros after every step.
        schedule: sets the learning rate of each step, and the weight decay; batch sizes are up to `gradients`.
        steps: optimiser steps in all.
        after_step: called with the loss of every step.
    """
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.factor(step, steps))
    losses, norms = [], []
    for step in range(steps):
        losses.append(gradients(step))
        if step % NORM_EVERY == 0:
            norms.append(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).detach())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, mask in masks:
                parameter.mul_(mask)
        after_step(losses[-1])
    return Curve(torch.stack(losses).tolist(), torch.stack(norms).tolist()) if losses else Curve([], [])
