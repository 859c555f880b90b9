"""Gradient descent on the weights that survive.

theta <- M * AdamW(theta, grad L(theta), r * s)        M: mask; r: learning rate; s: size of the parameter's surviving weights
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from recon.kernels.gradient_descent import Schedule, Trained
from recon.runtime.execution import Execution


@torch.enable_grad()
def train(
    loss: Callable[..., Tensor],
    data: list[Tensor],
    trained: list[Trained],
    schedule: Schedule,
    random: torch.Generator,
    execution: Execution,
    after_step: Callable[[Tensor], None] = lambda loss: None,
) -> list[float]:
    """Trains parameters in place; dropped weights are exact zeros after every step. Returns the loss of each step.

    loss: of a mini-batch of each tensor in `data`, mean over its samples, ().
    data: tensors (samples, ...), shuffled together, anew in each epoch by `random`.

    Where memory runs out, a step is repeated with half as many samples per forward pass, which holds for all later steps.
    Raises `ReconError` where memory does not suffice for one sample.
    """
    epochs = [torch.randperm(len(data[0]), generator=random) for _ in range(schedule.epochs)]
    steps = [chosen for order in epochs for chosen in order.split(schedule.per_step)]
    rates = [schedule.learning_rate * (each.size if schedule.rate == "relative" else 1.0) for each in trained]
    groups = [{"params": [each.parameter], "lr": rate} for each, rate in zip(trained, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=schedule.weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.factor(step, len(steps)))
    size, losses = min(schedule.batch_size, execution.micro_batch or schedule.batch_size), []

    def backward(chosen: Tensor, size: int) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=execution.device)
        parts = chosen.split(size)
        for part, batch in zip(parts, execution.batches(data, [part.tolist() for part in parts]), strict=True):
            value = loss(*batch) * (len(part) / len(chosen))
            value.backward()
            total += value.detach()
        return total

    for chosen in steps:
        total, fits = execution.halving(partial(backward, chosen), size)
        if fits < size:
            execution.micro_batch = size = fits  # for what is trained next as well
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            for each in trained:
                if each.mask is not None:
                    each.parameter.mul_(each.mask)
        losses.append(total)
        after_step(total)
    optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses).tolist() if losses else []


@torch.no_grad()
def movement(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """|after - before| / |before| over all `pairs` of a tensor before and after training, which are of one shape."""
    moved = norm = 0.0
    for before, after in pairs:
        moved += (after - before).square().sum().item()
        norm += before.square().sum().item()
    return (moved / max(norm, 1e-30)) ** 0.5
