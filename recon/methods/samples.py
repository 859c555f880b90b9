"""Calibration samples in whatever form users have them: a tensor, a `DataLoader`, a `datasets.Dataset`, or any iterable."""

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recon.errors import ReconError

ERROR_SAMPLES = 2  # that a window's error is measured on, before and after
ALLOWED = "allowed: tokens (samples, length), or an iterable of (length,) or (batch, length), or of mappings with such under 'input_ids'"


def as_tokens(samples: Tensor | Iterable) -> Tensor:
    """Tokens (samples, length) from `samples`: that tensor itself, or an iterable of tensors or lists; see `ALLOWED`.

    Raises `ReconError` where there are none, where they are not whole numbers, or not all of one length.
    """
    if not isinstance(samples, Tensor):
        if isinstance(samples, str | Mapping) or not isinstance(samples, Iterable):
            raise ReconError(f"calibration samples are {reprlib.repr(samples)}; {ALLOWED}")
        rows = [row for each in samples for row in _rows(each)]
        lengths = sorted({len(row) for row in rows})
        if len(lengths) != 1:
            found = (
                f"of {len(lengths)} lengths, from {lengths[0]} to {lengths[-1]} tokens; cut them to one length"
                if rows
                else "none"
            )
            raise ReconError(f"calibration samples are {found}; {ALLOWED}")
        samples = torch.stack(rows)
    if samples.ndim != 2 or not samples.numel() or samples.is_floating_point() or samples.dtype == torch.bool:
        raise ReconError(f"calibration samples are {tuple(samples.shape)} of {samples.dtype}; {ALLOWED}")
    return samples


def _rows(each: object) -> Tensor:
    """The samples (batch, length) in one element of an iterable."""
    try:
        rows = torch.as_tensor(each["input_ids"] if isinstance(each, Mapping) else each)
    except (KeyError, TypeError, ValueError, RuntimeError):
        rows = None
    if rows is None or rows.ndim not in (1, 2):
        raise ReconError(f"a calibration sample is {reprlib.repr(each)}; {ALLOWED}")
    return rows if rows.ndim == 2 else rows[None]


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
