"""What a run takes, before it starts and without weights: operations, time, memory, disk; and whether it fits here."""

import contextlib
import functools
import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig

from recon.config import ReconstructionConfig
from recon.data import models
from recon.errors import ReconError
from recon.evaluate.perplexity import SLICE
from recon.kernels import criteria
from recon.kernels.adapters import ADAPTERS
from recon.kernels.losses import ELEMENTS
from recon.kernels.moments import triangle
from recon.methods.samples import ERROR_SAMPLES
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.model.encoder_decoder import EncoderDecoder
from recon.model.modules import kind_of
from recon.model.skeleton import Lazy, skeleton
from recon.model.windows import Window
from recon.runtime import device as devices
from recon.runtime.device import HOST
from recon.runtime.storage import SMALL, cache_folder
from recon.study import streaming
from recon.study.spec import RunOptions, RunSpec

log = logging.getLogger("recon")
GIB = 2**30
LONG = 600  # seconds: runs that are expected to take longer say their whole plan before they start
LARGE = 0.3  # of the available memory: so do those that take more
MARGIN = 96 * 2**20  # bytes of what no shape tells: tokenizer, texts, libraries loaded later, kernels' own memory
WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "_dim",
    "_rank",
    "n_embd",
    "n_inner",
    "d_model",
)  # how options of a layer's widths end
EFFICIENCY = 0.6  # of a bare matrix product's speed that a whole pass reaches, measured on CPUs
STEP = 0.5e-3  # seconds of a training step for each matrix, beside products and updates: what Python and autograd take, measured on CPUs


# --- a model without weights ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def shapes_of(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Decoder:
    """The model called `model` without weights: of the Hub's files, or those of a folder, the configuration alone is read.

    Its blocks are on torch's meta device; outside them there are placeholders, so that the model itself says what its blocks are
    called with. Raises `ReconError` for what `recon.data.models` refuses, and for a model that cannot be decomposed.
    """
    config = models.configuration(model, revision, trust_remote_code)
    made = skeleton(config)
    made.tie_weights()
    Lazy(made, lambda names: iter(()))
    structure = _structure(config)
    decoder = decompose(made, like=structure)
    if isinstance(decoder, EncoderDecoder):  # learnt by running blocks, which with some masks takes values
        decoder.shared = structure.shared
    for block in decoder.blocks:
        block.to_empty(device="meta")
    return decoder


def _structure(config: PretrainedConfig) -> Decoder:
    """A model built as that of `config`, its layers as many times narrower as is possible, decomposed."""
    names = set(skeleton(config).state_dict())
    for factor in (64, 32, 16, 8, 4, 2, 1):
        narrow = type(config).from_dict(config.to_dict())
        widths = {
            name: size for name, size in vars(narrow.get_text_config()).items() if name.endswith(WIDTHS) and type(size) is int
        }
        # Of matrices with one column it cannot be told which way round they lie.
        if factor > 1 and any(size % factor or size == factor for size in widths.values()):
            continue
        vars(narrow.get_text_config()).update({name: size // factor for name, size in widths.items()})
        with contextlib.suppress(Exception if factor > 1 else ()):  # whatever a model of strange widths runs into
            model = skeleton(narrow)
            if set(model.state_dict()) == names:
                return decompose(model, lazy=Lazy(model, lambda names: iter(())))


def kinds(decoder: Decoder, granularity: str) -> list[list[Window]]:
    """The windows of `granularity` by kind: those of blocks that are built alike are as large as one another."""
    blocks, found = [kind_of(block) for block in decoder.blocks], {}
    for window in decoder.windows(granularity) if granularity != "none" else []:
        inside = tuple(name.removeprefix(decoder.names[window.blocks[0]]) for name in window.matrices)
        found.setdefault((window.half, inside, *(blocks[index] for index in window.blocks)), []).append(window)
    return list(found.values())


# --- operations and time ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def counted(decoder: Decoder, window: Window, length: int, train: str = "none") -> float:
    """Operations per token of a pass through `window` of `shapes_of`, in samples of `length` tokens, as torch counts them.

    train: "none", or what gradients are for: "matrices", "all", or "norms"; the backward pass is counted then, too.
    """
    weights = sum(matrix.share * matrix.weight.numel() for matrix in decoder.matrices(window).values())
    trained = decoder.trained(window, "all" if train == "norms" else train) if train != "none" else {}
    for parameter in decoder.model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(train != "norms" or parameter.ndim == 1)
    first = next(iter(decoder.matrices(window).values())).weight
    width = first.shape[1] if window.matrices else decoder.model.config.get_text_config().hidden_size
    try:
        with FlopCounterMode(display=False) as counter:
            output = decoder.forward(window, torch.empty(1, length, width, device="meta"))
            if trained:
                output.sum().backward()
    except Exception:  # what depends on values cannot run without any, such as experts that tokens are sent to
        return weights * {"none": 2.0, "norms": 4.0}.get(train, 6.0)
    # Products of activations with one another, as in attention, count half: a causal mask needs no more.
    aten = torch.ops.aten
    by_weights = (aten.mm, aten.addmm, aten.convolution, aten.convolution_backward)
    return sum(n if kind in by_weights else n / 2 for kind, n in counter.get_flop_counts()["Global"].items()) / length


def flops(spec: RunSpec) -> dict[str, float]:
    """Floating-point operations of a run of `spec` by phase: "prune", "reconstruct", "retrain", "evaluate".

    As if the run shared nothing with others: products with weights (forward, weight gradient, input gradient), attention over the
    causal half, Gram matrices, adapters, exact solvers; no element-wise work. Evaluation is that of perplexity.
    """
    spec, decoder = spec.resolved(), shapes_of(*spec.loaded_by)
    how, length, samples = spec.reconstruction, spec.calibration.sequence_length, spec.samples_by_phase
    matrices, whole = decoder.matrices(), Window(range(len(decoder.blocks)))
    weights = {name: matrix.share * matrix.weight.numel() for name, matrix in matrices.items()}  # that a token meets, on average
    forward, tokens = counted(decoder, whole, length), {phase: count * length for phase, count in samples.items()}
    predicted = decoder.predicted(torch.empty(1, 2)).shape[1] / 2  # of all tokens; an encoder-decoder predicts half of them
    head = predicted * 2 * sum(weight.numel() for weight in decoder.head_weights())
    read = [matrices[group[0]] for groups in decoder.groups for group in groups]
    grams = sum(2 * triangle(matrix.weight.shape[1]) * matrix.share for matrix in read)
    products = sum(matrix.weight.shape[0] * matrix.weight.shape[1] ** 2 for matrix in matrices.values())  # with Gram matrices
    found = dict.fromkeys(("prune", "reconstruct", "retrain", "evaluate"), 0.0)

    pruning, rule = spec.pruning, criteria.get("none" if spec.model.pruned else spec.pruning.criterion)
    if (rule.statistics != "none" or pruning.mask_refinement) and not spec.one_pass:  # else reconstruction's pass serves
        found["prune"] += forward * tokens["prune"] * (2 if pruning.statistics == "sparse" and rule.scope != "model" else 1)
    if rule.statistics == "gram" or pruning.mask_refinement:
        found["prune"] += grams * tokens["prune"]
    if pruning.criterion == "sparsegpt":
        found["prune"] += products + sum(2 * matrix.weight.shape[1] ** 3 for matrix in read)

    if how.granularity != "none":
        windows, own = decoder.windows(how.granularity), how.propagation != "dense"
        # The dense model's pass, and the student's own, of which nothing reads what comes after the last window.
        per_token = forward * (1 + own * (1 - len(windows[-1].blocks) / len(decoder.blocks)))
        if how.granularity == "matrix":  # targets come matrix by matrix; inputs by running a block up to it, but for dense ones
            per_token += 2 * sum(weights.values()) + forward * (how.propagation == "mixed")
        if how.solver == "adamw":
            epochs = how.schedule(samples["reconstruct"]).epochs
            for alike in kinds(decoder, how.granularity):
                per_token += epochs * len(alike) * counted(decoder, alike[0], length, how.train)
                if how.adapter != "none":
                    steps = epochs * -(-samples["reconstruct"] * how.chunks_of(alike[0], length) // how.batch_size)
                    size = sum(map(weights.get, decoder.matrices(alike[0])))
                    found["reconstruct"] += len(alike) * steps * 6 * how.rank * size
        if "exact" in (how.solver, how.start):
            found["reconstruct"] += grams * tokens["reconstruct"] + 2 * products * (1 + how.exact_iterations)
        # Errors: on held-out samples, through the dense windows too; before and after through the student's.
        errors = ERROR_SAMPLES * length * forward * ((spec.calibration.held_out_samples > 0) + 2)
        found["reconstruct"] += per_token * tokens["reconstruct"] + errors

    if (again := spec.retraining).retrain != "none":
        train = again.retrain if again.retrain == "norms" else "all" if again.retrain == "full" else "matrices"
        per_token = counted(decoder, whole, length, train) + head * (3 if again.retrain == "full" else 2)
        per_token += (forward + head) * (again.retrain_objective == "distil") + forward * again.retrain_checkpointing
        runs = -(-samples["retrain"] // again.retrain_batch_size) * (again.retrain in ADAPTERS)
        merging = runs * (6 + 2 * again.retrain_checkpointing) * again.retrain_rank * sum(weights.values())
        found["retrain"] = again.schedule(samples["retrain"]).epochs * (per_token * tokens["retrain"] + merging)

    evaluated = sum(spec.evaluation.windows.values()) * spec.evaluation.evaluation_length
    found["evaluate"] = (2 + (found["reconstruct"] + found["retrain"] > 0)) * evaluated  # models
    found["evaluate"] *= head + counted(decoder, whole, spec.evaluation.evaluation_length)
    return found


def rate(work: Callable[[], object], amount: float, seconds: float = 0.1) -> float:
    """How much of something is done per second, where `work` does `amount` of it and waits for the device."""
    work()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        work()
        count += 1
    return amount * count / (time.perf_counter() - began)


def gemm_rate(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.1) -> float:
    """Floating-point operations per second of a square matrix product on this machine, measured now."""
    square = torch.ones(size, size, device=device, dtype=dtype)
    return rate(lambda: (square @ square).sum().item(), 2 * size**3, seconds)


@functools.cache
def speeds(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """How fast this machine is: operations per second of a pass; weights per second that a training step rounds, updates and masks,
    which memory bounds. Measured once per process."""
    weights = nn.Parameter(torch.ones(1536, 1024, device=device))
    mask, optimizer = torch.ones_like(weights, dtype=torch.bfloat16), torch.optim.AdamW([weights], fused=True)

    def update() -> None:
        weights.grad = weights.detach().to(dtype).float()
        optimizer.step()
        weights.data.mul_(mask)[0, 0].item()

    return EFFICIENCY * gemm_rate(device, dtype), rate(update, weights.numel())


def seconds(spec: RunSpec, device: torch.device) -> dict[str, float]:
    """Seconds that a run of `spec` will take on this machine by phase."""
    spec, decoder = spec.resolved(), shapes_of(*spec.loaded_by)
    products, updates = speeds(device, devices.pick_compute_dtype(spec.compute.compute_dtype, device))
    found = {phase: count / products for phase, count in flops(spec).items()}
    trained = []  # phase, options, samples, rank of adapters or 0, windows of one kind
    if spec.reconstruction.solver == "adamw":
        how, length = spec.reconstruction, spec.calibration.sequence_length
        for windows in kinds(decoder, how.granularity):
            samples = spec.calibration.samples * how.chunks_of(windows[0], length)
            trained.append(("reconstruct", how, samples, how.rank * (how.adapter != "none"), windows))
    if (again := spec.retraining).retrain != "none":
        rank, whole = again.retrain_rank * (again.retrain != "full"), Window(range(len(decoder.blocks)))
        trained.append(("retrain", again, spec.samples_by_phase["retrain"], rank, [whole]))
    for phase, how, samples, rank, windows in trained:
        schedule, shapes = how.schedule(samples), [matrix.weight.shape for matrix in decoder.matrices(windows[0]).values()]
        size = sum(rank * sum(shape) if rank else shape.numel() for shape in shapes)
        steps = schedule.epochs * -(-samples // schedule.batch_size)
        found[phase] += len(windows) * (steps * len(shapes) * STEP + schedule.steps(samples) * size / updates)
    return found


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# --- memory -----------------------------------------------------------------------------------------------------------------


def window_memory(decoder: Decoder, spec: RunSpec, device: torch.device | None = None) -> dict[str, int]:
    """Bytes of the largest window of a run of `spec`, counted from shapes, by what they are for; empty where none is reconstructed.

    "parameters": what it takes to run the window. "gradients", "moments" (AdamW's two): of what is trained. "copies": weights to roll
    back to. "masks": as weights are multiplied by them. "rounded": weights in the compute dtype. "activations": what the forward pass
    of one batch keeps for the backward pass. "statistics": Gram matrices, and room to factor one, where there are any.

    decoder: the model, or its shapes alone. device: where windows are computed; default: the spec's.
    """
    device = devices.pick_device(spec.compute.device) if device is None else device
    found = [_window_memory(decoder, alike[0], spec, device) for alike in kinds(decoder, spec.reconstruction.granularity)]
    return max(found, key=lambda parts: sum(parts.values()), default={})


def _window_memory(decoder: Decoder, window: Window, spec: RunSpec, device: torch.device) -> dict[str, int]:
    how, length, config = spec.reconstruction, spec.calibration.sequence_length, decoder.model.config.get_text_config()
    dtype, matrices = planned_dtype(spec, device), decoder.matrices(window)
    shapes, rounds = [matrix.weight.shape for matrix in matrices.values()], dtype != torch.float32
    groups = [group for index in window.blocks for group in decoder.groups[index] if group[0] in matrices]
    weights, before = sum(map(math.prod, shapes)), sum(p.numel() for p in decoder.trained(window, how.train).values())
    trained = before if how.adapter == "none" else how.rank * sum(map(sum, shapes))
    # Rounded, each matrix has an input of its own; else those of a group share it. Norms keep what they read and what they give.
    read = [name for group in groups for name in (group if rounds else group[:1])]
    width = sum(m.share * (m.weight.shape[0] + (name in read) * m.weight.shape[1]) for name, m in matrices.items())
    per_token = dtype.itemsize * width + (0 if window.matrices else 2 * 4 * config.hidden_size * window.halves)
    tokens = min(how.batch_size, spec.calibration.samples) * length // how.chunks_of(window, length)
    rule = criteria.get("magnitude" if spec.model.pruned else spec.pruning.criterion)
    by_grams = rule.statistics == "gram" or spec.pruning.mask_refinement or "exact" in (how.solver, how.start)
    columns, descends = [matrices[group[0]].weight.shape[1] for group in groups], how.solver == "adamw"
    return {
        "parameters": 4 * sum(tensor.numel() for tensor in decoder.needed(window)),
        "gradients": descends * 4 * trained,
        "moments": descends * 8 * trained,
        "copies": 4 * before,
        "masks": descends * (how.adapter in ("none", "masklora")) * weights * (2 if device.type == "cpu" else 1),
        "rounded": descends * weights * dtype.itemsize * (rounds or how.adapter != "none"),
        "activations": descends * int(tokens * per_token),
        "statistics": 4 * (sum(each**2 for each in columns) + 6 * max(columns) ** 2) if by_grams else 0,
    }


def peak_memory(spec: RunSpec, device: torch.device, streamed: bool) -> dict[str, dict[str, float]]:
    """Peak bytes of a run of `spec` by kind of device, and by what they are for; the process itself is left out.

    Both models, unless `streamed`; activations of all samples, unless they are in mapped files; the largest window (for retraining, the
    model; see `window_memory`); logits; and `MARGIN` for the rest.
    """
    spec, decoder = spec.resolved(), shapes_of(*spec.loaded_by)
    how, again, calibration, evaluation = spec.reconstruction, spec.retraining, spec.calibration, spec.evaluation
    config, dtype, length = decoder.model.config.get_text_config(), planned_dtype(spec, device), calibration.sequence_length
    parameters, pruned = _elements(decoder)
    work: dict[str, float] = dict(window_memory(decoder, spec, device))
    if how.granularity == "none":
        work["statistics"] = window_memory(decoder, spec.replaced(granularity="block"), device)["statistics"]
    tokens, copies = min(evaluation.evaluation_length, SLICE), 2
    if again.retrain != "none":
        train = {"train": "all"} if again.retrain == "full" else {"adapter": again.retrain} if again.retrain in ADAPTERS else {}
        batch = {"batch_size": again.retrain_batch_size, "chunks": 1, "rank": again.retrain_rank}
        alike = ReconstructionConfig(granularity="model", **batch, **train)
        work |= window_memory(decoder, replace(spec, reconstruction=alike), device)
        tokens, copies, blocks = again.retrain_batch_size * length, 4 + (again.retrain_objective == "distil"), len(decoder.blocks)
        if again.retrain == "full":  # embedding and head as well
            rest = parameters - work["moments"] // 8
            work |= {"gradients": work["gradients"] + 4 * rest, "moments": work["moments"] + 8 * rest}
        work["copies"] = 4 * (pruned + parameters * (again.retrain in ("full", "norms")))
        if again.retrain_checkpointing:  # the blocks' inputs alone, and one block in the backward pass
            work["activations"] = work["activations"] / blocks + 4 * tokens * config.hidden_size * blocks
    if how.accumulation == again.retrain_accumulation == 1:  # gradients come while activations go
        work["gradients"] = max(0.0, work.get("gradients", 0) - work.get("activations", 0))
    head = sum(weight.numel() for weight in decoder.head_weights())
    work["logits"] = tokens * config.vocab_size * copies * dtype.itemsize + 12 * min(tokens * config.vocab_size, ELEMENTS)
    work["rounded"] = max(work.get("rounded", 0), 2 * head * dtype.itemsize * (dtype != torch.float32))

    samples = calibration.samples + min(calibration.held_out_samples, ERROR_SAMPLES)
    width = config.hidden_size * (3 + (how.propagation == "mixed")) * 4
    if how.granularity == "matrix":  # what all matrices of a block read and give
        width += dtype.itemsize * sum(m.share * sum(m.weight.shape) for m in decoder.matrices(Window(range(1))).values())
    streams = samples * length * width, 8 * evaluation.evaluation_samples * evaluation.evaluation_length * config.hidden_size
    kept = {"streams": max((float(size) for size in streams if not streamed or size <= SMALL), default=0.0), "margin": MARGIN}
    if streamed:
        work["parameters"] = max(work.get("parameters", 0), 2 * 4 * head)
        work["copies"] = work.get("copies", 0) * (work.get("copies", 0) <= SMALL)
    else:
        kept |= {"models": 8.0 * parameters, "masks of all": pruned, "what pruning changed": 4.0 * pruned * spec.changes_weights}
    if device.type == "cuda":
        return {HOST.type: kept, device.type: work}
    if not streamed:
        work.pop("parameters", None)  # they are the model's
    return {HOST.type: kept | work}


# --- the plan of a run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a run of `spec` takes on this machine, or on one with another GPU.

    memory: peak bytes by kind of device, and by what they are for; on the host, "process" is what this process takes already.
    rooms: bytes that the run needs, and that there are: of "memory", of "memory on" a GPU, and of "disk".
    flops, seconds: by phase; no seconds where the device is not here. streamed: whether the model stays on disk.
    """

    spec: RunSpec
    memory: dict[str, dict[str, float]]
    rooms: dict[str, tuple[float, float]]
    flops: dict[str, float]
    seconds: dict[str, float]
    streamed: bool

    @property
    def problem(self) -> str:
        """Why the run cannot fit here, and what to try; empty where it can."""
        tight = {room: [f"{size / GIB:.1f} GiB" for size in both] for room, both in self.rooms.items() if both[0] > both[1]}
        said = " and ".join(f"{needs} of {room}, of which there are {has}" for room, (needs, has) in tight.items())
        return said and f"this run needs {said}; try smaller windows or --stream yes"

    @property
    def line(self) -> str:
        """The run, its time and its memory in one line."""
        spec, parts = self.spec, ", ".join(f"{phase} {duration(value)}" for phase, value in self.seconds.items() if value)
        time = f"about {duration(sum(self.seconds.values()))} on this machine ({parts})" if self.seconds else "time not known"
        about = f"{spec.model.model}, {spec.pruning.criterion} {spec.pruning.pattern}, {spec.reconstruction.granularity}"
        return f"{about}: {time}; about {self.rooms['memory'][0] / GIB:.1f} GiB of memory"

    def __str__(self) -> str:
        decoder, granularity = shapes_of(*self.spec.loaded_by), self.spec.reconstruction.granularity
        parameters, pruned = _elements(decoder)
        rows = {
            "run": self.line,
            "model": f"{parameters:,} parameters, {pruned:,} of them pruned; kept {'on disk' if self.streamed else 'in memory'}",
            "windows": f"{sum(map(len, kinds(decoder, granularity)))} of {granularity}",
            "operations": ", ".join(f"{phase} {count:.1e}" for phase, count in self.flops.items() if count),
        }
        for kind, parts in self.memory.items():
            large = sorted(parts.items(), key=lambda part: -part[1])
            rows[f"on {kind}"] = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in large if size >= 0.01 * GIB)
        needs = ", ".join(f"{needs / GIB:.2f} GiB of {has / GIB:.1f} GiB {room}" for room, (needs, has) in self.rooms.items())
        return "\n".join(f"{name:12} {value}" for name, value in (rows | {"verdict": self.problem or f"fits: {needs}"}).items())


def plan(
    spec: RunSpec,
    options: RunOptions = RunOptions(),
    *,
    loaded: int = 0,
    memory_gib: float | None = None,
    device_gib: float | None = None,
    disk_gib: float | None = None,
) -> Plan:
    """What a run of `spec` takes, from the configuration of its model alone: no weights are read, and no texts.

    Args:
        loaded: bytes of the model's weights that are in memory already.
        memory_gib, device_gib, disk_gib: GiB of the host's memory, of a GPU's, and of the disk that the run may take; default: what is
            free here. Where `device_gib` is given, the GPU need not be here.

    Raises:
        ReconError: a device that is not here, a run that is to be streamed but cannot be, a model that is unknown or cannot be
            decomposed, a granularity that it is too small for.
    """
    spec, decoder = spec.resolved(), shapes_of(*spec.loaded_by)
    device = devices.pick_device(spec.compute.device) if device_gib is None else torch.device("cuda", 0)
    parameters, pruned = _elements(decoder)
    room = devices.available_memory() if memory_gib is None else memory_gib * GIB
    streamed = options.stream == "yes" and streaming.wanted("yes", spec)
    if options.stream == "auto" and 0 < room < streaming.models_in_memory(spec, parameters):
        streamed = not streaming.in_memory_only(spec)
    process = float(streamed and devices.resident_anonymous() or devices.resident())  # mapped files and libraries do not count
    needs, itemsize = peak_memory(spec, device, streamed), devices.SAVED[options.save_dtype].itemsize
    needs[HOST.type] = {"process": process, **needs[HOST.type]}
    disk = itemsize * parameters * (options.save is not None or streamed)
    if streamed:  # masks, activations of both models before and after a window, and what is not computed with as it is saved
        samples = spec.calibration.samples + spec.calibration.held_out_samples
        disk += pruned // 8 + 16 * samples * spec.calibration.sequence_length * decoder.model.config.get_text_config().hidden_size
        disk += 4 * parameters * (itemsize < 4)
    place = (options.save or (cache_folder() if streamed else Path("."))).absolute()
    free = shutil.disk_usage(next(each for each in (place, *place.parents) if each.exists())).free
    rooms = {"memory": (sum(needs[HOST.type].values()), room + process + loaded)}
    if device.type == "cuda":
        there = devices.available_on_device(device) if device_gib is None else device_gib * GIB
        rooms[f"memory on {device}"] = sum(needs[device.type].values()), there
    rooms["disk"] = disk, free if disk_gib is None else disk_gib * GIB
    here = device.type != "cuda" or torch.cuda.is_available()
    return Plan(spec, needs, rooms, flops(spec), seconds(spec, device) if here else {}, streamed)


def check(spec: RunSpec, options: RunOptions = RunOptions(), loaded: int = 0) -> None:
    """Logs what a run of `spec` will take: in one line, or all of its plan where it is long or large; see `plan`.

    Raises `ReconError` for a run that cannot fit, unless it is forced.
    """
    try:
        planned = plan(spec, options, loaded=loaded)
    except ReconError as error:  # the run itself will say what is wrong with it, if anything is
        log.info("no plan: %s", error)
        return
    if planned.problem and not options.force:
        raise ReconError(planned.problem)
    large = any(needs > LARGE * has for room, (needs, has) in planned.rooms.items() if room != "disk")
    log.info("%s", planned if large or sum(planned.seconds.values()) > LONG else planned.line)


def announce(specs: list[RunSpec]) -> None:
    """Logs how long `specs`, runs of one study, will take at most: what they share is computed once."""
    known, spent, needs = {}, 0.0, 0.0
    for spec in (replace(spec, seed=0) for spec in specs):
        with contextlib.suppress(ReconError):  # the run will say what is wrong with it, in its record
            known[spec] = known.get(spec) or plan(spec)
            spent, needs = spent + sum(known[spec].seconds.values()), max(needs, known[spec].rooms["memory"][0])
    log.info("study: %d runs, at most %s on this machine; %.1f GiB of memory", len(specs), duration(spent), needs / GIB)


def planned_dtype(spec: RunSpec, device: torch.device) -> torch.dtype:
    """What matrices are multiplied in: on a GPU that is not here, by default what any since 2020 multiplies natively."""
    absent, name = device.type == "cuda" and not torch.cuda.is_available(), spec.compute.compute_dtype
    return devices.pick_compute_dtype("bfloat16" if absent and name == "auto" else name, device)


def _elements(decoder: Decoder) -> tuple[int, int]:
    """Elements of the model, and of the matrices that are pruned."""
    pruned = sum(matrix.weight.numel() for matrix in decoder.matrices().values())
    return sum(parameter.numel() for parameter in decoder.model.parameters()), pruned
