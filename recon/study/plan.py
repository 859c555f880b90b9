"""What a run takes, before it starts and without weights: parameters, windows, memory, disk, operations, time; whether it fits here."""

import contextlib
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from recon.data import models
from recon.errors import ReconError
from recon.kernels import criteria
from recon.model.decoder import Decoder
from recon.model.windows import Window
from recon.runtime.attention import CHUNK, LONGEST
from recon.runtime.device import (
    COMPUTE_DTYPES,
    HOST,
    SAVED,
    available_memory,
    available_on_device,
    pick_compute_dtype,
    pick_device,
    resident,
    resident_anonymous,
)
from recon.runtime.storage import cache_folder
from recon.study import cost, memory, streaming
from recon.study.memory import Phases, highest, models_in_memory
from recon.study.shapes import shapes_of
from recon.study.spec import RunSpec

log = logging.getLogger("recon")
GIB = 2**30
LONG = 600  # seconds: runs that are expected to take longer say their plan before they start
LARGE = 0.3  # of the available memory: so do those that take more
GRANULARITIES = ("half-block", "block", "2-blocks", "4-blocks", "8-blocks", "quarter")  # tried where a larger one does not fit


@dataclass(frozen=True)
class Plan:
    """What a run of `spec` takes on this machine, or on one with another GPU.

    parameters, prunable: elements of the model, and of the matrices that are pruned.
    weights: what the dense model's weights are dequantised from, or their dtype.
    windows, largest_window: how many are fitted one after another, and the parameters of the largest.
    memory: peak bytes by kind of device, by phase, and by what they are for; on the host, "process" is what this process takes already.
    available: bytes that the run may take, by kind of device, what this process takes already included.
    disk, available_disk: bytes that the run keeps on the disk at most; bytes that are free there.
    tokens, flops, seconds: by phase; no seconds where the device is not here.
    streamed: whether the model stays on disk; see `recon.study.home.OnDisk`.
    device: where windows are computed.
    again: plans another spec (and `stream`), with all other arguments of `plan` unchanged.
    """

    spec: RunSpec
    parameters: int
    prunable: int
    weights: str
    windows: int
    largest_window: int
    memory: dict[str, Phases]
    available: dict[str, float]
    disk: int
    available_disk: int
    tokens: dict[str, int]
    flops: dict[str, float]
    seconds: dict[str, float]
    streamed: bool
    device: torch.device
    again: Callable[..., "Plan"]

    @property
    def rooms(self) -> dict[str, tuple[float, float]]:
        """Bytes that the run needs, and that there are: of "memory", of "memory on" a GPU, and of "disk"."""
        found = {self._memory_of(kind): (sum(highest(self.memory[kind]).values()), has) for kind, has in self.available.items()}
        return found | {"disk": (self.disk, self.available_disk)}

    @property
    def tight(self) -> list[str]:
        """The rooms of which the run needs more than there is."""
        return [room for room, (needs, has) in self.rooms.items() if needs > has]

    @property
    def problem(self) -> str:
        """Why the run cannot fit here; empty where it can."""
        rooms = {room: [f"{size / GIB:.1f} GiB" for size in self.rooms[room]] for room in self.tight}
        return "; ".join(f"needs {needs} of {room}, of which there are {has}" for room, (needs, has) in rooms.items())

    def _memory_of(self, kind: str) -> str:
        return "memory" if kind == HOST.type else f"memory on {self.device}"

    def __str__(self) -> str:
        spec = self.spec
        rooms = [
            f"{needs / GIB:.2f} GiB of {has / GIB:.1f} GiB {room}" for room, (needs, has) in self.rooms.items() if room != "disk"
        ]
        times = ", ".join(f"{phase} {cost.duration(value)}" for phase, value in self.seconds.items() if value)
        time = f"about {cost.duration(sum(self.seconds.values()))} on this machine: {times}"
        rows = [
            (
                "model",
                f"{spec.model.model}: {self.parameters:,} parameters, {self.prunable:,} of them in matrices that are pruned",
            ),
            ("dense", self.weights),
            ("kept", "on disk, one window at a time in memory" if self.streamed else "in memory"),
            (
                "windows",
                f"{self.windows} of {spec.reconstruction.granularity}, the largest of {self.largest_window:,} parameters",
            ),
            ("tokens", ", ".join(f"{phase} {count:,}" for phase, count in self.tokens.items())),
            ("operations", ", ".join(f"{phase} {count:.1e}" for phase, count in self.flops.items() if count)),
            ("time", time if self.seconds else f"not known: how fast {self.device} is can only be told where it is"),
            ("disk", f"{self.disk / GIB:.2f} GiB of {self.available_disk / GIB:.0f} GiB free"),
        ]
        for kind, phases in self.memory.items():
            by_phase = ", ".join(f"{phase} {sum(parts.values()) / GIB:.2f} GiB" for phase, parts in phases.items())
            parts = highest(phases)
            large = sorted(((size, name) for name, size in parts.items() if size >= 0.01 * sum(parts.values())), reverse=True)
            rows.append((self._memory_of(kind).removeprefix("memory on "), by_phase))
            rows.append(("at its peak", ", ".join(f"{name} {size / GIB:.2f} GiB" for size, name in large)))
        rows.append(("verdict", self.problem or f"fits: {', '.join(rooms)}"))
        return "\n".join(f"{name:12} {value}" for name, value in rows)


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
        save: whether the reconstructed model is written as a checkpoint.
        folder: where to; its disk counts, unless the run keeps in the cache what it writes.
        stream: "yes": the model stays on disk; "no": it is in memory; "auto": on disk where the copies of
            its weights that the run needs would not fit into memory, and the run can be streamed.
        save_dtype: what the checkpoint is written in.
        memory: GiB of host memory that the run may take; default: what can still be had here.
        device_memory: GiB of a GPU's memory that the run may take: it is planned for one with so much, which need not be here.
        disk: GiB that the run may write; default: what is free where it writes.

    Raises:
        ReconError: a device that is not here, unless `device_memory` is given; a run that cannot be streamed but is to be, a model
            that is unknown or cannot be taken apart, a granularity that it is too small for.
    """
    spec, (config, decoder) = spec.resolved(), shapes_of(*spec.loaded_by)
    windows = decoder.windows(spec.reconstruction.granularity) if spec.reconstruction.granularity != "none" else []
    device = planned_device(spec.compute.device, device_memory)
    dtype, here = planned_dtype(spec.compute.compute_dtype, device), is_here(device)
    parameters = sum(parameter.numel() for parameter in decoder.model.parameters())
    room = available_memory() if memory is None else int(memory * GIB)
    on_disk = stream == "yes" and streaming.wanted("yes", spec)
    if stream == "auto" and 0 < room < models_in_memory(spec, parameters):
        on_disk = _can_be_streamed(spec)
    flops = cost.flops(spec, decoder)
    found = peak_memory(spec, device, on_disk)
    available = {HOST.type: float(room) + _process(on_disk)}
    if len(found) > 1:
        available[device.type] = float(available_on_device(device) if device_memory is None else int(device_memory * GIB))
    return Plan(
        spec,
        parameters,
        prunable=sum(matrix.weight.numel() for matrix in decoder.matrices().values()),
        weights=models.precision(config),
        windows=len(windows),
        largest_window=max((sum(p.numel() for p in decoder.parameters(window).values()) for window in windows), default=0),
        memory=found,
        available=available,
        disk=_written(spec, decoder, save, on_disk, SAVED[save_dtype], dtype),
        available_disk=_free(Path(folder) if save or not on_disk else cache_folder()) if disk is None else int(disk * GIB),
        tokens=_tokens(spec),
        flops=flops,
        seconds=cost.seconds(spec, decoder, device, flops) if here else {},
        streamed=on_disk,
        device=device,
        again=partial(
            plan, save=save, folder=folder, save_dtype=save_dtype, memory=memory, device_memory=device_memory, disk=disk
        ),
    )


def peak_memory(spec: RunSpec, device: torch.device, on_disk: bool = False) -> dict[str, Phases]:
    """Peak bytes of a run by kind of device, by phase, and by what they are for; what this process takes already is part of the host's."""
    device, dtype = (device if device.type == "cuda" else HOST), planned_dtype(spec.compute.compute_dtype, device)
    found = memory.memory(spec, shapes_of(*spec.loaded_by).decoder, dtype, device, on_disk)
    process = _process(on_disk)
    return found | {HOST.type: {phase: {"process": process, **parts} for phase, parts in found[HOST.type].items()}}


def _process(on_disk: bool) -> float:
    """Bytes that this process takes; where a run is streamed, mapped files do not count, and so neither do libraries."""
    return float(on_disk and resident_anonymous() or resident())


def _written(spec: RunSpec, decoder: Decoder, save: bool, on_disk: bool, saved: torch.dtype, dtype: torch.dtype) -> int:
    """Bytes that the run writes: the checkpoint in dtype `saved`, and of a streamed run, which computes in `dtype`, all its work."""
    parameters = sum(parameter.numel() for parameter in decoder.model.parameters())
    found = saved.itemsize * parameters * (save or on_disk)
    if not on_disk:
        return found
    prunable = sum(matrix.weight.numel() for matrix in decoder.matrices().values())
    if saved.itemsize < 4 and spec.reconstruction.granularity != "none":
        # Until the run is done, what is not computed with as it is saved is there in float32 as well.
        windows = decoder.windows(spec.reconstruction.granularity)
        fitted = sum(p.numel() for window in windows for p in decoder.parameters(window).values())
        found += 4 * (fitted - prunable * (dtype == saved))
    return found + prunable // 8 + _streams(spec, decoder)


def _streams(spec: RunSpec, decoder: Decoder) -> int:
    """Bytes of the activations that a streamed run keeps on disk: of both models, each before and after the window in hand."""
    width = decoder.model.config.get_text_config().hidden_size
    return 4 * 4 * width * (spec.calibration.samples + spec.calibration.held_out_samples) * spec.calibration.sequence_length


def _free(folder: Path) -> int:
    """Bytes that can still be written to `folder`, which need not be there yet."""
    folder = folder.absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


def _tokens(spec: RunSpec) -> dict[str, int]:
    """Tokens that each phase reads."""
    phases = {
        "prune": not spec.model.pruned
        and (criteria.get(spec.pruning.criterion).statistics != "none" or spec.pruning.mask_refinement > 0),
        "reconstruct": spec.reconstruction.granularity != "none",
        "retrain": spec.retraining.retrain != "none",
    }
    tokens = {name: spec.samples_by_phase[name] * spec.calibration.sequence_length for name, there in phases.items() if there}
    return {
        **tokens,
        "evaluate": len(spec.evaluation.evaluation_texts)
        * spec.evaluation.evaluation_samples
        * spec.evaluation.evaluation_length,
    }


# --- one window -----------------------------------------------------------------------------------------------------------


def window_memory(decoder: Decoder, spec: RunSpec, device: torch.device | None = None) -> dict[str, int]:
    """Bytes of the largest window of a run of `spec`, counted from shapes, by what they are for; empty where none is reconstructed.

    "parameters": what it takes to run the window, float32. "gradients" and "moments" (AdamW's two): of what is trained, float32.
    "copies": weights to roll back to, weights rounded for products, masks to multiply by. "activations": what the forward pass of one
    batch keeps for the backward pass. "statistics": Gram matrices, where matrices are solved exactly.

    decoder: the model, or its shapes alone. device: where windows are computed; default: the spec's.
    """
    device = pick_device(spec.compute.device) if device is None else device
    if spec.reconstruction.granularity == "none":
        return {}
    windows = memory.distinct(decoder, spec.reconstruction.granularity)
    found = [
        _window_memory(decoder, window, spec, planned_dtype(spec.compute.compute_dtype, device), device) for window in windows
    ]
    return max(found, key=lambda parts: sum(parts.values()))


def _window_memory(decoder: Decoder, window: Window, spec: RunSpec, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    how, length, config = spec.reconstruction, spec.calibration.sequence_length, decoder.model.config.get_text_config()
    matrices, adapted = decoder.matrices(window), how.adapter != "none"
    shapes, rounds = [matrix.weight.shape for matrix in matrices.values()], dtype != torch.float32
    groups = [group for index in window.blocks for group in decoder.groups[index] if group[0] in matrices]
    weights, before = sum(map(math.prod, shapes)), sum(p.numel() for p in decoder.trained(window, how.train).values())
    trained = how.rank * sum(map(sum, shapes)) if adapted else before
    # Rounded, each matrix has an input of its own; else those of a group share it. Norms keep what they read and what they give.
    read = [each for group in groups for each in (group if rounds else group[:1])]
    width = sum(m.share * (m.weight.shape[0] + (name in read) * m.weight.shape[1]) for name, m in matrices.items())
    per_token = dtype.itemsize * width + (0 if window.matrices else 2 * 4 * config.hidden_size * window.halves)
    if rounds and device.type == "cpu" and window.mixes_tokens and CHUNK < length <= LONGEST:  # see `recon.runtime.attention`
        heads = getattr(config, "num_attention_heads", 0) or 0
        per_token += dtype.itemsize * heads * (length + CHUNK) / 2 * len(window.blocks)
    tokens = min(how.batch_size, spec.calibration.samples) * length // how.chunks_of(window, length)
    masked = (how.adapter in ("none", "masklora")) * (2 if device.type == "cpu" else 1)
    descends, solves = how.solver == "adamw", "exact" in (how.solver, how.start)
    return {
        "parameters": 4 * sum(tensor.numel() for tensor in decoder.needed(window)),
        "gradients": descends * 4 * trained,
        "moments": descends * 8 * trained,
        "copies": 4 * before + descends * weights * (masked + dtype.itemsize * (rounds or adapted)),
        "activations": descends * int(tokens * per_token),
        "statistics": solves * 4 * sum(matrices[group[0]].weight.shape[1] ** 2 for group in groups),
    }


# --- devices that need not be here ----------------------------------------------------------------------------------------


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


# --- what would fit instead -----------------------------------------------------------------------------------------------


def advice(planned: Plan) -> str:
    """The nearest run that would fit, where `planned` does not, and what it needs; empty where nothing here helps."""
    if not planned.problem:
        return ""
    spec, again, options, stream = planned.spec, planned.again, {}, "yes" if planned.streamed else "no"
    if "memory" in planned.tight and stream == "no" and _can_be_streamed(spec):
        other = again(spec, stream="yes")
        if not other.problem:
            return _said({"stream": "yes"}, planned, other)
        if "memory" not in other.tight:  # which leaves the device, or the disk
            planned, stream, options = other, "yes", {"stream": "yes"}
    together: dict = {}
    for steps in _changes(spec):
        for step in steps:
            other = again(spec.replaced(**step), stream=stream)
            if not other.problem:
                return _said(options | step, planned, other)
        if steps and any(other.rooms[room][0] < planned.rooms[room][0] for room in planned.tight):
            together |= steps[-1]
    if planned.tight == ["disk"] and stream == "no":
        return f"save to a folder on a disk with {planned.disk / GIB:.1f} GiB free, or do not save the model"
    return _said(options | together, planned, again(spec.replaced(**together), stream=stream)) if together else ""


def _said(options: dict, planned: Plan, other: Plan) -> str:
    """What `other` needs of what is tight for `planned`, with these options in place of its own."""
    shown = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    needs = " and ".join(f"{other.rooms[room][0] / GIB:.1f} GiB of {room}" for room in planned.tight)
    return f"even {shown} would need {needs}" if other.problem else f"{shown} would fit, with {needs}"


def _can_be_streamed(spec: RunSpec) -> bool:
    try:
        return streaming.wanted("yes", spec)
    except ReconError:
        return False


def _changes(spec: RunSpec) -> Iterator[list[dict]]:
    """Options that a run could be given instead, ever smaller ones; the least harmful first."""
    yield _halves(spec, "batch_size")
    if spec.retraining.retrain != "none":
        yield _halves(spec, "retrain_batch_size")
        yield [{"retrain_checkpointing": True}]
    yield _halves(spec, "evaluation_samples", 8)
    if spec.reconstruction.granularity not in ("none", "matrix"):
        decoder, sizes = shapes_of(*spec.loaded_by).decoder, {}
        for name in (spec.reconstruction.granularity, *GRANULARITIES):
            with contextlib.suppress(ReconError):  # it does not fit this model
                sizes.setdefault(max(window.halves for window in decoder.windows(name)), name)
        now = next(iter(sizes))
        yield [{"granularity": sizes[size]} for size in sorted(sizes, reverse=True) if size < now]
    yield _halves(spec, "samples", 8)
    yield _halves(spec, "sequence_length", 128)


def _halves(spec: RunSpec, name: str, least: int = 1) -> list[dict]:
    """Options with half of what `spec` says of `name`, and with half of that, down to `least`."""
    found, value = [], spec.flat()[name] // 2
    while value >= least:
        found.append({name: value})
        value //= 2
    return found


def check(
    spec: RunSpec,
    save: bool = False,
    folder: Path | str = ".",
    loaded: int = 0,
    stream: str = "auto",
    save_dtype: str = "float32",
) -> Plan | None:
    """The plan of a run that is long or large, once it is known to fit; None where it is neither, or has no plan.

    loaded: bytes of the model's weights that are in memory already.

    Raises `ReconError` for a run that cannot fit, with the nearest one that would.
    """
    try:
        planned = plan(spec, save, folder, stream, save_dtype)
    except ReconError as error:  # the run itself will say what is wrong with it, if anything is
        log.info("no plan: %s", error)
        return None
    planned.available[HOST.type] += loaded
    if planned.problem:
        raise ReconError(f"this run {planned.problem}; {advice(planned) or 'nothing smaller is known that would fit'}")
    large = any(needs > LARGE * has for room, (needs, has) in planned.rooms.items() if room != "disk")
    return planned if large or sum(planned.seconds.values()) > LONG else None
