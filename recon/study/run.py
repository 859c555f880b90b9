"""One run: prune, reconstruct, retrain and measure one model, from a specification to a record."""

import contextlib
import copy
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from typing import NamedTuple, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from recon.data import files, models
from recon.errors import ReconError, check_kind, log
from recon.evaluate import zero_shot
from recon.evaluate.perplexity import perplexity
from recon.kernels.patterns import Pattern, found_pattern
from recon.methods import masks, prune, reconstruct, reorder, retrain
from recon.methods.training import Callback
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.model.skeleton import Lazy
from recon.runtime import device, packed
from recon.runtime.execution import Execution
from recon.runtime.storage import Storage, cache_folder, check_new, complete, derived_folder, locked, owner, writing
from recon.runtime.weights import student
from recon.study import checkpoint, cluster, measure, plan
from recon.study.record import RunRecord, environment, finished, write_record
from recon.study.spec import RunOptions, RunSpec

Value = TypeVar("Value")
LEAST = 1e12  # floating-point operations, a few seconds: cheaper measurements of the dense model are not cached on disk
Measured = tuple[dict, Mapping[str, Tensor]]  # see `recon.study.measure.measure`


class Session:
    """What consecutive runs share: the dense model, its measurements, and the last pruned state, so that the granularities of a
    study start from the same one; and the last reconstructed state, if several runs need it."""

    def __init__(self, repeated: Collection[tuple] = ()):
        self.repeated = repeated  # values of `reconstructed_by` that several coming runs have
        self.reused: list[str] = []  # kinds of results that the last run took from here
        self._kept: dict[str, tuple[object, object]] = {}
        self._sources: dict[object, object] = {}  # hashes of the models, texts and criteria that results depend on

    def keep(self, kind: str, key: object, make: Callable[[], Value]) -> Value:
        """The result of `make()`, or the kept result of the same `kind` if `key` has not changed since."""
        if self.holds(kind, key):
            self.reused.append(kind)
        else:
            self._kept.pop(kind, None)  # frees the memory before the next one is made
            self._kept[kind] = (key, make())
        return self._kept[kind][1]

    def holds(self, kind: str, key: object) -> bool:
        """Whether `keep` would return the kept result."""
        return kind in self._kept and self._kept[kind][0] == key

    def clear(self) -> None:
        """Forgets everything: all kept results belong to one model."""
        self._kept.clear()

    def refresh(self, spec: RunSpec) -> None:
        """Forgets everything if a model or text that `spec` reads, or its criterion, has changed since an earlier run."""
        sources = spec.sources()
        now = sources["texts"] | {spec.loaded_by: sources["model"], spec.model.pruned: sources.get("pruned")}
        now["criterion", spec.pruning.criterion] = sources.get("criterion")
        if any(self._sources.get(name, content) != content for name, content in now.items()):
            self.clear()
        self._sources |= now

    def load(self, *loaded_by) -> tuple[Decoder, object]:
        """The dense model and its tokenizer; see `RunSpec.loaded_by`."""

        def make():
            loaded, tokenizer = models.load(*loaded_by)
            return decompose(loaded), tokenizer

        if not self.holds("model", loaded_by):
            self.clear()  # frees the old model before the new one is loaded
        return self.keep("model", loaded_by, make)

    def bytes_loaded(self, spec: RunSpec) -> int:
        """Bytes of the weights of the model of `spec` that are in memory already."""
        loaded = self.holds("model", spec.loaded_by)
        return sum(parameter.nbytes for parameter in self._kept["model"][1][0].model.parameters()) if loaded else 0


class RunResult(NamedTuple):
    """The result of a run; `model`: None if the run was streamed, or if an earlier call saved the model in the folder."""

    record: RunRecord
    model: PreTrainedModel | None


def run(
    spec: RunSpec, options: RunOptions = RunOptions(), *, session: Session | None = None, callbacks: Sequence[Callback] = ()
) -> RunResult:
    """Prunes, reconstructs and measures one model as `spec` says.

    A streamed run leaves its models on disk and works on one window at a time. Its folder is `<save>.unfinished`, or one in the
    cache named by its key. After a kill, the same call resumes after the last finished window. At the end the folder is deleted.

    options: where the model is saved, whether the run is streamed, on which executor it runs. session: results that earlier
    runs left in memory. callbacks: called after windows and training steps, and with the record once the model is saved.

    Raises `ReconError` for bad input, a run that cannot fit here, or one that another process runs, before any long computation.
    """
    check_kind("spec", spec, RunSpec)
    check_kind("options", options, RunOptions)
    spec, session, save = spec.resolved(), session or Session(), options.save
    if spec.reconstruction.granularity != "none":
        cluster.loop(options.executor, spec.reconstruction.propagation)  # raises now if it cannot be used
    if spec.evaluation.tasks:
        zero_shot.check_tasks(spec.evaluation.tasks)
    key, stream = spec.key(), options.stream
    session.refresh(spec)
    folder = save.with_name(f"{save.name}.unfinished") if save else cache_folder() / "unfinished" / key
    # A serial run may store pruning by window; a run on Ray stores it by block. Neither can resume in the other's folder.
    work = f"{key}, pruned first" if spec.one_pass and cluster.settings(options.executor) else key
    if spec.compute.compute_dtype == "auto":  # another machine might resume in another precision
        work += f", in {device.pick_compute_dtype('auto', device.pick_device(spec.compute.device))}".replace("torch.", "")
    begun = owner(folder) == work
    with contextlib.ExitStack() as stack:
        if save:
            stack.enter_context(locked(save, "save folder"))
            done = finished(save / files.RECORD, key)
            as_asked = packed.is_packed(save) == (options.save_format == "packed")
            if done and as_asked and done.environment.get("save_dtype", "float32") == options.save_dtype:
                log.info("done already: the model and its record are in %r", str(save))
                if begun:  # the run was killed before its folder was deleted
                    Storage(folder, work).delete()
                for callback in callbacks:
                    callback.on_done(done)
                return RunResult(done, None)
            check_new(save)
        if stream == "auto":  # a run that began streamed stays so; a model that is in memory fits
            stream = "yes" if begun else "no" if session.holds("model", spec.loaded_by) else stream
        streamed = plan.stays_on_disk(spec, stream, device.available_memory())
        if not (begun and streamed):
            plan.check(spec, replace(options, stream="yes" if streamed else "no"), session.bytes_loaded(spec))
        if (streamed or begun) and not save:
            stack.enter_context(locked(folder, "work folder"))
        taken = save and owner(folder) not in (None, work)  # by another unfinished run: `Storage` raises
        storage = Storage(folder if streamed or taken else None, work, keep=["prune"])
        if streamed:
            log.info("finished windows are in %r until the run is done; it may be deleted, to begin anew", str(folder))
        stack.callback(storage.delete, begun=False)  # without windows it would only block another try
        result = _Run(spec, key, options, session, storage, callbacks).result()
        for callback in callbacks:
            callback.on_done(result.record)
        storage.delete()
        if begun and not streamed:  # an earlier call streamed it
            Storage(folder, work).delete()
    return result


class _Run(Callback):
    """One run, phase by phase: what its phases use, and their results."""

    def __init__(self, spec: RunSpec, key: str, options: RunOptions, session: Session, storage: Storage, callbacks: Sequence):
        self.spec, self.options, self.session, self.storage = spec, options, session, storage
        self.record, self.callbacks = RunRecord(spec.flat(), key), callbacks
        self.device = device.pick_device(spec.compute.device)
        self.fingerprints = self.stored()

    def result(self) -> RunResult:
        """Runs the whole pipeline. The dense model is measured first, so that a wrong set-up shows before anything is pruned."""
        spec, session, storage, record = self.spec, self.session, self.storage, self.record
        began, resumed = time.perf_counter(), bool(storage.finished("dense"))
        session.reused.clear()
        with self.phase("load"):
            self.load()
            self.check_fits()
            record.flops = plan.flops(spec)  # first, as it raises for what cannot be planned
            self.texts = measure.Texts.draw(spec, self.tokenizer)
        read = spec.samples_by_phase.items()
        self.samples = {phase: self.texts.calibration[:count] if count else None for phase, count in read}
        found_dense, self.states = self.measured("dense", self.dense)
        record.seconds |= {"prune": 0.0, "reconstruct": 0.0, "retrain": 0.0}
        if spec.pruning.reorder_neurons:
            read = *spec.pruned_by[:-1], spec.pruning.pattern, spec.compute
            self.dense, record.seconds["prune"] = session.keep("reordered", read, self.reordered)
        if storage.folder:
            self.model = student(self.dense, storage, self.external and self.external.read)
        else:
            self.model = decompose(copy.deepcopy(self.dense.model), like=self.dense)

        pruned_by = spec.pruned_by, spec.compute  # runs of a session for which this is equal share the pruned state
        one_pass = spec.one_pass and not cluster.settings(self.options.executor) and not session.holds("pruned", pruned_by)
        make = partial(self.pruned, one_pass)
        pruning, weights, *cost = make() if storage.folder or self.external else session.keep("pruned", pruned_by, make)
        if "pruned" in session.reused:
            prune.apply(self.model, pruning, weights)
        record.seconds["prune"], record.peak_memory_bytes_by_phase["prune"] = cost
        found_pruned, _ = self.measured("pruned", student(self.dense, storage, phases=["prune"]) if one_pass else self.model)
        if spec.reconstruction.granularity != "none":
            self.reconstructed(None if one_pass else pruning.masks)
        if spec.retraining.retrain != "none":
            self.retrain(pruning.masks)
        trained = record.windows or record.retraining
        final = self.measured("reconstructed", self.model)[0] if trained else found_pruned

        if storage.folder and self.stored() != self.fingerprints:
            changed, folder = f"model {spec.model.model!r}, or what was pruned from it, changed on disk", str(storage.folder)
            raise ReconError(f"{changed} while it was read window by window; delete {folder!r}, to begin anew")
        record.metrics |= measure.metrics(spec, found_dense, found_pruned, final) | measure.count_zeros(self.model)
        record.metrics["under_calibrated_matrices"] = pruning.under_calibrated
        if self.external:
            record.metrics["pattern"] = str(found_pattern(pruning.masks.values()))
        record.tokens = measure.tokens(spec, self.texts, found_dense)
        record.window_memory_bytes = plan.window_memory(self.dense, spec, self.device)
        record.protocol = measure.protocol(spec, self.texts, self.dense, self.execution().dtype)
        record.shared = list(session.reused)
        record.environment = environment(self.device, spec.compute.compute_dtype)
        if storage.folder:
            record.environment |= {"streamed": True, "resumed": resumed}
        if record.windows and cluster.settings(self.options.executor):
            record.environment["executor"] = "ray"  # seconds of windows are then those of several workers
        record.status, record.seconds["total"] = "done", time.perf_counter() - began
        if self.options.save:
            if self.options.save_dtype != "float32":
                record.environment["save_dtype"] = self.options.save_dtype
            refused = writing(f"checkpoint {str(self.options.save)!r}", "choose a place with room")
            with refused, complete(self.options.save, folder=True) as folder:
                with self.phase("save"):
                    checkpoint.write(self.model, self.tokenizer, folder, record, self.options)
                record.seconds["total"] = time.perf_counter() - began
                write_record(record, folder / files.RECORD)
        return RunResult(record, None if storage.folder else self.model.model)

    def stored(self) -> list[str]:
        """The fingerprints of the models on disk, which a streamed run reads window by window."""
        model = self.spec.model
        pruned = [(model.pruned, model.pruned_revision, model.trust_remote_code)] * (model.pruned is not None)
        return [models.fingerprint(*each) for each in (self.spec.loaded_by, *pruned)]

    def execution(self, loop: Callable | None = None) -> Execution:
        """Where and how a phase computes; new for each phase, as one that runs out of memory continues with smaller batches."""
        return Execution(self.device, self.spec.compute.compute_dtype, self.storage, self.options.progress, loop)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context that adds up a phase's seconds and keeps its highest peak memory; a phase may be entered more than once."""
        record, began = self.record, time.perf_counter()
        device.release_memory()  # what earlier phases left counts as free, not as this phase's
        with device.peak_memory(self.device, anonymous=self.storage.folder is not None) as peak:
            yield
        record.seconds[name] = record.seconds.get(name, 0.0) + time.perf_counter() - began
        peaks, added = record.peak_memory_bytes_by_phase, record.added_memory_bytes_by_phase
        peaks[name], added[name] = max(peaks.get(name, 0), peak.bytes), max(added.get(name, 0), peak.bytes - peak.before)
        record.peak_memory_bytes = max(peaks.values())

    def load(self) -> None:
        """Loads the dense model and its tokenizer. A model pruned by other software is checked, but not read into memory."""
        spec, session, folder, model = self.spec, self.session, self.storage.folder, self.spec.model
        if folder:
            session.clear()  # results of earlier runs in memory are of no use
            skeleton, stored, self.tokenizer = models.skeleton(*spec.loaded_by, folder)
            self.dense = decompose(skeleton, lazy=Lazy(skeleton, stored.read))
        else:
            self.dense, self.tokenizer = session.load(*spec.loaded_by)

        def open_external():
            opened = models.load_pruned(model.pruned, self.dense.model, model.pruned_revision, model.trust_remote_code, folder)
            masks.check_pruned(self.dense, opened)
            return opened

        self.external = session.keep("external mask", spec.pruned_by, open_external) if model.pruned else None

    def check_fits(self) -> None:
        """Raises `ReconError` for what this model does not support, including being saved."""
        plan.check_fits(self.spec, self.dense)
        if tasks := self.spec.evaluation.tasks:
            zero_shot.check_tasks(tasks, self.dense)
            zero_shot.load(zero_shot.HUB.keys() & tasks)  # raises now for what cannot be fetched
        biases = prune.touched_biases(self.dense, self.spec.pruning)
        if self.options.save:
            checkpoint.check_model(self.dense, biases, self.options.save_dtype)

    def measured(self, name: str, decoder: Decoder) -> Measured:
        """Measures the dense, pruned or reconstructed model. A result from before the run was killed is reused, and so is one
        from a run of the session for which everything that determines it is equal."""
        spec, read, storage = self.spec, self.spec.calibration, self.storage
        made_by = {"dense": spec.loaded_by, "pruned": spec.pruned_by}.get(name)
        known_by = made_by, spec.evaluation, read.text, read.sequence_length, read.held_out_samples, spec.compute
        step, dense = ("dense", ()) if name == "dense" else (f"measure {name}", (self.dense, self.states))
        with self.phase("evaluate"):
            if storage.finished(step):
                return storage.finished(step)[0], storage.streams(step)
            given = decoder, name, self.texts, spec.evaluation, self.tokenizer, self.execution(), dense
            compute = partial(measure.measure, *given) if dense else partial(self.cached, partial(measure.measure, *given))
            found, states = self.session.keep(step, known_by, compute) if made_by else compute()
            storage.finish(step, found, states)
        return found, states

    def cached(self, compute: Callable[[], Measured]) -> Measured:
        """`compute()` of the dense model, cached across processes if it is long, by committed code, and on bundled tasks."""
        spec, how, here = self.spec, self.spec.evaluation, environment(self.device, self.spec.compute.compute_dtype)
        if plan.flops(spec)["evaluate"] < LEAST or here["git_dirty"] is not False or set(how.tasks) - set(zero_shot.BUNDLED):
            return compute()
        texts = [read for read in (*self.texts.evaluation.values(), self.texts.held_out) if read is not None]
        read = [(measure.digest(text), *text.shape) for text in texts]
        scored_by = metadata.version("lm_eval") if how.tasks else None
        measured = [*how.windows], how.kl_windows, how.tasks, how.task_limit, scored_by
        folder = derived_folder("dense", models.fingerprint(*spec.loaded_by), read, *measured, here)
        with locked(folder, "cache (RECON_CACHE)", wait=True):
            kept = Storage(folder, folder.name)
            if kept.finished("dense"):
                self.session.reused.append("dense")
            else:
                kept.finish("dense", *compute())
            return kept.finished("dense")[0], kept.streams("dense")

    def pruned(self, one_pass: bool) -> tuple[prune.Pruning, Mapping[str, Tensor], float, int]:
        """Prunes the model, during reconstruction or before it; returns the pruning, updated weights, seconds and peak."""
        seconds, peaks = self.record.seconds, self.record.peak_memory_bytes_by_phase
        how = replace(self.spec.pruning, reorder_neurons=False)  # done already
        if one_pass:
            self.reconstruct(pruning=how)
            seconds["prune"] += self.pruning.seconds
            peaks["prune"] = peaks["reconstruct"]
            seconds["reconstruct"] -= self.pruning.seconds
        else:
            with self.phase("prune"):
                if self.external:
                    self.pruning = masks.take_over(self.model, self.external, self.execution())
                else:
                    by = {"seed": self.spec.seed, "execution": self.execution()}
                    self.pruning = prune.prune(self.model, self.samples["prune"], how, **by)
        return self.pruning, self.storage.tensors("prune"), seconds["prune"], peaks["prune"]

    def reordered(self) -> tuple[Decoder, float]:
        """A copy of the dense model with its neurons reordered, and the seconds that it took."""
        began, dense = time.perf_counter(), decompose(copy.deepcopy(self.dense.model), like=self.dense)
        reorder.reorder_neurons(dense, self.samples["prune"], Pattern.parse(self.spec.pruning.pattern), self.execution())
        return dense, time.perf_counter() - began

    def on_pruned(self, pruning: prune.Pruning) -> None:
        self.pruning = pruning

    def reconstruct(self, **pruned: object) -> None:
        """Reconstructs the model in place; `pruned`: its masks or, to prune each window on the way, how."""
        execution = self.execution(cluster.loop(self.options.executor, self.spec.reconstruction.propagation))
        with self.phase("reconstruct"):
            reports = reconstruct.reconstruct(
                self.model, self.dense, self.samples["reconstruct"], self.spec.reconstruction, held_out=self.texts.held_out,
                seed=self.spec.seed, execution=execution, callbacks=(self, *self.callbacks), **pruned,
            )  # fmt: skip
        self.record.windows = [asdict(report) for report in reports]

    def retrain(self, kept: Mapping[str, Tensor]) -> None:
        """Retrains the model's surviving weights in place; see `recon.methods.retrain`."""
        with self.phase("retrain"):
            found = retrain.retrain(
                self.model, self.samples["retrain"], self.spec.retraining, masks=kept, dense=self.dense, seed=self.spec.seed,
                execution=self.execution(), callbacks=(self, *self.callbacks),
            )  # fmt: skip
        self.record.retraining = asdict(found)
        self.record.seconds["retrain"] = found.seconds  # without measurements on the way

    def reconstructed(self, masks: Mapping[str, Tensor] | None) -> None:
        """Reconstructs the pruned model in place, unless pruning did so on the way (no `masks`), or an earlier run did."""
        record, parameters = self.record, [*self.model.model.parameters()]
        measured = record.seconds, record.peak_memory_bytes_by_phase, record.added_memory_bytes_by_phase

        def make():
            if masks is not None:
                self.reconstruct(masks=masks)
            return [each.detach().clone() for each in parameters], record.windows, [each["reconstruct"] for each in measured]

        if self.storage.folder or self.spec.reconstructed_by not in self.session.repeated:
            return None if masks is None else self.reconstruct(masks=masks)
        values, record.windows, costs = self.session.keep("reconstructed", self.spec.reconstructed_by, make)
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data.copy_(value)
        for of_phase, cost in zip(measured, costs):
            of_phase["reconstruct"] = cost

    def on_merged(self) -> None:
        text, tokens = next(iter(self.texts.evaluation.items()))
        found = perplexity(self.model, tokens, execution=self.execution(), description=f"perplexity (merged, {text})")
        self.record.metrics["perplexity_before_masking"] = found.value
