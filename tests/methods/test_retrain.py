import copy

import pytest
import torch
from fixtures.models import FLOAT32, make_model
from torch.nn import functional as F

from recon.config import PruningConfig
from recon.errors import ReconError
from recon.evaluate.perplexity import Reference, last_states, perplexity
from recon.kernels.gradient_descent import Schedule
from recon.kernels.losses import kl_divergence
from recon.methods.prune import prune
from recon.methods.retrain import METHODS, retrain
from recon.model.discovery import take_apart
from recon.runtime.execution import Execution
from recon.runtime.seeds import generator

QUICK = Schedule(learning_rate=3e-3, batch_size=2)


def halved(family: str = "llama"):
    """A dense model and its half: whatever magnitude leaves of it."""
    dense = make_model(family)
    model = copy.deepcopy(dense)
    return dense, model, prune(model, PruningConfig(criterion="magnitude"), execution=Execution(progress=False)).masks


def run(model, tokens, masks=None, **options):
    options = {"schedule": QUICK, "compute_dtype": "float32", "progress": False} | options
    return retrain(model, tokens, masks=masks, **options)


def zeros_hold(model, masks) -> bool:
    return not any(matrix.weight[~masks[name]].any() for name, matrix in take_apart(model).matrices().items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_the_loss_and_keeps_every_zero(family, method, tokens):
    _, model, masks = halved(family)
    batch = tokens(8, 12)
    before = perplexity(model, batch, execution=FLOAT32).value
    report = run(model, batch, masks, method=method, schedule=Schedule(3e-3, epochs=8, batch_size=2))
    assert perplexity(model, batch, execution=FLOAT32).value < before
    assert zeros_hold(model, masks)
    assert len(report.losses) == 32 and len(report.gradient_norms) == 4
    assert report.status == "retrained" and (report.movement > 0) == (method != "norms")


@pytest.mark.parametrize("method", METHODS)
def test_only_what_a_method_trains_changes(method, tokens):
    _, model, masks = halved("opt")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    matrices = {f"{name}.weight" for name in take_apart(model).matrices()}
    run(model, tokens(4, 12), masks, method=method)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    if method == "norms":
        assert changed and all(before[name].ndim == 1 for name in changed)
    elif method == "full":
        assert matrices < changed
    else:
        assert changed == matrices
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_full_retraining_is_masked_adamw_step_by_step(tokens):
    """Against the same in a few plain lines."""
    _, model, masks = halved()
    batch, other = tokens(4, 12), copy.deepcopy(model)
    run(model, batch, masks, method="full", schedule=Schedule(1e-3, batch_size=1), seed=7)
    schedule = Schedule(1e-3, batch_size=1)
    optimizer = torch.optim.AdamW(other.parameters(), weight_decay=0.0)
    for step, index in enumerate(torch.randperm(4, generator=generator(7, "retrain"))):
        logits = other(batch[index : index + 1]).logits[0, :-1]
        optimizer.zero_grad()
        F.cross_entropy(logits, batch[index, 1:]).backward()
        optimizer.param_groups[0]["lr"] = 1e-3 * schedule.factor(step, 4)
        optimizer.step()
        with torch.no_grad():
            for name, matrix in take_apart(other).matrices().items():
                matrix.weight.mul_(masks[name])
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_lora_by_peft_equals_the_adapter_of_windows_before_merging(tokens):
    """`peft` and `recon.kernels.adapters` are one function; with B at zero the first loss is the pruned model's own."""
    _, model, masks = halved()
    batch = tokens(4, 12)
    expected = F.cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).item()
    filled = []
    report = run(
        model, batch, masks, method="lora", schedule=Schedule(1e-2, batch_size=4, epochs=3),
        merged=lambda: filled.append(all((m.weight[~masks[n]] != 0).any() for n, m in take_apart(model).matrices().items())),
    )  # fmt: skip
    assert report.losses[0] == pytest.approx(expected, rel=1e-4)
    assert filled == [True] and zeros_hold(model, masks)


def test_distillation_starts_at_the_divergence_and_lowers_it(tokens):
    dense, model, masks = halved()
    batch = tokens(4, 12)
    with torch.no_grad():
        p, q = (m(batch).logits[:, :-1].double().log_softmax(-1) for m in (dense, model))
        expected = (p.exp() * (p - q)).sum(-1).mean().item()
    report = run(model, batch, masks, retrain_objective="distil", dense=dense, schedule=Schedule(3e-3, epochs=5, batch_size=4))
    assert report.losses[0] == pytest.approx(expected, rel=1e-4)
    assert report.losses[-1] < report.losses[0]
    assert zeros_hold(model, masks)


@pytest.mark.parametrize("method", ["full", "masklora"])
def test_checkpointing_and_accumulation_change_nothing(method, tokens):
    _, model, masks = halved()
    batch, other = tokens(4, 12), copy.deepcopy(model)
    run(model, batch, masks, method=method, schedule=Schedule(1e-3, batch_size=2))
    run(other, batch, masks, method=method, schedule=Schedule(1e-3, batch_size=1, accumulation=2), checkpointing=True)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_generator_alone(tokens):
    found = []
    for _ in range(2):
        _, model, masks = halved()
        state = torch.random.get_rng_state()
        run(model, tokens(4, 12), masks, method="lora")
        assert torch.equal(torch.random.get_rng_state(), state)
        found.append(model)
    assert all(torch.equal(a, b) for a, b in zip(found[0].parameters(), found[1].parameters(), strict=True))


@pytest.mark.parametrize("method", ["full", "masklora", "norms"])
def test_what_diverges_is_restored(method, tokens):
    _, model, masks = halved()
    before = copy.deepcopy(model)
    report = run(model, tokens(4, 12), masks, method=method, schedule=Schedule(1e38, epochs=4))
    assert report.status == "rolled back: not finite"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_masks_default_to_what_is_not_zero(tokens):
    _, model, masks = halved()
    run(model, tokens(4, 12), method="masklora")
    assert zeros_hold(model, masks)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "dora"}, "unknown retraining method 'dora'; allowed: full, lora"),
        ({"retrain_objective": "rl"}, "unknown objective 'rl'; allowed: labels, distil"),
        ({"retrain_objective": "distil"}, "needs `dense`"),
    ],
)
def test_bad_options_are_refused(options, words, tokens):
    _, model, _ = halved()
    with pytest.raises(ReconError, match=words):
        run(model, tokens(2, 12), **options)


def test_perplexity_tells_the_divergence_from_a_reference(tokens):
    dense, model, _ = halved()
    batch = tokens(3, 12)
    reference = Reference(take_apart(dense), last_states(take_apart(dense), batch[:2], Execution("cpu", "float32")))
    found = perplexity(model, batch, execution=FLOAT32, reference=reference)
    with torch.no_grad():
        expected = [kl_divergence(dense(b[None]).logits[0, :-1], model(b[None]).logits[0, :-1]).mean().item() for b in batch]
    assert found.kl_per_window == pytest.approx(expected[:2], rel=1e-4)
    assert perplexity(dense, batch, execution=FLOAT32, reference=reference).kl_per_window == pytest.approx([0, 0], abs=1e-6)
