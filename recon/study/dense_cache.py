"""What is measured of a dense model, kept in the user's cache from one process to the next."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from recon.data import models
from recon.data.cache import cached, whole
from recon.evaluate import zero_shot
from recon.runtime.storage import write_json, write_safetensors
from recon.study.environment import environment
from recon.study.spec import RunSpec
from recon.study.texts import Texts, digest

LEAST = 1e12  # floating-point operations of measuring, a few seconds; what costs less is measured anew


def name(spec: RunSpec, texts: Texts, device: torch.device, flops: float) -> str:
    """Of what is measured of the dense model of `spec`, by all that decides it; empty where that cannot be told (by code that is not
    committed, and by tasks whose documents come from the Hub), or takes no time."""
    here = environment(device, spec.compute.compute_dtype)
    if flops < LEAST or here["git_dirty"] or set(spec.evaluation.tasks) - set(zero_shot.BUNDLED):
        return ""
    evaluation, held_out = spec.evaluation, texts.held_out
    read = [{text: digest(tokens) for text, tokens in texts.evaluation.items()}, None if held_out is None else digest(held_out)]
    decisive = [models.fingerprint(*spec.loaded_by), read, evaluation.kl_windows, evaluation.tasks, evaluation.task_limit, here]
    return f"dense-{hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]}"


def get(name: str) -> tuple[dict, dict[str, Tensor]] | None:
    """What is kept under `name`, or None."""
    folder = whole(name) if name else None
    return folder and (json.loads((folder / "measured.json").read_text()), load_file(folder / "states.safetensors"))


def put(name: str, measured: dict, states: dict[str, Tensor]) -> None:
    """Keeps it, where it has a `name`."""

    def write(folder: Path) -> None:
        write_json(folder / "measured.json", measured)
        write_safetensors(folder / "states.safetensors", states)

    if name:
        cached(name, write)
