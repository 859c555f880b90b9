"""Low-rank parametrisations of pruned matrices. They train few parameters, and merge into the weight afterwards.

W (out, in) is a pruned weight and M its mask; B (out, rank) and A (rank, in) are trained; s = alpha / rank:

    lora        W + s BA            fills the zeros: the mask is applied again after merging
    masklora    W + s M * (BA)      keeps the zeros
    scalelora   W * (1 + s BA)      keeps the zeros

LoRA: Hu et al., arXiv 2106.09685; MaskLoRA, ScaleLoRA: Zimmer et al., arXiv 2312.15230; ScaleLoRA: Lu et al., arXiv 2405.16057.
"""

import torch
from torch import Tensor, nn

from recon.kernels.gradient_descent import Trained

ADAPTERS = ("lora", "masklora", "scalelora")
ALPHA = 2.0  # the factor s = alpha / rank: alpha is twice the rank, as usual


class LowRank(nn.Module):
    """The merged weight (out, in) as a function of A and B. B starts at zero and A at random values, so BA starts at zero.

    mask: (out, in), 1 = kept. kind: one of `ADAPTERS`; see the top of the module. rank: of BA. random: draws A (Kaiming uniform,
    as in `peft`). transposed: whether weight and mask are stored as (in, out), here and in the arguments of the methods.
    """

    def __init__(self, weight: Tensor, mask: Tensor, kind: str, rank: int, random: torch.Generator, transposed: bool = False):
        super().__init__()
        self.kind, self.transposed = kind, transposed
        rows, columns = weight.T.shape if transposed else weight.shape
        a = torch.empty(rank, columns)
        nn.init.kaiming_uniform_(a, a=5**0.5, generator=random)
        self.a = nn.Parameter(a.to(weight.device))
        self.b = nn.Parameter(weight.new_zeros(rows, rank))
        self.register_buffer("mask", mask if kind == "masklora" else None, persistent=False)

    def trained(self, weight: Tensor) -> list[Trained]:
        """A and B, each with the size that multiplies a relative learning rate; weight: (out, in).

        B's size is the one at which s BA is as large as the surviving weights (for scalelora: as 1). A's size is always 1.
        """
        rank, kept = len(self.a), max(1, int((weight != 0).sum()))
        start = self.a.detach().square().mean().sqrt().item()
        whole = 1.0 if self.kind == "scalelora" else weight.detach().norm().item() / kept**0.5
        return [Trained(self.a), Trained(self.b, size=whole / (ALPHA * start * rank**0.5))]

    def forward(self, weight: Tensor) -> Tensor:
        """The merged weight (out, in), computed in float32, and rounded once where autocast would round it."""
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            merged = (ALPHA * self.b) @ self.a  # changed in place from here on, as it is as large as the weight
            merged = merged.T if self.transposed else merged
            factor = weight if self.kind == "scalelora" else self.mask
            if factor is not None:
                merged *= factor
            return merged.add_(weight).to(dtype)
