"""One window fitted by gradient descent: AdamW, linear schedule with warm-up, the mask re-applied after every step."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recon.engine import Engine
from recon.errors import ReconError


@dataclass(frozen=True)
class Schedule:
    """How long and how fast one window is trained."""

    learning_rate: float = 3e-3
    epochs: int = 1
    batch_size: int = 1  # samples per forward pass
    accumulation: int = 1  # forward passes per optimiser step
    warmup: float = 0.1  # share of the steps in which the learning rate rises
    pieces: int = 1  # that samples are cut into where a window does not mix tokens: more steps from the same work

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
    engine: Engine,
) -> list[float]:
    """Trains `parameters` in place so that `forward(inputs)` comes close to `targets`; returns the loss of every step.

    Args:
        forward: the window, (batch, length, in) -> (batch, length, out).
        parameters: what is trained; float32 leaves that require gradients.
        masks: pairs of parameter and keep-mask of its shape; dropped weights are exact zeros after every step.
        inputs, targets: (samples, length, in) and (samples, length, out).
        random: draws the order of samples anew for each epoch.
        engine: where and in what precision `forward` runs; `parameters` and `masks` are there already.

    The loss is divided by a constant, the mean square of the targets, so that AdamW's epsilon means the same for windows
    whose activations differ in size by orders of magnitude.
    """
    criterion = get_loss(loss)
    norm = torch.linalg.vector_norm(targets, dtype=torch.float32)  # unlike a square, it needs no room for all targets again
    scale = 1.0 if loss == "cosine" else max(norm.item() ** 2 / targets.numel(), 1e-30)
    steps = schedule.steps(len(inputs))
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.factor(step, steps))
    per_step = schedule.batch_size * schedule.accumulation
    losses: list[Tensor] = []
    orders = [torch.randperm(len(inputs), generator=random) for _ in range(schedule.epochs)]
    steps_of = [chosen for order in orders for chosen in order.split(per_step)]
    batches = engine.batches(
        [inputs, targets], [part.tolist() for chosen in steps_of for part in chosen.split(schedule.batch_size)]
    )
    with contextlib.closing(batches):
        for chosen in steps_of:
            total = torch.zeros((), device=engine.device)
            for _ in chosen.split(schedule.batch_size):
                x, y = next(batches)
                with engine:
                    output = forward(x)
                value = criterion(output, y) / scale * (len(x) / len(chosen))
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
