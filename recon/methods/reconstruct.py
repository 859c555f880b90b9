"""Reconstruction: fits a pruned model to the dense one, one window after another.

For a window f with weights theta, survivors M, inputs X and targets Y (which of them: `recon.methods.propagation`),

    min over theta  E || (f(X; M * theta) - Y) / sigma ||^2        sigma: standard deviation of each channel of Y

(or another loss; the paper's is without sigma; `recon.kernels.losses`).

A Free Lunch in LLM Compression, arXiv 2510.14444, method section. How a window is fitted: `recon.methods.fit`.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from recon.config import PruningConfig, ReconstructionConfig, two_passes
from recon.errors import ReconError
from recon.kernels.losses import unexplained
from recon.methods.adapters import check_adaptable
from recon.methods.callbacks import Callback, ProgressBar
from recon.methods.fit import WindowFit
from recon.methods.masks import check_alike, check_trainable, keep_masks
from recon.methods.problem import Problem, split_samples
from recon.methods.propagation import Propagation, Task
from recon.methods.prune import Pruner
from recon.methods.training import movement
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.model.modules import requiring_gradients
from recon.model.windows import Window
from recon.runtime.execution import Execution

log = logging.getLogger("recon")

ALIGNED = 16  # elements in float32: parts of one buffer begin at whole cache lines, as separate tensors do
# What became of a window. Rolled back: its weights are those that pruning left.
RECONSTRUCTED, GREW, NOT_FINITE = "reconstructed", "rolled back: error grew", "rolled back: not finite"


@dataclass(frozen=True)
class WindowReport:
    """What became of one window. Errors: the share of the variance of its output that is unexplained; see `recon.kernels.losses`."""

    name: str
    parameters: int  # elements trained
    error_before: dict[str, float]  # on "held_out" samples or, where there are none, on "calibration" samples
    error_after: dict[str, float]
    losses: list[float]  # one per optimiser step
    movement: float  # |after - before| / |before| over the window's matrices
    seconds: float
    status: str  # RECONSTRUCTED, GREW or NOT_FINITE
    micro_batch: int = 0  # samples per forward pass; fewer than asked for where memory ran out; 0: no gradient descent


def reconstruct(
    model: nn.Module | Decoder,
    dense: nn.Module | Decoder,
    samples: Tensor | Iterable,
    config: ReconstructionConfig = ReconstructionConfig(),
    *,
    masks: dict[str, Tensor] | None = None,
    pruning: PruningConfig | None = None,
    held_out: Tensor | Iterable | None = None,
    seed: int = 0,
    execution: Execution | None = None,
    callbacks: Sequence[Callback] = (),
) -> list[WindowReport]:
    """Reconstructs `model` in place against `dense`, window by window; pruned weights stay exact zeros.

    Args:
        model: the pruned model, or its `Decoder`; same architecture as `dense`; parameters in float32.
        dense: the model before pruning, left unchanged.
        samples: calibration tokens (samples, length), or batches of them; see `recon.methods.samples`.
        config: granularity, propagation, loss, solver, learning rate, ...
        masks: keep-masks by matrix name, bool (out, in); default: wherever `model` is not zero.
        pruning: prunes as well, in the same pass: `model` is a copy of `dense`, and each window is pruned before it is fitted, by
            statistics of what it reads in the dense model.
        held_out: tokens (samples, length), as long as `samples`, that nothing is fitted on. A window whose error on the first
            `recon.methods.problem.ERROR_SAMPLES` of them grows is rolled back.
        execution: where and in what precision to compute; default: where `dense` is. Models stay where they are, but for the window in hand.
        callbacks: told of each window's report, and of what pruning found.

    Returns the reports of all windows, in the order in which they were fitted.

    Raises:
        ReconError: a mask that does not fit, pruning that cannot be done in the same pass, models that differ in more than their values, a model not in float32, samples longer than
            the model was made for, held-out samples of another length, a granularity that does not fit the model.
    """
    teacher = decompose(dense)
    check_alike(model.model if isinstance(model, Decoder) else model, teacher.model)
    student = decompose(model, like=teacher)
    execution = execution or Execution(teacher.device)
    if config.adapter != "none":
        check_adaptable(student)
    check_trainable(student)
    tokens, split = split_samples(samples, held_out)
    teacher.check_length(split.length)
    windows, pruner = teacher.windows(config.granularity), None
    if pruning is None:
        masks = keep_masks(student, masks)
    else:
        check_one_pass(masks, pruning, config, split.calibration)
        pruner = Pruner(student, pruning.on(split.calibration), seed, execution)
        masks = execution.store.masks
    reconstruction = Reconstruction(Problem(teacher, student, masks, config, split, seed, execution, pruner))
    reports = [WindowReport(**found) for found in execution.store.finished("reconstruct")]
    left = windows[len(reports) :]
    if left:
        reconstruction.begin(tokens, reports)
    bar = tqdm(
        desc=f"{'prune and ' if pruner else ''}reconstruct ({config.granularity})", unit="window", disable=not execution.progress, initial=len(reports),
        total=len(windows),
    )  # fmt: skip
    # Only the window in hand is trained; nothing else needs gradients.
    with bar, requiring_gradients(student.model.parameters(), False):
        for report in (execution.loop or one_after_another)(reconstruction, left):
            reports.append(report)
            for callback in (ProgressBar(bar), *callbacks):
                callback.on_window(report)
    if pruner:
        found = pruner.summed_up(pruner.found)
        for callback in callbacks:
            callback.on_pruned(found)
    warn_of_rolled_back(reports, config)
    return reports


def check_one_pass(masks: dict | None, pruning: PruningConfig, config: ReconstructionConfig, samples: int) -> None:
    """Raises `ReconError` where pruning cannot be done in the same pass."""
    if masks is not None:
        raise ReconError("both masks and pruning are given; masks are of a model that is pruned already: leave one out")
    if why := two_passes(pruning, config, samples):
        raise ReconError(f"windows cannot be pruned as reconstruction reaches them: {why}; prune with `recon.prune` first")


def one_after_another(reconstruction: "Reconstruction", windows: Sequence[Window]) -> Iterator[WindowReport]:
    """The loop over windows: inputs and targets by propagation, its masks, a fit, and on to the next."""
    problem, propagation = reconstruction.problem, reconstruction.propagation
    for window in windows:
        began = time.perf_counter()
        task = propagation.task(window)
        with problem.student.loaded(window):
            if problem.pruner:
                problem.pruner.visit(window, task.statistics)
            report = reconstruction.reconstruct(window, task)
            propagation.advance(window)
            report = reconstruction.finish(window, report, propagation.streams, time.perf_counter() - began)
        yield report


class Reconstruction:
    """One pass over the windows of a problem: what a loop over them is made of."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.propagation = Propagation(problem)
        self.fit = WindowFit(problem)

    def begin(self, tokens: Tensor, reports: list[WindowReport]) -> None:
        """Starts with all of `tokens` (samples, length), or goes on after the windows of `reports`."""
        execution = self.problem.execution
        self.propagation.begin(tokens, execution.store.streams("reconstruct"))
        config, split, student = self.problem.config, self.problem.split, self.problem.student
        chunks = max(config.chunks_of(window, split.length) for window in student.windows(config.granularity))
        if chunks > 1:
            # To find out what blocks are called with at this length takes the embedding; later, a window would be in memory beside it.
            batch = min(config.batch_size, split.calibration * chunks)
            student.call(torch.empty(batch, split.length // chunks, 0, device=execution.device))
        if reports and 0 < reports[-1].micro_batch < self.problem.config.batch_size:
            execution.micro_batch = reports[-1].micro_batch

    def reconstruct(self, window: Window, task: Task) -> WindowReport:
        """Fits one window, measures its error before and after, and rolls it back where the error grew or became non-finite."""
        student, config = self.problem.student, self.problem.config
        parameters = student.trained(window, config.train)
        backup = self._copied(parameters)
        before = self._error(window, task)
        trained, losses = self.fit(window, task, parameters)
        after = self._error(window, task)
        status = self._status(window, parameters, losses, before, after)
        if status != RECONSTRUCTED:
            after = before
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(backup[name])
        matrices = dict.fromkeys(matrix.parameter_name for matrix in student.matrices(window).values())
        moved = movement((backup[name], parameters[name]) for name in matrices)
        batch = (self.problem.execution.micro_batch or config.batch_size) if config.solver == "adamw" else 0
        return WindowReport(window.name, trained, before, after, losses, moved, 0.0, status, batch)

    def finish(self, window: Window, report: WindowReport, streams: dict[str, Tensor | None], seconds: float) -> WindowReport:
        """Notes that `window`, whose weights are in memory, is finished; `streams`: what the next one starts from."""
        found = asdict(report) | {"seconds": seconds}
        tensors = {name: parameter.detach() for name, parameter in self.problem.student.parameters(window).items()}
        self.problem.execution.store.finish("reconstruct", found, streams, tensors)
        return WindowReport(**found)

    def _error(self, window: Window, task: Task) -> dict[str, float]:
        """The error of the window's output on the samples that errors are measured on."""
        split, inputs, targets = self.problem.split, task.inputs, task.targets
        if not self.propagation.by_grams:  # else the task holds these samples alone
            inputs, targets = inputs[split.measured], targets[split.measured]
        output = self.propagation.forward(self.problem.student, window, inputs)
        return {split.measured_on: unexplained(output, targets, task.variance)}

    def _status(self, window: Window, parameters, losses: list[float], before: dict, after: dict) -> str:
        """What became of a window that was fitted."""
        finite = {
            "weights": all(bool(parameter.isfinite().all()) for parameter in parameters.values()),
            "losses": all(map(math.isfinite, losses)),
            "activations": all(map(math.isfinite, after.values())),
        }
        if broken := [what for what, fine in finite.items() if not fine]:
            log.warning("window %r: fitting gave NaN or infinite %s; it is rolled back", window.name, ", ".join(broken))
            return NOT_FINITE
        # Only held-out text shows the harm of too high a learning rate; without any, nothing is rolled back for its error.
        grew = self.problem.config.roll_back and "held_out" in after and not after["held_out"] <= before["held_out"]
        return GREW if grew else RECONSTRUCTED

    def _copied(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Copies of `parameters`, in one buffer, which the store may place in a file."""
        steps = [-(-p.numel() // ALIGNED) * ALIGNED for p in parameters.values()]
        room = self.problem.execution.store.empty((sum(steps),), torch.float32).split(steps)
        found = zip(parameters.items(), room, strict=True)
        return {name: part[: p.numel()].view(p.shape).copy_(p.detach()) for (name, p), part in found}


def warn_of_rolled_back(reports: list[WindowReport], config: ReconstructionConfig) -> None:
    """Warns where more than half of the windows got worse."""
    grew = sum(report.status == GREW for report in reports)
    if 2 * grew > len(reports):
        log.warning(
            "%d of %d windows got worse on held-out text and were rolled back: the learning rate, %g, is probably too high for this "
            "model; try a third or a tenth of it",
            grew, len(reports), config.learning_rate,
        )  # fmt: skip
