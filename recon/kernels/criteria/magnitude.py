"""Magnitude: the smallest weights go.

    S_ij = |W_ij|

The layer-wise magnitude baseline of Sun et al., "A Simple and Effective Pruning Approach for Large Language Models"
(2023, arXiv 2306.11695), which compares within a whole matrix.
"""

import torch
from torch import Tensor


def score(weight: Tensor, statistics: None, generator: torch.Generator | None) -> Tensor:
    """Scores (out, in) of `weight` (out, in); needs neither statistics nor randomness."""
    return weight.abs()
