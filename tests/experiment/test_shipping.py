"""Decoders and tensors arrive as they were sent."""

import pickle

import pytest
import torch
from fixtures.models import ENCODER_DECODERS, make_model, random_tokens

from recon.experiment.shipping import Packed, revived, twin, without_weights
from recon.model.discovery import take_apart
from recon.model.skeleton import is_placeholder

pytest.importorskip("ray")


@pytest.mark.parametrize(
    "tensor", [torch.randn(3, 5).T, torch.randn(4, 1).bfloat16(), torch.tensor(7), torch.ones(2, 0), torch.eye(2) > 0]
)
def test_tensors_arrive_as_they_were(tensor):
    found = pickle.loads(pickle.dumps(Packed.of(tensor))).tensor()
    assert torch.equal(found, tensor) and found.dtype == tensor.dtype


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral", "t5", "bart"])
def test_a_decoder_arrives_without_weights_and_runs_on_those_that_it_is_given(family):
    tied = {"tie_word_embeddings": True} if family == "llama" else {}
    model = make_model(family, **tied)
    decoder, before = take_apart(model), {name: p.clone() for name, p in model.named_parameters()}
    sent = without_weights(decoder)
    assert not any(p.detach().numpy().tobytes() in sent for p in model.parameters() if p.ndim > 1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    given = {}
    one = revived(sent, given.get)
    other = twin(one, lambda name: None if given.get(name) is None else 2 * given[name])
    doubled = take_apart(make_model(family, **tied), like=decoder)
    hidden = decoder.embed(random_tokens(2, 10))
    with torch.no_grad():
        for parameter, own in zip(doubled.model.parameters(), model.parameters(), strict=True):
            parameter.copy_(2 * own)
        for window in decoder.windows("block" if family in ENCODER_DECODERS else "half-block"):
            needed = {id(tensor) for tensor in decoder.needed(window)}
            given.clear()
            given.update({name: p for name, p in model.named_parameters() if id(p) in needed})
            for made, wanted in ((one, decoder), (other, doubled)):
                with made.loaded(window):
                    assert torch.equal(made.forward(window, hidden), wanted.forward(window, hidden))
                assert all(is_placeholder(p) for p in made.model.parameters())
            with pytest.raises(KeyError), one.loaded(decoder.windows("model")[0]):
                pass
