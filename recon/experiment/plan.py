"""What a run takes, before it starts and without weights: parameters, windows, memory, disk, operations, time; whether it fits here."""

import bisect
import contextlib
import functools
import logging
import math
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from recon.data import models
from recon.errors import ReconError
from recon.experiment import estimate, streamed
from recon.experiment.config import RunSpec
from recon.kernels import criteria
from recon.model.decoder import Decoder
from recon.model.discovery import take_apart
from recon.model.skeleton import Lazy, skeleton
from recon.runtime.device import (
    COMPUTE_DTYPES,
    HOST,
    available_memory,
    available_on_device,
    pick_compute_dtype,
    pick_device,
    resident,
    resident_anonymous,
)
from recon.runtime.storage import cache_folder
from recon.runtime.weights import SAVED

log = logging.getLogger("recon")
GIB = 2**30
PHASES = ("load", "copy", "prune", "reconstruct", "retrain", "evaluate")  # in their order
LONG = 600  # seconds: runs that are expected to take longer are planned before they start
LARGE = 0.3  # of the available memory: so are those that roughly take more
GRANULARITIES = (
    "half-block",
    "block",
    "2-blocks",
    "4-blocks",
    "8-blocks",
    "quarter",
)  # that are tried where a larger one does not fit
NARROWEST = 64  # widths are divided by up to so much to find a model's structure


class Shapes(NamedTuple):
    """A model without weights: its configuration, and itself on torch's meta device, taken apart."""

    config: PretrainedConfig
    decoder: Decoder


Phases = dict[str, dict[str, float]]  # bytes, by phase and by what they are for


@dataclass(frozen=True)
class Plan:
    """What a run of `spec` takes on this machine, or on one with another GPU.

    parameters, prunable: numbers of the model, and those of them in the matrices that are pruned.
    windows, largest_window: how many are fitted one after another, and the parameters of the largest.
    memory: peak bytes of host memory by phase, divided by what they are for; "process" is what this process takes already.
    disk: bytes that the run writes and leaves.
    tokens, flops, seconds: by phase; no seconds where the device is not here.
    available_memory, available_disk: bytes that can still be had.
    streamed: whether the model stays on disk; see `recon.experiment.streamed`.
    device: where windows are computed.
    device_memory, available_device_memory: as those of host memory, where the device has its own; else empty, and 0.
    """

    spec: RunSpec
    parameters: int
    prunable: int
    windows: int
    largest_window: int
    memory: Phases
    disk: int
    tokens: dict[str, int]
    flops: dict[str, float]
    seconds: dict[str, float]
    available_memory: int
    available_disk: int
    streamed: bool = False
    device: torch.device = HOST
    device_memory: Phases = field(default_factory=dict)
    available_device_memory: int = 0

    @property
    def peak(self) -> dict[str, float]:
        """The parts of the highest peak of host memory, in bytes."""
        return _highest(self.memory)

    @property
    def peak_memory(self) -> float:
        """Bytes of host memory at its highest peak, this process included."""
        return sum(self.peak.values())

    @property
    def limits(self) -> dict[str, float]:
        """Bytes that the run may take, by kind of device; what this process has already is included."""
        host = {HOST.type: self.available_memory + self.peak["process"]}
        return host | ({self.device.type: float(self.available_device_memory)} if self.device_memory else {})

    @property
    def problem(self) -> str:
        """Why the run cannot fit here; empty where it can."""
        rooms = [("memory", self.peak_memory, self.limits[HOST.type])]
        if self.device_memory:
            highest = sum(_highest(self.device_memory).values())
            rooms.append((f"memory on {self.device}", highest, self.limits[self.device.type]))
        rooms.append(("disk", self.disk, self.available_disk))
        return "; ".join(
            f"needs {needs / GIB:.1f} GiB of {what}, of which there are {has / GIB:.1f} GiB"
            for what, needs, has in rooms
            if needs > has
        )

    def __str__(self) -> str:
        spec, limits = self.spec, self.limits
        fits = f"fits: {self.peak_memory / GIB:.2f} GiB of {limits[HOST.type] / GIB:.1f} GiB memory"
        on_device = []
        if self.device_memory:
            highest = sum(_highest(self.device_memory).values())
            fits += f", {highest / GIB:.2f} GiB of {limits[self.device.type] / GIB:.1f} GiB on {self.device}"
            on_device = [(f"on {self.device}", _by_phase(self.device_memory)), ("at its peak", _by_part(self.device_memory))]
        times = ", ".join(f"{phase} {estimate.duration(value)}" for phase, value in self.seconds.items() if value)
        time = f"about {estimate.duration(sum(self.seconds.values()))} on this machine: {times}"
        rows = [
            (
                "model",
                f"{spec.model.model}: {self.parameters:,} parameters, {self.prunable:,} of them in matrices that are pruned",
            ),
            ("kept", "on disk, one window at a time in memory" if self.streamed else "in memory"),
            (
                "windows",
                f"{self.windows} of {spec.reconstruction.granularity}, the largest of {self.largest_window:,} parameters",
            ),
            ("tokens", ", ".join(f"{phase} {count:,}" for phase, count in self.tokens.items())),
            ("operations", ", ".join(f"{phase} {count:.1e}" for phase, count in self.flops.items() if count)),
            ("time", time if self.seconds else f"not known: how fast {self.device} is can only be told where it is"),
            ("disk", f"{self.disk / GIB:.2f} GiB of {self.available_disk / GIB:.0f} GiB free"),
            ("memory", _by_phase(self.memory)),
            ("at its peak", _by_part(self.memory)),
            *on_device,
            ("verdict", self.problem or fits),
        ]
        return "\n".join(f"{name:12} {value}" for name, value in rows)


def _highest(memory: Phases) -> dict[str, float]:
    return max(memory.values(), key=lambda parts: sum(parts.values()))


def _by_phase(memory: Phases) -> str:
    return ", ".join(f"{phase} {sum(memory[phase].values()) / GIB:.2f} GiB" for phase in PHASES if phase in memory)


def _by_part(memory: Phases) -> str:
    parts = _highest(memory)
    large = sorted(((size, name) for name, size in parts.items() if size >= 0.01 * sum(parts.values())), reverse=True)
    return ", ".join(f"{name} {size / GIB:.2f} GiB" for size, name in large)


def plan(
    spec: RunSpec,
    save: bool = False,
    folder: Path | str = ".",
    stream: str = "auto",
    save_dtype: str = "float32",
    memory: float | None = None,
    device_memory: float | None = None,
    disk: float | None = None,
) -> Plan:
    """What a run of `spec` takes, from the configuration of its model alone: no weights are read, and no texts.

    Args:
        save: whether the repaired model is written as a checkpoint.
        folder: where to; its disk counts, unless the run keeps in the cache what it writes.
        stream: "yes": the model stays on disk; "no": it is in memory; "auto": on disk where its weights would not fit into memory as
            often as they are needed, and the run can be streamed.
        save_dtype: what the checkpoint is written in.
        memory: GiB of host memory that the run may take; default: what can still be had here.
        device_memory: GiB of a GPU's memory that the run may take: it is planned for one with so much, which need not be here.
        disk: GiB that the run may write; default: what is free where it writes.

    Raises:
        ReconError: a device that is not here, unless `device_memory` is given; a run that cannot be streamed but is to be, a model
            that is unknown or cannot be taken apart, a granularity that it is too small for.
    """
    decoder = shapes_of(*spec.loaded_by).decoder
    windows = decoder.windows(spec.reconstruction.granularity) if spec.reconstruction.granularity != "none" else []
    flops = estimate.flops(spec, decoder)
    device = planned_device(spec.compute.device, device_memory)
    dtype = planned_dtype(spec.compute.compute_dtype, device)
    parameters = sum(parameter.numel() for parameter in decoder.model.parameters())
    available = available_memory() if memory is None else int(memory * GIB)
    prunable = sum(matrix.weight.numel() for matrix in decoder.matrices().values())
    on_disk = stream == "yes" and streamed.wanted("yes", spec)
    if stream == "auto" and 0 < available < streamed.bytes_in_memory(spec, parameters):
        on_disk = _can_be_streamed(spec)
    size = SAVED[save_dtype].itemsize
    written = size * parameters * (save or on_disk)
    if on_disk and size < 4:  # until the run is done, what is not computed with as it is saved is there in float32 as well
        repaired = sum(p.numel() for window in windows for p in decoder.parameters(window).values())
        written += 4 * (repaired - prunable * (dtype == SAVED[save_dtype]) * bool(windows))
    if on_disk:
        written += prunable // 8 + _streams(spec, decoder)
    rate = estimate.speed(device, dtype) if is_here(device) else 0.0
    device = device if device.type == "cuda" else HOST  # what others have is the host's
    found = _memory(spec, on_disk=on_disk, device=device)
    return Plan(
        spec,
        parameters,
        prunable,
        len(windows),
        max((sum(p.numel() for p in decoder.parameters(window).values()) for window in windows), default=0),
        found[HOST.type],
        written,
        _tokens(spec),
        flops,
        {phase: count / rate for phase, count in flops.items()} if rate else {},
        available,
        _free(Path(folder) if save or not on_disk else cache_folder()) if disk is None else int(disk * GIB),
        on_disk,
        device,
        found.get(device.type, {}) if device != HOST else {},
        available_on_device(device) if device_memory is None else int(device_memory * GIB),
    )


def _free(folder: Path) -> int:
    """Bytes that can still be written to `folder`, which need not be there yet."""
    folder = folder.absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


def is_here(device: torch.device) -> bool:
    """Whether this machine has the device."""
    return device.type != "cuda" or torch.cuda.is_available()


def planned_device(name: str, device_memory: float | None = None) -> torch.device:
    """The device that a run is planned for: the first GPU where memory of one is given, which need not be here.

    Raises `ReconError` for a device that is not here, where no memory is given.
    """
    if device_memory is not None:
        if not (gpu := re.fullmatch(r"auto|cuda(?::(\d+))?", name)):
            raise ReconError(
                f"memory of a GPU is given to plan for, but the device is {name!r}; allowed: auto, cuda, cuda:NUMBER"
            )
        return torch.device("cuda", int(gpu[1] or 0))
    try:
        return pick_device(name)
    except ReconError as error:
        raise ReconError(f"{error}; to plan for a GPU that is not here, say how much memory it has (--device-memory)") from None


def planned_dtype(name: str, device: torch.device) -> torch.dtype:
    """What matrices are multiplied in: on a GPU that is not here, what any since 2020 multiplies natively."""
    return pick_compute_dtype(name if is_here(device) or name in COMPUTE_DTYPES else "bfloat16", device)


def _streams(spec: RunSpec, decoder: Decoder) -> int:
    """Bytes of the activations that a streamed run keeps on disk: of both models, each before and after the window in hand."""
    width = decoder.model.config.get_text_config().hidden_size
    return 4 * 4 * width * (spec.calibration.samples + spec.calibration.held_out_samples) * spec.calibration.sequence_length


def _can_be_streamed(spec: RunSpec) -> bool:
    try:
        return streamed.wanted("yes", spec)
    except ReconError:
        return False


def _memory(spec: RunSpec, evaluated: bool = True, on_disk: bool = False, device: torch.device = HOST) -> dict[str, Phases]:
    """Peak bytes by kind of device, by phase, and by what they are for."""
    from recon.experiment.rehearsal import peaks, streamed_peaks  # slow to import

    shapes = shapes_of(*spec.loaded_by)
    # Files that are mapped do not count where a run is streamed, and so neither do this process's own libraries.
    process = float(resident_anonymous() or resident()) if on_disk else float(resident())
    rehearse = streamed_peaks if on_disk else peaks
    spec = spec.replaced(compute_dtype=str(planned_dtype(spec.compute.compute_dtype, device)).removeprefix("torch."))
    try:
        found = rehearse(spec, shapes.config, shapes.decoder, evaluated, device)
    except ReconError:
        raise
    except Exception as error:  # whatever a model runs into that asks tensors without values for theirs
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        raise ReconError(
            f"no plan can be made for model {spec.model.model!r}: it does not run on tensors that have shapes and no values ({said}), as "
            "where shapes depend on weights; the run itself needs no plan"
        ) from error
    host = {phase: {"process": process, **parts} for phase, parts in found.highest(HOST.type).items()}
    return {device.type: found.highest(device.type), HOST.type: host}


def _tokens(spec: RunSpec) -> dict[str, int]:
    """Tokens that each phase reads."""
    phases = {
        "prune": not spec.model.pruned
        and (criteria.get(spec.pruning.criterion).statistics != "none" or spec.pruning.mask_refinement > 0),
        "reconstruct": spec.reconstruction.granularity != "none",
        "retrain": spec.retraining.method != "none",
    }
    tokens = {name: spec.samples_by_phase[name] * spec.calibration.sequence_length for name, there in phases.items() if there}
    return {**tokens, "evaluate": len(spec.evaluation.texts) * spec.evaluation.samples * spec.evaluation.length}


@dataclass(frozen=True)
class Change:
    """Options that a run could be given instead, ever smaller ones, and the phases that take less by them."""

    phases: frozenset[str]
    steps: list[dict]


def advice(planned: Plan) -> str:
    """The nearest run that would fit, where `planned` does not, and what it needs; empty where nothing here helps."""
    limits = planned.limits

    def over(memory: dict[str, Phases]) -> set[tuple[str, str]]:
        """The kinds of device and phases that take more than there is."""
        return {
            (kind, phase)
            for kind, limit in limits.items()
            for phase, parts in memory[kind].items()
            if sum(parts.values()) > limit
        }

    def needs(memory: dict[str, Phases]) -> str:
        return " and ".join(
            f"{sum(_highest(memory[kind]).values()) / GIB:.1f} GiB" + f" on {planned.device}" * (kind != HOST.type)
            for kind in limits
            if kind in {kind for kind, _ in too_much}
        )

    too_much = over({HOST.type: planned.memory, planned.device.type: planned.device_memory or planned.memory})
    if not too_much:
        return _advice_on_disk(planned) if planned.problem else ""
    spec, on_disk, options = planned.spec, planned.streamed, {}
    if HOST.type in {kind for kind, _ in too_much} and not on_disk and _can_be_streamed(spec):
        found = _memory(spec, on_disk=True, device=planned.device)
        if not over(found):
            return f"--stream yes would fit, with {needs(found)}"
        if HOST.type not in {kind for kind, _ in over(found)}:  # which leaves the device's memory
            on_disk, options, too_much = True, {"stream": "yes"}, over(found)
    phases = {phase for _, phase in too_much}
    changes = _changes(spec)

    @functools.cache
    def changed(number: int, step: int) -> dict[str, Phases]:
        change = changes[number]
        return _memory(spec.replaced(**change.steps[step]), "evaluate" in change.phases, on_disk, planned.device)

    def fits(number: int, step: int) -> bool:
        return not over(changed(number, step)) & too_much

    for number, change in enumerate(changes):
        if not phases <= change.phases or not fits(number, len(change.steps) - 1):
            continue
        # The first step that fits: they take ever less.
        step = bisect.bisect_left(range(len(change.steps)), True, key=lambda step, n=number: fits(n, step))
        return f"{_options(options | change.steps[step])} would fit, with {needs(changed(number, step))}"
    together: dict = {}
    for change in changes:
        if change.phases & phases:
            together |= change.steps[-1]
    if together:
        found = _memory(spec.replaced(**together), on_disk=on_disk, device=planned.device)
        verb = "even {} would need {}" if over(found) else "{} would fit, with {}"
        return verb.format(_options(options | together), needs(found))
    return ""


def _advice_on_disk(planned: Plan) -> str:
    """What would fit onto the disk: less text, where its activations are what is too much; or another disk."""
    elsewhere = f"a folder on a disk with {planned.disk / GIB:.1f} GiB free"
    if not planned.streamed:
        return f"save to {elsewhere}, or do not save the model"
    spec, decoder = planned.spec, shapes_of(*planned.spec.loaded_by).decoder
    rest = planned.disk - _streams(spec, decoder)
    shorter = (
        [] if spec.reconstruction.chunks > 1 else _halves(spec, "sequence_length", 128)
    )  # it has to be a multiple of the pieces
    for change in (*_halves(spec, "samples", 8), *shorter):
        needs = rest + _streams(spec.replaced(**change), decoder)
        if needs <= planned.available_disk:
            return f"{_options(change)} would fit, with {needs / GIB:.1f} GiB, as would {elsewhere}"
    return f"with fewer or shorter samples, {rest / GIB:.1f} GiB of it stay; take {elsewhere}"


def _halves(spec: RunSpec, name: str, least: int = 1) -> list[dict]:
    """Options with half of what `spec` says of `name`, and with half of that, down to `least`."""
    sizes = [value] if (value := getattr(spec, name) // 2) >= least else []
    while sizes and sizes[-1] // 2 >= least:
        sizes.append(sizes[-1] // 2)
    return [{name: size} for size in sizes]


def _changes(spec: RunSpec) -> list[Change]:
    """What could be changed to take less memory, the least harmful first."""
    halves = functools.partial(_halves, spec)
    decoder = shapes_of(*spec.loaded_by).decoder
    found = [(("reconstruct",), halves("batch_size")), (("retrain",), halves("retrain_batch_size"))]
    if spec.retraining.method != "none" and not spec.retraining.checkpointing:
        found.append((("retrain",), [{"retrain_checkpointing": True}]))
    found.append((("evaluate",), halves("evaluation_samples", 8)))
    if spec.reconstruction.granularity not in ("none", "matrix"):
        now, sizes = max(window.halves for window in decoder.windows(spec.reconstruction.granularity)), {}
        for name in GRANULARITIES:
            with contextlib.suppress(ReconError):  # it does not fit this model
                sizes.setdefault(max(window.halves for window in decoder.windows(name)), name)
        smaller = [{"granularity": sizes[size]} for size in sorted(sizes, reverse=True) if size < now]
        found.append((("reconstruct",), smaller))
    found.append((("prune", "reconstruct"), halves("samples", 8)))
    return [Change(frozenset(phases), steps) for phases, steps in found if steps]


def _options(changes: dict) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changes.items())


def check(
    spec: RunSpec,
    save: bool = False,
    folder: Path | str = ".",
    loaded: int = 0,
    stream: str = "auto",
    save_dtype: str = "float32",
) -> Plan | None:
    """The plan of a run that is long or large, once it is known to fit; None where a rough estimate says that it is neither.

    loaded: bytes of the model's weights that are in memory already.

    Raises `ReconError` for a run that cannot fit, with the nearest one that would.
    """
    try:
        decoder = shapes_of(*spec.loaded_by).decoder
        flops, roughly = estimate.cost(spec, decoder)
        device = pick_device(spec.compute.device)
        seconds = sum(flops.values()) / estimate.speed(device, pick_compute_dtype(spec.compute.compute_dtype, device))
        least = min(available_memory(), available_on_device(device) or math.inf)
        if seconds < LONG and roughly < LARGE * least:
            return None
        planned = plan(spec, save, folder, stream, save_dtype)
    except ReconError as error:  # the run itself will say what is wrong with it, if anything is
        log.info("no plan: %s", error)
        return None
    planned = replace(planned, available_memory=planned.available_memory + loaded)
    if planned.problem:
        raise ReconError(f"this run {planned.problem}; {advice(planned) or 'nothing smaller is known that would fit'}")
    return planned


@functools.lru_cache(maxsize=4)
def shapes_of(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Shapes:
    """The model called `model` without weights: of the Hub's files, or those of a folder, the configuration alone is read.

    Raises `ReconError` for what `recon.data.models` refuses, and for a model that cannot be taken apart.
    """
    config = models.configuration(model, revision, trust_remote_code)
    return Shapes(config, decoder_of(config))


def decoder_of(config: PretrainedConfig) -> Decoder:
    """The model of `config` on torch's meta device, taken apart as a much narrower one is.

    Raises `ReconError` for a model that cannot be taken apart.
    """
    model = skeleton(config)
    model.tie_weights()
    return take_apart(model, like=_structure(config))


def _structure(config: PretrainedConfig) -> Decoder:
    """A model built as that of `config`, of much smaller widths where that is possible, taken apart."""
    names = set(skeleton(config).state_dict())
    factor = NARROWEST
    while True:
        try:
            model = skeleton(narrowed(config, factor))
            if set(model.state_dict()) == names:
                return take_apart(model, lazy=Lazy(model, lambda names: iter(())))
        except Exception:  # whatever a model of strange widths runs into
            if factor == 1:
                raise
        factor //= 2


def narrowed(config: PretrainedConfig, factor: int) -> PretrainedConfig:
    """`config` with the widths of its layers divided by `factor`.

    Raises `ReconError` where they do not divide.
    """
    if factor == 1:
        return config
    config = type(config).from_dict(config.to_dict())
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, int) and _is_width(name):
            if value % factor or value == factor:  # of matrices with one column it cannot be told which way round they lie
                raise ReconError(f"{name} is {value}, which {factor} does not divide into 2 or more")
            setattr(text, name, value // factor)
    return config


def _is_width(name: str) -> bool:
    return name.endswith(("hidden_size", "intermediate_size", "_dim", "_rank", "n_embd", "n_inner", "d_model", "ffn_dim"))
