"""The low-rank parametrisations against their formulas, values and gradients."""

import pytest
import torch

from recon.kernels.adapters import ADAPTERS, ALPHA, LowRank


@pytest.mark.parametrize("kind", ADAPTERS)
def test_gradients_are_those_of_the_formula(kind):
    random = torch.Generator().manual_seed(0)
    weight, above = (torch.randn(7, 11, generator=random) for _ in range(2))
    mask = torch.rand(7, 11, generator=random) > 0.5
    adapter = LowRank(weight, mask, kind, 3, random)
    with torch.no_grad():
        adapter.b.normal_(generator=random)
    a, b = (parameter.detach().clone().requires_grad_() for parameter in (adapter.a, adapter.b))
    factor = {"lora": 1.0, "masklora": mask, "scalelora": weight}[kind]
    expected = weight + ALPHA * factor * (b @ a)
    torch.testing.assert_close(adapter(weight), expected)
    (adapter(weight) * above).sum().backward()
    (expected * above).sum().backward()
    torch.testing.assert_close(adapter.a.grad, a.grad)
    torch.testing.assert_close(adapter.b.grad, b.grad)


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


def test_under_autocast_the_merged_weight_is_rounded_once():
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 11, generator=random)
    adapter = LowRank(weight, torch.ones(7, 11, dtype=torch.bool), "masklora", 3, random)
    with torch.no_grad():
        adapter.b.normal_(generator=random)
    exact = adapter(weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapter(weight), exact.bfloat16())
