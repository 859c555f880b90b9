"""The execution: weights rounded and moved for a while, and the same results from elsewhere."""

import pytest
import torch
from fixtures.models import copied

from recon import Execution, PruningConfig, ReconstructionConfig, decompose, perplexity, prune, reconstruct
from recon.evaluate.perplexity import drift


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "phi"])
def test_rounded_weights_give_the_bits_of_autocast(tiny, tokens, family):
    decoder, execution = decompose(tiny(family)), Execution("cpu", "bfloat16")
    window = decoder.windows("2-blocks")[0]
    with execution.autocast(), torch.no_grad():
        hidden = decoder.embed(tokens(2, 12))
        expected = decoder.forward(window, hidden)
        with execution.holding(decoder, window):
            assert torch.equal(decoder.forward(window, hidden), expected)


def test_weights_are_rounded_for_a_while_and_what_is_trained_is_written_back(tiny, monkeypatch):
    """Also if something fails; the other half of the block, which is silenced, stays where it is."""
    monkeypatch.setattr(Execution, "elsewhere", lambda self, tensor: True)  # and is copied there and back
    decoder, execution = decompose(tiny("llama")), Execution("cpu", "bfloat16")
    window = decoder.windows("half-block")[0]
    before = {name: (p, p.data.clone(), p.data_ptr()) for name, p in decoder.model.named_parameters()}
    trained, rounded = decoder.trained(window, "matrices"), "model.layers.0.self_attn.q_proj.weight"
    del trained[rounded]
    needed = {name for name in before if name.startswith("model.layers.0.") and ".mlp." not in name}
    with pytest.raises(KeyError), execution.holding(decoder, window, trained.values()), torch.no_grad():
        for name, (p, data, place) in before.items():
            assert (p.data_ptr() != place) == (name in needed)
            assert torch.equal(p, data.bfloat16() if name == rounded else data)
            p += 1
        raise KeyError
    for name, (p, data, place) in before.items():
        kept = name in trained or name not in needed
        assert p.data_ptr() == place and torch.equal(p, data + 1 if kept else data)


@pytest.mark.parametrize("options", [
    {}, {"start": "exact"}, {"granularity": "matrix", "adapter": "masklora"}, {"propagation": "mixed", "granularity": "block"},
])  # fmt: skip
def test_a_model_that_lives_elsewhere_gives_the_same_bits(tiny, tokens, monkeypatch, options):
    dense, samples, held_out = decompose(tiny("llama")), tokens(5, 16), tokens(3, 16, seed=1)

    def results():
        student, execution = copied(dense), Execution(compute_dtype="bfloat16", progress=False)
        prune(student, samples, PruningConfig(criterion="sparsegpt"), execution=execution)
        config = ReconstructionConfig(epochs=1, **options)
        reconstruct(student, dense, samples, config, held_out=held_out, execution=execution)
        measured = drift(student, dense, held_out)[0], perplexity(student, held_out, execution=execution)
        return [p.clone() for p in student.model.parameters()], measured

    near, moved = results(), []
    monkeypatch.setattr(Execution, "elsewhere", lambda self, tensor: moved.append(1) or True)
    far = results()
    assert moved and all(torch.equal(a, b) for a, b in zip(near[0], far[0], strict=True))
    assert near[1] == far[1]
