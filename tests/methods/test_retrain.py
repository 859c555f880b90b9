"""Retraining: every zero stays, only what a method trains changes, and what diverges is rolled back."""

import copy
import math
from unittest.mock import Mock

import pytest
import torch
from fixtures.models import FLOAT32, make_model, zeros_stay
from torch.nn import functional as F

from recon import Callback, PruningConfig, RetrainingConfig, decompose, perplexity, prune, retrain
from recon.kernels.adapters import ADAPTERS
from recon.kernels.gradient_descent import Schedule
from recon.methods.retrain import NOT_FINITE, RETRAINED
from recon.runtime.seeds import generator

METHODS = ("full", *ADAPTERS, "norms")
CALL = {"dense", "seed", "callbacks"}  # arguments of `retrain`; all others are options


def halved(family: str = "llama"):
    """A dense model and its half: whatever magnitude leaves of it."""
    dense, model = make_model(family), make_model(family)
    return dense, model, prune(model, None, PruningConfig(criterion="magnitude"), execution=FLOAT32).masks


def run(model, tokens, masks=None, **options):
    call = {name: options.pop(name) for name in CALL & options.keys()}
    options = {"method": "masklora", "learning_rate": 3e-3, "rate": "absolute", "epochs": 1, "batch_size": 2} | options
    config = RetrainingConfig(options.pop("method"), **{f"retrain_{name}": value for name, value in options.items()})
    return retrain(model, tokens, config, masks=masks, execution=FLOAT32, **call)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_the_loss_keeps_every_zero_and_changes_only_what_it_trains(family, method, tokens):
    """The first loss is the pruned model's own: adapters change nothing at first. LoRA is shown before it is masked."""
    (_, model, masks), batch = halved(family), tokens(8, 12)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    matrices, pruned = {f"{name}.weight" for name in masks}, perplexity(model, batch, execution=FLOAT32).value
    told, filled, own = Mock(Callback), [], decompose(model).matrices().items()
    told.on_merged = lambda: filled.extend((matrix.weight[~masks[name]] != 0).any().item() for name, matrix in own)
    report = run(model, batch, masks, method=method, batch_size=8, epochs=32, callbacks=[told])
    assert report.status == RETRAINED and len(report.losses) == 32
    assert [call.args[0].item() for call in told.on_step.call_args_list] == report.losses
    assert report.losses[0] == pytest.approx(math.log(pruned), rel=1e-4)
    assert perplexity(model, batch, execution=FLOAT32).value < pruned
    assert filled == [True] * len(masks) * (method == "lora") and zeros_stay(decompose(model), masks)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    if method == "norms":
        assert changed and all(before[name].ndim == 1 for name in changed)
    else:
        assert matrices < changed if method == "full" else matrices == changed
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_biases_of_stacked_experts_are_biases_and_few_samples_are_passed_over_until_there_are_enough_steps(tokens):
    model = make_model("gpt_oss")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = retrain(model, tokens(8, 12), RetrainingConfig("norms", retrain_batch_size=2), execution=FLOAT32)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.endswith("gate_up_proj_bias") for name in changed) and len(report.losses) == 32
    assert not any(name.endswith(("gate_up_proj", "q_proj.weight")) for name in changed)


def test_full_retraining_is_masked_adamw_step_by_step(tokens):
    """Against the same in a few plain lines, which keep all activations."""
    _, model, masks = halved()
    batch, other = tokens(4, 12), copy.deepcopy(model)
    run(model, batch, masks, method="full", learning_rate=1e-3, batch_size=1, checkpointing=True, seed=7)
    schedule, optimizer = Schedule(1e-3, "absolute", batch_size=1), torch.optim.AdamW(other.parameters(), weight_decay=0.0)
    for step, index in enumerate(torch.randperm(4, generator=generator(7, "retrain"))):
        logits = other(batch[index : index + 1]).logits[0, :-1]
        optimizer.zero_grad()
        F.cross_entropy(logits, batch[index, 1:]).backward()
        optimizer.param_groups[0]["lr"] = 1e-3 * schedule.factor(step, 4)
        optimizer.step()
        with torch.no_grad():
            for name, matrix in decompose(other).matrices().items():
                matrix.weight.mul_(masks[name])
    torch.testing.assert_close([*model.parameters()], [*other.parameters()], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("which", ["on_step", "on_merged"])
def test_a_callback_that_fails_costs_no_zero_and_no_other_call(which, tokens):
    (_, model, masks), told = halved(), Mock(Callback)
    getattr(told, which).side_effect = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run(model, tokens(4, 12), masks, method="lora", callbacks=[told])
    assert told.on_merged.call_count == (which == "on_merged") and zeros_stay(decompose(model), masks)


def test_distillation_starts_at_the_divergence_and_lowers_it(tokens):
    (dense, model, masks), batch = halved(), tokens(4, 12)
    with torch.no_grad():
        p, q = (m(batch).logits[:, :-1].double().log_softmax(-1) for m in (dense, model))
        expected = (p.exp() * (p - q)).sum(-1).mean().item()
    report = run(model, batch, masks, objective="distil", dense=dense, epochs=5, batch_size=4, checkpointing=True)
    assert report.losses[0] == pytest.approx(expected, rel=1e-4) and report.losses[-1] < report.losses[0]


@pytest.mark.parametrize("method", ["full", "masklora", "norms"])
def test_what_diverges_is_rolled_back(method, tokens):
    _, model, masks = halved()
    before = copy.deepcopy(model)
    report = run(model, tokens(4, 12), masks, method=method, learning_rate=1e38, epochs=4)
    assert report.status == NOT_FINITE
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
