"""Calibration samples in whatever form users have them: a tensor, a `DataLoader`, a `datasets.Dataset`, or any iterable."""

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recon.errors import ReconError

ERROR_SAMPLES = 2  # that a window's error is measured on, before and after
ALLOWED = "tokens (samples, length), or an iterable of (length,) or (batch, length), or of mappings with such under 'input_ids'"


def as_tokens(samples: Tensor | Iterable) -> Tensor:
    """Tokens (samples, length) from `samples`: that tensor itself, or an iterable of tensors or lists; see `ALLOWED`.

    Raises `ReconError` if there are none, they are not whole numbers, or not all of one length.
    """
    tokens = samples
    try:
        if not isinstance(samples, Tensor):
            rows = (torch.as_tensor(each["input_ids"] if isinstance(each, Mapping) else each) for each in samples)
            tokens = torch.cat([row if row.ndim == 2 else row[None] for row in rows])
        found = f"{tuple(tokens.shape)} of {tokens.dtype}"
        fits = tokens.ndim == 2 and tokens.numel() and not tokens.is_floating_point() and tokens.dtype != torch.bool
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # such as of unequal lengths
        fits, found = False, f"{reprlib.repr(samples)} ({error})"
    if not fits:
        raise ReconError(f"calibration samples are {found}; allowed: {ALLOWED}")
    return tokens


@dataclass(frozen=True)
class Split:
    """Which of the samples serve for what: calibration samples come first, then held-out ones. All have `length` tokens."""

    calibration: int
    held_out: int
    length: int

    @property
    def measured_on(self) -> str:
        """The kind of samples that errors are measured on: held-out ones, if there are any."""
        return "held_out" if self.held_out else "calibration"

    @property
    def measured(self) -> slice:
        """The samples that errors are measured on."""
        first = self.calibration if self.held_out else 0
        return slice(first, min(first + ERROR_SAMPLES, self.calibration + self.held_out))


def split_samples(samples: Tensor | Iterable, held_out: Tensor | Iterable | None) -> tuple[Tensor, Split]:
    """The tokens (samples, length) that a reconstruction reads, of held-out samples no more than errors are measured on.

    Raises `ReconError` if held-out samples are not as long as calibration samples, and for what `as_tokens` refuses.
    """
    samples = as_tokens(samples)
    count, length = samples.shape
    if length < 2:
        raise ReconError(f"calibration samples are of {length} token; give at least 2: the first is left out of losses")
    if held_out is None:
        return samples, Split(count, 0, length)
    held_out = as_tokens(held_out)[:ERROR_SAMPLES]
    if held_out.shape[1] != length:
        raise ReconError(f"held-out samples of {held_out.shape[1]} tokens are not as long as calibration samples, {length}")
    return torch.cat([samples, held_out]), Split(count, len(held_out), length)
