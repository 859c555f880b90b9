"""A reconstructed model as a Hugging Face checkpoint that loads anywhere, zeros and all; and its model card."""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recon.data import files
from recon.data.models import quiet
from recon.errors import ReconError
from recon.model.decoder import Decoder
from recon.runtime.device import SAVED
from recon.runtime.storage import check_writable, complete, writing
from recon.runtime.weights import rounded
from recon.study import record as read
from recon.study.record import RunRecord
from recon.study.spec import RunOptions

log = logging.getLogger("recon")
SHARD = "1GB"  # so much of the model is in memory while it is written
CARD = """---
base_model: {model}
library_name: transformers
tags: [pruned, sparse, reconstruction]
---

# {name}: pruned {pattern} with {criterion}, reconstructed at {granularity} granularity

An ordinary checkpoint with exact zeros: it loads with the `from_pretrained` of transformers and needs no special kernel.
Method: local reconstruction after pruning, arXiv 2510.14444.

| | |
|---|---|
| base model | {model} {revision} |
| weights of the base model ("dense") | {dense} |
| criterion, pattern | {criterion}, {pattern} |
| sparsity of the pruned matrices, as counted | {sparsity:.4f} |
| reconstruction | granularity {granularity}, propagation {propagation}, solver {solver}, start {start}, loss {loss} |
| calibration | {calibration} |
| weights | {rounding} |
| licence | that of the base model |

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


def finished(folder: Path, key: str, dtype: str) -> RunRecord | None:
    """The record of the run called `key`, where that has saved its model in `folder`, in `dtype`; None where it has not."""
    record = read.finished(folder / files.RECORD, key)
    if record is None or record.environment.get("save_dtype", "float32") != dtype:
        return None
    log.info("done already: the model and its record are in %r", str(folder))
    return record


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Context that gives a new folder to write a checkpoint to, which gets its place `folder` at the end; the caller holds its lock.

    Raises `ReconError` naming the folder where the disk is full or cannot be written.
    """
    with writing(f"checkpoint {str(folder)!r}", "choose a place with room"), complete(folder) as temporary:
        temporary.mkdir()
        yield temporary


def write(student: Decoder, tokenizer: PreTrainedTokenizerBase, folder: Path, record: RunRecord, options: RunOptions) -> None:
    """Writes weights (safetensors), configuration, tokenizer and model card to `folder`.

    Raises `ReconError` for a model that would not load as it is; see `check_places`.
    """
    model, dtype = student.model, SAVED[options.save_dtype]
    check_places(model, model.state_dict())
    # As if the weights were on disk, so that transformers asks for each as it is written.
    whole = {
        name: torch.empty_like(tensor, dtype=dtype if tensor.is_floating_point() else None, device="meta")
        for name, tensor in model.state_dict().items()
    }
    model.hf_device_map, model._hf_hook = {"": "disk"}, SimpleNamespace(weights_map=_Weights(student, dtype))
    try:
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            model.save_pretrained(folder, state_dict=whole, max_shard_size=SHARD)
    finally:
        del model.hf_device_map, model._hf_hook
    model.config.dtype = options.save_dtype
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_card(folder, record, options)


class _Weights(dict):
    """The weights of a model by full name, rounded to a dtype and read while they are asked for."""

    def __init__(self, student: Decoder, dtype: torch.dtype):
        super().__init__()
        self.student, self.dtype = student, dtype

    def __missing__(self, name: str) -> Tensor:
        tensor = self.student.model.get_parameter_or_buffer(name)
        with self.student.present([tensor]) if isinstance(tensor, nn.Parameter) else contextlib.nullcontext():
            return rounded(name, tensor.detach(), self.dtype).clone()


def write_card(folder: Path, record: RunRecord, options: RunOptions) -> None:
    """Writes the model card to `folder`, from the record."""
    spec, metrics, dtype = record.spec, record.metrics, options.save_dtype
    rows = [
        f"| {text} | {values['dense_perplexity']:.2f} | {values['pruned_perplexity']:.2f} | {values['perplexity']:.2f} |"
        for text, values in metrics["by_text"].items()
    ]
    external = {"criterion": f"the mask of {spec['pruned']}", "pattern": metrics.get("pattern")} if spec["pruned"] else {}
    rounding = "float32" if dtype == "float32" else f"rounded to {dtype}; everything here was measured before, in float32"
    said = spec | external | {"name": Path(spec["model"]).name, "revision": spec["revision"] or ""}
    said |= {"sparsity": metrics["sparsity"], "rows": "\n".join(rows), "rounding": rounding}
    said |= {name: record.protocol[name] for name in ("dense", "calibration", "evaluation")}
    card = CARD.format(**said, command=options.command or "recon.run(...) from Python")
    (folder / "README.md").write_text(card, encoding="utf-8")
