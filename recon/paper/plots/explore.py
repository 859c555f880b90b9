"""Any measure of the records against any of their options or costs."""

import io
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd

from recon.paper.figures import Plot, log_scale, look, lower_is_better, number, styles
from recon.paper.runs import Run, protocol_words, short
from recon.paper.tables import FITS
from recon.study import studies
from recon.study.record import RunRecord

MEASURES = {"perplexity": "perplexity", "KL to dense": "kl", "share of the damage recovered": "share_recovered"}
OPTIONS = {
    "window": "fit",
    "criterion": "criterion",
    "propagation": "propagation",
    "loss": "loss",
    "adapter": "adapter",
    "recipe": "recipe",
    "text": "text",
}
FITTING = ["window", "propagation", "loss", "adapter"]  # what matters where windows are reconstructed
SUFFIXES = {"propagation": " propagation", "adapter": " adapter", "samples": " samples"}  # of values, in names
BEST = {"share of the damage recovered": "highest"}
RATES = ("learning_rate", "retrain_learning_rate")
MEASURED = ("TFLOP", "memory added, GiB", "seconds")  # what a run takes
AXES = (*OPTIONS, "samples", *MEASURED)


def read(records: Sequence[RunRecord]) -> pd.DataFrame:
    """A row for each finished run: model, pattern, seed, protocol, what it is asked for (`OPTIONS`, samples), its `MEASURES`, and what it takes.

    Options of reconstruction are "none" where there is none. Of runs that differ in their learning rates alone, the one that is best on held-out text.
    """
    done = [record for record in records if record.status == "done"]
    runs, data = list(map(Run, done)), studies.frame(done)
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.model, run.protocol, run.windows), []).append(run)
    words = {key: protocol_words(group) for key, group in groups.items()}
    found = pd.DataFrame(
        {"key": data["key"], "model": [short(run.model) for run in runs], "pattern": data["pattern"], "seed": data["seed"]}
        | {"protocol": [words[run.model, run.protocol, run.windows] for run in runs]}
        | {name: data[column].map(str) for name, column in OPTIONS.items()}
        | {name: data.get(column) for name, column in MEASURES.items()}
    )
    found.loc[found["window"] == "none", FITTING] = "none"
    phases = ("reconstruct", "retrain")
    found["tokens"] = data["sequence_length"]
    found["samples"] = [run.trained_samples for run in runs]
    for name, column, unit in (("TFLOP", "flops", 1e12), ("seconds", "seconds", 1)):
        found[name] = sum(data.get(f"{column}_{phase}", pd.Series(0.0, data.index)).fillna(0) for phase in phases) / unit
    memory = [data.get(f"added_memory_bytes_{phase}", pd.Series(float("nan"), data.index)) for phase in phases]
    found["memory added, GiB"] = pd.concat(memory, axis=1).max(axis=1) / 2**30
    alike = [str([item for item in sorted(record.spec.items()) if item[0] not in RATES]) for record in done]
    best = data.get("held_out_perplexity", data["seed"]).groupby(alike).rank("first", na_option="bottom")
    return found[best == 1]


def choices(runs: pd.DataFrame) -> dict[str, list[str]]:
    """What can be chosen: values of each argument of `view`, those with the most runs first."""
    most = {name: list(runs[name].value_counts().index) for name in ("model", "pattern")}
    return most | {"measure": list(MEASURES), "x": list(AXES)}


def view(runs: pd.DataFrame, model: str, pattern: str, measure: str, x: str) -> Plot:
    """`measure` against `x`: small marks are runs, large ones means over seeds; what else varies has a marker of its own.

    Of several protocols, the one with the most runs: others cannot be compared with it.
    """
    chosen = runs[(runs["model"] == model) & (runs["pattern"] == pattern)].dropna(subset=[measure, x])
    fig, ax = plt.subplots(figsize=(7, 4))
    ax.set_xlabel(x)
    ax.set_ylabel(measure)
    if chosen.empty:
        return Plot(fig, chosen, f"No runs of {model} at {pattern} have {measure} and {x}.", "Empty axes.")
    data = chosen[chosen["protocol"] == chosen["protocol"].mode()[0]].copy()
    varying = _varying(data, x)
    data["series"] = [_name(row, varying) for row in data.to_dict("records")]
    names = [name for name in _order(data[x]) if name in set(data[x])] if x in OPTIONS else []
    data["at"] = data[x].map({name: place for place, name in enumerate(names)}) if names else data[x].astype(float)
    shown = _styles(data, varying)
    if x not in MEASURED:
        shift = _shifts(data["at"], data["series"].map({name: rank for rank, name in enumerate(shown)}))
        data["at"] = data["at"] + min(0.05, 0.6 / len(shown)) * shift if names else data["at"] * 1.03**shift
    for name, style in shown.items():
        group = data[data["series"] == name]
        by = "series" if x in MEASURED else x  # costs differ from run to run
        means = group.groupby(by, sort=False)[[measure, "at"]].mean().sort_values("at")
        ax.plot(group["at"], group[measure], **style | {"linestyle": "", "markersize": 3, "alpha": 0.6})
        lines = {} if x == "samples" else {"linestyle": ""}
        ax.plot(means["at"], means[measure], **style | {"markersize": 6, "label": name} | lines)
    if names:
        ax.set_xticks(range(len(names)), names)
        if len(names) > 4:  # slanted, each with its end below its mark
            plt.setp(ax.get_xticklabels(), rotation=20, ha="right", rotation_mode="anchor")
        ax.margins(x=0.1)
    elif (data["at"] > 0).all():
        log_scale(ax, "x")
    if x == "samples":
        ax.set_xticks(sorted(set(data["samples"])))
        ax.set_xlabel(f"samples of {' or '.join(map(str, sorted(set(data['tokens']))))} tokens")
    if measure not in BEST:
        log_scale(ax)
        lower_is_better(ax)
    fig.tight_layout()
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return Plot(fig, data.drop(columns="at"), _said(data, measure, x, len(chosen)), "Marks for runs and for means over seeds.")


def explorer(runs: pd.DataFrame) -> ipywidgets.VBox:
    """Menus of `choices`, and below them the view that they choose, with what is found in it.

    The view is a picture, not an output area as `ipywidgets.interact` makes: with that, a notebook that is executed by a program
    sometimes never ended.
    """
    menus = {name: ipywidgets.Dropdown(options=values, description=name) for name, values in choices(runs).items()}
    picture, words = ipywidgets.Image(layout={"max_width": "100%", "align_self": "flex-start"}), ipywidgets.HTML()

    def draw(_=None) -> None:
        """Shows what is chosen now."""
        plot, png = view(runs, **{name: menu.value for name, menu in menus.items()}), io.BytesIO()
        plot.figure.savefig(png, format="png", bbox_inches="tight", dpi=100)
        plt.close(plot.figure)
        picture.value = png.getvalue()
        words.value = "<br>".join(map(escape, [plot.finding, *plot.data["protocol"].head(1)]))

    for menu in menus.values():
        menu.observe(draw, "value")
    draw()
    return ipywidgets.VBox([*menus.values(), picture, words])


def _order(values: pd.Series) -> list[str]:
    """Windows by size, everything else in the order in which it comes."""
    sizes = ["none", *FITS]
    return [*(size for size in sizes if size in set(values)), *(value for value in dict.fromkeys(values) if value not in sizes)]


def _varying(data: pd.DataFrame, x: str) -> list[str]:
    """What differs between runs beside `x`, the recipe first: it says which runs have no windows, whose options then do not count."""
    fitted, found = data["window"] != "none", []
    for name in ("recipe", *OPTIONS, "samples"):
        values = data.loc[fitted, name] if name in FITTING else data[name]
        if name not in (x, *found) and values.nunique() > 1:
            found.append(name)
    return found


def _name(run: Mapping, varying: Sequence[str]) -> str:
    """The recipe of a run, if it varies, and in brackets what else does."""
    words = [f"{run[name]}{SUFFIXES.get(name, '')}" for name in varying if name != "recipe" and run[name] != "none"]
    said = ", ".join(words)
    if "recipe" in varying and said:
        return f"{run['recipe']} ({said})"
    return said or run["recipe"]


def _styles(data: pd.DataFrame, varying: Sequence[str]) -> dict[str, dict]:
    """The look of each series: of its recipe where these vary, and of what else a recipe was run with the colour, with other marks."""
    series = data.groupby(["recipe", "series"]).size().sort_values(ascending=False, kind="stable")
    names = list(dict.fromkeys(series.index.get_level_values("series")))
    if varying and "recipe" not in varying:
        return {name: look(name) for name in names} if len(varying) == 1 else styles(names)
    found, markers = {}, dict.fromkeys(each["marker"] for each in plt.rcParams["axes.prop_cycle"])
    for recipe, group in series.groupby(level="recipe", sort=False):
        main, *others = group.index.get_level_values("series")
        found[main] = look(recipe)
        colour, own = found[main]["color"], found[main]["marker"]
        marks = [(marker, face) for face in ("white", colour) for marker in markers if marker != own]
        for name, (marker, face) in zip(others, cycle(marks)):
            found[name] = found[main] | {"marker": marker, "markerfacecolor": face}
    return found


def _shifts(at: pd.Series, rank: pd.Series) -> pd.Series:
    """How many steps each mark moves so that series, by their `rank`, stand beside one another at each place."""
    return rank.groupby(at).transform(lambda ranks: ranks.rank(method="dense") - (ranks.nunique() + 1) / 2)


def _said(data: pd.DataFrame, measure: str, x: str, count: int) -> str:
    """Which runs are best on average over what they share."""
    means = data.groupby(["series"] if x in MEASURED else ["series", x], sort=False)[measure].mean()
    best = means.idxmax() if measure in BEST else means.idxmin()
    series, *value = [best] if x in MEASURED else best
    words = [f"of {series}"] if data["series"].nunique() > 1 or not value else []
    words += [f"on {place} samples" if x == "samples" else f"with {x} {place}" for place in value]
    left_out = f" {count - len(data)} runs of other protocols are left out." if count > len(data) else ""
    return f"Of {len(data)} runs, those {' '.join(words)} have the {BEST.get(measure, 'lowest')} mean {measure}: {number(means[best])}.{left_out}"
