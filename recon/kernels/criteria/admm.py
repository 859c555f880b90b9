"""ADMM: weights that may take any value are pulled towards weights under the pattern, until the two agree.

With the Gram matrix G of the inputs, s_j = sqrt(G_jj), H = G / (s s') + 0.01 I and B = W s, the pruned weight is D / s for the D
under the pattern with the least tr (D - B) H (D - B)'. From D = B and V = 0, each round is

    X = (B H - V + rho D) (H + rho I)^-1
    Z = 1.5 X - 0.5 D + V / rho         D = Z where |Z| is largest, else 0        V = rho (Z - D)

and rho doubles every three rounds. Conjugate gradients then improve what survives; see `recon.kernels.least_squares`.
Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models" (NeurIPS 2024, arXiv
2406.07831); for masks that change between rounds, Boža, "Fast and Effective Weight Update for Pruned Large Language Models" (TMLR
2024, arXiv 2401.02938); for the factor 1.5, Boyd et al., "Distributed Optimization and Statistical Learning via ADMM" (2011),
section 3.4.3. The code of ALPS takes up to 300 rounds without this factor, raises rho by 10 to 30 % every third round, and damps
G by its mean diagonal.
"""

import torch
from torch import Tensor

from recon.kernels.least_squares import masked_least_squares
from recon.kernels.patterns import Pattern, keep_mask

DAMPING, RHO, ROUNDS, EVERY, RELAXATION, ITERATIONS = 0.01, 0.2, 9, 3, 1.5, 4
# If over MANY weights compete, a round's threshold is found from every 11th, or 13th. The stride must not divide the row length.
MANY, STRIDES = 2**16, (11, 13)


@torch.no_grad()
def prune(
    weight: Tensor, statistics: Tensor, pattern: Pattern, scope: str, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The pruned and updated weight (out, in), and its mask (out, in), True = kept.

    weight: (out, in), float32 or float64. statistics: the Gram matrix X'X / tokens (in, in), in the same dtype.
    """
    diagonal = statistics.diagonal()
    scale = torch.where(diagonal > 0, diagonal, 1.0).sqrt()  # s
    H = statistics / scale[:, None] / scale
    H.diagonal().add_(DAMPING)
    Z = (weight * scale).masked_fill_(diagonal == 0, 0.0)  # weights of inputs that are always zero go first
    BH, D = Z @ H, _largest(Z, pattern, scope)  # the first round, whose X is B
    for t in range(ROUNDS):
        if t % EVERY == 0:
            Z = Z if t == 0 else torch.lerp(D, Z, 0.5)  # V / rho is Z - D
            rho = RHO * 2 ** (t // EVERY)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(H + rho * torch.eye(len(H)).to(H)))
        X = torch.add(BH, torch.sub(D, Z, alpha=0.5), alpha=2 * rho) @ inverse
        Z.add_(X.sub_(D), alpha=RELAXATION)
        D = _largest(Z, pattern, scope)
    mask = keep_mask(Z.abs(), pattern, scope)
    return masked_least_squares(Z, mask, H, BH, ITERATIONS).div_(scale), mask


def _largest(Z: Tensor, pattern: Pattern, scope: str) -> Tensor:
    """Z (out, in) with all but its largest entries set to zero; about as many stay as `keep_mask` keeps."""
    groups = Z.reshape(-1, pattern.m or (Z.shape[1] if scope == "row" else Z.numel())).abs()
    sample = groups[:, :: STRIDES[Z.shape[1] % STRIDES[0] == 0] if groups.shape[1] > MANY else 1]
    zeros = pattern.zeros(sample.shape[1])
    if pattern.m:  # moves the smallest of each group to the front: faster than `kthvalue` for small groups
        least = list(sample.unbind(1))
        for first in range(zeros):
            for i in range(pattern.m - 1, first, -1):
                least[i - 1], least[i] = torch.minimum(least[i - 1], least[i]), torch.maximum(least[i - 1], least[i])
        threshold = least[zeros - 1][:, None]
    else:
        threshold = sample.kthvalue(zeros, dim=1, keepdim=True).values if zeros else -1.0
    return Z * (groups > threshold).view_as(Z)
