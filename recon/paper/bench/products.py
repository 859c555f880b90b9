"""The matrix products that a piece of work consists of, and how fast this machine does each alone."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1, torch.ops.aten.bmm.default: 0}


@dataclass(frozen=True)
class Product:
    """A matrix product as torch was asked for it: shape, stride and dtype of both factors; 3-D for a batch of products."""

    left: tuple
    right: tuple

    @property
    def flops(self) -> int:
        """Two per multiply-and-add."""
        *batch, rows, inner = self.left[0]
        return 2 * (batch[0] if batch else 1) * rows * inner * self.right[0][-1]

    def seconds(self, device: torch.device) -> float:
        """How long the product takes alone on this machine, best of several tries."""
        left, right = (torch.empty_strided(*side[:2], dtype=side[2], device=device).normal_() for side in (self.left, self.right))
        return timed(lambda: torch.matmul(left, right), device)


class Recorder(TorchDispatchMode):
    """Counts the matrix products that run while it is active, backward pass included."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[Product] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in _PRODUCTS:
            first = _PRODUCTS[function]
            sides = [(tuple(t.shape), tuple(t.stride()), t.dtype) for t in args[first : first + 2]]
            self.counts[Product(*sides)] += 1
        return function(*args, **(kwargs or {}))


def timed(store: Callable[[], object], device: torch.device, least: float = 0.05, tries: int = 5) -> float:
    """Seconds that `work` takes: the best of `tries` means, each over at least `least` / `tries` seconds."""
    store()
    synchronize(device)
    best = float("inf")
    for _ in range(tries):
        count, began = 0, time.perf_counter()
        while count == 0 or time.perf_counter() - began < least / tries:
            store()
            synchronize(device)
            count += 1
        best = min(best, (time.perf_counter() - began) / count)
    return best


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
