"""Wanda: weight times the norm of the input that it multiplies.

    S_ij = |W_ij| * ||x_j||_2

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (2023, arXiv 2306.11695), equation 1.
"""

import torch
from torch import Tensor


def score(weight: Tensor, statistics: Tensor, generator: torch.Generator | None) -> Tensor:
    """Scores (out, in) of `weight` (out, in).

    statistics: (in,), the norm of each input, here sqrt(mean over tokens of x_j^2). The paper's norm is a sum over tokens: one
    factor for the whole matrix, which changes no mask.
    """
    return weight.abs() * statistics
