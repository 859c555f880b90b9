"""Whether the model of a run stays on disk."""

import logging
import math
from pathlib import Path

from safetensors import safe_open

from recon.data import files, models
from recon.errors import ReconError
from recon.runtime import device
from recon.runtime.weights import quantisation
from recon.study import unfinished
from recon.study.memory import models_in_memory
from recon.study.session import Session
from recon.study.spec import RunOptions, RunSpec

log = logging.getLogger("recon")
STREAM = ("auto", "yes", "no")


def decide(spec: RunSpec, options: RunOptions, session: Session) -> bool:
    """Whether the run's model stays on disk. Raises `ReconError` where it is to, but cannot."""
    stream = options.stream
    if stream == "auto" and _begun(spec, options.save):
        stream = "yes"  # though it may fit into memory by now
    if stream == "auto" and session.holds("model", spec.loaded_by):
        return False  # what is in memory fits into it
    return wanted(stream, spec)


def begun(spec: RunSpec, save: Path | None) -> bool:
    """Whether some of a run of `spec` is on the disk already: finished steps of a streamed one, or what it has saved."""
    return _begun(spec, save) or (save is not None and (save / files.RECORD).exists())


def _begun(spec: RunSpec, save: Path | None) -> bool:
    return (unfinished.folder_of(spec.key(), save) / unfinished.JOURNAL).exists()


def wanted(stream: str, spec: RunSpec) -> bool:
    """Whether a run of `spec` is streamed. Raises `ReconError` for an unknown word, and where it is to be but cannot."""
    if stream not in STREAM:
        raise ReconError(f"stream is {stream!r}; allowed: {', '.join(STREAM)}")
    if stream == "no" or (stream == "auto" and not is_too_large(spec)):
        return False
    if spec.retraining.retrain != "none":
        needs_all = f"retraining (retrain {spec.retraining.retrain}) trains the whole model at once"
    else:
        needs_all = _needs_memory(spec)
    if needs_all and stream == "yes":
        raise ReconError(f"{needs_all}, which a streamed run cannot do, as it has one window in memory; use stream no")
    if needs_all:
        log.warning("model %r may not fit into memory, but %s and cannot be streamed", spec.model.model, needs_all)
    return not needs_all


def _needs_memory(spec: RunSpec) -> str | None:
    """Why the run's model has to be in memory, by its configuration, which alone is read (`recon plan` asks); None: it need not."""
    try:
        config = models.configuration(*spec.loaded_by)
    except ReconError:  # loading the model will say what is wrong
        return None
    if found := quantisation(config):
        return f"reading model {spec.model.model!r} undoes its quantisation ({found['quant_method']})"
    return None


def is_too_large(spec: RunSpec) -> bool:
    """Whether the weights of a run in memory would take more than there is to be had now; see `models_in_memory`."""
    elements = 0
    for path in files.shards(models.folder(*spec.loaded_by)):
        with safe_open(path, framework="pt") as file:
            elements += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return 0 < device.available_memory() < models_in_memory(spec, elements)
