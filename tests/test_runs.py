"""One run from specification to record: what the record says, what changes its key, what is refused."""

import copy
import json
import math
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import recon
from recon import pruning, reconstruction
from recon.errors import ReconError
from recon.runs import share_recovered
from recon.sparsity import sparsity_of

TIMES = {"seconds", "peak_memory_bytes", "peak_memory_bytes_by_phase", "shared"}  # differ from one run to the next


@pytest.fixture(scope="module")
def spec(tiny_folder, tiny_text) -> recon.RunSpec:
    return recon.RunSpec(
        model=tiny_folder, text=tiny_text, samples=8, sequence_length=32, held_out_samples=2,
        evaluation_texts=(tiny_text,), evaluation_samples=4, evaluation_length=48, compute_dtype="float32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def record(spec):
    return recon.run(spec, progress=False)


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A copy of the tiny model's folder that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


@pytest.fixture
def nothing_long(monkeypatch):
    """Fails the test where a refused run has begun to compute."""

    def computed(*args, **kwargs):
        raise AssertionError("a run that is refused has begun to compute")

    monkeypatch.setattr(pruning, "prune", computed)
    monkeypatch.setattr(reconstruction, "reconstruct", computed)
    monkeypatch.setattr("recon.evaluation.perplexity", computed)


def numbers(record) -> dict:
    """All of a record that two runs of one spec must agree on; windows without their times."""
    data = {name: value for name, value in record.to_dict().items() if name not in TIMES}
    data["windows"] = [{k: v for k, v in window.items() if k != "seconds"} for window in data["windows"]]
    return data


def run(spec, **changes):
    return recon.run(replace(spec, **changes), progress=False)


# ---- the record


def test_record_holds_what_was_measured(record, spec, tiny_text):
    assert record.status == "done" and record.error is None
    assert record.key == spec.key()
    assert record.spec == {field.name: getattr(spec, field.name) for field in fields(spec)}
    metrics = record.metrics
    for name in ("dense_perplexity", "pruned_perplexity", "perplexity"):
        assert 1 < metrics[name] < math.inf
        assert metrics["by_text"][tiny_text][name] == metrics[name]
    assert len({metrics[name] for name in ("dense_perplexity", "pruned_perplexity", "perplexity")}) == 3
    per_window = metrics["by_text"][tiny_text]["nll_per_window"]
    for kind, name in (("dense", "dense_perplexity"), ("pruned", "pruned_perplexity"), ("repaired", "perplexity")):
        assert len(per_window[kind]) == 4
        assert math.exp(sum(per_window[kind]) / 4) == pytest.approx(metrics[name])
    three = (metrics["dense_perplexity"], metrics["pruned_perplexity"], metrics["perplexity"])
    assert metrics["share_recovered"] == share_recovered(*three)
    assert metrics["sparsity"] == 0.5
    assert set(metrics["sparsity_by_matrix"].values()) == {0.5} and len(metrics["sparsity_by_matrix"]) == 4 * 7
    assert metrics["held_out_error"] < metrics["held_out_error_pruned"]
    assert len(metrics["drift"]) == len(metrics["drift_pruned"]) == 4
    assert metrics["drift"][-1] == metrics["held_out_error"]
    assert record.tokens == {"calibration": 8 * 32, "held_out": 2 * 32, "evaluation": 4 * 47}


def test_record_holds_time_and_memory(record):
    phases = {"load", "evaluate", "prune", "reconstruct"}
    assert set(record.seconds) == phases | {"total"}
    assert all(seconds > 0 for seconds in record.seconds.values())
    assert sum(record.seconds[phase] for phase in phases) <= record.seconds["total"]
    assert set(record.peak_memory_bytes_by_phase) == phases
    # A process with torch in it: not kilobytes, not pages.
    assert 50e6 < record.peak_memory_bytes == max(record.peak_memory_bytes_by_phase.values()) < 50e9


def test_record_holds_protocol_and_environment(record, tiny_text):
    assert record.protocol["calibration"] == f"8 x 32 tokens of {tiny_text} (calibration split), seed 0"
    assert "4 consecutive windows x 48 tokens" in record.protocol["evaluation"]
    assert set(record.protocol["token_hashes"]) == {"calibration", f"evaluation {tiny_text}"}
    environment = record.environment
    top = Path(recon.__file__).parent.parent
    done = subprocess.run(["git", "-C", str(top), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert environment["git_commit"] == (done.stdout.strip() if done.returncode == 0 else None)
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["packages"]["transformers"] is not None
    assert environment["threads"] == torch.get_num_threads()
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["device"].startswith("cpu") and environment["compute_dtype"] == "float32"


def test_record_holds_every_window(record):
    names = [f"block {index} {half}" for index in range(4) for half in ("attention", "mlp")]
    assert [window["name"] for window in record.windows] == names
    for window in record.windows:
        assert window["status"] == "repaired" and len(window["losses"]) == 4
        assert window["error_after"]["calibration"] < window["error_before"]["calibration"]


def test_record_survives_json(record):
    again = type(record).from_dict(json.loads(json.dumps(record.to_dict())))
    assert json.dumps(again.to_dict()) == json.dumps(record.to_dict())


def test_same_spec_gives_the_same_record(record, spec):
    assert numbers(run(spec)) == numbers(record)


def test_another_seed_gives_another_record(record, spec):
    other = run(spec, seed=1)
    assert other.metrics["dense_perplexity"] == record.metrics["dense_perplexity"]
    assert other.metrics["pruned_perplexity"] != record.metrics["pruned_perplexity"]
    assert other.protocol["token_hashes"]["calibration"] != record.protocol["token_hashes"]["calibration"]


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_a_run_in_a_shared_session_equals_one_alone(spec, criterion):
    session = recon.Session()
    recon.run(replace(spec, criterion=criterion, granularity="block"), session, progress=False)
    shared = recon.run(replace(spec, criterion=criterion), session, progress=False)
    assert shared.shared == ["model", "dense_perplexity", "pruned"]
    alone = run(spec, criterion=criterion)
    assert alone.shared == []
    assert numbers(shared) == numbers(alone)


@pytest.mark.parametrize(
    "change, reused",
    [
        ({"criterion": "magnitude"}, ["model", "dense_perplexity"]),
        ({"pattern": "2:4"}, ["model", "dense_perplexity"]),
        ({"scope": "matrix"}, ["model", "dense_perplexity"]),
        ({"samples": 4}, ["model", "dense_perplexity"]),
        ({"seed": 3}, ["model", "dense_perplexity"]),
        ({"prune_propagation": "dense"}, ["model", "dense_perplexity"]),
        ({"evaluation_length": 32}, ["model"]),
        ({"learning_rate": 1e-3, "epochs": 2, "loss": "cosine"}, ["model", "dense_perplexity", "pruned"]),
    ],
)
def test_a_session_shares_only_what_a_change_leaves_alone(spec, change, reused):
    session = recon.Session()
    recon.run(replace(spec, granularity="none"), session, progress=False)
    shared = recon.run(replace(spec, granularity="none", **change), session, progress=False)
    assert shared.shared == reused
    assert numbers(shared) == numbers(run(spec, granularity="none", **change))


def test_granularity_none_only_prunes(spec, record):
    pruned = run(spec, granularity="none")
    assert pruned.metrics["perplexity"] == pruned.metrics["pruned_perplexity"] == record.metrics["pruned_perplexity"]
    assert pruned.metrics["held_out_error"] == pruned.metrics["held_out_error_pruned"]
    assert pruned.seconds["reconstruct"] == 0 and pruned.windows == []
    assert pruned.metrics["sparsity"] == 0.5


def test_sparsity_is_counted_not_assumed(spec):
    assert run(spec, granularity="none", pattern="0.25").metrics["sparsity"] == 0.25
    assert run(spec, granularity="none", pattern="0.0").metrics["sparsity"] == 0.0
    assert run(spec, pattern="1:4").metrics["sparsity"] == 0.75


def test_evaluation_on_several_texts(spec, tmp_path, tiny_text):
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(reversed(Path(tiny_text).read_text().split("\n\n"))))
    metrics = run(spec, granularity="none", evaluation_texts=(str(other), tiny_text)).metrics
    assert list(metrics["by_text"]) == [str(other), tiny_text]
    assert metrics["dense_perplexity"] == metrics["by_text"][str(other)]["dense_perplexity"]
    assert metrics["dense_perplexity"] != metrics["by_text"][tiny_text]["dense_perplexity"]


def test_no_held_out_samples(spec):
    record = run(spec, held_out_samples=0)
    assert record.metrics["held_out_error"] is None and record.tokens["held_out"] == 0
    assert set(record.windows[0]["error_after"]) == {"calibration"}


# ---- share recovered


@pytest.mark.parametrize(
    "dense, pruned, repaired, share",
    [
        (10, 40, 10, 1.0),
        (10, 40, 40, 0.0),
        (10, 40, 20, 0.5),
        (10, 40, 80, -0.5),
        (10, 40, 5, 1.5),
        (10, 10, 9, None),
        (10, 9, 9, None),
        (10, math.inf, 20, None),
        (10, math.nan, 20, None),
        (10, 40, math.inf, None),
        (10, 40, math.nan, None),
        (math.nan, 40, 20, None),
    ],
)
def test_share_recovered(dense, pruned, repaired, share):
    found = share_recovered(dense, pruned, repaired)
    assert found is None if share is None else found == pytest.approx(share)


# ---- keys


CHANGES = {
    "samples": 9, "sequence_length": 33, "sparsegpt_block_size": 64, "sparsegpt_damping": 0.02, "learning_rate": 1e-3,
    "epochs": 2, "batch_size": 3, "accumulation": 2, "warmup": 0.2, "held_out_samples": 3, "evaluation_samples": 5,
    "evaluation_length": 49, "seed": 1, "criterion": "ria", "pattern": "2:4", "scope": "matrix", "loss": "cosine",
    "prune_propagation": "dense", "granularity": "block", "propagation": "mixed", "start": "exact", "device": "cpu",
    "compute_dtype": "bfloat16", "revision": "main", "evaluation_texts": ("news",),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_key_changes_with_every_field(spec, name):
    assert replace(spec, **{name: CHANGES[name]}).key() != spec.key()


def test_every_number_is_among_the_changes(spec):
    numeric = {field.name for field in fields(spec) if isinstance(getattr(spec, field.name), int | float)}
    assert numeric <= set(CHANGES)


def test_key_is_the_same_for_other_spellings(spec):
    assert replace(spec, granularity="1/2", pattern="0.50").key() == spec.key()
    assert replace(spec, granularity="1").key() == replace(spec, granularity="block").key()
    assert replace(spec, evaluation_texts=list(spec.evaluation_texts)).key() == spec.key()


def test_one_evaluation_text_may_be_given_bare(spec, tiny_text):
    assert replace(spec, evaluation_texts=tiny_text) == spec


def test_key_changes_with_the_text(spec, tmp_path, tiny_text):
    file = tmp_path / "text.txt"
    file.write_text(Path(tiny_text).read_text())
    calibrated, evaluated = replace(spec, text=str(file)), replace(spec, evaluation_texts=(str(file),))
    before = calibrated.key(), evaluated.key()
    assert before == (calibrated.key(), evaluated.key())
    file.write_text(Path(tiny_text).read_text() + " More.")
    assert calibrated.key() != before[0] and evaluated.key() != before[1]


def test_key_changes_with_the_weights(spec, folder):
    spec = replace(spec, model=str(folder))
    before = spec.key()
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert spec.key() != before


def test_key_changes_with_the_schema(spec, monkeypatch):
    before = spec.key()
    monkeypatch.setattr("recon.spec.SCHEMA", 10**6)
    assert spec.key() != before


def test_key_is_the_same_in_another_process(spec):
    settings = {field.name: getattr(spec, field.name) for field in fields(spec)}
    code = f"import recon; print(recon.RunSpec(**{settings!r}).key())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == spec.key()


def test_spec_is_frozen(spec):
    with pytest.raises(FrozenInstanceError):
        spec.samples = 3


# ---- what is refused


COUNTS = "samples epochs batch_size accumulation evaluation_samples sparsegpt_block_size sequence_length evaluation_length"


@pytest.mark.parametrize("name", [*COUNTS.split(), "held_out_samples", "seed"])
@pytest.mark.parametrize("value", [-1, True, 2.0, "4", None, math.nan])
def test_counts_are_whole_numbers(name, value):
    with pytest.raises(ReconError, match=rf"{name} is {value!r}; allowed: a whole number from \d up"):
        recon.RunSpec(**{name: value})


@pytest.mark.parametrize("name", COUNTS.split())
def test_most_counts_are_at_least_one(name):
    with pytest.raises(ReconError, match=f"{name} is 0; allowed"):
        recon.RunSpec(**{name: 0})


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("criterion", "entropy", "'entropy'.*magnitude, random, wanda, ria, sparsegpt"),
        ("pattern", "4:2", "pattern '4:2'.*2:4"),
        ("pattern", "1.5", "pattern '1.5'.*0.5"),
        ("pattern", "-0.1", "pattern '-0.1'.*0.5"),
        ("pattern", "abc", "pattern 'abc'.*0.5"),
        ("pattern", "1", "pattern '1"),
        ("pattern", "nan", "pattern 'nan'"),
        ("pattern", "2:2", "pattern '2:2'"),
        ("pattern", "0:0", "pattern '0:0'"),
        ("pattern", 1.0, "pattern '1.0'"),
        ("granularity", "layer", "granularity 'layer'; allowed: none, matrix, half-block"),
        ("granularity", "0-blocks", "granularity '0-blocks'; allowed"),
        ("granularity", "-1", "granularity '-1'; allowed"),
        ("propagation", "both", "propagation 'both'; allowed: dense, sparse, mixed"),
        ("loss", "l1", "loss 'l1'; allowed: mse, cosine"),
        ("solver", "sgd", "solver 'sgd'; allowed: adamw, exact"),
        ("solver", "exact", "solver exact fits single matrices, not granularity 'half-block'"),
        ("start", "random", "start 'random'; allowed: pruned, exact"),
        ("scope", "column", "scope is 'column'; allowed: auto, row, matrix"),
        ("prune_propagation", "mixed", "prune_propagation is 'mixed'; allowed: sparse, dense"),
        ("compute_dtype", "int8", "compute_dtype is 'int8'; allowed: auto, bfloat16, float32"),
        ("learning_rate", 0, "learning_rate is 0; allowed: a number above 0"),
        ("learning_rate", -1e-3, "learning_rate is -0.001; allowed"),
        ("learning_rate", math.nan, "learning_rate is nan; allowed"),
        ("learning_rate", math.inf, "learning_rate is inf; allowed"),
        ("learning_rate", True, "learning_rate is True; allowed"),
        ("learning_rate", "1e-3", "learning_rate is '1e-3'; allowed"),
        ("warmup", 1.5, "warmup is 1.5; allowed: a number from 0 to 1"),
        ("warmup", math.nan, "warmup is nan; allowed"),
        ("warmup", "none", "warmup is 'none'; allowed"),
        ("sparsegpt_damping", -0.01, "sparsegpt_damping is -0.01; allowed"),
        ("evaluation_texts", (), "evaluation_texts is empty"),
    ],
)
def test_bad_fields_are_refused_at_once(name, value, said):
    with pytest.raises(ReconError, match=said):
        recon.RunSpec(**{name: value})


@pytest.mark.parametrize(
    "change, said",
    [
        ({"pattern": "2:5"}, r"q_proj has 32 input columns.*groups of 5.*2:5"),
        ({"granularity": "9-blocks"}, "windows of 9 blocks, but the model has 4"),
        ({"samples": 9000}, r"9000 samples of 32 tokens are more than the calibration split .* it has \d+ tokens, \d+ samples"),
        ({"held_out_samples": 9000}, "9000 samples of 32 tokens are more than the validation split"),
        ({"evaluation_samples": 9000}, "9000 samples of 48 tokens are more than the evaluation split"),
        ({"sequence_length": 257}, "sequence length 257 is more than the 256 tokens"),
        ({"evaluation_length": 300}, "sequence length 300 is more than the 256 tokens"),
        ({"model": "no-such-model"}, "unknown model 'no-such-model'; bundled: smollm2-135m"),
        ({"text": "no-such-text"}, "unknown text 'no-such-text'; choose one of wikipedia, news"),
        ({"evaluation_texts": ("missing.txt",)}, r"no text file 'missing\.txt'"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
    ],
)
def test_what_only_model_or_text_can_tell_is_refused_before_anything_long(spec, nothing_long, change, said):
    with pytest.raises(ReconError, match=said):
        run(spec, **change)


def test_an_empty_text_is_refused(spec, nothing_long, tmp_path):
    file = tmp_path / "empty.txt"
    file.write_text("\n \n")
    with pytest.raises(ReconError, match=r"empty\.txt' is empty"):
        run(spec, text=str(file))


def own_folder(tiny, family: str, tiny_folder: str, folder: Path, **changes) -> str:
    """A folder with a model of `family` and the tokenizer of `tiny_folder`."""
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    vocabulary = json.loads((Path(tiny_folder) / "config.json").read_text())["vocab_size"]
    tiny(family, vocab_size=vocabulary, **changes).save_pretrained(folder)
    return str(folder)


def test_half_blocks_of_a_bloom_are_refused_and_blocks_work(spec, tiny, tiny_folder, tmp_path, monkeypatch):
    bloom = own_folder(tiny, "bloom", tiny_folder, tmp_path / "bloom")
    with monkeypatch.context() as patch:
        patch.setattr("recon.evaluation.perplexity", lambda *args, **kwargs: pytest.fail("has begun to compute"))
        with pytest.raises(ReconError, match=r"half-block.*BloomBlock.*use granularity block"):
            run(spec, model=bloom)
    record = run(spec, model=bloom, granularity="block")
    assert record.status == "done" and record.metrics["sparsity"] == 0.5


def test_a_model_that_is_not_causal_is_refused(spec, nothing_long, tiny, tiny_folder, tmp_path):
    bert = own_folder(tiny, "bert", tiny_folder, tmp_path / "bert")
    with pytest.raises(ReconError, match="Bert.* is not a causal language model"):
        run(spec, model=bert)


def test_the_target_folder_is_checked_first(spec, nothing_long, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    with pytest.raises(ReconError, match="exists and is not an empty folder"):
        recon.run(spec, save=tmp_path / "full", progress=False)


# ---- the pieces, on a model of one's own


def test_pieces_work_on_a_plain_transformers_model(tiny, tokens):
    model = tiny("qwen2")
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    samples = tokens(16, 32)
    pruned = copy.deepcopy(model)
    found = recon.prune(pruned, samples, criterion="wanda", pattern="2:4", progress=False)
    before = recon.perplexity(pruned, samples, progress=False).value
    left = {name: pruned.get_submodule(name).weight.clone() for name in found.masks}
    reports = recon.reconstruct(pruned, model, samples, granularity="half-block", progress=False)
    assert len(reports) == 2 * 3
    assert recon.perplexity(pruned, samples, progress=False).value != before
    for name, mask in found.masks.items():
        weight = pruned.get_submodule(name).weight
        assert sparsity_of(weight) == 0.5 and torch.equal(weight != 0, mask)
        assert not torch.equal(weight, left[name])
    assert all(torch.equal(parameter, dense[name]) for name, parameter in model.named_parameters())


def test_a_model_pruned_by_something_else_is_repaired_by_its_zeros(tiny, tokens):
    model, samples = tiny("llama"), tokens(16, 32)
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in pruned.named_parameters():
            if name.endswith("_proj.weight"):
                parameter[:, ::3] = 0
    recon.reconstruct(pruned, model, samples, granularity="block", progress=False)
    for name, parameter in pruned.named_parameters():
        if name.endswith("_proj.weight"):
            assert not parameter[:, ::3].any() and parameter[:, 1::3].all()
