"""Sparsity by block: how sparse each block is to be, so that all of them together are as sparse as asked for.

dlp: a block's importance is 1 - S_b / sum S with S_b the median of its |W_ij| ||x_j||, scaled to the range from 0 to 2 alpha; its
sparsity is p plus what its importance is below the mean. "DLP: Dynamic Layerwise Pruning in Large Language Models" (ICML 2025,
arXiv 2505.23807); alpha = 0.15 is their code's.

by_losses: a block's loss is taken to grow with its sparsity s as exp(c s), where c is that of the squared error of normally
distributed weights around p: without the smallest share s, between -q and q, it is E(s) = s - 2 q phi(q). With l_b the loss at
p + r, where r is the farthest that a block may be from p, and n_b weights,

    min sum_b l_b exp(c (s_b - p - r))   where sum_b n_b s_b = p sum_b n_b    has    s_b = a + log(n_b / l_b) / c,

but for blocks that are r from p. The a that meets the total is found by bisection.
"""

import math
from statistics import NormalDist

import torch
from torch import Tensor

ALPHA = 0.15


def spread(sparsity: float) -> float:
    """How far blocks may be from the `sparsity` of the whole (`dlp`: nearly twice as far); less where that is near 0 or 1."""
    return min(ALPHA, sparsity / 2, (1 - sparsity) / 2)


def dlp(medians: Tensor, sizes: Tensor, sparsity: float) -> Tensor:
    """The sparsity of each block (blocks,), from the medians S and the numbers of weights n, (blocks,) float64 each."""
    importance = 1 - medians / medians.sum().clamp_min(torch.finfo(sizes.dtype).tiny)
    least, most = importance.aminmax()
    scaled = 2 * spread(sparsity) * (importance - least) / (most - least).clamp_min(torch.finfo(sizes.dtype).tiny)
    return sparsity + (scaled * sizes).sum() / sizes.sum() - scaled


def by_losses(losses: Tensor, sizes: Tensor, sparsity: float) -> Tensor:
    """The sparsity of each block (blocks,), from its loss when it alone has `sparsity` plus `spread(sparsity)`.

    losses: above 0; sizes: the numbers of weights n; (blocks,) float64 each.
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
