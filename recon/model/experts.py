"""Mixtures of experts: the products with their matrices, which of a block's modules are experts, and which are routers.

transformers keeps the matrices of all experts of a layer in one parameter, (experts, out, in) or (experts, in, out). Each expert's
slice is a `Matrix` here. What it reads is seen by watching for matrix products with views of the parameter.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from recon.model.structure import Matrix


@dataclass(frozen=True)
class Product:
    """A product with one of the matrices that a parameter holds."""

    name: str  # of the parameter, with the expert's number in brackets
    experts: int  # how many matrices the parameter holds
    transposed: bool  # stored as (in, out)
    x: Tensor  # what the matrix reads, (tokens, in)
    alone: bool  # multiplied by itself, and not together with the others


@dataclass
class FusedProducts(TorchFunctionMode):
    """Sees the products with matrices of experts, each of which is a slice of a parameter."""

    parameters: dict[str, nn.Parameter]  # by name, those to look out for
    see: Callable[[Product], None] = lambda product: None  # called before each product with one expert's matrix
    # By matrix name, what those that are multiplied alone are multiplied as instead, laid out as in the parameter.
    use: Mapping[str, Tensor] = field(default_factory=dict)

    # Functions that multiply by a matrix -> its index among their arguments, after what it multiplies; whether it is (out, in).
    FUNCTIONS: ClassVar = {F.linear: (1, True), torch.baddbmm: (2, False)} | dict.fromkeys(
        (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm), (1, False)
    )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        at, out_by_in = self.FUNCTIONS.get(function, (len(args), False))
        if at < len(args):
            args = list(args)
            for name, parameter in self.parameters.items():
                for product in _products(name, parameter, args[at - 1].detach(), args[at], out_by_in):
                    self.see(product)
                    if product.alone and product.name in self.use:
                        other = self.use[product.name]
                        args[at] = other.T if product.transposed == out_by_in else other
        return function(*args, **(kwargs or {}))


def _products(name: str, parameter: nn.Parameter, x: Tensor, matrix: Tensor, out_by_in: bool) -> Iterator[Product]:
    """The products with experts' matrices in the product of `x` and `matrix`, if this is a view of the `parameter` called `name`.

    out_by_in: whether `matrix` is (out, in), not (in, out).
    """
    # A view is recognised by its memory, however it was made.
    if matrix.untyped_storage()._cdata != parameter.untyped_storage()._cdata:
        return
    start, row = matrix.storage_offset() - parameter.storage_offset(), parameter.shape[-1]
    turned = matrix.stride()[-2:] == (1, row)
    if not 0 <= start < parameter.numel() or not (turned or matrix.stride()[-2:] == (row, 1)):
        return
    size = matrix.shape[-2] * matrix.shape[-1]
    # A parameter of two dimensions is one matrix, such as a router's, or several on top of one another.
    fits = size < parameter.numel() if parameter.ndim == 2 else size == parameter.shape[-2] * row
    if not fits or start % size:
        return
    alone = matrix.ndim == 2
    for expert, rows in enumerate([x.reshape(-1, x.shape[-1])] if alone else x.expand(len(matrix), -1, -1), start // size):
        # All experts in one product: rows of tokens that are not sent to an expert are zero.
        read = rows if alone else rows[rows.any(-1)]
        yield Product(expert_name(name, expert), parameter.numel() // size, out_by_in == turned, read, alone)


def expert_name(name: str, expert: int) -> str:
    """The name of one expert's matrix in the parameter called `name`."""
    return f"{name}[{expert}]"


def fused(matrices: dict[str, Matrix]) -> dict[str, nn.Parameter]:
    """By full name, the parameters that hold those of `matrices` that share one."""
    return {matrix.parameter_name: matrix.parameter for matrix in matrices.values() if matrix.expert is not None}


def fused_parameters(block: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `block` that may hold several matrices each: all but vectors and the parameters of standard modules."""
    standard = (nn.Linear, Conv1D, nn.Embedding, nn.modules.conv._ConvNd)
    return {
        name: parameter
        for name, parameter in block.named_parameters()
        if parameter.ndim >= 2 and not isinstance(block.get_submodule(name.rpartition(".")[0]), standard)
    }


def routed_modules(modules: Iterable[str], ran: dict[str, int]) -> dict[str, list[str]]:
    """Those of the `modules` of a block, by name, that only some tokens are sent to, as to experts; each with all that are alike.

    Names of experts differ in numbers only, and some experts read fewer tokens than other modules of the block, or none.

    ran: number of tokens that each module read; modules that did not run are missing.
    """
    alike: dict[str, list[str]] = {}
    for name in modules:
        alike.setdefault(re.sub(r"\d+", "", name), []).append(name)
    most = max(ran.values(), default=0)
    kinds = [(names, [ran.get(name, 0) for name in names]) for names in alike.values()]
    return {name: names for names, read in kinds if len(names) > 1 and 0 < max(read) and min(read) < most for name in names}


def routers(modules: dict[str, nn.Module], experts: dict[str, int]) -> set[str]:
    """Those of the `modules` of a block, by name, that weigh experts; they are not pruned.

    They are in the same child of the block as the experts, and have one output per expert, or one in all.

    experts: number of experts, by name of each expert's module, or of the parameter that holds them.
    """
    counts = {(name.partition(".")[0], outputs) for name, count in experts.items() for outputs in (1, count)}
    outputs = {name: module.weight.shape[isinstance(module, Conv1D)] for name, module in modules.items() if name not in experts}
    return {name for name, rows in outputs.items() if "." in name and (name.partition(".")[0], rows) in counts}
