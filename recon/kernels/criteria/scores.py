"""Criteria that only rank weights. Each returns scores (out, in), higher = kept, for a weight W (out, in).

    magnitude   |W_ij|                                                              (compared within a whole matrix)
    random      uniform in [0, 1): the floor that every other criterion has to beat
    wanda       |W_ij| * ||x_j||
    wanda++     |W_ij| * (||x_j|| + a G_ij),  a = 100
    ria         (|W_ij| / sum_k |W_kj|  +  |W_ij| / sum_k |W_ik|) * ||x_j|| ^ a,  a = 0.5

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (2023, arXiv 2306.11695), equation 1;
Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models" (ICLR 2024), equation 4: a
weight is compared with the other weights of its input and of its output, so that no whole channel is pruned away;
Yang et al., "Wanda++: Pruning Large Language Models via Regional Gradients" (2025, arXiv 2503.04992): G_ij is the root mean
square over samples of the gradient by W_ij of ||f(X)||, the norm of the output of the matrix's block.

statistics: (in,), the norm of each input, here sqrt(mean over tokens of x_j^2); its scale changes no mask of Wanda or RIA. For
wanda++, (1 + out, in): sqrt(mean over samples of the sum over a sample's tokens of x_j^2), as in their code, then G.
"""

import torch
from torch import Tensor


def magnitude(weight: Tensor, statistics: None, generator: torch.Generator | None) -> Tensor:
    """The weight's size."""
    return weight.abs()


def random(weight: Tensor, statistics: None, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1), drawn on the generator's device."""
    return torch.rand(weight.shape, generator=generator, device=generator.device).to(weight.device)


def wanda(weight: Tensor, statistics: Tensor, generator: torch.Generator | None) -> Tensor:
    """The weight's size times the norm of its input."""
    return weight.abs() * statistics


def wanda_plus(weight: Tensor, statistics: Tensor, generator: torch.Generator | None, a: float = 100.0) -> Tensor:
    """The weight's size times the sum of its input's norm and `a` times the gradient of the norm of its block's output."""
    return weight.abs() * (statistics[0] + a * statistics[1:])


def ria(weight: Tensor, statistics: Tensor, generator: torch.Generator | None, a: float = 0.5) -> Tensor:
    """The weight's size relative to its column and its row, times the norm of its input to the power `a`."""
    size, smallest = weight.abs(), torch.finfo(weight.dtype).tiny  # a row or column of zeros scores 0, not 0/0
    by_column = size / size.sum(0, keepdim=True).clamp_min(smallest)
    by_row = size / size.sum(1, keepdim=True).clamp_min(smallest)
    return (by_column + by_row) * statistics**a
