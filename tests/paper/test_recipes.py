"""Recipes by name, and the same search for each of them."""

import math

import pandas as pd
import pytest

from recon.paper import recipes, runner
from recon.study.spec import RunSpec
from recon.study.studies import recipe_name

BASE = RunSpec.of(samples=32, prune_samples=32)
NAMES = [
    "pruned", "reconstruction", "masklora", "full", "masklora, distilled", "reconstruction, then masklora",
    "reconstruction, then full, distilled", "dense, masklora",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_what_its_name_says(name):
    assert recipe_name(recipes.spec(BASE, name, 8).flat()) == name


def test_a_recipe_trains_on_its_samples_from_the_same_pruned_weights():
    ours, theirs, both = (recipes.spec(BASE, name, 8) for name in ("reconstruction", "full", "reconstruction, then full"))
    assert {each.samples_by_phase["prune"] for each in (ours, theirs, both)} == {32}
    assert ours.samples_by_phase["reconstruct"] == theirs.samples_by_phase["retrain"] == 8
    assert both.samples_by_phase["reconstruct"] == both.samples_by_phase["retrain"] == 8


def test_rates_hold_for_their_count_and_for_recipes_made_of_them():
    rates = {("reconstruction", 8): 0.5, ("full", 8): 0.25, ("full", 32): 0.75}
    both = recipes.spec(BASE, "reconstruction, then full", 8, 3, rates)
    assert (both.reconstruction.learning_rate, both.retraining.learning_rate, both.seed) == (0.5, 0.25, 3)
    assert recipes.spec(BASE, "dense, full", 32, 0, rates).retraining.learning_rate == 0.75
    assert recipes.spec(BASE, "reconstruction", 2, 0, rates).reconstruction.learning_rate == BASE.reconstruction.learning_rate


RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]


class Study:
    """Stands for `recon.run_study`: held-out perplexity is lowest at a rate of each recipe's own. done: keys of runs with records."""

    def __init__(self, best: dict[str, float], done=(), fails=()):
        self.best, self.done, self.fails, self.ran = best, set(done), set(fails), []

    def __call__(self, specs, compute):
        rows = []
        for each in specs:
            flat = each.flat()
            name = recipe_name(flat)
            rate = flat["learning_rate"] if name == "reconstruction" else flat["retrain_learning_rate"]
            if compute and each.key() not in self.done:
                self.done.add(each.key())
                self.ran.append((name, each.calibration.samples if name == "reconstruction" else flat["retrain_samples"], rate))
            status = "failed" if rate in self.fails else "done" if each.key() in self.done else "missing"
            held_out = abs(math.log(rate / self.best[name])) if status == "done" else math.nan
            rows.append(flat | {"recipe": name, "held_out_perplexity": held_out, "key": each.key(), "status": status})
        return pd.DataFrame(rows, columns=None if rows else [*BASE.flat(), "recipe", "held_out_perplexity", "key", "status"])


def test_every_recipe_is_searched_by_one_rule_at_each_count():
    study = Study({"reconstruction": 1e-3, "masklora, distilled": 1e-2})
    found = recipes.search(BASE, {"reconstruction": [2, 8], "masklora, distilled": [8]}, RATES, 1, study)
    assert recipes.chosen(found) == {("reconstruction", 2): 1e-3, ("reconstruction", 8): 1e-3, ("masklora, distilled", 8): 1e-2}
    middle = [("reconstruction", count, rate) for count in (2, 8) for rate in (3e-4, 1e-3, 3e-3)]
    assert study.ran == [*middle, *(("masklora, distilled", 8, rate) for rate in (3e-4, 1e-3, 3e-3, 1e-2))]
    assert recipes.search(BASE, {"reconstruction": [2]}, [], 1, study).empty


def test_a_search_takes_what_has_records_and_runs_nothing_unless_told_to():
    recorded = [recipes.spec(BASE, "full", 8, 0, {("full", 8): rate}).key() for rate in (1e-4, 3e-4)]
    study = Study({"full": 1e-4}, recorded)
    found = recipes.search(BASE, {"full": [8]}, RATES, 0, study, compute=False)
    assert not study.ran and sorted(found["learning_rate"]) == [1e-4, 3e-4] and recipes.chosen(found) == {("full", 8): 1e-4}


def test_a_search_ends_beside_rates_that_fail():
    study = Study({"full": 1e-2}, fails=[3e-3])
    found = recipes.search(BASE, {"full": [8]}, RATES, 0, study)
    assert recipes.chosen(found) == {("full", 8): 1e-3} and len(study.ran) == 3


def test_the_rate_is_chosen_for_each_count_on_held_out_text():
    rows = [("full", 32, 2, 0.1, 9.0, "done"), ("full", 32, 2, 0.3, 7.0, "done"), ("full", 32, 8, 0.1, 3.0, "done"),
            ("full", 32, 8, 0.3, 4.0, "done"), ("none", 2, 0, 0.1, 5.0, "done"), ("none", 2, 0, 0.3, 1.0, "failed")]  # fmt: skip
    runs = pd.DataFrame(rows, columns=["retrain", "samples", "retrain_samples", "rate", "held_out_perplexity", "status"])
    runs["recipe"] = runs["retrain"].replace("none", "reconstruction")
    runs = runs.assign(learning_rate=runs["rate"], retrain_learning_rate=runs["rate"] / 10, key="k")
    found = recipes.searched(runs)
    assert recipes.chosen(found) == {("full", 2): 0.03, ("full", 8): 0.01, ("reconstruction", 2): 0.1}
    assert len(found) == 5 and recipes.chosen(recipes.searched(runs[runs["status"] == "failed"])) == {}


@pytest.mark.parametrize("profile", runner.PROFILES)
def test_profiles_try_rising_rates_in_one_spacing(profile):
    parameters = runner.profile_parameters(profile)
    for rates in (
        parameters["2-sample-efficiency"].get("rates", []),
        parameters["5-what-reviewers-asked"].get("adapter_rates", []),
    ):
        steps = {round(math.log10(float(b) / float(a)), 1) for a, b in zip(rates, rates[1:])}
        assert steps <= {0.5}
