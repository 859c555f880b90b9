"""Files that appear only when they are complete; hashes; the cache folder."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import platformdirs
from safetensors.torch import save_file
from torch import Tensor, nn

from recon.errors import ReconError


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
    """Makes `folder` if need be; raises `ReconError` naming it where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ReconError(
            f"{what}: cannot write to {str(folder)!r} ({error.strerror}); name a folder that can be written"
        ) from None


SLOW = 2**30  # bytes from which it is shown that they are hashed
PART = ".part"  # ends the names of files that are still being written; nothing ever reads one


def _place(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, parameter)


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes `tensors` to `path`, which appears when all of it is on the disk.

    Raises `OSError` or safetensors' own error where that cannot be done, such as on a full disk; nothing half-written stays.
    """
    temporary = path.with_name(path.name + PART)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: object) -> None:
    """As `write_safetensors`, for what JSON can hold."""
    temporary = path.with_name(path.name + PART)
    try:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def publish(temporary: Path, path: Path) -> None:
    """Gives a written file its name, once it is on the disk; when this returns, so is the name."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until what was written to a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
