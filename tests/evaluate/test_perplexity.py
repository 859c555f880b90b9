"""Perplexity against the models' own loss, and distances between models."""

import copy
import math

import pytest
import torch
from fixtures.models import FAMILIES, FLOAT32
from torch.testing import assert_close

from recon import decompose, perplexity
from recon.evaluate.perplexity import SLICE, drift, last_states
from recon.kernels.losses import channel_variance, kl_divergence, unexplained
from recon.model.modules import watched


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_perplexity_is_the_models_own(tiny, tokens, family):
    model = tiny(family, max_position_embeddings=600) if family == "llama" else tiny(family)
    long = [tokens(2, 2 * SLICE + 30)] * (family == "llama")  # more than one slice
    for batch in (tokens(3, 64), tokens(2, 2), *long):  # 64: no more fit the model
        result = perplexity(model, batch, execution=FLOAT32)
        expected = [model(input_ids=window[None], labels=window[None], use_cache=False).loss.item() for window in batch]
        assert_close(result.per_window, expected, rtol=1e-5, atol=1e-5)
        assert result.value == pytest.approx(math.exp(sum(expected) / len(batch)), rel=1e-4)
        assert result.tokens == len(batch) * (batch.shape[1] - 1)


def test_the_divergence_from_a_reference_is_told(tiny, tokens):
    dense, model, batch = tiny("llama"), tiny("llama", seed=1), tokens(3, 12)
    reference = decompose(dense), last_states(decompose(dense), batch[:2], FLOAT32)
    found = perplexity(model, batch, execution=FLOAT32, reference=reference)
    with torch.no_grad():
        expected = [kl_divergence(dense(b[None]).logits[0, :-1], model(b[None]).logits[0, :-1]).mean().item() for b in batch]
    assert found.kl_per_window == pytest.approx(expected[:2], rel=1e-4)
    assert perplexity(dense, batch.int(), execution=FLOAT32, reference=reference).kl_per_window == pytest.approx([0, 0], abs=1e-6)


def test_float16_weights_run_on_the_cpu(tiny, tokens):
    model, batch = tiny("llama"), tokens(2, 12)
    assert perplexity(copy.deepcopy(model).half(), batch.tolist()).value == pytest.approx(
        perplexity(model, batch).value, rel=1e-2
    )


def test_a_hopeless_model_has_infinite_perplexity(tiny, tokens):
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    assert perplexity(model, tokens(1, 20), execution=FLOAT32).value == math.inf
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    assert math.isnan(perplexity(model, tokens(1, 20), execution=FLOAT32).value)


@torch.no_grad()
def test_drift_is_that_of_hidden_states(tiny, tokens):
    dense, batch = decompose(tiny("llama")), tokens(5, 12)
    model = copy.deepcopy(dense.model)
    model.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    student = decompose(model, like=dense)
    measured, states = drift(student, dense, batch, execution=FLOAT32)
    assert perplexity(model, batch, execution=FLOAT32, states=states) == perplexity(model, batch, execution=FLOAT32)
    seen = {}
    layers = {(which, n): layer for which, each in enumerate((dense.model, model)) for n, layer in enumerate(each.model.layers)}
    with watched(layers, after=lambda key, args, kwargs, output: seen.update({key: output})):
        dense.model(input_ids=batch, use_cache=False), model(input_ids=batch, use_cache=False)
    expected = [unexplained(seen[1, n], seen[0, n], channel_variance(seen[0, n])) for n in range(3)]
    assert measured[0] == 0 and min(measured[1:]) > 1e-3
    assert_close(measured, expected, rtol=1e-4, atol=1e-7)
