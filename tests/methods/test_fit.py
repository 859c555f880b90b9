"""The gradient solver on windows small enough to reason about."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from recon.errors import ReconError
from recon.kernels.gradient_descent import Schedule
from recon.kernels.losses import cosine, get_loss, mse
from recon.methods.fit import fit
from recon.runtime.execution import Execution


def problem(samples=8, length=5, width=6, scale=1.0, seed=0):
    """Inputs and targets of a linear map (width, width), and half of its weights as a start.

    Inputs are correlated: with independent ones the surviving weights would be all but right already.
    """
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, length, width, generator=g) @ torch.randn(width, width, generator=g)
    true = torch.randn(width, width, generator=g)
    mask = torch.rand(width, width, generator=g) > 0.5
    return inputs * scale, inputs @ true.T * scale, true * mask, mask


def run(schedule, loss="mse", seed=0, scale=1.0, samples=8):
    inputs, targets, start, mask = problem(samples, scale=scale)
    weight = nn.Parameter(start.clone())
    random = torch.Generator().manual_seed(seed)
    curve = fit(
        lambda x: F.linear(x, weight),
        [weight],
        [(weight, mask)],
        inputs,
        targets,
        loss,
        schedule,
        random,
        Execution("cpu", "float32"),
    )
    return weight, curve.losses, mask


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
    [
        (64, 1, 2, 1, 32),
        (64, 3, 2, 4, 24),
        (7, 1, 2, 1, 4),
        (7, 2, 2, 2, 4),
        (9, 1, 2, 2, 3),
        (1, 1, 8, 8, 1),
        (8, 1, 8, 1, 1),
    ],
)
def test_step_counts(samples, epochs, batch_size, accumulation, steps):
    schedule = Schedule(epochs=epochs, batch_size=batch_size, accumulation=accumulation)
    assert schedule.steps(samples) == steps
    assert len(run(schedule, samples=samples)[1]) == steps


def test_learning_rates_reach_the_optimiser(monkeypatch):
    used, step = [], torch.optim.AdamW.step

    def record(self, *args, **kwargs):
        used.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    schedule = Schedule(learning_rate=0.02, epochs=2, batch_size=1, warmup=0.25)
    run(schedule)
    assert_close(used, [0.02 * schedule.factor(n, 16) for n in range(16)])
    assert_close(used[:4], [0.005, 0.01, 0.015, 0.02])


# ---- fitting


@pytest.mark.parametrize("loss", ["mse", "cosine", "relative"])
def test_fitting_lowers_the_loss_and_keeps_zeros(loss):
    weight, losses, mask = run(Schedule(learning_rate=3e-2, epochs=20), loss)
    assert losses[-1] < 0.8 * losses[0]
    assert (weight[~mask] == 0).all() and (weight[mask] != 0).all()
    assert weight.grad is None


@pytest.mark.parametrize("loss", ["mse", "cosine", "relative"])
@pytest.mark.parametrize("samples", [8, 7])
def test_accumulation_is_a_larger_batch(loss, samples):
    whole = run(Schedule(batch_size=4, epochs=3), loss, samples=samples)
    for batch_size, accumulation in ((1, 4), (2, 2)):
        parts = run(Schedule(batch_size=batch_size, accumulation=accumulation, epochs=3), loss, samples=samples)
        assert_close(parts[0], whole[0], rtol=1e-4, atol=1e-5)
        assert_close(parts[1], whole[1], rtol=1e-4, atol=1e-6)


def test_uneven_parts_weigh_by_their_samples():
    # Three samples in one step, as two and one: the loss is the mean over the three.
    inputs, targets, start, _ = problem(3)
    _, losses, _ = run(Schedule(batch_size=2, accumulation=2), samples=3)
    expected = (inputs @ start.T - targets).square().mean() / targets.square().mean()
    assert_close(losses, [expected.item()])


def test_loss_of_each_step_is_that_before_the_step():
    inputs, targets, start, _ = problem()
    _, losses, _ = run(Schedule(batch_size=8))
    assert_close(losses, [((inputs @ start.T - targets).square().mean() / targets.square().mean()).item()])
    _, losses, _ = run(Schedule(batch_size=8), "cosine")
    assert_close(losses, [cosine(inputs @ start.T, targets).item()])


@pytest.mark.parametrize("loss", ["mse", "cosine", "relative"])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_size_of_activations_does_not_matter(loss, scale):
    schedule = Schedule(learning_rate=1e-2, epochs=5)
    plain, scaled = run(schedule, loss), run(schedule, loss, scale=scale)
    assert_close(scaled[1], plain[1], rtol=1e-3, atol=1e-5)
    assert_close(scaled[0], plain[0], rtol=1e-3, atol=1e-4)


def test_samples_are_shuffled_anew_each_epoch_by_the_generator():
    inputs, targets, start, mask = problem()
    orders = []
    for seed in (0, 0, 1):
        weight, seen = nn.Parameter(start.clone()), []

        def forward(x, weight=weight, seen=seen):
            seen.extend(int((inputs == row).all((1, 2)).nonzero()) for row in x)
            return F.linear(x, weight)

        random = torch.Generator().manual_seed(seed)
        fit(
            forward,
            [weight],
            [(weight, mask)],
            inputs,
            targets,
            "mse",
            Schedule(epochs=2),
            random,
            Execution("cpu", "float32"),
        )
        orders.append(seen)
    assert sorted(orders[0][:8]) == sorted(orders[0][8:]) == list(range(8))
    assert orders[0][:8] != orders[0][8:]
    assert orders[0] == orders[1] != orders[2]


def test_trained_in_float32_under_autocast():
    inputs, targets, start, mask = problem()
    weight, dtypes = nn.Parameter(start.clone()), []

    def forward(x):
        output = F.linear(x, weight)
        dtypes.append(output.dtype)
        return output

    amp = Execution("cpu", "bfloat16")
    random = torch.Generator().manual_seed(0)
    losses = fit(forward, [weight], [(weight, mask)], inputs, targets, "mse", Schedule(epochs=3), random, amp).losses
    assert set(dtypes) == {torch.bfloat16} and weight.dtype == torch.float32
    assert losses[-1] < losses[0]
    assert (weight[~mask] == 0).all()
    assert not torch.equal(weight, weight.bfloat16().float())


# ---- losses


def test_mse_by_hand():
    output, target = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 4.0]]])
    assert mse(output, target).item() == pytest.approx((4 + 9) / 4)


def test_cosine_by_hand():
    output, target = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]), torch.tensor([[[5.0, 0.0], [0.0, 2.0]]])
    assert cosine(output, target).item() == pytest.approx((0 + 1 - 1 / math.sqrt(2)) / 2, abs=1e-6)


@pytest.mark.parametrize("loss", [mse, cosine])
def test_losses_are_in_float32(loss):
    value = loss(torch.full((1, 2, 3), 300.0).half(), torch.full((1, 2, 3), -300.0).half())
    assert value.dtype == torch.float32 and value.isfinite()


def test_unknown_loss_is_refused():
    with pytest.raises(ReconError, match="unknown loss 'kl'; allowed: mse, cosine"):
        get_loss("kl")


def test_gradient_norms_are_those_of_every_eighth_step():
    inputs, targets, start, mask = problem(20)
    weight = nn.Parameter(start.clone())
    scale = targets.square().mean()
    order = torch.Generator().manual_seed(0)
    first = torch.randperm(20, generator=order)[0]
    expected = torch.autograd.grad(F.mse_loss(F.linear(inputs[first], weight), targets[first]), weight)[0].norm() / scale
    random = torch.Generator().manual_seed(0)
    curve = fit(
        lambda x: F.linear(x, weight),
        [weight],
        [(weight, mask)],
        inputs,
        targets,
        "mse",
        Schedule(),
        random,
        Execution("cpu", "float32"),
    )
    assert len(curve.losses) == 20 and len(curve.gradient_norms) == 3
    assert_close(curve.gradient_norms[0], expected.item(), rtol=1e-4, atol=0)
