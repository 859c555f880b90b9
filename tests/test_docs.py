"""README and guides: short, their links lead somewhere, and the words and options that they name exist."""

import re
from pathlib import Path

import pytest

from recon import cli, decompose, load
from recon.kernels.criteria import CRITERIA
from recon.kernels.patterns import found_pattern

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted((ROOT / "guides").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDES]
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "figures" / "article.md"], ids=identify)
def test_links_lead_somewhere(page):
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_readme_and_guides_are_short_and_every_guide_and_notebook_is_listed():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200
    assert {identify(page): n for page in GUIDES if (n := len(page.read_text(encoding="utf-8").splitlines())) >= 120} == {}
    listed = set(LINK.findall((ROOT / "guides" / "README.md").read_text(encoding="utf-8")))
    assert listed == {page.name for page in GUIDES} - {"README.md"}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"| [`{path.stem}`](notebooks/{path.name}) |" in text for path in (ROOT / "notebooks").glob("*.ipynb"))


def test_the_readme_links_the_figures_that_are_drawn():
    rows = re.findall(r"\| `\./run_all\.sh [^|]*\| (.*) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = {name: bool(link) for row in rows for name, link in re.findall(r"`([\w-]+)`(\]\()?", row)}
    assert named and named == {name: (ROOT / "figures" / f"{name}.png").exists() for name in named}


def test_commands_name_words_and_options_that_exist(capsys):
    script = (ROOT / "run_all.sh").read_text(encoding="utf-8")
    known = set(re.findall(r"--[a-z][\w-]*", script)) | {"--help-notebook"}  # of papermill
    for command in ("run", "plan", "reconstruct", "bench", "models", "assets", "pack", "unpack", "shrink"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        known |= set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`|^((?:\./run_all|recon) .+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            line = "".join(code)
            if line.startswith(("--", "recon ", "./run_all.sh")):
                assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", line)) <= known, (identify(page), line)
            if word := re.match(r"\./run_all\.sh ([a-z]+)", line):
                assert re.search(rf"^[\w| -]*\b{word[1]}\b[\w| -]*\)", script, re.MULTILINE), (identify(page), line)


def test_python_in_guides_runs(tiny_folder, tmp_path, monkeypatch):
    """On a small model, and less text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(CRITERIA, "mine", CRITERIA["wanda"])  # so that it goes again
    small = {"path/or/hub-id": tiny_folder, '"wikipedia"': f'"{tiny_folder}/tiny_text.txt"', "length=512": "length=32"}
    small |= {"samples=64": "samples=4", "samples=8": "samples=2", '"smollm2-135m", samples=32': f'"{tiny_folder}", **few'}
    pages = [(ROOT / "guides" / name).read_text(encoding="utf-8") for name in ("own-model.md", "retraining.md")]
    blocks = re.findall(r"```python\n(.*?)```", "\n".join(pages), re.DOTALL)
    assert len(blocks) == 5
    code = "\n".join(blocks)
    for words, other in small.items():
        code = code.replace(words, other)
    text = f"{tiny_folder}/tiny_text.txt"
    few = {"text": text, "evaluation_texts": [text], "samples": 2, "sequence_length": 32, "evaluation_samples": 1}
    found: dict = {"few": few | {"evaluation_length": 32}}
    exec(code, found)
    assert (found["table"]["status"] == "done").all() and len(found["table"]) == 6
    assert CRITERIA["mine"].name == "mine"
    saved = [matrix.weight != 0 for matrix in decompose(load("my-pruned-model")[0]).matrices().values()]
    assert str(found_pattern(saved)) == "2:4"
