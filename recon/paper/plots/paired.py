"""Paired differences: between runs that share seeds and evaluation windows, with the interval that claims are judged by."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from recon.experiment.record import RunRecord
from recon.paper.claims import Claim
from recon.paper.comparisons import KINDS, MARGIN, SEEDS
from recon.paper.runs import DEFAULTS, Run
from recon.paper.statistics import interval

LEVEL = 0.90  # of intervals: within the margin, they are two one-sided tests at 5 %
SHARE = f"{MARGIN:.0%}".replace("%", " %")  # the margin in words


def grouped(records: Iterable[RunRecord], of: Callable[[dict], tuple]) -> dict[tuple, list[Run]]:
    """The finished runs by what `of` makes of their spec, in the order in which they come."""
    found: dict[tuple, list[Run]] = {}
    for record in records:
        if record.status == "done":
            found.setdefault(of(record.spec), []).append(Run(record))
    return found


def difference(ours: Sequence[Run], other: Sequence[Run], kind: str = "equal") -> dict:
    """The effect of a kind of comparison ("equal": a share of the damage; "better": nats) at the seeds that both have: above 0, `ours` is better.

    Each of `ours` and `other` are runs of one setting. Without a common seed, `seeds` is 0 and the rest NaN.
    """
    evidence = None
    if ours and other:
        evidence = KINDS[kind]([*ours, *other], Claim("", "", kind, _options(ours[0]), _options(other[0])))
    if evidence is None:
        return {"difference": math.nan, "low": math.nan, "high": math.nan, "seeds": 0}
    means = np.concatenate([part.mean((1, 2)) for part in evidence.parts])[:, None]
    low, high = interval(evidence.parts, evidence.statistic, LEVEL)
    return {"difference": float(evidence.statistic(means)[0]), "low": low, "high": high, "seeds": evidence.seeds}


def _options(run: Run) -> dict:
    return {name: value for name, value in run.setting.items() if value != DEFAULTS[name]}


def judged(low: float, high: float, seeds: int) -> str:
    """ "equal" within the margin, "better" or "worse" beyond it; "undecided" where the interval reaches across it or seeds are few."""
    if seeds < SEEDS or math.isnan(low) or math.isnan(high):
        return "undecided"
    if -MARGIN < low and high < MARGIN:
        return "equal"
    return "better" if low > MARGIN else "worse" if high < -MARGIN else "undecided"
