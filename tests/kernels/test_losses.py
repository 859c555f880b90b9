"""Losses against torch's own and by hand, values and gradients."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from recon.kernels import losses
from recon.kernels.losses import LOSSES, channel_variance, cosine, kl_divergence, mse, unexplained, whitened


@pytest.mark.parametrize("loss, output, target, expected", [
    (mse, [[1.0, 2.0], [3.0, 4.0]], [[1.0, 0.0], [0.0, 4.0]], [4 / 4, 9 / 4]),
    (whitened, [[1.0, 2.0], [3.0, 4.0]], [[1.0, 0.0], [0.0, 4.0]], [4 / 1 / 2, 9 / 3 / 2]),
    (cosine, [[1.0, 0.0], [1.0, 1.0]], [[5.0, 0.0], [0.0, 2.0]], [0, 1 - 1 / math.sqrt(2)]),
])  # fmt: skip
def test_losses_by_hand(loss, output, target, expected):
    assert_close(loss(torch.tensor(output), torch.tensor(target), torch.tensor([3.0, 1.0])), torch.tensor(expected))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_equal_outputs_cost_nothing_even_where_they_are_zero(loss):
    target = torch.tensor([[[1.0, -2.0], [0.0, 0.0]]])
    expected = torch.tensor([[0.0, float(loss is cosine)]])  # zeros have no angle
    assert_close(loss(target, target, torch.ones(2)), expected)


def test_channel_variance_is_torchs_without_the_first_position_and_never_zero():
    targets = 5 + torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
    targets[:, 0] = 1e4
    assert_close(channel_variance(targets), targets[:, 1:].flatten(0, 1).var(0, correction=0))
    assert_close(channel_variance(1e-6 * targets), 1e-12 * channel_variance(targets), rtol=1e-4, atol=0)
    assert channel_variance(targets.bfloat16()).dtype == torch.float32
    targets[..., 1] = 7.0
    assert 0 < channel_variance(targets)[1] < 1e-5 and (channel_variance(torch.ones(2, 3, 4)) > 0).all()


def test_unexplained_is_a_share_of_the_variance_and_the_first_position_does_not_count():
    targets = torch.randn(4, 50, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-2, 1, 1, 1e3, 1, 1])
    variance, mean = channel_variance(targets), targets[:, 1:].mean((0, 1)).expand_as(targets)
    assert unexplained(targets, targets, variance) == 0
    assert unexplained(mean, targets, variance) == pytest.approx(1, rel=1e-4)
    assert unexplained((mean + targets) / 2, targets, variance) == pytest.approx(1 / 4, rel=1e-4)


@pytest.mark.parametrize("loss", losses.LOSSES.values(), ids=losses.LOSSES)
@pytest.mark.parametrize("size", [100.0, 0.5, 0.0])
def test_the_first_position_counts_as_much_as_others_however_large_it_is(loss, size):
    random = torch.Generator().manual_seed(0)
    targets = torch.randn(3, 9, 6, generator=random)
    targets[:, 0] *= size
    variance = channel_variance(targets)
    whole = {first: losses.position_weights(first, loss, targets, variance) for first in losses.POSITIONS}
    assert all(weights.mean().item() == pytest.approx(1) and len(weights[1:].unique()) == 1 for weights in whole.values())
    share = {first: (weights[0] / weights[1]).item() for first, weights in whole.items()}
    sizes = loss(torch.zeros_like(targets), targets, variance).mean(0)
    smaller = min(1.0, (sizes[1:].mean() / sizes[0]).item()) if sizes[0] else 1.0
    assert share == {"full": 1.0, "skipped": 0.0, "scaled": pytest.approx(smaller)}


@pytest.mark.parametrize("elements", [1, 50, 170, 2**20])  # one row at a time, several, all; the last part is shorter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("against", ["targets", "predictions"])
def test_prediction_losses_and_their_gradients_are_torchs(monkeypatch, elements, dtype, against):
    monkeypatch.setattr(losses, "ELEMENTS", elements)
    random = torch.Generator().manual_seed(0)
    found, wanted = (4 * torch.randn(13, 50, generator=random) for _ in range(2))
    targets = torch.randint(50, (13,), generator=random)
    ours, theirs = (found.to(dtype).requires_grad_() for _ in range(2))
    if against == "targets":
        loss, expected = losses.negative_log_likelihood(ours, targets), F.cross_entropy(theirs.float(), targets, reduction="none")
    else:
        p, q = wanted.log_softmax(-1), theirs.float().log_softmax(-1)
        loss, expected = kl_divergence(wanted, ours), (p.exp() * (p - q)).sum(-1)
        assert_close(kl_divergence(wanted, wanted), torch.zeros(13))
    assert_close(loss, expected)
    (3 * loss.mean()).backward()
    (3 * expected.mean()).backward()
    assert_close(ours.grad, theirs.grad)  # of its dtype, too
