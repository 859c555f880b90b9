"""The training loop, on a matrix small enough to reason about; adapters, of which merging loses no zero."""

import math
from unittest.mock import Mock

import pytest
import torch
from fixtures.families import small_model
from fixtures.models import FLOAT32, make_model
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.testing import assert_close

from recon import Callback, PruningConfig, ReconError, decompose, prune
from recon.kernels.adapters import ADAPTERS, ALPHA
from recon.kernels.gradient_descent import Schedule, Trained
from recon.kernels.losses import LOSSES, channel_variance
from recon.methods.training import adapted, train
from recon.runtime.seeds import generator


def problem():
    """Inputs and targets (8, 5, 6) of a linear map (6, 6), half of its weights as a start, and their mask.

    Inputs are correlated: with independent ones the surviving weights would be all but right already.
    """
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 5, 6, generator=g) @ torch.randn(6, 6, generator=g)
    true = torch.randn(6, 6, generator=g)
    mask = torch.rand(6, 6, generator=g) > 0.5
    return inputs, inputs @ true.T, true * mask, mask


def run(schedule, loss="mse", seed=0, see=lambda x, output: None, after_step=lambda weight: None):
    """The trained weight and the losses; `see` is called with every mini-batch and its output."""
    inputs, targets, start, mask = problem()
    weight = nn.Parameter(start.clone())

    def of_batch(x, y):
        output = F.linear(x, weight)
        see(x, output)
        return LOSSES[loss](output, y, channel_variance(targets)).mean()

    random, told = torch.Generator().manual_seed(seed), Mock(Callback)
    told.on_step.side_effect = lambda loss: after_step(weight)
    losses = train(of_batch, [inputs, targets], [Trained(weight, mask)], schedule, random, FLOAT32, [told])
    assert losses == [call.args[0].item() for call in told.on_step.call_args_list]
    return weight, losses


def pulled(slopes, schedule, *trained, steps=1):
    """Trains parameters whose gradients are always `slopes`."""
    pull = lambda x: sum((each.parameter * slopes).sum() for each in trained)  # noqa: E731
    train(pull, [torch.zeros(steps, 1)], list(trained), schedule, torch.Generator(), FLOAT32)


@pytest.mark.parametrize("rate, moved", [("relative", [0.5, 0.1]), ("absolute", [0.1, 0.1])])
def test_a_relative_rate_is_times_the_size_of_each_parameter(rate, moved):
    large, small = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    pulled(torch.ones(3), Schedule(learning_rate=0.1, rate=rate), Trained(large, size=5.0), Trained(small))
    assert_close(torch.stack([large, small]), -torch.tensor(moved)[:, None].expand(2, 3))


def test_weight_decay_shrinks_what_no_gradient_holds():
    schedule = Schedule(learning_rate=0.1, weight_decay=0.5, rate="absolute")
    weight = Trained(nn.Parameter(torch.tensor([4.0, -2.0, 1.0])), torch.tensor([True, True, False]))
    pulled(torch.zeros(3), schedule, weight, steps=10)
    left = math.prod(1 - 0.5 * 0.1 * schedule.factor(step, 10) for step in range(10))
    assert_close(weight.parameter.detach(), left * torch.tensor([4.0, -2.0, 0.0]))


@pytest.mark.parametrize("loss", LOSSES)
def test_training_lowers_the_loss_and_keeps_zeros_at_every_step(loss):
    zeros, mask, schedule = [], problem()[-1], Schedule(learning_rate=3e-2, epochs=20)
    weight, losses = run(schedule, loss, after_step=lambda weight: zeros.append(torch.equal(weight == 0, ~mask)))
    assert losses[-1] < 0.8 * losses[0] and weight.grad is None
    assert all(zeros) and len(zeros) == 160 and not weight[~mask].signbit().any()


def test_samples_are_shuffled_anew_each_epoch_by_the_generator():
    inputs, orders = problem()[0], []
    for seed in (0, 0, 1):
        seen = []
        run(Schedule(epochs=2), seed=seed, see=lambda x, _, seen=seen: seen.append(int((inputs == x[0]).all((1, 2)).nonzero())))
        orders.append(seen)
    assert sorted(orders[0][:8]) == sorted(orders[0][8:]) == list(range(8))
    assert orders[0][:8] != orders[0][8:] and orders[0] == orders[1] != orders[2]


def test_too_little_memory_for_one_sample_is_an_error():
    with pytest.raises(ReconError, match="one sample"):
        run(Schedule(batch_size=2), see=Mock(side_effect=torch.OutOfMemoryError("no room")))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_change_nothing_until_they_are_trained_and_merging_gives_the_formula_and_loses_no_zero(family, kind, tokens):
    decoder, batch = decompose(make_model(family)), tokens(2, 9)
    masks = prune(decoder, None, PruningConfig("random"), execution=FLOAT32).masks
    matrices, parameters, logits = decoder.matrices(), dict(decoder.model.named_parameters()), decoder.model(batch).logits
    before = {name: matrix.weight.detach().clone() for name, matrix in matrices.items()}
    given = [*matrices.values()], masks, kind, 4, generator(0, "test")
    with pytest.raises(RuntimeError, match="inside"), adapted(*given) as trained:
        assert_close(decoder.model(batch).logits, logits)
        assert all(each.parameter.is_leaf and each.parameter.requires_grad for each in trained)
        raise RuntimeError("inside")
    assert torch.equal(decoder.model(batch).logits, logits)
    after = dict(decoder.model.named_parameters())
    assert after.keys() == parameters.keys() and all(after[name] is parameters[name] for name in parameters)
    assert not any(parametrize.is_parametrized(module) for module in decoder.model.modules())
    with adapted(*given) as trained, torch.no_grad():
        for each in trained:
            each.parameter.normal_(generator=torch.Generator().manual_seed(each.parameter.numel()))
        low_rank = {name: b.parameter @ a.parameter for name, a, b in zip(matrices, trained[::2], trained[1::2], strict=True)}
    for name, matrix in matrices.items():
        product = ALPHA * low_rank[name]
        grown = before[name] * (1 + product) if kind == "scalelora" else before[name] + product
        assert_close(matrix.weight, grown * masks[name])
        assert not matrix.weight[~masks[name]].any() and not torch.equal(matrix.weight, before[name])


def test_what_adapters_draw_does_not_depend_on_which_expert_was_found_first():
    matrices, drawn = decompose(small_model("switch_transformers (encoder-decoder)")).matrices(), []
    masks = {name: torch.ones_like(matrix.weight, dtype=torch.bool) for name, matrix in matrices.items()}
    experts = [name for name, matrix in matrices.items() if matrix.routed]
    for order in (experts, experts[::-1]):
        names = [name for name in matrices if name not in experts] + order
        with adapted([matrices[name] for name in names], masks, "lora", 4, generator(0, "test")) as trained:
            drawn.append([each.parameter.detach().clone() for each in trained])
    assert len(experts) > 1 and all(map(torch.equal, *drawn))
