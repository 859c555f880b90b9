"""Reconstruction beside retraining: what is drawn, from made-up records whose truth is known."""

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from fixtures import made_up
from matplotlib.text import Text

from recon.paper import recipes
from recon.paper.plots import samples
from recon.paper.plots.layout import label_beside

pytestmark = pytest.mark.usefixtures("style")

BASE = recipes.RunSpec.of(samples=32, prune_samples=32, sequence_length=256, evaluation_texts=("wikipedia", "news"))


def run(recipe, count, seed, recovered, kl, tflop, gib):
    """A record of `recipe`, which recovers `recovered` on the first text and half of that on the second."""
    spec = recipes.spec(BASE, recipe, count, seed).flat()
    own, other = (made_up.record(share, text_seed=index, **spec) for index, share in enumerate((recovered, recovered / 2)))
    [nll], [other_nll] = own.metrics["by_text"].values(), other.metrics["by_text"].values()
    for text, found in (("wikipedia", nll), ("news", other_nll)):
        own.metrics["by_text"][text] = found | {"perplexity": 20 + 20 * (1 - recovered), "dense_perplexity": 20.0}
    own.metrics["by_text"]["wikipedia"]["kl_per_window"] = {"pruned": [0.8] * 4, "reconstructed": [kl, kl + 0.01] * 2}
    own.metrics |= {"kl": kl}
    own.flops = {"reconstruct": tflop * 1e12, "retrain": 0.0}
    own.seconds |= {"retrain": 0.0}
    own.added_memory_bytes_by_phase = {"reconstruct": gib * 2**30}
    return own


@pytest.fixture(scope="module")
def records():
    """Retraining is better on the calibration text's kind, reconstruction nearer to the dense model."""
    found = [run("pruned", 0, seed, 0.0, 0.8, 0, 0.1) for seed in range(3)]
    for seed in range(3):
        for step, count in enumerate((2, 8, 32)):
            gain = 0.1 * step
            found += [
                run("reconstruction", count, seed, 0.2 + gain, 0.5 - gain, count, 0.2),
                run("masklora", count, seed, 0.3 + gain, 0.7 - gain, 3 * count, 0.9),
                run("full", count, seed, 0.1 + gain, 0.75 - gain, 3 * count, 1.5),
            ]
    found += [run("lora", 8, 0, 0.25, 0.7, 24, 0.8), run("dense, masklora", 8, 0, 1.1, 0.2, 24, 0.9)]
    return found


def test_the_table_has_a_row_per_run_with_samples_of_the_last_training(records):
    data = samples.table(records)
    assert len(data) == len(records) and set(data.loc[data["method"] == "pruned", "samples"]) == {0}
    assert samples.measures(data) == ["perplexity, wikipedia", "perplexity, news", "KL to dense"]
    lora = data[data["method"] == "lora"].iloc[0]
    assert (lora["samples"], lora["TFLOP"], lora["memory added, GiB"]) == (8, 24, pytest.approx(0.8))
    assert samples.summary(data).loc[("full", 8), ("seeds", "")] == 3


def test_differences_are_paired_and_have_the_truth_in_their_interval(records):
    paired = samples.differences(records)
    assert len(paired) == 2 * 3 * 3 and set(paired["seeds"]) == {3}
    by = paired.set_index(["method", "samples", "measure"])["difference"]
    # Retraining recovers 0.1 more of the damage, or less; half of that on the other text.
    assert by["masklora", 8, "perplexity, wikipedia"] == pytest.approx(-0.1 * made_up.DAMAGE, abs=0.01)
    assert by["full", 8, "perplexity, news"] == pytest.approx(0.05 * made_up.DAMAGE, abs=0.01)
    assert by["masklora", 32, "KL to dense"] == pytest.approx(0.2)
    assert ((paired["low"] <= paired["difference"]) & (paired["difference"] <= paired["high"])).all()


def test_the_finding_counts_on_each_measure_and_says_where_seeds_are_few(records):
    plot = samples.efficiency(samples.table(records), samples.differences(records), 256)
    assert plot.finding == (
        "At equal samples, reconstruction beats retraining in 6 of 12 comparisons by perplexity and in 6 of 6 by KL to dense; "
        "it loses 6 by perplexity."
    )
    first = [record for record in records if record.spec["seed"] == 0]
    plot = samples.efficiency(samples.table(first), samples.differences(first), 256)
    assert "With 1 seed, training noise is unknown" in plot.finding
    assert samples.efficiency(samples.table(first[:2]), samples.differences(first[:2]), 256).finding.startswith(
        "No number of samples"
    )


def test_training_that_did_harm_is_said(records):
    assert "Worse than" not in samples.budget(samples.table(records)).finding
    harmed = samples.table([*records, run("full", 128, 0, -0.5, 0.9, 384, 1.5)])
    said = "Worse than the pruned model before any training: 1 of 10 by perplexity, wikipedia"
    assert said in samples.budget(harmed).finding
    assert said in samples.efficiency(harmed, samples.differences(records), 256).finding


def test_only_sizes_that_were_run_are_on_the_axis(records):
    plot = samples.efficiency(samples.table(records), samples.differences(records), 256)
    assert list(plot.figure.axes[0].get_xticks()) == [2, 8, 32]


def test_nothing_on_the_front_is_beaten(records):
    means = samples.budget(samples.table(records)).data
    assert not means["method"].str.startswith("dense").any() and "pruned" not in set(means["method"])
    best = samples.front(means, "TFLOP", "KL to dense")
    for row in best.itertuples():
        cheaper = means[means["TFLOP"] <= means.loc[row.Index, "TFLOP"]]
        assert cheaper["KL to dense"].min() == means.loc[row.Index, "KL to dense"]
    assert set(best["method"]) == {"reconstruction"}


def test_costs_that_hardly_differ_are_equal_and_a_seed_apart_does_not_count():
    means = pd.DataFrame({"cost": [1.0, 1.04, 2.0, 2.2], "quality": [3.0, 2.0, 1.5, 1.0]})
    assert list(samples.front(means, "cost", "quality")["cost"]) == [1.04, 2.0, 2.2]
    assert samples.front(means.head(0), "cost", "quality").empty
    found = [run("reconstruction", 2, seed, 0.2, 0.5, 2, gib) for seed, gib in enumerate((0.2, 0.2, 0.1))]
    assert list(samples.budget(samples.table(found)).data["memory added, GiB"]) == pytest.approx([0.2])


def test_the_fronts_are_counted(records):
    data = samples.table(records)
    data = data[data["method"].isin(("pruned", "reconstruction")) | ((data["method"] == "masklora") & (data["samples"] == 32))]
    said = "Of the recipes that nothing beats at their cost, reconstruction alone is 3 of 4 for compute and 1 of 2 for memory by perplexity, and all by KL to dense."
    assert samples.budget(data).finding == said


def test_searches_that_end_at_an_edge_are_counted():
    found = pd.DataFrame(
        [("full", 8, rate, value, "k", rate == 0.1) for rate, value in ((0.01, 3.0), (0.03, 2.0), (0.1, 1.0))]
        + [("full", 2, rate, value, "k", rate == 0.03) for rate, value in ((0.01, 3.0), (0.03, 2.0), (0.1, 4.0))],
        columns=["recipe", "samples", "learning_rate", "held_out_perplexity", "key", "chosen"],
    )
    plot = samples.rates(found)
    said = "The best rate is at the edge of what was tried in 1 of 2 searches; from the fewest samples to the most, it rises by 1 step for full."
    assert plot.finding == said
    assert {text.get_text()[2:] for text in plot.figure.axes[0].texts} == {"2.00", "3.00"}  # beyond what is drawn
    assert plot.data["ratio"].min() == 1


def test_names_beside_a_panel_do_not_cover_one_another():
    fig, ax = plt.subplots()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    label_beside(ax, [(1, 0.5, "a", {}), (0.2, 0.51, "b\nsecond line", {}), (1, 0.1, "c", {})])
    fig.canvas.draw()
    boxes = {text.get_text(): Text.get_window_extent(text) for text in ax.texts}  # without the lines
    assert boxes["a"].y1 <= boxes["b\nsecond line"].y0 and boxes["c"].y1 <= boxes["a"].y0
    assert min(box.x0 for box in boxes.values()) > ax.bbox.x1
