"""What reviewers asked: what is drawn, from made-up runs whose truth is known."""

import matplotlib

matplotlib.use("agg")

import pandas as pd
import pytest
from fixtures import made_up

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
    assert plot.finding == (
        "Single matrices lower their own errors to 50 % (median), half-blocks to 90 %; after the last block they leave 0.50 of the variance "
        "unexplained, half-blocks 0.30, the pruned model 0.60."
    )
    ratios = plot.data[plot.data["panel"] == "windows"].groupby("fit")["ratio"].first()
    assert dict(ratios) == pytest.approx({"matrix": 0.5, "half-block": 0.9, "block": 0.95})
    assert asked.accumulation(RECORDS[:1], ORDER).finding.endswith("the pruned model leaves 0.60 of the variance unexplained.")


def test_losses_are_the_medians_over_windows_with_a_panel_for_each_size():
    plot = asked.losses(RECORDS, ORDER)
    assert [ax.get_title() for ax in plot.figure.axes] == ORDER[1:]
    half = plot.data[plot.data["fit"] == "half-block"]
    assert half["loss"].iloc[0] == pytest.approx(0.2) and half["loss"].iloc[-1] == pytest.approx(0.18)
    assert half["samples"].iloc[-1] == 32  # 8 samples, 4 epochs: steps are at least 32
    assert "matrix 54%" in plot.finding  # the last four of 32 steps over the first four


def costly(recovered, memory, **options):
    records = made_up.seeds(recovered, **options)
    for one in records:
        one.flops, one.added_memory_bytes_by_phase = {"reconstruct": 1e12}, {"reconstruct": memory * 2**30}
    return records


def test_costs_name_the_best_that_seeds_tell_and_what_it_takes():
    half, matrix = costly(0.5, 0.3, granularity="half-block"), costly(0.1, 0.4, granularity="matrix")
    plot = asked.costs(matrix + half, ORDER)
    assert plot.finding == "The lowest perplexity is that of half-block, which also adds the least memory."
    assert list(plot.data["granularity"]) == ORDER[1:3] and plot.data["TFLOP"].eq(1).all()
    small = asked.costs(costly(0.1, 0.1, granularity="matrix") + half, ORDER)
    assert small.finding.endswith("with 3.00 times the memory of matrix, which adds the least.")
    tie = asked.costs([*matrix, *half, *costly(0.5, 0.2, granularity="block")], ORDER).finding
    assert tie.startswith("The lowest perplexities are those of ") and "which seeds do not tell apart; block adds" in tie
    one = asked.costs([matrix[0], half[0]], ORDER).finding
    assert one == "Seeds do not tell the perplexities of the sizes apart; half-block adds the least memory."


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
