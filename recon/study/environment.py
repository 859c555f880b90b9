"""What a run ran on: versions, commit, device, threads."""

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from recon.runtime.device import pick_compute_dtype

PACKAGES = ("recon", "torch", "transformers", "datasets", "safetensors", "numpy")


@functools.cache
def commit() -> dict:
    """Commit of the source tree that this package runs from, and whether tracked code differs from it; None outside git."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Figures and records are what a run writes: they make no difference to the code.
    written = (":(top,exclude)figures", ":(top,exclude)results")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *written)
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": None if changed is None else bool(changed)}


def environment(device: torch.device, compute_dtype: str) -> dict:
    """Versions, commit, device and threads, as plain data for a record."""
    here = {found.metadata["Name"].lower(): found.version for found in metadata.distributions() if found.metadata["Name"]}
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    return {
        **commit(),
        "python": platform.python_version(),
        "packages": {name: here.get(name) for name in PACKAGES},
        "device": f"{device.type}: {torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu}",
        "compute_dtype": str(pick_compute_dtype(compute_dtype, device)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
