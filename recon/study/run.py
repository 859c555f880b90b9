"""One run: prune, reconstruct, retrain and measure one model, from a specification to a record."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from recon.data import models
from recon.evaluate import zero_shot
from recon.evaluate.perplexity import perplexity
from recon.kernels.patterns import Pattern, found_pattern
from recon.methods import external_mask
from recon.methods.adapters import check_adaptable
from recon.methods.callbacks import Callback
from recon.methods.prune import prune, touched_biases
from recon.methods.reconstruct import reconstruct
from recon.methods.retrain import retrain
from recon.model.decoder import Decoder
from recon.runtime import device
from recon.runtime.activations import Activations
from recon.runtime.execution import Execution
from recon.study import checkpoint, cost, plan, ray_windows, report, streaming, workers
from recon.study.dense_cache import DenseCache
from recon.study.environment import environment
from recon.study.home import Home, InMemory, OnDisk, Pruned, Step
from recon.study.measure import Measured, Measurement, count_zeros
from recon.study.record import RunRecord
from recon.study.session import Session
from recon.study.spec import RunOptions, RunSpec
from recon.study.texts import Texts

log = logging.getLogger("recon")
HELD_OUT_SHARE = 0.25  # of a session's room for activations: for those on held-out samples


class RunResult(NamedTuple):
    """What a run gives.

    model: the reconstructed model; None where it was streamed, or saved by an earlier call: then it is in the folder.
    """

    record: RunRecord
    model: PreTrainedModel | None


def run(
    spec: RunSpec,
    options: RunOptions = RunOptions(),
    *,
    session: Session | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Prunes, reconstructs and measures one model as `spec` says.

    Args:
        options: how it is carried out: where the model is saved, whether it is streamed, on what it is computed.
        session: what earlier runs left in memory to share.
        callbacks: told of windows and training steps, and of the record once it is done and the model is saved. Until that
            returns, a streamed run can give the record again.

    Raises:
        ReconError: bad input, a run that cannot fit here, or another process that does the same run;
            before anything long begins.
    """
    spec, session, save = spec.resolved(), session or Session(), options.save
    ray_windows.check(options.executor, spec.reconstruction.propagation)
    if spec.evaluation.tasks:
        zero_shot.check_tasks(spec.evaluation.tasks)
    streamed = streaming.decide(spec, options, session)
    if not options.force and not streaming.begun(spec, save):
        folder, loaded = save.parent if save else Path("."), session.bytes_loaded(spec)
        if planned := plan.check(spec, save is not None, folder, loaded, options.stream, options.save_dtype):
            log.info("%s", planned)
    home = (OnDisk if streamed else InMemory)(spec, options, session)
    with home.locked():
        record, model = home.finished(), None
        if record is None:
            if save:
                checkpoint.check_target(save)
            record, model = _Run(spec, options, session, home, callbacks).execute()
        for callback in callbacks:
            callback.on_done(record)
        home.clear()
    return RunResult(record, model)


class _Run:
    """A run that is not done yet."""

    def __init__(self, spec: RunSpec, options: RunOptions, session: Session, home: Home, callbacks: Sequence[Callback]):
        self.spec, self.options, self.session, self.home, self.callbacks = spec, options, session, home, callbacks
        self.record = RunRecord(spec.flat(), spec.key())
        self.device = device.pick_device(spec.compute.device)
        self.dtype = device.pick_compute_dtype(spec.compute.compute_dtype, self.device)
        session.reused.clear()

    def execute(self) -> tuple[RunRecord, PreTrainedModel | None]:
        """The whole pipeline, dense model first, so that a wrong set-up shows before anything is pruned."""
        spec, home, record = self.spec, self.home, self.record
        began = time.perf_counter()
        with self.phase("load"):
            self.load()
            about = home.open()
        cost.announce(spec, self.dense, self.device)
        with self.phase("evaluate"):
            dense, states = self.measure_dense()
        student = home.student(self.external)
        record.seconds |= {"prune": 0.0, "reconstruct": 0.0, "retrain": 0.0}
        serial, key = workers.get(self.options.executor) is None, self.key("prune")
        one_pass = spec.one_pass and serial and not home.knows_pruned(key)
        if one_pass:
            found = self.prune_and_reconstruct(student)
            left = home.pruned_on_the_way(key, found)
        else:
            found = home.pruned(key, student, lambda: self.prune(student))
            left = student
        self.note_pruned(found)
        with self.phase("evaluate"):
            pruned = final = self.measure("pruned", self.key("pruned"), left, states)
        masks = found.pruning.masks
        if spec.reconstruction.granularity != "none" and not one_pass:
            with self.phase("reconstruct"):
                self.reconstruct(student, masks=masks)
        if spec.retraining.retrain != "none":
            with self.phase("retrain"):
                self.retrain(student, masks)
            record.seconds["retrain"] = record.retraining["seconds"]  # without what was measured on the way
        if record.windows or record.retraining:
            with self.phase("evaluate"):
                final = self.measure("reconstructed", None, student, states)
        record.metrics |= report.metrics(spec, dense, pruned, final) | home.step("counted", None, lambda: count_zeros(student))[0]
        record.tokens = report.tokens(spec, self.texts, dense)
        record.flops = cost.flops(spec, self.dense)
        record.protocol = report.protocol(spec, self.texts, self.dense, self.dtype)
        record.shared = list(self.session.reused)
        record.environment = environment(self.device, spec.compute.compute_dtype) | about
        record.peak_memory_bytes = max(record.peak_memory_bytes_by_phase.values())
        record.status = "done"
        self.save(student, began)
        return record, None if home.streamed else student.model

    # --- before anything is computed ------------------------------------------------------------------------------

    def load(self) -> None:
        """Loads model and texts, and refuses here whatever can be refused."""
        spec, save = self.spec, self.options.save
        self.dense, tokenizer = self.home.load()
        self.external = None
        if spec.model.pruned:
            self.external = self.session.keep("external mask", spec.pruned_by, self.open_external)
        self.check_fits()
        if save:
            checkpoint.check_places(self.dense.model, self.touched)
            checkpoint.check_range(self.dense, self.options.save_dtype)
        self.texts = Texts.draw(spec, tokenizer)
        streams = self.session.activations("held-out", self.key("held-out"), HELD_OUT_SHARE)
        self.measurement = Measurement(spec.evaluation, self.texts, tokenizer, self.dense, streams)

    def open_external(self):
        """The model that something else pruned, checked but not read into memory."""
        model = self.spec.model
        opened = models.load_pruned(model.pruned, self.dense.model, model.pruned_revision, model.trust_remote_code)
        external_mask.check_pruned(self.dense, opened)
        return opened

    def check_fits(self) -> None:
        """Raises `ReconError` for what this model cannot do: windows, adapters, patterns, lengths, tasks."""
        spec, dense = self.spec, self.dense
        dense.windows(spec.reconstruction.granularity if spec.reconstruction.granularity != "none" else "block")
        if spec.reconstruction.adapter != "none" or spec.retraining.retrain not in ("none", "full", "norms"):
            check_adaptable(dense)
        self.touched = []
        if not spec.model.pruned:
            self.touched = touched_biases(dense, spec.pruning.criterion)
            for name, matrix in dense.matrices().items():
                Pattern.parse(spec.pruning.pattern).check_columns(name, matrix.weight.shape[1])
        for length in (spec.calibration.sequence_length, spec.evaluation.evaluation_length):
            dense.check_length(length)
        if spec.evaluation.tasks:
            zero_shot.check_model(dense)

    # --- phases ---------------------------------------------------------------------------------------------------

    def prune(self, student: Decoder) -> Pruned:
        """Prunes the student in a pass of its own, or takes over the external model."""
        spec, began = self.spec, time.perf_counter()
        with device.PeakMemory(self.device, anonymous=self.home.streamed) as peak:
            if self.external:
                found = self.home.take_mask(student, self.external, self.execution())
            else:
                found = prune(student, self.samples("prune"), spec.pruning, seed=spec.seed, execution=self.execution())
        return Pruned(found, time.perf_counter() - began, peak.bytes)

    def prune_and_reconstruct(self, student: Decoder) -> Pruned:
        """Prunes and reconstructs the student in one pass; the seconds of pruning are those of making masks."""
        found = []

        class Found(Callback):
            def on_pruned(self, pruning) -> None:
                found.append(pruning)

        with self.phase("reconstruct"):
            self.reconstruct(student, [Found()], pruning=self.spec.pruning)
        self.record.seconds["reconstruct"] -= found[0].seconds
        return Pruned(found[0], found[0].seconds, self.record.peak_memory_bytes_by_phase["reconstruct"])

    def note_pruned(self, found: Pruned) -> None:
        """Writes into the record what pruning took, and what it found."""
        record = self.record
        record.seconds["prune"], record.peak_memory_bytes_by_phase["prune"] = found.seconds, found.peak
        record.metrics["under_calibrated_matrices"] = found.pruning.under_calibrated
        if self.external:
            record.metrics["pattern"] = str(found_pattern(found.pruning.masks.values()))

    def measure_dense(self) -> tuple[Measured, dict[str, Tensor]]:
        """What is measured of the dense model, and its states that other models are compared with."""
        cache = DenseCache(self.spec, self.texts, self.device, cost.flops(self.spec, self.dense)["evaluate"])

        def compute() -> Step:
            if known := cache.get():
                self.session.reused.append("dense")
                return known
            found, states = self.measurement.of_dense(self.execution())
            cache.put(found, states)
            return found, states

        found, states = self.home.step("dense", self.key("dense"), compute)
        return Measured.of(found), states

    def measure(self, name: str, key: object, student: Decoder, states: dict[str, Tensor]) -> Measured:
        """What is measured of the student by now."""
        found, _ = self.home.step(f"measure {name}", key, lambda: self.measurement.of(student, name, states, self.execution()))
        return Measured.of(found)

    def reconstruct(self, student: Decoder, callbacks: Sequence[Callback] = (), **pruned: object) -> None:
        """pruned: the masks, or how to prune; see `recon.reconstruct`."""
        spec = self.spec
        known = self.session.activations("activations", self.key("activations"), 1 - HELD_OUT_SHARE)
        reports = reconstruct(
            student, self.dense, self.samples("reconstruct"), spec.reconstruction, held_out=self.texts.held_out, seed=spec.seed,
            execution=self.execution(known, ray_windows.loop(self.options.executor)), callbacks=[*callbacks, *self.callbacks], **pruned,
        )  # fmt: skip
        self.record.windows = [asdict(each) for each in reports]

    def retrain(self, student: Decoder, masks: dict[str, Tensor]) -> None:
        """Retrains the student's surviving weights in place, and notes in the record how; see `recon.methods.retrain`."""
        spec, record = self.spec, self.record
        text, tokens = next(iter(self.texts.evaluation.items()))
        execution = self.execution()

        class Merged(Callback):
            def on_merged(self) -> None:
                found = perplexity(student, tokens, execution=execution, description=f"perplexity (merged, {text})")
                record.metrics["perplexity_before_masking"] = found.value

        found = retrain(
            student, self.samples("retrain"), spec.retraining, masks=masks, dense=self.dense, seed=spec.seed,
            execution=self.execution(), callbacks=[Merged(), *self.callbacks],
        )  # fmt: skip
        record.retraining = asdict(found)

    def save(self, student: Decoder, began: float) -> None:
        """Saves model and record, where they are to be saved."""
        record, dtype = self.record, self.options.save_dtype
        with self.home.saving(record) as folder:
            if folder:
                if dtype != "float32":
                    record.environment["save_dtype"] = dtype
                with self.phase("save"):
                    self.home.write(student, folder, record)
            record.seconds["total"] = time.perf_counter() - began

    # --- what phases have in common -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds up seconds and keeps the highest peak memory of a phase, which may be entered more than once."""
        record, began = self.record, time.perf_counter()
        device.release_memory()  # what is left from before counts as free, and not as this phase's
        with device.PeakMemory(self.device, anonymous=self.home.streamed) as peak:
            yield
        record.seconds[name] = record.seconds.get(name, 0.0) + time.perf_counter() - began
        for found, value in (
            (record.peak_memory_bytes_by_phase, peak.bytes),
            (record.added_memory_bytes_by_phase, peak.bytes - peak.before),
        ):
            found[name] = max(found.get(name, 0), value)

    def execution(self, known: Activations | None = None, loop: Callable | None = None) -> Execution:
        """Where and how a phase computes; made for each, as a phase that runs out of memory goes on with smaller batches."""
        return Execution(self.device, self.spec.compute.compute_dtype, self.home.store, self.options.progress, known, loop)

    def samples(self, phase: str) -> Tensor:
        """The calibration samples that `phase` reads."""
        return self.texts.calibration[: self.spec.samples_by_phase[phase]]

    def key(self, what: str) -> tuple:
        """What decides something that runs of a session share."""
        spec = self.spec
        held_out = (spec.calibration.text, spec.calibration.sequence_length, spec.calibration.held_out_samples)
        return {
            "dense": (spec.loaded_by, spec.evaluation, held_out, spec.compute),
            "held-out": (spec.loaded_by, held_out, spec.compute),
            "activations": (spec.loaded_by, held_out, spec.calibration.samples, spec.seed, spec.compute),
            "prune": (spec.pruned_by, spec.compute),
            "pruned": (spec.pruned_by, spec.evaluation, held_out, spec.compute),
        }[what]
