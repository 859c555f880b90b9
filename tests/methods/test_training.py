"""Mini-batches of samples: their order, their weights in a step, and what becomes of them where memory runs out."""

import pytest
import torch
from fixtures.models import FLOAT32
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from recon.errors import ReconError
from recon.kernels.gradient_descent import Schedule, Trained
from recon.kernels.losses import LOSSES, channel_variance
from recon.methods.training import train
from recon.runtime.execution import Execution


def problem(samples: int = 8):
    """Inputs and targets (samples, 5, 6) of a linear map (6, 6), half of its weights as a start, and their mask.

    Inputs are correlated: with independent ones the surviving weights would be all but right already.
    """
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 5, 6, generator=g) @ torch.randn(6, 6, generator=g)
    true = torch.randn(6, 6, generator=g)
    mask = torch.rand(6, 6, generator=g) > 0.5
    return inputs, inputs @ true.T, true * mask, mask


def run(schedule, loss="mse", samples=8, seed=0, execution=FLOAT32, see=lambda x, output: None):
    """The trained weight, the losses, and the mask; `see` is called with every mini-batch and its output."""
    inputs, targets, start, mask = problem(samples)
    weight = nn.Parameter(start.clone())

    def of_batch(x, y):
        with execution:
            output = F.linear(x, weight)
        see(x, output)
        return LOSSES[loss](output, y, channel_variance(targets)).mean()

    random = torch.Generator().manual_seed(seed)
    losses = train(of_batch, [inputs, targets], [Trained(weight, mask)], schedule, random, execution)
    return weight, losses, mask


@pytest.mark.parametrize("loss", LOSSES)
def test_training_lowers_the_loss_and_keeps_zeros(loss):
    weight, losses, mask = run(Schedule(learning_rate=3e-2, epochs=20), loss)
    assert losses[-1] < 0.8 * losses[0]
    assert (weight[~mask] == 0).all() and (weight[mask] != 0).all()
    assert weight.grad is None


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("samples", [8, 7])
def test_accumulation_is_a_larger_batch(loss, samples):
    whole = run(Schedule(batch_size=4, epochs=3), loss, samples)
    assert len(whole[1]) == 6
    for batch_size, accumulation in ((1, 4), (2, 2)):
        parts = run(Schedule(batch_size=batch_size, accumulation=accumulation, epochs=3), loss, samples)
        assert_close(parts[0], whole[0], rtol=1e-4, atol=1e-5)
        assert_close(parts[1], whole[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_the_loss_is_that_before_the_step_and_uneven_parts_weigh_by_their_samples(loss):
    # Three samples in one step, as two and one: the loss is the mean over the three.
    inputs, targets, start, _ = problem(3)
    _, losses, _ = run(Schedule(batch_size=2, accumulation=2), loss, samples=3)
    assert_close(losses, [LOSSES[loss](inputs @ start.T, targets, channel_variance(targets)).mean().item()])


def test_samples_are_shuffled_anew_each_epoch_by_the_generator():
    inputs, orders = problem()[0], []
    for seed in (0, 0, 1):
        seen = []
        run(Schedule(epochs=2), seed=seed, see=lambda x, _, seen=seen: seen.append(int((inputs == x[0]).all((1, 2)).nonzero())))
        orders.append(seen)
    assert sorted(orders[0][:8]) == sorted(orders[0][8:]) == list(range(8))
    assert orders[0][:8] != orders[0][8:]
    assert orders[0] == orders[1] != orders[2]


def test_trained_in_float32_under_autocast():
    dtypes = set()
    amp = Execution("cpu", "bfloat16")
    weight, losses, mask = run(Schedule(epochs=3), execution=amp, see=lambda x, output: dtypes.add(output.dtype))
    assert dtypes == {torch.bfloat16} and weight.dtype == torch.float32
    assert losses[-1] < losses[0]
    assert (weight[~mask] == 0).all()
    assert not torch.equal(weight, weight.bfloat16().float())


def test_where_memory_runs_out_smaller_batches_give_the_same_weights():
    execution, sizes = Execution("cpu", "float32"), []

    def see(x, output):
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("no room")

    found, plain = run(Schedule(batch_size=7), execution=execution, see=see), run(Schedule(batch_size=7))
    assert sizes == [7, 4, 2, 2, 2, 1, 1]  # tried; then one step of seven, and one of the eighth sample
    assert execution.micro_batch == 2  # also for what is trained next
    assert_close(found[0], plain[0])
    assert_close(found[1], plain[1])


def test_too_little_memory_for_one_sample_is_an_error():
    def see(x, output):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(ReconError, match="one sample"):
        run(Schedule(batch_size=2), execution=Execution("cpu", "float32"), see=see)
