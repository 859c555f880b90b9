"""Figures are saved whole with their data and origin, look the same everywhere, and are all on one page; so is the site."""

import itertools
import json
import os
import re
import subprocess
import sys

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import seaborn as sns

from companion import publish


@pytest.fixture
def saved(tmp_path):
    """Saves a figure of two lines under a name into `tmp_path`, and returns that folder."""

    def save(name: str, finding: str = "Lines [rise] and rise, over more words than there are in a line of a title."):
        with matplotlib.rc_context():
            publish.style()
            data = pd.DataFrame({"x": [1, 2, 1, 2], "y": [1, 2, 3, 4.00000001], "fit": ["block", "block", "matrix", "matrix"]})
            figure, ax = plt.subplots()
            sns.lineplot(data, x="x", y="y", hue="fit", style="fit", dashes=False, ax=ax, **publish.looks(data["fit"]))
            publish.publish(figure, name, tmp_path, data, "How it <was> made", ["b", "a", "b"], finding)
        return tmp_path

    return save


def test_a_figure_comes_with_its_data_and_origin(saved, capsys):
    folder = saved("two-lines")
    assert {path.name for path in folder.iterdir()} == {f"two-lines.{suffix}" for suffix in ("pdf", "png", "csv", "json")}
    assert (folder / "two-lines.csv").read_text() == "x,y,fit\n1,1,block\n2,2,block\n1,3,matrix\n2,4,matrix\n"
    origin = json.loads((folder / "two-lines.json").read_text())
    assert origin["records"] == ["a", "b"] and origin["caption"] == "How it <was> made" and "commit" in origin
    assert capsys.readouterr().out.endswith("two-lines.png\n") and not plt.get_fignums()
    first = {path: path.read_bytes() for path in folder.iterdir()}
    saved("two-lines")
    assert first == {path: path.read_bytes() for path in folder.iterdir()}


def test_things_that_are_compared_can_be_told_apart_in_grey():
    sizes = ["matrix", "half-block", "block", "2-blocks", "4-blocks", "8-blocks", "quarter", "model"]
    for names in (sizes, ["magnitude", "wanda", "sparsegpt"], ["reconstruction", "masklora", "full"], ["ours", "reference"]):
        assert len({(publish.look(name)["marker"], publish.look(name)["linestyle"]) for name in names}) == len(names)
    varied = ["masklora", "masklora, distilled", "reconstruction, then masklora", "dense, masklora"]
    assert len({str(publish.look(name)) for name in varied}) == 4
    assert {publish.look(name)["marker"] for name in varied} == {publish.look("masklora")["marker"]}
    assert publish.look("block from exact")["color"] == publish.look("block")["color"]
    assert publish.look("another model") == publish.look("another model")


@pytest.mark.parametrize("axis, arrow", [("x", "←"), ("y", "↓")])
def test_axes_say_that_less_is_better_and_numbers_plainly_in_texts_with_three_digits(axis, arrow):
    _, ax = plt.subplots()
    ax.plot([20, 60], [20, 60])
    publish.lower_is_better(ax, axis)
    publish.log_scale(ax, axis)
    ax.figure.draw_without_rendering()
    assert arrow in getattr(ax, f"get_{axis}label")()
    assert "30" in [label.get_text() for label in getattr(ax, f"get_{axis}ticklabels")()]
    assert [publish.number(value) for value in (1, 0.0978, 99.96, 1234.5)] == ["1.00", "0.0978", "100", "1234"]
    plt.close("all")


def test_the_gallery_shows_what_is_there_and_names_what_is_not(saved):
    names = {notebook.stem: publish.drawn(notebook) for notebook in publish.notebooks()}
    assert names["0-quickstart"] == ["quickstart-perplexity", "quickstart-error", "method"]
    every = list(itertools.chain(*names.values()))
    assert len(set(every)) == len(every)
    folder = saved("method")
    (folder / "tables").mkdir()
    (folder / "tables" / "table-1.md").write_text("# Table 1\n\n| a |\n|---|\n")
    page = publish.gallery("quick", "| claim |", folder, {"table-3.md": "# Table 3"})
    assert page.index("### Table 1") < page.index("### Table 3")
    assert "### Method\n\nLines [rise]" in page and "![Lines (rise)" in page and "| claim |" in page
    assert "- quickstart-perplexity, quickstart-error (0-quickstart)" in page
    marked = publish.gallery("quick", folder=folder, older={"a"})  # one of its two records
    assert publish.OLDER_WORDS not in page and f"How it <was> made {publish.OLDER_WORDS}" in marked
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert links and [link for link in links if not (folder / link).exists()] == []


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert publish.commit() == ""


def test_each_profile_has_folders_of_its_own(tmp_path):
    both = [publish.folders(profile) for profile in publish.PROFILES]
    assert len(set(itertools.chain(*both))) == 6
    assert publish.folders("quick", tmp_path) == (tmp_path / "figures", tmp_path / "records")


@pytest.mark.slow
def test_the_site_opens_from_disk():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(publish.ROOT), str(publish.ROOT / "notebooks")])}
    subprocess.run([sys.executable, "-m", "companion.site"], cwd=publish.ROOT, env=environment, check=True)
    site = publish.ROOT / "build" / "site"
    pages = ["index", "ARTIFACT", "figures/README", "figures/claims", "guides/README"]
    for page in pages + [f"notebooks/{path.stem}" for path in publish.notebooks()]:
        text = (site / f"{page}.html").read_text(encoding="utf-8")
        sources = re.findall(r'<(?:img|script|link)[^>]* (?:src|href)="([^"]+)"', text)
        assert sources and not [source for source in sources if source.startswith(("http", "//"))]
        assert not re.search(r'href="[^"]*\.png"', text)  # a figure is looked at, not downloaded
        places = [(site / page).parent / source.partition("?")[0] for source in sources if not source.startswith("data:")]
        assert [place for place in places if not place.exists()] == []
