"""The matrices of a block, found by watching one forward pass: in the order in which they run, grouped by the input they read."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from recon.errors import ReconError
from recon.model import experts
from recon.model.decoder import Decoder
from recon.model.experts import FusedProducts, Product
from recon.model.matrices import Matrix
from recon.model.modules import watched


def find_matrices(decoder: Decoder, index: int, hidden: Tensor) -> dict:
    """The `groups`, `matrices` and `dense` modules of a `BlockStructure`, for block `index` and its input `hidden`.

    Raises:
        ReconError: a matrix runs twice, or a parameter of three dimensions is in no matrix product that could be seen.
    """
    path, block, tokens = decoder.names[index], decoder.blocks[index], hidden.shape[:-1].numel()
    modules = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    fused = experts.fused_parameters(block)
    groups: list[list[str]] = []
    ran: dict[str, int] = {}  # number of tokens that each linear module read
    products: dict[str, list[Product]] = {}  # by name of a parameter that holds several matrices
    last: list[Tensor | None] = [None]  # input of the last group

    def see_module(name: str, args: tuple, kwargs: dict) -> None:
        if name in ran:
            raise ReconError(
                f"{type(block).__name__} runs the matrix '{path}.{name}' more than once in one forward pass; it must run once"
            )
        ran[name] = args[0].shape[:-1].numel()
        if last[0] is args[0]:
            groups[-1].append(name)
        else:
            groups.append([name])
        last[0] = args[0]

    def see_product(product: Product) -> None:
        name = product.name.rpartition("[")[0]
        if name not in products:
            # All experts, as the probe's tokens may not reach each of them.
            groups.extend([experts.expert_name(name, expert)] for expert in range(product.experts))
            last[0] = None
        products.setdefault(name, []).append(product)

    with watched(modules, see_module), FusedProducts(fused, see_product):
        decoder.run_block(index, hidden)
    for name, parameter in fused.items():
        if name not in products and sum(size > 1 for size in parameter.shape) > 2:
            raise ReconError(
                f"{type(block).__name__} holds the fused weight '{path}.{name}' of shape {tuple(parameter.shape)}, but no matrix "
                "product with a part of it was seen, as there must be for it to be pruned expert by expert"
            )
    routed = experts.routed_modules(modules, ran)
    counts = {name: seen[0].experts for name, seen in products.items()} | {name: len(alike) for name, alike in routed.items()}
    routers = experts.routers(modules, counts)
    for name in [name for name in routed if name not in ran]:
        # No token was sent to this expert: it comes after one that is alike and did run.
        at = max(number for number, group in enumerate(groups) if set(group) & set(routed[name]))
        groups.insert(at + 1, [name])
    matrices: dict[str, Matrix] = {}
    for name, module in modules.items():
        alike = routed.get(name, [name])
        share = sum(ran.get(other, 0) for other in alike) / len(alike) / tokens
        matrices[name] = Matrix(name, transposed=isinstance(module, Conv1D), share=share, routed=name in routed)
    for name, seen in products.items():
        count, attribute, alone = seen[0].experts, name.rpartition(".")[2], all(product.alone for product in seen)
        share = sum(len(product.x) for product in seen) / (count * tokens)
        for expert in range(count):
            each = experts.expert_name(name, expert)
            matrices[each] = Matrix(each, None, attribute, expert, count, seen[0].transposed, share, routed=True, alone=alone)
    kept = tuple(names for group in groups if (names := tuple(name for name in group if name not in routers)))
    dense = tuple(name for name in modules if name not in ran and name not in routers and name not in routed)
    return {"groups": kept, "matrices": {name: matrices[name] for group in kept for name in group}, "dense": dense}
