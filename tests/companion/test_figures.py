"""Figures from few made-up records: they draw, and their data hold what was put in."""

import json

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from fixtures.made_up import record, seeds

import recon
from companion import figures, frame, judge, search

matplotlib.use("agg")
SIZES = ("none", "matrix", "half-block", "block")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def table(*records, memory=False):
    more = {"added_memory_bytes_by_phase": {"prune": 2**31, "reconstruct": 2**30}} if memory else {}
    return frame.table([run | more for run in records])


def of_sizes(count=2, **options):
    shares = dict(zip(SIZES, (0.0, 0.2, 0.4, 0.41)))
    return [run for size, share in shares.items() for run in seeds(share, count, granularity=size, **options)]


def test_sizes_are_means_over_seeds():
    runs = table(*of_sizes(3), *of_sizes(1, pattern="2:4"), memory=True)
    data = figures.sizes(runs).set_index(["pattern", "granularity"])
    assert data.loc[("0.5", "half-block"), "perplexity"] == pytest.approx(35.0) and data.loc[("0.5", "pruned"), "seeds"] == 3
    expected = 1 - np.log(35 / 20) / np.log(45 / 20)
    assert data.loc[("0.5", "half-block"), "share recovered"] == pytest.approx(expected) and data[frame.MEMORY].eq(1.0).all()


@pytest.mark.parametrize("memory", [True, False])
def test_memory_is_drawn_if_records_have_it_and_else_flops(memory):
    figure, drawn, finding = figures.memory(figures.sizes(table(*of_sizes(), memory=memory)))
    assert (frame.MEMORY in drawn) == memory and finding.startswith("Block windows take 1.0 times") and len(figure.axes) == 1
    assert figures.costs(table(*of_sizes(), memory=memory))[2].startswith("The lowest perplexity is that of block")


def test_effects_are_paired_and_judged():
    given = table(*of_sizes(3)), ["model", "fit"], {"fit": "half-block"}
    data = figures.effects(*given).set_index("fit")
    assert data["verdict"].to_dict() == {"none": "worse", "matrix": "worse", "half-block": "default", "block": "equal"}
    assert data.loc["matrix", "difference"] == pytest.approx(-0.2, abs=0.01)
    flipped = figures.effects(*given, flip=True, share=False).set_index("fit")
    assert flipped.loc["matrix", "difference"] == pytest.approx(0.2 * 0.8, abs=0.01)
    figure = figures.forest(data.reset_index(), "fit", "model", "share")
    assert len(figure.axes) == 1 and figures.count_words(data) == "1 equal, 2 worse"


def test_efficiency_and_budget():
    both = {"other": 0.3, "kl": 0.3, "prune_samples": 32}
    options = {"granularity": "none", "retrain": "masklora", "samples": 32, **both}
    ours = [run for n in (2, 8) for run in seeds(0.3 + n / 100, 2, samples=n, **both)]
    theirs = [run for n in (2, 8) for run in seeds(0.2, 2, retrain_samples=n, **options)]
    runs = table(*seeds(0.0, 2, granularity="none", other=0.0, kl=0.0), *ours, *theirs)
    figure, drawn, finding = figures.efficiency(runs, 256)
    differences = drawn[drawn["panel"] == "difference"].set_index("measure")["difference"]
    assert len(differences) == 2 * 3 and (differences["perplexity, wikipedia"] > 0).all()
    assert finding.startswith("Reconstruction against retraining at equal samples: 2 better, ")
    figure, means, finding = figures.budget(runs)
    assert set(means["method"]) == {"reconstruction", "masklora"} and "reconstruction alone in" in finding


def test_front_is_what_nothing_beats():
    draw = np.random.default_rng(0)
    means = pd.DataFrame({"cost": draw.uniform(1, 100, 60), "quality": draw.uniform(0, 1, 60)})
    best = figures.front(means, "cost", "quality")
    for row in means.itertuples():
        beaten = ((means["cost"] * figures.ALIKE < row.cost) & (means["quality"] < row.quality)).any()
        assert (row.Index in best.index) != beaten


@pytest.fixture
def asked(monkeypatch):
    """Runs are made up, and noted here: held-out perplexity is lowest at a rate of 1e-3.

    Rates at which all is rolled back, to what would be the lowest perplexity, are not to be chosen. Of random masks it is
    lowest, instead, where it has fallen again.
    """
    asked = []

    def run_study(specs, folder, **_):
        asked.extend(specs)
        for spec in specs:
            rate = spec.flat()["learning_rate"]
            fits, held_out = rate < 1e-2, 30 + abs(np.log10(rate) + 3) if rate < 1e-2 else 29
            if spec.pruning.criterion == "random":
                fits, held_out = True, dict(zip(RATES, (60, 62, 61, 77, 80, 76, 58)))[rate]
            run = record(0.4, held_out=held_out, **spec.flat())
            for window in run["windows"]:
                window["status"] = "reconstructed" if fits else "rolled back: error grew"
            (folder / f"{spec.key()}.json").write_text(json.dumps(run | {"key": spec.key()}))

    monkeypatch.setattr(recon, "run_study", run_study)
    return asked


RATES, BASE = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1], recon.RunSpec.of(sequence_length=64, evaluation_length=64)


def test_search_tries_rates_beside_the_best(tmp_path, asked):
    """It begins about the middle, walks to the lowest, and tries both its neighbours."""
    cell = BASE.replaced(granularity="block", seed=100)
    assert search.search({cell: "learning_rate"}, RATES, tmp_path, compute=False).empty
    runs = search.search({cell: "learning_rate"}, RATES, tmp_path)
    assert search.chosen(runs) == {cell: 1e-3} and sorted(runs["rate"]) == [3e-4, 1e-3, 3e-3, 3e-2]
    other = cell.replaced(criterion="magnitude")
    runs = search.search(dict.fromkeys([cell, other], "learning_rate"), RATES, tmp_path)
    assert sorted(runs.loc[runs["cell"] == other, "rate"]) == [3e-4, 1e-3, 3e-3, 1e-2]  # from where another cell ended
    other = cell.replaced(criterion="random")
    assert search.chosen(search.search({other: "learning_rate"}, RATES, tmp_path)) == {other: 1e-1}
    specs = recon.grid(BASE, seed=[0, 1], granularity=["none", "block"])
    found, _ = search.tuned(specs, RATES, tmp_path, seed=100)
    assert [spec.flat()["learning_rate"] for spec in found] == [1e-2, 1e-3] * 2  # nothing is trained without windows


def test_rates_are_searched_and_used_without_the_rules_for_sizes(tmp_path, asked):
    found, _ = search.tuned([BASE.replaced(granularity="model")], RATES, tmp_path, seed=100)
    assert {(spec.reconstruction.size_power, spec.reconstruction.matrix_rate) for spec in (*found, *asked)} == {(0.0, 1.0)}
    assert asked and found[0].reconstruction.learning_rate == 1e-3 and found[0].seed == 0


def test_retraining_has_one_search_for_all_recipes():
    """And reconstruction followed by retraining is searched part by part."""
    cells = {
        (recipe, name): search.searched(search.method(recon.RunSpec.of(preset=recipe), name, 8), seed=100)
        for recipe in ("default", "paper")
        for name in ("reconstruction", "masklora", "reconstruction, then masklora")
    }
    assert cells["default", "masklora"] == cells["paper", "masklora"]
    for recipe in ("default", "paper"):
        parts = cells[recipe, "reconstruction"] | cells[recipe, "masklora"]
        assert cells[recipe, "reconstruction, then masklora"] == parts


def test_methods_and_fits_have_the_names_of_their_runs():
    for name in ("pruned", "reconstruction", "masklora", "reconstruction, then lora", "dense, full", "lora, distilled"):
        spec = search.method(recon.RunSpec(), name, 16)
        assert frame.method_name(spec.flat()) == name and spec.calibration.samples == 16
    for fit in ("matrix", "matrix exact", "half-block", "half-block, equal steps", "block from exact"):
        [spec] = recon.grid(recon.RunSpec(), **frame.fit_options(fit))
        assert frame.fit_name(spec.flat(), "default") == fit
    [spec] = recon.grid(recon.RunSpec.of(preset="paper"), **frame.fit_options("half-block, equal steps"))
    assert frame.fit_name(spec.flat(), "paper") == "half-block"  # whose steps are equal anyway
    cut, whole = record(), record(chunks=1)
    assert list(frame.table([cut, whole])["fit"]) == ["half-block", "half-block, equal steps"]
    assert list(frame.table([whole, record(chunks=1, granularity="block")])["fit"]) == ["half-block", "block"]


def test_costs_and_rates_of_a_run():
    run = record() | {"seconds": {"prune": 2.0, "reconstruct": 3.0, "total": 9.0}, "flops": {"prune": 2.0, "reconstruct": 5.0}}
    row = frame.table([run]).iloc[0]
    costs = ("seconds", "seconds_total", "flops", "flops_with_pruning")
    assert tuple(row[name] for name in costs) == (3.0, 9.0, 5.0, 7.0)
    windows, added = [{**window, "parameters": 2**29} for window in run["windows"]], {"reconstruct": 3 * 2**30}
    masks_within, before = ({"windows": windows, "added_memory_bytes_by_phase": added | more} for more in ({}, {"prune": 0}))
    assert list(frame.table([run | masks_within, run | before])[frame.MEMORY]) == [2.0, 3.0]
    # A rate for matrices changes nothing in half-blocks.
    same, other = (frame.table([record(**rate)]).at[0, "rates"] for rate in ({"matrix_rate": 0.5}, {"learning_rate": 0.5}))
    assert same == row["rates"] != other


def test_criteria():
    shares = {"magnitude": 0.2, "wanda": 0.3, "sparsegpt": 0.4}
    runs = table(*[run for name, share in shares.items() for size in ("none", "half-block")
                   for run in seeds(share * (size != "none"), 2, criterion=name, granularity=size)])  # fmt: skip
    figure, drawn, finding = figures.gaps(runs, "sparsegpt")
    assert set(drawn["criterion"]) == {"magnitude", "wanda"} and "in 0 of 2 comparisons" in finding


def test_drift_is_relative_to_the_pruned_model():
    runs = table(*[run for name in ("dense", "mixed") for run in seeds(0.4, 2, propagation=name)])
    figure, drawn, finding = figures.drift(runs)
    assert np.allclose(drawn["ratio"], 0.5) and "0.50 for dense" in finding


def test_the_lowest_panel_of_each_column_has_tick_labels():
    _, axes = figures.panels(3, 2, 2, columns=2, sharex=True)
    assert [ax.xaxis.get_tick_params()["labelbottom"] for ax in axes] == [False, True, True]


def test_the_forest_has_a_row_per_central_claim_and_model():
    runs = table(*of_sizes(3), *of_sizes(3, pattern="2:4"))
    figure, drawn, finding = figures.claims(judge.judge(runs))
    assert set(drawn["claim"]) == {"1.wanda.own", "2.block", "3"} and set(drawn["pattern"]) == {"0.5"}
    assert finding.startswith("Holds: recovery, ")
    assert figures.claims(judge.judge(table(*of_sizes(3)[:3]))) is None
