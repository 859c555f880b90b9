"""One run: prune, reconstruct, retrain and measure one model, from a specification to a record."""

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from recon.data import files, models
from recon.errors import ReconError
from recon.evaluate import zero_shot
from recon.evaluate.perplexity import perplexity
from recon.kernels.patterns import Pattern, found_pattern
from recon.methods import external_mask, prune
from recon.methods.adapters import check_adaptable
from recon.methods.callbacks import Callback
from recon.methods.reconstruct import reconstruct
from recon.methods.retrain import retrain
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.model.skeleton import Lazy
from recon.runtime import device, student
from recon.runtime.execution import Execution
from recon.runtime.lock import locked
from recon.runtime.storage import Storage, write_json
from recon.study import checkpoint, dense_cache, plan, report, side_by_side, streaming
from recon.study.cluster import settings
from recon.study.environment import environment
from recon.study.measure import Measured, Measurement, count_zeros
from recon.study.record import RunRecord
from recon.study.session import Session
from recon.study.spec import RunOptions, RunSpec
from recon.study.texts import Texts

log = logging.getLogger("recon")
Step = tuple[dict, dict[str, Tensor]]  # what a step found, as JSON can hold it, and activations to keep with it


class RunResult(NamedTuple):
    """What a run gives.

    model: the reconstructed model; None where it was streamed, or saved by an earlier call: then it is in the folder.
    """

    record: RunRecord
    model: PreTrainedModel | None


@dataclass(frozen=True)
class Pruned:
    """A pruned state, and what it took. `storage` holds the parameters that pruning changed other than by zeroing."""

    pruning: prune.Pruning
    seconds: float
    peak: int  # bytes
    storage: Storage


def run(
    spec: RunSpec,
    options: RunOptions = RunOptions(),
    *,
    session: Session | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Prunes, reconstructs and measures one model as `spec` says.

    A streamed run leaves its models on disk and works on one window at a time, in the folder `<save>.unfinished`, or in one in the cache
    that is named by its key; the same call goes on after the last finished window. The folder is deleted when the run is done.

    Args:
        options: how it is carried out: where the model is saved, whether it is streamed, on what it is computed.
        session: what earlier runs left in memory to share.
        callbacks: told of windows and training steps, and of the record once it is done and the model is saved.

    Raises:
        ReconError: bad input, a run that cannot fit here, or another process that does the same run; before anything long begins.
    """
    spec, session, save = spec.resolved(), session or Session(), options.save
    side_by_side.loop(options.executor, spec.reconstruction.propagation)  # refuses what it must, before anything long begins
    if spec.evaluation.tasks:
        zero_shot.check_tasks(spec.evaluation.tasks)
    key, record, model, folder = spec.key(), None, None, None
    with contextlib.ExitStack() as stack:
        if save:
            stack.enter_context(locked(save.with_name(f".{save.name}.lock"), f"save folder {str(save)!r}"))
            record = checkpoint.finished(save, key, options.save_dtype)
        if record is None:
            if save:
                checkpoint.check_target(save)
            streamed = streaming.decide(spec, options, session)
            if not streaming.begun(spec, save):
                plan.check(spec, options, session.bytes_loaded(spec))
            if streamed:
                folder = streaming.work_folder(key, save)
                log.info("finished windows are in %r until the run is done; it may be deleted, to begin anew", str(folder))
            if streamed and not save:
                stack.enter_context(locked(folder.with_name(f".{key}.lock"), f"work folder {str(folder)!r}"))
            going = _Run(spec, options, session, folder, callbacks)
            try:
                record, model = going.execute()
            except ReconError:
                going.storage.delete(begun=False)  # refused: it would stand in the way of another try
                raise
        for callback in callbacks:
            callback.on_done(record)
        if folder:
            going.storage.delete()
    return RunResult(record, model)


class _Run:
    """A run that is not done yet. folder: where it is streamed, for its finished windows."""

    def __init__(self, spec: RunSpec, options: RunOptions, session: Session, folder: Path | None, callbacks: Sequence[Callback]):
        self.spec, self.options, self.session, self.folder, self.callbacks = spec, options, session, folder, callbacks
        self.record, self.began = RunRecord(spec.flat(), spec.key()), time.perf_counter()
        self.device = device.pick_device(spec.compute.device)
        self.dtype = device.pick_compute_dtype(spec.compute.compute_dtype, self.device)
        self.storage = Storage(folder, self.record.key, keep=["prune"])
        session.reused.clear()

    def execute(self) -> tuple[RunRecord, PreTrainedModel | None]:
        """The whole pipeline, dense model first, so that a wrong set-up shows before anything is pruned."""
        spec, record = self.spec, self.record
        with self.phase("load"):
            self.load()
        resumed = bool(self.storage.finished("dense"))
        with self.phase("evaluate"):
            dense, states = self.measure_dense()
        model = self.student()
        record.seconds |= {"prune": 0.0, "reconstruct": 0.0, "retrain": 0.0}
        one_pass = spec.one_pass and not settings(self.options.executor) and not self.session.holds("pruned", self.key("prune"))
        if one_pass:
            found = self.prune_and_reconstruct(model)
            left = student.student(self.dense, self.storage, phases=["prune"])
        else:
            found, left = self.prune(model), model
        record.seconds["prune"], record.peak_memory_bytes_by_phase["prune"] = found.seconds, found.peak
        with self.phase("evaluate"):
            pruned = final = self.measure("pruned", self.key("pruned"), left, states)
        masks = found.pruning.masks
        if spec.reconstruction.granularity != "none" and not one_pass:
            self.reconstruct(model, masks=masks)
        if spec.retraining.retrain != "none":
            self.retrain(model, masks)
        if record.windows or record.retraining:
            with self.phase("evaluate"):
                final = self.measure("reconstructed", None, model, states)
        record.metrics |= report.metrics(spec, dense, pruned, final) | self.step("counted", None, lambda: count_zeros(model))[0]
        record.metrics["under_calibrated_matrices"] = found.pruning.under_calibrated
        if self.external:
            record.metrics["pattern"] = str(found_pattern(masks.values()))
        record.tokens = report.tokens(spec, self.texts, dense)
        record.flops, record.window_memory_bytes = plan.flops(spec), plan.window_memory(self.dense, spec, self.device)
        record.protocol = report.protocol(spec, self.texts, self.dense, self.dtype)
        record.shared = list(self.session.reused)
        streamed = {"streamed": True, "resumed": resumed} if self.folder else {}
        record.environment = environment(self.device, spec.compute.compute_dtype) | streamed
        record.peak_memory_bytes = max(record.peak_memory_bytes_by_phase.values())
        record.status, record.seconds["total"] = "done", time.perf_counter() - self.began
        if self.options.save:
            self.save(model)
        return record, None if self.folder else model.model

    # --- before anything is computed ------------------------------------------------------------------------------

    def load(self) -> None:
        """Loads model and texts, and refuses here whatever can be refused."""
        spec, save = self.spec, self.options.save
        if self.folder:
            self.session.clear()  # what earlier runs have in memory is of no use
            model, stored, self.tokenizer = models.skeleton(*spec.loaded_by, self.folder)
            self.dense = decompose(model, lazy=Lazy(model, stored.read))
        else:
            self.dense, self.tokenizer = self.session.load(*spec.loaded_by)
        self.external = self.session.keep("external mask", spec.pruned_by, self.open_external) if spec.model.pruned else None
        self.check_fits()
        if save:
            touched = [] if self.external else prune.touched_biases(self.dense, spec.pruning.criterion)
            checkpoint.check_places(self.dense.model, touched)
            checkpoint.check_range(self.dense, self.options.save_dtype)
        self.texts = Texts.draw(spec, self.tokenizer)
        self.measurement = Measurement(spec.evaluation, self.texts, self.tokenizer, self.dense)

    def open_external(self):
        """The model that something else pruned, checked but not read into memory."""
        model = self.spec.model
        opened = models.load_pruned(model.pruned, self.dense.model, model.pruned_revision, model.trust_remote_code, self.folder)
        external_mask.check_pruned(self.dense, opened)
        return opened

    def check_fits(self) -> None:
        """Raises `ReconError` for what this model cannot do: windows, adapters, patterns, lengths, tasks."""
        spec, dense = self.spec, self.dense
        dense.windows(spec.reconstruction.granularity if spec.reconstruction.granularity != "none" else "block")
        if spec.reconstruction.adapter != "none" or spec.retraining.retrain not in ("none", "full", "norms"):
            check_adaptable(dense)
        if not spec.model.pruned:
            prune.touched_biases(dense, spec.pruning.criterion)
            for name, matrix in dense.matrices().items():
                Pattern.parse(spec.pruning.pattern).check_columns(name, matrix.weight.shape[1])
        for length in (spec.calibration.sequence_length, spec.evaluation.evaluation_length):
            dense.check_length(length)
        if spec.evaluation.tasks:
            zero_shot.check_model(dense)

    def student(self) -> Decoder:
        """The model to be pruned: a copy of the dense one; streamed, a skeleton of it, or of the one that something else pruned."""
        if self.folder is None:
            return decompose(copy.deepcopy(self.dense.model), like=self.dense)
        return student.student(self.dense, self.storage, self.external and self.external.read)

    # --- phases ---------------------------------------------------------------------------------------------------

    def prune(self, model: Decoder) -> Pruned:
        """Prunes the model in place in a pass of its own, or as a run of the session did, or takes over the external model."""
        key = self.key("prune")
        found = (
            self._prune(model) if self.folder or self.external else self.session.keep("pruned", key, lambda: self._prune(model))
        )
        if found.storage is not self.storage:
            prune.apply(model, found.pruning, found.storage.tensors("prune"))
        return found

    def _prune(self, model: Decoder) -> Pruned:
        spec, began = self.spec, time.perf_counter()
        with device.PeakMemory(self.device, anonymous=self.folder is not None) as peak:
            if self.external:
                found = external_mask.take_over(model, self.external, self.execution())
            else:
                found = prune.prune(model, self.samples("prune"), spec.pruning, seed=spec.seed, execution=self.execution())
        return Pruned(found, time.perf_counter() - began, peak.bytes, self.storage)

    def prune_and_reconstruct(self, model: Decoder) -> Pruned:
        """Prunes and reconstructs the model in one pass; the seconds of pruning are those of making masks."""
        found = []

        class Found(Callback):
            def on_pruned(self, pruning) -> None:
                found.append(pruning)

        self.reconstruct(model, [Found()], pruning=self.spec.pruning)
        self.record.seconds["reconstruct"] -= found[0].seconds
        peak = self.record.peak_memory_bytes_by_phase["reconstruct"]
        return self.session.keep("pruned", self.key("prune"), lambda: Pruned(found[0], found[0].seconds, peak, self.storage))

    def reconstruct(self, model: Decoder, callbacks: Sequence[Callback] = (), **pruned: object) -> None:
        """pruned: the masks, or how to prune; see `recon.reconstruct`."""
        spec = self.spec
        execution = self.execution(side_by_side.loop(self.options.executor, spec.reconstruction.propagation))
        with self.phase("reconstruct"):
            reports = reconstruct(
                model, self.dense, self.samples("reconstruct"), spec.reconstruction, held_out=self.texts.held_out, seed=spec.seed,
                execution=execution, callbacks=[*callbacks, *self.callbacks], **pruned,
            )  # fmt: skip
        self.record.windows = [asdict(each) for each in reports]

    def retrain(self, model: Decoder, masks: dict[str, Tensor]) -> None:
        """Retrains the model's surviving weights in place, and notes in the record how; see `recon.methods.retrain`."""
        spec, record, execution = self.spec, self.record, self.execution()
        text, tokens = next(iter(self.texts.evaluation.items()))

        class Merged(Callback):
            def on_merged(self) -> None:
                found = perplexity(model, tokens, execution=execution, description=f"perplexity (merged, {text})")
                record.metrics["perplexity_before_masking"] = found.value

        with self.phase("retrain"):
            found = retrain(
                model, self.samples("retrain"), spec.retraining, masks=masks, dense=self.dense, seed=spec.seed,
                execution=self.execution(), callbacks=[Merged(), *self.callbacks],
            )  # fmt: skip
        record.retraining = asdict(found)
        record.seconds["retrain"] = found.seconds  # without what was measured on the way

    def measure_dense(self) -> tuple[Measured, dict[str, Tensor]]:
        """What is measured of the dense model, and its states that other models are compared with."""

        def compute() -> Step:
            name = dense_cache.name(self.spec, self.texts, self.device, plan.flops(self.spec)["evaluate"])
            if known := dense_cache.get(name):
                self.session.reused.append("dense")
            else:
                known = self.measurement.of_dense(self.execution())
                dense_cache.put(name, *known)
            return known

        found, states = self.step("dense", self.key("dense"), compute)
        return Measured.of(found), states

    def measure(self, name: str, key: object, model: Decoder, states: dict[str, Tensor]) -> Measured:
        """What is measured of the model by now; key: see `step`."""
        found, _ = self.step(f"measure {name}", key, lambda: self.measurement.of(model, name, states, self.execution()))
        return Measured.of(found)

    def save(self, model: Decoder) -> None:
        """Saves model and record."""
        record = self.record
        if self.options.save_dtype != "float32":
            record.environment["save_dtype"] = self.options.save_dtype
        with checkpoint.writing(self.options.save) as folder:
            with self.phase("save"):
                checkpoint.write(model, self.tokenizer, folder, record, self.options)
            record.seconds["total"] = time.perf_counter() - self.began
            write_json(folder / files.RECORD, record.to_dict())

    # --- what phases have in common -------------------------------------------------------------------------------

    def step(self, name: str, key: object, compute: Callable[[], Step]) -> Step:
        """`compute()`, unless it is known: from before the run was killed, or from a run of the session with the same `key`.

        key: what decides the result; None where no other run has the same.
        """
        if self.storage.finished(name):
            return self.storage.finished(name)[0], self.storage.streams(name)
        found, streams = self.session.keep(name, key, compute) if key else compute()
        self.storage.finish(name, found, streams)
        return found, streams

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds up seconds and keeps the highest peak memory of a phase, which may be entered more than once."""
        record, began = self.record, time.perf_counter()
        device.release_memory()  # what is left from before counts as free, and not as this phase's
        with device.PeakMemory(self.device, anonymous=self.folder is not None) as peak:
            yield
        record.seconds[name] = record.seconds.get(name, 0.0) + time.perf_counter() - began
        peaks, added = record.peak_memory_bytes_by_phase, record.added_memory_bytes_by_phase
        peaks[name], added[name] = max(peaks.get(name, 0), peak.bytes), max(added.get(name, 0), peak.bytes - peak.before)

    def execution(self, loop: Callable | None = None) -> Execution:
        """Where and how a phase computes; made for each, as a phase that runs out of memory goes on with smaller batches."""
        return Execution(self.device, self.spec.compute.compute_dtype, self.storage, self.options.progress, loop)

    def samples(self, phase: str) -> Tensor:
        """The calibration samples that `phase` reads."""
        return self.texts.calibration[: self.spec.samples_by_phase[phase]]

    def key(self, what: str) -> tuple:
        """What decides something that runs of a session share."""
        spec = self.spec
        held_out = (spec.calibration.text, spec.calibration.sequence_length, spec.calibration.held_out_samples)
        return {
            "dense": (spec.loaded_by, spec.evaluation, held_out, spec.compute),
            "prune": (spec.pruned_by, spec.compute),
            "pruned": (spec.pruned_by, spec.evaluation, held_out, spec.compute),
        }[what]
