"""Low-rank parametrisations of pruned matrices, which train few parameters and merge into the weight again."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ADAPTERS = {
    "lora": "W + BA; merging fills the zeros, so the mask is applied once more (Hu et al. 2022, arXiv 2106.09685)",
    "masklora": "W + M*(BA), merged without losing a zero (Zimmer et al. 2023, arXiv 2312.15230)",
    "scalelora": "W*(1 + BA), zeros stay zeros (Zimmer et al. 2023, arXiv 2312.15230; Lu et al. 2024, arXiv 2405.16057)",
}
ELEMENTS = {"cpu": 2**18}  # of a matrix that are worked on at once, by kind of device: what fits a core's cache
ALPHA = 2.0  # the factor alpha / rank in front of BA, as with the usual alpha = 2 * rank


class LowRank(nn.Module):
    """A weight W as a function of B (rows, rank), which starts at zero, and A (rank, columns), random: W itself at first.

    Args:
        weight: W as its module stores it, (rows, columns).
        mask: keep-mask of the same shape.
        kind: see `ADAPTERS`.
    """

    def __init__(self, weight: Tensor, mask: Tensor, kind: str, rank: int, random: torch.Generator):
        super().__init__()
        self.kind = kind
        rows, columns = weight.shape
        a = torch.empty(rank, columns)
        nn.init.kaiming_uniform_(a, a=5**0.5, generator=random)  # as `peft` does
        self.a = nn.Parameter(a.to(weight.device))
        self.b = nn.Parameter(weight.new_zeros(rows, rank))
        if mask.device.type == "cpu":  # where a product with booleans takes several times as long
            mask = mask.to(torch.bfloat16)
        self.register_buffer("mask", mask if kind == "masklora" else None, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        device = weight.device.type
        # The merged weight is computed in float32, and rounded as autocast would round it for the product that it goes into.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        return _Merged.apply(weight, weight if self.kind == "scalelora" else self.mask, self.b, self.a, dtype)


class _Merged(torch.autograd.Function):
    """W + ALPHA * factor * (BA) in `dtype`: weight (rows, columns), factor of that shape or None, b (rows, rank), a (rank, columns).

    A few rows at a time, so that nothing of the size of W but the result goes through main memory: several times as fast as the
    same in whole matrices. The weight itself gets no gradient.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, factor: Tensor | None, b: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(factor, b, a)
        merged = torch.empty_like(weight, dtype=dtype, requires_grad=False)
        with torch.autocast(weight.device.type, enabled=False):
            for part in parts(weight):
                change = b[part] @ a
                if factor is not None:
                    change *= factor[part]
                merged[part] = change.mul_(ALPHA).add_(weight[part])
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx, above: Tensor):
        factor, b, a = ctx.saved_tensors
        b_gradient, a_gradient = torch.empty_like(b), torch.zeros_like(a)
        with torch.autocast(above.device.type, enabled=False):
            for part in parts(above):
                slope = above[part].float() * ALPHA
                if factor is not None:
                    slope *= factor[part]
                b_gradient[part] = slope @ a.T
                a_gradient.addmm_(b[part].T, slope)
        return None, None, b_gradient, a_gradient, None


def parts(matrix: Tensor) -> list[slice]:
    """Rows of a matrix that are worked on at once."""
    rows = max(1, ELEMENTS.get(matrix.device.type, matrix.numel()) // matrix.shape[1])
    return [slice(start, start + rows) for start in range(0, len(matrix), rows)]
