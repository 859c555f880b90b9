"""Perplexity against the models' own loss, and distances between models."""

import copy
import math

import pytest
import torch
from fixtures.models import FAMILIES, FLOAT32
from torch.testing import assert_close

from recon.errors import ReconError
from recon.evaluate import perplexity as evaluation
from recon.evaluate.perplexity import Reference, drift, last_states, perplexity
from recon.kernels.losses import channel_variance, kl_divergence, unexplained
from recon.model.discovery import decompose
from recon.runtime.activations import Activations
from recon.runtime.execution import Execution


@torch.no_grad()
def own_losses(model, tokens):
    """Mean negative log-likelihood of each window, by transformers itself."""
    return [model(input_ids=window[None], labels=window[None], use_cache=False).loss.item() for window in tokens]


# ---- perplexity


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slice_length", [7, 256])
def test_perplexity_is_the_models_own(tiny, tokens, monkeypatch, family, slice_length):
    monkeypatch.setattr(evaluation, "SLICE", slice_length)
    model, batch = tiny(family), tokens(3, 31)
    result = perplexity(model, batch, execution=FLOAT32)
    expected = own_losses(model, batch)
    assert_close(result.per_window, expected, rtol=1e-5, atol=1e-5)
    assert result.value == pytest.approx(math.exp(sum(expected) / 3), rel=1e-4)
    assert result.tokens == 3 * 30


@pytest.mark.parametrize(
    "family, setting, plain",
    [("gemma2", "final_logit_softcapping", None), ("cohere", "logit_scale", 1.0), ("granite", "logits_scaling", 1.0)],
)
def test_caps_and_scales_of_logits_count(tiny, tokens, family, setting, plain):
    model, batch = tiny(family), tokens(2, 20)
    capped = perplexity(model, batch, execution=FLOAT32).value
    setattr(model.config, setting, plain)
    for name in (setting, "logits_scaling"):  # some models read it once, when they are made
        if name in vars(model):
            setattr(model, name, plain)
    uncapped = perplexity(model, batch, execution=FLOAT32).value
    assert abs(capped / uncapped - 1) > 1e-3


def test_the_divergence_from_a_reference_is_told(tiny, tokens):
    dense, model, batch = tiny("llama"), tiny("llama", seed=1), tokens(3, 12)
    reference = Reference(decompose(dense), last_states(decompose(dense), batch[:2], FLOAT32))
    found = perplexity(model, batch, execution=FLOAT32, reference=reference)
    with torch.no_grad():
        expected = [kl_divergence(dense(b[None]).logits[0, :-1], model(b[None]).logits[0, :-1]).mean().item() for b in batch]
    assert found.kl_per_window == pytest.approx(expected[:2], rel=1e-4)
    assert perplexity(dense, batch, execution=FLOAT32, reference=reference).kl_per_window == pytest.approx([0, 0], abs=1e-6)


def test_windows_longer_than_a_slice(tiny, tokens):
    model, batch = tiny("llama", max_position_embeddings=600), tokens(2, 2 * evaluation.SLICE + 30)
    result = perplexity(model, batch, execution=FLOAT32)
    assert_close(result.per_window, own_losses(model, batch), rtol=1e-5, atol=1e-5)


def test_shortest_windows(tiny, tokens):
    model, batch = tiny("llama"), tokens(2, 2)
    assert_close(
        perplexity(model, batch, execution=FLOAT32).per_window,
        own_losses(model, batch),
        rtol=1e-5,
        atol=1e-5,
    )


def test_bfloat16_is_close_and_not_the_same(tiny, tokens):
    decoder, batch = decompose(tiny("llama")), tokens(2, 31)
    one, other = (perplexity(decoder, batch, execution=Execution("cpu", dtype)).value for dtype in ("float32", "bfloat16"))
    assert one != other
    assert other == pytest.approx(one, rel=0.05)


def test_a_hopeless_model_has_infinite_perplexity(tiny, tokens):
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    assert perplexity(model, tokens(1, 20), execution=FLOAT32).value == math.inf


@pytest.mark.parametrize("family, longest", [("llama", 64), ("gpt2", 64), ("opt", 64)])
def test_too_long_sequences_are_refused(tiny, tokens, family, longest):
    model = tiny(family)
    perplexity(model, tokens(1, longest))
    with pytest.raises(ReconError, match="65 .* 64 tokens"):
        perplexity(model, tokens(1, longest + 1))


# ---- distances


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_drift_from_itself_is_nothing(tiny, tokens, family):
    decoder = decompose(tiny(family))
    assert drift(decoder, decoder, tokens(3, 12), execution=FLOAT32)[0] == [0.0, 0.0, 0.0]


@torch.no_grad()
def test_drift_is_that_of_hidden_states(tiny, tokens):
    dense, batch = decompose(tiny("llama")), tokens(5, 12)
    model = copy.deepcopy(dense.model)
    model.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    found, states = drift(decompose(model, like=dense), dense, batch, execution=FLOAT32)
    known = perplexity(model, batch, execution=FLOAT32, states=states)
    assert known == perplexity(model, batch, execution=FLOAT32)
    seen = {}
    for which in (dense.model, model):
        handles = [
            layer.register_forward_hook(lambda m, a, out, key=(which, n): seen.update({key: out}))
            for n, layer in enumerate(which.model.layers)
        ]
        which(input_ids=batch, use_cache=False)
        for handle in handles:
            handle.remove()
    ours, theirs = ([seen[which, n] for n in range(3)] for which in (model, dense.model))
    assert found[0] == 0
    assert min(found[1:]) > 1e-3
    assert_close(found, [unexplained(a, b, channel_variance(b)) for a, b in zip(ours, theirs, strict=True)], rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_drift_shares_what_it_knows_of_the_dense_model(tiny, tokens, monkeypatch):
    dense, batch = decompose(tiny("llama")), tokens(5, 12)
    model = copy.deepcopy(dense.model)
    model.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    student, kept = decompose(model, like=dense), Activations()
    alone = drift(student, dense, batch)[0]
    assert drift(student, dense, batch, activations=kept)[0] == alone
    run = evaluation.residual_streams
    monkeypatch.setattr(
        evaluation, "residual_streams", lambda decoder, *a: pytest.fail() if decoder is dense else run(decoder, *a)
    )
    assert drift(student, dense, batch, activations=kept)[0] == alone
