"""Mask refinement: a pruned and a kept weight of a row change roles while that lowers the row's error.

With D (in,) a dense row, w = D * mask, e = w - D and the Gram matrix G = X'X (in, in), the error is e G e'. With r = e G,
keeping the pruned weight j and dropping the kept weight i instead changes it by

    a_j + b_i - 2 D_i D_j G_ij,    a_j = 2 D_j r_j + D_j^2 G_jj,    b_i = -2 D_i r_i + D_i^2 G_ii.

Each step takes the j with the least a and the i with the least b, and makes the exchange where the sum is below zero. Rows are
independent. The idea is that of DSnoT (Zhang et al., ICLR 2024, arXiv 2310.08915); here the exact change of the error decides.
"""

import torch
from torch import Tensor


@torch.no_grad()
def refine(weight: Tensor, mask: Tensor, gram: Tensor, steps: int, group: int | None = None) -> Tensor:
    """The refined mask (out, in), with as many weights kept in every row (and group) as in `mask`.

    weight: dense weights D (out, in), float32 or float64; left unchanged, as is `mask`.
    mask: (out, in), True = kept: where to start.
    gram: G (in, in), symmetric; its scale changes nothing.
    steps: exchanges in each row, at most.
    group: M of an N:M pattern: exchanges stay within groups of M consecutive columns; None: within the row.
    """
    rows, columns = weight.shape
    group = group or columns
    mask = mask.clone()
    residual = -(weight * ~mask) @ gram  # r, (out, in)
    alone = weight.square() * gram.diagonal()  # D_j^2 G_jj, (out, in)
    row = torch.arange(rows, device=weight.device)
    offset = torch.arange(0, columns, group, device=weight.device)  # (groups,)
    for _ in range(steps):
        linear = 2 * weight * residual
        cost_in = (alone + linear).masked_fill_(mask, torch.inf).view(rows, -1, group)  # a
        cost_out = (alone - linear).masked_fill_(~mask, torch.inf).view(rows, -1, group)  # b
        best_in, j = cost_in.min(-1)  # (out, groups) each
        best_out, i = cost_out.min(-1)
        i, j = i + offset, j + offset
        change = best_in + best_out - 2 * weight.gather(1, i) * weight.gather(1, j) * gram[i, j]
        change, best = change.min(1)  # the best group of each row, (out,)
        i, j = i[row, best], j[row, best]
        better = change < -1e-6 * alone.sum(1)  # by more than rounding, or a row might go back and forth
        if not better.any():
            break
        r, i, j = row[better], i[better], j[better]
        mask[r, i], mask[r, j] = False, True
        residual[r] += weight[r, j, None] * gram[j] - weight[r, i, None] * gram[i]
    return mask
