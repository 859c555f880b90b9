"""The matrix products that a piece of work consists of, and how fast this machine does each alone."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1, torch.ops.aten.bmm.default: 0}  # -> first factor


@dataclass(frozen=True)
class Product:
    """A matrix product as torch was asked for it: shape, stride and dtype of both factors; 3-D for a batch of products."""

    left: tuple
    right: tuple

    def seconds(self, device: torch.device) -> float:
        """How long the product takes alone on this machine."""
        left, right = (torch.empty_strided(*side[:2], dtype=side[2], device=device).normal_() for side in (self.left, self.right))
        return seconds(lambda: torch.matmul(left, right))


class Recorder(TorchDispatchMode):
    """Counts the matrix products that run while it is active, backward pass included.

    torch's FlopCounterMode sees shapes only; a product's speed also depends on strides and dtype.
    """

    def __init__(self):
        super().__init__()
        self.counts: Counter[Product] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS:
            first = PRODUCTS[function]
            sides = [(tuple(t.shape), tuple(t.stride()), t.dtype) for t in args[first : first + 2]]
            self.counts[Product(*sides)] += 1
        return function(*args, **(kwargs or {}))


def seconds(function: Callable[[], object], least: float = 0.05) -> float:
    """Median seconds of a call, of as many as fill `least` seconds, after a warm-up, on as many threads as torch now uses."""
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=least).median
