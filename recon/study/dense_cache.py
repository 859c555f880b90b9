"""What is measured of a dense model, kept in the user's cache from one process to the next."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from recon.data import models
from recon.data.cache import cached, whole
from recon.errors import ReconError
from recon.evaluate import zero_shot
from recon.runtime.storage import write_json, write_safetensors
from recon.study.environment import environment
from recon.study.spec import RunSpec
from recon.study.texts import Texts

log = logging.getLogger("recon")
VERSION = 1  # raise it when the meaning of what is kept changes
ROOM = 2 * 2**30  # bytes on disk; beyond it, what was not used for longest goes
LEAST = 1e12  # floating-point operations of measuring, a few seconds; what costs less is measured anew
FOUND, STATES = "measured.json", "states.safetensors"


class DenseCache:
    """What was measured of the dense model of one run, by whatever decides it: the files' content, tokens, versions, device.

    Code that is changed but not committed, and tasks whose documents come from the Hub, are in no key: then nothing is kept.
    """

    def __init__(self, spec: RunSpec, texts: Texts, device: torch.device, flops: float):
        here = environment(device, spec.compute.compute_dtype)
        foreign = set(spec.evaluation.tasks) - set(zero_shot.BUNDLED)
        self.used, self.name = flops >= LEAST and not (here["git_dirty"] or foreign), ""
        if self.used:
            tasks = (spec.evaluation.tasks, spec.evaluation.task_limit)
            held_out = texts.held_out is not None and _digest(texts.held_out)
            read = {name: _digest(tokens) for name, tokens in texts.evaluation.items()}
            scorer = metadata.version("lm_eval") if spec.evaluation.tasks else None
            decisive = [
                VERSION,
                models.fingerprint(*spec.loaded_by),
                spec.evaluation.kl_windows,
                read,
                held_out,
                tasks,
                scorer,
                here,
            ]
            self.name = f"dense-{hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]}"

    def get(self) -> tuple[dict, dict[str, Tensor]] | None:
        """What is kept, or None; a damaged file counts as none."""
        folder = whole(self.name) if self.used else None
        try:
            found = folder and (json.loads((folder / FOUND).read_text(encoding="utf-8")), load_file(folder / STATES))
            if folder:
                os.utime(folder)
            return found
        except OSError:  # another process has just made room
            return None

    def put(self, found: dict, states: dict[str, Tensor]) -> None:
        """Keeps it, where there is room."""
        if not self.used:
            return

        def write(folder: Path) -> None:
            write_json(folder / FOUND, found)
            write_safetensors(folder / STATES, states)

        try:
            kept = cached(self.name, write).parent
        except ReconError as error:
            log.warning("what was measured of the dense model is not kept: %s", error)
            return
        _make_room(kept)


def _make_room(home: Path) -> None:
    """Deletes what was not used for longest, where there is more than `ROOM`."""
    used = 0
    with contextlib.suppress(OSError):  # another process makes room too
        for folder in sorted(home.glob("dense-*/"), key=lambda folder: folder.stat().st_mtime, reverse=True):
            used += sum(file.stat().st_size for file in folder.iterdir())
            if used > ROOM:
                shutil.rmtree(folder, ignore_errors=True)


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(json.dumps(tokens.tolist()).encode()).hexdigest()
