"""How long and how fast to train: a linear schedule with warm-up, and learning rates relative to the size of the weights.

The loop is `recon.methods.training.train`. AdamW moves every weight by about its learning rate, whatever the gradient's size. So
the rate r is relative: it is multiplied by s, the root mean square of the surviving weights of each matrix. The same r then fits
models whose weights differ by an order of magnitude.

AdamW: Loshchilov & Hutter 2019, arXiv 1711.05101. Schedule as in the paper (arXiv 2510.14444): linear with 10 % warm-up.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

RATES = ("relative", "absolute")  # multiplied by the root mean square of each matrix's surviving weights; as it is


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    learning_rate: float = 0.01  # at its peak
    rate: str = "relative"  # what the learning rate means; see `RATES`
    epochs: int = 1
    batch_size: int = 1  # samples per forward pass
    accumulation: int = 1  # forward passes per optimiser step
    warmup: float = 0.1  # share of the steps in which the learning rate rises
    weight_decay: float = 0.0  # each step shrinks a parameter by this times its learning rate

    def factor(self, step: int, steps: int) -> float:
        """Learning rate at `step` of `steps`, relative to its peak: linear warm-up, then linear decay to zero."""
        rise = max(1, round(self.warmup * steps))
        return min((step + 1) / rise, (steps - step) / max(1, steps - rise + 1))


@dataclass(frozen=True)
class Trained:
    """A parameter to train; `mask`: of its shape, 1 = survives, None: all do; `size`: multiplies a relative rate."""

    parameter: nn.Parameter
    mask: Tensor | None = None
    size: float = 1.0


@torch.no_grad()
def trained(
    parameters: Iterable[nn.Parameter], masks: dict[nn.Parameter, Tensor], stacked: Collection[nn.Parameter] = ()
) -> list[Trained]:
    """`parameters` with their masks (1 = survives) and sizes: the root mean square of each one's surviving elements.

    A vector (bias or norm) or a matrix of zeros gets at least the root mean square of all matrices together (of all vectors, if
    there is no matrix): else it would never learn. stacked: parameters of several vectors, such as the biases of experts.
    """
    squares = {p: p.detach().float().square().sum().item() for p in parameters}
    counts = {p: int(masks[p].count_nonzero()) if p in masks else p.numel() for p in squares}
    vectors = {p for p in squares if p.ndim == 1}.union(stacked)
    matrices = [p for p in squares if p not in vectors] or list(squares)
    least = (sum(squares[p] for p in matrices) / max(1, sum(counts[p] for p in matrices))) ** 0.5
    sizes = {p: (squares[p] / max(1, counts[p])) ** 0.5 for p in squares}
    return [Trained(p, masks.get(p), max(size, least) if p in vectors or not size else size) for p, size in sizes.items()]
