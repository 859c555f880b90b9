"""Where the runs of a study are computed: in this process one after the other, or by the workers of a Ray cluster."""

import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from recon.experiment import cost, plan, streaming
from recon.experiment.cluster import Crew, Failure, Ray, Request, connect
from recon.experiment.config import RunSpec
from recon.experiment.memory import highest
from recon.experiment.record import RunRecord
from recon.experiment.session import Session
from recon.runtime.activations import LIMIT
from recon.runtime.device import HOST, pick_device

log = logging.getLogger("recon")
# Computes one run, with or without progress bars; never raises, but gives a record that says how it failed.
Run = Callable[[RunSpec, Session, bool], RunRecord]


def each(specs: dict[str, RunSpec], run: Run, executor: Ray | None, progress: bool = True) -> Iterator[RunRecord]:
    """The record of each of `specs`, by key, as soon as it is there, in any order.

    specs: in an order in which neighbours have most in common, so that what a session keeps is used again.
    executor: None: one after the other, in this process.
    progress: whether runs may draw progress bars of their own, where there is but one at a time.
    """
    return _serial(specs, run, progress) if executor is None else _spread(specs, run, executor)


def _serial(specs: dict[str, RunSpec], run: Run, progress: bool) -> Iterator[RunRecord]:
    several = len(specs) > 1
    session = Session(activation_bytes=LIMIT if several else 0)
    announced = set()
    for key, spec in specs.items():
        if several and spec.loaded_by not in announced:
            announced.add(spec.loaded_by)
            _announce([other for other in specs.values() if other.loaded_by == spec.loaded_by], session)
        changed = "the model or texts that it reads have changed since the study began"
        yield _under(key, spec, run(spec, session, progress), changed)


def _under(key: str, spec: RunSpec, found: RunRecord, reason: str) -> RunRecord:
    """What was `found` for `spec`; where it has another key than `key`, a record of that key that says so, with the reason."""
    if found.key == key:
        return found
    error = f"its key is {found.key} by now: {reason}" if found.status == "done" else found.error
    return RunRecord(spec.flat(), key, "failed", error)


def _announce(specs: list[RunSpec], session: Session) -> None:
    """Says how long the runs of one model will take, unless it is too large to be loaded for that; they may be streamed."""
    try:
        if any(map(streaming.is_too_large, specs)):
            return
        decoder, _ = session.load(*specs[0].loaded_by)
        cost.announce_study(specs, decoder, pick_device(specs[0].device))
    except Exception as error:  # the runs themselves will fail in the same way, each with a record of it
        log.debug("no estimate: %s", error)


def _spread(specs: dict[str, RunSpec], run: Run, settings: Ray) -> Iterator[RunRecord]:
    ray = connect(settings.address)
    on_cpu = any(spec.compute.device == "cpu" for spec in specs.values())
    room = settings.request(ray, on_cpu).memory_there(ray)
    share = min((each for _, each in room), default=math.inf) if settings.memory is None else math.inf
    # Models that need workers of their own size come one after the other.
    for memory, group in _by_memory(specs, share).items():
        if settings.workers is None:  # the cluster does not grow: a run that is too large for any node will say so itself
            memory = min(memory, max((whole for whole, _ in room), default=memory))
        yield from _by_workers(group, run, ray, settings.request(ray, on_cpu, int(memory)), settings.workers)


def _by_memory(specs: dict[str, RunSpec], share: float) -> dict[int, dict[str, RunSpec]]:
    """`specs` by the bytes that the largest run of their model takes by its plan; 0 where that is little of a worker's `share` of a node."""
    models: dict[tuple, dict[str, RunSpec]] = {}
    for key, spec in specs.items():
        models.setdefault(spec.loaded_by, {})[key] = spec
    found: dict[int, dict[str, RunSpec]] = {}
    for group in models.values():
        found.setdefault(_memory(group.values(), share), {}).update(group)
    return found


def _memory(specs: Iterable[RunSpec], share: float) -> int:
    specs = list(specs)
    try:
        peaks = (plan.peak_memory(spec, pick_device(spec.compute.device))[HOST.type] for spec in specs)
        needs = max(sum(highest(phases).values()) for phases in peaks)
    except Exception as error:  # the runs themselves will fail in the same way, each with a record of it
        log.info("no memory is set aside for runs of %r: %s", specs[0].model.model, error)
        return 0
    return 0 if needs < plan.LARGE * share else math.ceil(needs)


def _by_workers(specs: dict[str, RunSpec], run: Run, ray, request: Request, limit: int | None) -> Iterator[RunRecord]:
    queue = Queue(specs)
    with contextlib.closing(Crew(ray, request, limit, _Runs(run), queue, "run")) as crew:
        while len(queue) or crew.in_hand:
            for key, found in crew.step():
                if isinstance(found, Failure):
                    found = RunRecord(specs[key].flat(), key, "failed", found.error)
                others = (
                    "where a worker computed it, the model or texts that it reads are others than here; give all nodes the same"
                )
                yield _under(key, specs[key], found, others)
            if not len(queue):
                crew.dismiss()


class _Runs:
    """What a worker does: runs one after the other, which share what they can."""

    def __init__(self, run: Run):
        self.run = run
        self.session: Session | None = None

    def __call__(self, spec: RunSpec) -> RunRecord:
        if self.session is None:
            self.session = Session(activation_bytes=LIMIT)
        return self.run(spec, self.session, False)


class Queue:
    """Runs that wait, in groups that start from one pruned state; see `recon.experiment.cluster.Tasks`."""

    def __init__(self, specs: dict[str, RunSpec]):
        self.specs = specs
        self.groups: dict[tuple, deque[str]] = {}
        for key in specs:
            self.put_back(key)
        self.untouched = set(self.groups)

    def __len__(self) -> int:
        return sum(map(len, self.groups.values()))

    def task(self, key: str) -> RunSpec:
        return self.specs[key]

    def put_back(self, key: str) -> None:
        self.groups.setdefault(self.specs[key].pruned_by, deque()).append(key)

    def take(self, before: str | None) -> str:
        """The run that shares most with the worker's run before, and least with those of other workers."""
        waiting = [group for group, keys in self.groups.items() if keys]
        own, loaded = (self.specs[before].pruned_by, self.specs[before].loaded_by) if before else (None, ())
        # Where others are at work on all groups, the longest one is shared.
        best = max(waiting, key=lambda g: (g == own, g in self.untouched, g[: len(loaded)] == loaded, len(self.groups[g])))
        self.untouched.discard(best)
        return self.groups[best].popleft()
