"""One run from a specification to a record: text -> decoder -> prune -> reconstruct -> evaluate."""

import copy
import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from recon import checkpoint, device, estimate, evaluation, models, pruning, reconstruction, text
from recon.activations import Activations
from recon.assets import cache_folder
from recon.decoder import Decoder
from recon.environment import environment
from recon.seeds import generator
from recon.sparsity import Pattern, sparsity_of
from recon.spec import RunRecord, RunSpec


@dataclass
class _Pruned:
    """A pruned state that several runs start from: weights of the matrices where pruning changed them, masks, figures."""

    pruning: pruning.Pruning
    weights: dict[str, Tensor]
    perplexities: dict[str, evaluation.Perplexity]
    drift: list[float]
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

    def keep(self, kind: str, key: object, make):
        """`make()`, or what it gave last time for the same `kind` if `key` has not changed since."""
        if kind in self._kept and self._kept[kind][0] == key:
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
) -> RunRecord:
    """Prunes and repairs one model as `spec` says, and returns the record.

    Args:
        session: what runs before this one left in memory to share.
        save: folder for the repaired model as a Hugging Face checkpoint; must not exist, or be empty.
        command: the command that asked for this run, for the model card.

    Raises:
        ReconError: bad input, before anything long begins.
    """
    if save is not None:
        checkpoint.check_target(Path(save))
    return _Run(spec, session or Session(), progress).execute(None if save is None else Path(save), command)


class _Run:
    def __init__(self, spec: RunSpec, session: Session, progress: bool):
        self.spec, self.session, self.progress = spec, session, progress
        self.record = RunRecord(asdict(spec), spec.key())
        self.device = device.pick_device(spec.device)
        session.reused.clear()
        session.model = None  # frees the memory of the last run's model, unless somebody else holds it

    def execute(self, save: Path | None, command: str) -> RunRecord:
        """The whole pipeline, dense model first; see `run`."""
        spec, record = self.spec, self.record
        began = time.perf_counter()
        with self.phase("load"):
            self.load()
        estimate.announce(spec, self.dense, self.device)
        with self.phase("evaluate"):
            # Dense first: a wrong set-up shows before anything is pruned.
            key = (spec.model, spec.revision, self.protocol_key())
            dense = self.session.keep("dense_perplexity", key, lambda: self.perplexities(self.dense, "dense"))
        model = copy.deepcopy(self.dense.model)
        student = Decoder(model, like=self.dense)
        pruned = self.session.keep("pruned", self.pruned_key(), lambda: self.prune(student))
        with torch.no_grad():
            for name, matrix in student.matrices().items():
                matrix.weight.copy_(pruned.weights.get(name, matrix.weight) * pruned.pruning.masks[name])
        record.seconds["prune"] = pruned.seconds
        record.peak_memory_bytes_by_phase["prune"] = pruned.peak
        repaired, drift = pruned.perplexities, pruned.drift
        record.seconds["reconstruct"] = 0.0
        if spec.granularity != "none":
            with self.phase("reconstruct"):
                record.windows = reconstruction.summary(self.reconstruct(student, pruned.pruning.masks))
            with self.phase("evaluate"):
                repaired = self.perplexities(student, "repaired")
                drift = self.drift(student)
        self.fill(student, dense, pruned, repaired, drift)
        record.shared = list(self.session.reused)
        record.environment = environment(self.device, spec.compute_dtype)
        record.peak_memory_bytes = max(record.peak_memory_bytes_by_phase.values())
        record.status = "done"
        self.session.model = model
        if save is not None:
            with self.phase("save"):
                checkpoint.save(model, self.tokenizer, save, record, command)
        record.seconds["total"] = time.perf_counter() - began
        return record

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds up seconds and keeps the highest peak memory of a phase, which may be entered more than once."""
        began = time.perf_counter()
        with device.PeakMemory(self.device) as peak:
            yield
        self.record.seconds[name] = self.record.seconds.get(name, 0.0) + time.perf_counter() - began
        peaks = self.record.peak_memory_bytes_by_phase
        peaks[name] = max(peaks.get(name, 0), peak.bytes)

    def load(self) -> None:
        """Loads model and texts, and refuses here whatever can be refused."""
        spec = self.spec

        def make():
            model, tokenizer = models.load(spec.model, spec.revision)
            return Decoder(model), tokenizer

        self.dense, self.tokenizer = self.session.keep("model", (spec.model, spec.revision), make)
        self.session.dense, self.session.tokenizer = self.dense, self.tokenizer
        # Everything that can be refused is refused here, before the first long computation.
        self.dense.windows(spec.granularity if spec.granularity != "none" else "block")
        for name, matrix in self.dense.matrices().items():
            Pattern.parse(spec.pattern).check_columns(name, matrix.weight.shape[1])
        for length in (spec.sequence_length, spec.evaluation_length):
            evaluation.check_length(self.dense, length)
        draw = text.sample_tokens
        seed = generator(spec.seed, "calibration").initial_seed() % 2**32
        self.samples = draw(spec.text, "calibration", self.tokenizer, spec.samples, spec.sequence_length, seed)
        self.held_out = None
        if spec.held_out_samples:
            self.held_out = draw(spec.text, "validation", self.tokenizer, spec.held_out_samples, spec.sequence_length)
        self.texts = {
            name: draw(name, "evaluation", self.tokenizer, spec.evaluation_samples, spec.evaluation_length)
            for name in spec.evaluation_texts
        }

    def protocol_key(self) -> tuple:
        spec = self.spec
        return spec.evaluation_texts, spec.evaluation_samples, spec.evaluation_length, spec.device, spec.compute_dtype

    def pruned_key(self) -> tuple:
        names = "model revision text samples sequence_length criterion pattern scope prune_propagation sparsegpt_block_size "
        names += "sparsegpt_damping swaps held_out_samples seed"
        return (*(getattr(self.spec, name) for name in names.split()), self.protocol_key())

    def perplexities(self, decoder: Decoder, what: str) -> dict[str, evaluation.Perplexity]:
        return {
            name: evaluation.perplexity(
                decoder, tokens, self.spec.compute_dtype, self.progress, f"perplexity ({what}, {name})", self.device
            )
            for name, tokens in self.texts.items()
        }

    def drift(self, student: Decoder) -> list[float]:
        if self.held_out is None:
            return []
        return evaluation.drift(student, self.dense, self.held_out, self.spec.compute_dtype, self.device)

    def prune(self, student: Decoder) -> _Pruned:
        """Prunes the student in place, and measures it."""
        spec = self.spec
        options = {}
        if spec.criterion == "sparsegpt":
            options = {"block_size": spec.sparsegpt_block_size, "damping": spec.sparsegpt_damping}
        began = time.perf_counter()
        with device.PeakMemory(self.device) as peak:
            pruned = pruning.prune(
                student, self.samples, spec.criterion, spec.pattern, spec.scope, spec.prune_propagation,
                spec.seed, spec.swaps, spec.compute_dtype, self.device, self.progress, **options,
            )  # fmt: skip
        seconds = time.perf_counter() - began
        dense = self.dense.matrices()
        weights = {
            name: matrix.weight.clone()
            for name, matrix in student.matrices().items()
            if not torch.equal(matrix.weight, dense[name].weight * pruned.masks[name])
        }
        with self.phase("evaluate"):
            perplexities, drift = self.perplexities(student, "pruned"), self.drift(student)
        return _Pruned(pruned, weights, perplexities, drift, seconds, peak.bytes)

    def activations(self) -> Activations:
        """What is known of the dense model on this run's samples, in its batches."""
        names = "model revision text samples sequence_length held_out_samples seed compute_dtype device"
        key = tuple(getattr(self.spec, name) for name in names.split())
        return self.session.keep("activations", key, lambda: Activations(self.session.activation_bytes, cache_folder()))

    def reconstruct(self, student: Decoder, masks: dict[str, Tensor]) -> list[reconstruction.WindowReport]:
        spec = self.spec
        return reconstruction.reconstruct(
            student, self.dense, self.samples, masks, spec.granularity, spec.propagation, spec.solver, spec.start,
            spec.loss, spec.schedule, self.held_out, spec.exact, spec.train, self.activations(), spec.seed, spec.compute_dtype,
            self.device, self.progress,
        )  # fmt: skip

    def fill(self, student: Decoder, dense: dict, pruned: _Pruned, repaired: dict, drift: list[float]) -> None:
        """Writes metrics, tokens and protocol into the record."""
        spec, metrics = self.spec, self.record.metrics
        by_text = {}
        for name in spec.evaluation_texts:
            values = [result[name].value for result in (dense, pruned.perplexities, repaired)]
            by_text[name] = {
                "dense_perplexity": values[0],
                "pruned_perplexity": values[1],
                "perplexity": values[2],
                "share_recovered": share_recovered(*values),
                "nll_per_window": {
                    kind: result[name].per_window
                    for kind, result in (("dense", dense), ("pruned", pruned.perplexities), ("repaired", repaired))
                },
            }
        headline = by_text[spec.evaluation_texts[0]]
        metrics.update(
            {name: headline[name] for name in ("dense_perplexity", "pruned_perplexity", "perplexity", "share_recovered")}
        )
        weights = {name: matrix.weight for name, matrix in student.matrices().items()}
        zeros = sum(int((weight == 0).sum()) for weight in weights.values())
        metrics["sparsity"] = zeros / sum(weight.numel() for weight in weights.values())
        metrics["sparsity_by_matrix"] = {name: sparsity_of(weight) for name, weight in weights.items()}
        metrics["held_out_error_pruned"] = pruned.drift[-1] if pruned.drift else None
        metrics["held_out_error"] = drift[-1] if drift else None
        metrics["drift_pruned"], metrics["drift"] = pruned.drift, drift
        metrics["by_text"] = by_text
        self.record.tokens = {
            "calibration": self.samples.numel(),
            "held_out": 0 if self.held_out is None else self.held_out.numel(),
            "evaluation": sum(result.tokens for result in dense.values()),
        }
        dtype = str(device.pick_compute_dtype(spec.compute_dtype, self.device)).removeprefix("torch.")
        self.record.protocol = {
            "calibration": f"{spec.samples} x {spec.sequence_length} tokens of {spec.text} (calibration split), seed {spec.seed}",
            "evaluation": (
                "perplexity: exp of the mean negative log-likelihood over all but the first token of each window; "
                f"{spec.evaluation_samples} consecutive windows x {spec.evaluation_length} tokens of "
                f"{', '.join(spec.evaluation_texts)} (evaluation split), every window on its own; {dtype} products, float32 loss"
            ),
            "held_out_error": (
                "mean over tokens of |repaired - dense|^2 / |dense|^2 after the last block, on "
                f"{spec.held_out_samples} x {spec.sequence_length} tokens of {spec.text} (validation split)"
            ),
            "share_recovered": "1 - log(repaired / dense) / log(pruned / dense), in perplexities",
            "token_hashes": {
                "calibration": _hash(self.samples),
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
