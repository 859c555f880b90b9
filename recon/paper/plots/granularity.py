"""Quality and memory against granularity: what a larger window brings, and what it costs."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from recon.experiment.record import RunRecord
from recon.experiment.study import fit_name
from recon.paper.comparisons import MARGIN
from recon.paper.figures import Plot, log_scale, look, lower_is_better, reference, sentence
from recon.paper.plots import paired
from recon.paper.plots.layout import label_points, panels, pattern_words
from recon.paper.runs import Run, short

HALF, MATRICES = "half-block", ("matrix", "matrix exact")
FAR = 5 * MARGIN  # differences beyond are written, not drawn to scale


def table(records: Sequence[RunRecord]) -> pd.DataFrame:
    """A row per model, pattern and granularity ("pruned": none): means over seeds of what was measured, and the least memory."""
    rows = []
    for (model, pattern, fit), runs in _cells(records).items():
        found = [run.record for run in runs]
        row = {"model": model, "pattern": pattern, "granularity": fit, "seeds": len(runs)}
        row |= {f"{state} perplexity": _perplexity(runs, state) for state in ("dense", "pruned")}
        row |= {
            "perplexity": _perplexity(runs),
            "lowest perplexity": min(map(_one, runs)),
            "highest perplexity": max(map(_one, runs)),
        }
        row["share recovered"] = 1 - np.log(row["perplexity"] / row["dense perplexity"]) / np.log(
            row["pruned perplexity"] / row["dense perplexity"]
        )
        # The least: what a process runs first adds buffers that later runs find there.
        added = [
            r.added_memory_bytes_by_phase["reconstruct"] / 2**30 for r in found if "reconstruct" in r.added_memory_bytes_by_phase
        ]
        row["memory added, GiB"] = min(added, default=math.nan)
        row["seconds"] = _mean(r.seconds.get("reconstruct", math.nan) for r in found)
        row["zero-shot accuracy"] = _mean(r.metrics.get("accuracy", math.nan) for r in found)
        rows.append(row)
    return pd.DataFrame(rows)


def memory(records: Sequence[RunRecord]) -> Plot | None:
    """Perplexity against the memory that reconstruction adds, a panel per model: what a larger window costs and brings.

    The records, as those of `differences`, are of one pattern.
    """
    data = table(records)
    data = data[data["granularity"] != "pruned"].drop(columns=["seconds", "zero-shot accuracy"])
    if data.empty:
        return None
    models = list(data.groupby("model", sort=False))
    fig, axes = panels(len(models), (2.8, 2.8), wspace=0.5, sharex=True)
    said = []
    for ax, (model, cell) in zip(axes, models):
        known = cell[cell["memory added, GiB"] > 0]
        for row in known.to_dict("records"):
            at, shown = row["memory added, GiB"], look(row["granularity"])
            ax.plot(
                [at, at],
                [row["lowest perplexity"], row["highest perplexity"]],
                color=shown["color"],
                linestyle="-",
                marker="",
                linewidth=1,
            )
            ax.plot(at, row["perplexity"], **shown | _hollow(row["seeds"]), zorder=3)
        for state in ("dense", "pruned"):
            reference(ax, cell[f"{state} perplexity"].mean(), state)
        ax.margins(x=0.2, y=0.08)
        if len(known):
            log_scale(ax, "x")
        log_scale(ax)
        ax.set(title=model, xlabel="memory added while reconstructing, GiB", ylabel="perplexity")
        lower_is_better(ax)
        said.append(f"on {model}, {_cost(known if len(known) else cell)}")
    for ax, (_, cell) in zip(axes, models):  # once the limits of all are known
        known = cell[cell["memory added, GiB"] > 0].set_index("granularity")
        label_points(ax, {name: tuple(point) for name, point in known[["memory added, GiB", "perplexity"]].iterrows()})
    drawn = "Perplexity against the memory that reconstruction adds, a mark per granularity, a panel per model; dashed the pruned model, dotted the dense one."
    return Plot(fig, data, sentence("; ".join(said)) + ".", drawn)


def differences(records: Sequence[RunRecord]) -> Plot | None:
    """The quality of each granularity less that of half-blocks at the same seeds, as a share of the damage, a panel per model."""
    cells, rows = _cells(records), []
    for (model, pattern, fit), runs in cells.items():
        found = paired.difference(runs, cells.get((model, pattern, HALF), []))
        if fit not in (HALF, "pruned") and found["seeds"]:
            verdict = paired.judged(found["low"], found["high"], found["seeds"])
            rows.append({"model": model, "pattern": pattern, "granularity": fit, **found, "verdict": verdict})
    data = pd.DataFrame(rows)
    if data.empty:
        return None
    fits, models = list(dict.fromkeys(data["granularity"])), list(data.groupby("model", sort=False))
    fig, axes = panels(len(models), (2.7, 0.3 + 0.25 * len(fits)), wspace=0.1, sharey=True)
    for ax, (model, cell) in zip(axes, models):
        for row in cell.to_dict("records"):
            paired.draw(ax, fits.index(row["granularity"]), row, look(row["granularity"]), FAR)
        paired.margin(ax, FAR, "difference to half-blocks, share of the damage")
        ax.set_title(model)
        ax.set_yticks(range(len(fits)), fits)
        ax.set_ylim(len(fits) - 0.5, -0.5)
    drawn = f"Difference of each granularity to half-blocks as a share of the damage, with intervals; the band is within {paired.SHARE}."
    return Plot(fig, data, _size_matters(data), drawn)


def everywhere(records: Sequence[RunRecord]) -> Plot | None:
    """The share of the damage undone by granularity and pattern, a panel per model."""
    data = table(records)
    data = data[data["granularity"] != "pruned"].drop(columns=["memory added, GiB", "seconds", "zero-shot accuracy"])
    if data.empty:
        return None
    fits, models = list(dict.fromkeys(data["granularity"])), list(data.groupby("model", sort=False))
    counts = [cell["pattern"].nunique() for _, cell in models]
    size = (1.6 + 0.75 * sum(counts) + 0.3 * len(counts), 0.8 + 0.28 * len(fits))
    layout = {"width_ratios": counts, "wspace": 0.9 / max(1, np.mean(counts)) / 3}
    fig, axes = plt.subplots(1, len(models), figsize=size, squeeze=False, sharey=True, gridspec_kw=layout)
    top = max(0.1, data["share recovered"].max())
    for ax, (model, cell) in zip(axes[0], models):
        patterns = list(dict.fromkeys(cell["pattern"]))
        grid = cell.pivot(index="granularity", columns="pattern", values="share recovered").reindex(fits, columns=patterns)
        seeds = cell.pivot(index="granularity", columns="pattern", values="seeds").reindex(fits, columns=patterns)
        ax.imshow(grid.clip(0, top), cmap="Blues", vmin=0, vmax=1.8 * top, aspect="auto")
        _write_shares(ax, grid, seeds)
        ax.set(title=model, xlabel="pattern")
        ax.set_xticks(range(len(patterns)), map(pattern_words, patterns))
        ax.set_yticks(range(len(fits)), fits)
        ax.grid(False)
    return Plot(
        fig, data, _near_the_best(data), "A table of the share of the damage undone, granularity by pattern, a panel per model."
    )


def _write_shares(ax: Axes, grid: pd.DataFrame, seeds: pd.DataFrame) -> None:
    """The number in each field: bold for the best of a column, in brackets for one seed."""
    for column, pattern in enumerate(grid):
        for row, value in enumerate(grid[pattern]):
            if math.isfinite(value):
                number = f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
                text = number if seeds[pattern].iloc[row] > 1 else f"({number})"
                best = "bold" if value == grid[pattern].max() else "normal"
                ax.text(column, row, text, ha="center", va="center", fontsize=8, fontweight=best)


def _cells(records: Sequence[RunRecord]) -> dict[tuple, list[Run]]:
    """Runs by model, pattern and granularity, smaller windows first, as the records do."""
    name = {"none": "pruned"}
    return paired.grouped(records, lambda spec: (short(spec["model"]), spec["pattern"], name.get(fit_name(spec), fit_name(spec))))


def _one(run: Run, state: str = "reconstructed") -> float:
    return float(np.exp(run.nll[state].mean()))


def _perplexity(runs: Sequence[Run], state: str = "reconstructed") -> float:
    """Geometric mean over runs, as the logarithm is what differences are of."""
    return float(np.exp(np.mean([run.nll[state].mean() for run in runs])))


def _mean(values) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _hollow(seeds: int) -> dict:
    """A mark of one seed is hollow."""
    return {} if seeds > 1 else {"markerfacecolor": "white"}


def _cost(cell: pd.DataFrame) -> str:
    """What the largest window costs and brings, against half-blocks."""
    by_name = cell.set_index("granularity")
    coarse = [name for name in by_name.index if name not in (HALF, *MATRICES) and " from " not in name]
    if HALF not in by_name.index or not coarse:
        best = by_name["perplexity"].idxmin()
        return f"the lowest perplexity, {by_name['perplexity'].min():.3g}, is that of {best}"
    half, large = by_name.loc[HALF], by_name.loc[coarse[-1]]
    times = large["memory added, GiB"] / half["memory added, GiB"]
    change = large["perplexity"] / half["perplexity"] - 1
    said = f"{abs(change):.1%}".replace("%", " %") + (" higher" if change > 0 else " lower")
    size = {"block": "a block", "model": "the whole model", "quarter": "a quarter of the model"}.get(coarse[-1], coarse[-1])
    return f"reconstructing {size} at once takes {times:.1f} times the memory of half-blocks, for a perplexity {said}"


def _size_matters(data: pd.DataFrame) -> str:
    """How many sizes from half a block up differ from half-blocks, and how many single matrices do."""
    exact = data["granularity"].str.contains(" from ")
    matrices = data[data["granularity"].isin(MATRICES)]
    larger = data[~data["granularity"].isin(MATRICES) & ~exact]
    said = []
    if len(larger):
        said.append(f"Larger windows against half-blocks: {paired.count_words(larger['verdict'], larger['seeds'])}.")
    if len(matrices):
        said.append(f"Single matrices against half-blocks: {paired.count_words(matrices['verdict'], matrices['seeds'])}.")
    return " ".join([*said, f"Equal is within {paired.SHARE} of the damage."])


def _near_the_best(data: pd.DataFrame) -> str:
    """In how many models and patterns half-blocks, and single matrices, come close to the best size."""
    best = data.groupby(["model", "pattern"])["share recovered"].transform("max")
    close = data.assign(close=best - data["share recovered"] <= MARGIN)
    said = []
    for name, words in ((HALF, "half-blocks"), ("matrix", "single matrices"), ("matrix exact", "single matrices solved exactly")):
        cell = close[close["granularity"] == name]
        if len(cell):
            said.append(f"{words} in {cell['close'].sum()} of {len(cell)}")
    if not said:
        return f"The best size undoes {data['share recovered'].max():.0%} of the damage.".replace("%", " %")
    return f"Models and patterns where a size comes within {paired.SHARE} of the damage of the best one: {', '.join(said)}."
