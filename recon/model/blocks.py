"""Finds what blocks consist of: matrices (by watching a forward pass), halves (by silencing children), shared parameters."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from recon.errors import ReconError
from recon.model.decoder import Decoder
from recon.model.experts import FusedProducts, Product
from recon.model.modules import distance, first, placeholder_tokens, requiring_gradients, standard, tolerance, watched
from recon.model.structure import Halves, Matrix


def find_matrices(decoder: Decoder, index: int, hidden: Tensor) -> dict:
    """The `groups`, `matrices` and `dense` modules of a `BlockStructure`, found by running block `index` on `hidden`."""
    path, block, tokens = decoder.names[index], decoder.blocks[index], hidden.shape[:-1].numel()
    kind = type(block).__name__
    modules = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    fused = {name: parameter for name, parameter in block.named_parameters() if parameter.ndim >= 2 and not standard(block, name)}
    groups: list[list[str]] = []
    ran: dict[str, int] = {}  # number of tokens that each linear module read
    products: dict[str, list[Product]] = {}  # by the name of the parameter, which holds several matrices
    last: list[Tensor | None] = [None]  # input of the last group

    def see_module(name: str, args: tuple, kwargs: dict) -> None:
        if name in ran:
            raise ReconError(f"{kind} runs the matrix '{path}.{name}' more than once in one forward pass; it must run once")
        ran[name] = args[0].shape[:-1].numel()
        if last[0] is args[0]:
            groups[-1].append(name)
        else:
            groups.append([name])
        last[0] = args[0]

    def see_product(product: Product) -> None:
        name = product.name.rpartition("[")[0]
        if name not in products:
            # All experts at once, as the probe's tokens may not reach each of them.
            groups.extend([f"{name}[{expert}]"] for expert in range(product.experts))
            last[0] = None
        products.setdefault(name, []).append(product)

    with watched(modules, see_module), FusedProducts(fused, see_product):
        decoder.run_block(index, hidden)
    for name, parameter in fused.items():
        if name not in products and sum(size > 1 for size in parameter.shape) > 2:
            raise ReconError(f"{kind} holds '{path}.{name}' of shape {tuple(parameter.shape)}, but multiplies by no part of it")
    routed = _routed_modules(modules, ran)
    counts = {name: seen[0].experts for name, seen in products.items()} | {name: len(alike) for name, alike in routed.items()}
    routers = _routers(modules, counts)
    for name in [name for name in routed if name not in ran]:
        # No token was sent to this expert: place it after one of the same kind that did run.
        at = max(number for number, group in enumerate(groups) if set(group) & set(routed[name]))
        groups.insert(at + 1, [name])
    matrices: dict[str, Matrix] = {}
    for name, module in modules.items():
        alike = routed.get(name, [name])
        share = sum(ran.get(other, 0) for other in alike) / len(alike) / tokens
        matrices[name] = Matrix(name, transposed=isinstance(module, Conv1D), share=share, routed=name in routed)
    for name, seen in products.items():
        count, alone = seen[0].experts, all(product.alone for product in seen)
        share = sum(len(product.x) for product in seen) / (count * tokens)
        for expert in range(count):
            each = f"{name}[{expert}]"
            matrices[each] = Matrix(each, None, expert, count, seen[0].transposed, share, routed=True, alone=alone)
    kept = tuple(names for group in groups if (names := tuple(name for name in group if name not in routers)))
    dense = tuple(name for name in modules if name not in ran and name not in routers and name not in routed)
    return {"groups": kept, "matrices": {name: matrices[name] for group in kept for name in group}, "dense": dense}


def _routed_modules(modules: Iterable[str], ran: dict[str, int]) -> dict[str, list[str]]:
    """The modules of a block that read only the tokens sent to them (experts): the name of each -> names of all of its kind.

    Names of one kind differ only in numbers, as experts.0.w1 and experts.1.w1; w1 and w2, as last parts, are two kinds. In a kind
    of experts, some read fewer tokens (`ran`: how many each module read) than other modules of the block, or none.
    """
    alike: dict[str, list[str]] = {}
    for name in modules:
        alike.setdefault(re.sub(r"\d+(?=.*\.)|(?<=\.)\d+$", "", name), []).append(name)
    most = max(ran.values(), default=0)
    kinds = [(names, [ran.get(name, 0) for name in names]) for names in alike.values()]
    return {name: names for names, read in kinds if len(names) > 1 and 0 < max(read) and min(read) < most for name in names}


def _routers(modules: dict[str, nn.Module], experts: dict[str, int]) -> set[str]:
    """Names of the `modules` of a block that weigh experts (routers); they are not pruned.

    experts: how many experts there are, by matrix name. A router is in the same child of the block as its experts, with one
    output for each expert, or a single one; or it is the only linear module in its child, with one output for each expert.
    """
    inside = Counter(name.partition(".")[0] for name in modules)
    counts = {(name.partition(".")[0], outputs) for name, count in experts.items() for outputs in (1, count)}
    outputs = {name: module.weight.shape[isinstance(module, Conv1D)] for name, module in modules.items() if name not in experts}
    return {
        name
        for name, rows in outputs.items()
        if ("." in name and (name.partition(".")[0], rows) in counts)
        or (inside[name.partition(".")[0]] == 1 and rows in experts.values())
    }


def find_halves(decoder: Decoder, index: int, hidden: Tensor) -> Halves | str:
    """The halves of block `index`, checked to reproduce its output for the input `hidden`; or why it does not divide."""
    ran: dict[str, tuple[tuple, dict, object]] = {}
    block = decoder.blocks[index]
    with_matrices = {name: child for name, child in block.named_children() if any(p.ndim >= 2 for p in child.parameters())}
    with watched(with_matrices, after=lambda name, args, kwargs, output: ran.update({name: (args, kwargs, output)})):
        whole = decoder.run_block(index, hidden)
    mixing = {name for name, (args, kwargs, _) in ran.items() if _mixes_tokens(with_matrices[name], args, kwargs)}
    children = {"attention": tuple(n for n in ran if n in mixing), "mlp": tuple(n for n in ran if n not in mixing)}
    if missing := [f"no {half}" for half, names in children.items() if not names]:
        return f"has {' and '.join(missing)} child with weights of its own"
    halves = Halves("sequential", children, {name: _silence(*each) for name, each in ran.items()})
    try:
        attention = decoder.run_block(index, hidden, halves.silenced("attention"))
        sequential = distance(decoder.run_block(index, attention, halves.silenced("mlp")), whole, hidden)
        parallel = distance(attention + decoder.run_block(index, hidden, halves.silenced("mlp")) - hidden, whole, hidden)
    except Exception as error:  # a block may raise any error if its children are silenced
        return f"does not run with one half silenced ({type(error).__name__}: {error})"
    if min(sequential, parallel) > tolerance(whole):
        gap = f"with one silenced after the other, its output is off by {min(sequential, parallel):.0%}"
        return f"does not divide into an attention half and an MLP half ({gap})"
    layout = "parallel" if sequential > tolerance(whole) else "sequential"
    return replace(halves, layout=layout, parameters=_parameters_of(halves, decoder, index, hidden))


def _parameters_of(halves: Halves, decoder: Decoder, index: int, hidden: Tensor) -> dict[str, frozenset[str]]:
    """Half -> names of the block's parameters that its output depends on; each parameter is in one half at most."""
    parameters = dict(decoder.blocks[index].named_parameters())
    used: dict[str, frozenset[str]] = {}
    for half in halves.children:
        with torch.enable_grad(), requiring_gradients(parameters.values()):
            output = decoder.run_block(index, hidden.detach(), halves.silenced(half))
            weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
            gradients = torch.autograd.grad((output * weights).sum(), list(parameters.values()), allow_unused=True)
        used[half] = frozenset(name for name, g in zip(parameters, gradients, strict=True) if g is not None and g.any())
    # A norm that both halves of a parallel block use is trained only with the attention half: the MLP half would undo its fit.
    used["mlp"] -= used["attention"]
    # Parameters without a gradient, such as an expert that no probe token is sent to, go to the half that their child is in.
    unused = [name for name in parameters if name not in used["attention"] | used["mlp"]]
    return {
        half: used[half] | {name for name in unused if name.partition(".")[0] in children}
        for half, children in halves.children.items()
    }


def _given(args: tuple, kwargs: dict) -> Tensor:
    """The first tensor among a module's arguments: by convention the hidden states."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _mixes_tokens(child: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether changing the first token's input changes the output at any other token."""
    given = _given(args, kwargs)
    changed = given.clone()
    # The token axis is the second to last, also if a block flattens (batch, length) into one axis.
    changed[..., 0, :] = changed[..., 0, :].flip(-1) + 1

    def output(hidden: Tensor) -> Tensor:
        swapped = [hidden if value is given else value for value in args]
        return first(child(*swapped, **{key: hidden if value is given else value for key, value in kwargs.items()}))

    # The block may have changed its child's output in place, so the child runs again on the original input.
    plain, other = (output(hidden).reshape(*given.shape[:-1], -1)[..., 1:, :] for hidden in (given, changed))
    # If the first token goes to other experts, batch sizes change for the other tokens too, and they are rounded differently.
    return bool((plain - other).float().abs().max() > tolerance(plain) / 1000 * plain.float().abs().max())


def _silence(args: tuple, kwargs: dict, output) -> Callable:
    """A function that takes a child's arguments, of any batch and length, and returns zeros in the structure of its `output`.

    What is not a tensor, or has no row for each token that the child reads, becomes None. The function may be used for a wider
    model than the one that `args` and `kwargs` are from (see `recon.study.plan`): zeros are as wide as the input if `output` was.
    """
    tokens, width = _given(args, kwargs).shape[:-1], _given(args, kwargs).shape[-1]

    def forward(*args, **kwargs):
        like = _given(args, kwargs)

        def zeros(leaf) -> Tensor | None:
            if not isinstance(leaf, Tensor) or leaf.shape[:-1].numel() != tokens.numel():
                return None
            rows = like.shape[:-1] if leaf.shape[:-1] == tokens else (like.shape[:-1].numel(),)  # batch and length in one axis
            return like.new_zeros(*rows, like.shape[-1] if leaf.shape[-1] == width else leaf.shape[-1])

        return type(output)(map(zeros, output)) if isinstance(output, tuple | list) else zeros(output)

    return forward


def find_shared(decoder: Decoder) -> frozenset[str]:
    """Full names of the blocks' parameters that other blocks' arguments are computed from."""
    inside = {name: parameter for name, parameter in decoder.model.named_parameters() if name not in decoder.ends}
    with torch.enable_grad(), requiring_gradients(inside.values()):
        calls = decoder.observe_calls(placeholder_tokens(decoder.model, (1, 2)))
        computed = [leaf.sum() for leaf in tree_leaves(calls) if isinstance(leaf, Tensor) and leaf.requires_grad]
        gradients = torch.autograd.grad(computed, list(inside.values()), allow_unused=True) if computed else ()
    return frozenset(name for name, gradient in zip(inside, gradients) if gradient is not None)
