"""Sparsity patterns, and exact masks made from scores. Matrices are always (out, in)."""

import contextlib
import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from recon.errors import ReconError

SCOPES = ("row", "matrix")


@dataclass(frozen=True)
class Pattern:
    """How many weights go, and where: unstructured (`0.5`) or semi-structured N:M (`2:4`)."""

    sparsity: float  # share of the weights that become zero, 0 <= sparsity < 1
    n: int | None = None  # of every `m` consecutive inputs of a row, `n` are kept; both None where unstructured
    m: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """The pattern called "0.5" or "2:4"; the inverse of `str`. Raises `ReconError` for anything else."""
        if (match := re.fullmatch(r"([0-9]+):([0-9]+)", text)) and 0 < int(match[1]) < int(match[2]):
            n, m = int(match[1]), int(match[2])
            return cls(1 - n / m, n, m)
        with contextlib.suppress(ValueError):
            if 0 <= float(text) < 1:
                return cls(float(text))
        raise ReconError(f"pattern is {text!r}; allowed: a sparsity from 0 to below 1 (such as 0.5), or N:M with 0 < N < M (2:4)")

    def __str__(self) -> str:
        return str(self.sparsity) if self.m is None else f"{self.n}:{self.m}"

    def zeros(self, entries: int) -> int:
        """The number of zeros among `entries` weights."""
        return round(self.sparsity * entries)

    def check_columns(self, name: str, columns: int) -> None:
        """Raises `ReconError` if the `columns` inputs of the matrix `name` do not divide into groups of M."""
        if self.m is not None and columns % self.m:
            said = f"which do not divide into the groups of {self.m} of {self}; choose another M, or a sparsity"
            raise ReconError(f"{name} has {columns} input columns, {said}")


def keep_mask(scores: Tensor, pattern: Pattern, scope: str) -> Tensor:
    """The mask (out, in), True = kept, that keeps the largest `scores` (out, in).

    scope: what an unstructured pattern compares within: each "row" gets round(sparsity * in) zeros, or the "matrix" gets
        round(sparsity * out * in). An N:M pattern always compares within its groups of M.

    The number of zeros is exact, whatever the ties: of equal scores, the one at the earlier position is dropped first.
    Raises `ReconError` for NaN scores.
    """
    groups = scores.reshape(-1, pattern.m or (scores.shape[1] if scope == "row" else scores.numel()))
    return keep_all_but(groups, pattern.zeros(groups.shape[1])).view_as(scores)


def keep_all_but(scores: Tensor, zeros: int) -> Tensor:
    """The mask (groups, size), True = kept, that drops exactly the `zeros` smallest of each row of `scores`. Raises for NaN."""
    if scores.isnan().any():
        raise ReconError(f"{int(scores.isnan().sum())} of {scores.numel()} scores are NaN; scores must be numbers")
    if zeros == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(zeros, dim=1, keepdim=True).values  # (groups, 1)
    dropped = scores < threshold
    tied = scores == threshold
    places = zeros - dropped.sum(1, keepdim=True)
    # In int32, as int64 would double the largest buffer: with scope "matrix", a row here is a whole matrix.
    dropped |= tied & (tied.cumsum(1, dtype=torch.int32) <= places)
    return ~dropped


def found_pattern(masks: Collection[Tensor]) -> Pattern:
    """The pattern of a model's masks (out, in). N:M, with the smallest M of 2, 4, ... 32, if all masks keep at most N of every M
    consecutive inputs and about N / M in total; else their overall sparsity, to four digits.

    Matrices without zeros are ignored. `masks` is iterated over several times; it may compute each mask on the way.
    """
    counts = [(int(mask.sum()), mask.numel()) for mask in masks if not mask.all()]
    if not counts:
        return Pattern(0.0)
    share = sum(kept for kept, _ in counts) / sum(size for _, size in counts)
    for m in (2, 4, 8, 16, 32):
        n = round(share * m)
        # A few more may be zero, such as weights that half precision rounded to zero.
        if 0 < n < m and abs(share - n / m) < 0.005:
            if all(mask.all() or mask.shape[1] % m == 0 and mask.reshape(-1, m).sum(1).max() <= n for mask in masks):
                return Pattern(1 - n / m, n, m)
    return Pattern(round(1 - share, 4))
