"""Decoders without their weights, and tensors, in the form in which they go to other processes."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from recon.model.decoder import Decoder
from recon.model.discovery import take_apart
from recon.model.skeleton import Lazy, placeholder, second


@dataclass(frozen=True)
class Packed:
    """A tensor as plain bytes, which Ray hands to the processes of a node without copying them."""

    content: np.ndarray
    dtype: torch.dtype
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Tensor) -> "Packed":
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        return cls(flat.view(torch.uint8).numpy(), tensor.dtype, tensor.shape)

    def tensor(self) -> Tensor:
        """The tensor, on the CPU; not to be changed in place."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it cannot be written to
            return torch.from_numpy(self.content).view(self.dtype).view(self.shape)


def without_weights(decoder: Decoder) -> bytes:
    """`decoder` with everything but its parameters, for `revived`. Needs Ray."""
    from ray import cloudpickle  # for the functions that a decoder holds; it never leaves the processes of one computation

    parameters, buffers = list(decoder.model.parameters()), list(decoder.model.buffers())
    homes = [(tensor, tensor.data) for tensor in (*parameters, *buffers)]
    try:
        for parameter in parameters:
            parameter.data = placeholder(parameter.shape)
        for buffer in buffers:
            buffer.data = buffer.data.cpu()
        kind = type(decoder)
        # Cached properties may hold parameters, which come anew.
        parts = {name: part for name, part in vars(decoder).items() if not isinstance(getattr(kind, name, None), cached_property)}
        # What blocks are called with is found anew, by shape and device; where weights are read from, is said by `revived`.
        parts |= {"lazy": None, "calls": {}}
        return cloudpickle.dumps((kind, parts))
    finally:
        for tensor, home in homes:
            tensor.data = home


Read = Callable[[str], Tensor | None]


def revived(content: bytes, read: Read) -> Decoder:
    """The decoder that `without_weights` was given, as a skeleton.

    read: gives a parameter's value by its full name, float32 on the CPU, not to be changed; None for one outside the blocks that nothing is
        computed with.
    """
    from ray import cloudpickle

    kind, parts = cloudpickle.loads(content)
    decoder = object.__new__(kind)
    vars(decoder).update(parts)
    return _lazy(decoder, read)


def twin(decoder: Decoder, read: Read) -> Decoder:
    """A second skeleton of the architecture of `decoder`, with other weights; `read` as for `revived`."""
    return _lazy(take_apart(second(decoder.model), like=decoder), read)


def _lazy(decoder: Decoder, read: Read) -> Decoder:
    inside = {id(parameter) for parameter in decoder.blocks.parameters()}
    outside = {name: p.shape for name, p in decoder.model.named_parameters() if id(p) not in inside}

    def values(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            value = read(name)
            if value is None and name not in outside:
                raise KeyError(name)
            yield name, torch.zeros(()).expand(outside[name]) if value is None else value.clone()

    decoder.lazy = Lazy(decoder.model, values)
    return decoder
