"""Products with experts' matrices. Transformers keeps these in one parameter, (experts, out, in) or (experts, in, out).

Each expert's slice is a `Matrix` here. To see its input, matrix products with views of the parameter are intercepted.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Product:
    """A matrix product of `x` with one of the matrices that a parameter holds."""

    name: str  # of the parameter, with the expert's number in brackets
    experts: int  # how many matrices the parameter holds
    transposed: bool  # stored as (in, out)
    x: Tensor  # what the matrix reads, (tokens, in)
    alone: bool  # in a product of its own, not in one with the other matrices


@dataclass
class FusedProducts(TorchFunctionMode):
    """Context that intercepts matrix products with experts' matrices, each of which is a slice of a parameter."""

    parameters: dict[str, nn.Parameter]  # by name: those that hold experts' matrices
    see: Callable[[Product], None] = lambda product: None  # called before each product with one expert's matrix
    # Called with the names of the matrices in a product, and its output: (tokens, out); (experts, tokens, out) for several.
    gave: Callable[[list[str], Tensor], None] = lambda names, output: None
    # By matrix name: tensors used in place of matrices in products of their own (`Product.alone`), laid out as in the parameter.
    use: Mapping[str, Tensor] = field(default_factory=dict)

    # Functions that multiply by a matrix -> its index among the arguments (right after that of x), whether it is (out, in).
    FUNCTIONS: ClassVar = {F.linear: (1, True), torch.baddbmm: (2, False)} | dict.fromkeys(
        (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm), (1, False)
    )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        (at, out_by_in), names = self.FUNCTIONS.get(function, (len(args), False)), []
        if at < len(args):
            args = list(args)
            for name, parameter in self.parameters.items():
                for product in _products(name, parameter, args[at - 1].detach(), args[at], out_by_in):
                    self.see(product)
                    names.append(product.name)
                    if product.alone and product.name in self.use:
                        other = self.use[product.name]
                        args[at] = other.T if product.transposed == out_by_in else other
        output = function(*args, **(kwargs or {}))
        if names:
            self.gave(names, output)
        return output


def _products(name: str, parameter: nn.Parameter, x: Tensor, matrix: Tensor, out_by_in: bool) -> Iterator[Product]:
    """The products with experts' matrices that multiplying `x` by `matrix` consists of; none if it is no view of `parameter`."""
    # A view is recognised by its memory, not by how it was made.
    if matrix.untyped_storage()._cdata != parameter.untyped_storage()._cdata:
        return
    start, row = matrix.storage_offset() - parameter.storage_offset(), parameter.shape[-1]
    turned = matrix.stride()[-2:] == (1, row)
    if not 0 <= start < parameter.numel() or not (turned or matrix.stride()[-2:] == (row, 1)):
        return
    size = matrix.shape[-2] * matrix.shape[-1]
    # A parameter with two dimensions is one matrix, such as a router's, or several stacked along the rows.
    fits = size < parameter.numel() if parameter.ndim == 2 else size == parameter.shape[-2] * row
    if not fits or start % size:
        return
    alone = matrix.ndim == 2
    for expert, rows in enumerate([x.reshape(-1, x.shape[-1])] if alone else x.expand(len(matrix), -1, -1), start // size):
        # All experts in one product: rows of tokens that are not sent to an expert are zero.
        read = rows if alone else rows[rows.any(-1)]
        yield Product(f"{name}[{expert}]", parameter.numel() // size, out_by_in == turned, read, alone)
