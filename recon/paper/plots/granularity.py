"""Quality and memory against granularity: what a larger window brings, and what it costs."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from recon.paper.comparisons import MARGIN
from recon.paper.figures import Plot, log_scale, look, lower_is_better, number, reference, sentence
from recon.paper.plots import paired
from recon.paper.plots.layout import label_points, panels, pattern_words
from recon.paper.runs import Run, short
from recon.study.record import RunRecord
from recon.study.studies import fit_name

HALF, MATRICES = "half-block", ("matrix", "matrix exact")
MEMORY = "memory added, GiB"
FAR = 5 * MARGIN  # differences beyond are written, not drawn to scale


def table(records: Sequence[RunRecord]) -> pd.DataFrame:
    """A row per model, pattern and granularity ("pruned": none): means over seeds of what was measured, and the least memory.

    A seed that was run in several precisions counts once. Memory is that of one precision in each model and pattern.
    """
    cells, rows = _cells(records), []
    for (model, pattern, fit), runs in cells.items():
        nll = {state: _by_seed(runs, [run.nll[state].mean() for run in runs]) for state in ("dense", "pruned", "reconstructed")}
        row = {"model": model, "pattern": pattern, "granularity": fit, "seeds": len(nll["dense"])}
        row |= {f"{state} perplexity": float(np.exp(nll[state].mean())) for state in ("dense", "pruned")}
        # Geometric mean over seeds, as the logarithm is what differences are of.
        names = {"perplexity": "mean", "lowest perplexity": "min", "highest perplexity": "max"}
        row |= {name: float(np.exp(nll["reconstructed"].agg(of))) for name, of in names.items()}
        row["share recovered"] = 1 - np.log(row["perplexity"] / row["dense perplexity"]) / np.log(
            row["pruned perplexity"] / row["dense perplexity"]
        )
        precision = _precision([others for key, others in cells.items() if key[:2] == (model, pattern)])
        # The least: what a process runs first adds buffers that later runs find there.
        row[MEMORY] = min((_added(run) for run in runs if run.seed[1] == precision), default=math.nan)
        row["memory of"] = precision
        found = [run.record for run in runs]
        row["TFLOP"] = _by_seed(runs, [record.flops.get("reconstruct", math.nan) / 1e12 for record in found]).min()
        row["seconds"] = _by_seed(runs, [record.seconds.get("reconstruct", math.nan) for record in found]).mean()
        row["zero-shot accuracy"] = _by_seed(runs, [record.metrics.get("accuracy", math.nan) for record in found]).mean()
        rows.append(row)
    return pd.DataFrame(rows)


def memory(records: Sequence[RunRecord]) -> Plot | None:
    """Perplexity against the memory that reconstruction adds, a panel per model: what a larger window costs and brings.

    The records, as those of `differences`, are of one pattern.
    """
    data = table(records)
    data = data[data["granularity"] != "pruned"].drop(columns=["TFLOP", "seconds", "zero-shot accuracy"])
    if data.empty:
        return None
    models = list(data.groupby("model", sort=False))
    fig, axes = panels(len(models), (2.8, 2.8), wspace=0.5, sharex=True)
    for ax, (model, cell) in zip(axes, models):
        known = cell[cell[MEMORY] > 0]
        for row in known.to_dict("records"):
            mark(ax, row[MEMORY], row)
        reference(ax, cell["pruned perplexity"].mean(), "pruned")
        ax.margins(x=0.2, y=0.08)
        if len(known):
            log_scale(ax, "x")
        log_scale(ax)
        _dense(ax, cell["dense perplexity"].mean())
        ax.set(title=model, xlabel=memory_words(cell), ylabel="perplexity")
        lower_is_better(ax)
    for ax, (_, cell) in zip(axes, models):  # once the limits of all are known
        known = cell[cell[MEMORY] > 0].set_index("granularity")
        label_points(ax, {name: tuple(point) for name, point in known[[MEMORY, "perplexity"]].iterrows()})
    drawn = "Perplexity against the memory that reconstruction adds, a mark per granularity, a panel per model; dashed the pruned model."
    return Plot(fig, data, _costs(models), drawn)


def memory_words(cell: pd.DataFrame) -> str:
    """The label of an axis of memory: in which precision that is, and which granularities have no run in it."""
    there = cell[MEMORY] > 0
    of = [f"{name} runs" for name in cell.loc[there, "memory of"].unique() if name]
    without = [f"none of {', '.join(cell.loc[~there, 'granularity'])}"] if of and not there.all() else []
    return "memory added while reconstructing, GiB" + (f"\n({'; '.join([*of, *without])})" if of else "")


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
    without = [MEMORY, "memory of", "TFLOP", "seconds", "zero-shot accuracy"]
    data = data[data["granularity"] != "pruned"].drop(columns=without)
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
    under = {"xytext": (0, -34), "xycoords": "axes fraction", "textcoords": "offset points", "va": "top"}
    axes[0][0].annotate("number: share of the damage undone (higher is better)", (0, 0), **under, fontsize=8)
    return Plot(
        fig, data, _near_the_best(data), "A table of the share of the damage undone, granularity by pattern, a panel per model."
    )


def _write_shares(ax: Axes, grid: pd.DataFrame, seeds: pd.DataFrame) -> None:
    """The number in each field: bold for the best of a column of several, or all that show as much; in brackets for one seed."""
    for column, pattern in enumerate(grid):
        shown = (grid[pattern].round(2) + 0.0).dropna()  # no minus before 0
        for name, value in shown.items():
            said = f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
            text = said if seeds.loc[name, pattern] > 1 else f"({said})"
            best = "bold" if len(shown) > 1 and value == shown.max() else "normal"
            ax.text(column, grid.index.get_loc(name), text, ha="center", va="center", fontsize=8, fontweight=best)


def _dense(ax: Axes, level: float) -> None:
    """The dense model's level: a line within the limits, which stay; beyond them written at the edge."""
    low, high = ax.get_ylim()
    if low <= level <= high:
        reference(ax, level, "dense")
    else:
        edge, arrow = (0, "\N{DOWNWARDS ARROW}") if level < low else (1, "\N{UPWARDS ARROW}")
        beside = {"xycoords": "axes fraction", "textcoords": "offset points"}
        ax.annotate(f"dense {number(level)} {arrow}", (1, edge), (4, 0), **beside, va="center", fontsize=8)
    ax.set_ylim(low, high)


def _cells(records: Sequence[RunRecord]) -> dict[tuple, list[Run]]:
    """Runs by model, pattern and granularity, smaller windows first, as the records do."""
    name = {"none": "pruned"}
    return paired.grouped(records, lambda spec: (short(spec["model"]), spec["pattern"], name.get(fit_name(spec), fit_name(spec))))


def _by_seed(runs: Sequence[Run], values: Sequence[float]) -> pd.Series:
    """The values of runs by seed: the mean over the precisions in which it was run."""
    return pd.Series(values, dtype=float).groupby([run.seed[0] for run in runs]).mean()


def _added(run: Run) -> float:
    return run.record.added_memory_bytes_by_phase.get("reconstruct", math.nan) / 2**30


def _precision(cells: Sequence[Sequence[Run]]) -> str:
    """The precision in which the memory of most of `cells` is known, then that of most runs."""
    known = [[run.seed[1] for run in runs if not math.isnan(_added(run))] for runs in cells]
    total = Counter(itertools.chain(*known))
    return max(total, key=lambda name: (sum(name in each for each in known), total[name], name), default="")


def mark(ax: Axes, at: float, row: Mapping) -> None:
    """The perplexity of a row of `table` at the cost `at`, with its range over seeds; hollow for one seed."""
    shown = look(row["granularity"]) | ({} if row["seeds"] > 1 else {"markerfacecolor": "white"})
    ends = row["lowest perplexity"], row["highest perplexity"]
    ax.plot([at, at], ends, color=shown["color"], linestyle="-", marker="", linewidth=1)
    ax.plot(at, row["perplexity"], **shown, zorder=3)


def _costs(models: Sequence[tuple[str, pd.DataFrame]]) -> str:
    """What the largest window costs and brings, against half-blocks, on each model where it takes more memory, or less."""
    said = []
    for model, cell in models:
        known = cell[cell[MEMORY] > 0].set_index("granularity")
        coarse = [name for name in known.index if name not in (HALF, *MATRICES) and " from " not in name]
        if HALF not in known.index or not coarse:
            continue
        half, large = known.loc[HALF], known.loc[coarse[-1]]
        times = f"{large[MEMORY] / half[MEMORY]:.1f}"
        change = large["perplexity"] / half["perplexity"] - 1
        brings = f"a perplexity {abs(change):.1%}".replace("%", " %") + (" higher" if change > 0 else " lower")
        size = {"block": "a block", "model": "the whole model", "quarter": "a quarter of the model"}.get(coarse[-1], coarse[-1])
        takes = f"reconstructing {size} at once takes {times} times the memory of half-blocks"
        said += [f"on {model}, {takes}, for {brings}"] * (times != "1.0")
    if said:
        return sentence("; ".join(said)) + "."
    low, high = (number(of([cell["perplexity"].agg(of) for _, cell in models])) for of in (min, max))
    return f"No window is known to take another amount of memory than half-blocks; perplexity is {low} to {high}."


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
    if not said:
        said.append(f"From an exact solution against half-blocks: {paired.count_words(data['verdict'], data['seeds'])}.")
    return " ".join(said)


def _near_the_best(data: pd.DataFrame) -> str:
    """In how many models and patterns with several sizes half-blocks, and single matrices, come close to the best size."""
    sizes = data.groupby(["model", "pattern"])["share recovered"]
    close = data.assign(close=sizes.transform("max") - data["share recovered"] <= MARGIN)[sizes.transform("size") > 1]
    said = []
    for name, words in ((HALF, "half-blocks"), ("matrix", "single matrices"), ("matrix exact", "single matrices solved exactly")):
        cell = close[close["granularity"] == name]
        if len(cell):
            said.append(f"{words} in {cell['close'].sum()} of {len(cell)}")
    if not said:
        return f"The best size undoes {data['share recovered'].max():.0%} of the damage.".replace("%", " %")
    return f"Models and patterns where a size comes within {paired.SHARE} of the damage of the best one: {', '.join(said)}."
