"""Masked least squares against a direct solution, row by row."""

import pytest
import torch

from recon.kernels.least_squares import masked_least_squares
from recon.kernels.patterns import Pattern, keep_mask


def problem(rows=24, columns=96, tokens=2048, outliers=4, seed=0):
    """A dense weight, a mask, and inputs as in a language model: correlated, of unequal size, a few of them huge."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = randn(tokens, columns // 2) * torch.logspace(0, -1.5, columns // 2, dtype=torch.float64)
    inputs = factors @ randn(columns // 2, columns) / (columns // 2) ** 0.5 + 0.05 * randn(tokens, columns)
    inputs *= torch.exp(0.7 * randn(columns))
    inputs[:, torch.randperm(columns, generator=generator)[:outliers]] *= 100
    dense = randn(rows, columns)
    mask = keep_mask(dense.abs() * inputs.square().mean(0).sqrt(), Pattern.parse("0.5"), "row")
    return dense, mask, inputs


def moments(dense, inputs):
    gram = inputs.T @ inputs / len(inputs)
    return gram, dense @ gram


def errors(weight, dense, inputs):
    """Per row, the mean squared difference of outputs, in float64."""
    return (inputs @ (weight.double() - dense).T).square().mean(0)


def direct_solution(mask, inputs, targets):
    solution = torch.zeros(mask.shape, dtype=torch.float64)
    for row, kept in enumerate(mask):
        solution[row, kept] = torch.linalg.lstsq(inputs[:, kept], targets[:, row]).solution
    return solution


@pytest.mark.parametrize("start", ["dense", "zero"])
def test_converges_to_the_direct_solution(start):
    dense, mask, inputs = problem()
    weight = masked_least_squares(dense if start == "dense" else 0 * dense, mask, *moments(dense, inputs), iterations=500)
    torch.testing.assert_close(weight, direct_solution(mask, inputs, inputs @ dense.T), rtol=1e-6, atol=1e-6)
    assert (weight[~mask] == 0).all() and not weight[~mask].signbit().any()


@pytest.mark.parametrize("iterations", [0, 1, 2, 5, 15, 300])
def test_no_row_ends_worse_than_it_started(iterations):
    dense, mask, inputs = problem()
    gram, cross = moments(dense, inputs)
    optimum = direct_solution(mask, inputs, inputs @ dense.T)
    for start in (dense, optimum):
        weight = masked_least_squares(start.float(), mask, gram.float(), cross.float(), iterations)
        before, after = (errors(value, dense, inputs) for value in (start.float() * mask, weight))
        assert (after <= before * (1 + 1e-5)).all()
        assert (after < before).all() or start is optimum or not iterations


def test_solved_rows_empty_rows_and_dead_inputs_give_no_nan():
    dense, mask, inputs = problem()
    inputs[:, 5] = 0.0
    mask[:, 5] = True
    mask[0], mask[1] = True, False  # solved at the start; nothing to solve
    weight = masked_least_squares(dense, mask, *moments(dense, inputs), iterations=500)
    assert weight.isfinite().all() and (weight[1] == 0).all()
    torch.testing.assert_close(weight[0], dense[0])
    assert torch.equal(weight[2:, 5], dense[2:, 5]), "an input that is always zero is no reason to move a weight"
