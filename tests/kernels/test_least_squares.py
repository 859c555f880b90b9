"""Masked least squares against a direct solution, row by row; moments of inputs, batch by batch, against those of all."""

import pytest
import torch
from fixtures.models import least_squares, problem

from recon.kernels.least_squares import masked_least_squares
from recon.kernels.moments import add_gram, add_moments, mean_product, mirrored
from recon.kernels.patterns import Pattern, keep_mask


def masked_problem():
    """A dense weight, a mask, and inputs of which a few are huge."""
    dense, inputs = problem(24, 96, 2048)
    inputs[:, 5:96:25] *= 100
    return dense, keep_mask(dense.abs() * inputs.square().mean(0).sqrt(), Pattern.parse("0.5"), "row"), inputs


def moments(dense, inputs):
    gram = inputs.T @ inputs / len(inputs)
    return gram, dense @ gram


@pytest.mark.parametrize("start", ["dense", "zero"])
def test_converges_to_the_direct_solution(start):
    dense, mask, inputs = masked_problem()
    weight = masked_least_squares(dense if start == "dense" else 0 * dense, mask, *moments(dense, inputs), iterations=500)
    torch.testing.assert_close(weight, least_squares(inputs, inputs @ dense.T, mask), rtol=1e-6, atol=1e-6)
    assert (weight[~mask] == 0).all() and not weight[~mask].signbit().any()


@pytest.mark.parametrize("iterations", [0, 1, 2, 5, 15, 300])
def test_no_row_ends_worse_than_it_started(iterations):
    dense, mask, inputs = masked_problem()
    gram, cross = moments(dense, inputs)
    optimum = least_squares(inputs, inputs @ dense.T, mask)
    for start in (dense, optimum):
        weight = masked_least_squares(start.float(), mask, gram.float(), cross.float(), iterations)
        both = (start.float() * mask, weight)
        before, after = ((inputs @ (value.double() - dense).T).square().mean(0) for value in both)  # of each row
        assert (after <= before * (1 + 1e-5)).all()
        assert (after < before).all() or start is optimum or not iterations


def test_inputs_of_unequal_size_are_no_harder():
    """With the diagonal as preconditioner, the steps do not depend on the inputs' units."""
    dense, mask, inputs = masked_problem()
    units = torch.logspace(-2, 2, inputs.shape[1], dtype=torch.float64)
    weight = masked_least_squares(dense, mask, *moments(dense, inputs), iterations=5)
    other = masked_least_squares(dense / units, mask, *moments(dense / units, inputs * units), iterations=5)
    torch.testing.assert_close(other * units, weight)


def test_solved_rows_empty_rows_and_dead_inputs_give_no_nan():
    dense, mask, inputs = masked_problem()
    inputs[:, 5] = 0.0
    mask[:, 5] = True
    mask[0], mask[1] = True, False  # solved at the start; nothing to solve
    weight = masked_least_squares(dense, mask, *moments(dense, inputs), iterations=500)
    assert weight.isfinite().all() and (weight[1] == 0).all()
    torch.testing.assert_close(weight[0], dense[0])
    assert torch.equal(weight[2:, 5], dense[2:, 5]), "an input that is always zero is no reason to move a weight"


@pytest.mark.parametrize("width", [1, 255, 256, 257, 1536, 1537])
def test_the_upper_triangle_makes_the_gram_matrix(width):
    parts = torch.randn(3, 40, width, generator=torch.Generator().manual_seed(0)).double()
    total = torch.zeros(width, width, dtype=torch.float64)
    for x in parts:
        add_gram(total, x)
    x = parts.flatten(0, 1)
    torch.testing.assert_close(mirrored(total), x.T @ x)


def test_products_of_half_precision_are_summed_in_float32():
    left, right = torch.randn(2, 3, 500, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = left.double().flatten(0, 1).T @ right.double().flatten(0, 1) / 1500
    torch.testing.assert_close(mean_product(zip(left, right)), expected.float())


def test_a_large_mean_costs_no_digits_of_the_variance():
    draw = torch.Generator().manual_seed(0)
    batches = [1000 + 0.1 * i + 0.1 * torch.randn(n, 6, generator=draw) for i, n in enumerate((64, 1, 30, 64))]
    total, seen = torch.zeros(2, 6), 0
    for x in batches:
        add_moments(total, seen, x)
        seen += len(x)
    x = torch.cat(batches).double()
    torch.testing.assert_close(total.double(), torch.stack([x.mean(0), x.var(0, correction=0)]), rtol=1e-3, atol=1e-4)
