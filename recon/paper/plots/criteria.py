"""Pruning criteria before and after reconstruction: how far apart they are."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from recon.experiment.record import RunRecord
from recon.experiment.study import fit_name
from recon.paper.figures import Plot, log_scale, look, lower_is_better, number
from recon.paper.plots import paired
from recon.paper.plots.layout import label_ends, panels, pattern_words
from recon.paper.runs import Run, short

PRUNED = "pruned"
NAMES = {"sparsegpt": "SparseGPT", "wanda": "Wanda", "ria": "RIA"}


def slopes(records: Sequence[RunRecord]) -> Plot | None:
    """Perplexity pruned and reconstructed, a line per criterion, a panel per model and pattern."""
    rows = []
    for (model, pattern, fit, criterion), runs in _cells(records).items():
        values = {state: float(np.exp(np.mean([run.nll[state].mean() for run in runs]))) for state in ("dense", "reconstructed")}
        row = {"model": model, "pattern": pattern, "criterion": criterion, "granularity": fit, "seeds": len(runs)}
        rows.append(row | {"dense perplexity": values["dense"], "perplexity": values["reconstructed"]})
    data = pd.DataFrame(rows)
    if data.empty:
        return None
    steps = sorted(data["granularity"].unique(), key=lambda step: step != PRUNED)
    data = _by_model(data)
    cells = list(data.groupby(["model", "pattern"], sort=False))
    fig, axes = panels(len(cells), (1.9, 2.5), columns=min(3, data["pattern"].nunique()), wspace=0.7, sharey=True)
    right = len(steps) - 0.92  # labels stand beyond it
    for ax, ((model, pattern), cell) in zip(axes, cells):
        for criterion, line in cell.groupby("criterion", sort=False):
            line = line.set_index("granularity").reindex(steps).dropna(subset="perplexity")
            places, shown = [steps.index(step) for step in line.index], look(criterion)
            ax.plot(places, line["perplexity"], **shown, markevery=[index for index, n in enumerate(line["seeds"]) if n > 1])
            for place, row in zip(places, line.to_dict("records")):
                if row["seeds"] == 1:
                    ax.plot(place, row["perplexity"], **shown | {"markerfacecolor": "white"})
        ax.set_title(f"{model}, {pattern_words(pattern)}")
        ax.set_xticks(range(len(steps)), [step if step == PRUNED else f"reconstructed\n({step})" for step in steps])
        ax.set_xlim(-0.75 if len(steps) > 1 else -0.3, right)
        ax.grid(axis="x", visible=False)
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel("perplexity")
            lower_is_better(ax)
    log_scale(axes[0])
    for ax, (_, cell) in zip(axes, cells):
        first, last = (cell[cell["granularity"] == step] for step in (steps[0], steps[-1]))
        ends = {
            f"{NAMES.get(row['criterion'], row['criterion'])} {number(row['perplexity'])}": row["perplexity"]
            for _, row in last.iterrows()
        }
        level = cell["dense perplexity"].mean()
        ax.axhline(level, **look("dense") | {"marker": "", "linewidth": 1}, zorder=1)
        label_ends(ax, right, ends | {f"dense {number(level)}": level})
        if len(steps) > 1:
            label_ends(ax, 0, {number(value): value for value in first["perplexity"]}, side="left")
    drawn = (
        "Perplexity before and after reconstruction, a line per criterion, a panel per model and pattern; dotted the dense model."
    )
    return Plot(fig, data, _closer(data, steps), drawn)


def _by_model(data: pd.DataFrame) -> pd.DataFrame:
    """Rows with those of a model together, and of its patterns; models and patterns in the order in which they first come."""
    ranks = [data[name].map({value: rank for rank, value in enumerate(data[name].unique())}) for name in ("model", "pattern")]
    return data.iloc[np.lexsort(ranks[::-1])].reset_index(drop=True)


def _closer(data: pd.DataFrame, steps: Sequence[str]) -> str:
    """The perplexity of the worst criterion over that of the best, before and after."""
    by_step = data.groupby(["model", "pattern", "granularity"])["perplexity"].agg(["max", "min", "size"])
    ratios = (by_step["max"] / by_step["min"])[by_step["size"] == data["criterion"].nunique()].unstack("granularity")
    if not {steps[0], steps[-1]} <= set(ratios) or len(steps) < 2 or ratios[[steps[0], steps[-1]]].dropna().empty:
        return "No model and pattern with all criteria, pruned and reconstructed, yet."
    ratios = ratios.dropna(subset=[steps[0], steps[-1]])
    before, after = ratios[steps[0]], ratios[steps[-1]]
    return (
        f"Perplexity of the worst criterion over the best: {_span(before)} pruned, {_span(after)} reconstructed ({steps[-1]}); "
        f"it falls in {(after < before).sum()} of {len(ratios)} models and patterns."
    )


def _span(values: pd.Series) -> str:
    low, high = number(values.min()), number(values.max())
    return low if low == high else f"{low} to {high}"


def gaps(records: Sequence[RunRecord], to: str) -> Plot | None:
    """How much worse each criterion is than the criterion `to`, pruned and reconstructed, in nats, a panel per criterion."""
    cells, rows = _cells(records), []
    for (model, pattern, fit, criterion), runs in cells.items():
        other = cells.get((model, pattern, fit, to), [])
        found = paired.difference(other, runs, "better")  # the criterion less `to`
        if criterion != to and found["seeds"]:
            rows.append({"model": model, "pattern": pattern, "criterion": criterion, "granularity": fit, **found})
    data = pd.DataFrame(rows)
    if data.empty:
        return None
    data = _by_model(data.rename(columns={"difference": "gap"}))
    places = list(dict.fromkeys(zip(data["model"], data["pattern"])))
    criteria = list(data.groupby("criterion", sort=False))
    fig, axes = panels(len(criteria), (2.7, 0.5 + 0.32 * len(places)), wspace=0.1, sharey=True)
    for ax, (criterion, cell) in zip(axes, criteria):
        for row in cell.to_dict("records"):
            place, shown = places.index((row["model"], row["pattern"])), look(_state(row["granularity"]))
            ax.plot([row["low"], row["high"]], [place, place], color=shown["color"], linestyle="-", marker="", linewidth=1.5)
            filled = {} if row["seeds"] > 1 else {"markerfacecolor": "white"}
            ax.plot(row["gap"], place, **shown | {"linestyle": ""} | filled, zorder=3)
        for row in cell[(cell["model"] == places[0][0]) & (cell["pattern"] == places[0][1])].to_dict("records"):
            words = row["granularity"] if row["granularity"] == PRUNED else "reconstructed"
            side = {"ha": "center"} if cell["gap"].max() > 1.5 else {"ha": "left" if words == PRUNED else "right"}
            ax.annotate(
                words,
                (row["gap"], 0),
                (0, 7),
                textcoords="offset points",
                fontsize=8,
                **side,
                bbox={"color": "white", "pad": 0.5},
            )
        ax.axvline(0, color="0.4", linewidth=1, linestyle="-", marker="", zorder=1)
        ax.margins(x=0.12)
        ax.set_title(f"{NAMES.get(criterion, criterion)} less {NAMES.get(to, to)}")
        ax.set_yticks(range(len(places)), [f"{model}, {pattern_words(pattern)}" for model, pattern in places])
        ax.set_ylim(len(places) - 0.5, -0.8)
        ax.set_xlabel("difference of log-perplexity, nats\n(0: the two are as good)", fontsize=8)
    drawn = f"How much worse each criterion is than {NAMES.get(to, to)}, pruned and reconstructed, with intervals, a panel per criterion."
    return Plot(fig, data, _shrinks(data, NAMES.get(to, to)), drawn)


def _state(fit: str) -> str:
    return PRUNED if fit == PRUNED else "reconstructed"


def _shrinks(data: pd.DataFrame, to: str) -> str:
    wide = data.pivot(index=["model", "pattern", "criterion"], columns="granularity", values=["gap", "low", "high"])
    fits = [fit for fit in dict.fromkeys(data["granularity"]) if fit != PRUNED]
    if not fits or PRUNED not in wide["gap"]:
        return f"No gap to {to} both pruned and reconstructed yet."
    both = wide.dropna(subset=[("gap", PRUNED), ("gap", fits[-1])])
    before, after = both["gap"][PRUNED], both["gap"][fits[-1]]
    left = (both["low"][fits[-1]] > 0).sum()
    return (
        f"The gap to {to} shrinks with reconstruction in {(after.abs() < before.abs()).sum()} of {len(both)} comparisons: "
        f"from {_nats(before)} to {_nats(after)} nats. What is left is clearly above 0 in {left}."
    )


def _nats(values: pd.Series) -> str:
    low, high = (f"{value:.2f}".replace("-", "\N{MINUS SIGN}") for value in (values.min(), values.max()))
    return low if low == high else f"{low}\N{EN DASH}{high}"


def _cells(records: Sequence[RunRecord]) -> dict[tuple, list[Run]]:
    """Runs by model, pattern, granularity ("pruned": none) and criterion."""

    def of(spec: dict) -> tuple:
        fit = fit_name(spec)
        return short(spec["model"]), spec["pattern"], PRUNED if fit == "none" else fit, spec["criterion"]

    return paired.grouped(records, of)
