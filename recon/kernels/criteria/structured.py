"""Criteria that remove whole units: attention heads (with grouped queries: whole key/value groups) and MLP neurons.

Both score the columns of the matrix that reads the units (the output projection of attention, the down projection of the
MLP); the score of a unit is the mean over its columns. With X (tokens, in) what that matrix W (out, in) reads,

    Wanda-sp:  s_j = sum_i |W_ij| * ||x_j||_2                               compared within each half of a block
    FLAP:      s_j = var(x_j) * ||W_:j||_2^2, then standardised:            compared over the whole model
               (s_j - mean of s) / (standard deviation of s)

An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (2023, arXiv 2312.11983), metric WIFV
with the adaptive structure AL-AM, and the extension of Wanda that it is compared with. What FLAP removes is replaced by its
mean: mean(x_j) W_:j goes into the bias. The authors' code squares the scores of attention before they are standardised;
here both halves are treated alike.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def wanda_sp(weight: Tensor, norm: Tensor) -> Tensor:
    """Scores (in,) of the columns of ``weight`` (out, in); norm: (in,), root of the mean square of each input."""
    return weight.abs().sum(0) * norm


def flap(weight: Tensor, moments: Tensor) -> Tensor:
    """Scores (in,), of mean 0 and standard deviation 1, of the columns of ``weight`` (out, in).

    moments: (2, in), the mean and the variance over tokens of each input.
    """
    fluctuation = moments[1] * weight.square().sum(0)
    centred = fluctuation - fluctuation.mean()
    return centred / centred.square().mean().sqrt().clamp_min(torch.finfo(weight.dtype).tiny)


def keep_globally(scores: Sequence[Tensor], weights: Sequence[int], target: float) -> list[Tensor]:
    """For each half the units (count,) that are kept, True. All compete; a half may lose all or none.

    From the lowest score up, every unit goes that fits into what ``target`` weights leave room for, give or take half of the
    smallest unit: a head too large for the rest of the room stays, and neurons fill it up.

    scores: for each half, those of its units (count,). weights: for each half, how many go with one of its units.
    """
    size = [weight for score, weight in zip(scores, weights, strict=True) for _ in range(len(score))]
    kept, room = [True] * len(size), target + min(size) / 2
    for unit in torch.cat(list(scores)).argsort(stable=True).tolist():
        if size[unit] <= room:
            kept[unit] = False
            room -= size[unit]
    return list(torch.tensor(kept, device=scores[0].device).split([len(score) for score in scores]))
