"""Files and folders in the cache that are made once, by one process at a time, and are whole or not there."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from recon.errors import ReconError
from recon.runtime.storage import cache_folder


def derived_folder(name: str) -> Path:
    """Where the folder `name` of files that are computed from others is; the name differs wherever anything decisive differs."""
    return cache_folder() / "derived" / name


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make(empty folder)` unless it is there. What a killed process left of it is begun again.

    Raises `ReconError` if the cache cannot be written; and whatever `make` raises.
    """
    if folder.is_dir():
        return folder
    home, fresh = cache_folder(), folder.with_name(f"{folder.name}.part")
    try:
        for each in (folder.parent, home / "locks"):
            each.mkdir(parents=True, exist_ok=True)
        with FileLock(home / "locks" / folder.name):
            if not folder.is_dir():  # another process may have made it meanwhile
                shutil.rmtree(fresh, ignore_errors=True)
                fresh.mkdir()
                with contextlib.ExitStack() as undo:
                    undo.callback(shutil.rmtree, fresh, ignore_errors=True)
                    make(fresh)
                    os.replace(fresh, folder)
    except OSError as error:
        if error.errno is None:  # of a library, and not of the system
            raise
        raise ReconError(
            f"the cache folder {home} cannot be written ({error}); free space there, or set RECON_CACHE to another folder"
        ) from error
    return folder
