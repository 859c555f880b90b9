"""Samples of unequal length without padding: their tokens, or activations, one sample after another.

What works on samples of equal length, one tensor (samples, length, ...), works on these by the functions below.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Ragged:
    """Samples of unequal length: `flat` (tokens of all samples, ...), and how many of them are each sample's, in order.

    As of a tensor, `ragged[number]` is one sample (length, ...), `ragged[start:stop]` several, which view the same memory, and
    `ragged[numbers]` a tensor (samples, length, ...) of samples that have to be of one length.
    """

    def __init__(self, flat: Tensor, lengths: Sequence[int]):
        self.flat, self.lengths = flat, list(lengths)
        self._starts = [0]
        for length in lengths:
            self._starts.append(self._starts[-1] + length)
        if self._starts[-1] != len(flat):
            raise ValueError(f"samples of {self._starts[-1]} tokens in all do not make up the {len(flat)} that are there")

    @classmethod
    def of(cls, samples: Sequence[Tensor]) -> "Ragged":
        """`samples`, each (length, ...)."""
        return cls(torch.cat(list(samples)), [len(sample) for sample in samples])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, which):
        if isinstance(which, slice):
            start, stop, _ = which.indices(len(self))
            return Ragged(self.flat[self._starts[start] : self._starts[max(start, stop)]], self.lengths[start:stop])
        if isinstance(which, int):
            return self.flat[self._starts[which] : self._starts[which + 1]]
        return torch.stack([self[int(number)] for number in which])

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(len(self)))

    @property
    def device(self) -> torch.device:
        return self.flat.device

    @property
    def dtype(self) -> torch.dtype:
        return self.flat.dtype


Samples = Tensor | Ragged


def lengths(samples: Samples) -> list[int]:
    """How many tokens each sample has."""
    return samples.lengths if isinstance(samples, Ragged) else [samples.shape[1]] * len(samples)


def flat(samples: Samples) -> Tensor:
    """The tokens of all samples, (tokens, ...), one sample after another: a view."""
    return samples.flat if isinstance(samples, Ragged) else samples.flatten(0, 1)


def shape(samples: Samples, *rest: int) -> tuple[int, ...]:
    """Of a tensor that holds so much for each token of `samples`."""
    return (len(samples.flat), *rest) if isinstance(samples, Ragged) else (*samples.shape[:2], *rest)


def like(samples: Samples, values: Tensor) -> Samples:
    """`values`, of that `shape`, as samples."""
    return Ragged(values, samples.lengths) if isinstance(samples, Ragged) else values


def joined(first: Samples, second: Samples) -> Samples:
    """The samples of both; of equal length where all are."""
    alike = len({*lengths(first), *lengths(second)}) == 1
    if alike and not isinstance(first, Ragged) and not isinstance(second, Ragged):
        return torch.cat([first, second])
    return Ragged(torch.cat([flat(first), flat(second)]), lengths(first) + lengths(second))


def batches(samples: Samples, chosen: Sequence[int], size: int) -> list[list[int]]:
    """The numbers in `chosen`, at most `size` of one length at a time; in their order where all are of one length."""
    by_length: dict[int, list[int]] = {}
    known = lengths(samples)
    for number in chosen:
        by_length.setdefault(known[number], []).append(number)
    return [numbers[start : start + size] for numbers in by_length.values() for start in range(0, len(numbers), size)]


def runs(known: Sequence[int], tokens: int, edge: int) -> list[range]:
    """The numbers of samples of `known` lengths, in order, as ranges of one length; each has up to so many `tokens`, or one sample, and
    none lies across `edge`."""
    found: list[range] = []
    for number, length in enumerate(known):
        last = found[-1] if found else range(0)
        if last and number != edge and known[last[0]] == length and (len(last) + 1) * length <= tokens:
            found[-1] = range(last.start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found
