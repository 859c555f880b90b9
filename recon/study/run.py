"""One run: prune, reconstruct, retrain and measure one model, from a specification to a record."""

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recon.data import files, models
from recon.errors import ReconError
from recon.evaluate import zero_shot
from recon.evaluate.perplexity import perplexity
from recon.kernels.patterns import Pattern, found_pattern
from recon.methods import prune
from recon.methods.callbacks import Callback
from recon.methods.masks import check_pruned, take_over
from recon.methods.reconstruct import reconstruct
from recon.methods.retrain import retrain
from recon.methods.training import check_adaptable
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.model.skeleton import Lazy
from recon.runtime import device
from recon.runtime.execution import Execution
from recon.runtime.storage import Storage, locked, write_json
from recon.runtime.student import student
from recon.study import checkpoint, cluster, measure, plan, streaming
from recon.study.record import RunRecord, environment
from recon.study.session import Session
from recon.study.spec import RunOptions, RunSpec

log = logging.getLogger("recon")
Step = tuple[dict, Mapping[str, Tensor]]  # what a step found, as JSON can hold it, and activations to keep with it


class RunResult(NamedTuple):
    """What a run gives.

    model: the reconstructed model; None where it was streamed, or saved by an earlier call: then it is in the folder.
    """

    record: RunRecord
    model: PreTrainedModel | None


class Pruned(NamedTuple):
    """A pruned state, and what it took. `tensors`: parameters that pruning changed other than by zeroing."""

    pruning: prune.Pruning
    seconds: float
    peak: int  # bytes
    tensors: Mapping[str, Tensor]


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
    cluster.loop(options.executor, spec.reconstruction.propagation)  # refuses what it must, before anything long begins
    if spec.evaluation.tasks:
        zero_shot.check_tasks(spec.evaluation.tasks)
    key, done, folder, storage = spec.key(), None, None, Storage()
    with contextlib.ExitStack() as stack:
        if save:
            stack.enter_context(locked(save, "save folder"))
            if record := checkpoint.finished(save, key, options.save_dtype):
                done = RunResult(record, None)
            else:
                checkpoint.check_target(save)
        if done is None:
            streamed = streaming.decide(spec, options, session)
            if not streaming.begun(spec, save):
                plan.check(spec, options, session.bytes_loaded(spec))
            if streamed:
                folder = streaming.work_folder(key, save)
                log.info("finished windows are in %r until the run is done; it may be deleted, to begin anew", str(folder))
            if streamed and not save:
                stack.enter_context(locked(folder, "work folder"))
            storage = Storage(folder, key, keep=["prune"])
            try:
                done = _computed(_Run(spec, options, session, storage, RunRecord(spec.flat(), key)), callbacks)
            except ReconError:
                storage.delete(begun=False)  # refused: it would stand in the way of another try
                raise
        for callback in callbacks:
            callback.on_done(done.record)
        storage.delete()
    return done


@dataclass(frozen=True)
class _Run:
    """What all phases of a run have at hand."""

    spec: RunSpec
    options: RunOptions
    session: Session
    storage: Storage
    record: RunRecord

    @property
    def device(self) -> torch.device:
        return device.pick_device(self.spec.compute.device)

    def execution(self, loop: Callable | None = None) -> Execution:
        """Where and how a phase computes; made for each, as a phase that runs out of memory goes on with smaller batches."""
        return Execution(self.device, self.spec.compute.compute_dtype, self.storage, self.options.progress, loop)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds up seconds and keeps the highest peak memory of a phase, which may be entered more than once."""
        record, began = self.record, time.perf_counter()
        device.release_memory()  # what is left from before counts as free, and not as this phase's
        with device.PeakMemory(self.device, anonymous=self.storage.folder is not None) as peak:
            yield
        record.seconds[name] = record.seconds.get(name, 0.0) + time.perf_counter() - began
        peaks, added = record.peak_memory_bytes_by_phase, record.added_memory_bytes_by_phase
        peaks[name], added[name] = max(peaks.get(name, 0), peak.bytes), max(added.get(name, 0), peak.bytes - peak.before)

    def step(self, name: str, key: object, compute: Callable[[], Step]) -> Step:
        """`compute()`, unless it is known: from before the run was killed, or from a run of the session with the same `key`.

        key: what decides the result; None where no other run has the same.
        """
        if self.storage.finished(name):
            return self.storage.finished(name)[0], self.storage.streams(name)
        found, streams = self.session.keep(name, key, compute) if key else compute()
        self.storage.finish(name, found, streams)
        return found, streams


def _computed(now: _Run, callbacks: Sequence[Callback]) -> RunResult:
    """The whole pipeline, dense model first, so that a wrong set-up shows before anything is pruned."""
    spec, options, session, storage, record = now.spec, now.options, now.session, now.storage, now.record
    began, resumed, calibration = time.perf_counter(), bool(storage.finished("dense")), spec.calibration
    session.reused.clear()

    with now.phase("load"):
        dense, tokenizer, external = _loaded(now)
        _check_fits(spec, dense)
        if options.save and external is None:
            checkpoint.check_places(dense.model, prune.touched_biases(dense, spec.pruning.criterion))
        texts = measure.Texts.draw(spec, tokenizer)
    samples = {phase: texts.calibration[:count] for phase, count in spec.samples_by_phase.items()}

    # What decides measurements, and the pruned state: runs of a session that agree on it share them.
    measured_by = (spec.evaluation, calibration.text, calibration.sequence_length, calibration.held_out_samples, spec.compute)
    pruned_by = (spec.pruned_by, spec.compute)

    def measured(decoder: Decoder, name: str, **reference: object) -> Step:
        return measure.measure(decoder, name, texts, spec.evaluation, tokenizer, now.execution(), **reference)

    def measured_dense() -> Step:
        flops = plan.flops(spec)["evaluate"]
        return session.measured(spec, texts, now.device, flops, lambda: measured(dense, "dense"))

    with now.phase("evaluate"):
        found_dense, states = now.step("dense", (spec.loaded_by, *measured_by), measured_dense)
    if storage.folder:
        model = student(dense, storage, external and external.read)
    else:
        model = decompose(copy.deepcopy(dense.model), like=dense)
    record.seconds |= {"prune": 0.0, "reconstruct": 0.0, "retrain": 0.0}

    def reconstruct_model(callbacks: Sequence[Callback] = callbacks, **pruned: object) -> None:
        execution = now.execution(cluster.loop(options.executor, spec.reconstruction.propagation))
        with now.phase("reconstruct"):
            reports = reconstruct(
                model, dense, samples["reconstruct"], spec.reconstruction, held_out=texts.held_out, seed=spec.seed,
                execution=execution, callbacks=callbacks, **pruned,
            )  # fmt: skip
        record.windows = [asdict(report) for report in reports]

    def prune_model() -> Pruned:
        with now.phase("prune"):
            if external is None:
                found = prune.prune(model, samples["prune"], spec.pruning, seed=spec.seed, execution=now.execution())
            else:
                found = take_over(model, external, now.execution())
        return Pruned(found, record.seconds["prune"], record.peak_memory_bytes_by_phase["prune"], storage.tensors("prune"))

    def prune_and_reconstruct() -> Pruned:
        """In one pass; the seconds of pruning are those of making masks."""
        seen = []

        class Seen(Callback):
            def on_pruned(self, pruning) -> None:
                seen.append(pruning)

        reconstruct_model([Seen(), *callbacks], pruning=spec.pruning)
        record.seconds["reconstruct"] -= seen[0].seconds
        peak = record.peak_memory_bytes_by_phase["reconstruct"]
        return Pruned(seen[0], seen[0].seconds, peak, storage.tensors("prune"))

    one_pass = spec.one_pass and not cluster.settings(options.executor) and not session.holds("pruned", pruned_by)
    make = prune_and_reconstruct if one_pass else prune_model
    pruned = make() if storage.folder or external else session.keep("pruned", pruned_by, make)
    if "pruned" in session.reused:
        prune.apply(model, pruned.pruning, pruned.tensors)
    masks = pruned.pruning.masks
    record.seconds["prune"], record.peak_memory_bytes_by_phase["prune"] = pruned.seconds, pruned.peak
    with now.phase("evaluate"):
        left, key = student(dense, storage, phases=["prune"]) if one_pass else model, (spec.pruned_by, *measured_by)
        found_pruned, _ = now.step("measure pruned", key, lambda: measured(left, "pruned", dense=dense, states=states))

    if spec.reconstruction.granularity != "none" and not one_pass:
        reconstruct_model(masks=masks)
    if spec.retraining.retrain != "none":
        _retrain(now, model, dense, samples["retrain"], masks, texts, callbacks)
    final = found_pruned
    if record.windows or record.retraining:
        with now.phase("evaluate"):
            known = {"dense": dense, "states": states}
            final, _ = now.step("measure reconstructed", None, lambda: measured(model, "reconstructed", **known))

    record.metrics |= measure.metrics(spec, found_dense, found_pruned, final) | measure.count_zeros(model)
    record.metrics["under_calibrated_matrices"] = pruned.pruning.under_calibrated
    if external:
        record.metrics["pattern"] = str(found_pattern(masks.values()))
    record.tokens, record.flops = measure.tokens(spec, texts, found_dense), plan.flops(spec)
    record.window_memory_bytes = plan.window_memory(dense, spec, now.device)
    record.protocol = measure.protocol(spec, texts, dense, now.execution().dtype)
    record.shared = list(session.reused)
    record.environment = environment(now.device, spec.compute.compute_dtype)
    if storage.folder:
        record.environment |= {"streamed": True, "resumed": resumed}
    record.peak_memory_bytes = max(record.peak_memory_bytes_by_phase.values())
    record.status, record.seconds["total"] = "done", time.perf_counter() - began
    if options.save:
        if options.save_dtype != "float32":
            record.environment["save_dtype"] = options.save_dtype
        with checkpoint.whole(options.save) as folder:
            with now.phase("save"):
                checkpoint.write(model, tokenizer, folder, record, options)
            record.seconds["total"] = time.perf_counter() - began
            write_json(folder / files.RECORD, record.to_dict())
    return RunResult(record, None if storage.folder else model.model)


def _loaded(now: _Run) -> tuple[Decoder, object, object | None]:
    """The dense model, its tokenizer, and the model that something else pruned, if any: checked, but not read into memory."""
    spec, session, folder, model = now.spec, now.session, now.storage.folder, now.spec.model
    if folder:
        session.clear()  # what earlier runs have in memory is of no use
        skeleton, stored, tokenizer = models.skeleton(*spec.loaded_by, folder)
        dense = decompose(skeleton, lazy=Lazy(skeleton, stored.read))
    else:
        dense, tokenizer = session.load(*spec.loaded_by)

    def open_external():
        opened = models.load_pruned(model.pruned, dense.model, model.pruned_revision, model.trust_remote_code, folder)
        check_pruned(dense, opened)
        return opened

    return dense, tokenizer, session.keep("external mask", spec.pruned_by, open_external) if model.pruned else None


def _check_fits(spec: RunSpec, dense: Decoder) -> None:
    """Raises `ReconError` for what this model cannot do: windows, adapters, patterns, lengths, tasks."""
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


def _retrain(now: _Run, model: Decoder, dense: Decoder, samples: Tensor, masks: dict, texts: measure.Texts, callbacks) -> None:
    """Retrains the model's surviving weights in place, and notes in the record how; see `recon.methods.retrain`."""
    text, tokens = next(iter(texts.evaluation.items()))

    class Merged(Callback):
        def on_merged(self) -> None:
            found = perplexity(model, tokens, execution=now.execution(), description=f"perplexity (merged, {text})")
            now.record.metrics["perplexity_before_masking"] = found.value

    with now.phase("retrain"):
        found = retrain(
            model, samples, now.spec.retraining, masks=masks, dense=dense, seed=now.spec.seed, execution=now.execution(),
            callbacks=[Merged(), *callbacks],
        )  # fmt: skip
    now.record.retraining = asdict(found)
    now.record.seconds["retrain"] = found.seconds  # without what was measured on the way
