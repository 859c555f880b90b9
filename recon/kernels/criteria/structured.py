"""Criteria that remove whole units: attention heads (with grouped queries: whole key/value groups) and MLP neurons.

Both score the columns of the matrix W (out, in) that reads the units: attention's output projection, the MLP's down projection. A
unit's score is the mean over its columns. With that matrix's inputs X (tokens, in),

    Wanda-sp:  s_j = sum_i |W_ij| * ||x_j||_2                               compared within each half-block
    FLAP:      s_j = var(x_j) * ||W_:j||_2^2, then standardised:            compared over the whole model
               (s_j - mean of s) / (standard deviation of s)

An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (2023, arXiv 2312.11983): metric WIFV with
the adaptive structure AL-AM, and the extension of Wanda that FLAP is compared with. FLAP replaces removed inputs by their mean:
mean(x_j) W_:j is added to the bias. Their code squares attention's scores before it standardises them; this code does not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def wanda_sp(weight: Tensor, norm: Tensor) -> Tensor:
    """Scores (in,) of the columns of `weight` (out, in); norm: (in,), root of the mean square of each input."""
    return weight.abs().sum(0) * norm


def flap(weight: Tensor, moments: Tensor) -> Tensor:
    """Scores (in,) of the columns of `weight` (out, in); moments: (2, in), mean and variance over tokens of each input."""
    fluctuation = moments[1] * weight.square().sum(0)
    centred = fluctuation - fluctuation.mean()
    return centred / centred.square().mean().sqrt().clamp_min(torch.finfo(weight.dtype).tiny)


def keep_globally(scores: Sequence[Tensor], weights: Sequence[int], target: float) -> list[Tensor]:
    """For each half-block, which of its units are kept, bool (units,). All units compete; a half-block may lose all or none.

    From the lowest score up, a unit is removed if its weights fit into what is left of `target` plus half of the smallest unit.
    So a head that is too large for the rest stays, and neurons fill the rest.

    scores: for each half-block, the scores of its units, (units,).
    weights: for each half-block, the number of weights of one unit.
    target: the number of weights to remove in total.
    """
    size = [weight for score, weight in zip(scores, weights, strict=True) for _ in range(len(score))]
    kept, room = [True] * len(size), target + min(size) / 2
    for unit in torch.cat(list(scores)).argsort(stable=True).tolist():
        if size[unit] <= room:
            kept[unit] = False
            room -= size[unit]
    return list(torch.tensor(kept, device=scores[0].device).split([len(score) for score in scores]))
