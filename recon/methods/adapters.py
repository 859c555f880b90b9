"""Low-rank adapters around the matrices of a model, merged at the end without losing a zero."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from recon.errors import ReconError
from recon.kernels.adapters import LowRank
from recon.kernels.gradient_descent import Trained
from recon.model.decoder import Decoder
from recon.model.matrices import Matrix


def check_adaptable(decoder: Decoder) -> None:
    """Raises `ReconError` where a matrix of the model has no module of its own that could carry an adapter: an expert's."""
    for name, matrix in decoder.matrices().items():
        if matrix.expert is not None:
            raise ReconError(
                f"{name!r} is one expert's part of a parameter that holds those of {matrix.experts}, which no adapter fits; "
                "train the matrices themselves (adapter none, or retraining full or norms)"
            )


@contextlib.contextmanager
def adapted(
    matrices: Iterable[Matrix],
    masks: dict[str, Tensor],
    kind: str,
    rank: int,
    random: torch.Generator,
    merged: Callable[[], None] = lambda: None,
) -> Iterator[list[Trained]]:
    """While active, `matrices` are parametrised by adapters; afterwards these are merged, masked where `masks` drop, and gone.

    Args:
        masks: keep-masks (out, in) by matrix name.
        kind: see `recon.kernels.adapters.ADAPTERS`.
        merged: called once the adapters are merged, before the mask is applied.

    Yields the adapters' parameters, to be trained.
    """
    matrices, trained = list(matrices), []
    for matrix in matrices:
        mask = matrix.oriented(masks[matrix.name]).to(matrix.module.weight.device)
        adapter = LowRank(matrix.module.weight, mask, kind, rank, random)
        trained += adapter.trained(matrix.module.weight)
        parametrize.register_parametrization(matrix.module, "weight", adapter, unsafe=True)  # its shape is known to be right
    try:
        yield trained
    finally:
        with torch.no_grad():
            for matrix in matrices:
                original, weight = matrix.module.parametrizations.weight.original, matrix.module.weight
                # The very parameter that was there before comes back, so that whoever holds it sees the merged weight.
                parametrize.remove_parametrizations(matrix.module, "weight", leave_parametrized=False)
                original.copy_(weight)
            merged()
            for matrix in matrices:
                matrix.part.mul_(matrix.oriented(masks[matrix.name]).to(matrix.part.device))
