"""Saves a reconstructed model as an ordinary Hugging Face checkpoint, with zeros stored as zeros, and its model card."""

import contextlib
import copy
import tempfile
import warnings
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recon.data.models import quiet
from recon.errors import ReconError
from recon.model.decoder import Decoder
from recon.model.skeleton import place
from recon.runtime.device import SAVED
from recon.runtime.packed import pack_files
from recon.runtime.weights import rounded
from recon.study.record import RunRecord
from recon.study.spec import RunOptions

SHARD = "1GB"  # size of a file: this much of the model is in memory while it is written


def check_model(dense: Decoder, biases: Collection[str], dtype: str) -> None:
    """Raises `ReconError` naming a weight that `dtype` cannot hold, or one of the `biases` that pruning adds, if no configuration
    of the model has a place for it: transformers would drop it silently when it loads the checkpoint.
    """
    places = with_places(dense.model, biases)[1] if biases else ()
    if missing := [name for name in biases if name not in places]:
        said = f"one of {len(missing)} biases that pruning adds; to save it, prune by another criterion, such as wanda-sp"
        raise ReconError(f"no configuration of {type(dense.model).__name__} has a place for {missing[0]!r}, {said}")
    parameters = dict(dense.model.named_parameters())
    if dtype != "float32":  # reads all weights of a model that stays on disk
        for name, value in dense.lazy.read(list(parameters)) if dense.lazy else parameters.items():
            rounded(name, value.detach(), SAVED[dtype])


def with_places(model: PreTrainedModel, names: Iterable[str]) -> tuple[list[str], dict[str, Tensor]]:
    """Configuration options, such as attention_bias, that give `model` the parameters `names`; its state with them, on meta."""

    def state(options: list[str]) -> dict[str, Tensor]:
        config = copy.deepcopy(model.config)
        vars(config.get_text_config()).update(dict.fromkeys(options, True))
        with torch.device("meta"):
            return type(model)(config).state_dict()

    options, places, unset = [], state([]), vars(model.config.get_text_config())
    for option in (name for name, value in unset.items() if value is False and "bias" in name):
        if (set(names) & state([option]).keys()) - places.keys():
            options, places = [*options, option], state([*options, option])
    return options, places


def save(student: Decoder, tokenizer: PreTrainedTokenizerBase, folder: Path, save_dtype: str) -> None:
    """Writes weights (safetensors), configuration and tokenizer to `folder`. Raises `ReconError` as `rounded`.

    If pruning has added biases, the configuration has to declare all biases of that kind; those not added by pruning are zeros.
    """
    model, dtype = student.model, SAVED[save_dtype]
    options, places = with_places(model, model.state_dict())
    model.config = copy.deepcopy(model.config)  # the dense model may share it
    vars(model.config.get_text_config()).update(dict.fromkeys(options, True))
    for name in places.keys() - model.state_dict().keys():
        place(model, name, nn.Parameter(torch.zeros(places[name].shape), requires_grad=False))
    # Pretends that the weights are on disk, so that transformers asks for each one when it writes it.
    meta = {
        name: torch.empty_like(tensor, dtype=dtype if tensor.is_floating_point() else None, device="meta")
        for name, tensor in model.state_dict().items()
    }
    model.hf_device_map, model._hf_hook = {"": "disk"}, SimpleNamespace(weights_map=_Weights(student, dtype))
    try:
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            model.save_pretrained(folder, state_dict=meta, max_shard_size=SHARD)
    finally:
        del model.hf_device_map, model._hf_hook
    model.config.dtype = save_dtype
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write(student: Decoder, tokenizer: PreTrainedTokenizerBase, folder: Path, record: RunRecord, options: RunOptions) -> None:
    """As `save`, with a model card; packed if `options.save_format` says so."""
    if options.save_format == "packed":
        with tempfile.TemporaryDirectory(dir=folder) as plain:
            write(student, tokenizer, Path(plain), record, replace(options, save_format="plain"))
            pack_files(Path(plain), folder)
        return
    save(student, tokenizer, folder, options.save_dtype)
    base = record.spec["model"]
    about = ModelCardData(base_model=base, library_name="transformers", tags=["pruned", "sparse", "reconstruction"])
    said = vars(record) | {"name": Path(base).resolve().name, "dtype": options.save_dtype, "command": options.command}
    ModelCard.from_template(about, str(Path(__file__).with_name("card.md")), **said).save(folder / "README.md")


class _Weights:
    """The weights of a model by full name, rounded to a dtype and read when they are asked for."""

    def __init__(self, student: Decoder, dtype: torch.dtype):
        self.student, self.dtype = student, dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.student.model.get_parameter_or_buffer(name)
        with self.student.present([tensor]) if isinstance(tensor, nn.Parameter) else contextlib.nullcontext():
            value = rounded(name, tensor.detach(), self.dtype).clone()
        return value.add_(0.0) if value.is_floating_point() else value  # masked weights may be -0
