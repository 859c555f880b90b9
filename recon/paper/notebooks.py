"""Runs the notebooks under a profile and renders them: `python -m recon.paper.notebooks quick`.

Notebooks are found by glob and are independent of one another: one that fails is recorded, and the others go on.
Executed copies, HTML pages and an index go to build/<profile>/; what the notebooks write goes to `output_folders`.
"""

import argparse
import base64
import contextlib
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

import nbformat
import papermill
import yaml
from nbconvert import HTMLExporter

from recon.errors import ReconError
from recon.experiment import cluster
from recon.experiment.estimate import duration
from recon.paper import claims, figures
from recon.runtime import lock

ROOT = Path(__file__).resolve().parents[2]
PROFILES = ("quick", "laptop", "paper")
_QUIET = "--IPKernelApp.log_level=ERROR"  # kernels warn that they speak TCP, which stays within the machine
_WIDGET = "application/vnd.jupyter.widget-view+json"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Notebooks, profile {profile}</title>
<style>
body {{ font: 1rem/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; }}
main {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
a {{ color: #0550ae; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .6rem .8rem .6rem 0; border-bottom: 1px solid #ccc; }}
tbody th {{ font-weight: normal; }}
td {{ white-space: nowrap; }}
th p {{ margin: 0; font-size: .85rem; color: #555; overflow-wrap: anywhere; }}
th p.error {{ color: #a40e26; font-family: ui-monospace, monospace; }}
.finished::before {{ content: "\\2713  "; color: #116329; }}
.failed, .stopped {{ color: #a40e26; font-weight: 600; }}
.failed::before, .stopped::before {{ content: "\\2717  "; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.5rem; }}
figure {{ margin: 0; }}
figcaption {{ font-size: .9rem; }}
figcaption span {{ position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }}
img {{ width: 100%; border: 1px solid #ccc; }}
</style>
</head>
<body>
<main>
<h1>Notebooks, profile {profile}</h1>
<table>
<thead><tr><th scope="col">Notebook</th><th scope="col">Status</th><th scope="col">Time</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
{gallery}
</main>
</body>
</html>
"""


@dataclass(frozen=True)
class Outcome:
    """How one notebook went: `status` is "finished", "failed" or "stopped" (by the user); `error` is one line."""

    name: str
    title: str
    status: str
    seconds: float
    error: str = ""


def output_folders(profile: str, root: Path | str = ROOT) -> tuple[Path, Path]:
    """Where the notebooks of `profile` write: (figures, records). Raises `ReconError` for an unknown profile."""
    root = Path(root)
    folders = {
        "quick": (root / "build/quick/figures", root / "build/quick/records"),
        "laptop": (root / "figures", root / "results/laptop"),
        "paper": (root / "figures/paper", root / "results/paper"),
    }
    if profile not in folders:
        raise ReconError(f"unknown profile {profile!r}; allowed: {', '.join(PROFILES)}")
    return folders[profile]


def check_output(folder: Path | str, profile: str, root: Path | str = ROOT) -> Path:
    """`folder` as an absolute path; raises `ReconError` if it lies inside the folders of another profile."""
    output_folders(profile, root)
    path = Path(folder).resolve()
    owners = {owned.resolve(): other for other in PROFILES for owned in output_folders(other, root)}
    # figures/paper lies inside figures: the innermost folder tells whose it is.
    owner = next((owners[parent] for parent in (path, *path.parents) if parent in owners), profile)
    if owner != profile:
        raise ReconError(f"output folder {str(folder)!r} belongs to profile {owner!r}, not {profile!r}; give another")
    return path


def folders(profile: str, output: Path | str = "", root: Path | str = ROOT) -> tuple[Path, Path]:
    """Where a notebook writes: (figures, records) inside `output` (relative to `root`); empty: those of `profile`.

    Raises `ReconError` for an unknown profile, and for an `output` inside the folders of another profile.
    """
    if not output:
        return output_folders(profile, root)
    chosen = Path(root) / output
    return check_output(chosen / "figures", profile, root), check_output(chosen / "records", profile, root)


def find_notebooks(names: Sequence[str] | None = None, root: Path | str = ROOT) -> list[Path]:
    """The notebooks in root/notebooks, by name: those called `names` (with or without .ipynb), or all.

    Raises `ReconError` if there are none, or none of a given name.
    """
    folder = Path(root) / "notebooks"
    found = {path.stem: path for path in sorted(folder.glob("*.ipynb"))}
    if not found:
        raise ReconError(f"no notebooks (*.ipynb) in {str(folder)!r}")
    wanted = {Path(name).name.removesuffix(".ipynb"): name for name in names or found}
    if unknown := [given for stem, given in wanted.items() if stem not in found]:
        raise ReconError(f"unknown notebook {unknown[0]!r}; known: {', '.join(found)}")
    return [path for stem, path in found.items() if stem in wanted]


def profile_parameters(profile: str, root: Path | str = ROOT) -> dict[str, dict]:
    """The parameters that `profile` sets, by notebook name, from root/notebooks/profiles/<profile>.yaml.

    Every notebook gets `profile` itself as well. Raises `ReconError` for a file that is missing, is not a mapping of
    mappings, or names a notebook or a parameter that does not exist.
    """
    output_folders(profile, root)
    source = Path(root) / "notebooks" / "profiles" / f"{profile}.yaml"
    if not source.is_file():
        raise ReconError(f"profile {profile!r} has no file {str(source)!r}")
    try:
        given = yaml.safe_load(source.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ReconError(f"{str(source)!r} is not YAML: {error}") from None
    if not isinstance(given, dict) or not all(isinstance(values, dict | None) for values in given.values()):
        raise ReconError(f"{str(source)!r} must map each notebook's name to a mapping of parameters to values")
    known = {path.stem: path for path in find_notebooks(root=root)}
    if unknown := [name for name in given if name not in known]:
        raise ReconError(f"{str(source)!r} names an unknown notebook {unknown[0]!r}; known: {', '.join(known)}")
    parameters = {name: {**(given.get(name) or {}), "profile": profile} for name in known}
    for name, path in known.items():
        names = parameter_names(path)
        if unknown := [parameter for parameter in parameters[name] if parameter not in names]:
            raise ReconError(
                f"notebook {name!r} has no parameter {unknown[0]!r}, which profile {profile!r} sets; "
                f"known: {', '.join(names) or 'none'}"
            )
    return parameters


def parameter_names(path: Path | str) -> list[str]:
    """The parameters that the notebook at `path` declares.

    Raises `ReconError` unless exactly one cell is tagged `parameters`.
    """
    cells = nbformat.read(path, as_version=4).cells
    tagged = sum("parameters" in cell.metadata.get("tags", []) for cell in cells)
    if tagged != 1:
        raise ReconError(f"notebook {Path(path).stem!r} has {tagged} cells tagged 'parameters'; it must have one")
    return list(papermill.inspect_notebook(str(path)))


def execute(
    profile: str,
    notebooks: Sequence[str] | None = None,
    root: Path | str = ROOT,
    report: Callable[[str], None] = lambda line: None,
    stdout: TextIO | None = None,
    compute: bool = True,
    executor: str | None = None,
    address: str | None = None,
) -> list[Outcome]:
    """Runs the notebooks named (None: all) under `profile`, renders them and the index, and says how each went.

    compute: False draws from the records that are there and runs nothing; notebooks that cannot are left out.
    executor, address: what computes their studies, and the Ray cluster that they all share; see `recon.experiment.cluster.shared`.

    Everything that can be checked is checked before the first one runs (`ReconError`), also that no other process is at it. An exception inside a notebook
    is part of its `Outcome`. An interrupt by the user ends the list, with the notebook that was running "stopped".
    `report` is called with a line per notebook; what notebooks print (estimates, results) also goes to `stdout`.
    """
    root = Path(root).resolve()
    paths, parameters = find_notebooks(notebooks, root), profile_parameters(profile, root)
    if not compute:
        paths = [path for path in paths if "compute" in parameter_names(path)]
        parameters = {path.stem: parameters[path.stem] | {"compute": False} for path in paths}
    build = root / "build" / profile
    with lock.held(build / lock.NAME, f"output folder {str(build)!r}"):
        for folder in ("notebooks", "html"):
            (build / folder).mkdir(exist_ok=True)
        outcomes = []
        with cluster.shared(executor, address) if compute else contextlib.nullcontext():
            for number, path in enumerate(paths, 1):
                report(f"[{number}/{len(paths)}] {path.stem}")
                outcomes.append(_run(path, parameters[path.stem], build, stdout))
                if outcomes[-1].status == "stopped":
                    break
        folder, records = output_folders(profile, root)
        if figures.saved(folder):
            figures.gallery(folder, _claims(profile, records, root))
        _index(profile, outcomes, build, root)
    return outcomes


def _claims(profile: str, records: Path, root: Path) -> str:
    """Renews the page of the paper's claims, where the profile's records allow a judgement; returns what to say of it above the figures."""
    found = claims.read_records(records) if records.is_dir() else []
    if not any(record.status == "done" for record in found):
        return ""
    page = output_folders(profile, root)[0] / "claims.md"
    claims.write(records, page, root / "README.md" if profile == "laptop" else None)
    return claims.to_summary(claims.judge(found))


def _run(path: Path, parameters: dict, build: Path, stdout: TextIO | None) -> Outcome:
    """Executes one notebook into build/notebooks and renders it into build/html, whether it fails or not."""
    copy, problem = build / "notebooks" / path.name, build / "notebooks" / f"{path.stem}.error.txt"
    html = build / "html" / f"{path.stem}.html"
    for old in (copy, problem, html):
        old.unlink(missing_ok=True)
    status, error, start = "finished", "", time.monotonic()
    try:
        papermill.execute_notebook(
            str(path),
            str(copy),
            parameters=parameters,
            kernel_name="python3",
            cwd=str(path.parent),
            progress_bar=sys.stderr.isatty(),
            stdout_file=stdout,
            extra_arguments=[_QUIET],
        )
    except KeyboardInterrupt:
        status, error = "stopped", "stopped by the user"
    # Anything at all may go wrong in a notebook or its kernel; the other notebooks do not depend on it.
    except Exception as exception:
        status, error = "failed", _one_line(exception)
        problem.write_text(_ANSI.sub("", traceback.format_exc()), encoding="utf-8")
    seconds = time.monotonic() - start
    if copy.is_file():
        html.write_text(_render(copy), encoding="utf-8")
    return Outcome(path.stem, _title(path), status, round(seconds, 1), error)


def _render(copy: Path) -> str:
    """An executed notebook as one HTML page that loads nothing from elsewhere."""
    notebook = nbformat.read(copy, as_version=4)
    for cell in notebook.cells:
        # Progress bars are live widgets: on a page they would be empty frames.
        cell["outputs"] = [output for output in cell.get("outputs", []) if _WIDGET not in output.get("data", {})]
        if cell.cell_type != "code":
            del cell["outputs"]
    exporter = HTMLExporter(embed_images=True, mathjax_url="", require_js_url="", jquery_url="")
    return exporter.from_notebook_node(notebook, {"metadata": {"name": copy.stem}})[0]


def _one_line(exception: Exception) -> str:
    if isinstance(exception, papermill.PapermillExecutionError):
        name, text = exception.ename, exception.evalue
    else:
        name, text = type(exception).__name__, str(exception)
    return f"{name}: {' '.join(_ANSI.sub('', text).split())}"[:300]


def _title(path: Path) -> str:
    """The first Markdown heading of a notebook; its name if it has none."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown" and (heading := re.search(r"^#+\s+(.+)$", cell.source, re.MULTILINE)):
            return heading[1].strip()
    return path.stem


def _index(profile: str, outcomes: list[Outcome], build: Path, root: Path) -> None:
    """Writes build/html/index.html: the latest outcome of each notebook, those of earlier runs included."""
    store = build / "outcomes.json"
    try:
        latest = {name: Outcome(**fields) for name, fields in json.loads(store.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        latest = {}  # none yet, or cut short: the index then starts anew
    latest |= {outcome.name: outcome for outcome in outcomes}
    latest = {path.stem: latest[path.stem] for path in find_notebooks(root=root) if path.stem in latest}
    _replace(store, json.dumps({name: asdict(outcome) for name, outcome in latest.items()}, indent=1))
    text = _index_page(profile, latest.values(), build, output_folders(profile, root)[0])
    _replace(build / "html" / "index.html", text)


def _index_page(profile: str, outcomes: Iterable[Outcome], build: Path, figure_folder: Path) -> str:
    """A page that needs nothing but itself: the notebooks with how they went, then the figures."""
    html, rows, pictures = build / "html", [], []
    for outcome in outcomes:
        title = escape(outcome.title)
        if (html / f"{outcome.name}.html").is_file():
            title = f'<a href="{escape(quote(outcome.name))}.html">{title}</a>'
        error = f'<p class="error">{escape(outcome.error)}</p>' if outcome.error else ""
        rows.append(
            f'<tr><th scope="row">{title}<p>{escape(outcome.name)}</p>{error}</th>'
            f'<td class="{outcome.status}">{outcome.status}</td><td>{duration(outcome.seconds)}</td></tr>'
        )
    for figure in figures.saved(figure_folder):
        name, picture = figure["name"], figure_folder / f"{figure['name']}.png"
        where = escape(quote(Path(os.path.relpath(picture, html)).with_suffix("").as_posix()))
        embedded = base64.b64encode(picture.read_bytes()).decode()
        pictures.append(
            f'<figure><a href="{where}.png"><img src="data:image/png;base64,{embedded}" alt="{escape(name)}"></a>'
            f'<figcaption>{escape(figure["caption"] or name)}<br><a href="{where}.pdf">PDF<span> of {name}</span></a>'
            f' <a href="{where}.csv">data<span> of {name}</span></a></figcaption></figure>'
        )
    gallery = f'<h2>Figures</h2><div class="figures">{"".join(pictures)}</div>' if pictures else ""
    return _PAGE.format(profile=profile, rows="\n".join(rows), gallery=gallery)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def summary(profile: str, outcomes: Sequence[Outcome], root: Path | str = ROOT) -> str:
    """What ran, for how long, where everything is, and which notebooks failed with what."""
    root = Path(root).resolve()
    here = Path.cwd()

    def shown(path: Path) -> str:
        return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)

    build, width = root / "build" / profile, max(len(outcome.name) for outcome in outcomes)
    finished = sum(outcome.status == "finished" for outcome in outcomes)
    lines = ["", f"Profile {profile}: {finished} of {len(outcomes)} notebooks finished"]
    for outcome in outcomes:
        lines.append(f"  {outcome.name:<{width}}  {outcome.status:<8}  {duration(outcome.seconds):>8}")
        if outcome.error:
            lines.append(f"  {'':<{width}}  {outcome.error}")
        if outcome.status == "failed":
            lines.append(f"  {'':<{width}}  traceback: {shown(build / 'notebooks' / f'{outcome.name}.error.txt')}")
    folder, records = output_folders(profile, root)
    places = {
        "figures": folder,
        "records": records,
        "executed notebooks": build / "notebooks",
        "to read in a browser": build / "html" / "index.html",
    }
    return "\n".join(lines + [f"{what + ':':<22}{shown(path)}" for what, path in places.items()])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0, 1 if a notebook failed, 2 for a mistake in the call, 130 if stopped."""

    def say(line: str) -> None:
        print(line, flush=True)

    parser = argparse.ArgumentParser(prog="python -m recon.paper.notebooks", description="Run the notebooks under a profile.")
    parser.add_argument("profile", choices=PROFILES, help="which sizes to run")
    parser.add_argument("--from-records", action="store_true", help="run nothing: draw from the records that are there")
    parser.add_argument(
        "--executor", choices=cluster.EXECUTORS, help="what computes their studies (default: RECON_EXECUTOR, or serial)"
    )
    parser.add_argument("--address", help="of a Ray cluster; default: RAY_ADDRESS, else one that is started on this machine")
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="names of notebooks (default: all)")
    given = parser.parse_intermixed_args(arguments)
    # papermill repeats through the log what the summary says.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        outcomes = execute(
            given.profile, given.notebooks or None, report=say, stdout=sys.stdout, compute=not given.from_records,
            executor=given.executor, address=given.address,
        )  # fmt: skip
    except ReconError as error:
        parser.exit(2, f"recon.paper.notebooks: {error}\n")
    say(summary(given.profile, outcomes))
    statuses = {outcome.status for outcome in outcomes}
    return 130 if "stopped" in statuses else int("failed" in statuses)


if __name__ == "__main__":
    sys.exit(main())
