"""Runs the notebooks under a profile: `python -m companion.run quick [NOTEBOOK ...] [--executor ray] [--from-records]`.

What each profile sets is in notebooks/profiles/. Notebooks do not depend on one another: if one fails, the others still run,
and it is named at the end. Executed copies, logs and HTML pages go to build/<profile>/; figures and records to `publish.folders`.
"""

import argparse
import io
import os
import re
import sys
import time
import traceback
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import papermill
from nbconvert import HTMLExporter
from nbconvert.filters import strip_ansi
from traitlets.config import Config

from companion import judge, tables
from companion.article import settings
from companion.compare import SEEDS
from companion.figures import claims
from companion.publish import PROFILES, ROOT, folders, gallery, notebooks, publish, style


class Console(io.TextIOBase):
    """What a notebook prints goes to its log; the paths of its figures to the console as well."""

    def __init__(self, name: str, log: Path):
        self.name, self.log = name, log.open("w", encoding="utf-8", buffering=1)

    def write(self, text: str) -> None:
        self.log.write(text)
        for path in re.findall(r"^\S+\.png$", text, re.MULTILINE):
            print(f"{self.name}  {path}", flush=True)


def parameters(profile: str) -> dict[str, dict]:
    """The parameters of each notebook under `profile`, by its name."""
    return {path.stem: settings(profile).get(path.stem, {}) | {"profile": profile} for path in notebooks()}


def execute(path: Path, values: dict, build: Path) -> dict:
    """Executes one notebook into `build`, renders it, and says how it went: name, status, seconds, error (one line)."""
    copy, began, error = build / path.name, time.monotonic(), ""
    try:
        papermill.execute_notebook(
            str(path), str(copy), values, kernel_name="python3", progress_bar=False,
            resources={"metadata": {"path": str(path.parent)}},  # working folder of the kernel; this process keeps its own
            stdout_file=Console(path.stem, build / f"{path.stem}.log"), extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )  # fmt: skip
        status = "finished"
    except papermill.PapermillExecutionError as failure:
        missing = failure.ename == "MissingRecords" and values.get("compute") is False
        status, error = "no records" if missing else "failed", f"{failure.ename}: {strip_ansi(failure.evalue)}"
    except Exception as failure:  # such as a kernel that dies: the other notebooks still run
        status, error = "failed", f"{type(failure).__name__}: {failure}"
        traceback.print_exc()
    if copy.exists():
        page(nbformat.read(copy, as_version=4), build / f"{path.stem}.html")
    seconds = round(time.monotonic() - began)
    print(f"{path.stem}  {status} after {seconds} s", flush=True)
    return {"notebook": path.stem, "status": status, "seconds": seconds, "error": " ".join(error.split())[:300]}


def page(notebook: nbformat.NotebookNode, target: Path) -> None:
    """Writes a notebook as one HTML page that loads nothing from elsewhere, without the source of cells tagged `hide-input`."""
    hidden = Config({"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": {"hide-input"}}})
    exporter = HTMLExporter(hidden, embed_images=True, mathjax_url="", require_js_url="", jquery_url="")
    resources = {"metadata": {"name": target.stem, "path": str(target.parent)}}
    target.write_text(exporter.from_notebook_node(readable(notebook), resources)[0], encoding="utf-8")


def readable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Removes from a notebook Papermill's notes about the machine, and live widgets, which a page shows as empty frames."""
    for part in (notebook, *notebook.cells):
        for name in ("papermill", "widgets", "execution"):
            part.metadata.pop(name, None)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [out for out in cell.outputs if "application/vnd.jupyter.widget-view+json" not in out.get("data", {})]
    return notebook


def judged(profile: str) -> tuple[str, Container]:
    """Judges claims from records of `profile`; writes pages, tables, a figure; returns a summary, and keys of older protocols."""
    figures, records = folders(profile)
    if not any(records.glob("*.json")):
        return "", ()
    style()
    readme = ROOT / "README.md" if profile == "laptop" else None
    texts, verdicts, older = judge.pages(records, figures / "claims.md", readme, profile)
    if plot := claims(verdicts):
        caption = (
            "The central claims, by model, at its main pattern; bootstrap intervals over seeds and windows (95 %; equal and "
            f"as good 90 %). Hollow: fewer than {SEEDS} seeds. Equal: linear up to 0.1, logarithmic beyond. †: older protocol. "
            "The title counts these rows, without those by KL. All comparisons and protocols: claims.md."
        )
        figure, drawn, finding = plot
        publish(figure, "claims", figures, drawn, caption, {key for keys in verdicts["keys"] for key in keys}, finding)
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return judge.summary(verdicts), older


def run(profile: str, names: Sequence[str] = (), compute: bool = True) -> list[dict]:
    """Runs the notebooks called `names`, or all, and writes verdicts, gallery and index.html; returns how each went.

    compute: if False, no run is computed: notebooks draw from existing records, or are left out if they lack this parameter.
    """
    build, values = ROOT / "build" / profile, parameters(profile)
    paths = [path for path in notebooks() if path.stem in (names or values)]
    if not compute:
        paths = [path for path in paths if "compute" in papermill.inspect_notebook(str(path))]
        values = {name: given | {"compute": False} for name, given in values.items()}
    build.mkdir(parents=True, exist_ok=True)
    two = (profile == "quick" or not compute) and os.environ.get("RECON_EXECUTOR") != "ray"
    threads, outcomes = os.environ.get("OMP_NUM_THREADS"), []
    for group, at_once in ((paths[:1], 1), (paths[1:], 1 + two)):  # the first alone, so that there is a figure soon
        os.environ["OMP_NUM_THREADS"] = threads or str(max(1, (os.cpu_count() or 1) // at_once))
        with ThreadPoolExecutor(at_once) as pool:
            outcomes += pool.map(lambda path: execute(path, values[path.stem], build), group)
    figures, _ = folders(profile)
    if profile == "laptop":  # to be committed
        (figures / "executed").mkdir(exist_ok=True)
        for name in (outcome["notebook"] for outcome in outcomes if outcome["status"] == "finished"):
            nbformat.write(readable(nbformat.read(build / f"{name}.ipynb", as_version=4)), figures / "executed" / f"{name}.ipynb")
    summary, older = judged(profile)
    rows = [(f"[{o['notebook']}]({o['notebook']}.html)", o["status"], f"{o['seconds']} s", o["error"]) for o in outcomes]
    went = "\n".join(tables.markdown(("notebook", "status", "time", "error"), rows))
    shown = gallery(profile, summary, older=older)  # written even without records to judge, after the new figure of claims
    figures.mkdir(parents=True, exist_ok=True)
    (figures / "README.md").write_text(shown, encoding="utf-8")
    links = re.sub(r"\]\((?!http)", f"]({os.path.relpath(figures, build)}/", shown)
    text = f"# Profile {profile}\n\n{went}\n\n{links}"
    page(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]), build / "index.html")
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0, or 1 if a notebook failed."""
    parser = argparse.ArgumentParser(prog="python -m companion.run", description="Run the notebooks under a profile.")
    parser.add_argument("profile", choices=PROFILES, help="which sizes to run")
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help=f"default: all of {[path.stem for path in notebooks()]}")
    parser.add_argument("--from-records", action="store_true", help="compute no runs: draw from existing records")
    parser.add_argument(
        "--executor", choices=("serial", "ray"), help="how to compute studies (default: RECON_EXECUTOR, or serial)"
    )
    parser.add_argument("--address", help="of a Ray cluster; default: RAY_ADDRESS, or a new one on this machine")
    given = parser.parse_intermixed_args(arguments)
    if unknown := set(given.notebooks) - {path.stem for path in notebooks()}:
        parser.error(f"unknown notebook {unknown.pop()!r}; known: {', '.join(path.stem for path in notebooks())}")
    inherited = {"RECON_EXECUTOR": given.executor, "RAY_ADDRESS": given.address}  # by the notebooks' kernels
    os.environ |= {name: value for name, value in inherited.items() if value}
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # otherwise torch's profiler logs its starts and stops
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "notebooks"), os.environ.get("PYTHONPATH", "")])
    outcomes = run(given.profile, given.notebooks, compute=not given.from_records)
    failed = [outcome for outcome in outcomes if outcome["status"] != "finished"]
    print(f"\nProfile {given.profile}: {len(outcomes) - len(failed)} of {len(outcomes)} notebooks finished")
    for outcome in failed:
        print(f"  {outcome['notebook']}  {outcome['status']}: {outcome['error']}")
    figures, records = (os.path.relpath(folder) for folder in folders(given.profile))
    build = os.path.relpath(ROOT / "build" / given.profile)
    print(f"figures: {figures}\nrecords: {records}\nnotebooks and logs: {build}\nto read in a browser: {build}/index.html")
    return int(any(outcome["status"] == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
