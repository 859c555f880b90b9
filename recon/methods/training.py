"""Gradient descent on samples that lie anywhere: in mini-batches, brought to the compute device, as large as memory suffices for."""

import contextlib
import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from recon.kernels.gradient_descent import Schedule, Trained, descend
from recon.runtime.execution import Execution

log = logging.getLogger("recon")


def train(
    loss: Callable[..., Tensor],
    data: list[Tensor],
    trained: list[Trained],
    schedule: Schedule,
    random: torch.Generator,
    execution: Execution,
    after_step: Callable[[Tensor], None] = lambda loss: None,
) -> list[float]:
    """Trains parameters in place on `data`, and returns the loss of each step; see `recon.kernels.gradient_descent.descend`.

    Args:
        loss: called with a mini-batch of each tensor in `data`; the mean over its samples of what is minimised, ().
        data: samples (samples, ...), shuffled together.
        trained: the parameters, on the compute device, with their masks and sizes.
        random: draws the order of samples anew for each epoch.
        execution: brings mini-batches to the compute device.

    Raises `ReconError` where memory does not suffice for one sample at a time.
    """
    orders = [torch.randperm(len(data[0]), generator=random) for _ in range(schedule.epochs)]
    steps = [chosen for order in orders for chosen in order.split(schedule.per_step)]
    parameters = [each.parameter for each in trained]
    with contextlib.closing(_Gradients(loss, data, parameters, steps, schedule.batch_size, execution)) as gradients:
        return descend(gradients, trained, schedule, len(steps), after_step)


@torch.no_grad()
def movement(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """|after - before| / |before| over all `pairs` of a tensor before and after training, which are of one shape."""
    moved = norm = 0.0
    for before, after in pairs:
        moved += (after - before).square().sum().item()
        norm += before.square().sum().item()
    return (moved / max(norm, 1e-30)) ** 0.5


class _Gradients:
    """Adds up the gradients of a step, a mini-batch at a time.

    Where memory runs out, the step is repeated with half as many samples at a time, which then holds for all later steps: the
    gradients are the same but for rounding.
    """

    def __init__(self, loss, data, parameters, steps: list[Tensor], size: int, execution: Execution):
        self.loss, self.data, self.parameters, self.steps, self.execution = loss, data, parameters, steps, execution
        self.size = min(size, execution.micro_batch or size)  # samples per forward pass
        self._batches = None  # those of all steps to come, so that the next one is copied while the device computes

    def __call__(self, step: int) -> Tensor:
        before = self.size
        total, size = self.execution.halving(lambda size: self._add(step, size), before)
        if size < before:
            self.execution.micro_batch = size  # for what is trained next as well
        return total

    def _add(self, step: int, size: int) -> Tensor:
        if self._batches is None or size != self.size:
            self.close()
            for parameter in self.parameters:  # what memory sufficed for before it ran out
                parameter.grad = None
            self.size = size
            coming = [part.tolist() for chosen in self.steps[step:] for part in chosen.split(size)]
            self._batches = self.execution.batches(self.data, coming)
        total = torch.zeros((), device=self.execution.device)
        for part in self.steps[step].split(size):
            value = self.loss(*next(self._batches)) * (len(part) / len(self.steps[step]))
            value.backward()
            total += value.detach()
        return total

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None
