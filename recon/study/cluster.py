"""A Ray cluster, and tasks spread over its workers: the runs of a study, or the windows of one large model (`recon.study.side_by_side`)."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from recon.errors import ReconError, need
from recon.runtime.device import cores, limit_compiled_shapes

VARIABLE = "RECON_EXECUTOR"  # environment variable: the executor where none is given
ATTEMPTS = 3  # workers that a task may kill before it counts as failed


@dataclass(frozen=True)
class Ray:
    """Work is done side by side by the workers of a Ray cluster.

    Models and texts that are files must have the same path on every node, as on a shared file system, and every node the same version of
    this package; each node fetches bundled models once.

    Args:
        address: of a cluster: "auto" for the one that this machine is part of, or "ray://host:port"; None: the one that this process is
            connected to or `RAY_ADDRESS` names, else one of this machine alone that ends with the process.
        workers: how many at most; None: as many as there is room for.
        threads: CPUs and threads per worker; None: one or, on GPUs, a GPU's share of the CPUs.
        gpus: GPUs per worker; None: one where the cluster has any and the work is not asked for on the CPU, else none.
    """

    address: str | None = None
    workers: int | None = None
    threads: int | None = None
    gpus: float | None = None

    def __post_init__(self):
        for name, least in (("workers", 1), ("threads", 1), ("gpus", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ReconError(f"{name} of executor ray is {value!r}; allowed: from {least} up")

    def request(self, there: dict[str, float], on_cpu: bool) -> tuple[int, float, int]:
        """CPUs and GPUs of each worker, and the number of workers, on a cluster with these resources, as Ray names them.

        on_cpu: the work is asked for on the CPU. Raises `ReconError` where there is no room for a worker.
        """
        cpus, with_gpus = there.get("CPU", 0), there.get("GPU", 0)
        gpus = int(with_gpus > 0 and not on_cpu) if self.gpus is None else self.gpus
        threads = self.threads or max(1, int(cpus / with_gpus * gpus) if gpus and with_gpus else 1)
        room = int(min(cpus / threads, with_gpus / gpus) if gpus else cpus / threads)
        if not room:
            asked = f"{threads} CPUs, {gpus:g} GPUs"
            raise ReconError(f"the Ray cluster has no room for a worker ({asked}); it has {cpus:g} CPUs, {with_gpus:g} GPUs")
        return threads, gpus, min(room, self.workers or room)


def settings(executor: str | Ray | None) -> Ray | None:
    """The settings for an executor: nothing (None) for "serial", the defaults for "ray"; settings as they are.

    executor: None: what the environment variable `RECON_EXECUTOR` names, or serial. Raises `ReconError` for an unknown name.
    """
    executor = executor or os.environ.get(VARIABLE) or "serial"
    if isinstance(executor, Ray):
        return executor
    if executor not in ("serial", "ray"):
        raise ReconError(f"unknown executor {executor!r}; allowed: serial, ray, or recon.Ray(...) with settings of your own")
    return Ray() if executor == "ray" else None


def connect(address: str | None = None):
    """The module `ray`, connected to a cluster for as long as this process lasts; see `Ray`.

    Raises `ReconError` where Ray is not installed, or no cluster answers at `address`.
    """
    need("ray", "ray", "executor ray")
    import ray

    address, options = address or os.environ.get("RAY_ADDRESS") or "local", {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 leaves workers next to nothing beside other programs
        options = {"include_dashboard": False, "num_cpus": cores()}  # Ray would count those that this process may not use
    try:
        if not ray.is_initialized():
            ray.init(address, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray has no class of its own for this
        raise ReconError(f"no Ray cluster can be reached at {address!r}: {error}") from error
    return ray


class Worker:
    """One process, which does one task after another: an actor of Ray."""

    def __init__(self, threads: int, function: Callable[[object], object]):
        limit_compiled_shapes()
        torch.set_num_threads(threads)  # Ray counts a worker's CPUs, but does not keep it to them
        self.function = function

    def do(self, task: object) -> object:
        return self.function(task)


def spread(how: Ray, on_cpu: bool, function: Callable, tasks: Iterable) -> Iterator:
    """What `function` gives for each of `tasks`, as soon as it is there; an exception for a task that raised, or that workers died of.

    Ray starts a worker that is lost again, and gives it its task again, up to `ATTEMPTS` times.

    function: each worker has a copy of its own, which may keep what its next task can use.
    tasks: taken a few ahead of what workers do.
    """
    ray = connect(how.address)
    from ray.util import ActorPool

    threads, gpus, count = how.request(ray.cluster_resources(), on_cpu)
    kind = ray.remote(Worker).options(num_cpus=threads, num_gpus=gpus, max_restarts=-1, max_task_retries=ATTEMPTS - 1)
    shared, left, waiting = ray.put(function), iter(tasks), 0
    workers = [kind.remote(threads, shared) for _ in range(count)]
    pool = ActorPool(workers)
    try:
        while True:
            while waiting < 2 * count and (task := next(left, None)) is not None:
                pool.submit(lambda worker, task: worker.do.remote(task), task)
                waiting += 1
            if not waiting:
                return
            while waiting < count and (idle := pool.pop_idle()):  # where these were, a lost worker may start again
                ray.kill(idle)
            try:
                answer = pool.get_next_unordered()
            except ray.exceptions.RayError as error:
                answer = error
            waiting -= 1
            yield answer
    finally:
        for worker in workers:
            ray.kill(worker)
