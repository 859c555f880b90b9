"""Executed notebooks as they are committed and shown: without live widgets and paths of the machine, and small."""

import base64
import copy
import io
from pathlib import Path

import nbformat
from PIL import Image

LARGEST = 1_000_000  # bytes of a committed notebook
WIDTHS = (1200, 900, 700, 500, 350)  # pixels that pictures are scaled down to, until it is small enough
_WIDGET, _PNG = "application/vnd.jupyter.widget-view+json", "image/png"


def readable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy without progress bars (live widgets, which are empty frames on a page) and without what Papermill notes of the machine."""
    notebook = copy.deepcopy(notebook)
    for part in (notebook, *notebook.cells):
        for name in ("papermill", "widgets", "execution"):
            part.metadata.pop(name, None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _WIDGET not in output.get("data", {})]
    return notebook


def keep(source: Path, target: Path) -> Path:
    """Writes the executed notebook `source` to `target`, readable, its pictures scaled down until the file is smaller than `LARGEST`.

    Where no scale is small enough, pictures are left out.
    """
    notebook = readable(nbformat.read(source, as_version=4))
    for width in (*WIDTHS, 0):
        text = nbformat.writes(_scaled(notebook, width)) + "\n"
        if len(text.encode()) < LARGEST:
            break
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    return target


def _scaled(notebook: nbformat.NotebookNode, width: int) -> nbformat.NotebookNode:
    """A copy with pictures of at most `width` pixels; 0: with none."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if _PNG not in data:
                continue
            if width:
                data[_PNG] = _scaled_picture(data[_PNG], width)
            else:
                del data[_PNG]
                data["text/plain"] = "(a picture, left out for its size)"
    return notebook


def _scaled_picture(encoded: str, width: int) -> str:
    picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
    if picture.width > width:
        picture = picture.convert("RGB").resize(
            (width, max(1, round(picture.height * width / picture.width))), Image.Resampling.LANCZOS
        )
    packed = io.BytesIO()
    picture.convert("RGB").quantize(128).save(packed, "png", optimize=True)
    return base64.b64encode(packed.getvalue()).decode()
