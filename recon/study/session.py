"""What consecutive runs of one process share in memory."""

from collections.abc import Callable
from typing import TypeVar

from recon.data import models
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.study.spec import RunSpec

Value = TypeVar("Value")


class Session:
    """What consecutive runs share: the dense model, its measurements, and the last pruned state, so that granularities that follow
    one another in a study start from the very same one.
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
