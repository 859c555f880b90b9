"""Where the runs of a study are computed: in this process one after the other, or by many processes of a Ray cluster."""

import contextlib
import functools
import hashlib
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from recon import estimate
from recon.activations import LIMIT
from recon.device import pick_device
from recon.errors import ReconError
from recon.runs import Session
from recon.spec import RunRecord, RunSpec

log = logging.getLogger("recon")

VARIABLE = "RECON_EXECUTOR"  # environment variable: the executor of studies that are given none
ATTEMPTS = 3  # workers that a run may lose before it counts as failed
POLL = 2.0  # seconds after which a cluster is looked at anew for nodes that came or went

# Computes one run, with or without progress bars; never raises, but gives a record that says how it failed.
Run = Callable[[RunSpec, Session, bool], RunRecord]


class Executor(Protocol):
    """Computes runs."""

    def each(self, specs: dict[str, RunSpec], run: Run, progress: bool = True) -> Iterator[RunRecord]:
        """The record of each of `specs`, by key, as soon as it is there, in any order.

        specs: in an order in which neighbours have most in common, so that what a session keeps is used again.
        progress: whether runs may draw progress bars of their own.
        """


@dataclass(frozen=True)
class Serial:
    """Runs one after the other in this process, which is told beforehand how long those of each model will take."""

    def each(self, specs: dict[str, RunSpec], run: Run, progress: bool = True) -> Iterator[RunRecord]:
        several = len(specs) > 1
        session = Session(activation_bytes=LIMIT if several else 0)
        announced = set()
        for spec in specs.values():
            if several and spec.loaded_by not in announced:
                announced.add(spec.loaded_by)
                _announce([other for other in specs.values() if other.loaded_by == spec.loaded_by], session)
            yield run(spec, session, progress)


def _announce(specs: list[RunSpec], session: Session) -> None:
    """Says how long the runs of one model will take."""
    try:
        decoder, _ = session.load(*specs[0].loaded_by)
        estimate.announce_study(specs, decoder, pick_device(specs[0].device))
    except Exception as error:  # the runs themselves will fail in the same way, each with a record of it
        log.debug("no estimate: %s", error)


@dataclass(frozen=True)
class Ray:
    """Runs side by side in workers, which are processes (actors) of a Ray cluster, each with a session of its own.

    Workers come and go with the nodes of the cluster. A run whose worker is lost, in whatever way, is given to another one.
    Models and texts that are files must have the same path on every node, as on a shared file system; bundled ones are
    fetched by each node once.

    Args:
        address: of a cluster, "auto" for the one that this machine is part of, or "ray://host:port"; None: the cluster that this
            process is connected to or `RAY_ADDRESS` names, else one of this machine alone that ends with the process.
        threads: CPUs and threads per worker; None: one or, on GPUs, a GPU's share of its node's CPUs.
        gpus: GPUs per worker; None: one, where the cluster has any and no run asks for the CPU; else none.
        memory: bytes of a node's memory set aside for each worker; 0: none.
        workers: how many at most, asked for even if the cluster has to grow for them; None: as many as its nodes have room for.
    """

    address: str | None = None
    threads: int | None = None
    gpus: float | None = None
    memory: int = 0
    workers: int | None = None

    def __post_init__(self):
        for name, least in (("threads", 1), ("gpus", 0), ("memory", 0), ("workers", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ReconError(f"{name} of executor ray is {value!r}; allowed: from {least} up")

    def each(self, specs: dict[str, RunSpec], run: Run, progress: bool = True) -> Iterator[RunRecord]:
        ray = connect(self.address)
        with contextlib.closing(_Crew(ray, self.request(ray, specs), self.workers, specs, run)) as crew:
            yield from crew.work()

    def request(self, ray, specs: dict[str, RunSpec]) -> "Request":
        """What each worker needs of a node."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        with_gpus = [node for node in nodes if node.get("GPU")]
        gpus, threads = self.gpus, self.threads
        if gpus is None:
            gpus = int(bool(with_gpus) and not any(spec.device == "cpu" for spec in specs.values()))
        if threads is None:
            shares = [int(node.get("CPU", 1) / node["GPU"] * gpus) for node in with_gpus] if gpus else []
            threads = max(1, min(shares, default=1))
        return Request(threads, gpus, self.memory)


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

    def __str__(self) -> str:
        parts = [f"{self.threads} CPU{'s' * (self.threads > 1)}"]
        parts += [f"{self.gpus:g} GPU{'s' * (self.gpus > 1)}"] if self.gpus else []
        parts += [f"{self.memory / 2**30:.1f} GiB"] if self.memory else []
        return ", ".join(parts)


NAMED = {"serial": Serial, "ray": Ray}


def get(executor: str | Executor | None) -> Executor:
    """The executor called "serial" or "ray", or the one given; None: the one that `RECON_EXECUTOR` names, or serial.

    Raises `ReconError` for an unknown name.
    """
    if executor is None:
        executor = os.environ.get(VARIABLE) or "serial"
    if not isinstance(executor, str):
        return executor
    if executor not in NAMED:
        raise ReconError(f"unknown executor {executor!r}; allowed: {', '.join(NAMED)}, or an object of recon.executors")
    return NAMED[executor]()


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
        options["include_dashboard"] = False
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
    get(executor)
    if address is not None and executor != "ray":
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
    folder = Path(__file__).parent
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


class Worker:
    """A process that computes one run at a time, and keeps what the next one may share with it; made a Ray actor by `_Crew`."""

    def __init__(self, threads: int):
        # Ray counts a worker's CPUs, but does not keep it to them.
        torch.set_num_threads(threads)
        self.session = Session(activation_bytes=LIMIT)

    def place(self) -> Place:
        import ray

        return Place(socket.gethostname(), ray.get_runtime_context().get_node_id(), os.getpid(), code())

    def run(self, run: Run, spec: RunSpec) -> RunRecord:
        return run(spec, self.session, False)


@dataclass(eq=False)
class _Member:
    """A worker as its driver sees it: `place` once it has started, `key` of the run in hand, where there is one."""

    actor: object
    place: Place | None = None
    key: str | None = None
    before: RunSpec | None = None  # the last run that it was given


@dataclass
class _Queue:
    """Runs that wait, in groups that start from one pruned state."""

    groups: dict[tuple, deque[str]] = field(default_factory=dict)
    untouched: set[tuple] = field(default_factory=set)

    def add(self, key: str, spec: RunSpec) -> None:
        if spec.pruned_by not in self.groups:
            self.untouched.add(spec.pruned_by)
        self.groups.setdefault(spec.pruned_by, deque()).append(key)

    def __len__(self) -> int:
        return sum(map(len, self.groups.values()))

    def take(self, before: RunSpec | None) -> str:
        """The key of the run that a worker does best next: it shares most with its run before, and least with other workers."""
        waiting = [group for group, keys in self.groups.items() if keys]
        own = before.pruned_by if before else None
        loaded = before.loaded_by if before else ()
        # Where others are at work on all groups, the longest one is shared.
        best = max(waiting, key=lambda g: (g == own, g in self.untouched, g[: len(loaded)] == loaded, len(self.groups[g])))
        self.untouched.discard(best)
        return self.groups[best].popleft()


class _Crew:
    """The workers of one study, and who is at work on what."""

    def __init__(self, ray, request: Request, limit: int | None, specs: dict[str, RunSpec], run: Run):
        self.ray, self.request, self.limit, self.specs = ray, request, limit, specs
        self.run = ray.put(run)
        self.queue = _Queue()
        for key, spec in specs.items():
            self.queue.add(key, spec)
        self.lost = dict.fromkeys(specs, 0)  # workers, by run
        self.members: dict[object, _Member] = {}  # by the answer that is waited for
        self.looked, self.room = 0.0, 0
        self.make = ray.remote(Worker).options(
            num_cpus=request.threads, num_gpus=request.gpus, memory=request.memory or None, max_restarts=0
        )

    def work(self) -> Iterator[RunRecord]:
        began, warned = time.monotonic(), False
        while self.queue or self.in_hand:
            self.adjust()
            answered = []
            if self.members:
                answered, _ = self.ray.wait(list(self.members), timeout=POLL)
            else:
                time.sleep(POLL)
            for answer in answered:
                yield from self.hear(self.members.pop(answer), answer)
            if not warned and not any(member.place for member in self.members.values()) and time.monotonic() - began > 10 * POLL:
                warned = True
                log.warning("no worker has started yet; each needs %s of a node, and waits until that is free", self.request)

    @property
    def in_hand(self) -> int:
        return sum(member.key is not None for member in self.members.values())

    def adjust(self) -> None:
        """Starts workers that there is room and work for; dismisses those that there is none for."""
        wanted = len(self.queue) + self.in_hand
        if len(self.members) < wanted and (self.limit is not None or time.monotonic() - self.looked > POLL):
            wanted = min(wanted, self.limit or self.capacity())
            for _ in range(wanted - len(self.members)):
                actor = self.make.remote(self.request.threads)
                self.members[actor.place.remote()] = _Member(actor)
        if not self.queue:
            for answer, member in list(self.members.items()):
                if member.key is None:
                    self.ray.kill(member.actor)
                    del self.members[answer]

    def capacity(self) -> int:
        """How many workers the cluster's nodes have room for. Raises `ReconError` where that is none from the start."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        room = sum(map(self.request.fits, nodes))
        if not room and not self.looked:
            there = "; ".join(
                ", ".join(f"{name} {node[name]:g}" for name in ("CPU", "GPU", "memory") if name in node) for node in nodes
            )
            raise ReconError(f"no node of the Ray cluster has room for a worker ({self.request}); the nodes have: {there}")
        if room != self.room:
            log.info("Ray: %d node%s, room for %d workers of %s each", len(nodes), "s" * (len(nodes) > 1), room, self.request)
        self.looked, self.room = time.monotonic(), room
        return room

    def hear(self, member: _Member, answer) -> Iterator[RunRecord]:
        """Takes a worker's answer, gives it its next run, and yields the record that it brought."""
        errors = self.ray.exceptions
        key, member.key = member.key, None
        record = None
        try:
            found = self.ray.get(answer)
            if key is None:
                self.welcome(member, found)
            elif found.key == key:
                record = found
            else:
                words = f"the files that it reads are others on {member.place.host} than here; give all nodes the same ones"
                record = self.failure(key, words)
        except errors.RayTaskError as error:  # the worker itself is well
            if key is None:
                raise ReconError(f"a Ray worker cannot start: {error}") from error
            record = self.failure(key, str(error))
        except errors.RayError as error:
            yield from self.lose(member, key, error)
            return
        if self.queue:
            self.give(member)
        else:
            self.ray.kill(member.actor)
        if record is not None:
            yield record

    def welcome(self, member: _Member, place: Place) -> None:
        if place.code != code():
            raise ReconError(
                f"the Ray worker, {place}, runs another version of recon than this process ({place.code}, {code()}); "
                "install the same one on every node"
            )
        member.place = place

    def give(self, member: _Member) -> None:
        key = self.queue.take(member.before)
        member.key, member.before = key, self.specs[key]
        self.members[member.actor.run.remote(self.run, self.specs[key])] = member
        log.info("run %s: %s", key, member.place)

    def lose(self, member: _Member, key: str | None, error: Exception) -> Iterator[RunRecord]:
        """Puts back the run of a worker that is gone; yields its record where it has been tried often enough."""
        self.ray.kill(member.actor)  # where its answer alone was lost
        self.looked = min(self.looked, time.monotonic() - POLL)  # its node may be gone as well
        words = " ".join(str(error).split())
        if key is None:
            if getattr(error, "actor_init_failed", False):
                raise ReconError(f"a Ray worker cannot start: {words}") from error
            log.warning("a worker was lost before it had begun (%s)", type(error).__name__)
            return
        self.lost[key] += 1
        log.warning("run %s: its worker, %s, is lost (%s)", key, member.place, type(error).__name__)
        if self.lost[key] < ATTEMPTS:
            self.queue.add(key, self.specs[key])
        else:
            yield self.failure(
                key, f"{ATTEMPTS} workers were lost with this run in hand, the last one, {member.place}, by: {words}"
            )

    def failure(self, key: str, error: str) -> RunRecord:
        return RunRecord(asdict(self.specs[key]), key, "failed", error)

    def close(self) -> None:
        """Dismisses all workers, and with them the runs in hand."""
        for member in self.members.values():
            self.ray.kill(member.actor)
        self.members.clear()
