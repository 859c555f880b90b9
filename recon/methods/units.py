"""Units of a model, attention heads and MLP neurons: which rows and columns of its matrices belong to each.

Found by running blocks, so that no family of models needs code of its own.
"""

import contextlib
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from recon.errors import ReconError
from recon.model.decoder import Decoder
from recon.model.matrices import Matrix
from recon.model.modules import kind_of, probe_tokens
from recon.model.skeleton import made_up
from recon.model.windows import Window


@dataclass(frozen=True)
class Units:
    """The units of one half of a block.

    reader: the matrix that reads them, as many consecutive columns for each: the last to run of the half.
    count: how many there are: neurons, or key/value heads with all the query heads that they serve.
    rows: by name of the matrices that make them, the unit that each row belongs to, (out,). A matrix whose rows cannot be told
        apart is missing: its rows stay, and the unit is gone all the same, for nothing reads it.
    weights: how many weights go with one unit.
    """

    window: Window
    reader: Matrix
    count: int
    rows: dict[str, Tensor]
    weights: int

    def of(self, decoder: Decoder, window: Window) -> "Units":
        """The same units in `window`, the same half of a block of the same kind."""
        theirs, ours = (f"{decoder.names[w.blocks[0]]}." for w in (self.window, window))
        rows = {ours + name.removeprefix(theirs): owner for name, owner in self.rows.items()}
        reader = decoder.matrices(window)[ours + self.reader.name.removeprefix(theirs)]
        return replace(self, window=window, reader=reader, rows=rows)

    def columns(self, kept: Tensor) -> Tensor:
        """Which of the reader's columns (in,) belong to the units `kept` (count,)."""
        return kept.repeat_interleave(self.reader.weight.shape[1] // self.count)

    def remove(self, masks: dict[str, Tensor], kept: Tensor) -> None:
        """Takes the units that are not `kept` (count,) out of `masks`, (out, in) by matrix name, in place."""
        masks[self.reader.name] &= self.columns(kept)
        for name, rows in self.rows.items():
            masks[name] &= kept[rows, None]


@torch.no_grad()
def find_units(decoder: Decoder) -> list[Units]:
    """The units of each half of each block, in the order in which they run. Of blocks of one kind, only the first is examined.

    Raises:
        ReconError: the model has experts, its blocks do not divide into halves, or a half does not divide into units.
    """
    for name, matrix in decoder.matrices().items():
        if matrix.routed:
            raise ReconError(f"{name!r} is an expert's; whole heads and neurons are not removed from models with experts")
    first: dict[tuple, Units] = {}
    units = []
    # A lazy model is examined with made-up weights: when a run resumes, some of its own may be pruned already.
    weights = decoder.lazy.reading(made_up(decoder.lazy.parameters)) if decoder.lazy else contextlib.nullcontext()
    with weights:
        hidden = decoder.embed(probe_tokens(decoder.model))
        for window in decoder.windows("half-block"):
            (index,) = window.blocks
            kind = kind_of(decoder.blocks[index]), window.half
            if kind not in first:
                with decoder.loaded(window):
                    first[kind] = _units_of(decoder, window, hidden)
            units.append(first[kind].of(decoder, window))
    return units


def _units_of(decoder: Decoder, window: Window, hidden: Tensor) -> Units:
    """The units of `window`, one half of a block, which reads `hidden` (batch, length, hidden)."""
    matrices = decoder.matrices(window)
    *makers, last = matrices
    beside = next(group for group in decoder.groups[window.blocks[0]] if last in group)
    if not makers or set(beside) & set(makers):
        raise ReconError(f"{window.name} has no single matrix that reads what its others make, so no units are found in it")
    rows, columns = matrices[last].weight.shape
    count = _heads(decoder, window, last, columns) if window.half == "attention" else columns
    owners = _owners(decoder, window, hidden, makers, last, count)
    made = sum(matrices[name].weight.numel() for name in owners)
    return Units(window, matrices[last], count, owners, (rows * columns + made) // count)


def _heads(decoder: Decoder, window: Window, reader: str, columns: int) -> int:
    """How many key/value heads an attention half has; columns: of the matrix `reader`, which reads all query heads side by side."""
    config = decoder.model.config.get_text_config()
    heads = config.num_attention_heads
    count = getattr(config, "num_key_value_heads", None) or heads
    if not all(isinstance(number, int) for number in (heads, count)) or heads % count or columns % heads:
        raise ReconError(
            f"{window.name}: the {columns} columns of {reader!r} do not divide into num_attention_heads {heads!r} "
            f"in num_key_value_heads {count!r} groups"
        )
    return count


@torch.enable_grad()
def _owners(decoder: Decoder, window: Window, hidden: Tensor, makers: list[str], reader: str, count: int) -> dict[str, Tensor]:
    """By name of the matrices `makers`, the unit (out,) that each row serves; matrices with a row that serves several are left out.

    A row serves the units whose part of what `reader` reads has a gradient in it. Units are told apart by the bits of their numbers:
    for each bit, a row of one unit has a gradient in the units with that bit or in those without it, and in no others. Noise
    stands in for what `makers` give, so that no row is silent by chance.
    """
    draw, noise, read, handles = torch.Generator().manual_seed(0), {}, [], []

    def by_noise(name: str, module, args, output: Tensor) -> Tensor:
        noise[name] = torch.randn(output.shape, generator=draw).to(output).requires_grad_()
        return noise[name].clone()

    for name in makers:
        handles.append(decoder.model.get_submodule(name).register_forward_hook(partial(by_noise, name)))
    handles.append(decoder.model.get_submodule(reader).register_forward_pre_hook(lambda module, args: read.append(args[0])))
    try:
        decoder.forward(window, hidden)
    finally:
        for handle in handles:
            handle.remove()
    weighted = (read[0] * torch.randn(read[0].shape, generator=draw).to(read[0])).flatten(0, -2).sum(0).view(count, -1).sum(1)

    def reached(units: Tensor) -> dict[str, Tensor]:
        total = weighted[units.to(weighted.device)].sum()
        gradients = torch.autograd.grad(total, list(noise.values()), retain_graph=True, materialize_grads=True)
        return {name: (each != 0).flatten(0, -2).any(0) for name, each in zip(noise, gradients, strict=True)}

    owners = {name: torch.zeros(each.shape[-1], dtype=torch.long, device=each.device) for name, each in noise.items()}
    single, numbers = set(owners), torch.arange(count)
    for bit in range(max(1, (count - 1).bit_length())):
        on, off = (reached((numbers >> bit & 1).bool() == value) for value in (True, False))
        single -= {name for name in single if not (on[name] ^ off[name]).all()}
        owners = {name: owners[name] + (on[name].long() << bit) for name in single}
    return {name: owners[name] for name in makers if name in single}
