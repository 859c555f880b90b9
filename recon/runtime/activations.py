"""Activations that several runs of a study share, in files that are mapped into memory.

The operating system keeps as much of such files in memory as there is room for, and writes the rest to disk.
"""

import logging
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Hashable
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger("recon")
LIMIT = 16 * 2**30  # bytes
RESERVE = 2 * 2**30  # bytes of the disk that are left free


class Activations:
    """Keeps tensors by name until `limit` bytes are full; what does not fit is not kept.

    Their files are deleted as soon as they are mapped, so that the operating system frees them when the last tensor that views
    them goes, or the process dies, however it dies.

    Args:
        limit: bytes in all; 0 keeps nothing.
        folder: where the files are; default: the system's temporary folder, which on some systems is in memory.
    """

    def __init__(self, limit: int = LIMIT, folder: Path | str | None = None):
        self.limit, self.folder, self.bytes = limit, folder, 0
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
        with tempfile.NamedTemporaryFile(prefix="recon-", dir=self.folder) as file:
            if tensor.nbytes + RESERVE > shutil.disk_usage(file.name).free:
                raise OSError(f"{math.ceil(tensor.nbytes / 2**20)} MiB more would leave less than {RESERVE / 2**30:.0f} GiB free")
            # Blocks are taken before they are mapped: a full disk is then an error here, and not a crash at some write.
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
            self._maps.append(mmap.mmap(file.fileno(), tensor.nbytes))
        return torch.frombuffer(self._maps[-1], dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)

    def release(self) -> None:
        """Gives back the memory that the tensors' pages occupy; they are read again from disk (or its cache) when needed."""
        for pages in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                pages.madvise(mmap.MADV_DONTNEED)
