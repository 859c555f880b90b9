"""How far it scales: predictions held against the clock, and carried on to many GPUs."""

import matplotlib.pyplot as plt
import pandas as pd

from recon.paper.figures import Plot, log_scale

STYLES = {"study": {"color": "C0", "marker": "o"}, "windows": {"color": "C1", "marker": "s"}}


def check(data: pd.DataFrame) -> Plot:
    """Predicted against measured seconds; open: what the prediction was made from.

    data: a row for each measurement: what ("study", "windows"), workers, measured, predicted, calibrates, error (of the prediction, as a share).
    """
    fig, ax = plt.subplots(figsize=(4.6, 3.8))
    ends = data[["measured", "predicted"]].to_numpy()
    ends = [ends.min() / 2, 2 * ends.max()]
    ax.plot(ends, ends, color="0.6", linestyle=":", marker="", linewidth=1)
    for (what, calibrates), cell in data.groupby(["what", "calibrates"]):
        style = STYLES[what] | {"linestyle": "", "fillstyle": "none" if calibrates else "full"}
        ax.plot(cell["measured"], cell["predicted"], label=what + " (calibrates)" * calibrates, **style)
        for _, row in cell.iterrows():
            words = f"{row['workers']} worker{'s' * (row['workers'] > 1)}"
            place = ((6, -8), "left") if calibrates else ((-6, 4), "right")  # where the labels of neighbours are not
            ax.annotate(words, (row["measured"], row["predicted"]), place[0], ha=place[1], textcoords="offset points", fontsize=7)
    log_scale(ax, "x")
    log_scale(ax, "y")
    ax.set_xlabel("measured, s")
    ax.set_ylabel("predicted, s")
    ax.legend(fontsize=7, loc="lower right", labelspacing=0.3)
    drawn = "Predicted against measured seconds, a mark for each number of workers; dotted, where both are the same."
    return Plot(fig, data, _errors(data[~data["calibrates"]]), drawn)


def _errors(data: pd.DataFrame) -> str:
    """How far the prediction for the most workers is from the clock."""
    if data.empty:
        return "Measured with one worker alone, which calibrates: no prediction can be checked."
    most = data[data["workers"] == data["workers"].max()]
    each = [f"{abs(row.error):.0%} too {'short' if row.error < 0 else 'long'} for the {row.what}" for row in most.itertuples()]
    return f"With {most['workers'].iloc[0]} workers, the predicted time is {' and '.join(each)}.".replace("%", " %")


def carried_on(data: pd.DataFrame) -> Plot:
    """Predicted hours against GPUs, a line for each thing to do, each point marked by its bottleneck.

    data: a row for each point: what, GPUs, hours, bottleneck.
    """
    fig, ax = plt.subplots(figsize=(6.4, 4.0))
    marks = dict(zip(data["bottleneck"].unique(), "osDv^P"))
    for number, (what, line) in enumerate(data.groupby("what", sort=False)):
        ax.plot(line["GPUs"], line["hours"], color=f"C{number}", marker="", linewidth=1, label=what)
        for bottleneck, cell in line.groupby("bottleneck"):
            ax.plot(cell["GPUs"], cell["hours"], color=f"C{number}", linestyle="", marker=marks[bottleneck])
    for bottleneck, mark in marks.items():
        ax.plot([], [], color="0.4", linestyle="", marker=mark, label=f"bottleneck: {bottleneck}")
    ax.set_xscale("log", base=2)
    counts = sorted(set(data["GPUs"]))
    ax.set_xticks(counts, counts)
    log_scale(ax)
    ax.set_xlabel("GPUs")
    ax.set_ylabel("hours (predicted)")
    ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    return Plot(fig, data, _enough(data), "A line of hours against GPUs for each thing to do; marks say what the bottleneck is.")


def _enough(data: pd.DataFrame) -> str:
    """Up to how many GPUs each thing to do gets faster, by more than 1 % in all beyond."""
    each = [
        f"{line.loc[line['hours'] <= 1.01 * line['hours'].min(), 'GPUs'].min()} for {what}"
        for what, line in data.groupby("what", sort=False)
    ]
    return f"Predicted, not measured: with more GPUs, time falls up to {', '.join(each)}."
