"""Moments of inputs, gathered batch by batch, against those of all of them at once."""

import pytest
import torch
from torch.testing import assert_close

from recon.kernels.moments import add_gram, add_moments, mirrored


@pytest.mark.parametrize("width", [1, 255, 256, 257, 1536, 1537])
def test_the_upper_triangle_makes_the_gram_matrix(width):
    parts = torch.randn(3, 40, width, generator=torch.Generator().manual_seed(0)).double()
    total = torch.zeros(width, width, dtype=torch.float64)
    for x in parts:
        add_gram(total, x)
    x = parts.flatten(0, 1)
    assert_close(mirrored(total), x.T @ x)


def test_a_large_mean_costs_no_digits_of_the_variance():
    draw = torch.Generator().manual_seed(0)
    batches = [1000 + 0.1 * i + 0.1 * torch.randn(n, 6, generator=draw) for i, n in enumerate((64, 1, 30, 64))]
    total, seen = torch.zeros(2, 6), 0
    for x in batches:
        add_moments(total, seen, x)
        seen += len(x)
    x = torch.cat(batches).double()
    assert_close(total.double(), torch.stack([x.mean(0), x.var(0, correction=0)]), rtol=1e-3, atol=1e-4)
    naive = torch.cat(batches).square().mean(0) - torch.cat(batches).mean(0).square()
    assert ((naive.double() - x.var(0, correction=0)) / x.var(0, correction=0)).abs().max() > 1e-1  # what this guards against
