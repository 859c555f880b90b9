"""The weights of a student that stays on disk: what the steps of a run have made of the weights that it starts from."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from recon.model.decoder import Decoder
from recon.model.discovery import take_apart
from recon.model.matrices import Matrix
from recon.model.skeleton import Lazy, second
from recon.runtime.journal import StepFiles
from recon.runtime.weights import Checkpoint, rounded

Read = Callable[[list[str]], Iterator[tuple[str, Tensor]]]  # gives parameters by full name, float32, not shared with anything


class StudentWeights:
    """Reads each parameter of the student in its newest version.

    These are, newest first: reconstructed (in a finished shard of the checkpoint, or beside it where rounding changed the value),
    pruned (where pruning did more than set weights to zero), and else those that the student starts from, with the masks applied.

    Args:
        files: of the run's finished steps.
        dtype: what shards are written in.
    """

    def __init__(self, files: StepFiles, dtype: torch.dtype):
        self._files, self._dtype = files, dtype
        self._shards: list[str] = []  # files
        self._exact: dict[str, str] = {}  # parameter -> the file with its value before it was rounded
        self._pruned: dict[str, str] = {}  # parameter -> its file
        self._count = 0  # shards that there will be
        self._rounded: Collection[str] = ()
        self._lazy: Lazy | None = None
        self._reconstructed: Checkpoint | None = None

    def decoder(self, dense: Decoder, start: Read, masks: Mapping[str, Tensor], shards: int, rounded: Collection[str]) -> Decoder:
        """The student: a second skeleton beside `dense`.

        Args:
            start: reads the weights that the student starts from.
            masks: of the run, by matrix name.
            shards: how many the checkpoint will have.
            rounded: names of parameters that are rounded to the dtype of the shards whenever something is computed with them.
        """
        self._count, self._rounded, self._start, self._masks = shards, rounded, start, masks
        self._matrices: dict[str, list[Matrix]] = {}  # by the name of the parameter that they are in
        self._lazy = Lazy(second(dense.model), self._read, self._apply_masks)
        self._admit(self._pruned)
        decoder = take_apart(self._lazy.model, like=dense, lazy=self._lazy)
        for matrix in decoder.matrices().values():
            self._matrices.setdefault(matrix.parameter_name, []).append(matrix)
        return decoder

    def write(self, shard: dict[str, Tensor], keep_exact: bool) -> dict:
        """Writes the next shard of the checkpoint; returns what the journal is to say of its files.

        keep_exact: whether the run still computes with these parameters, and needs them as they are.
        """
        number = len(self._shards) + 1
        stored = {name: rounded(name, tensor, self._dtype) for name, tensor in shard.items()}
        entries = revert_weight_conversion(self._lazy.model, stored)
        noted = {"shard": self._files.write(f"checkpoint/model-{number:05}-of-{self._count:05}.safetensors", entries)}
        exact = {name: shard[name] for name in shard.keys() - self._rounded if _differs(stored[name], shard[name])}
        if exact and keep_exact:
            noted["exact"] = self._files.write(f"exact/{number:05}.safetensors", exact, names=list(exact))
        return noted

    def take(self, entry: dict) -> None:
        """Reads the weights of a finished step from its files from now on."""
        pruned = entry.get("weights", {}).get("names", ())
        self._pruned |= dict.fromkeys(pruned, entry.get("weights", {}).get("file"))
        if self._lazy is not None:
            self._admit(pruned)
        self._exact |= dict.fromkeys(entry.get("exact", {}).get("names", ()), entry.get("exact", {}).get("file"))
        if "shard" in entry:
            self._shards.append(entry["shard"]["file"])
            if self._reconstructed is not None:
                self._reconstructed.add(self._files.folder / self._shards[-1])

    def _admit(self, pruned: Iterable[str]) -> None:
        """Gives the student those of the `pruned` parameters that the dense model does not have, such as biases."""
        added = [name for name in pruned if self._lazy.add(name, self._files.tensor(self._pruned[name], name).shape)]
        if added or self._reconstructed is None:
            self._reconstructed = Checkpoint(self._lazy.model, [self._files.folder / file for file in self._shards])

    def _read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        done = [name for name in names if name in self._reconstructed]
        files = {name: self._pruned[name] for name in names if name in self._pruned and name not in self._reconstructed}
        yield from self._reconstructed.read(name for name in done if name not in self._exact)
        files |= {name: self._exact[name] for name in done if name in self._exact}
        for name, file in files.items():
            yield name, self._files.tensor(file, name).clone()
        yield from self._start([name for name in names if name not in {*done, *files}])

    def _apply_masks(self, names: list[str]) -> None:
        """Sets weights that the masks drop to zero; those that were pruned or reconstructed have their zeros already."""
        for name in names:
            if name not in self._reconstructed and name not in self._pruned:
                for matrix in self._matrices.get(name, ()):
                    if matrix.name in self._masks:
                        matrix.weight.data.masked_fill_(~self._masks[matrix.name], 0.0)


def _differs(stored: Tensor, tensor: Tensor) -> bool:
    """Whether rounding changed a value."""
    return stored is not tensor and not torch.equal(stored.to(tensor.dtype), tensor)
