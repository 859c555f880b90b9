"""The forest of claims: a row per claim and model, with its interval, against what it has to exceed."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from recon.experiment.record import RunRecord
from recon.paper.comparisons import CLOSE, MARGIN, SEEDS
from recon.paper.figures import log_scale, savefig, style
from recon.paper.runs import short
from recon.paper.verdicts import FAILS, HOLDS, MARKS, UNSURE, Verdict, effect_words

# Those that stand for their group, as a page cannot show all, and what they say in short.
CENTRAL = {
    "1.own": "reconstructed better than pruned: perplexity",
    "1.other": "reconstructed better than pruned: perplexity on another text",
    "1.kl": "reconstructed better than pruned: KL to dense",
    "3": "half-blocks better than single matrices",
    "4": "half-blocks better than matrices solved exactly",
    "5b.masklora.2.own": "2 samples as good as MaskLoRA with > 20: perplexity",
    "5b.masklora.2.kl": "2 samples as good as MaskLoRA with > 20: KL to dense",
    "5a.masklora.8.own": "8 samples as good as MaskLoRA with 8: perplexity",
    "5a.masklora.8.kl": "8 samples as good as MaskLoRA with 8: KL to dense",
    "5b.masklora.8.own": "8 samples as good as MaskLoRA with > 80: perplexity",
    "5b.masklora.8.kl": "8 samples as good as MaskLoRA with > 80: KL to dense",
    "5b.full.8.own": "8 samples as good as full with > 80: perplexity",
    "5b.full.8.kl": "8 samples as good as full with > 80: KL to dense",
    "6.masklora.reconstruction.flops": "with MaskLoRA after it, better at equal compute",
    "6.masklora.retraining.flops": "before MaskLoRA, better than MaskLoRA at equal compute",
    "7.magnitude": "gap of magnitude to SparseGPT shrinks",
    "7.wanda": "gap of Wanda to SparseGPT shrinks",
    "2.block": "half-block equals block",
    "2.2-blocks": "half-block equals two blocks",
    "2.quarter": "half-block equals a quarter",
    "2.model": "half-block equals the model",
    "9.sparse.mse": "sparse propagation equals dense",
    "9.mixed.mse": "mixed propagation equals dense",
    "10.cosine.mixed": "cosine loss equals squared error",
    "10.whitened.mixed": "whitened loss equals squared error",
    "11.masklora": "MaskLoRA in windows equals all weights",
    "5b.masklora.flops": "MaskLoRA takes over 10 times the FLOPs",
}
COLOURS = {HOLDS: "#0072b2", FAILS: "#d55e00", UNSURE: "0.5"}
SHAPES = {HOLDS: "o", FAILS: "X", UNSURE: "d"}
PANELS = {  # of verdicts, by what their effect is -> label of the axis
    "difference": "nats per token by which it is better: right of 0 is as claimed",
    "match": f"difference as a share of the damage: right of the line ({-MARGIN:g}) is as claimed",
    "gap": "nats per token by which the gap shrinks: right of 0 is as claimed",
    "equal": f"difference as a share of the damage: equal within the band (±{MARGIN:g}; dark: ±{CLOSE:g})",
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
    counts = {state: sum(v.verdict == state for v in shown) for state in (HOLDS, FAILS, UNSURE)}
    finding = f"Of {len(shown)} central comparisons, as the paper claims: {counts[HOLDS]}; not so: {counts[FAILS]}"
    finding += f"; open: {counts[UNSURE]}." if counts[UNSURE] else "."
    return fig, drawn, finding


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
