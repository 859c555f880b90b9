"""Structured pruning: removes whole units (attention heads, MLP neurons) until the pattern's share of the weights is gone.

Units are found by running blocks, so that no family of models needs code of its own. Shapes do not change: a removed unit has
exact zeros in the columns of the matrix that reads it, and in the rows of the matrices that make it.
An et al. 2023, arXiv 2312.11983 (Wanda-sp and FLAP); scores: `recon.kernels.criteria.structured`.
"""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recon.config import PruningConfig
from recon.errors import ReconError
from recon.kernels.criteria import Criterion
from recon.kernels.criteria.structured import keep_globally
from recon.kernels.patterns import Pattern, keep_all_but
from recon.methods.statistics import over_blocks
from recon.model.decoder import Decoder
from recon.model.modules import kind_of, probe_tokens, watched
from recon.model.structure import Matrix
from recon.model.windows import Window
from recon.runtime.execution import Execution


@dataclass(frozen=True)
class Units:
    """The units of one half of a block."""

    window: Window
    reader: Matrix  # reads them, each by equally many consecutive columns; the last to run in the half
    count: int  # how many there are: neurons, or key/value heads with all the query heads that they serve
    # By name of the matrices that make them, the unit that each row belongs to, (out,). Matrices with rows that serve several
    # units are missing: their rows stay, but a removed unit is gone nevertheless, as nothing reads it.
    rows: dict[str, Tensor]
    weights: int  # how many belong to one unit


@torch.no_grad()
def prune_units(decoder: Decoder, criterion: Criterion, config: PruningConfig, samples: Tensor, execution: Execution) -> None:
    """Removes whole units in place until the pattern's share of all the blocks' weights is gone, as near as units allow."""
    pattern, whole = Pattern.parse(config.pattern), criterion.scope == "model"
    halves = find_units(decoder)
    target = pattern.sparsity * sum(matrix.weight.numel() for matrix in decoder.matrices().values())
    if whole:
        kept, means = _compare(decoder, criterion, halves, target, samples, execution)
    else:
        # There are few heads, so the nearest share of heads may be far from the pattern's; neurons make up for the difference.
        heads, neurons = ([half for half in halves if half.window.half == which] for which in ("attention", "mlp"))
        gone = {half.window.name: min(pattern.zeros(half.count), half.count - 1) for half in heads}
        left = max(0, target - sum(gone[half.window.name] * half.weights for half in heads))
        share = left / sum(half.count * half.weights for half in neurons)
        gone |= {half.window.name: min(round(share * half.count), half.count - 1) for half in neurons}

    def visit(window: Window, statistics: dict[str, Tensor]) -> tuple[None, dict[str, Tensor]]:
        matrices, changed = decoder.matrices(window), {}
        masks = {name: torch.ones_like(matrix.weight, dtype=torch.bool) for name, matrix in matrices.items()}
        for half in (half for half in halves if half.window.blocks == window.blocks):
            name, reader = half.window.name, half.reader
            keep = kept[name] if whole else keep_all_but(_score(criterion, half, statistics)[None], gone[name])[0]
            columns = keep.repeat_interleave(reader.weight.shape[1] // half.count)
            masks[reader.name] &= columns
            for maker, rows in half.rows.items():
                masks[maker] &= keep[rows, None]
            if criterion.compensates and not keep.all():
                # Adds the mean of what the reader no longer reads to its bias; the reader's weights are still dense.
                extra = reader.weight.float() @ means[name].masked_fill(columns, 0.0)
                bias = extra if reader.module.bias is None else reader.module.bias + extra
                changed[reader.bias_name] = bias.to(reader.weight.dtype)
                set_bias(reader.module, changed[reader.bias_name])
        for name, matrix in matrices.items():
            matrix.weight.masked_fill_(~masks[name], 0.0)
        execution.storage.masks.update(masks)
        return None, changed

    description, statistics = f"prune ({criterion.name} {pattern})", "none" if whole else criterion.statistics
    over_blocks(decoder, execution, "prune", visit, description, samples, statistics, config.statistics == "sparse")


def _compare(
    decoder: Decoder, criterion: Criterion, halves: list[Units], target: float, samples: Tensor, execution: Execution
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By name of each half, which units are kept (count,), and means (in,) of what its reader reads in the dense model."""

    def visit(window: Window, statistics: dict[str, Tensor]) -> tuple[list, dict]:
        here = [half for half in halves if half.window.blocks == window.blocks]
        return [(_score(criterion, half, statistics).tolist(), statistics[half.reader.name][0].tolist()) for half in here], {}

    notes = over_blocks(decoder, execution, "compare", visit, f"compare ({criterion.name})", samples, criterion.statistics)
    # JSON stores every float32 exactly.
    scores, means = ([torch.tensor(half[which], device=decoder.device) for block in notes for half in block] for which in (0, 1))
    names, kept = [half.window.name for half in halves], keep_globally(scores, [half.weights for half in halves], target)
    return dict(zip(names, kept, strict=True)), dict(zip(names, means, strict=True))


def _score(criterion: Criterion, half: Units, statistics: dict[str, Tensor]) -> Tensor:
    """The scores (count,) of a half's units, from what the matrices of its block read."""
    weight = half.reader.weight
    scores = criterion.score(weight.float(), statistics[half.reader.name].to(weight.device))
    if not scores.isfinite().all():
        raise ReconError(f"matrix {half.reader.name!r}: criterion {criterion.name!r} gives NaN or infinite scores")
    return scores.view(half.count, -1).mean(1)


def set_bias(module: nn.Module, bias: Tensor) -> None:
    """Sets the bias (out,) of a matrix, as a new parameter if it has none."""
    if module.bias is None:
        module.bias = nn.Parameter(module.weight.new_empty(len(bias)), module.weight.requires_grad)
    module.bias.copy_(bias)


# --- which rows and columns belong to a unit ----------------------------------------------------------------------------


@torch.no_grad()
def find_units(decoder: Decoder) -> list[Units]:
    """The units of each half of each block, in the order in which they run. Of blocks of one kind, only the first is examined.

    Raises `ReconError` if the model has experts, its blocks do not divide into halves, or a half does not divide into units.
    """
    if routed := next((name for name, matrix in decoder.matrices().items() if matrix.routed), None):
        raise ReconError(f"{routed!r} is an expert's; whole heads and neurons are not removed from models with experts")
    if why := next((halves for halves in decoder.halves if isinstance(halves, str)), None):
        kind = type(decoder.model).__name__
        raise ReconError(f"whole heads and neurons of {kind} cannot be removed, single weights can: a block {why}")
    known: dict[tuple, dict[int, Tensor]] = {}
    units = []
    # A lazy model is examined with made-up weights: when a run resumes, some of its own may be pruned already.
    with decoder.lazy.made_up() if decoder.lazy else contextlib.nullcontext():
        hidden = decoder.embed(probe_tokens(decoder.model))
        for window in decoder.windows("half-block"):
            kind, count = (kind_of(decoder.blocks[window.blocks[0]]), window.half), _count(decoder, window)
            if kind not in known:
                with decoder.loaded(window):
                    known[kind] = _owners(decoder, window, hidden, count)
            *makers, reader = decoder.matrices(window).values()
            rows = {makers[place].name: owner for place, owner in known[kind].items()}
            weights = reader.weight.numel() + sum(makers[place].weight.numel() for place in known[kind])
            units.append(Units(window, reader, count, rows, weights // count))
    return units


def _count(decoder: Decoder, window: Window) -> int:
    """The number of units of `window`, a half of a block. Its reader reads all neurons, or all query heads, side by side."""
    *makers, reader = decoder.matrices(window).values()
    beside = next(group for group in decoder.groups[window.blocks[0]] if reader.name in group)
    if not makers or any(maker.name in beside for maker in makers):
        raise ReconError(f"{window.name} has no single matrix that reads what its others make, so no units are found in it")
    columns, config = reader.weight.shape[1], decoder.model.config.get_text_config()
    if window.half == "mlp":
        return columns
    heads = getattr(config, "num_attention_heads", None)
    count = getattr(config, "num_key_value_heads", None) or heads
    if not all(isinstance(number, int) for number in (heads, count)) or heads % count or columns % heads:
        raise ReconError(f"{window.name}: {reader.name!r} reads {columns} columns, not {heads!r} heads in {count!r} groups")
    return count


@torch.enable_grad()
def _owners(decoder: Decoder, window: Window, hidden: Tensor, count: int) -> dict[int, Tensor]:
    """By place among the matrices of `window`, the unit (out,) that each row of the matrix serves; `hidden`: the window's input.

    A row serves a unit if the unit's part of the last matrix's input has a gradient by the row's output. Matrices with a row that
    serves several are left out. The bits of its number identify a unit: for each bit, a row of one unit has a gradient from units
    with that bit or from those without it, not both. Positive noise replaces matrices' outputs: no row is silent by chance.
    """
    draw, noise, read = torch.Generator().manual_seed(0), {}, []

    def by_noise(place: int, args, kwargs, output: Tensor) -> Tensor:
        noise[place] = torch.randn(output.shape, generator=draw).abs().to(output).requires_grad_()
        return noise[place].clone()

    *makers, reader = (decoder.model.get_submodule(name) for name in decoder.matrices(window))
    with watched(dict(enumerate(makers)), after=by_noise), watched({0: reader}, lambda key, args, kwargs: read.append(args[0])):
        decoder.forward(window, hidden)
    weighted = (read[0] * torch.randn(read[0].shape, generator=draw).to(read[0])).flatten(0, -2).sum(0).view(count, -1).sum(1)

    def reached(units: Tensor) -> dict[int, Tensor]:
        total = weighted[units.to(weighted.device)].sum()
        gradients = torch.autograd.grad(total, list(noise.values()), retain_graph=True, materialize_grads=True)
        return {place: (each != 0).flatten(0, -2).any(0) for place, each in zip(noise, gradients, strict=True)}

    owners = {place: torch.zeros(each.shape[-1], dtype=torch.long, device=each.device) for place, each in noise.items()}
    single, numbers = set(owners), torch.arange(count)
    for bit in range(max(1, (count - 1).bit_length())):
        on, off = (reached((numbers >> bit & 1).bool() == value) for value in (True, False))
        single -= {place for place in single if not (on[place] ^ off[place]).all()}
        owners = {place: owners[place] + (on[place].long() << bit) for place in single}
    return owners
