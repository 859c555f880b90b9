"""What the matrices of a window read: moments of their inputs, gathered in one pass over calibration samples."""

from torch import Tensor

_SPLIT = 256  # a Gram matrix is formed by quarters down to this size


def add_moments(total: Tensor, seen: int, x: Tensor) -> None:
    """Brings `total` (2, in), mean and variance of the `seen` tokens so far, up to date for x (tokens, in) more, in place.

    Means are taken off before anything is squared, so that a large mean costs no digits of a small variance (Chan, Golub &
    LeVeque 1979).
    """
    share = len(x) / (seen + len(x))
    mean = x.mean(0)
    step = mean - total[0]
    variance = (x - mean).square().mean(0)
    total[1] += share * (variance - total[1] + (1 - share) * step.square())
    total[0] += share * step


def add_gram(total: Tensor, x: Tensor) -> None:
    """Adds X'X to `total` (in, in) for x (tokens, in), in place, above the diagonal and little more; see `mirrored`.

    By symmetry three quarters of the products are enough, and of the two quarters on the diagonal again three quarters.
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
    """Products per token that `add_gram` forms for a Gram matrix (columns, columns)."""
    if columns <= _SPLIT:
        return columns**2
    half = columns // 2
    return triangle(half) + half * (columns - half) + triangle(columns - half)


def mirrored(gram: Tensor) -> Tensor:
    """The symmetric matrix (in, in) with the upper triangle of `gram`."""
    upper = gram.triu()
    return upper + gram.triu(1).T
