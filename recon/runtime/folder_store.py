"""A store in a folder, from which a killed run goes on."""

import contextlib
import logging
from collections import ChainMap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from recon.errors import ReconError
from recon.model.decoder import Decoder
from recon.runtime.activations import STREAM, Spill
from recon.runtime.journal import Journal, StepFiles
from recon.runtime.storage import SLOW
from recon.runtime.student import StudentWeights
from recon.runtime.weights import rounded

log = logging.getLogger("recon")
KINDS = ("masks", "weights", "shard", "exact")  # of the files of a step, beside activations
FOLDERS = ("masks", "pruned", "activations", "checkpoint", "exact")
SAVE = "remainder"  # the phase that writes what is in no window: nothing is computed with what it writes


class FolderStore:
    """The `Store` of a streamed run, in a folder: a run that was killed at any moment goes on from its last finished step.

    A step is finished once the journal says so. The journal says so once all files of the step are on the disk. The activations
    that a step started from are deleted only after that. Opening the folder deletes whatever an unfinished step left.

        journal.jsonl    which run this is, and its finished steps
        masks/           per block, the masks of its matrices, 8 weights to the byte
        pruned/          per block, its weights as pruning left them, if pruning did more than set some to zero
        activations/     what the next step starts from
        checkpoint/      finished shards, and in the end the whole checkpoint
        exact/           where rounding changed what a shard holds: the unrounded values, which the run goes on with

    Args:
        journal: the run's; its folder is made if need be.
        dtype: what shards are written in.

    Raises:
        ReconError: the folder is damaged, or cannot be written.
    """

    def __init__(self, journal: Journal, dtype: torch.dtype = torch.float32):
        self.journal, self.folder, self.dtype = journal, journal.path.parent, dtype
        self.files = StepFiles(self.folder)
        self._pending: dict[str, Tensor] = {}  # masks that were set since the last finished step
        self.masks = ChainMap(self._pending, _StoredMasks(self.files))
        self._weights: StudentWeights | None = None
        self._spill = Spill(self.folder / "activations")
        self._kept: dict[str, tuple[Tensor, dict]] = {}  # stream -> its tensor, and what the journal says of its file
        written = [entry[kind] for entry in journal.entries for kind in KINDS if kind in entry]
        if (size := sum(noted["size"] for noted in written)) > SLOW:
            log.info("checking %.1f GiB that this run has written before", size / 2**30)
        for noted in written:
            self.files.check(noted)
        for entry in journal.entries:
            self._take(entry)
        last = [self._last(phase) for phase in {entry["phase"] for entry in journal.entries}]
        with self._writing():
            self.files.sweep(FOLDERS, {noted["file"] for noted in written}.union(*map(_stream_files, last)))

    def new_masks(self) -> None:
        pass  # a folder belongs to one run

    def finished(self, phase: str) -> list:
        return self.journal.finished(phase)

    def streams(self, phase: str) -> dict[str, Tensor]:
        found = {}
        for name, noted in self._last(phase).get("streams", {}).items():
            if noted is not None:
                self.files.check(noted)
                with safe_open(self.folder / noted["file"], framework="pt") as opened:
                    stored = opened.get_tensor(STREAM)
                    # A copy: tensors in a file may begin anywhere, which can change the last bits of what is computed.
                    found[name] = self.empty(stored.shape, stored.dtype).copy_(stored)
                self._kept[name] = found[name], noted
        return found

    def finish(self, phase, found, streams=None, weights=None, shard=None) -> None:
        number, last = len(self.finished(phase)), self._last(phase)
        entry = {"phase": phase, "found": found}
        with self._writing():
            if self._pending:
                columns = {name: mask.shape[1] for name, mask in self._pending.items()}
                packed = {name: torch.from_numpy(np.packbits(mask.cpu().numpy(), 1)) for name, mask in self._pending.items()}
                entry["masks"] = self.files.write(f"masks/{number:05}.safetensors", packed, names=columns)
            if weights:
                entry["weights"] = self.files.write(f"pruned/{number:05}.safetensors", weights, names=list(weights))
            if shard:
                entry |= self._write_shard(shard, keep_exact=phase != SAVE)
            if streams is not None:
                entry["streams"] = {name: self._keep(f"{phase}-{name}-{number:05}", name, each) for name, each in streams.items()}
            self.journal.add(entry)
        self._take(entry)
        for file in _stream_files(last) - _stream_files(entry):
            (self.folder / file).unlink(missing_ok=True)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, pinned: bool = False) -> Tensor:
        with self._writing():
            return self._spill.empty(shape, dtype, pinned)

    def student(
        self,
        dense: Decoder,
        start: Callable[[list[str]], Iterator[tuple[str, Tensor]]],
        shards: int,
        computed_rounded: Collection[str] = (),
    ) -> Decoder:
        """The student, a second skeleton beside `dense`; see `recon.runtime.student.StudentWeights`.

        Args:
            start: reads the weights that the student starts from.
            shards: how many the checkpoint will have.
            computed_rounded: names of parameters that are rounded to the dtype of the shards whenever something is computed with them.
        """
        self._count, self._computed_rounded = shards, computed_rounded
        self._start = dense, start
        self._weights = StudentWeights(self.files, self.masks, *self._start)
        return self._weights.decoder

    def pruned(self) -> Decoder:
        """The student as pruning left it, whatever was reconstructed since."""
        return StudentWeights(self.files, self.masks, *self._start, pruned=True).decoder

    def _write_shard(self, shard: dict[str, Tensor], keep_exact: bool) -> dict:
        """Writes the next shard of the checkpoint; returns what the journal is to say of its files.

        keep_exact: whether the run still computes with these parameters, and needs them as they are.
        """
        number = len(self.files.shards) + 1
        stored = {name: rounded(name, tensor, self.dtype) for name, tensor in shard.items()}
        entries = revert_weight_conversion(self._weights.decoder.model, stored)
        noted = {"shard": self.files.write(f"checkpoint/model-{number:05}-of-{self._count:05}.safetensors", entries)}
        needed = shard.keys() - self._computed_rounded if keep_exact else ()
        if exact := {name: shard[name] for name in needed if not torch.equal(stored[name].to(shard[name].dtype), shard[name])}:
            noted["exact"] = self.files.write(f"exact/{number:05}.safetensors", exact, names=list(exact))
        return noted

    def _keep(self, file: str, name: str, stream: Tensor | None) -> dict | None:
        """What the journal says of the file that `stream` is in, which is written unless it is that of the step before."""
        kept, noted = self._kept.pop(name, (None, None))
        if stream is None:
            return None
        if kept is not stream:
            file = f"activations/{file}.safetensors"
            self._spill.keep(stream, self.folder / file)
            noted = self.files.noted(file)
        self._kept[name] = stream, noted
        return noted

    def _last(self, phase: str) -> dict:
        """What the journal says of the last finished step of `phase`."""
        return next((entry for entry in reversed(self.journal.entries) if entry["phase"] == phase), {})

    def _take(self, entry: dict) -> None:
        """Reads from the files of a finished step from now on."""
        self.files.take(entry)
        self._pending.clear()
        if self._weights is not None:
            self._weights.take(entry)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:  # a full disk raises either
            raise ReconError(
                f"work folder {str(self.folder)!r} cannot be written: {error}. What is finished is kept: with room on the disk, the "
                "same command goes on from there"
            ) from error


def _stream_files(entry: dict) -> set[str]:
    """The files of the activations that a step left."""
    return {noted["file"] for noted in entry.get("streams", {}).values() if noted}


class _StoredMasks(Mapping):
    """The masks in the files of finished steps by matrix name, bool (out, in)."""

    def __init__(self, files: StepFiles):
        self._files, self._places = files, files.places["masks"]

    def __getitem__(self, name: str) -> Tensor:
        columns, packed = self._places[name]["names"][name], self._files.tensor("masks", name)
        return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=columns).view(np.bool_))

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
