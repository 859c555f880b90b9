"""SparseGPT: optimal brain surgery, column by column, with one order of columns for every row.

With H (in, in) the Hessian of the matrix's squared error, and F the columns from j on: dropping W_ij costs S_ij, and the
columns F make up for it best by the update

    S_ij = W_ij^2 / [H_F^-1]_jj            W_iF <- W_iF - W_ij / [H_F^-1]_jj * [H_F^-1]_j,:

Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (2023, arXiv 2301.00774),
Algorithm 1. For the upper triangular U (in, in) with U'U = H^-1, [H_F^-1]_j,: = U_jj * U_j,F: one factorisation serves all.

Unlike in the authors' code, the number of zeros is exact, whatever the ties; and inputs that are always zero have the mean of
the others on the diagonal of H, where theirs have 1, so that the unit of activations does not matter.
"""

import torch
from torch import Tensor

from recon.errors import ReconError, log
from recon.kernels.patterns import Pattern, keep_all_but, keep_mask

ATTEMPTS = 10
STRIP = 16  # columns after which the rest of their block makes up for their errors


@torch.no_grad()
def prune(
    weight: Tensor,
    statistics: Tensor,
    pattern: Pattern,
    scope: str,
    generator: torch.Generator | None,
    block_size: int = 128,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """The pruned and updated weight (out, in), and its mask (out, in), True = kept.

    weight: (out, in).
    statistics: the Gram matrix X'X / tokens (in, in). H is a multiple of that, which does not change the result.
    scope: what an unstructured pattern compares within, in each block of columns: one "row", or the "matrix" (all rows).
    block_size: columns whose unstructured mask is chosen at once; for N:M it affects speed alone.
    damping: added to H's diagonal, as a fraction of its mean; ten times more after each failed factorisation.
    Raises `ReconError` for a Gram matrix that no damping makes positive definite.
    """
    block_size += -block_size % (pattern.m or 1)  # no group of M straddles two blocks

    dead = statistics.diagonal() == 0  # inputs that are always zero, (in,)
    # (in, out): what is done column by column reads memory in order.
    columns = weight.masked_fill(dead, 0.0).T.contiguous()
    live = statistics.diagonal()[~dead]
    hessian = statistics + torch.diag(dead * (live.mean() if len(live) else 1.0))
    factor = inverse_factor(hessian, damping)

    mask = torch.ones_like(columns, dtype=torch.bool)
    for start in range(0, len(columns), block_size):
        block, rest = slice(start, start + block_size), slice(start + block_size, None)
        mask[block], errors = _prune_block(columns[block], factor[block, block], pattern, scope, before=start)
        columns[rest].addmm_(factor[block, rest].T, errors, alpha=-1)
    return columns.masked_fill_(~mask, 0.0).T.contiguous(), mask.T.contiguous()


def _prune_block(columns: Tensor, factor: Tensor, pattern: Pattern, scope: str, before: int) -> tuple[Tensor, Tensor]:
    """Updates one block of `columns` (block, out) in place, without zeroing; it has `before` columns to its left.

    factor: the part of U for these columns, (block, block).
    Returns the mask, and the errors (W_ij - pruned W_ij) / U_jj, (block, out) each, which columns to its right have yet to make
    up for. Within the block, a column makes up for those before it in few products: after each strip, and when its turn comes.
    """
    pivots, errors = factor.diagonal()[:, None], torch.zeros_like(columns)
    mask = torch.ones_like(columns, dtype=torch.bool)
    if pattern.m is None:  # rounding carries over between blocks: the total is exact
        scores = (columns / pivots).square().T
        groups, unit = (scores, 1) if scope == "row" else (scores.reshape(1, -1), len(scores))
        zeros = pattern.zeros(unit * (before + len(columns))) - pattern.zeros(unit * before)
        mask = keep_all_but(groups, zeros).view_as(scores).T
    shares = ~mask / pivots
    width, settled = pattern.m or 1, 0  # columns whose errors all of the block has made up for
    for first in range(0, len(columns), width):
        group, coming = slice(first, first + width), slice(first, None)
        if first - settled >= STRIP:
            columns[coming].addmm_(factor[settled:first, coming].T, errors[settled:first], alpha=-1)
            settled = first
        columns[group].addmm_(factor[settled:first, group].T, errors[settled:first], alpha=-1)
        if pattern.m is not None:
            mask[group] = keep_mask((columns[group] / pivots[group]).square().T, pattern, scope).T
            shares[group] = ~mask[group] / pivots[group]
        for j in range(first, first + width):
            if j > first:
                columns[j].addmv_(errors[first:j].T, factor[first:j, j], alpha=-1)
            torch.mul(columns[j], shares[j], out=errors[j])
    return mask, errors


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular U (in, in) with U'U = (H + d I)^-1, for H = `hessian` (in, in), d = `damping` * mean of its diagonal.

    Each time the factorisation fails, warns and multiplies the damping by ten. Raises `ReconError` after the last attempt.
    """
    mean, identity = hessian.diagonal().mean(), torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    for _ in range(ATTEMPTS):
        # With rows and columns reversed, the lower Cholesky factor L gives H = R R' for an upper R, and U = R^-1.
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
        log.warning("SparseGPT: the Hessian is not positive definite at damping %g; trying %g", damping, damping * 10)
        damping *= 10
    raise ReconError(f"criterion 'sparsegpt': the Gram matrix is not positive definite at any damping up to {damping / 10:g}")
