"""What a run will take, computed without weights: operations, time and memory; and whether it fits here."""

import contextlib
import functools
import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig

from recon.config import ReconstructionConfig
from recon.data import models
from recon.errors import ReconError, log
from recon.evaluate.perplexity import SLICE
from recon.kernels.adapters import ADAPTERS
from recon.kernels.criteria import CRITERIA, admm
from recon.kernels.losses import ELEMENTS
from recon.kernels.moments import triangle
from recon.kernels.patterns import Pattern
from recon.methods import allocation, reorder, weighting
from recon.methods.samples import ERROR_SAMPLES
from recon.methods.training import check_trainable
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.model.skeleton import Lazy, skeleton
from recon.model.structure import Matrix
from recon.model.windows import Window
from recon.runtime import device as devices
from recon.runtime import packed
from recon.runtime.storage import SMALL, cache_folder
from recon.runtime.weights import quantisation
from recon.study.spec import RunOptions, RunSpec

GIB = 2**30
MARGIN = 96 * 2**20  # bytes that shapes do not tell: tokenizer, texts, libraries loaded later, kernels' own memory
WIDTHS = ("hidden_size", "intermediate_size", "_dim", "_rank", "n_embd", "n_inner", "d_model")  # names of widths end in these
EFFICIENCY = 0.6  # share of a bare matrix product's speed that a whole pass reaches, measured on CPUs
STEP = 5e-4  # seconds that each matrix adds to a step, whatever its size; measured on CPUs
UPDATE = 2000  # operations that take as long as rounding, updating and masking one weight (memory-bound); measured on CPUs


def shapes_of(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Decoder:
    """The model called `model` without weights: only its configuration is read, from the Hub or from a folder.

    Its blocks are on torch's meta device. Other parameters are placeholders, so that the model can run up to its blocks
    and show their arguments. Raises `ReconError` for what `recon.data.models` refuses, and for a model that cannot be decomposed.
    """
    content = models.configuration(model, revision, trust_remote_code).to_json_string()
    return _shapes(content, model, revision, trust_remote_code)


@functools.lru_cache(maxsize=4)
def _shapes(content: str, *loaded_by: object) -> Decoder:
    """As `shapes_of`. content: the configuration, as part of the cache's key: it may change while the model's name stays."""
    config, trust_remote_code = models.configuration(*loaded_by), loaded_by[-1]
    made = skeleton(config, trust_remote_code)
    made.tie_weights()
    Lazy(made, lambda names: iter(()))
    decoder = decompose(made, like=_structure(config, trust_remote_code))
    for block in decoder.blocks:
        block.to_empty(device="meta")
    return decoder


def _structure(config: PretrainedConfig, trust_remote_code: bool) -> Decoder:
    """The model of `config`, with its layers made narrower by the largest factor that works, decomposed."""
    names = set(skeleton(config, trust_remote_code).state_dict())
    for factor in (64, 32, 16, 8, 4, 2, 1):
        narrow = type(config).from_dict(config.to_dict())
        options = vars(narrow.get_text_config())
        widths = {name: size for name, size in options.items() if name.endswith(WIDTHS) and type(size) is int}
        # A matrix with one column could be transposed, and one with as many rows as there are experts could be a router.
        experts = {size for name, size in options.items() if "expert" in name and name not in widths}
        if factor > 1 and any(size % factor or size // factor in {1, *experts} for size in widths.values()):
            continue
        options.update({name: size // factor for name, size in widths.items()})
        with contextlib.suppress(Exception if factor > 1 else ()):  # unusual widths may raise anything
            model = skeleton(narrow, trust_remote_code)
            if set(model.state_dict()) == names:
                return decompose(model, lazy=Lazy(model, lambda names: iter(())))


@functools.lru_cache(maxsize=64)
def counted(decoder: Decoder, window: Window, length: int, train: str = "none") -> float:
    """Operations per token of a pass through `window`, in samples of `length` tokens, as torch counts them.

    decoder: from `shapes_of`. train: "none", or what is trained: "matrices", "all" or "norms"; adds the backward pass.
    """
    matrices = decoder.matrices(window).values()
    trained = decoder.trained(window, "all" if train == "norms" else train) if train != "none" else {}
    decoder.model.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(train != "norms" or parameter.ndim == 1)
    width = next(iter(matrices)).weight.shape[1] if window.matrices else decoder.model.config.get_text_config().hidden_size
    try:
        with FlopCounterMode(display=False) as counter:
            output = decoder.forward(window, torch.empty(1, length, width, device="meta"))
            if trained:
                output.sum().backward()
    except Exception:  # some blocks do not run without values, such as those that send tokens to experts
        return sum(matrix.share * matrix.weight.numel() for matrix in matrices) * {"none": 2.0, "norms": 4.0}.get(train, 6.0)
    # Products of activations with each other, as in attention, count half: the mask is causal.
    aten = torch.ops.aten
    by_weights = (aten.mm, aten.addmm, aten.convolution, aten.convolution_backward)
    return sum(n if kind in by_weights else n / 2 for kind, n in counter.get_flop_counts()["Global"].items()) / length


class Training(NamedTuple):
    """`window` is one of `count` windows with equal shapes. For each: forward passes, tokens of all passes, trained elements."""

    phase: str
    how: ReconstructionConfig
    window: Window
    count: int = 1
    passes: int = 0
    tokens: int = 0
    elements: int = 0


def trainings(spec: RunSpec, decoder: Decoder) -> Iterator[Training]:
    """What a run of `spec` (resolved) trains. Retraining has one window, the whole model. Exact solutions have no passes."""
    how, again, length, alike = spec.reconstruction, spec.retraining, spec.calibration.sequence_length, defaultdict(list)
    for window in decoder.windows(how.granularity) if how.granularity != "none" else []:
        alike[window.half, tuple(p.shape for p in decoder.parameters(window).values())].append(window)
    parts = [Training("reconstruct", how, windows[0], len(windows)) for windows in alike.values()]
    if again.retrain != "none":
        same = {name: getattr(again, f"retrain_{name}") for name in ("rank", "epochs", "batch_size", "accumulation")}
        trains = {"adapter": again.retrain} if again.retrain in ADAPTERS else {"train": "all"}
        whole = ReconstructionConfig(granularity="model", **same, **trains)
        parts.append(Training("retrain", whole, Window(range(len(decoder.blocks)))))
    for part in parts:
        how, samples = part.how, spec.samples_by_phase[part.phase]
        epochs = how.schedule(samples).epochs * (how.solver == "adamw")
        passes = epochs * -(-samples * how.chunks_of(part.window, length) // how.batch_size)
        elements = sum(parameter.numel() for parameter in decoder.trained(part.window, how.train).values())
        if part.phase == "retrain":  # also of embedding and head
            vectors = again.retrain == "norms"
            elements = sum(weight.numel() for weight in decoder.model.parameters() if weight.ndim == 1 or not vectors)
        if how.adapter != "none":
            elements = how.rank * sum(sum(matrix.weight.shape) for matrix in decoder.matrices(part.window).values())
        yield part._replace(passes=passes, tokens=epochs * samples * length, elements=elements)


def check_fits(spec: RunSpec, decoder: Decoder) -> None:
    """Raises `ReconError` for what the model cannot do: windows, adapters, patterns, lengths; and for too few samples."""
    spec.pruning.on(spec.samples_by_phase["prune"])
    granularity = spec.reconstruction.granularity
    decoder.windows("block" if granularity == "none" else granularity)
    for method in (spec.reconstruction.adapter, spec.retraining.retrain):
        check_trainable(decoder, method)
    pattern = Pattern.parse(spec.pruning.pattern)
    for name, matrix in decoder.matrices().items():
        pattern.check_columns(name, matrix.weight.shape[1])
    for length in (spec.calibration.sequence_length, spec.evaluation.evaluation_length):
        decoder.check_length(length)


def flops(spec: RunSpec) -> dict[str, float]:
    """Floating-point operations of a run of `spec` by phase: "prune", "reconstruct", "retrain", "evaluate" (without tasks).

    Only products count (with weights, in causal attention, of Gram matrices, adapters and solvers), as if the run shared nothing.
    """
    spec, decoder = spec.resolved(), shapes_of(*spec.loaded_by)
    how, again, pruning, length = spec.reconstruction, spec.retraining, spec.pruning, spec.calibration.sequence_length
    matrices, whole = decoder.matrices(), Window(range(len(decoder.blocks)))
    weights = {name: matrix.share * matrix.weight.numel() for name, matrix in matrices.items()}  # used per token, on average
    forward, tokens = counted(decoder, whole, length), {phase: count * length for phase, count in spec.samples_by_phase.items()}
    predicted = decoder.predicted(torch.empty(1, 2)).shape[1] / 2  # share of tokens; half in an encoder-decoder
    head = predicted * 2 * sum(weight.numel() for weight in decoder.head_weights())
    read = [matrices[group[0]] for groups in decoder.groups for group in groups]
    grams = sum(2 * triangle(matrix.weight.shape[1]) * matrix.share for matrix in read)
    products = sum(matrix.weight.shape[0] * matrix.weight.shape[1] ** 2 for matrix in matrices.values())  # with Gram matrices

    passes = 0 if spec.one_pass or pruning.gathers == "none" else 1
    if pruning.statistics == "sparse" and CRITERIA[pruning.criterion].scope != "model":  # each block but the last runs once more
        passes *= 1 + (1 - 1 / len(decoder.blocks))
    by_grams = pruning.gathers == "gram"
    found = {"prune": (passes * forward + by_grams * grams) * tokens["prune"], "reconstruct": 0.0, "retrain": 0.0}
    if pruning.gathers == "gradient":
        found["prune"] += counted(decoder, whole, length, "matrices") * tokens["prune"]
    found["prune"] += forward * tokens["prune"] * (pruning.allocation == "dlp")
    found["prune"] += forward * min(reorder.TOKENS, tokens["prune"]) * pruning.reorder_neurons
    if pruning.weighting == "fisher":
        found["prune"] += (3 * forward + 2 * head) * min(weighting.TOKENS, tokens["prune"])
    if pruning.allocation == "measured":
        found["prune"] += forward * min(allocation.NORMS, tokens["prune"])
        probed = min(allocation.PROBES * allocation.LENGTH, tokens["prune"])
        found["prune"] += len(decoder.blocks) * probed * (forward / 2 + head / allocation.EVERY)
    if pruning.criterion == "sparsegpt":
        found["prune"] += products + sum(2 * matrix.weight.shape[1] ** 3 for matrix in read)
    if pruning.criterion == "admm":
        found["prune"] += 2 * products * (admm.ROUNDS + admm.ITERATIONS + 2)
        found["prune"] += admm.ROUNDS / admm.EVERY * sum(matrix.weight.shape[1] ** 3 for matrix in matrices.values())

    parts = [*trainings(spec, decoder)]
    for part in parts:
        per_token, per_pass = counted(decoder, part.window, length, part.how.train), 0.0
        if part.how.adapter != "none":  # products that give weights, and gradients of adapters
            per_pass = 6 * part.how.rank * sum(map(weights.get, decoder.matrices(part.window)))
        if part.phase == "retrain":
            if again.retrain == "norms":
                per_token = counted(decoder, whole, length, "norms")
            per_token += head * (3 if again.retrain == "full" else 2) + forward * again.retrain_checkpointing
            per_token += (forward + head) * (again.retrain_objective == "distil")
            per_pass *= 4 / 3 if again.retrain_checkpointing else 1
        found[part.phase] += part.count * (per_token * part.tokens + per_pass * part.passes)

    if how.granularity != "none":
        # The dense model's pass, and unless propagation is dense, the student's, which ends where the last window begins.
        left = 1 - len(decoder.windows(how.granularity)[-1].blocks) / len(decoder.blocks)
        per_token = forward * (1 + (how.propagation != "dense") * left)
        if how.granularity == "matrix":  # targets: one product per matrix; mixed inputs: the block runs up to it
            per_token += 2 * sum(weights.values()) + forward * (how.propagation == "mixed")
        if "exact" in (how.solver, how.start):
            found["reconstruct"] += grams * tokens["reconstruct"] + 2 * products * (1 + how.exact_iterations)
            if how.granularity == "matrix" and how.propagation == "mixed":  # products of targets with inputs
                per_token += 2 * sum(weights.values())
        # Errors: samples pass through the student's windows before and after the fit; held-out ones through dense windows, too.
        unseen = spec.calibration.held_out_samples
        errors = min(ERROR_SAMPLES, unseen or spec.calibration.samples) * length * forward * ((unseen > 0) + 2)
        found["reconstruct"] += per_token * tokens["reconstruct"] + errors

    windows, read, measured = spec.evaluation.windows.values(), spec.evaluation.evaluation_length, 2 + (len(parts) > 0)  # models
    evaluated = measured * sum(windows) * read * (head + counted(decoder, whole, read))
    evaluated += (measured - 1) * sum(min(count, spec.evaluation.kl_windows) for count in windows) * read * head
    # To measure drift, the dense model runs again beside each other model.
    held_out = spec.calibration.held_out_samples * length * (measured * head + (2 * measured - 1) * forward)
    return found | {"evaluate": evaluated + held_out}


@functools.cache
def gemm_rate(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Floating-point operations per second of a square matrix product on this machine, measured once per process."""
    square = {"x": torch.ones(size, size, device=device, dtype=dtype)}
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():  # the device that the timer waits for
        return 2 * size**3 / Timer("x @ x", globals=square, num_threads=torch.get_num_threads()).timeit(20).mean


def duration(seconds: float) -> str:
    """`seconds` as text, in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def window_memory(decoder: Decoder, spec: RunSpec, device: torch.device, run_only: Window | None = None) -> dict[str, int]:
    """Bytes by purpose of the largest window that a run of `spec` trains, or of `run_only`; empty if there is no window.

    "parameters": needed to run it. "gradients", "moments" (AdamW's two): of trained elements. "copies": to roll back to.
    "rounded": weights in the compute dtype, and masks. "activations": what a batch's forward pass keeps for the backward pass.
    "statistics": Gram matrices, and room to factor one, or squared gradients. "logits": of retraining, and their gradients.
    """
    itemsize, length = devices.pick_compute_dtype(spec.compute.compute_dtype, device).itemsize, spec.calibration.sequence_length
    config, largest, masks = decoder.model.config.get_text_config(), {}, 4 if device.type == "cpu" else 1
    others = [Training("prune", ReconstructionConfig(), run_only)] if run_only else []
    for phase, how, window, _, passes, _, elements in (*others, *trainings(spec, decoder)):
        matrices, descends, retrains = decoder.matrices(window), passes > 0, phase == "retrain"
        weights = sum(matrix.weight.numel() for matrix in matrices.values())
        norms = 0 if window.matrices else 2 * 4 * config.hidden_size * window.halves  # their inputs and outputs
        chunks = how.chunks_of(window, length)
        tokens = min(how.batch_size, spec.samples_by_phase[phase] * chunks) * length // chunks
        read = (group[0] for index in window.blocks for group in decoder.groups[index])
        columns = [matrices[name].weight.shape[1] for name in read if name in matrices]
        by_grams = spec.pruning.gathers == "gram" or "exact" in (how.solver, how.start)
        by_slopes = spec.pruning.gathers == "gradient" and not retrains
        goes_back = by_slopes or spec.pruning.weighting == "fisher" and not retrains
        grams = 4 * (sum(each**2 for each in columns) + 6 * max(columns, default=0) ** 2) if by_grams and not retrains else 0
        vectors = retrains and spec.retraining.retrain == "norms"
        kept = len(decoder.blocks) if retrains and spec.retraining.retrain_checkpointing else 1  # keeps one block at a time
        sizes = {
            "parameters": 4 * sum(tensor.numel() for tensor in decoder.needed(window)),
            "gradients": descends * 4 * elements,
            "moments": descends * 8 * elements,
            "copies": 4 * (elements if vectors else max(weights, elements)),
            "rounded": descends * weights * (masks + itemsize * (itemsize < 4 or how.adapter != "none")),
            "activations": (descends or goes_back) * int(tokens * (itemsize * _width(matrices.values()) + norms)) // kept,
            "statistics": grams + 12 * weights * by_slopes,
        }
        if retrains:
            sizes["logits"] = 2 * tokens * config.vocab_size * itemsize
        largest = max(largest, sizes, key=lambda sizes: sum(sizes.values()))
    return largest


def models_in_memory(spec: RunSpec) -> int:
    """The least bytes that a run in memory takes, in float32: for the dense model and its copy, for weights that pruning changes
    beyond setting some to zero, and for a model with reordered neurons."""
    return 4 * shapes_of(*spec.loaded_by).model.num_parameters() * (2 + spec.changes_weights + spec.pruning.reorder_neurons)


def stays_on_disk(spec: RunSpec, stream: str, room: float) -> bool:
    """Whether a run of `spec` is streamed, with `room` bytes of memory. Raises `ReconError` if it must be, but cannot."""
    if stream == "auto":
        stream = "no"
        with contextlib.suppress(ReconError):  # loading the model will say what is wrong
            stream = "auto" if room < models_in_memory(spec) else "no"
    if stream == "no":
        return False
    why = why_in_memory(spec)
    if why and stream == "yes":
        raise ReconError(f"{why}, which a streamed run cannot do, as it has one window in memory; use stream no")
    if why:
        log.warning("model %r may not fit into memory, but %s and cannot be streamed", spec.model.model, why)
    return not why


def why_in_memory(spec: RunSpec) -> str:
    """Why a run of `spec` cannot be streamed; empty if it can."""
    if spec.retraining.retrain != "none":
        return f"retraining (retrain {spec.retraining.retrain}) trains the whole model at once"
    if spec.pruning.reorder_neurons:
        return "reordering neurons (reorder_neurons) changes the dense model"
    found = quantisation(models.configuration(*spec.loaded_by))
    return f"reading model {spec.model.model!r} undoes its quantisation ({found['quant_method']})" if found else ""


class Plan:
    """What a run of `spec` takes on this machine, computed from its model's configuration: no weights or texts are read.

    memory: peak bytes by kind of device and by purpose; "process": what this process uses already. rooms: by place, the bytes
    that the run needs and those available. flops, seconds: by phase. streamed: whether the model stays on disk.

    options: whether the run is streamed, what it saves and where. loaded: bytes of the weights that are already in memory.
    memory_gib: free host memory in GiB, not counting what this process uses already; default: what is free here.
    """

    def __init__(self, spec: RunSpec, options: RunOptions = RunOptions(), loaded: int = 0, memory_gib: float | None = None):
        self.spec = spec = spec.resolved()
        self.decoder = decoder = shapes_of(*spec.loaded_by)
        check_fits(spec, decoder)
        device = devices.pick_device(spec.compute.device)
        if memory_gib is not None and not memory_gib > 0:
            raise ReconError(f"memory is {memory_gib}; allowed: a number of GiB above 0")
        room = devices.available_memory() if memory_gib is None else memory_gib * GIB
        self.elements = decoder.model.num_parameters()
        self.streamed = stays_on_disk(spec, options.stream, room)
        self.memory = self._peak(device)
        if options.save:
            beside = 1 + (options.save_format == "packed")  # the plain files are there until they are packed
            self.memory["disk"]["saved model"] = devices.SAVED[options.save_dtype].itemsize * self.elements * beside
        self.memory["cpu"]["process"] = process = devices.resident(anonymous=self.streamed)  # mapped files do not count
        self.rooms = {"memory": (sum(self.memory["cpu"].values()), room + process + loaded)}
        if device.type == "cuda":
            cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # which the run can use
            self.rooms[f"memory on {device}"] = sum(self.memory["cuda"].values()), torch.cuda.mem_get_info(device)[0] + cached
        if options.save or self.streamed:
            folder = (options.save or cache_folder()).absolute()
            there = next(place for place in (folder, *folder.parents) if place.exists())
            self.rooms["disk"] = sum(self.memory["disk"].values()), shutil.disk_usage(there).free
        self.flops, steps = flops(spec), Counter()
        speed = EFFICIENCY * gemm_rate(device, devices.pick_compute_dtype(spec.compute.compute_dtype, device))
        for part in trainings(spec, decoder):
            seconds = UPDATE * part.elements / speed + STEP * len(decoder.matrices(part.window))
            steps[part.phase] += part.count * part.passes * seconds
        self.seconds = {phase: count / speed + steps[phase] for phase, count in self.flops.items()}

    def _peak(self, device: torch.device) -> dict[str, dict[str, float]]:
        """Peak bytes by kind of device and purpose: both models, unless streamed; activations of all samples, unless in mapped
        files; the largest window (or a block that is only run, or the retrained model); logits; `MARGIN` for the rest."""
        spec, decoder, block, length = self.spec, self.decoder, Window(range(1)), self.spec.calibration.sequence_length
        config, again, read = decoder.model.config.get_text_config(), spec.retraining, spec.samples_by_phase
        itemsize = devices.pick_compute_dtype(spec.compute.compute_dtype, device).itemsize
        window, tokens, copies = window_memory(decoder, spec, device, block), min(spec.evaluation.evaluation_length, SLICE), 2
        if again.retrain != "none":
            tokens = min(again.retrain_batch_size, read["retrain"]) * length
            copies = 4 + (again.retrain_objective == "distil")
            window["copies"] = window["parameters"]  # briefly, while adapters are merged or the optimiser steps
        if spec.reconstruction.accumulation == again.retrain_accumulation == 1:  # gradients are made as activations are freed
            window["gradients"] = max(0, window["gradients"] - window["activations"])
        window["logits"] = tokens * config.vocab_size * copies * itemsize + 12 * min(tokens * config.vocab_size, ELEMENTS)

        # How many streams exist at once, found by measuring: in memory; in files, mapped ones included, of a streamed run.
        there, written = {"dense": (2, 4), "sparse": (4, 5), "mixed": (4, 7)}[spec.reconstruction.propagation]
        width = 4 * there * config.hidden_size
        if spec.reconstruction.granularity == "matrix":  # also inputs and outputs of all matrices of a block
            width += itemsize * int(_width(decoder.matrices(block).values()))
        streams = width * length * (read["reconstruct"] + min(spec.calibration.held_out_samples, ERROR_SAMPLES))
        other = [count * spec.evaluation.evaluation_length for count in spec.evaluation.windows.values()]
        # Passes without training also hold the inputs and outputs of all samples.
        other += [read["prune"] * length, 2 * spec.calibration.held_out_samples * length]  # through two models
        if spec.pruning.weighting == "fisher":  # the inputs of all blocks
            other += [(len(decoder.blocks) + 3) * min(weighting.TOKENS, read["prune"] * length) // 2]
        streams = max(streams, 8 * config.hidden_size * max(other))
        stored = 5 + 4 * spec.changes_weights + 4 * packed.is_packed(Path(spec.model.model))  # bytes of each weight
        written = max(streams / there * written, 16 * config.hidden_size * read["prune"] * length)
        disk = {"work folder": stored * self.elements + written} if self.streamed else {}
        kept = {"streams": streams, "margin": MARGIN, "models": models_in_memory(spec)}
        if self.streamed:
            kept |= {"streams": min(streams, SMALL), "models": 0}
            window["copies"] = min(window["copies"], SMALL)
        # Embedding and head of both models, while they are compared; if streamed, only the head.
        blocks = sum(parameter.numel() for parameter in decoder.blocks.parameters())
        ends = sum(weight.numel() for weight in decoder.head_weights()) if self.streamed else self.elements - blocks
        if self.streamed or device.type == "cuda":
            window["parameters"] = max(window["parameters"], 8 * ends)
        if device.type == "cuda":
            if again.retrain != "none":  # whole models; the copy to roll back to is on the host
                window["parameters"] = 4 * self.elements * (1 + (again.retrain_objective == "distil"))
                kept["copies"] = 4 * self.elements
            if not self.streamed:  # pinned memory is allocated in powers of two
                one = 4 * config.hidden_size * length * spec.calibration.samples
                kept["streams"] *= 2 ** math.ceil(math.log2(one)) / one
            return {"cpu": kept, "cuda": window, "disk": disk}
        return {"cpu": window | kept | ({} if self.streamed else {"parameters": 0}), "disk": disk}  # counted in "models"

    @property
    def problem(self) -> str:
        """Why the run cannot fit here, and what to try; empty if it can."""
        kinds = dict(zip(self.rooms, self.memory))  # kind of device of each room: both have the same order
        tight = {room: (needs / GIB, has / GIB) for room, (needs, has) in self.rooms.items() if needs > has}
        said = " and ".join(f"{needs:.1f} GiB of {room}, of which there are {has:.1f}" for room, (needs, has) in tight.items())
        most = {max(self.memory[kinds[room]], key=self.memory[kinds[room]].get) for room in tight if room != "disk"}
        granularity, again = self.spec.reconstruction.granularity, self.spec.retraining
        tries = ["fewer or shorter samples"] if most == {"streams"} else ["smaller windows"] * (granularity != "none")
        tries += ["--retrain-checkpointing"] * (again.retrain != "none" and not again.retrain_checkpointing)
        tries += ["--stream yes"] * (not self.streamed and not why_in_memory(self.spec))
        elsewhere = "; save to another disk, or have RECON_CACHE name a folder there" * ("disk" in tight)
        smaller = f"; try {' or '.join(tries)}" * bool(most and tries)
        return said and f"this run needs {said}{smaller}{elsewhere}"

    def __str__(self) -> str:
        spec, granularity = self.spec, self.spec.reconstruction.granularity
        pruned, how = spec.model.pruned, spec.pruning
        mask = f"{how.criterion} {how.pattern}" if pruned is None else f"the mask of {pruned}"
        times = ", ".join(f"{phase} {duration(value)}" for phase, value in self.seconds.items() if value)
        total = duration(sum(self.seconds.values()))
        needs = ", ".join(f"{needs / GIB:.2f} GiB of {has / GIB:.2f} GiB {room}" for room, (needs, has) in self.rooms.items())
        rows = {
            "run": f"{spec.model.model}, {mask}, {granularity}: about {total} on this machine "
            f"({times}{', without tasks' * bool(spec.evaluation.tasks)}); "
            f"about {self.rooms['memory'][0] / GIB:.1f} GiB of memory",
            "model": f"{self.elements:,} parameters, kept {'on disk' if self.streamed else 'in memory'}",
            "windows": f"{len(self.decoder.windows(granularity)) if granularity != 'none' else 0} of {granularity}",
            "operations": ", ".join(f"{phase} {count:.1e}" for phase, count in self.flops.items() if count),
        }
        for kind, parts in self.memory.items():
            if said := ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in parts.items() if size >= 0.01 * GIB):
                rows[f"on {kind}"] = said
        rows["verdict"] = self.problem or f"fits: {needs}"
        return "\n".join(f"{name:12} {value}" for name, value in rows.items())


def check(spec: RunSpec, options: RunOptions = RunOptions(), loaded: int = 0) -> None:
    """Logs in one line what a run of `spec` will take; see `Plan`. Raises `ReconError` if it cannot fit, unless forced."""
    try:
        planned = Plan(spec, options, loaded)
    except ReconError as error:  # the run itself will say what is wrong with it, if anything is
        log.debug("no plan: %s", error)
        return
    if planned.problem and not options.force:
        raise ReconError(planned.problem)
    log.info("%s", str(planned).partition("\n")[0].removeprefix("run").strip())


def announce(specs: list[RunSpec]) -> None:
    """Logs how long a study of `specs` takes at most: less if runs share results. The time for tasks is not counted."""
    spent, unknown, tasks = 0.0, 0, " without tasks" * any(spec.evaluation.tasks for spec in specs)
    for spec, count in Counter(replace(spec, seed=0) for spec in specs).items():
        try:
            spent += count * sum(Plan(spec).seconds.values())
        except ReconError:  # the run's record will say what is wrong, or the run is for another machine
            unknown += count
    said = f"{tasks}, but for {unknown} that cannot be planned here" if unknown else tasks
    log.info("study: %d runs, at most %s on this machine%s", len(specs), duration(spent), said)


def _width(matrices: Iterable[Matrix]) -> float:
    """Elements per token of the inputs and outputs of `matrices`."""
    return sum(matrix.share * sum(matrix.weight.shape) for matrix in matrices)
