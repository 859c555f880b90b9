"""Samples of unequal length: never padded, each on its own, and the same as ever where they are of one length after all."""

import copy
import dataclasses

import pytest
import torch
from conftest import make_model, random_tokens
from torch.testing import assert_close

import recon
import recon.estimate
from recon import text
from recon.activations import Activations
from recon.decoder import SHAPES, Decoder
from recon.engine import Engine
from recon.errors import ReconError
from recon.pruning import prune
from recon.ragged import Ragged, batches, flat, joined, lengths, like, runs, shape
from recon.reconstruction import reconstruct
from recon.retraining import retrain
from recon.solvers.gradient import Schedule, fit
from recon.spec import RunSpec
from recon.statistics import gather

LENGTHS = [9, 4, 4, 13, 7, 4, 9, 9]


def uneven(seed=0):
    return Ragged.of([random_tokens(1, length, seed + number)[0] for number, length in enumerate(LENGTHS)])


@pytest.fixture(scope="module")
def dense():
    """A decoder whose model no test changes; two blocks."""
    return Decoder(make_model("llama", num_hidden_layers=2))


# ---- the container


def test_samples_are_views_of_one_tensor():
    samples = uneven()
    assert len(samples) == 8 and lengths(samples) == LENGTHS and [len(sample) for sample in samples] == LENGTHS
    assert torch.equal(samples[3], samples.flat[17:30])
    part = samples[1:4]
    assert lengths(part) == [4, 4, 13] and torch.equal(part.flat, samples.flat[9:30])
    assert part.flat.data_ptr() == samples.flat[9:].data_ptr()
    assert len(samples[5:2]) == len(samples[9:]) == 0
    assert torch.equal(samples[[1, 5]], torch.stack([samples[1], samples[5]]))
    with pytest.raises(ValueError, match="samples of 7 tokens in all do not make up the 8"):
        Ragged(torch.zeros(8), [3, 4])


def test_equal_lengths_stay_a_tensor_when_joined():
    even = random_tokens(3, 9)
    assert torch.equal(joined(even, even), torch.cat([even, even]))
    both = joined(uneven(), even)
    assert lengths(both) == LENGTHS + [9] * 3 and torch.equal(both[8], even[0])
    assert lengths(joined(even, random_tokens(1, 5))) == [9, 9, 9, 5]


def test_shapes_and_values():
    even, samples = random_tokens(3, 9), uneven()
    assert shape(even, 5) == (3, 9, 5) and shape(samples, 5) == (59, 5)
    for each in (even, samples):
        made = like(each, torch.zeros(shape(each, 5)))
        assert lengths(made) == lengths(each) and flat(made).shape == (sum(lengths(each)), 5)


def test_batches_are_of_one_length_and_lose_nothing():
    samples, order = uneven(), [3, 1, 0, 6, 2, 7, 5, 4]
    found = batches(samples, order, 2)
    assert sorted(number for part in found for number in part) == sorted(order)
    assert all(len({LENGTHS[number] for number in part}) == 1 and len(part) <= 2 for part in found)
    assert batches(random_tokens(8, 5), order, 3) == [order[:3], order[3:6], order[6:]]


def test_runs_keep_the_order_and_stop_at_the_edge():
    assert runs(LENGTHS, 8, 8) == [range(0, 1), range(1, 3), range(3, 4), range(4, 5), range(5, 6), range(6, 7), range(7, 8)]
    assert runs(LENGTHS, 18, 7)[-2:] == [range(6, 7), range(7, 8)]
    assert runs(LENGTHS, 18, 6)[-1:] == [range(6, 8)]
    assert runs([10] * 7, 30, 4) == [range(0, 3), range(3, 4), range(4, 7)]


def test_activations_keep_them(tmp_path):
    store, samples = Activations(2**20, tmp_path), uneven()
    kept = store.put("tokens", samples)
    assert lengths(kept) == LENGTHS and torch.equal(kept.flat, samples.flat) and store.get("tokens") is kept


# ---- passes


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "bloom", "gpt_neox"])
@torch.no_grad()
def test_each_sample_goes_through_blocks_on_its_own(family):
    decoder, samples, engine = Decoder(make_model(family)), uneven(), Engine("cpu", "float32")
    stream = engine.embed(decoder, samples)
    for window in decoder.windows("block"):
        stream = engine.run(lambda hidden, window=window: decoder.forward(window, hidden), stream)
    assert lengths(stream) == LENGTHS
    for tokens, states in zip(samples, stream, strict=True):
        expected = decoder.model(input_ids=tokens[None], use_cache=False).logits
        assert_close(decoder.logits(tokens[None], states[None]), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_blocks_are_called_with_is_known_for_so_many_shapes():
    decoder = Decoder(make_model("llama", num_hidden_layers=1))
    for length in range(1, SHAPES + 10):
        decoder.forward(decoder.windows("block")[0], torch.zeros(1, length, 32))
    assert len(decoder._calls) == SHAPES


@pytest.mark.parametrize("kind", ["norm", "gram", "moments"])
def test_every_token_counts_alike_in_statistics(dense, kind):
    samples, engine, seen = uneven(), Engine("cpu", "float32"), []
    name = "model.layers.0.mlp.down_proj"
    handle = dense.model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0][0].double()))
    with torch.no_grad():
        for tokens in samples:
            dense.model(input_ids=tokens[None], use_cache=False)
    handle.remove()
    x = torch.cat(seen)
    _, found = gather(engine, dense, dense.windows("block")[0], engine.embed(dense, samples), kind)
    expected = {"norm": x.square().mean(0).sqrt(), "gram": x.T @ x / len(x), "moments": torch.stack([x.mean(0), x.var(0, False)])}
    assert_close(found[name].double(), expected[kind], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [
    {"granularity": "half-block", "schedule": Schedule(batch_size=2)},
    {"granularity": "block", "propagation": "mixed", "start": "exact"},
    {"granularity": "matrix"},
    {"granularity": "matrix", "solver": "exact"},
    {"granularity": "matrix", "solver": "exact", "propagation": "mixed"},
], ids=str)  # fmt: skip
def test_samples_of_one_length_give_the_same_bits_as_a_tensor(dense, options):
    even, held_out = random_tokens(6, 12), random_tokens(2, 12, 1)
    found = []
    for samples in (even, Ragged.of(list(even))):
        model = copy.deepcopy(dense.model)
        masks = prune(model, samples, compute_dtype="float32", progress=False).masks
        reports = reconstruct(
            model, dense, samples, masks, held_out=held_out, compute_dtype="float32", progress=False,
            **{"exact": recon.reconstruction.Exact(samples=4)} | options,
        )  # fmt: skip
        found.append(([(r.error_before, r.error_after, r.losses) for r in reports], model.state_dict()))
    assert found[0][0] == found[1][0]
    for name, tensor in found[0][1].items():
        assert torch.equal(tensor, found[1][1][name])


@pytest.mark.parametrize("options", [
    {"granularity": "half-block", "schedule": Schedule(batch_size=3)},
    {"granularity": "block", "propagation": "sparse"},
    {"granularity": "matrix"},
    {"granularity": "matrix", "solver": "exact", "propagation": "mixed"},
], ids=str)  # fmt: skip
def test_unequal_samples_repair(dense, options):
    model, samples = copy.deepcopy(dense.model), uneven()
    masks = prune(model, samples, compute_dtype="float32", progress=False).masks
    reports = reconstruct(model, dense, samples, masks, held_out=samples[:2], compute_dtype="float32", progress=False, **options)
    assert sum(r.status == "repaired" for r in reports) > len(reports) / 2
    for name, matrix in Decoder(model, like=dense).matrices().items():
        assert not matrix.weight[~masks[name]].any()


def test_a_step_is_the_mean_over_all_of_its_tokens():
    """Three samples of three lengths in one step, against the gradient over all of their tokens at once."""
    draw = torch.Generator().manual_seed(0)
    inputs, targets = (Ragged(torch.randn(20, 5, generator=draw), [3, 10, 7]) for _ in range(2))
    weight = torch.nn.Parameter(torch.randn(5, 5, generator=draw))
    scale = targets.flat.square().mean()
    expected = torch.nn.functional.mse_loss(inputs.flat @ weight.T, targets.flat) / scale
    gradient = torch.autograd.grad(expected, weight)[0]
    curve = fit(
        lambda x: x @ weight.T, [weight], [], inputs, targets, "mse", Schedule(batch_size=2, accumulation=2),
        torch.Generator().manual_seed(0), Engine("cpu", "float32"),
    )  # fmt: skip
    assert curve.losses == [pytest.approx(expected.item(), rel=1e-5)]
    assert curve.gradient_norms == [pytest.approx(gradient.norm().item(), rel=1e-5)]


def test_retraining_reads_them(dense):
    model, samples = copy.deepcopy(dense.model), uneven()
    report = retrain(model, samples, None, "full", schedule=Schedule(learning_rate=1e-3, epochs=3), progress=False)
    assert len(report.losses) == 3 * len(samples) and sum(report.losses[-8:]) < sum(report.losses[:8])


# ---- text, and whole runs


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


def test_documents_are_of_natural_length(tokenizer, tiny_text):
    found = text.sample_documents(tiny_text, "calibration", tokenizer, 12, 60, seed=0)
    texts = [tokenizer(each, return_tensors="pt").input_ids[0, :60] for each in text.documents(tiny_text, "calibration")]
    numbers = [next(i for i, each in enumerate(texts) if torch.equal(each, sample)) for sample in found]
    assert len(set(numbers)) == 12 and numbers != sorted(numbers)
    assert (
        max(lengths(found)) == 60
        and len(set(lengths(text.sample_documents(tiny_text, "calibration", tokenizer, 12, 500, 0)))) > 4
    )
    again = text.sample_documents(tiny_text, "calibration", tokenizer, 12, 60, seed=0)
    assert torch.equal(again.flat, found.flat)
    with pytest.raises(
        ReconError, match=f"1000 documents are more than the calibration split .* it has {len(texts)} of at least 16"
    ):
        text.sample_documents(tiny_text, "calibration", tokenizer, 1000, 60, seed=0)


def test_a_run_on_documents(tiny_folder, tiny_text):
    spec = RunSpec(
        model=tiny_folder, text=tiny_text, samples=6, sequence_length=120, held_out_samples=2, evaluation_texts=(tiny_text,),
        evaluation_samples=2, evaluation_length=32,
    )  # fmt: skip
    documents = dataclasses.replace(spec, documents=True)
    assert documents.key() != spec.key()
    record = recon.run(documents, progress=False)
    assert record.status == "done" and record.metrics["sparsity"] == 0.5
    assert 6 * 16 <= record.tokens["reconstruct"] < 6 * 120
    whole = recon.estimate.flops(documents, Decoder(recon.load(tiny_folder)[0]))["reconstruct"]
    assert (
        0.9 < record.flops["reconstruct"] / whole / (record.tokens["reconstruct"] / (6 * 120)) < 1.3
    )  # errors are measured on held-out text
    assert "6 documents of up to 120 tokens" in record.protocol["calibration"]
    with pytest.raises(ReconError, match="pieces is 2, but documents of unequal length are not cut"):
        dataclasses.replace(documents, pieces=2)
