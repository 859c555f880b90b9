"""What the console shows of a notebook while it runs: one line, and the path of each figure as soon as it is there."""

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

BAR = "{desc}  {n_fmt}/{total_fmt} cells |{bar:12}| {elapsed}{postfix}"


class Console:
    """Shows the notebook called `name`; what it prints is given to `write`, and goes to the file `log`.

    On a terminal there is a bar of its cells, with the time that has passed and the last line that it printed.

    Args:
        copy: where Papermill keeps the executed notebook, cell by cell.
        figures: where its figures will be.
        stdout: None: nothing is shown.
    """

    def __init__(self, name: str, cells: int, copy: Path, figures: Sequence[Path], stdout: TextIO | None):
        self.name, self.copy, self.figures, self.stdout = name, copy, figures, stdout
        self.log = copy.with_suffix(".log").open("w", encoding="utf-8")
        self.here = Path.cwd()
        self.known, self.saved = dict(self._figures()), 0
        shown = stdout is not None and stdout.isatty()
        self.bar = tqdm(total=cells, desc=name, bar_format=BAR, file=stdout, disable=not shown, leave=False, dynamic_ncols=True)
        self.ended = threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def write(self, text: str) -> None:
        """Takes what the notebook prints."""
        self.log.write(text)
        if said := [line for line in text.splitlines() if line.strip()]:
            self.bar.set_postfix_str(said[-1].strip(), refresh=False)

    def flush(self) -> None:
        self.log.flush()

    def end(self, outcome: str) -> None:
        """Shows the last figures, and `outcome` instead of the bar."""
        self.ended.set()
        self.watcher.join()
        self.bar.close()
        self.log.close()
        self._look()
        self._say(outcome)

    def _watch(self) -> None:
        while not self.ended.wait(1.0):
            self._look()

    def _look(self) -> None:
        for path, changed in self._figures():
            if self.known.get(path) != changed:
                self.known[path] = changed
                self._say(shown(path, self.here))
        if not self.bar.disable:
            self.bar.n = self._cells()
            self.bar.refresh()  # the time

    def _say(self, words: str) -> None:
        if self.stdout:
            tqdm.write(f"{self.name}  {words}", file=self.stdout)
            self.stdout.flush()

    def _figures(self) -> Iterator[tuple[Path, int]]:
        """Each figure that is there, and when it was drawn."""
        for path in self.figures:
            with contextlib.suppress(FileNotFoundError):  # not there yet, or another takes its place
                yield path, path.stat().st_mtime_ns

    def _cells(self) -> int:
        """How many cells are done."""
        with contextlib.suppress(OSError, ValueError):  # not there yet, or half written
            if (changed := self.copy.stat().st_mtime_ns) != self.saved:
                cells = json.loads(self.copy.read_text(encoding="utf-8"))["cells"]
                self.saved = changed
                return sum(cell["metadata"].get("papermill", {}).get("status") == "completed" for cell in cells)
        return self.bar.n


def shown(path: Path, here: Path) -> str:
    """`path` as one would type it in the folder `here`."""
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
