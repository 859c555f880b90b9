"""Criteria that remove whole units: attention heads (with grouped queries: whole key/value groups) and MLP neurons.

Both score the columns of the matrix W (out, in) that reads the units: attention's output projection, the MLP's down projection. A
unit's score is the mean over its columns. With X (tokens, in) what that matrix reads,

    Wanda-sp:  s_j = sum_i |W_ij| * ||x_j||_2                               compared within each half-block
    FLAP:      s_j = var(x_j) * ||W_:j||_2^2, then standardised:            compared over the whole model
               (s_j - mean of s) / (standard deviation of s)

An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (2023, arXiv 2312.11983): metric WIFV with
the adaptive structure AL-AM, and the extension of Wanda that it is compared with. FLAP replaces what it removes by its mean:
mean(x_j) W_:j goes into the bias. Their code squares the scores of attention before it standardises them; this one does not.
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

    From the lowest score up, a unit goes if its weights fit into what is left of `target`, give or take half of the smallest
    unit: a head too large for the rest stays, and neurons fill it up.

    scores: of each half-block, those of its units, (units,).
    weights: of each half-block, how many weights one of its units has.
    target: weights to be removed in all.
    """
    size = [weight for score, weight in zip(scores, weights, strict=True) for _ in range(len(score))]
    kept, room = [True] * len(size), target + min(size) / 2
    for unit in torch.cat(list(scores)).argsort(stable=True).tolist():
        if size[unit] <= room:
            kept[unit] = False
            room -= size[unit]
    return list(torch.tensor(kept, device=scores[0].device).split([len(score) for score in scores]))
