"""Whole units of a model, attention heads and MLP neurons: where their weights are, and pruning that removes them.

Shapes stay: a removed unit is exact zeros in the columns of the matrix that reads it, and in the rows of those that make it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from recon.criteria import Structured
from recon.criteria.structured import keep_globally
from recon.decoder import Decoder, Matrix
from recon.engine import Engine
from recon.errors import ReconError
from recon.sparsity import Pattern, keep_all_but
from recon.statistics import gather
from recon.structure import probe_tokens
from recon.windows import Window


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
    """The units of each half of each block, in the order in which they run.

    Raises:
        ReconError: blocks do not divide into halves, or a half into units.
    """
    for name, matrix in decoder.matrices().items():
        if matrix.routed:
            raise ReconError(f"{name!r} is an expert's; whole heads and neurons are not removed from models with experts")
    hidden = decoder.embed(probe_tokens(decoder.model))
    return [_units_of(decoder, window, hidden) for window in decoder.windows("half-block")]


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
    decoder: Decoder,
    rule: Structured,
    pattern: Pattern,
    stream: Tensor,
    propagation: str,
    engine: Engine,
    progress: bool = True,
    compensate: bool | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Removes whole units in place until the pattern's share of all the blocks' weights is gone, as near as units allow.

    Args:
        stream: inputs of the first block, (samples, length, hidden).
        propagation: "sparse" or "dense"; a rule that compares over the whole model always reads the dense one.
        compensate: whether the mean of what is removed goes into the reader's bias, which is added where there is none;
            default: what the rule's authors do. Needs the means of the inputs, which only some rules gather.

    Returns:
        The masks of all matrices, bool (out, in), True = kept; and, by name of their matrix, the biases (out,) that changed.
    """
    compensate = rule.compensates if compensate is None else compensate
    if compensate and not rule.compensates:
        raise ReconError(f"compensate is {compensate}, but criterion {rule.name!r} gathers no means to compensate with")
    halves = find_units(decoder)
    masks = {name: torch.ones_like(matrix.weight, dtype=torch.bool) for name, matrix in decoder.matrices().items()}
    target = pattern.sparsity * sum(mask.numel() for mask in masks.values())
    gone = _uniform_counts(halves, pattern, target)
    statistics: dict[str, Tensor] = {}
    for window in tqdm(decoder.windows("block"), desc=f"prune ({rule.name} {pattern})", unit="block", disable=not progress):
        outputs, found = gather(engine, decoder, window, stream, rule.statistics)
        here = [half for half in halves if half.window.blocks == window.blocks]
        statistics |= {half.reader.name: found[half.reader.name].to(decoder.device) for half in here}
        if rule.scope == "half-block":
            for half in here:
                scores = _score(rule, half, statistics[half.reader.name])
                half.remove(masks, keep_all_but(scores[None], gone[half.window.name])[0])
            _zero(decoder, window, masks)
            if propagation == "sparse" and window.blocks[-1] + 1 < len(decoder.blocks):
                with engine.holding(decoder, window):
                    outputs = engine.run(lambda batch, window=window: decoder.forward(window, batch), stream)
        stream = outputs
    biases: dict[str, Tensor] = {}
    if rule.scope == "model":
        scores = [_score(rule, half, statistics[half.reader.name]) for half in halves]
        for half, kept in zip(halves, keep_globally(scores, [half.weights for half in halves], target), strict=True):
            half.remove(masks, kept)
            if compensate and not kept.all():
                biases[half.reader.name] = _compensated_bias(half, kept, statistics[half.reader.name][0])
                set_bias(half.reader.module, biases[half.reader.name])
        _zero(decoder, None, masks)
    return masks, biases


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


def _zero(decoder: Decoder, window: Window | None, masks: dict[str, Tensor]) -> None:
    for name, matrix in decoder.matrices(window).items():
        matrix.weight.masked_fill_(~masks[name], 0.0)


def set_bias(module: nn.Module, bias: Tensor) -> None:
    """Gives a matrix the bias (out,), as a new parameter where it has none."""
    if module.bias is None:
        module.bias = nn.Parameter(module.weight.new_empty(len(bias)), module.weight.requires_grad)
    module.bias.copy_(bias)
