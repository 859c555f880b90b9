"""Divides a block into an attention half and an MLP half: the block itself runs, with the children of the other half silenced."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from recon.model.decoder import Decoder
from recon.model.modules import distance, first, requiring_gradients, tolerance, watched
from recon.model.structure import Halves


def find_halves(decoder: Decoder, index: int, hidden: Tensor) -> Halves | str:
    """The halves of block `index`, checked to give the block back on its input `hidden`; or why it does not divide."""
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
    except Exception as error:  # a block may raise anything if its children are silenced
        return f"does not run with one half silenced ({type(error).__name__}: {error})"
    if min(sequential, parallel) > tolerance(whole):
        return (
            "does not divide into an attention half and an MLP half (with one silenced after the other, its output is off by "
            f"{min(sequential, parallel):.0%}), as where the residual is added inside the sub-module"
        )
    layout = "parallel" if sequential > tolerance(whole) else "sequential"
    return replace(halves, layout=layout, parameters=_parameters_of(halves, decoder, index, hidden))


def _parameters_of(halves: Halves, decoder: Decoder, index: int, hidden: Tensor) -> dict[str, frozenset[str]]:
    """The names of the block's parameters that the output of each half depends on; each parameter is in one half at most."""
    parameters = dict(decoder.blocks[index].named_parameters())
    used: dict[str, frozenset[str]] = {}
    for half in halves.children:
        with torch.enable_grad(), requiring_gradients(parameters.values()):
            output = decoder.run_block(index, hidden.detach(), halves.silenced(half))
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


def _hidden_states(args: tuple, kwargs: dict) -> Tensor:
    """The first tensor among a module's arguments: by convention the hidden states."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _mixes_tokens(child: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether changing the first token's input changes the output at any other token."""
    given = _hidden_states(args, kwargs)
    changed = given.clone()
    # The token axis is the last but one, also if a block flattens (batch, length) into one axis.
    changed[..., 0, :] = changed[..., 0, :].flip(-1) + 1

    def output(hidden: Tensor) -> Tensor:
        swapped = [hidden if value is given else value for value in args]
        return first(child(*swapped, **{key: hidden if value is given else value for key, value in kwargs.items()}))

    # The block may have changed its child's output in place since, so the child runs again on the original input.
    plain, other = (output(hidden).reshape(*given.shape[:-1], -1)[..., 1:, :] for hidden in (given, changed))
    # Once the first token goes to other experts, the others are multiplied in batches of other sizes, and rounded differently.
    return bool((plain - other).float().abs().max() > tolerance(plain) / 1000 * plain.float().abs().max())


def _silence(args: tuple, kwargs: dict, output) -> Callable:
    """A function that takes a child's arguments, of any batch and length, and returns zeros in the structure of its `output`.

    args, kwargs: what gave `output`. None stands for what is no tensor, or is not of the tokens that the child reads. The child may be
    of a wider model than the one that was looked at (see `recon.study.plan`): what was as wide as its input is so again.
    """
    given = _hidden_states(args, kwargs)
    tokens, width = given.shape[:-1], given.shape[-1]

    def forward(*args, **kwargs):
        like = _hidden_states(args, kwargs)

        def zeros(leaf) -> Tensor | None:
            if not isinstance(leaf, Tensor) or leaf.shape[:-1].numel() != tokens.numel():
                return None
            rows = like.shape[:-1] if leaf.shape[:-1] == tokens else (like.shape[:-1].numel(),)  # batch and length in one axis
            return like.new_zeros(*rows, like.shape[-1] if leaf.shape[-1] == width else leaf.shape[-1])

        return type(output)(map(zeros, output)) if isinstance(output, tuple | list) else zeros(output)

    return forward
