"""What the matrices of a window read: moments of their inputs, gathered in one pass over calibration samples."""

import torch
from torch import Tensor

from recon.decoder import Decoder
from recon.engine import Engine
from recon.errors import ReconError
from recon.windows import Window

FEW = 32  # tokens that say too little of what an expert reads
_SPLIT = 256  # a Gram matrix is formed by quarters down to this size


@torch.no_grad()
def gather(engine: Engine, decoder: Decoder, window: Window, stream: Tensor, kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs `window` on `stream` and gathers statistics of what its matrices read.

    Args:
        stream: inputs of the window, (samples, length, hidden).
        kind: "norm": root of the mean square of each input column, (in,); "gram": X'X / tokens, (in, in); "moments": mean and
            variance of each input column, (2, in).

    Returns:
        The window's outputs, and the statistics by matrix name in float32, on the engine's device. Matrices that share an
        input share one tensor. They accumulate in float32 outside autocast: a Gram matrix formed in bfloat16 is useless.
        An expert's are those of the tokens that are sent to it; one that fewer than FEW are sent to has none.
    """
    totals: dict[tuple[str, ...], Tensor] = {}
    tokens: dict[tuple[str, ...], int] = {}

    def accumulate(group: tuple[str, ...], x: Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1])
        if not len(x):
            return
        if group not in totals:
            rows = {"norm": (), "gram": (x.shape[1],), "moments": (2,)}[kind]
            totals[group] = x.new_zeros((*rows, x.shape[1]), dtype=torch.float32)
            tokens[group] = 0
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if kind == "gram":
                add_gram(totals[group], x)
            elif kind == "moments":
                add_moments(totals[group], tokens[group], x)
            else:
                totals[group] += x.square().sum(0)
        tokens[group] += len(x)

    def forget() -> None:
        totals.clear()
        tokens.clear()

    with engine.holding(decoder, window), decoder.watching(window, accumulate):
        outputs = engine.run(lambda batch: decoder.forward(window, batch), stream, anew=forget)
    statistics, matrices = {}, decoder.matrices(window)
    for group, total in totals.items():
        if tokens[group] < FEW and matrices[group[0]].routed:
            continue
        if not torch.isfinite(total).all():
            raise ReconError(f"the input of {group[0]!r} holds NaN or infinite activations on the calibration samples")
        if kind == "moments":
            statistics |= dict.fromkeys(group, total)
            continue
        mean = total / tokens[group]
        statistics |= dict.fromkeys(group, mirrored(mean) if kind == "gram" else mean.sqrt())
    return outputs, statistics


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
