"""The folders where streamed runs work: where they are, which of them were not finished, and how to be rid of these."""

import contextlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from recon.errors import ReconError
from recon.runtime import lock
from recon.runtime.storage import cache_folder
from recon.study.spec import RunSpec

JOURNAL = "journal.jsonl"  # in the folder where a run works
UNFINISHED = ".unfinished"  # ends the name of the folder of a run that saves its model


@dataclass(frozen=True)
class Unfinished:
    """A run without a folder to save to that was not finished.

    spec: its options by flat name, as its journal tells them; empty where that is damaged.
    size: bytes of its files. age: seconds since its last step. in_use: whether a process works on it.
    """

    key: str
    spec: dict
    size: int
    age: float
    in_use: bool

    @property
    def options(self) -> str:
        """The options of `recon run` that are not at their defaults, and the model."""
        words = []
        for name, value in self.spec.items():
            value = tuple(value) if isinstance(value, list) else value
            if name != "model" and value == RunSpec().flat().get(name, value):
                continue
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
        return " ".join(words)


def folder_of(key: str, save: Path | None = None) -> Path:
    """The folder where the streamed run called `key` works: beside the one that it saves to, or in the cache."""
    return cache_folder() / "unfinished" / key if save is None else save.with_name(save.name + UNFINISHED)


def locked(key: str) -> contextlib.AbstractContextManager:
    """Context in which no other process works on the run called `key`, which saves nothing; see `recon.runtime.lock.locked`."""
    folder = folder_of(key)
    return lock.locked(folder.with_name(f".{folder.name}{lock.NAME}"), f"unfinished run {key}")


def unfinished() -> list[Unfinished]:
    """The unfinished runs in the cache, the one with the latest step first."""
    home, found = folder_of(""), []
    for folder in filter(Path.is_dir, home.iterdir() if home.is_dir() else ()):
        with contextlib.suppress(FileNotFoundError):  # it is finished meanwhile
            changed = (folder / JOURNAL if (folder / JOURNAL).exists() else folder).stat().st_mtime
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            found.append(Unfinished(folder.name, _spec(folder), size, time.time() - changed, _in_use(folder.name)))
    return sorted(found, key=lambda run: run.age)


def discard(key: str) -> None:
    """Deletes the unfinished run called `key`. Raises `ReconError` where there is none, or a process works on it."""
    known = [run.key for run in unfinished()]
    if key not in known:
        raise ReconError(f"there is no unfinished run {key!r}; there are: {', '.join(known) or 'none'}")
    with locked(key):
        (folder_of(key) / JOURNAL).unlink(missing_ok=True)  # first: without it, nothing else counts
        shutil.rmtree(folder_of(key))


def delete(folder: Path) -> None:
    """Deletes the folder of a run that is done, if there is one; the journal last, as it holds the record."""
    if not folder.exists():
        return
    for path in filter(Path.is_dir, folder.iterdir()):
        shutil.rmtree(path)
    (folder / JOURNAL).unlink(missing_ok=True)
    folder.rmdir()


def _spec(folder: Path) -> dict:
    """The options that the first line of the journal tells."""
    try:
        with open(folder / JOURNAL, encoding="utf-8") as file:
            return dict(json.loads(file.readline())["spec"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _in_use(key: str) -> bool:
    try:
        with locked(key):
            return False
    except ReconError:
        return True
