"""Folders in the cache that are made once, by one process at a time, and are whole or not there."""

import contextlib
import errno
import glob
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from recon.data.files import digest, read_hashes, write_hashes
from recon.errors import ReconError
from recon.runtime.storage import cache_folder, complete, remove_unfinished

log = logging.getLogger("recon")


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` in the cache with the files that `make(empty folder)` writes; made when it is first asked for.

    name: differs wherever anything that `make` depends on differs.

    The hashes of the files lie beside them, in `SHA256SUMS`. A folder whose files do not agree with them is reported and made again.

    Raises `ReconError` if the cache cannot be written; and whatever `make` raises.
    """
    folder = _place(name)
    if not _is_whole(folder):
        with filling(folder):
            if not _is_whole(folder):  # another process may have made it meanwhile
                if folder.exists():
                    log.warning("%s is damaged or incomplete: making it again", folder)
                    shutil.rmtree(folder)
                with complete(folder) as fresh:
                    fresh.mkdir()
                    make(fresh)
                    write_hashes(fresh, "*")
    return folder


def whole(name: str) -> Path | None:
    """The folder `name` in the cache as `cached` gives it, if it is there and whole; nothing is made."""
    return _place(name) if _is_whole(_place(name)) else None


def _place(name: str) -> Path:
    return cache_folder() / "derived" / name


def _is_whole(folder: Path) -> bool:
    hashes = read_hashes(folder)
    return bool(hashes) and all((folder / name).is_file() and digest(folder / name) == kept for name, kept in hashes.items())


@contextlib.contextmanager
def filling(path: Path) -> Iterator[None]:
    """Context in which no other process fills `path` in the cache, and what killed processes left of it is gone.

    Raises `ReconError` naming the cache if it cannot be written, such as on a full disk.
    """
    home = cache_folder()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (home / "locks").mkdir(exist_ok=True)
        with FileLock(home / "locks" / path.name):
            remove_unfinished(path.parent, glob.escape(path.name))
            yield
    except Exception as error:
        # safetensors has an error of its own for a full disk, with the system's words.
        if (isinstance(error, OSError) and error.errno) or os.strerror(errno.ENOSPC) in str(error):
            raise ReconError(
                f"the cache folder {home} cannot be written ({error}); free space there, or set RECON_CACHE to another folder"
            ) from error
        raise
