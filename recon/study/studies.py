"""Runs many specs, and returns one data frame. Records go to a folder: finished runs are skipped, a killed study resumes."""

import contextlib
import itertools
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from recon.errors import ReconError, check_kind, log
from recon.methods.training import Callback
from recon.runtime.storage import check_writable, locked
from recon.study import plan
from recon.study.cluster import ATTEMPTS, Ray, settings, spread
from recon.study.record import RunRecord, finished, read_record, write_record
from recon.study.run import Session, run
from recon.study.spec import RunOptions, RunSpec


def grid(base: RunSpec, **axes: Iterable) -> list[RunSpec]:
    """Every combination of values on `axes` (option -> values), the rest as in `base`. Raises `ReconError` for a wrong axis."""
    if single := next(
        (name for name, values in axes.items() if isinstance(values, str) or not isinstance(values, Iterable)), None
    ):
        raise ReconError(f"values of {single} are {axes[single]!r}; allowed: a list of values")
    return [base.replaced(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


class _Writer(Callback):
    """Writes a run's record to `path`, if given. Raises `ReconError` if the run's key is not `key`, if given."""

    def __init__(self, path: Path | None, key: str):
        self.path, self.key = path, key

    def on_done(self, record: RunRecord) -> None:
        self.check(record.key)
        if self.path:
            write_record(record, self.path)

    def check(self, now: str) -> None:
        if self.key and now != self.key:
            raise ReconError(f"its key is {now} by now: the model or texts that it reads have changed, or are others here")


def run_to_record(
    spec: RunSpec, path: Path | None, options: RunOptions, session: Session | None = None, key: str = ""
) -> tuple[RunRecord, Exception | None]:
    """Runs `spec` and returns its record and None; if it fails, a record that says why, and the exception. Writes the record to
    `path`, but no failure over the record of a finished run. key: of the run; default: the one that it has now."""
    if path:
        check_writable(path.parent, "record")
        if path.is_dir():
            raise ReconError(f"record {str(path)!r} is a folder; name a file")
        if options.save and path.resolve().is_relative_to(options.save.resolve()):
            raise ReconError(f"record {str(path)!r} is in the folder of the saved model, which holds its own; name another place")
        if path.resolve().parent == Path(spec.model.model).resolve():
            raise ReconError(f"record {str(path)!r} is in the folder of the model, and would change it; name another place")
        if path.exists() and not key:
            done = read_record(path)  # raises if the file is not a record
            if done.status == "done" and done.key != spec.key():
                raise ReconError(f"record {str(path)!r} is of another run, {done.key}; name another place")
    try:
        writer, key = _Writer(path, key), spec.key() if path or key else ""
        writer.check(key)
        return run(spec, options, session=session, callbacks=[writer]).record, None
    except Exception as error:
        said = str(error) if isinstance(error, ReconError) else "".join(traceback.format_exception(error))
        record = RunRecord(spec.flat(), key, "failed", said)
        if path and not finished(path):
            write_record(record, path)
        return record, error


def _work(folder: Path, options: RunOptions, session: Session, task: tuple[str, RunSpec]) -> tuple[str, RunRecord]:
    """Computes one run of a study, here or in a worker, unless it is finished by now; returns its key and record."""
    key, spec = task
    if not folder.exists():  # in a worker on another machine
        return key, run_to_record(spec, None, options, session, key)[0]
    path = folder / f"{key}.json"
    with locked(path, "record", wait=True):  # another study may compute the same run
        return key, finished(path, key) or run_to_record(spec, path, options, session, key)[0]


def run_study(
    specs: Iterable[RunSpec], folder: Path | str, progress: bool = True, compute: bool = True, executor: str | Ray | None = None
) -> pd.DataFrame:
    """Runs those of `specs` that are not finished, and returns one row per spec, in their order.

    Each finished run is a record in `folder` at once, so a killed study resumes where it was. Several studies may use one folder
    at the same time. A run that fails leaves a record that says why, and is tried again next time; the others go on.

    specs: several, or one. folder: for the records, one JSON file per run, named by its key.
    compute: False runs nothing; a run without a record then has the status "missing".
    executor: "serial", "ray", or `recon.Ray(...)` with settings of your own; None: what the environment variable
        RECON_EXECUTOR names, or serial. Records and their names do not depend on it.

    Returns a frame with a column per option of the spec, one per metric that is one number, `seconds_<phase>`, `flops_<phase>`,
    `peak_memory_bytes`, `peak_memory_bytes_<phase>`, `added_memory_bytes_<phase>`, `key`, `status` and `error`.

    Raises `ReconError` if a model or text is not found, `folder` cannot be written, the executor is not available, or, with
    compute False, a record cannot be read.
    """
    for spec in (specs := [specs] if isinstance(specs, RunSpec) else [*specs]):
        check_kind("spec", spec, RunSpec)
    specs, folder = [spec.resolved() for spec in specs], Path(folder).resolve()
    keys, how = [spec.key() for spec in specs], settings(executor)
    known = dict(zip(keys, specs))
    paths = {key: folder / f"{key}.json" for key in known}
    if compute:
        check_writable(folder, "record folder")
        records = {key: finished(path, key) for key, path in paths.items()}
        records |= _computed({key: spec for key, spec in known.items() if records[key] is None}, folder, how, progress)
    else:
        missing = "missing", f"not computed: no record in {folder.name}/"
        records = {key: RunRecord(spec.flat(), key, *missing) for key, spec in known.items()}
        records |= {key: read_record(path) for key, path in paths.items() if path.is_file()}
    # The spec as given: a record may hold another path to the same files.
    return frame(replace(records[key], spec=spec.flat()) for key, spec in zip(keys, specs))


def _computed(specs: dict[str, RunSpec], folder: Path, how: Ray | None, progress: bool) -> dict[str, RunRecord]:
    """Runs `specs`, and writes their records to `folder`. Both `specs` and the records returned are by key."""
    # Sorted so that runs with the same pruned state are neighbours; among these, runs with equal samples and reconstruction.
    parts = {key: (*spec.pruned_by, spec.calibration.samples, spec.reconstruction) for key, spec in specs.items()}
    order = sorted(specs, key=lambda key: [*map(str, parts[key])])
    fits = Counter(spec.reconstructed_by for spec in specs.values())
    session = Session({fit for fit, count in fits.items() if count > 1})
    if len(specs) > 1:
        plan.announce(list(specs.values()))
    work = partial(_work, folder, RunOptions(progress=progress and how is None), session)
    tasks, on_cpu = [(key, specs[key]) for key in order], all(spec.compute.device == "cpu" for spec in specs.values())
    answers = (work(task) for task in tasks) if how is None else spread(how, on_cpu, work, tasks)
    records, lost = {}, None

    def keep(key: str, record: RunRecord) -> None:
        records[key] = record
        if how:  # the worker may not have this folder
            path = folder / f"{key}.json"
            with locked(path, "record", wait=True):
                if record.status == "done" or not finished(path, key):
                    write_record(record, path)
        if record.status != "done":
            said = record.error.strip()
            log.error("run %s failed: %s", key, said.splitlines()[-1] if said.startswith("Traceback") else said)

    bar = tqdm(answers, total=len(order), desc="study", unit="run", disable=not progress or not order)
    with contextlib.closing(answers), bar:
        for answer in bar:
            if isinstance(answer, Exception):  # a worker was lost: runs do not raise
                lost = answer
            else:
                keep(*answer)
    for key in specs.keys() - records.keys():
        said = f"no worker finished it in up to {ATTEMPTS} attempts, the last one ended by: {' '.join(str(lost).split())}"
        keep(key, RunRecord(specs[key].flat(), key, "failed", said))
    return records


def frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """One row per record, as `run_study` describes."""
    rows, ends = [], ("peak_memory_bytes", "key", "status", "error")
    for record in records:
        said = vars(record)
        row = record.spec | {name: value for name, value in record.metrics.items() if not isinstance(value, dict | list)}
        for name in ("seconds", "flops", "peak_memory_bytes_by_phase", "added_memory_bytes_by_phase"):
            row |= {f"{name.removesuffix('_by_phase')}_{phase}": value for phase, value in said[name].items()}
        rows.append(row | {name: said[name] for name in ends})
    # Without records, there are the columns that every study has.
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=[*RunSpec().flat(), *ends])
