"""A student whose weights are read in their newest version: what the finished windows of a run have made of those at the start."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.model.matrices import Matrix
from recon.model.skeleton import Lazy, Read, second
from recon.runtime.storage import Storage


def student(
    dense: Decoder, storage: Storage, start: Read | None = None, phases: Sequence[str] = ("reconstruct", "prune")
) -> Decoder:
    """A skeleton beside `dense`, each parameter of which is that of the first of `phases` to have it in `storage`.

    start: reads what is in none of them, as `recon.model.skeleton.Lazy` asks for it, to which the masks in `storage` are applied; default: the dense model's.
    """
    originals = dict(dense.model.named_parameters())

    def copies(names: list[str]) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, originals[name].detach().clone()) for name in names)

    start = start or (dense.lazy.read if dense.lazy else copies)
    holders: dict[str, list[Matrix]] = {}  # matrices by the name of the parameter that they are in

    def newest(name: str) -> Tensor | None:
        return next((storage.tensors(phase)[name] for phase in phases if name in storage.tensors(phase)), None)

    def read(names: list[str]) -> Iterator[tuple[str, Tensor]]:
        left = []
        for name in names:
            if (value := newest(name)) is None:
                left.append(name)
            else:
                yield name, value.clone()
        yield from start(left)

    def mask(names: list[str]) -> None:
        for matrix in (matrix for name in names if newest(name) is None for matrix in holders.get(name, ())):
            if matrix.name in storage.masks:
                matrix.weight.data.masked_fill_(~storage.masks[matrix.name], 0.0)

    lazy = Lazy(second(dense.model), read, mask)
    for name, value in storage.tensors("prune").items():  # such as biases that the dense model does not have
        lazy.add(name, value.shape)
    made = decompose(lazy.model, like=dense, lazy=lazy)
    for matrix in made.matrices().values():
        holders.setdefault(matrix.parameter_name, []).append(matrix)
    return made
