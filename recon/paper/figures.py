"""One look for every figure, and one way to save it: with its data and where that came from."""

import importlib.metadata
import json
import re
import textwrap
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from recon.errors import ReconError
from recon.runtime import storage
from recon.study import environment
from recon.study.record import RunRecord

PACKAGES = ("recon", "torch", "transformers", "numpy", "pandas", "matplotlib", "seaborn")
_NAME = re.compile(r"[a-z0-9]+(?:[-_.][a-z0-9]+)*")


class Plot(NamedTuple):
    """What `recon.paper.plots` makes of runs."""

    figure: Figure
    data: pd.DataFrame
    """What is drawn, a row per mark."""
    finding: str
    """A sentence computed from the data."""
    drawn: str
    """What is drawn, in words."""


def style() -> None:
    """Sets the look of all figures: colours for colour-blind readers, markers and line styles that survive grey."""
    sns.set_theme(context="paper", style="whitegrid", palette="colorblind")
    colours = sns.color_palette("colorblind").as_hex()
    del colours[7]  # grey is for levels to compare with
    markers = ["o", "s", "^", "D", "v", "P", "X", "*", "h"]
    # Twice as many styles as colours: the second time round, each colour comes with another marker and line.
    colours, markers, lines = colours * 2, markers + markers[4:] + markers[:4], ["-", "--", "-.", ":"] * 4 + ["-", "--"]
    plt.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=colours, linestyle=lines, marker=markers),
            "figure.figsize": (5.5, 3.4),  # inches: the width of a single-column text
            "figure.dpi": 110,
            "savefig.bbox": "tight",
            "pdf.fonttype": 42,  # TrueType, embedded: text in the PDF stays text
        }
    )


def lower_is_better(ax: Axes, axis: str = "y") -> None:
    """Says in the label of `axis` ("x" or "y") that smaller values are better."""
    arrow = {"x": "\N{LEFTWARDS ARROW}", "y": "\N{DOWNWARDS ARROW}"}.get(axis)
    if arrow is None:
        raise ReconError(f"unknown axis {axis!r}; allowed: x, y")
    note = f"(lower is better {arrow})"
    label = getattr(ax, f"get_{axis}label")()
    if note not in label:
        # A long vertical label would stand out above the axes, so there the note gets a line of its own.
        getattr(ax, f"set_{axis}label")(f"{label}{' ' if axis == 'x' else chr(10)}{note}".strip())


def number(value: float) -> str:
    """`value` to three digits, zeros at the end included, so that labels beside one another are of one precision."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def log_scale(ax: Axes, axis: str = "y") -> None:
    """Makes `axis` ("x" or "y") logarithmic, with plain numbers at a few round places; call it once all is drawn."""
    if axis not in ("x", "y"):
        raise ReconError(f"unknown axis {axis!r}; allowed: x, y")
    getattr(ax, f"set_{axis}scale")("log")
    low, high = getattr(ax, f"get_{axis}lim")()
    places = (1, 2, 5) if high > 8 * low else (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)
    ticks = getattr(ax, f"{axis}axis")
    ticks.set_major_locator(LogLocator(subs=places, numticks=20))
    ticks.set_major_formatter("{x:g}")
    ticks.set_minor_formatter(NullFormatter())


def _registry() -> dict[str, dict]:
    """Colour, marker and line style of each thing that figures show. Within a group, marker and line tell things apart in grey."""
    blue, orange, green, purple, gold = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#b8860b"

    def group(colours: Iterable[str], markers: Iterable[str], lines: Iterable[str], names: Iterable[str]) -> dict[str, dict]:
        return {n: {"color": c, "marker": m, "linestyle": line} for n, c, m, line in zip(names, colours, markers, lines)}

    sizes = ["matrix", "half-block", "block", "2-blocks", "4-blocks", "8-blocks", "quarter", "model"]
    ramp = [
        matplotlib.colors.to_hex(matplotlib.colormaps["viridis"](0.85 * index / (len(sizes) - 1))) for index in range(len(sizes))
    ]
    found = group(ramp, "soD^v<>*", ["-"] * len(sizes), sizes)
    # The same window, fitted by or started from an exact solution: its colour, another marker and line.
    found |= {"matrix exact": found["matrix"] | {"marker": "X", "linestyle": ":"}}
    found |= {f"{size} from exact": found[size] | {"marker": "P", "linestyle": ":"} for size in sizes}
    found |= group([orange, green, blue, purple, gold, "0.6"], "vs^DPx", ["--", "-.", "-", ":", "--", ":"],
                   ["magnitude", "wanda", "sparsegpt", "ria", "flap", "random"])  # fmt: skip
    found |= group([blue, orange, green], "os^", ["-", "--", "-."], ["reconstruction", "masklora", "full"])
    others = group(["0.4", "0.55", "0.7"], "DvP", [":", "--", "-."], ["lora", "scalelora", "norms"])
    for name, shown in (others | {name: found[name] for name in ("masklora", "full")}).items():
        found[name] = shown
        # What varies a method is grey and keeps its marker.
        found[f"{name}, distilled"] = shown | {"color": "0.45", "linestyle": ":"}
        found[f"reconstruction, then {name}"] = shown | {"color": "0.15", "linestyle": "-"}
        found[f"dense, {name}"] = shown | {"color": "0.65", "linestyle": (0, (1, 4))}
    found |= group(
        [blue, orange, green], "os^", ["-", "--", "-."], [f"{name} propagation" for name in ("dense", "sparse", "mixed")]
    )
    found |= group([blue, orange, green, purple], "os^D", ["-", "--", "-.", ":"], ["whitened", "mse", "cosine", "relative"])
    found |= group([blue, orange], "os", ["-", "--"], ["smollm2-135m", "gemma3-270m"])
    found |= group(["0.3", "0.3", blue], "Dxo", [":", "--", "-"], ["dense", "pruned", "reconstructed"])
    found |= group([orange, blue], "Xo", ["--", "-"], ["reference", "ours"])  # loops of the benchmark
    found |= group([blue, green, purple], "ov^", ["-", "--", "-."], ["default", "fast", "best"])
    return found


_LOOK = _registry()


def look(name: str) -> dict:
    """Colour, marker and line style of a granularity, criterion, method, loss, model, state, loop or preset, the same in every figure.

    Granularities are a ramp from small (dark) to large (light); of methods, the three main ones are coloured and all else is grey. Of
    propagations the name is "dense propagation" and so on: "dense" is the dense model. A name that is not known, such as that of
    another model, is grey, with a marker and line by its name.
    """
    if name in _LOOK:
        return dict(_LOOK[name])
    index = zlib.crc32(name.encode())
    return {"color": "0.5", "marker": "os^DvPX*h"[index % 9], "linestyle": ["-", "--", "-.", ":"][index // 9 % 4]}


def reference(ax: Axes, value: float, name: str) -> None:
    """A line across `ax` at `value`, of the dense or pruned model, with its name and value at the right end."""
    ax.axhline(value, **look(name) | {"marker": "", "linewidth": 1}, zorder=1)
    note = f"{name} {number(value)}"
    ax.annotate(note, (1, value), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center", fontsize=8)


def styles(names: Iterable[str]) -> dict[str, dict]:
    """A colour, marker and line style for each name, so that it looks the same in every panel."""
    return dict(zip(dict.fromkeys(names), cycle(plt.rcParams["axes.prop_cycle"])))


def savefig(
    fig: Figure,
    name: str,
    folder: Path | str,
    data: pd.DataFrame,
    records: Sequence[Mapping],
    caption: str = "",
    finding: str = "",
    drawn: str = "",
) -> Path:
    """Writes `<name>.pdf`, `.png` (200 dpi), `.csv` and `.json` into `folder`, each file whole or not at all.

    The same figure from the same code gives the same bytes.

    Args:
        data: what is drawn, a row per mark.
        records: the run records behind it. The JSON file holds their "key"s and commits (where they come with their "environment"), the
            texts, the commit of this code and the package versions.
        caption: the protocol.
        finding: a sentence computed from `data`; it becomes the figure's title.
        drawn: what is drawn, in words. After the finding it makes the alternative text, "alt" in the JSON file.

    Returns:
        The path of the PNG.

    Raises:
        ReconError: a name that does not suit a file, empty data, or a record without a key.
    """
    if not _NAME.fullmatch(name):
        allowed = "lower-case letters, digits, and - _ . between them"
        raise ReconError(f"figure name {name!r} does not suit a file; allowed: {allowed}")
    if data.empty:
        raise ReconError(f"figure {name!r} has no data; give the rows that are drawn")
    if keyless := [index for index, record in enumerate(records) if "key" not in record]:
        raise ReconError(f"figure {name!r}: records {keyless} have no 'key'; give the records of the runs")
    if finding:
        title(fig, finding)
    provenance = {
        "name": name,
        "finding": finding,
        "caption": caption,
        "alt": f"{finding} {drawn}".strip(),
        "records": sorted({record["key"] for record in records}),
        "record_commits": sorted({commit for record in records if (commit := record.get("environment", {}).get("git_commit"))}),
        **environment.commit(),
        "packages": _versions(),
    }
    writers: dict[str, Callable[[Path], object]] = {
        "pdf": lambda path: fig.savefig(
            path, format="pdf", metadata={"CreationDate": None}
        ),  # so that drawing again changes nothing
        "png": lambda path: fig.savefig(path, format="png", dpi=200),
        "csv": lambda path: data.to_csv(path, index=False, float_format="%.6g", lineterminator="\n"),
        "json": lambda path: path.write_text(json.dumps(provenance, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"),
    }
    for suffix, write in writers.items():
        with storage.complete(Path(folder) / f"{name}.{suffix}") as path:
            write(path)
    return Path(folder) / f"{name}.png"


def publish(plot: Plot | None, name: str, folder: Path | str, records: Sequence[RunRecord], caption: str) -> None:
    """Saves a plot of `records`, as `savefig` does, and shows it; without a plot, says so."""
    if plot is None:
        print(f"{name}: no runs to draw it from yet")
        return
    origins = [{"key": record.key, "environment": record.environment} for record in records]
    savefig(plot.figure, name, folder, plot.data, origins, caption, plot.finding, plot.drawn)
    show(caption)


def title(fig: Figure, finding: str) -> None:
    """Writes `finding` above all that is drawn, in lines as wide as that."""
    fig.suptitle("")
    fig.draw_without_rendering()  # puts everything in its place, where it stays
    fig.set_layout_engine("none")
    box, (width, height) = fig.get_tightbbox(fig.canvas.get_renderer()), fig.get_size_inches()
    lines = textwrap.wrap(finding, max(30, int(11.5 * box.width)))  # characters of this size to an inch
    place = {"x": box.x0 / width, "y": (box.y1 + 0.1) / height, "ha": "left", "va": "bottom"}
    fig.suptitle("\n".join(lines), **place, fontsize=10, fontweight="bold")


def sentence(words: str) -> str:
    """`words` with a capital letter first, as in the middle of a caption."""
    return words[:1].upper() + words[1:]


def show(caption: str = "") -> None:
    """Shows the figure of a notebook's cell, and under it what `savefig` was told of it."""
    from IPython.display import HTML, display  # comes with notebooks, not with the library

    plt.show()
    if caption:
        display(HTML(f"<p><small>{escape(caption)}</small></p>"))


def _versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # the library also runs from a checkout that is not installed
    return installed
