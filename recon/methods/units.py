"""Units of a model, attention heads and MLP neurons: which rows and columns of its matrices belong to each.

Found by running blocks, so that no family of models needs code of its own.
"""

import contextlib
from dataclasses import dataclass, replace

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
    count, served = _heads(decoder, window, last, columns) if window.half == "attention" else (columns, columns)
    owners, weights = {}, rows * columns // count
    for name in makers:
        size, width = matrices[name].weight.shape
        # Alone, or fused unit by unit; two of equal size fused (gate|up); fused q|k|v.
        for parts in ((size,), (size // 2, size // 2), (columns, served, served)):
            if sum(parts) != size or any(part % count for part in parts):
                continue
            owner = torch.cat([torch.arange(count).repeat_interleave(part // count) for part in parts])
            if _serve_their_units(decoder, window, hidden, name, last, owner, count):
                owners[name] = owner.to(decoder.device)
                weights += size // count * width
                break
    return Units(window, matrices[last], count, owners, weights)


def _heads(decoder: Decoder, window: Window, reader: str, columns: int) -> tuple[int, int]:
    """How many key/value heads an attention half has, and how many rows of keys, or of values, they take in all.

    columns: of the matrix `reader`, which reads all query heads side by side.
    """
    config = decoder.model.config.get_text_config()
    heads = config.num_attention_heads
    count = getattr(config, "num_key_value_heads", None) or heads
    if not all(isinstance(number, int) for number in (heads, count)) or heads % count or columns % heads:
        raise ReconError(
            f"{window.name}: the {columns} columns of {reader!r} do not divide into num_attention_heads {heads!r} "
            f"in num_key_value_heads {count!r} groups"
        )
    return count, columns // heads * count


def _serve_their_units(
    decoder: Decoder, window: Window, hidden: Tensor, name: str, reader: str, owner: Tensor, count: int
) -> bool:
    """Whether the rows of the matrix `name` make the units that `owner` (out,) says, and nothing else.

    Noise in place of what the rows of half of the units give must change these units in the reader's input, and no other
    one by a single bit; then the same with the other half. What is fused otherwise, and norms over several units, fail.
    """
    draw = torch.Generator().manual_seed(0)
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.randperm(count, generator=draw)[: (count + 1) // 2]] = True
    plain = _read(decoder, window, hidden, reader)
    for half in (chosen, ~chosen) if count > 1 else (chosen,):
        noisy = half[owner].to(decoder.device)

        def disturb(module, args, output, noisy=noisy):
            noise = torch.randn(output.shape, generator=draw).to(output)
            return torch.where(noisy, noise, output)

        handle = decoder.model.get_submodule(name).register_forward_hook(disturb)
        try:
            changed = _read(decoder, window, hidden, reader)
        finally:
            handle.remove()
        touched = (changed != plain).flatten(0, -2).any(0).view(count, -1).any(1).cpu()
        if not touched.any() or (touched & ~half).any():
            return False
    return True


def _read(decoder: Decoder, window: Window, hidden: Tensor, reader: str) -> Tensor:
    """What the matrix `reader` reads, (..., in), where `window` reads `hidden`."""
    caught = []
    handle = decoder.model.get_submodule(reader).register_forward_pre_hook(lambda module, args: caught.append(args[0].clone()))
    try:
        decoder.forward(window, hidden)
    finally:
        handle.remove()
    return caught[0]
