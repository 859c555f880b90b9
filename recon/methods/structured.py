"""Structured pruning: removes whole units, attention heads and MLP neurons, until the pattern's share of the weights is gone.

Shapes stay: a removed unit is exact zeros in the columns of the matrix that reads it, and in the rows of those that make it.
An et al. 2023, arXiv 2312.11983 (Wanda-sp and FLAP); scores: `recon.kernels.criteria.structured`.
"""

from collections.abc import Callable, MutableMapping

import torch
from torch import Tensor, nn

from recon.config import PruningConfig
from recon.errors import ReconError
from recon.kernels.criteria import Structured
from recon.kernels.criteria.structured import keep_globally
from recon.kernels.patterns import Pattern, keep_all_but, sparsity_of
from recon.methods.blocks import over_blocks
from recon.methods.units import Units, find_units
from recon.model.decoder import Decoder
from recon.model.windows import Window
from recon.runtime.execution import Execution


@torch.no_grad()
def prune_units(
    decoder: Decoder, criterion: Structured, config: PruningConfig, samples: Tensor, execution: Execution
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Removes whole units in place until the pattern's share of all the blocks' weights is gone, as near as units allow.

    Wanda-sp compares within each half of a block, on what the already pruned model (or the dense one) reads; FLAP compares over the
    whole dense model before it removes anything, and puts the mean of what it removes into the reader's bias.

    samples: calibration tokens (samples, length).

    Returns the sparsity of all matrices; and, by name of their matrix, the biases (out,) that changed.

    Raises:
        ReconError: no units are found (see `find_units`), or a score is NaN or infinite.
    """
    pattern, store, whole = Pattern.parse(config.pattern), execution.store, criterion.scope == "model"
    halves, choose, means = [], None, {}
    if len(store.finished("prune")) < len(decoder.blocks):
        halves = find_units(decoder)
        target = pattern.sparsity * sum(matrix.weight.numel() for matrix in decoder.matrices().values())
        if whole:
            kept, means = _compare(decoder, criterion, halves, target, samples, execution)
        else:
            gone = _uniform_counts(halves, pattern, target)

        def choose(half: Units, statistics: dict[str, Tensor]) -> Tensor:
            name = half.window.name
            return kept[name] if whole else keep_all_but(_score(criterion, half, statistics)[None], gone[name])[0]

    visit = _PruneUnits(decoder, halves, choose, means if criterion.compensates else {}, store.masks)
    description, statistics = f"prune ({criterion.name} {pattern})", "none" if whole else criterion.statistics
    rerun = config.statistics == "sparse"
    found = over_blocks(decoder, execution, "prune", visit, description, samples, statistics, rerun)
    return {name: share for block in found for name, share in block.items()}, visit.biases


class _PruneUnits:
    """Removes units of one block: a visit of `over_blocks`.

    choose: from a half and the statistics of its block, which units are kept, bool (count,); None where no block is left.
    means: by name of a half, the mean (in,) of what its reader reads, where that is to be made up for in the reader's bias.
    masks: receives the keep-masks (out, in) by matrix name.
    biases: by matrix name, those (out,) that were changed.
    """

    def __init__(
        self,
        decoder: Decoder,
        halves: list[Units],
        choose: Callable[[Units, dict[str, Tensor]], Tensor] | None,
        means: dict[str, Tensor],
        masks: MutableMapping[str, Tensor],
    ):
        self.decoder, self.halves, self.choose, self.means, self.masks = decoder, halves, choose, means, masks
        self.biases: dict[str, Tensor] = {}

    def __call__(self, window: Window, statistics: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
        matrices = self.decoder.matrices(window)
        masks = {name: torch.ones_like(matrix.weight, dtype=torch.bool) for name, matrix in matrices.items()}
        changed: dict[str, Tensor] = {}
        for half in self.halves:
            if half.window.blocks == window.blocks:
                kept = self.choose(half, statistics)
                half.remove(masks, kept)
                if half.window.name in self.means and not kept.all():
                    changed[half.reader.bias_name] = self._compensate(half, kept)
        for name, matrix in matrices.items():
            matrix.weight.masked_fill_(~masks[name], 0.0)
        self.masks.update(masks)
        return {name: sparsity_of(mask) for name, mask in masks.items()}, changed

    def _compensate(self, half: Units, kept: Tensor) -> Tensor:
        """Gives the reader the bias (out,) that makes up for the mean of what it no longer reads; its weights are still dense."""
        module, weight = half.reader.module, half.reader.weight
        extra = weight.float() @ self.means[half.window.name].masked_fill(half.columns(kept), 0.0)
        bias = (extra if module.bias is None else module.bias + extra).to(weight.dtype)
        self.biases[half.reader.name] = bias
        set_bias(module, bias)
        return bias


def _compare(
    decoder: Decoder, criterion: Structured, halves: list[Units], target: float, samples: Tensor, execution: Execution
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By name of each half, which of its units are kept (count,), and the means (in,) of what its reader reads in the dense model."""

    def visit(window: Window, statistics: dict[str, Tensor]) -> tuple[dict, dict]:
        here = [half for half in halves if half.window.blocks == window.blocks]
        scores = [_score(criterion, half, statistics).tolist() for half in here]
        return {"scores": scores, "means": [statistics[half.reader.name][0].tolist() for half in here]}, {}

    found = over_blocks(decoder, execution, "compare", visit, f"compare ({criterion.name})", samples, criterion.statistics)

    def tensors(what: str) -> list[Tensor]:
        # Every float32 is a number of JSON, and comes back as it was.
        return [torch.tensor(values, device=decoder.device) for block in found for values in block[what]]

    names = [half.window.name for half in halves]
    kept = keep_globally(tensors("scores"), [half.weights for half in halves], target)
    return dict(zip(names, kept, strict=True)), dict(zip(names, tensors("means"), strict=True))


def _score(criterion: Structured, half: Units, statistics: dict[str, Tensor]) -> Tensor:
    """The scores (count,) of a half's units, from what the matrices of its block read."""
    weight = half.reader.weight
    scores = criterion.score(weight.float(), statistics[half.reader.name].to(weight.device))
    if not scores.isfinite().all():
        raise ReconError(
            f"matrix {half.reader.name!r}: criterion {criterion.name!r} finds NaN or infinite scores; all must be finite"
        )
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
