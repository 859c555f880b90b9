"""What reviewers asked: what is drawn, from made-up runs whose truth is known."""

import matplotlib

matplotlib.use("agg")

import pandas as pd
import pytest
from fixtures import made_up

from recon.experiment import study
from recon.paper.plots import asked

pytestmark = pytest.mark.usefixtures("style")

ORDER = ["none", "matrix", "half-block", "block"]


def fitted(granularity, ratio, drift, seed=0):
    """A record whose windows keep `ratio` of their error, and whose drift grows up to `drift`."""
    found = made_up.record(seed=seed, granularity=granularity, samples=8)
    window = {"error_before": {"held_out": 0.2}, "error_after": {"held_out": 0.2 * ratio}}
    losses = [[0.2 - 0.2 * (1 - ratio) * step / 31 for step in range(32)]] * 3
    found.windows = [] if granularity == "none" else [window | {"losses": each} for each in losses]
    found.metrics |= {"drift": [drift / 2, drift], "perplexity": 100 * drift, "dense_perplexity": 10.0, "pruned_perplexity": 60.0}
    found.flops = {"reconstruct": 1e12 / drift}
    found.added_memory_bytes_by_phase = {"reconstruct": int(2**30 * drift)}
    return found


RECORDS = [fitted("none", 1.0, 0.6), fitted("matrix", 0.5, 0.5), fitted("half-block", 0.9, 0.3), fitted("block", 0.95, 0.4)]


def test_windows_that_fit_best_need_not_make_the_best_model():
    plot = asked.accumulation(RECORDS, ORDER)
    assert plot.finding.startswith("Windows of matrix lower their own errors most (to 50%")
    assert "they leave 50%" in plot.finding and "half-block leaves 30%" in plot.finding
    ratios = plot.data[plot.data["panel"] == "windows"].groupby("fit")["ratio"].first()
    assert dict(ratios) == pytest.approx({"matrix": 0.5, "half-block": 0.9, "block": 0.95})
    assert asked.accumulation(RECORDS[:1], ORDER).finding.startswith("The pruned model has 60%")


def test_losses_are_the_medians_over_windows_with_a_panel_for_each_size():
    plot = asked.losses(RECORDS, ORDER)
    assert [ax.get_title() for ax in plot.figure.axes] == ORDER[1:]
    half = plot.data[plot.data["fit"] == "half-block"]
    assert half["loss"].iloc[0] == pytest.approx(0.2) and half["loss"].iloc[-1] == pytest.approx(0.18)
    assert half["samples"].iloc[-1] == 32  # 8 samples, 4 epochs: steps are at least 32
    assert "matrix 54%" in plot.finding  # the last four of 32 steps over the first four


def test_costs_name_the_best_and_what_it_takes():
    runs = study.frame(RECORDS[1:])
    plot = asked.costs(runs, ORDER)
    assert plot.finding == "The lowest perplexity is that of half-block, which also adds the least memory."
    runs.loc[runs["fit"] == "matrix", "added_memory_bytes_reconstruct"] = int(2**30 * 0.1)
    assert asked.costs(runs, ORDER).finding.endswith("with 3.00 times the memory of matrix, which adds the least.")
    assert list(plot.data["fit"]) == ORDER[1:]


def test_the_overview_counts_what_is_helped_and_compares_adapters_in_pairs():
    def runs(by, values):
        rows = [(name, fit, 20.0, value) for name, pair in values.items() for fit, value in zip(("none", "half-block"), pair)]
        return pd.DataFrame(rows, columns=[by, "fit", "dense_perplexity", "perplexity"])

    texts = runs("text", {"wikipedia": (40, 30), "news": (42, 35)})
    structured = runs("criterion", {"flap": (50, 55), "wanda-sp": (70, 30)})
    adapters = [*made_up.seeds(0.4), *made_up.seeds(0.405, adapter="masklora"), *made_up.seeds(0.2, adapter="lora")]
    plot = asked.overview(texts, structured, adapters)
    assert "helps with 2 of 2 calibration texts and 1 of 2 structured criteria" in plot.finding
    assert "masklora is equal, lora is worse" in plot.finding
    lora = plot.data.set_index("name").loc["lora"]
    assert lora["low"] <= lora["difference"] <= lora["high"] and lora["difference"] == pytest.approx(-0.2, abs=0.02)
    alone = asked.overview(texts, structured.head(0), adapters[:3])
    assert len(alone.figure.axes) == 1 and alone.finding == "Reconstruction helps with 2 of 2 calibration texts."
    assert asked.overview(texts.head(2), structured.head(0), []) is None
