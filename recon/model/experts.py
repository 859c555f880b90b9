"""Mixtures of experts: matrices of several experts in one parameter, the products with them, and routers.

transformers keeps the matrices of all experts of a layer in one parameter, (experts, out, in) or (experts, in, out). Each expert's
slice is a `Matrix` here. What it reads is seen by watching for matrix products with views of the parameter.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from recon.model.matrices import Matrix

IMPLEMENTATION = "_experts_implementation_internal"  # in a configuration, how transformers multiplies by the experts' matrices


def configurations(model: nn.Module) -> list:
    """The configurations of `model` and its modules that say how experts are computed."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in found if hasattr(config, IMPLEMENTATION)}.values())


@contextlib.contextmanager
def apart(configs: Iterable) -> Iterator[None]:
    """Context in which each expert's matrices are multiplied one by one, by the tokens sent to it alone. `configs`: see `configurations`."""
    settings = [(vars(config), vars(config)[IMPLEMENTATION]) for config in configs]
    try:
        for values, _ in settings:
            values[IMPLEMENTATION] = "eager"
        yield
    finally:
        for values, implementation in settings:
            values[IMPLEMENTATION] = implementation


# ---- products with experts' matrices


@dataclass(frozen=True)
class Product:
    """A product with one of the matrices that a parameter holds."""

    expert: int  # which of them
    experts: int  # of how many
    transposed: bool  # stored as (in, out)
    x: Tensor  # what the matrix reads, (tokens, in)
    alone: bool  # multiplied by itself, and not together with the others


class FusedProducts(TorchFunctionMode):
    """Sees the products with matrices of experts, each of which is a slice of a parameter.

    Args:
        parameters: by name, those to look out for.
        see: called with a parameter's name and the product before each product with one expert's matrix.
        use: called with a parameter's name and an expert whose matrix is multiplied alone; returns what to multiply by instead, laid
            out as in the parameter.
    """

    # Functions that multiply by a matrix -> its index among their arguments, after what it multiplies; whether it is (out, in).
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
    """The products with experts' matrices in the product of `x` and `matrix`, where this is a view of `parameter`.

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
    first, experts = start // size, parameter.numel() // size
    transposed = out_by_in == turned
    if matrix.ndim == 2:
        yield Product(first, experts, transposed, x.reshape(-1, x.shape[-1]), alone=True)
        return
    for expert, rows in enumerate(x.expand(len(matrix), -1, -1), first):
        # All experts in one product: rows of tokens that are not sent to an expert are zero.
        yield Product(expert, experts, transposed, rows[rows.any(-1)], alone=False)


def expert_name(name: str, expert: int) -> str:
    """The name of one expert's matrix in the parameter called `name`."""
    return f"{name}[{expert}]"


def _fused(matrices: dict[str, Matrix]) -> dict[str, nn.Parameter]:
    """By full name, the parameters that hold those of `matrices` that share one."""
    return {matrix.parameter_name: matrix.parameter for matrix in matrices.values() if matrix.expert is not None}


def watching(matrices: dict[str, Matrix], see: Callable[[tuple[str, ...], Tensor], None]) -> contextlib.AbstractContextManager:
    """Context in which `see((name,), input)` is called whenever one of `matrices` that shares a parameter reads its input, (tokens, in)."""
    fused = _fused(matrices)
    if not fused:
        return contextlib.nullcontext()
    return FusedProducts(fused, lambda name, product: see((expert_name(name, product.expert),), product.x))


def using(matrices: dict[str, Matrix], weights: dict[str, Tensor]) -> contextlib.AbstractContextManager:
    """Context in which those of `matrices` that are `alone` are multiplied as `weights` (by name, laid out as stored) instead."""
    return FusedProducts(_fused(matrices), use=lambda name, expert: weights[expert_name(name, expert)])


# ---- finding experts


def fused_parameters(block: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `block` that may hold several matrices each: all but vectors and the parameters of standard modules."""
    standard = (nn.Linear, Conv1D, nn.Embedding, nn.modules.conv._ConvNd)
    return {
        name: parameter
        for name, parameter in block.named_parameters()
        if parameter.ndim >= 2 and not isinstance(block.get_submodule(name.rpartition(".")[0]), standard)
    }


def matrices_in(name: str, products: list[Product], tokens: int) -> list[Matrix]:
    """The matrices in the parameter called `name`, from the products seen with them while their block read `tokens` tokens."""
    one = products[0]
    share = sum(len(product.x) for product in products) / (one.experts * tokens)
    common = {"transposed": one.transposed, "share": share, "routed": True, "alone": all(product.alone for product in products)}
    attribute = name.rpartition(".")[2]
    return [Matrix(expert_name(name, expert), None, attribute, expert, one.experts, **common) for expert in range(one.experts)]


def routed_modules(modules: Iterable[str], ran: dict[str, int]) -> dict[str, list[str]]:
    """Those of the `modules` of a block, by name, that only some tokens are sent to, as to experts; each with all that are alike.

    Names of experts differ in one number only, and some experts read fewer tokens than other modules of the block, or none.

    ran: number of tokens that each module read; modules that did not run are missing.
    """
    alike: dict[tuple[str, str], list[str]] = {}
    for name in modules:
        for number in re.finditer(r"\d+", name):
            alike.setdefault((name[: number.start()], name[number.end() :]), []).append(name)
    most, found = max(ran.values(), default=0), {}
    for names in alike.values():
        read = [ran.get(name, 0) for name in names]
        if 0 < max(read) and min(read) < most:
            # Of several numbers in a name, the one with the most values counts the experts.
            found |= {name: names for name in names if len(names) > max(1, len(found.get(name, ())))}
    return found


def routers(modules: dict[str, nn.Module], experts: dict[str, int]) -> set[str]:
    """Those of the `modules` of a block, by name, that weigh experts; they are not pruned.

    They are in the same child of the block as the experts, and have one output per expert, or one in all.

    experts: number of experts, by name of each expert's module, or of the parameter that holds them.
    """
    found = set()
    for name, count in experts.items():
        child = f"{name.partition('.')[0]}."
        for other, module in modules.items():
            outputs = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
            if other.startswith(child) and other not in experts and outputs in (1, count):
                found.add(other)
    return found
