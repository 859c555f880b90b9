"""Whether the model of a run stays on disk, and where such a run works."""

import logging
import math
from pathlib import Path

from safetensors import safe_open

from recon.data import files, models
from recon.errors import ReconError
from recon.runtime import device
from recon.runtime.storage import RUN, cache_folder
from recon.runtime.weights import quantisation
from recon.study.session import Session
from recon.study.spec import RunOptions, RunSpec

log = logging.getLogger("recon")


def work_folder(key: str, save: Path | None) -> Path:
    """The folder where the streamed run called `key` works: beside the one that it saves to, or in the cache."""
    return cache_folder() / "unfinished" / key if save is None else save.with_name(f"{save.name}.unfinished")


def begun(spec: RunSpec, save: Path | None) -> bool:
    """Whether a streamed run of `spec` has finished something."""
    return (work_folder(spec.key(), save) / RUN).exists()


def decide(spec: RunSpec, options: RunOptions, session: Session) -> bool:
    """Whether the run's model stays on disk. Raises `ReconError` where it is to, but cannot."""
    stream = options.stream
    if stream == "auto" and begun(spec, options.save):
        stream = "yes"  # though it may fit into memory by now
    if stream == "auto" and session.holds("model", spec.loaded_by):
        return False  # what is in memory fits into it
    return wanted(stream, spec)


def wanted(stream: str, spec: RunSpec) -> bool:
    """Whether a run of `spec` is streamed. Raises `ReconError` where it is to be but cannot."""
    if stream == "no" or (stream == "auto" and not is_too_large(spec)):
        return False
    why = in_memory_only(spec)
    if why and stream == "yes":
        raise ReconError(f"{why}, which a streamed run cannot do, as it has one window in memory; use stream no")
    if why:
        log.warning("model %r may not fit into memory, but %s and cannot be streamed", spec.model.model, why)
    return not why


def in_memory_only(spec: RunSpec) -> str:
    """Why the run's model has to be in memory, by the options and its configuration; empty: it need not."""
    if spec.retraining.retrain != "none":
        return f"retraining (retrain {spec.retraining.retrain}) trains the whole model at once"
    try:
        found = quantisation(models.configuration(*spec.loaded_by))
    except ReconError:  # loading the model will say what is wrong
        return ""
    return f"reading model {spec.model.model!r} undoes its quantisation ({found['quant_method']})" if found else ""


def models_in_memory(spec: RunSpec, parameters: int) -> int:
    """The least bytes that a run in memory takes: a model of so many parameters and its copy, in float32, and once more what pruning
    made of it, where that is more than zeros."""
    return 4 * parameters * (2 + spec.changes_weights)


def is_too_large(spec: RunSpec) -> bool:
    """Whether the weights of a run in memory would take more than there is to be had now; see `models_in_memory`."""
    elements = 0
    for path in files.shards(models.folder(*spec.loaded_by)):
        with safe_open(path, framework="pt") as file:
            elements += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return 0 < device.available_memory() < models_in_memory(spec, elements)
