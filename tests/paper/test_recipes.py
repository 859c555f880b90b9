"""Recipes by name, and the same search for each of them."""

import pandas as pd
import pytest

from recon.errors import ReconError
from recon.experiment.config import RunSpec
from recon.experiment.study import recipe_name
from recon.paper import recipes, runner

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


def test_every_recipe_is_searched_alike_at_each_count():
    rates = {"reconstruction": [3e-3, 1e-2, 3e-2], "masklora, distilled": [3e-4, 1e-3, 3e-3]}  # half a decade apart, rounded
    specs = recipes.search(BASE, {"reconstruction": [2, 8], "masklora, distilled": [8]}, rates, seed=1)
    tried = [(recipe_name(each.flat()), each.seed) for each in specs]
    assert tried == [("reconstruction", 1)] * 6 + [("masklora, distilled", 1)] * 3
    assert [each.reconstruction.learning_rate for each in specs[:6]] == rates["reconstruction"] * 2
    assert recipes.search(BASE, {"reconstruction": [2]}, {}, seed=1) == []


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ({"reconstruction": [1e-3, 1e-2]}, "no learning rates to try for 'full'"),
        ({"reconstruction": [1e-3, 1e-2], "full": [1e-3]}, "differ in number or spacing"),
        ({"reconstruction": [1e-3, 1e-2], "full": [1e-3, 3e-3]}, "differ in number or spacing"),
    ],
)
def test_unequal_searches_are_refused(rates, said):
    with pytest.raises(ReconError, match=said):
        recipes.search(BASE, {"reconstruction": [8], "full": [8]}, rates, seed=0)


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
def test_profiles_search_every_recipe_alike(profile):
    parameters = runner.profile_parameters(profile)
    of_recipes, of_adapters = parameters["2-sample-efficiency"], parameters["5-what-reviewers-asked"].get("adapter_rates", {})
    recipes.check_alike(of_adapters, of_adapters)
    if rates := of_recipes.get("rates"):
        searched = ["reconstruction", *of_recipes["methods"], *of_recipes["more_methods"]]
        recipes.check_alike([*searched, *(f"{name}, distilled" for name in of_recipes["distilled"])], rates)
