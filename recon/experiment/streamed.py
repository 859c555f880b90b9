"""A run whose model stays on disk: window by window, resumable at every moment, with the numbers of one in memory."""

import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recon.data import files, models
from recon.errors import ReconError
from recon.evaluate import perplexity as evaluation
from recon.experiment import checkpoint, unfinished
from recon.experiment.cluster import Ray
from recon.experiment.config import RunSpec
from recon.experiment.environment import environment
from recon.experiment.memory import models_in_memory
from recon.experiment.record import RunRecord
from recon.experiment.run import Measured, Pruned, Run, Session
from recon.experiment.unfinished import JOURNAL
from recon.methods import external_mask
from recon.methods import prune as pruning
from recon.model.decoder import Decoder
from recon.model.discovery import take_apart
from recon.model.skeleton import Lazy
from recon.runtime import device, lock
from recon.runtime.folder_store import SAVE, FolderStore
from recon.runtime.journal import Journal, differences
from recon.runtime.storage import sync_all, write_json
from recon.runtime.weights import SAVED, quantisation, reader

log = logging.getLogger("recon")
UNFINISHED = ".unfinished"  # ends the name of the folder where a run works
SHARD = 2**30  # bytes of the shards that hold what is in no window, unless a single block or matrix is larger
STREAM = ("auto", "yes", "no")
RECORD = "record"  # the last phase: its one step holds the record of the whole run


def wanted(stream: str, spec: RunSpec) -> bool:
    """Whether a run of `spec` is streamed. Raises `ReconError` for an unknown word, and where it is to be but cannot."""
    if stream not in STREAM:
        raise ReconError(f"stream is {stream!r}; allowed: {', '.join(STREAM)}")
    if stream == "no" or (stream == "auto" and not is_too_large(spec)):
        return False
    if spec.retraining.method != "none":
        needs_all = f"retraining (then {spec.retraining.method!r}) trains the whole model at once"
    else:
        needs_all = _needs_memory(spec)
    if needs_all and stream == "yes":
        raise ReconError(f"{needs_all}, which a streamed run cannot do, as it has one window in memory; use stream no")
    if needs_all:
        log.warning("model %r may not fit into memory, but %s and cannot be streamed", spec.model.model, needs_all)
    return not needs_all


def _needs_memory(spec: RunSpec) -> str | None:
    """Why the run's model has to be in memory, by its configuration, which alone is read (`recon plan` asks); None: it need not."""
    try:
        config = models.configuration(*spec.loaded_by)
    except ReconError:  # loading the model will say what is wrong
        return None
    if found := quantisation(config):
        return f"reading model {spec.model.model!r} undoes its quantisation ({found['quant_method']})"
    return None


def is_too_large(spec: RunSpec) -> bool:
    """Whether the weights of a run in memory would take more than there is to be had now; see `recon.experiment.memory.models_in_memory`."""
    numbers = 0
    for path in files.shards(models.folder(*spec.loaded_by)):
        with safe_open(path, framework="pt") as file:
            numbers += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return 0 < device.available_memory() < models_in_memory(spec, numbers)


def run(
    spec: RunSpec,
    session: Session,
    save: Path | None,
    command: str,
    progress: bool,
    on_done: Callable[[RunRecord], None],
    executor: str | Ray = "serial",
    save_dtype: str = "float32",
) -> RunRecord:
    """As `recon.run` with `stream="yes"`.

    The run works in `<save>.unfinished`, or where nothing is saved, in a folder of the user's cache that is named by the
    run's key (see `recon.experiment.unfinished`). It is deleted when the run is done; until then, the same call goes on from the last finished step, and gives the
    same record when there is none left to do.
    """
    folder = folder_of(spec, save)
    if save is None:
        held = unfinished.held(folder.name)
    else:
        held = lock.held(save.parent / f".{save.name}{lock.NAME}", f"save folder {str(save)!r}")
    with held:
        task = StreamedRun(spec, session, progress, folder, executor, save_dtype)
        record = None if save is None else checkpoint.finished(save, task.record.key, save_dtype)
        if record is None:
            done = task.journal.finished(RECORD)
            if done:
                record = RunRecord.from_dict(done[0])
            else:
                if save is not None:
                    checkpoint.check_target(save)
                with _nothing_left_of_nothing(task.journal):
                    record = task.execute(save, command)
                task.store.finish(RECORD, record.to_dict())
            if save is not None:
                publish(folder / "checkpoint", save, record)
        on_done(record)
        try:
            delete(task.journal)
        except OSError as error:  # some network file systems keep files that are mapped
            log.warning("work folder %r is no longer needed, but cannot be deleted: %s", str(folder), error)
    return record


def folder_of(spec: RunSpec, save: Path | None) -> Path:
    """The folder where a streamed run of `spec` works."""
    return unfinished.folder_of(spec.key()) if save is None else save.with_name(save.name + UNFINISHED)


def begun(spec: RunSpec, save: Path | None) -> bool:
    """Whether a streamed run of `spec` has finished a step already."""
    return (folder_of(spec, save) / JOURNAL).exists()


def publish(complete: Path, save: Path, record: RunRecord) -> None:
    """Gives the complete checkpoint its place, with its record."""
    if not complete.exists():
        raise ReconError(
            f"the checkpoint has been moved to {str(save)!r}, and is not there any more; delete {str(complete.parent)!r} to begin anew"
        )
    try:
        checkpoint.publish(complete, save, record)
    except OSError as error:
        raise ReconError(
            f"checkpoint cannot be moved to {str(save)!r}: {error}. It is complete in {str(complete)!r}; the same command moves it "
            "when its place is free and there is room"
        ) from error


@contextlib.contextmanager
def _nothing_left_of_nothing(journal: Journal) -> Iterator[None]:
    """Where what is inside is refused before it has finished anything, its work folder goes: it would stand in the way of another try."""
    try:
        yield
    except ReconError:
        if all(entry["phase"] == "opened" for entry in journal.entries):
            with contextlib.suppress(OSError):
                delete(journal)
        raise


def delete(journal: Journal) -> None:
    """Deletes a work folder, if there is one. As long as anything else is in it, so is the journal: whoever is killed here, the record is there."""
    if not journal.path.parent.exists():
        return
    for path in journal.path.parent.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    journal.path.unlink(missing_ok=True)
    journal.path.parent.rmdir()


class StreamedRun(Run):
    """One run with its model on disk.

    What is in memory, in float32 unless it says otherwise:

    - pruning: one block, its matrices once more rounded to the compute dtype, and the statistics of their inputs (Gram matrices
      where the criterion asks for them);
    - reconstruction: the dense window with its matrices rounded, while targets are computed; then the window in hand,
      its gradients, AdamW's two moments, and its masks (2 bytes a weight on CPUs);
    - evaluation: one block and its rounded matrices; then the head, likewise;
    - the embedding, while tokens are embedded;
    - of one mini-batch, the activations inside the window.

    Activations of all samples lie in mapped files where they are larger than `recon.runtime.activations.SMALL`, and so does what a window
    was before it is fitted: the system keeps them in memory while there is room. So does the model's own file. On disk there are,
    beside the repaired weights in the dtype that they are saved in, the masks (1 bit a weight), and two to four streams of activations.
    Where weights are saved rounded, those that are computed with in another way are there in float32 as well until the run is done: norms
    and biases where matrices are computed with in the same dtype, and else all.
    """

    def __init__(
        self,
        spec: RunSpec,
        session: Session,
        progress: bool,
        folder: Path,
        executor: str | Ray = "serial",
        save_dtype: str = "float32",
    ):
        super().__init__(spec, session, progress, executor, save_dtype)
        self.compute_dtype = device.pick_compute_dtype(spec.compute.compute_dtype, self.device)
        computed = {"device": self.device.type, "compute_dtype": str(self.compute_dtype), "save_dtype": save_dtype}
        self.journal = Journal(folder / JOURNAL, {"spec": spec.decisive(), **spec.sources(), **computed})

    def load(self) -> None:
        super().load()
        self.store = FolderStore(self.journal, SAVED[self.save_dtype])  # only now: a run that is refused leaves nothing
        here, before = environment(self.device, self.spec.compute.compute_dtype), self.store.finished("opened")
        if changed := next(filter(None, (differences(other, here) for other in before)), None):
            log.warning(
                "this run goes on in another environment than it was begun in (%s): the last bits of its numbers may differ",
                "; ".join(changed),
            )
        self.resumed = len(before)
        self.store.finish("opened", here)

    def load_model(self) -> tuple[Decoder, PreTrainedTokenizerBase]:
        self.session.clear()  # what earlier runs have in memory is of no use
        model, stored, tokenizer = models.skeleton(*self.spec.loaded_by)
        decoder = take_apart(model, lazy=Lazy(model, reader(model, stored)))
        return decoder, tokenizer

    def dense_measured(self) -> tuple[Measured, dict[str, evaluation.Reference]]:
        if not self.store.finished("dense"):
            measured, references = self.measure_dense()
            states = {str(number): reference.states for number, reference in enumerate(references.values())}
            self.store.finish("dense", asdict(measured), states)
            return measured, references
        states = self.store.streams("dense").values()
        references = {name: evaluation.Reference(self.dense, state) for name, state in zip(self.texts, states, strict=True)}
        return _measured(self.store.finished("dense")[0]), references

    def copy_of_dense(self) -> Decoder:
        start = reader(self.dense.model, self.pruned) if self.spec.model.pruned else self.dense.lazy.read
        saved_as_computed = SAVED[self.save_dtype] == self.compute_dtype
        rounded = {matrix.parameter_name for matrix in self.dense.matrices().values()} if saved_as_computed else set()
        return self.store.student(self.dense, start, len(self.windows()) + len(self.remainder()), rounded)

    def pruned_student(self, student: Decoder) -> Pruned:
        return self.prune(student)

    def take_given(self, student: Decoder) -> pruning.Pruning:
        return external_mask.read_mask(student, self.execution())

    def changed(self, student: Decoder, masks) -> dict[str, Tensor]:
        return {}  # the student's weights are in files, and no other run starts from them

    def measured(self, student: Decoder, what: str) -> Measured:
        if not self.store.finished(what):
            self.store.finish(what, asdict(self.measure(student, what)))
        return _measured(self.store.finished(what)[0])

    def counted(self, student: Decoder) -> tuple[int, dict[str, float]]:
        if not self.store.finished("counted"):
            self.store.finish("counted", super().counted(student))
        zeros, shares = self.store.finished("counted")[0]
        return zeros, shares

    def peak_memory(self) -> device.PeakMemory:
        return device.PeakMemory(self.device, anonymous=True)

    def about(self) -> dict:
        return {"streamed": True, "resumed": self.resumed}

    # --- the checkpoint -------------------------------------------------------------------------------------------

    def windows(self):
        """The windows that are repaired; each is a shard of the checkpoint."""
        return [] if self.spec.reconstruction.granularity == "none" else self.dense.windows(self.spec.reconstruction.granularity)

    def remainder(self) -> list[list[str]]:
        """The parameters and buffers that are in no window, by name, divided into shards."""
        model = self.dense.model
        taken = {name for window in self.windows() for name in self.dense.parameters(window)}
        skipped = set(model._keys_to_ignore_on_save or ())
        sizes = {name: 4 * parameter.numel() for name, parameter in self.dense.lazy.parameters.items()}
        buffers = dict(model.named_buffers())
        sizes |= {name: buffers[name].nbytes for name in model.state_dict() if name in buffers}
        home = {name: block for block in self.dense.names for name in sizes if name.startswith(f"{block}.")}
        blocks: dict[str, list[str]] = {}  # what is in one block stays together, as transformers may store it in one piece
        for name in sizes:
            if name not in taken and name not in skipped:
                blocks.setdefault(home.get(name, name), []).append(name)
        shards, room = [], 0
        for names in blocks.values():
            size = sum(sizes[name] for name in names)
            if size > room:
                shards.append([])
                room = SHARD
            shards[-1] += names
            room -= size
        return shards

    def save(self, student: Decoder, folder: Path, command: str) -> None:
        """Completes the checkpoint beside the finished shards; `publish` moves it to `folder` in one piece."""
        model, store = student.model, self.store
        for names in self.remainder()[len(store.finished(SAVE)) :]:
            parameters = {name: student.lazy.parameters[name] for name in names if name in student.lazy.parameters}
            with student.lazy.present(parameters.values()):
                tensors = {name: model.get_buffer(name) for name in names if name not in parameters}
                tensors |= {name: parameter.detach() for name, parameter in parameters.items()}
                store.finish(SAVE, names, shard=tensors)
        target = store.folder / "checkpoint"
        try:
            model.config.dtype, model.config.architectures = self.save_dtype, [type(model).__name__]
            model.config.save_pretrained(target)
            if model.can_generate():
                model.generation_config.save_pretrained(target)
            self.tokenizer.save_pretrained(target)
            write_json(target / files.INDEX, _index(target))
            entries = [entry["shard"] for entry in store.journal.entries if "shard" in entry]
            hashes = "".join(f"{entry['sha256']}  {Path(entry['file']).name}\n" for entry in entries)
            (target / files.HASHES).write_text(hashes, encoding="utf-8")
            self.record.environment["checkpoint"] = files.sha256(target / files.HASHES)
            checkpoint.write_card(target, self.record, command, self.save_dtype)
            sync_all(target)
        except Exception as error:
            if not checkpoint.not_written(error):
                raise
            raise ReconError(
                f"checkpoint cannot be written to {str(folder)!r}: {error}. What is finished is kept: with room on the disk, the same command "
                "goes on from there"
            ) from error


def _measured(found: dict) -> Measured:
    perplexities = {name: evaluation.Perplexity(**values) for name, values in found["perplexities"].items()}
    return Measured(**(found | {"perplexities": perplexities}))


def _index(folder: Path) -> dict:
    """The index of the shards in `folder`, as transformers writes it."""
    places, size, numbers = {}, 0, 0
    for path in sorted(folder.glob("model-*.safetensors")):
        with open(path, "rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        size += path.stat().st_size - header  # tensors lie side by side behind it
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                places[name] = path.name
                numbers += math.prod(file.get_slice(name).get_shape())
    return {"metadata": {"total_parameters": numbers, "total_size": size}, "weight_map": dict(sorted(places.items()))}
