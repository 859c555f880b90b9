"""The weights of a model whose parameters stay on disk, read from safetensors one by one."""

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from recon.errors import ReconError
from recon.model.skeleton import skeleton

log = logging.getLogger("recon")
PLAIN = ("F64", "F32", "BF16", "F16")  # safetensors dtypes of weights that need no scale from elsewhere
SAVED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # dtypes that a model can be saved in


@dataclass
class _Source:
    """The entries of a checkpoint that a parameter is made from, each with the pattern of the converter that it matched."""

    target: str
    converter: WeightConverter | None
    entries: list[tuple[str, str | None]] = field(default_factory=list)


class Checkpoint:
    """The weights in safetensors files, read parameter by parameter, with the values that `from_pretrained` gives them.

    Transformers' rules for the model's architecture rename entries, and stack experts that files hold one by one.

    Args:
        model: a skeleton, or any model of the architecture.
        files: safetensors files; if two hold the same entry, the later one counts.
    """

    def __init__(self, model: PreTrainedModel, files: Iterable[Path] = ()):
        self.model = model
        # Shapes, not tensors, which would stay in memory.
        self._known = {name: (tensor.shape, tensor.is_floating_point()) for name, tensor in model.state_dict().items()}
        self._transforms = get_model_conversion_mapping(model)
        self._files: dict[str, tuple[object, Path]] = {}  # entry -> its open file
        self._states: dict[Path, os.stat_result] = {}  # file -> its state when it was opened
        self._sources: dict[str, _Source] = {}  # by parameter
        self.unknown: list[str] = []  # entries that the model has no place for
        self.computed: dict[str, Tensor] = {}  # parameters that no file has, because transformers computes them
        self._finite: set[str] = set()  # parameters without NaN and infinity, as was checked
        for file in files:
            self.add(file)

    def add(self, file: Path) -> None:
        """Adds the entries of one more file.

        Raises `ReconError` naming the file if it is not a complete safetensors file, or has a quantised entry, which is named too.
        """
        try:
            self._states[file], opened = file.stat(), safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ReconError(f"{str(file)!r} is not a whole safetensors file: {error}") from error
        renamings = [each for each in self._transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in self._transforms if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        prefix = self.model.base_model_prefix
        for entry in opened.keys():  # noqa: SIM118 - it is no mapping
            target, pattern = rename_source_key(entry, renamings, converters, prefix, self._known)
            if target not in self._known and entry in self._known:
                target, pattern = rename_source_key(entry, [], [], prefix, self._known)
            if target not in self._known:
                self.unknown.append(entry)
                continue
            if self._known[target][1]:
                check_stored(entry, opened.get_slice(entry).get_dtype(), file)
            if entry not in self._files:
                converter = by_pattern.get(pattern)
                source = self._sources.setdefault(target, _Source(target, converter))
                source.entries.append((entry, pattern))
                source.entries.sort(key=lambda found: dot_natural_key(found[0]))
                for other in converter.target_patterns[1:] if converter else ():
                    self._sources[target.replace(converter.target_patterns[0], other)] = source
            self._files[entry] = opened, file

    @property
    def transforms(self) -> list:
        """Transformers' rules that were applied to these files, which saving has to reverse."""
        return [each for each in self._transforms if each.was_used()]

    @property
    def surplus(self) -> list[str]:
        """The entries that the model has no place for, without those that its class ignores."""
        ignored, buffers = list(self.model._keys_to_ignore_on_load_unexpected or ()), [n for n, _ in self.model.named_buffers()]
        # As in transformers: old files have these buffers, which are computed now.
        for ending, pattern in (("rotary_emb.inv_freq", r"rotary_emb\.inv_freq"), ("position_ids", r"(^|\.)position_ids$")):
            if any(name.endswith(ending) for name in buffers):
                ignored.append(pattern)
        return [name for name in self.unknown if not any(re.search(pattern, name) for pattern in ignored)]

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The parameters and buffers called `names`, in any order: floating-point ones in float32, all in memory of their own.

        Raises `ReconError` naming one that is missing, has another shape than the model's, or holds NaN or infinity; and a file that
        has been written to since it was opened.
        """
        wanted = dict.fromkeys(names)
        while wanted:
            name = next(iter(wanted))
            made = {name: self.computed[name].clone()} if name in self.computed else self._made(name)
            if name not in made:
                raise ReconError(f"the checkpoint's weights do not make up {name!r}")
            for found in [each for each in made if each in wanted]:
                yield found, self._checked(found, made[found])
                del wanted[found]

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._finite and name not in self.computed:
            file, shape = repr(str(self._files[self._sources[name].entries[-1][0]][1])), self._known[name][0]
            if tensor.shape != shape:
                raise ReconError(f"{file}: weight {name!r} is {tuple(tensor.shape)}, not {tuple(shape)}")
            check_finite(name, tensor, file)
            self._finite.add(name)
        return tensor

    def _made(self, name: str) -> dict[str, Tensor]:
        """The parameters that are made from the same entries as `name`, by name."""
        if name not in self._sources:
            raise ReconError(f"the checkpoint has no weight {name!r}")
        source = self._sources[name]
        if source.converter is None:
            return {source.target: self._entry(source.entries[-1][0])}
        converter = deepcopy(source.converter)
        for entry, pattern in source.entries:
            converter.add_tensor(source.target, entry, pattern, self._entry(entry))
        made = converter.convert(source.target, model=self.model, config=self.model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    def _entry(self, name: str) -> Tensor:
        opened, path = self._files[name]
        _check_untouched(path, self._states[path])  # reading behind the end of a shortened file would kill the process
        tensor = opened.get_tensor(name)
        # A copy, as the tensor is mapped from the file, which must not change.
        tensor = tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        _check_untouched(path, self._states[path])
        return tensor


def _check_untouched(path: Path, before: os.stat_result) -> None:
    """Raises `ReconError` if the file at `path` has been written to since, by its size and time; not if another file has replaced it."""
    try:
        now = path.stat()
    except OSError:
        return
    same = (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
    if same and (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise ReconError(
            f"{str(path)!r} has been written to while this run read from it; restore it, and give the same command again"
        )


def tied(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by its first; tied parameters have several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {found[0]: found for found in names.values()}


def reader(model: nn.Module, checkpoint: Checkpoint) -> Callable[[list[str]], Iterator[tuple[str, Tensor]]]:
    """For `Lazy`: reads parameters of `model` by full name from `checkpoint`, which has a tied parameter under any of its names."""
    stored = {name: next((other for other in names if other in checkpoint), name) for name, names in tied(model).items()}

    def read(wanted: list[str]) -> Iterator[tuple[str, Tensor]]:
        names = {stored[name]: name for name in wanted}
        for found, value in checkpoint.read(names):
            yield names[found], value

    return read


def _place(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, parameter)


def check_stored(name: str, kind: str, file: Path) -> None:
    """Raises `ReconError` naming a weight that is stored in a safetensors dtype `kind` which needs scales from elsewhere."""
    if kind not in PLAIN:
        raise ReconError(
            f"{str(file)!r}: weight {name!r} is stored as {kind}; allowed: {', '.join(PLAIN)}. Undo its quantisation first"
        )


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


def warn_of_surplus(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Warns if there are `names`: of entries in a checkpoint that `model` has no place for."""
    if names := sorted(names):
        log.warning(
            "%s has no place for weight %r of its checkpoint (%d such): left out", type(model).__name__, names[0], len(names)
        )


def check_finite(name: str, tensor: Tensor, owner: str) -> None:
    """Raises `ReconError` naming the parameter `name` and its `owner` if it holds NaN or infinity."""
    bad = tensor.numel() - int(tensor.isfinite().sum())
    if bad:
        raise ReconError(f"{owner}: parameter {name!r} holds {bad} NaN or infinite values of {tensor.numel()}")


def open_model(
    config: PretrainedConfig, files: Iterable[Path], trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Checkpoint]:
    """The skeleton of `config`, tied as `from_pretrained` ties it, and its weights in `files`.

    Weights that the model has no place for are left out, with a warning, as there.

    Raises `ReconError` naming weights that are missing or quantised.
    """
    check_unquantised(config)
    model = skeleton(config, trust_remote_code)
    checkpoint = Checkpoint(model, files)
    warn_of_surplus(model, checkpoint.surplus)
    missing = {name for name in model.state_dict() if name not in checkpoint}
    missing -= {name for name in missing for kept in model._keys_to_ignore_on_load_missing or () if re.search(kept, name)}
    # If a checkpoint has both of what its configuration ties, they are tied only if their values are equal.
    pairs = {name for pair in model.all_tied_weights_keys.items() for name in pair if not set(pair) & missing}
    for name, value in checkpoint.read(pairs):
        _place(model, name, nn.Parameter(value))
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    if missing:
        raise ReconError(f"weights that the configuration calls for are missing: {', '.join(sorted(missing))}")
    for name, names in tied(model).items():
        if not any(other in checkpoint for other in names):  # such as sinusoidal positions, which transformers computes
            owner, shape = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name).shape
            _place(model, name, nn.Parameter(torch.empty(shape)))
            model._init_weights(owner)
            checkpoint.computed[name] = model.get_parameter(name).detach()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = {name for name in model.state_dict() if name not in parameters}
    for name, value in checkpoint.read(name for name in stored if name in checkpoint):
        model.get_buffer(name).data = value.to(model.get_buffer(name).dtype)
    model._weight_conversions = checkpoint.transforms
    return model, checkpoint


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype` if it is floating-point, else as it is; zeros stay zeros.

    Raises `ReconError` naming the parameter or buffer `name` if a finite value would become infinite.
    """
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    found = tensor.to(dtype)
    if not found.isfinite().all():
        largest = tensor.abs().max().item()
        raise ReconError(
            f"{name!r} holds {largest:.4g}, more than {str(dtype).removeprefix('torch.')} can ({torch.finfo(dtype).max:.4g}); save in "
            "bfloat16 or float32"
        )
    return found


def as_stored(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` under the names, and in the parts, in which `save_pretrained` stores them; see `Checkpoint`."""
    return revert_weight_conversion(model, tensors)
