"""Workers: processes of a Ray cluster that do the parts of a computation side by side."""

import contextlib
import functools
import hashlib
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path

import torch

from recon.errors import ReconError, need
from recon.runtime.device import cores, limit_compiled_shapes

log = logging.getLogger("recon")
EXECUTORS = ("serial", "ray")
VARIABLE = "RECON_EXECUTOR"  # environment variable: the executor of studies that are given none
ATTEMPTS = 3  # workers that a task may kill before it counts as failed
POLL = 2.0  # seconds after which a cluster is looked at anew for nodes that came or went


@dataclass(frozen=True)
class Ray:
    """Work is done side by side by the workers (actors) of a Ray cluster, which come and go with its nodes.

    The task of a worker that is lost is given to another. Models and texts that are files must have the same path on every node, as on
    a shared file system; each node fetches bundled ones once.

    Args:
        address: of a cluster: "auto" for the one that this machine is part of, or "ray://host:port"; None: the one that this process is
            connected to or `RAY_ADDRESS` names, else one of this machine alone that ends with the process.
        threads: CPUs and threads per worker; None: one or, on GPUs, a GPU's share of its node's CPUs.
        gpus: GPUs per worker; None: one where the cluster has any and the run is not asked for on the CPU, else none.
        memory: bytes of a node's memory set aside for each worker; 0: none; None: what the largest run of the model is planned to
            take (see `recon.study.plan`), or none where that is little.
        workers: how many at most, asked for even if the cluster has to grow for them; None: as many as its nodes have room for.
    """

    address: str | None = None
    threads: int | None = None
    gpus: float | None = None
    memory: int | None = None
    workers: int | None = None

    def __post_init__(self):
        for name, least in (("threads", 1), ("gpus", 0), ("memory", 0), ("workers", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ReconError(f"{name} of executor ray is {value!r}; allowed: from {least} up")

    def request(self, ray, on_cpu: bool, memory: int = 0) -> "Request":
        """What each worker needs of a node.

        on_cpu: the run is asked for on the CPU.
        memory: bytes that the run is planned to take, for where these settings do not say.
        """
        with_gpus = [node for node in nodes(ray) if node.get("GPU")]
        gpus = int(bool(with_gpus) and not on_cpu) if self.gpus is None else self.gpus
        shares = [int(node.get("CPU", 1) / node["GPU"] * gpus) for node in with_gpus] if gpus else []
        threads = max(1, min(shares, default=1)) if self.threads is None else self.threads
        return Request(threads, gpus, memory if self.memory is None else self.memory)


@dataclass(frozen=True)
class Request:
    """What a worker needs of a node; memory in bytes."""

    threads: int
    gpus: float
    memory: int

    def fits(self, node: dict[str, float]) -> int:
        """How many such workers there is room for on a node with these resources."""
        needs = {"CPU": self.threads, "GPU": self.gpus, "memory": self.memory}
        return min(int(node.get(name, 0) / amount) for name, amount in needs.items() if amount)

    def room(self, ray) -> int:
        """How many such workers there is room for on all nodes."""
        return sum(map(self.fits, nodes(ray)))

    def __str__(self) -> str:
        parts = [f"{self.threads} CPU{'s' * (self.threads > 1)}"]
        parts += [f"{self.gpus:g} GPU{'s' * (self.gpus > 1)}"] if self.gpus else []
        parts += [f"{self.memory / 2**30:.1f} GiB"] if self.memory else []
        return ", ".join(parts)


def nodes(ray) -> list[dict[str, float]]:
    """The resources of each node of the cluster, as Ray names them."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def get(executor: str | Ray | None) -> Ray | None:
    """The settings for an executor: nothing (None) for "serial", the defaults for "ray"; settings as they are.

    None: what the environment variable `RECON_EXECUTOR` names, or serial. Raises `ReconError` for an unknown name.
    """
    executor = executor or os.environ.get(VARIABLE) or "serial"
    if isinstance(executor, Ray):
        return executor
    if executor not in EXECUTORS:
        raise ReconError(
            f"unknown executor {executor!r}; allowed: {', '.join(EXECUTORS)}, or recon.Ray(...) with settings of your own"
        )
    return Ray() if executor == "ray" else None


def connect(address: str | None = None):
    """The module `ray`, connected to a cluster for as long as this process lasts; see `Ray`.

    Raises `ReconError` where Ray is not installed, or no cluster answers at `address`.
    """
    need("ray", "ray", "executor ray")
    import ray

    if ray.is_initialized():
        return ray
    options = {"logging_level": logging.ERROR}
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 leaves workers next to nothing beside other programs
        # Ray would count all CPUs of the machine, not those that this process may use.
        options |= {"include_dashboard": False, "num_cpus": cores()}
    try:
        ray.init(address, **options)
    except Exception as error:  # Ray has no class of its own for this
        raise ReconError(f"no Ray cluster can be reached at {address!r}: {error}") from error
    return ray


@contextlib.contextmanager
def shared(executor: str | None, address: str | None = None) -> Iterator[None]:
    """Context in which the studies of child processes that are given no executor use this one, and one cluster.

    executor: "serial" or "ray"; None: as `get`.
    address: of the cluster; None: as for `Ray`; one that starts here ends with the context.

    Raises `ReconError` for an unknown name, an address of nothing, or a cluster that cannot be reached.
    """
    executor = executor or os.environ.get(VARIABLE) or "serial"
    check_address(executor, address)
    given = {VARIABLE: executor}
    with contextlib.ExitStack() as stack:
        if get(executor):
            ray = connect(address)
            stack.callback(ray.shutdown)
            address = address or os.environ.get("RAY_ADDRESS") or "local"
            given["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address if address == "local" else address
        before = {name: os.environ[name] for name in given if name in os.environ}
        os.environ.update(given)
        try:
            yield
        finally:
            for name in given:
                del os.environ[name]
            os.environ.update(before)


def check_address(executor: str, address: str | None) -> None:
    """Raises `ReconError` where the address of a cluster is given to an executor that uses none."""
    if get(executor) is None and address is not None:
        raise ReconError(f"address {address!r} is that of a Ray cluster, but the executor is {executor}; choose executor ray")


@functools.cache
def code() -> str:
    """Hash of this package's source."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class Worker:
    """A process that does one task after another: an actor of Ray.

    version: the code of the process that asks, which must be this one's.
    function: given a task; it may keep what the next task can use.
    """

    def __init__(self, threads: int, version: str, function: Callable[[object], object]):
        if version != code():
            raise ReconError(
                f"it runs another version of recon than the process that started it ({code()}, {version}); install the same on every node"
            )
        limit_compiled_shapes()
        torch.set_num_threads(threads)  # Ray counts a worker's CPUs, but does not keep it to them
        self.function = function

    def do(self, task: object) -> object:
        return self.function(task)


class _Crew:
    """The workers of one computation, and what each has in hand.

    depth: tasks that a worker has at a time; all but the first wait for it in its queue.
    """

    def __init__(self, ray, request: Request, function: Callable, depth: int):
        self.ray, self.threads, self.function, self.depth = ray, request.threads, ray.put(function), depth
        self.make = ray.remote(Worker).options(num_cpus=request.threads, num_gpus=request.gpus, memory=request.memory or None)
        self.workers: set = set()
        self.busy: dict[object, tuple] = {}  # answer -> worker, key, task
        self.idle: deque[tuple] = deque()  # worker and the key of its last task, once for each task that it can take

    def give(self, key: str, task: object, new: bool) -> None:
        """Gives a task to a new worker, or to the one that has been idle for longest."""
        worker = self.make.remote(self.threads, code(), self.function) if new else self.idle.popleft()[0]
        self.busy[worker.do.remote(task)] = worker, key, task
        if new:
            self.workers.add(worker)
            self.idle.extend([(worker, key)] * (self.depth - 1))

    def answers(self) -> Iterator[tuple[str, object, object, bool]]:
        """Waits for `POLL` seconds, or an answer: key, task, what was found, and whether the worker is lost."""
        if not self.busy:
            time.sleep(POLL)
            return
        for answer in self.ray.wait(list(self.busy), timeout=POLL)[0]:
            worker, key, task = self.busy.pop(answer)
            found, lost = _result(self.ray, answer)
            if lost:
                log.warning("%s: its worker is lost (%s)", key, lost)
                self.dismiss({worker})
            elif worker in self.workers:
                self.idle.append((worker, key))
            yield key, task, found, bool(lost)

    def dismiss(self, gone: set) -> None:
        """Ends workers, and what they do."""
        self.idle = deque((worker, key) for worker, key in self.idle if worker not in gone)
        self.workers -= gone
        for worker in gone:
            self.ray.kill(worker)

    def dismiss_idle(self) -> None:
        """Ends the workers that have nothing in hand."""
        self.dismiss(self.workers - {worker for worker, *_ in self.busy.values()})


def spread(
    ray,
    settings: Ray,
    request: Request,
    function: Callable,
    left: Sized,
    take: Callable[[str | None], tuple | None],
    depth: int = 1,
) -> Iterator[tuple[str, object]]:
    """What tasks give, by key, as soon as it is there; a `ReconError` for a task that raised, or that `ATTEMPTS` workers died of.

    function: what a worker does with a task; each worker has a copy of its own.
    left: what is still to be handed out.
    take: takes a key and its task out of `left`, given the key of the worker's last task (None: a new worker); gives None where nothing
        can be had before other tasks are done.
    depth: tasks that a worker has at a time.

    Raises `ReconError` where no node has room for a worker, or workers cannot start.
    """
    _check_room(ray, settings, request)
    crew, again, deaths = _Crew(ray, request, function, depth), [], Counter()
    try:
        while left or again or crew.busy:
            room = settings.workers or request.room(ray)
            while crew.idle or len(crew.workers) < room:
                new = len(crew.workers) < room
                found = again.pop() if again else take(None if new else crew.idle[0][1])
                if found is None:
                    break
                crew.give(*found, new)
            if not left and not again:  # tasks may wait for what idle workers hold of the nodes
                crew.dismiss_idle()
            for key, task, found, lost in crew.answers():
                deaths[key] += lost
                if lost and deaths[key] < ATTEMPTS:
                    again.append((key, task))
                else:
                    yield key, found
    finally:
        crew.dismiss(set(crew.workers))


def _check_room(ray, settings: Ray, request: Request) -> None:
    if not settings.workers and not request.room(ray):
        kinds = ("CPU", "GPU", "memory")
        there = "; ".join(", ".join(f"{kind} {node[kind]:g}" for kind in kinds if kind in node) for node in nodes(ray))
        raise ReconError(f"no node of the Ray cluster has room for a worker ({request}); the nodes have: {there}")


def _result(ray, answer) -> tuple[object, str]:
    """What a worker answered, a `ReconError` where that is none; and how the worker was lost, if it was.

    Raises `ReconError` for a worker that cannot start.
    """
    try:
        return ray.get(answer), ""
    except ray.exceptions.RayTaskError as error:
        return ReconError(str(error)), ""
    except ray.exceptions.RayError as error:
        words = str(error).strip()
        if getattr(error, "actor_init_failed", False):
            raise ReconError(f"a Ray worker cannot start: {words.splitlines()[-1]}") from error
        last = " ".join(words.split())
        return ReconError(f"{ATTEMPTS} workers were lost with this in hand, the last one by: {last}"), type(error).__name__
