"""Keep-masks by matrix name, bool (out, in), True = survives: checks, saving, loading, and masks of models pruned elsewhere."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from recon.errors import ReconError, check_kind, log
from recon.methods.prune import Pruning
from recon.methods.statistics import over_blocks
from recon.model.decoder import Decoder
from recon.model.skeleton import tied
from recon.model.windows import Window
from recon.runtime.execution import Execution
from recon.runtime.storage import write_safetensors
from recon.runtime.weights import Weights

LEAST = 0.01  # a model counts as pruned from this share of zeros in its matrices: dense models have a few zeros, too


@torch.no_grad()
def keep_masks(student: Decoder, masks: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """`masks`, checked, and applied to `student`; if None, masks that keep its nonzero weights. Raises `ReconError`."""
    if student.lazy:  # its masks come from its own run
        return masks
    weights = {name: matrix.weight for name, matrix in student.matrices().items()}
    if masks is None:
        return {name: weight != 0 for name, weight in weights.items()}
    check_kind("masks", masks, dict)
    check_shapes("mask of", masks, weights)
    for name, mask in masks.items():
        if name not in weights or not torch.equal(mask, mask.bool().to(mask.dtype)):
            raise ReconError(f"mask of {name!r} is of no matrix of the model, or has other values than True and False")
    masks = {name: mask.bool() for name, mask in masks.items()}
    for name, weight in weights.items():
        weight.masked_fill_(~masks[name].to(weight.device), 0.0)
    return masks


def check_shapes(what: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises `ReconError` naming a tensor of `expected` that `found` lacks, or has in another shape."""
    for name, tensor in expected.items():
        if name not in found:
            raise ReconError(f"{what} {name!r} is missing; it must be of shape {tuple(tensor.shape)}")
        if found[name].shape != tensor.shape:
            raise ReconError(f"{what} {name!r} has shape {tuple(found[name].shape)}; it must be {tuple(tensor.shape)}")


def check_apart(model: nn.Module, dense: nn.Module) -> None:
    """Raises `ReconError` naming a parameter that both share: `model` is changed, and `dense` has to stay as it is."""
    own = {*model.parameters()}
    if shared := next((name for name, parameter in dense.named_parameters() if parameter in own), None):
        raise ReconError(f"model and dense share parameters, such as {shared!r}; give a copy of the dense model (copy.deepcopy)")


def save_masks(masks: dict[str, Tensor], path: Path | str) -> None:
    """Writes `masks` to the safetensors file `path`, which appears only when it is complete."""
    write_safetensors(Path(path), masks)


def load_masks(path: Path | str) -> dict[str, Tensor]:
    """The masks in a file that `save_masks` wrote. Raises `ReconError` naming a file that cannot be read or has other tensors."""
    try:
        masks = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ReconError(f"masks cannot be read from {str(path)!r}: {error}") from error
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise ReconError(f"{str(path)!r}: {name!r} is {mask.dtype}; masks are bool, as `recon.save_masks` writes them")
    return masks


# --- a model that something else pruned: its mask is read from its zeros ------------------------------------------------


def check_pruned(dense: Decoder, pruned: Weights) -> None:
    """Reads all of `pruned` once. Raises `ReconError` for a parameter that only one of the models has, that has another shape, or
    that has NaN or infinite values; and if less than the share `LEAST` of all weights in matrices is zero, or all are."""
    zeros, sizes, holders = 0, 0, {matrix.parameter_name for matrix in dense.matrices().values()}
    for name, value in _read(dense.model, pruned):
        if name in holders:
            zeros, sizes = zeros + int((value == 0).sum()), sizes + value.numel()
    check_zeros("pruned model", zeros, sizes)


def check_zeros(what: str, zeros: int, sizes: int) -> None:
    """Raises `ReconError` if `zeros`, of `sizes` weights in matrices, are too few to come from pruning, or all."""
    if not LEAST * sizes <= zeros < sizes:
        said = f"a mask is read from zeros: at least {LEAST:.0%}, and not all"
        raise ReconError(f"{what}: {zeros / sizes:.2%} of its matrices is zero; {said}")


@torch.no_grad()
def take_over(decoder: Decoder, pruned: Weights, execution: Execution) -> Pruning:
    """Copies the weights of `pruned` to `decoder`, a copy of the dense model, in place; the masks drop those that are zero.

    All parameters are copied: pruning may have changed weights that survive (as SparseGPT does), and training since then any
    parameter. A `decoder` on disk already has the weights of `pruned`; only its masks are read, block by block.
    """
    if not decoder.lazy:
        for name, value in _read(decoder.model, pruned):
            decoder.model.get_parameter(name).copy_(value)
        decoder.forget()
    masks = execution.storage.masks

    def visit(window: Window, statistics: dict) -> tuple[None, dict]:
        masks.update({name: matrix.weight != 0 for name, matrix in decoder.matrices(window).items()})
        return None, {}

    over_blocks(decoder, execution, "prune", visit, "read the mask")
    if empty := [name for name, mask in masks.items() if not mask.any()]:
        log.warning("all of matrix %r is zero (%d such): there is nothing to reconstruct in it", empty[0], len(empty))
    return Pruning(masks)


def _read(model: nn.Module, pruned: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yields each parameter of `model` by full name, with its value in `pruned`, float32, after checks; see `check_pruned`."""
    names = tied(model)
    if surplus := pruned.surplus or sorted(pruned.names - {other for group in names.values() for other in group}):
        raise ReconError(f"pruned model: it has {surplus[0]!r}, which the dense one does not ({len(surplus)} such)")
    for name, group in names.items():
        if not (stored := [other for other in group if other in pruned.names]):
            raise ReconError(f"pruned model: it lacks {name!r}")
        try:
            (_, value), *others = pruned.read(stored)
        except ReconError as error:
            raise ReconError(f"pruned model: {error}") from error
        check_shapes("pruned model: weight", {name: value}, {name: model.get_parameter(name)})
        for other, its in others:
            if not torch.equal(value, its):
                raise ReconError(f"pruned model: {other!r} differs from {stored[0]!r}; in the dense model they are one")
        yield name, value
