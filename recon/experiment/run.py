"""One run from a specification to a record: text -> decoder -> prune -> reconstruct -> retrain -> evaluate."""

import contextlib
import copy
import functools
import hashlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recon.data import files, models, text
from recon.errors import ReconError
from recon.evaluate import perplexity as evaluation
from recon.evaluate import zero_shot
from recon.experiment import checkpoint, cost, ray_windows
from recon.experiment.cluster import Ray
from recon.experiment.config import RunSpec
from recon.experiment.environment import environment
from recon.experiment.record import RunRecord
from recon.kernels.patterns import Pattern, found_pattern, sparsity_of
from recon.methods import external_mask
from recon.methods import prune as pruning
from recon.methods import reconstruct as reconstruction
from recon.methods import retrain as retraining
from recon.methods.adapters import check_adaptable
from recon.methods.callbacks import Callback
from recon.methods.problem import ERROR_SAMPLES
from recon.model.decoder import Decoder
from recon.model.discovery import take_apart
from recon.runtime import device, lock
from recon.runtime.activations import Activations
from recon.runtime.execution import Execution
from recon.runtime.seeds import generator
from recon.runtime.storage import cache_folder
from recon.runtime.store import MemoryStore
from recon.runtime.weights import SAVED, Checkpoint, rounded

HELD_OUT_SHARE = 0.25  # of what a session keeps on disk


@dataclass
class Measured:
    """How good a model is: perplexities by text, zero-shot results, drift along the depth, perplexity on held-out samples."""

    perplexities: dict[str, evaluation.Perplexity]
    zero_shot: dict
    drift: list[float]
    held_out: float | None


@dataclass
class Pruned:
    """A pruned state that several runs start from: weights of the matrices where pruning changed them, masks, figures."""

    pruning: pruning.Pruning
    weights: dict[str, Tensor]
    measured: Measured
    seconds: float
    peak: int


class Session:
    """What consecutive runs share: the loaded dense model, its perplexity, its activations, and the last pruned state.

    Masks depend on model, criterion, pattern and calibration alone, so granularities that follow one another in a study
    start from the very same ones.

    Args:
        activation_bytes: how much of the dense model's activations and Gram matrices is kept, on disk; 0: none.
    """

    def __init__(self, activation_bytes: int = 0):
        self.activation_bytes = activation_bytes
        self._kept: dict[str, tuple[object, object]] = {}
        self.reused: list[str] = []
        self.dense = self.tokenizer = self.model = None  # of the last run

    def load(self, model: str, revision: str | None, trust_remote_code: bool = False) -> tuple[Decoder, object]:
        """The dense model, taken apart, and its tokenizer."""

        def make():
            loaded, tokenizer = models.load(model, revision, trust_remote_code=trust_remote_code)
            return take_apart(loaded), tokenizer

        key = (model, revision, trust_remote_code)
        if not self.holds("model", key):
            self.clear()  # before there is a second model
        return self.keep("model", key, make)

    def clear(self) -> None:
        """Forgets everything: all that is kept is of one model, or refers to it."""
        self._kept.clear()
        self.dense = self.tokenizer = self.model = None

    def bytes_loaded(self, spec: RunSpec) -> int:
        """How much of what a run of `spec` needs is in memory already: the weights of its model, or nothing."""
        key, value = self._kept.get("model", (None, None))
        return sum(p.nbytes for p in value[0].model.parameters()) if key == spec.loaded_by else 0

    def holds(self, kind: str, key: object) -> bool:
        """Whether `keep` would give what it gave last time."""
        return kind in self._kept and self._kept[kind][0] == key

    def keep(self, kind: str, key: object, make):
        """`make()`, or what it gave last time for the same `kind` if `key` has not changed since."""
        if self.holds(kind, key):
            self.reused.append(kind)
            return self._kept[kind][1]
        self._kept.pop(kind, None)  # frees the memory before the next one is made
        value = make()
        self._kept[kind] = (key, value)
        return value


def run(
    spec: RunSpec,
    session: Session | None = None,
    save: Path | str | None = None,
    command: str = "",
    progress: bool = True,
    stream: str = "auto",
    on_done: Callable[[RunRecord], None] = lambda record: None,
    executor: str | Ray = "serial",
    save_dtype: str = "float32",
) -> RunRecord:
    """Prunes and repairs one model as `spec` says, and returns the record.

    Args:
        session: what runs before this one left in memory to share.
        save: folder for the repaired model as a Hugging Face checkpoint, with the record; must not exist, or be empty. Where it holds
            what this very run saved, that record is given, and nothing is loaded or computed.
        command: the command that asked for this run, for the model card.
        stream: "yes": the model is never in memory as a whole, but read from disk window by window, and the run can be killed at
            any time and goes on when it is called again (see `recon.experiment.streamed`); "no": it is loaded; "auto": it is loaded where it fits
            into memory, unless it was begun streamed. The numbers are the same to the last bit.
        on_done: called with the record once the model is saved. Until it returns, a streamed run can give the record again.
        executor: "serial", or "ray" or `recon.Ray(...)`: workers repair the windows side by side; see `recon.reconstruct`.
        save_dtype: what the model is saved in: "float32", as it was measured; or "bfloat16" or "float16", rounded after that, which halves
            the files. A model in memory (`session.model`) is then left as it was saved.

    Raises:
        ReconError: bad input, or another process that saves to the same folder, before anything long begins.
    """
    from recon.experiment import streamed  # which builds on what is here

    session, save = session or Session(), None if save is None else Path(save)
    checkpoint.check_dtype(save_dtype, save)
    ray_windows.check(executor, spec.reconstruction.propagation)
    if stream == "auto" and streamed.begun(spec, save):
        stream = "yes"  # though it may fit into memory by now
    # What is in memory already fits into it.
    if not (stream == "auto" and session.holds("model", spec.loaded_by)) and streamed.wanted(stream, spec):
        return streamed.run(spec, session, save, command, progress, on_done, executor, save_dtype)
    task = Run(spec, session, progress, executor, save_dtype)
    if save is None:
        record = task.execute(None, command)
    else:
        # The folder itself appears only when it is complete, so the lock lies beside it.
        with lock.held(save.parent / f".{save.name}{lock.NAME}", f"save folder {str(save)!r}"):
            record = checkpoint.finished(save, task.record.key, save_dtype)
            if record is None:
                checkpoint.check_target(save)
                record = task.execute(save, command)
                task.publish(save)
    on_done(record)
    return record


def begun(spec: RunSpec, save: Path | str | None) -> bool:
    """Whether some of a run of `spec` is on the disk already: what a streamed one has finished, or what it has saved."""
    from recon.experiment import streamed

    save = None if save is None else Path(save)
    return streamed.begun(spec, save) or (save is not None and (save / files.RECORD).exists())


class Run:
    """One run with its model in memory."""

    def __init__(
        self, spec: RunSpec, session: Session, progress: bool, executor: str | Ray = "serial", save_dtype: str = "float32"
    ):
        self.spec, self.session, self.progress, self.executor, self.save_dtype = spec, session, progress, executor, save_dtype
        self.record = RunRecord(spec.flat(), spec.key())
        self.device = device.pick_device(spec.compute.device)
        self.store = MemoryStore()
        session.reused.clear()
        session.model = None  # frees the memory of the last run's model, unless somebody else holds it

    def execute(self, save: Path | None, command: str) -> RunRecord:
        """The whole pipeline, dense model first; see `run`."""
        spec, record = self.spec, self.record
        began = time.perf_counter()
        with self.phase("load"):
            self.load()
            biases = [] if spec.model.pruned else pruning.touched_biases(self.dense, spec.pruning.criterion)
            if save is not None:
                checkpoint.check_places(self.dense.model, biases)
                self.check_range()
        self.announce()
        with self.phase("evaluate"):
            # Dense first: a wrong set-up shows before anything is pruned.
            dense, self.references = self.dense_measured()
        student = self.copy_of_dense()
        pruned = self.pruned_student(student)
        record.metrics["under_calibrated_matrices"] = pruned.pruning.under_calibrated
        if spec.model.pruned:
            record.metrics["pattern"] = str(found_pattern(pruned.pruning.masks.values()))
        record.seconds["prune"] = pruned.seconds
        record.peak_memory_bytes_by_phase["prune"] = pruned.peak
        repaired = pruned.measured
        record.seconds["reconstruct"] = record.seconds["retrain"] = 0.0
        if spec.reconstruction.granularity != "none":
            with self.phase("reconstruct"):
                record.windows = [asdict(report) for report in self.reconstruct(student, pruned.pruning.masks)]
        if spec.retraining.method != "none":
            with self.phase("retrain"):
                report = self.retrain(student, pruned.pruning.masks)
            record.retraining, record.seconds["retrain"] = asdict(report), report.seconds
        if spec.reconstruction.granularity != "none" or spec.retraining.method != "none":
            with self.phase("evaluate"):
                repaired = self.measured(student, "repaired")
        self.fill(student, dense, pruned.measured, repaired)
        record.shared = list(self.session.reused)
        record.environment = environment(self.device, spec.compute.compute_dtype) | self.about()
        record.peak_memory_bytes = max(record.peak_memory_bytes_by_phase.values())
        record.status = "done"
        if save is not None:
            if self.save_dtype != "float32":
                record.environment["save_dtype"] = self.save_dtype
            with self.phase("save"):
                self.save(student, save, command)
        record.seconds["total"] = time.perf_counter() - began
        return record

    # --- what a run does in another way where the model is streamed; see `recon.experiment.streamed` ----------------------------

    def load_model(self) -> tuple[Decoder, PreTrainedTokenizerBase]:
        """The dense model, taken apart, and its tokenizer."""
        return self.session.load(*self.spec.loaded_by)

    def dense_measured(self) -> tuple[Measured, dict[str, evaluation.Reference]]:
        """What `measure_dense` gives, now or in an earlier run of the session."""
        return self.session.keep("dense", (*self.spec.loaded_by, self.protocol_key()), self.measure_dense)

    def copy_of_dense(self) -> Decoder:
        """The student before anything is done to it."""
        self.session.model = copy.deepcopy(self.dense.model)
        return take_apart(self.session.model, like=self.dense)

    def pruned_student(self, student: Decoder) -> Pruned:
        """Prunes the student, as `prune` does now or did in an earlier run of the session."""
        found = self.session.keep("pruned", (*self.spec.pruned_by, self.protocol_key()), lambda: self.prune(student))
        pruning.apply(student, found.pruning, found.weights)
        return found

    def take_given(self, student: Decoder) -> pruning.Pruning:
        """Gives the student the weights of the pruned model that the specification names."""
        return external_mask.take_over(student, self.pruned)

    def measured(self, student: Decoder, what: str) -> Measured:
        """What `measure` gives."""
        return self.measure(student, what)

    def save(self, student: Decoder, folder: Path, command: str) -> None:
        """Writes all of the student that `publish` moves to `folder`, and what tells the checkpoint from others into the record."""
        self.complete = checkpoint.write(student.model, self.tokenizer, folder, self.record, command, self.save_dtype)
        self.record.environment["checkpoint"] = files.sha256(self.complete / files.HASHES)

    def publish(self, folder: Path) -> None:
        """Gives what `save` wrote its place, with the record, which is complete by now."""
        try:
            checkpoint.publish(self.complete, folder, self.record)
        except OSError as error:
            raise ReconError(f"checkpoint cannot be written to {str(folder)!r}: {error}") from error
        finally:
            shutil.rmtree(self.complete, ignore_errors=True)

    def peak_memory(self) -> device.PeakMemory:
        return device.PeakMemory(self.device)

    def about(self) -> dict:
        """What the record's environment says beside what it says of every run."""
        return {}

    def announce(self) -> None:
        """Says how long this will take."""
        cost.announce(self.spec, self.dense, self.device)

    # --- the same in any case -----------------------------------------------------------------------------------------

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds up seconds and keeps the highest peak memory of a phase, which may be entered more than once."""
        began = time.perf_counter()
        device.release_memory()  # what is left from before counts as free, and not as this phase's
        with self.peak_memory() as peak:
            yield
        self.record.seconds[name] = self.record.seconds.get(name, 0.0) + time.perf_counter() - began
        record = self.record
        for found, value in (
            (record.peak_memory_bytes_by_phase, peak.bytes),
            (record.added_memory_bytes_by_phase, peak.bytes - peak.before),
        ):
            found[name] = max(found.get(name, 0), value)

    def load(self) -> None:
        """Loads model and texts, and refuses here whatever can be refused."""
        spec = self.spec
        if spec.evaluation.tasks:
            zero_shot.check_tasks(spec.evaluation.tasks)
        self.dense, self.tokenizer = self.load_model()
        self.session.dense, self.session.tokenizer = self.dense, self.tokenizer
        # Everything that can be refused is refused here, before the first long computation.
        self.dense.windows(spec.reconstruction.granularity if spec.reconstruction.granularity != "none" else "block")
        if spec.reconstruction.adapter != "none" or spec.retraining.method not in ("none", "full", "norms"):
            check_adaptable(self.dense)
        if spec.model.pruned:
            self.pruned = self.session.keep("given", spec.pruned_by, self.load_pruned)
        else:
            for name, matrix in self.dense.matrices().items():
                Pattern.parse(spec.pruning.pattern).check_columns(name, matrix.weight.shape[1])
        for length in (spec.calibration.sequence_length, spec.evaluation.length):
            self.dense.check_length(length)
        if spec.evaluation.tasks:
            zero_shot.check_model(self.dense)
        draw = text.sample_tokens
        seed = generator(spec.seed, "calibration").initial_seed() % 2**32
        most = max(spec.samples_by_phase.values())
        # One draw for all phases: each reads the first so many of it.
        self.calibration = draw(
            spec.calibration.text, "calibration", self.tokenizer, most, spec.calibration.sequence_length, seed
        )
        self.held_out = None
        if spec.calibration.held_out_samples:
            self.held_out = draw(
                spec.calibration.text,
                "validation",
                self.tokenizer,
                spec.calibration.held_out_samples,
                spec.calibration.sequence_length,
            )
        self.texts = {
            name: draw(name, "evaluation", self.tokenizer, spec.evaluation.samples, spec.evaluation.length)
            for name in spec.evaluation.texts
        }

    def load_pruned(self) -> Checkpoint:
        """The pruned model that was given, checked but not read into memory."""
        spec = self.spec
        opened = models.load_pruned(spec.model.pruned, self.dense.model, spec.model.pruned_revision, spec.model.trust_remote_code)
        external_mask.check_pruned(self.dense, opened)
        return opened

    def check_range(self) -> None:
        """Raises `ReconError` where the dense model has a weight that is infinite in the dtype that it is to be saved in."""
        if self.save_dtype == "float16":  # the range of the others is that of float32
            lazy = self.dense.lazy
            for name, parameter in self.dense.model.named_parameters():
                with lazy.present([parameter]) if lazy else contextlib.nullcontext():
                    rounded(name, parameter.detach(), SAVED[self.save_dtype])

    def samples(self, phase: str) -> Tensor:
        """The calibration samples that `phase` reads."""
        return self.calibration[: self.spec.samples_by_phase[phase]]

    def protocol_key(self) -> tuple:
        names = "evaluation_texts evaluation_samples evaluation_length tasks task_limit text sequence_length held_out_samples "
        return tuple(self.spec.get(name) for name in (names + "device compute_dtype").split())

    def measure(self, decoder: Decoder, what: str) -> Measured:
        """Everything that is measured of a model."""
        spec = self.spec
        execution = self.execution()

        def perplexity(tokens: Tensor, name: str, states: Tensor | None = None) -> evaluation.Perplexity:
            return evaluation.perplexity(
                decoder, tokens, execution=execution, reference=self.references.get(name), states=states,
                description=f"perplexity ({what}, {name})",
            )  # fmt: skip

        perplexities = {name: perplexity(tokens, name) for name, tokens in self.texts.items()}
        tasks = {}
        if spec.evaluation.tasks:
            limit = spec.evaluation.task_limit or None
            tasks = zero_shot.zero_shot(decoder, self.tokenizer, spec.evaluation.tasks, limit, execution=execution)
        drift, held_out = [], None
        if self.held_out is not None:
            states = None
            if decoder is not self.dense:
                drift, states = evaluation.drift(
                    decoder, self.dense, self.held_out, execution=execution, activations=self.held_out_streams
                )
            held_out = perplexity(self.held_out, "held out", states).value
        return Measured(perplexities, tasks, drift, held_out)

    def measure_dense(self) -> tuple[Measured, dict[str, evaluation.Reference]]:
        """The dense model's own figures, and what the predictions of others are compared with, by text."""
        execution = self.execution()
        self.references = {}
        measured = self.measure(self.dense, "dense")
        first = {name: tokens[: evaluation.KL_WINDOWS] for name, tokens in self.texts.items()}
        states = {name: evaluation.last_states(self.dense, tokens, execution) for name, tokens in first.items()}
        return measured, {name: evaluation.Reference(self.dense, state) for name, state in states.items()}

    def prune(self, student: Decoder) -> Pruned:
        """Prunes the student in place, and measures it."""
        spec = self.spec
        began = time.perf_counter()
        with self.peak_memory() as peak:
            if spec.model.pruned:
                pruned = self.take_given(student)
            else:
                pruned = pruning.prune(student, self.samples("prune"), spec.pruning, seed=spec.seed, execution=self.execution())
        seconds = time.perf_counter() - began
        with self.phase("evaluate"):
            measured = self.measured(student, "pruned")
        return Pruned(pruned, self.changed(student, pruned.masks), measured, seconds, peak.bytes)

    def changed(self, student: Decoder, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The matrices of a pruned student, (out, in) by name, in which more has changed than what is zero."""
        dense = self.dense.matrices()
        return {
            name: matrix.weight.clone()
            for name, matrix in student.matrices().items()
            if not torch.equal(matrix.weight, dense[name].weight * masks[name])
        }

    def activations(self) -> Activations:
        """What is known of the dense model on this run's samples, in its batches."""
        names = "text samples sequence_length held_out_samples seed compute_dtype device"
        key = (*self.spec.loaded_by, *(self.spec.get(name) for name in names.split()))
        return self.kept_on_disk("activations", key, 1 - HELD_OUT_SHARE)

    @functools.cached_property
    def held_out_streams(self) -> Activations:
        """The dense model's residual streams on held-out text, which drift is measured from."""
        names = "text sequence_length held_out_samples compute_dtype device"
        key = (*self.spec.loaded_by, *(self.spec.get(name) for name in names.split()))
        return self.kept_on_disk("held-out", key, HELD_OUT_SHARE)

    def kept_on_disk(self, kind: str, key: tuple, share: float) -> Activations:
        """The session's store for `kind`, of that share of its bytes; an empty one that keeps nothing, where it has none."""
        limit = int(share * self.session.activation_bytes)
        return self.session.keep(kind, key, lambda: Activations(limit, cache_folder())) if limit else Activations(limit=0)

    def reconstruct(self, student: Decoder, masks: dict[str, Tensor]) -> list[reconstruction.WindowReport]:
        spec = self.spec
        return reconstruction.reconstruct(
            student, self.dense, self.samples("reconstruct"), spec.reconstruction, masks=masks, held_out=self.held_out,
            seed=spec.seed, execution=self.execution(self.activations(), ray_windows.loop(self.executor)),
        )  # fmt: skip

    def retrain(self, student: Decoder, masks: dict[str, Tensor]) -> retraining.RetrainingReport:
        """Retrains the student in place; notes the perplexity of a merged LoRA before its mask."""
        spec = self.spec

        run = self

        class Merged(Callback):
            def on_merged(self) -> None:
                name = spec.evaluation.texts[0]
                found = evaluation.perplexity(
                    student, run.texts[name], execution=run.execution(), description=f"perplexity (merged, {name})"
                )
                run.record.metrics["perplexity_before_masking"] = found.value

        return retraining.retrain(
            student, self.samples("retrain"), spec.retraining, masks=masks, dense=self.dense, seed=spec.seed,
            execution=self.execution(), callbacks=[Merged()],
        )  # fmt: skip

    def execution(self, cache: Activations | None = None, loop: Callable | None = None) -> Execution:
        return Execution(self.device, self.spec.compute.compute_dtype, self.store, self.progress, cache, loop)

    def counted(self, student: Decoder) -> tuple[int, dict[str, float]]:
        """How many weights of the matrices are zero, and which share of each matrix."""
        zeros, shares = 0, {}
        for block in student.windows("block"):
            with student.loaded(block):
                for name, matrix in student.matrices(block).items():
                    zeros += int((matrix.weight == 0).sum())
                    shares[name] = sparsity_of(matrix.weight)
        return zeros, shares

    def fill(self, student: Decoder, dense: Measured, pruned: Measured, repaired: Measured) -> None:
        """Writes metrics, tokens, operations and protocol into the record."""
        spec, metrics = self.spec, self.record.metrics
        tokens = {phase: count * spec.calibration.sequence_length for phase, count in spec.samples_by_phase.items()}
        self.record.flops = cost.flops(spec, self.dense)
        by_text, states = {}, {"dense": dense, "pruned": pruned, "repaired": repaired}
        for name in spec.evaluation.texts:
            results = {kind: measured.perplexities[name] for kind, measured in states.items()}
            values = [result.value for result in results.values()]
            by_text[name] = {
                "dense_perplexity": values[0],
                "pruned_perplexity": values[1],
                "perplexity": values[2],
                "share_recovered": share_recovered(*values),
                "nll_per_window": {kind: result.per_window for kind, result in results.items()},
                "kl_per_window": {kind: results[kind].kl_per_window for kind in ("pruned", "repaired")},
                "kl": sum(results["repaired"].kl_per_window) / max(1, len(results["repaired"].kl_per_window)),
            }
        headline = by_text[spec.evaluation.texts[0]]
        metrics.update(
            {name: headline[name] for name in ("dense_perplexity", "pruned_perplexity", "perplexity", "share_recovered")}
        )
        zeros, shares = self.counted(student)
        metrics["sparsity"] = zeros / sum(matrix.weight.numel() for matrix in student.matrices().values())
        metrics["sparsity_by_matrix"] = shares
        metrics["kl"] = headline["kl"]
        metrics["dense_held_out_perplexity"], metrics["held_out_perplexity"] = dense.held_out, repaired.held_out
        if spec.evaluation.tasks:
            metrics["zero_shot"] = {kind: measured.zero_shot for kind, measured in states.items()}
            metrics |= {
                f"{prefix}accuracy": zero_shot.mean_accuracy(states[kind].zero_shot)
                for prefix, kind in (("dense_", "dense"), ("pruned_", "pruned"), ("", "repaired"))
            }
        metrics["held_out_error_pruned"] = pruned.drift[-1] if pruned.drift else None
        metrics["held_out_error"] = repaired.drift[-1] if repaired.drift else None
        metrics["drift_pruned"], metrics["drift"] = pruned.drift, repaired.drift
        metrics["by_text"] = by_text
        self.record.tokens = {
            **tokens,
            "held_out": 0 if self.held_out is None else self.held_out.numel(),
            "evaluation": sum(result.tokens for result in dense.perplexities.values()),
        }
        dtype = str(device.pick_compute_dtype(spec.compute.compute_dtype, self.device)).removeprefix("torch.")
        self.record.protocol = {
            "calibration": (
                ", ".join(f"{phase} {count}" for phase, count in spec.samples_by_phase.items())
                + f" x {spec.calibration.sequence_length} tokens of {spec.calibration.text} (calibration split), seed {spec.seed}"
            ),
            "evaluation": (
                "perplexity: exp of the mean negative log-likelihood over all but the first token of each window; "
                f"{spec.evaluation.samples} consecutive windows x {spec.evaluation.length} tokens of "
                f"{', '.join(spec.evaluation.texts)} (evaluation split), every window on its own; {dtype} products, float32 loss"
            ),
            **({"reading": self.dense.reading} if self.dense.reading else {}),
            "kl": f"KL(dense || model) per token, on the first {evaluation.KL_WINDOWS} evaluation windows",
            "flops": "closed form from the shapes, as if the run shared nothing; see recon.experiment.cost.flops",
            "drift": (
                "mean over tokens of |repaired - dense|^2 / |dense|^2 in the residual stream, on "
                f"{spec.calibration.held_out_samples} x {spec.calibration.sequence_length} tokens of {spec.calibration.text} (validation split)"
            ),
            "held_out_error": "drift after the last block",
            "rejection": (f"a window is put back where its own error on the first {ERROR_SAMPLES} of these samples grew"),
            "zero_shot": f"{', '.join(spec.evaluation.tasks)}: the first {spec.evaluation.task_limit or 'all'} questions of each; scored by lm-eval, float32 logits"
            if spec.evaluation.tasks
            else "none",
            "share_recovered": "1 - log(repaired / dense) / log(pruned / dense), in perplexities",
            "token_hashes": {
                "calibration": _hash(self.calibration),
                **{f"evaluation {name}": _hash(tokens) for name, tokens in self.texts.items()},
            },
        }


def share_recovered(dense: float, pruned: float, repaired: float) -> float | None:
    """1 - log(repaired / dense) / log(pruned / dense), in perplexities; None where pruning did no harm to recover from."""
    if not (math.isfinite(pruned) and math.isfinite(repaired) and pruned > dense):
        return None
    return 1 - math.log(repaired / dense) / math.log(pruned / dense)


def _hash(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
