"""A student whose weights are read in their newest version: what the finished windows of a run have made of those at the start."""

from collections import ChainMap
from collections.abc import Iterator, Sequence

from torch import Tensor

from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.model.skeleton import Lazy, Read, second
from recon.model.structure import Matrix
from recon.runtime.storage import Storage


def student(
    dense: Decoder, storage: Storage, start: Read | None = None, phases: Sequence[str] = ("reconstruct", "prune")
) -> Decoder:
    """A skeleton beside `dense`, each parameter of which is that of the first of `phases` to have it in `storage`.

    start: reads what is in none of them, to which the masks in `storage` are then applied; default: the dense model's values.
    """
    originals = dict(dense.model.named_parameters())

    def copies(names: list[str]) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, originals[name].detach().clone()) for name in names)

    start = start or (dense.lazy.read if dense.lazy else copies)
    holders: dict[str, list[Matrix]] = {}  # matrices by the name of the parameter that they are in

    def newest() -> ChainMap:
        return ChainMap(*map(storage.tensors, phases))

    def read(names: list[str]) -> Iterator[tuple[str, Tensor]]:
        known = newest()
        yield from ((name, known[name].clone()) for name in names if name in known)
        yield from start([name for name in names if name not in known])

    def mask(names: list[str]) -> None:
        for matrix in (matrix for name in names if name not in newest() for matrix in holders.get(name, ())):
            if matrix.name in storage.masks:
                matrix.weight.data.masked_fill_(~storage.masks[matrix.name], 0.0)

    lazy = Lazy(second(dense.model), read, mask)
    for name, value in storage.tensors("prune").items():  # such as biases that the dense model does not have
        lazy.add(name, value.shape)
    made = decompose(lazy.model, like=dense, lazy=lazy)
    for matrix in made.matrices().values():
        holders.setdefault(matrix.parameter_name, []).append(matrix)
    return made
