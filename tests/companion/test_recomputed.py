"""Central numbers of the committed verdicts, computed once more from raw records by other code: plain loops and one bootstrap."""

import functools
import json
import math

import numpy as np
import pytest
from scipy import stats

from companion import frame, judge
from companion.publish import ROOT

RECORDS = ROOT / "results" / "laptop"


@functools.cache
def verdicts():
    return judge.judge(frame.load(RECORDS), [claim for claim in judge.claims() if claim["id"] in CASES]).query("seeds > 1")


def matrix(row, wanted, state, measure="nll"):
    """Nats (seeds, windows) of the runs of a verdict whose spec has the options `wanted`, by seed."""
    runs = {}
    for key in row["keys"]:
        record = json.loads((RECORDS / f"{key}.json").read_text())
        if all(record["spec"][name] == value for name, value in wanted.items()):
            text = record["metrics"]["by_text"][record["spec"]["evaluation_texts"][0]]
            runs[record["spec"]["seed"]] = text[f"{measure}_per_window"][state]
    return np.array([runs[seed] for seed in sorted(runs)])


def bootstrap(sides, statistic, level, draws=1500):
    """The interval's ends: seeds and windows drawn with replacement, deviations between seeds widened for their small number."""
    seeds, windows = sides[0].shape
    widened = math.sqrt(seeds / (seeds - 1)) * stats.t.ppf((1 + level) / 2, seeds - 1) / stats.norm.ppf((1 + level) / 2)
    random, found = np.random.default_rng(1), []
    for _ in range(draws):
        rows, columns = random.integers(seeds, size=seeds), random.integers(windows, size=windows)
        means = [side[:, columns].mean(1) for side in sides]
        found.append(statistic(*(mean.mean() + widened * (mean[rows].mean() - mean.mean()) for mean in means)))
    return np.quantile(found, [(1 - level) / 2, (1 + level) / 2])


HALF, PLAIN = {"granularity": "half-block", "retrain": "none"}, (lambda mine, theirs: theirs - mine)
CASES = {  # claim -> sides (options, state), statistic of their means, level
    "1.wanda.own": ([(HALF, "reconstructed"), (HALF, "pruned")], PLAIN, 0.95),
    "3": ([(HALF, "reconstructed"), ({"granularity": "matrix"}, "reconstructed")], PLAIN, 0.95),
    "2.block": (
        [(HALF, "reconstructed"), ({"granularity": "block"}, "reconstructed"), (HALF, "dense"), (HALF, "pruned")],
        lambda mine, theirs, dense, pruned: (theirs - mine) / (pruned - dense), 0.90,
    ),
    "5a.masklora.32.own": (
        [(HALF, "reconstructed"), ({"retrain": "masklora"}, "reconstructed"), (HALF, "dense"), (HALF, "pruned")],
        lambda mine, theirs, dense, pruned: (theirs - mine) / (pruned - dense), 0.90,
    ),
    "7.magnitude": (
        [({**HALF, "criterion": name}, state) for state in ("pruned", "reconstructed") for name in ("magnitude", "sparsegpt")],
        lambda before, best, after, other: before - best - (after - other), 0.95,
    ),
}  # fmt: skip


@pytest.mark.parametrize("claim", CASES)
def test_effects_and_intervals_are_those_of_other_code(claim):
    (sides, statistic, level), mine = CASES[claim], verdicts()[verdicts()["claim"] == claim]
    row = mine.iloc[0]
    values = [matrix(row, wanted, state) for wanted, state in sides]
    assert len(values[0]) == row["seeds"]
    assert statistic(*(side.mean() for side in values)) == pytest.approx(row["effect"], abs=1e-9)
    ends, width = bootstrap(values, statistic, level), row["high"] - row["low"]
    assert ends == pytest.approx([row["low"], row["high"]], abs=0.1 * width)
