"""What it costs: what is drawn and found, from made-up measurements whose truth is known."""

import matplotlib

matplotlib.use("agg")

import pandas as pd
import pytest

from recon.paper.plots import cost

pytestmark = pytest.mark.usefixtures("style")


def test_phases_are_multiples_of_their_floor_in_bars_of_their_length():
    times = [
        ("reconstruct", "reference", 25.0),
        ("reconstruct", "reference", 27.0),
        ("reconstruct", "ours", 13.0),
        ("reconstruct", "ours", 15.0),
        ("evaluate", "ours", 6.0),
    ]
    rows = [
        {"phase": phase, "loop": loop, "round": index, "seconds": seconds} for index, (phase, loop, seconds) in enumerate(times)
    ]
    plot = cost.phases({"rows": rows, "floor_seconds": {"reconstruct": 10.0, "evaluate": 3.0}})
    assert plot.finding == 'Ours takes 1.4 times the floor for "reconstruct" (reference loop: 2.6).'
    slow = {"phase": "reconstruct", "loop": "ours", "round": 5, "seconds": 30.0}
    overlapping = cost.phases({"rows": [*rows, slow], "floor_seconds": {"reconstruct": 10.0}})
    assert overlapping.finding == 'Rounds do not tell the loops apart for "reconstruct".'
    drawn = plot.data.set_index(["phase", "loop"])
    assert drawn.loc[("reconstruct", "ours")].tolist() == pytest.approx([1.4, 1.3, 1.5, 2])
    ax = plot.figure.axes[0]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(plot.data["times"].tolist())
    labels = [text.get_text() for text in ax.texts]
    assert sorted(labels) == ["1.4  ours", "2.0", "2.6  reference loop"]


def runs(*ours):
    rows = [{"loop": name, "perplexity": value} for name, value in (("dense", 10.0), ("pruned", 30.0))]
    for name, perplexity, seconds in (("reference", 20.0, 100.0), *ours):
        rows.append({"loop": name, "samples": 8, "perplexity": perplexity, "share_recovered": 0.5, "seconds": seconds})
    return rows


def test_quality_names_the_first_of_ours_that_is_as_good_as_the_reference():
    half, quarter = ("ours, half of the samples", 19.5, 43.0), ("ours, a quarter of the samples", 21.0, 20.0)
    plot = cost.quality(runs(("ours, default", 18.0, 90.0), half, quarter))
    assert plot.finding == "Ours (half of the samples) reaches the reference loop's perplexity in 0.43 of its time."
    ax = plot.figure.axes[0]
    marks = plot.data.dropna(subset="seconds")
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines] == list(zip(marks["seconds"], marks["perplexity"]))
    assert {line.get_markerfacecolor() for line in ax.lines} == {"white"}  # one seed
    [field] = ax.patches
    assert (field.get_x() + field.get_width(), field.get_y() + field.get_height()) == pytest.approx((100, 20))
    assert "in 1.50 times its time" in cost.quality(runs(("ours, default", 18.0, 150.0), quarter)).finding
    none = cost.quality(runs(quarter, ("ours, fast", 20.5, 30.0))).finding
    assert none == "None of ours reaches the reference loop's perplexity, 20.0: the best (fast) has 20.5."


def test_operations_are_shares_of_their_own_loop():
    kinds = {"reference": {"matrix products": 5.0, "attention": 5.0}, "ours": {"matrix products": 6.0, "attention": 2.0}}
    plot = cost.operations({loop: {"kinds": each, "operations": []} for loop, each in kinds.items()})
    assert plot.finding.startswith(
        "Matrix products are 75 % of our time and 50 % of the reference loop's; in all, ours takes 0.80 of"
    )
    assert [bar.get_width() for bar in plot.figure.axes[0].patches] == plot.data["seconds"].tolist()
    assert plot.data.groupby("loop")["share"].sum().tolist() == [1, 1]


def grown(*lines):
    """Rows of loops that take this many seconds and MiB with 4, 8, ... samples."""
    return [
        {"axis": "samples", "value": 4 * 2**step, "loop": loop, "seconds": s, "added_memory_bytes": m * 2**20, "peak_memory_bytes": 1}
        for loop, values in lines
        for step, (s, m) in enumerate(values)
    ]  # fmt: skip


def test_growth_is_from_the_smallest_to_the_largest():
    plot = cost.growth(grown(("reference", [(2, 100), (4, 200), (8, 400)]), ("ours", [(1, 80), (2, 120), (3.5, 200)])))
    assert plot.finding == (
        "Our time grows 3.5 times with 4 times the samples; the memory we add is 0.50 to 0.80 of the reference loop's."
    )
    upper, lower = plot.figure.axes
    for ax, value in ((upper, "seconds"), (lower, "GiB")):
        for line, (_, drawn) in zip(ax.lines, plot.data.groupby("loop", sort=False), strict=True):
            assert line.get_xdata().tolist() == [4, 8, 16] and line.get_ydata().tolist() == drawn[value].tolist()
    alone = cost.growth(grown(("reference", [(2, 0)]), ("ours", [(1, 0)])))
    assert alone.finding == "Nothing was measured at two sizes."


def recipes(values, seeds=3, pruned=40.0):
    """Runs of recipes by name: perplexity, compute, and the perplexity of what they prune."""
    rows = [
        {
            "model": "/models/tiny", "recipe": name, "seed": seed, "dense_perplexity": 10.0, "pruned_perplexity": own or pruned,
            "perplexity": perplexity + seed * 1e-3, "share_recovered": 0.5, "held_out_error": None,
            "flops_prune": 1e11 * compute, "flops_reconstruct": 9e11 * compute,
        }
        for name, (perplexity, compute, own) in values.items()
        for seed in range(seeds)
    ]  # fmt: skip
    return cost.recipe_runs(pd.DataFrame(rows))


FOUND = {"default": (20.0, 20.0, None), "best": (15.0, 75.0, None), "mask refinement": (17.0, 30.0, 25.0)}


def test_recipes_are_judged_by_the_damage_that_the_default_starts_from():
    data = recipes(FOUND)
    recovered = data.groupby("recipe")["recovered"].mean()
    assert recovered["default"] == pytest.approx(0.5, abs=1e-3)  # log 2 of log 4
    assert recovered["mask refinement"] == pytest.approx(0.617, abs=1e-3)  # of log 4, too
    plot = cost.recipes(data)
    assert plot.finding == "On tiny, best recovers most: 71 % of the damage at 3.75 times the default's compute (default: 50 %)."
    ax = plot.figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(FOUND)
    assert [text.get_text() for text in ax.texts] == ["20.0", "75.0", "30.0", "TFLOP"]
    means = data.groupby("recipe", sort=False)["perplexity"].mean()
    assert [bars.lines[0].get_xdata()[0] for bars in ax.containers] == pytest.approx(means.tolist())


def test_one_seed_is_hollow_and_said_and_no_damage_is_no_share():
    plot = cost.recipes(recipes({"default": (20.0, 20.0, None), "fast": (21.0, 9.0, None)}, seeds=1))
    assert plot.finding == (
        "On tiny, recipes recover 46 % (fast) to 50 % (default) of the damage, the default 50 %; 1 seed does not tell which is best."
    )
    assert {bars.lines[0].get_markerfacecolor() for bars in plot.figure.axes[0].containers} == {"white"}
    for found in (recipes(FOUND, pruned=9.0), recipes({"fast": FOUND["default"], "best": FOUND["best"]})):
        assert cost.recipes(found).finding == "No model has damage, and the default recipe, to compare by."


def test_the_table_of_recipes_has_means_and_counts_seeds():
    table = cost.recipe_table(recipes(FOUND))
    assert table.loc[("tiny", "best"), ("TFLOP ↓", "mean")] == 75 and set(table["seeds", ""]) == {3}
    assert "share unexplained ↓" not in table  # not measured


def test_figures_come_from_the_commit_that_measured_their_section():
    sections = {"phases": {"environment": {"git_commit": "a"}}, "growth": {"environment": {"git_commit": "b"}}}
    found = cost.origin({"key": "k", "settings": {"samples": 8}, "sections": sections}, "growth")
    assert (found.key, found.environment["git_commit"]) == ("k", "b")
