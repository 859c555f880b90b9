"""The weights of a student that stays on disk: what the steps of a run have made of the weights that it starts from."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor

from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.model.matrices import Matrix
from recon.model.skeleton import Lazy, second
from recon.runtime.journal import StepFiles
from recon.runtime.weights import Checkpoint

Read = Callable[[list[str]], Iterator[tuple[str, Tensor]]]  # gives parameters by full name, float32, not shared with anything


class StudentWeights:
    """The student, `decoder`: a second skeleton beside the dense one, whose parameters are read in their newest version.

    These are, newest first: reconstructed (in a finished shard of the checkpoint, or beside it where rounding changed the value),
    pruned (where pruning did more than set weights to zero), and else those that the student starts from, with the masks applied.

    Args:
        files: of the run's finished steps.
        masks: of the run, by matrix name.
        start: reads the weights that the student starts from.
        pruned: the student as pruning left it, whatever was reconstructed since.
    """

    def __init__(self, files: StepFiles, masks: Mapping[str, Tensor], dense: Decoder, start: Read, pruned: bool = False):
        self._files, self._masks, self._start, self._pruned = files, masks, start, pruned
        self._lazy = Lazy(second(dense.model), self._read, self._apply_masks)
        self._admit(files.places["weights"])
        self.decoder = decompose(self._lazy.model, like=dense, lazy=self._lazy)
        self._matrices: dict[str, list[Matrix]] = {}  # by the name of the parameter that they are in
        for matrix in self.decoder.matrices().values():
            self._matrices.setdefault(matrix.parameter_name, []).append(matrix)

    def take(self, entry: dict) -> None:
        """Reads from the files of one more finished step, which `files` knows already, from now on."""
        if "weights" in entry:
            self._admit(entry["weights"]["names"])
        elif "shard" in entry:
            self._reconstructed.add(self._files.folder / entry["shard"]["file"])

    def _admit(self, pruned: Iterable[str]) -> None:
        """Gives the student those of the `pruned` parameters that the dense model does not have, such as biases."""
        for name in pruned:
            self._lazy.add(name, self._files.tensor("weights", name).shape)
        shards = [] if self._pruned else [self._files.folder / noted["file"] for noted in self._files.shards]
        self._reconstructed = Checkpoint(self._lazy.model, shards)

    def _newest(self, name: str) -> str | None:
        """The kind of file with the newest version of parameter `name`; None: it is as at the start, but for its mask."""
        if name in self._files.places["exact"] and not self._pruned:
            return "exact"
        if name in self._reconstructed:
            return "shard"
        return "weights" if name in self._files.places["weights"] else None

    def _read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        kinds = {name: self._newest(name) for name in names}
        yield from self._reconstructed.read(name for name, kind in kinds.items() if kind == "shard")
        for name, kind in kinds.items():
            if kind in ("exact", "weights"):
                yield name, self._files.tensor(kind, name).clone()
        yield from self._start([name for name, kind in kinds.items() if kind is None])

    def _apply_masks(self, names: list[str]) -> None:
        """Sets weights that the masks drop to zero; those that were pruned or reconstructed have their zeros already."""
        for name in names:
            if self._newest(name) is None:
                for matrix in self._matrices.get(name, ()):
                    if matrix.name in self._masks:
                        matrix.weight.data.masked_fill_(~self._masks[matrix.name], 0.0)
