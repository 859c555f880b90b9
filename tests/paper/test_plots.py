"""Figures by topic: what they draw and what they find, from made-up records whose truth is known."""

import math

import pytest
from fixtures.made_up import DAMAGE, record, seeds

from recon.experiment.study import fit_name
from recon.paper.claims import judge
from recon.paper.comparisons import MARGIN
from recon.paper.plots import paired
from recon.paper.plots.answers import answers


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
