"""Sparsity by block: totals are exact, DLP as published, and no other split of the total costs less."""

import itertools
import math

import pytest
import torch

from recon.kernels.allocation import by_curves, dlp, spread

SIZES = torch.tensor([30.0, 10, 20], dtype=torch.float64)


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.7, 0.95])
def test_dlp_follows_the_formula(sparsity):
    medians = torch.tensor([1.0, 4, 5], dtype=torch.float64)
    importance = [1 - 0.1, 1 - 0.4, 1 - 0.5]
    scaled = [2 * spread(sparsity) * (each - 0.5) / 0.4 for each in importance]
    mean = (30 * scaled[0] + 10 * scaled[1] + 20 * scaled[2]) / 60
    found = dlp(medians, SIZES, sparsity)
    torch.testing.assert_close(found.tolist(), [sparsity + mean - each for each in scaled])
    assert (found * SIZES).sum().item() == pytest.approx(60 * sparsity, abs=1e-12) and 0 <= found.min() <= found.max() < 1


@pytest.mark.parametrize("low, high", [([1, 2, 8], [4, 9, 20]), ([1, 100, 1], [2, 900, 1.5]), ([1, 2, 1], [0.9, 5, 3])])
def test_no_other_split_of_the_total_costs_less(low, high):
    """Tried: all splits on a fine grid. The last losses are noise: one falls with sparsity."""
    sparsity, reach = 0.6, spread(0.6)
    low, high = (torch.tensor(each, dtype=torch.float64) for each in (low, high))
    found = by_curves(low, high, SIZES, sparsity)
    assert (found * SIZES).sum().item() == pytest.approx(60 * sparsity, abs=1e-9)
    slopes = [max(math.log(b / a) / (2 * reach), 1e-3) for a, b in zip(low.tolist(), high.tolist(), strict=True)]

    def cost(split):
        curves = zip(split, slopes, low.tolist(), strict=True)
        return sum(a * math.exp(slope * (s - sparsity + reach)) for s, slope, a in curves)

    grid = [sparsity - reach + 2 * reach * step / 60 for step in range(61)]
    splits = [(a, b, (60 * sparsity - 30 * a - 10 * b) / 20) for a, b in itertools.product(grid, grid)]
    least = min(cost(split) for split in splits if sparsity - reach <= split[2] <= sparsity + reach)
    assert cost(found.tolist()) <= least * (1 + 1e-9)
