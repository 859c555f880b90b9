"""`RunRecord`: what a run found; and the environment that it ran in: versions, commit, device, threads."""

import functools
import json
import platform
import subprocess
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path

import torch

from recon.errors import ReconError, log
from recon.runtime.device import pick_compute_dtype
from recon.runtime.storage import write_json, writing

PACKAGES = ("recon", "torch", "transformers", "datasets", "safetensors", "numpy")


@dataclass
class RunRecord:
    """What a run found, and everything needed to check it. Seconds, operations and tokens are by phase."""

    spec: dict  # options by flat name
    key: str
    status: str = "failed"  # "done", "failed" (then `error` says how), or in tables "missing"
    error: str | None = None
    metrics: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=dict)
    flops: dict = field(default_factory=dict)
    peak_memory_bytes: int = 0  # of the phase with the highest
    peak_memory_bytes_by_phase: dict = field(default_factory=dict)
    added_memory_bytes_by_phase: dict = field(default_factory=dict)  # the peak above what was in use before the phase
    window_memory_bytes: dict = field(default_factory=dict)  # of the largest window, by purpose, computed from shapes
    tokens: dict = field(default_factory=dict)
    protocol: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    windows: list = field(default_factory=list)  # the report of each window
    retraining: dict = field(default_factory=dict)
    shared: list = field(default_factory=list)  # what was reused from runs of the session or, of the dense model, from the cache

    def to_dict(self) -> dict:
        """The record as plain data, as written to JSON."""
        return asdict(self)


def read_record(path: Path) -> RunRecord:
    """The record at `path`; raises `ReconError` naming the file, and fields that are missing, unknown or of a wrong type."""
    kinds = {each.name: each.type for each in fields(RunRecord)}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if wrong := [name for name in kinds | data if not isinstance(data.get(name), kinds.get(name, ()))]:
            raise TypeError(f"missing, unknown or of a wrong type: {', '.join(wrong)}")
    except (OSError, ValueError, TypeError) as error:
        raise ReconError(f"record {str(path)!r} cannot be read: {error}") from error
    spec = {name: tuple(value) if isinstance(value, list) else value for name, value in data["spec"].items()}
    return RunRecord(**data | {"spec": spec})


def finished(path: Path, key: str | None = None) -> RunRecord | None:
    """The record at `path` if its run is finished and has the key `key` (None: any key); else None.

    A record that cannot be read is logged, and counts as absent.
    """
    try:
        record = read_record(path) if path.is_file() else None
    except ReconError as error:
        log.warning("%s", error)
        return None
    return record if record and record.status == "done" and key in (None, record.key) else None


def write_record(record: RunRecord, path: Path) -> None:
    """Writes `record` as JSON, whole or not at all. Raises `ReconError` naming a path that cannot be written."""
    with writing(f"record {str(path)!r}", "choose a place with room"):
        write_json(path, record.to_dict())


@functools.cache
def commit() -> dict:
    """Commit of the source tree that this package runs from, and whether tracked code differs from it; None outside git."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:  # the package is installed inside another repository
        return {"git_commit": None, "git_dirty": None}
    # Figures and records are written by runs: changes to them do not make the code differ.
    written = (":(top,exclude)figures", ":(top,exclude)results")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *written)
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": None if changed is None else bool(changed)}


def environment(device: torch.device, compute_dtype: str) -> dict:
    """Versions, commit, device and threads, as plain data for a record."""
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    cpu += f" ({torch.backends.cpu.get_cpu_capability()})"
    return {
        **commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "device": f"{device.type}: {torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu}",
        "compute_dtype": str(pick_compute_dtype(compute_dtype, device)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
