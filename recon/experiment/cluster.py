"""Workers: processes of a Ray cluster that do parts of a computation side by side, whatever becomes of some of them."""

import contextlib
import functools
import hashlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from recon.errors import ReconError
from recon.runtime.device import cores, limit_compiled_shapes

log = logging.getLogger("recon")
EXECUTORS = ("serial", "ray")
VARIABLE = "RECON_EXECUTOR"  # environment variable: the executor of studies that are given none
ATTEMPTS = 3  # workers that a task may lose before it counts as failed
POLL = 2.0  # seconds after which a cluster is looked at anew for nodes that came or went


@dataclass(frozen=True)
class Ray:
    """Work is done side by side by workers, which are processes (actors) of a Ray cluster.

    Workers come and go with the nodes of the cluster. What is in hand of one that is lost, in whatever way, is given to another.
    Models and texts that are files must have the same path on every node, as on a shared file system; bundled ones are
    fetched by each node once.

    Args:
        address: of a cluster, "auto" for the one that this machine is part of, or "ray://host:port"; None: the cluster that this
            process is connected to or `RAY_ADDRESS` names, else one of this machine alone that ends with the process.
        threads: CPUs and threads per worker; None: one or, on GPUs, a GPU's share of its node's CPUs.
        gpus: GPUs per worker; None: one, where the cluster has any and nobody asks for the CPU; else none.
        memory: bytes of a node's memory set aside for each worker; 0: none; None: what the run that takes most of its model is planned to
            take (see `recon.experiment.plan`), or none where that is little.
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

        on_cpu: what it computes is asked for on the CPU.
        memory: bytes that it is planned to take, which count where the settings do not say.
        """
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        with_gpus = [node for node in nodes if node.get("GPU")]
        gpus, threads = self.gpus, self.threads
        if gpus is None:
            gpus = int(bool(with_gpus) and not on_cpu)
        if threads is None:
            shares = [int(node.get("CPU", 1) / node["GPU"] * gpus) for node in with_gpus] if gpus else []
            threads = max(1, min(shares, default=1))
        return Request(threads, gpus, memory if self.memory is None else self.memory)


@dataclass(frozen=True)
class Request:
    """What a worker needs of a node."""

    threads: int
    gpus: float
    memory: int

    def fits(self, resources: dict[str, float]) -> int:
        """How many such workers there is room for in `resources`, as Ray names them."""
        needs = {"CPU": self.threads, "GPU": self.gpus, "memory": self.memory}
        return min(int(resources.get(name, 0) / amount) for name, amount in needs.items() if amount)

    def memory_there(self, ray) -> list[tuple[float, float]]:
        """Bytes of each node's memory, and what each worker could have of it where as many are there as CPUs and GPUs have room for."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return [(node["memory"], node["memory"] / self.fits(node)) for node in nodes if "memory" in node and self.fits(node)]

    def __str__(self) -> str:
        parts = [f"{self.threads} CPU{'s' * (self.threads > 1)}"]
        parts += [f"{self.gpus:g} GPU{'s' * (self.gpus > 1)}"] if self.gpus else []
        parts += [f"{self.memory / 2**30:.1f} GiB"] if self.memory else []
        return ", ".join(parts)


def get(executor: "str | Ray | None") -> "Ray | None":
    """What to use of Ray for an executor: nothing (None) for "serial", the defaults for "ray"; settings as they are.

    None: what the environment variable `RECON_EXECUTOR` names, or serial. Raises `ReconError` for an unknown name.
    """
    if executor is None:
        executor = os.environ.get(VARIABLE) or "serial"
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
    try:
        import ray
    except ImportError:
        raise ReconError("executor ray needs Ray, which is not installed; install it: pip install 'recon[ray]'") from None
    if ray.is_initialized():
        return ray
    options = {"logging_level": logging.WARNING}
    if address is None and not os.environ.get("RAY_ADDRESS"):
        address = "local"
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 leaves workers next to nothing beside other programs
        options["include_dashboard"] = False
        if cores() < (os.cpu_count() or 0):  # Ray counts all of the machine's
            options["num_cpus"] = cores()
    try:
        ray.init(address, **options)
    except Exception as error:  # Ray has no class of its own for this
        where = "no Ray can be started here" if address == "local" else "no Ray cluster can be reached at "
        where += "" if address == "local" else repr(address or os.environ["RAY_ADDRESS"])
        raise ReconError(f"{where}: {error}") from error
    return ray


@contextlib.contextmanager
def shared(executor: str | None, address: str | None = None) -> Iterator[None]:
    """Context in which the studies of child processes that are given no executor use this one, and one cluster.

    executor: "serial" or "ray"; None: as `get`.
    address: of the cluster; None: as for `Ray`; one that starts here ends with the context.

    Raises `ReconError` for an unknown name, an address of nothing, or a cluster that cannot be reached.
    """
    executor = executor or os.environ.get(VARIABLE) or "serial"
    if get(executor) is None and address is not None:
        raise ReconError(f"address {address!r} is that of a Ray cluster, but the executor is {executor}; choose executor ray")
    given = {VARIABLE: executor}
    with contextlib.ExitStack() as stack:
        if executor == "ray":
            ray = connect(address)
            stack.callback(ray.shutdown)
            address = address or os.environ.get("RAY_ADDRESS")
            given["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address if address in (None, "local") else address
        before = {name: os.environ.get(name) for name in given}
        os.environ.update(given)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@functools.cache
def code() -> str:
    """Hash of this package's source."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Place:
    """Where a worker is, and the code that it runs."""

    host: str
    node: str  # Ray's own name of it: several can be on one host
    pid: int
    code: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Tasks(Protocol):
    """What there is to do: tasks by key, handed out one by one."""

    def __len__(self) -> int:
        """How many wait, of those that are known so far."""

    def take(self, before: str | None) -> str:
        """The key of the one that a worker is to do next, whose last one was `before`; one of those that wait."""

    def put_back(self, key: str) -> None:
        """A task that was taken waits again."""

    def task(self, key: str) -> object:
        """What the worker is given."""


@dataclass(frozen=True)
class Failure:
    """In place of what a task gives: why it gave nothing."""

    error: str


class Worker:
    """A process that does one task at a time; made a Ray actor by `Crew`.

    do: given a task; it may keep what the next one can use.
    """

    def __init__(self, threads: int, do: Callable):
        limit_compiled_shapes()
        # Ray counts a worker's CPUs, but does not keep it to them.
        torch.set_num_threads(threads)
        self._do = do

    def place(self) -> Place:
        import ray

        return Place(socket.gethostname(), ray.get_runtime_context().get_node_id(), os.getpid(), code())

    def do(self, task: object) -> object:
        return self._do(task)


@dataclass(eq=False)
class _Member:
    """A worker as its driver sees it: `place` once it has started, `key` of the task in hand, where there is one."""

    actor: object
    place: Place | None = None
    key: str | None = None
    before: str | None = None  # the last task that it was given


class Crew:
    """The workers of one computation, and who is at work on what.

    Args:
        do: what workers do with a task: copied to each node once, and to each worker.
        kind: what a task is called, in messages.
        limit: workers at most; None: as many as the cluster has room for.
    """

    def __init__(self, ray, request: Request, limit: int | None, do: Callable, tasks: Tasks, kind: str):
        self.ray, self.request, self.limit, self.tasks, self.kind = ray, request, limit, tasks, kind
        self.do = ray.put(do)
        self.lost: dict[str, int] = {}  # workers, by task
        self.members: dict[object, _Member] = {}  # by the answer that is waited for
        self.idle: list[_Member] = []  # workers that nothing is asked of
        self.looked, self.room = 0.0, -1
        self.alone, self.warned = time.monotonic(), False  # since when no worker is there, and whether that was said
        self.stillborn = 0  # workers in a row that were lost before they had begun
        self.make = ray.remote(Worker).options(
            num_cpus=request.threads, num_gpus=request.gpus, memory=request.memory or None, max_restarts=0
        )

    @property
    def in_hand(self) -> int:
        """How many tasks are being done."""
        return sum(member.key is not None for member in self.members.values())

    @property
    def there(self) -> bool:
        """Whether any worker has started, and is not known to be lost."""
        return any(member.place for member in (*self.members.values(), *self.idle))

    def step(self, timeout: float = POLL) -> list[tuple[str, object]]:
        """Hands out what waits, and waits until something is done: tasks by key, with what they gave, or a `Failure`."""
        self.start()
        while self.idle and len(self.tasks):
            self.give(self.idle.pop())
        answered = []
        if self.members:
            answered, _ = self.ray.wait(list(self.members), timeout=timeout)
        elif len(self.tasks):
            time.sleep(timeout)
        if self.there:
            self.alone, self.warned = time.monotonic(), False
        elif not self.warned and time.monotonic() - self.alone > 10 * POLL:
            self.warned = True
            log.warning("no worker has started; each needs %s of a node, and waits until that is free", self.request)
        found = [self.hear(self.members.pop(answer), answer) for answer in answered]
        return [each for each in found if each is not None]

    def start(self) -> None:
        """Starts workers that there is room and work for."""
        there = len(self.members) + len(self.idle)
        wanted = len(self.tasks) + self.in_hand
        if there < wanted:
            for _ in range(min(wanted, self.capacity()) - there):
                actor = self.make.remote(self.request.threads, self.do)
                self.members[actor.place.remote()] = _Member(actor)

    def dismiss(self) -> None:
        """Ends the workers that have nothing to do."""
        for answer, member in list(self.members.items()):
            if member.key is None:
                self.idle.append(self.members.pop(answer))
        for member in self.idle:
            self.ray.kill(member.actor)
        self.idle.clear()

    def capacity(self) -> int:
        """How many workers there can be at present. Raises `ReconError` where that is none from the start."""
        if self.limit is not None or time.monotonic() - self.looked < POLL:
            return self.limit or self.room
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        room = sum(map(self.request.fits, nodes))
        if not room and self.room < 0:
            there = "; ".join(
                ", ".join(f"{name} {node[name]:g}" for name in ("CPU", "GPU", "memory") if name in node) for node in nodes
            )
            raise ReconError(f"no node of the Ray cluster has room for a worker ({self.request}); the nodes have: {there}")
        if room != self.room:
            log.info("Ray: %d node%s, room for %d workers of %s each", len(nodes), "s" * (len(nodes) > 1), room, self.request)
        self.looked, self.room = time.monotonic(), room
        return room

    def hear(self, member: _Member, answer) -> tuple[str, object] | None:
        """Takes a worker's answer, gives it its next task, and returns what it has done, if anything."""
        errors = self.ray.exceptions
        key, member.key = member.key, None
        try:
            found = self.ray.get(answer)
            if key is None:
                self.welcome(member, found)
        except errors.RayTaskError as error:  # the worker itself is well
            if key is None:
                raise ReconError(f"a Ray worker cannot start: {error}") from error
            found = Failure(str(error))
        except errors.RayError as error:
            return self.lose(member, key, error)
        if len(self.tasks):
            self.give(member)
        else:
            self.idle.append(member)
        return None if key is None else (key, found)

    def welcome(self, member: _Member, place: Place) -> None:
        if place.code != code():
            raise ReconError(
                f"the Ray worker, {place}, runs another version of recon than this process ({place.code}, {code()}); "
                "install the same one on every node"
            )
        member.place, self.stillborn = place, 0

    def give(self, member: _Member) -> None:
        key = self.tasks.take(member.before)
        member.key = member.before = key
        self.members[member.actor.do.remote(self.tasks.task(key))] = member
        log.info("%s %s: %s", self.kind, key, member.place)

    def lose(self, member: _Member, key: str | None, error: Exception) -> tuple[str, Failure] | None:
        """Puts back the task of a worker that is gone; returns its failure where it has been tried often enough."""
        self.ray.kill(member.actor)  # where its answer alone was lost
        self.looked = 0.0  # its node may be gone as well
        words = " ".join(str(error).split())
        if key is None:
            if getattr(error, "actor_init_failed", False):
                raise ReconError(f"a Ray worker cannot start: {words}") from error
            log.warning("a worker was lost before it had begun (%s)", type(error).__name__)
            self.stillborn += 1
            if self.stillborn >= ATTEMPTS * max(1, self.limit or self.room) and not self.there:
                raise ReconError(
                    f"{self.stillborn} Ray workers in a row were lost before they had begun, the last one by: {words}"
                ) from error
            return None
        self.lost[key] = self.lost.get(key, 0) + 1
        log.warning("%s %s: its worker, %s, is lost (%s)", self.kind, key, member.place, type(error).__name__)
        if self.lost[key] < ATTEMPTS:
            self.tasks.put_back(key)
            return None
        return key, Failure(f"{ATTEMPTS} workers were lost with this in hand, the last one, {member.place}, by: {words}")

    def close(self) -> None:
        """Ends all workers, and with them the tasks in hand."""
        for member in (*self.members.values(), *self.idle):
            self.ray.kill(member.actor)
        self.members.clear()
        self.idle.clear()
