"""Reconstruction: fits a pruned model to the dense one, one window after another.

For a window f with weights theta, mask M, inputs X and targets Y (chosen by propagation: `recon.methods.propagation`),

    min over theta  E || (f(X; M * theta) - Y) / sigma ||^2        sigma: standard deviation of each channel of Y

(or another loss, see `recon.kernels.losses`; the paper's loss has no sigma).

A Free Lunch in LLM Compression, arXiv 2510.14444, method section.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from recon.config import PruningConfig, ReconstructionConfig, two_passes
from recon.errors import ReconError, check_kind, log
from recon.kernels.gradient_descent import Trained, trained
from recon.kernels.least_squares import masked_least_squares
from recon.kernels.losses import LOSSES, channel_variance, position_weights, unexplained
from recon.kernels.moments import mean_product
from recon.methods.masks import check_apart, check_shapes, check_zeros, keep_masks
from recon.methods.propagation import Streams
from recon.methods.prune import Pruner
from recon.methods.samples import ERROR_SAMPLES, with_held_out
from recon.methods.training import NOT_FINITE, Callback, Report, adapted, check_trainable, settle, train
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.model.modules import requiring_gradients
from recon.model.structure import factors, stored
from recon.model.windows import Window
from recon.runtime.execution import Execution
from recon.runtime.seeds import generator

TOKENS = 2**17  # that the variance of channels is computed from
# The status of a window; `NOT_FINITE` is another. A window that is rolled back has the weights that pruning left.
RECONSTRUCTED, GREW = "reconstructed", "rolled back: error grew"


@dataclass(frozen=True, kw_only=True)
class WindowReport(Report):
    """The result for one window. Errors: the unexplained share of its targets' variance; see `recon.kernels.losses`."""

    name: str
    error_before: dict[str, float]  # on "held_out" samples or, if there are none, on "calibration" samples
    error_after: dict[str, float]


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

    model: the pruned model, or its `Decoder`; same architecture as `dense`; parameters of both in float32.
    dense: the model before pruning, left unchanged.
    samples: calibration tokens (samples, length), or batches of them; see `recon.methods.samples`.
    masks: keep-masks by matrix name, bool (out, in); default: wherever `model` is not zero.
    pruning: if given, pruning is part of the same pass: `model` is a copy of `dense`, and each window is pruned before it is
        fitted, from statistics of what it reads in the dense model.
    held_out: tokens (samples, length), of the same length as `samples`, that nothing is fitted on. A window is rolled back if its
        error on the first `recon.methods.samples.ERROR_SAMPLES` of them grows, unless `config.roll_back` is False.
    execution: where and in what precision to compute; default: where `dense` is.
    callbacks: receive each window's report, and the masks that pruning made.

    Returns the reports of all windows, in the order in which they were fitted. Raises `ReconError` for models, masks, samples and
    options that do not fit together, naming what does not.
    """
    check_kind("config", config, ReconstructionConfig)
    check_kind("pruning", pruning or PruningConfig(), PruningConfig)
    teacher = decompose(dense)
    whole = (model.model if isinstance(model, Decoder) else model), teacher.model
    check_apart(*whole)
    check_shapes("the pruned model's", *(dict(each.named_parameters(remove_duplicate=False)) for each in whole))
    student = decompose(model, like=teacher)
    execution = Execution.of(teacher, execution)
    check_trainable(student, config.adapter)
    check_trainable(teacher, "none")
    tokens, count = with_held_out(samples, held_out)
    teacher.check_length(length := tokens.shape[1])
    windows, pruner = teacher.windows(config.granularity), None
    if pruning is None:
        given, masks = masks, keep_masks(student, masks)
        if given is None:
            sizes = sum(mask.numel() for mask in masks.values())
            check_zeros("model", sizes - sum(int(mask.sum()) for mask in masks.values()), sizes)
    elif masks is not None:
        raise ReconError("both masks and pruning are given; leave one out")
    else:
        if why := two_passes(pruning, config, count) or "workers fit windows side by side" * bool(execution.loop):
            raise ReconError(f"windows cannot be pruned as reconstruction reaches them: {why}; prune with `recon.prune` first")
        pruner = Pruner(student, pruning.on(count), seed, execution)
        pruner.prepare(tokens[:count])
        masks = execution.storage.masks
    reconstruction = Reconstruction(teacher, student, masks, config, count, seed, execution, pruner)
    reports = [WindowReport(**noted) for noted in execution.storage.finished("reconstruct")]
    if left := windows[len(reports) :]:
        reconstruction.streams.begin(config.propagation, tokens, execution.storage.streams("reconstruct"))
        chunks = max(config.chunks_of(window, length) for window in windows)
        if chunks > 1:  # finds the blocks' arguments now: it loads the embedding, and later a window is in memory, too
            student.call(torch.empty(min(config.batch_size, count * chunks), length // chunks, 0, device=execution.device))
    name = f"{'prune and ' if pruner else ''}reconstruct ({config.granularity})"
    bar = tqdm(desc=name, unit="window", disable=not execution.progress, initial=len(reports), total=len(windows))
    # Only the current window is trained; nothing else needs gradients.
    with bar, requiring_gradients(student.model.parameters(), False):
        for report in (execution.loop or one_after_another)(reconstruction, left):
            reports.append(report)
            bar.update()
            before, after = (next(iter(error.values())) for error in (report.error_before, report.error_after))
            bar.set_postfix_str(f"error {before:.2g} -> {after:.2g}")
            for callback in callbacks:
                callback.on_window(report)
    if pruner:
        made = pruner.summed_up()
        for callback in callbacks:
            callback.on_pruned(made)
    worse = sum(report.status != RECONSTRUCTED for report in reports)
    if 2 * worse > len(reports):
        why = f"the learning rate, {config.learning_rate:g}, is too high" if config.solver == "adamw" else "samples are too few"
        log.warning("%d of %d windows got worse and were rolled back: %s", worse, len(reports), why)
    return reports


def one_after_another(reconstruction: "Reconstruction", windows: Sequence[Window]) -> Iterator[WindowReport]:
    """The loop over windows. For each: inputs and targets by propagation, a mask, a start, a fit; then on to the next."""
    student, streams, pruner = reconstruction.student, reconstruction.streams, reconstruction.pruner
    for f in windows:
        began = time.perf_counter()
        X, Y, statistics = streams.task(reconstruction.config.propagation, f)
        with student.loaded(f):
            if pruner:
                pruner.visit(f, statistics)
            report = reconstruction.fit(f, X, Y, statistics)
            streams.advance(f)
            yield reconstruction.finish(f, report, time.perf_counter() - began)


@dataclass
class Reconstruction:
    """The steps of a loop over windows: for each window `streams.task`, `fit`, `streams.advance` and `finish`, in this order.

    `execution.loop` replaces the loop `one_after_another`. Under dense propagation, windows do not depend on one another, so each
    can be fitted anywhere, by another `Reconstruction` whose `streams.dense` is set to the dense stream that this window starts
    from. `finish` then takes the results, in the order of the windows.
    """

    teacher: Decoder  # the dense model, which stays unchanged
    student: Decoder  # the pruned one, whose parameters change in place
    masks: dict[str, Tensor]  # keep-masks M by matrix name, bool (out, in)
    config: ReconstructionConfig
    count: int  # number of calibration samples; later ones are held out
    seed: int
    execution: Execution
    pruner: Pruner | None = None  # prunes each window before it is fitted; None: all are pruned already

    def __post_init__(self):
        self.exact = "exact" in (self.config.solver, self.config.start)
        # For these windows, `_solve_exactly` forms Gram matrices itself, from what the student reads.
        own = self.config.granularity == "matrix" and self.config.propagation != "dense"
        statistics = "gram" if self.exact and not own else self.pruner.config.gathers if self.pruner else "none"
        self.streams = Streams(self.teacher, self.student, self.execution, self.count, statistics)

    def fit(self, f: Window, X: Tensor, Y: Tensor, statistics: dict[str, Tensor]) -> WindowReport:
        """Fits one window, measures its error before and after, and rolls it back if the error grew or became non-finite.

        statistics: of what its matrices read, by matrix name; Gram matrices if the window is solved exactly.
        """
        config, theta = self.config, self.student.trained(f, self.config.train)
        variance = channel_variance(Y[: min(-(-TOKENS // Y.shape[1]), self.count)])  # sigma^2
        pruned = {name: self.execution.storage.empty(p.shape, p.dtype).copy_(p.detach()) for name, p in theta.items()}
        before, count, losses, batch = self._error(f, X, Y, variance), sum(p.numel() for p in theta.values()), [], 0
        if self.exact:
            self._solve_exactly(f, X, Y, statistics, theta)
        if config.solver == "adamw" and theta:
            count, losses = self._descend(f, X, Y, variance, theta)
            batch = min(self.execution.micro_batch or config.batch_size, config.batch_size)
        after = self._error(f, X, Y, variance)
        # Only held-out samples show that the learning rate is too high.
        grew = config.roll_back and "held_out" in after and after["held_out"] > before["held_out"]
        fine = settle(f"window {f.name!r}", theta, pruned, [*losses, *after.values()], keep=not grew)
        status = GREW if fine and grew else RECONSTRUCTED if fine else NOT_FINITE
        errors = {"error_before": before, "error_after": after if status == RECONSTRUCTED else before}
        return WindowReport(count, losses, 0.0, status, batch, name=f.name, **errors)

    def finish(
        self, f: Window, report: WindowReport, seconds: float, streams: dict[str, Tensor | None] | None = None
    ) -> WindowReport:
        """Stores the finished `f`, whose weights are in memory; streams: what the next window starts from, if not the current."""
        noted = asdict(report) | {"seconds": seconds}
        tensors = {name: parameter.detach() for name, parameter in self.student.parameters(f).items()}
        streams = streams or {"dense": self.streams.dense, "sparse": self.streams.sparse}
        self.execution.storage.finish("reconstruct", noted, streams, tensors)
        return WindowReport(**noted)

    # --- one window -------------------------------------------------------------------------------------------------

    def _error(self, f: Window, X: Tensor, Y: Tensor, variance: Tensor) -> dict[str, float]:
        """The error of f(X) on held-out samples or, if there are none, on the first calibration samples."""
        on, measured = ("held_out", slice(self.count, None)) if len(X) > self.count else ("calibration", slice(ERROR_SAMPLES))
        return {on: unexplained(self.execution.forward(self.student, f, X[measured], self.count), Y[measured], variance)}

    @torch.no_grad()
    def _solve_exactly(self, f: Window, X: Tensor, Y: Tensor, grams: dict[str, Tensor], theta: dict[str, nn.Parameter]) -> None:
        """Sets each matrix of the window to its masked least-squares solution; see `recon.kernels.least_squares`."""
        dense, column = self.teacher.matrices(f), 0
        if f.matrices and self.config.propagation != "dense":
            grams = dict.fromkeys(f.matrices, self._mean_product(X, X))
        with self.execution.holding(self.student, f, theta.values()), self.teacher.loaded(f):
            for name, matrix in self.student.matrices(f).items():
                if name not in grams:  # an expert that too few tokens are sent to
                    continue
                gram, mask = (each[name].to(matrix.weight.device) for each in (grams, self.masks))
                cross, rows = dense[name].weight.to(gram) @ gram, len(mask)
                bias, dense_bias = (getattr(m.module, "bias", None) for m in (matrix, dense[name]))
                if f.matrices and self.config.propagation == "mixed":
                    # Targets are not the dense matrix's outputs for these inputs, so the cross product is formed from both.
                    cross = self._mean_product(Y[..., column : column + rows], X)
                    if bias is not None:
                        cross -= torch.outer(bias, X[: self.count].mean((0, 1), dtype=torch.float32).to(bias.device))
                elif bias is not None:
                    # Only weights are fitted, to the dense product. A bias that pruning changed is set back to the dense one.
                    bias.copy_(torch.zeros_like(bias) if dense_bias is None else dense_bias)
                matrix.weight.copy_(masked_least_squares(matrix.weight, mask, gram, cross, self.config.exact_iterations))
                column += rows

    def _mean_product(self, left: Tensor, right: Tensor) -> Tensor:
        """`mean_product` of the calibration samples of two streams, one sample at a time on the compute device."""
        return mean_product(self.execution.batches([left, right], [range(i, i + 1) for i in range(self.count)]))

    def _descend(
        self, f: Window, X: Tensor, Y: Tensor, variance: Tensor, theta: dict[str, nn.Parameter]
    ) -> tuple[int, list[float]]:
        """Trains the window by gradient descent on calibration samples; returns how many elements, and each step's loss."""
        config, count, length, distance = self.config, self.count, X.shape[1], LOSSES[self.config.loss]
        weights = position_weights(config.first_position, distance, Y[:count], variance)
        data = [X[:count], Y[:count], weights.expand(count, -1)]
        chunks = config.chunks_of(f, length)  # if tokens are not mixed: more steps for the same work
        data = [each.unflatten(1, (chunks, -1)).flatten(0, 1) for each in data]
        variance = variance.to(self.execution.device)

        def loss(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
            with self.execution.autocast():
                output = self.student.forward(f, x)
            return (distance(output.flatten(2), y.flatten(2), variance) * weight).mean()  # a token may have several vectors

        schedule, random = config.schedule(count, f), generator(self.seed, "shuffle", f.name)
        with self._trained(f, theta) as parameters:
            losses = train(loss, data, parameters, schedule, random, self.execution)
        return sum(each.parameter.numel() for each in parameters), losses

    @contextlib.contextmanager
    def _trained(self, f: Window, theta: dict[str, nn.Parameter]) -> Iterator[list[Trained]]:
        """Context that yields what gradient descent trains in window `f`, theta or adapters, on the compute device."""
        config, matrices, device = self.config, self.student.matrices(f), self.execution.device
        with self.execution.holding(self.student, f, theta.values()):
            if config.adapter != "none":
                draw = generator(self.seed, "adapters", f.name)
                with adapted([*matrices.values()], self.masks, config.adapter, config.rank, draw) as low_rank:
                    yield low_rank
                return
            # Experts that share a parameter but are multiplied one by one: each becomes a parameter of its own, in the same
            # memory. Otherwise every expert would create a full gradient of the shared parameter.
            alone = {name: matrix for name, matrix in matrices.items() if matrix.expert is not None and matrix.alone}
            leaves = {name: nn.Parameter(matrix.part_of(matrix.parameter).detach()) for name, matrix in alone.items()}
            held = {matrix.parameter_name for matrix in alone.values()}
            rest = [parameter for name, parameter in theta.items() if name not in held]
            masks = dict(stored({name: matrix for name, matrix in matrices.items() if name not in alone}, self.masks, device))
            masks |= {leaf: factors(alone[name].oriented(self.masks[name]), device) for name, leaf in leaves.items()}
            with requiring_gradients(rest), self.student.fused_products(f, use=leaves) if alone else contextlib.nullcontext():
                biases = {theta[name] for name in theta.keys() & {matrix.bias_name for matrix in matrices.values()}}
                yield trained([*rest, *leaves.values()], masks, biases)
