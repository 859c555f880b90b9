"""Settings of executors, and how tasks are handed to workers, which are objects of this process here."""

import os
import sys
from types import SimpleNamespace

import pytest

from recon.errors import ReconError
from recon.study import workers
from recon.study.workers import Ray, Request, Worker, spread


class Lost(Exception):
    pass


class FakeRay:
    """A stand-in for Ray: a worker does its next task when it is waited for. A task is a function of the worker's number.

    nodes_of: CPUs of each node, one after another, as often as the cluster is looked at; the last one stays.
    """

    exceptions = SimpleNamespace(RayError=Lost, RayTaskError=ZeroDivisionError)

    def __init__(self, *cpus: list[int]):
        self.cpus, self.made, self.killed, self.waiting = list(cpus) or [[2]], [], [], {}

    def nodes(self):
        cpus = self.cpus.pop(0) if len(self.cpus) > 1 else self.cpus[0]
        return [{"Alive": True, "Resources": {"CPU": float(count)}} for count in cpus]

    def put(self, thing):
        return thing

    def remote(self, kind):
        assert kind is Worker
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=self.make))

    def make(self, threads, version, function):
        number = len(self.made)

        def ask(task):
            answer = object()
            self.waiting[answer] = lambda: function((number, task))
            return answer

        self.made.append(Handle(number, SimpleNamespace(remote=ask)))
        return self.made[-1]

    def kill(self, worker):
        self.killed.append(worker.number)

    def wait(self, answers, timeout):
        return answers[:1], answers[1:]

    def get(self, answer):
        return self.waiting.pop(answer)()


class Handle:
    def __init__(self, number, do):
        self.number, self.do = number, do


def do(task):
    number, (what, value) = task
    if what == "die":
        raise Lost("killed by the node")
    if what == "break":
        return 1 / 0
    return number, value


def handed(ray, tasks: dict[str, tuple], settings=Ray(), depth=1, seen=None) -> dict[str, object]:
    left = dict(tasks)

    def take(last):
        if seen is not None:
            seen.append(last)
        key = next(iter(left), None)
        return key and (key, left.pop(key))

    return dict(spread(ray, settings, Request(1, 0, 0), do, left, take, depth))


def test_every_task_is_done_by_as_many_workers_as_there_is_room_for():
    ray, seen = FakeRay(), []
    found = handed(ray, {str(n): ("give", n) for n in range(5)}, seen=seen)
    assert {key: value for key, (_, value) in found.items()} == {str(n): n for n in range(5)}
    assert len(ray.made) == 2 and sorted(ray.killed) == [0, 1]
    assert seen[:2] == [None, None] and seen[2:5] == ["0", "1", "2"]  # the last task of whoever asks
    ray = FakeRay()
    handed(ray, {str(n): ("give", n) for n in range(5)}, Ray(workers=3))  # asked for though there is no room yet
    assert len(ray.made) == 3


def test_a_worker_has_as_many_tasks_at_a_time_as_asked_for():
    ray = FakeRay()
    most = []
    ray.wait = lambda answers, timeout: most.append(len(answers)) or (answers[:1], answers[1:])
    assert len(handed(ray, {str(n): ("give", n) for n in range(9)}, depth=2)) == 9
    assert max(most) == 4 and len(ray.made) == 2


def test_a_lost_worker_costs_nothing_and_a_task_that_kills_them_all_fails(caplog):
    ray = FakeRay()
    found = handed(ray, {"a": ("give", 1), "b": ("die", 0), "c": ("break", 0), "d": ("give", 4)})
    assert found["a"][1] == 1 and found["d"][1] == 4
    assert isinstance(found["b"], ReconError) and "3 workers were lost" in str(found["b"]) and "by the node" in str(found["b"])
    assert isinstance(found["c"], ReconError) and "division by zero" in str(found["c"])
    assert caplog.text.count("b: its worker is lost (Lost)") == workers.ATTEMPTS
    assert sorted(ray.killed) == list(range(len(ray.made)))


def test_a_worker_that_cannot_start_ends_the_study():
    def fail(answer):
        error = Lost("the actor died\nrecon.errors.ReconError: it runs another version of recon")
        error.actor_init_failed = True
        raise error

    ray = FakeRay()
    ray.get = fail
    with pytest.raises(ReconError, match="worker cannot start: .*another version"):
        handed(ray, {"a": ("give", 1)})
    assert ray.killed


def test_workers_end_when_nothing_is_left_for_them():
    """What others wait for may be what they hold of the nodes."""
    ray, killed = FakeRay(), []
    ray.wait = lambda answers, timeout: killed.append(len(ray.killed)) or (answers[:1], answers[1:])
    handed(ray, {"a": ("give", 1), "b": ("give", 2)})
    assert killed == [0, 1]


def test_a_node_that_joins_gets_workers_and_a_cluster_without_nodes_is_waited_for(monkeypatch):
    slept = []
    monkeypatch.setattr(workers.time, "sleep", slept.append)
    ray = FakeRay([1], [0], [0], [1], [3])
    assert len(handed(ray, {str(n): ("give", n) for n in range(8)})) == 8
    assert slept == [workers.POLL] * 2 and len(ray.made) == 3


def test_a_request_that_no_node_can_meet_is_refused():
    ray = FakeRay([1, 4])
    with pytest.raises(
        ReconError, match=r"no node .* has room for a worker \(5 CPUs, 1 GPU, 1\.0 GiB\); the nodes have: CPU 1; CPU 4"
    ):
        next(spread(ray, Ray(), Request(5, 1, 2**30), do, ["a"], lambda last: None))
    assert not ray.made


def test_a_worker_with_other_code_is_refused():
    with pytest.raises(ReconError, match="another version of recon .*0123456789abcdef"):
        Worker(1, "0123456789abcdef", print)


def test_ray_on_this_machine_has_the_cpus_that_this_process_may_use(monkeypatch):
    given = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    module = SimpleNamespace(is_initialized=lambda: False, init=lambda address, **options: given.update(options))
    monkeypatch.setitem(sys.modules, "ray", module)
    monkeypatch.setattr(workers, "need", lambda *_: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 4, 5}, raising=False)
    workers.connect()
    assert given["num_cpus"] == 3


def test_an_address_that_does_not_answer_is_named(monkeypatch):
    def init(address, **options):
        raise ConnectionError("timed out")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    monkeypatch.setattr(workers, "need", lambda *_: None)
    with pytest.raises(ReconError, match="'10.0.0.1:6379': timed out"):
        workers.connect("10.0.0.1:6379")


def test_without_ray_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ReconError, match=r"ray is not installed; pip install 'recon\[ray\]'"):
        workers.connect()


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
    assert Ray().request(module, on_cpu=False, memory=7) == Request(12, 1, 7)
    assert Request(12, 1, 0).room(module) == 8 and Request(1, 0, 0).room(module) == 98
    with pytest.raises(ReconError, match="threads of executor ray is 0; allowed: from 1 up"):
        Ray(threads=0)


def test_executors_by_name(monkeypatch):
    monkeypatch.delenv(workers.VARIABLE, raising=False)
    assert workers.get(None) is None and workers.get("ray") == Ray()
    monkeypatch.setenv(workers.VARIABLE, "ray")
    assert workers.get(None) == Ray() and workers.get("serial") is None
    own = Ray(threads=2)
    assert workers.get(own) is own
    with pytest.raises(ReconError, match="unknown executor 'dask'; allowed: serial, ray, or recon.Ray"):
        workers.get("dask")
    with pytest.raises(ReconError, match="'10.0.0.1:6379' .*executor is serial; choose executor ray"):
        workers.check_address("serial", "10.0.0.1:6379")
