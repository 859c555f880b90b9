"""Calibration samples in whatever form users have them: a tensor, a `DataLoader`, a `datasets.Dataset`, or any iterable."""

import reprlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from recon.errors import ReconError

ERROR_SAMPLES = 2  # samples that a window's error is measured on, before and after it is fitted
ALLOWED = "tokens (samples, length), or an iterable of (length,) or (batch, length), or of mappings with such under 'input_ids'"


def as_tokens(samples: Tensor | Iterable, what: str = "calibration samples", first: int = 0) -> Tensor:
    """Tokens (samples, length) as int64 from `samples`: a tensor, or an iterable of tensors or lists; see `ALLOWED`.

    first: take only this many; 0: all. Raises `ReconError` for none, for fewer, and unless all are whole numbers of one length.
    """
    tokens = samples
    try:
        if not isinstance(samples, Tensor):
            tokens = torch.cat([_rows(each) for each in ([samples] if isinstance(samples, Mapping) else samples)])
        found = f"{tuple(tokens.shape)} of {tokens.dtype}"
        fits = tokens.ndim == 2 and tokens.numel() and not tokens.is_floating_point() and tokens.dtype != torch.bool
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # such as unequal lengths
        fits, found = False, f"{reprlib.repr(samples)} ({error})"
    if not fits:
        raise ReconError(f"{what} are {found}; allowed: {ALLOWED}")
    if first > len(tokens):
        raise ReconError(f"{what} are {len(tokens)}, and {first} are asked for; give more, or ask for fewer")
    return tokens[: first or None].long()


def _rows(item: Tensor | list | tuple | Mapping) -> Tensor:
    """Tokens (batch, length) of one item; if that is a list of tensors, as from a `TensorDataset`, of its first tensor."""
    if isinstance(item, list) and len(item) > 1 and isinstance(item[0], Tensor) and item[0].ndim < 2:
        raise ValueError("lists of tensors may be columns, as torch collates lists: make each batch one tensor")
    if isinstance(item, list | tuple) and item and isinstance(item[0], Tensor):
        item = item[0]
    if isinstance(item, Mapping):
        if not torch.as_tensor(item.get("attention_mask", 1)).all():
            raise ReconError("samples are padded (attention_mask has zeros): padding would count as text")
        item = item["input_ids"]
    row = torch.as_tensor(item)
    return row if row.ndim == 2 else row[None]


def with_held_out(samples: Tensor | Iterable, held_out: Tensor | Iterable | None) -> tuple[Tensor, int]:
    """Calibration samples, then up to `ERROR_SAMPLES` held-out ones, as tokens (samples, length); and how many are the former."""
    samples = as_tokens(samples)
    count, length = samples.shape
    if length < 2:
        raise ReconError(f"calibration samples are of {length} token; give at least 2: the first is left out of errors")
    if held_out is not None:
        held_out = as_tokens(held_out, "held-out samples")[:ERROR_SAMPLES]
        if held_out.shape[1] != length:
            raise ReconError(f"held-out samples of {held_out.shape[1]} tokens are not as long as calibration samples, {length}")
        samples = torch.cat([samples, held_out])
    return samples, count
