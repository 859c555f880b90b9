"""Pruning criteria before and after reconstruction: how far apart they are."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from recon.paper.figures import Plot, log_scale, look, lower_is_better, number
from recon.paper.plots import paired
from recon.paper.plots.layout import label_ends, panels, pattern_words
from recon.paper.runs import Run, short
from recon.study.record import RunRecord
from recon.study.studies import fit_name

PRUNED = "pruned"
SHIFT = {PRUNED: -0.15, "reconstructed": 0.15}  # of states that share a row, down
NAMES = {"sparsegpt": "SparseGPT", "wanda": "Wanda", "ria": "RIA"}


def slopes(records: Sequence[RunRecord]) -> Plot | None:
    """Perplexity pruned and reconstructed, a line per criterion, a panel per model and pattern that have several."""
    rows = []
    for (model, pattern, fit, criterion), runs in _cells(records).items():
        values = {state: float(np.exp(np.mean([run.nll[state].mean() for run in runs]))) for state in ("dense", "reconstructed")}
        row = {"model": model, "pattern": pattern, "criterion": criterion, "granularity": fit, "seeds": len(runs)}
        rows.append(row | {"dense perplexity": values["dense"], "perplexity": values["reconstructed"]})
    data = pd.DataFrame(rows)
    if len(data):
        data = data[data.groupby(["model", "pattern"])["criterion"].transform("nunique") > 1]
    if data.empty:
        return None
    steps = sorted(data["granularity"].unique(), key=lambda step: step != PRUNED)
    data = _by_model(data)
    cells, patterns = list(data.groupby(["model", "pattern"], sort=False)), data["pattern"].nunique()
    fig, axes = panels(len(cells), (1.9, 2.5), columns=min(3, patterns if patterns > 1 else len(cells)), wspace=0.7, sharey=True)
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
    """The perplexity of the worst criterion over that of the best, before and after; by name, where they are the same everywhere."""
    wide = data.pivot(index=["model", "pattern", "granularity"], columns="criterion", values="perplexity").dropna()
    wide = wide[wide.index.isin((steps[0], steps[-1]), level="granularity")]
    ratios = (wide.max(axis=1) / wide.min(axis=1)).unstack("granularity")
    if not {steps[0], steps[-1]} <= set(ratios) or len(steps) < 2 or ratios[[steps[0], steps[-1]]].dropna().empty:
        return "No model and pattern with all criteria, pruned and reconstructed, yet."
    ratios = ratios.dropna(subset=[steps[0], steps[-1]])
    before, after = ratios[steps[0]], ratios[steps[-1]]
    worst, best = (set(of(axis=1)) for of in (wide.idxmax, wide.idxmin))
    same = len(worst) == len(best) == 1
    which = " over ".join(NAMES.get(name, name) for name in (*worst, *best)) if same else "the worst criterion over the best"
    return (
        f"Perplexity of {which}: {_span(before)} pruned, {_span(after)} reconstructed ({steps[-1]}); "
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
    fig, axes = panels(len(criteria), (2.7, 0.5 + 0.4 * len(places)), wspace=0.15, sharex=True, sharey=True)
    # Linear up to 0.1, logarithmic beyond: gaps differ by orders of magnitude, and some are about 0.
    axes[0].set_xscale("symlog", linthresh=0.1, linscale=0.5)
    for ax, (criterion, cell) in zip(axes, criteria):
        for row in cell.to_dict("records"):
            state = _state(row["granularity"])
            place, shown = places.index((row["model"], row["pattern"])) + SHIFT[state], look(state)
            ax.plot([row["low"], row["high"]], [place, place], color=shown["color"], linestyle="-", marker="", linewidth=1.5)
            filled = {} if row["seeds"] > 1 else {"markerfacecolor": "white"}
            ax.plot(row["gap"], place, **shown | {"linestyle": ""} | filled, zorder=3)
        ax.axvline(0, color="0.4", linewidth=1, linestyle="-", marker="", zorder=1)
        ax.set_title(NAMES.get(criterion, criterion))
        ax.set_yticks(range(len(places)), [f"{model}, {pattern_words(pattern)}" for model, pattern in places])
        ax.set_ylim(len(places) - 0.5, -0.5)
        ax.set_xlabel(f"worse than {NAMES.get(to, to)}, nats per token \N{RIGHTWARDS ARROW}")
    _name_states(axes, data, places[0])
    drawn = f"How much worse each criterion is than {NAMES.get(to, to)}, pruned and reconstructed, with intervals, a panel per criterion."
    return Plot(fig, data, _shrinks(data, NAMES.get(to, to)), drawn)


def _name_states(axes: Sequence[Axes], data: pd.DataFrame, place: tuple[str, str]) -> None:
    """Ticks at round numbers, and in the uppermost row of each panel the name of each state: to the side of its interval that has room."""
    low, high = axes[0].get_xlim()
    steps = [0, *(sign * 10**power * digit for sign in (-1, 1) for power in range(-1, 3) for digit in (1, 2, 5))]
    axes[0].set_xticks([step for step in steps if low <= step <= high])
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].xaxis.set_minor_locator(NullLocator())
    for ax, (_, cell) in zip(axes, data.groupby("criterion", sort=False)):
        for row in cell[(cell["model"] == place[0]) & (cell["pattern"] == place[1])].to_dict("records"):
            state = _state(row["granularity"])
            left = ax.transLimits.transform(ax.transScale.transform((row["gap"], 0)))[0] > 0.5
            end = {"xytext": (-6 if left else 6, 0), "textcoords": "offset points", "ha": "right" if left else "left"}
            at = row["low"] if left else row["high"], SHIFT[state]
            ax.annotate(state, at, **end, va="center", fontsize=8, color=look(state)["color"])


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
