"""Calibration samples in whatever form users have them: a tensor, a `DataLoader`, a `datasets.Dataset`, or any iterable."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from recon.errors import ReconError


def as_tokens(samples: Tensor | Iterable) -> Tensor:
    """Tokens (samples, length) from `samples`.

    samples: that tensor itself, or an iterable of `input_ids`: tensors or lists (length,) or (batch, length), or mappings with such
        under "input_ids".

    Raises `ReconError` where there are none, where they are not whole numbers, or not all of one length.
    """
    if not isinstance(samples, Tensor):
        rows = []
        for each in samples:
            found = torch.as_tensor(each["input_ids"] if isinstance(each, Mapping) else each)
            rows += list(found if found.ndim == 2 else found[None])
        if not rows:
            raise ReconError("there are no calibration samples; give at least one")
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1:
            raise ReconError(
                f"calibration samples are of {len(lengths)} lengths, from {lengths[0]} to {lengths[-1]} tokens; cut them to one length"
            )
        samples = torch.stack(rows)
    if samples.ndim != 2 or samples.is_floating_point() or not samples.numel():
        raise ReconError(
            f"calibration samples are {tuple(samples.shape)} of {samples.dtype}; they must be tokens (samples, length), at least one"
        )
    return samples
