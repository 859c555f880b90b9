"""SparseGPT: optimal brain surgery, column by column, with one order of columns for every row.

With H (in, in) the Hessian of the matrix's squared error, and F the columns from j on: dropping W_ij costs S_ij, and the
columns F make up for it best by the update

    S_ij = W_ij^2 / [H_F^-1]_jj            W_iF <- W_iF - W_ij / [H_F^-1]_jj * [H_F^-1]_j,:

Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (2023, arXiv 2301.00774),
Algorithm 1. For the upper triangular U (in, in) with U'U = H^-1, [H_F^-1]_j,: = U_jj * U_j,F: one factorisation serves all
columns.

Unlike in the authors' code, the number of zeros is exact, whatever the ties.
"""

import logging

import torch
from torch import Tensor

from recon.errors import ReconError
from recon.kernels.patterns import Pattern, keep_all_but, keep_mask

log = logging.getLogger("recon")
ATTEMPTS = 10


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
    statistics: the Gram matrix X'X / tokens (in, in). H is twice that; a constant factor does not change the result.
    scope: what an unstructured pattern compares within, in each block of columns: one "row", or the "matrix" (all rows).
    block_size: columns whose unstructured mask is chosen at once; for N:M it affects speed alone.
    damping: added to H's diagonal, as a fraction of its mean; ten times more after each failed factorisation.
    Raises `ReconError` for a bad option, and for a Gram matrix that no damping makes positive definite.
    """
    if block_size < 1:
        raise ReconError(f"criterion 'sparsegpt': block_size is {block_size}; it must be at least 1")
    if not damping > 0:
        raise ReconError(f"criterion 'sparsegpt': damping is {damping}; it must be above 0")
    block_size += -block_size % (pattern.m or 1)  # no group of M straddles two blocks

    dead = statistics.diagonal() == 0  # inputs that are always zero, (in,)
    weight = weight.masked_fill(dead, 0.0)
    hessian = statistics + torch.diag(dead.to(statistics.dtype))
    factor = inverse_factor(hessian, damping)

    mask = torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], block_size):
        stop = min(start + block_size, weight.shape[1])
        block, rest = slice(start, stop), slice(stop, None)
        weight[:, block], mask[:, block], errors = _prune_block(
            weight[:, block], factor[block, block], pattern, scope, before=start
        )
        weight[:, rest] -= errors @ factor[block, rest]
    return weight, mask


def _prune_block(weight: Tensor, factor: Tensor, pattern: Pattern, scope: str, before: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prunes one block of columns, `weight` (out, block), which has `before` columns to its left.

    factor: the part of U for these columns, (block, block).
    Returns the new weight and its mask, and the errors (W_ij - pruned W_ij) / U_jj, (out, block) each. The columns to the right
    of the block have yet to make up for the errors.
    """
    weight, errors = weight.clone(), torch.zeros_like(weight)
    pivots = factor.diagonal()
    if pattern.m is None:
        mask = _block_mask((weight / pivots).square(), pattern, scope, before)
    else:
        mask = torch.ones_like(weight, dtype=torch.bool)
    for j in range(weight.shape[1]):
        if pattern.m is not None and j % pattern.m == 0:
            group = slice(j, j + pattern.m)
            mask[:, group] = keep_mask((weight[:, group] / pivots[group]).square(), pattern, scope)
        errors[:, j] = weight[:, j].masked_fill(mask[:, j], 0.0) / pivots[j]
        weight[:, j + 1 :] -= errors[:, j : j + 1] * factor[j, j + 1 :]
    return weight.masked_fill(~mask, 0.0), mask, errors


def _block_mask(scores: Tensor, pattern: Pattern, scope: str, before: int) -> Tensor:
    """An unstructured mask (out, block) from `scores` (out, block). Rounding carries over between blocks: the total is exact."""
    rows, columns = scores.shape
    groups, unit = (scores, 1) if scope == "row" else (scores.reshape(1, -1), rows)
    zeros = pattern.zeros(unit * (before + columns)) - pattern.zeros(unit * before)
    return keep_all_but(groups, zeros).view_as(scores)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular U (in, in) with U'U = (H + d I)^-1, for H = `hessian` (in, in) and d = `damping` * mean of H's
    diagonal.

    Each time the factorisation fails, warns and multiplies the damping by ten. Raises `ReconError` after the last attempt.
    """
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    mean = hessian.diagonal().mean()
    for _ in range(ATTEMPTS):
        # With rows and columns reversed, the lower Cholesky factor L gives H = R R' for an upper R, and U = R^-1.
        lower, failed = torch.linalg.cholesky_ex((hessian + damping * mean * identity).flip(0, 1))
        if not failed:
            return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
        log.warning("SparseGPT: the Hessian is not positive definite at damping %g; trying %g", damping, damping * 10)
        damping *= 10
    raise ReconError(
        f"criterion 'sparsegpt': the Gram matrix is not positive definite at any damping up to {damping / 10:g}; "
        "a Gram matrix X'X has no negative eigenvalues"
    )
