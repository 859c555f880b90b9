"""The pass that repairs a pruned model, one window at a time, so that each matches the dense model's activations."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from recon import device
from recon.decoder import Decoder
from recon.errors import ReconError
from recon.evaluation import check_length, relative_error
from recon.pruning import gather
from recon.seeds import generator
from recon.solvers.exact import masked_least_squares
from recon.solvers.gradient import Schedule, fit, get_loss
from recon.structure import requiring_gradients
from recon.windows import Window, canonical

log = logging.getLogger("recon")

PROPAGATIONS = {
    "dense": "inputs from the dense model, targets the dense window's outputs",
    "sparse": "inputs from the already repaired model, targets the dense window's outputs on those same inputs",
    "mixed": "inputs from the already repaired model, targets the dense model's own activations",
}
SOLVERS = {
    "adamw": "gradient descent (AdamW, linear schedule with warm-up)",
    "exact": "masked least squares, matrix by matrix (granularity matrix only)",
}
STARTS = {
    "pruned": "the weights that pruning left",
    "exact": "the masked least-squares solution of every matrix in the window",
}
ERROR_SAMPLES = 8  # calibration samples that a window's error is measured on before and after


@dataclass(frozen=True)
class WindowReport:
    """What became of one window. Errors are relative squared errors of its output, mean over tokens."""

    name: str
    parameters: int
    error_before: dict[str, float]  # "calibration", and "held_out" where held-out samples were given
    error_after: dict[str, float]
    losses: list[float]  # one per optimiser step, relative to the mean square of the targets
    seconds: float
    status: str  # "repaired", or "restored" where fitting gave numbers that are not finite


def reconstruct(
    model: nn.Module | Decoder,
    dense: nn.Module | Decoder,
    samples: Tensor,
    masks: dict[str, Tensor] | None = None,
    granularity: str = "half-block",
    propagation: str = "dense",
    solver: str = "adamw",
    start: str = "pruned",
    loss: str = "mse",
    schedule: Schedule = Schedule(),
    held_out: Tensor | None = None,
    seed: int = 0,
    compute_dtype: str = "auto",
    progress: bool = True,
) -> list[WindowReport]:
    """Repairs `model` in place against `dense`, window by window; the pruned weights stay exact zeros.

    Args:
        model: the pruned model, or its `Decoder`; same architecture as `dense`; parameters in float32.
        dense: the model as it was, left unchanged.
        samples: calibration tokens (samples, length).
        masks: keep-masks by matrix name, bool (out, in); default: wherever `model` is not zero, so that a model pruned by
            anything else can be repaired.
        granularity: matrix, half-block, block, <k>-blocks, quarter or model.
        schedule: a window of k blocks is trained with 1/sqrt(k) of its learning rate: steps add up along the depth, and at
            the rate that suits a block, a quarter of the model or all of it diverges.
        propagation, solver, start: see `PROPAGATIONS`, `SOLVERS`, `STARTS`.
        held_out: tokens (samples, length) that nothing is fitted on, to measure errors on.

    Raises:
        ReconError: an unknown name, a combination that has no meaning, a mask that does not fit, or a model not in float32.
    """
    teacher = dense if isinstance(dense, Decoder) else Decoder(dense)
    student = model if isinstance(model, Decoder) else Decoder(model, like=teacher)
    check_options(granularity, propagation, solver, start, loss)
    check_length(teacher, samples.shape[1])
    for name, parameter in student.model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ReconError(f"parameter {name!r} is {parameter.dtype}; small updates are lost in it: load the model in float32")
    if masks is None:
        masks = {name: matrix.weight != 0 for name, matrix in student.matrices().items()}
    for name, matrix in student.matrices().items():
        if name not in masks or masks[name].shape != matrix.weight.shape:
            found = tuple(masks[name].shape) if name in masks else None
            raise ReconError(f"mask of {name!r} has shape {found}; it must be {tuple(matrix.weight.shape)}")
    task = _Pass(teacher, student, masks, propagation, solver, start, loss, schedule, seed, compute_dtype, len(samples))
    task.begin(samples if held_out is None else torch.cat([samples, held_out]))
    reports = []
    windows = teacher.windows(granularity)
    bar = tqdm(windows, desc=f"reconstruct ({granularity})", unit="window", disable=not progress)
    # Only the window in hand is trained; nothing else needs gradients.
    with bar, requiring_gradients(student.model.parameters(), False):
        for window in bar:
            report = task.repair(window)
            reports.append(report)
            seen = "held_out" if "held_out" in report.error_after else "calibration"
            bar.set_postfix_str(f"error {report.error_before[seen]:.2g} -> {report.error_after[seen]:.2g}")
    return reports


def check_options(granularity: str, propagation: str, solver: str, start: str, loss: str) -> None:
    """Raises `ReconError` for unknown names and for combinations that have no meaning."""
    for kind, value, known in (
        ("propagation", propagation, PROPAGATIONS),
        ("solver", solver, SOLVERS),
        ("start", start, STARTS),
    ):
        if value not in known:
            raise ReconError(f"unknown {kind} {value!r}; allowed: {', '.join(known)}")
    get_loss(loss)
    if solver == "exact" and canonical(granularity) not in ("matrix", "none"):
        raise ReconError(
            f"solver exact fits single matrices, not granularity {granularity!r}; use granularity matrix, or start exact "
            "to begin larger windows from the exact solution of their matrices"
        )
    if solver == "exact" and loss != "mse":
        raise ReconError(f"solver exact minimises mse, not loss {loss!r}")


@dataclass
class _Pass:
    """One sweep over the windows. Streams hold the input of the current block for all samples, calibration first."""

    teacher: Decoder
    student: Decoder
    masks: dict[str, Tensor]
    propagation: str
    solver: str
    start: str
    loss: str
    schedule: Schedule
    seed: int
    compute_dtype: str
    count: int  # calibration samples; held-out ones follow them

    def begin(self, tokens: Tensor) -> None:
        self.amp = device.autocast(self.teacher.device, device.pick_compute_dtype(self.compute_dtype, self.teacher.device))
        embedded = self.over(self.teacher.embed, tokens)
        # Embeddings are not pruned, so both models start from the same activations.
        self.dense = embedded if self.propagation in ("dense", "mixed") else None
        self.sparse = embedded if self.propagation in ("sparse", "mixed") else None

    @torch.no_grad()
    def over(self, function: Callable[[Tensor], Tensor], stream: Tensor) -> Tensor:
        """`function` applied to `stream` (samples, ...) a batch at a time."""
        with self.amp:
            return torch.cat([function(batch) for batch in stream.split(self.schedule.batch_size)])

    def repair(self, window: Window) -> WindowReport:
        """Fits one window, measures it before and after, and moves the streams on."""
        began = time.perf_counter()
        inputs, targets, grams = self.task_of(window)
        parameters = self.student.parameters(window)
        before = self.errors(window, inputs, targets)
        backup = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        if grams:
            self.solve_exactly(window, inputs, targets, grams)
        losses = self.descend(window, inputs, targets, parameters) if self.solver == "adamw" else []
        status = "repaired"
        if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters.values()):
            log.warning("window %r: fitting gave NaN or infinite weights; its pruned-only weights are restored", window.name)
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(backup[name])
            status = "restored"
        after = self.errors(window, inputs, targets)
        self.advance(window, inputs, targets)
        count = sum(parameter.numel() for parameter in parameters.values())
        return WindowReport(window.name, count, before, after, losses, time.perf_counter() - began, status)

    def task_of(self, window: Window) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The window's inputs and targets for all samples, and, where matrices are solved exactly, their Gram matrices."""
        exact = self.solver == "exact" or self.start == "exact"
        if self.propagation == "dense":
            inputs = self.over(lambda h: self.teacher.inputs(window, h), self.dense) if window.matrices else self.dense
        else:
            inputs = self.over(lambda h: self.student.inputs(window, h), self.sparse) if window.matrices else self.sparse
        # What the teacher reads: the same, but for mixed propagation.
        given = inputs
        if self.propagation == "mixed":
            given = self.over(lambda h: self.teacher.inputs(window, h), self.dense)
        if exact and not window.matrices:
            # The teacher's run for the targets gathers, on the way, what each matrix inside the window reads.
            with self.amp:
                outputs, grams = gather(self.teacher, window, list(given[: self.count].split(self.schedule.batch_size)), "gram")
            if len(given) > self.count:
                outputs.append(self.over(lambda h: self.teacher.forward(window, h), given[self.count :]))
            return inputs, torch.cat(outputs), grams
        targets = self.over(lambda x: self.teacher.forward(window, x), given)
        grams = dict.fromkeys(window.matrices, _product(inputs[: self.count], inputs[: self.count])) if exact else {}
        return inputs, targets, grams

    @torch.no_grad()
    def solve_exactly(self, window: Window, inputs: Tensor, targets: Tensor, grams: dict[str, Tensor]) -> None:
        """Sets each matrix of the window to its masked least-squares solution."""
        dense = self.teacher.matrices(window)
        column = 0
        for name, matrix in self.student.matrices(window).items():
            rows = matrix.weight.shape[0]
            cross = dense[name].weight @ grams[name]
            if window.matrices and self.propagation == "mixed":
                # Targets are not the dense matrix's answer to these inputs, so their product is formed from both.
                wanted = targets[: self.count, :, column : column + rows].float()
                bias = getattr(matrix.module, "bias", None)
                cross = _product(wanted if bias is None else wanted - bias, inputs[: self.count])
            matrix.weight.copy_(masked_least_squares(matrix.weight, self.masks[name], grams[name], cross))
            column += rows

    def descend(self, window: Window, inputs: Tensor, targets: Tensor, parameters: dict[str, nn.Parameter]) -> list[float]:
        """Trains the window by gradient descent; returns the loss of every step."""
        matrices = self.student.matrices(window)
        with requiring_gradients(parameters.values()):
            return fit(
                lambda x: self.student.forward(window, x),
                list(parameters.values()),
                [(matrix.module.weight, matrix.oriented(self.masks[name])) for name, matrix in matrices.items()],
                inputs[: self.count],
                targets[: self.count],
                self.loss,
                self.schedule.scaled(len(window.blocks) ** -0.5),
                generator(self.seed, "shuffle", window.name),
                self.amp,
            )

    def errors(self, window: Window, inputs: Tensor, targets: Tensor) -> dict[str, float]:
        parts = {"calibration": slice(0, min(ERROR_SAMPLES, self.count)), "held_out": slice(self.count, None)}
        return {
            name: relative_error(self.over(lambda x: self.student.forward(window, x), inputs[part]), targets[part])
            for name, part in parts.items()
            if len(inputs[part])
        }

    def advance(self, window: Window, inputs: Tensor, targets: Tensor) -> None:
        """Moves the streams on to what the next window starts from."""
        if window.blocks[-1] == len(self.teacher.blocks) - 1 and window.ends_block:
            self.dense = self.sparse = None
            return
        if not window.chained and not window.ends_block:
            return
        block = Window(window.blocks)
        if self.dense is not None:
            self.dense = targets if window.chained else self.over(lambda h: self.teacher.forward(block, h), self.dense)
        if self.sparse is not None:
            whole = window if window.chained else block
            self.sparse = self.over(lambda h: self.student.forward(whole, h), self.sparse)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Mean over tokens of the outer product: left (samples, length, a), right (samples, length, b) -> (a, b) float32."""
    total = left.new_zeros(left.shape[-1], right.shape[-1], dtype=torch.float32)
    for a, b in zip(left, right, strict=True):
        total.addmm_(a.float().T, b.float())
    return total / (left.shape[0] * left.shape[1])


def summary(reports: list[WindowReport]) -> list[dict]:
    """The reports as plain data for a record."""
    return [asdict(report) for report in reports]
