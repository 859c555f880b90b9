"""The compute device and its precision; how much memory there is, and how much something takes."""

import contextlib
import ctypes
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from recon.errors import ReconError

HOST = torch.device("cpu")
COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SAVED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # dtypes that a model can be saved in


def pick_device(name: str = "auto") -> torch.device:
    """The torch device called `name`; "auto" is CUDA if there is one, else the CPU. Raises `ReconError` for one that cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ReconError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); try auto or cpu") from None


def pick_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; "auto" is bfloat16 where the hardware has it, else float32. Raises `ReconError` for other names."""
    if name in COMPUTE_DTYPES:
        return COMPUTE_DTYPES[name]
    if name != "auto":
        raise ReconError(f"unknown compute dtype {name!r}; allowed: auto, {', '.join(COMPUTE_DTYPES)}")
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")
    return torch.bfloat16 if native else torch.float32


def limit_compiled_shapes() -> None:
    """Limits oneDNN's cache of compiled matrix products (CPUs) to the last 16 shapes; call it before the first product.

    The default is 1,024. Experts read another number of tokens with every batch, so that it would grow to hundreds of megabytes.
    Sets the environment variables ONEDNN_PRIMITIVE_CACHE_CAPACITY and LRU_CACHE_CAPACITY unless they are set already. Child
    processes inherit them. The command line, the notebook runner and Ray workers call this; other programs may.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "16")


def cores() -> int:
    """The number of CPUs that this process may use; a SLURM job, say, has a few of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def out_of_memory(error: Exception) -> bool:
    """Whether `error` says that a device's memory is used up."""
    from accelerate.utils.memory import should_reduce_batch_size  # slow to import

    has_message = bool(error.args) and isinstance(error.args[0], str)  # accelerate looks at nothing else
    return isinstance(error, torch.OutOfMemoryError) or (has_message and should_reduce_batch_size(error))


class PeakMemory(contextlib.AbstractContextManager):
    """Peak memory of what runs inside, in bytes: memory of a CUDA device, or else resident memory of this process.

    Linux can reset its high-water mark (`/proc/self/clear_refs`). On other systems the peak is that of the process so far.

    anonymous: leaves out what is mapped from files, which the system takes back when it needs memory. The system keeps no mark of that,
    so it is sampled every hundredth of a second (on Linux; elsewhere everything counts).
    """

    def __init__(self, device: torch.device, anonymous: bool = False):
        self.device, self.cuda = device, device.type == "cuda"
        self.anonymous = anonymous and not self.cuda and bool(resident_anonymous())
        self.bytes = self.before = 0  # the peak; what was in use on entry
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.bytes = self.before = (
            torch.cuda.memory_allocated(self.device) if self.cuda else resident_anonymous() if self.anonymous else resident()
        )
        if self.anonymous:
            self._thread.start()
        return self

    def __exit__(self, *exception):
        if self.anonymous:
            self._stop.set()
            self._thread.join()
        else:
            self.bytes = torch.cuda.max_memory_allocated(self.device) if self.cuda else resident(highest=True)

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self.bytes = max(self.bytes, resident_anonymous())


def resident(highest: bool = False) -> int:
    """Resident memory of this process in bytes: now, or its peak. Always the peak on systems that tell nothing else."""
    return _status("VmHWM:" if highest else "VmRSS:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_anonymous() -> int:
    """Resident memory of this process in bytes that is not mapped from files; 0 if the system does not tell."""
    return _status("RssAnon:")


def _status(name: str, file: Path = Path("/proc/self/status")) -> int:
    """Bytes of the entry `name`, which Linux states in KiB, of `file`; 0 if there is none."""
    try:
        return int(file.read_text().split(name)[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0


def available_memory(root: Path | str = "/") -> int:
    """Bytes of memory that this process can still use without swapping; 0 if the system does not tell.

    That is what the machine has left, or less if the limit of a control group leaves less, as in containers and SLURM jobs.

    root: the folder that /proc and /sys are in.
    """
    left = _status("MemAvailable:", Path(root) / "proc/meminfo")
    return left and max(1, min([left, *_left_in_groups(Path(root))]))


def available_on_device(device: torch.device) -> int:
    """Bytes of a GPU's own memory that this process can still use; 0 for other devices."""
    if device.type != "cuda":
        return 0
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes that are left of the memory limit of each control group that this process is in; groups without a limit are left out."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):  # version 2 names no controllers
        if controllers and "memory" not in controllers.split(","):
            continue
        place, names, prefix = root / "sys/fs/cgroup", ("memory.max", "memory.current"), ""
        if controllers:
            place, names, prefix = place / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
        # The groups around it count too. In a container the path may be the host's, and its own group is the root.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for group in (place.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)):
            with contextlib.suppress(OSError, ValueError, KeyError):  # there is no such group, or its limit is "max"
                most, used = (int((group / name).read_text()) for name in names)
                pages = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
                # Cached files count as used, but make room when memory is needed.
                yield most - used + sum(int(pages[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))


def release_memory() -> None:
    """Returns freed memory to the operating system (glibc only) and to CUDA."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
