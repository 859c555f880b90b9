"""How fast gradient descent goes: the schedule, and the sizes of parameters. The loop: `tests/methods/test_training.py`."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from recon.kernels.gradient_descent import Schedule, trained


@pytest.mark.parametrize("steps", [1, 2, 7, 32])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
def test_learning_rate_rises_then_falls_to_near_zero(steps, warmup):
    schedule = Schedule(warmup=warmup)
    factors = [schedule.factor(step, steps) for step in range(steps)]
    rise = max(1, round(warmup * steps))
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == factors[rise - 1] == 1
    assert_close(factors[:rise], [(step + 1) / rise for step in range(rise)])
    falling = [*factors[rise - 1 :], schedule.factor(steps, steps)]
    assert_close(falling[-1], 0.0)  # the step after the last
    differences = [a - b for a, b in zip(falling, falling[1:], strict=False)]
    assert_close(differences, [1 / (steps - rise + 1)] * len(differences))


def test_sizes_are_those_of_what_survives():
    weight, mask = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, -4.0]])), torch.tensor([[True, False], [True, True]])
    zeros, norm = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.tensor([10.0, 10.0]))
    given = trained([weight, zeros, norm], {weight: mask})
    assert [each.parameter for each in given] == [weight, zeros, norm] and given[0].mask is mask
    size = (25 / 3) ** 0.5
    assert_close([each.size for each in given], [size, size, 10.0])  # a bias of zeros learns, too
    assert_close([each.size for each in trained([zeros, norm], {})], [50**0.5, 10.0])
    silent = nn.Parameter(torch.zeros(2, 2))  # and so does a matrix of zeros, at the size of all matrices together
    assert_close([each.size for each in trained([weight, silent], {weight: mask})], [size, (25 / 7) ** 0.5])
