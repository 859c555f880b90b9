"""Activations in files that are mapped into memory: those that several runs of a study share, and those that memory is too small for.

The operating system keeps as much of such files in memory as there is room for, and writes the rest to disk.
"""

import logging
import math
import mmap
import os
import tempfile
from collections.abc import Hashable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from recon.runtime.storage import PART

log = logging.getLogger("recon")
LIMIT = 16 * 2**30  # bytes
RESERVE = 2 * 2**30  # bytes of the disk that are left free


def mapped(shape: Sequence[int], dtype: torch.dtype, folder: Path | str | None) -> tuple[Tensor, mmap.mmap, Path]:
    """A tensor to be filled, the mapped pages of a new file in `folder` that it views, and the file.

    The pages are freed with the last tensor that views them. Raises `OSError` where the disk is full.
    """
    size = math.prod(shape) * dtype.itemsize
    handle, name = tempfile.mkstemp(prefix="recon-", suffix=PART, dir=folder)
    path = Path(name)
    with open(handle, "rb+") as file:
        try:
            # Blocks are taken before they are mapped: a full disk is then an error here, and not a crash at some write.
            os.posix_fallocate(file.fileno(), 0, size)
            pages = mmap.mmap(file.fileno(), size)
        except BaseException:
            path.unlink()
            raise
    tensor = torch.frombuffer(pages, dtype=dtype, count=size // dtype.itemsize).view(*shape)
    return tensor, pages, path


class Activations:
    """Keeps tensors by name until `limit` bytes are full; what does not fit is not kept.

    Their files are deleted as soon as they are mapped, so that the operating system frees them when the last tensor that views
    them goes, or the process dies, however it dies.

    Args:
        limit: bytes in all; 0 keeps nothing.
        folder: where the files are; default: the system's temporary folder, which on some systems is in memory.
    """

    def __init__(self, limit: int = LIMIT, folder: Path | str | None = None):
        self.limit = limit
        self.folder = folder
        self.bytes = 0
        self._kept: dict[Hashable, Tensor] = {}
        self._maps: list[mmap.mmap] = []

    def get(self, name: Hashable) -> Tensor | None:
        """What is kept under `name`, not to be changed in place, or None."""
        return self._kept.get(name)

    def put(self, name: Hashable, tensor: Tensor) -> Tensor:
        """Keeps `tensor` under `name`, where there is room; returns the copy kept, or else `tensor` itself."""
        if name in self._kept or tensor.device.type != "cpu" or self.bytes + tensor.nbytes > self.limit:
            return self._kept.get(name, tensor)
        try:
            self._kept[name] = self._room(tensor).copy_(tensor)
        except OSError as error:
            log.warning("activations are no longer kept on disk: %s", error)
            self.limit = self.bytes
            return tensor
        self.bytes += tensor.nbytes
        return self._kept[name]

    def _room(self, tensor: Tensor) -> Tensor:
        if self.folder is not None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
        space = os.statvfs(self.folder or tempfile.gettempdir())
        if tensor.nbytes + RESERVE > space.f_bavail * space.f_frsize:
            raise OSError(f"{math.ceil(tensor.nbytes / 2**20)} MiB more would leave less than {RESERVE / 2**30:.0f} GiB free")
        room, pages, path = mapped(tensor.shape, tensor.dtype, self.folder)
        path.unlink()
        self._maps.append(pages)
        return room

    def release(self) -> None:
        """Gives back the memory that the tensors' pages occupy; they are read again from disk (or its cache) when needed."""
        for pages in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                pages.madvise(mmap.MADV_DONTNEED)
