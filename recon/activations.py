"""A bounded store of tensors on disk, mapped into memory, for what several runs of a study would each compute anew."""

import logging
import math
import mmap
import os
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

    Each tensor is a file that is deleted as soon as it is mapped: the operating system reads it from disk or from its cache,
    and frees it when the last tensor that views it goes, or the process dies, however it dies.

    Args:
        limit: bytes in all; 0 keeps nothing.
        folder: where the files are, for the moment that they have names; default: the system's temporary folder, which on
            some systems is in memory.
    """

    def __init__(self, limit: int = LIMIT, folder: Path | str | None = None):
        self.limit = limit
        self.folder = folder
        self.bytes = 0
        self._kept: dict[Hashable, Tensor] = {}
        self._maps: list[mmap.mmap] = []

    def get(self, name: Hashable) -> Tensor | None:
        """The tensor kept under `name`, not to be changed in place, or None."""
        return self._kept.get(name)

    def put(self, name: Hashable, tensor: Tensor) -> Tensor:
        """Keeps `tensor` under `name`, where there is room; returns the copy kept, or else `tensor` itself."""
        size = tensor.numel() * tensor.element_size()
        if name in self._kept or tensor.device.type != "cpu" or self.bytes + size > self.limit:
            return self._kept.get(name, tensor)
        try:
            mapped = self._mapped(tensor, size)
        except OSError as error:
            log.warning("activations are no longer kept on disk: %s", error)
            self.limit = self.bytes
            return tensor
        self._kept[name] = mapped
        self.bytes += size
        return mapped

    def _mapped(self, tensor: Tensor, size: int) -> Tensor:
        if self.folder is not None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix="recon-", dir=self.folder) as file:
            space = os.statvfs(file.name)
            if size + RESERVE > space.f_bavail * space.f_frsize:
                raise OSError(f"{math.ceil(size / 2**20)} MiB more would leave less than {RESERVE / 2**30:.0f} GiB free")
            # Blocks are taken before they are mapped: a full disk is then an error here, and not a crash at some write.
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
            pages = mmap.mmap(file.fileno(), max(size, 1))
        self._maps.append(pages)
        mapped = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
        return mapped.copy_(tensor)

    def release(self) -> None:
        """Gives back the memory that the tensors' pages occupy; they are read again from disk (or its cache) when needed."""
        for pages in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                pages.madvise(mmap.MADV_DONTNEED)
