"""Where the arithmetic happens and in what precision; how much memory it took."""

import contextlib
import resource
from pathlib import Path

import torch

from recon.attention import FastCausalAttention
from recon.errors import ReconError

COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def pick_device(name: str = "auto") -> torch.device:
    """The torch device called `name`; "auto" is CUDA where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ReconError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); try auto or cpu") from None


def pick_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that matrix products are computed in; "auto" is bfloat16 where the hardware multiplies it natively."""
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


class Arithmetic(contextlib.AbstractContextManager):
    """Context, to be entered again and again, in which matrix products run in `dtype` while parameters keep theirs."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._entered: list[contextlib.ExitStack] = []

    def __enter__(self):
        stack = contextlib.ExitStack()
        stack.enter_context(torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32))
        if self.device.type == "cpu" and self.dtype == torch.bfloat16:
            stack.enter_context(FastCausalAttention())
        self._entered.append(stack)
        return self

    def __exit__(self, *exception):
        self._entered.pop().close()


def arithmetic(device: torch.device, compute_dtype: str) -> Arithmetic:
    """The context for `compute_dtype` ("auto", "bfloat16", "float32") on `device`; see `pick_compute_dtype`."""
    return Arithmetic(device, pick_compute_dtype(compute_dtype, device))


class PeakMemory(contextlib.AbstractContextManager):
    """Peak memory of what runs inside, in bytes: of the CUDA device where one is used, else resident memory of this process.

    Linux can restart its high-water mark (`/proc/self/clear_refs`); elsewhere the mark is that of the whole process so far.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes = 0

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *exception):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
            return
        try:
            status = Path("/proc/self/status").read_text()
            self.bytes = int(status.split("VmHWM:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            self.bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
