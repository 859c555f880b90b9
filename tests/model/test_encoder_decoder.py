"""Encoder-decoders: both stacks as one chain of blocks, the encoder's first."""

import copy

import pytest
import torch
from fixtures.models import ENCODER_DECODERS, FLOAT32, composed, copied, make_model, random_tokens, zeros_stay
from torch.testing import assert_close
from transformers.models.t5.modeling_t5 import T5Attention

from recon import Execution, PruningConfig, ReconError, RetrainingConfig, decompose, prune, retrain
from recon.data.models import load_pruned
from recon.methods.masks import take_over
from recon.methods.statistics import gather
from recon.model.modules import requiring_gradients, watched


@torch.no_grad()
def own_logits(model, tokens):
    middle = tokens.shape[1] // 2
    return model(input_ids=tokens[:, :middle], decoder_input_ids=tokens[:, middle:], use_cache=False).logits


@pytest.mark.parametrize("family", ENCODER_DECODERS)
@torch.no_grad()
def test_windows_are_the_model_each_changes_its_own_half_and_a_decoder_block_reads_both(made, family):
    decoder, tokens = made(family), random_tokens(3, 13)
    assert len(decoder.blocks) == 4 and len(decoder.structure.stacks) == 2
    for granularity in ("2-blocks", "model"):
        assert_close(composed(decoder, tokens, granularity), own_logits(decoder.model, tokens), rtol=1e-4, atol=1e-4)
    hidden = decoder.embed(random_tokens(2, 12))
    for index, window in enumerate(decoder.windows("block")):
        own, other = (slice(6), slice(6, 12)) if index < 2 else (slice(6, 12), slice(6))
        output = decoder.forward(window, hidden)
        assert torch.equal(output[:, other], hidden[:, other]) and not torch.equal(output[:, own], hidden[:, own])
        disturbed = hidden.clone()
        disturbed[:, other] += torch.randn(hidden[:, other].shape, generator=torch.Generator().manual_seed(0))
        encoder = index < 2  # which knows nothing of what the decoder reads
        assert torch.equal(decoder.forward(window, disturbed)[:, own], output[:, own]) == encoder
    for granularity in ("matrix", "half-block"):
        with pytest.raises(ReconError, match=f"granularity '{granularity}' does not fit .* is reconstructed by whole blocks"):
            decoder.windows(granularity)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
@torch.no_grad()
def test_statistics_are_those_of_the_model_as_a_whole(made, family):
    """Also for a batch of a shape not met before, for which the model is run to see what its blocks are called with."""
    decoder, tokens, seen = decompose(copy.deepcopy(made(family).model)), random_tokens(5, 14), {}
    modules = {name: matrix.module for name, matrix in decoder.matrices().items()}
    with watched(modules, lambda name, args, kwargs: seen.update({name: args[0].flatten(0, -2)})):
        own_logits(decoder.model, tokens)
    execution, gathered = Execution("cpu", "float32"), {}
    stream = execution.run(decoder.embed, tokens)
    for window in decoder.windows("block"):
        stream, statistics, _ = gather(execution, decoder, window, stream, "norm")
        gathered |= statistics
    assert_close(gathered, {name: x.square().mean(0).sqrt() for name, x in seen.items()}, rtol=1e-3, atol=1e-5)


def test_what_blocks_share_is_found_and_belongs_to_no_window(made, tmp_path):
    """Biases of relative positions: each block is called with those of its own model, however it was made."""
    dense, tokens = made("t5"), random_tokens(16, 16)
    biases = {f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for half in ("encoder", "decoder")}
    assert dense.structure.shared == biases and not made("bart").structure.shared
    first = dense.windows("block")[0]
    assert biases & set(dense.parameters(first)) and not biases & set(dense.trained(first, "all"))
    student, other = copied(dense), copied(dense)
    masks = prune(student, tokens, PruningConfig(criterion="wanda"), execution=Execution(progress=False)).masks
    composed(student, tokens[:2], "block"), composed(other, tokens[:2], "block")
    config = RetrainingConfig(retrain="full", retrain_learning_rate=0.01, retrain_rate="absolute")
    retrain(student, tokens, config, masks=masks, execution=FLOAT32)
    student.model.save_pretrained(tmp_path)
    take_over(other, load_pruned(str(tmp_path), dense.model), FLOAT32)
    for decoder in (student, other, decompose(make_model("t5", seed=1), like=dense), dense):
        assert_close(composed(decoder, tokens[:2], "block"), own_logits(decoder.model, tokens[:2]), rtol=1e-4, atol=1e-4)
    assert all(not torch.equal(student.model.get_parameter(name), dense.model.get_parameter(name)) for name in biases)
    assert zeros_stay(student, masks)


def test_finding_what_blocks_are_called_with_spoils_no_training_in_half_precision(made):
    """It is found with placeholders, which autocast by itself would round and go on with when weights are trained."""
    dense = made("t5")
    window, losses, execution = dense.windows("2-blocks")[0], [], Execution("cpu", "bfloat16")
    with execution.autocast(), requiring_gradients(dense.parameters(window).values()):
        hidden = execution.embed(dense, random_tokens(1, 16))
        for _ in range(2):
            dense.forget()
            losses.append(dense.forward(window, hidden).square().mean().item())
    assert losses[0] == losses[1]  # which NaN is not
    assert dense.forward(window, hidden).isfinite().all()  # in single precision after that


def test_what_blocks_share_has_to_be_known(monkeypatch):
    """A model is refused whose biases come of weights, but cannot be traced back to them."""
    monkeypatch.setattr(T5Attention, "compute_bias", torch.no_grad()(T5Attention.compute_bias))
    with pytest.raises(ReconError, match="cannot be decomposed: its 4 blocks .* do not give the model's own output"):
        decompose(make_model("t5"))


@pytest.mark.parametrize("family", ["t5", "bart"])
@torch.no_grad()
def test_a_window_runs_where_only_what_it_needs_is_on_the_compute_device(made, family):
    """The meta device stands for a GPU."""
    for number in range(2):
        decoder = decompose(copy.deepcopy(made(family).model))
        window = decoder.windows("2-blocks")[number]
        hidden = decoder.embed(random_tokens(2, 18)).to("meta")
        decoder.call(hidden)
        needed = set(decoder.needed(window))
        for module in decoder.model.modules():
            for name, parameter in module._parameters.items():
                if parameter in needed:
                    module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
            module._buffers |= {name: each.to("meta") for name, each in module._buffers.items() if each in needed}
        assert decoder.forward(window, hidden).device.type == "meta"
