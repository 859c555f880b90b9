"""The weights of a model that stays on disk: transformers leaves them there (`device_map={"": "disk"}`), and they are read one by one."""

import json
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from recon.errors import ReconError
from recon.model.skeleton import auto_class, place
from recon.runtime.storage import PART, cache_folder

logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of what is asked for


class Weights:
    """The weights of a model that `from_pretrained` has left on disk, with the values that it gives them in memory.

    names: of all parameters; those that are tied under each of their names. surplus: entries that the model has no place for.
    scratch: where transformers has put what is not stored as the model has it, such as stacked experts.
    """

    def __init__(self, model: PreTrainedModel, path: Path, surplus: list[str], scratch: tempfile.TemporaryDirectory):
        hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
        self._stored = next(hook.weights_map for hook in hooks if hook.weights_map is not None)
        while hasattr(self._stored, "dataset"):  # of one module
            self._stored = self._stored.dataset
        for hook in hooks:
            hook.original_devices = {}  # nothing is brought back when it is removed
        remove_hook_from_module(model, recurse=True)
        for entry in self._stored.index.values():
            if not Path(
                entry.get("safetensors_file", path)
            ).exists():  # it looks for all shards beside the first, in a folder below
                shards = json.loads((path / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
                entry["safetensors_file"] = str(path / shards[entry["weight_name"]])
        self.surplus, self._scratch = surplus, scratch
        self._places: dict[str, str] = {}  # the name under which each parameter is stored
        self._computed: dict[str, Tensor] = {}  # what no file has, such as sinusoidal positions
        for name, names in tied(model).items():
            stored = next((other for other in names if other in self._stored.index), "")
            self._places |= {other: other if other in self._stored.index else stored for other in names}
            if not stored:
                place(model, name, nn.Parameter(torch.empty(model.get_parameter(name).shape)))
                model._init_weights(model.get_submodule(name.rpartition(".")[0]))
                self._computed |= dict.fromkeys(names, model.get_parameter(name).detach())
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
        self.names = self._shapes.keys()
        self._finite: set[str] = set()  # parameters without NaN and infinity, as was checked

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The parameters `names` in float32, in memory of their own. Raises `ReconError` naming one that does not fit or is not finite."""
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
    """The model in the folder `path` without its parameters, which are on torch's meta device, and these.

    folder: for what has to be stored anew, such as experts that are stacked; default: the cache.

    Raises `ReconError` naming weights that are missing, or if they are quantised.
    """
    check_unquantised(config)
    folder = folder or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(dir=folder, prefix=".offloaded.", suffix=PART)
    model, surplus = read_model(path, config, trust_remote_code, device_map={"": "disk"}, offload_folder=scratch.name)
    return model.eval(), Weights(model, path, surplus, scratch)


def read_model(path: Path, config: PretrainedConfig, trust_remote_code: bool, **options) -> tuple[PreTrainedModel, list[str]]:
    """What `from_pretrained` makes of the folder `path`, and the entries that it has no place for. Raises for weights that are missing."""
    model, report = auto_class(config).from_pretrained(
        path, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True,
        **options,
    )  # fmt: skip
    if report["missing_keys"]:
        raise ReconError(f"it lacks weights that its config.json calls for: {', '.join(sorted(report['missing_keys']))}")
    return model, sorted(report["unexpected_keys"])


def tied(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by its first; tied parameters have several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {found[0]: found for found in names.values()}


def quantisation(config: PretrainedConfig) -> dict | None:
    """How the weights of a model of this configuration are quantised, including "quant_method"; None if they are not."""
    for part in (config, config.get_text_config()):
        if found := getattr(part, "quantization_config", None):
            found = dict(found) if isinstance(found, dict) else found.to_dict()
            method = found.get("quant_method", "of an unknown kind")
            return found | {"quant_method": getattr(method, "value", method)}
    return None


def check_unquantised(config: PretrainedConfig) -> None:
    """Raises `ReconError` naming the method if the weights of a model of this configuration are quantised."""
    if found := quantisation(config):
        raise ReconError(f"its weights are quantised ({found['quant_method']}); undo their quantisation first")


def check_finite(name: str, tensor: Tensor, owner: str) -> None:
    """Raises `ReconError` naming the parameter `name` and its `owner` if it holds NaN or infinity."""
    bad = tensor.numel() - int(tensor.isfinite().sum())
    if bad:
        raise ReconError(f"{owner}: parameter {name!r} holds {bad} NaN or infinite values of {tensor.numel()}")


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype` if it is floating-point, else as it is. Raises `ReconError` naming it if a value would become infinite."""
    found = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if found.dtype != tensor.dtype and not found.isfinite().all():
        largest, most = tensor.abs().max().item(), torch.finfo(dtype).max
        kind = str(dtype).removeprefix("torch.")
        raise ReconError(f"{name!r} holds {largest:.4g}, more than {kind} can ({most:.4g}); save in bfloat16 or float32")
    return found
