"""Tasks spread over the workers of a Ray cluster: the runs of a study, or, under dense propagation, the windows of one model."""

import itertools
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from recon.errors import ReconError, need
from recon.model.windows import Window
from recon.runtime.device import limit_compiled_shapes

VARIABLE = "RECON_EXECUTOR"  # environment variable that names the executor if none is given
ATTEMPTS = 3  # a task counts as failed after so many of its workers died


@dataclass(frozen=True)
class Ray:
    """Settings of the executor ray: workers, which are processes of a Ray cluster, work in parallel.

    Files of models and texts must have the same path on every node, as on a shared file system. Every node needs the same version
    of this package, and fetches bundled models once.
    """

    # Of a cluster: "auto" (the one that runs on this machine), "host:port" or "ray://host:port". None: the one that this process
    # is connected to, else the one that `RAY_ADDRESS` names, else a new one on this machine alone, which ends with the process.
    address: str | None = None
    workers: int | None = None  # how many at most; None: as many as the cluster has room for
    threads: int | None = None  # CPUs per worker; None: one or, with GPUs, a node's CPUs per GPU (the lowest of all nodes)
    gpus: float | None = None  # GPUs per worker; None: one if the cluster has any and not all work is on CPUs, else none

    def __post_init__(self):
        for name, least in (("workers", 1), ("threads", 1), ("gpus", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ReconError(f"{name} of executor ray is {value!r}; allowed: from {least} up")

    def request(self, nodes: list[dict[str, float]], on_cpu: bool) -> tuple[int, float, int]:
        """CPUs and GPUs per worker, and how many workers. nodes: resources of each. Raises `ReconError` if none has room."""
        there = [(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes]
        shares = [cpus / with_gpus for cpus, with_gpus in there if with_gpus]
        gpus = int(bool(shares) and not on_cpu) if self.gpus is None else self.gpus
        threads = self.threads or max(1, int(min(shares, default=1) * gpus))
        room = sum(int(min(cpus / threads, with_gpus / gpus) if gpus else cpus / threads) for cpus, with_gpus in there)
        if room:
            return threads, gpus, min(room, self.workers or room)
        said = f"the Ray cluster has no room for a worker ({threads} CPUs, {gpus:g} GPUs)"
        found = " or ".join(dict.fromkeys(f"{cpus:g} CPUs, {with_gpus:g} GPUs" for cpus, with_gpus in there))
        raise ReconError(f"{said}; it has {found} on a node")


def settings(executor: str | Ray | None) -> Ray | None:
    """The settings of `executor`, None for "serial". Default: $RECON_EXECUTOR, else serial. Raises `ReconError` for others."""
    executor = executor or os.environ.get(VARIABLE) or "serial"
    if executor not in ("serial", "ray") and not isinstance(executor, Ray):
        raise ReconError(f"unknown executor {executor!r}; allowed: serial, ray, or recon.Ray(...) with settings of your own")
    return {"serial": None, "ray": Ray()}.get(executor, executor)


def connect(address: str | None = None):
    """The module `ray`, connected to a cluster (see `Ray`) until this process ends. Raises `ReconError` if it cannot connect."""
    need("ray", "ray", "executor ray")
    import ray

    address, options = address or os.environ.get("RAY_ADDRESS") or "local", {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's default, 15, workers get little time beside other programs
        # The CPUs that this process may use: in a SLURM job, for example, Ray would count all of the machine's.
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        options = {"include_dashboard": False, "num_cpus": cpus}
    try:
        if not ray.is_initialized():
            ray.init(address, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray has no exception class for this
        raise ReconError(f"no Ray cluster can be reached at {address!r}: {error}") from error
    return ray


class Worker:
    """An actor of Ray: a process that does one task after another."""

    def __init__(self, threads: int, function: Callable[[object], object]):
        limit_compiled_shapes()
        torch.set_num_threads(threads)  # Ray reserves CPUs for a worker, but does not limit it to them
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # Ray's arrays are shared
        self.function = function

    def do(self, task: object) -> object:
        return self.function(task)


def spread(how: Ray, on_cpu: bool, function: Callable, tasks: Iterable) -> Iterator:
    """Yields `function(task)` for each of `tasks` when it is done; an exception, if it raised or `ATTEMPTS` workers died.

    Ray restarts workers that die. tasks: a few are taken in advance.
    function: each worker has its own copy, which can keep what its next task may use.
    """
    ray = connect(how.address)
    from ray.util import ActorPool

    threads, gpus, count = how.request([node["Resources"] for node in ray.nodes() if node["Alive"]], on_cpu)
    kind = ray.remote(Worker).options(num_cpus=threads, num_gpus=gpus, max_restarts=-1, max_task_retries=ATTEMPTS - 1)
    shared, left, waiting, lost = ray.put(function), iter(tasks), 0, None
    workers = [kind.remote(threads, shared) for _ in range(count)]
    pool = ActorPool(workers)
    try:
        while True:
            for task in itertools.islice(left, 2 * count - waiting):
                pool.submit(lambda worker, task: worker.do.remote(task), task)
                waiting += 1
            if not waiting:
                return
            while waiting < count and (idle := pool.pop_idle()):  # makes room for a lost worker to start again
                ray.kill(idle)
            if not pool.has_next():
                raise ReconError(f"no worker of the Ray cluster is left; the last one was lost by: {lost}")
            waiting -= 1
            try:
                yield pool.get_next_unordered()
            except ray.exceptions.RayError as error:
                lost = error
                yield error
    finally:
        for worker in workers:
            ray.kill(worker)


def loop(executor: str | Ray | None, propagation: str) -> Callable | None:
    """The loop over windows of an executor, for `recon.Execution`; None: the serial one. Raises `ReconError` for a wrong one."""
    if (how := settings(executor)) is None:
        return None
    if propagation != "dense":
        raise ReconError(f"windows cannot run side by side under {propagation} propagation; choose dense, or executor serial")
    connect(how.address)
    return partial(side_by_side, how)


def weights(decoder, window: Window) -> dict[str, np.ndarray]:
    """The parameters that `window` needs to run, by full name, as arrays: Ray shares these between processes of a node."""
    with decoder.loaded(window):
        needed = {id(tensor) for tensor in decoder.needed(window)}
        return {name: p.detach().cpu().numpy() for name, p in decoder.model.named_parameters() if id(p) in needed}


def hollow(decoder, values: dict[str, np.ndarray]):
    """A decoder with the structure of `decoder` that reads its weights from `values`; weights that are not there are zeros."""
    from recon.model.skeleton import Lazy, second

    made = type(decoder)(second(decoder.model).cpu(), decoder.structure)

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, torch.tensor(values[name]) if name in values else torch.zeros(()).expand(made.ends[name].shape)

    made.lazy = Lazy(made.model, read)
    made.model.requires_grad_(False)
    return made


class Fit:
    """Fits one window in a worker, as `whole` would. Takes the window, its weights in both models, masks and dense inputs."""

    def __init__(self, whole):
        device, dtype = whole.execution.device.type, str(whole.execution.dtype).removeprefix("torch.")
        self.execution, self.how = ("cpu" if device == "cpu" else "auto", dtype), (whole.config, whole.count, whole.seed)
        self.values = [{}, {}]  # weights of the window, in the dense and in the pruned model
        self.decoders = list(map(hollow, (whole.teacher, whole.student), self.values))

    def __call__(self, task: tuple) -> tuple:
        import ray

        from recon.methods.reconstruct import Reconstruction
        from recon.runtime.execution import Execution

        (window, *fresh, masks, stream), began = task, time.perf_counter()
        for values, now in zip(self.values, fresh):
            values.clear()
            values.update(now)
        masks = {name: torch.tensor(mask) for name, mask in masks.items()}
        alone = Reconstruction(*self.decoders, masks, *self.how, Execution(*self.execution))
        alone.streams.dense = torch.from_numpy(ray.get(stream))
        task = alone.streams.task("dense", window)
        with alone.student.loaded(window):
            report = alone.fit(window, *task)
            fitted = {name: p.numpy() for name, p in alone.student.parameters(window).items()}
        return window.name, report, time.perf_counter() - began, fitted


def side_by_side(how: Ray, whole, windows: list[Window]) -> Iterator:
    """Reconstructs `windows` of `whole` in parallel; yields their reports in order. Raises `ReconError` if one fails."""
    ray, streams, student = connect(how.address), whole.streams, whole.student
    left, done, after = list(windows), {}, {}  # after: by unfinished window, the streams that the next one starts from

    def tasks() -> Iterator[tuple]:
        """The task of each window, made when a worker can take it; the dense activations of a block are sent once."""
        dense = shipped = None
        for window in windows:
            if streams.dense is not dense:
                dense, shipped = streams.dense, ray.put(streams.dense.cpu().numpy())
            masks = {name: whole.masks[name].cpu().numpy() for name in student.matrices(window)}
            read = Window(window.blocks) if window.matrices else window
            task = window, weights(whole.teacher, read), weights(student, window), masks, shipped
            streams.advance(window)
            # Kept only if a folder stores them: each is of all samples, and every unfinished window has one.
            after[window.name] = {"dense": streams.dense if whole.execution.storage.folder else None, "sparse": None}
            yield task

    for answer in spread(how, whole.execution.device.type == "cpu", Fit(whole), tasks()):
        if isinstance(answer, Exception):
            raise ReconError(f"a window was not reconstructed: {answer}")
        done[answer[0]] = answer[1:]
        while left and left[0].name in done:
            window = left.pop(0)
            report, seconds, fitted = done.pop(window.name)
            with student.loaded(window), torch.no_grad():
                for name, parameter in student.parameters(window).items():
                    parameter.copy_(torch.tensor(fitted[name]))
                report = whole.finish(window, report, seconds, after.pop(window.name))
            yield report
