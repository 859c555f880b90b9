"""A bootstrap percentile interval of a statistic of means over seeds and evaluation windows."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

# Quantiles of Student's t, 1 to 9 degrees of freedom, over those of the normal distribution.
_T = {
    0.95: np.array([12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]) / 1.960,
    0.90: np.array([6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833]) / 1.645,
}


@lru_cache(maxsize=64)
def _draws(count: int, resamples: int, seed: int, stream: int) -> np.ndarray:
    """Weights (resamples, count) of things drawn with replacement."""
    # RandomState: its stream is frozen, so that the committed page does not depend on numpy's version.
    drawn = np.random.RandomState([seed, stream]).randint(0, count, (resamples, count))
    flat = (drawn + np.arange(resamples)[:, None] * count).ravel()
    return np.bincount(flat, minlength=resamples * count).reshape(resamples, count) / count


def wider(seeds: int, level: float) -> float:
    """How many times wider than the bootstrap's the spread of means over so many seeds is taken to be; infinite for one."""
    return math.sqrt(seeds / (seeds - 1)) * _T[level][min(seeds - 1, 9) - 1] if seeds > 1 else math.inf


def interval(
    parts: Sequence[np.ndarray], statistic: Callable, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap percentile interval of `statistic` of the means of `parts`, each (means, seeds, windows); level 0.95 or 0.9.

    Seeds are drawn with replacement, then windows; all seeds share their windows, so one draw of windows serves them all
    (the "pigeonhole" bootstrap: Owen, Annals of Applied Statistics 2007). The bootstrap understates the spread of few
    seeds, so that deviations of drawn seeds from their mean are widened by sqrt(n / (n - 1)) and by Student's t over normal
    (as Hesterberg's expanded percentile interval does: The American Statistician 2015). With one seed only windows are drawn.
    NaN where the statistic is NaN in any draw.
    """
    means = []
    for index, values in enumerate(parts):
        seeds, windows = values.shape[1:]
        of_seeds = _draws(seeds, resamples, seed, 2 * index)
        if seeds > 1:
            of_seeds = 1 / seeds + wider(seeds, level) * (of_seeds - 1 / seeds)
        by_seed = values @ _draws(windows, resamples, seed, 2 * index + 1).T
        means.append(np.einsum("bs,ksb->kb", of_seeds, by_seed))
    lower, upper = bounds(statistic(np.concatenate(means)))
    if np.isnan(lower).any() or np.isnan(upper).any():
        return math.nan, math.nan
    # No arithmetic between draws: a ratio may be infinite.
    low = np.quantile(lower, (1 - level) / 2, method="lower")
    return float(low), float(np.quantile(upper, (1 + level) / 2, method="higher"))


def bounds(effects: np.ndarray | tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds of effects; effects that are known are both."""
    return effects if isinstance(effects, tuple) else (effects, effects)
