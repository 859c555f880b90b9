"""What a pass over a model keeps while it works: masks, room for activations, and which of its steps are finished."""

from collections.abc import MutableMapping, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Store(Protocol):
    """What passes keep things in. A pass is a phase, such as "prune" or "reconstruct", and ends its steps, such as windows, in order.

    A pass that goes on after a kill asks what `finished` tells, begins with `streams`, and does only the steps that are left.
    """

    masks: MutableMapping[str, Tensor]  # keep-masks by matrix name, bool (out, in)

    def new_masks(self) -> None:
        """Pruning begins: `masks` is a new mapping, unless this run has pruned some blocks already."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype, pinned: bool = False) -> Tensor:
        """A tensor on the CPU to be filled, for activations or for weights that are put aside.

        pinned: in memory that a GPU can read by itself, unless the tensor is in a file.
        """

    def finished(self, phase: str) -> list:
        """What the finished steps of `phase` found, in their order."""

    def streams(self, phase: str) -> dict[str, Tensor]:
        """The activations that the next step of `phase` starts from, by name."""

    def finish(
        self,
        phase: str,
        found: object,
        streams: dict[str, Tensor | None] | None = None,
        weights: dict[str, Tensor] | None = None,
        shard: dict[str, Tensor] | None = None,
    ) -> None:
        """Ends one step of `phase`, with the masks that were set since the last step.

        Args:
            found: what `finished` is to tell of this step, as JSON can hold it.
            streams: activations that the next step starts from; the caller must not change them any more.
            weights: parameters by full name as pruning left them, where it did more than set some weights to zero.
            shard: parameters by full name with their final values, for the checkpoint.
        """


class MemoryStore:
    """The `Store` of a run whose model is in memory: nothing outlives the process, and no step is finished beforehand.

    weights: where they are to be kept, the parameters by full name that pruning did more to than set some to zero, as it left them.
    """

    def __init__(self, keeps_weights: bool = False):
        self.weights: dict[str, Tensor] = {}
        self._keeps_weights = keeps_weights
        self.new_masks()

    def new_masks(self) -> None:
        self.masks: MutableMapping[str, Tensor] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype, pinned: bool = False) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=pinned)

    def finished(self, phase: str) -> list:
        return []

    def streams(self, phase: str) -> dict[str, Tensor]:
        return {}

    def finish(self, phase, found, streams=None, weights=None, shard=None) -> None:
        if self._keeps_weights:
            self.weights |= {name: parameter.detach().clone() for name, parameter in (weights or {}).items()}
