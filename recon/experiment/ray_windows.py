"""Windows of one model reconstructed side by side by Ray workers."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from recon.errors import ReconError
from recon.experiment import cluster
from recon.experiment.cluster import Crew, Failure, Ray
from recon.experiment.shipping import Packed, revived, twin, without_weights
from recon.methods.problem import Problem
from recon.methods.reconstruct import Reconstruction, WindowReport
from recon.model.decoder import Decoder
from recon.model.modules import requiring_gradients
from recon.model.windows import Window
from recon.runtime.execution import Execution


def loop(executor: str | Ray | None) -> Callable | None:
    """The loop over windows for an executor (see `recon.experiment.cluster.get`): None: one after another."""
    settings = cluster.get(executor)
    return None if settings is None else partial(side_by_side, settings)


def check(executor: str | Ray | None, propagation: str) -> None:
    """Raises `ReconError` where windows depend on one another and are to be fitted side by side."""
    if cluster.get(executor) is not None and propagation != "dense":
        raise ReconError(
            f"windows cannot be reconstructed side by side under {propagation} propagation: each reads what those before it, reconstructed, "
            "give out; choose propagation dense, or executor serial"
        )


@dataclass(frozen=True)
class _Task:
    """One window as a worker gets it: its weights, dense and pruned, its masks, and the dense activations that it starts from."""

    window: Window
    dense: dict[str, Packed]
    pruned: dict[str, Packed]
    masks: dict[str, Packed]
    stream: object  # reference to a `Packed` that windows share


class _Windows:
    """What a worker does: reconstructs one window after the other, none of which depends on another."""

    def __init__(self, problem: Problem):
        self.decoder, execution = without_weights(problem.teacher), problem.execution
        self.on_cpu, self.dtype = execution.device.type == "cpu", str(execution.dtype).removeprefix("torch.")
        self.config, self.split, self.seed = problem.config, problem.split, problem.seed
        self.task: _Task | None = None
        self.teacher: Decoder | None = None

    def __call__(self, task: _Task) -> tuple[dict, dict[str, Packed]]:
        import ray

        self.task = task
        if self.teacher is None:
            self.teacher = revived(self.decoder, lambda name: self.value(self.task.dense, name))
            self.student = twin(self.teacher, lambda name: self.value(self.task.pruned, name))
        for name, value in task.pruned.items():
            self.student.lazy.add(name, value.shape)
        masks = {name: mask.tensor() for name, mask in task.masks.items()}
        execution = Execution("cpu" if self.on_cpu else "auto", self.dtype)
        alone = Reconstruction(Problem(self.teacher, self.student, masks, self.config, self.split, self.seed, execution))
        alone.propagation.dense, window = ray.get(task.stream).tensor(), task.window
        began = time.perf_counter()
        with requiring_gradients(self.student.model.parameters(), False):
            aim = alone.propagation.task(window)
            with self.student.loaded(window):
                report = alone.reconstruct(window, aim)
                shard = {name: Packed.of(parameter) for name, parameter in self.student.parameters(window).items()}
        return asdict(report) | {"seconds": time.perf_counter() - began}, shard

    @staticmethod
    def value(values: dict[str, Packed], name: str) -> Tensor | None:
        return values[name].tensor() if name in values else None


class _Waiting:
    """Windows that wait for a worker, made ready one by one; see `recon.experiment.cluster.Tasks`."""

    def __init__(self, reconstruction: Reconstruction, windows: list[Window], put: Callable[[Packed], object]):
        self.reconstruction, self.put = reconstruction, put
        self.left = deque(windows)
        self.waiting: deque[str] = deque()
        self.ready: dict[str, _Task] = {}  # by name, until they are finished
        self.after: dict[str, Tensor | None] = {}  # the stream that the next window starts from
        self.shared: tuple[Tensor | None, object] = None, None

    def __len__(self) -> int:
        return len(self.waiting)

    def take(self, before: str | None) -> str:
        return self.waiting.popleft()

    def put_back(self, key: str) -> None:
        self.waiting.appendleft(key)

    def task(self, key: str) -> _Task:
        return self.ready[key]

    def make_ready(self) -> None:
        """Packs the next window, and takes the dense activations on to the one after it."""
        problem, propagation, window = self.reconstruction.problem, self.reconstruction.propagation, self.left.popleft()
        if propagation.dense is not self.shared[0]:
            self.shared = propagation.dense, self.put(Packed.of(propagation.dense))
        read = Window(window.blocks) if window.matrices else window
        masks = {name: Packed.of(problem.masks[name]) for name in problem.student.matrices(window)}
        dense, pruned = _packed(problem.teacher, read), _packed(problem.student, window)
        self.ready[window.name] = _Task(window, dense, pruned, masks, self.shared[1])
        propagation.advance(window)
        self.after[window.name] = propagation.dense
        self.waiting.append(window.name)


def _packed(decoder: Decoder, window: Window) -> dict[str, Packed]:
    """The parameters that it takes to run `window`, by full name."""
    with decoder.loaded(window):
        needed = {id(tensor) for tensor in decoder.needed(window)}
        return {name: Packed.of(p) for name, p in decoder.model.named_parameters() if id(p) in needed}


def side_by_side(settings: Ray, reconstruction: Reconstruction, windows: list[Window]) -> Iterator[WindowReport]:
    """The reports of `windows`, in their order, as workers reconstruct them."""
    problem, ray = reconstruction.problem, cluster.connect(settings.address)
    request = settings.request(ray, on_cpu=problem.execution.device.type == "cpu")
    waiting, done = _Waiting(reconstruction, windows, ray.put), {}
    with contextlib.closing(Crew(ray, request, settings.workers, _Windows(problem), waiting, "window")) as crew:
        for window in windows:
            while window.name not in done:
                room = crew.capacity()
                # Each worker has a window in hand and one that waits; what is finished out of turn waits as well.
                more = bool(waiting.left) and len(waiting.ready) < 3 * room and len(waiting) < room
                if more:
                    waiting.make_ready()
                for name, found in crew.step(timeout=0 if more else cluster.POLL):
                    if isinstance(found, Failure):
                        raise ReconError(f"window {name!r} was not reconstructed: {found.error}")
                    done[name] = found
            del waiting.ready[window.name]
            found, shard = done.pop(window.name)
            with problem.student.loaded(window), torch.no_grad():
                parameters = problem.student.parameters(window)
                for name, packed in shard.items():
                    parameters[name].copy_(packed.tensor())
                streams = {"dense": waiting.after.pop(window.name), "sparse": None}
                report = reconstruction.finish(window, WindowReport(**found), streams, found["seconds"])
            yield report
