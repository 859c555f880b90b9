"""Many runs through a folder of records: skipped, taken up again, killed, corrupted, failed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import recon
from recon import study
from recon.errors import ReconError
from recon.study import RecordStore, grid, read_record, run_study, write_record


@pytest.fixture(scope="module")
def spec(tiny_folder, tiny_text) -> recon.RunSpec:
    return recon.RunSpec(
        model=tiny_folder, text=tiny_text, samples=4, sequence_length=16, held_out_samples=0, granularity="none",
        evaluation_texts=(tiny_text,), evaluation_samples=2, evaluation_length=16, compute_dtype="float32",
    )  # fmt: skip


@pytest.fixture
def ran(monkeypatch) -> list[recon.RunSpec]:
    """The specs that are really run, in their order."""
    specs = []

    def spy(spec, *args, **kwargs):
        specs.append(spec)
        return recon.run(spec, *args, **kwargs)

    monkeypatch.setattr(study, "run", spy)
    return specs


def marks(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells whether a record was written again: its inode and time."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.json")}


# ---- grids


def test_grid_is_every_combination_in_order():
    base = recon.RunSpec(samples=3)
    specs = grid(base, criterion=["wanda", "ria"], seed=range(2))
    assert [(s.criterion, s.seed) for s in specs] == [("wanda", 0), ("wanda", 1), ("ria", 0), ("ria", 1)]
    assert {s.samples for s in specs} == {3}
    assert grid(base) == [base]


def test_grid_refuses_an_axis_that_is_no_field():
    with pytest.raises(ReconError, match="unknown field 'granularities'; allowed: model, revision"):
        grid(recon.RunSpec(), granularities=["block"])


def test_grid_refuses_a_bad_value():
    with pytest.raises(ReconError, match="'entropy'"):
        grid(recon.RunSpec(), criterion=["wanda", "entropy"])


# ---- rows and records


def test_rows_are_those_of_the_specs_in_their_order(spec, tmp_path, ran):
    specs = grid(spec, seed=[1, 0], criterion=["wanda", "magnitude"])
    specs.append(specs[0])
    found = run_study(specs, tmp_path, progress=False)
    assert list(zip(found.seed, found.criterion, strict=True)) == [(s.seed, s.criterion) for s in specs]
    assert list(found.key) == [s.key() for s in specs]
    assert len(ran) == 4  # the same spec twice is one run
    assert {path.name for path in tmp_path.iterdir()} == {f"{s.key()}.json" for s in specs}
    for row, s in zip(found.to_dict("records"), specs, strict=True):
        record = read_record(tmp_path / f"{s.key()}.json")
        assert row["perplexity"] == record.metrics["perplexity"]
        assert row["seconds_total"] == record.seconds["total"]
        assert row["peak_memory_bytes"] == record.peak_memory_bytes
        assert row["status"] == "done" and row["error"] is None


def test_runs_that_share_a_pruned_state_follow_one_another(spec, tmp_path, ran):
    run_study(grid(spec, granularity=["none", "block"], criterion=["wanda", "magnitude"]), tmp_path, progress=False)
    criteria = [s.criterion for s in ran]
    assert criteria in (["wanda"] * 2 + ["magnitude"] * 2, ["magnitude"] * 2 + ["wanda"] * 2)
    records = [read_record(tmp_path / f"{s.key()}.json") for s in ran]
    assert [record.shared for record in records] == [
        [], ["model", "dense_perplexity", "pruned"], ["model", "dense_perplexity"], ["model", "dense_perplexity", "pruned"]
    ]  # fmt: skip


def test_what_is_done_is_skipped_and_the_rows_are_the_same(spec, tmp_path, ran):
    specs = grid(spec, seed=[0, 1])
    first = run_study(specs[:1], tmp_path, progress=False)
    before = marks(tmp_path)
    both = run_study(specs, tmp_path, progress=False)
    assert ran == specs
    again = run_study(specs, tmp_path, progress=False)
    assert ran == specs
    assert {name: marks(tmp_path)[name] for name in before} == before
    assert both.to_dict("records") == again.to_dict("records")  # read from disk or just measured
    assert first.to_dict("records") == again.to_dict("records")[:1]


def test_an_empty_study(tmp_path):
    assert len(run_study([], tmp_path, progress=False)) == 0


def spoil(kind: str, path: Path, other: Path) -> None:
    text = path.read_text()
    data = json.loads(text)
    match kind:
        case "truncated":
            path.write_text(text[: len(text) // 2])
        case "empty":
            path.write_text("")
        case "binary":
            path.write_bytes(b"\xff\xfe\x00" * 40)
        case "no record":
            path.write_text("[1, 2]")
        case "field missing":
            path.write_text(json.dumps({name: value for name, value in data.items() if name != "metrics"}))
        case "field unknown":
            path.write_text(json.dumps(data | {"metric": 1}))
        case "field of another kind":
            path.write_text(json.dumps(data | {"metrics": None}))
        case "another run's":
            path.write_text(other.read_text())


@pytest.mark.parametrize(
    "kind",
    ["truncated", "empty", "binary", "no record", "field missing", "field unknown", "field of another kind", "another run's"],
)
def test_a_corrupt_record_is_reported_set_aside_and_recomputed(spec, tmp_path, ran, caplog, kind):
    specs = grid(spec, seed=[0, 1])
    run_study(specs, tmp_path, progress=False)
    path, other = (tmp_path / f"{s.key()}.json" for s in specs)
    perplexity, before = read_record(path).metrics["perplexity"], marks(tmp_path)
    spoil(kind, path, other)
    spoiled = path.read_bytes()
    ran.clear()
    found = run_study(specs, tmp_path, progress=False)
    assert ran == specs[:1]
    assert str(path) in caplog.text and f"set aside as {path.stem}.corrupt" in caplog.text
    assert path.with_suffix(".corrupt").read_bytes() == spoiled
    assert found.perplexity[0] == perplexity == read_record(path).metrics["perplexity"]
    assert marks(tmp_path)[other.name] == before[other.name]


def test_half_written_files_are_not_taken_for_records(spec, tmp_path, ran):
    (tmp_path / f".{spec.key()}.json.abc123").write_text('{"spec": {')
    (tmp_path / "notes.txt").write_text("mine")
    assert list(run_study([spec], tmp_path, progress=False).status) == ["done"]
    assert len(ran) == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


# ---- failures


def test_a_failed_run_is_recorded_and_the_others_go_on(spec, tmp_path, ran, caplog):
    specs = [spec, replace(spec, pattern="2:5"), replace(spec, seed=1)]
    found = run_study(specs, tmp_path, progress=False)
    assert list(found.status) == ["done", "failed", "done"]
    assert "groups of 5" in found.error[1] and "groups of 5" in caplog.text
    record = read_record(tmp_path / f"{specs[1].key()}.json")
    assert record.status == "failed" and record.error == found.error[1] and "Traceback" not in record.error
    assert record.spec == asdict(specs[1])


def test_a_failed_run_is_tried_again_next_time(spec, tmp_path, ran, monkeypatch):
    specs = grid(spec, seed=[0, 1])

    def fail(decoder, *args, **kwargs):
        raise RuntimeError("out of pencils")

    with monkeypatch.context() as patch:
        patch.setattr("recon.pruning.prune", fail)
        found = run_study(specs, tmp_path, progress=False)
    assert list(found.status) == ["failed", "failed"]
    # What is no user's mistake is recorded with where it happened.
    assert "Traceback" in found.error[0] and "out of pencils" in found.error[0]
    found = run_study(specs, tmp_path, progress=False)
    assert ran == specs * 2
    assert list(found.status) == ["done", "done"]
    assert found.to_dict("records") == run_study(specs, tmp_path, progress=False).to_dict("records")
    assert ran == specs * 2


def test_a_failure_leaves_no_trace_in_the_runs_after_it(spec, tmp_path, monkeypatch):
    specs = grid(replace(spec, granularity="block"), seed=[0, 1])
    prune = recon.prune
    calls = []

    def fail_once(*args, **kwargs):
        calls.append(1)
        result = prune(*args, **kwargs)
        if len(calls) == 1:
            raise RuntimeError("out of pencils")
        return result

    monkeypatch.setattr("recon.pruning.prune", fail_once)
    found = run_study(specs, tmp_path, progress=False)
    assert list(found.status) == ["failed", "done"]
    assert found.perplexity[1] == recon.run(specs[1], progress=False).metrics["perplexity"]


def test_an_unknown_model_is_refused_before_anything_runs(spec, tmp_path, ran):
    with pytest.raises(ReconError, match="unknown model 'nonsense'"):
        run_study([spec, replace(spec, model="nonsense")], tmp_path, progress=False)
    assert ran == []


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(spec, tmp_path, ran):
    (tmp_path / "file").touch()
    with pytest.raises(ReconError, match=r"record folder: cannot write to '.*file/records'"):
        run_study([spec], tmp_path / "file" / "records", progress=False)
    assert ran == []


def test_a_full_disk_ends_with_the_record_named_and_nothing_half_written(spec, tmp_path):
    record = recon.run(spec, progress=False)
    script = (
        "import json, resource, sys; from pathlib import Path; from recon.study import RunRecord, write_record\n"
        "record = RunRecord.from_dict(json.load(sys.stdin)); resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        f"write_record(record, Path({str(tmp_path / 'full' / 'r.json')!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(record.to_dict()), capture_output=True, text=True
    )
    assert "ReconError: record cannot be written to" in done.stderr and "r.json" in done.stderr
    assert list((tmp_path / "full").iterdir()) == []


def test_a_full_disk_leaves_the_old_record_alone(spec, tmp_path, monkeypatch):
    record = recon.run(spec, progress=False)
    path = tmp_path / "r.json"
    write_record(record, path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ReconError, match="r.json'.*No space left on device"):
        write_record(replace(record, key="other"), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_store_knows_only_finished_records(spec, tmp_path):
    store = RecordStore(tmp_path)
    assert store.get("abc") is None
    store.put(study.RunRecord(spec=asdict(spec), key="abc", status="failed", error="why"))
    assert store.get("abc") is None
    assert store.path("abc").is_file()


# ---- killed


STUDY = """
import os, signal, sys
import recon
from recon import study
if "die" in sys.argv:  # in the middle of writing the second record
    replace, calls = os.replace, []
    def deadly(*paths):
        calls.append(paths)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
    os.replace = deadly
base = recon.RunSpec(**{settings!r})
print("ready", flush=True)
recon.run_study(study.grid(base, seed=range({runs})), {folder!r}, progress=False)
print("complete", flush=True)
"""


class Studies:
    """A study of some runs in a folder, for other processes to work on and for this one to look at."""

    def __init__(self, spec: recon.RunSpec, folder: Path, runs: int):
        self.specs, self.folder = grid(spec, seed=range(runs)), folder
        self.code = STUDY.format(settings=asdict(spec), folder=str(folder), runs=runs)
        self.processes: list[subprocess.Popen] = []

    def start(self, *arguments: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", self.code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.processes.append(process)
        return process

    def wait_for_records(self, process: subprocess.Popen, count: int) -> None:
        end = time.monotonic() + 60
        while len(marks(self.folder)) < count:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end, "no record within a minute"
            time.sleep(0.005)

    def check_whole(self) -> None:
        """Every file that has a record's name is a whole, finished record of one of the specs."""
        keys = {s.key() for s in self.specs}
        for path in self.folder.glob("*.json"):
            record = read_record(path)
            assert record.status == "done" and record.key == path.stem and record.key in keys


@pytest.fixture
def studies(spec, tmp_path):
    study = Studies(replace(spec, granularity="block", samples=32, epochs=6), tmp_path / "records", runs=4)
    yield study
    for process in study.processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def test_a_killed_study_goes_on_where_it_was(studies, ran):
    for count, pause in ((1, 0.0), (2, 0.1)):
        process = studies.start()
        studies.wait_for_records(process, count)
        time.sleep(pause)
        process.kill()
        process.communicate()
        studies.check_whole()
    done = marks(studies.folder)
    assert 2 <= len(done) < 4, "the study ended before it was killed: make its runs longer"
    found = run_study(studies.specs, studies.folder, progress=False)
    assert list(found.status) == ["done"] * 4
    assert {f"{s.key()}.json" for s in ran} == {f"{s.key()}.json" for s in studies.specs} - set(done)
    assert {name: mark for name, mark in marks(studies.folder).items() if name in done} == done


def test_a_study_killed_while_it_writes_a_record(studies, ran):
    process = studies.start("die")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    done = marks(studies.folder)
    assert len(done) == 1
    assert len(list(studies.folder.iterdir())) == 2  # and the file that was being written, under another name
    studies.check_whole()
    assert list(run_study(studies.specs, studies.folder, progress=False).status) == ["done"] * 4
    assert len(ran) == 3
    assert marks(studies.folder).items() >= done.items()


def test_an_interrupted_study_ends_promptly_and_goes_on(studies, ran):
    process = studies.start()
    studies.wait_for_records(process, 1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors and "complete" not in output
    studies.check_whole()
    done = marks(studies.folder)
    assert 1 <= len(done) < 4
    assert len(list(studies.folder.iterdir())) == len(done)  # nothing half-written
    assert list(run_study(studies.specs, studies.folder, progress=False).status) == ["done"] * 4
    assert len(ran) == 4 - len(done)


def test_two_processes_on_one_folder(studies, ran):
    both = [studies.start(), studies.start()]
    for process in both:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and "complete" in output, errors
    assert len(list(studies.folder.iterdir())) == 4
    studies.check_whole()
    run_study(studies.specs, studies.folder, progress=False)
    assert ran == []
