"""Sparsity by block: how sparse each block is to be, so that all of them together are as sparse as asked for.

dlp: a block's importance is 1 - S_b / sum S, scaled to the range from 0 to 2 alpha; S_b is the median of its |W_ij| ||x_j||. The
block's sparsity is p, that of the whole, plus the mean importance, minus its own. "DLP: Dynamic Layerwise Pruning in Large
Language Models" (ICML 2025, arXiv 2505.23807); alpha = 0.15 as in their code.

by_losses: a block's loss is assumed to grow with its sparsity s as exp(c s), where c is the rate around p of the squared error of
normally distributed weights: dropping the smallest share s, from -q to q, gives E(s) = s - 2 q phi(q), phi the normal density.
With n_b the number of weights of a block, r the farthest that its sparsity may be from p, and l_b its loss at p + r,

    min sum_b l_b exp(c (s_b - p - r))   where sum_b n_b s_b = p sum_b n_b    has    s_b = a + log(n_b / l_b) / c,

clamped to at most r from p. The a that meets the total is found by bisection.
"""

import math
from statistics import NormalDist

import torch
from torch import Tensor

ALPHA = 0.15


def spread(sparsity: float) -> float:
    """How far a block's sparsity may be from `sparsity`, the whole's (`dlp`: nearly twice as far); less near 0 and 1."""
    return min(ALPHA, sparsity / 2, (1 - sparsity) / 2)


def dlp(medians: Tensor, sizes: Tensor, sparsity: float) -> Tensor:
    """The sparsity of each block (blocks,); medians: S; sizes: the numbers of weights; both (blocks,) float64."""
    importance = 1 - medians / medians.sum().clamp_min(torch.finfo(sizes.dtype).tiny)
    least, most = importance.aminmax()
    scaled = 2 * spread(sparsity) * (importance - least) / (most - least).clamp_min(torch.finfo(sizes.dtype).tiny)
    return sparsity + (scaled * sizes).sum() / sizes.sum() - scaled


def by_losses(losses: Tensor, sizes: Tensor, sparsity: float) -> Tensor:
    """The sparsity of each block (blocks,), from its loss when it alone is pruned, to `sparsity` plus `spread(sparsity)`.

    losses: l, above 0; sizes: the numbers of weights n; both (blocks,) float64.
    """
    reach, normal = spread(sparsity), NormalDist()
    least, most = sparsity - reach, sparsity + reach
    ends = [(share, normal.inv_cdf((1 + share) / 2)) for share in (least, most)]
    low, high = (math.log(share - 2 * q * normal.pdf(q)) for share, q in ends)  # log E
    offsets = (sizes / losses).log() * (2 * reach / (high - low))
    below, above = least - offsets.max(), most - offsets.min()
    for _ in range(100):
        a = (below + above) / 2
        shares = (a + offsets).clamp(least, most)
        below, above = (a, above) if (shares * sizes).sum() < sparsity * sizes.sum() else (below, a)
    return shares
