"""Low-rank parametrisations of pruned matrices. They train few parameters, and merge into the weight afterwards.

With W (out, in) a pruned weight, M its mask, B (out, rank) and A (rank, in) what is trained, and s = alpha / rank,

    lora        W + s BA            fills the zeros: the mask is applied once more after merging
    masklora    W + s M * (BA)      keeps the zeros
    scalelora   W * (1 + s BA)      keeps the zeros

LoRA: Hu et al., arXiv 2106.09685; MaskLoRA, ScaleLoRA: Zimmer et al., arXiv 2312.15230; ScaleLoRA: Lu et al., arXiv 2405.16057.
"""

import torch
from torch import Tensor, nn

from recon.kernels.gradient_descent import Trained

ADAPTERS = ("lora", "masklora", "scalelora")
ALPHA = 2.0  # the factor s itself, alpha / rank: alpha is twice the rank, as usual


class LowRank(nn.Module):
    """A weight (out, in) as a function of B, which starts at zero, and A, which is random: at first the weight itself.

    mask: (out, in), 1 = kept. kind: see the top. rank: of BA. random: draws A as `peft` does (Kaiming uniform).
    transposed: whether weight and mask are laid out as (in, out), here and in the methods.
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
        """A and B with the sizes that a relative rate is times; weight: (out, in).

        B's is the size at which s BA is as large as the surviving weights (scalelora: as 1). A's is 1, whatever the weights.
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
            merged = (ALPHA * self.b) @ self.a  # in place from here on: it is as large as the weight
            merged = merged.T if self.transposed else merged
            factor = weight if self.kind == "scalelora" else self.mask
            if factor is not None:
                merged *= factor
            return merged.add_(weight).to(dtype)
