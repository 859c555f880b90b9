"""Where the runs of a study are computed: in this process one after the other, or by the workers of a Ray cluster."""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator

from recon.runtime.activations import LIMIT
from recon.study import plan, workers
from recon.study.record import RunRecord
from recon.study.session import Session
from recon.study.spec import RunSpec
from recon.study.workers import Ray

log = logging.getLogger("recon")
# Computes one run, with or without progress bars; never raises, but gives a record that says how it failed.
Run = Callable[[RunSpec, Session, bool], RunRecord]


def each(specs: dict[str, RunSpec], run: Run, executor: Ray | None, progress: bool = True) -> Iterator[RunRecord]:
    """The record of each of `specs`, by key, as soon as it is there, in any order.

    specs: in an order in which neighbours have most in common, so that what a session keeps is used again.
    executor: None: one after the other, in this process.
    progress: whether runs may draw progress bars of their own, where there is but one at a time.
    """
    for key, found in _serial(specs, run, progress) if executor is None else _spread(specs, run, executor):
        if found.key != key:
            said = f"its key is {found.key} by now: the model or texts that it reads have changed, or are others where it was computed"
            found = RunRecord(specs[key].flat(), key, "failed", said if found.status == "done" else found.error)
        yield found


def _serial(specs: dict[str, RunSpec], run: Run, progress: bool) -> Iterator[tuple[str, RunRecord]]:
    several = len(specs) > 1
    session = Session(activation_bytes=LIMIT if several else 0)
    announced = set()
    for key, spec in specs.items():
        if several and spec.loaded_by not in announced:
            announced.add(spec.loaded_by)
            _announce([other for other in specs.values() if other.loaded_by == spec.loaded_by])
        yield key, run(spec, session, progress)


def _announce(specs: list[RunSpec]) -> None:
    """Says how long the runs of one model will take."""
    try:
        plan.announce(specs)
    except Exception as error:  # the runs themselves will fail in the same way, each with a record of it
        log.debug("no estimate: %s", error)


class Runs:
    """What a worker does: runs one after another, which share what they can."""

    def __init__(self, run: Run):
        self.run = run
        self.session: Session | None = None

    def __call__(self, spec: RunSpec) -> RunRecord:
        self.session = self.session or Session(activation_bytes=LIMIT)
        return self.run(spec, self.session, False)


def _spread(specs: dict[str, RunSpec], run: Run, settings: Ray) -> Iterator[tuple[str, RunRecord]]:
    ray = workers.connect(settings.address)
    on_cpu = any(spec.compute.device == "cpu" for spec in specs.values())
    models: dict[tuple, dict[str, RunSpec]] = {}
    for key, spec in specs.items():
        models.setdefault(spec.loaded_by, {})[key] = spec
    groups: dict[int, dict[str, RunSpec]] = {}  # by the memory of their workers: one group after the other
    for group in models.values():
        groups.setdefault(0, {}).update(group)
    for memory, group in groups.items():
        request, left = settings.request(ray, on_cpu, memory), dict(group)
        with contextlib.closing(workers.spread(ray, settings, request, Runs(run), left, taker(left))) as found:
            for key, record in found:
                failed = RunRecord(specs[key].flat(), key, "failed", str(record))
                yield key, record if isinstance(record, RunRecord) else failed


def taker(left: dict[str, RunSpec]) -> Callable[[str | None], tuple[str, RunSpec] | None]:
    """Takes specs out of `left`: what shares most with the worker's last run, and least with those of other workers."""
    specs, begun = dict(left), set()

    def take(last: str | None) -> tuple[str, RunSpec] | None:
        """The next run for a worker whose last one had the key `last`; None once all are taken."""
        if not left:
            return None
        sizes = Counter(spec.pruned_by for spec in left.values())
        pruned, loaded = (specs[last].pruned_by, specs[last].loaded_by) if last else (None, None)

        def shared(key: str) -> tuple:
            group = left[key].pruned_by  # where others are at work on all groups, the largest one is divided
            return group == pruned, group not in begun, left[key].loaded_by == loaded, sizes[group]

        key = max(left, key=shared)
        begun.add(left[key].pruned_by)
        return key, left.pop(key)

    return take
