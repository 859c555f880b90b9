"""Runs spread over the nodes of a Ray cluster, which are processes of this machine; nodes and workers killed while they run."""

import contextlib
import copy
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixtures.processes import heed_interrupts
from fixtures.runs import record_of

import recon
from recon.config import ReconstructionConfig
from recon.errors import ReconError
from recon.experiment import cluster as workers
from recon.experiment import executors
from recon.experiment.cluster import Ray, Request
from recon.experiment.plan import plan
from recon.experiment.record import RunRecord, read_record
from recon.experiment.study import grid, run_study
from recon.runtime.execution import Execution

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")
cloudpickle = pytest.importorskip("ray.cloudpickle")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each; this process is connected to them."""
    head = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # beside other work on the machine, workers would get next to nothing
        made = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
        add_node(made)
        ray.init(address=made.address, logging_level=logging.WARNING)
        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
        yield made
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        ray.shutdown()
        made.shutdown()


def add_node(cluster):
    return cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)


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
        begun.write_text(ray.get_runtime_context().get_node_id())
        if (self.folder / f"{key} dies").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if (self.folder / f"{key} breaks").exists():
            raise RuntimeError("a bug")
        while (self.folder / f"{key} waits").exists():
            time.sleep(0.02)
        kept = session.keep("pruned", spec.pruned_by, lambda: os.getpid())
        return RunRecord(asdict(spec), key, "done", metrics={"threads": torch.get_num_threads(), "pid": kept})

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
    return Notes(tmp_path)


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
        model=tiny_folder, text=tiny_text, samples=4, sequence_length=32, held_out_samples=2, evaluation_texts=(tiny_text,),
        evaluation_samples=2, evaluation_length=64,
    )  # fmt: skip
    wanted = grid(base, granularity=["none", "9-blocks", "half-block"], seed=[0, 1])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as workers have: more could round differently
    try:
        serial = run_study(wanted, tmp_path / "serial", progress=False)
    finally:
        torch.set_num_threads(threads)
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
    queue = executors.Queue(made)
    given = {"one": [], "two": []}
    for _ in range(4):
        for keys in given.values():
            keys.append(queue.take(keys[-1] if keys else None))
    assert given == {
        "one": ["a wanda block", "a wanda model", "b wanda block", "b wanda model"],
        "two": ["a ria block", "a ria model", "b ria block", "b ria model"],
    }
    assert not len(queue)


def test_lost_workers_and_failing_runs_cost_nothing_but_themselves(cluster, notes, caplog):
    held = {key: notes.tell(key, "waits") for key in ("key 0", "key 1")}
    notes.tell("key 2", "breaks")
    notes.tell("key 5", "dies")
    # Two groups, so that the two workers have one each.
    made = {key: spec.replaced(criterion=["wanda", "ria"][number % 2]) for number, (key, spec) in enumerate(specs(6).items())}
    made["key 6"] = replace(made["key 0"], rank=99)  # its record has another key

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
    assert "run key 1: its worker, process" in caplog.text and "is lost" in caplog.text
    assert "RuntimeError: a bug" in failed["key 2"]
    assert "3 workers were lost with this in hand" in failed["key 5"]
    assert "give all nodes the same" in failed["key 6"]


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


class Stillborn:
    """A stand-in for Ray, whose workers are lost before they have begun."""

    exceptions = SimpleNamespace(RayError=RuntimeError, RayTaskError=ZeroDivisionError)

    def __init__(self):
        self.made = 0

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 2.0}}]

    def put(self, thing):
        return thing

    def kill(self, actor):
        pass

    def remote(self, kind):
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=self.make))

    def make(self, *args):
        self.made += 1
        return SimpleNamespace(place=SimpleNamespace(remote=object))

    def wait(self, answers, timeout):
        return answers[:1], answers[1:]

    def get(self, answer):
        raise RuntimeError("killed by the node")


def test_workers_that_are_always_lost_before_they_begin_end_the_study():
    cluster = Stillborn()
    crew = workers.Crew(cluster, Request(1, 0, 0), None, None, executors.Queue(specs(4)), "run")
    with pytest.raises(ReconError, match="6 Ray workers in a row were lost before they had begun, the last one by: killed by"):
        for _ in range(50):
            crew.step(0)
    assert cluster.made <= 8


def test_it_is_said_that_no_worker_is_there_also_when_all_are_lost_later(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: clock[0])
    cluster = Stillborn()
    cluster.wait = lambda answers, timeout: ([], answers)
    crew = workers.Crew(cluster, Request(1, 0, 0), None, None, executors.Queue(specs(4)), "run")

    def said(seconds: float) -> bool:
        caplog.clear()
        clock[0] += seconds
        crew.step(0)
        return "no worker has started; each needs 1 CPU of a node" in caplog.text

    assert [said(1), said(10 * workers.POLL), said(100)] == [False, True, False]
    member = next(iter(crew.members.values()))
    member.place = "process 1 on here"
    assert not said(100)
    member.place = None
    assert [said(1), said(10 * workers.POLL)] == [False, True]


def test_ray_on_this_machine_has_the_cpus_that_this_process_may_use(monkeypatch):
    given = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    module = SimpleNamespace(is_initialized=lambda: False, init=lambda address, **options: given.update(options))
    monkeypatch.setitem(sys.modules, "ray", module)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    workers.connect()
    assert "num_cpus" not in given
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 4, 5}, raising=False)
    workers.connect()
    assert given["num_cpus"] == 3


def test_a_worker_with_other_code_is_refused(cluster, notes, monkeypatch):
    monkeypatch.setattr(workers, "code", lambda: "0123456789abcdef")
    with pytest.raises(ReconError, match="runs another version of recon than this process .*install the same one on every node"):
        records(Ray(workers=1), specs(2), notes)
    assert not notes.begun()


def test_a_request_that_no_node_can_meet_is_refused(cluster, notes):
    with pytest.raises(
        ReconError, match=r"no node .* has room for a worker \(4 CPUs, 1 GPU, 1\.0 GiB\); the nodes have: .*CPU 1"
    ):
        records(Ray(threads=4, gpus=1, memory=2**30), specs(2), notes)
    assert not notes.begun()


def test_what_a_worker_asks_for():
    assert Request(2, 0, 0).fits({"CPU": 7, "GPU": 1}) == 3
    assert Request(1, 0.5, 2**30).fits({"CPU": 7, "GPU": 2, "memory": 3 * 2**30}) == 3
    assert Request(1, 1, 0).fits({"CPU": 7}) == 0
    nodes = [{"Alive": True, "Resources": {"CPU": 96.0, "GPU": 8.0}}, {"Alive": True, "Resources": {"CPU": 2.0}}]
    module = SimpleNamespace(nodes=lambda: nodes)
    assert Ray().request(module, on_cpu=False) == Request(12, 1, 0)
    assert Ray(gpus=0.5).request(module, on_cpu=False) == Request(6, 0.5, 0)
    assert Ray().request(module, on_cpu=True) == Ray(gpus=0).request(module, on_cpu=False) == Request(1, 0, 0)
    assert Ray(threads=3, memory=5).request(module, on_cpu=False, memory=7) == Request(3, 1, 5)
    assert Ray(memory=0).request(module, on_cpu=True, memory=7) == Request(1, 0, 0)
    nodes[0]["Resources"]["memory"], nodes[1]["Resources"]["memory"] = 640.0, 80.0
    assert Ray().request(module, on_cpu=False, memory=7) == Request(12, 1, 7)
    assert Request(12, 1, 0).memory_there(module) == [(640.0, 80.0)]  # none fits on the other node
    assert Request(1, 0, 0).memory_there(module) == [(640.0, 640 / 96), (80.0, 40.0)]
    with pytest.raises(ReconError, match="threads of executor ray is 0; allowed: from 1 up"):
        Ray(threads=0)


def test_memory_is_set_aside_for_the_largest_run_of_a_model(tiny_folder, tiny_text):
    base = recon.RunSpec.of(model=tiny_folder, text=tiny_text, samples=4, sequence_length=32, evaluation_length=32)
    specs = {spec.reconstruction.granularity: spec for spec in grid(base, granularity=["none", "half-block", "model"])}
    specs["of no model"] = recon.RunSpec.of(model=f"{tiny_folder}/none")
    assert list(executors._by_memory(specs, 1e12)) == [0]
    asked = executors._by_memory(specs, 1e3)
    largest = next(memory for memory, group in asked.items() if "model" in group)
    assert {memory: [*group] for memory, group in asked.items()} == {largest: ["none", "half-block", "model"], 0: ["of no model"]}
    planned = {name: plan(specs[name]).rooms["memory"][0] for name in asked[largest]}
    assert 0.9 < largest / planned["model"] < 1.1 and planned["model"] == max(planned.values())


def test_executors_by_name(monkeypatch):
    monkeypatch.delenv(workers.VARIABLE, raising=False)
    assert workers.get(None) is None and workers.get("ray") == Ray()
    monkeypatch.setenv(workers.VARIABLE, "ray")
    assert workers.get(None) == Ray() and workers.get("serial") is None
    own = Ray(threads=2)
    assert workers.get(own) is own
    with pytest.raises(ReconError, match="unknown executor 'dask'; allowed: serial, ray, or recon.Ray"):
        workers.get("dask")


def test_without_ray_it_is_said_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ReconError, match=r"Ray, which is not installed; install it: pip install 'recon\[ray\]'"):
        run_study([recon.RunSpec()], tmp_path, executor="ray")
    assert not list(tmp_path.glob("*.json"))


WAYS = {  # granularity, and how windows are fitted
    "halves": ("half-block", {"schedule": recon.Schedule(3e-3, chunks=2)}),
    "matrices exactly": ("matrix", {"solver": "exact"}),
    "biases that pruning added": ("half-block", {"criterion": "flap", "pattern": "0.3"}),
    "blocks from exact": ("2-blocks", {"start": "exact", "train": "all"}),
    "experts": ("half-block", {"family": "mixtral"}),
    "adapters": ("block", {"adapter": "masklora", "rank": 2}),
}


@pytest.mark.parametrize("way", [*[*WAYS][:3], *(pytest.param(way, marks=pytest.mark.slow) for way in [*WAYS][3:])])
def test_windows_side_by_side_have_the_bits_of_one_after_the_other(cluster, tiny, tokens, way):
    granularity, options = WAYS[way]
    options = {"criterion": "wanda", "pattern": "0.5", "family": "llama"} | options
    family = options.pop("family")
    pruning = {name: options.pop(name) for name in ("criterion", "pattern")}
    dense, samples, held_out = tiny(family, tie_word_embeddings=True), tokens(6, 16), tokens(3, 16, seed=1)
    pruned = copy.deepcopy(dense)
    masks = recon.prune(pruned, samples, **pruning, execution=Execution(progress=False)).masks
    made, reports = {}, {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as workers have: more could round differently
    try:
        for executor in ("serial", Ray()):
            made[executor] = copy.deepcopy(pruned)
            reports[executor] = recon.reconstruct(
                made[executor],
                dense,
                samples,
                ReconstructionConfig(granularity=granularity),
                masks=masks,
                held_out=held_out,
                executor=executor,
                **options,
                execution=Execution(progress=False),
            )
    finally:
        torch.set_num_threads(threads)
    serial, spread = (made[executor].state_dict() for executor in made)
    assert all(torch.equal(serial[name], spread[name]) for name in serial)
    assert any(not torch.equal(serial[name], pruned.state_dict()[name]) for name in serial)
    one, other = ([replace(report, seconds=0) for report in reports[executor]] for executor in made)
    assert one == other


@pytest.mark.parametrize("stream", ["no", "yes"])
def test_the_windows_of_a_run_are_spread(cluster, stream, tiny_folder, tiny_text, tmp_path):
    spec = recon.RunSpec.of(
        model=tiny_folder, text=tiny_text, samples=4, sequence_length=32, held_out_samples=2, evaluation_texts=(tiny_text,),
        evaluation_samples=2, evaluation_length=32,
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        serial = record_of(spec, save=tmp_path / "serial", stream=stream)
        spread = record_of(spec, save=tmp_path / "spread", stream=stream, executor=Ray())
    finally:
        torch.set_num_threads(threads)
    assert spread.metrics == serial.metrics and len(spread.windows) == len(serial.windows) > 2
    for path in (tmp_path / "serial").glob("*.safetensors"):
        assert (tmp_path / "spread" / path.name).read_bytes() == path.read_bytes()
    assert not list(tmp_path.glob("*.unfinished"))


def test_windows_that_depend_on_one_another_are_not_spread(tiny, tokens, tmp_path):
    with pytest.raises(ReconError, match="cannot be repaired side by side under mixed propagation"):
        record_of(recon.RunSpec.of(propagation="mixed"), save=tmp_path / "saved", executor="ray")
    assert not list(tmp_path.iterdir())
    for propagation in ("sparse", "mixed"):
        with pytest.raises(
            ReconError, match=f"side by side under {propagation} propagation: each one reads what those before it"
        ):
            recon.reconstruct(
                tiny("llama"), tiny("llama"), tokens(2, 8), ReconstructionConfig(propagation=propagation), executor="ray"
            )


SCRIPT = """
import sys
import recon
base = recon.RunSpec.of(
    model=sys.argv[1], text=sys.argv[2], samples=4, sequence_length=32, held_out_samples=2,
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
