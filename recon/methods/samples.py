"""Calibration samples in whatever form users have them: a tensor, a `DataLoader`, a `datasets.Dataset`, or any iterable."""

import reprlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from recon.errors import ReconError

ALLOWED = "allowed: whole numbers (length,) or (batch, length), or mappings with such under 'input_ids'"


def as_tokens(samples: Tensor | Iterable) -> Tensor:
    """Tokens (samples, length) from `samples`.

    samples: that tensor itself, or an iterable of `input_ids`: tensors or lists (length,) or (batch, length), or mappings with such
        under "input_ids".

    Raises `ReconError` where there are none, where they are not whole numbers, or not all of one length.
    """
    if not isinstance(samples, Tensor):
        if isinstance(samples, str | Mapping) or not isinstance(samples, Iterable):
            raise ReconError(
                f"calibration samples are {reprlib.repr(samples)}; allowed: tokens (samples, length), or an iterable of them"
            )
        rows = [row for each in samples for row in _rows(each)]
        if not rows:
            raise ReconError("there are no calibration samples; give at least one")
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1:
            raise ReconError(
                f"calibration samples are of {len(lengths)} lengths, from {lengths[0]} to {lengths[-1]} tokens; cut them to one length"
            )
        samples = torch.stack(rows)
    if samples.ndim != 2 or not samples.numel() or samples.is_floating_point() or samples.dtype == torch.bool:
        raise ReconError(
            f"calibration samples are {tuple(samples.shape)} of {samples.dtype}; allowed: tokens (samples, length), at least one"
        )
    return samples


def _rows(each: object) -> Tensor:
    """The samples (batch, length) in one element of an iterable."""
    if isinstance(each, Mapping) and "input_ids" not in each:
        raise ReconError(f"a calibration sample has {', '.join(map(str, each))}; {ALLOWED}")
    ids = each["input_ids"] if isinstance(each, Mapping) else each
    try:
        found = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        raise ReconError(f"a calibration sample is {reprlib.repr(ids)}; {ALLOWED}") from None
    if found.ndim not in (1, 2):
        raise ReconError(f"a calibration sample is {tuple(found.shape)}; {ALLOWED}")
    return found if found.ndim == 2 else found[None]
