"""Whole units of a model, attention heads and MLP neurons: where their weights are, and pruning that removes them.

Shapes stay: a removed unit is exact zeros in the columns of the matrix that reads it, and in the rows of those that make it.
"""

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from recon.config import PruningConfig
from recon.errors import ReconError
from recon.kernels.criteria import Structured
from recon.kernels.criteria.structured import keep_globally
from recon.kernels.patterns import Pattern, keep_all_but, sparsity_of
from recon.methods.blocks import over_blocks
from recon.model.decoder import Decoder
from recon.model.matrices import Matrix
from recon.model.modules import kind_of, probe_tokens
from recon.model.skeleton import made_up
from recon.model.windows import Window
from recon.runtime.execution import Execution


@dataclass(frozen=True)
class Units:
    """The units of one half of a block.

    reader: the matrix that reads them, as many consecutive columns for each: the last to run of the half.
    count: how many there are. In an MLP half each column is one, a neuron; in an attention half, each key/value head
        with all the query heads that it serves.
    rows: by name of the matrices that make them, the unit that each row belongs to, (out,). A matrix whose rows cannot be
        told apart (rows that serve several units, or a layout other than those tried) is missing: its rows stay, and
        the unit is gone all the same, for nothing reads it.
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
    """The units of each half of each block, in the order in which they run; those of blocks of one kind are found in the first of it.

    Raises:
        ReconError: blocks do not divide into halves, or a half into units.
    """
    for name, matrix in decoder.matrices().items():
        if matrix.routed:
            raise ReconError(f"{name!r} is an expert's; whole heads and neurons are not removed from models with experts")
    first: dict[tuple, Units] = {}
    units = []
    # As all of a skeleton's structure: of its own weights, some may be pruned already when a run goes on.
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
    matrices = decoder.matrices(window)
    *makers, last = matrices
    beside = next(group for group in decoder.groups[window.blocks[0]] if last in group)
    if not makers or set(beside) & set(makers):
        raise ReconError(f"{window.name} has no single matrix that reads what its others make, so no units are found in it")
    rows, columns = matrices[last].weight.shape
    count, kv_rows = columns, columns
    if window.half == "attention":
        config = decoder.model.config.get_text_config()
        heads = config.num_attention_heads
        count = getattr(config, "num_key_value_heads", None) or heads
        if not all(isinstance(number, int) for number in (heads, count)) or heads % count or columns % heads:
            raise ReconError(
                f"{window.name}: the {columns} columns of {last!r} do not divide into num_attention_heads {heads!r} "
                f"in num_key_value_heads {count!r} groups"
            )
        kv_rows = columns // heads * count
    owners, weights = {}, rows * columns // count
    for name in makers:
        size, width = matrices[name].weight.shape
        # Alone, or fused unit by unit; two of equal size fused (gate|up); fused q|k|v.
        for parts in ((size,), (size // 2, size // 2), (columns, kv_rows, kv_rows)):
            if sum(parts) != size or any(part % count for part in parts):
                continue
            owner = torch.cat([torch.arange(count).repeat_interleave(part // count) for part in parts])
            if _serve_their_units(decoder, window, hidden, name, last, owner, count):
                owners[name] = owner.to(decoder.device)
                weights += size // count * width
                break
    return Units(window, matrices[last], count, owners, weights)


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


@torch.no_grad()
def prune_units(
    decoder: Decoder, criterion: Structured, config: PruningConfig, samples: Tensor, execution: Execution
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Removes whole units in place until the pattern's share of all the blocks' weights is gone, as near as units allow.

    Wanda-sp compares within each half of a block, on what the already pruned model (or the dense one) reads; FLAP compares over the whole
    dense model before it removes anything, and puts the mean of what it removes into the reader's bias.

    Returns the sparsity of all matrices; and, by name of their matrix, the biases (out,) that changed.
    """
    pattern, store = Pattern.parse(config.pattern), execution.store
    compensate, everywhere = config.compensate and criterion.compensates, criterion.scope == "model"
    biases: dict[str, Tensor] = {}
    if len(store.finished("prune")) < len(decoder.blocks):
        halves = find_units(decoder)
        target = pattern.sparsity * sum(matrix.weight.numel() for matrix in decoder.matrices().values())
        if everywhere:
            kept, means = _compare(decoder, criterion, halves, target, samples, execution)
        else:
            gone = _uniform_counts(halves, pattern, target)

    def visit(window: Window, statistics: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
        matrices = decoder.matrices(window)
        masks = {name: torch.ones_like(matrix.weight, dtype=torch.bool) for name, matrix in matrices.items()}
        changed: dict[str, Tensor] = {}
        for half in halves:
            if half.window.blocks != window.blocks:
                continue
            name = half.window.name
            if not everywhere:
                scores = _score(criterion, half, statistics[half.reader.name].to(decoder.device))
                kept_here = keep_all_but(scores[None], gone[name])[0]
            else:
                kept_here = kept[name]
            half.remove(masks, kept_here)
            if compensate and not kept_here.all():
                bias = _compensated_bias(half, kept_here, means[name])
                biases[half.reader.name] = changed[half.reader.bias_name] = bias
                set_bias(half.reader.module, bias)
        for name, matrix in matrices.items():
            matrix.weight.masked_fill_(~masks[name], 0.0)
        store.masks.update(masks)
        return {name: sparsity_of(mask) for name, mask in masks.items()}, changed

    description, statistics = f"prune ({criterion.name} {pattern})", "none" if everywhere else criterion.statistics
    found = over_blocks(
        decoder, execution, "prune", visit, description, samples, statistics, rerun=config.statistics == "sparse"
    )  # fmt: skip
    return {name: share for block in found for name, share in block.items()}, biases


def _compare(
    decoder: Decoder, criterion: Structured, halves: list[Units], target: float, samples: Tensor, execution: Execution
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By name of each half, which of its units are kept (count,), and the means (in,) of what its reader reads in the dense model."""

    def visit(window: Window, statistics: dict[str, Tensor]) -> tuple[dict, dict]:
        here = [half for half in halves if half.window.blocks == window.blocks]
        moments = [statistics[half.reader.name].to(decoder.device) for half in here]
        scores = [_score(criterion, half, found).tolist() for half, found in zip(here, moments, strict=True)]
        return {"scores": scores, "means": [found[0].tolist() for found in moments]}, {}

    found = over_blocks(decoder, execution, "compare", visit, f"compare ({criterion.name})", samples, criterion.statistics)

    def tensors(what: str) -> list[Tensor]:
        # Every float32 is a number of JSON, and comes back as it was.
        return [torch.tensor(values, device=decoder.device) for block in found for values in block[what]]

    chosen, names = (
        keep_globally(tensors("scores"), [half.weights for half in halves], target),
        [half.window.name for half in halves],
    )
    return dict(zip(names, chosen, strict=True)), dict(zip(names, tensors("means"), strict=True))


def _score(rule: Structured, half: Units, statistics: Tensor) -> Tensor:
    """The scores (count,) of a half's units."""
    scores = rule.score(half.reader.weight.float(), statistics)
    if not scores.isfinite().all():
        raise ReconError(f"matrix {half.reader.name!r}: criterion {rule.name!r} finds NaN or infinite scores; all must be finite")
    return scores.view(half.count, -1).mean(1)


def _uniform_counts(halves: list[Units], pattern: Pattern, target: float) -> dict[str, int]:
    """By name of each half, how many of its units go: the same share of all of one kind, but never all units of a half.

    There are few heads, so the share of those that comes near to the pattern's may miss it by far; neurons make up for that.
    """
    heads = {h.window.name: min(pattern.zeros(h.count), h.count - 1) for h in halves if h.window.half == "attention"}
    removed = sum(heads.get(half.window.name, 0) * half.weights for half in halves)
    neurons = [half for half in halves if half.window.half == "mlp"]
    share = max(target - removed, 0) / sum(half.count * half.weights for half in neurons)
    return heads | {half.window.name: min(round(share * half.count), half.count - 1) for half in neurons}


def _compensated_bias(half: Units, kept: Tensor, mean: Tensor) -> Tensor:
    """The reader's bias (out,) that makes up for the mean (in,) of what it no longer reads."""
    module, weight = half.reader.module, half.reader.weight
    extra = weight.float() @ mean.masked_fill(half.columns(kept), 0.0)
    return (extra if module.bias is None else module.bias + extra).to(weight.dtype)


def set_bias(module: nn.Module, bias: Tensor) -> None:
    """Gives a matrix the bias (out,), as a new parameter where it has none."""
    if module.bias is None:
        module.bias = nn.Parameter(module.weight.new_empty(len(bias)), module.weight.requires_grad)
    module.bias.copy_(bias)
