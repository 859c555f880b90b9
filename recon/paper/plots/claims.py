"""The forest of claims: a row per claim and model, with its interval, against what it has to exceed."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from recon.paper.comparisons import CLOSE, MARGIN, SEEDS
from recon.paper.figures import log_scale, savefig, style
from recon.paper.runs import short
from recon.paper.verdicts import FAILS, HOLDS, MARKS, UNSURE, Verdict, effect_words
from recon.study.record import RunRecord

_COUNTS, _SHORT = (2, 8, 32), {"own": "perplexity", "kl": "KL to dense"}
# Those that are drawn, as a page cannot show all, and what they say in short: of ways to retrain MaskLoRA, of measures two; else every size,
# count, propagation and loss.
CENTRAL = (
    {f"1.{measure}": f"reconstructed better than pruned: {words}" for measure, words in _SHORT.items()}
    | {"3": "half-blocks better than single matrices", "4": "half-blocks better than matrices solved exactly"}
    | {
        f"{group}.masklora.{count}.{measure}": f"{count} samples as good as MaskLoRA with {more.format(count * times)}: {words}"
        for group, times, more in (("5a", 1, "{}"), ("5b", 10, "{} or more"))
        for count in _COUNTS
        for measure, words in _SHORT.items()
    }
    | {
        f"6.masklora.reconstruction.{count}": f"reconstruction + MaskLoRA better than reconstruction, {count} samples"
        for count in _COUNTS[1:]
    }
    | {
        f"6.masklora.retraining.{count}": f"reconstruction + MaskLoRA better than MaskLoRA, {count} samples"
        for count in _COUNTS[1:]
    }
    | {
        "6.masklora.reconstruction.flops": "reconstruction + MaskLoRA better than reconstruction, no more compute",
        "6.masklora.retraining.flops": "reconstruction + MaskLoRA better than MaskLoRA, no more compute",
        "7.magnitude": "gap of magnitude to SparseGPT shrinks",
        "7.wanda": "gap of Wanda to SparseGPT shrinks",
    }
    | {f"2.{size}": f"half-block = {size}" for size in ("block", "2-blocks", "4-blocks", "8-blocks", "quarter", "model")}
    | {
        f"9.{ours}.{loss}": f"{ours} = dense propagation ({loss})"
        for ours in ("sparse", "mixed")
        for loss in ("mse", "cosine", "whitened")
    }
    | {
        f"10.{loss}.{of}": f"{loss} loss = mse ({of} propagation)"
        for loss in ("cosine", "whitened")
        for of in ("dense", "sparse", "mixed")
    }
    | {"11.masklora": "MaskLoRA in windows = all weights", "5b.masklora.flops": "MaskLoRA takes over 10 times the FLOPs"}
)
# Groups of claims, in the words of the title.
TOPICS = {
    "1": "recovery", "2": "window size", "3": "single matrices", "4": "exact solutions", "5a": "retraining on the same samples",
    "5b": "retraining on ten times the samples", "6": "both together", "7": "criteria", "8": "model size", "9": "propagation", "10": "loss",
    "11": "adapters",
}  # fmt: skip
COLOURS = {HOLDS: "#0072b2", FAILS: "#d55e00", UNSURE: "0.5"}
SHAPES = {HOLDS: "o", FAILS: "X", UNSURE: "d"}
PANELS = {  # of verdicts, by what their effect is -> label of the axis
    "difference": "nats per token by which it is better: right of 0 is as claimed",
    "match": f"difference as a share of the damage: right of the line ({-MARGIN:g}) is as claimed",
    "gap": "nats per token by which the gap shrinks: right of 0 is as claimed",
    "equal": f"share of the damage: equal in the band (±{MARGIN:g}; dark: ±{CLOSE:g}), right of it the first is better",
    "ratio": "times the cost: right of the line is as claimed",
}


def forest(verdicts: Sequence[Verdict]) -> tuple[Figure, pd.DataFrame, str] | None:
    """The figure, what is drawn, and the finding. Filled: decided with at least `SEEDS` seeds; hollow: fewer. None without any."""
    central = [v for v in verdicts if v.claim in CENTRAL and np.isfinite([v.low, v.effect]).all()]
    first = {}
    for verdict in central:  # the main pattern comes first
        first.setdefault((verdict.claim, verdict.model), verdict)
    shown = sorted(first.values(), key=lambda v: list(CENTRAL).index(v.claim))
    if not shown:
        return None
    panels = {name: [v for v in shown if _panel(v) == name] for name in PANELS}
    panels = {name: mine for name, mine in panels.items() if mine}
    heights = [len(mine) + 1.6 for mine in panels.values()]
    fig, axes = plt.subplots(
        len(panels), 1, figsize=(9, 0.24 * sum(heights) + 0.3), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for ax, (name, mine) in zip(axes.flat, panels.items()):
        _draw(ax, name, mine)
    drawn = pd.DataFrame(
        {
            "claim": v.claim, "statement": v.statement, "model": short(v.model), "pattern": v.pattern, "effect": v.effect,
            "low": v.low, "high": v.high, "unit": v.unit, "seeds": v.seeds, "verdict": v.verdict,
        }
        for v in shown
    )  # fmt: skip
    return fig, drawn, _finding(shown)


def _finding(shown: Sequence[Verdict]) -> str:
    """Which groups of claims hold in all that is drawn, in some of it, and in none."""
    topics: dict[str, list[str]] = {"Holds": [], "Holds in part": [], "Does not hold": [], "Open": []}
    for group, topic in TOPICS.items():
        mine = [v.verdict for v in shown if v.group == group]
        if mine:
            holds, fails = mine.count(HOLDS), mine.count(FAILS)
            word = "Holds" if holds == len(mine) else "Holds in part" if holds else "Does not hold" if fails else "Open"
            topics[word].append(f"{topic} ({holds} of {len(mine)})" if word == "Holds in part" else topic)
    return " ".join(f"{word}: {', '.join(found)}." for word, found in topics.items() if found)


def _panel(verdict: Verdict) -> str:
    return verdict.kind if verdict.kind in PANELS else "match" if verdict.bar < 0 else "difference"


def _draw(ax, name: str, verdicts: Sequence[Verdict]) -> None:
    if name == "equal":
        ax.axvspan(-MARGIN, MARGIN, color="0.9", zorder=0)
        ax.axvspan(-CLOSE, CLOSE, color="0.82", zorder=0)
    ax.axvline(verdicts[0].bar, color="0.3", linewidth=1, zorder=1)
    for place, verdict in enumerate(verdicts):
        colour, enough = COLOURS[verdict.verdict], verdict.seeds >= SEEDS
        if np.isfinite(verdict.high):
            ax.plot([verdict.low, verdict.high], [place, place], color=colour, linestyle="-", marker="", linewidth=1.5)
        else:  # only a lower bound is known
            arrow = {"arrowstyle": "->", "color": colour, "linewidth": 1.5}
            ax.annotate("", (verdict.effect * 3, place), (verdict.low, place), arrowprops=arrow)
        ax.plot(
            verdict.effect, place, color=colour, marker=SHAPES[verdict.verdict], markersize=5.5, linestyle="",
            markerfacecolor=colour if enough else "white",
        )  # fmt: skip
        words = f"{MARKS[verdict.verdict]}  {effect_words(verdict).removesuffix(verdict.unit)}"
        ax.annotate(
            words, (1, place), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center", fontsize=7
        )
    labels = [f"{CENTRAL[v.claim]}  ·  {short(v.model)} {v.pattern}" for v in verdicts]
    ax.set_yticks(range(len(verdicts)), labels, fontsize=7)
    ax.set_ylim(len(verdicts) - 0.4, -0.6)
    ax.set_xlabel(PANELS[name], fontsize=8)
    ax.tick_params(axis="x", labelsize=7)
    ax.grid(axis="y", visible=False)
    if name == "ratio":
        log_scale(ax, "x")


def save(verdicts: Sequence[Verdict], folder: Path | str, records: Iterable[RunRecord]) -> None:
    """Saves the forest as the figure `claims` in `folder`, where there is anything to draw; records: what `verdicts` are of."""
    style()
    if not (made := forest(verdicts)):
        return
    fig, drawn, finding = made
    keys = {key for verdict in verdicts if verdict.claim in CENTRAL for key in verdict.records}
    caption = (
        "Central claims of the paper, a row for each and model, at its main pattern; marks: effects, lines: bootstrap intervals over seeds and "
        f"windows (95 %; equal and as good 90 %). {HOLDS}: circle; {FAILS}: cross; {UNSURE}: diamond; hollow: fewer than {SEEDS} seeds. All claims "
        "and protocols: claims.md."
    )
    what = "A row per claim and model, with the effect, its interval, and what it has to exceed."
    behind = [record.to_dict() for record in records if record.key in keys]
    savefig(fig, "claims", folder, drawn, behind, caption, finding, what)
    plt.close(fig)
