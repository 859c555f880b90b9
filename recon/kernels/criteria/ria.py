"""RIA: relative importance and activations.

    S_ij = (|W_ij| / sum_k |W_kj|  +  |W_ij| / sum_k |W_ik|) * ||x_j||_2 ^ a,   a = 0.5

Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models" (ICLR 2024), equation 4. A
weight is compared with those of its input (column) and of its output (row), so that no whole channel is pruned away.
"""

import torch
from torch import Tensor


def score(weight: Tensor, statistics: Tensor, generator: torch.Generator | None, a: float = 0.5) -> Tensor:
    """Scores (out, in) of `weight` (out, in).

    statistics: (in,), the norm of each input, sqrt(mean over tokens of x_j^2); its unit changes no mask.
    a: the exponent of the norm.
    """
    magnitude = weight.abs()
    smallest = torch.finfo(weight.dtype).tiny  # a row or column of zeros scores 0, not 0/0
    by_column = magnitude / magnitude.sum(0, keepdim=True).clamp_min(smallest)
    by_row = magnitude / magnitude.sum(1, keepdim=True).clamp_min(smallest)
    return (by_column + by_row) * statistics**a
