"""Many specs to one data frame, through a folder of records: what is done is skipped, what is killed is taken up again."""

import contextlib
import itertools
import logging
import os
import socket
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from recon.errors import ReconError
from recon.experiment import cluster, executors
from recon.experiment.cluster import Ray
from recon.experiment.config import RunOptions, RunSpec, options
from recon.experiment.record import RunRecord, read_record
from recon.experiment.run import run
from recon.experiment.session import Session
from recon.methods.callbacks import Callback
from recon.model.windows import canonical
from recon.runtime import lock
from recon.runtime.storage import check_writable, remove_unfinished, write_json

log = logging.getLogger("recon")


def grid(base: RunSpec, **axes: Iterable) -> list[RunSpec]:
    """Every combination of the values on `axes` (flat name of an option -> values), all else as in `base`.

    Raises `ReconError` for an axis that is no option.
    """
    return [base.replaced(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def fit_options(fit: str) -> dict[str, list]:
    """The axes for `grid` of a way to repair by its short name: a granularity, "matrix exact", or "<granularity> from exact"."""
    if fit == "matrix exact":
        return {"granularity": ["matrix"], "solver": ["exact"]}
    name, _, start = fit.partition(" from ")
    return {"granularity": [canonical(name)], "start": [start or "pruned"]}


def fit_name(spec: dict) -> str:
    """The short name of how a spec repairs, the reverse of `fit_options`."""
    if spec["solver"] == "exact" and spec["granularity"] == "matrix":
        return "matrix exact"
    return spec["granularity"] + (" from exact" if spec["start"] == "exact" else "")


def recipe_name(spec: dict) -> str:
    """The short name of how a spec trains: "reconstruction", a retraining method, both, or "pruned"."""
    parts = ["reconstruction"] if spec["granularity"] != "none" else []
    if spec["retrain"] != "none":
        method = spec["retrain"] + (", distilled" if spec["retrain_objective"] == "distil" else "")
        parts.append(f"then {method}" if parts else method)
    name = ", ".join(parts) or "pruned"
    return name if spec["criterion"] != "none" else f"dense, {name}"


def best(runs: pd.DataFrame, by: str) -> pd.DataFrame:
    """Of the finished runs of each value of the column `by`, the one with the lowest perplexity on held-out text."""
    if "held_out_perplexity" not in runs:
        return runs.iloc[:0]
    known = runs.dropna(subset="held_out_perplexity")
    return known.loc[known.groupby(by)["held_out_perplexity"].idxmin()]


def tuned_rates(base: RunSpec, rates: dict[str, Iterable[float]], folder: Path | str, compute: bool = True) -> dict[str, float]:
    """By model, the one of its learning rates in `rates` after which half-blocks predict held-out text best.

    What is too fast depends on the size of a model's weights, which differs by an order of magnitude between models. All else is as
    in `base`, but for evaluation text, which plays no part: one window of it is read, so that these runs are under a protocol of
    their own and never mix with what they choose for. They go through `folder` as others do; models none of whose runs are done are
    left out.
    """
    base = base.replaced(granularity="half-block", evaluation_samples=1, tasks=(), task_limit=RunSpec().evaluation.task_limit)
    specs = [base.replaced(model=model, learning_rate=float(rate)) for model, candidates in rates.items() for rate in candidates]
    found = best(run_study(specs, folder, compute=compute), "model")
    return dict(zip(found["model"], found["learning_rate"]))


def at_rates(specs: Iterable[RunSpec], rates: dict[str, float]) -> list[RunSpec]:
    """`specs` with the learning rate of their model in `rates`, where it is there and they repair by gradient descent."""
    return [
        spec.replaced(learning_rate=rates[spec.model.model])
        if spec.model.model in rates and spec.reconstruction.granularity != "none" and spec.reconstruction.solver == "adamw"
        else spec
        for spec in specs
    ]


def seed_words(runs: pd.DataFrame, by: str) -> str:
    """Which seeds the values of the column `by` were run with: "seeds 0, 1, 2 (seed 0 for lora, norms)"."""
    seeds = runs.groupby(by, sort=False, observed=True)["seed"].agg(lambda found: tuple(sorted(set(found))))
    groups = {found: [str(name) for name in seeds.index[[other == found for other in seeds]]] for found in dict.fromkeys(seeds)}
    most = max(groups, key=lambda found: (len(groups[found]) * len(found), len(found)))

    def words(found: tuple) -> str:
        return f"seed{'s' * (len(found) > 1)} {', '.join(map(str, found))}"

    def listed(names: list[str]) -> str:
        return ", ".join(f"'{name}'" if "," in name else name for name in names)

    others = [f"{words(found)} for {listed(names)}" for found, names in groups.items() if found != most]
    return words(most) + (f" ({'; '.join(others)})" if others else "")


def rate_words(names: Iterable[str], rates: dict[str, float], default: float) -> str:
    """The learning rate of each of `names`, `default` where `rates` has none: "0.003 for smollm2-135m, 0.0001 for gemma3-270m"."""
    return ", ".join(f"{rates.get(name, default):g} for {name}" for name in dict.fromkeys(names))


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
        if self.path is None or not self.path.exists():
            return False
        try:
            record = read_record(self.path)
        except ReconError:  # damaged, or no record
            return False
        return record.status == "done" and record.key == spec.key()


def read_records(folder: Path | str, keys: Iterable[str] | None = None) -> list[RunRecord]:
    """The records in `folder`: those of `keys`, in their order, or all, by name.

    Raises `ReconError` if there is no such folder, and for a file that is missing or no record.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ReconError(f"record folder {str(folder)!r} does not exist; give one with run records (*.json)")
    paths = sorted(folder.glob("*.json")) if keys is None else [folder / f"{key}.json" for key in dict.fromkeys(keys)]
    return [read_record(path) for path in paths]


class RecordStore:
    """A folder with one JSON file per run, named after the run's key."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        check_writable(self.folder, "record folder")

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def get(self, key: str) -> RunRecord | None:
        """The finished record of `key`, if there is one. A corrupt file is reported, set aside and counts as absent."""
        path = self.path(key)
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

    def clear(self) -> None:
        """Removes what processes that were killed while they wrote a record left of it; nobody else may be writing."""
        remove_unfinished(self.folder, "*.json")

    def put(self, record: RunRecord) -> None:
        write_record(record, self.path(record.key))


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
        record = RunRecord(spec=spec.flat(), key=key, status="failed")
        record.error = "".join(traceback.format_exception(error)) if not isinstance(error, ReconError) else str(error)
        return record, error


@dataclass(frozen=True)
class _Recorded(Callback):
    """Computes a run of a study, here or in a worker: its record, also where it fails.

    One that is done is written to the study's folder by whoever computed it, before a streamed run deletes its work: a death in between
    loses nothing. A worker that does not see the folder, which it tells by the lock, leaves that to the process that asked for the study.
    """

    folder: Path
    keys: frozenset[str]
    owner: tuple[str, int]  # the process that holds the folder

    def __call__(self, spec: RunSpec, session: Session, progress: bool) -> RunRecord:
        return run_or_record_failure(spec, RunOptions(progress=progress), session, [self])[0]

    def on_done(self, record: RunRecord) -> None:
        """Writes a record of this study, where its folder can be seen from here."""
        path = self.folder / f"{record.key}.json"
        if record.key not in self.keys:  # what it reads has changed: it is another run's
            return
        if self.owner == _process():
            write_record(record, path)
        elif (self.folder / lock.NAME).exists():
            try:
                write_record(record, path)
            except ReconError as error:
                log.warning("%s; the process that asked for it will write it", error)


def _process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def run_study(
    specs: Iterable[RunSpec],
    folder: Path | str,
    progress: bool = True,
    compute: bool = True,
    executor: str | Ray | None = None,
) -> pd.DataFrame:
    """Runs what is missing of `specs` and returns one row per spec, in their order.

    Every finished run is a record in `folder` at once, so that a killed study goes on where it was. A run that fails leaves
    a record that says how, and the others go on; a failed run is tried again next time.

    compute: False runs nothing; what has no record then has the status "missing".
    executor: "serial", "ray", or `recon.Ray(...)` with settings of your own; None: what the environment variable RECON_EXECUTOR
        names, or serial. What a record says, and its name, do not depend on it.

    Raises `ReconError` where another process is at work on `folder`, naming it, and where the executor cannot be had.

    Returns:
        A frame with a column per field of the spec, `fit` and `recipe` (short names, see `fit_name` and `recipe_name`), one per metric that is one number, `seconds_<phase>`,
        `flops_<phase>`, `peak_memory_bytes`, `peak_memory_bytes_<phase>`, `added_memory_bytes_<phase>`,
        `key`, `status` and `error`.
    """
    specs = list(specs)
    keys = [spec.key() for spec in specs]
    if not compute:
        return frame([_as_it_is(Path(folder), spec, key) for spec, key in zip(specs, keys, strict=True)])
    chosen = cluster.get(executor)
    store = RecordStore(folder)
    with lock.held(store.folder / lock.NAME, f"record folder {str(folder)!r}"):
        records = _run_missing(specs, keys, store, chosen, progress)
    return frame([records[key] for key in keys])


def _run_missing(
    specs: list[RunSpec], keys: list[str], store: RecordStore, executor: Ray | None, progress: bool
) -> dict[str, RunRecord]:
    """The records of all `keys`, those that are not in `store` computed and put there."""
    store.clear()
    records = {key: store.get(key) for key in dict.fromkeys(keys)}
    missing = {key: spec for key, spec in zip(keys, specs, strict=True) if records[key] is None}
    # Runs that start from one pruned state stand together, and among these the ones on as many samples.
    order = sorted(missing, key=lambda key: [str(part) for part in (*missing[key].pruned_by, missing[key].calibration.samples)])
    if not order:
        return records
    recorded = _Recorded(store.folder.resolve(), frozenset(order), _process())
    found, failed = executors.each({key: missing[key] for key in order}, recorded, executor, progress), []
    with contextlib.closing(found), tqdm(total=len(order), desc="study", unit="run", disable=not progress) as bar:
        for record in found:
            if record.status != "done" or executor is not None:  # others are written already
                store.put(record)
            records[record.key] = record
            bar.update()
            if record.status != "done":
                failed.append(record.key)
                said = record.error.strip()
                log.error("run %s failed: %s", record.key, said.splitlines()[-1] if said.startswith("Traceback") else said)
    if len(failed) > 1:
        log.error("%d of %d runs failed; their records say how: %s", len(failed), len(order), ", ".join(failed))
    return records


def _as_it_is(folder: Path, spec: RunSpec, key: str) -> RunRecord:
    """The record of a run, or one that says that there is none; nothing is written."""
    path = folder / f"{key}.json"
    if path.is_file():
        return read_record(path)
    return RunRecord(spec.flat(), key, "missing", f"not computed: no record in {folder.name}/")


def frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """One row per record, as `run_study` describes."""
    rows = [
        {
            **record.spec,
            "fit": fit_name(record.spec),
            "recipe": recipe_name(record.spec),
            **{name: value for name, value in record.metrics.items() if not isinstance(value, dict | list)},
            **{f"seconds_{phase}": value for phase, value in record.seconds.items()},
            **{f"flops_{phase}": value for phase, value in record.flops.items()},
            "peak_memory_bytes": record.peak_memory_bytes,
            **{f"peak_memory_bytes_{phase}": value for phase, value in record.peak_memory_bytes_by_phase.items()},
            **{f"added_memory_bytes_{phase}": value for phase, value in record.added_memory_bytes_by_phase.items()},
            "key": record.key,
            "status": record.status,
            "error": record.error,
        }
        for record in records
    ]
    # A study of nothing has the columns that every study has.
    always = [*options(), "fit", "recipe", "key", "status", "error"]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=always)
