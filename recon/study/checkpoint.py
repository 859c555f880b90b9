"""A reconstructed model as a Hugging Face checkpoint that loads anywhere, zeros and all."""

import contextlib
import copy
import glob
import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recon.data import files
from recon.data.models import quiet
from recon.errors import ReconError
from recon.model.decoder import Decoder
from recon.model.windows import Window
from recon.runtime import lock
from recon.runtime.device import SAVED
from recon.runtime.folder_store import SAVE, FolderStore
from recon.runtime.storage import check_writable, complete, remove_unfinished, rename, sha256, sync_all, write_json
from recon.runtime.weights import rounded
from recon.study.card import write_card
from recon.study.record import RunRecord, read_record
from recon.study.spec import RunOptions

log = logging.getLogger("recon")
SHARD = 2**30  # bytes of the shards that hold what is in no window, unless a single block or matrix is larger


# --- what can be refused before anything is computed ---------------------------------------------------------------------


def locked(folder: Path) -> contextlib.AbstractContextManager:
    """Context in which no other process saves to `folder`; the lock lies beside it, as the folder appears when it is complete."""
    return lock.locked(folder.parent / f".{folder.name}{lock.NAME}", f"save folder {str(folder)!r}")


def check_target(folder: Path) -> None:
    """Raises `ReconError` unless `folder` can be made, or is empty and can be written to."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ReconError(f"save folder {str(folder)!r} exists and is not an empty folder; name a new one")
    check_writable(folder.parent, "save folder")


def check_places(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Raises `ReconError` where the model made from the configuration of `model` has no parameters of these `names`.

    Such may be biases that make up for what pruning removed: transformers would drop them unnoticed when it loads the checkpoint.
    """
    with torch.device("meta"):
        places = type(model)(copy.deepcopy(model.config)).state_dict()
    if missing := [name for name in names if name not in places]:
        raise ReconError(
            f"{type(model).__name__} as configured has no place for {missing[0]!r}, one of {len(missing)} biases that pruning adds, "
            "and a checkpoint would load without them; to save it, prune by another criterion, such as wanda-sp"
        )


def check_range(dense: Decoder, dtype: str) -> None:
    """Raises `ReconError` naming a weight of `dense` that is beyond the range of the dtype to save in."""
    if dtype == "float16":  # the range of the others is that of float32
        for name, parameter in dense.model.named_parameters():
            with dense.lazy.present([parameter]) if dense.lazy else contextlib.nullcontext():
                rounded(name, parameter.detach(), SAVED[dtype])


def finished(folder: Path, key: str, dtype: str) -> RunRecord | None:
    """The record of the run called `key`, where that has saved its model in `folder`, in `dtype`; None where it has not.

    Raises `ReconError` where it has, and the checkpoint is damaged.
    """
    try:
        record = read_record(folder / files.RECORD)
    except ReconError:  # whatever else may be there: see `check_target`
        return None
    if record.status != "done" or record.key != key or record.environment.get("save_dtype", "float32") != dtype:
        return None
    try:
        files.shards(folder)
        if record.environment.get("checkpoint") != sha256(folder / files.HASHES):
            raise ReconError(f"{files.HASHES} is not what was written")
    except (ReconError, OSError) as error:
        raise ReconError(
            f"save folder {str(folder)!r} holds the model of this very run, damaged: {error}; delete it to run anew, or name a new one"
        ) from error
    log.info("done already: the model and its record are in %r", str(folder))
    return record


# --- a model in memory -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Context that gives a new folder to write a checkpoint to, and gives it its place `folder` at the end; see
    `recon.runtime.storage.complete`.

    The caller holds the lock, see `locked`. Raises `ReconError` naming the folder where the disk is full or cannot be written.
    """
    remove_unfinished(folder.parent, glob.escape(folder.name))  # of processes that were killed
    try:
        with complete(folder) as temporary:
            temporary.mkdir()
            yield temporary
    except Exception as error:
        if not not_written(error):
            raise
        raise ReconError(f"checkpoint cannot be written to {str(folder)!r}: {error}") from error


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, record: RunRecord, options: RunOptions
) -> None:
    """Writes weights (safetensors) and their hashes, configuration, tokenizer and model card to `folder`; notes the hash of hashes.

    The model itself is rounded to the dtype that it is saved in, so that there is no second one in memory. Raises `ReconError`
    for a model that would not load as it is; see `check_places`.
    """
    check_places(model, model.state_dict())
    _round(model, SAVED[options.save_dtype])
    with quiet():
        model.save_pretrained(folder)
    files.write_hashes(folder)
    _describe(folder, tokenizer, record, options)


def _round(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Rounds all that is saved of `model`, in place."""
    stored = model.state_dict()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in stored:
            tensor.data = rounded(name, tensor.data, dtype)


def _describe(folder: Path, tokenizer: PreTrainedTokenizerBase, record: RunRecord, options: RunOptions) -> None:
    """Writes tokenizer and model card; notes the hash of hashes, which tells the checkpoint from others, in the record."""
    tokenizer.save_pretrained(folder)
    record.environment["checkpoint"] = sha256(folder / files.HASHES)
    write_card(folder, record, options)


def not_written(error: Exception) -> bool:
    """Whether `error` is what saving raises where the disk is full: Python's own error, that of safetensors, or of tokenizers,
    which raises nothing more particular than `Exception`."""
    return isinstance(error, OSError | SafetensorError) or type(error) is Exception


# --- a streamed model: one shard per window, written as windows are reconstructed, and shards for the rest ----------------------


def remainder(dense: Decoder, windows: list[Window]) -> list[list[str]]:
    """The parameters and buffers that are in none of `windows`, by name, divided into shards.

    What is in one block stays together, as transformers may store it in one tensor.
    """
    model = dense.model
    taken = {name for window in windows for name in dense.parameters(window)} | set(model._keys_to_ignore_on_save or ())
    sizes = {name: 4 * parameter.numel() for name, parameter in dense.lazy.parameters.items()}
    buffers = dict(model.named_buffers())
    sizes |= {name: buffers[name].nbytes for name in model.state_dict() if name in buffers}
    home = {name: block for block in dense.names for name in sizes if name.startswith(f"{block}.")}
    together: dict[str, list[str]] = {}
    for name in sizes:
        if name not in taken:
            together.setdefault(home.get(name, name), []).append(name)
    shards, room = [], 0
    for names in together.values():
        size = sum(sizes[name] for name in names)
        if size > room:
            shards.append([])
            room = SHARD
        shards[-1] += names
        room -= size
    return shards


def write_rest(
    student: Decoder,
    shards: list[list[str]],
    store: FolderStore,
    tokenizer: PreTrainedTokenizerBase,
    record: RunRecord,
    options: RunOptions,
) -> None:
    """Completes the checkpoint beside its finished shards: the other `shards`, and all that `write` writes.

    Raises `ReconError` naming the save folder where the disk is full or cannot be written; what is finished is kept.
    """
    model, folder = student.model, store.folder / "checkpoint"
    for names in shards[len(store.finished(SAVE)) :]:
        parameters = {name: student.lazy.parameters[name] for name in names if name in student.lazy.parameters}
        with student.lazy.present(parameters.values()):
            tensors = {name: model.get_buffer(name) for name in names if name not in parameters}
            tensors |= {name: parameter.detach() for name, parameter in parameters.items()}
            store.finish(SAVE, names, shard=tensors)
    try:
        model.config.dtype, model.config.architectures = options.save_dtype, [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        write_json(folder / files.INDEX, _index(folder))
        written = [entry["shard"] for entry in store.journal.entries if "shard" in entry]
        hashes = "".join(f"{entry['sha256']}  {Path(entry['file']).name}\n" for entry in written)
        (folder / files.HASHES).write_text(hashes, encoding="utf-8")
        _describe(folder, tokenizer, record, options)
        sync_all(folder)
    except Exception as error:
        if not not_written(error):
            raise
        raise ReconError(
            f"checkpoint cannot be written to {str(options.save)!r}: {error}. What is finished is kept: with room on the disk, the "
            "same command goes on from there"
        ) from error


def move(written: Path, folder: Path, record: RunRecord) -> None:
    """Gives the checkpoint in the folder `written` its place `folder`, with its record.

    Raises `ReconError` where that cannot be done; the checkpoint stays where it is.
    """
    if not written.exists():
        raise ReconError(
            f"the checkpoint has been moved to {str(folder)!r}, and is not there any more; delete {str(written.parent)!r} to begin anew"
        )
    try:
        write_json(written / files.RECORD, record.to_dict())
        rename(written, folder)
    except OSError as error:
        raise ReconError(
            f"checkpoint cannot be moved to {str(folder)!r}: {error}. It is complete in {str(written)!r}; the same command moves it "
            "when its place is free and there is room"
        ) from error


def _index(folder: Path) -> dict:
    """The index of the shards in `folder`, as transformers writes it."""
    places, size, elements = {}, 0, 0
    for path in sorted(folder.glob("model-*.safetensors")):
        with open(path, "rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        size += path.stat().st_size - header  # tensors lie side by side behind it
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                places[name] = path.name
                elements += math.prod(file.get_slice(name).get_shape())
    return {"metadata": {"total_parameters": elements, "total_size": size}, "weight_map": dict(sorted(places.items()))}
