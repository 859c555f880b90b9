"""Figures by topic: what they draw and what they find, from made-up records whose truth is known."""

import math
import re

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from fixtures.made_up import DAMAGE, record, seeds
from matplotlib.text import Text

from recon.paper import figures
from recon.paper.claims import judge
from recon.paper.comparisons import MARGIN
from recon.paper.plots import criteria, granularity, layout, paired, propagation
from recon.paper.plots.answers import answers
from recon.study.studies import fit_name


def by_fit(records):
    return {fit: runs for (fit,), runs in paired.grouped(records, lambda spec: (fit_name(spec),)).items()}


def test_differences_are_paired_and_in_favour_of_the_side_named_first():
    runs = by_fit(seeds(0.5, granularity="half-block") + seeds(0.3, granularity="matrix", count=2))
    found = paired.difference(runs["matrix"], runs["half-block"])
    assert found["difference"] == pytest.approx(-0.2, abs=0.02) and found["seeds"] == 2
    assert found["low"] < found["difference"] < found["high"]
    turned = paired.difference(runs["half-block"], runs["matrix"])
    assert turned["difference"] == pytest.approx(-found["difference"], abs=0.01)
    nats = paired.difference(runs["matrix"], runs["half-block"], "better")
    assert nats["difference"] == pytest.approx(found["difference"] * DAMAGE, rel=0.02)


def test_options_of_a_run_that_are_not_the_defaults_are_part_of_its_side():
    runs = by_fit(seeds(0.5, granularity="half-block", criterion="ria") + seeds(0.5, granularity="block", criterion="ria"))
    assert abs(paired.difference(runs["block"], runs["half-block"])["difference"]) < 0.02


def test_runs_without_a_common_seed_have_no_difference():
    runs = by_fit([record(seed=0, granularity="matrix"), record(seed=1, granularity="half-block")])
    found = paired.difference(runs["matrix"], runs["half-block"])
    assert found["seeds"] == 0 and math.isnan(found["difference"])
    assert paired.difference([], runs["matrix"])["seeds"] == 0


@pytest.mark.parametrize(
    ("low", "high", "count", "said"),
    [
        (-0.9 * MARGIN, 0.9 * MARGIN, 3, "equal"),
        (-0.9 * MARGIN, 0.9 * MARGIN, 2, "undecided"),
        (0.5 * MARGIN, 2 * MARGIN, 3, "undecided"),
        (1.1 * MARGIN, 2 * MARGIN, 3, "better"),
        (-2 * MARGIN, -1.1 * MARGIN, 3, "worse"),
        (math.nan, math.nan, 3, "undecided"),
    ],
)
def test_intervals_are_judged_by_the_margin(low, high, count, said):
    assert paired.judged(low, high, count) == said


def test_answers_count_the_verdicts_of_each_group_and_give_the_first_of_each_kind():
    records = [*seeds(0.5, granularity="half-block", chunks=1)]
    records += [*seeds(0.5, granularity="block", chunks=1), *seeds(0.2, granularity="model", chunks=1)]
    verdicts = judge(records)
    table = answers(verdicts, ["2", "3"]).data
    assert list(table) == ["paper", "here", "why"]
    assert table["here"][0] == "✓ holds (1 of 2)\n✗ does not hold here (1 of 2)"
    assert "Half-block equals block (smollm2-135m, 0.5): " in table["why"][0].split("\n")[0]
    assert "Half-block equals model" in table["why"][0].split("\n")[1]
    assert table["here"][1] == "no records yet"


def drawn(plot):
    """The plot, once it is clear that it can be saved: with a title above everything, and numbers in what is drawn."""
    figures.title(plot.figure, plot.finding)
    plt.close(plot.figure)
    assert plot.finding.endswith(".") and "nan" not in plot.finding.lower() and plot.drawn
    return plot


def sized(recovered, count=3, memory=1.0, **options):
    """Records as `seeds` makes them, with the memory that reconstruction adds."""
    records = seeds(recovered, count, **options)
    for one in records:
        one.added_memory_bytes_by_phase = {"reconstruct": memory * 2**30}
    return records


def granularities(coarse=0.5, count=3, **options):
    records = [*seeds(0.0, count, granularity="none", noise=0, **options)]
    records += sized(-0.3, count, 0.1, granularity="matrix", **options)
    records += sized(0.3, count, 0.2, granularity="matrix", solver="exact", **options)
    records += sized(0.5, count, 0.5, granularity="half-block", **options)
    return records + sized(coarse, count, 4.0, granularity="model", **options)


def test_what_a_larger_window_costs_and_brings_is_said_as_it_is():
    better = drawn(granularity.memory(granularities(0.6)))
    assert better.figure.axes[0].texts[0].get_text().startswith("pruned")  # with a line, dense is written at the edge:
    assert [text.get_text()[:5] for text in better.figure.axes[0].texts if text.get_text().endswith("\N{DOWNWARDS ARROW}")] == [
        "dense"
    ]
    assert re.search(r"takes 8\.0 times the memory of half-blocks, for a perplexity 7\.\d % lower", better.finding)  # exp(-0.08)
    assert re.search(r"for a perplexity 8\.\d % higher", drawn(granularity.memory(granularities(0.4))).finding)  # exp(0.08)
    rows = better.data.set_index("granularity")
    assert list(rows.index) == ["matrix", "matrix exact", "half-block", "model"]  # pruned is a level, no mark
    assert rows["perplexity"]["half-block"] == pytest.approx(rows["dense perplexity"].iloc[0] * math.exp(0.5 * DAMAGE), rel=0.01)
    assert rows["share recovered"].tolist() == pytest.approx([-0.3, 0.3, 0.5, 0.6], abs=0.01)


def test_memory_is_of_one_precision_and_a_seed_counts_once():
    again = sized(0.5, 2, 0.05, granularity="half-block") + sized(0.3, 1, 0.01, granularity="block")
    for one in again:
        one.environment["compute_dtype"] = "float32"
    records = granularities() + again
    rows = granularity.table(records).set_index("granularity")
    assert rows["seeds"].tolist() == [3, 3, 3, 3, 3, 1] and rows["memory of"].eq("bfloat16").all()
    assert rows[granularity.MEMORY]["half-block"] == 0.5 and math.isnan(rows[granularity.MEMORY]["block"])
    ax = drawn(granularity.memory(records)).figure.axes[0]
    assert ax.get_xlabel().endswith("(bfloat16 runs; none of block)")
    assert granularity.differences(records).data["seeds"].tolist() == [3, 3, 3, 1]


def test_a_window_that_takes_no_more_memory_is_not_in_the_title():
    records = sized(0.5, granularity="half-block") + sized(0.4, granularity="block")
    assert "takes" not in drawn(granularity.memory(records)).finding


@pytest.mark.parametrize(("coarse", "said"), [(0.5, "1 equal"), (0.7, "1 better"), (0.3, "1 worse")])
def test_sizes_are_equal_better_or_worse_by_the_data(coarse, said):
    plot = drawn(granularity.differences(granularities(coarse)))
    assert f"Larger windows against half-blocks: {said}." in plot.finding
    assert "Single matrices against half-blocks: 2 worse." in plot.finding
    found = plot.data.set_index("granularity")["difference"]
    assert list(found.index) == ["matrix", "matrix exact", "model"]
    assert found["model"] == pytest.approx(coarse - 0.5, abs=0.02)


def test_one_seed_decides_nothing_and_is_hollow():
    plot = drawn(granularity.differences(granularities(count=1)))
    assert "1 undecided (fewer than 3 seeds)" in plot.finding and "2 undecided (fewer than 3 seeds)" in plot.finding
    assert "fewer" not in drawn(granularity.differences(granularities())).finding
    [mark] = [line for line in plot.figure.axes[0].lines if line.get_marker() == granularity.look("model")["marker"]]
    assert mark.get_markerfacecolor() == "white"


def test_a_difference_off_the_axis_is_written():
    plot = drawn(granularity.differences(granularities()))
    [note] = [text.get_text() for text in plot.figure.axes[0].texts]
    assert note.startswith("\N{MINUS SIGN}0.80 [")
    assert paired.marks_words(plot, granularity.FAR) == " Arrow: beyond 0.25."


def test_an_interval_that_the_axis_cuts_ends_in_an_arrow():
    fig, ax = plt.subplots()
    paired.draw(ax, 0, {"difference": 0.1, "low": -0.1, "high": 0.5, "seeds": 3}, granularity.look("block"), 0.25)
    head, line, _ = ax.lines
    assert head.get_marker() == ">" and head.get_xdata()[0] == line.get_xdata()[1] == pytest.approx(0.25 * paired.EDGE)
    assert line.get_xdata()[0] == -0.1
    plt.close(fig)


def test_what_noise_leaves_open_has_no_single_leader():
    data = pd.DataFrame({"mean": [2, 1, 5], "low": [1.4, 0.5, 4], "high": [2.5, 1.5, 6], "count": 3}, index=["b", "a", "c"])
    assert sorted(paired.leading(data)) == ["a", "b"]
    assert paired.leading(data.loc[["a", "c"]]) == ["a"]
    assert len(paired.leading(data.assign(count=1))) == 3


def test_every_model_and_pattern_has_its_field_and_none_is_made_up():
    records = granularities() + [r for r in granularities(pattern="2:4") if r.spec["granularity"] != "model"]
    records += seeds(0.5, granularity="half-block", pattern="0.7")  # of one size: no best
    plot = drawn(granularity.everywhere(records))
    [ax] = plot.figure.axes
    assert len(ax.texts) - 1 == len(plot.data) == 8  # one says what the numbers are
    assert [label.get_text() for label in ax.get_xticklabels()] == ["50 %", "2:4", "70 %"]
    assert [text.get_text() for text in ax.texts if text.get_fontweight() == "bold"] == ["0.50"] * 3  # the larger one ties
    assert "half-blocks in 2 of 2, single matrices in 0 of 2, single matrices solved exactly in 0 of 2" in plot.finding


def by_criterion(after, **options):
    """Three criteria that lose 0.8, 0.9 and 2 nats, of which `after` are left."""
    losses = {"sparsegpt": 0.8, "wanda": 0.9, "magnitude": 2.0}
    records = []
    for name in ("magnitude", "wanda", "sparsegpt"):
        records += seeds(0.0, criterion=name, damage=losses[name], granularity="none", noise=0, **options)
        kept = 1 - after[name] / losses[name]
        records += seeds(kept, criterion=name, damage=losses[name], granularity="half-block", **options)
    return records


def test_gaps_between_criteria_before_and_after():
    records = by_criterion({"sparsegpt": 0.4, "wanda": 0.42, "magnitude": 0.7})
    plot = drawn(criteria.gaps(records, "sparsegpt"))
    gaps = plot.data.set_index(["criterion", "granularity"])["gap"]
    assert gaps["magnitude", "pruned"] == pytest.approx(1.2, abs=0.01)
    assert gaps["magnitude", "half-block"] == pytest.approx(0.3, abs=0.02)
    assert gaps["wanda", "pruned"] == pytest.approx(0.1, abs=0.01)
    assert "shrinks with reconstruction in 2 of 2 comparisons" in plot.finding
    wider = drawn(criteria.gaps(by_criterion({"sparsegpt": 0.4, "wanda": 0.7, "magnitude": 0.7}), "sparsegpt"))
    assert "shrinks with reconstruction in 1 of 2 comparisons" in wider.finding


def test_slopes_say_how_far_the_worst_criterion_is_from_the_best():
    plot = drawn(criteria.slopes(by_criterion({"sparsegpt": 0.4, "wanda": 0.42, "magnitude": 0.7})))
    assert f"Perplexity of magnitude over SparseGPT: {math.exp(1.2):.2f} pruned" in plot.finding
    assert "falls in 1 of 1" in plot.finding
    apart = drawn(criteria.slopes(by_criterion({"sparsegpt": 0.4, "wanda": 0.42, "magnitude": 1.9})))
    assert "falls in 0 of 1" in apart.finding
    texts = [text.get_text() for text in plot.figure.axes[0].texts]
    assert any(text.startswith("SparseGPT ") for text in texts) and any(text.startswith("dense ") for text in texts)
    assert criteria.gaps(seeds(granularity="half-block"), "sparsegpt") is None
    assert criteria.slopes(seeds(granularity="half-block")) is None  # one criterion


def test_panels_of_a_model_stand_together_in_whatever_order_runs_come():
    left = {"sparsegpt": 0.4, "wanda": 0.42, "magnitude": 0.7}
    cells = [("small", "0.5"), ("large", "0.5"), ("small", "2:4"), ("large", "2:4")]
    plot = drawn(criteria.slopes([r for model, pattern in cells for r in by_criterion(left, model=model, pattern=pattern)]))
    assert [ax.get_title() for ax in plot.figure.axes] == ["small, 50 %", "small, 2:4", "large, 50 %", "large, 2:4"]


def combinations(worst=0.2):
    records = seeds(0.0, granularity="none", noise=0)
    for name in ("dense", "mixed"):
        for loss in ("whitened", "mse"):
            share = worst if (name, loss) == ("dense", "mse") else 0.5
            records += seeds(share, granularity="half-block", propagation=name, loss=loss)
    for one in records:
        one.metrics |= {"drift_pruned": [0.2, 0.4], "drift": [0.1, 0.5 if one.spec["propagation"] == "dense" else 0.3]}
    return records


def test_the_grid_is_against_the_default():
    plot = drawn(propagation.grid(combinations(), ("mixed", "whitened")))
    assert (
        "of 3 other combinations: 2 equal, 1 worse" in plot.finding
        and "from \N{MINUS SIGN}0.30 (dense with mse) to" in plot.finding
    )
    equal = drawn(propagation.grid(combinations(0.5), ("mixed", "whitened")))
    assert "of 3 other combinations: 3 equal" in equal.finding
    table = propagation.table(plot.data)
    assert table.loc[("half-block", "mixed"), "whitened"].endswith("(default)")
    assert "(\N{MINUS SIGN}0.30 [" in table.loc[("half-block", "dense"), "mse"]
    assert propagation.grid(seeds(granularity="half-block"), ("mixed", "whitened")) is None


def test_drift_is_over_that_of_the_pruned_model():
    plot = drawn(propagation.drift(combinations(), "half-block"))
    ratios = plot.data.groupby(["propagation", "block"])["ratio"].mean()
    assert ratios.tolist() == pytest.approx([0.5, 1.25, 0.5, 0.75])
    assert plot.finding == (
        "Mixed propagation ends at 0.75 of the pruned model's drift, dense at 1.25; "
        "2 of 4 combinations are no better than pruned at some block."
    )
    same = [one for one in combinations() if one.spec["propagation"] != "dense"]
    assert propagation.drift(same, "half-block").finding == (
        "Drift ends at 0.75 of the pruned model's; all are better than pruned at every block."
    )


def test_labels_are_moved_apart_as_little_as_possible():
    assert layout.apart([0, 100, 50], 10) == [0, 100, 50]
    assert layout.apart([5, 5], 10) == [0, 10]
    assert layout.apart([1, 0, 2], 4) == pytest.approx([1, -3, 5])


def test_labels_of_points_cover_neither_points_nor_one_another():
    fig, [ax] = layout.panels(1, (3, 3))
    ax.set(xlim=(0, 1), ylim=(0, 1))
    points = {f"label {index}": (0.4 + 0.03 * index, 0.5 + 0.01 * (index % 2)) for index in range(6)}
    layout.label_points(ax, points)
    fig.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # without the lines to points
    assert len(boxes) == 6 and not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert not any(box.contains(*ax.transData.transform(point)) for box in boxes for point in points.values())
    plt.close(fig)


def test_a_label_that_another_point_is_nearer_to_has_a_line():
    fig, ax = plt.subplots(figsize=(3, 3))
    ax.set(xlim=(0, 1), ylim=(0, 1))
    layout.label_points(
        ax, {"alone": (0.1, 0.9), "first": (0.5, 0.5), "second": (0.53, 0.5), "third": (0.56, 0.5), "fourth": (0.53, 0.53)}
    )
    fig.canvas.draw()
    assert any(text.arrow_patch for text in ax.texts) and not ax.texts[0].arrow_patch  # labels come from the left
    for text in ax.texts:
        box = Text.get_window_extent(text).extents
        far = {other: layout._from(box, ax.transData.transform(other.xy)) for other in ax.texts}
        assert text.arrow_patch or min(far, key=far.get) is text
    plt.close(fig)


def test_labels_of_points_keep_off_lines_across():
    fig, ax = plt.subplots(figsize=(3, 3))
    ax.set(xlim=(0, 1), ylim=(0, 1))
    across = ax.axhline(0.58, marker="")
    layout.label_points(ax, {"a point": (0.5, 0.5)})  # above it would be first, and on the line
    fig.canvas.draw()
    box = Text.get_window_extent(ax.texts[0])
    line = across.get_transform().transform(across.get_xydata())[0, 1]
    assert not box.y0 <= line <= box.y1
    plt.close(fig)


def test_a_missing_plot_is_said_and_nothing_is_written(tmp_path, capsys):
    figures.publish(None, "granularity", tmp_path, [], "")
    assert "no runs to draw it from" in capsys.readouterr().out and not list(tmp_path.iterdir())
