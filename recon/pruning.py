"""The pass that gathers statistics block by block and makes masks."""

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from recon import criteria
from recon.decoder import Decoder, Matrix
from recon.engine import Engine
from recon.errors import ReconError
from recon.seeds import generator
from recon.solvers.swaps import swap
from recon.sparsity import Pattern, sparsity_of
from recon.statistics import gather

log = logging.getLogger("recon")


@dataclass(frozen=True)
class Pruning:
    """What a pruning pass found: `masks` by matrix name, bool (out, in), True = kept; and the sparsity of each matrix."""

    masks: dict[str, Tensor]
    sparsity: dict[str, float] = field(default_factory=dict)

    @property
    def total_sparsity(self) -> float:
        """Share of zeros over all pruned matrices."""
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        return 1 - kept / sum(mask.numel() for mask in self.masks.values())


@torch.no_grad()
def prune(
    model: nn.Module | Decoder,
    samples: Tensor | None = None,
    criterion: str = "wanda",
    pattern: str | Pattern = "0.5",
    scope: str = "auto",
    propagation: str = "sparse",
    seed: int = 0,
    swaps: int = 0,
    compute_dtype: str = "auto",
    device: torch.device | str | None = None,
    progress: bool = True,
    **options,
) -> Pruning:
    """Prunes the matrices of every block of `model` in place, block by block; embeddings and output head are left alone.

    Args:
        model: a causal LM, or its `Decoder`.
        samples: calibration tokens (samples, length), needed by criteria that weigh activations.
        criterion: one of `recon.criteria.CRITERIA`.
        pattern: unstructured sparsity such as "0.5", or N:M such as "2:4" (N kept of every M).
        scope: weights compete within a "row" (one output neuron) or the "matrix"; "auto" is the criterion's own default.
        propagation: statistics come from activations of the already pruned model ("sparse", as the Wanda and SparseGPT
            authors do) or of the dense one ("dense").
        swaps: exchanges of a pruned and a kept weight that are tried in each row after the criterion has chosen; see
            `recon.solvers.swaps`.
        device: where to compute; default: where the model is. The model stays where it is, but for the block in hand.
        options: passed to the criterion (SparseGPT: `block_size`, `damping`).

    Raises:
        ReconError: an unknown name, a pattern that does not divide a matrix, missing samples, NaN in weights or activations.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    rule = criteria.get(criterion)
    pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
    scope = rule.scope if scope == "auto" else scope
    if propagation not in ("sparse", "dense"):
        raise ReconError(f"unknown pruning propagation {propagation!r}; allowed: sparse, dense")
    for name, matrix in decoder.matrices().items():
        pattern.check_columns(name, matrix.weight.shape[1])
    check_swaps(swaps, criterion)
    kind = "gram" if swaps else rule.statistics
    if kind != "none" and samples is None:
        what = f"criterion {criterion!r}" if rule.statistics != "none" else f"choosing by {criterion!r} with swaps"
        raise ReconError(f"{what} weighs activations and needs calibration samples")
    engine = Engine(device or decoder.device, compute_dtype)
    stream = engine.run(decoder.embed, samples) if kind != "none" else None
    masks = {}
    for window in tqdm(decoder.windows("block"), desc=f"prune ({criterion} {pattern})", unit="block", disable=not progress):
        statistics: dict[str, Tensor] = {}
        if stream is not None:
            outputs, statistics = gather(engine, decoder, window, stream, kind)
        with engine.holding(decoder, window, trained=decoder.weights(window)):
            for name, matrix in decoder.matrices(window).items():
                random = generator(seed, "criterion", name)
                weight, mask = _prune_matrix(matrix, statistics.get(name), rule, pattern, scope, random, swaps, options)
                matrix.weight.copy_(weight)
                masks[name] = mask.to(decoder.device)
        if stream is None or window.blocks[0] + 1 == len(decoder.blocks):
            continue
        if propagation == "sparse":
            with engine.holding(decoder, window):
                outputs = engine.run(lambda batch, window=window: decoder.forward(window, batch), stream)
        stream = outputs
    return Pruning(masks, {name: sparsity_of(mask) for name, mask in masks.items()})


def check_swaps(swaps: int, criterion: str) -> None:
    """Raises `ReconError` where `swaps` are asked for after a criterion that has adapted the weights to its own mask."""
    if swaps and not criteria.get(criterion).scores:
        adequate = ", ".join(name for name, rule in criteria.CRITERIA.items() if rule.scores)
        raise ReconError(f"swaps is {swaps}, but criterion {criterion!r} adapts weights to its own mask; swaps suit {adequate}")


def _prune_matrix(
    matrix: Matrix, statistics: Tensor | None, rule, pattern: Pattern, scope: str, random, swaps: int, options: dict
) -> tuple[Tensor, Tensor]:
    """The matrix's new weight and mask. `statistics` are a Gram matrix where there are `swaps`, else what `rule` asks for."""
    weight, own = matrix.weight.float(), statistics
    if swaps:
        own = {"none": None, "norm": statistics.diagonal().sqrt(), "gram": statistics}[rule.statistics]
    try:
        pruned, mask = rule.prune(weight, own, pattern, scope, random, **options)
    except ReconError as error:
        raise ReconError(f"matrix {matrix.name!r}: {error}") from None
    if not swaps:
        return pruned, mask
    mask = swap(weight, mask, statistics, swaps, pattern.m)
    return weight.masked_fill(~mask, 0.0), mask
