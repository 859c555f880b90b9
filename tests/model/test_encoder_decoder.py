"""Encoder-decoders: both stacks as one chain of blocks, the encoder's first."""

import copy

import pytest
import torch
from fixtures.models import ENCODER_DECODERS, FLOAT32, make_model, random_tokens
from fixtures.runs import record_of
from torch.testing import assert_close
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.models.t5.modeling_t5 import T5Attention

import recon
from recon.config import PruningConfig, ReconstructionConfig, RetrainingConfig
from recon.data.models import load_pruned
from recon.errors import ReconError
from recon.evaluate.perplexity import perplexity
from recon.methods.external_mask import take_over
from recon.methods.prune import prune
from recon.methods.reconstruct import reconstruct
from recon.methods.retrain import retrain
from recon.methods.statistics import gather
from recon.model.discovery import decompose
from recon.model.encoder_decoder import EncoderDecoder
from recon.model.modules import requiring_gradients
from recon.runtime.execution import Execution
from recon.study.plan import plan


@pytest.fixture(scope="module")
def made():
    """Family -> its decoder, made once, and left as it is."""
    kept = {}

    def make(family):
        if family not in kept:
            kept[family] = decompose(make_model(family))
        return kept[family]

    return make


def own_logits(model, tokens):
    middle = tokens.shape[1] // 2
    with torch.no_grad():
        return model(input_ids=tokens[:, :middle], decoder_input_ids=tokens[:, middle:], use_cache=False).logits


@torch.no_grad()
def composed(decoder, tokens, granularity="block"):
    """The logits that come of running one window after another."""
    hidden = decoder.embed(tokens)
    for window in decoder.windows(granularity):
        hidden = decoder.forward(window, hidden)
    return decoder.logits(decoder.predicted(tokens), decoder.predicted(hidden))


@pytest.mark.parametrize("granularity", ["block", "2-blocks", "quarter", "model"])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_windows_composed_are_the_model(made, family, granularity):
    decoder, tokens = made(family), random_tokens(3, 13)
    assert isinstance(decoder, EncoderDecoder) and len(decoder.blocks) == 4 and len(decoder.structure.stacks) == 2
    found = composed(decoder, tokens, granularity)
    assert_close(found, own_logits(decoder.model, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
@torch.no_grad()
def test_a_block_changes_its_own_half_and_a_decoder_block_reads_both(made, family):
    decoder = made(family)
    hidden = decoder.embed(random_tokens(2, 12))
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    for index, window in enumerate(decoder.windows("block")):
        own, other = (slice(6), slice(6, 12)) if index < 2 else (slice(6, 12), slice(6))
        output = decoder.forward(window, hidden)
        assert torch.equal(output[:, other], hidden[:, other]) and not torch.equal(output[:, own], hidden[:, own])
        disturbed = hidden.clone()
        disturbed[:, other] += noise[:, other]
        # The encoder knows nothing of what the decoder reads.
        assert torch.equal(decoder.forward(window, disturbed)[:, own], output[:, own]) == (index < 2)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
@torch.no_grad()
def test_statistics_are_those_of_the_model_as_a_whole(made, family):
    """Also where a batch is of a shape not met before, for which the model is run to see what its blocks are called with."""
    decoder, tokens = decompose(copy.deepcopy(made(family).model)), random_tokens(5, 14)
    names, seen = list(decoder.matrices()), {}
    handles = [
        decoder.model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, n=name: seen.update({n: args[0].flatten(0, -2)})
        )
        for name in names
    ]
    own_logits(decoder.model, tokens)
    for handle in handles:
        handle.remove()
    execution, found = Execution("cpu", "float32"), {}
    stream = execution.run(decoder.embed, tokens)
    for window in decoder.windows("block"):
        stream, statistics = gather(execution, decoder, window, stream, "norm")
        found |= statistics
    assert set(found) == set(names)
    for name in names:
        assert_close(found[name], seen[name].square().mean(0).sqrt(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_pruned_reconstructed_and_saved(made, tmp_path, family):
    dense, tokens = made(family), random_tokens(12, 16)
    model = copy.deepcopy(dense.model)
    result = prune(model, tokens, PruningConfig(criterion="wanda", pattern="2:4"), execution=Execution(progress=False))
    assert result.total_sparsity == 0.5 and not result.under_calibrated
    pruned = perplexity(model, tokens, execution=FLOAT32)
    assert pruned.tokens == 12 * 7  # of the decoder's 8 tokens all but the first
    reports = reconstruct(
        model,
        dense,
        tokens,
        ReconstructionConfig(granularity="block", propagation="sparse"),
        masks=result.masks,
        execution=Execution(compute_dtype="float32", progress=False),
    )
    assert [report.name for report in reports] == [f"block {index}" for index in range(4)]
    assert all(report.error_after["calibration"] < report.error_before["calibration"] for report in reports)
    model.save_pretrained(tmp_path)
    again = decompose(AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float32).eval(), like=dense)
    for name, matrix in again.matrices().items():
        assert torch.equal(matrix.weight == 0, ~result.masks[name])


def test_perplexity_is_that_of_the_second_half_given_the_first(made):
    decoder, tokens = made("bart"), random_tokens(3, 20)
    likelihood = own_logits(decoder.model, tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 11:, None])
    found = perplexity(decoder, tokens, execution=FLOAT32, reference=None)
    assert found.value == pytest.approx(likelihood.mean().neg().exp().item(), rel=1e-4)


def test_retraining_lowers_the_loss_and_keeps_the_zeros(made):
    model = copy.deepcopy(made("t5").model)
    masks = prune(model, config=PruningConfig(criterion="magnitude"), execution=Execution(progress=False)).masks
    config = RetrainingConfig(
        retrain="full", retrain_learning_rate=3e-4, retrain_rate="absolute", retrain_batch_size=16, retrain_epochs=8
    )
    report = retrain(model, random_tokens(16, 16), config, masks=masks, execution=Execution(progress=False))
    assert report.losses[-1] < report.losses[0]
    for name, matrix in decompose(model, like=made("t5")).matrices().items():
        assert not matrix.weight[~masks[name]].any()


def test_what_blocks_share_is_found_and_belongs_to_no_window(made, tmp_path):
    """Biases of relative positions: each block is called with those of its own model, however it was trained or where it came from."""
    dense, tokens = made("t5"), random_tokens(16, 16)
    biases = {f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for half in ("encoder", "decoder")}
    assert dense.shared == biases and not made("bart").shared
    first = dense.windows("block")[0]
    assert biases & set(dense.parameters(first)) and not biases & set(dense.trained(first, "all"))
    student = decompose(copy.deepcopy(dense.model), like=dense)
    copied = decompose(copy.deepcopy(dense.model), like=dense)
    masks = prune(student, tokens, PruningConfig(criterion="wanda"), execution=Execution(progress=False)).masks
    composed(student, tokens[:2]), composed(copied, tokens[:2])
    retrain(
        student,
        tokens,
        RetrainingConfig(retrain="full", retrain_learning_rate=0.01, retrain_rate="absolute"),
        masks=masks,
        execution=Execution(compute_dtype="float32", progress=False),
    )
    student.model.save_pretrained(tmp_path)
    take_over(copied, load_pruned(str(tmp_path), dense.model))
    for decoder in (student, copied, decompose(make_model("t5", seed=1), like=dense), dense):
        assert_close(composed(decoder, tokens[:2]), own_logits(decoder.model, tokens[:2]), rtol=1e-4, atol=1e-4)
    assert all(not torch.equal(student.model.get_parameter(name), dense.model.get_parameter(name)) for name in biases)


def test_finding_what_blocks_are_called_with_spoils_no_training_in_half_precision(made):
    """It is found with placeholders, which autocast by itself would round and go on with where weights are trained."""
    dense = made("t5")
    window, losses = dense.windows("2-blocks")[0], []
    with Execution("cpu", "bfloat16") as execution, requiring_gradients(dense.parameters(window).values()):
        hidden = execution.embed(dense, random_tokens(1, 16))
        for _ in range(2):
            dense.forget()
            losses.append(dense.forward(window, hidden).square().mean().item())
    assert losses[0] == losses[1]  # which NaN is not


def test_what_blocks_share_has_to_be_known(monkeypatch):
    """A model is refused whose biases come of weights, but cannot be traced back to them."""
    monkeypatch.setattr(T5Attention, "compute_bias", torch.no_grad()(T5Attention.compute_bias))
    with pytest.raises(ReconError, match="cannot be taken apart: its 4 blocks .* do not give the model's own output"):
        decompose(make_model("t5"))


def test_a_run_says_what_the_encoder_reads(tiny_folder, tiny_text, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    make_model("t5", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    spec = recon.RunSpec.of(
        model=str(tmp_path), text=tiny_text, samples=4, sequence_length=16, held_out_samples=2, evaluation_texts=(tiny_text,),
        evaluation_samples=2, evaluation_length=32, granularity="block",
    )  # fmt: skip
    record = record_of(spec)
    assert record.status == "done" and record.metrics["sparsity"] == 0.5
    assert record.protocol["reading"].startswith("the encoder reads the first half")
    assert len(record.metrics["drift"]) == 4 and record.flops["reconstruct"] > 0
    with pytest.raises(ReconError, match="zero-shot tasks need a causal language model; T5For"):
        record_of(spec.replaced(tasks=("analogies",)))
    planned = plan(spec.replaced(granularity="none", criterion="magnitude"), recon.RunOptions(stream="yes"))
    assert planned.streamed and planned.flops["evaluate"] > 0 and "models" not in planned.memory["cpu"]


def test_samples_are_as_long_as_both_halves_of_the_model_read(tiny_folder, tiny_text, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    make_model("bart", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    spec = recon.RunSpec.of(
        model=str(tmp_path), text=tiny_text, samples=2, held_out_samples=0, evaluation_texts=(tiny_text,), evaluation_samples=1,
        granularity="block", criterion="magnitude",
    )  # fmt: skip
    record = record_of(spec)
    assert record.spec["sequence_length"] == record.spec["evaluation_length"] == 2 * 64
    with pytest.raises(ReconError, match="sequence length 129 is more than the 128 tokens that the model was made for"):
        record_of(spec.replaced(evaluation_length=129))


@pytest.mark.parametrize("granularity", ["matrix", "half-block"])
def test_parts_of_blocks_are_refused(made, granularity):
    with pytest.raises(
        ReconError, match=f"granularity '{granularity}' does not fit BartFor.*: an encoder-decoder is reconstructed by whole"
    ):
        made("bart").windows(granularity)
