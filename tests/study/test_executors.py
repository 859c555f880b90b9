"""Runs of a study spread over the nodes of a Ray cluster; nodes and workers killed while they run."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fixtures.cluster import add_node, one_thread
from fixtures.processes import heed_interrupts

import recon
from recon.errors import ReconError
from recon.study import executors, workers
from recon.study.record import RunRecord, read_record
from recon.study.studies import grid, run_study
from recon.study.workers import Ray


def specs(count: int, **options) -> dict[str, recon.RunSpec]:
    """Specs by made-up keys; nothing is run of them."""
    return {f"key {number}": recon.RunSpec.of(rank=number + 1, **options) for number in range(count)}


class Notes:
    """A stand-in for a run, which writes down who runs what in files of `folder`, and may wait or die there."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, spec, session, progress) -> RunRecord:
        assert not progress
        key = f"key {spec.reconstruction.rank - 1}"
        begun = self.folder / f"{key} begun by {os.getpid()} {time.monotonic_ns()}"
        begun.write_text(self.node())
        if (self.folder / f"{key} dies").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if (self.folder / f"{key} breaks").exists():
            raise RuntimeError("a bug")
        while (self.folder / f"{key} waits").exists():
            time.sleep(0.02)
        kept = session.keep("pruned", spec.pruned_by, lambda: os.getpid())
        return RunRecord(spec.flat(), key, "done", metrics={"threads": torch.get_num_threads(), "pid": kept})

    @staticmethod
    def node() -> str:
        import ray

        return ray.get_runtime_context().get_node_id()

    def tell(self, key: str, what: str) -> Path:
        (self.folder / f"{key} {what}").touch()
        return self.folder / f"{key} {what}"

    def begun(self, key: str = "key") -> list[Path]:
        return sorted(self.folder.glob(f"{key}* begun by *"), key=lambda path: int(path.name.split()[-1]))

    def wait_for(self, key: str) -> Path:
        """The note of the process that has begun to run `key`."""
        until = time.monotonic() + 120
        while not (found := self.begun(key)) or not found[-1].read_text():
            assert time.monotonic() < until
            time.sleep(0.02)
        return found[-1]


@pytest.fixture
def notes(tmp_path):
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    yield Notes(tmp_path)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def records(executor: Ray, made: dict[str, recon.RunSpec], notes: Notes) -> dict[str, RunRecord]:
    return {record.key: record for record in executors.each(made, notes, executor)}


@contextlib.contextmanager
def meanwhile(function, notes: Notes):
    """Context beside which `function` runs; where either fails, nothing waits any longer, and both fail."""

    def release():
        for path in notes.folder.glob("* waits"):
            path.unlink(missing_ok=True)

    def run():
        try:
            function()
        except BaseException as error:
            errors.append(error)
            release()

    errors = []
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    except BaseException:
        release()
        raise
    finally:
        thread.join()
    if errors:
        raise errors[0]


def test_a_study_has_the_same_records_on_a_cluster(cluster, tiny_folder, tiny_text, tmp_path):
    base = recon.RunSpec.of(
        model=tiny_folder, text=tiny_text, samples=4, epochs=1, sequence_length=32, held_out_samples=2, evaluation_texts=(tiny_text,),
        evaluation_samples=2, evaluation_length=64,
    )  # fmt: skip
    wanted = grid(base, granularity=["none", "9-blocks", "half-block"], seed=[0, 1])
    with one_thread():
        serial = run_study(wanted, tmp_path / "serial", progress=False)
    # One of the runs is there already.
    run_study(wanted[:1], tmp_path / "ray", progress=False)
    [first] = (tmp_path / "ray").glob("*.json")
    stamp = first.stat().st_mtime_ns
    spread = run_study(wanted, tmp_path / "ray", progress=False, executor="ray")
    assert first.stat().st_mtime_ns == stamp
    columns = ["key", "granularity", "seed", "status", "error", "perplexity", "held_out_error", "sparsity", "flops_reconstruct"]
    assert spread[columns].equals(serial[columns])
    assert list(spread["status"]) == ["done", "done", "failed", "failed", "done", "done"]
    assert spread["error"].str.contains("the model has 4").sum() == 2
    [key] = spread["key"][(spread["granularity"] == "half-block") & (spread["seed"] == 1)]
    one, other = (read_record(tmp_path / folder / f"{key}.json") for folder in ("serial", "ray"))
    assert [w["losses"] for w in one.windows] == [w["losses"] for w in other.windows]
    assert other.environment["threads"] == 1


def test_the_next_run_shares_most_with_the_last_one_and_least_with_those_of_others():
    made = {
        f"{model} {criterion} {granularity}": recon.RunSpec.of(model=model, criterion=criterion, granularity=granularity)
        for model in ("a", "b") for criterion in ("wanda", "ria") for granularity in ("block", "model")
    }  # fmt: skip
    left = dict(made)
    take = executors.taker(left)
    given = {"one": [], "two": []}
    for _ in range(4):
        for keys in given.values():
            keys.append(take(keys[-1] if keys else None)[0])
    assert given == {
        "one": ["a wanda block", "a wanda model", "b wanda block", "b wanda model"],
        "two": ["a ria block", "a ria model", "b ria block", "b ria model"],
    }
    assert not left and take(None) is None


def test_a_study_without_ray_is_refused_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ReconError, match=r"pip install 'recon\[ray\]'"):
        run_study([recon.RunSpec()], tmp_path, executor="ray")
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.slow
def test_lost_workers_and_failing_runs_cost_nothing_but_themselves(cluster, notes, caplog):
    held = {key: notes.tell(key, "waits") for key in ("key 0", "key 1")}
    notes.tell("key 2", "breaks")
    notes.tell("key 5", "dies")
    # Two groups, so that the two workers have one each.
    made = {key: spec.replaced(criterion=["wanda", "ria"][number % 2]) for number, (key, spec) in enumerate(specs(6).items())}
    made["key 6"] = made["key 0"].replaced(rank=99)  # its record has another key

    def kill():
        notes.wait_for("key 0")
        os.kill(int(notes.wait_for("key 1").name.split()[-2]), signal.SIGKILL)
        for path in held.values():
            path.unlink()

    with caplog.at_level(logging.WARNING, "recon"), meanwhile(kill, notes):
        found = {key: (record.status, record.error) for key, record in records(Ray(), made, notes).items()}
    failed = {key: error for key, (status, error) in found.items() if status == "failed"}
    assert found.keys() == made.keys() and failed.keys() == {"key 2", "key 5", "key 6"}
    assert [len(notes.begun(key)) for key in made][:6] == [1, 2, 1, 1, 1, workers.ATTEMPTS]
    assert "key 1: its worker is lost" in caplog.text
    assert "RuntimeError: a bug" in failed["key 2"]
    assert "3 workers were lost with this in hand" in failed["key 5"]
    assert "are others where it was computed" in failed["key 6"]


@pytest.mark.slow
def test_a_node_that_is_lost_costs_its_runs_only_and_a_new_one_joins_in(cluster, notes):
    held = {key: notes.tell(key, "waits") for key in ("key 0", "key 1")}

    found = {}
    with meanwhile(lambda: found.update(records(Ray(), specs(6), notes)), notes):
        places = {notes.wait_for(key).read_text(): key for key in held}
        [node] = [node for node in cluster.worker_nodes if node.node_id in places]
        lost = places.pop(node.node_id)
        cluster.remove_node(node, allow_graceful=False)
        # The node that is left is busy: the run can only be done by the one that joins.
        joined = add_node(cluster).node_id
        held[lost].unlink()
        notes.wait_for("key 5")
        [kept] = places.values()
        held[kept].unlink()
    assert {key: record.status for key, record in found.items()} == dict.fromkeys(specs(6), "done")
    assert [len(notes.begun(key)) for key in specs(6)] == [1 + (key == lost) for key in specs(6)]
    assert {path.read_text() for path in notes.begun(lost)[1:] + notes.begun("key 5")} == {joined}


SCRIPT = """
import sys
import recon
base = recon.RunSpec.of(
    model=sys.argv[1], text=sys.argv[2], samples=4, epochs=1, sequence_length=32, held_out_samples=2,
    evaluation_texts=(sys.argv[2],), evaluation_samples=2, evaluation_length=64,
)
specs = recon.grid(base, granularity=["none", "half-block", "block", "model"], seed=[0, 1])
runs = recon.run_study(specs, sys.argv[3], progress=False, executor=recon.Ray("local", workers=2))
print(*runs["status"])
"""


@pytest.mark.slow
def test_a_study_that_is_interrupted_goes_on_where_it_was(tmp_path, tiny_folder, tiny_text):
    """With a cluster of its own, as on a laptop, which gets the interrupt from the terminal as well."""

    def start():
        words = [sys.executable, "-c", SCRIPT, tiny_folder, tiny_text, str(tmp_path / "records")]
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
        return subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings, start_new_session=True,
            preexec_fn=heed_interrupts,
        )  # fmt: skip

    process = start()
    until = time.monotonic() + 240
    while len(list((tmp_path / "records").glob("*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < until, "the study ended or hung before it was to be interrupted"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0 and "KeyboardInterrupt" in said
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").glob("*.json")}
    assert 2 <= len(before) < 8 and {read_record(path).status for path in before} == {"done"}
    process = start()
    answer, said = process.communicate(timeout=300)
    assert answer.split() == ["done"] * 8, said
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert len(list((tmp_path / "records").glob("*.json"))) == 8
