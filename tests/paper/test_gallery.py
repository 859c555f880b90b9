"""The gallery: every figure in its place, with its finding, its picture and its links; and the registry it follows."""

import json
import re
from pathlib import Path

import nbformat
import pytest

from recon.paper import gallery, runner

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def figure(tmp_path):
    """Makes the files of a figure in the folder figures/ of a checkout."""
    folder = tmp_path / "figures"
    folder.mkdir()

    def make(name: str, **said) -> Path:
        (folder / f"{name}.png").write_bytes(b"")
        provenance = {"name": name, "caption": "", "records": ["a1", "b2"], "git_commit": "c" * 40} | said
        (folder / f"{name}.json").write_text(json.dumps(provenance))
        return folder

    return make


def test_verdicts_tables_figures_and_the_appendix_come_in_this_order(figure, tmp_path):
    for name in ("scaling", "criteria", "granularity", "claims", "unheard-of"):
        folder = figure(name)
    (folder / "tables").mkdir()
    (folder / "tables" / "paper.md").write_text("# Against the paper\n\n| a |\n|---|\n")
    page = gallery.write(folder, "| claim | verdict |", {"run it": ["third", "fourth"]}, root=tmp_path)
    assert page == folder / "README.md"
    text = page.read_text()
    order = [
        "(claims.png)", "| claim | verdict |", "(claims.md)", "## Tables", "### Against the paper", "## Figures", "(granularity.png)",
        "(criteria.png)", "(unheard-of.png)", "## Appendix", "(scaling.png)", "## Missing\n\n- `third`, `fourth`: run it\n",
    ]  # fmt: skip
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert text.count("\n### ") == 6


def test_a_figure_has_its_finding_its_picture_and_its_links(figure, tmp_path):
    said = {
        "finding": "Blocks are enough.",
        "alt": "Blocks are enough. [Bars]\nfrom low to high.",
        "caption": "Mean of three seeds.",
    }
    text = gallery.write(figure("granularity", **said, record_commits=["a" * 40]), root=tmp_path).read_text()
    assert (
        "### Blocks are enough.\n\n![Blocks are enough. (Bars) from low to high.](granularity.png)\n\nMean of three seeds.\n"
        in text
    )
    assert "[notebook 1-granularity](../notebooks/1-granularity.ipynb)" in text
    assert "[`./run_all.sh laptop 1-granularity`](../run_all.sh)" in text
    assert "[data](granularity.csv)" in text and "[2 records of commit `aaaaaaaaaa`](granularity.json)" in text


def test_a_figure_that_says_little_is_shown_by_its_name(figure, tmp_path):
    text = gallery.write(figure("own", caption="A [caption]."), root=tmp_path).read_text()
    assert "### own\n\n![A (caption).](own.png)" in text and "notebook" not in text.partition("### own")[2]
    assert "[2 records, drawn at commit `cccccccccc`]" in text


def test_the_figure_of_verdicts_is_drawn_from_records(figure, tmp_path):
    assert "`./run_all.sh figures paper`" in gallery.write(figure("claims"), profile="paper", root=tmp_path).read_text()


def test_files_that_are_no_figures_are_left_out(figure):
    folder = figure("one")
    (folder / "one-notes.json").write_text("{}")  # there is no PNG beside it
    assert [found["name"] for found in gallery.saved(folder)] == ["one"]


def test_the_registry_knows_what_every_notebook_draws():
    drawn = {
        name: path.stem
        for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
        for name in runner._DRAWN.findall("\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells))
    }
    assert len(drawn) > 5
    assert {name: notebook for name, notebook in drawn.items() if gallery.NOTEBOOKS.get(name) != notebook} == {}
    committed = {path.stem for path in (ROOT / "figures").glob("*.png")}
    assert committed and committed - set(gallery.NOTEBOOKS) - {gallery.FOREST} == set()


def test_links_of_the_committed_page_lead_somewhere():
    page = ROOT / "figures" / "README.md"
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert len(links) > 10 and [link for link in links if not (page.parent / link).exists()] == []
