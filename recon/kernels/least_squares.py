"""Exact masked least squares: the best weights of a matrix, given which of them survive.

For each row w (in,) with support S (the survivors), inputs X (tokens, in), target y (tokens,), G = X'X and c = y'X,

    min_w |X w' - y|^2 = min_w  w G w' - 2 w c' + constant,     w_j = 0 outside S.

Rows share G and differ in S, so a direct solution would factorise a submatrix of G for every row. Conjugate gradients need only
products with G: one matrix product per iteration for all rows (Hestenes & Stiefel 1952; Saad, "Iterative Methods for Sparse
Linear Systems", 2003, algorithm 9.1). The diagonal (Jacobi) preconditioner removes the spread in size between inputs.
"""

import torch
from torch import Tensor
from torch.linalg import vecdot


@torch.no_grad()
def masked_least_squares(weight: Tensor, mask: Tensor, gram: Tensor, cross: Tensor, iterations: int = 15) -> Tensor:
    """The weight (out, in) that minimises w G w' - 2 w c' for each row, with exact zeros outside the mask.

    weight: where to start, (out, in), float32 or float64 as are the other tensors; ignored outside the mask.
    mask: (out, in), True = kept.
    gram: G (in, in), symmetric positive semidefinite.
    cross: the rows c (out, in), scaled as `gram`: both are sums over tokens, or both means. To reproduce the dense matrix D on
        the same inputs, c = D G.
    iterations: at most this many; a row stops earlier when its residual is at rounding level. After any number of iterations,
        no row has a larger objective than at the start, up to rounding.
    """
    # An input that is always zero has a zero row in G: no residual, and no reason to change its weights.
    inverse_diagonal = torch.where(gram.diagonal() > torch.finfo(gram.dtype).tiny, 1 / gram.diagonal(), 0.0)  # (in,)
    weight = weight.masked_fill(~mask, 0.0)
    keep = mask.to(weight.dtype)  # multiplying by it is several times as fast as `masked_fill`
    residual = (cross - weight @ gram).mul_(keep)  # (out, in)
    scaled = residual * inverse_diagonal
    size = vecdot(residual, scaled)[:, None]  # (out, 1)
    target = cross * keep
    rounding = torch.finfo(gram.dtype).eps ** 2 * vecdot(target, target * inverse_diagonal)[:, None]
    direction = scaled.clone()
    for _ in range(iterations):
        active = size > rounding
        if not active.any():
            break
        product = (direction @ gram).mul_(keep)
        curvature = vecdot(direction, product)[:, None]
        active &= curvature > 0
        step = torch.where(active, size / curvature, 0.0)
        weight.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        torch.mul(residual, inverse_diagonal, out=scaled)
        previous, size = size, vecdot(residual, scaled)[:, None]
        direction.mul_(torch.where(active, size / previous, 0.0)).add_(scaled)
    return weight
