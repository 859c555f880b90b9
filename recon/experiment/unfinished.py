"""Streamed runs that save no model and were not finished: where they lie in the cache, which they are, and how to be rid of them."""

import contextlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from recon.errors import ReconError
from recon.experiment.config import options
from recon.runtime import lock
from recon.runtime.storage import cache_folder

JOURNAL = "journal.jsonl"  # in the folder where a run works


@dataclass(frozen=True)
class Unfinished:
    """A run that was not finished: its key, the fields of its specification (empty where its journal does not tell), the bytes of
    its files, the seconds since it finished its last step, and whether a process is at work on it."""

    key: str
    spec: dict
    size: int
    age: float
    in_use: bool

    @property
    def options(self) -> str:
        """The specification as options of `recon run`, where it is not the default."""
        defaults = {name: field.default for name, field in options().items()}
        words = []
        for name, value in self.spec.items():
            value = tuple(value) if isinstance(value, list) else value
            if name == "model" or value != defaults.get(name):
                words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
        return " ".join(words)


def folder_of(key: str) -> Path:
    """The folder where the run called `key` works."""
    return cache_folder() / "unfinished" / key


def held(key: str) -> contextlib.AbstractContextManager:
    """Context in which no other process works on the run called `key`; see `recon.runtime.lock.held`."""
    folder = folder_of(key)
    return lock.held(folder.with_name(f".{folder.name}{lock.NAME}"), f"unfinished run {key}")


def unfinished() -> list[Unfinished]:
    """The runs that were not finished, the last one that did something first."""
    home, found = folder_of(""), []
    for folder in home.iterdir() if home.is_dir() else ():
        if not folder.is_dir():
            continue
        with contextlib.suppress(FileNotFoundError):  # it is finished meanwhile
            changed = (folder / JOURNAL if (folder / JOURNAL).exists() else folder).stat().st_mtime
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            found.append(Unfinished(folder.name, _spec(folder), size, time.time() - changed, _in_use(folder.name)))
    return sorted(found, key=lambda run: run.age)


def _spec(folder: Path) -> dict:
    """What the first line of the journal says that the run is."""
    try:
        with open(folder / JOURNAL, encoding="utf-8") as file:
            return dict(json.loads(file.readline())["spec"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _in_use(key: str) -> bool:
    try:
        with held(key):
            return False
    except ReconError:
        return True


def discard(key: str) -> None:
    """Deletes what the run called `key` has done so far.

    Raises `ReconError` where there is no such run, or a process is at work on it.
    """
    known = [run.key for run in unfinished()]
    if key not in known:
        raise ReconError(f"there is no unfinished run {key!r}; there are: {', '.join(known) or 'none'}")
    with held(key):
        # Without its journal, nothing that is left of the folder counts for anything.
        (folder_of(key) / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(folder_of(key))
