"""What a run answers: `RunRecord`."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from recon.errors import ReconError


@dataclass
class RunRecord:
    """What a run found, and everything needed to check it.

    `status` is "done", "failed" (then `error` says how), or in tables "missing". `spec` holds options by flat name. `seconds`, `flops`
    and `tokens` are by phase; `peak_memory_bytes` is that of the highest phase. `windows`: the report of each window. `shared`: what
    was taken from earlier runs of the session.
    """

    spec: dict
    key: str
    status: str = "failed"
    error: str | None = None
    metrics: dict = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    peak_memory_bytes_by_phase: dict[str, int] = field(default_factory=dict)
    added_memory_bytes_by_phase: dict[str, int] = field(default_factory=dict)  # beyond what was in use before the phase
    window_memory_bytes: dict[str, int] = field(default_factory=dict)  # counted: see `recon.study.plan.window_memory`
    tokens: dict[str, int] = field(default_factory=dict)
    protocol: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    windows: list[dict] = field(default_factory=list)
    retraining: dict = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """The record as plain data, as written to JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "RunRecord":
        """The record from plain data; raises `ReconError` naming missing, unknown or malformed fields."""
        data = {"window_memory_bytes": {}} | data  # which records from before it was counted do not have
        wanted = {f.name for f in fields(cls)}
        if set(data) != wanted:
            raise ReconError(f"not a record: fields missing {sorted(wanted - set(data))}, unknown {sorted(set(data) - wanted)}")
        for name in (
            "spec",
            "metrics",
            "seconds",
            "flops",
            "peak_memory_bytes_by_phase",
            "added_memory_bytes_by_phase",
            "window_memory_bytes",
            "tokens",
            "protocol",
            "environment",
            "retraining",
        ):
            if not isinstance(data[name], dict):
                raise ReconError(f"not a record: {name} is {type(data[name]).__name__}, not an object")
        spec = {name: tuple(value) if isinstance(value, list) else value for name, value in data["spec"].items()}
        return cls(**{**data, "spec": spec})


def read_record(path: Path) -> RunRecord:
    """The record at `path`; raises `ReconError` naming the file where it is not a whole record."""
    try:
        return RunRecord.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ReconError, OSError, ValueError, TypeError, AttributeError) as error:
        raise ReconError(f"record {str(path)!r} cannot be read: {error}") from error
