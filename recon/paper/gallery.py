"""The page that shows every figure of a folder, and which notebook each comes from."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from recon.paper.profiles import ROOT

# Notebook -> its figures, in the order in which the page shows them; then those about engineering, for its appendix.
SCIENCE = {
    "0-quickstart": ("method", "quickstart-perplexity", "quickstart-error"),
    "1-granularity": ("granularity", "granularity-difference", "granularity-all"),
    "2-sample-efficiency": ("sample-efficiency", "sample-efficiency-pareto", "learning-rates"),
    "3-criterion-convergence": ("criteria", "criteria-gap"),
    "4-propagation-and-loss": ("propagation", "propagation-drift"),
    "5-what-reviewers-asked": ("asked", "loss-curves", "costs", "error-accumulation"),
}
ENGINEERING = {
    "6-cost": ("cost-phases", "cost-operations", "recipes"),
    "7-scale": ("scaling",),
}
NOTEBOOKS = {figure: notebook for group in (SCIENCE, ENGINEERING) for notebook, figures in group.items() for figure in figures}
APPENDIX = {figure for figures in ENGINEERING.values() for figure in figures}
FOREST = "claims"
"""The figure of all verdicts, drawn from records alone; it comes first."""


def saved(folder: Path | str) -> list[dict]:
    """The provenance of each figure in `folder`, in the order of the page: JSON files of `savefig` that have their PNG beside them."""
    pairs = [(path, path.with_name(f"{path.stem}.png")) for path in sorted(Path(folder).glob("*.json"))]
    found = [json.loads(path.read_text(encoding="utf-8")) for path, picture in pairs if picture.is_file()]
    order = {name: place for place, name in enumerate([FOREST, *NOTEBOOKS])}
    return sorted(found, key=lambda figure: order.get(figure["name"], len(order)))


def heading(figure: Mapping) -> str:
    """What a figure found; its name where it does not say."""
    return figure.get("finding") or figure["name"]


def origin(figure: Mapping) -> str:
    """How many records a figure was drawn from, and of which commits; where it does not say, the commit of the code that drew it."""
    count, made_by = len(figure["records"]), figure.get("record_commits", [])
    said = f"{count} record{'s' * (count != 1)}"
    if made_by:
        return f"{said} of commit{'s' * (len(made_by) != 1)} {', '.join(f'`{commit[:10]}`' for commit in made_by)}"
    return f"{said}, drawn at commit `{figure['git_commit'][:10]}`" if figure["git_commit"] else said


def write(
    folder: Path | str,
    claims: str = "",
    missing: Mapping[str, Sequence[str]] = {},
    profile: str = "laptop",
    root: Path | str = ROOT,
) -> Path:
    """Writes `folder`/README.md: verdicts, tables, every figure with its finding, caption and links, and last those about engineering.

    claims: the verdicts. missing: names of figures that are not there, by why. profile, root: what made them, and of which checkout.
    """
    folder = Path(folder)
    up = Path(os.path.relpath(root, folder)).as_posix()
    figures = saved(folder)
    parts = [
        "# Gallery",
        "",
        "Every figure with what it shows, the notebook and command that draw it, its data, and the records behind it. Written by",
        "`recon.paper.gallery`.",
        "",
        "Captions say how runs were made: 32 x 256 tokens are 32 samples, or evaluation windows, of 256 tokens. Whole samples are not cut into",
        "chunks. Perplexity is exp of the mean negative log-likelihood over all but the first token of each window. The damage is",
        "log(perplexity pruned / dense).",
    ]
    first = [line for figure in figures if figure["name"] == FOREST for line in _shown(figure, profile, up)]
    if claims or first:
        parts += ["", "## The paper's claims on this data", *first]
        parts += ["", claims.strip(), "", "How each was judged: [claims.md](claims.md)."] if claims else []
    if tables := sorted((folder / "tables").glob("*.md"), key=lambda path: (path.stem.startswith("appendix"), path.stem)):
        parts += ["", "## Tables", *(line for path in tables for line in ("", _lowered(path.read_text(encoding="utf-8"))))]
    science = [figure for figure in figures if figure["name"] not in APPENDIX | {FOREST}]
    engineering = [figure for figure in figures if figure["name"] in APPENDIX]
    for title, group in (("Figures", science), ("Appendix: time, memory and scale", engineering)):
        if group:
            parts += ["", f"## {title}", *(line for figure in group for line in _shown(figure, profile, up))]
    if missing:
        parts += ["", "## Missing", ""]
        parts += [f"- {', '.join(f'`{name}`' for name in names)}: {why}" for why, names in missing.items()]
    page = folder / "README.md"
    page.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return page


def _shown(figure: Mapping, profile: str, up: str) -> list[str]:
    """A figure as lines of the page; `up` leads from there to the checkout."""
    name, caption, notebook = figure["name"], figure["caption"], NOTEBOOKS.get(figure["name"])
    links = []
    if notebook:
        links += [f"[notebook {notebook}]({up}/notebooks/{notebook}.ipynb)"]
    if notebook or name == FOREST:
        words = f"{profile} {notebook}" if notebook else f"figures {profile}"
        links += [f"[`./run_all.sh {words}`]({up}/run_all.sh)"]
    links += [f"[data]({name}.csv)", f"[{origin(figure)}]({name}.json)", f"[PDF]({name}.pdf)"]
    return [
        "", f"### {heading(figure)}",
        "", f"![{_plain(figure.get('alt') or caption or name)}]({name}.png)",
        *(["", caption] if caption else []),
        "", " · ".join(links),
    ]  # fmt: skip


def _lowered(text: str) -> str:
    """A page as a section of another: its headings two levels down."""
    return re.sub(r"^(#+ )", r"##\1", text.strip(), flags=re.MULTILINE)


def _plain(text: str) -> str:
    """`text` on one line and without brackets, for the alternative text of a Markdown image."""
    return " ".join(text.replace("[", "(").replace("]", ")").split())
