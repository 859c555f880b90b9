"""Structured pruning: removes whole units, attention heads and MLP neurons, until the pattern's share of the weights is gone.

Shapes stay: a removed unit is exact zeros in the columns of the matrix that reads it, and in the rows of those that make it.
An et al. 2023, arXiv 2312.11983 (Wanda-sp and FLAP); scores: `recon.kernels.criteria.structured`.
"""

import torch
from torch import Tensor, nn

from recon.config import PruningConfig
from recon.errors import ReconError
from recon.kernels.criteria import Structured
from recon.kernels.criteria.structured import keep_globally
from recon.kernels.patterns import Pattern, keep_all_but
from recon.methods.blocks import over_blocks
from recon.methods.units import Units, find_units
from recon.model.decoder import Decoder
from recon.model.windows import Window
from recon.runtime.execution import Execution


@torch.no_grad()
def prune_units(
    decoder: Decoder, criterion: Structured, config: PruningConfig, samples: Tensor, execution: Execution
) -> dict[str, Tensor]:
    """Removes whole units in place until the pattern's share of all the blocks' weights is gone, as near as units allow.

    Wanda-sp compares within each half of a block, on what the already pruned model (or the dense one) reads; FLAP compares over
    the whole dense model before it removes anything, and puts the mean of what it removes into the reader's bias.

    samples: calibration tokens (samples, length).

    Returns by name of their matrix the biases (out,) that changed.

    Raises:
        ReconError: no units are found (see `find_units`), or a score is NaN or infinite.
    """
    pattern, whole, biases = Pattern.parse(config.pattern), criterion.scope == "model", {}
    halves = find_units(decoder)
    target = pattern.sparsity * sum(matrix.weight.numel() for matrix in decoder.matrices().values())
    if whole:
        kept, means = _compare(decoder, criterion, halves, target, samples, execution)
    else:
        gone = _uniform_counts(halves, pattern, target)

    def visit(window: Window, statistics: dict[str, Tensor]) -> tuple[None, dict[str, Tensor]]:
        matrices, changed = decoder.matrices(window), {}
        masks = {name: torch.ones_like(matrix.weight, dtype=torch.bool) for name, matrix in matrices.items()}
        for half in (half for half in halves if half.window.blocks == window.blocks):
            name = half.window.name
            keep = kept[name] if whole else keep_all_but(_score(criterion, half, statistics)[None], gone[name])[0]
            half.remove(masks, keep)
            if criterion.compensates and not keep.all():
                # Makes up for the mean of what the reader no longer reads; its weights are still dense.
                extra = half.reader.weight.float() @ means[name].masked_fill(half.columns(keep), 0.0)
                bias = extra if half.reader.module.bias is None else half.reader.module.bias + extra
                biases[half.reader.name] = changed[half.reader.bias_name] = bias.to(half.reader.weight.dtype)
                set_bias(half.reader.module, biases[half.reader.name])
        for name, matrix in matrices.items():
            matrix.weight.masked_fill_(~masks[name], 0.0)
        execution.storage.masks.update(masks)
        return None, changed

    description, statistics = f"prune ({criterion.name} {pattern})", "none" if whole else criterion.statistics
    over_blocks(decoder, execution, "prune", visit, description, samples, statistics, config.statistics == "sparse")
    return biases


def _compare(
    decoder: Decoder, criterion: Structured, halves: list[Units], target: float, samples: Tensor, execution: Execution
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By name of each half, which of its units are kept (count,), and the means (in,) of what its reader reads in the dense
    model."""

    def visit(window: Window, statistics: dict[str, Tensor]) -> tuple[list, dict]:
        here = [half for half in halves if half.window.blocks == window.blocks]
        return [(_score(criterion, half, statistics).tolist(), statistics[half.reader.name][0].tolist()) for half in here], {}

    notes = over_blocks(decoder, execution, "compare", visit, f"compare ({criterion.name})", samples, criterion.statistics)
    # Every float32 is a number of JSON, and comes back as it was.
    scores, means = ([torch.tensor(half[which], device=decoder.device) for block in notes for half in block] for which in (0, 1))
    names, kept = [half.window.name for half in halves], keep_globally(scores, [half.weights for half in halves], target)
    return dict(zip(names, kept, strict=True)), dict(zip(names, means, strict=True))


def _score(criterion: Structured, half: Units, statistics: dict[str, Tensor]) -> Tensor:
    """The scores (count,) of a half's units, from what the matrices of its block read."""
    weight = half.reader.weight
    scores = criterion.score(weight.float(), statistics[half.reader.name].to(weight.device))
    if not scores.isfinite().all():
        raise ReconError(f"matrix {half.reader.name!r}: criterion {criterion.name!r} gives NaN or infinite scores")
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


def set_bias(module: nn.Module, bias: Tensor) -> None:
    """Gives a matrix the bias (out,), as a new parameter where it has none."""
    if module.bias is None:
        module.bias = nn.Parameter(module.weight.new_empty(len(bias)), module.weight.requires_grad)
    module.bias.copy_(bias)
