"""Masked AdamW and its schedule, on a matrix small enough to reason about."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from recon.config import ReconstructionConfig
from recon.kernels.gradient_descent import Schedule, Trained, descend, trained


@pytest.fixture
def problem():
    """A pruned weight (6, 6), its mask, and the `gradients` of its squared error on correlated inputs."""
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 6, generator=g) @ torch.randn(6, 6, generator=g)
    true = torch.randn(6, 6, generator=g)
    mask = torch.rand(6, 6, generator=g) > 0.5
    weight = nn.Parameter(true * mask)

    def gradients(step: int) -> torch.Tensor:
        loss = F.mse_loss(inputs @ weight.T, inputs @ true.T)
        loss.backward()
        return loss.detach()

    return weight, mask, gradients


# ---- schedule


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 32, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.3, 0.5, 1.0])
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


@pytest.mark.parametrize(
    "samples, epochs, batch_size, accumulation, steps",
    [(64, 1, 2, 1, 32), (64, 3, 2, 4, 24), (7, 1, 2, 1, 4), (7, 2, 2, 2, 4), (9, 1, 2, 2, 3), (1, 1, 8, 8, 1), (8, 1, 8, 1, 1)],
)
def test_step_counts(samples, epochs, batch_size, accumulation, steps):
    assert Schedule(epochs=epochs, batch_size=batch_size, accumulation=accumulation).steps(samples) == steps


# ---- descent


def test_each_step_is_as_large_as_the_schedule_says():
    """AdamW moves a weight whose gradient never changes by the learning rate, whatever the gradient's size."""
    weight, schedule, seen = nn.Parameter(torch.zeros(3)), Schedule(learning_rate=0.02, warmup=0.25), []

    def gradients(step: int) -> torch.Tensor:
        weight.grad = torch.tensor([1e-2, 1.0, -1e2])
        return torch.zeros(())

    descend(gradients, [Trained(weight)], schedule, 16, lambda loss: seen.append(weight.detach().clone()))
    moved = torch.stack([torch.zeros(3), *seen]).diff(dim=0)
    rates = torch.tensor([0.02 * schedule.factor(step, 16) for step in range(16)])
    assert_close(rates[:4], torch.tensor([0.005, 0.01, 0.015, 0.02]))
    assert_close(moved, -rates[:, None] * torch.tensor([1.0, 1.0, -1.0]), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("rate, moved", [("relative", [0.5, 0.1]), ("absolute", [0.1, 0.1])])
def test_a_relative_rate_is_times_the_size_of_each_parameter(rate, moved):
    large, small = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def gradients(step: int) -> torch.Tensor:
        large.grad, small.grad = torch.ones(3), torch.ones(3)
        return torch.zeros(())

    descend(gradients, [Trained(large, size=5.0), Trained(small)], Schedule(learning_rate=0.1, rate=rate), 1)
    assert_close(torch.stack([large, small]), -torch.tensor(moved)[:, None].expand(2, 3))


def test_sizes_are_those_of_what_survives():
    weight, mask = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, -4.0]])), torch.tensor([[True, False], [True, True]])
    zeros, norm = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.tensor([10.0, 10.0]))
    found = trained([weight, zeros, norm], {weight: mask})
    assert [each.parameter for each in found] == [weight, zeros, norm] and found[0].mask is mask
    size = (25 / 3) ** 0.5
    assert_close([each.size for each in found], [size, size, 10.0])  # a bias of zeros learns, too
    assert_close([each.size for each in trained([zeros, norm], {})], [50**0.5, 10.0])
    silent = nn.Parameter(torch.zeros(2, 2))  # and so does a matrix of zeros, at the size of all matrices together
    assert_close([each.size for each in trained([weight, silent], {weight: mask})], [size, (25 / 7) ** 0.5])


def test_dropped_weights_are_zero_after_every_step_and_the_loss_falls(problem):
    weight, mask, gradients = problem
    zeros, told = [], []

    def after_step(loss):
        zeros.append(torch.equal(weight == 0, ~mask))
        told.append(loss)

    losses = descend(gradients, [Trained(weight, mask)], Schedule(learning_rate=3e-2), 60, after_step)
    assert all(zeros) and len(zeros) == 60
    assert losses == [loss.item() for loss in told]
    assert losses[-1] < 0.8 * losses[0]
    assert weight.grad is None


def test_weight_decay_shrinks_what_no_gradient_holds():
    schedule = ReconstructionConfig(learning_rate=0.1, weight_decay=0.5).schedule(10)
    weight, mask = nn.Parameter(torch.tensor([4.0, -2.0, 1.0])), torch.tensor([True, True, False])

    def gradients(step: int) -> torch.Tensor:
        weight.grad = torch.zeros(3)
        return torch.zeros(())

    descend(gradients, [Trained(weight, mask)], schedule, 10)
    left = math.prod(1 - 0.5 * 0.1 * schedule.factor(step, 10) for step in range(10))
    assert left < 0.8
    assert_close(weight.detach(), left * torch.tensor([4.0, -2.0, 0.0]))


def test_without_a_mask_everything_is_trained(problem):
    weight, mask, gradients = problem
    descend(gradients, [Trained(weight)], Schedule(), 3)
    assert weight[~mask].all()


def test_no_steps_change_nothing(problem):
    weight, mask, gradients = problem
    before = weight.detach().clone()
    assert descend(gradients, [Trained(weight, mask)], Schedule(), 0) == []
    assert torch.equal(weight, before)
