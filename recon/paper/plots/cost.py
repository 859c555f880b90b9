"""What it costs: phases against their floor, quality against time, where time goes, how it grows, recipes against one another.

Of the loops, "reference" is the straightforward one, "ours" this library.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from recon.paper.bench import report
from recon.paper.figures import Plot, look, lower_is_better, number, sentence
from recon.paper.plots import paired
from recon.paper.plots.layout import label_ends, label_points, panels
from recon.paper.runs import short
from recon.study.record import RunRecord

LOOPS = {"reference": "reference loop", "ours": "ours"}
HOLLOW = {"markerfacecolor": "white"}  # measured once, or of one seed
COMPUTE = "TFLOP"


def origin(results: Mapping, section: str) -> RunRecord:
    """What figures say that a section of `results`, as of `recon bench`, comes from: its key, and the commit that measured it."""
    where = results["sections"][section]["environment"]
    return RunRecord(results["settings"], results["key"], "done", environment=where)


def phases(section: dict) -> Plot:
    """Every phase's time as a multiple of its floor, ours beside the reference's: bars of means, lines over all rounds."""
    rows, floor = pd.DataFrame(section["rows"]), pd.Series(section["floor_seconds"])
    times = rows["seconds"] / rows["phase"].map(floor)
    data = times.groupby([rows["phase"], rows["loop"]]).agg(times="mean", low="min", high="max", rounds="size").reset_index()
    data = data[data["phase"].isin(floor.index)]
    fig, [ax] = panels(1, (5, 0.42 * len(floor)))
    _bars(ax, data, list(floor.index), "times", [f"{value:.1f}" for value in data["times"]])
    ax.axvline(1, color="0.4", linewidth=1, linestyle=":", marker="")
    ax.set_xlabel("times the floor: its products alone, at full speed")
    lower_is_better(ax, "x")
    drawn = "A pair of bars for each phase, reference and ours; dotted at 1, the floor."
    return Plot(fig, data, _faster(data, list(floor.index)), drawn)


def _faster(data: pd.DataFrame, names: Sequence[str]) -> str:
    """Both loops in each phase where all rounds of one are shorter than those of the other, and where they are not."""
    clear, other = [], []
    for name in names:
        pair = data[data["phase"] == name].set_index("loop")
        if len(pair) == len(LOOPS):
            told = len(paired.leading(pair.rename(columns={"times": "mean", "rounds": "count"}))) == 1
            ours, reference = pair.loc[["ours", "reference"], "times"]
            clear += [f'{ours:.1f} times the floor for "{name}" (reference loop: {reference:.1f})'] * told
            other += [f'"{name}"'] * (not told)
    parts = [f"Ours takes {', '.join(clear)}."] if clear else []
    parts += [f"Rounds do not tell the loops apart for {', '.join(other)}."] if other else []
    return " ".join(parts) or "No phase has both loops."


def quality(section: list[dict]) -> Plot:
    """Perplexity against seconds to prune and reconstruct, a mark per run; grey: better than the reference in less time."""
    table = report.quality(section)
    runs = table.dropna(subset="seconds")
    fig, [ax] = panels(1, (5, 3.4))
    for name, row in runs.iterrows():
        shown = look("ours" if name.startswith("ours") else name)
        ax.plot(row["seconds"], row["perplexity"], **shown | HOLLOW | {"linestyle": "", "markersize": 7})
    ax.margins(x=0.12, y=0.15)
    ax.set_xlim(left=0)
    seconds, perplexity = runs.loc["reference", ["seconds", "perplexity"]]
    bottom = ax.get_ylim()[0]
    ax.add_patch(Rectangle((0, bottom), seconds, perplexity - bottom, color="0.93", zorder=0, linewidth=0))
    ax.set_xlabel("seconds to prune and reconstruct")
    lower_is_better(ax, "x")
    ax.set_ylabel("perplexity")
    lower_is_better(ax)
    names = {name: LOOPS.get(name, name.removeprefix("ours, ").replace(", ", ",\n")) for name in runs.index}
    label_points(ax, {names[name]: (row["seconds"], row["perplexity"]) for name, row in runs.iterrows()})
    first = runs[runs["first as good"]]
    if len(first):
        name, share = first.index[0].removeprefix("ours, "), first["share of the reference's time"].iloc[0]
        finding = f"Ours ({name}) reaches the reference loop's perplexity in {_of(share)} its time."
    else:
        ours = runs[runs.index.str.startswith("ours")]
        best = ours["perplexity"].idxmin()
        finding = f"None of ours reaches the reference loop's perplexity, {number(perplexity)}: the best ({best.removeprefix('ours, ')}) "
        finding += f"has {number(ours.loc[best, 'perplexity'])}."
    return Plot(fig, table.reset_index(), finding, "A mark for each run; grey, better than the reference loop in less time.")


def operations(section: dict) -> Plot:
    """Seconds by kind of operation, ours beside the reference's, with the share of the loop's time that each is."""
    data = report.profile(section).rename_axis("operation").reset_index().melt("operation", var_name="loop", value_name="seconds")
    total = data.groupby("loop")["seconds"].sum()
    data["share"] = data["seconds"] / data["loop"].map(total)
    kinds = list(dict.fromkeys(data["operation"]))
    fig, [ax] = panels(1, (5, 0.42 * len(kinds)))
    _bars(ax, data, kinds, "seconds", [f"{row.seconds:.2g} ({_percent(row.share)})" for row in data.itertuples()])
    ax.set_xlabel("seconds to prune and reconstruct")
    lower_is_better(ax, "x")
    share = data.set_index(["operation", "loop"])["share"]["matrix products"]
    finding = (
        f"Matrix products are {_percent(share['ours'])} of our time and {_percent(share['reference'])} of the reference loop's; "
        f"in all, ours takes {_of(total['ours'] / total['reference'])} its time."
    )
    return Plot(fig, data, finding, "A pair of bars for each kind of operation, reference and ours.")


def growth(section: list[dict]) -> Plot:
    """Time above, memory below, against samples, sequence length, depth and width, a line per loop."""
    data = pd.DataFrame(section)
    data["GiB"] = data["added_memory_bytes"] / 2**30
    names = list(dict.fromkeys(data["axis"]))
    fig, axes = panels(2 * len(names), (1.35, 1.5), columns=len(names), wspace=0.3)
    for place, ax in enumerate(axes):
        name, value = names[place % len(names)], ("seconds", "GiB")[place // len(names)]
        part = data[data["axis"] == name]
        for loop, line in part.groupby("loop", sort=False):
            ax.plot(line["value"], line[value], **look(loop) | HOLLOW | {"markersize": 5})
        ax.set_ylim(0, 1.1 * max(part[value].max(), 1e-3))
        ax.set_xlim(0, 1.08 * part["value"].max())
        ax.set_xticks(part["value"].unique())
        ax.tick_params(labelsize=8)
        if value == "GiB":
            ax.set_xlabel(name)
    for ax, label in ((axes[0], "seconds"), (axes[len(names)], "memory added, GiB")):
        ax.set_ylabel(label)
        lower_is_better(ax)
    for ax, value in ((axes[len(names) - 1], "seconds"), (axes[-1], "GiB")):
        last = data[data["axis"] == names[-1]].groupby("loop", sort=False).last()
        label_ends(ax, ax.get_xlim()[1], {LOOPS[loop]: height for loop, height in last[value].items()})
    drawn = "Curves of seconds above and memory below, a panel for each thing that grows."
    return Plot(fig, data.drop(columns=["peak_memory_bytes", "added_memory_bytes"], errors="ignore"), _grows(data), drawn)


def _grows(data: pd.DataFrame) -> str:
    """How many times our time grows as each thing does, and our memory beside the reference's."""
    parts = []
    for name, line in data[data["loop"] == "ours"].groupby("axis", sort=False):
        times, more = (line[column].iloc[-1] / line[column].iloc[0] for column in ("seconds", "value"))
        if more > 1:
            parts.append(f"{times:.1f} times with {more:g} times the {name}")
    finding = f"Our time grows {', '.join(parts)}" if parts else "Nothing was measured at two sizes"
    wide = data.pivot_table(index=["axis", "value"], columns="loop", values="GiB")
    ratio = (wide["ours"] / wide["reference"].where(wide["reference"] > 0)).dropna()
    if len(ratio):
        low, high = f"{ratio.min():.2f}", f"{ratio.max():.2f}"
        finding += f"; the memory we add is {low if low == high else f'{low} to {high}'} of the reference loop's"
    return f"{finding}."


def recipe_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each finished run of a recipe: what it reached and what it took.

    runs: a frame of `recon.run_study`, with a column `recipe`; one of them is "default". "recovered" is the share of the damage that
    pruning does as the default does it at that seed, so that what is pruned otherwise is judged by the same measure.
    """
    data = runs.assign(**{"model": runs["model"].map(short), COMPUTE: (runs["flops_prune"] + runs["flops_reconstruct"]) / 1e12})
    default = data[data["recipe"] == "default"].set_index(["model", "seed"])["pruned_perplexity"]
    pruned = default.reindex(pd.MultiIndex.from_frame(data[["model", "seed"]])).to_numpy()
    damage = np.log(np.where(pruned > data["dense_perplexity"], pruned, np.nan) / data["dense_perplexity"])
    data["recovered"] = 1 - np.log(data["perplexity"] / data["dense_perplexity"]) / damage
    names = ["dense_perplexity", "pruned_perplexity", "perplexity", "recovered", "share_recovered", "held_out_error", COMPUTE]
    return data[["model", "recipe", "seed", *names]]


def recipes(data: pd.DataFrame) -> Plot:
    """Perplexity of each recipe, mean and standard deviation over seeds, with its compute beside it, a panel per model.

    data: of `recipe_runs`.
    """
    cells, names = list(data.groupby("model", sort=False)), list(dict.fromkeys(data["recipe"]))
    fig, axes = panels(len(cells), (2.6, 0.5 + 0.27 * len(names)), sharey=True)
    for ax, (model, cell) in zip(axes, cells):
        groups = cell.groupby("recipe", sort=False)
        means, spread, seeds = groups[["perplexity", COMPUTE]].mean(), groups["perplexity"].std(), groups["seed"].nunique()
        for recipe, row in means.iterrows():
            place, shown = names.index(recipe), look(recipe) | (HOLLOW if seeds[recipe] == 1 else {})
            ax.errorbar(row["perplexity"], place, xerr=spread[recipe], capsize=2, **shown | {"linestyle": "", "markersize": 6})
            beside = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            ax.annotate(number(row[COMPUTE]), (1, place), (5, 0), **beside, va="center", fontsize=8)
            if recipe == "default":
                ax.axvline(row["perplexity"], color=shown["color"], linewidth=1, linestyle=":", marker="", zorder=1)
        ax.annotate(COMPUTE, (1, 1), (5, 6), xycoords="axes fraction", textcoords="offset points", fontsize=8)
        ax.margins(x=0.1)
        ax.set_title(model)
        ax.set_xlabel("perplexity")
        lower_is_better(ax, "x")
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
    drawn = "A row for each recipe with its perplexity and compute, a panel for each model; dotted: the default."
    return Plot(fig, data, _most(cells), drawn)


def _most(cells: Sequence[tuple[str, pd.DataFrame]]) -> str:
    """What recovers most of each model's damage, beside the default; where seeds do not tell, from how much to how much is recovered."""
    parts = []
    for model, cell in cells:
        cell = cell.dropna(subset="recovered")
        if cell.empty:
            continue
        lost = (1 - cell["recovered"]).groupby(cell["recipe"], sort=False).agg(["mean", "min", "max", "count"])
        best, *others = paired.leading(lost.rename(columns={"min": "low", "max": "high"}))
        share = {name: _percent(value) for name, value in (1 - lost["mean"]).items()}
        if others:
            ends = " to ".join(f"{share[name]} ({name})" for name in (lost["mean"].idxmax(), best))
            seeds = cell["seed"].nunique()
            which = f"{seeds} seed{'s do' if seeds > 1 else ' does'} not tell which is best"
            parts.append(f"on {model}, recipes recover {ends} of the damage, the default {share['default']}; {which}")
        elif best == "default":
            parts.append(f"on {model}, the default recovers most: {share[best]} of the damage")
        else:
            compute = cell.groupby("recipe")[COMPUTE].mean()
            times = f"{_of(compute[best] / compute['default'])} the default's compute (default: {share['default']})"
            parts.append(f"on {model}, {best} recovers most: {share[best]} of the damage at {times}")
    return f"{'. '.join(map(sentence, parts))}." if parts else "No model has damage, and the default recipe, to compare by."


def recipe_table(data: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation of what each recipe reaches and takes; data: of `recipe_runs`."""
    words = {
        "perplexity": "perplexity ↓", "share_recovered": "share recovered ↑", "held_out_error": "share unexplained ↓", COMPUTE: f"{COMPUTE} ↓"
    }  # fmt: skip
    groups = data.groupby(["model", "recipe"], sort=False)
    table = groups[list(words)].agg(["mean", "std"]).rename(columns=words)
    table.insert(0, ("seeds", ""), groups["seed"].nunique())
    return table.dropna(axis=1, how="all")


def _bars(ax: Axes, data: pd.DataFrame, names: Sequence[str], value: str, labels: Sequence[str]) -> None:
    """A pair of bars for each name, labelled: the reference's above ours; with a line from `low` to `high` where `data` has them."""
    by = data.columns[0]
    pairs = [name for name in names if (data[by] == name).sum() == len(LOOPS)]
    for row, label in zip(data.to_dict("records"), labels):
        loop, shown, end = row["loop"], look(row["loop"]), row.get("high", row[value])
        place = names.index(row[by]) + (list(LOOPS).index(loop) - 0.5) * (0.4 if row[by] in pairs else 0)
        hatch = {"hatch": "///"} if loop == "reference" else {}
        ax.barh(place, row[value], 0.36, color=shown["color"], edgecolor="white", linewidth=0, **hatch)
        if "low" in row:
            ax.plot([row["low"], end], [place, place], color="0.2", linewidth=1, linestyle="-", marker="")
        label += f"  {LOOPS[loop]}" if row[by] == pairs[0] else ""
        ax.annotate(label, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(0, 1.5 * data.get("high", data[value]).max())
    ax.grid(visible=False, axis="y")


def _of(share: float) -> str:
    """ "0.43 of" or "1.43 times"."""
    return f"{share:.2f} of" if share < 1 else f"{share:.2f} times"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
