"""What a run keeps while it works: masks, repaired weights, activations, and which steps are finished."""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recon.errors import ReconError
from recon.model.decoder import Decoder
from recon.model.matrices import Matrix
from recon.model.skeleton import Lazy, second
from recon.runtime.activations import STREAM, Spill
from recon.runtime.journal import Journal
from recon.runtime.storage import SLOW, sha256, sync, write_safetensors
from recon.runtime.weights import Checkpoint, as_stored, rounded

log = logging.getLogger("recon")
KEPT = ("masks", "weights", "shard", "exact")  # what an entry of the journal may say of the files of a step, beside activations
FOLDERS = ("masks", "pruned", "activations", "checkpoint", "exact")
SAVE = "remainder"  # the phase that writes what is in no window: nothing is computed with what it writes


class MemoryStore:
    """The work of a run whose model is in memory: nothing of it outlives the process. See `FolderStore` for the other kind."""

    def __init__(self):
        self.masks: MutableMapping[str, Tensor] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype, pinned: bool = False) -> Tensor:
        """A tensor on the CPU for activations, or for weights that are put aside.

        pinned: in memory that a GPU can read by itself, unless it is in a file.
        """
        return torch.empty(shape, dtype=dtype, pin_memory=pinned)

    def finished(self, phase: str) -> list:
        """What the finished steps of `phase` found, in their order."""
        return []

    def streams(self, phase: str) -> dict[str, Tensor]:
        """The activations that the next step of `phase` starts from, by name."""
        return {}

    def finish(
        self,
        phase: str,
        found: object,
        streams: dict[str, Tensor | None] | None = None,
        weights: dict[str, Tensor] | None = None,
        shard: dict[str, Tensor] | None = None,
    ) -> None:
        """Ends one step of `phase`, with the masks that were set since the last one.

        Args:
            found: what `finished` is to tell of it, as JSON can hold it.
            streams: activations that the next step starts from; they are not changed any more.
            weights: parameters by full name as pruning left them, where it did more than to set some to zero.
            shard: parameters by full name in their final state, which later steps read, but for those that `save` writes.
        """


class FolderStore(MemoryStore):
    """The work of a streamed run, in a folder: after a kill at any moment, a run of the same fingerprint goes on from the last step.

    A step is finished when the journal says so, which it does once all that belongs to the step is on the disk. Files get their
    names when they are complete, and activations go only after the next step's are noted; what else lies in
    the folder is swept away when it is opened.

        journal.jsonl    which run this is, and its finished steps
        masks/           per block, the masks of its matrices, 8 weights to the byte
        pruned/          per block, its weights as pruning left them, where it changed more than it zeroed
        activations/     what the next step starts from
        checkpoint/      finished shards, and in the end the whole checkpoint
        exact/           per shard that is saved rounded, what the run itself goes on with where that is not the same

    Args:
        journal: the run's; its folder is made where it does not exist.
        dtype: what shards are written in.

    Raises:
        ReconError: the folder is damaged, or cannot be written.
    """

    def __init__(self, journal: Journal, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype = dtype
        self.rounded: set[str] = set()  # parameters that are rounded to that dtype whenever something is computed with them
        self.exact: dict[str, str] = {}  # parameter -> the file with what it was before it was rounded
        self.journal, self.folder = journal, journal.path.parent
        folder = self.folder
        self.spill = Spill(folder / "activations")
        self.masks = _Masks(self)
        self.columns: dict[str, tuple[str, int]] = {}  # of a mask: the file that it is in, and its columns
        self.pruned: dict[str, str] = {}  # parameter -> the file that it is in
        self.shards: list[str] = []
        self.of = 0  # shards that there will be
        self.repaired: Checkpoint | None = None
        self.lazy: Lazy | None = None  # of the student
        self._kept: dict[str, tuple[Tensor, dict]] = {}  # stream -> what is in hand of it, and what is noted of its file
        self._open: dict[str, object] = {}
        kept = [entry[kind] for entry in self.journal.entries for kind in KEPT if kind in entry]
        if (size := sum(noted["size"] for noted in kept)) > SLOW:
            log.info("checking %.1f GiB that this run has written before", size / 2**30)
        for noted in kept:
            self._check(noted)
        for entry in self.journal.entries:
            self._take(entry)
        try:
            for name in FOLDERS:
                (folder / name).mkdir(parents=True, exist_ok=True)
            self._sweep()
            sync(folder)
            sync(folder.parent)
        except OSError as error:
            raise self._unwritten(error) from error

    # --- steps ----------------------------------------------------------------------------------------------------

    def finished(self, phase: str) -> list:
        return self.journal.finished(phase)

    def streams(self, phase: str) -> dict[str, Tensor]:
        found = {}
        for name, noted in self._last(phase).get("streams", {}).items():
            if noted is not None:
                self._check(noted)
                with safe_open(self.folder / noted["file"], framework="pt") as opened:
                    stored = opened.get_tensor(STREAM)
                    # A copy: tensors in a file begin where they please, which can show in the last bits of what is computed.
                    found[name] = self.empty(stored.shape, stored.dtype).copy_(stored)
                self._kept[name] = found[name], noted
        return found

    def finish(self, phase, found, streams=None, weights=None, shard=None) -> None:
        number = len(self.finished(phase))
        entry = {"phase": phase, "found": found}
        before = self._stream_files(self._last(phase))
        try:
            if self.masks.pending:
                columns = {name: mask.shape[1] for name, mask in self.masks.pending.items()}
                packed = {name: _pack(mask) for name, mask in self.masks.pending.items()}
                name = f"masks/{number:05}.safetensors"
                write_safetensors(self.folder / name, packed)
                entry["masks"] = self._noted(name) | {"columns": columns}
            if weights:
                name = f"pruned/{number:05}.safetensors"
                write_safetensors(self.folder / name, weights)
                entry["weights"] = self._noted(name) | {"names": list(weights)}
            if shard:
                name = f"checkpoint/model-{len(self.shards) + 1:05}-of-{self.of:05}.safetensors"
                stored = {name: rounded(name, tensor, self.dtype) for name, tensor in shard.items()}
                write_safetensors(self.folder / name, as_stored(self.repaired.model, stored))
                entry["shard"] = self._noted(name)
                exact = {name: shard[name] for name in shard.keys() - self.rounded if _differs(stored[name], shard[name])}
                if exact and phase != SAVE:
                    name = f"exact/{len(self.shards) + 1:05}.safetensors"
                    write_safetensors(self.folder / name, exact)
                    entry["exact"] = self._noted(name) | {"names": list(exact)}
            if streams is not None:
                entry["streams"] = {name: self._keep(phase, number, name, tensor) for name, tensor in streams.items()}
            self.journal.add(entry)
        except (OSError, SafetensorError) as error:  # a full disk is either, by what was being written
            raise self._unwritten(error) from error
        self._take(entry)
        self.masks.pending.clear()
        for file in before - self._stream_files(entry):
            (self.folder / file).unlink(missing_ok=True)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, pinned: bool = False) -> Tensor:
        try:
            return self.spill.empty(shape, dtype, pinned)
        except OSError as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: Exception) -> ReconError:
        return ReconError(
            f"work folder {str(self.folder)!r} cannot be written: {error}. What is finished is kept: with room on the disk, the same "
            "command goes on from there"
        )

    def _noted(self, name: str) -> dict:
        """What the journal says of a file that is written, for `_check`."""
        path = self.folder / name
        return {"file": name, "size": path.stat().st_size, "sha256": sha256(path)}

    def _keep(self, phase: str, number: int, name: str, stream: Tensor | None) -> dict | None:
        """What the journal says of the file that `stream` is in, which is written where it is not yet."""
        kept, noted = self._kept.pop(name, (None, None))
        if stream is None:
            return None
        if kept is not stream:
            file = f"activations/{phase}-{name}-{number:05}.safetensors"
            self.spill.keep(stream, self.folder / file)
            noted = self._noted(file)
        self._kept[name] = stream, noted
        return noted

    @staticmethod
    def _stream_files(entry: dict) -> set[str]:
        return {noted["file"] for noted in entry.get("streams", {}).values() if noted}

    def _last(self, phase: str) -> dict:
        return next((entry for entry in reversed(self.journal.entries) if entry["phase"] == phase), {})

    def _take(self, entry: dict) -> None:
        """Counts on the files of a finished step from now on."""
        for name, columns in entry.get("masks", {}).get("columns", {}).items():
            self.columns[name] = entry["masks"]["file"], columns
        for name in entry.get("weights", {}).get("names", ()):
            self.pruned[name] = entry["weights"]["file"]
        if self.lazy is not None:
            self._take_in(entry.get("weights", {}).get("names", ()))
        for name in entry.get("exact", {}).get("names", ()):
            self.exact[name] = entry["exact"]["file"]
        if "shard" in entry:
            self.shards.append(entry["shard"]["file"])
            if self.repaired is not None:
                self.repaired.add(self.folder / self.shards[-1])

    def _take_in(self, names: Iterable[str]) -> None:
        """Gives the student those of the pruned parameters `names` that the dense model does not have, such as biases."""
        fresh = [name for name in names if self.lazy.add(name, self.tensor(self.pruned[name], name).shape)]
        if fresh or self.repaired is None:
            self.repaired = Checkpoint(self.lazy.model, [self.folder / file for file in self.shards])

    def _check(self, noted: dict) -> None:
        """Raises `ReconError` where a file of a finished step is not what was written."""
        path = self.folder / noted["file"]
        size = path.stat().st_size if path.exists() else None
        if size != noted["size"] or sha256(path) != noted["sha256"]:
            wrong = "is missing" if size is None else "has changed since it was written"
            raise ReconError(f"{str(path)!r} {wrong}; delete {str(self.folder)!r} to begin anew")

    def _sweep(self) -> None:
        """Deletes what steps that were not finished left."""
        counted = {self.folder / self.journal.path.name}
        for entry in self.journal.entries:
            counted |= {self.folder / entry[kind]["file"] for kind in KEPT if kind in entry}
        for phase in {entry["phase"] for entry in self.journal.entries}:
            counted |= {self.folder / file for file in self._stream_files(self._last(phase))}
        for name in FOLDERS:
            for path in (self.folder / name).iterdir():
                if path.is_dir():  # of a tokenizer, in the checkpoint
                    shutil.rmtree(path)
                elif path not in counted:
                    path.unlink()

    # --- the weights that the run has come to ---------------------------------------------------------------------

    def tensor(self, file: str, name: str) -> Tensor:
        """One tensor of a file of this folder, mapped; not to be changed in place."""
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file].get_tensor(name)

    def student(self, dense: Decoder, start: Callable[[list[str]], Iterator[tuple[str, Tensor]]]) -> Decoder:
        """A second skeleton beside `dense`, whose weights are what this run has made so far of those that `start` reads."""
        model = second(dense.model)
        held: dict[str, list[Matrix]] = {}

        def read(names: list[str]) -> Iterator[tuple[str, Tensor]]:
            repaired = [name for name in names if name in self.repaired]
            pruned = [name for name in names if name in self.pruned and name not in self.repaired]
            yield from self.repaired.read(name for name in repaired if name not in self.exact)
            for name in repaired:
                if name in self.exact:
                    yield name, self.tensor(self.exact[name], name).clone()
            for name in pruned:
                yield name, self.tensor(self.pruned[name], name).clone()
            yield from start([name for name in names if name not in {*repaired, *pruned}])

        def done(names: list[str]) -> None:
            for name in names:
                if name not in self.repaired and name not in self.pruned:
                    for matrix in held.get(name, ()):
                        if matrix.name in self.masks:
                            matrix.weight.data.masked_fill_(~self.masks[matrix.name], 0.0)

        self.lazy = Lazy(model, read, done)
        self._take_in(self.pruned)
        decoder = Decoder(model, like=dense, lazy=self.lazy)
        for matrix in decoder.matrices().values():
            held.setdefault(matrix.parameter_name, []).append(matrix)
        return decoder


class _Masks(MutableMapping):
    """The masks of a run by matrix name, bool (out, in): those set since the last finished step, and those in its files."""

    def __init__(self, store: FolderStore):
        self.store = store
        self.pending: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self.pending:
            return self.pending[name]
        file, columns = self.store.columns[name]
        return _unpack(self.store.tensor(file, name), columns)

    def __setitem__(self, name: str, mask: Tensor) -> None:
        self.pending[name] = mask

    def __delitem__(self, name: str) -> None:
        del self.pending[name]

    def __contains__(self, name: object) -> bool:
        return name in self.pending or name in self.store.columns

    def __iter__(self) -> Iterator[str]:
        return iter({**self.store.columns, **self.pending})

    def __len__(self) -> int:
        return len({**self.store.columns, **self.pending})


def _differs(stored: Tensor, tensor: Tensor) -> bool:
    """Whether `stored` is not `tensor` in another dtype, number for number."""
    return stored is not tensor and not torch.equal(stored.to(tensor.dtype), tensor)


def _pack(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=1))


def _unpack(packed: Tensor, columns: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=columns).view(np.bool_))
