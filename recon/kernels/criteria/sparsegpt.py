"""SparseGPT: optimal brain surgery, column by column, with one order of columns for every row.

H (in, in) is the Hessian of the matrix's squared error, and F the columns from j on. Dropping W_ij increases the error by S_ij,
if the columns F compensate for it by the best update:

    S_ij = W_ij^2 / [H_F^-1]_jj            W_iF <- W_iF - W_ij / [H_F^-1]_jj * [H_F^-1]_j,:

Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (2023, arXiv 2301.00774),
Algorithm 1. For the upper triangular U (in, in) with U'U = H^-1, [H_F^-1]_j,: = U_jj * U_j,F: one factorisation is enough.

Unlike in the authors' code, the number of zeros is exact, whatever the ties; and for inputs that are always zero the diagonal of
H holds the mean of the others instead of 1, so that the scale of activations does not matter.
"""

import torch
from torch import Tensor

from recon.errors import ReconError, log
from recon.kernels.patterns import Pattern, keep_all_but, keep_mask

ATTEMPTS = 10
STRIP = 16  # columns after which the rest of their block is updated for their errors


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
    statistics: the Gram matrix X'X / tokens (in, in). H is a multiple of it; the factor does not change the result.
    scope: what an unstructured pattern compares within, in each block of columns: one "row", or the "matrix" (all rows).
    block_size: columns whose unstructured mask is chosen at once; for N:M it affects only speed.
    damping: added to H's diagonal, as a fraction of the diagonal's mean; times ten after each failed factorisation.
    Raises `ReconError` for a Gram matrix that no damping makes positive definite.
    """
    block_size += -block_size % (pattern.m or 1)  # no group of M straddles two blocks

    dead = statistics.diagonal() == 0  # inputs that are always zero, (in,)
    # Stored as (in, out), so that work column by column reads memory in order.
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
    """Updates the block `columns` (block, out) in place, without zeroing what is dropped; `before` columns are to its left.

    factor: the part of U for these columns, (block, block).
    Returns the mask, and the errors (W_ij - pruned W_ij) / U_jj, (block, out) each. The caller updates columns right of the block
    for these errors. Columns of the block are updated here, in few products: after each strip, and when their turn comes.
    """
    pivots, errors = factor.diagonal()[:, None], torch.zeros_like(columns)
    mask = torch.ones_like(columns, dtype=torch.bool)
    if pattern.m is None:  # rounding carries over between blocks: the total is exact
        scores = (columns / pivots).square().T
        groups, unit = (scores, 1) if scope == "row" else (scores.reshape(1, -1), len(scores))
        zeros = pattern.zeros(unit * (before + len(columns))) - pattern.zeros(unit * before)
        mask = keep_all_but(groups, zeros).view_as(scores).T
    shares = ~mask / pivots
    width, settled = pattern.m or 1, 0  # settled: columns for whose errors all of the block is updated
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
