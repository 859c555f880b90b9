"""Two processes cannot write to one output folder, and a dead one stops nobody."""

import os
import signal
import socket
import subprocess
import sys

import pytest
from fixtures.runs import record_of

import recon
from recon.errors import ReconError
from recon.runtime import lock
from recon.study import unfinished

HOLD = """
import sys
from pathlib import Path
from recon.runtime import lock
with lock.locked(Path({path!r}), "folder"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `tmp_path`, until its standard input ends."""
    code = HOLD.format(path=str(tmp_path / lock.NAME))
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def spec(tiny_folder, tiny_text) -> recon.RunSpec:
    return recon.RunSpec.of(
        model=tiny_folder, text=tiny_text, samples=2, sequence_length=16, held_out_samples=0, granularity="none",
        evaluation_texts=(tiny_text,), evaluation_samples=2, evaluation_length=16, compute_dtype="float32",
    )  # fmt: skip


def test_the_second_process_is_refused_with_the_name_of_the_first(holder, tmp_path, tiny_folder, tiny_text):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ReconError) as error:
        recon.run_study([spec(tiny_folder, tiny_text)], tmp_path, progress=False)
    said = str(error.value)
    assert f"record folder '{tmp_path}' is in use by process {holder.pid} on host {socket.gethostname()}, since 2" in said
    assert sorted(tmp_path.iterdir()) == before
    holder.communicate()  # it ends
    found = recon.run_study([spec(tiny_folder, tiny_text)], tmp_path, progress=False)
    assert list(found.status) == ["done"]
    assert [file.suffix for file in tmp_path.iterdir()] == [".json"]  # neither lock nor note is left


def test_a_process_that_was_killed_stops_nobody(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / lock.NAME).exists()
    with lock.locked(tmp_path / lock.NAME, "folder"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_studies_of_one_process_are_kept_apart_too(tmp_path):
    path = tmp_path / "deep" / lock.NAME
    with lock.locked(path, "folder"):
        with pytest.raises(ReconError, match=f"folder is in use by process {os.getpid()} on host"):
            with lock.locked(path, "folder"):
                pytest.fail("held twice")
        (path.parent / f"{path.name}.holder").write_text("{")
        with pytest.raises(ReconError, match="folder is in use by another process"):
            with lock.locked(path, "folder"):
                pytest.fail("held twice")


def test_the_lock_is_given_up_where_what_it_protects_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with lock.locked(tmp_path / lock.NAME, "folder"):
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stream", ["no", "yes"])
def test_a_save_folder_is_held_from_the_start(stream, tmp_path, tiny_folder, tiny_text, monkeypatch):
    for name in ("load", "skeleton"):
        monkeypatch.setattr(f"recon.data.models.{name}", lambda *a, **k: pytest.fail("loaded before the folder was held"))
    with lock.locked(tmp_path / f".out{lock.NAME}", "folder"):
        with pytest.raises(ReconError, match=f"save folder '{tmp_path}/out' is in use by process {os.getpid()}"):
            record_of(spec(tiny_folder, tiny_text), save=tmp_path / "out", stream=stream)
    assert list(tmp_path.iterdir()) == []


def test_a_streamed_run_that_saves_nothing_is_held_too(tmp_path, tiny_folder, tiny_text, monkeypatch):
    """Two processes with the same command would work in the same folder of the cache."""
    monkeypatch.setattr("recon.study.unfinished.cache_folder", lambda: tmp_path)
    monkeypatch.setattr("recon.data.models.skeleton", lambda *a, **k: pytest.fail("loaded before the folder was held"))
    run = spec(tiny_folder, tiny_text)
    with unfinished.locked(run.key()):
        with pytest.raises(ReconError, match=f"unfinished run {run.key()} is in use by process {os.getpid()}"):
            record_of(run, stream="yes")


def test_what_a_killed_study_left_half_written_is_removed(tmp_path, tiny_folder, tiny_text):
    half = tmp_path / ".0123456789abcdef.json.x7.part"
    half.write_text('{"spec"')
    recon.run_study([spec(tiny_folder, tiny_text)], tmp_path, progress=False)
    assert not half.exists()
