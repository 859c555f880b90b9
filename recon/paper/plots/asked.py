"""What reviewers asked: calibration text, structured pruning, adapters, losses while windows are fitted, costs, errors along the depth."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from recon.paper.comparisons import MARGIN
from recon.paper.figures import Plot, log_scale, look, lower_is_better, number, sentence
from recon.paper.plots import granularity
from recon.paper.plots.granularity import MEMORY
from recon.paper.plots.layout import label_beside, label_points
from recon.paper.plots.paired import difference, grouped, judged, leading
from recon.study import studies
from recon.study.record import RunRecord
from recon.study.spec import RunSpec


def overview(texts: pd.DataFrame, structured: pd.DataFrame, adapters: Sequence[RunRecord]) -> Plot | None:
    """Three questions: perplexity before and after reconstruction by calibration text and by structured criterion, and adapters against
    full weights. One without runs has no panel; None where none has any.

    texts, structured: runs (frames of `recon.study.studies`) without and with reconstruction. adapters: reconstructed runs.
    """
    questions = {  # runs, the column by which they differ, title
        "calibration texts": (texts, "text", "calibration text"),
        "structured criteria": (structured, "criterion", "whole heads and neurons removed"),
    }
    questions = {what: question for what, question in questions.items() if question[0][question[1]].nunique() > 1}
    compares = len({record.spec["adapter"] for record in adapters}) > 1
    panels = len(questions) + compares
    if not panels:
        return None
    fig, axes = plt.subplots(1, panels, figsize=(3.8 * panels, 2.9), squeeze=False)
    drawn = {what: _before_after(ax, *question) for ax, (what, question) in zip(axes[0], questions.items())}
    compared = _adapters(axes[0][-1], adapters) if compares else pd.DataFrame()
    fig.tight_layout(w_pad=2)
    helped = [
        f"{int((cell['reconstructed'] < cell['pruned']).sum())} of {len(cell)} {what}"
        for what, cell in drawn.items()
        if len(cell)
    ]
    said = [f"reconstruction helps with {' and '.join(helped)}"] if helped else []
    against = ", ".join(f"{row.name} is {row.judged}" for row in compared.itertuples(index=False))
    said += [f"against training a window's own weights, {against}"] if against else []
    data = pd.concat([*drawn.values(), compared.assign(panel="adapter in the window")])
    finding = sentence("; ".join(said) or "nothing can be compared")
    return Plot(fig, data, f"{finding}.", "Perplexity before and after, and paired differences.")


def _before_after(ax: Axes, runs: pd.DataFrame, by: str, title: str) -> pd.DataFrame:
    """A row for each value of `by`: pruned and reconstructed perplexity, mean over seeds, joined by a line."""
    rows = []
    for name, cell in runs.groupby(by, sort=False):
        values = {
            state: cell.loc[(cell["fit"] == "none") == (state == "pruned"), "perplexity"] for state in ("pruned", "reconstructed")
        }
        if all(map(len, values.values())):
            spread = {f"{state} std": found.std() for state, found in values.items()}
            rows.append(
                {
                    "name": name,
                    **{state: found.mean() for state, found in values.items()},
                    **spread,
                    "seeds": len(values["pruned"]),
                }
            )
    data = pd.DataFrame(rows, columns=["name", "pruned", "reconstructed", "pruned std", "reconstructed std", "seeds"])
    places = np.arange(len(data))[::-1]
    ax.hlines(places, data["reconstructed"], data["pruned"], color="0.75", zorder=1)
    for state, align, shift in (("pruned", "left", 7), ("reconstructed", "right", -7)):
        style = look(state) | {"linestyle": "", "markersize": 6}
        for place, value, spread, seeds in zip(places, data[state], data[f"{state} std"], data["seeds"]):
            face = {} if seeds > 1 else {"markerfacecolor": "white"}
            ax.errorbar(value, place, xerr=None if np.isnan(spread) else spread, capsize=2, **style | face)
            right = (align == "left") == (data["pruned"] >= data["reconstructed"]).iloc[0]
            ax.annotate(
                number(value), (value, place), (abs(shift) if right else -abs(shift), 7), textcoords="offset points", fontsize=7.5,
                ha="left" if right else "right", color=style["color"],
            )  # fmt: skip
    if len(runs):
        dense = runs["dense_perplexity"].mean()
        ax.axvline(dense, **look("dense") | {"marker": "", "linewidth": 1})
        ax.annotate(
            f"dense {number(dense)}",
            (dense, 1),
            (0, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=7.5,
            ha="center",
        )
    if len(data):
        for state in ("pruned", "reconstructed"):
            ax.annotate(
                state,
                (data[state].iloc[0], places[0]),
                (0, -13),
                textcoords="offset points",
                fontsize=7.5,
                ha="center",
                color=look(state)["color"],
            )
    ax.set_yticks(places, data["name"])
    ax.set_ylim(-0.6, len(data) - 0.4)
    ax.margins(x=0.2)
    ax.set_title(title, fontsize=9, pad=14)
    ax.set_xlabel("perplexity")
    lower_is_better(ax, "x")
    return data.assign(panel=title)


def _adapters(ax: Axes, records: Sequence[RunRecord]) -> pd.DataFrame:
    """Each adapter against a window's own weights, as a share of the damage, paired by seed and evaluation window."""
    runs = {name: found for (name,), found in grouped(records, lambda spec: (spec["adapter"],)).items()}
    rows = [{"name": name} | difference(found, runs.get("none", [])) for name, found in runs.items() if name != "none"]
    data = pd.DataFrame(rows, columns=["name", "difference", "low", "high", "seeds"])
    data["judged"] = [judged(row.low, row.high, row.seeds) for row in data.itertuples()]
    places = np.arange(len(data))[::-1]
    ax.axvspan(-MARGIN, MARGIN, color="0.92", zorder=0)
    ax.axvline(0, color="0.4", linewidth=1)
    for place, row in zip(places, data.itertuples()):
        error = [[max(0.0, row.difference - row.low)], [max(0.0, row.high - row.difference)]]
        face = {} if row.seeds > 1 else {"markerfacecolor": "white"}
        ax.errorbar(row.difference, place, xerr=error, capsize=3, **{"color": "0.2", "marker": "o", "linestyle": ""} | face)
        ax.annotate(row.judged, (row.difference, place), (0, 7), textcoords="offset points", fontsize=7.5, ha="center")
    ax.set_yticks(places, data["name"])
    ax.set_ylim(-0.6, max(0.4, len(data) - 0.4))
    ax.set_title("adapter in the window\n(grey: equal to its own weights)", fontsize=9)
    ax.set_xlabel("better than own weights \N{RIGHTWARDS ARROW}\n(share of the damage)")
    return data


def losses(records: Sequence[RunRecord], order: Sequence[str]) -> Plot:
    """Loss while windows are fitted, median and middle half over the windows: a panel for each size, with shared axes.

    records: of one seed. order: of the sizes.
    """
    found = {studies.fit_name(record.spec): record for record in records if record.windows and record.spec["solver"] == "adamw"}
    fits = [fit for fit in order if fit in found]
    fig, axes = plt.subplots(1, len(fits), figsize=(2.1 * len(fits) + 1, 2.6), sharex=True, sharey=True, squeeze=False)
    drawn, falls = [], []
    for ax, fit in zip(axes[0], fits):
        record = found[fit]
        # Windows that do not mix tokens may make several steps per sample: their mean is drawn.
        length = min(len(window["losses"]) for window in record.windows)
        each = np.array([[part.mean() for part in np.array_split(window["losses"], length)] for window in record.windows])
        samples = record.spec["samples"]
        seen = np.arange(1, length + 1) * samples * RunSpec.of(**record.spec).reconstruction.schedule(samples).epochs / length
        low, middle, high = np.quantile(each, [0.25, 0.5, 0.75], axis=0)
        colour = look(fit)["color"]
        ax.plot(seen, middle, color=colour, marker="")
        ax.fill_between(seen, low, high, color=colour, alpha=0.2)
        ax.set_title(fit, fontsize=9)
        ax.set_xlabel("samples trained on")
        drawn += [{"fit": fit, "samples": n, "low": a, "loss": b, "high": c} for n, a, b, c in zip(seen, low, middle, high)]
        ends = max(1, length // 8)
        falls.append((np.median(each[:, -ends:].mean(1) / each[:, :ends].mean(1)), fit))
    log_scale(axes[0, 0])
    axes[0, 0].set_ylabel("unexplained share\nof the target")
    lower_is_better(axes[0, 0])
    fig.tight_layout()
    said = ", ".join(f"{fit} {share:.0%}" for share, fit in falls)
    finding = f"From the first to the last eighth of the steps, the loss falls to (median over windows): {said}."
    return Plot(fig, pd.DataFrame(drawn), finding, "A curve with a band in each panel.")


def costs(records: Sequence[RunRecord], order: Sequence[str]) -> Plot:
    """Perplexity of each size of window, mean and range over seeds, against FLOPs and memory, the least over seeds: other work only adds.

    records: of one model and pattern. order: of the sizes.
    """
    table = granularity.table(records).set_index("granularity", drop=False)
    data = table.loc[[fit for fit in order if fit in table.index and fit != "none"]]
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for ax, (cost, words) in zip(axes, {"TFLOP": "TFLOP to reconstruct", MEMORY: granularity.memory_words(data)}.items()):
        for row in data[data[cost] > 0].to_dict("records"):
            granularity.mark(ax, row[cost], row)
        ax.margins(x=0.15, y=0.15)
        ax.set_xlim(left=0)
        ax.set_xlabel(words)
        lower_is_better(ax, "x")
    axes[0].set_ylabel("perplexity")
    lower_is_better(axes[0])
    fig.tight_layout()
    for ax, cost in zip(axes, ("TFLOP", MEMORY)):
        points = data.loc[data[cost] > 0, [cost, "perplexity"]]
        label_points(ax, {fit: tuple(point) for fit, point in points.iterrows()})
    kept = ["granularity", "seeds", "perplexity", "lowest perplexity", "highest perplexity", "TFLOP", MEMORY, "memory of"]
    drawn = "A mark for each size of window in two panels: compute and memory."
    return Plot(fig, data[kept], _cheapest(data), drawn)


def _cheapest(data: pd.DataFrame) -> str:
    """Which size has the lowest perplexity, or which ones seeds do not tell apart, and which adds the least memory."""
    names = {"perplexity": "mean", "lowest perplexity": "low", "highest perplexity": "high", "seeds": "count"}
    best, known = leading(data.rename(columns=names)), data.loc[data[MEMORY] > 0, MEMORY]
    least = known.idxmin() if len(known) else None
    if len(best) == len(data) > 1:
        finding = "Seeds do not tell the perplexities of the sizes apart"
    elif len(best) > 1:
        finding = f"The lowest perplexities are those of {' and '.join(best)}, which seeds do not tell apart"
    else:
        finding = f"The lowest perplexity is that of {best[0]}"
        if least not in (None, best[0]) and best[0] in known:
            return f"{finding}, with {number(known[best[0]] / known[least])} times the memory of {least}, which adds the least."
        if least == best[0]:
            return f"{finding}, which also adds the least memory."
    return finding + (f"; {least} adds the least memory." if least else ".")


def accumulation(records: Sequence[RunRecord], order: Sequence[str]) -> Plot:
    """Left, the error of each window after it is fitted, relative to before; right, the drift of the model after each block.

    records: of one seed. order: of the sizes; "none" is the pruned model.
    """
    found = {studies.fit_name(record.spec): record for record in records}
    fits = [fit for fit in order if fit in found]
    local = pd.DataFrame(
        [
            {"fit": fit, "before": next(iter(w["error_before"].values())), "after": next(iter(w["error_after"].values()))}
            for fit in fits
            for w in found[fit].windows
        ],
        columns=["fit", "before", "after"],
    )
    local["ratio"] = local["after"] / local["before"]
    drift = pd.DataFrame(
        [{"fit": fit, "block": block, "error": e} for fit in fits for block, e in enumerate(found[fit].metrics["drift"], 1)]
    )
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4))
    groups = dict(list(local.groupby("fit", sort=False)["ratio"]))
    if groups:
        left.boxplot(
            list(groups.values())[::-1], tick_labels=list(groups)[::-1], whis=(0, 100), orientation="horizontal", widths=0.5,
            medianprops={"color": look("reconstructed")["color"], "linewidth": 2},
        )  # fmt: skip
    left.axvline(1, **look("pruned") | {"marker": "", "linewidth": 1})
    left.set_xlabel("error of a window, after / before")
    lower_is_better(left, "x")
    left.set_title("Each window by itself", fontsize=9)
    ends = []
    for fit, group in drift.groupby("fit", sort=False):
        name = "pruned" if fit == "none" else fit
        right.plot(group["block"], group["error"], **look(name) | {"markersize": 3})
        ends.append((group["block"].iloc[-1], group["error"].iloc[-1], name, {"color": look(name)["color"]}))
    log_scale(right)
    right.set_xlabel("block")
    right.set_ylabel("unexplained share of variance")
    right.set_title("The model's state after each block", fontsize=9)
    lower_is_better(right)
    fig.tight_layout()
    label_beside(right, ends)
    return Plot(
        fig,
        pd.concat([drift.assign(panel="drift"), local.assign(panel="windows")]),
        _accumulated(groups, drift),
        "Boxes of ratios; curves.",
    )


def _accumulated(groups: Mapping[str, pd.Series], drift: pd.DataFrame) -> str:
    """What matrices, solved exactly where they are, and half-blocks leave of their own errors, and in the model."""
    last = drift.groupby("fit")["error"].last()
    if not groups:
        return f"After the last block, the pruned model leaves {last.iloc[0]:.2f} of the variance unexplained."
    pruned = [f"the pruned model {last['none']:.2f}"] if "none" in last else []
    words = {"matrix exact": "matrices solved exactly", "matrix": "single matrices", "half-block": "half-blocks"}
    shown = [fit for fit in words if fit in groups]
    shown = [shown[0], shown[-1]] if len(shown) > 1 else list(groups)
    first, *others = (words.get(fit, f"windows of {fit}") for fit in shown)
    share, *shares = (f"{100 * groups[fit].median():.0f} %" for fit in shown)
    error, *errors = (f"{last[fit]:.2f}" for fit in shown)
    own = [f"{sentence(first)} lower their own errors to {share} (median)", *map("{} to {}".format, others, shares)]
    whole = [f"after the last block they leave {error} of the variance unexplained", *map("{} {}".format, others, errors)]
    return f"{', '.join(own)}; {', '.join([*whole, *pruned])}."
