"""The compute device and its precision; how much memory is available, and how much is used."""

import contextlib
import ctypes
import os
import resource
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch

from recon.errors import ReconError

COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SAVED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # dtypes that a model can be saved in


def pick_device(name: str = "auto") -> torch.device:
    """The torch device called `name`; "auto": CUDA if there is one, else the CPU. Raises `ReconError` if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # fails on the meta device
        return probe.device
    except (RuntimeError, AssertionError) as error:
        raise ReconError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); try auto or cpu") from None


def pick_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; "auto": bfloat16 if the hardware has it, else float32. Raises `ReconError` for others."""
    if name == "auto":
        can = torch.cpu.get_capabilities()
        on_cpu = any(can.get(kind) for kind in ("avx512_bf16", "amx_bf16", "bf16"))
        native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else on_cpu
        name = "bfloat16" if native else "float32"
    if name not in COMPUTE_DTYPES:
        raise ReconError(f"unknown compute dtype {name!r}; allowed: auto, {', '.join(COMPUTE_DTYPES)}")
    return COMPUTE_DTYPES[name]


def limit_compiled_shapes() -> None:
    """Limits oneDNN's cache of compiled matrix products. Experts would fill it: their number of tokens differs in every batch.

    Call it before the first product. Environment variables that are set already are kept; child processes inherit all of them.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "16")


def out_of_memory(error: Exception) -> bool:
    """Whether `error` says that a device has run out of memory."""
    from accelerate.utils.memory import should_reduce_batch_size  # slow to import

    has_message = bool(error.args) and isinstance(error.args[0], str)  # accelerate expects a string
    return isinstance(error, torch.OutOfMemoryError) or (has_message and should_reduce_batch_size(error))


@contextlib.contextmanager
def peak_memory(device: torch.device, anonymous: bool = False) -> Iterator[SimpleNamespace]:
    """Context that measures the memory of a GPU, or of this process: `before` is what was in use, and `bytes` the peak inside.

    On Linux the peak of the process is reset first (`/proc/self/clear_refs`); elsewhere it counts from the start of the process.
    anonymous: without what is mapped from files. That peak is not recorded, so memory is sampled every hundredth of a second.
    """
    cuda, ended = device.type == "cuda", threading.Event()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    used = partial(torch.cuda.memory_allocated, device) if cuda else partial(resident, anonymous)
    peak = SimpleNamespace(before=used(), bytes=0)

    def sample() -> None:
        while not ended.wait(0.01):
            peak.bytes = max(peak.bytes, used())

    if anonymous and not cuda:
        threading.Thread(target=sample, daemon=True).start()
    try:
        yield peak
    finally:
        ended.set()
        highest = torch.cuda.max_memory_allocated(device) if cuda else used() if anonymous else _highest()
        peak.bytes = max(peak.before, peak.bytes, highest)


def resident(anonymous: bool = False) -> int:
    """Resident memory of this process in bytes; anonymous: without what is mapped from files, if the system reports that."""
    memory = psutil.Process().memory_info()
    return memory.rss - (getattr(memory, "shared", 0) if anonymous else 0)


def _highest() -> int:
    """The peak resident memory of this process in bytes; on Linux, since the peak was last reset."""
    try:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process can still use without swapping: what the machine has left, or less if the limit of a
    control group (version 2) leaves less, as in containers and SLURM jobs. root: the folder that /proc and /sys are in.
    """
    left = [psutil.virtual_memory().available]
    with contextlib.suppress(OSError, IndexError):
        parts = (root / "proc/self/cgroup").read_text().split("0::/")[1].split("\n")[0].split("/")
        # The groups around it limit it too. In a container the path may be the host's, and the own group is the root.
        for depth in range(len(parts) + 1):
            group = root.joinpath("sys/fs/cgroup", *(part for part in parts[:depth] if part != ".."))
            with contextlib.suppress(OSError, ValueError, KeyError):  # there is no such group, or its limit is "max"
                most, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
                pages = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
                # Cached files count as used, but are dropped when memory is needed.
                left.append(most - used + int(pages["active_file"]) + int(pages["inactive_file"]))
    return max(1, min(left))


def release_memory() -> None:
    """Returns freed memory to the operating system (glibc only) and to CUDA."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
