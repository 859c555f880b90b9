"""SparseGPT: optimal brain surgery, column by column, with one order of columns for every row.

With H the Hessian of the layer-wise squared error and F the columns from j on, dropping W_ij costs, and is best
compensated in the columns F by,

    S_ij = W_ij^2 / [H_F^-1]_jj            W_iF <- W_iF - W_ij / [H_F^-1]_jj * [H_F^-1]_j,:

Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (2023, arXiv 2301.00774),
Algorithm 1. For U upper triangular with U'U = H^-1, [H_F^-1]_j,: = U_jj * U_j,F: one factorisation serves all columns.

Unlike in the authors' code, the number of zeros is exact whatever the ties.
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

    statistics: the Gram matrix X'X / tokens (in, in). H is twice that, and no constant factor changes the result.
    scope: what an unstructured pattern compares within, in a block of columns: each "row" or the "matrix" (all rows).
    block_size: columns whose unstructured mask is chosen at once; for N:M only a matter of speed.
    damping: what is added to H's diagonal, as a fraction of its mean; ten times more after each failed factorisation.
    Raises ReconError for a bad option, or a Gram matrix that no damping makes positive definite.
    """
    if block_size < 1:
        raise ReconError(f"criterion 'sparsegpt': block_size is {block_size}; it must be at least 1")
    if not damping > 0:
        raise ReconError(f"criterion 'sparsegpt': damping is {damping}; it must be above 0")
    block_size += -block_size % (pattern.m or 1)  # no group of M straddles two blocks

    dead = statistics.diagonal() == 0
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


def _prune_block(weight: Tensor, factor: Tensor, pattern: Pattern, scope: str, before: int):
    """Prunes the columns of one block, ``weight`` (out, block), that has ``before`` columns to its left.

    Returns the new weight and mask, and the errors (out, block), (W_ij - pruned W_ij) / U_jj, that the columns to the
    right of the block have yet to make up for.
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
    """An unstructured mask of one block, whose rounding makes up for the blocks before: the total is exact."""
    rows, columns = scores.shape
    groups, unit = (scores, 1) if scope == "row" else (scores.reshape(1, -1), rows)
    zeros = pattern.zeros(unit * (before + columns)) - pattern.zeros(unit * before)
    return keep_all_but(groups, zeros).view_as(scores)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular U (in, in) with U'U = (H + d I)^-1, where d = ``damping`` * mean of H's diagonal.

    Multiplies the damping by ten, with a warning, as often as the factorisation fails.
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
