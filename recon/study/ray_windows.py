"""Windows of one model reconstructed side by side by Ray workers.

Under dense propagation no window depends on another. A worker gets the model's structure once, and of each window its weights, its masks
and the dense activations that it starts from, which windows share; this process computes those, a few windows ahead.
"""

import contextlib
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from recon.errors import ReconError
from recon.methods.reconstruct import Reconstruction, WindowReport
from recon.model.decoder import Decoder
from recon.model.modules import requiring_gradients
from recon.model.skeleton import Lazy, second
from recon.model.windows import Window
from recon.runtime.execution import Execution
from recon.study import workers
from recon.study.workers import Ray

AHEAD = 3  # windows per worker that are prepared and not yet finished in turn, which bounds what is in memory


def loop(executor: str | Ray | None) -> Callable | None:
    """The loop over windows for an executor (see `recon.study.workers.get`); None: one after another."""
    settings = workers.get(executor)
    return None if settings is None else partial(side_by_side, settings)


def check(executor: str | Ray | None, propagation: str) -> None:
    """Raises `ReconError` where windows are to be reconstructed side by side but depend on one another, or there is no Ray."""
    settings = workers.get(executor)
    if settings is None:
        return
    if propagation != "dense":
        raise ReconError(
            f"windows cannot be reconstructed side by side under {propagation} propagation: each reads the output of those before it, "
            "reconstructed; choose propagation dense, or executor serial"
        )
    workers.connect(settings.address)


@dataclass(frozen=True)
class Packed:
    """A tensor as plain bytes, which Ray hands to the processes of a node without copying them."""

    content: np.ndarray
    dtype: torch.dtype
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Tensor) -> "Packed":
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        return cls(flat.view(torch.uint8).numpy(), tensor.dtype, tensor.shape)

    def tensor(self) -> Tensor:
        """The tensor, on the CPU; not to be changed in place."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it cannot be written to
            return torch.from_numpy(self.content).view(self.dtype).view(self.shape)


def packed(decoder: Decoder, window: Window) -> dict[str, Packed]:
    """The parameters that it takes to run `window`, by full name."""
    with decoder.loaded(window):
        needed = {id(tensor) for tensor in decoder.needed(window)}
        return {name: Packed.of(p) for name, p in decoder.model.named_parameters() if id(p) in needed}


def without_weights(decoder: Decoder) -> Decoder:
    """A decoder of the same architecture, for `with_weights`; Ray can pickle it."""
    return type(decoder)(second(decoder.model).cpu(), decoder.structure)


def with_weights(decoder: Decoder, values: dict[str, Packed]) -> Decoder:
    """A decoder of the same architecture whose weights are what `values` holds by the time that they are needed.

    Weights outside the blocks that are missing are zeros: windows are not computed with them.
    """
    found = without_weights(decoder)

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, values[name].tensor().clone() if name in values else torch.zeros(()).expand(found.ends[name].shape)

    found.lazy = Lazy(found.model, read)
    return found


@dataclass(frozen=True)
class Task:
    """One window as a worker gets it: its weights, dense and pruned, its masks, and the dense activations that it starts from."""

    window: Window
    dense: dict[str, Packed]
    pruned: dict[str, Packed]
    masks: dict[str, Packed]
    stream: object  # Ray's reference to a `Packed` that windows share


class Fit:
    """What a worker does: reconstructs one window after another."""

    def __init__(self, problem: Reconstruction):
        self.decoder, execution = without_weights(problem.teacher), problem.execution
        self.execution = "cpu" if execution.device.type == "cpu" else "auto", str(execution.dtype).removeprefix("torch.")
        self.config, self.split, self.seed = problem.config, problem.split, problem.seed
        self.dense: dict[str, Packed] = {}
        self.pruned: dict[str, Packed] = {}

    def __call__(self, task: Task) -> tuple[dict, dict[str, Packed]]:
        import ray

        if not self.dense:
            self.teacher, self.student = with_weights(self.decoder, self.dense), with_weights(self.decoder, self.pruned)
        for kept, values in ((self.dense, task.dense), (self.pruned, task.pruned)):
            kept.clear()
            kept.update(values)
        for name, value in task.pruned.items():
            self.student.lazy.add(name, value.shape)
        masks, began = {name: mask.tensor() for name, mask in task.masks.items()}, time.perf_counter()
        execution = Execution(*self.execution)
        alone = Reconstruction(self.teacher, self.student, masks, self.config, self.split, self.seed, execution)
        alone.streams.dense = ray.get(task.stream).tensor()
        with requiring_gradients(self.student.model.parameters(), False):
            aim = alone.streams.task("dense", task.window)
            with self.student.loaded(task.window):
                report = alone.fit(task.window, *aim)
                shard = {name: Packed.of(p) for name, p in self.student.parameters(task.window).items()}
        return asdict(report) | {"seconds": time.perf_counter() - began}, shard


def side_by_side(settings: Ray, reconstruction: Reconstruction, windows: list[Window]) -> Iterator[WindowReport]:
    """The reports of `windows`, in their order, as workers reconstruct them."""
    problem, propagation, ray = reconstruction, reconstruction.streams, workers.connect(settings.address)
    request = settings.request(ray, on_cpu=problem.execution.device.type == "cpu")
    most = AHEAD * (settings.workers or request.room(ray))
    left, done = deque(windows), {}
    after: dict[str, Tensor | None] = {}  # the stream that the next window starts from, of windows that are not finished
    shipped = None, None  # the last stream, and Ray's reference to it

    def take(_: str | None) -> tuple[str, Task] | None:
        """Packs the next window, and takes the dense activations on to the one after it."""
        nonlocal shipped
        if not left or len(after) >= most:
            return None
        window = left.popleft()
        if propagation.dense is not shipped[0]:
            shipped = propagation.dense, ray.put(Packed.of(propagation.dense))
        read = Window(window.blocks) if window.matrices else window
        masks = {name: Packed.of(problem.masks[name]) for name in problem.student.matrices(window)}
        task = Task(window, packed(problem.teacher, read), packed(problem.student, window), masks, shipped[1])
        propagation.advance(window)
        after[window.name] = propagation.dense
        return window.name, task

    with contextlib.closing(workers.spread(ray, settings, request, Fit(problem), left, take, depth=2)) as answers:
        for window in windows:
            while window.name not in done:
                name, found = next(answers)
                if isinstance(found, ReconError):
                    raise ReconError(f"window {name!r} was not reconstructed: {found}")
                done[name] = found
            report, shard = done.pop(window.name)
            with problem.student.loaded(window), torch.no_grad():
                parameters = problem.student.parameters(window)
                for name, value in shard.items():
                    parameters[name].copy_(value.tensor())
                streams = {"dense": after.pop(window.name), "sparse": None}
                report = reconstruction.finish(window, WindowReport(**report), report["seconds"], streams)
            yield report
