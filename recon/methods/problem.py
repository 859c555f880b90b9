"""What a reconstruction starts from: two models, masks, options, and which samples serve for what."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from recon.config import ReconstructionConfig
from recon.errors import ReconError
from recon.methods.prune import Pruner
from recon.methods.samples import as_tokens
from recon.model.decoder import Decoder
from recon.runtime.execution import Execution

ERROR_SAMPLES = 2  # that a window's error is measured on, before and after


@dataclass(frozen=True)
class Split:
    """Which of the samples serve for what: calibration samples come first, then held-out ones. All have `length` tokens."""

    calibration: int
    held_out: int
    length: int

    @property
    def measured_on(self) -> str:
        """The kind of samples that errors are measured on: held-out ones, where there are any."""
        return "held_out" if self.held_out else "calibration"

    @property
    def measured(self) -> slice:
        """The samples that errors are measured on."""
        first = self.calibration if self.held_out else 0
        return slice(first, min(first + ERROR_SAMPLES, self.calibration + self.held_out))


def split_samples(samples: Tensor | Iterable, held_out: Tensor | Iterable | None) -> tuple[Tensor, Split]:
    """The tokens (samples, length) that a reconstruction reads, of held-out samples no more than errors are measured on.

    Raises `ReconError` where held-out samples are not as long as calibration samples, and for what `as_tokens` refuses.
    """
    samples = as_tokens(samples)
    length = samples.shape[1]
    if length < 2:
        raise ReconError(f"calibration samples are of {length} token; give at least 2: the first is left out of losses")
    if held_out is None:
        return samples, Split(len(samples), 0, length)
    held_out = as_tokens(held_out)[:ERROR_SAMPLES]
    if held_out.shape[1] != length:
        raise ReconError(f"held-out samples of {held_out.shape[1]} tokens are not as long as calibration samples, {length}")
    return torch.cat([samples, held_out]), Split(len(samples), len(held_out), length)


@dataclass(frozen=True)
class Problem:
    """A pruned model that is to match a dense one.

    teacher: the dense model, which stays as it is. student: the pruned one, whose parameters change in place.
    masks: keep-masks by matrix name, bool (out, in).
    pruner: prunes each window before it is fitted; None: all are pruned.
    """

    teacher: Decoder
    student: Decoder
    masks: dict[str, Tensor]
    config: ReconstructionConfig
    split: Split
    seed: int
    execution: Execution
    pruner: Pruner | None = None
