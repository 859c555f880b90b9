"""Paired differences: between runs that share seeds and evaluation windows, with the interval that claims are judged by."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator

from recon.paper.claims import Claim
from recon.paper.comparisons import KINDS, MARGIN, SEEDS
from recon.paper.figures import Plot
from recon.paper.runs import DEFAULTS, Run
from recon.paper.statistics import interval
from recon.study.record import RunRecord

LEVEL = 0.90  # of intervals: within the margin, they are two one-sided tests at 5 %
SHARE = f"{MARGIN:.0%}".replace("%", " %")  # the margin in words
EDGE = 1.06  # where an axis of differences ends, in units of the largest that is drawn: room for arrow heads


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
    """A difference with its interval, at the height `place`; hollow for one seed. Beyond `far`, an arrow; a mean there is written."""
    value, low, high = row["difference"], row["low"], row["high"]
    if math.isnan(value):
        return
    edge = EDGE * far
    heads = [(-edge, "<")] * (min(value, low) < -far) + [(edge, ">")] * (max(value, high) > far)
    for end, head in heads:
        ax.plot(end, place, color=shown["color"], marker=head, markersize=5, linestyle="", clip_on=False)
    if abs(value) > far:
        right = value > 0
        offset = {"xytext": (-6 if right else 6, 0), "textcoords": "offset points"}
        note = number(value) + ("" if math.isnan(low) else f" [{number(low)}, {number(high)}]")
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        align = {"ha": "right" if right else "left", "va": "center"}
        ax.annotate(note, (edge if right else -edge, place), **offset, **align, fontsize=7.5, bbox=behind)
        return
    if not math.isnan(low):
        left, right = (-edge if low < -far else low), (edge if high > far else high)
        ax.plot([left, right], [place, place], color=shown["color"], linestyle="-", marker="", linewidth=1.5)
    ax.plot(value, place, **shown | {"linestyle": ""} | ({} if row["seeds"] > 1 else {"markerfacecolor": "white"}), zorder=3)


def margin(ax: Axes, far: float, label: str) -> None:
    """The band of equivalence on a horizontal axis of differences, named under it, and which side is which."""
    ax.axvspan(-MARGIN, MARGIN, color="0.9", zorder=0, linewidth=0)
    ax.axvline(0, color="0.4", linewidth=1, linestyle="-", marker="", zorder=1)
    ax.set_xlim(-EDGE * far, EDGE * far)
    ax.xaxis.set_major_locator(MultipleLocator(2 * MARGIN))
    sides = "\N{LEFTWARDS ARROW} worse", f"equal (\N{PLUS-MINUS SIGN}{SHARE})", "better \N{RIGHTWARDS ARROW}"
    ax.set_xlabel(f"{'    '.join(sides)}\n{label}", fontsize=8)


def marks_words(plot: Plot | None, far: float = math.inf) -> str:
    """What hollow marks and arrows are, each after a space, for the caption of a plot that has them; empty for one without."""
    data = plot.data if plot else pd.DataFrame({"seeds": []})
    found = {
        "Hollow: one seed.": (data["seeds"] == 1).any(),
        f"Arrow: beyond {far:g}.": data.filter(["difference", "low", "high"]).abs().gt(far).to_numpy().any(),
    }
    return "".join(f" {words}" for words, there in found.items() if there)


def leading(data: pd.DataFrame) -> list[str]:
    """The names of what is lowest in the mean, and of all that cannot be told apart from it: where ranges overlap, or are of one value.

    data: columns mean, low, high and count (of values), by name.
    """
    data = data.sort_values("mean", kind="stable")
    first = data.iloc[0]
    return list(data.index[(data["low"] <= first["high"]) | (data["count"].clip(upper=first["count"]) < 2)])
