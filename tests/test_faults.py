"""Kills and full disks: nothing half-written is ever under a final name, and the same command goes on to the same numbers."""

import contextlib
import errno
import functools
import gc
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from fixtures.models import saved_model
from fixtures.runs import comparable, record_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from recon import Callback, ReconError, RunSpec, grid, run_study
from recon.runtime import storage
from recon.study.record import read_record, write_record

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def spec(tiny_spec) -> RunSpec:
    return tiny_spec.replaced(samples=3, sequence_length=16, evaluation_length=16, granularity="block", compute_dtype="float32")


@pytest.fixture(scope="module")
def expected(spec):
    """The record of a run in memory that nothing happens to."""
    return record_of(spec)


@contextlib.contextmanager
def room_for(size: int):
    """No file can grow beyond `size` bytes for a while, as on a disk that is nearly full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def assert_whole(folder: Path) -> None:
    """What is under a final name can be read."""
    for path in folder.rglob("*.safetensors"):
        if not any(part.endswith(storage.PART) for part in path.parts):
            load_file(path)


class Killed(BaseException):
    pass


def die(monkeypatch, points: int, error: BaseException | None = None) -> None:
    """Ends the process, as far as the disk is concerned, at the n-th time that something gets its final name on the disk.

    From then on nothing changes on the disk, whatever exception handlers and finalisers do; an `error` is raised but once.
    """
    names, dead, replace = itertools.count(1), [], os.replace

    def wrap(function):
        def wrapped(*args, **options):
            if dead:
                return None
            if function is replace and next(names) == points:
                dead.extend([True] * (error is None))
                raise error or Killed
            return function(*args, **options)

        return wrapped

    for name in ("replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))


def until_done(spec, folder: Path, monkeypatch, step: int, error=None, **how):
    """The record of a run that fails at a write to the disk, and is repeated until it is done; and how often it failed."""
    for attempt in range(60):
        with monkeypatch.context() as patch:
            die(patch, step + attempt % 3, error)
            try:
                return record_of(spec, **how), attempt
            except (Killed, ReconError) as fault:
                assert isinstance(fault, Killed) or "No space left on device" in str(fault)
            finally:
                gc.collect()
        assert_whole(folder)
    pytest.fail("no end in sight")


CASES = {
    "blocks": ("", {}),
    "blocks and rows of unequal sparsity": ("", {"allocation": "measured", "weighting": "fisher"}),
    "matrices, exact": ("", {"granularity": "matrix", "solver": "exact", "propagation": "dense"}),
    "SparseGPT, two passes": ("gpt2", {"criterion": "sparsegpt", "propagation": "sparse"}),
    "experts": ("mixtral", {"granularity": "half-block", "criterion": "sparsegpt"}),
    "biases that pruning adds": ("", {"criterion": "flap", "pattern": "0.3"}),
    "encoder-decoder": ("t5", {"propagation": "sparse", "train": "all"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_killed_at_writes_to_the_disk_again_and_again(case, spec, tiny_folder, tmp_path, monkeypatch):
    family, changes = CASES[case]
    spec = spec.replaced(**changes)
    if family:
        spec = spec.replaced(model=saved_model(family, tiny_folder, tmp_path / "model"))
    monkeypatch.setenv("RECON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "SMALL", 0)  # all activations are in files
    wanted = record_of(spec, stream="no")
    record, killed = until_done(spec, tmp_path, monkeypatch, 6, stream="yes")
    assert killed > 1 and record.environment["resumed"] and comparable(record) == comparable(wanted)
    assert not list((tmp_path / "cache" / "unfinished").iterdir())


@pytest.mark.parametrize("error", [None, FULL], ids=["killed", "full disk"])
@pytest.mark.parametrize("stream", ["no", "yes"])
def test_a_checkpoint_is_there_with_its_record_or_not_at_all(stream, error, spec, expected, tmp_path, monkeypatch):
    saved = tmp_path / "saved"
    record, failed = until_done(spec, tmp_path, monkeypatch, 1 if stream == "no" else 9, error, save=saved, stream=stream)
    assert failed and comparable(record) == comparable(expected) == comparable(read_record(saved / "record.json"))
    assert record.seconds["total"] > record.seconds["save"] > 0
    assert AutoModelForCausalLM.from_pretrained(saved) and [path.name for path in tmp_path.iterdir()] == ["saved"]
    before = {path: path.stat().st_mtime_ns for path in saved.iterdir()}
    assert record_of(spec, save=saved, stream=stream).to_dict() == record.to_dict()  # what is done is not done again
    assert {path: path.stat().st_mtime_ns for path in saved.iterdir()} == before


@pytest.mark.parametrize("stream, sizes", [("no", [100, 60_000]), ("yes", [5, 3_000, 20_000, 60_000])])
def test_wherever_the_disk_is_full_the_same_command_goes_on(stream, sizes, spec, expected, tmp_path, monkeypatch):
    """No file could grow beyond so many bytes: notes, activations, weights. Libraries raise exceptions of their own here."""
    monkeypatch.setattr(storage, "SMALL", 0)
    said = r"cannot be written.*saved.*File too large|saved.*cannot be written.*File too large"
    for size in sizes:
        with room_for(size), pytest.raises(ReconError, match=said):
            record_of(spec, save=tmp_path / "saved", stream=stream)
        assert not (tmp_path / "saved").exists()
        assert_whole(tmp_path)
    found = record_of(spec, save=tmp_path / "saved", stream=stream)
    assert comparable(found) == comparable(expected) and [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_the_work_of_another_run_is_refused_and_that_of_the_same_goes_on(spec, tmp_path, monkeypatch):
    saved = tmp_path / "saved"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die(patch, 12)
        record_of(spec, save=saved, stream="yes")
    with pytest.raises(ReconError, match=rf"{spec.key()}.*; this is .*; give its command .*, delete"):
        record_of(spec.replaced(learning_rate=1e-3), save=saved, stream="yes")
    with pytest.raises(ReconError, match="holds another unfinished run"):
        record_of(spec.replaced(learning_rate=1e-3), save=saved, stream="no")
    work = saved.with_suffix(".unfinished")
    window, note = max((work / "reconstruct").glob("?????.safetensors")), work / "run.json"
    note.rename(tmp_path / "kept")
    note.touch()  # as a machine that loses power may leave it
    with pytest.raises(ReconError, match=r"run\.json' is cut short .*; delete '.*saved\.unfinished', to begin anew"):
        record_of(spec, save=saved)
    (tmp_path / "kept").replace(note)
    os.truncate(window, window.stat().st_size - 9)
    with pytest.raises(ReconError, match=rf"{window.name}' is cut short .*; delete '.*saved.unfinished', to begin anew"):
        record_of(spec, save=saved)
    window.unlink()
    same = record_of(spec.replaced(prune_samples=3), save=saved)  # said in another way; streamed, as it was begun so
    assert same.environment["resumed"] and not list(tmp_path.glob("*.unfinished"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die(patch, 12)
        record_of(spec, save=tmp_path / "again", stream="yes")
    record_of(spec, save=tmp_path / "again", stream="no")  # from the beginning, in memory
    assert not list(tmp_path.glob("*.unfinished"))
    (notes := tmp_path / "new.unfinished" / "notes.txt").parent.mkdir()
    notes.write_text("of somebody")
    with pytest.raises(ReconError, match=r"new\.unfinished' is where a run would keep .* holds something else; move it"):
        record_of(spec, save=tmp_path / "new", stream="yes")
    assert notes.exists()


def test_a_streamed_run_is_of_one_precision_and_one_model(spec, tiny_folder, tmp_path, monkeypatch):
    spec = spec.replaced(model=str(shutil.copytree(tiny_folder, tmp_path / "model")), compute_dtype="auto")
    weights = tmp_path / "model" / "model.safetensors"
    for able in (True, False):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda able=able: {"avx512_bf16": able})
        wanted = pytest.raises(Killed) if able else pytest.raises(ReconError, match="in bfloat16; this is .* in float32")
        with monkeypatch.context() as patch, wanted:
            die(patch, 12)
            record_of(spec, save=tmp_path / "saved", stream="yes")

    def overwrite(report) -> None:
        save_file({name: 1.5 * tensor for name, tensor in load_file(weights).items()}, tmp_path / "new", {"format": "pt"})
        (tmp_path / "new").replace(weights)

    with pytest.raises(ReconError, match="model '.*model', or what was pruned from it, changed on disk"):
        record_of(spec, save=tmp_path / "other", stream="yes", callbacks=[Mock(Callback, on_window=overwrite)])
    assert not (tmp_path / "other").exists()


def test_a_run_killed_while_its_folder_is_deleted_leaves_nothing_for_ever(spec, tmp_path, monkeypatch):
    def rmtree(path, *args, **options):
        if list(Path(path).glob("*.unfinished")):
            raise Killed
        return remove(path, *args, **options)

    remove = shutil.rmtree
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", rmtree)
        record_of(spec, save=tmp_path / "saved", stream="yes")
    assert len(list(tmp_path.iterdir())) == 2
    record_of(spec, save=tmp_path / "saved", stream="yes")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("stream", ["no", "yes"])
def test_an_interrupted_run_leaves_nothing_but_what_it_goes_on_from(stream, spec, expected, tmp_path, capsys):
    stop = Mock(Callback, on_window=lambda report: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            record_of(spec, callbacks=[stop], save=tmp_path / "saved", stream=stream)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in tmp_path.iterdir()] == ["saved.unfinished"] * (stream == "yes")
    assert comparable(record_of(spec, save=tmp_path / "saved", stream=stream)) == comparable(expected)


def test_a_record_for_which_there_is_no_room(expected, tmp_path):
    path = tmp_path / "full" / "r.json"
    for record, left in ((expected, []), (replace(expected, key="other"), ["r.json"])):
        with room_for(1000), pytest.raises(ReconError, match=r"record .*r\.json' cannot be written: .*File too large"):
            write_record(record, path)
        assert [each.name for each in path.parent.iterdir()] == left
        write_record(expected, path)
    assert read_record(path) == expected


@pytest.mark.parametrize("damage", ['{"spec"', None], ids=["half a record", "fields"])
def test_a_damaged_record_is_reported_and_computed_anew(damage, spec, expected, tmp_path, caplog):
    path = tmp_path / f"{spec.key()}.json"
    path.write_text(damage or json.dumps(expected.to_dict() | {"metrics": []}))
    found = run_study([spec], tmp_path, progress=False)
    assert "cannot be read" in caplog.text and str(path) in caplog.text
    assert found.perplexity[0] == expected.metrics["perplexity"] == read_record(path).metrics["perplexity"]


def test_a_study_killed_at_any_write_goes_on(spec, tmp_path, monkeypatch):
    specs, seen = grid(spec.replaced(granularity="none"), seed=range(3)), {}
    for _ in range(4):
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            die(patch, 2)
            run_study(specs, tmp_path, progress=False)
        for path in tmp_path.glob("*.json"):
            assert read_record(path).status == "done"
            assert seen.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    assert list(run_study(specs, tmp_path, progress=False).status) == ["done"] * 3
    assert {path.name for path in tmp_path.iterdir()} == {f"{each.key()}.json" for each in specs}


def test_studies_share_a_folder_and_compute_a_run_once(spec, tmp_path):
    specs = grid(spec.replaced(granularity="none"), seed=range(3))
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        one, other = pool.map(functools.partial(run_study, folder=tmp_path, progress=False), (specs[:2], specs[1:]))
    assert set(one.status) == set(other.status) == {"done"} and one.seconds_total[1] == other.seconds_total[0]
    assert {path.name for path in tmp_path.iterdir()} == {f"{each.key()}.json" for each in specs}


HOLD = """
import sys
from pathlib import Path
from recon.runtime.storage import locked
with locked(Path(sys.argv[1]), "save folder"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_leaves_alone_what_a_neighbour_is_writing(tmp_path):
    with storage.complete(tmp_path / "model-2.5", folder=True) as writing, storage.locked(tmp_path / "model-2", "save folder"):
        assert writing.is_dir()


@pytest.mark.parametrize("what", ["save, no", "save, yes", "cache"])
def test_two_processes_that_do_the_same_refuse_each_other_and_a_dead_one_stops_nobody(what, spec, tmp_path, monkeypatch):
    spec = spec.replaced(granularity="none", held_out_samples=0)
    monkeypatch.setenv("RECON_CACHE", str(tmp_path / "cache"))
    place = tmp_path / (f"cache/unfinished/{spec.key()}" if what == "cache" else "saved")
    lock = place.with_name(f".{place.name}.lock")

    def go():
        return record_of(spec, save=None if what == "cache" else tmp_path / "saved", stream="no" if what[-2:] == "no" else "yes")

    command = [sys.executable, "-c", HOLD, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ReconError, match="is in use by another process; wait until it is done"):
            go()
        holder.kill()
    assert lock.exists()
    go()
    assert not lock.exists()
