"""Activations on disk, mapped into memory: what several runs of a study would each compute anew, and what does not fit into it."""

import json
import logging
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Hashable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from recon.runtime.storage import PART, publish, write_safetensors

log = logging.getLogger("recon")
LIMIT = 16 * 2**30  # bytes
RESERVE = 2 * 2**30  # bytes of the disk that are left free
SMALL = 64 * 2**20  # bytes up to which activations stay in memory when others are put on disk
_ALIGNMENT = 64  # bytes: where tensors begin in memory that torch allocates
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # in safetensors files
STREAM = "stream"  # the tensor's name in the file


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
        """What is kept under `name`, not to be changed in place, or None."""
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
        return self._kept[name]

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


class Spill:
    """Room for activations: in memory for small ones, else in files that are mapped into memory, and go when their tensor goes.

    The operating system keeps as much of the files in memory as there is room for, and writes the rest to disk.

    Args:
        folder: where the files are; they end in `recon.runtime.weights.PART` until they are kept.
        small: bytes up to which a tensor stays in memory.
    """

    def __init__(self, folder: Path, small: int | None = None):
        self.folder = folder
        self.small = SMALL if small is None else small
        self._files: dict[int, Path] = {}  # by where a tensor begins in memory

    def empty(self, shape: Sequence[int], dtype: torch.dtype, pinned: bool = False) -> Tensor:
        """A tensor on the CPU to be filled; a small one is `pinned` on demand. Raises `OSError` where a large one finds the disk full."""
        size = math.prod(shape) * dtype.itemsize
        if size <= self.small:
            return torch.empty(shape, dtype=dtype, pin_memory=pinned)
        content = {STREAM: {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [0, size]}}
        header = json.dumps(content).encode()
        header += b" " * (-(8 + len(header)) % _ALIGNMENT)
        begin = 8 + len(header)
        handle, name = tempfile.mkstemp(suffix=PART, dir=self.folder)
        path = Path(name)
        with open(handle, "rb+") as file:
            try:
                # Blocks are taken before they are mapped: a full disk is then an error here, and not a crash at some write.
                os.posix_fallocate(file.fileno(), 0, begin + size)
                pages = mmap.mmap(file.fileno(), begin + size)
            except BaseException:
                path.unlink()
                raise
        pages[:begin] = len(header).to_bytes(8, "little") + header
        tensor = torch.frombuffer(pages, dtype=dtype, count=size // dtype.itemsize, offset=begin).view(*shape)
        weakref.finalize(pages, self._drop, self._files, tensor.data_ptr(), path)
        self._files[tensor.data_ptr()] = path
        return tensor

    @staticmethod
    def _drop(files: dict[int, Path], place: int, path: Path) -> None:
        files.pop(place, None)
        path.unlink(missing_ok=True)  # where it was kept, it has another name by now

    def keep(self, tensor: Tensor, path: Path) -> None:
        """Writes `tensor` to the safetensors file `path`, which appears when all of it is on the disk.

        Where the tensor is in a file already, that file gets the name, and stays when the tensor goes.
        """
        file = self._files.pop(tensor.data_ptr(), None)
        if file is None or not file.exists():
            write_safetensors(path, {STREAM: tensor})
        else:
            publish(file, path)
