"""The pass that repairs a pruned model, one window at a time, so that each matches the dense model's activations."""

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from recon.errors import ReconError
from recon.kernels.adapters import check_adapter
from recon.kernels.gradient_descent import Curve, Schedule
from recon.kernels.least_squares import Exact, masked_least_squares
from recon.kernels.losses import get_loss, relative_error
from recon.methods.adapters import adapted, check_adaptable
from recon.methods.fit import fit
from recon.methods.prune import check_alike, keep_masks
from recon.methods.statistics import gather
from recon.model.decoder import Decoder
from recon.model.discovery import take_apart
from recon.model.matrices import Matrix, stored
from recon.model.modules import requiring_gradients
from recon.model.windows import Window, canonical
from recon.runtime.activations import Activations
from recon.runtime.execution import Execution, in_batches
from recon.runtime.seeds import generator
from recon.runtime.store import MemoryStore

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
TRAINED = {
    "matrices": "the matrices of the window, with their biases",
    "all": "every parameter that the window's output depends on, norms included",
}
ERROR_SAMPLES = 2  # samples that a window's error is measured on before and after
# Larger windows take smaller steps: the learning rate is divided by this power of their number of halves. With no power, or
# the square root of the blocks, windows of 2 to 4 blocks of SmolLM2 get worse on held-out text; with the first, all 30 learn too little.
SLOWING = 0.75
ALIGNED = 16  # numbers in float32: parts of one piece of memory begin where tensors of their own would, at whole cache lines


@dataclass(frozen=True)
class WindowReport:
    """What became of one window. Errors are relative squared errors of its output, mean over tokens."""

    name: str
    parameters: int
    error_before: dict[str, float]  # on "held_out" samples or, where there are none, on "calibration" samples
    error_after: dict[str, float]
    losses: list[float]  # one per optimiser step, relative to the mean square of the targets
    gradient_norms: list[float]  # see `recon.kernels.gradient_descent.Curve`
    movement: float  # |after - before| / |before| over the window's matrices
    seconds: float
    # "repaired"; "restored" to what pruning left, where fitting gave numbers that are not finite; "rejected" and restored, where
    # the error on held-out samples grew
    status: str
    micro_batch: int = 0  # samples per forward pass; fewer than asked for where memory ran out; 0: no gradient descent


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
    exact: Exact = Exact(),
    train: str = "matrices",
    adapter: str = "none",
    rank: int = 16,
    activations: Activations | None = None,
    seed: int = 0,
    compute_dtype: str = "auto",
    device: torch.device | str | None = None,
    progress: bool = True,
    store: MemoryStore | None = None,
    executor: object = "serial",
) -> list[WindowReport]:
    """Repairs `model` in place against `dense`, window by window; the pruned weights stay exact zeros.

    Args:
        model: the pruned model, or its `Decoder`; same architecture as `dense`; parameters in float32.
        dense: the model as it was, left unchanged.
        samples: calibration tokens (samples, length).
        masks: keep-masks by matrix name, bool (out, in); default: wherever `model` is not zero, so that a model pruned by
            anything else can be repaired.
        granularity: matrix, half-block, block, <k>-blocks, quarter or model.
        schedule: a window of n half-blocks is trained with its learning rate divided by n ** `SLOWING`: steps add up along the
            depth, and at the rate that suits a block, a quarter of the model or all of it diverges.
        exact: how exact solutions are computed, where `solver` or `start` asks for them.
        propagation, solver, start, train: see `PROPAGATIONS`, `SOLVERS`, `STARTS`, `TRAINED`.
        adapter, rank: a low-rank parametrisation that is trained in place of the matrices; see `recon.kernels.adapters.ADAPTERS`.
        device: where to compute; default: where `dense` is. Both models stay where they are, but for the window in hand.
        activations: where passes over the same dense model and samples share what they know of it.
        held_out: tokens (samples, length), as long as `samples`, that nothing is fitted on, to measure errors on; a window whose error on the first
            `ERROR_SAMPLES` of them grows is put back.
        work: what is finished already, and where every finished window is noted; default: nothing, and nowhere.
        executor: "serial", or "ray" or `recon.Ray(...)`: workers then repair windows side by side, each with the weights of its
            window alone. Under dense propagation only: there no window depends on another.

    Raises:
        ReconError: an unknown name, a combination that has no meaning, a mask that does not fit, models that differ in more than
            their values, or a model not in float32.
    """
    from recon.experiment.ray_windows import _side_by_side, workers

    settings = workers(executor, propagation)
    teacher = take_apart(dense)
    check_alike(model.model if isinstance(model, Decoder) else model, teacher.model)
    student = take_apart(model, like=teacher)
    check_options(granularity, propagation, solver, start, loss, train, adapter, rank)
    teacher.check_length(samples.shape[1])
    if held_out is not None and held_out.shape[1] != samples.shape[1]:
        raise ReconError(
            f"held-out samples of {held_out.shape[1]} tokens are not as long as calibration samples, {samples.shape[1]}"
        )
    if adapter != "none":
        check_adaptable(student)
    store = store or MemoryStore()
    masks = keep_masks(student, masks)
    task = _Pass(
        teacher, student, masks, propagation, solver, start, loss, schedule, exact, train,
        adapter, rank, seed, Execution(device or teacher.device, compute_dtype, store), len(samples),
        Activations(limit=0) if activations is None else activations, store,
    )  # fmt: skip
    windows = teacher.windows(granularity)
    reports = [WindowReport(**found) for found in store.finished("reconstruct")]
    tokens = samples if held_out is None else torch.cat([samples, held_out[:ERROR_SAMPLES]])
    task.micro_batch = reports[-1].micro_batch if reports else 0
    if len(reports) < len(windows):
        task.begin(tokens)
    bar = tqdm(desc=f"reconstruct ({granularity})", unit="window", disable=not progress, initial=len(reports), total=len(windows))
    # Only the window in hand is trained; nothing else needs gradients.
    with bar, requiring_gradients(student.model.parameters(), False):
        left = windows[len(reports) :]
        for report in _side_by_side(task, left, tokens, settings) if settings else map(task.repair, left):
            reports.append(report)
            bar.update()
            before, after = (next(iter(error.values())) for error in (report.error_before, report.error_after))
            bar.set_postfix_str(f"error {before:.2g} -> {after:.2g}")
    rejected = sum(report.status == "rejected" for report in reports)
    if 2 * rejected > len(reports):
        log.warning(
            "%d of %d windows got worse on held-out text and were put back: the learning rate, %g, is probably too high for this "
            "model; try a third or a tenth of it",
            rejected, len(reports), schedule.learning_rate,
        )  # fmt: skip
    return reports


def check_options(
    granularity: str,
    propagation: str,
    solver: str,
    start: str,
    loss: str,
    train: str = "matrices",
    adapter: str = "none",
    rank: int = 16,
) -> None:
    """Raises `ReconError` for unknown names and for combinations that have no meaning."""
    for kind, value, known in (
        ("propagation", propagation, PROPAGATIONS),
        ("solver", solver, SOLVERS),
        ("start", start, STARTS),
        ("train", train, TRAINED),
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
    if adapter != "none":
        check_adapter(adapter, rank)
        if solver == "exact" or train == "all":
            raise ReconError(f"adapter {adapter!r} is all that is trained; it goes with solver adamw and train matrices")


@dataclass
class _Pass:
    """One sweep over the windows.

    A stream holds activations of all samples at one place of a model, (samples, length, width): calibration samples
    first, then held-out ones.
    """

    teacher: Decoder
    student: Decoder
    masks: dict[str, Tensor]
    propagation: str
    solver: str
    start: str
    loss: str
    schedule: Schedule
    exact: Exact
    train: str
    adapter: str
    rank: int
    seed: int
    execution: Execution
    count: int  # calibration samples
    activations: Activations
    store: MemoryStore
    micro_batch: int = 0  # samples that memory has sufficed for, where it ran out before

    def begin(self, tokens: Tensor) -> None:
        """Embeds `tokens` (samples, length), calibration samples first.

        Where windows are finished already, the streams are those that the next one starts from.
        """
        self.settle(*tokens.shape)
        if streams := self.store.streams("reconstruct"):
            self.dense, self.sparse = streams.get("dense"), streams.get("sparse")
            return
        embedded = self.known("embedded")
        if embedded is None:
            embedded = self.keep("embedded", self.execution.embed(self.teacher, tokens, self.count))
        self.dense = embedded if self.propagation in ("dense", "mixed") else None
        self.sparse = None
        if self.propagation in ("sparse", "mixed"):
            # Embeddings are not pruned, so both models start from the same activations, unless something else changed them.
            own = self.execution.embed(self.student, tokens, self.count)
            self.sparse = embedded if torch.equal(own, embedded) else own

    def settle(self, samples: int, length: int) -> None:
        """Decides what is measured and solved on which of all the `samples`, of `length` tokens each, held-out ones included."""
        # Errors are measured on held-out samples or, where there are none, on the first calibration samples.
        first = self.count if samples > self.count else 0
        self.measured = slice(first, min(first + ERROR_SAMPLES, samples))
        self.measured_on = "held_out" if first else "calibration"
        # Gram matrices of the dense model are then all that is fitted on, and inputs serve to measure errors alone.
        self.by_grams = self.solver == "exact" and self.propagation == "dense"
        # Samples that Gram matrices are made of: whole batches, so that outputs have the same bits however they come about.
        wanted = min(self.exact.samples or self.count, self.count)
        self.read = next(part.stop for part in in_batches(samples, length, self.count) if part.stop >= wanted)
        self.kept: dict[str, Tensor] = {}  # by name, what is known of the dense model around the window in hand

    def known(self, name: str) -> Tensor | None:
        """What this pass, or one before it in the same study, computed under `name`."""
        return self.kept[name] if name in self.kept else self.activations.get(name)

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        self.kept[name] = self.activations.put(name, tensor)
        return self.kept[name]

    def over(self, function: Callable[[Tensor], Tensor], stream: Tensor) -> Tensor:
        """`function` applied to `stream` (samples, ...) a batch at a time; no batch mixes calibration and held-out samples."""
        return self.execution.run(function, stream, self.count)

    def forward(self, decoder: Decoder, window: Window, stream: Tensor) -> Tensor:
        """The output of `window` for all of `stream`."""
        with self.execution.holding(decoder, window):
            return self.over(lambda h: decoder.forward(window, h), stream)

    def repair(self, window: Window) -> WindowReport:
        """Fits one window, measures it before and after, moves the streams on, and notes that it is finished."""
        began = time.perf_counter()
        inputs, targets, grams = self.task_of(window)
        with self.student.loaded(window):
            count, curve, before, after, moved, status = self.fit_and_measure(window, inputs, targets, grams)
            self.advance(window)
            report = WindowReport(
                window.name, count, before, after, curve.losses, curve.gradient_norms, moved, time.perf_counter() - began, status,
                curve.micro_batch,
            )  # fmt: skip
            shard = {name: parameter.detach() for name, parameter in self.student.parameters(window).items()}
            self.store.finish("reconstruct", asdict(report), {"dense": self.dense, "sparse": self.sparse}, shard=shard)
        return report

    def fit_and_measure(
        self, window: Window, inputs: Tensor, targets: Tensor, grams: dict[str, Tensor]
    ) -> tuple[int, Curve, dict[str, float], dict[str, float], float, str]:
        """Fits one window: how many numbers were trained, and how that went; its errors before and after; how far it moved; its status.

        What it does harm to is put back, and is then as it was before.
        """
        parameters = self.student.trained(window, self.train)
        backup = self.copied(parameters)
        before = self.error(window, inputs, targets)
        count, curve = self.fit(window, inputs, targets, grams, parameters)
        after, status = self.error(window, inputs, targets), "repaired"
        finite = {
            "weights": all(bool(parameter.isfinite().all()) for parameter in parameters.values()),
            "losses": all(map(math.isfinite, curve.losses)),
            "activations": all(map(math.isfinite, after.values())),
        }
        broken = [what for what, fine in finite.items() if not fine]
        if broken:
            log.warning(
                "window %r: fitting gave NaN or infinite %s; its pruned-only weights are restored", window.name, ", ".join(broken)
            )
            status = "restored"
        elif self.measured_on == "held_out" and not after["held_out"] <= before["held_out"]:
            # Too few steps at too high a rate do harm; text that was not fitted on tells.
            status = "rejected"
        if status != "repaired":
            after = before
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(backup[name])
        matrices = {matrix.parameter_name for matrix in self.student.matrices(window).values()}
        moved = sum((parameters[name].detach() - backup[name]).square().sum().item() for name in matrices)
        norm = sum(backup[name].square().sum().item() for name in matrices)
        return count, curve, before, after, (moved / max(norm, 1e-30)) ** 0.5, status

    def copied(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Copies of `parameters`, in one piece of memory: where there is room for large ones alone, such as on disk, it is one."""
        steps = [-(-p.numel() // ALIGNED) * ALIGNED for p in parameters.values()]
        room = self.store.empty((sum(steps),), torch.float32).split(steps)
        found = zip(parameters.items(), room, strict=True)
        return {name: part[: p.numel()].view(p.shape).copy_(p.detach()) for (name, p), part in found}

    def fit(
        self,
        window: Window,
        inputs: Tensor,
        targets: Tensor,
        grams: dict[str, Tensor],
        parameters: dict[str, nn.Parameter],
    ) -> tuple[int, Curve]:
        """Changes the window's `parameters`; returns how many numbers were trained, and how that went."""
        matrices = self.student.matrices(window)
        if self.adapter == "none":
            with self.execution.holding(self.student, window, parameters.values()):
                if grams:
                    self.solve_exactly(window, inputs, targets, grams)
                curve = self.descend(window, inputs, targets, parameters, matrices) if self.solver == "adamw" else Curve([], [])
            return sum(parameter.numel() for parameter in parameters.values()), curve
        if grams:
            with self.execution.holding(self.student, window, parameters.values()):
                self.solve_exactly(window, inputs, targets, grams)
        random = generator(self.seed, "adapters", window.name)
        with adapted(matrices.values(), self.masks, self.adapter, self.rank, random) as low_rank:
            with self.execution.holding(self.student, window, low_rank.values()):
                curve = self.descend(window, inputs, targets, low_rank, {})
            return sum(parameter.numel() for parameter in low_rank.values()), curve

    def task_of(self, window: Window) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The window's inputs and targets for all samples, and, where matrices are solved exactly, their Gram matrices."""
        exact = self.solver == "exact" or self.start == "exact"
        if self.propagation == "dense":
            grams = self.dense_grams(window) if exact else {}
            if not window.matrices:
                return self.dense, self.dense_output(window), grams
            inputs = self.dense_inputs(window)
            return inputs, self.forward(self.teacher, window, inputs), grams
        inputs = self.inputs(self.student, window, self.sparse)
        # The teacher reads the same, but for mixed propagation.
        given = self.inputs(self.teacher, window, self.dense) if self.propagation == "mixed" else inputs
        grams = {}
        if exact and window.matrices:
            grams = dict.fromkeys(window.matrices, _product(inputs[: self.read], inputs[: self.read]))
        elif exact:
            grams = self.gathered(window, given)[1]
        if self.propagation == "mixed" and not window.matrices:
            return inputs, self.dense_output(window), grams
        return inputs, self.forward(self.teacher, window, given), grams

    def inputs(self, decoder: Decoder, window: Window, stream: Tensor) -> Tensor:
        """What `window` reads where its block (or half) reads `stream`."""
        if not window.matrices:
            return stream
        with self.execution.holding(decoder, Window(window.blocks)):
            return self.over(lambda h: decoder.inputs(window, h), stream)

    def dense_output(self, window: Window) -> Tensor:
        """The dense model's own activations after `window`, of blocks or a half."""
        known = self.known(_place(window))
        return self.keep(_place(window), self.forward(self.teacher, window, self.dense)) if known is None else known

    def dense_inputs(self, window: Window) -> Tensor:
        """What the matrices of `window` read in the dense model; one run of the block tells it for all of its groups."""
        group = next(g for g in self.teacher.groups[window.blocks[0]] if window.matrices[0] in g)
        if f"input of {group[0]}" not in self.kept:
            block, seen = Window(window.blocks), {}

            def see(group: tuple[str, ...], x: Tensor) -> None:
                x = x.detach().reshape(-1, x.shape[-1])
                if group not in seen:
                    # Matrices multiply what is rounded to the compute dtype, so nothing is lost by keeping that.
                    seen[group] = self.execution.empty((*stream.shape[:2], x.shape[1]), self.execution.dtype, stream.device)
                    filled[group] = 0
                seen[group].flatten(0, 1)[filled[group] : filled[group] + len(x)] = x
                filled[group] += len(x)

            def forget() -> None:
                for group in filled:
                    filled[group] = 0

            stream, filled = self.dense[self.measured] if self.by_grams else self.dense, {}
            with self.teacher.watching(block, see), self.execution.holding(self.teacher, block):
                outputs = self.execution.run(partial(self.teacher.forward, block), stream, self.count, forget)
            if not self.by_grams:
                self.keep(_place(block), outputs)
            # Kept for this block only: they are larger than the stream that they come from.
            self.kept |= {f"input of {first}": x for (first, *_), x in seen.items()}
        return self.kept[f"input of {group[0]}"]

    def dense_grams(self, window: Window) -> dict[str, Tensor]:
        """Gram matrices of what the matrices of `window` read in the dense model; one run tells all those of a block."""
        # Matrices that share an input share its Gram matrix, which is kept once, under the first one's name.
        first = {name: group[0] for index in window.blocks for group in self.teacher.groups[index] for name in group}
        place = {name: f"gram of {first[name]}, {self.read} samples" for name in self.teacher.matrices(window)}
        if any(self.known(key) is None for key in place.values()):
            whole = Window(window.blocks) if window.matrices else window
            outputs, found = self.gathered(whole, self.dense)
            if self.known(_place(whole)) is None:
                self.keep(_place(whole), outputs)
            for name, gram in found.items():
                if name == first[name]:
                    self.keep(f"gram of {name}, {self.read} samples", gram)
        return {name: gram for name, key in place.items() if (gram := self.known(key)) is not None}

    def gathered(self, window: Window, stream: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's outputs of `window`, of blocks or a half, for `stream`, and Gram matrices on its first samples."""
        outputs, grams = gather(self.execution, self.teacher, window, stream[: self.read], "gram")
        if len(rest := stream[self.read :]):
            with self.execution.holding(self.teacher, window):
                forward, edge = partial(self.teacher.forward, window), self.count - self.read
                parts = [outputs, self.execution.run(forward, rest, edge)]
                outputs = self.execution.empty((*stream.shape[:2], outputs.shape[-1]), outputs.dtype, stream.device)
                torch.cat(parts, out=outputs)
        return outputs, grams

    @torch.no_grad()
    def solve_exactly(self, window: Window, inputs: Tensor, targets: Tensor, grams: dict[str, Tensor]) -> None:
        """Sets each matrix of the window to its masked least-squares solution."""
        dense = self.teacher.matrices(window)
        column = 0
        with self.teacher.loaded(window):
            for name, matrix in self.student.matrices(window).items():
                if name not in grams:  # an expert that too few tokens are sent to
                    continue
                rows = matrix.weight.shape[0]
                gram = grams[name].to(matrix.weight.device)
                cross = dense[name].weight.to(gram.device) @ gram
                bias, dense_bias = (getattr(m.module, "bias", None) for m in (matrix, dense[name]))
                if window.matrices and self.propagation == "mixed":
                    # Targets are not the dense matrix's answer to these inputs, so their product is formed from both.
                    wanted = targets[: self.read, :, column : column + rows].float()
                    cross = _product(wanted if bias is None else wanted - bias, inputs[: self.read])
                elif bias is not None:
                    # Weights alone are fitted, to the dense matrix's product: a bias that pruning put there would come on top.
                    bias.copy_(torch.zeros_like(bias) if dense_bias is None else dense_bias)
                mask = self.masks[name].to(gram.device)
                matrix.weight.copy_(masked_least_squares(matrix.weight, mask, gram, cross.to(gram.device), self.exact.iterations))
                column += rows

    def descend(
        self, window: Window, inputs: Tensor, targets: Tensor, parameters: dict[str, nn.Parameter], masked: dict[str, Matrix]
    ) -> Curve:
        """Trains `parameters` of the window by gradient descent; those of the matrices `masked` keep their zeros."""
        inputs, targets = inputs[: self.count], targets[: self.count]
        if self.schedule.pieces > 1 and (window.matrices or window.half == "mlp"):
            inputs, targets = (t.unflatten(1, (self.schedule.pieces, -1)).flatten(0, 1) for t in (inputs, targets))
        # Experts' parts of one parameter that are multiplied one by one.
        alone = {name: matrix for name, matrix in masked.items() if matrix.expert is not None and matrix.alone}
        device = self.execution.device
        # Each expert's matrix as a parameter of its own, in the same memory: the gradient of the parameter that holds
        # them all would be made anew, in full, for every expert.
        leaves = {name: nn.Parameter(matrix.part.detach()) for name, matrix in alone.items()}
        holders = {matrix.parameter_name for matrix in alone.values()}
        rest = [parameter for name, parameter in parameters.items() if name not in holders]
        others = {name: matrix for name, matrix in masked.items() if name not in alone}
        masks = stored(others, self.masks, device)
        masks += [(leaf, alone[name].oriented(self.masks[name]).to(device)) for name, leaf in leaves.items()]
        using = self.student.using(window, leaves) if alone else contextlib.nullcontext()

        def forward(x: Tensor) -> Tensor:
            with using:
                return self.student.forward(window, x)

        try:
            with requiring_gradients(rest):
                curve = fit(
                    forward, [*rest, *leaves.values()], masks, inputs, targets, self.loss, self.schedule.scaled(window.halves**-SLOWING),
                    generator(self.seed, "shuffle", window.name), self.execution, self.micro_batch,
                )  # fmt: skip
        except ReconError as error:
            raise ReconError(f"window {window.name!r}: {error}") from error
        self.micro_batch = curve.micro_batch
        return curve

    def error(self, window: Window, inputs: Tensor, targets: Tensor) -> dict[str, float]:
        """The relative error of the window's output on the samples that errors are measured on."""
        if not self.by_grams:
            inputs, targets = inputs[self.measured], targets[self.measured]
        return {self.measured_on: relative_error(self.forward(self.student, window, inputs), targets)}

    def advance(self, window: Window) -> None:
        """Moves the streams on to what the next window starts from."""
        if window.blocks[-1] == len(self.teacher.blocks) - 1 and window.ends_block:
            self.dense = self.sparse = None
        elif window.chained or window.ends_block:
            whole = window if window.chained else Window(window.blocks)
            if self.dense is not None:
                self.dense = self.dense_output(whole)
            if self.sparse is not None:
                self.sparse = self.forward(self.student, whole, self.sparse)
        if window.ends_block:
            self.kept.clear()
            self.activations.release()


def _place(window: Window) -> str:
    """Where the output of `window`, of blocks or a half, lies in the dense model: the same for windows that end at one place."""
    inside = window.half and not (window.chained and window.ends_block)
    return f"block {window.blocks[-1]}" + (f" {window.half}" if inside else "")


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Mean over tokens of the outer product: left (samples, length, a), right (samples, length, b) -> (a, b) float32."""
    total = left.new_zeros(left.shape[-1], right.shape[-1], dtype=torch.float32)
    for a, b in zip(left, right, strict=True):
        total.addmm_(a.float().T, b.float())
    return total / left.shape[:2].numel()


def summary(reports: list[WindowReport]) -> list[dict]:
    """The reports as plain data for a record."""
    return [asdict(report) for report in reports]
