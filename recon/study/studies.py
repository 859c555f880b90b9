"""Many specs to one data frame, through a folder of records: what is done is skipped, and a killed study goes on."""

import contextlib
import itertools
import logging
import os
import traceback
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from recon.errors import ReconError
from recon.methods.callbacks import Callback
from recon.runtime.storage import check_writable, locked, write_json, writing
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
    with writing(f"record {str(path)!r}", "choose a place with room"):
        write_json(path, record.to_dict())


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


def _finished(folder: Path, key: str) -> RunRecord | None:
    """The finished record of `key`, if there is one. A corrupt file is reported, set aside and counts as absent."""
    path = folder / f"{key}.json"
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


class _Work(Callback):
    """Computes runs of a study one after another, which share what they can, here or in a worker; by key.

    A finished record is written before a streamed run deletes its work. keys: of the study's runs; a run whose model or texts have
    changed since has another one.
    """

    def __init__(self, folder: Path, keys: Collection[str], progress: bool):
        self.folder, self.keys, self.options, self.session = folder, keys, RunOptions(progress=progress), Session()

    def __call__(self, task: tuple[str, RunSpec]) -> tuple[str, RunRecord]:
        key, spec = task
        if not self.folder.exists():  # in a worker on another machine
            return key, run_or_record_failure(spec, self.options, self.session)[0]
        with locked(self.folder / f"{key}.json", "record", wait=True):  # another study may be at work on the same run
            done = _finished(self.folder, key)
            return key, done or run_or_record_failure(spec, self.options, self.session, [self])[0]

    def on_done(self, record: RunRecord) -> None:
        if record.key in self.keys:
            write_record(record, self.folder / f"{record.key}.json")


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
        said = f"not computed: no record in {folder.name}/"
        paths = [folder / f"{key}.json" for key in keys]
        return frame(
            read_record(path) if path.is_file() else RunRecord(spec.flat(), path.stem, "missing", said)
            for spec, path in zip(specs, paths, strict=True)
        )
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
    if len(specs) > 1:
        plan.announce(list(specs.values()))
    tasks, work = [(key, specs[key]) for key in order], _Work(folder, set(specs), progress and how is None)
    on_cpu = any(spec.compute.device == "cpu" for spec in specs.values())
    answers = (work(task) for task in tasks) if how is None else spread(how, on_cpu, work, tasks)
    records, lost = {}, None

    def keep(key: str, record: RunRecord) -> None:
        records[key] = record
        if record.status != "done" or how:  # others are written already
            write_record(record, folder / f"{key}.json")
        if record.status != "done":
            said = record.error.strip()
            log.error("run %s failed: %s", key, said.splitlines()[-1] if said.startswith("Traceback") else said)

    with (
        contextlib.closing(answers),
        tqdm(answers, total=len(order), desc="study", unit="run", disable=not progress or not order) as bar,
    ):
        for answer in bar:
            if isinstance(answer, Exception):  # runs do not raise
                lost = answer
                continue
            key, record = answer
            if record.key != key:
                said = (
                    f"its key is {record.key} by now: the model or texts that it reads have changed, or are others where it ran"
                )
                record = RunRecord(specs[key].flat(), key, "failed", said if record.status == "done" else record.error)
            keep(key, record)
    for key in specs.keys() - records.keys():
        said = f"{ATTEMPTS} workers were lost with this in hand, the last one by: {' '.join(str(lost).split())}"
        keep(key, RunRecord(specs[key].flat(), key, "failed", said))
    return records


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
