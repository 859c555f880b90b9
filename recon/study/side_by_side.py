"""Windows of one model reconstructed side by side on a Ray cluster.

Under dense propagation no window depends on another. A worker has the model's structure; of each window it gets the weights, the masks
and the dense activations before it, and gives back the fitted weights. This process computes the dense activations, a few windows ahead.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
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
from recon.study.cluster import Ray, connect, settings, spread


def loop(executor: str | Ray | None, propagation: str) -> Callable | None:
    """The loop over windows for an executor, for `recon.Execution`; None: one after another.

    Raises `ReconError` where windows are to be reconstructed side by side but depend on one another, or there is no Ray.
    """
    if (how := settings(executor)) is None:
        return None
    if propagation != "dense":
        raise ReconError(
            f"windows cannot be reconstructed side by side under {propagation} propagation: each reads the output of those before it, "
            "reconstructed; choose propagation dense, or executor serial"
        )
    connect(how.address)
    return partial(side_by_side, how)


def weights(decoder: Decoder, window: Window) -> dict[str, np.ndarray]:
    """The parameters that it takes to run `window`, by full name, as arrays, which the processes of a node share."""
    with decoder.loaded(window):
        needed = {id(tensor) for tensor in decoder.needed(window)}
        return {name: p.detach().cpu().numpy() for name, p in decoder.model.named_parameters() if id(p) in needed}


def with_weights(decoder: Decoder, values: dict[str, np.ndarray]) -> Decoder:
    """A decoder built as `decoder`, with these weights; others outside the blocks are zeros: windows are not computed with them."""
    made = type(decoder)(second(decoder.model), decoder.structure)

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, torch.tensor(values[name]) if name in values else torch.zeros(()).expand(made.ends[name].shape)

    made.lazy = Lazy(made.model, read)
    for name, value in values.items():  # such as biases that pruning gave to matrices
        made.lazy.add(name, value.shape)
    return made


class Fit:
    """What a worker does with a window, its weights in both models, its masks, and the dense activations before it."""

    def __init__(self, whole: Reconstruction):
        self.decoder = type(whole.teacher)(second(whole.teacher.model).cpu(), whole.teacher.structure)  # without weights
        execution = whole.execution
        self.execution = "cpu" if execution.device.type == "cpu" else "auto", str(execution.dtype).removeprefix("torch.")
        self.config, self.split, self.seed = whole.config, whole.split, whole.seed

    def __call__(self, task: tuple) -> tuple[str, dict, dict[str, np.ndarray]]:
        import ray

        (window, dense, pruned, masks, stream), began = task, time.perf_counter()
        teacher, student = with_weights(self.decoder, dense), with_weights(self.decoder, pruned)
        masks, execution = {name: torch.tensor(mask) for name, mask in masks.items()}, Execution(*self.execution)
        alone = Reconstruction(teacher, student, masks, self.config, self.split, self.seed, execution)
        with warnings.catch_warnings(action="ignore"):  # that it cannot be written to
            alone.streams.dense = torch.from_numpy(ray.get(stream))
        with requiring_gradients(student.model.parameters(), False):
            inputs, targets, statistics = alone.streams.dense_task(window)
            with student.loaded(window):
                report = asdict(alone.fit(window, inputs, targets, statistics)) | {"seconds": time.perf_counter() - began}
                return window.name, report, {name: p.detach().cpu().numpy() for name, p in student.parameters(window).items()}


def side_by_side(how: Ray, whole: Reconstruction, windows: list[Window]) -> Iterator[WindowReport]:
    """The reports of `windows`, in their order, as workers reconstruct them."""
    ray, streams, student = connect(how.address), whole.streams, whole.student
    after: dict[str, Tensor | None] = {}  # by window that is not finished, what the next one starts from
    left, done = list(windows), {}

    def tasks() -> Iterator[tuple]:
        dense = shipped = None
        for window in windows:
            if streams.dense is not dense:
                dense, shipped = streams.dense, ray.put(streams.dense.cpu().numpy())
            masks = {name: whole.masks[name].cpu().numpy() for name in student.matrices(window)}
            read = Window(window.blocks) if window.matrices else window
            task = window, weights(whole.teacher, read), weights(student, window), masks, shipped
            streams.advance(window)
            after[window.name] = streams.dense
            yield task

    for answer in spread(how, whole.execution.device.type == "cpu", Fit(whole), tasks()):
        if isinstance(answer, Exception):
            raise ReconError(f"a window was not reconstructed: {answer}")
        done[answer[0]] = answer[1:]
        while left and left[0].name in done:
            window = left.pop(0)
            report, fitted = done.pop(window.name)
            with student.loaded(window), torch.no_grad():
                for name, parameter in student.parameters(window).items():
                    parameter.copy_(torch.tensor(fitted[name]))
                now = {"dense": after.pop(window.name), "sparse": None}
                report = whole.finish(window, WindowReport(**report), report["seconds"], now)
            yield report
