"""Runs the notebooks under a profile and renders them: `python -m recon.paper.runner quick`.

Notebooks do not depend on one another: one that fails is recorded, and the others go on. Executed copies, HTML pages and an
index go to build/<profile>/; figures and records where `recon.paper.profiles` says.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import jinja2
import nbformat
import papermill
import yaml
from nbclient.exceptions import CellTimeoutError
from nbconvert import HTMLExporter
from traitlets.config import Config

from recon.errors import ReconError
from recon.paper import claims, executed, gallery
from recon.paper.console import Console, shown
from recon.paper.plots import claims as forest
from recon.paper.profiles import PROFILES, ROOT, MissingRecords, folders
from recon.runtime import lock, storage
from recon.runtime.device import cores, limit_compiled_shapes
from recon.study import workers
from recon.study.cost import duration

LONGEST = 300  # seconds that a cell takes at most which only draws; they take seconds
_DRAWN = re.compile(r'(?:savefig|publish)\(\s*\w+,\s*"([\w.-]+)"')
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Outcome:
    """How one notebook went: `status` is "finished", "missing" (nothing to draw from), "failed" or "stopped" (by the user); `error` is
    one line."""

    name: str
    title: str
    status: str
    seconds: float
    error: str = ""


def find_notebooks(names: Sequence[str] | None = None, root: Path | str = ROOT) -> list[Path]:
    """The notebooks in root/notebooks, by name: those called `names` (with or without .ipynb), or all.

    Raises:
        ReconError: there are none, or none of a given name.
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
    """The parameters of each notebook under `profile`, by its name: those in root/notebooks/profiles/<profile>.yaml, and `profile`.

    Raises:
        ReconError: the file is missing or is not a mapping of mappings, or names a notebook or a parameter that does not exist.
    """
    folders(profile)
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
    """The parameters that a notebook declares. Raises `ReconError` unless exactly one cell is tagged `parameters`."""
    cells = nbformat.read(path, as_version=4).cells
    tagged = sum("parameters" in cell.metadata.get("tags", []) for cell in cells)
    if tagged != 1:
        raise ReconError(f"notebook {Path(path).stem!r} has {tagged} cells tagged 'parameters'; it must have one")
    return list(papermill.inspect_notebook(str(path)))


def execute(
    profile: str,
    notebooks: Sequence[str] | None = None,
    root: Path | str = ROOT,
    stdout: TextIO | None = None,
    compute: bool = True,
    executor: str | None = None,
    address: str | None = None,
) -> list[Outcome]:
    """Runs notebooks under `profile`, renders them and the index, and says how each went.

    An exception inside a notebook is part of its `Outcome`. An interrupt by the user ends the list with the running notebook,
    "stopped".

    Args:
        notebooks: names; None: all.
        stdout: gets a line per notebook, and the path of each figure; see `recon.paper.console`. What notebooks print goes to
            build/<profile>/notebooks/<name>.log.
        compute: False runs nothing: notebooks draw from the records that are there; those that cannot are left out, and those that
            find none end as "missing".
        executor, address: what computes studies, and the Ray cluster that all notebooks share; see `recon.study.workers.shared`.

    Raises:
        ReconError: the call, the profile or a notebook's parameters are wrong, or another process runs this profile. Nothing has
            been run by then.
    """
    root = Path(root).resolve()
    paths, parameters = find_notebooks(notebooks, root), profile_parameters(profile, root)
    if not compute:
        paths = [path for path in paths if "compute" in parameter_names(path)]
        parameters = {path.stem: parameters[path.stem] | {"compute": False} for path in paths}
    build = root / "build" / profile
    with lock.locked(build / lock.NAME, f"output folder {str(build)!r}"):
        for folder in ("notebooks", "html"):
            (build / folder).mkdir(exist_ok=True)
        figure_folder, outcomes = folders(profile, root=root)[0], []

        def run(number: int, path: Path) -> Outcome:
            """Runs one notebook, and shows on the console how it goes."""
            copy, name = build / "notebooks" / path.name, f"[{number}/{len(paths)}] {path.stem}"
            drawn = [figure_folder / f"{each}.png" for each in _drawn(path)]
            console = Console(name, len(nbformat.read(path, as_version=4).cells), copy, drawn, stdout)
            outcome = _run(path, parameters[path.stem], build, console)
            console.end(f"{outcome.status}, {duration(outcome.seconds)}")
            return outcome

        # Notebooks that only draw run side by side; one that computes has the machine to itself.
        with workers.shared(executor, address) if compute else contextlib.nullcontext(), ThreadPoolExecutor(cores()) as pool:
            for outcome in (map if compute else pool.map)(run, range(1, len(paths) + 1), paths):
                outcomes.append(outcome)
                if outcome.status == "stopped":
                    break
        if profile == "laptop":
            _keep_executed(build / "notebooks", figure_folder / "executed", outcomes)
        _write_gallery(profile, outcomes, root)
        _write_index(profile, outcomes, root)
    return outcomes


def _run(path: Path, parameters: dict, build: Path, stdout: Console) -> Outcome:
    """Executes one notebook into build/notebooks and renders it into build/html, whether it fails or not."""
    copy, problem = build / "notebooks" / path.name, build / "notebooks" / f"{path.stem}.error.txt"
    html = build / "html" / f"{path.stem}.html"
    for old in (copy, problem, html):
        old.unlink(missing_ok=True)
    status, error, start = "finished", "", time.monotonic()
    try:
        _execute(path, copy, parameters, stdout)
    except KeyboardInterrupt:
        status, error = "stopped", "stopped by the user"
    except Exception as exception:  # whatever goes wrong in a notebook or its kernel: the others do not depend on it
        status, error = "failed", _one_line(exception)
        name, _, said = error.partition(": ")
        if name == MissingRecords.__name__ and parameters.get("compute") is False:  # else its runs have failed
            status, error = "missing", said
        else:
            problem.write_text(_ANSI.sub("", traceback.format_exc()), encoding="utf-8")
    seconds = round(time.monotonic() - start, 1)
    if copy.is_file():
        html.write_text(_render(copy), encoding="utf-8")
    return Outcome(path.stem, _title(path), status, seconds, error)


def _execute(path: Path, copy: Path, parameters: dict, stdout: Console) -> None:
    """Executes one notebook; once more where a cell that only draws does not end: now and then, a kernel waits forever for a message."""
    draws = parameters.get("compute") is False
    for last in (False, True) if draws else (True,):
        try:
            papermill.execute_notebook(
                str(path), str(copy), parameters, kernel_name="python3", progress_bar=False,
                resources={"metadata": {"path": str(path.parent)}},  # the kernel's folder; this process stays where it is
                execution_timeout=LONGEST if draws else None,
                stdout_file=stdout, extra_arguments=["--IPKernelApp.log_level=ERROR"],  # kernels warn that they use TCP
            )  # fmt: skip
            return
        except CellTimeoutError:
            if last:
                raise


def _render(copy: Path) -> str:
    """An executed notebook as one HTML page that loads nothing from elsewhere. The source of cells tagged `hide-input` is left out."""
    notebook = executed.readable(nbformat.read(copy, as_version=4))
    hidden = Config({"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": {"hide-input"}}})
    exporter = HTMLExporter(hidden, embed_images=True, mathjax_url="", require_js_url="", jquery_url="")
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


def _keep_executed(copies: Path, folder: Path, outcomes: list[Outcome]) -> None:
    """Keeps the notebooks that finished, to be committed beside the figures."""
    for outcome in outcomes:
        if outcome.status == "finished":
            executed.keep(copies / f"{outcome.name}.ipynb", folder / f"{outcome.name}.ipynb")


def _drawn(path: Path) -> list[str]:
    """The names of the figures that a notebook draws."""
    return _DRAWN.findall("\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells))


def _write_gallery(profile: str, outcomes: list[Outcome], root: Path) -> None:
    """Writes the page of figures, which names those that are missing, and the judgement of the paper's claims from the records."""
    figure_folder, record_folder = folders(profile, root=root)
    figure_folder.mkdir(parents=True, exist_ok=True)
    judged, missing = "", {}
    finished = {outcome.name for outcome in outcomes if outcome.status == "finished"}
    if record_folder.is_dir():
        records = claims.read_records(record_folder)
        verdicts = claims.judge(records)
        judged = claims.to_summary(verdicts)
        forest.save(verdicts, figure_folder, records)
        claims.write(record_folder, figure_folder / "claims.md", root / "README.md" if profile == "laptop" else None)
    for path in find_notebooks(root=root):
        if names := [name for name in _drawn(path) if not (figure_folder / f"{name}.png").is_file()]:
            left_out = profile == "quick" and path.stem in finished  # it could draw no more
            missing[str(MissingRecords("laptop" if left_out else profile, path.stem))] = names
    gallery.write(figure_folder, judged, missing, profile, root)


def _write_index(profile: str, outcomes: list[Outcome], root: Path) -> None:
    """Writes build/<profile>/html/index.html: the latest outcome of each notebook, also of earlier runs, and the figures."""
    build, figure_folder = root / "build" / profile, folders(profile, root=root)[0]
    store, html = build / "outcomes.json", build / "html"
    try:
        latest = {name: Outcome(**fields) for name, fields in json.loads(store.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        latest = {}  # none yet, or of another version
    latest |= {outcome.name: outcome for outcome in outcomes}
    latest = {path.stem: latest[path.stem] for path in find_notebooks(root=root) if path.stem in latest}
    storage.write_json(store, {name: asdict(outcome) for name, outcome in latest.items()})
    pictures = [
        figure
        | {
            "place": Path(os.path.relpath(figure_folder / figure["name"], html)).as_posix(),
            "png": base64.b64encode((figure_folder / f"{figure['name']}.png").read_bytes()).decode(),
        }
        for figure in gallery.saved(figure_folder)
    ]
    environment = jinja2.Environment(loader=jinja2.PackageLoader("recon.paper", "."), autoescape=True, trim_blocks=True)
    environment.filters["duration"] = duration
    page = environment.get_template("index.html.jinja").render(
        profile=profile, outcomes=latest.values(), rendered={path.stem for path in html.glob("*.html")}, figures=pictures
    )
    (html / "index.html").write_text(page, encoding="utf-8")


def summary(profile: str, outcomes: Sequence[Outcome], root: Path | str = ROOT) -> str:
    """How many notebooks finished, which did not and why, and where everything is."""
    root, here = Path(root).resolve(), Path.cwd()
    build, width = root / "build" / profile, max(len(outcome.name) for outcome in outcomes)
    finished = sum(outcome.status == "finished" for outcome in outcomes)
    lines = ["", f"Profile {profile}: {finished} of {len(outcomes)} notebooks finished"]
    for outcome in outcomes:
        if outcome.error:
            lines.append(f"  {outcome.name:<{width}}  {outcome.status}: {outcome.error}")
        if outcome.status == "failed":
            lines.append(f"  {'':<{width}}  traceback: {shown(build / 'notebooks' / f'{outcome.name}.error.txt', here)}")
    figure_folder, record_folder = folders(profile, root=root)
    places = {
        "figures": figure_folder, "records": record_folder, "executed notebooks": build / "notebooks",
        "to read in a browser": build / "html" / "index.html",
    }  # fmt: skip
    return "\n".join(lines + [f"{what + ':':<22}{shown(path, here)}" for what, path in places.items()])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0, 1 if a notebook failed, 2 for a mistake in the call, 130 if stopped."""
    parser = argparse.ArgumentParser(prog="python -m recon.paper.runner", description="Run the notebooks under a profile.")
    parser.add_argument("profile", choices=PROFILES, help="which sizes to run")
    parser.add_argument("--from-records", action="store_true", help="run nothing: draw from the records that are there")
    parser.add_argument(
        "--executor", choices=workers.EXECUTORS, help="what computes their studies (default: RECON_EXECUTOR, or serial)"
    )
    parser.add_argument("--address", help="of a Ray cluster; default: RAY_ADDRESS, else one that is started on this machine")
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="names of notebooks (default: all)")
    given = parser.parse_intermixed_args(arguments)
    # What kernels inherit: this checkout comes before an installed one.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    limit_compiled_shapes()
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or torch's profiler writes when it starts and stops
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it logs what the summary says
    try:
        outcomes = execute(
            given.profile, given.notebooks or None, stdout=sys.stdout, compute=not given.from_records,
            executor=given.executor, address=given.address,
        )  # fmt: skip
    except ReconError as error:
        parser.exit(2, f"recon.paper.runner: {error}\n")
    except KeyboardInterrupt:  # of notebooks that were drawn side by side; one that computes ends as "stopped"
        parser.exit(130, "recon.paper.runner: stopped by the user\n")
    print(summary(given.profile, outcomes), flush=True)
    statuses = {outcome.status for outcome in outcomes}
    return 130 if "stopped" in statuses else int("failed" in statuses)


if __name__ == "__main__":
    sys.exit(main())
