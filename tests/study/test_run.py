"""A run: its record, what it shares with others of its session, and what the next process knows of the dense model."""

import gc
import math
import shutil
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from fixtures.models import dressed, saved_model
from fixtures.runs import comparable, largest, record_of, result_of, smallest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import recon
from recon.data import models
from recon.kernels.criteria import CRITERIA, Criterion
from recon.kernels.patterns import Pattern
from recon.methods.prune import Pruner, Pruning
from recon.study import measure
from recon.study import run as runs
from recon.study.measure import Texts, share_recovered


@pytest.fixture(scope="module")
def spec(tiny_spec):
    return tiny_spec.replaced(samples=6, held_out_samples=3, evaluation_samples=3)


@pytest.fixture(scope="module")
def record(spec):
    return record_of(spec)


def test_a_record_holds_what_it_takes_to_believe_it(spec, record):
    assert (record.status, record.error, record.spec, record.key) == ("done", None, spec.flat(), spec.key())
    assert record.metrics["sparsity"] == 0.5 and 1 < record.metrics["pruned_perplexity"] < math.inf
    assert math.isfinite(record.metrics["perplexity"])
    assert {"total", "prune", "reconstruct", "evaluate"} <= set(record.seconds)
    assert record.seconds["total"] >= record.seconds["reconstruct"] > 0
    assert record.peak_memory_bytes == max(record.peak_memory_bytes_by_phase.values()) > 0
    added = record.added_memory_bytes_by_phase
    assert 0 <= added["reconstruct"] < record.peak_memory_bytes_by_phase["reconstruct"]
    assert record.tokens == {"prune": 6 * 32, "reconstruct": 6 * 32, "retrain": 0, "held_out": 3 * 32, "evaluation": 3 * 63}
    assert "3 consecutive windows of" in record.protocol["evaluation"] and "x 64 tokens" in record.protocol["evaluation"]
    assert record.protocol["dense"] == "float32" and "pruned" not in record.protocol
    assert {"git_commit", "git_dirty", "packages", "device", "threads", "compute_dtype"} <= set(record.environment)
    assert len(record.windows) == 8 and [len(window["losses"]) for window in record.windows] == [6, 4 * 6] * 4
    assert len(record.metrics["drift"]) == len(record.metrics["drift_pruned"]) == 4


@pytest.mark.parametrize(("family", "changes", "said"), [
    ("llama", {"samples": 1, "allocation": "measured"}, "'measured' with 1 calibration sample"),
    ("mixtral", {"pattern": "2:4", "reorder_neurons": True}, "an expert's; whole heads and neurons"),
    ("t5", {"granularity": "block", "tasks": "analogies"}, "zero-shot tasks need a causal language model"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_before_it_is_measured(spec, tmp_path, tiny_folder, monkeypatch, family, changes, said):
    monkeypatch.setattr(measure, "measure", Mock(side_effect=AssertionError))
    with pytest.raises(recon.ReconError, match=said):
        record_of(spec.replaced(model=saved_model(family, tiny_folder, tmp_path), **changes))


def test_share_recovered():
    found = [share_recovered(10, *values) for values in ((40, 10), (40, 20), (40, 160), (9, 9), (math.inf, 9))]
    assert found[:3] == pytest.approx([1.0, 0.5, -1.0]) and found[3:] == [None, None]


def test_a_run_among_others_equals_a_run_alone_and_pruning_alone_changes_nothing_more(spec, record):
    session = recon.Session()
    pruned = record_of(spec.replaced(granularity="none"), session)
    assert record.shared == pruned.shared == pruned.windows == [] and pruned.seconds["reconstruct"] == 0
    assert pruned.metrics["perplexity"] == pruned.metrics["pruned_perplexity"] == record.metrics["pruned_perplexity"]
    assert pruned.metrics["drift"] == pruned.metrics["drift_pruned"]
    shared = record_of(spec, session)
    assert shared.shared == ["model", "dense", "pruned", "measure pruned"]
    assert comparable(shared) == comparable(record)
    other = record_of(spec.replaced(seed=1), session)
    assert other.shared == ["model", "dense"] and other.protocol["token_hashes"] != record.protocol["token_hashes"]


@pytest.mark.parametrize("stream", ["no", "yes"])
def test_nothing_of_one_model_is_in_memory_when_the_next_is_loaded(stream, spec, tiny_folder, tmp_path, monkeypatch):
    session, other = recon.Session(), shutil.copytree(tiny_folder, tmp_path / "other")
    spec = spec.replaced(granularity="none")
    found = [result_of(spec, session, save=tmp_path / "pruned").model]
    found += [result_of(spec.replaced(pruned=str(tmp_path / "pruned")), session).model, session.load(*spec.loaded_by)[0].model]
    before = [weakref.ref(model) for model in found]
    found.clear()
    seen, read = [], models.AutoTokenizer.from_pretrained

    def look(*args, **options):  # the first thing that is read
        gc.collect()
        seen.append([model() for model in before])
        return read(*args, **options)

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", look)
    monkeypatch.setenv("RECON_CACHE", str(tmp_path))
    record_of(spec.replaced(model=str(other)), session, stream=stream)
    assert seen[0] == [None, None, None]


@pytest.mark.parametrize("retrain", ["masklora", "full", "lora"])
def test_retraining_follows_reconstruction_and_lora_says_what_its_mask_costs(spec, record, retrain):
    """More samples for retraining change nothing that comes before, as every phase reads the first of one draw."""
    found = record_of(spec.replaced(retrain=retrain, retrain_samples=9, retrain_epochs=3, retrain_objective="distil"))
    assert found.metrics["pruned_perplexity"] == record.metrics["pruned_perplexity"]
    assert [window["losses"] for window in found.windows] == [window["losses"] for window in record.windows]
    assert found.metrics["kl"] < record.metrics["kl"] and found.metrics["sparsity"] == 0.5
    assert len(found.retraining["losses"]) == 3 * 9 and found.tokens["retrain"] == 9 * 32 and found.seconds["retrain"] > 0
    assert found.flops["retrain"] > 0 and found.flops["reconstruct"] == record.flops["reconstruct"]
    unmasked = found.metrics.get("perplexity_before_masking")
    assert unmasked not in (None, found.metrics["perplexity"]) if retrain == "lora" else unmasked is None


def test_the_dense_control_is_not_pruned(spec):
    found = record_of(spec.replaced(criterion="none", granularity="none", retrain="masklora")).metrics
    assert found["sparsity"] == 0 == max(found["sparsity_by_matrix"].values())
    assert found["pruned_perplexity"] == found["dense_perplexity"] != found["perplexity"] and found["share_recovered"] is None


def test_a_model_with_experts_runs_and_names_those_that_starve(spec, tmp_path, tiny_folder):
    model = saved_model("mixtral", tiny_folder, tmp_path, num_hidden_layers=1)
    record = record_of(spec.replaced(model=model, samples=2, sequence_length=16))
    assert record.status == "done" and record.metrics["sparsity"] == 0.5
    starved = record.metrics["under_calibrated_matrices"]
    assert starved and set(starved) < set(record.metrics["sparsity_by_matrix"])


@pytest.fixture
def cached(tiny_spec, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "LEAST", 0)
    monkeypatch.setenv("RECON_CACHE", str(tmp_path))
    monkeypatch.setattr("recon.study.record.commit", lambda: {"git_commit": "one", "git_dirty": False})
    return tiny_spec.replaced(granularity="none", evaluation_length=32, compute_dtype="bfloat16")


@pytest.mark.parametrize("stream", ["no", "yes"])
def test_the_next_process_measures_the_dense_model_no_more(cached, stream):
    first = record_of(cached, stream=stream)
    again, same = record_of(cached.replaced(pattern="0.6", seed=1), stream=stream), record_of(cached, stream=stream)
    assert comparable(same) == comparable(first) and (first.shared, again.shared) == ([], ["dense"])
    assert again.metrics["dense_perplexity"] == first.metrics["dense_perplexity"]


def test_whatever_decides_it_keeps_it_apart_and_of_code_that_is_not_committed_nothing_is_kept(cached, tmp_path, monkeypatch):
    record_of(base := cached.replaced(evaluation_samples=1))
    changes = {"evaluation_samples": 2, "evaluation_length": 16}, {"held_out_samples": 0}, {"compute_dtype": "float32"}
    assert [record_of(base.replaced(**changed)).shared for changed in (*changes, {"kl_windows": 0})] == [[]] * 4
    assert len(list((tmp_path / "derived").glob("dense-*"))) == 5
    monkeypatch.setattr("recon.study.record.commit", lambda: {"git_commit": "one", "git_dirty": True})
    assert record_of(base).shared == [] and record_of(base.replaced(evaluation_samples=3)).shared == []
    assert len(list((tmp_path / "derived").glob("dense-*"))) == 5


def test_each_text_is_of_its_own_split_long_enough_for_every_phase_and_begins_as_the_tokenizer_says(spec, tiny_folder, tiny_text):
    tokenizer, spec = dressed(AutoTokenizer.from_pretrained(tiny_folder), "<bos> $A"), spec.replaced(prune_samples=9)
    own, joined = (Texts.draw(spec.replaced(evaluation_protocol=protocol), tokenizer) for protocol in ("samples", "joined"))
    for texts, protocol in ((own, "samples"), (joined, "joined")):
        assert torch.equal(texts.held_out, recon.sample_tokens(tiny_text, "validation", tokenizer, 3, 32))
        wanted = recon.sample_tokens(tiny_text, "evaluation", tokenizer, 3, 64, protocol=protocol)
        assert torch.equal(texts.evaluation[tiny_text], wanted)
    available = recon.sample_tokens(tiny_text, "calibration", tokenizer, 462, 32)
    assert len(own.calibration) == 9 and all((available == row).all(1).any() for row in own.calibration)
    assert torch.equal(own.calibration, joined.calibration) and own.hashes() != joined.hashes()


def test_metrics_are_of_the_state_that_they_are_named_after(spec, tiny_text):
    def measured(number):
        perplexities = {tiny_text: {"value": 10 + number, "tokens": 1, "per_window": [number], "kl_per_window": [number]}}
        tasks = {"tasks": {"analogies": {"acc": number / 10}}}
        return {"perplexities": perplexities, "zero_shot": tasks, "drift": [0, number], "held_out": 20 + number}

    found = measure.metrics(spec.replaced(tasks="analogies"), *map(measured, (1, 3, 2)))
    wanted = {"dense_perplexity": 11, "pruned_perplexity": 13, "perplexity": 12, "kl": 2}
    wanted |= {"dense_held_out_perplexity": 21, "held_out_perplexity": 22}
    wanted |= {"dense_accuracy": 0.1, "pruned_accuracy": 0.3, "accuracy": 0.2}
    wanted |= {"held_out_error_pruned": 3, "held_out_error": 2, "drift_pruned": [0, 3], "drift": [0, 2]}
    assert wanted.items() <= found.items()


PRUNED = {"granularity": "none", "criterion": "sparsegpt", "compute_dtype": "float32"}
FOLLOWS = [  # what a run is, beside PRUNED, and how the next of its session differs
    ({}, {"evaluation_samples": 2}), ({}, {"kl_windows": 1}), ({}, {"evaluation_length": 32}), ({}, {"held_out_samples": 0}),
    ({}, {"sequence_length": 16}), ({}, {"compute_dtype": "bfloat16"}), ({}, {"granularity": "block"}),
    ({}, {"sparsegpt_damping": 0.5}), ({}, {"prune_samples": 3}),
    ({"criterion": "flap", "pattern": "0.3"}, {"granularity": "block"}), ({"criterion": "wanda"}, {"granularity": "block"}),
    *(({"criterion": "wanda", "pattern": "2:4", "reorder_neurons": True}, changes)
      for changes in ({"pattern": "4:8"}, {"reorder_neurons": False})),
]  # fmt: skip


@pytest.mark.parametrize("first, changes", FOLLOWS)
def test_a_run_after_another_is_that_of_a_session_of_its_own(spec, first, changes):
    """And what they share is after it as it was before, such as weights that SparseGPT has changed."""
    session, spec = recon.Session(), spec.replaced(**PRUNED | first)
    before, changed = result_of(spec, session), spec.replaced(**changes)
    found = record_of(changed, session)
    assert comparable(found) == comparable(record_of(changed)) and found.metrics != before.record.metrics
    again = result_of(spec, session)
    assert comparable(again.record) == comparable(before.record)
    assert all(map(torch.equal, again.model.parameters(), before.model.parameters()))


def test_as_many_samples_are_read_for_pruning_and_for_the_divergence_as_is_said(spec, tiny_text):
    each = (spec.replaced(granularity="none", kl_windows=2, **read) for read in ({"samples": 2}, {"prune_samples": 2}, {}))
    few, said, many = (record_of(one).metrics for one in each)
    assert few["pruned_perplexity"] == said["pruned_perplexity"] != many["pruned_perplexity"]
    windows = few["by_text"][tiny_text]["kl_per_window"]
    assert {state: len(values) for state, values in windows.items()} == {"pruned": 2, "reconstructed": 2}


def test_time_for_pruning_is_not_time_for_reconstruction(spec, monkeypatch):
    plain = Pruner.summed_up
    monkeypatch.setattr(Pruner, "summed_up", lambda self: Pruning(plain(self).masks, seconds=1000.0))
    assert spec.one_pass and not spec.replaced(criterion="magnitude", allocation="dlp", prune_samples=1).one_pass
    monkeypatch.setitem(CRITERIA, "mine", replace(CRITERIA["wanda"], statistics="moments"))
    assert spec.replaced(criterion="mine").one_pass and not spec.replaced(criterion="mine", start="exact").one_pass
    seconds = record_of(spec).seconds
    assert seconds["prune"] == 1000 and -1000 < seconds["reconstruct"] < 0
    monkeypatch.undo()

    def slow(decoder, *given):
        time.sleep(1.5)
        return [Pattern(0.5) for _ in decoder.blocks]

    monkeypatch.setattr("recon.methods.prune.allocate", slow)
    spec = spec.replaced(allocation="dlp")
    assert spec.one_pass and record_of(spec).seconds["prune"] > 1.5


def test_every_phase_draws_by_the_seed_of_the_run(spec, monkeypatch):
    called = []
    for module, name in ((runs.prune, "prune"), (runs.reconstruct, "reconstruct"), (runs.retrain, "retrain")):
        monkeypatch.setattr(module, name, Mock(wraps=getattr(module, name)))
        called.append(getattr(module, name))
    record_of(spec.replaced(seed=5, statistics="sparse", retrain="masklora"))
    assert [each.call_args.kwargs["seed"] for each in called] == [5] * 3


@pytest.mark.parametrize("which", ["model", "pruned", "evaluation_texts"])
def test_what_has_changed_is_read_anew(spec, tiny_folder, tmp_path, which):
    folder, session, found = Path(shutil.copytree(tiny_folder, tmp_path / "model")), recon.Session(), []
    text, weights = folder / "tiny_text.txt", folder / "model.safetensors"
    spec = spec.replaced(granularity="none", **{which: str(text if which == "evaluation_texts" else folder)})
    for size in (1.0, 0.5):
        content = load_file(f"{tiny_folder}/model.safetensors")
        for name in (name for name in content if name.endswith("up_proj.weight")):
            content[name] *= size * (content[name].abs() > 0.02)
        save_file(content, weights, metadata={"format": "pt"})
        text.write_text(text.read_text()[round(10_000 * (1 - size)) :])
        each = [record_of(spec, one).metrics for one in (session, recon.Session())]
        found.append([(metrics["dense_perplexity"], metrics["perplexity"]) for metrics in each])
    assert found[0][0] == found[0][1] != found[1][0] == found[1][1]
    assert which == "pruned" or found[0][0][0] != found[1][0][0]


def test_a_criterion_of_ones_own_is_known_by_all_that_decides_its_masks():
    def powered(power):
        return lambda weight, norms, generator: weight.abs() * norms**power

    def typed(code):  # whose source Python cannot find
        return eval(f"lambda weight, norms, generator: {code}")

    def code(scope, score):
        return Criterion("mine", "norm", scope, "", "", score).source_code

    scores = [
        powered(1),
        powered(2),
        partial(largest),
        typed("weight"),
        typed("-weight"),
        typed("norms"),
        CRITERIA["wanda"].score,
    ]
    codes = [code(scope, score) for scope in ("row", "matrix") for score in scores]
    assert len({*codes}) == len(codes) and codes[:2] == [code("row", powered(power)) for power in (1, 2)]
    assert not any(CRITERIA[name].source_code for name in ("wanda", "sparsegpt", "flap"))


def test_a_criterion_that_has_changed_prunes_anew_and_no_text_is_read_for_what_needs_none(spec, monkeypatch):
    session, found = recon.Session(), []
    for score in (largest, smallest):
        monkeypatch.setitem(CRITERIA, "mine", Criterion("mine", "none", "row", "", "", score))
        found += [record_of(spec.replaced(criterion="mine", granularity="none"), one) for one in (session, recon.Session())]
    one, again, changed, anew = (record.metrics["perplexity"] for record in found)
    assert one == again != changed == anew
    assert found[0].tokens["prune"] == 0 and found[0].protocol["calibration"].startswith("prune 0, reconstruct 0, ")


@pytest.mark.slow
def test_the_dense_perplexity_of_the_bundled_model():
    """Four windows of 512 tokens of held-out Wikipedia, known numbers. bfloat16 rounds differently on different processors."""
    model, tokenizer = recon.load("smollm2-135m")
    tokens = recon.sample_tokens("wikipedia", "evaluation", tokenizer, samples=4, sequence_length=512)
    for dtype, golden in (("float32", 20.54), ("bfloat16", 20.57)):
        found = recon.perplexity(model, tokens, execution=recon.Execution("cpu", dtype))
        assert (found.tokens, found.value) == (4 * 511, pytest.approx(golden, rel=0.01)), dtype


@pytest.mark.slow
def test_reconstructing_the_bundled_model():
    """The paper's picture, small: half-block windows recover a share, whole blocks about as well, single matrices worse."""
    base, session = recon.RunSpec.of(samples=32, sequence_length=256, evaluation_samples=6), recon.Session()

    def share(**changes) -> float:
        record = record_of(base.replaced(**changes), session)
        assert record.metrics["sparsity"] == 0.5
        assert record.metrics["held_out_error"] < record.metrics["held_out_error_pruned"] or changes["granularity"] == "matrix"
        return record.metrics["share_recovered"]

    half = share(granularity="half-block")
    assert half > 0.15
    assert share(granularity="block") == pytest.approx(half, abs=0.08)
    assert share(granularity="matrix") < half - 0.03
    assert share(granularity="half-block", criterion="magnitude") > half
