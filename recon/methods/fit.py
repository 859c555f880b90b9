"""One window fitted by gradient descent: AdamW, linear schedule with warm-up, the mask re-applied after every step."""

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from recon.errors import ReconError
from recon.kernels.gradient_descent import NORM_EVERY, Curve, Schedule
from recon.kernels.losses import get_loss
from recon.runtime.device import out_of_memory, release_memory
from recon.runtime.execution import Execution

log = logging.getLogger("recon")


@torch.enable_grad()
def optimise(
    loss: Callable[..., Tensor],
    data: list[Tensor],
    parameters: list[nn.Parameter],
    masks: list[tuple[nn.Parameter, Tensor]],
    schedule: Schedule,
    random: torch.Generator,
    execution: Execution,
    step_done: Callable[[Tensor], None] = lambda value: None,
    micro_batch: int = 0,
) -> Curve:
    """AdamW on `parameters`, in place, with the learning rate of `schedule`.

    Where the device's memory does not suffice for a step, that step is made anew from half as many samples at a time, whose gradients
    add up to the same but for rounding, and so are all after it.

    Args:
        loss: called with a batch of each tensor in `data`; the mean over its samples of what is minimised.
        data: samples (samples, ...), shuffled together.
        parameters: float32 leaves that require gradients.
        masks: pairs of parameter and keep-mask of its shape; dropped weights are exact zeros after every step.
        random: draws the order of samples anew for each epoch.
        execution: brings the batches to where `parameters` and `masks` are already.
        step_done: called with the loss after every step.
        micro_batch: samples per forward pass, at most; 0: as many as `schedule` says.

    Raises `ReconError` where memory does not suffice for one sample at a time.
    """
    samples = len(data[0])
    steps = schedule.steps(samples)
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.factor(step, steps))
    per_step = schedule.batch_size * schedule.accumulation
    losses: list[Tensor] = []
    norms: list[Tensor] = []
    if execution.device.type == "cpu":  # where a product with booleans takes several times as long
        # In the list itself, so that it does not keep the booleans alive, a byte a weight, while windows are fitted.
        masks[:] = [(parameter, mask.to(torch.bfloat16)) for parameter, mask in masks]
    orders = [torch.randperm(samples, generator=random) for _ in range(schedule.epochs)]
    steps_of = [chosen for order in orders for chosen in order.split(per_step)]
    size = min(micro_batch or schedule.batch_size, schedule.batch_size)
    while len(losses) < steps:
        parts = [part for chosen in steps_of[len(losses) :] for part in parts_of(chosen, size)]
        with contextlib.closing(execution.batches(data, parts)) as batches:
            while len(losses) < steps:
                try:
                    total = _add_gradients(loss, batches, parts_of(steps_of[len(losses)], size), execution)
                except Exception as error:
                    if not out_of_memory(error):
                        raise
                    total, fault = None, str(error).splitlines()[0]
                if total is None:  # and the exception, which holds on to all that was computed, is gone
                    break
                if len(losses) % NORM_EVERY == 0:
                    norms.append(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).detach())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
                with torch.no_grad():
                    for parameter, mask in masks:
                        parameter.mul_(mask)
                losses.append(total)
                step_done(total)
        if total is None:
            optimizer.zero_grad(set_to_none=True)
            release_memory()
            if size == 1:
                raise ReconError(
                    f"memory of device {execution.device} does not suffice for one sample at a time ({fault}); give shorter samples, or "
                    "smaller windows"
                )
            log.warning("out of memory with %d samples at a time: %d from here on (%s)", size, -(-size // 2), fault)
            size = -(-size // 2)
    return Curve(torch.stack(losses).tolist(), torch.stack(norms).tolist(), size) if losses else Curve([], [], size)


def parts_of(chosen: Tensor, size: int) -> list[list[int]]:
    """The numbers of samples in `chosen`, at most `size` at a time."""
    return [part.tolist() for part in chosen.split(size)]


def _add_gradients(
    loss: Callable[..., Tensor], batches: Iterator[tuple[Tensor, ...]], parts: list[list[int]], execution: Execution
) -> Tensor:
    """Adds the gradients of one step, on samples of the numbers in `parts`, in which each counts alike; returns its loss."""
    total = torch.zeros((), device=execution.device)
    samples = sum(map(len, parts))
    for part in parts:
        value = loss(*next(batches)) * (len(part) / samples)
        value.backward()
        total += value.detach()
    return total


def fit(
    forward: Callable[[Tensor], Tensor],
    parameters: list[nn.Parameter],
    masks: list[tuple[nn.Parameter, Tensor]],
    inputs: Tensor,
    targets: Tensor,
    loss: str,
    schedule: Schedule,
    random: torch.Generator,
    execution: Execution,
    micro_batch: int = 0,
) -> Curve:
    """Trains `parameters` in place so that `forward(inputs)` comes close to `targets`; see `optimise`.

    Args:
        forward: the window, (batch, length, in) -> (batch, length, out).
        inputs, targets: (samples, length, in) and (samples, length, out).
        execution: where and in what precision `forward` runs.
        micro_batch: samples per forward pass, at most; 0: as many as `schedule` says.

    The squared error is divided by a constant, the mean square of the targets, so that AdamW's epsilon means the same for windows
    whose activations differ in size by orders of magnitude.
    """
    criterion = get_loss(loss)
    norm = torch.linalg.vector_norm(targets, dtype=torch.float32)  # unlike squares, it needs no room for all targets again
    scale = max(norm.item() ** 2 / targets.numel(), 1e-30) if loss == "mse" else 1.0

    def distance(x: Tensor, y: Tensor) -> Tensor:
        with execution:
            output = forward(x)
        return criterion(output, y) / scale

    return optimise(distance, [inputs, targets], parameters, masks, schedule, random, execution, micro_batch=micro_batch)
