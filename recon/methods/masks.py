"""Keep-masks by matrix name, bool (out, in), True = survives: read from zeros, checked, saved and loaded."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from recon.errors import ReconError
from recon.model.decoder import Decoder
from recon.runtime.storage import write_safetensors


def check_trainable(student: Decoder) -> None:
    """Raises `ReconError` naming a parameter that is not in float32, as what is trained has to be."""
    for name, parameter in student.model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ReconError(f"parameter {name!r} is {parameter.dtype}; small updates are lost in it: load the model in float32")


def keep_masks(student: Decoder, masks: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """`masks`, checked; if None, the masks that keep every weight of `student` that is not zero.

    Raises `ReconError` naming a mask that is missing or does not fit.
    """
    if student.lazy:  # whose masks are of its own run
        return masks
    matrices = student.matrices()
    if masks is None:
        return {name: matrix.weight != 0 for name, matrix in matrices.items()}
    for name, matrix in matrices.items():
        shape = tuple(masks[name].shape) if name in masks else None
        if shape != tuple(matrix.weight.shape):
            raise ReconError(f"mask of {name!r} has shape {shape}; it must be {tuple(matrix.weight.shape)}")
    return masks


def check_alike(pruned: nn.Module, dense: nn.Module) -> None:
    """Raises `ReconError` naming a parameter of `dense` that `pruned` lacks, or has in another shape; pruning may have added
    biases."""
    theirs = dict(pruned.named_parameters(remove_duplicate=False))
    for name, parameter in dense.named_parameters(remove_duplicate=False):
        shape = tuple(theirs[name].shape) if name in theirs else None
        if shape != tuple(parameter.shape):
            raise ReconError(
                f"parameter {name!r} has shape {shape} in the pruned model, and {tuple(parameter.shape)} in the dense one"
            )


def save_masks(masks: dict[str, Tensor], path: Path | str) -> None:
    """Writes `masks` to a safetensors file, which appears when it is complete."""
    write_safetensors(Path(path), {name: mask.cpu().contiguous() for name, mask in masks.items()})


def load_masks(path: Path | str) -> dict[str, Tensor]:
    """The masks in a file that `save_masks` wrote. Raises `ReconError` naming a file that holds none."""
    try:
        masks = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ReconError(f"masks cannot be read from {str(path)!r}: {error}") from error
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise ReconError(f"{str(path)!r}: {name!r} is {mask.dtype}; masks are bool, as `recon.save_masks` writes them")
    return masks
