"""Sparsity by block: how sparse each block is to be, so that all of them together are as sparse as asked for.

dlp: a block's importance is 1 - S_b / sum S with S_b the median of its |W_ij| ||x_j||, scaled to the range from 0 to 2 alpha; its
sparsity is p plus what its importance is below the mean. "DLP: Dynamic Layerwise Pruning in Large Language Models" (ICML 2025,
arXiv 2505.23807); alpha = 0.15 is their code's.

by_curves: each block's loss grows with its sparsity s as exp(u_b + c_b s), through two measured points. With n_b weights,

    min sum_b exp(u_b + c_b s_b)   where sum_b n_b s_b = p sum_b n_b    has    c_b exp(u_b + c_b s_b) = lambda n_b  for all b,

but for blocks at a bound of what was measured. The lambda that meets the total is found by bisection.
"""

import torch
from torch import Tensor

ALPHA = 0.15


def spread(sparsity: float) -> float:
    """How far blocks may be from the `sparsity` of the whole: alpha, or less where that comes near 0 or 1."""
    return min(ALPHA, sparsity / 2, (1 - sparsity) / 2)


def dlp(medians: Tensor, sizes: Tensor, sparsity: float) -> Tensor:
    """The sparsity of each block (blocks,), from the medians S and the numbers of weights n, (blocks,) float64 each."""
    importance = 1 - medians / medians.sum().clamp_min(torch.finfo(sizes.dtype).tiny)
    least, most = importance.aminmax()
    scaled = 2 * spread(sparsity) * (importance - least) / (most - least).clamp_min(torch.finfo(sizes.dtype).tiny)
    return sparsity + (scaled * sizes).sum() / sizes.sum() - scaled


def by_curves(low: Tensor, high: Tensor, sizes: Tensor, sparsity: float) -> Tensor:
    """The sparsity of each block (blocks,), from its loss when it alone has `sparsity` minus and plus `spread(sparsity)`.

    low, high: the two losses, above 0; sizes: the numbers of weights n; (blocks,) float64 each.
    """
    reach = spread(sparsity)
    slope = ((high / low).log() / (2 * reach)).clamp_min(1e-3)  # c, where noise does not make it negative
    start = low.log() - slope * (sparsity - reach)  # u

    def at(log_lambda: Tensor) -> Tensor:
        return ((log_lambda + (sizes / slope).log() - start) / slope).clamp(sparsity - reach, sparsity + reach)

    ends = (slope / sizes).log() + start + slope * torch.tensor([[sparsity - reach], [sparsity + reach]]).to(sizes)
    below, above = ends.min(), ends.max()
    for _ in range(100):
        middle = (below + above) / 2
        below, above = (middle, above) if (at(middle) * sizes).sum() < sparsity * sizes.sum() else (below, middle)
    return at(above)
