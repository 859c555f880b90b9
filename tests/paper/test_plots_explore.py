"""The explorer: what is chosen, what is left out, from made-up records."""

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import pytest
from fixtures import made_up

from recon.paper import figures
from recon.paper.plots import explore


@pytest.fixture
def runs():
    """Half-blocks and blocks, by two criteria; one run of another protocol, one that failed."""
    records = []
    for granularity, level in (("half-block", 30.0), ("block", 32.0), ("none", 40.0)):
        for criterion, more in (("wanda", 0.0), ("magnitude", 5.0)):
            for seed in range(2):
                record = made_up.record(seed=seed, granularity=granularity, criterion=criterion)
                record.metrics |= {"perplexity": level + more + seed, "share_recovered": 1 - level / 50}
                record.flops = {"reconstruct": 2e12, "retrain": 1e12}
                records.append(record)
    other = made_up.record(granularity="block", text="news")
    other.metrics["perplexity"] = 1.0
    failed = made_up.record(granularity="block", seed=9)
    failed.status = "failed"
    with matplotlib.rc_context():
        figures.style()
        yield explore.read([*records, other, failed])
    plt.close("all")


def test_a_row_for_each_finished_run_with_what_it_took(runs):
    assert len(runs) == 13 and set(runs["TFLOP"]) == {3.0, 0.0}
    assert explore.choices(runs)["model"] == ["smollm2-135m"] and explore.choices(runs)["pattern"] == ["0.5"]


def test_only_runs_of_one_protocol_are_in_a_view(runs):
    plot = explore.view(runs, "smollm2-135m", "0.5", "perplexity", "window")
    assert len(plot.data) == 12 and set(plot.data["text"]) == {"wikipedia"}
    said = "Of 12 runs, those of reconstruction (wanda) with window half-block have the lowest mean perplexity: 30.5."
    assert plot.finding == f"{said} 1 runs of other protocols are left out."
    assert [label.get_text() for label in plot.figure.axes[0].get_xticklabels()] == ["none", "half-block", "block"]


@pytest.mark.parametrize("x", explore.AXES)
def test_every_axis_can_be_chosen_and_keeps_all_runs(runs, x):
    plot = explore.view(runs, "smollm2-135m", "0.5", "share of the damage recovered", x)
    expected = 0 if x == "memory added, GiB" else 12  # no record states it
    assert len(plot.data) == expected
    assert plot.figure.axes[0].get_xlabel() == ("samples of 512 tokens" if x == "samples" else x)


def test_what_varies_beside_the_axis_names_the_marks(runs):
    names = set(explore.view(runs, "smollm2-135m", "0.5", "perplexity", "criterion").data["series"])
    assert names == {"reconstruction (half-block)", "reconstruction (block)", "pruned"}
    names = set(explore.view(runs, "smollm2-135m", "0.5", "perplexity", "TFLOP").data["series"])
    assert {"reconstruction (half-block, wanda)", "pruned (wanda)"} < names and len(names) == 6


def test_each_recipe_has_its_colour_and_mark(style):
    records = [made_up.record(seed=seed, propagation=way) for way, count in (("mixed", 2), ("dense", 1)) for seed in range(count)]
    records += [made_up.record(granularity="none"), made_up.record(granularity="none", retrain="masklora")]
    for record in records:
        record.metrics["perplexity"] = 30.0
    ax = explore.view(explore.read(records), "smollm2-135m", "0.5", "perplexity", "samples").figure.axes[0]
    shown = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    main, other = "reconstruction (mixed propagation)", "reconstruction (dense propagation)"
    assert set(shown) == {main, other, "pruned", "masklora"}
    for name, recipe in ((main, "reconstruction"), ("pruned", "pruned"), ("masklora", "masklora")):
        assert (shown[name].get_color(), shown[name].get_marker()) == tuple(map(figures.look(recipe).get, ("color", "marker")))
    assert shown[other].get_color() == shown[main].get_color() and shown[other].get_marker() != shown[main].get_marker()
    assert len({float(line.get_xdata()[0]) for line in shown.values()}) == 4  # none hides another


def test_a_measure_that_no_record_has_is_said(runs):
    assert explore.view(runs, "smollm2-135m", "0.5", "KL to dense", "window").finding.startswith("No runs of smollm2-135m")


def test_of_a_search_for_learning_rates_the_best_is_shown():
    tried = [made_up.record(seed=seed, learning_rate=rate, held_out=30 + 100 * rate) for rate in (0.1, 0.01) for seed in range(2)]
    assert list(explore.read(tried)["key"]) == [record.key for record in tried[2:]]


def test_menus_change_the_picture(runs):
    shown = explore.explorer(runs)
    *menus, picture, words = shown.children
    assert [menu.description for menu in menus] == ["model", "pattern", "measure", "x"]
    before = bytes(picture.value)
    assert before.startswith(b"\x89PNG") and "perplexity" in words.value and runs["protocol"].iloc[0] in words.value
    menus[3].value = "criterion"
    assert bytes(picture.value) != before and bytes(picture.value).startswith(b"\x89PNG")
