"""Makes one site of README, gallery, verdicts, executed notebooks and guides: `python -m companion.site` writes build/site.

It is made by Sphinx, with MyST-NB for Markdown and notebooks. Its pages load nothing from elsewhere, and open from disk.
"""

import re
import shutil
import sys
from pathlib import Path

import nbformat
from sphinx.application import Sphinx

from companion.publish import ROOT, notebooks
from companion.run import readable

SETTINGS = {
    "project": "recon",
    "html_title": "recon",
    "html_theme": "sphinx_book_theme",
    "html_theme_options": {"use_download_button": False, "show_toc_level": 2, "navbar_persistent": []},
    "html_static_path": ["static"],
    "html_css_files": ["site.css"],
    "html_show_copyright": False,
    "html_copy_source": False,
    "extensions": ["myst_nb"],
    "myst_heading_anchors": 3,
    "myst_enable_extensions": [],  # no formulas: a dollar sign is text
    "nb_execution_mode": "off",
    "nb_merge_streams": True,
    "nb_ipywidgets_js": {},
    "suppress_warnings": ["myst.header", "mystnb.unknown_mime_type"],  # a page may begin with any heading level
}
STYLE = """td code, td .pre { white-space: normal }  /* long names in tables */
.table { font-size: 0.85em } .table :is(td, th) { padding: 0.3em 0.4em }
"""
CONTENTS = {
    "Results": ["figures/article", "figures/README", "figures/claims", "ARTIFACT"],
    "Notebooks": [f"notebooks/{path.stem}" for path in notebooks()],
    "Guides": ["guides/README", *(f"guides/{path.stem}" for path in sorted((ROOT / "guides").glob("[!R]*.md")))],
}


def stage(folder: Path) -> None:
    """Copies the pages into `folder`, laid out as in the checkout so that links work; notebooks with outputs, if executed."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "guides", folder / "guides")
    shutil.copytree(ROOT / "figures", folder / "figures", ignore=shutil.ignore_patterns("executed", "paper", "tables"))
    for name in ("ARTIFACT.md", "CITATION.cff", "LICENSE", "run_all.sh"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for path in notebooks():
        executed = ROOT / "figures" / "executed" / path.name
        page = readable(nbformat.read(executed if executed.exists() else path, as_version=4))
        nbformat.write(page, folder / "notebooks" / path.name)
    trees = [
        f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(pages) + "\n```\n" for title, pages in CONTENTS.items()
    ]
    shutil.copy(ROOT / "README.md", folder / "index.md")
    for page in (folder / "index.md", *(folder / "guides").glob("*.md")):  # links to figures become links into the gallery
        text = page.read_text(encoding="utf-8").replace("../README.md", "../index.md")
        text = re.sub(r"(?<!!)(\[[^]]*\]\(\S*figures/)([\w-]+)\.png\)", r"\1README.md#\2)", text)
        page.write_text(text + "".join(trees) * (page.name == "index.md"), encoding="utf-8")
    (folder / "static").mkdir()
    (folder / "static" / "site.css").write_text(STYLE, encoding="utf-8")


if __name__ == "__main__":
    source, target = ROOT / "build" / "site-source", ROOT / "build" / "site"
    stage(source)
    app = Sphinx(source, None, target, ROOT / "build" / "site-doctrees", "html", SETTINGS, status=None, freshenv=True)
    app.build()
    print("The site: build/site/index.html")
    sys.exit(app.statuscode)
