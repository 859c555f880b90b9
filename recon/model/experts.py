"""Experts whose matrices share one parameter: the matrix products with slices of it, seen as they are computed."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D


def _expert(name: str, expert: int) -> str:
    """The name of one expert's matrix in the parameter called `name`."""
    return f"{name}[{expert}]"


def _routed(prefix: str, modules: dict[str, nn.Module], ran: dict[str, int]) -> dict[str, list[str]]:
    """Of the `modules` of a block, by name, those that read tokens of their own, as experts do; each with all that are alike.

    Their names differ in one number alone, and some read fewer tokens than other modules of the block, or none.

    ran: how many tokens they read, where they ran.
    """
    alike: dict[tuple[str, str], list[str]] = {}
    for name in modules:
        for number in re.finditer(r"\d+", name.removeprefix(prefix)):
            start, stop = (len(prefix) + edge for edge in number.span())
            alike.setdefault((name[:start], name[stop:]), []).append(name)
    most, found = max(ran.values(), default=0), {}
    for names in alike.values():
        read = [ran.get(name, 0) for name in names]
        if 0 < max(read) and min(read) < most:
            # Where a name has several numbers, that of the expert is the one with the most values.
            found |= {name: names for name in names if len(names) > max(1, len(found.get(name, ())))}
    return found


@dataclass(frozen=True)
class Product:
    """A matrix product with one of the matrices that a parameter holds.

    expert, experts: which of them, of how many.
    transposed: whether they are stored as (in, out).
    x: what the matrix reads, (tokens, in).
    alone: whether it is multiplied by itself, and not with others at once.
    """

    expert: int
    experts: int
    transposed: bool
    x: Tensor
    alone: bool


class FusedProducts(TorchFunctionMode):
    """Sees the matrix products with slices of parameters that hold the matrices of several experts, one slice each.

    Args:
        parameters: by name, those to look out for.
        see: called with a parameter's name and the product before each product with one expert's matrix.
        use: called with a parameter's name and an expert, for one whose matrix is multiplied alone; gives what is multiplied
            by instead, laid out as in the parameter.
    """

    # The functions that multiply by a matrix: where it is among their arguments, after what it multiplies; whether it is (out, in).
    FUNCTIONS = {F.linear: (1, True), torch.baddbmm: (2, False)} | dict.fromkeys(
        (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm), (1, False)
    )

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        see: Callable[[str, Product], None] = lambda name, product: None,
        use: Callable[[str, int], Tensor] | None = None,
    ):
        super().__init__()
        self.parameters, self.see, self.use = parameters, see, use

    def __torch_function__(self, function, types, args=(), kwargs=None):
        at, out_by_in = self.FUNCTIONS.get(function, (len(args), False))
        if at < len(args):
            args = list(args)
            for name, parameter in self.parameters.items():
                for product in _products(args[at - 1].detach(), args[at], out_by_in, parameter):
                    self.see(name, product)
                    if self.use is not None and product.alone:
                        other = self.use(name, product.expert)
                        args[at] = other.T if product.transposed == out_by_in else other
        return function(*args, **(kwargs or {}))


def _products(x: Tensor, matrix: Tensor, out_by_in: bool, parameter: nn.Parameter) -> Iterator[Product]:
    """The products with experts' matrices in that of `x` and `matrix`, where this is a view of `parameter`.

    out_by_in: whether `matrix` is (out, in), not (in, out).
    """
    # A view is known by where it lies, however it was made.
    if matrix.untyped_storage()._cdata != parameter.untyped_storage()._cdata:
        return
    start, row = matrix.storage_offset() - parameter.storage_offset(), parameter.shape[-1]
    turned = matrix.stride()[-2:] == (1, row)
    if not 0 <= start < parameter.numel() or not (turned or matrix.stride()[-2:] == (row, 1)):
        return
    size = matrix.shape[-2] * matrix.shape[-1]
    # Two dimensions hold one matrix that is nobody's, a router's, say; or several on top of one another.
    fits = size < parameter.numel() if parameter.ndim == 2 else size == parameter.shape[-2] * row
    if not fits or start % size:
        return
    first, experts = start // size, parameter.numel() // size
    transposed = out_by_in == turned
    if matrix.ndim == 2:
        yield Product(first, experts, transposed, x.reshape(-1, x.shape[-1]), alone=True)
        return
    for expert, rows in enumerate(x.expand(len(matrix), -1, -1), first):
        # All experts at once: a token that is not for one is a row of zeros.
        yield Product(expert, experts, transposed, rows[rows.any(-1)], alone=False)


def fused_parameters(block: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `block` that may hold several matrices each: all but vectors and those of the usual modules."""
    usual = (nn.Linear, Conv1D, nn.Embedding, nn.modules.conv._ConvNd)
    return {
        name: parameter
        for name, parameter in block.named_parameters()
        if parameter.ndim >= 2 and not isinstance(block.get_submodule(name.rpartition(".")[0]), usual)
    }
