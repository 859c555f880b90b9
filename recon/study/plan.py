"""What a run takes, before it starts and without weights: operations, time, memory; and whether it fits here."""

import contextlib
import functools
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
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
from recon.model.modules import kind_of
from recon.model.skeleton import Lazy, skeleton
from recon.model.structure import Matrix
from recon.model.windows import Window
from recon.runtime import device as devices
from recon.runtime.device import HOST
from recon.runtime.storage import SMALL
from recon.runtime.weights import quantisation
from recon.study.spec import RunSpec

log = logging.getLogger("recon")
GIB = 2**30
MARGIN = 96 * 2**20  # bytes of what no shape tells: tokenizer, texts, libraries loaded later, kernels' own memory
WIDTHS = ("hidden_size", "intermediate_size", "_dim", "_rank", "n_embd", "n_inner", "d_model")  # ends of options: layers' widths
EFFICIENCY = 0.6  # of a bare matrix product's speed that a whole pass reaches, measured on CPUs
UPDATE = 2000  # operations that take as long as one weight's rounding, update and masking, which memory bounds: measured on CPUs
STEP = 0.5e-3  # seconds of a training step for each matrix, beside all that: what Python and autograd take, measured on CPUs


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
    decoder = decompose(made, like=_structure(config))
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


class Trained(NamedTuple):
    """Windows of one kind that a run trains: `passes` through each, in both directions, of so many `tokens` in all, for its `elements`."""

    phase: str
    how: ReconstructionConfig
    windows: list[Window]
    passes: int
    tokens: int
    elements: int


def trained(spec: RunSpec, decoder: Decoder) -> Iterator[Trained]:
    """What a run of `spec` (resolved) trains; retraining has one window, the whole model. Exact solutions take no pass."""
    again, length = spec.retraining, spec.calibration.sequence_length
    parts = [("reconstruct", spec.reconstruction, alike) for alike in kinds(decoder, spec.reconstruction.granularity)]
    if again.retrain != "none":
        same = {name: getattr(again, f"retrain_{name}") for name in ("rank", "epochs", "batch_size", "accumulation")}
        trains = {"adapter": again.retrain} if again.retrain in ADAPTERS else {"train": "all"}
        whole = ReconstructionConfig(granularity="model", **same, **trains)
        parts.append(("retrain", whole, [Window(range(len(decoder.blocks)))]))
    for phase, how, windows in parts:
        samples, parameters = spec.samples_by_phase[phase], decoder.trained(windows[0], how.train).values()
        epochs = how.schedule(samples).epochs * (how.solver == "adamw")
        passes = epochs * -(-samples * how.chunks_of(windows[0], length) // how.batch_size)
        if phase == "retrain" and again.retrain == "full":  # embedding and head as well
            parameters = list(decoder.model.parameters())
        elements = sum(parameter.numel() for parameter in parameters)
        if how.adapter != "none":
            elements = how.rank * sum(sum(matrix.weight.shape) for matrix in decoder.matrices(windows[0]).values())
        yield Trained(phase, how, windows, passes, epochs * samples * length, elements)


def flops(spec: RunSpec) -> dict[str, float]:
    """Floating-point operations of a run of `spec` by phase: "prune", "reconstruct", "retrain", "evaluate".

    As if the run shared nothing with others: products with weights (forward, weight gradient, input gradient), attention over the
    causal half, Gram matrices, adapters, exact solvers; no element-wise work. Evaluation is that of perplexity.
    """
    spec, decoder = spec.resolved(), shapes_of(*spec.loaded_by)
    how, again, pruning, length = spec.reconstruction, spec.retraining, spec.pruning, spec.calibration.sequence_length
    matrices, whole = decoder.matrices(), Window(range(len(decoder.blocks)))
    weights = {name: matrix.share * matrix.weight.numel() for name, matrix in matrices.items()}  # that a token meets, on average
    forward, tokens = counted(decoder, whole, length), {phase: count * length for phase, count in spec.samples_by_phase.items()}
    predicted = decoder.predicted(torch.empty(1, 2)).shape[1] / 2  # of all tokens; an encoder-decoder predicts half of them
    head = predicted * 2 * sum(weight.numel() for weight in decoder.head_weights())
    read = [matrices[group[0]] for groups in decoder.groups for group in groups]
    grams = sum(2 * triangle(matrix.weight.shape[1]) * matrix.share for matrix in read)
    products = sum(matrix.weight.shape[0] * matrix.weight.shape[1] ** 2 for matrix in matrices.values())  # with Gram matrices
    found = dict.fromkeys(("prune", "reconstruct", "retrain", "evaluate"), 0.0)

    rule = criteria.CRITERIA["none" if spec.model.pruned else pruning.criterion]
    by_grams = rule.statistics == "gram" or pruning.mask_refinement > 0
    passes = rule.statistics != "none" or by_grams
    passes = 0 if spec.one_pass else passes * (2 if pruning.statistics == "sparse" and rule.scope != "model" else 1)
    found["prune"] = (passes * forward + by_grams * grams) * tokens["prune"]
    if pruning.criterion == "sparsegpt":
        found["prune"] += products + sum(2 * matrix.weight.shape[1] ** 3 for matrix in read)

    for part in trained(spec, decoder):
        per_token, per_pass = counted(decoder, part.windows[0], length, part.how.train), 0.0
        if part.how.adapter != "none":  # made into weights, and back into gradients
            per_pass = 6 * part.how.rank * sum(map(weights.get, decoder.matrices(part.windows[0])))
        if part.phase == "retrain":
            if again.retrain == "norms":
                per_token = counted(decoder, whole, length, "norms")
            per_token += head * (3 if again.retrain == "full" else 2) + forward * again.retrain_checkpointing
            per_token += (forward + head) * (again.retrain_objective == "distil")
            per_pass *= 4 / 3 if again.retrain_checkpointing else 1
        found[part.phase] += len(part.windows) * (per_token * part.tokens + per_pass * part.passes)

    if how.granularity != "none":
        # The dense model's pass, and the student's own, of which nothing reads what comes after the last window.
        left = 1 - len(decoder.windows(how.granularity)[-1].blocks) / len(decoder.blocks)
        per_token = forward * (1 + (how.propagation != "dense") * left)
        if how.granularity == "matrix":  # targets come matrix by matrix; inputs by running a block up to it, but for dense ones
            per_token += 2 * sum(weights.values()) + forward * (how.propagation == "mixed")
        if "exact" in (how.solver, how.start):
            found["reconstruct"] += grams * tokens["reconstruct"] + 2 * products * (1 + how.exact_iterations)
        # Errors: on held-out samples, through the dense windows too; before and after through the student's.
        errors = ERROR_SAMPLES * length * forward * ((spec.calibration.held_out_samples > 0) + 2)
        found["reconstruct"] += per_token * tokens["reconstruct"] + errors

    evaluated = sum(spec.evaluation.windows.values()) * spec.evaluation.evaluation_length
    found["evaluate"] = (2 + (found["reconstruct"] + found["retrain"] > 0)) * evaluated  # models
    found["evaluate"] *= head + counted(decoder, whole, spec.evaluation.evaluation_length)
    return found


@functools.cache
def gemm_rate(device: torch.device, dtype: torch.dtype, size: int = 1024, times: int = 20) -> float:
    """Floating-point operations per second of a square matrix product on this machine, measured once per process."""
    square = torch.ones(size, size, device=device, dtype=dtype)
    (square @ square).sum().item()
    began = time.perf_counter()
    for _ in range(times):
        (square @ square).sum().item()
    return times * 2 * size**3 / (time.perf_counter() - began)


def seconds(spec: RunSpec, device: torch.device) -> dict[str, float]:
    """Seconds that a run of `spec` will take on this machine by phase."""
    spec, decoder = spec.resolved(), shapes_of(*spec.loaded_by)
    speed = EFFICIENCY * gemm_rate(device, devices.pick_compute_dtype(spec.compute.compute_dtype, device))
    found = {phase: count / speed for phase, count in flops(spec).items()}
    for part in trained(spec, decoder):
        step = STEP * len(decoder.matrices(part.windows[0])) + UPDATE * part.elements / speed
        found[part.phase] += len(part.windows) * part.passes * step
    return found


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# --- memory -----------------------------------------------------------------------------------------------------------------


def window_memory(decoder: Decoder, spec: RunSpec, device: torch.device | None = None) -> dict[str, int]:
    """Bytes of the largest window of a run of `spec`, the whole model where it is retrained, by what they are for; empty without training.

    "parameters": what it takes to run the window. "gradients", "moments" (AdamW's two): of what is trained. "copies": weights to roll
    back to. "rounded": weights in the compute dtype, and masks. "activations": what the forward pass of one batch keeps for the
    backward pass. "statistics": Gram matrices, and room to factor one, where there are any. "logits": of retraining, and their gradients.

    decoder: the model, or its shapes alone. device: where windows are computed; default: the spec's.
    """
    device = devices.pick_device(spec.compute.device) if device is None else device
    tokens = spec.retraining.retrain_batch_size * spec.calibration.sequence_length
    logits = 2 * tokens * decoder.model.config.get_text_config().vocab_size * _itemsize(spec, device)
    more = {"retrain": {"copies": 0, "logits": logits}, "reconstruct": {}}  # nothing is rolled back in retraining
    windows = [_bytes(decoder, part, spec, device) | more[part.phase] for part in trained(spec, decoder)]
    return max(windows, key=lambda sizes: sum(sizes.values()), default={})


def _bytes(decoder: Decoder, part: Trained, spec: RunSpec, device: torch.device) -> dict[str, int]:
    """Bytes of one window of a kind; see `window_memory`."""
    how, window, length = part.how, part.windows[0], spec.calibration.sequence_length
    itemsize, matrices = _itemsize(spec, device), decoder.matrices(window)
    weights = sum(matrix.weight.numel() for matrix in matrices.values())
    groups = [group for index in window.blocks for group in decoder.groups[index] if group[0] in matrices]
    norms = 0 if window.matrices else 2 * 4 * decoder.model.config.get_text_config().hidden_size * window.halves  # read and give
    tokens = min(how.batch_size, spec.samples_by_phase[part.phase]) * length // how.chunks_of(window, length)
    columns, descends = [matrices[group[0]].weight.shape[1] for group in groups], part.passes > 0
    rule = criteria.CRITERIA["magnitude" if spec.model.pruned else spec.pruning.criterion]
    by_grams = rule.statistics == "gram" or spec.pruning.mask_refinement or "exact" in (how.solver, how.start)
    return {
        "parameters": 4 * sum(tensor.numel() for tensor in decoder.needed(window)),
        "gradients": descends * 4 * part.elements,
        "moments": descends * 8 * part.elements,
        "copies": 4 * max(weights, part.elements),
        "rounded": descends * weights * (2 + itemsize * (itemsize < 4 or how.adapter != "none")),
        "activations": descends * int(tokens * (itemsize * _width(matrices.values()) + norms)),
        "statistics": 4 * (sum(each**2 for each in columns) + 6 * max(columns) ** 2) if by_grams else 0,
    }


def peak_memory(spec: RunSpec, device: torch.device, streamed: bool) -> dict[str, dict[str, float]]:
    """Peak bytes of a run of `spec` (resolved) by kind of device, and by what they are for; the process itself is left out.

    Both models, unless `streamed`; activations of all samples, unless they are in mapped files; the largest window, which may be a block
    that is only run, or the model where it is retrained (see `window_memory`); logits; and `MARGIN` for the rest.
    """
    decoder, again, length = shapes_of(*spec.loaded_by), spec.retraining, spec.calibration.sequence_length
    config, itemsize = decoder.model.config.get_text_config(), _itemsize(spec, device)
    run = Trained("prune", ReconstructionConfig(), [Window(range(1))], 0, 0, 0)
    windows = [_bytes(decoder, part, spec, device) for part in (run, *trained(spec, decoder))]
    window = max(windows, key=lambda sizes: sum(sizes.values()))
    tokens, copies = min(spec.evaluation.evaluation_length, SLICE), 2
    if again.retrain != "none":
        tokens, copies = again.retrain_batch_size * length, 4 + (again.retrain_objective == "distil")
        window["activations"] //= len(decoder.blocks) if again.retrain_checkpointing else 1
    if spec.reconstruction.accumulation == again.retrain_accumulation == 1:  # gradients come while activations go
        window["gradients"] = max(0, window["gradients"] - window["activations"])
    window["logits"] = tokens * config.vocab_size * copies * itemsize + 12 * min(tokens * config.vocab_size, ELEMENTS)

    width = 16 * config.hidden_size  # inputs and targets of both models
    if spec.reconstruction.granularity == "matrix":  # and what all matrices of a block read and give
        width += itemsize * int(_width(decoder.matrices(run.windows[0]).values()))
    samples = spec.calibration.samples + min(spec.calibration.held_out_samples, ERROR_SAMPLES)
    kept = {"streams": samples * length * width, "margin": MARGIN}
    if streamed:
        kept["streams"], window["copies"] = min(kept["streams"], SMALL), min(window["copies"], SMALL)
        window["parameters"] = max(window["parameters"], 8 * sum(weight.numel() for weight in decoder.head_weights()))
    else:
        kept["models"] = models_in_memory(spec)
    if device.type == "cuda":
        return {HOST.type: kept, device.type: window}
    return {HOST.type: window | kept | ({} if streamed else {"parameters": 0})}  # those in memory are the models'


def models_in_memory(spec: RunSpec) -> int:
    """The least bytes that a run in memory takes: a model and its copy, in float32, and what pruning made of it beyond zeros."""
    return 4 * _elements(shapes_of(*spec.loaded_by)) * (2 + spec.changes_weights)


def stays_on_disk(spec: RunSpec, stream: str, room: float) -> bool:
    """Whether a run of `spec` is streamed, with so many bytes of memory to be had (0: it is unknown). Raises `ReconError` if it is to
    be, but cannot.
    """
    if stream == "auto":
        with contextlib.suppress(ReconError):  # loading the model will say what is wrong
            stream = "auto" if 0 < room < models_in_memory(spec) else "no"
    if stream == "no":
        return False
    why, retrain, found = "", spec.retraining.retrain, quantisation(models.configuration(*spec.loaded_by))
    if retrain != "none":
        why = f"retraining (retrain {retrain}) trains the whole model at once"
    elif found:
        why = f"reading model {spec.model.model!r} undoes its quantisation ({found['quant_method']})"
    if why and stream == "yes":
        raise ReconError(f"{why}, which a streamed run cannot do, as it has one window in memory; use stream no")
    if why:
        log.warning("model %r may not fit into memory, but %s and cannot be streamed", spec.model.model, why)
    return not why


# --- the plan of a run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a run of `spec` takes on this machine.

    memory: peak bytes by kind of device, and by what they are for; on the host, "process" is what this process takes already.
    rooms: bytes that the run needs, and that there are, of "memory", and of "memory on" a GPU.
    flops, seconds: by phase. streamed: whether the model stays on disk.
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

    def __str__(self) -> str:
        spec, decoder, granularity = self.spec, shapes_of(*self.spec.loaded_by), self.spec.reconstruction.granularity
        times = ", ".join(f"{phase} {duration(value)}" for phase, value in self.seconds.items() if value)
        rows = {
            "run": f"{spec.model.model}, {spec.pruning.criterion} {spec.pruning.pattern}, {granularity}: about "
            f"{duration(sum(self.seconds.values()))} on this machine ({times}); about {self.rooms['memory'][0] / GIB:.1f} GiB of memory",
            "model": f"{_elements(decoder):,} parameters, kept {'on disk' if self.streamed else 'in memory'}",
            "windows": f"{sum(map(len, kinds(decoder, granularity)))} of {granularity}",
            "operations": ", ".join(f"{phase} {count:.1e}" for phase, count in self.flops.items() if count),
        }
        for kind, parts in self.memory.items():
            rows[f"on {kind}"] = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in parts.items() if size >= 0.01 * GIB)
        needs = ", ".join(f"{needs / GIB:.2f} GiB of {has / GIB:.1f} GiB {room}" for room, (needs, has) in self.rooms.items())
        return "\n".join(f"{name:12} {value}" for name, value in (rows | {"verdict": self.problem or f"fits: {needs}"}).items())


def plan(spec: RunSpec, stream: str = "auto", *, loaded: int = 0, memory_gib: float | None = None) -> Plan:
    """What a run of `spec` takes, from the configuration of its model alone: no weights are read, and no texts.

    Args:
        stream: whether the model is to stay on disk; see `RunOptions`.
        loaded: bytes of the model's weights that are in memory already.
        memory_gib: GiB of the host's memory that the run may take; default: what is free here.

    Raises:
        ReconError: a device that is not here, a run that is to be streamed but cannot be, a model that is unknown or cannot be
            decomposed, a granularity that it is too small for.
    """
    spec, device = spec.resolved(), devices.pick_device(spec.compute.device)
    room = devices.available_memory() if memory_gib is None else memory_gib * GIB
    streamed = stays_on_disk(spec, stream, room)
    memory = peak_memory(spec, device, streamed)
    process = float(devices.resident(anonymous=streamed))  # mapped files and libraries do not count
    memory[HOST.type]["process"] = process
    rooms = {"memory": (sum(memory[HOST.type].values()), room + process + loaded)}
    if device.type == "cuda":
        rooms[f"memory on {device}"] = sum(memory[device.type].values()), devices.available_on_device(device)
    return Plan(spec, memory, rooms, flops(spec), seconds(spec, device), streamed)


def check(spec: RunSpec, stream: str = "auto", force: bool = False, loaded: int = 0) -> None:
    """Logs in one line what a run of `spec` will take; see `plan`. Raises `ReconError` for one that cannot fit, unless it is forced."""
    try:
        planned = plan(spec, stream, loaded=loaded)
    except ReconError as error:  # the run itself will say what is wrong with it, if anything is
        log.info("no plan: %s", error)
        return
    if planned.problem and not force:
        raise ReconError(planned.problem)
    log.info("%s", str(planned).partition("\n")[0].removeprefix("run").strip())


def announce(specs: list[RunSpec]) -> None:
    """Logs how long `specs`, runs of one study, will take at most: what they share is computed once."""
    known, spent = {}, 0.0
    for spec in (replace(spec, seed=0) for spec in specs):
        with contextlib.suppress(ReconError):  # the run will say what is wrong with it, in its record
            known[spec] = known.get(spec) or sum(plan(spec).seconds.values())
            spent += known[spec]
    log.info("study: %d runs, at most %s on this machine", len(specs), duration(spent))


def _elements(decoder: Decoder) -> int:
    return sum(parameter.numel() for parameter in decoder.model.parameters())


def _width(matrices: Iterable[Matrix]) -> float:
    """Elements of what `matrices` read and give per token."""
    return sum(matrix.share * sum(matrix.weight.shape) for matrix in matrices)


def _itemsize(spec: RunSpec, device: torch.device) -> int:
    return devices.pick_compute_dtype(spec.compute.compute_dtype, device).itemsize
