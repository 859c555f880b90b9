"""How fast gradient descent goes, and low-rank parametrisations against their formulas. The loop: `methods/test_training.py`."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from recon.kernels.adapters import ADAPTERS, LowRank
from recon.kernels.gradient_descent import Schedule, trained


@pytest.mark.parametrize("steps", [1, 2, 7, 32])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
def test_learning_rate_rises_then_falls_to_near_zero(steps, warmup):
    schedule = Schedule(warmup=warmup)
    factors = [schedule.factor(step, steps) for step in range(steps)]
    rise = max(1, round(warmup * steps))
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
    stacked = nn.Parameter(torch.full((2, 2), 1e-3))  # biases of two experts learn as other biases do
    assert_close([each.size for each in trained([weight, stacked], {weight: mask}, [stacked])], [size, size])
    silent = nn.Parameter(torch.zeros(2, 2))  # and so does a matrix of zeros, at the size of all matrices together
    assert_close([each.size for each in trained([weight, silent], {weight: mask})], [size, (25 / 7) ** 0.5])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_begin_and_scale_as_pefts_do_and_have_the_gradients_of_the_formula(kind, transposed):
    """A: Kaiming uniform with a = sqrt(5), which is +-1 / sqrt(in); alpha: twice the rank."""
    random = torch.Generator().manual_seed(0)
    weight, above = (torch.randn(7, 64, generator=random) for _ in range(2))
    mask = torch.rand(7, 64, generator=random) > 0.5

    def stored(given):
        return given.T if transposed else given

    adapter = LowRank(stored(weight), stored(mask), kind, 16, random, transposed)
    assert 0.99 / 8 < adapter.a.abs().max() <= 1 / 8 and not adapter.b.any()
    with torch.no_grad():
        adapter.b.normal_(generator=random)
    a, b = (parameter.detach().clone().requires_grad_() for parameter in (adapter.a, adapter.b))
    expected = weight + 2 * {"lora": 1.0, "masklora": mask, "scalelora": weight}[kind] * (b @ a)
    assert_close(exact := adapter(stored(weight)), stored(expected))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapter(stored(weight)), exact.bfloat16())  # rounded once
    (adapter(stored(weight)) * stored(above)).sum().backward()
    (expected * above).sum().backward()
    assert_close((adapter.a.grad, adapter.b.grad), (a.grad, b.grad))


@pytest.mark.parametrize("size", [1e-2, 10.0])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_step_of_b_moves_the_merged_weight_by_about_the_rate_times_its_size(kind, size):
    random = torch.Generator().manual_seed(0)
    mask = torch.rand(40, 60, generator=random) > 0.5
    weight = size * torch.randn(40, 60, generator=random) * mask
    adapter = LowRank(weight, mask, kind, 8, random)
    a, b = adapter.trained(weight)
    assert (a.parameter, b.parameter, a.size) == (adapter.a, adapter.b, 1)  # no weight decides how A starts
    with torch.no_grad():
        adapter.b.add_(0.1 * b.size * torch.randn(40, 8, generator=random).sign())
    moved = (adapter(weight) - weight)[mask]
    assert moved.norm().item() == pytest.approx(0.1 * weight.norm().item(), rel=0.1)
