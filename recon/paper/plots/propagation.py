"""Propagation and loss: what feeds a window and what it must match, against the default."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from recon.paper.comparisons import MARGIN
from recon.paper.figures import Plot, look, sentence
from recon.paper.plots import paired
from recon.paper.plots.layout import label_beside, panels
from recon.paper.runs import Run
from recon.paper.statistics import interval
from recon.study.record import RunRecord

FAR = 5 * MARGIN  # differences beyond are written, not drawn to scale


def grid(records: Sequence[RunRecord], default: tuple[str, str]) -> Plot | None:
    """Each propagation and loss against the default ones at the same seeds, as a share of the damage, a panel per loss."""
    cells, rows = _cells(records), []
    for (granularity, propagation, loss), runs in cells.items():
        row = {"granularity": granularity, "propagation": propagation, "loss": loss}
        row["perplexity"] = float(np.exp(np.mean([run.nll["reconstructed"].mean() for run in runs])))
        if (propagation, loss) == default:
            row |= {"difference": 0.0, "low": np.nan, "high": np.nan, "seeds": len(runs), "verdict": "default"}
        else:
            row |= paired.difference(runs, cells.get((granularity, *default), []))
            row["verdict"] = paired.judged(row["low"], row["high"], row["seeds"])
        rows.append(row)
    data = pd.DataFrame(rows)
    if data.empty or (data["verdict"] == "default").all() or not data["seeds"].any():
        return None
    names = list(dict.fromkeys(data["propagation"]))
    groups = list(data.groupby(["granularity", "loss"], sort=False))
    size = (2.2, 0.3 + 0.3 * len(names))
    fig, axes = panels(len(groups), size, columns=data["loss"].nunique(), wspace=0.1, sharey=True)
    for ax, ((granularity, loss), cell) in zip(axes, groups):
        for row in cell.to_dict("records"):
            place = names.index(row["propagation"])
            paired.draw(ax, place, row, look(f"{row['propagation']} propagation"), FAR)
            if row["verdict"] == "default":
                ax.annotate("default", (0, place), (8, 0), textcoords="offset points", va="center", fontsize=8)
        paired.margin(ax, FAR, "share of the damage")
        ax.set_title(f"{loss} loss" + (f", {granularity}" if data["granularity"].nunique() > 1 else ""))
        ax.set_yticks(range(len(names)), [f"{name} propagation" for name in names])
        ax.set_ylim(len(names) - 0.5, -0.5)
    drawn = f"Difference of each propagation and loss to the default as a share of the damage, with intervals; the band is within {paired.SHARE}."
    return Plot(fig, data, _matters(data, default), drawn)


def table(data: pd.DataFrame) -> pd.DataFrame:
    """What `grid` draws as a table: perplexity, and the difference to the default with its interval."""

    def words(row: dict) -> str:
        if row["verdict"] == "default":
            return f"{row['perplexity']:.2f} (default)"
        low, high = paired.number(row["low"]), paired.number(row["high"])
        return f"{row['perplexity']:.2f} ({paired.number(row['difference'])} [{low}, {high}])"

    said = data.assign(words=[words(row) for row in data.to_dict("records")])
    order = [list(dict.fromkeys(data["propagation"])), list(dict.fromkeys(data["loss"]))]
    parts = {name: cell.pivot(index="propagation", columns="loss", values="words") for name, cell in said.groupby("granularity")}
    return pd.concat({name: part.reindex(order[0], columns=order[1]) for name, part in parts.items()})


def _matters(data: pd.DataFrame, default: tuple[str, str]) -> str:
    others = data[(data["verdict"] != "default") & (data["seeds"] > 0)]
    if others["difference"].isna().all():
        return "Pruning did no harm that differences could be measured by."
    best, worst = (others.loc[index] for index in (others["difference"].idxmax(), others["difference"].idxmin()))
    ends = [f"{paired.number(row['difference'])} ({row['propagation']} with {row['loss']})" for row in (worst, best)]
    return (
        f"Against {default[0]} propagation with {default[1]} loss, of {len(others)} other combinations: "
        f"{paired.count_words(others['verdict'], others['seeds'])}. Differences are from {ends[0]} to {ends[1]} of the damage."
    )


def drift(records: Sequence[RunRecord], granularity: str) -> Plot | None:
    """Drift from the dense model along the depth, relative to that of the pruned model, a panel per loss."""
    rows = []
    for (size, propagation, loss), runs in _cells(records).items():
        if size != granularity:
            continue
        metrics = [run.record.metrics for run in runs]
        ratios = np.array([np.divide(found["drift"], found["drift_pruned"]) for found in metrics])
        for block, values in enumerate(ratios.T, 1):
            low, high = interval([values[None, :, None]], lambda means: means[0], paired.LEVEL)
            row = {"granularity": size, "propagation": propagation, "loss": loss, "block": block, "ratio": values.mean()}
            rows.append(row | {"low": low, "high": high, "seeds": len(runs)})
    data = pd.DataFrame(rows)
    if data.empty:
        return None
    groups = list(data.groupby("loss", sort=False))
    fig, axes = panels(len(groups), (1.9, 2.2), columns=3, wspace=0.1, sharey=True)
    for ax, (loss, cell) in zip(axes, groups):
        lines = list(cell.groupby("propagation", sort=False))
        for index, (propagation, line) in enumerate(lines):
            shown = look(f"{propagation} propagation")
            few = {"markerfacecolor": "white"} if line["seeds"].min() == 1 else {}
            step = max(1, len(line) // 8)
            marks = {"markersize": 4, "markevery": (index * step // len(lines), step)}  # of no two lines at the same place
            ax.plot(line["block"], line["ratio"], **shown | few | marks, linewidth=1.2)
            ax.fill_between(line["block"], line["low"], line["high"], color=shown["color"], alpha=0.15, linewidth=0)
        ax.axhline(1, **look("pruned") | {"marker": "", "linewidth": 1})
        ax.set_title(f"{loss} loss")
        ax.set_xlabel("after block")
        ax.margins(x=0.03)
    axes[0].set_ylabel("drift over that of the pruned model\n(lower is better \N{DOWNWARDS ARROW})")
    axes[0].set_ylim(0, max(1.08, 1.05 * data["high"].max()))
    for ax, (_, cell) in zip(axes, groups):
        if not (ax.get_subplotspec().is_last_col() or ax is axes[-1]):
            continue  # every panel has the same lines
        last = cell[cell["block"] == cell["block"].max()]
        ends = {f"{name} propagation": ratio for name, ratio in zip(last["propagation"], last["ratio"])} | {"pruned": 1.0}
        label_beside(ax, [(last["block"].max(), ratio, name, {"color": look(name)["color"]}) for name, ratio in ends.items()])
    drawn = "Drift from the dense model after each block over that of the pruned model, a line per propagation, a panel per loss; dashed at 1, no better than pruned."
    return Plot(fig, data, _drifts(data), drawn)


def _drifts(data: pd.DataFrame) -> str:
    """Where drift ends: of the propagation that ends lowest, if its intervals are below those of all others, and where it is above pruned."""
    last = data[data["block"] == data["block"].max()]
    first = last.loc[last["ratio"].idxmin(), "propagation"]
    best, others = last[last["propagation"] == first], last[last["propagation"] != first]
    said = f"Drift ends at {_span(last)} of the pruned model's"
    if len(others) and last["seeds"].min() > 1 and best["high"].max() < others["low"].min():
        names = " and ".join(others["propagation"].unique())
        said = f"{sentence(first)} propagation ends at {_span(best)} of the pruned model's drift, {names} at {_span(others)}"
    elif len(others):
        said += ", and no propagation is clearly lowest"
    above = data.groupby(["propagation", "loss"])["ratio"].max().ge(1)
    if above.any():
        return f"{said}; {above.sum()} of {len(above)} combinations are no better than pruned at some block."
    return f"{said}; all are better than pruned at every block."


def _span(rows: pd.DataFrame) -> str:
    low, high = (f"{value:.2f}" for value in (rows["ratio"].min(), rows["ratio"].max()))
    return low if low == high else f"{low} to {high}"


def _cells(records: Sequence[RunRecord]) -> dict[tuple, list[Run]]:
    """Reconstructed runs by granularity, propagation and loss."""
    found = paired.grouped(records, lambda spec: (spec["granularity"], spec["propagation"], spec["loss"]))
    return {key: runs for key, runs in found.items() if key[0] != "none"}
