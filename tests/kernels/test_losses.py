"""Losses against torch's own and by hand, values and gradients."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from recon.errors import ReconError
from recon.kernels import losses
from recon.kernels.losses import LOSSES, cosine, get_loss, kl_divergence, mse, negative_log_likelihood, relative, relative_error

# ---- of windows


def test_mse_by_hand():
    output, target = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 4.0]]])
    assert mse(output, target).item() == pytest.approx((4 + 9) / 4)


def test_cosine_by_hand():
    output, target = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]), torch.tensor([[[5.0, 0.0], [0.0, 2.0]]])
    assert cosine(output, target).item() == pytest.approx((0 + 1 - 1 / math.sqrt(2)) / 2, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_are_in_float32(loss):
    value = loss(torch.full((1, 2, 3), 300.0).half(), torch.full((1, 2, 3), -300.0).half())
    assert value.dtype == torch.float32 and value.isfinite()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_equal_outputs_cost_nothing_even_where_they_are_zero(loss):
    target = torch.tensor([[[1.0, -2.0], [0.0, 0.0]]])
    assert_close(loss(target, target), torch.tensor(0.5 if loss is cosine else 0.0))  # zeros have no angle


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("loss", [cosine, relative])
def test_size_of_activations_does_not_matter(loss, scale):
    draw = torch.Generator().manual_seed(0)
    output, target = (torch.randn(2, 5, 6, generator=draw) for _ in range(2))
    assert_close(loss(output * scale, target * scale), loss(output, target))


def test_one_massive_token_decides_the_squared_error_alone():
    output, target = torch.zeros(1, 10, 4), torch.ones(1, 10, 4)
    target[0, 0] = 1e3
    better = output.clone()
    better[0, 1:] = 1.0  # all tokens but one are right
    assert mse(better, target) > 0.99 * mse(output, target)
    assert_close(relative(better, target), 0.1 * relative(output, target))


def test_unknown_loss_is_refused():
    with pytest.raises(ReconError, match="'kl'.*mse, cosine, relative"):
        get_loss("kl")


def test_relative_error_by_hand():
    target = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[2.0, 0.0], [0.0, 10.0]]])
    output = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[2.0, 1.0], [0.0, 5.0]]])
    assert relative_error(output, target) == pytest.approx((0 + 1 + 1 / 4 + 25 / 100) / 4)
    assert relative_error(output, target) == relative(output, target).item()
    assert relative_error(target, target) == 0


def test_relative_error_weighs_tokens_alike():
    target = torch.tensor([[[1000.0, 0.0], [1.0, 0.0]]])
    assert relative_error(torch.tensor([[[1000.0, 0.0], [0.0, 0.0]]]), target) == pytest.approx(0.5)


def test_relative_error_of_a_silent_token_is_finite():
    assert math.isfinite(relative_error(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)))


# ---- of predictions


@pytest.fixture
def draw():
    random = torch.Generator().manual_seed(0)
    found, wanted = (4 * torch.randn(13, 50, generator=random) for _ in range(2))
    return found, wanted, torch.randint(50, (13,), generator=random)


@pytest.mark.parametrize("elements", [1, 50, 170, 2**20])  # one row at a time, several, all; the last part is shorter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_likelihoods_and_their_gradients_are_torchs(draw, monkeypatch, elements, dtype):
    monkeypatch.setattr(losses, "ELEMENTS", elements)
    found, _, targets = draw
    ours, theirs = (found.to(dtype).requires_grad_() for _ in range(2))
    loss, expected = negative_log_likelihood(ours, targets), F.cross_entropy(theirs.float(), targets, reduction="none")
    assert_close(loss, expected)
    (3 * loss.mean()).backward()
    (3 * expected.mean()).backward()
    assert ours.grad.dtype == dtype
    assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("elements", [1, 170, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergences_and_their_gradients_are_torchs(draw, monkeypatch, elements, dtype):
    monkeypatch.setattr(losses, "ELEMENTS", elements)
    found, wanted, _ = draw
    ours, theirs = (found.to(dtype).requires_grad_() for _ in range(2))
    p, q = wanted.log_softmax(-1), theirs.float().log_softmax(-1)
    loss, expected = kl_divergence(wanted, ours), (p.exp() * (p - q)).sum(-1)
    assert_close(loss, expected)
    loss.mean().backward()
    expected.mean().backward()
    assert_close(ours.grad, theirs.grad)
    assert_close(kl_divergence(wanted, wanted), torch.zeros(13))


def test_weighted_tokens_have_weighted_gradients(draw):
    found, _, targets = draw
    ours, theirs = (found.clone().requires_grad_() for _ in range(2))
    weights = torch.linspace(0, 2, 13)
    (weights * negative_log_likelihood(ours, targets)).sum().backward()
    (weights * F.cross_entropy(theirs, targets, reduction="none")).sum().backward()
    assert_close(ours.grad, theirs.grad)


def test_nothing_is_kept_where_no_gradient_is_wanted(draw):
    found, _, targets = draw
    assert not negative_log_likelihood(found, targets).requires_grad
    with torch.no_grad():
        assert not negative_log_likelihood(found.requires_grad_(), targets).requires_grad
