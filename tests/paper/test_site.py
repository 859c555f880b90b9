"""Executed notebooks as they are kept and shown, and the site that holds them."""

import base64
import io
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from recon.errors import ReconError
from recon.paper import executed, runner, site

ROOT = Path(__file__).resolve().parents[2]


def picture(width: int) -> str:
    """Noise, which cannot be compressed."""
    noise = np.random.default_rng(0).integers(0, 255, (width // 2, width, 3), dtype=np.uint8)
    packed = io.BytesIO()
    Image.fromarray(noise).save(packed, "png")
    return base64.b64encode(packed.getvalue()).decode()


def notebook(*outputs, title: str = "A title") -> nbformat.NotebookNode:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cell = new_code_cell("1 + 1", outputs=list(outputs), metadata={"papermill": {"duration": 1.0}})
    about = {"kernelspec": kernel, "papermill": {"input_path": str(ROOT)}}
    return new_notebook(cells=[new_markdown_cell(f"# {title}"), cell], metadata=about)


def shown(data: dict):
    return new_output("display_data", data=data)


@pytest.mark.parametrize("count, kept", [(1, True), (2, True), (40, False)])
def test_kept_notebooks_are_small(tmp_path, monkeypatch, count, kept):
    assert executed.LARGEST <= 1_000_000
    monkeypatch.setattr(executed, "LARGEST", 60_000)
    monkeypatch.setattr(executed, "WIDTHS", (200, 100))
    nbformat.write(notebook(*[shown({"image/png": picture(300), "text/plain": "a figure"})] * count), tmp_path / "a.ipynb")
    path = executed.keep(tmp_path / "a.ipynb", tmp_path / "executed" / "a.ipynb")
    assert path.stat().st_size < executed.LARGEST < (tmp_path / "a.ipynb").stat().st_size
    outputs = nbformat.read(path, as_version=4).cells[1].outputs
    assert len(outputs) == count and all(("image/png" in output.data) == kept for output in outputs)
    if kept:
        width = Image.open(io.BytesIO(base64.b64decode(outputs[0].data["image/png"]))).width
        assert width in executed.WIDTHS


def test_kept_notebooks_have_no_widgets_and_no_paths(tmp_path):
    bar = shown({"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "  0%"})
    nbformat.write(notebook(bar, shown({"text/plain": "2"})), tmp_path / "a.ipynb")
    path = executed.keep(tmp_path / "a.ipynb", tmp_path / "b.ipynb")
    assert [output.data["text/plain"] for output in nbformat.read(path, as_version=4).cells[1].outputs] == ["2"]
    assert str(ROOT) not in path.read_text() and "papermill" not in path.read_text()


def test_the_laptop_profile_keeps_what_finished(tmp_path):
    for name in ("0-a", "1-b"):
        nbformat.write(notebook(), tmp_path / f"{name}.ipynb")
    outcomes = [runner.Outcome("0-a", "A", "finished", 1.0), runner.Outcome("1-b", "B", "failed", 1.0)]
    runner._keep_executed(tmp_path, tmp_path / "executed", outcomes)
    assert [path.name for path in (tmp_path / "executed").iterdir()] == ["0-a.ipynb"]


@pytest.fixture
def checkout(tmp_path):
    """The pages of this repository with three notebooks: executed under a profile, committed as executed, and with an error."""
    for name in ("guides", "figures"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("executed"))
    for name in ("README.md", *site.FILES):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "notebooks").mkdir()
    places = [tmp_path / "build/laptop/notebooks", tmp_path / "build/quick/notebooks", tmp_path / "figures/executed"]
    for folder in places:
        folder.mkdir(parents=True)
    names = [path.name for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    for name in names:
        nbformat.write(notebook(title=f"Source {name}"), tmp_path / "notebooks" / name)
    failed = new_output("error", ename="KeyError", evalue="lost", traceback=[])
    nbformat.write(notebook(shown({"text/plain": "of the laptop"})), places[0] / names[0])
    nbformat.write(notebook(failed), places[0] / names[1])
    nbformat.write(notebook(shown({"text/plain": "committed"})), places[2] / names[1])
    nbformat.write(notebook(failed), places[1] / names[2])
    return tmp_path, names


def test_the_site_shows_each_notebook_as_it_was_executed_to_its_end(checkout):
    root, names = checkout
    bare = site.stage(root, root / "staged")
    assert bare == [Path(name).stem for name in names[2:]]
    texts = [(root / "staged" / "notebooks" / name).read_text() for name in names]
    assert "of the laptop" in texts[0] and "committed" in texts[1] and "KeyError" not in texts[2]
    front = (root / "staged" / "index.md").read_text()
    assert front.startswith((root / "README.md").read_text()) and "guides/own-model\n" in front and "figures/claims\n" in front


def test_the_site_opens_from_disk(checkout, capfd):
    pytest.importorskip("sphinx_book_theme")
    pytest.importorskip("myst_nb")
    root, names = checkout
    front = site.build(root)
    assert "WARNING" not in capfd.readouterr().err  # such as a link that leads nowhere
    pages = [path for path in sorted(front.parent.rglob("*.html")) if "_static" not in path.parts]
    assert {f"notebooks/{Path(name).stem}.html" for name in names} < {path.relative_to(front.parent).as_posix() for path in pages}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img)[^>]* src="([^"]+)"|<link[^>]* href="([^"]+)"', text)
        for link in map("".join, loaded):
            assert not link.startswith(("http", "/")), f"{page.name} loads {link}"
            assert (page.parent / link.split("?")[0].split("#")[0]).exists(), f"{page.name} lacks {link}"


def test_without_its_extra_the_site_says_what_to_install(checkout, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sphinx.application", None)
    with pytest.raises(ReconError, match=r"run ./run_all.sh site"):
        site.build(checkout[0])
