"""One look for all figures, one way to save a figure with its data and origin, and the page of all figures of a profile."""

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping
from html import escape
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import seaborn as sns
from IPython import get_ipython
from IPython.display import HTML, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

ROOT = Path(__file__).resolve().parents[2]
PROFILES = {  # name -> folders of figures and of records
    "quick": ("build/quick/figures", "build/quick/records"),
    "laptop": ("figures", "results/laptop"),
    "paper": ("figures/paper", "results/paper"),
}
OLDER_WORDS = "**Older protocol**: other windows of text, or another precision, than those of today; to be made anew."
# Groups of names that are drawn together, in the order in which they get colours, markers and line styles.
_BLUE, _ORANGE, _GREEN, _PURPLE, _GOLD = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#b8860b"
_SIZES = ["matrix", "half-block", "block", "2-blocks", "4-blocks", "8-blocks", "quarter", "model"]
_RAMP = [matplotlib.colors.to_hex(matplotlib.colormaps["viridis"](0.92 * (place / 7) ** 0.7)) for place in range(8)]
_GROUPS = [
    (_SIZES, _RAMP),
    (
        ["sparsegpt", "magnitude", "wanda", "ria", "admm", "flap", "random"],
        [_BLUE, _ORANGE, _GREEN, _PURPLE, "0.2", _GOLD, "0.6"],
    ),
    (["reconstruction", "masklora", "full", "lora", "scalelora", "norms"], [_BLUE, _ORANGE, _GREEN, "0.4", "0.55", "0.7"]),
    (["dense propagation", "sparse propagation", "mixed propagation"], [_BLUE, _ORANGE, _GREEN]),
    (["whitened", "mse", "cosine"], [_BLUE, _ORANGE, _GREEN]),
    (["smollm2-135m", "gemma3-270m"], [_BLUE, _ORANGE]),
    (["reconstructed", "pruned", "dense"], [_BLUE, "0.3", "0.3"]),
    (["ours", "reference"], [_BLUE, _ORANGE]),  # loops of `recon bench`
]
_MARKERS, _LINES = "os^DvP*h", ["-", "--", "-.", ":"]
_LOOK = {
    name: {"color": colour, "marker": _MARKERS[place], "linestyle": _LINES[place % 4]}
    for names, colours in _GROUPS
    for place, (name, colour) in enumerate(zip(names, colours))
}


class MissingRecords(Exception):
    """Raised by a notebook that has too few finished runs to draw from."""

    def __init__(self, profile: str, notebook: str):
        super().__init__(f"too few records: run ./run_all.sh {profile} {notebook}")


def folders(profile: str, output: Path | str = "") -> tuple[Path, Path]:
    """(figures, records): the folders of `profile`, or those inside `output`, which is relative to the checkout."""
    figures, records = (f"{output}/figures", f"{output}/records") if output else PROFILES[profile]
    return ROOT / figures, ROOT / records


def start(profile: str, output: Path | str = "") -> tuple[Path, Path]:
    """Begins a notebook: prints what the library logs, sets the look of figures, and returns `folders`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("recon").setLevel(logging.INFO)
    style()
    return folders(profile, output)


def style() -> None:
    """Sets the look of all figures: colours for colour-blind readers, text in PDFs that stays text."""
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it warns about the dates of fonts
    sns.set_theme(context="paper", style="whitegrid", palette="colorblind")
    plt.rcParams |= {"figure.figsize": (5.5, 3.4), "figure.dpi": 110, "savefig.bbox": "tight", "pdf.fonttype": 42}


def look(name: str) -> dict:
    """Colour, marker and line style of a granularity, criterion, method, loss, model, state or loop, the same in every figure.

    Names that end in "exact", "equal steps" or "paper's recipe" have another marker. "<propagation>, <loss>" has the
    propagation's colour and the loss's marker. Variants of a method ("..., distilled", "reconstruction, then ...",
    "dense, ...") are grey and keep its marker. Other names are grey, with a marker chosen by name.
    """
    fed, _, loss = name.partition(", ")
    if f"{fed} propagation" in _LOOK and loss in _LOOK:
        return look(f"{fed} propagation") | {"marker": look(loss)["marker"]}
    base = re.sub(r"( from)? exact$|, distilled$|, paper's recipe$|, equal steps$|^dense, |^reconstruction, then ", "", name)
    digest = zlib.crc32(base.encode())
    shown = _LOOK.get(base, {"color": "0.5", "marker": _MARKERS[digest % 8], "linestyle": _LINES[digest // 8 % 4]})
    if base == name:
        return dict(shown)
    if name.endswith(("recipe", "steps")):
        return shown | {"marker": "X", "linestyle": ":"}
    if name.endswith("exact"):
        return shown | {"marker": "P", "linestyle": ":"}
    return shown | {"color": "0.15" if "then" in name else "0.45" if "distilled" in name else "0.65", "linestyle": ":"}


def looks(names: Iterable[str]) -> dict:
    """The looks of `names` for seaborn: the arguments `palette` and `markers` of a plot whose hue and style are `names`."""
    names = list(dict.fromkeys(names))
    return {part: {name: look(name)[key] for name in names} for part, key in (("palette", "color"), ("markers", "marker"))}


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """Each name's colour in `look`, without "after", "pruned" or "reconstructed"; unknown names take other colours in turn."""
    turn = iter(sns.color_palette("colorblind").as_hex())
    bases = {name: re.sub("^after | (pruned|reconstructed)$", "", name) for name in names}
    return {name: _LOOK[base]["color"] if base in _LOOK else next(turn) for name, base in bases.items()}


def lower_is_better(ax: Axes, axis: str = "y") -> None:
    """Says in the label of `axis` ("x" or "y") that smaller values are better."""
    label, note = getattr(ax, f"get_{axis}label")(), f"(lower is better {'←' if axis == 'x' else '↓'})"
    getattr(ax, f"set_{axis}label")(f"{label}{' ' if axis == 'x' else chr(10)}{note}".strip())


def log_scale(ax: Axes, axis: str = "y") -> None:
    """Makes `axis` ("x" or "y") logarithmic, with plain numbers at a few round places; call it once all is drawn."""
    getattr(ax, f"set_{axis}scale")("log")
    low, high = getattr(ax, f"get_{axis}lim")()
    places = (1,) if high > 1e4 * low else (1, 2, 5) if high > 8 * low else (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)
    ticks = getattr(ax, f"{axis}axis")
    ticks.set_major_locator(LogLocator(subs=places, numticks=20))
    ticks.set_major_formatter("{x:g}")
    ticks.set_minor_formatter(NullFormatter())


def number(value: float) -> str:
    """`value` to three significant digits (more from 1000 on), trailing zeros included, so that labels have one precision."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def publish(
    figure: Figure, name: str, folder: Path, data: pd.DataFrame, caption: str, keys: Iterable[str], finding: str = ""
) -> None:
    """Writes `<name>.pdf`, `.png`, `.csv` and `.json` into `folder`, and shows the figure with its caption.

    Args:
        data: what is drawn, a row per mark.
        caption: how the runs were made and measured, and what the figure shows.
        keys: of the run records behind it; the JSON file holds them with caption, finding and the commit of this code.
        finding: a sentence computed from `data`; it becomes the figure's title.
    """
    if finding := re.sub(r"(?<![\w.])-(?=\d)", "−", finding):
        _title(figure, finding)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})  # so that drawing again changes nothing
    figure.savefig(folder / f"{name}.png", dpi=200)
    data.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g", lineterminator="\n")
    origin = {"name": name, "finding": finding, "caption": caption, "records": sorted(set(keys)), "commit": commit()}
    (folder / f"{name}.json").write_text(json.dumps(origin, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if get_ipython():  # in a notebook
        plt.show()
        display(HTML(f"<p><small>{escape(caption)}</small></p>"))
    plt.close(figure)
    print(os.path.relpath(folder / f"{name}.png", ROOT))


def _title(figure: Figure, finding: str) -> None:
    """Writes `finding` above everything drawn, wrapped to its width."""
    figure.draw_without_rendering()  # lays everything out; then the layout stays
    figure.set_layout_engine("none")
    box, (width, height) = figure.get_tightbbox(figure.canvas.get_renderer()), figure.get_size_inches()
    lines = textwrap.wrap(finding, max(30, int(11.5 * box.width)))  # 11.5 characters to an inch
    place = {"x": box.x0 / width, "y": (box.y1 + 0.1) / height, "ha": "left", "va": "bottom"}
    figure.suptitle("\n".join(lines), **place, fontsize=10, fontweight="bold")


def commit() -> str:
    """The commit of this checkout, with "-dirty" if code differs from it; empty outside a repository or without git."""

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    return git("rev-parse", "HEAD") + "-dirty" * bool(git("status", "--porcelain", "--", "recon", "notebooks"))


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name for a file or folder. At the end it becomes `path`, whole or not at all; an existing folder stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as around:
        yield (fresh := Path(around) / path.name)
        if not path.is_dir():  # no other process was faster
            os.replace(fresh, path)


def notebooks() -> list[Path]:
    """The notebooks of this checkout, in their order."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"), key=lambda path: int(path.stem.partition("-")[0]))


def drawn(notebook: Path) -> list[str]:
    """The names of the figures that a notebook publishes, in their order."""
    return published("\n".join(cell.source for cell in nbformat.read(notebook, as_version=4).cells))


def published(code: str) -> list[str]:
    """The names of the figures that `code` publishes, in their order."""
    return re.findall(r'publish\(\s*[\w.]+,\s*"([\w-]+)"', code)


def gallery(
    profile: str, claims: str = "", folder: Path | None = None, tables: Mapping[str, str] = {}, older: Container[str] = ()
) -> str:
    """The page of all figures in the figure folder of `profile`.

    claims: their summary. tables: texts by file name, which add to the folder's or replace them. older: keys of older runs.
    """
    folder = folder or folders(profile)[0]
    up = Path(os.path.relpath(ROOT, folder)).as_posix()
    page = ["# Gallery", "Every figure with what it shows, its data, and the runs behind it. Written by `companion.publish`."]
    if (folder / "claims.png").exists():
        page += ["## The paper's claims", *_entry(folder, "claims", f"`./run_all.sh figures {profile}` · ")]
    page += [claims] if claims else []
    found = {path.name: path.read_text("utf-8") for path in (folder / "tables").glob("*.md")} | dict(tables)
    order = sorted((name for name in found if name.endswith(".md")), key=lambda name: (name.startswith("appendix"), name))
    page += ["## Tables"] * bool(order)
    page += [re.sub(r"^#", "###", found[name].strip(), flags=re.M) for name in order]
    missing: list[str] = []
    for notebook in notebooks():
        names = drawn(notebook)
        there = [name for name in names if (folder / f"{name}.json").exists()]
        gone = ", ".join(name for name in names if name not in there)
        missing += [f"- {gone} ({notebook.stem})"] * bool(gone)
        made = f"[Notebook]({up}/notebooks/{notebook.name}), `./run_all.sh {profile} {notebook.stem}`"
        heading = nbformat.read(notebook, as_version=4).cells[0].source.splitlines()[0].lstrip("# ")
        page += [f"## {heading}", made] * bool(there)
        for name in there:
            page += [f"### {name.replace('-', ' ').capitalize()}", *_entry(folder, name, older=older)]
    page += ["## Not drawn yet", "\n".join(missing)] * bool(missing)
    return "\n\n".join(page) + "\n"


def _entry(folder: Path, name: str, before: str = "", older: Container[str] = ()) -> list[str]:
    """A figure as paragraphs of the gallery; before: text before its links."""
    figure, picture = image(folder, name)
    caption = figure["caption"] + f" {OLDER_WORDS}" * any(key in older for key in figure["records"])
    count = len(figure["records"])
    links = f"[data]({name}.csv) · [{count} record{'s' * (count != 1)}]({name}.json) · [PDF]({name}.pdf)"
    return [figure["finding"], picture, caption, before + links]


def image(folder: Path, name: str) -> tuple[dict, str]:
    """The JSON data of a published figure, and Markdown that shows it on a page in the same folder."""
    about = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    words = (about["finding"] or about["caption"]).replace("[", "(").replace("]", ")")
    return about, f"![{words}]({name}.png)"
