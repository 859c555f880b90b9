"""Gradient descent on the surviving weights or on low-rank adapters; its reports, and callbacks on the way.

theta <- M * AdamW(theta, grad L(theta), r * s)        M: mask; r: learning rate; s: size of the parameter's surviving weights
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from recon.errors import ReconError, log
from recon.kernels.adapters import ADAPTERS, LowRank
from recon.kernels.gradient_descent import Schedule, Trained
from recon.model.decoder import Decoder
from recon.model.structure import Matrix, factors
from recon.runtime.execution import Execution

NOT_FINITE = "rolled back: not finite"


class Callback:
    """Base class whose methods do nothing; override what you need.

    class Log(recon.Callback):
        def on_window(self, report):
            print(report.name, report.error_before, report.error_after)
    """

    def on_pruned(self, pruning) -> None:
        """After `recon.reconstruct` has pruned and fitted all windows in one pass; pruning: `recon.methods.prune.Pruning`."""

    def on_window(self, report) -> None:
        """After each window of `recon.reconstruct`; report: `recon.methods.reconstruct.WindowReport`."""

    def on_step(self, loss) -> None:
        """After each optimiser step of `recon.retrain`; loss: a tensor ()."""

    def on_merged(self) -> None:
        """After `recon.retrain` has merged LoRA into the weights, before the mask is applied again."""

    def on_done(self, record) -> None:
        """After `recon.run`, once the model is saved; record: `recon.study.record.RunRecord`."""


@dataclass(frozen=True)
class Report:
    """The result of training, such as by `recon.retrain`."""

    parameters: int  # elements trained
    losses: list[float]  # one per optimiser step; in retraining, nats per token
    seconds: float
    status: str  # if rolled back, the weights are as before
    micro_batch: int = 0  # samples per forward pass; fewer than asked for where memory ran out; 0: no gradient descent


@torch.enable_grad()
def train(
    loss: Callable[..., Tensor],
    data: list[Tensor],
    trained: list[Trained],
    schedule: Schedule,
    random: torch.Generator,
    execution: Execution,
    callbacks: Sequence[Callback] = (),
    name: str = "",
) -> list[float]:
    """Trains parameters in place; dropped weights are exact zeros after every step. Returns the loss of each step.

    loss: takes a mini-batch of each tensor in `data`, and returns the mean loss over its samples, ().
    data: tensors (samples, ...), shuffled together, anew in each epoch by `random`.
    callbacks: called after each step. name: of a progress bar; empty: none.

    If memory runs out, a step is repeated with half as many samples per forward pass; later steps keep that number.
    """
    epochs = [torch.randperm(len(data[0]), generator=random) for _ in range(schedule.epochs)]
    steps = [chosen for order in epochs for chosen in order.split(schedule.batch_size * schedule.accumulation)]
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

    for chosen in tqdm(steps, desc=name, unit="step", disable=not (name and execution.progress)):
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
        for callback in callbacks:
            callback.on_step(total)
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for each in trained:
            each.parameter.add_(0.0)  # masked weights may be -0.0, whose bytes in a file are not zero
    return torch.stack(losses).tolist() if losses else []


@torch.no_grad()
def settle(what: str, theta: dict[str, nn.Parameter], before: dict[str, Tensor], values: list[float], keep: bool = True) -> bool:
    """Whether `theta` and `values` are finite; if they are not, or `keep` is False, rolls `theta` back to `before`."""
    fine = all(map(math.isfinite, values)) and all(bool(parameter.isfinite().all()) for parameter in theta.values())
    if not fine:
        log.warning("%s gave NaN or infinite values; it is rolled back", what)
    if not (fine and keep):
        for name, parameter in theta.items():
            parameter.copy_(before[name])
    return fine


def check_trainable(decoder: Decoder, method: str) -> None:
    """Raises `ReconError` naming a parameter that is not in float32, or what `method` cannot train."""
    if method == "norms" and all(each.ndim != 1 for each in decoder.model.parameters()):
        raise ReconError("retrain 'norms' trains norms and biases, of which the model has none; choose another method")
    for name, parameter in decoder.model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ReconError(f"parameter {name!r} is {parameter.dtype}; small updates are lost in it: load the model in float32")
    for name, matrix in decoder.matrices().items() if method in ADAPTERS else ():
        if matrix.expert is not None:  # it has no module of its own
            raise ReconError(f"{name!r} is one expert's part of a parameter, which no adapter fits; train it without adapters")


@contextlib.contextmanager
def adapted(
    matrices: list[Matrix], masks: dict[str, Tensor], kind: str, rank: int, random: torch.Generator, callbacks: Iterable = ()
) -> Iterator[list[Trained]]:
    """Context in which adapters parametrise `matrices`. At the end they are merged and removed, and `masks` are applied again.

    kind, rank: see `recon.kernels.adapters`. callbacks: called when LoRA is merged, before masking; other kinds keep all zeros.
    Yields the adapters' parameters, to be trained.
    """
    trained, done, complete = [], [], False
    try:
        # Each draws from `random` in turn, experts last and by name: they are found in the order in which tokens reach them.
        for matrix in sorted(matrices, key=lambda matrix: matrix.name * matrix.routed):
            mask = factors(matrix.oriented(masks[matrix.name]), matrix.module.weight.device)
            adapter = LowRank(matrix.module.weight, mask, kind, rank, random, matrix.transposed)
            trained += adapter.trained(matrix.module.weight)
            parametrize.register_parametrization(matrix.module, "weight", adapter, unsafe=True)  # its shape is known to be right
            done.append(matrix)
        yield trained
        complete = kind == "lora"
    finally:
        with torch.no_grad():
            for matrix in done:
                original, weight = matrix.module.parametrizations.weight.original, matrix.module.weight
                # The original parameter object is put back, so that other references to it see the merged weight.
                parametrize.remove_parametrizations(matrix.module, "weight", leave_parametrized=False)
                original.copy_(weight)
            try:
                for callback in callbacks if complete else ():
                    callback.on_merged()
            finally:
                for matrix in done:
                    matrix.weight.mul_(factors(masks[matrix.name], matrix.weight.device)).add_(0.0)
