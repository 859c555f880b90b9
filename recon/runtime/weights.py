"""Weights of a model that stay on disk: transformers leaves them there (`device_map={"": "disk"}`); they are read one by one."""

import json
import logging
import tempfile
from collections import ChainMap, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from recon.errors import ReconError
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.model.skeleton import Lazy, Read, auto_class, place, second, tied
from recon.runtime import packed
from recon.runtime.storage import PART, Storage, cache_folder

UNDONE = ("fp8", "mxfp4")  # quantisations that transformers undoes while it reads weights
logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of offloading, which is intended


class Weights:
    """The weights of a model that `from_pretrained` has left on disk. Reading gives the values that it would load into memory.

    names: of all parameters, a tied one under each of its names. surplus: entries of the files that the model has no place for.
    scratch: where transformers has put weights that it had to convert, such as experts that it stacks.
    """

    def __init__(self, model: PreTrainedModel, path: Path, surplus: list[str], scratch: tempfile.TemporaryDirectory):
        hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
        self._stored = next(hook.weights_map for hook in hooks if hook.weights_map is not None)
        while hasattr(self._stored, "dataset"):  # a view for one module: go to the map of all weights
            self._stored = self._stored.dataset
        for hook in hooks:
            hook.original_devices = {}  # removing the hook then moves no weights back
        remove_hook_from_module(model, recurse=True)
        for entry in self._stored.index.values():  # transformers expects shards beside the first, not in subfolders
            if not Path(entry.get("safetensors_file", path)).exists():
                shards = json.loads((path / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
                entry["safetensors_file"] = str(path / shards[entry["weight_name"]])
        self.surplus, self._scratch = surplus, scratch
        self._places: dict[str, str] = {}  # name of each parameter -> name under which it is stored
        self._computed: dict[str, Tensor] = {}  # parameters that no file has, such as sinusoidal positions
        for name, names in tied(model).items():
            stored = next((other for other in names if other in self._stored.index), "")
            self._places |= {other: other if other in self._stored.index else stored for other in names}
            if not stored:
                place(model, name, nn.Parameter(torch.empty(model.get_parameter(name).shape)))
                model._init_weights(model.get_submodule(name.rpartition(".")[0]))
                self._computed |= dict.fromkeys(names, model.get_parameter(name).detach())
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
        self.names = self._shapes.keys()
        self._finite: set[str] = set()  # parameters found to be without NaN and infinity

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yields the parameters `names` in float32, as copies. Raises `ReconError` for a wrong shape, NaN or infinity."""
        for name in names:
            stored = self._computed[name] if name in self._computed else self._stored[self._places[name]]
            value = stored.to(torch.float32, copy=True)
            if value.shape != self._shapes[name]:
                raise ReconError(f"weight {name!r} is {tuple(value.shape)}, not {tuple(self._shapes[name])}")
            if name not in self._finite:
                check_finite(name, value, "the model on disk")
                self._finite.add(name)
            yield name, value


def open_model(
    path: Path, config: PretrainedConfig, trust_remote_code: bool = False, folder: Path | None = None
) -> tuple[PreTrainedModel, Weights]:
    """The model in the folder `path`, with parameters on torch's meta device, and its `Weights`. Raises as `read_model`.

    folder: where converted weights, such as stacked experts, are stored; default: the cache.
    """
    folder = folder or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(dir=folder, prefix=".offloaded.", suffix=PART)
    path = packed.unpacked(path, Path(scratch.name) / "plain")
    model, surplus = read_model(path, config, trust_remote_code, device_map={"": "disk"}, offload_folder=scratch.name)
    return model.eval(), Weights(model, path, surplus, scratch)


def read_model(path: Path, config: PretrainedConfig, trust_remote_code: bool, **options) -> tuple[PreTrainedModel, list[str]]:
    """The model in `path`, and surplus entries. Raises `ReconError` for weights not in safetensors, quantised or missing."""
    if not any(path.glob("*.safetensors*")):
        raise ReconError("it has no safetensors, the only weights that are read; save it by transformers' `save_pretrained`")
    if found := quantisation(config):
        if found["quant_method"] not in UNDONE or "device_map" in options:
            raise ReconError(f"its weights are quantised ({found['quant_method']}); undo their quantisation first")
        config.quantization_config = found | {"dequantize": True}  # on a GPU, transformers undoes it only on request
    options |= {"config": config, "dtype": torch.float32, "use_safetensors": True, "trust_remote_code": trust_remote_code}
    model, report = auto_class(config).from_pretrained(path, output_loading_info=True, **options)
    if report["missing_keys"]:
        raise ReconError(f"it lacks weights that its config.json calls for: {', '.join(sorted(report['missing_keys']))}")
    surplus, weights = sorted(report["unexpected_keys"]), dict(model.named_parameters())
    if lost := [name for name in surplus if name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in weights]:
        raise ReconError(f"its files hold {lost[0]!r}, for which its config.json has no place; save what is pruned by recon.run")
    return model, surplus


def quantisation(config: PretrainedConfig) -> dict | None:
    """How the weights of a model of this configuration are quantised, including "quant_method"; None if they are not."""
    for part in (config, config.get_text_config()):
        if found := getattr(part, "quantization_config", None):
            found = dict(found) if isinstance(found, dict) else found.to_dict()
            method = found.get("quant_method", "of an unknown kind")
            return found | {"quant_method": getattr(method, "value", method)}
    return None


def check_finite(name: str, tensor: Tensor, owner: str) -> None:
    """Raises `ReconError` naming the parameter `name` and its `owner` if it holds NaN or infinity."""
    bad = tensor.numel() - int(tensor.isfinite().sum())
    if bad:
        raise ReconError(f"{owner}: parameter {name!r} holds {bad} NaN or infinite values of {tensor.numel()}")


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype` if it is floating-point, else as it is. Raises `ReconError` naming it if a value becomes infinite."""
    found = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if found.dtype != tensor.dtype and not found.isfinite().all():
        largest, most = tensor.abs().max().item(), torch.finfo(dtype).max
        kind = str(dtype).removeprefix("torch.")
        raise ReconError(f"{name!r} holds {largest:.4g}, more than {kind} can ({most:.4g}); save in bfloat16 or float32")
    return found


def student(
    dense: Decoder, storage: Storage, start: Read | None = None, phases: Sequence[str] = ("reconstruct", "prune")
) -> Decoder:
    """A skeleton of the model `dense`. It reads each parameter from the first of `phases` that has it in `storage`.

    start: reads parameters that no phase has, and the masks in `storage` are applied to them; default: the dense model's values.
    """
    originals = dict(dense.model.named_parameters())

    def copies(names: list[str]) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, originals[name].detach().clone()) for name in names)

    start = start or (dense.lazy.read if dense.lazy else copies)
    known = ChainMap(*map(storage.tensors, phases))  # up to date: windows finished later are found too

    def read(names: list[str]) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, known[name].clone()) for name in names if name in known)
        for name, value in start([name for name in names if name not in known]):
            for matrix in matrices[name]:
                if matrix.name in storage.masks:
                    matrix.oriented(matrix.part_of(value)).masked_fill_(~storage.masks[matrix.name], 0.0)
            yield name, value

    lazy = Lazy(second(dense.model), read)
    for name, value in storage.tensors("prune").items():  # such as biases that the dense model does not have
        lazy.add(name, value.shape)
    made, matrices = decompose(lazy.model, like=dense, lazy=lazy), defaultdict(list)  # by parameter, which may hold several
    for matrix in made.matrices().values():
        matrices[matrix.parameter_name].append(matrix)
    return made
