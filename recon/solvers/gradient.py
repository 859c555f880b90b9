"""One window fitted by gradient descent: AdamW, linear schedule with warm-up, the mask re-applied after every step."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recon.errors import ReconError


@dataclass(frozen=True)
class Schedule:
    """How long and how fast one window is trained."""

    learning_rate: float = 3e-3
    epochs: int = 1
    batch_size: int = 2  # samples per forward pass
    accumulation: int = 1  # forward passes per optimiser step
    warmup: float = 0.1  # share of the steps in which the learning rate rises

    def scaled(self, factor: float) -> "Schedule":
        """The same schedule with its learning rate multiplied by `factor`."""
        return replace(self, learning_rate=self.learning_rate * factor)

    def steps(self, samples: int) -> int:
        """Optimiser steps for this many samples."""
        return self.epochs * -(-samples // (self.batch_size * self.accumulation))

    def factor(self, step: int, steps: int) -> float:
        """Learning rate at `step` of `steps`, relative to its peak: linear warm-up, then linear decay to zero."""
        rise = max(1, round(self.warmup * steps))
        return min((step + 1) / rise, (steps - step) / max(1, steps - rise + 1))


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all elements, in float32."""
    return F.mse_loss(output.float(), target.float())


def cosine(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of one minus the cosine between output and target, in float32."""
    return (1 - F.cosine_similarity(output.float(), target.float(), dim=-1)).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "cosine": cosine}


def get_loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss called `name`; raises `ReconError` that lists the names."""
    if name not in LOSSES:
        raise ReconError(f"unknown loss {name!r}; allowed: {', '.join(LOSSES)}")
    return LOSSES[name]


@torch.enable_grad()
def fit(
    forward: Callable[[Tensor], Tensor],
    parameters: list[nn.Parameter],
    masks: list[tuple[nn.Parameter, Tensor]],
    inputs: Tensor,
    targets: Tensor,
    loss: str,
    schedule: Schedule,
    random: torch.Generator,
    arithmetic,
) -> list[float]:
    """Trains `parameters` in place so that `forward(inputs)` comes close to `targets`; returns the loss of every step.

    Args:
        forward: the window, (batch, length, in) -> (batch, length, out).
        parameters: what is trained; float32 leaves that require gradients.
        masks: pairs of parameter and keep-mask of its shape; dropped weights are exact zeros after every step.
        inputs, targets: (samples, length, in) and (samples, length, out).
        random: draws the order of samples anew for each epoch.
        arithmetic: context for the forward pass, such as autocast.

    The loss is divided by a constant, the mean square of the targets, so that AdamW's epsilon means the same for windows
    whose activations differ in size by orders of magnitude.
    """
    criterion = get_loss(loss)
    scale = 1.0 if loss == "cosine" else targets.float().square().mean().clamp_min(1e-30).item()
    steps = schedule.steps(len(inputs))
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.factor(step, steps))
    per_step = schedule.batch_size * schedule.accumulation
    losses: list[Tensor] = []
    for _ in range(schedule.epochs):
        order = torch.randperm(len(inputs), generator=random)
        for chosen in order.split(per_step):
            total = torch.zeros((), device=inputs.device)
            for part in chosen.split(schedule.batch_size):
                with arithmetic:
                    output = forward(inputs[part])
                value = criterion(output, targets[part]) / scale * (len(part) / len(chosen))
                value.backward()
                total += value.detach()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for parameter, mask in masks:
                    parameter.mul_(mask)
            losses.append(total)
    return torch.stack(losses).tolist() if losses else []
