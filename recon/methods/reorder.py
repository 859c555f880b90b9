"""The order of MLP neurons under an N:M pattern: the most important neurons are spread over the groups of M.

The rows that compute a neuron and the column that reads it move together, so the model computes the same function. S (rows,
neurons) are the scores of the matrix that reads neurons. The order is improved place by place: the neuron at this place is taken
out of every group, and these neurons are assigned to the groups again. If b_rg is the N-th largest score of row r among the other
M - 1 neurons of group g, then neuron i increases the sum of the scores that group g keeps by

    sum_r max(S_ri, b_rg) - b_rg,

so the best assignment is a linear assignment problem. Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for
Large Language Models" (ICLR 2024), channel permutation; scores are Wanda's.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from recon.errors import ReconError
from recon.kernels.criteria.scores import wanda
from recon.kernels.patterns import Pattern
from recon.methods.statistics import over_blocks
from recon.methods.structured import find_units
from recon.model.decoder import Decoder
from recon.model.modules import distance, probe_tokens, tolerance
from recon.model.windows import Window
from recon.runtime.execution import Execution

ROWS = 512  # at most this many rows are used, at equal distances: they tell enough
TOKENS = 2048  # that norms are computed from; with four times as many, a pattern drops 1 % less, and it takes over twice as long


def better_order(scores: Tensor, pattern: Pattern) -> Tensor:
    """An order (neurons,) of the columns of `scores` (rows, neurons) in which an N:M `pattern` keeps a larger sum of scores."""
    scores = scores[:: -(-len(scores) // ROWS)].T.contiguous()  # (neurons, rows)
    groups = torch.arange(len(scores), device=scores.device).view(-1, pattern.m)
    for place in range(pattern.m):
        others = torch.cat([groups[:, :place], groups[:, place + 1 :]], 1)
        least = scores[others].topk(pattern.n, dim=1).values[:, -1]  # b, (groups, rows)
        gain = torch.stack([least.maximum(neuron).sum(1) for neuron in scores[groups[:, place]]])
        moved, to = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
        groups[to, place] = groups[moved, place]
    return groups.flatten()


@torch.no_grad()
def reorder_neurons(decoder: Decoder, samples: Tensor, pattern: Pattern, execution: Execution) -> None:
    """Reorders the neurons of each MLP half of a dense model in place, by the first `TOKENS` of `samples` (samples, length).

    Raises `ReconError` as `find_units`, for neurons that do not divide into groups, and if the logits change.
    """
    halves = {half.window.blocks: half for half in find_units(decoder) if half.window.half == "mlp"}
    for half in halves.values():
        pattern.check_columns(half.reader.name, half.count)
    tokens = probe_tokens(decoder.model).to(decoder.device)
    before = decoder.run(tokens).logits

    def visit(window: Window, norms: dict[str, Tensor]) -> tuple[None, dict]:
        half, matrices = halves[window.blocks], decoder.matrices(window)
        weight, norm = half.reader.weight, norms[half.reader.name]
        order = better_order(wanda(weight.to(norm.device), norm, None), pattern).to(weight.device)
        weight.copy_(weight[:, order])
        for name, owner in half.rows.items():
            rows, bias = owner.argsort(stable=True).view(half.count, -1), getattr(matrices[name].module, "bias", None)
            for tensor in [matrices[name].weight] + [bias] * (bias is not None):
                tensor[rows.flatten()] = tensor[rows[order].flatten()]
        return None, {}

    read = samples[: -(-TOKENS // samples.shape[1])]
    over_blocks(decoder, execution, "reorder", visit, f"reorder ({pattern})", read, "norm")
    if (gap := distance(decoder.run(tokens).logits, before)) > tolerance(before):
        raise ReconError(f"with its neurons reordered, the model gives other logits (by {gap:.1e}): something else makes them")
