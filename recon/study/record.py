"""What a run answers: `RunRecord`."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from recon.errors import ReconError


@dataclass
class RunRecord:
    """What a run found, and everything needed to check it.

    `status` is "done", "failed" (then `error` says how), or in tables "missing". `spec` holds options by flat name. `seconds`, `flops`
    and `tokens` are by phase; `peak_memory_bytes` is that of the highest phase, `added_memory_bytes_by_phase` what was not in use before
    the phase, `window_memory_bytes` what the largest window takes as counted, by kind. `windows`: the report of each window.
    `shared`: what was taken from earlier runs of the session.
    """

    spec: dict
    key: str
    status: str = "failed"
    error: str | None = None
    metrics: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=dict)
    flops: dict = field(default_factory=dict)
    peak_memory_bytes: int = 0
    peak_memory_bytes_by_phase: dict = field(default_factory=dict)
    added_memory_bytes_by_phase: dict = field(default_factory=dict)
    window_memory_bytes: dict = field(default_factory=dict)
    tokens: dict = field(default_factory=dict)
    protocol: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    windows: list = field(default_factory=list)
    retraining: dict = field(default_factory=dict)
    shared: list = field(default_factory=list)

    def to_dict(self) -> dict:
        """The record as plain data, as written to JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "RunRecord":
        """The record from plain data; raises `ReconError` naming missing, unknown or malformed fields."""
        wanted, data = {each.name: each.type for each in fields(cls)}, {"window_memory_bytes": {}} | data  # the newest field
        if data.keys() != wanted.keys():
            raise ReconError(
                f"not a record: fields missing {sorted(wanted - data.keys())}, unknown {sorted(data.keys() - wanted)}"
            )
        if wrong := [name for name, kind in wanted.items() if not isinstance(data[name], kind)]:
            raise ReconError(f"not a record: {wrong[0]} is {type(data[wrong[0]]).__name__}")
        spec = {name: tuple(value) if isinstance(value, list) else value for name, value in data["spec"].items()}
        return cls(**{**data, "spec": spec})


def read_record(path: Path) -> RunRecord:
    """The record at `path`; raises `ReconError` naming the file where it is not a whole record."""
    try:
        return RunRecord.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ReconError(f"record {str(path)!r} cannot be read: {error}") from error
