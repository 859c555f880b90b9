"""Writing a repaired model as a Hugging Face checkpoint that loads anywhere, zeros and all."""

import copy
import glob
import logging
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recon.data import files
from recon.errors import ReconError
from recon.experiment.record import RunRecord, read_record
from recon.runtime.storage import PART, check_writable, remove_unfinished, rename, sha256, sync_all, write_json
from recon.runtime.weights import SAVED, rounded

log = logging.getLogger("recon")
CARD = """---
base_model: {model}
library_name: transformers
tags: [pruned, sparse, reconstruction]
---

# {name}: pruned {pattern} with {criterion}, repaired at {granularity} granularity

A dense checkpoint with exact zeros: it loads with the `from_pretrained` of transformers and needs no special kernel.
Method: local reconstruction after pruning, arXiv 2510.14444.

| | |
|---|---|
| base model | {model}{revision} |
| criterion, pattern | {criterion}, {pattern} |
| sparsity of the pruned matrices, as counted | {sparsity:.4f} |
| reconstruction | granularity {granularity}, propagation {propagation}, solver {solver}, start {start}, loss {loss} |
| calibration | {calibration} |
{rounding}| licence | that of the base model |

| perplexity (lower is better) | dense | pruned | this model |
|---|---|---|---|
{rows}

Protocol: {evaluation}

Made by:

```
{command}
```
"""


def check_target(folder: Path) -> None:
    """Raises `ReconError` unless `folder` can be made, or is empty and can be written to."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ReconError(f"save folder {str(folder)!r} exists and is not an empty folder; name a new one")
    check_writable(folder.parent, "save folder")


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


def check_dtype(dtype: str, folder: Path | None) -> None:
    """Raises `ReconError` for an unknown dtype to save in, or one that is not the default where nothing is saved."""
    if dtype not in SAVED:
        raise ReconError(f"save_dtype is {dtype!r}; allowed: {', '.join(SAVED)}")
    if dtype != "float32" and folder is None:
        raise ReconError(f"save_dtype is {dtype!r}, but no folder to save to is named; name one, or leave it out")


def check_places(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Raises `ReconError` where the model made from the configuration of `model` has no parameters of these `names`.

    Such may be biases that make up for what pruning removed: a checkpoint with them would load without them, unnoticed.
    """
    with torch.device("meta"):
        made = type(model)(copy.deepcopy(model.config))
    places = made.state_dict()
    missing = [name for name in names if name not in places]
    if missing:
        raise ReconError(
            f"{type(model).__name__} as configured has no place for {missing[0]!r}, one of {len(missing)} biases that pruning adds, "
            "and a checkpoint would load without them; to save it, prune by another criterion, or by flap with compensate=False"
        )


def card(record) -> dict:
    """What the model card says, from the record."""
    spec, metrics = record.spec, record.metrics
    rows = [
        f"| {text} | {values['dense_perplexity']:.2f} | {values['pruned_perplexity']:.2f} | {values['perplexity']:.2f} |"
        for text, values in metrics["by_text"].items()
    ]
    return {
        **spec,
        **({"criterion": f"the mask of {spec['pruned']}", "pattern": metrics["pattern"]} if spec["pruned"] else {}),
        "name": Path(spec["model"]).name,
        "revision": f" at {spec['revision']}" if spec["revision"] else "",
        "sparsity": metrics["sparsity"],
        "calibration": record.protocol["calibration"],
        "evaluation": record.protocol["evaluation"],
        "rows": "\n".join(rows),
    }


def write_card(folder: Path, record, command: str, dtype: str = "float32") -> None:
    """Writes the model card of the run with this record to `folder`, where weights are in `dtype`."""
    rounding = (
        "" if dtype == "float32" else f"| weights | rounded to {dtype}, after all that is said here was measured in float32 |\n"
    )
    text = CARD.format(command=command or "recon.run(...) from Python", rounding=rounding, **card(record))
    (folder / "README.md").write_text(text, encoding="utf-8")


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, record, command: str, dtype: str = "float32"
) -> Path:
    """Writes weights (safetensors) and their hashes, configuration, tokenizer and model card to a new folder beside `folder`, and
    returns it: what is left for `publish`.

    dtype: see `recon.runtime.weights.SAVED`; in others than float32, the model itself is rounded to it, so that there is no second one in memory.

    The caller holds the folder's lock (see `recon.runtime.lock`). Raises `ReconError` naming the folder where the disk is full or cannot be
    written; nothing half-written stays. Also, before anything is written, for a model that would not load as it is: see `check_places`.
    """
    check_places(model, model.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder.parent, glob.escape(folder.name))  # nobody else saves here now
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=PART, dir=folder.parent))
    try:
        _round_off(model, SAVED[dtype])
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        files.write_hashes(temporary)
        write_card(temporary, record, command, dtype)
        temporary.chmod(0o755)
        sync_all(temporary)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not_written(error):
            raise ReconError(f"checkpoint cannot be written to {str(folder)!r}: {error}") from error
        raise
    return temporary


def not_written(error: BaseException) -> bool:
    """Whether `error` is what saving a model and its tokenizer raises where the disk is full: by what was being written, Python's own
    error, that of safetensors, or of tokenizers, which raises nothing more particular than `Exception`."""
    return isinstance(error, OSError | SafetensorError) or type(error) is Exception


def publish(complete: Path, folder: Path, record: RunRecord) -> None:
    """Gives the folder `complete` its place `folder`, with the record in it: whoever is killed, both are there or neither is.

    Raises `OSError` where that cannot be done.
    """
    write_json(complete / files.RECORD, record.to_dict())
    if folder.exists():
        folder.rmdir()  # empty, as checked before the run
    rename(complete, folder)


def _round_off(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Rounds all that is saved of `model`, in place."""
    stored = model.state_dict()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in stored:
            tensor.data = rounded(name, tensor.data, dtype)
