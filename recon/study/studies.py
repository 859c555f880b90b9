"""Many specs to one data frame, through a folder of records: what is done is skipped, and a killed study goes on."""

import contextlib
import itertools
import logging
import os
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from filelock import FileLock
from tqdm.auto import tqdm

from recon.errors import ReconError
from recon.methods.callbacks import Callback
from recon.runtime.storage import check_writable, remove_unfinished, write_json
from recon.study import plan
from recon.study.cluster import ATTEMPTS, Ray, settings, spread
from recon.study.record import RunRecord, read_record
from recon.study.run import run
from recon.study.session import Session
from recon.study.spec import RunOptions, RunSpec

log = logging.getLogger("recon")


def grid(base: RunSpec, **axes: Iterable) -> list[RunSpec]:
    """Every combination of the values on `axes` (flat name of an option -> values), all else as in `base`.

    Raises `ReconError` for an axis that is no option.
    """
    return [base.replaced(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def write_record(record: RunRecord, path: Path) -> None:
    """Writes `record` as JSON; it appears under its name only when it is complete.

    Raises `ReconError` naming the path where that cannot be done.
    """
    try:
        write_json(path, record.to_dict())
    except OSError as error:
        raise ReconError(f"record cannot be written to {str(path)!r}: {error.strerror}; choose a place with room") from error


class RecordFile(Callback):
    """Writes the record of a run to one file, once the run is done.

    path: None: nothing is written. Raises `ReconError` for a path that cannot be written.
    """

    def __init__(self, path: Path | None):
        self.path = path
        if path is not None:
            if path.is_dir():
                raise ReconError(f"record {str(path)!r} is a folder; name a file")
            check_writable(path.parent, "record")

    def on_done(self, record: RunRecord) -> None:
        if self.path is not None:
            write_record(record, self.path)

    def holds(self, spec: RunSpec) -> bool:
        """Whether the file holds the record of a finished run of `spec`."""
        try:
            record = read_record(self.path) if self.path else None
        except ReconError:  # absent, damaged, or no record
            return False
        return record is not None and record.status == "done" and record.key == spec.key()


def record_path(folder: Path | str, key: str) -> Path:
    """The file with the record of the run of that key, in a folder of records."""
    return Path(folder) / f"{key}.json"


def _finished(folder: Path, key: str) -> RunRecord | None:
    """The finished record of `key`, if there is one. A corrupt file is reported, set aside and counts as absent."""
    path = record_path(folder, key)
    if not path.exists():
        return None
    try:
        record = read_record(path)
        if record.key != key:
            raise ReconError(f"record {str(path)!r} is that of another run ({record.key})")
    except ReconError as error:
        aside = path.with_suffix(".corrupt")
        log.warning("%s; set aside as %s and computed anew", error, aside.name)
        os.replace(path, aside)
        return None
    return record if record.status == "done" else None


def run_or_record_failure(
    spec: RunSpec, options: RunOptions = RunOptions(), session: Session | None = None, callbacks: Sequence[Callback] = ()
) -> tuple[RunRecord, Exception | None]:
    """The record of `recon.run`; where it fails, a record that says how, and the exception."""
    try:
        return run(spec, options, session=session, callbacks=callbacks).record, None
    except Exception as error:
        try:
            key = spec.key()
        except Exception:  # what it reads cannot be had any more, if it ever could
            key = ""
        said = str(error) if isinstance(error, ReconError) else "".join(traceback.format_exception(error))
        return RunRecord(spec.flat(), key, "failed", said), error


@dataclass(frozen=True)
class _Recorded(Callback):
    """Computes a run of a study, here or in a worker. A finished record is written before a streamed run deletes its work.

    keys: of the study's runs; a run whose model or texts have changed since has another one.
    """

    folder: Path
    keys: dict[RunSpec, str]

    def __call__(self, spec: RunSpec, session: Session, progress: bool) -> RunRecord:
        if not self.folder.exists():  # in a worker on another machine
            return run_or_record_failure(spec, RunOptions(progress=progress), session)[0]
        key = self.keys[spec]
        lock = self.folder / f".{key}.lock"
        with FileLock(lock):  # another study may be at work on the same run
            remove_unfinished(self.folder, f"{key}.json")
            done = _finished(self.folder, key)
            done = done or run_or_record_failure(spec, RunOptions(progress=progress), session, [self])[0]
            lock.unlink(missing_ok=True)
        return done

    def on_done(self, record: RunRecord) -> None:
        if record.key in self.keys.values():
            write_record(record, record_path(self.folder, record.key))


def run_study(
    specs: Iterable[RunSpec],
    folder: Path | str,
    progress: bool = True,
    compute: bool = True,
    executor: str | Ray | None = None,
) -> pd.DataFrame:
    """Runs what is missing of `specs` and returns one row per spec, in their order.

    Every finished run is a record in `folder` at once, so that a killed study goes on where it was; several studies may be at work
    on one folder, and share what they have in common. A run that fails leaves a record that says how, and the others go on; a failed
    run is tried again next time.

    Args:
        folder: for the records, one JSON file per run, named by its key.
        compute: False runs nothing; what has no record then has the status "missing".
        executor: "serial", "ray", or `recon.Ray(...)` with settings of your own; None: what the environment variable RECON_EXECUTOR
            names, or serial. What a record says, and its name, do not depend on it.

    Returns:
        A frame with a column per option of the spec, one per metric that is one number, `seconds_<phase>`, `flops_<phase>`,
        `peak_memory_bytes`, `peak_memory_bytes_<phase>`, `added_memory_bytes_<phase>`, `key`, `status` and `error`.

    Raises:
        ReconError: nothing can be written to `folder`, or the executor cannot be had.
    """
    specs, folder = [spec.resolved() for spec in specs], Path(folder).resolve()
    keys = [spec.key() for spec in specs]
    if not compute:
        return frame([_as_it_is(folder, spec, key) for spec, key in zip(specs, keys, strict=True)])
    how = settings(executor)
    check_writable(folder, "record folder")
    records = {key: _finished(folder, key) for key in keys}
    missing = {key: spec for key, spec in zip(keys, specs, strict=True) if records[key] is None}
    records |= _computed(missing, folder, how, progress)
    return frame([records[key] for key in keys])


def _computed(specs: dict[str, RunSpec], folder: Path, how: Ray | None, progress: bool) -> dict[str, RunRecord]:
    """Runs `specs`, and writes their records to `folder`; by key."""
    # Runs that start from one pruned state stand together, and among these the ones on as many samples.
    order = sorted(specs, key=lambda key: [str(part) for part in (*specs[key].pruned_by, specs[key].calibration.samples)])
    specs, run = {key: specs[key] for key in order}, _Recorded(folder, {spec: key for key, spec in specs.items()})
    if len(specs) > 1:
        plan.announce(list(specs.values()))
    done = _one_by_one(specs, run, progress) if how is None else _side_by_side(specs, run, how)
    records, failed = {}, []
    with contextlib.closing(done), tqdm(total=len(order), desc="study", unit="run", disable=not progress or not order) as bar:
        for key, record in done:
            if record.key != key:
                said = f"its key is {record.key} by now: the model or texts that it reads have changed, or are others where it was computed"
                record = RunRecord(specs[key].flat(), key, "failed", said if record.status == "done" else record.error)
            if record.status != "done" or how:  # others are written already
                write_record(record, record_path(folder, key))
            records[key] = record
            bar.update()
            if record.status != "done":
                failed.append(key)
                said = record.error.strip()
                log.error("run %s failed: %s", key, said.splitlines()[-1] if said.startswith("Traceback") else said)
    if len(failed) > 1:
        log.error("%d of %d runs failed; their records say how: %s", len(failed), len(order), ", ".join(failed))
    return records


def _one_by_one(specs: dict[str, RunSpec], run: "_Recorded", progress: bool) -> Iterator[tuple[str, RunRecord]]:
    """The record of each of `specs`, by key, one after the other."""
    session = Session()
    for key, spec in specs.items():
        yield key, run(spec, session, progress)


def _side_by_side(specs: dict[str, RunSpec], run: "_Recorded", how: Ray) -> Iterator[tuple[str, RunRecord]]:
    """The record of each of `specs`, by key, as soon as a worker has computed it."""
    left, lost = dict(specs), None
    on_cpu = any(spec.compute.device == "cpu" for spec in specs.values())
    with contextlib.closing(spread(how, on_cpu, _InWorker(run), specs.items())) as answers:
        for answer in answers:
            if isinstance(answer, Exception):  # runs do not raise
                lost = answer
                continue
            left.pop(answer[0])
            yield answer
    for key, spec in left.items():
        said = f"{ATTEMPTS} workers were lost with this in hand, the last one by: {' '.join(str(lost).split())}"
        yield key, RunRecord(spec.flat(), key, "failed", said)


class _InWorker:
    """What a worker does: runs one after another, which share what they can."""

    def __init__(self, run: "_Recorded"):
        self.run, self.session = run, None

    def __call__(self, task: tuple[str, RunSpec]) -> tuple[str, RunRecord]:
        (key, spec), self.session = task, self.session or Session()
        return key, self.run(spec, self.session, False)


def _as_it_is(folder: Path, spec: RunSpec, key: str) -> RunRecord:
    """The record of a run, or one that says that there is none; nothing is written."""
    if record_path(folder, key).is_file():
        return read_record(record_path(folder, key))
    return RunRecord(spec.flat(), key, "missing", f"not computed: no record in {folder.name}/")


def frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """One row per record, as `run_study` describes."""
    rows = []
    for record in records:
        row = record.spec | {name: value for name, value in record.metrics.items() if not isinstance(value, dict | list)}
        for column, parts in (
            ("seconds", record.seconds),
            ("flops", record.flops),
            ("peak_memory_bytes", record.peak_memory_bytes_by_phase),
            ("added_memory_bytes", record.added_memory_bytes_by_phase),
        ):
            row |= {f"{column}_{phase}": value for phase, value in parts.items()}
        own = ("peak_memory_bytes", "key", "status", "error")
        rows.append(row | {name: getattr(record, name) for name in own})
    # A study of nothing has the columns that every study has.
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=[*RunSpec().flat(), "key", "status", "error"])
