"""Learning rates are chosen by model."""

import pandas as pd
import pytest

import recon
from recon.experiment import study
from recon.experiment.study import grid, read_records, run_study
from recon.paper.tuning import at_rates, best, tuned_rates


@pytest.fixture
def base(tiny_folder, tiny_text):
    return recon.RunSpec.of(
        model=tiny_folder, text=tiny_text, samples=4, sequence_length=32, held_out_samples=2, evaluation_texts=(tiny_text,),
        evaluation_samples=2, evaluation_length=64,
    )  # fmt: skip


def test_the_best_is_chosen_on_held_out_text():
    runs = pd.DataFrame({"a": ["x", "x", "y", "y"], "held_out_perplexity": [3.0, 2.0, None, 9.0], "perplexity": [1, 5, 0, 7]})
    assert list(best(runs, "a").index) == [1, 3]
    assert best(runs[["a"]], "a").empty


def test_rates_are_chosen_by_model_on_held_out_text_and_kept_as_records(base, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(study, "run", lambda spec, *args, **options: counted.append(spec) or recon.run(spec, *args, **options))
    rates = {base.model.model: [1e-3, 1.0]}
    chosen = tuned_rates(base, rates, tmp_path)
    found = {record.spec["learning_rate"]: record.metrics["held_out_perplexity"] for record in read_records(tmp_path)}
    lowest = min(found, key=found.get)
    assert chosen == {base.model.model: lowest} and len(set(found.values())) == 2
    assert {spec.evaluation.samples for spec in counted} == {1} and {spec.reconstruction.granularity for spec in counted} == {
        "half-block"
    }
    assert tuned_rates(base, rates, tmp_path, compute=False) == chosen and len(counted) == 2
    assert tuned_rates(base, {base.model.model: [0.1]}, tmp_path, compute=False) == tuned_rates(base, {}, tmp_path) == {}
    specs = at_rates(grid(base, granularity=["none", "block"]), chosen)
    assert [spec.reconstruction.learning_rate for spec in specs] == [base.reconstruction.learning_rate, lowest]
    assert at_rates(specs, {"another": 0.5}) == specs


def test_of_a_study_of_nothing_nothing_is_best(tmp_path):
    assert best(run_study([], tmp_path), "adapter").empty
