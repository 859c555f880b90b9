"""Files that appear only when they are complete; hashes; the cache folder."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import platformdirs
from safetensors.torch import save_file
from torch import Tensor

from recon.errors import ReconError

SLOW = 2**30  # bytes from which hashing takes long enough to be shown
PART = ".part"  # ends the names of files and folders that are still being written; nothing ever reads one


def cache_folder() -> Path:
    """Where fetched and converted files are kept: $RECON_CACHE, else the user's cache folder."""
    chosen = os.environ.get("RECON_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else platformdirs.user_cache_path("recon")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_writable(folder: Path, what: str) -> None:
    """Makes `folder` if need be; raises `ReconError` naming it, and `what` it is for, if nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ReconError(
            f"{what}: cannot write to {str(folder)!r} ({error.strerror}); name a folder that can be written"
        ) from None


@contextlib.contextmanager
def complete(path: Path) -> Iterator[Path]:
    """Context that gives the name of a file or folder to write beside `path`, and renames it to `path` at the end.

    Everything is on the disk before it gets its name. After an error nothing is left; a killed process leaves a name that
    ends in `PART`, see `remove_unfinished`. The folder around `path` is made if need be.

    Raises `OSError` where that cannot be done, such as for a folder that is to replace one with files in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PART}")
    try:
        yield temporary
        rename(temporary, path)
    except BaseException:
        _remove(temporary)
        raise


def rename(written: Path, path: Path) -> None:
    """Renames a file or folder to `path`, once all of it is on the disk. When this returns, its new name is on the disk too."""
    sync_all(written)
    os.replace(written, path)
    sync(path.parent)


def remove_unfinished(folder: Path, pattern: str = "*") -> None:
    """Removes what processes that were killed inside `complete` left in `folder` of files called like `pattern`.

    Call it only while no other process writes there, such as under a lock.
    """
    for left in folder.glob(f".{pattern}.*{PART}"):
        _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes `tensors` to the safetensors file `path`; see `complete`. Raises safetensors' own error too, such as on a full disk."""
    with complete(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})


def write_json(path: Path, content: object) -> None:
    """Writes `content`, which JSON can hold, to `path`; see `complete`."""
    with complete(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def sync_all(path: Path) -> None:
    """`sync` for a file, or for a folder and everything in it."""
    for each in (*path.rglob("*"), path):
        sync(each)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
