"""Paired differences: between runs that share seeds and evaluation windows, with the interval that claims are judged by."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

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


def count_words(verdicts: Iterable[str], seeds: Iterable[int]) -> str:
    """How many verdicts of `judged` are what: "3 equal, 1 worse, 2 undecided (fewer than 3 seeds)"."""
    verdicts = list(verdicts)
    said = ", ".join(f"{verdicts.count(name)} {name}" for name in ("equal", "better", "worse", "undecided") if name in verdicts)
    return said + (f" (fewer than {SEEDS} seeds)" if max(seeds, default=0) < SEEDS else "")


def number(value: float) -> str:
    """With its sign, two digits after the point."""
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def draw(ax: Axes, place: float, row: Mapping, shown: Mapping, far: float) -> None:
    """A difference with its interval, at the height `place`; hollow for one seed. Beyond `far`, an arrow with the number."""
    value, low, high = row["difference"], row["low"], row["high"]
    if math.isnan(value):
        return
    if abs(value) > far:
        right = value > 0
        ax.plot(
            far * (1 if right else -1), place, color=shown["color"], marker=">" if right else "<", linestyle="", clip_on=False
        )
        offset = {"xytext": (-7 if right else 7, 0), "textcoords": "offset points"}
        note = number(value) + ("" if math.isnan(low) else f" [{number(low)}, {number(high)}]")
        ax.annotate(note, (far * (1 if right else -1), place), **offset, ha="right" if right else "left", va="center", fontsize=8)
        return
    if not math.isnan(low):
        ax.plot([max(low, -far), min(high, far)], [place, place], color=shown["color"], linestyle="-", marker="", linewidth=1.5)
    ax.plot(value, place, **shown | {"linestyle": ""} | ({} if row["seeds"] > 1 else {"markerfacecolor": "white"}), zorder=3)


def margin(ax: Axes, far: float, label: str) -> None:
    """The band of equivalence on a horizontal axis of differences, and which side is which."""
    ax.axvspan(-MARGIN, MARGIN, color="0.9", zorder=0, linewidth=0)
    ax.axvline(0, color="0.4", linewidth=1, linestyle="-", marker="", zorder=1)
    ax.set_xlim(-far, far)
    ax.set_xlabel(f"\N{LEFTWARDS ARROW} worse        better \N{RIGHTWARDS ARROW}\n{label}", fontsize=8)
