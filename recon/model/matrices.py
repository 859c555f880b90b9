"""The prunable matrices of a model, by name, as views (out, in) of the parameters that hold them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Matrix:
    """A prunable matrix of a block: the weight of a module, or one expert's part of a parameter that holds several."""

    name: str  # full name of the module, or of the parameter with the expert's number in brackets
    module: nn.Module | None = None  # holds the parameter; None in a `Structure`, where names are relative to the block
    attribute: str = "weight"  # the parameter's name within the module
    expert: int | None = None  # which of the matrices in the parameter this is; None: it is the only one
    experts: int = 1  # how many matrices are in the parameter
    transposed: bool = False  # stored as (in, out)
    share: float = 1.0  # mean fraction of all tokens that it reads: less than 1 for an expert
    routed: bool = False  # reads only tokens that are sent to it, as an expert does
    alone: bool = True  # multiplied by itself, and not together with those of other experts

    def within(self, path: str, block: nn.Module) -> "Matrix":
        """The matrix of `block`, whose full name is `path`, that has this one's name within the block."""
        module = self.name if self.expert is None else self.parameter_name.rpartition(".")[0]
        return replace(self, name=f"{path}.{self.name}", module=block.get_submodule(module))

    @property
    def parameter_name(self) -> str:
        """Full name of the parameter that holds the matrix."""
        return f"{self.name}.{self.attribute}" if self.expert is None else self.name.rpartition("[")[0]

    @property
    def bias_name(self) -> str:
        """Full name that the parameter with the matrix's bias has, where there is one."""
        return f"{self.name}.bias" if self.expert is None else f"{self.parameter_name}_bias"

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the matrix, as it is stored."""
        return getattr(self.module, self.attribute)

    @property
    def part(self) -> Tensor:
        """The part of the parameter that is the matrix, laid out as it is stored: a view."""
        if self.expert is None:
            return self.parameter
        return self.parameter.view(self.experts, -1, self.parameter.shape[-1])[self.expert]

    @property
    def weight(self) -> Tensor:
        """The matrix (out, in): a view, also where it is stored transposed."""
        return self.oriented(self.part)

    def oriented(self, stored: Tensor) -> Tensor:
        """`stored` (laid out as the matrix is stored) as (out, in), and the reverse; a view."""
        return stored.T if self.transposed else stored


def factors(mask: Tensor, device: torch.device) -> Tensor:
    """`mask` as what weights are multiplied by on `device`: bool, or 0 and 1 on CPUs, where a product with booleans takes long."""
    return mask.to(device, torch.bfloat16 if device.type == "cpu" else torch.bool)


def stored(matrices: dict[str, Matrix], masks: dict[str, Tensor], device: torch.device) -> list[tuple[nn.Parameter, Tensor]]:
    """The parameters that hold `matrices`, each with its mask (see `factors`), laid out as the parameter is.

    masks: bool (out, in) by matrix name.
    """
    parts: dict[nn.Parameter, list[Tensor]] = {}
    for name, matrix in matrices.items():
        parts.setdefault(matrix.parameter, []).append(factors(matrix.oriented(masks[name]), device))
    # Experts are in the same order in the parameter as in `matrices`.
    return [(p, found[0] if len(found) == 1 else torch.stack(found).view(p.shape)) for p, found in parts.items()]
