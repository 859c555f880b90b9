"""The figures of notebooks 1 to 5 and 8, and that of all claims.

A function that returns a `Plot` gives the figure, its data (a row per mark) and its finding in a sentence.
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from companion.compare import CLOSE, MARGIN, SEEDS, common, interval, paired
from companion.frame import DEFAULTS, MEMORY, RECIPE_WORDS, short
from companion.judge import FAILS, HOLDS, MARKS, OLDER, RATIOS, UNSURE, central, effect_words, found_in, in_short
from companion.publish import log_scale, look, looks, lower_is_better, number

Plot = tuple[Figure, pd.DataFrame, str]
MAIN = ["reconstruction", "masklora", "full"]
PUBLISHED = f"{MAIN[0]}, paper's recipe"
KL, COMPUTE = "KL to dense", "TFLOP"
FAR = 5 * MARGIN  # differences beyond it are written as text, not drawn to scale
ALIKE = 1.05  # costs that differ by less count as equal
beside = partial(Axes.annotate, textcoords="offset points", va="center", fontsize=8)  # (axes, words, place, offset in points)

# --- numbers: means over seeds, paired differences, and words for them -----------------------------------------------------


def sizes(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per model, pattern and granularity ("pruned" for none): geometric means over seeds of perplexities, and costs.

    A seed run in several precisions counts once.
    """
    levels, by = ["dense perplexity", "pruned perplexity", "perplexity"], ["model", "pattern", "granularity"]
    runs = runs.assign(granularity=runs["fit"].replace("none", "pruned"), TFLOP=runs["flops"] / 1e12)
    runs = runs.rename(columns={"dense_perplexity": levels[0], "pruned_perplexity": levels[1]})
    runs[levels] = np.log(runs[levels])
    seeds = runs.groupby([*by, "seed"], sort=False)[[*levels, COMPUTE, MEMORY, "seconds"]].mean().reset_index("seed")
    groups = seeds.groupby(by, sort=False)
    data = pd.concat([groups["seed"].size().rename("seeds"), np.exp(groups[levels].mean())], axis=1)
    data["lowest perplexity"], data["highest perplexity"] = (np.exp(groups["perplexity"].agg(of)) for of in ("min", "max"))
    left, gap = (np.log(data[name] / data[levels[0]]) for name in ("perplexity", levels[1]))
    data["share recovered"] = 1 - left / gap
    data[COMPUTE], data[MEMORY], data["seconds"] = groups[COMPUTE].min(), groups[MEMORY].median(), groups["seconds"].mean()
    return data.reset_index()


def effects(runs: pd.DataFrame, by: Sequence[str], baseline: dict, flip: bool = False, **options) -> pd.DataFrame:
    """Compares each group of runs (by the columns `by`) with the group that has the values of `baseline`; options: of `paired`.

    A difference above 0 means better than the baseline; with `flip`, worse. `verdict`: see `judged`; "default" for the baseline.
    """
    groups, rows = dict(list(runs.groupby(list(by), sort=False))), []
    for name, group in groups.items():
        other = groups.get(tuple((dict(zip(by, name)) | baseline)[part] for part in by), group.iloc[:0])
        row = dict(zip(by, name)) | {"perplexity": np.exp(np.log(group["perplexity"]).mean())}
        if other is group:
            row |= {"difference": 0.0, "low": math.nan, "high": math.nan, "seeds": group["unit"].nunique(), "verdict": "default"}
        else:
            row |= paired(*((other, group) if flip else (group, other)), **options)
            row["verdict"] = judged(row["low"], row["high"], row["seeds"])
        rows.append(row)
    return pd.DataFrame(rows, columns=[*by, "perplexity", "difference", "low", "high", "seeds", "verdict"]).query("seeds > 0")


def judged(low: float, high: float, seeds: int) -> str:
    """The verdict: "equal" within the margin, "better" or "worse" beyond it, "undecided" across it or with few seeds."""
    if seeds < SEEDS or math.isnan(low):
        return "undecided"
    if -MARGIN < low and high < MARGIN:
        return "equal"
    return "better" if low > MARGIN else "worse" if high < -MARGIN else "undecided"


def count_words(data: pd.DataFrame) -> str:
    """The verdicts counted: "3 equal, 1 worse, 2 undecided"."""
    counts = data["verdict"].value_counts()
    return ", ".join(f"{counts[name]} {name}" for name in ("equal", "better", "worse", "undecided") if name in counts)


def span(values: pd.Series, form: str = "{:.2f}") -> str:
    """The range of `values` in words: "<lowest> to <highest>", or one number if both read the same."""
    words = (form.format(value) for value in (values.min(), values.max()))
    return " to ".join(dict.fromkeys(word.replace("-", "−") if word.strip("-0.") else word.lstrip("-") for word in words))


# --- parts of figures --------------------------------------------------------------------------------------------------


def panels(count: int, width: float, height: float, columns: int = 3, **options) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, each `width` x `height` inches, up to `columns` in a row; four panels are two by two."""
    columns = 2 if count == 4 else min(count, columns)
    rows = -(-count // columns)
    options |= {"figsize": (width * columns, height * rows), "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, **options)
    for ax in axes.flat[count:]:
        ax.remove()
    for ax in axes.flat[count - columns : count]:  # the lowest of each column, unlabelled if axes are shared
        ax.tick_params(axis="x", which="both", labelbottom=True)
    return figure, list(axes.flat[:count])


def label(ax: Axes, x: pd.Series, y: pd.Series, names: pd.Series) -> None:
    """Writes each name beside its point, clear of lines and of other names; set limits and scales first."""
    ax.figure.draw_without_rendering()
    texts = [ax.text(*each, fontsize=8) for each in zip(x, y, names)]
    arrows = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6}
    forces = {"expand": (1.2, 1.5), "force_static": (0.5, 0.8), "force_text": (0.4, 0.6)}
    adjust_text(texts, [*x], [*y], objects=list(ax.lines) or None, ax=ax, arrowprops=arrows, **forces)


def label_ends(ax: Axes, x: float, ends: dict[str, float]) -> None:
    """Writes each name to the right of its line's last value, without overlap; set limits and scales first."""
    ax.figure.draw_without_rendering()
    names = sorted(ends, key=ends.get)
    own = [ax.transData.transform((x, ends[name]))[1] * 72 / ax.figure.dpi for name in names]
    gaps = 10 * np.arange(len(own))  # points
    places = np.maximum.accumulate(own - gaps), np.minimum.accumulate((own - gaps)[::-1])[::-1]  # moved only up, only down
    for name, at, moved in zip(names, own, np.mean(places, axis=0) + gaps):
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0} if abs(moved - at) > 1 else None
        beside(ax, name, (x, ends[name]), (12, moved - at), arrowprops=line, annotation_clip=False)


def level(ax: Axes, value: float, name: str, inside: bool = True) -> None:
    """Draws a line across `ax` at `value` of the dense or pruned model (`name`), labelled at its right end.

    inside: whether to widen the limits to include it; otherwise, a label beyond them is put at their edge, with an arrow.
    """
    low, high = ax.get_ylim()
    if inside:
        low, high = min(low, 0.96 * value), max(high, 1.03 * value)
    ax.axhline(value, color=look(name)["color"], linestyle=look(name)["linestyle"], linewidth=1, zorder=1)
    ax.set_ylim(low, high)
    words = f"{name} {number(value)}" + (" ↓" if value < low else " ↑" if value > high else "")
    beside(ax, words, (1, min(max(value, low), high)), (4, 0), xycoords=("axes fraction", "data"))


def legend(figure: Figure, ax: Axes) -> None:
    """One legend for all panels, below them: that of `ax`."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    ax.get_legend().remove()


def mark(ax: Axes, x: float, row: dict, name: str) -> None:
    """Draws the perplexity of a row of `sizes` at the cost `x`, with its range over seeds; hollow for one seed."""
    shown = look(name)
    ax.plot([x, x], [row["lowest perplexity"], row["highest perplexity"]], color=shown["color"], linewidth=1)
    ax.plot(x, row["perplexity"], **shown, **hollow(row["seeds"]), zorder=3)


def hollow(seeds: int) -> dict:
    """Options of `Axes.plot` that make the mark of a single seed hollow."""
    return {"markerfacecolor": "white"} if seeds == 1 else {}


def bars(ax: Axes, data: pd.DataFrame, places: Sequence[float], names: Sequence[str], far: float = math.inf) -> None:
    """Draws differences and intervals at heights `places`, in the look of `names`; a mean beyond `far` is written as text."""
    for row, place, name in zip(data.to_dict("records"), places, names):
        value, shown = row["difference"], look(name)
        if abs(value) > far:
            words, right = f"{value:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]".replace("-", "−"), value > 0
            ax.plot(math.copysign(far, value), place, color=shown["color"], marker=">" if right else "<", clip_on=False)
            side = {"xytext": (-8 if right else 8, 0), "ha": "right" if right else "left"}
            beside(ax, words, (math.copysign(far, value), place), **side, backgroundcolor="white")
            continue
        ax.plot(np.clip([row["low"], row["high"]], -far, far), [place, place], color=shown["color"], linewidth=1.5)
        ax.plot(value, place, **shown | {"linestyle": ""}, **hollow(row["seeds"]), zorder=3)


def forest(data: pd.DataFrame, by: str, panel: str, words: str) -> Figure:
    """Differences of `effects` as shares of the perplexity gap: a row for each value of `by`, a panel for each of `panel`."""
    names, groups = list(dict.fromkeys(data[by])), list(data.groupby(panel, sort=False))
    figure, axes = panels(len(groups), 3.1 + (len(groups) == 1), 0.9 + 0.25 * len(names), sharey=True)
    for ax, (title, group) in zip(axes, groups):
        ax.axvspan(-MARGIN, MARGIN, color="0.9", zorder=0, linewidth=0)
        ax.axvline(0, color="0.4", linewidth=1, zorder=1)
        ax.set_xlim(-1.05 * FAR, 1.05 * FAR)
        bars(ax, group, [names.index(name) for name in group[by]], group[by], FAR)
        for place in [names.index(name) for name in group.loc[group["verdict"] == "default", by]]:
            beside(ax, "default", (0, place), (8, 0))
        ax.set_title(title)
        ax.set_xlabel(f"← worse    equal (±{MARGIN:.0%})    better →\n{words}", fontsize=8)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
    return figure


# --- notebook 1 --------------------------------------------------------------------------------------------------------


def memory(data: pd.DataFrame) -> Plot:
    """Perplexity against the memory that training adds (FLOPs if none was measured), by model. data: `sizes` of one pattern."""
    cost = MEMORY if data[MEMORY].notna().any() else COMPUTE
    data = data[(data["granularity"] != "pruned") & data[cost].notna()]
    data = data.drop(columns=[COMPUTE if cost == MEMORY else MEMORY, "seconds"])
    models, said = list(data.groupby("model", sort=False)), []
    figure, axes = panels(len(models), 3.6, 3.4, columns=2, sharex=True)
    for ax, (model, cell) in zip(axes, models):
        for row in cell.to_dict("records"):
            mark(ax, row[cost], row, row["granularity"])
        ax.margins(0.12)
        level(ax, cell["pruned perplexity"].mean(), "pruned")
        log_scale(ax, "x")
        log_scale(ax)
        level(ax, cell["dense perplexity"].mean(), "dense", inside=False)
        ax.set(title=model, xlabel=cost, ylabel="perplexity")
        lower_is_better(ax, "x")
        lower_is_better(ax)
        ax.tick_params(axis="x", which="both", labelbottom=True)
        known = cell.set_index("granularity")
        large = [name for name in known.index if not name.startswith(("matrix", "half-block"))][-1:]
        if large and "half-block" in known.index:
            half, last = known.loc["half-block"], known.loc[large[0]]
            lowest = f"{known['perplexity'].idxmin()} ({model})"
            said.append((large[0], last[cost] / half[cost], last["perplexity"] / half["perplexity"] - 1, lowest))
    for ax, (_, cell) in zip(axes, models):
        label(ax, cell[cost], cell["perplexity"], cell["granularity"])
    if not said:
        return figure, data, f"Perplexity is {span(data['perplexity'])}."
    names, times, changes, lowest = (pd.Series(values) for values in zip(*said))
    which = " or ".join(dict.fromkeys(names))
    finding = (
        f"{which[0].upper()}{which[1:]} windows take {span(times, '{:.1f}')} times the {cost.split(',')[0]} of half-blocks; "
        f"their perplexity differs by {span(changes, '{:+.1%}')}. Lowest: {', '.join(lowest)}."
    )
    return figure, data, finding


def rates(runs: pd.DataFrame, panel: str = "place", line: str = "fit") -> tuple[Figure, pd.DataFrame, str, str]:
    """Held-out perplexity over the best rate's, by rate: a line per cell of `companion.search.search`. `Plot` and caption."""
    runs = runs.assign(place=runs["model"] + ", " + runs["recipe"].map(RECIPE_WORDS), samples=runs["trained"])
    runs["ratio"] = runs["held_out_perplexity"] / runs.groupby("cell", sort=False)["held_out_perplexity"].transform("min")
    data = runs[list(dict.fromkeys([panel, line, "recipe", "rate", "held_out_perplexity", "ratio", "chosen"]))]
    shown = looks(data[line]) if line == "fit" else {"palette": "colorblind", "markers": True}
    plot = sns.relplot(
        data, x="rate", y="ratio", hue=line, style=line, col=panel, col_wrap=min(4, data[panel].nunique()), kind="line",
        dashes=False, markersize=5, height=2.4, aspect=1.1, legend="full", units="recipe", estimator=None, **shown,
    )  # fmt: skip
    for name, ax in plot.axes_dict.items():
        taken = data[(data[panel] == name) & data["chosen"]]
        ax.plot(taken["rate"], taken["ratio"], "o", color="0.2", markersize=9, fillstyle="none")
        ax.set(title=name, xscale="log", ylim=(0.98, min(1.5, 1.02 * data["ratio"].max())))
    plot.set_axis_labels("learning rate", "held-out perplexity / best\n(lower is better ↓)")
    best = data[data["chosen"]].groupby(panel, sort=False)["rate"]
    form = "{:g}"
    finding = f"The best rates are {', '.join(f'{span(own, form)} ({name})' for name, own in best)}."
    tried = runs.iloc[0]
    caption = "Held-out perplexity relative to the best of its line; above 1.5: not drawn. Ringed: the rate that is used. "
    caption += f"Held out: {tried['held_out_samples']} x {tried['sequence_length']} tokens of {short(tried['text'])}, at a seed "
    return plot.figure, data, finding, caption + "that no verdict uses. "


def rule(runs: pd.DataFrame) -> str:
    """How the best rates of windows follow their size, and what the default's rule costs against the search, in words."""
    powers, costs = [], {}
    for model, group in runs[runs["recipe"] != "paper"].groupby("model", sort=False):
        windows = group.drop_duplicates("fit").set_index("fit")["losses"].map(len)
        if "half-block" not in windows:
            continue
        halves = windows["half-block"] / windows  # half-blocks in a window
        best = group[group["chosen"] & (group["fit"] != "matrix")].set_index("fit")["rate"]
        powers += [-np.polyfit(np.log(halves[best.index]), np.log(best), 1)[0]] if len(best) > 2 else []
        for fit, own in group.sort_values("rate").groupby("fit", sort=False):
            usual = DEFAULTS["learning_rate"]
            usual *= DEFAULTS["matrix_rate"] if fit == "matrix" else halves[fit] ** -DEFAULTS["size_power"]
            lost = np.log(own["held_out_perplexity"] / own["held_out_perplexity"].min())
            costs[f"{fit}, {model}"] = np.expm1(np.interp(np.log(usual), np.log(own["rate"]), lost))
    if not powers:
        return ""
    most = max(costs, key=costs.get)
    said = f"Searched rates fall with the size to the power {span(-pd.Series(powers))}; the rule's is {-DEFAULTS['size_power']:g}"
    return f"{said.replace('-', '−')}. The rule costs up to {costs[most]:.1%} in perplexity ({most})."


# --- notebook 2 --------------------------------------------------------------------------------------------------------


def of_both(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs with the paper's reconstruction as a method of its own; its retraining, which differs only in masks, is dropped."""
    published = runs["recipe"] == "paper"
    kept = runs[~published | (runs["method"] == MAIN[0])]
    return kept.assign(method=kept["method"].where(~published, PUBLISHED))


def methods(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each run: its method, samples, seed, quality and costs; for `efficiency` and `budget`."""
    reached = [name for name in runs if name.startswith(("perplexity, ", "dense perplexity, "))] + [KL]
    runs = of_both(runs).assign(**{COMPUTE: runs["flops"] / 1e12, KL: runs["kl"]})
    runs["samples"] = runs["trained"].where(runs["method"] != "pruned", 0)
    return runs[["method", "samples", "seed", *reached, COMPUTE, "seconds", MEMORY]]


def measures(data: pd.DataFrame) -> list[str]:
    """The columns of the first two texts and of the KL divergence: the measures with a value per evaluation window."""
    return [name for name in data if name.startswith("perplexity, ")][:2] + [KL]


def efficiency(runs: pd.DataFrame, length: int) -> Plot:
    """Above, quality against samples; below, retraining minus reconstruction at equal samples. A column for each measure.

    length: tokens of a sample.
    """
    data, parts = methods(runs), []
    names, main = measures(data), runs[runs["method"].isin(MAIN)].assign(samples=runs["trained"])
    recipes = list(dict.fromkeys(main["recipe"]))
    for name, measure in zip(names, ["own", "other"][: len(names) - 1] + ["kl"]):
        group = main[main[f"{measure}_pruned"].notna()]
        by, against = ["recipe", "method", "samples"], {"method": MAIN[0]}
        part = effects(group, by, against, flip=True, measure=measure, share=False, level=0.95)
        parts.append(part[part["verdict"] != "default"].drop(columns=["verdict", "perplexity"]).assign(measure=name))
    differences, trained = pd.concat(parts), data[data["method"] != "pruned"]
    order = list(dict.fromkeys(trained["method"]))
    shape = {"figsize": (3.4 * len(names), 3.4 + 2.2 * len(recipes)), "height_ratios": [1.5] + [1] * len(recipes)}
    figure, axes = plt.subplots(1 + len(recipes), len(names), sharex=True, squeeze=False, layout="constrained", **shape)
    by_method = {"hue": "method", "style": "method", "hue_order": order, "style_order": order, **looks(order)}
    by_method |= {"errorbar": "sd", "err_style": "bars", "dashes": False, "markersize": 7}
    for name, above in zip(names, axes[0]):
        sns.lineplot(trained, x="samples", y=name, ax=above, legend=name == names[0], **by_method)
        log_scale(above)
        above.set(title=name, ylabel="nats per token" if name == KL else "perplexity")
        level(above, data.loc[data["method"] == "pruned", name].mean(), "pruned")
        if name != KL:
            level(above, data[f"dense {name}"].mean(), "dense", inside=False)
        lower_is_better(above)
    for (name, recipe), below in zip(itertools.product(names, recipes), axes[1:].T.flat):
        below.axhline(0, color=look(MAIN[0])["color"], linewidth=1.2)
        mine = (differences["measure"] == name) & (differences["recipe"] == recipe)
        lines = differences[mine].groupby("method", sort=False)
        for shift, (method, group) in zip((0.96, 1.04, 1, 1), lines):
            errors = np.abs(group[["low", "high"]].T.to_numpy() - group["difference"].to_numpy())
            below.errorbar(group["samples"] * shift, group["difference"], errors, **look(method) | {"linestyle": ""}, capsize=2.5)
        below.set_title(f"above 0: reconstruction ({RECIPE_WORDS[recipe]}) is better", fontsize=8, loc="left")
        below.set(xlabel=f"samples of {length} tokens" * (recipe == recipes[-1]), xscale="log")
        below.set_ylabel("difference,\nnats per token" * (name == names[0]))
        below.xaxis.set_major_locator(FixedLocator(sorted(set(trained["samples"]))))
        below.xaxis.set_minor_locator(NullLocator())
        below.xaxis.set_major_formatter("{x:.0f}")
    legend(figure, axes[0, 0])
    kinds = differences.groupby([differences["measure"].str.split(",").str[0], "recipe"], sort=False)
    said = [
        f"{(part['low'] > 0).sum()} better, {(part['high'] < 0).sum()} worse of {len(part)} by {kind} ({RECIPE_WORDS[recipe]})"
        for (kind, recipe), part in kinds
    ]
    finding = f"Reconstruction against retraining at equal samples: {'; '.join(said) or 'nothing to compare yet'}."
    return figure, pd.concat([data.assign(panel="quality"), differences.assign(panel="difference")]), finding


def front(means: pd.DataFrame, cost: str, quality: str) -> pd.DataFrame:
    """The Pareto front of `means`: rows that none beats in `quality` at no higher cost, by cost; within 5 %, costs are equal."""
    ranked = means[means[cost] > 0].sort_values([cost, quality]).drop_duplicates(quality)
    return ranked[ranked[quality] <= [ranked.loc[ranked[cost] < ALIKE * value, quality].min() for value in ranked[cost]]]


def budget(runs: pd.DataFrame) -> Plot:
    """Quality against compute and, if known, memory. Larger marks: more samples. Line: the Pareto front.

    A mark is a method at a number of samples: the mean over the seeds that all marks have. The dense control and the pruned
    model have no mark.
    """
    data = methods(runs)
    repaired, shown = data[~data["method"].str.startswith(("dense", "pruned"))], [measures(data)[0], KL]
    shared = set.intersection(*(set(group["seed"]) for _, group in repaired.groupby(["method", "samples"])))
    groups = repaired[repaired["seed"].isin(shared)].groupby(["method", "samples"], sort=False)
    means = groups[[*shown, COMPUTE, MEMORY]].mean().reset_index()
    costs = [cost for cost in (COMPUTE, MEMORY) if means[cost].notna().any()]
    figure, axes = plt.subplots(2, len(costs), figsize=(4.7 * len(costs), 6), sharex="col", sharey="row", squeeze=False,
                                layout="constrained")  # fmt: skip
    order, sizes, counts = list(dict.fromkeys(means["method"])), sorted(set(means["samples"])), []
    for row, quality in zip(axes, shown):
        for ax, cost in zip(row, costs):
            best = front(means, cost, quality)
            ours = best["method"].isin([MAIN[0], PUBLISHED]).sum()
            counts.append(f"{ours} of {len(best)} ({quality.split(',')[0]} at equal {cost.split(',')[0]})")
            ax.step(best[cost], best[quality], where="post", color="0.6", linewidth=1, zorder=1)
            marked = {"style": "method", "size": "samples", "sizes": dict(zip(sizes, np.geomspace(20, 110, len(sizes))))}
            sns.scatterplot(means, x=cost, y=quality, hue="method", **marked, **looks(order), legend=ax is axes[0, 0], ax=ax)
            if cost == COMPUTE:
                log_scale(ax, "x")
            log_scale(ax)
            level(ax, data.loc[data["method"] == "pruned", quality].mean(), "pruned")
            ax.margins(0.12)
        lower_is_better(row[0])
    legend(figure, axes[0, 0])
    return figure, means, f"What nothing beats at its cost is reconstruction alone in {', '.join(counts)}."


def extrapolation(runs: pd.DataFrame, reach: int = 64) -> Plot | None:
    """The perplexity gap that remains, in nats, against samples: a power law fitted to each method and drawn beyond the data.

    reach: how far, in multiples of the most samples. None if no method has three numbers of samples.
    """
    runs = of_both(runs[runs["method"].isin(MAIN)])
    grid, rows = np.geomspace(runs["trained"].min(), reach * runs["trained"].max(), 25), []
    for name, group in runs.groupby("method", sort=False):
        points = {count: own.drop_duplicates("unit").set_index("unit") for count, own in group.groupby("trained")}
        units = common(*points.values())
        if len(points) < 3 or not units:  # two points always lie on a line
            continue
        left = [[own.at[unit, "own_reconstructed"] - own.at[unit, "own_dense"] for unit in units] for own in points.values()]
        fit = np.linalg.pinv(np.vander(np.log(list(points)), 2))
        rows += [{"method": name, "samples": n, "gap": np.mean(own), "measured": True} for n, own in zip(points, left)]
        for samples, weights in zip(grid, np.vander(np.log(grid), 2) @ fit):
            means = np.log(np.mean(left, axis=(1, 2)))
            low, high = interval([np.array(left)], lambda drawn, weights=weights: weights @ np.log(drawn.clip(1e-3)), 0.90)
            row = {"method": name, "samples": samples, "gap": np.exp(weights @ means), "measured": False}
            rows.append(row | {"low": np.exp(low), "high": np.exp(high)})
    if not rows:
        return None
    data = pd.DataFrame(rows)
    figure, [ax] = panels(1, 5.5, 3.4)
    for name, own in data.groupby("method", sort=False):
        shown, line, points = look(name), own[~own["measured"]], own[own["measured"]]
        ax.plot(line["samples"], line["gap"], color=shown["color"], linestyle=shown["linestyle"], linewidth=1)
        ax.fill_between(line["samples"], line["low"], line["high"], color=shown["color"], alpha=0.12, linewidth=0)
        ax.plot(points["samples"], points["gap"], **shown | {"linestyle": ""}, label=name)
    log_scale(ax, "x")
    log_scale(ax)
    ax.set(xlabel="samples", ylabel="perplexity gap that remains, nats")
    ax.legend(title="")
    lower_is_better(ax)
    ends = data[~data["measured"]].groupby("method", sort=False).last()
    said = [f"{name} {row['gap']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" for name, row in ends.iterrows()]
    return figure, data, f"If gaps went on as powers of the samples, at {grid[-1]:,.0f} they would be: {', '.join(said)} nats."


# --- notebook 3 --------------------------------------------------------------------------------------------------------


def gaps(runs: pd.DataFrame, to: str) -> Plot:
    """How much worse each criterion is than the criterion `to`, pruned and reconstructed, in nats, a panel per criterion."""
    runs = runs.assign(granularity=runs["fit"].replace("none", "pruned"))
    data = effects(runs, ["model", "pattern", "criterion", "granularity"], {"criterion": to}, flip=True, share=False)
    data = data[data["verdict"] != "default"].drop(columns=["verdict", "perplexity"])
    places = list(dict.fromkeys(data["model"] + ", " + data["pattern"]))
    groups = list(data.groupby("criterion", sort=False))
    figure, axes = panels(len(groups), 3.2, 0.9 + 0.45 * len(places), sharex=True, sharey=True)
    for ax, (criterion, cell) in zip(axes, groups):
        # Linear up to 0.1, logarithmic beyond: gaps differ by orders of magnitude, and some are about 0.
        ax.set_xscale("symlog", linthresh=0.1, linscale=0.5)
        states = ["pruned" if name == "pruned" else "reconstructed" for name in cell["granularity"]]
        rows = [places.index(f"{model}, {pattern}") for model, pattern in zip(cell["model"], cell["pattern"])]
        heights = [row + (0.15 if state == "reconstructed" else -0.15) for row, state in zip(rows, states)]
        bars(ax, cell, heights, states)
        for row, height, low, state in zip(rows, heights, cell["low"], states):
            if row == 0 and ax is axes[0]:
                beside(ax, state, (low, height), (-6, 0), ha="right", color=look(state)["color"])
        ax.axvline(0, color="0.4", linewidth=1, zorder=1)
        ax.set(title=criterion, xlabel=f"nats worse than {to} →", ylim=(len(places) - 0.5, -0.5))
        ax.set_yticks(range(len(places)), places)
        ax.set_xticks([0, 0.1, 0.5, 2, 10], ["0", "0.1", "0.5", "2", "10"])
    wide = data.pivot(index=["model", "pattern", "criterion"], columns="granularity", values="difference")
    last = next((name for name in wide if name != "pruned"), None)
    if "pruned" not in wide or last is None:
        return figure, data, f"No gap to {to} both pruned and reconstructed yet."
    shrinks = (wide[last].abs() < wide["pruned"].abs()).sum()
    ends = f"{span(wide['pruned'])} nats before it, {span(wide[last])} after"
    return figure, data, f"The gap to {to} shrinks with reconstruction in {shrinks} of {len(wide)} comparisons: {ends}."


# --- notebook 4 --------------------------------------------------------------------------------------------------------


def drift(runs: pd.DataFrame) -> Plot:
    """Drift from the dense model along the depth, relative to that of the pruned model, a panel per loss."""
    rows = []
    for (size, propagation, loss), group in runs.groupby(["granularity", "propagation", "loss"], sort=False):
        for block, values in enumerate(np.array([a / b for a, b in zip(group["drift"], group["drift_pruned"])]).T, 1):
            low, high = interval([values[None, :, None]], lambda means: means[0], 0.90)
            row = {"granularity": size, "propagation": propagation, "loss": loss, "block": block, "ratio": values.mean()}
            rows.append(row | {"low": low, "high": high, "seeds": len(group)})
    data = pd.DataFrame(rows)
    groups = list(data.groupby("loss", sort=False))
    figure, axes = panels(len(groups), 2.5, 2.8, sharey=True)
    for ax, (loss, cell) in zip(axes, groups):
        for name, line in cell.groupby("propagation", sort=False):
            shown = look(f"{name} propagation")
            ax.plot(line["block"], line["ratio"], **shown, markersize=3.5, markevery=4, linewidth=1.2)
            ax.fill_between(line["block"], line["low"], line["high"], color=shown["color"], alpha=0.15, linewidth=0)
        ax.set(title=f"{loss} loss", xlabel="after block", ylim=(0, max(1.08, data["high"].max())))
        ax.axhline(1, color="0.3", linestyle="--", linewidth=1)
    axes[0].set_ylabel("drift over that of the pruned model")
    lower_is_better(axes[0])
    last = data[data["block"] == data["block"].max()]
    ends = last[last["loss"] == groups[-1][0]]
    label_ends(axes[-1], last["block"].max(), {**dict(zip(ends["propagation"] + " propagation", ends["ratio"])), "pruned": 1.0})
    said = [f"{span(part['ratio'])} for {name}" for name, part in last.groupby("propagation", sort=False)]
    return figure, data, f"Drift ends at these shares of the pruned model's: {', '.join(said)}."


# --- notebook 5 --------------------------------------------------------------------------------------------------------


def costs(runs: pd.DataFrame) -> Plot:
    """Perplexity of each size of window, mean and range over seeds, against FLOPs and, if known, memory."""
    columns = ["granularity", "seeds", "perplexity", "lowest perplexity", "highest perplexity", COMPUTE, MEMORY]
    data = sizes(runs).query("granularity != 'pruned'")[columns]
    shown = [cost for cost in (COMPUTE, MEMORY) if data[cost].notna().any()]
    figure, axes = panels(len(shown), 4.4, 3.2, sharey=True)
    for ax, cost in zip(axes, shown):
        for row in data.to_dict("records"):
            mark(ax, row[cost], row, row["granularity"])
        ax.margins(0.15)
        ax.set(xlim=(0, None), xlabel=cost, ylabel="perplexity" if ax is axes[0] else "")
        lower_is_better(ax, "x")
        label(ax, data[cost], data["perplexity"], data["granularity"])
    lower_is_better(axes[0])
    best = data.sort_values("perplexity").iloc[0]
    close = data[(data["lowest perplexity"] <= best["highest perplexity"]) | (data["seeds"] < 2)]["granularity"]
    finding = f"The lowest perplexity is that of {best['granularity']}"
    others = [name for name in close if name != best["granularity"]]
    return figure, data, finding + (f"; seeds do not tell it from that of {', '.join(others)}." if others else ".")


# --- notebook 8 --------------------------------------------------------------------------------------------------------


def frontier(runs: pd.DataFrame, baseline: str, ways: tuple[str, str], least: float = 0.05) -> Plot:
    """What a mask gains over the mask `baseline` before reconstruction and after it (the two fits `ways`), in nats per token.

    runs: with two more columns, mask and way (the fit). least: gains up to it, in nats, do not enter the finding.
    A row of panels for each pattern, a column for each model.
    """
    data = effects(runs[runs["way"].isin(ways)], ["model", "pattern", "way", "mask"], {"mask": baseline}, share=False)
    data = data[data["mask"] != baseline].drop(columns="verdict")
    models, masks = list(dict.fromkeys(data["model"])), data.groupby("pattern", sort=False)["mask"].unique()
    counts = [len(names) for names in masks]
    size = {"figsize": (3.6 * len(models) + 1, sum(0.22 * count + 0.65 for count in counts) + 0.6), "layout": "constrained"}
    figure, axes = plt.subplots(len(masks), len(models), squeeze=False, sharey="row", height_ratios=counts, **size)
    for row, (pattern, names) in zip(axes, masks.items()):
        for ax, model in zip(row, models):
            here = (data["pattern"] == pattern) & (data["model"] == model)
            ax.set_visible(here.any())
            ax.axvline(0, color="0.4", linewidth=1, zorder=1)
            for way, colour, shape in zip(ways, ("0.55", "#0072b2"), "Do"):
                own = data[here & (data["way"] == way)]
                places = [list(names).index(name) + (0.15 if way == ways[1] else -0.15) for name in own["mask"]]
                ax.hlines(places, own["low"], own["high"], color=colour, linewidth=1.5)
                faces = ["white" if seeds == 1 else colour for seeds in own["seeds"]]
                ax.scatter(own["difference"], places, 25, faces, shape, edgecolors=colour, label=way, zorder=3)
            ax.set_xscale("symlog", linthresh=0.1, linscale=0.6)
            ax.xaxis.set(major_locator=FixedLocator([-2, -0.5, -0.1, 0, 0.1, 0.5, 2]), minor_locator=NullLocator())
            ax.xaxis.set_major_formatter("{x:g}")
            ax.set(ylim=(len(names) - 0.5, -0.5), title=f"{model}, {pattern}")
            ax.set_yticks(range(len(names)), names)
    for ax in axes[-1]:
        ax.set_xlabel(f"← worse    than {baseline}    better →\n(nats per token)", fontsize=8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    wide = data.pivot(index=["model", "pattern", "mask"], columns="way", values="difference").reindex(columns=ways).dropna()
    paid = wide[wide[ways[0]] > least]
    kept = (paid[ways[1]] / paid[ways[0]]).groupby("pattern", sort=False)
    words = ", ".join(f"{own.median():.0%} ({pattern}, gains: {len(own)})" for pattern, own in kept) or "there are none"
    return figure, data, f"Of gains over {baseline} above {least:g} nats, reconstruction leaves (median; below 0: loss): {words}."


def frontier_cost(runs: pd.DataFrame, baseline: tuple[str, str]) -> Plot:
    """Perplexity and FLOPs (pruning, reconstruction, retraining) of each mask and way, divided by those of the pair `baseline`.

    runs: as in `frontier`. A panel for each model and pattern; its title names the pair with the lowest perplexity. Means over
    seeds. Line: the Pareto front.
    """
    by, cost, quality = ["model", "pattern", "mask", "way"], "times the operations", "times the perplexity"
    data = effects(runs, by, dict(zip(by[2:], baseline)), share=False).drop(columns="verdict")
    data = data.merge(runs.groupby(by)["flops_with_pruning"].mean().rename("flops").reset_index(), on=by)
    usual = data[(data["mask"] == baseline[0]) & (data["way"] == baseline[1])].set_index(by[:2])["flops"]
    data[cost] = data["flops"] / usual.reindex(pd.MultiIndex.from_frame(data[by[:2]])).to_numpy()
    data[quality] = np.exp(-data["difference"])
    best = data.loc[data.groupby(by[:2])[quality].idxmin()].set_index(by[:2])
    ways, masks = (list(dict.fromkeys(data[name])) for name in ("way", "mask"))
    cells = data.sort_values("pattern", kind="stable").groupby(["pattern", "model"], sort=False)
    figure, axes = panels(len(cells), 4, 2.9, columns=data["model"].nunique(), sharex=True)
    shown = {"hue": "way", "hue_order": ways, "palette": "colorblind", "style": "mask", "style_order": masks}
    for ax, ((pattern, model), own) in zip(axes, cells):
        unbeaten = front(own, cost, quality)
        ax.step(unbeaten[cost], unbeaten[quality], where="post", color="0.6", linewidth=1, zorder=1)
        sns.scatterplot(own, x=cost, y=quality, **shown, s=60, legend=ax is axes[0], ax=ax)
        mask, way, lowest = best.loc[(model, pattern), [*by[2:], quality]]
        ax.set_title(f"{model}, {pattern}\nbest: {mask}, {way}, {lowest:.2f}", fontsize=9)
        ax.set(xlabel=f"{cost} of {', '.join(baseline)}", ylabel=quality)
        ax.margins(0.15)
        log_scale(ax, "x")
        log_scale(ax)
    lower_is_better(axes[0])
    legend(figure, axes[0])
    said = f"{span(best[quality])} times that of {', '.join(baseline)}, for {span(best[cost], '{:.1f}')} {cost}"
    return figure, data, f"The lowest perplexity of each panel is {said}."


# --- all claims --------------------------------------------------------------------------------------------------------

_AXES = {  # kind of effect -> label of the axis
    "difference": "nats per token by which it is better: right of 0 is as claimed",
    "match": f"share of the perplexity gap, or of the KL that pruning adds: right of the line ({-MARGIN:g}) is as claimed",
    "gap": "nats per token by which the gap shrinks: right of 0 is as claimed",
    "equal": f"share of the perplexity gap: equal in the band (±{MARGIN:g}; dark: ±{CLOSE:g}), right of it the first is better",
    "ratio": "times the cost: right of the line is as claimed",
    "memory": "times the memory: right of the line is as claimed",
}


def claims(verdicts: pd.DataFrame) -> Plot | None:
    """The effects of the central claims at their main patterns, a row per claim, model and recipe. Line: the bar to exceed."""
    shown = central(verdicts)
    if shown.empty:
        return None
    kinds = [kind if kind in _AXES else "match" if bar < 0 else "difference" for kind, bar in zip(shown["test"], shown["bar"])]
    groups = [(name, shown[np.array(kinds) == name]) for name in _AXES if name in kinds]
    heights = [len(group) + 1.6 for _, group in groups]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(9, 0.24 * sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for ax, (name, group) in zip(axes.flat, groups):
        for width, shade in ((MARGIN, "0.9"), (CLOSE, "0.82")) if name == "equal" else ():
            ax.axvspan(-width, width, color=shade, zorder=0)
        ax.axvline(group["bar"].iloc[0], color="0.3", linewidth=1, zorder=1)
        for place, (_, row) in enumerate(group.iterrows()):
            colour, shape = {HOLDS: ("#0072b2", "o"), FAILS: ("#d55e00", "X"), UNSURE: ("0.5", "d")}[row["verdict"]]
            end = row["high"] if np.isfinite(row["high"]) else 9 * row["effect"]
            face = colour if row["seeds"] >= SEEDS else "white"
            ax.plot([row["low"], end], [place, place], color=colour, linewidth=1.5)
            if np.isinf(row["high"]):
                ax.plot(end, place, ">", color=colour, markersize=4)
            ax.plot(row["effect"], place, color=colour, marker=shape, markersize=5.5, markerfacecolor=face)
            words = f"{MARKS[row['verdict']]}  {effect_words(row).removesuffix(row['unit'])}"
            beside(ax, words, (1, place), (6, 0), xycoords=("axes fraction", "data"), fontsize=7)
        names = [f"{row['short']}  ·  {found_in(row).replace(f', {OLDER}', ' †')}" for _, row in group.iterrows()]
        ax.set_yticks(range(len(group)), names, fontsize=7)
        ax.set_ylim(len(group) - 0.4, -0.6)
        ax.set_xlabel(_AXES[name], fontsize=8)
        ax.grid(axis="y", visible=False)
        if name in RATIOS:
            log_scale(ax, "x")
        elif name == "equal":  # most effects are near 0, some are large
            ax.set_xscale("symlog", linthresh=0.1)
            ax.margins(x=0.08)
            low, high = ax.get_xlim()
            ax.set_xticks([x for x in (-0.5, -0.1, 0, 0.1, 0.5) if low < x < high])
            ax.xaxis.set_major_formatter("{x:g}")
    columns = ["claim", "statement", "model", "pattern", "recipe", "effect", "low", "high", "unit", "seeds", "verdict"]
    return figure, shown[columns], in_short(shown)
