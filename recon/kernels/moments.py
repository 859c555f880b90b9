"""Moments of what a matrix reads, accumulated batch by batch: the statistics that criteria and exact solutions need.

With X (tokens, in) the inputs: sums of squares; the upper triangle of the Gram matrix X'X; mean and variance over tokens.
"""

from collections.abc import Iterable

from torch import Tensor

_PART = 2**17  # elements that are squared at a time
_SPLIT = 256  # columns up to which a Gram matrix is formed in one product
_ELSEWHERE = 2**26  # elements at a time on devices other than a CPU


def parts(matrix: Tensor, elements: int) -> list[slice]:
    """Slices that divide the rows of `matrix` (rows, columns); on a CPU, about `elements` elements each, to fit its cache."""
    rows = max(1, (elements if matrix.device.type == "cpu" else _ELSEWHERE) // matrix.shape[1])
    return [slice(start, start + rows) for start in range(0, len(matrix), rows)]


def add_squares(total: Tensor, x: Tensor) -> None:
    """Adds the sum over tokens of x_j^2 to `total` (in,) in place, in its dtype, for x (tokens, in)."""
    for part in parts(x, _PART):
        total += x[part].to(total.dtype).square().sum(0)


def add_moments(total: Tensor, seen: int, x: Tensor) -> None:
    """Adds the tokens of x (tokens, in) to `total` (2, in), the mean and variance of `seen` earlier tokens, in place.

    Means are subtracted before squaring, so that a large mean costs a small variance no digits (Chan, Golub & LeVeque 1979).
    """
    share = len(x) / (seen + len(x))
    mean = x.mean(0)
    step = mean - total[0]
    variance = (x - mean).square().mean(0)
    total[1] += share * (variance - total[1] + (1 - share) * step.square())
    total[0] += share * step


def add_gram(total: Tensor, x: Tensor) -> None:
    """Adds X'X to `total` (in, in) in place, for x (tokens, in); below the diagonal it is incomplete: see `mirrored`.

    As X'X is symmetric, one of its four quarters is left out. The two on the diagonal are formed in the same way, recursively.
    """
    if x.shape[1] <= _SPLIT:
        total.addmm_(x.T, x)
        return
    half = x.shape[1] // 2
    left, right = x[:, :half], x[:, half:]
    add_gram(total[:half, :half], left)
    total[:half, half:].addmm_(left.T, right)
    add_gram(total[half:, half:], right)


def triangle(columns: int) -> int:
    """Multiplications per token in `add_gram` for an input of `columns` columns."""
    if columns <= _SPLIT:
        return columns**2
    half = columns // 2
    return triangle(half) + half * (columns - half) + triangle(columns - half)


def mirrored(gram: Tensor) -> Tensor:
    """The symmetric matrix (in, in) with the upper triangle of `gram` (in, in)."""
    return gram.triu() + gram.triu(1).T


def mean_product(batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean over tokens of the outer product, (a, b) float32, from batches of left (..., a) and right (..., b)."""
    total, tokens = None, 0
    for left, right in batches:
        left, right = left.flatten(0, -2).float(), right.flatten(0, -2).float()
        total = left.T @ right if total is None else total.addmm_(left.T, right)
        tokens += len(left)
    return total / tokens
