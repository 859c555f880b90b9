"""The learning-rate schedule and the curve of one training."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Schedule:
    """How long and how fast one window is trained."""

    learning_rate: float = 3e-3
    epochs: int = 1
    batch_size: int = 1  # samples per forward pass
    accumulation: int = 1  # forward passes per optimiser step
    warmup: float = 0.1  # share of the steps in which the learning rate rises
    pieces: int = 1  # that samples are cut into where a window does not mix tokens: more steps from the same work

    def scaled(self, factor: float) -> "Schedule":
        """The same schedule with its learning rate multiplied by `factor`."""
        return replace(self, learning_rate=self.learning_rate * factor)

    def steps(self, samples: int) -> int:
        """Optimiser steps for this many samples."""
        return self.epochs * -(-samples // (self.batch_size * self.accumulation))

    def factor(self, step: int, steps: int) -> float:
        """Learning rate at `step` of `steps`, relative to its peak: linear warm-up, then linear decay to zero."""
        rise = max(1, round(self.warmup * steps))
        return min((step + 1) / rise, (steps - step) / max(1, steps - rise + 1))


@dataclass(frozen=True)
class Curve:
    """How a training went: `losses`, one per optimiser step, and the gradient's norm at every `NORM_EVERY`-th step from the first.

    `micro_batch` is the number of samples per forward pass in the end: fewer than asked for where memory ran out.
    """

    losses: list[float]
    gradient_norms: list[float]
    micro_batch: int = 0


NORM_EVERY = 8  # steps: a norm reads all gradients once more, which costs a few per cent of a step
