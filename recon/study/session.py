"""What runs share: those of one process in memory, and what is measured of a dense model in the user's cache."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from recon.data import models
from recon.evaluate import zero_shot
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.runtime.storage import derived_folder, once, write_json, write_safetensors
from recon.study.measure import Texts, digest
from recon.study.record import environment
from recon.study.spec import RunSpec

Value = TypeVar("Value")
LEAST = 1e12  # floating-point operations of measuring, a few seconds; what costs less is measured anew


class Session:
    """What consecutive runs share: the dense model, its measurements, and the last pruned state, so that granularities which follow one
    another in a study start from the very same one.
    """

    def __init__(self):
        self.reused: list[str] = []  # kinds of what the last run took from here
        self._kept: dict[str, tuple[object, object]] = {}

    def keep(self, kind: str, key: object, make: Callable[[], Value]) -> Value:
        """`make()`, or what it gave last time for the same `kind` if `key` has not changed since."""
        if self.holds(kind, key):
            self.reused.append(kind)
        else:
            self._kept.pop(kind, None)  # frees the memory before the next one is made
            self._kept[kind] = (key, make())
        return self._kept[kind][1]

    def holds(self, kind: str, key: object) -> bool:
        """Whether `keep` would give what it gave last time."""
        return kind in self._kept and self._kept[kind][0] == key

    def clear(self) -> None:
        """Forgets everything: all that is kept is of one model."""
        self._kept.clear()

    def load(self, model: str, revision: str | None, trust_remote_code: bool) -> tuple[Decoder, object]:
        """The dense model and its tokenizer."""

        def make():
            loaded, tokenizer = models.load(model, revision, trust_remote_code=trust_remote_code)
            return decompose(loaded), tokenizer

        key = (model, revision, trust_remote_code)
        if not self.holds("model", key):
            self.clear()  # before there is a second model
        return self.keep("model", key, make)

    def bytes_loaded(self, spec: RunSpec) -> int:
        """Bytes of the weights of the model of `spec` that are in memory already."""
        loaded = self.holds("model", spec.loaded_by)
        return sum(parameter.nbytes for parameter in self._kept["model"][1][0].model.parameters()) if loaded else 0

    def measured(
        self,
        spec: RunSpec,
        texts: Texts,
        device: torch.device,
        flops: float,
        measure: Callable[[], tuple[dict, dict[str, Tensor]]],
    ) -> tuple[dict, dict[str, Tensor]]:
        """`measure()` of the dense model, or what it gave an earlier process.

        flops: of measuring. What takes no time is not kept, nor what code gives that is not committed, nor tasks whose documents come
        from the Hub.
        """
        here, how = environment(device, spec.compute.compute_dtype), spec.evaluation
        if flops < LEAST or here["git_dirty"] or set(how.tasks) - set(zero_shot.BUNDLED):
            return measure()
        read = [
            {text: digest(read) for text, read in texts.evaluation.items()},
            texts.held_out is not None and digest(texts.held_out),
        ]
        decisive = [models.fingerprint(*spec.loaded_by), read, how.kl_windows, how.tasks, how.task_limit, here]
        folder = derived_folder(f"dense-{hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]}")
        if folder.is_dir():
            self.reused.append("dense")
            return json.loads((folder / "measured.json").read_text()), load_file(folder / "states.safetensors")
        found, states = measure()

        def write(fresh: Path) -> None:
            write_json(fresh / "measured.json", found)
            write_safetensors(fresh / "states.safetensors", states)

        once(folder, write)
        return found, states
