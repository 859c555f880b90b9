"""Divides a block into an attention half and an MLP half: the block itself runs, with the children of the other half silenced."""

import contextlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from recon.model.blocks import Blocks
from recon.model.modules import distance, first, requiring_gradients, tolerance
from recon.model.structure import Halves, unchanged


def find_halves(model: Blocks, index: int, hidden: Tensor) -> Halves | str:
    """The halves of block `index`, checked to give the block back on its input `hidden`; or why it does not divide."""
    children, silence = _probe_children(model, index, hidden)
    if not all(children.values()):
        missing = " and ".join(f"no {half}" for half, names in children.items() if not names)
        return f"has {missing} child with weights of its own"
    halves = Halves("sequential", children, silence)
    whole = model.run_block(index, hidden)
    try:
        attention = model.run_block(index, hidden, halves.silenced("attention"))
        sequential = distance(model.run_block(index, attention, halves.silenced("mlp")), whole, hidden)
        parallel = distance(attention + model.run_block(index, hidden, halves.silenced("mlp")) - hidden, whole, hidden)
    except Exception as error:  # a block may raise anything where its children are silenced
        return f"does not run with one half silenced ({type(error).__name__}: {error})"
    if min(sequential, parallel) > tolerance(whole):
        return (
            "does not divide into an attention half and an MLP half (with one silenced after the other, its output is off by "
            f"{min(sequential, parallel):.0%}), as where the residual is added inside the sub-module"
        )
    if sequential > tolerance(whole):
        halves = replace(halves, layout="parallel")
    halves = replace(halves, parameters=_parameters_of(halves, model, index, hidden))
    return replace(halves, idle={half: _idle(halves, half, model, index, hidden) for half in children})


def _idle(halves: Halves, half: str, model: Blocks, index: int, hidden: Tensor) -> tuple[str, ...]:
    """The block's norms (children with vectors alone) that the output of `half` does not depend on: they cost time for nothing."""
    silenced, found = halves.silenced(half), []
    output = model.run_block(index, hidden, silenced)
    for name, child in model.blocks[index].named_children():
        own = {f"{name}.{parameter}": values.ndim for parameter, values in child.named_parameters()}
        if set(own.values()) == {1} and halves.parameters[half].isdisjoint(own):
            with contextlib.suppress(Exception):  # it is no norm: what it is given does not fit in the place of what it returns
                if torch.equal(model.run_block(index, hidden, silenced | {name: unchanged}), output):
                    found.append(name)
    return tuple(found)


def _parameters_of(halves: Halves, model: Blocks, index: int, hidden: Tensor) -> dict[str, frozenset[str]]:
    """The names of the block's parameters that the output of each half depends on; each parameter is in one half at most."""
    parameters = dict(model.blocks[index].named_parameters())
    used: dict[str, frozenset[str]] = {}
    for half in halves.children:
        with torch.enable_grad(), requiring_gradients(parameters.values()):
            output = model.run_block(index, hidden.detach(), halves.silenced(half))
            weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
            gradients = torch.autograd.grad((output * weights).sum(), list(parameters.values()), allow_unused=True)
        used[half] = frozenset(name for name, g in zip(parameters, gradients, strict=True) if g is not None and g.any())
    # A norm that both halves of a parallel block read is trained with the first half only: training it again with the
    # second would spoil the first.
    used["mlp"] -= used["attention"]
    # Parameters without a gradient, such as those of experts that no probe token is sent to, go with the child they are in.
    unused = [name for name in parameters if name not in used["attention"] | used["mlp"]]
    return {
        half: used[half] | {name for name in unused if name.partition(".")[0] in children}
        for half, children in halves.children.items()
    }


def _probe_children(model: Blocks, index: int, hidden: Tensor) -> tuple[dict[str, tuple[str, ...]], dict[str, Callable]]:
    """The block's children with matrices that mix tokens (attention) and that do not (MLP), and what silences each; see `Halves`."""
    block = model.blocks[index]
    named = {n: c for n, c in block.named_children() if any(p.ndim >= 2 for p in c.parameters())}
    seen: dict[str, tuple[tuple, dict, object]] = {}
    handles = [
        child.register_forward_hook(lambda m, a, k, out, name=name: seen.update({name: (a, k, out)}), with_kwargs=True)
        for name, child in named.items()
    ]
    try:
        model.run_block(index, hidden)
    finally:
        for handle in handles:
            handle.remove()
    mixes = {name: _mixes_tokens(named[name], args, kwargs) for name, (args, kwargs, _) in seen.items()}
    children = {
        "attention": tuple(name for name, mixing in mixes.items() if mixing),
        "mlp": tuple(name for name, mixing in mixes.items() if not mixing),
    }
    return children, {name: _silence(args, kwargs, out) for name, (args, kwargs, out) in seen.items()}


def _hidden_states(args: tuple, kwargs: dict) -> Tensor:
    """The first tensor among a module's arguments: by convention the hidden states."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _mixes_tokens(child: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether changing the first token's input changes the output at any other token."""
    given = _hidden_states(args, kwargs)
    changed = given.clone()
    # The token axis is the last but one, also where a block flattens (batch, length) into one axis.
    changed[..., 0, :] = changed[..., 0, :].flip(-1) + 1

    def swap(value):
        return changed if value is given else value

    again = child(*map(swap, args), **{key: swap(value) for key, value in kwargs.items()})
    # The block may have changed its child's output in place since, so the child runs again on the original input.
    plain, other = (first(out).reshape(*given.shape[:-1], -1)[..., 1:, :].float() for out in (child(*args, **kwargs), again))
    # Once the first token goes to other experts, the others are multiplied in batches of other sizes, and rounded differently.
    return bool((plain - other).abs().max() > tolerance(first(again)) / 1000 * plain.abs().max())


def _silence(args: tuple, kwargs: dict, output) -> Callable:
    """A function that takes a module and its arguments, of any batch and length, and returns zeros in the structure of `output`.

    args, kwargs: what gave `output`. The module may be that of another model, of other widths.
    """
    given = _hidden_states(args, kwargs)

    def zeros(leaf, like: Tensor, module: nn.Module):
        """In place of `leaf` of the output, for input `like`; None for what is no tensor, or of another shape."""
        if not isinstance(leaf, Tensor):
            return None
        width = like.shape[-1] if leaf.shape[-1] == given.shape[-1] else leaf.shape[-1]
        if isinstance(module, nn.Linear | Conv1D):
            width = module.weight.shape[isinstance(module, Conv1D)]
        if leaf.shape[:-1] == given.shape[:-1]:
            return like.new_zeros(*like.shape[:-1], width)
        if leaf.shape[:-1] == (given.shape[:-1].numel(),):  # batch and length in one axis
            return like.new_zeros(like.shape[:-1].numel(), width)
        return None

    def forward(module: nn.Module, *args, **kwargs):
        like = _hidden_states(args, kwargs)
        if isinstance(output, tuple | list):
            return type(output)(zeros(leaf, like, module) for leaf in output)
        return zeros(output, like, module)

    return forward
