"""Activations in files that are mapped into memory: those that several runs of a study share, and those that memory is too small for.

The operating system keeps as much of such files in memory as there is room for, and writes the rest to disk.
"""

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

from recon.runtime.storage import PART, rename, write_safetensors

log = logging.getLogger("recon")
LIMIT = 16 * 2**30  # bytes
RESERVE = 2 * 2**30  # bytes of the disk that are left free
SMALL = 64 * 2**20  # bytes up to which activations stay in memory when others are put on disk
_ALIGNMENT = 64  # bytes: where tensors begin in memory that torch allocates
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # in safetensors files
STREAM = "stream"  # the tensor's name in the file


def mapped(
    shape: Sequence[int], dtype: torch.dtype, folder: Path | str | None, header: bytes = b""
) -> tuple[Tensor, mmap.mmap, Path]:
    """A tensor to be filled, the mapped pages of a new file in `folder` that it views behind `header`, and the file.

    The pages are freed with the last tensor that views them. Raises `OSError` where the disk is full.
    """
    size = math.prod(shape) * dtype.itemsize
    handle, name = tempfile.mkstemp(prefix="recon-", suffix=PART, dir=folder)
    path = Path(name)
    with open(handle, "rb+") as file:
        try:
            # Blocks are taken before they are mapped: a full disk is then an error here, and not a crash at some write.
            os.posix_fallocate(file.fileno(), 0, len(header) + size)
            pages = mmap.mmap(file.fileno(), len(header) + size)
        except BaseException:
            path.unlink()
            raise
    pages[: len(header)] = header
    tensor = torch.frombuffer(pages, dtype=dtype, count=size // dtype.itemsize, offset=len(header)).view(*shape)
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


class Spill:
    """Room for activations: in memory for small ones, else in mapped safetensors files, deleted with their tensors unless kept.

    Args:
        folder: where the files are; until they are kept, their names end in `recon.runtime.storage.PART`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[int, Path] = {}  # by where a tensor begins in memory

    def empty(self, shape: Sequence[int], dtype: torch.dtype, pinned: bool = False) -> Tensor:
        """A tensor on the CPU to be filled; a small one is `pinned` on demand. Raises `OSError` if the disk is too full for a large one."""
        size = math.prod(shape) * dtype.itemsize
        if size <= SMALL:
            return torch.empty(shape, dtype=dtype, pin_memory=pinned)
        header = json.dumps({STREAM: {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [0, size]}}).encode()
        header += b" " * (-(8 + len(header)) % _ALIGNMENT)
        tensor, pages, path = mapped(shape, dtype, self.folder, len(header).to_bytes(8, "little") + header)
        weakref.finalize(pages, path.unlink, missing_ok=True)  # a file that is kept has another name by then
        self._files[tensor.data_ptr()] = path
        return tensor

    def keep(self, tensor: Tensor, path: Path) -> None:
        """Writes `tensor` to the safetensors file `path`, which appears when all of it is on the disk.

        A tensor that is in a file already stays there: that file is renamed, and stays when the tensor goes.
        """
        file = self._files.pop(tensor.data_ptr(), None)
        if file is None or not file.exists():
            write_safetensors(path, {STREAM: tensor})
        else:
            rename(file, path)
