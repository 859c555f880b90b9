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
    """Reads all of `pruned` once, a parameter at a time, and raises `ReconError` for what `take_over` cannot use.

    That is a parameter that one of the models has and the other does not, or that is of another shape, NaN or infinite; and matrices
    of which less than a share `LEAST` is zero, or all.
    """
    decoder, zeros, sizes = decompose(dense), 0, 0
    holders = {matrix.parameter_name for matrix in decoder.matrices().values()}
    for name, value in read(decoder.model, pruned):
        if name in holders:
            zeros, sizes = zeros + int((value == 0).sum()), sizes + value.numel()
    if not LEAST * sizes <= zeros < sizes:
        raise ReconError(
            f"pruned model: {zeros / sizes:.2%} of its matrices is zero; a mask is read from zeros: at least {LEAST:.0%}, not all"
        )


@torch.no_grad()
def take_over(model: nn.Module | Decoder, pruned: Weights, execution: Execution | None = None) -> Pruning:
    """Gives `model`, a copy of the dense one, the weights of `pruned` in place; its mask is wherever those are zero.

    All of its parameters are taken over, as what made the mask may have changed others (SparseGPT updates what survives),
    and what was trained since may have changed any. Weights in half precision become float32, which loses nothing. A model on disk
    has been made of `pruned` already; its mask is read block by block.

    Raises `ReconError` for a parameter that one of the models has and the other does not, or of another shape, NaN or infinite.
    """
    decoder = decompose(model)
    execution = execution or Execution(decoder.device, progress=False)
    if not decoder.lazy:
        for name, value in read(decoder.model, pruned):
            decoder.model.get_parameter(name).copy_(value)
        decoder.forget()
    masks = execution.storage.masks

    def visit(window: Window, statistics: dict) -> tuple[None, dict]:
        masks.update({name: matrix.weight != 0 for name, matrix in decoder.matrices(window).items()})
        return None, {}

    over_blocks(decoder, execution, "prune", visit, "read the mask")
    pruning = Pruning(masks)
    if empty := [name for name, share in pruning.sparsity.items() if share == 1]:
        log.warning("all of matrix %r is zero (%d such): there is nothing to reconstruct in it", empty[0], len(empty))
    return pruning


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
