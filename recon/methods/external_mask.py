"""A model that something else pruned: its mask is read from its zeros, and reconstruction starts from its weights."""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from recon.errors import ReconError
from recon.methods.blocks import over_blocks
from recon.methods.prune import Pruning
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.model.windows import Window
from recon.runtime.execution import Execution
from recon.runtime.weights import Weights, tied

log = logging.getLogger("recon")
LEAST = 0.01  # share of zeros in the matrices from which a model counts as pruned: dense ones have a few of their own


def check_pruned(dense: nn.Module | Decoder, pruned: Weights) -> None:
    """Reads all of `pruned` once, a parameter at a time, and raises `ReconError` for what `take_over` refuses."""
    decoder = decompose(dense)
    holders = {matrix.parameter_name for matrix in decoder.matrices().values()}
    held = [(value.numel(), int(value.count_nonzero())) for name, value in read(decoder.model, pruned) if name in holders]
    sizes, kept = map(sum, zip(*held, strict=True))
    _check_share(1 - kept / sizes)


@torch.no_grad()
def take_over(model: nn.Module | Decoder, pruned: Weights) -> Pruning:
    """Gives `model`, a copy of the dense one, the weights of `pruned` in place; its mask is wherever those are zero.

    All of its parameters are taken over, as what made the mask may have changed others (SparseGPT updates what survives),
    and what was trained since may have changed any. Weights in half precision become float32, which loses nothing.

    Raises:
        ReconError: naming a parameter that one of the models has and the other does not, or that is of another shape, NaN or
            infinite; less than a share `LEAST` of the matrices' weights is zero, or all of them.
    """
    decoder = decompose(model)
    holders = {matrix.parameter_name for matrix in decoder.matrices().values()}
    for name, value in read(decoder.model, pruned):
        parameter = decoder.model.get_parameter(name)
        fresh = ((value == 0) & (parameter.cpu() != 0)).float().mean().item()
        if name not in holders and fresh > LEAST:
            log.warning("%s of %r, outside of the blocks' matrices, is zero: nothing keeps it so", f"{fresh:.0%}", name)
        parameter.copy_(value)
    decoder.forget()
    return _checked(Pruning({name: matrix.weight != 0 for name, matrix in decoder.matrices().items()}))


@torch.no_grad()
def read_mask(student: Decoder, execution: Execution) -> Pruning:
    """The mask of a student whose weights are those of the pruned model already, read block by block."""

    def visit(window: Window, statistics: dict) -> tuple[None, dict]:
        execution.store.masks.update({name: matrix.weight != 0 for name, matrix in student.matrices(window).items()})
        return None, {}

    over_blocks(student, execution, "prune", visit, "read the mask")
    return _checked(Pruning(execution.store.masks))


def read(model: nn.Module, pruned: Weights) -> Iterator[tuple[str, Tensor]]:
    """The parameters of `model` by full name, with their values in `pruned`, float32, checked one by one; see `take_over`."""
    known = dict(model.named_parameters(remove_duplicate=False))
    if surplus := pruned.surplus or sorted(pruned.names - known.keys()):
        raise ReconError(f"pruned model: it has {surplus[0]!r}, which the dense one does not ({len(surplus)} such)")
    for name, names in tied(model).items():
        stored = [other for other in names if other in pruned.names]
        if not stored:
            raise ReconError(f"pruned model: it lacks {name!r}")
        try:
            values = dict(pruned.read(stored))
        except ReconError as error:
            raise ReconError(f"pruned model: {error}") from error
        if values[stored[0]].shape != known[name].shape:
            raise ReconError(f"pruned model: weight {name!r} is {tuple(values[stored[0]].shape)}, not {tuple(known[name].shape)}")
        value = values.pop(stored[0])
        for other, its in values.items():
            if not torch.equal(value, its):
                raise ReconError(f"pruned model: {other!r} differs from {stored[0]!r}; in the dense model they are one")
        yield name, value


def _checked(pruning: Pruning) -> Pruning:
    """Raises `ReconError` where less than `LEAST` of the matrices is zero, or all; warns of one that is all zero."""
    _check_share(pruning.total_sparsity)
    if empty := [name for name, share in pruning.sparsity.items() if share == 1]:
        log.warning("all of matrix %r is zero (%d such): there is nothing to reconstruct in it", empty[0], len(empty))
    return pruning


def _check_share(share: float) -> None:
    if not LEAST <= share < 1:
        raise ReconError(
            f"pruned model: {share:.2%} of its matrices is zero; a mask is read from zeros: at least {LEAST:.0%}, not all"
        )
