"""The matrices of a block, found by watching one forward pass: in the order in which they run, grouped by the input they read."""

import contextlib

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from recon.errors import ReconError
from recon.model import experts
from recon.model.blocks import Blocks
from recon.model.experts import FusedProducts, Product
from recon.model.matrices import Matrix


class _Seen:
    """What ran in a block's forward pass: groups of names that read the same input, in order.

    ran: number of tokens that each linear module read.
    products: by name of a parameter that holds several matrices, the products with them.
    """

    def __init__(self, path: str, block: nn.Module):
        self.path, self.block = path, block
        self.groups: list[list[str]] = []
        self.ran: dict[str, int] = {}
        self.products: dict[str, list[Product]] = {}
        self._last: Tensor | None = None  # input of the last group

    def module(self, name: str, x: Tensor) -> None:
        """Notes that the matrix `name` has read `x` (..., in). Raises `ReconError` where it has run before."""
        if name in self.ran:
            raise ReconError(
                f"{type(self.block).__name__} runs the matrix '{self.path}.{name}' more than once in one forward pass; it must run once"
            )
        self.ran[name] = x.shape[:-1].numel()
        if self._last is x:
            self.groups[-1].append(name)
        else:
            self._last = x
            self.groups.append([name])

    def product(self, name: str, product: Product) -> None:
        if name not in self.products:
            # All experts, as the probe's tokens may not reach each of them.
            self.groups.extend([experts.expert_name(name, expert)] for expert in range(product.experts))
            self._last = None
        self.products.setdefault(name, []).append(product)


def find_matrices(model: Blocks, index: int, hidden: Tensor) -> dict:
    """The `groups`, `matrices` and `dense` modules of a `BlockStructure`, for block `index` and its input `hidden`.

    Raises:
        ReconError: a matrix runs twice, or a parameter of three dimensions is in no matrix product that could be seen.
    """
    block, tokens = model.blocks[index], hidden.shape[:-1].numel()
    modules = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    seen = _watch(model, index, hidden, modules)
    products, ran = seen.products, seen.ran
    routed = experts.routed_modules(modules, ran)
    counts = {name: found[0].experts for name, found in products.items()} | {name: len(alike) for name, alike in routed.items()}
    routers = experts.routers(modules, counts)
    for name in [name for name in routed if name not in ran]:
        # No token was sent to this expert: it comes after one that is alike and did run.
        at = max(number for number, group in enumerate(seen.groups) if set(group) & set(routed[name]))
        seen.groups.insert(at + 1, [name])
    found: dict[str, Matrix] = {}
    for name, module in modules.items():
        alike = routed.get(name, [name])
        share = sum(ran.get(other, 0) for other in alike) / len(alike) / tokens
        found[name] = Matrix(name, transposed=isinstance(module, Conv1D), share=share, routed=name in routed)
    for name in products:
        found |= {matrix.name: matrix for matrix in experts.matrices_in(name, products[name], tokens)}
    groups = tuple(tuple(kept) for group in seen.groups if (kept := [name for name in group if name not in routers]))
    dense = tuple(name for name in modules if name not in ran and name not in routers and name not in routed)
    return {"groups": groups, "matrices": {name: found[name] for group in groups for name in group}, "dense": dense}


def _watch(model: Blocks, index: int, hidden: Tensor, modules: dict[str, nn.Module]) -> _Seen:
    """What runs in block `index`, of which `modules` are the linear ones."""
    path, block = model.names[index], model.blocks[index]
    seen, fused = _Seen(path, block), experts.fused_parameters(block)
    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(lambda m, args, name=name: seen.module(name, args[0]))
            stack.callback(hook.remove)
        with FusedProducts(fused, seen.product):
            model.run_block(index, hidden)
    for name, parameter in fused.items():
        if name not in seen.products and sum(size > 1 for size in parameter.shape) > 2:
            raise ReconError(
                f"{type(block).__name__} holds the fused weight '{path}.{name}' of shape {tuple(parameter.shape)}, but no matrix "
                "product with a part of it was seen, as there must be for it to be pruned expert by expert"
            )
    return seen
