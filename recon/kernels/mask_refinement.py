"""Mask refinement: exchanges a pruned and a kept weight of a row for as long as this lowers the row's error.

For a dense row D (in,), w = D * mask, e = w - D and the Gram matrix G = X'X (in, in), the error is e G e'. With r = e G, an
exchange that keeps the pruned weight j and drops the kept weight i changes the error by

    a_j + b_i - 2 D_i D_j G_ij,    a_j = 2 D_j r_j + D_j^2 G_jj,    b_i = -2 D_i r_i + D_i^2 G_ii.

Each step makes the exchange with the least change of all pairs, if that is below zero. Rows are independent. The idea is that of
DSnoT (Zhang et al., ICLR 2024, arXiv 2310.08915), with the exact change instead of an estimate, as in SparseSwaps.

Few pairs have to be tried. As |G_ij| <= t_j G_ii^(1/2) for t_j = max over i of |G_ij| / G_ii^(1/2), the change for j is at least

    a_j + min over i of (b_i - 2 x |D_i| G_ii^(1/2)),    x >= |D_j| t_j,

The minimum is computed for a few x. Only the weights j whose bound is below the least change found so far are tried with every i.
"""

import torch
from torch import Tensor

FIRST = 8  # pruned weights of each row that are tried first: those with the least bounds
LEVELS = 8  # values of x
PAIRS = 2**22  # pairs tried at a time


@torch.no_grad()
def refine(weight: Tensor, mask: Tensor, gram: Tensor, steps: int, group: int | None = None) -> Tensor:
    """The refined mask (out, in), with as many weights kept in every row (and group) as in `mask`.

    weight: dense weights D (out, in), float32 or float64; left unchanged, as is `mask`.
    mask: the mask to start from, (out, in), True = kept.
    gram: G (in, in), symmetric; its scale changes nothing.
    steps: at most this many exchanges in each row.
    group: M of an N:M pattern: exchanges stay within groups of M consecutive columns; None: within the row.
    """
    rows, columns = weight.shape
    m, mask = group or columns, mask.clone()
    chunk = max(1, PAIRS // m)
    row, column = (torch.arange(size, device=weight.device) for size in weight.shape)
    member, within = column // m, column % m  # the group of each column, and its place there
    near = gram.unflatten(1, (-1, m))[column, member]  # G_ij of the members i of the group of j, (in, m)
    root = gram.diagonal().sqrt()
    others = near.abs() / root.clamp_min(torch.finfo(root.dtype).tiny).view(-1, m)[member]
    others[column, within] = 0.0
    reach = (weight.abs() * others.amax(1)).view(rows, -1, m)  # |D_j| t_j, (out, groups, m)
    D, size = weight.view(rows, -1, m), (weight.abs() * root).view(rows, -1, m)
    residual, alone = -(weight * ~mask) @ gram, weight.square() * gram.diagonal()  # r and D_j^2 G_jj, (out, in)
    for _ in range(steps):
        linear = 2 * weight * residual
        a = (alone + linear).masked_fill_(mask, torch.inf)
        b = (alone - linear).masked_fill_(~mask, torch.inf).view(rows, -1, m)
        unit = (reach * ~mask.view(rows, -1, m)).amax(-1, keepdim=True).div(LEVELS).clamp_min(torch.finfo(root.dtype).tiny)
        least = torch.stack([(b - 2 * level * unit * size).amin(-1) for level in range(LEVELS + 1)], -1)
        bound = a + least.gather(2, (reach / unit).ceil().clamp_max(LEVELS).long()).view(rows, columns)
        # For each j, the least change: that of the exchange with its best i.
        change, partner = torch.full_like(a, torch.inf), torch.zeros_like(mask, dtype=torch.long)
        first = bound.topk(min(FIRST, columns), dim=1, largest=False).indices
        r, j = row.repeat_interleave(first.shape[1]), first.flatten()
        for _ in ("the first", "all that may be better"):
            for q, k in zip(r.split(chunk), j.split(chunk), strict=True):
                least, i = (b[q, member[k]] - 2 * weight[q, k, None] * D[q, member[k]] * near[k]).min(-1)
                change[q, k], partner[q, k] = a[q, k] + least, i + member[k] * m
            r, j = ((bound < change.amin(1, keepdim=True).clamp_max(0.0)) & change.isinf()).nonzero(as_tuple=True)
        change, j = change.min(1)
        better = change < -1e-6 * alone.sum(1)  # by more than rounding, or a row might go back and forth
        if not better.any():
            break
        r, i, j = row[better], partner[row, j][better], j[better]
        mask[r, i], mask[r, j] = False, True
        residual[r] += weight[r, j, None] * gram[j] - weight[r, i, None] * gram[i]
    return mask
