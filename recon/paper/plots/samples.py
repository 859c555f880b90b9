"""Reconstruction beside retraining: quality against samples, compute and memory, and the search for learning rates."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from recon.paper.comparisons import SEEDS
from recon.paper.figures import Plot, log_scale, look, lower_is_better, number, reference
from recon.paper.plots.layout import apart
from recon.paper.runs import Run, Seed
from recon.paper.statistics import interval
from recon.study import studies
from recon.study.record import RunRecord

MAIN = ("reconstruction", "masklora", "full")
KL, COMPUTE, MEMORY = "KL to dense", "TFLOP", "memory added, GiB"
SAME = 1.05  # costs that differ by less count as equal
HIGHEST = 1.5  # ratios beyond are written, not drawn to scale


def table(records: Sequence[RunRecord]) -> pd.DataFrame:
    """A row for each run: its method, samples and seed, what it reached, and what it took. "dense" and "pruned" come with it, to compare."""
    rows = []
    for record in records:
        spec, metrics = record.spec, record.metrics
        method = studies.recipe_name(spec)
        trained = spec["retrain_samples"] or spec["samples"] if spec["retrain"] != "none" else spec["samples"]
        # Records of before it was measured do not say.
        memory = [record.added_memory_bytes_by_phase.get(phase, math.nan) for phase in ("reconstruct", "retrain")]
        row = {"method": method, "samples": 0 if method == "pruned" else trained, "seed": spec["seed"], "key": record.key}
        for text, found in metrics["by_text"].items():
            row |= {f"perplexity, {text}": found["perplexity"], f"dense perplexity, {text}": found["dense_perplexity"]}
        row |= {
            KL: metrics["kl"],
            COMPUTE: (record.flops["reconstruct"] + record.flops["retrain"]) / 1e12,
            "seconds": record.seconds["reconstruct"] + record.seconds["retrain"],
            MEMORY: pd.Series(memory).max() / 2**30,
            "perplexity before masking": metrics.get("perplexity_before_masking", math.nan),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def measures(data: pd.DataFrame) -> list[str]:
    """The columns of quality: perplexity on each text, and the divergence from the dense model."""
    return [column for column in data if column.startswith("perplexity, ")] + [KL]


def summary(data: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of every method at every number of samples, and the standard deviation where there are several."""
    groups = data.groupby(["method", "samples"], sort=False)
    shown = [*measures(data), COMPUTE, "seconds", MEMORY, "perplexity before masking"]
    found = groups[shown].agg(["mean", "std"])
    found.insert(0, ("seeds", ""), groups["seed"].nunique())
    return found.dropna(axis=1, how="all")


def differences(records: Sequence[RunRecord]) -> pd.DataFrame:
    """How much more each other main method leaves than reconstruction with as many samples, in nats per token, paired by seed and window.

    A row for each method, number of samples and measure: difference, low, high (95 %), seeds. Above 0, reconstruction is better.
    """
    runs: dict[tuple[str, int], dict[Seed, Run]] = {}
    for record in records:
        if (method := studies.recipe_name(record.spec)) in MAIN:
            run = Run(record)
            runs.setdefault((method, run.trained_samples), {})[run.seed] = run
    texts = records[0].spec["evaluation_texts"]
    names = {"own": f"perplexity, {texts[0]}"} | ({"other": f"perplexity, {texts[1]}"} if len(texts) > 1 else {}) | {"kl": KL}
    rows = []
    for (method, count), theirs in runs.items():
        ours = runs.get((MAIN[0], count), {})
        seeds = sorted(set(ours) & set(theirs))
        for measure, name in names.items():
            if (
                method == MAIN[0]
                or not seeds
                or any(measure not in side[seed].measures for side in (ours, theirs) for seed in seeds)
            ):
                continue
            values = np.array([[side[seed].measures[measure]["reconstructed"] for seed in seeds] for side in (ours, theirs)])
            low, high = interval([values], lambda means: means[1] - means[0])
            mean = float(values[1].mean() - values[0].mean())
            rows.append(
                {
                    "method": method,
                    "samples": count,
                    "measure": name,
                    "difference": mean,
                    "low": low,
                    "high": high,
                    "seeds": len(seeds),
                }
            )
    return pd.DataFrame(rows, columns=["method", "samples", "measure", "difference", "low", "high", "seeds"])


def efficiency(data: pd.DataFrame, paired: pd.DataFrame, length: int) -> Plot:
    """Above, quality against samples; below, retraining minus reconstruction at equal samples. A column for each measure of quality.

    data: of `table`. paired: of `differences`. length: tokens of a sample.
    """
    panels = measures(data)
    fig, axes = plt.subplots(
        2, len(panels), figsize=(3.4 * len(panels) + 0.3, 5.4), sharex=True, squeeze=False, height_ratios=[1.5, 1]
    )
    trained = data[data["method"] != "pruned"]
    for column, measure in enumerate(panels):
        _levels(axes[0, column], data, measure)
        _differences(axes[1, column], paired[paired["measure"] == measure])
    for ax in axes[1]:
        ax.set_xlabel(f"samples of {length} tokens")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(FixedLocator(sorted(set(trained["samples"]))))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.margins(x=0.06)
    axes[1, 0].set_ylabel("retraining minus\nreconstruction, nats per token")
    fig.tight_layout()
    _legend(fig, axes[0, 0])
    drawn = pd.concat([data.drop(columns="key").assign(panel="quality"), paired.assign(panel="difference")])
    return Plot(
        fig,
        drawn,
        _said(paired) + _worse_than_pruned(data),
        "Above, quality against samples, below, paired differences; a column for each measure.",
    )


def _levels(ax: Axes, data: pd.DataFrame, measure: str) -> None:
    trained = data[data["method"] != "pruned"]
    for shift, (method, group) in zip(_beside(trained["method"].nunique()), trained.groupby("method", sort=False)):
        values = group.groupby("samples")[measure].agg(["mean", "std", "count"])
        values.index = values.index * shift
        style = look(method) | {"linewidth": 2.2 if method in MAIN else 1, "markersize": 6.5 if method in MAIN else 4.5}
        style["zorder"] = 3 if method in MAIN else 2
        ax.errorbar(
            values.index, values["mean"], yerr=values["std"], capsize=2, **style | {"markerfacecolor": "none", "elinewidth": 1}
        )
        several = values[values["count"] > 1]
        ax.plot(several.index, several["mean"], **style | {"linestyle": ""})
        ax.plot([], [], **style, label=method)
    levels = {"pruned": data.loc[data["method"] == "pruned", measure].mean()}
    if measure != KL:
        levels["dense"] = data[f"dense {measure}"].mean()
    for name, level in levels.items():
        if not math.isnan(level):
            reference(ax, level, name)
    log_scale(ax)
    ax.set_title(measure, fontsize=10)
    ax.set_ylabel("nats per token" if measure == KL else "perplexity")
    lower_is_better(ax)


def _differences(ax: Axes, paired: pd.DataFrame) -> None:
    ax.axhline(0, color=look(MAIN[0])["color"], linewidth=1.2)
    ax.set_title("above 0: reconstruction is better", fontsize=8, loc="left")
    for shift, (method, group) in zip(_beside(paired["method"].nunique()), paired.groupby("method", sort=False)):
        style = look(method)
        for row in group.itertuples():
            ax.errorbar(
                row.samples * shift, row.difference, yerr=[[max(0.0, row.difference - row.low)], [max(0.0, row.high - row.difference)]], capsize=2.5,
                color=style["color"], marker=style["marker"], markerfacecolor=style["color"] if row.seeds > 1 else "white", linestyle="",
            )  # fmt: skip


def _legend(fig: Figure, ax: Axes) -> None:
    """Says below all panels what the lines of `ax`, and of the others, are."""
    handles, names = ax.get_legend_handles_labels()
    fig.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=min(5, len(names)), fontsize=9)


def _beside(count: int) -> np.ndarray:
    """Factors that move `count` marks at one place of a logarithmic axis beside one another."""
    return 1.08 ** (np.arange(count) - (count - 1) / 2)


def _said(paired: pd.DataFrame) -> str:
    """Who is better at equal samples, measure by measure."""
    if paired.empty:
        return "No number of samples has both reconstruction and retraining: nothing can be compared."
    wins, losses = [], []
    for kind, group in paired.groupby(paired["measure"].map(_kind), sort=False):
        ours, theirs = (group["low"] > 0).sum(), (group["high"] < 0).sum()
        wins.append(f"in {ours or 'none'} of {len(group)} {'' if wins else 'comparisons '}by {kind}")
        losses += [f"{theirs} by {kind}"] if theirs else []
    most = int(paired["seeds"].max())
    few = "" if most >= SEEDS else f" With {most} seed{'s' * (most > 1)}, training noise is unknown."
    return (
        f"At equal samples, reconstruction beats retraining {' and '.join(wins)}; it loses {' and '.join(losses) or 'none'}.{few}"
    )


def _kind(measure: str) -> str:
    """A measure without the text that it is of."""
    return measure.split(", ")[0]


def _worse_than_pruned(data: pd.DataFrame) -> str:
    """What training did harm, measure by measure; empty where nothing did."""
    means = data[data["method"].isin(MAIN)].groupby(["method", "samples"])[measures(data)].mean()
    pruned = data.loc[data["method"] == "pruned", measures(data)].mean()
    counts = {measure: int((means[measure] > pruned[measure]).sum()) for measure in measures(data)}
    said = ", ".join(f"{count} of {len(means)} by {measure}" for measure, count in counts.items() if count)
    return f" Worse than the pruned model before any training: {said}." if said else ""


def front(means: pd.DataFrame, cost: str, quality: str) -> pd.DataFrame:
    """The rows of `means` that nothing beats in `quality` at their cost or less, by cost; of costs, those within 5 % are equal."""
    ranked = means[means[cost] > 0].sort_values([cost, quality]).drop_duplicates(quality)
    best = [ranked.loc[ranked[cost] < SAME * value, quality].min() for value in ranked[cost]]
    return ranked[ranked[quality] <= best]


def budget(data: pd.DataFrame) -> Plot:
    """Quality against compute and against memory, with the front of what nothing beats at its cost or less.

    A mark is a method with a number of samples, mean over the seeds that all methods have; the dense control and the pruned model have none.
    """
    recipes = data[~data["method"].str.startswith("dense") & (data["method"] != "pruned")]
    shared = set.intersection(*(set(group["seed"]) for _, group in recipes.groupby("method")))
    shown = [measures(data)[0], KL]
    means = recipes[recipes["seed"].isin(shared)].groupby(["method", "samples"], sort=False)[[*shown, COMPUTE]].mean()
    # The seed has no part in memory, so that all records which state it tell; what else the process did can have, so no mean.
    means[MEMORY] = recipes.groupby(["method", "samples"])[MEMORY].median()
    means = means.reset_index()
    fig, axes = plt.subplots(len(shown), 2, figsize=(9.5, 6), sharex="col", sharey="row")
    on_front, fronts = [], []
    for row, quality in enumerate(shown):
        for ax, cost in zip(axes[row], (COMPUTE, MEMORY)):
            best = front(means, cost, quality)
            on_front.append((cost, quality, best["method"].isin(MAIN[:1]).sum(), len(best)))
            ax.step(best[cost], best[quality], where="post", color="0.6", linewidth=1, zorder=1)
            for method, group in means[means[cost] > 0].groupby("method", sort=False):
                main = method in MAIN
                style = look(method) | {"linestyle": "", "markersize": 7.5 if main else 4}
                ax.plot(group[cost], group[quality], **style, zorder=2 if main else 3, label=method)
            fronts.append((ax, best[["method", "samples", cost, quality]]))
            ax.axhline(
                data.loc[data["method"] == "pruned", quality].mean(),
                **look("pruned") | {"marker": "", "linewidth": 1, "label": "pruned"},
            )
            ax.margins(0.1)
    for ax, quality in zip(axes[:, 0], shown):
        ax.set_ylabel(quality)
        log_scale(ax)
        lower_is_better(ax)
    for ax, cost in zip(axes[-1], ("TFLOP of reconstruction and retraining", MEMORY)):
        ax.set_xlabel(cost)
    log_scale(axes[-1, 0], "x")
    lower_is_better(axes[-1, 0], "x")
    lower_is_better(axes[-1, 1], "x")
    fig.tight_layout()
    for ax, best in fronts:
        _number(ax, best)
    _legend(fig, axes[0, 0])
    return Plot(
        fig,
        means,
        _on_front(on_front) + _worse_than_pruned(data),
        "Marks for methods and numbers of samples; a staircase joins what nothing beats.",
    )


def _number(ax: Axes, best: pd.DataFrame) -> None:
    """Writes the samples of each mark of the front (method, samples, cost, quality) to the left of it, in its colour."""
    points = best.iloc[:, 2:].to_numpy()
    heights = ax.transData.transform(points)[:, 1] * 72 / ax.figure.dpi - 6
    for (method, count), point, old, new in zip(best.iloc[:, :2].to_numpy(), points, heights, apart(heights, 9)):
        shift = {"xytext": (-6, new - old - 6), "textcoords": "offset points"}
        ax.annotate(f"{count}", point, **shift, fontsize=7, ha="right", va="center", color=look(method)["color"])


def _on_front(found: list[tuple[str, str, int, int]]) -> str:
    """How many of each front (cost, quality, those of reconstruction alone, all) are reconstruction."""
    words, parts = {COMPUTE: "compute", MEMORY: "memory"}, []
    for quality in dict.fromkeys(quality for _, quality, _, _ in found):
        counts = {words[cost]: (ours, count) for cost, other, ours, count in found if other == quality and count}
        each = [f"{ours or 'none'} of {count} for {cost}" for cost, (ours, count) in counts.items()]
        every = all(ours == count for ours, count in counts.values())
        parts.append(f"{'all' if every else ' and '.join(each)} by {_kind(quality)}")
    return f"Of the recipes that nothing beats at their cost, reconstruction alone is {', and '.join(parts)}."


def rates(searched: pd.DataFrame, rate: str = "") -> Plot:
    """Held-out perplexity against the learning rate, relative to the best: a panel for each recipe, a line for each number of samples.

    searched: of `recon.paper.recipes.searched`. rate: what rates are, "relative" or "absolute".
    """
    names, counts = list(dict.fromkeys(searched["recipe"])), sorted(set(searched["samples"]))
    columns = min(4, len(names))
    fig, axes = plt.subplots(-(-len(names) // columns), columns, figsize=(2.5 * columns + 0.6, 2.3 * -(-len(names) // columns)), sharex=True, sharey=True,
                             squeeze=False)  # fmt: skip
    best = searched.groupby(["recipe", "samples"])["held_out_perplexity"].transform("min")
    data = searched.drop(columns="key").assign(ratio=searched["held_out_perplexity"] / best)
    shades = dict(zip(counts, np.linspace(0.75, 0.0, len(counts))))
    shifts = dict(zip(counts, _beside(len(counts))))
    for ax, name in zip(axes.flat, names):
        for count, group in data[data["recipe"] == name].groupby("samples"):
            ordered, mark = group.sort_values("learning_rate"), {"color": str(shades[count]), "marker": "o"}
            at = ordered["learning_rate"] * shifts[count]
            ax.plot(at, ordered["ratio"], **mark, markerfacecolor="white", markersize=4, linestyle="-")
            taken = ordered["chosen"].astype(bool)
            ax.plot(at[taken], ordered["ratio"][taken], **mark, markersize=6, linestyle="", zorder=4)
            for x, ratio in zip(at, ordered["ratio"]):
                if ratio > HIGHEST:
                    words, offset = f"\N{UPWARDS ARROW}\n{number(ratio)}", {"xytext": (0, -2), "textcoords": "offset points"}
                    ax.annotate(words, (x, HIGHEST), **offset, ha="center", va="top", fontsize=7, linespacing=0.9)
        ax.set_title(name, fontsize=9)
        ax.set_xscale("log")
    for ax in list(axes.flat)[len(names) :]:
        ax.set_visible(False)
    for ax in axes.flat[max(0, len(names) - columns) : len(names)]:
        ax.set_xlabel("learning rate" + f" ({rate})" * bool(rate))
    axes[0, 0].set_ylabel("held-out perplexity / best")
    axes[0, 0].set_ylim(0.98, min(HIGHEST, 1.02 * data["ratio"].max()))
    lower_is_better(axes[0, 0])
    log_scale(axes[0, 0])
    fig.tight_layout()
    handles = [plt.Line2D([], [], color=str(shades[count]), marker="o") for count in counts]
    fig.legend(handles, counts, title="samples", loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, title_fontsize=8)
    return Plot(
        fig, data, _chosen_rates(data), "A panel for each recipe, a line for each number of samples; the chosen rate is filled."
    )


def _chosen_rates(data: pd.DataFrame) -> str:
    """How many best rates lie at the edge of their search, and how far each recipe's moves from the fewest samples to the most."""
    grid, taken = sorted(set(data["learning_rate"])), data[data["chosen"].astype(bool)].sort_values("samples")
    tried = data.groupby(["recipe", "samples"])["learning_rate"].agg(["min", "max"])
    ends = [row.learning_rate in set(tried.loc[(row.recipe, row.samples)]) for row in taken.itertuples()]
    moves: dict[str, list[str]] = {}
    for name, group in taken.groupby("recipe", sort=False)["learning_rate"]:
        if len(group) > 1:
            steps = grid.index(group.iloc[-1]) - grid.index(group.iloc[0])
            moved = f"{'rises' if steps > 0 else 'falls'} by {abs(steps)} step{'s' * (abs(steps) > 1)}" if steps else "stays"
            moves.setdefault(moved, []).append(name)
    each = ", ".join(f"{moved} for {' and '.join(names)}" for moved, names in moves.items())
    moved = f"; from the fewest samples to the most, it {each}" if moves else ""
    return f"The best rate is at the edge of what was tried in {sum(ends) or 'none'} of {len(ends)} searches{moved}."
