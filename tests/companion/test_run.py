"""The loop over notebooks, in a checkout of its own: its console, pages and exit status."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from companion import run

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = 'profile: str = "quick"  # which\noutput: str = ""  # where\ncompute: bool = True  # whether\nsize: int = 1  # how'
DRAWS = """
import matplotlib.pyplot as plt, pandas as pd
from companion.publish import folders, publish
figure, _ = plt.subplots()
publish(figure, "a-line", folders(profile)[0], pd.DataFrame({"y": [size]}), "A <line> & more", ["k"], "It is flat.")"""
LACKS = 'from companion.publish import MissingRecords\nraise MissingRecords(profile, "2-lacks")'


def notebook(path: Path, title: str, *sources: str) -> Path:
    cells = [new_markdown_cell(f"# {title}"), new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    cells += [new_code_cell(source, metadata={"tags": ["hide-input"]} if "hidden" in source else {}) for source in sources]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    return path


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout with a package `companion`, and three notebooks: one draws, one fails, one has no records."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "notebooks" / "companion", root / "notebooks" / "companion")
    (root / "notebooks" / "profiles").mkdir()
    (root / "notebooks" / "profiles" / "quick.yaml").write_text("0-draws: {size: 7}\n")
    notebook(root / "notebooks" / "0-draws.ipynb", "Draws & saves", DRAWS, "print('size', size)  # hidden")
    notebook(root / "notebooks" / "1-fails.ipynb", "Fails", "raise KeyError('lost')", "print('never')")
    notebook(root / "notebooks" / "2-lacks.ipynb", "Lacks", LACKS)
    return root


def called(root: Path, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root / "notebooks"), str(ROOT)])}
    command = [sys.executable, "-m", "companion.run", *words]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_every_notebook_runs_though_one_fails(checkout):
    done = called(checkout, "quick")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert "0-draws  build/quick/figures/a-line.png" in lines
    assert any(re.fullmatch(r"0-draws  finished after \d+ s", line) for line in lines)
    assert "Profile quick: 1 of 3 notebooks finished" in lines and "  1-fails  failed: KeyError: 'lost'" in lines
    build = checkout / "build" / "quick"
    assert "size 7" in (build / "0-draws.log").read_text()
    assert json.loads((build / "figures" / "a-line.json").read_text())["records"] == ["k"]
    index = (build / "index.html").read_text()
    links = [link for link in re.findall(r'href="([^"#]+)"', index) if not link.startswith("http")]
    assert {"0-draws.html", "1-fails.html", "2-lacks.html", "figures/a-line.csv"} <= set(links)
    assert [link for link in links if not (build / link).exists()] == []
    assert 'src="data:image/png;base64,' in index and "Draws &amp; saves" in index and "KeyError" in index
    text = re.sub(r"<[^>]+>", "", (build / "0-draws.html").read_text())
    assert "size 7" in text and "import matplotlib" in text and "# hidden" not in text


@pytest.mark.slow
def test_from_records_nothing_is_computed_and_what_has_none_is_no_failure(checkout):
    done = called(checkout, "quick", "--from-records", "0-draws", "2-lacks")
    assert done.returncode == 0, done.stderr
    assert "  2-lacks  no records: MissingRecords: too few records: run ./run_all.sh quick 2-lacks" in done.stdout.splitlines()


def test_mistakes_are_refused_before_anything_runs(capsys):
    for words, said in ((["fast"], "invalid choice"), (["quick", "9-z"], "unknown notebook '9-z'; known: 0-quickst")):
        with pytest.raises(SystemExit) as caught:
            run.main(words)
        assert caught.value.code == 2 and said in capsys.readouterr().err


def test_committed_notebooks_hold_nothing_of_the_machine():
    widget = new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}})
    cell = new_code_cell("1", outputs=[widget, new_output("stream", text="said")], metadata={"papermill": {"duration": 1}})
    clean = run.readable(new_notebook(cells=[cell], metadata={"papermill": {"input_path": "/home"}, "widgets": {}}))
    assert not clean.metadata and not clean.cells[0].metadata and [each.text for each in clean.cells[0].outputs] == ["said"]
