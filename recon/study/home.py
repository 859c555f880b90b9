"""Where the models of a run live, and what it has finished: in memory, or on disk, where a killed run goes on."""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recon.data import files, models
from recon.errors import ReconError
from recon.methods import external_mask
from recon.methods import prune as pruning
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.model.skeleton import Lazy
from recon.runtime import device
from recon.runtime.execution import Execution
from recon.runtime.folder_store import FolderStore
from recon.runtime.journal import Journal, differences
from recon.runtime.storage import write_json
from recon.runtime.store import MemoryStore, Store
from recon.runtime.weights import Checkpoint
from recon.study import checkpoint, unfinished
from recon.study.environment import environment
from recon.study.record import RunRecord
from recon.study.session import Session
from recon.study.spec import RunOptions, RunSpec

log = logging.getLogger("recon")
RECORD = "record"  # the last phase of a streamed run: its one step holds the record
Step = tuple[dict, dict[str, Tensor]]  # what a step found, as JSON can hold it, and activations to keep with it


@dataclass(frozen=True)
class Pruned:
    """A pruned state, and what it took."""

    pruning: pruning.Pruning
    seconds: float
    peak: int  # bytes


class Home(Protocol):
    """Where the models of one run live, and what it has finished. `store`: what its passes keep things in."""

    streamed: bool
    store: Store

    def locked(self) -> contextlib.AbstractContextManager:
        """Context of the whole run, in which no other process can do the same run."""

    def finished(self) -> RunRecord | None:
        """The record, where this very run is done already and its model, if any, is saved; else None."""

    def load(self) -> tuple[Decoder, PreTrainedTokenizerBase]:
        """The dense model and its tokenizer."""

    def open(self) -> dict:
        """Begins, once nothing can be refused any more; returns what the record's environment says of this home."""

    def student(self, external: Checkpoint | None) -> Decoder:
        """The model to be pruned: a copy of the dense one, or `external` where that may replace it at once."""

    def step(self, name: str, key: object, compute: Callable[[], Step]) -> Step:
        """`compute()`, unless it is known: from before the run was killed, or from a run of the session with the same `key`.

        key: what decides the result; None where no other run has the same.
        """

    def pruned(self, key: object, student: Decoder, prune: Callable[[], Pruned]) -> Pruned:
        """Prunes the student in place by `prune`, or as that did in a run of the session with the same `key`."""

    def knows_pruned(self, key: object) -> bool:
        """Whether `pruned` would give what a run of the session found."""

    def pruned_on_the_way(self, key: object, found: Pruned) -> Decoder:
        """The pruned model, where reconstruction pruned it window by window and found this; other runs may then take it as `pruned`."""

    def take_mask(self, student: Decoder, external: Checkpoint, execution: Execution) -> pruning.Pruning:
        """Gives the student the weights of an external pruned model; its mask is wherever these are zero."""

    def saving(self, record: RunRecord) -> contextlib.AbstractContextManager[Path | None]:
        """Context that gives the folder to `write` to, or None; at its end, the record is complete and both are put in their place."""

    def write(self, student: Decoder, folder: Path, record: RunRecord) -> None:
        """Writes the checkpoint."""

    def clear(self) -> None:
        """Deletes what is of no use once the run is done and callbacks have its record."""


class InMemory:
    """Both models are in memory; what runs have in common is shared by the session."""

    streamed = False

    def __init__(self, spec: RunSpec, options: RunOptions, session: Session):
        self.spec, self.options, self.session = spec, options, session
        self.store = MemoryStore(keeps_weights=True)

    def locked(self) -> contextlib.AbstractContextManager:
        return checkpoint.locked(self.options.save) if self.options.save else contextlib.nullcontext()

    def finished(self) -> RunRecord | None:
        save = self.options.save
        return checkpoint.finished(save, self.spec.key(), self.options.save_dtype) if save else None

    def load(self) -> tuple[Decoder, PreTrainedTokenizerBase]:
        self.dense, self.tokenizer = self.session.load(*self.spec.loaded_by)
        return self.dense, self.tokenizer

    def open(self) -> dict:
        return {}

    def student(self, external: Checkpoint | None) -> Decoder:
        return decompose(copy.deepcopy(self.dense.model), like=self.dense)

    def step(self, name: str, key: object, compute: Callable[[], Step]) -> Step:
        return compute() if key is None else self.session.keep(name, key, compute)

    def pruned(self, key: object, student: Decoder, prune: Callable[[], Pruned]) -> Pruned:
        found, weights = self.session.keep("pruned", key, lambda: (prune(), self.store.weights))
        pruning.apply(student, found.pruning, weights)
        return found

    def knows_pruned(self, key: object) -> bool:
        return self.session.holds("pruned", key)

    def pruned_on_the_way(self, key: object, found: Pruned) -> Decoder:
        self.session.keep("pruned", key, lambda: (found, self.store.weights))
        return pruning.pruned_copy(self.dense, found.pruning, self.store.weights)

    def take_mask(self, student: Decoder, external: Checkpoint, execution: Execution) -> pruning.Pruning:
        found, dense = external_mask.take_over(student, external), self.dense.matrices()
        for name, matrix in student.matrices().items():
            if not torch.equal(matrix.weight, dense[name].weight * found.masks[name]):
                self.store.weights.setdefault(matrix.parameter_name, matrix.parameter.detach().clone())
        return found

    @contextlib.contextmanager
    def saving(self, record: RunRecord) -> Iterator[Path | None]:
        if self.options.save is None:
            yield None
            return
        with checkpoint.writing(self.options.save) as folder:
            yield folder
            write_json(folder / files.RECORD, record.to_dict())

    def write(self, student: Decoder, folder: Path, record: RunRecord) -> None:
        checkpoint.write(student.model, self.tokenizer, folder, record, self.options)

    def clear(self) -> None:
        pass


class OnDisk:
    """Both models are on disk, and read window by window; finished steps are in a journal, from which a killed run goes on.

    In memory, in float32 unless it says otherwise, there are:

    - pruning: one block, its matrices once more rounded to the compute dtype, and the statistics of their inputs (Gram matrices
      where the criterion asks for them);
    - reconstruction: the dense window with its matrices rounded, while targets are computed; then the window in hand,
      its gradients, AdamW's two moments, and its masks (2 bytes a weight on CPUs);
    - evaluation: one block and its rounded matrices; then the head, likewise;
    - the embedding, while tokens are embedded;
    - of one mini-batch, the activations inside the window.

    Activations of all samples, and what a window was before it is fitted, are in mapped files where they are larger than
    `recon.runtime.activations.SMALL`; so are the models' own files. The system keeps these in memory while there is room. The
    folder holds, see `FolderStore`, the reconstructed weights, the masks (1 bit a weight), and two to four streams of activations.
    Where weights are saved rounded, it also holds, until the run is done, those in float32 that are computed with unrounded: norms
    and biases if products are in the dtype that is saved, else all.

    The folder is `<save>.unfinished`, or where nothing is saved, one in the user's cache that is named by the run's key; see
    `recon.study.unfinished`. It is deleted when the run is done.
    """

    streamed = True

    def __init__(self, spec: RunSpec, options: RunOptions, session: Session):
        self.spec, self.options, self.session = spec, options, session
        self.device = device.pick_device(spec.compute.device)
        self.dtype = device.pick_compute_dtype(spec.compute.compute_dtype, self.device)
        self.key = spec.key()
        self.folder = unfinished.folder_of(self.key, options.save)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        save = self.options.save
        with checkpoint.locked(save) if save else unfinished.locked(self.key):
            decisive = {"spec": self.spec.decisive(), **self.spec.sources()}
            computed = {"device": self.device.type, "compute_dtype": str(self.dtype), "save_dtype": self.options.save_dtype}
            self.journal = Journal(self.folder / unfinished.JOURNAL, decisive | computed)
            try:
                yield
            except ReconError:
                # Refused before anything was finished: the folder would stand in the way of another try.
                if all(entry["phase"] == "opened" for entry in self.journal.entries):
                    with contextlib.suppress(OSError):
                        unfinished.delete(self.folder)
                raise

    def finished(self) -> RunRecord | None:
        save = self.options.save
        record = checkpoint.finished(save, self.key, self.options.save_dtype) if save else None
        if record is None and (done := self.journal.finished(RECORD)):
            record = RunRecord.from_dict(done[0])
            self._publish(record)
        return record

    def load(self) -> tuple[Decoder, PreTrainedTokenizerBase]:
        self.session.clear()  # what earlier runs have in memory is of no use
        model, stored, self.tokenizer = models.skeleton(*self.spec.loaded_by)
        self.dense = decompose(model, lazy=Lazy(model, stored.read))
        granularity = self.spec.reconstruction.granularity
        windows = [] if granularity == "none" else self.dense.windows(granularity)
        self.rest = checkpoint.remainder(self.dense, windows)
        self.shards = len(windows) + len(self.rest)
        return self.dense, self.tokenizer

    def open(self) -> dict:
        self.store = FolderStore(self.journal, device.SAVED[self.options.save_dtype])
        here, before = environment(self.device, self.spec.compute.compute_dtype), self.store.finished("opened")
        if changed := next(filter(None, (differences(other, here) for other in before)), None):
            log.warning(
                "this run goes on in another environment than it was begun in (%s): the last bits of its numbers may differ",
                "; ".join(changed),
            )
        self.store.finish("opened", here)
        return {"streamed": True, "resumed": len(before)}

    def student(self, external: Checkpoint | None) -> Decoder:
        start = external.read if external else self.dense.lazy.read
        saved_as_computed = device.SAVED[self.options.save_dtype] == self.dtype
        rounded = {matrix.parameter_name for matrix in self.dense.matrices().values()} if saved_as_computed else set()
        return self.store.student(self.dense, start, self.shards, rounded)

    def step(self, name: str, key: object, compute: Callable[[], Step]) -> Step:
        if not self.store.finished(name):
            found, streams = compute()
            self.store.finish(name, found, streams)
            return found, streams
        return self.store.finished(name)[0], self.store.streams(name)

    def pruned(self, key: object, student: Decoder, prune: Callable[[], Pruned]) -> Pruned:
        return prune()

    def knows_pruned(self, key: object) -> bool:
        return False

    def pruned_on_the_way(self, key: object, found: Pruned) -> Decoder:
        return self.store.pruned()

    def take_mask(self, student: Decoder, external: Checkpoint, execution: Execution) -> pruning.Pruning:
        return external_mask.read_mask(student, execution)

    @contextlib.contextmanager
    def saving(self, record: RunRecord) -> Iterator[Path | None]:
        yield self.folder / "checkpoint" if self.options.save else None
        self.store.finish(RECORD, record.to_dict())
        self._publish(record)

    def write(self, student: Decoder, folder: Path, record: RunRecord) -> None:
        checkpoint.write_rest(student, self.rest, self.store, self.tokenizer, record, self.options)

    def _publish(self, record: RunRecord) -> None:
        if self.options.save:
            checkpoint.move(self.folder / "checkpoint", self.options.save, record)

    def clear(self) -> None:
        try:
            unfinished.delete(self.folder)
        except OSError as error:  # some network file systems keep files that are mapped
            log.warning("work folder %r is no longer needed, but cannot be deleted: %s", str(self.folder), error)
