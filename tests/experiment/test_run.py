import copy
import dataclasses
import gc
import math
import shutil
import weakref

import pytest
import torch
from fixtures.models import make_model
from fixtures.runs import comparable
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import recon
from recon.config import PruningConfig, ReconstructionConfig
from recon.data import models, text
from recon.errors import ReconError
from recon.experiment.run import share_recovered
from recon.model.discovery import take_apart
from recon.runtime.execution import Execution


@pytest.fixture(scope="module")
def spec(tiny_folder, tiny_text):
    return recon.RunSpec.of(
        model=str(tiny_folder),
        text=str(tiny_text),
        samples=6,
        sequence_length=32,
        held_out_samples=3,
        evaluation_texts=(str(tiny_text),),
        evaluation_samples=3,
        evaluation_length=64,
    )


@pytest.fixture(scope="module")
def record(spec):
    return recon.run(spec, progress=False)


def test_a_record_holds_what_it_takes_to_believe_it(spec, record):
    assert record.status == "done" and record.error is None
    assert record.spec == dataclasses.asdict(spec) and record.key == spec.key()
    assert record.metrics["sparsity"] == 0.5
    assert record.metrics["pruned_perplexity"] > 1 and math.isfinite(record.metrics["perplexity"])
    assert {"total", "prune", "reconstruct", "evaluate"} <= set(record.seconds)
    assert record.seconds["total"] >= record.seconds["reconstruct"] > 0
    assert record.peak_memory_bytes == max(record.peak_memory_bytes_by_phase.values()) > 0
    added = record.added_memory_bytes_by_phase
    assert 0 <= added["reconstruct"] < record.peak_memory_bytes_by_phase["reconstruct"]
    assert record.tokens == {"prune": 6 * 32, "reconstruct": 6 * 32, "retrain": 6 * 32, "held_out": 3 * 32, "evaluation": 3 * 63}
    assert "3 consecutive windows x 64 tokens" in record.protocol["evaluation"]
    assert {"git_commit", "git_dirty", "packages", "device", "threads", "compute_dtype"} <= set(record.environment)
    assert len(record.windows) == 8 and all(len(window["losses"]) == spec.calibration.samples for window in record.windows)
    assert len(record.metrics["drift"]) == len(record.metrics["drift_pruned"]) == 4


def test_the_share_is_computed_from_the_perplexities_of_the_record(record):
    metrics = record.metrics
    lost = math.log(metrics["pruned_perplexity"] / metrics["dense_perplexity"])
    left = math.log(metrics["perplexity"] / metrics["dense_perplexity"])
    if lost > 0:
        assert metrics["share_recovered"] == pytest.approx(1 - left / lost)
    else:
        assert metrics["share_recovered"] is None


@pytest.mark.parametrize(
    "values, share",
    [
        ((10, 40, 10), 1.0),
        ((10, 40, 40), 0.0),
        ((10, 40, 20), 0.5),
        ((10, 40, 160), -1.0),
        ((10, 9, 9), None),
        ((10, math.inf, 9), None),
    ],
)
def test_share_recovered(values, share):
    assert share_recovered(*values) == (None if share is None else pytest.approx(share))


def test_the_same_spec_gives_the_same_record(spec, record):
    assert comparable(recon.run(spec, progress=False)) == comparable(record)


def test_a_run_among_others_equals_a_run_alone(spec, record):
    assert record.shared == []
    session = recon.Session(activation_bytes=2**30)
    first = recon.run(dataclasses.spec.replaced(granularity="none"), session, progress=False)
    assert first.shared == []
    shared = recon.run(spec, session, progress=False)
    assert shared.shared == ["model", "dense", "pruned", "held-out"]
    assert comparable(shared) == comparable(record)
    other = recon.run(dataclasses.spec.replaced(seed=1), session, progress=False)
    assert other.shared == ["model", "dense", "held-out"]
    assert other.protocol["token_hashes"] != record.protocol["token_hashes"]


@pytest.mark.parametrize("stream", ["no", "yes"])
def test_nothing_of_one_model_is_in_memory_when_the_next_is_loaded(stream, spec, tiny_folder, tmp_path, monkeypatch):
    session, other = recon.Session(activation_bytes=2**20), shutil.copytree(tiny_folder, tmp_path / "other")
    spec = dataclasses.spec.replaced(granularity="none")
    recon.run(spec, session, save=tmp_path / "pruned", progress=False)
    options = {name: value for name, value in spec.__dict__.items() if name not in ("criterion", "pattern", "pruned")}
    recon.run(recon.RunSpec.of(**options, pruned=str(tmp_path / "pruned")), session, progress=False)
    before = [weakref.ref(model) for model in (session.dense.model, session.model)]
    seen, read = [], models.AutoTokenizer.from_pretrained

    def look(*args, **options):  # the first thing that is read
        gc.collect()
        seen.append([model() for model in before])
        return read(*args, **options)

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", look)
    monkeypatch.setattr("recon.experiment.unfinished.cache_folder", lambda: tmp_path)
    recon.run(dataclasses.spec.replaced(model=str(other)), session, progress=False, stream=stream)
    assert seen[0] == [None, None]


def test_prune_only_changes_nothing_after_pruning(spec, record):
    pruned = recon.run(dataclasses.spec.replaced(granularity="none"), progress=False)
    assert pruned.metrics["perplexity"] == pruned.metrics["pruned_perplexity"] == record.metrics["pruned_perplexity"]
    assert pruned.seconds["reconstruct"] == 0 and pruned.windows == []
    assert pruned.metrics["drift"] == pruned.metrics["drift_pruned"]


@pytest.mark.parametrize("criterion", ["sparsegpt", "wanda"])
def test_a_pruned_state_that_is_reused_is_that_of_the_criterion(spec, criterion):
    """SparseGPT also changes the weights that stay; they must survive being shared between runs."""
    only = dataclasses.spec.replaced(criterion=criterion, granularity="none")
    session = recon.Session()
    recon.run(only, session, progress=False)
    first = copy.deepcopy(session.model)
    recon.run(dataclasses.replace(only, granularity="block"), session, progress=False)
    recon.run(only, session, progress=False)
    dense = session.dense.matrices()
    changed = 0
    for name, matrix in take_apart(first).matrices().items():
        assert torch.equal(matrix.weight, session.model.get_submodule(name).weight)
        kept = matrix.weight != 0
        changed += int((matrix.weight[kept] != dense[name].weight[kept]).sum())
    assert (changed > 0) == (criterion == "sparsegpt")


def test_the_key_depends_on_everything_that_can_change_the_numbers(spec, tmp_path, tiny_folder, tiny_text):
    key = spec.key()
    assert dataclasses.replace(spec).key() == key
    changes = {
        "samples": 5, "sequence_length": 16, "criterion": "ria", "pattern": "2:4", "scope": "matrix", "statistics": "dense",
        "sparsegpt_block_size": 64, "sparsegpt_damping": 0.1, "mask_refinement": 2, "granularity": "block", "propagation": "mixed", "start": "exact",
        "train": "all", "chunks": 2, "exact_samples": 2, "exact_iterations": 3, "loss": "cosine", "learning_rate": 1e-3, "epochs": 2, "batch_size": 2, "accumulation": 2, "warmup": 0.2,
        "held_out_samples": 2, "evaluation_texts": (str(tiny_text), "news"), "evaluation_samples": 2, "evaluation_length": 32,
        "seed": 1, "compute_dtype": "float32", "revision": "main", "text": "news", "device": "cpu",
        "prune_samples": 4, "adapter": "lora", "rank": 8, "retrain": "masklora", "retrain_objective": "distil", "retrain_samples": 4,
        "retrain_learning_rate": 1e-3, "retrain_epochs": 2, "retrain_batch_size": 2, "retrain_accumulation": 2, "retrain_checkpointing": True,
        "tasks": ("analogies",), "task_limit": 50, "trust_remote_code": True, "pruned_revision": "v1",
    }  # fmt: skip
    keys = {name: dataclasses.spec.replaced(**{name: value}).key() for name, value in changes.items()}
    assert set(changes) | {"model", "solver", "pruned"} == {field.name for field in dataclasses.fields(spec)}
    assert len({key, *keys.values()}) == len(keys) + 1
    other = tmp_path / "text.txt"
    other.write_text(open(tiny_text).read() + "\n\nOne more paragraph.")
    assert dataclasses.spec.replaced(text=str(other), evaluation_texts=(str(other),)).key() != key
    assert text.fingerprint(str(other)) != text.fingerprint(str(tiny_text))


def test_as_many_samples_said_in_another_way_are_the_same_run(spec):
    said = dataclasses.spec.replaced(prune_samples=6, retrain_samples=6)
    assert said.key() == spec.key()
    # What was said stands when another number of samples is asked for.
    assert dataclasses.replace(said, samples=4).samples_by_phase == {"prune": 6, "reconstruct": 4, "retrain": 6}
    assert dataclasses.spec.replaced(prune_samples=6, samples=4).samples_by_phase == {"prune": 6, "reconstruct": 4, "retrain": 4}


def test_an_option_added_later_does_not_disown_old_records(spec):
    """A key is a hash of what differs from the defaults."""
    later = dataclasses.make_dataclass("Later", [("quite_new", str, "default")], bases=(recon.RunSpec,), frozen=True)
    fields = dataclasses.asdict(spec)
    assert later(**fields).key() == spec.key() != later(**fields, quite_new="other").key()


@pytest.mark.parametrize("retrain", ["masklora", "full"])
def test_retraining_follows_reconstruction(spec, record, then):
    found = recon.run(dataclasses.spec.replaced(retrain=then, retrain_epochs=3, retrain_objective="distil"), progress=False)
    assert found.windows and found.metrics["pruned_perplexity"] == record.metrics["pruned_perplexity"]
    assert found.metrics["kl"] < record.metrics["kl"]
    assert found.metrics["sparsity"] == 0.5
    assert len(found.retraining["losses"]) == 3 * spec.calibration.samples and found.seconds["retrain"] > 0
    assert found.flops["retrain"] > 0 and found.flops["reconstruct"] == record.flops["reconstruct"]


def test_samples_by_phase_are_the_first_of_one_draw(spec, record):
    """With as many samples as before to prune and repair with, more for retraining change nothing that comes before."""
    more = recon.run(dataclasses.spec.replaced(retrain="masklora", retrain_samples=9), progress=False)
    assert more.tokens["retrain"] == 9 * 32
    assert more.metrics["pruned_perplexity"] == record.metrics["pruned_perplexity"]
    for window, other in zip(more.windows, record.windows, strict=True):
        assert window["losses"] == other["losses"]


def test_lora_says_what_its_mask_costs(spec):
    found = recon.run(
        dataclasses.spec.replaced(granularity="none", retrain="lora", retrain_learning_rate=3e-3), progress=False
    ).metrics
    assert found["sparsity"] == 0.5 and found["perplexity_before_masking"] != found["perplexity"]


def test_the_dense_control_is_not_pruned(spec):
    found = recon.run(dataclasses.spec.replaced(criterion="none", granularity="none", retrain="masklora"), progress=False).metrics
    assert found["sparsity"] == 0 and found["pruned_perplexity"] == found["dense_perplexity"] != found["perplexity"]
    assert found["share_recovered"] is None


def test_a_spec_is_frozen_and_takes_the_papers_names(spec):
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.calibration.samples = 3
    assert [recon.RunSpec.of(granularity=g).granularity for g in ("1/2", "1", "2")] == ["half-block", "block", "2-blocks"]
    assert recon.RunSpec.of(pattern="0.50").pattern == "0.5"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"criterion": "magic"}, r"'magic'.*magnitude.*wanda"),
        ({"pattern": "4:2"}, r"'4:2'"),
        ({"pattern": "1.5"}, r"'1.5'"),
        ({"pattern": "-0.1"}, r"'-0.1'"),
        ({"pattern": "abc"}, r"'abc'"),
        ({"granularity": "third"}, r"granularity is 'third'; allowed: none, matrix, half-block"),
        ({"propagation": "up"}, r"unknown propagation 'up'; allowed: dense, sparse, mixed"),
        ({"statistics": "mixed"}, r"statistics is 'mixed'; allowed: sparse, dense"),
        ({"loss": "mae"}, r"loss is 'mae'; allowed: mse, cosine"),
        ({"solver": "sgd"}, r"unknown solver 'sgd'; allowed: adamw, exact"),
        ({"solver": "exact"}, r"solver exact fits single matrices, not granularity 'half-block'"),
        ({"start": "cold"}, r"unknown start 'cold'; allowed: pruned, exact"),
        ({"mask_refinement": -1}, r"swaps is -1; allowed: a whole number from 0 up"),
        (
            {"mask_refinement": 5, "criterion": "sparsegpt"},
            r"swaps is 5, but criterion 'sparsegpt' adapts weights.*suit magnitude, random, wanda, ria",
        ),
        ({"chunks": 0}, r"pieces is 0; allowed: a whole number from 1 up"),
        ({"chunks": 3}, r"pieces is 3; allowed: a number that divides sequence_length, 512"),
        ({"exact_samples": -1}, r"exact_samples is -1; allowed: a whole number from 0 up"),
        ({"train": "norms"}, r"unknown train 'norms'; allowed: matrices, all"),
        ({"scope": "column"}, r"scope is 'column'; allowed: auto, row, matrix"),
        ({"compute_dtype": "int8"}, r"compute_dtype is 'int8'; allowed: auto, bfloat16, float32"),
        ({"samples": 0}, r"samples is 0; allowed: a whole number from 1 up"),
        ({"samples": 1.5}, r"samples is 1.5"),
        ({"epochs": True}, r"epochs is True"),
        ({"sequence_length": 1}, r"sequence_length is 1; allowed: a whole number from 2 up"),
        ({"held_out_samples": -1}, r"held_out_samples is -1"),
        ({"learning_rate": 0}, r"learning_rate is 0; allowed: a number above 0"),
        ({"learning_rate": math.nan}, r"learning_rate is nan"),
        ({"warmup": 2}, r"warmup is 2; allowed: a number from 0 to 1"),
        ({"evaluation_texts": ()}, r"evaluation_texts is empty"),
    ],
)
def test_a_bad_field_is_refused_by_name(change, message):
    with pytest.raises(ReconError, match=message):
        recon.RunSpec.of(**change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pattern": "2:5"}, r"self_attn.q_proj has 32 input columns, which do not divide into the groups of 5"),
        ({"model": "gpt-17"}, r"unknown model 'gpt-17'; bundled: smollm2-135m"),
        ({"text": "wikipaedia"}, r"'wikipaedia'"),
        (
            {"samples": 100_000},
            r"100000 samples of 32 tokens are more than the calibration split of text .* holds: it has \d+ tokens",
        ),
        ({"held_out_samples": 100_000}, r"more than the validation split"),
        ({"evaluation_samples": 100_000}, r"more than the evaluation split"),
        ({"sequence_length": 300, "samples": 1, "held_out_samples": 0}, r"sequence length 300 is more than the 256 tokens"),
        ({"evaluation_length": 300}, r"sequence length 300 is more than the 256 tokens"),
        ({"granularity": "9-blocks"}, r"windows of 9 blocks, but the model has 4"),
        ({"device": "warp"}, r"device 'warp' cannot be used here"),
    ],
)
def test_what_the_model_or_text_cannot_do_is_refused_before_anything_long(spec, change, message, monkeypatch):
    monkeypatch.setattr("recon.evaluate.perplexity.perplexity", lambda *a, **k: pytest.fail("computed before it was checked"))
    with pytest.raises(ReconError, match=message):
        recon.run(dataclasses.spec.replaced(**change), progress=False)


def test_an_empty_text_is_refused(spec, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    with pytest.raises(ReconError, match="empty"):
        recon.run(dataclasses.spec.replaced(text=str(empty)), progress=False)


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("bloom", {}, r"half-block windows do not fit this model: block 0 \(BloomBlock\)"),
        ("bert", {}, r"BertLMHeadModel is not a causal language model"),
        ("mixtral", {"granularity": "matrix"}, r"matrix windows do not fit this model: .* has experts"),
        ("mixtral", {"retrain": "masklora"}, r"one expert's part of a parameter"),
        ("mixtral", {"criterion": "flap", "pattern": "0.2"}, r"is an expert's; whole heads and neurons"),
    ],
)
def test_models_that_do_not_fit_are_refused(spec, family, change, message, tmp_path, tiny_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    make_model(family, vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ReconError, match=message):
        recon.run(dataclasses.spec.replaced(model=str(tmp_path), **change), progress=False)


def test_a_model_with_experts_runs_and_names_those_that_starve(spec, tmp_path, tiny_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    make_model("mixtral", vocab_size=len(tokenizer), num_hidden_layers=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    record = recon.run(dataclasses.spec.replaced(model=str(tmp_path), samples=2, sequence_length=16), progress=False)
    assert record.status == "done" and record.metrics["sparsity"] == 0.5
    starved = record.metrics["starved_matrices"]
    assert starved and set(starved) < set(record.metrics["sparsity_by_matrix"])


def test_nan_weights_are_named(spec, tmp_path, tiny_folder):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name][0, :3] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ReconError, match=rf"'{name}' holds 3 NaN or infinite values"):
        recon.run(dataclasses.spec.replaced(model=str(folder)), progress=False)


def test_the_pieces_work_on_a_model_of_ones_own(tiny_folder, tiny_text):
    """The README's five lines."""
    model, tokenizer = recon.load(str(tiny_folder))
    samples = recon.sample_tokens(str(tiny_text), "calibration", tokenizer, samples=6, sequence_length=32, seed=0)
    pruned = copy.deepcopy(model)
    recon.prune(pruned, samples, PruningConfig(criterion="wanda", pattern="2:4"), execution=Execution(progress=False))
    before = take_apart(pruned, like=take_apart(model)).matrices()
    zeros = {name: matrix.weight == 0 for name, matrix in before.items()}
    recon.reconstruct(pruned, model, samples, ReconstructionConfig(granularity="half-block"), execution=Execution(progress=False))
    assert all(torch.equal(pruned.get_submodule(name).weight == 0, zero) for name, zero in zeros.items())
    held_out = recon.sample_tokens(str(tiny_text), "evaluation", tokenizer, samples=2, sequence_length=64)
    untouched = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert recon.perplexity(model, held_out) == recon.perplexity(untouched, held_out)
    assert math.isfinite(recon.perplexity(pruned, held_out).value)


def test_a_frozen_model_is_taken_apart_like_any_other(tiny, tokens):
    frozen = tiny("llama").requires_grad_(False)
    expected, found = recon.take_apart(tiny("llama")), recon.take_apart(frozen)
    for window in expected.windows("half-block"):
        assert list(found.parameters(window)) == list(expected.parameters(window)) != []
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
