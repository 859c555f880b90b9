"""Intervals on made-up arrays: how often they hold the truth, and how wide they are."""

import math

import numpy as np
import pytest

from recon.paper.statistics import interval

WINDOWS = 30


@pytest.mark.parametrize("level", [0.95, 0.90])
@pytest.mark.parametrize("seed_spread, window_spread", [(1.0, 0.3), (0.1, 1.0), (0.5, 3.0)])
@pytest.mark.parametrize("count", [3, 5])
def test_intervals_cover_the_truth(count, seed_spread, window_spread, level):
    """Crossed seed and window effects and noise: the interval holds the true mean about as often as it says, or a bit more often."""
    draw, hits, widths, trials = np.random.default_rng(1), 0, [], 300
    for _ in range(trials):
        values = (
            2.0
            + draw.normal(0, seed_spread, (count, 1))
            + draw.normal(0, window_spread, (1, WINDOWS))
            + draw.normal(0, 0.3, (count, WINDOWS))
        )
        low, high = interval([values[None]], lambda means: means[0], level, 400)
        hits += low <= 2.0 <= high
        widths.append(high - low)
    assert level - 0.04 <= hits / trials <= 1
    # Not by being wide without need: Student's t with the true spread, if only seeds mattered, plus that of windows.
    t = {3: {0.95: 4.303, 0.90: 2.920}, 5: {0.95: 2.776, 0.90: 2.132}}[count][level]
    assert np.mean(widths) < 2 * 1.25 * (
        t * math.sqrt((seed_spread**2 + 0.1) / count) + 2 * math.sqrt(window_spread**2 / WINDOWS)
    )


def test_interval_of_one_seed_is_that_of_windows():
    values = np.random.default_rng(0).normal(5.0, 2.0, (1, 1, 400))
    low, high = interval([values], lambda means: means[0], 0.95, 4000)
    error = 1.96 * values.std() / 20
    assert (low, high) == (pytest.approx(values.mean() - error, abs=0.03), pytest.approx(values.mean() + error, abs=0.03))


def test_interval_may_be_infinite():
    low, high = interval([np.zeros((1, 3, 5))], lambda means: (means[0] - np.inf, means[0] + np.inf))
    assert (low, high) == (-np.inf, np.inf)
