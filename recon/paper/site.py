"""One site of README, gallery, verdicts, executed notebooks and guides: `python -m recon.paper.site` writes build/site.

Sphinx makes it, with sphinx-book-theme and MyST for Markdown and notebooks: its pages load nothing from elsewhere, and open from disk.
"""

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat

from recon.errors import ReconError
from recon.paper.executed import readable
from recon.paper.profiles import PROFILES, ROOT

FILES = ("ARTIFACT.md", "CITATION.cff", "LICENSE", "run_all.sh", "ro-crate-metadata.json")
SETTINGS = {
    "project": "recon",
    "author": "",
    "copyright": "",
    "html_title": "recon",
    "html_theme": "sphinx_book_theme",
    "html_theme_options": {
        "use_download_button": False,
        "use_fullscreen_button": False,
        "show_toc_level": 2,
        "navbar_persistent": [],
    },
    "html_static_path": ["style"],
    "html_css_files": ["tables.css"],
    "html_show_copyright": False,
    "html_show_sphinx": False,
    "html_copy_source": False,
    "html_show_sourcelink": False,
    "extensions": ["myst_nb"],
    "myst_heading_anchors": 3,
    "myst_enable_extensions": [],  # a dollar is a dollar
    "nb_execution_mode": "off",
    "nb_merge_streams": True,
    "nb_ipywidgets_js": {},
    "suppress_warnings": ["myst.header", "mystnb.unknown_mime_type"],  # pages start where their Markdown does
}
TABLES = ".output td, .output th { padding: 0.15em 0.6em; }\n"  # the theme leaves no room between a notebook's numbers
CONTENTS = """
```{{toctree}}
:hidden:
:caption: {caption}

{pages}
```
"""


def stage(root: Path | str, folder: Path) -> list[str]:
    """Puts the pages of the site into `folder`, linked as in the checkout `root`; returns the names of notebooks that were not executed."""
    root = Path(root)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "style").mkdir(parents=True)
    (folder / "style" / "tables.css").write_text(TABLES, encoding="utf-8")
    for name in FILES:
        if (root / name).is_file():
            shutil.copy(root / name, folder)
    for part in ("guides", "figures"):
        if (root / part).is_dir():
            shutil.copytree(root / part, folder / part, ignore=shutil.ignore_patterns("executed", "paper", "tables"))
    notebooks, bare = sorted((root / "notebooks").glob("*.ipynb")), []
    (folder / "notebooks").mkdir()
    for source in notebooks:
        executed = _executed(root, source.name)
        bare += [] if executed else [source.stem]
        nbformat.write(readable(executed or nbformat.read(source, as_version=4)), folder / "notebooks" / source.name)
    guides = [path.stem for path in (folder / "guides").glob("*.md")]
    listed = re.findall(r"\]\(([\w-]+)\.md\)", (folder / "guides" / "README.md").read_text(encoding="utf-8"))  # in their order
    contents = {
        "Results": ["figures/README", "figures/claims", *(["ARTIFACT"] if (folder / "ARTIFACT.md").is_file() else [])],
        "Notebooks": [f"notebooks/{path.stem}" for path in notebooks],
        "Guides": [f"guides/{name}" for name in ("README", *listed) if name in guides],
    }
    toc = "".join(CONTENTS.format(caption=caption, pages="\n".join(pages)) for caption, pages in contents.items())
    (folder / "index.md").write_text((root / "README.md").read_text(encoding="utf-8") + toc, encoding="utf-8")
    return bare


def _executed(root: Path, name: str) -> nbformat.NotebookNode | None:
    """A notebook as it was executed to its end: under the largest profile that was run here, or else the committed copy."""
    places = [root / "build" / profile / "notebooks" for profile in reversed(PROFILES)]
    for path in (folder / name for folder in (*places, root / "figures" / "executed")):
        if path.is_file():
            notebook = nbformat.read(path, as_version=4)
            if not any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", [])):
                return notebook
    return None


def build(root: Path | str = ROOT) -> Path:
    """Builds the site in root/build/site; returns its front page.

    Raises:
        ReconError: Sphinx is not installed, or it could not build the site.
    """
    try:
        from sphinx.application import Sphinx
    except ImportError:
        raise ReconError("the site needs the extra site: run ./run_all.sh site, or pip install -e '.[site]'") from None
    root = Path(root).resolve()
    source, target = root / "build" / "site-source", root / "build" / "site"
    bare = stage(root, source)
    shutil.rmtree(target, ignore_errors=True)
    app = Sphinx(
        source, None, target, root / "build" / "site-doctrees", "html", SETTINGS, status=None, warning=sys.stderr, freshenv=True
    )
    app.build()
    if app.statuscode:
        raise ReconError(f"the site could not be built; Sphinx ended with status {app.statuscode}")
    if bare:
        print(f"Shown without outputs, as they were not run here: {', '.join(bare)}")
    return target / "index.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    try:
        page = build()
    except ReconError as error:
        print(f"recon.paper.site: {error}", file=sys.stderr)
        return 2
    print(f"The site: {page.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
