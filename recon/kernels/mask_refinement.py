"""Better masks from a Gram matrix: a pruned and a kept weight change places while that lowers the error.

With D the dense row, w = D * mask, e = w - D and G = X'X, the error is e G e'. With r = e G, letting the pruned j in and the
kept i out changes it by

    a_j + b_i - 2 D_i D_j G_ij,    a_j = 2 D_j r_j + D_j^2 G_jj,    b_i = -2 D_i r_i + D_i^2 G_ii.

Each step takes, in every row, the best j and the best i by a and b alone, and keeps the exchange where the sum is below
zero. Rows are independent. The idea is that of DSnoT (Zhang et al., ICLR 2024, arXiv 2310.08915), with the exact change of the error as
the measure.
"""

import torch
from torch import Tensor


@torch.no_grad()
def swap(weight: Tensor, mask: Tensor, gram: Tensor, steps: int, group: int | None = None) -> Tensor:
    """The refined mask (out, in), True = kept, with as many kept in every row (and group) as before.

    weight: dense weights D (out, in), float32 or float64.
    mask: (out, in), where to start.
    gram: G (in, in), symmetric; its unit changes nothing.
    steps: exchanges tried in each row, at most.
    group: weights change places within groups of so many columns, as N:M patterns need; None: within the row.
    """
    rows, columns = weight.shape
    group = group or columns
    mask = mask.clone()
    residual = -(weight * ~mask) @ gram
    alone = weight.square() * gram.diagonal()
    row = torch.arange(rows, device=weight.device)
    for _ in range(steps):
        linear = 2 * weight * residual
        gain_in = (alone + linear).masked_fill_(mask, torch.inf).view(rows, -1, group)
        gain_out = (alone - linear).masked_fill_(~mask, torch.inf).view(rows, -1, group)
        best_in, j = gain_in.min(-1)
        best_out, i = gain_out.min(-1)
        offset = torch.arange(0, columns, group, device=weight.device)
        i, j = i + offset, j + offset
        change = best_in + best_out - 2 * weight.gather(1, i) * weight.gather(1, j) * gram[i, j]
        change, best = change.min(1)
        i, j = i[row, best], j[row, best]
        # Rounding must not make a row go back and forth.
        better = change < -1e-6 * alone.sum(1)
        if not better.any():
            break
        r, i, j = row[better], i[better], j[better]
        mask[r, i], mask[r, j] = False, True
        residual[r] += weight[r, j, None] * gram[j] - weight[r, i, None] * gram[i]
    return mask
