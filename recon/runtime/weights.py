"""The weights of a model whose parameters stay on disk, read from safetensors one by one."""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

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
)

from recon.errors import ReconError
from recon.model.skeleton import place, skeleton

log = logging.getLogger("recon")
PLAIN = ("F64", "F32", "BF16", "F16")  # safetensors dtypes of weights that need no scale from elsewhere


class _File:
    """A safetensors file that is read from, and must not change meanwhile. Raises `ReconError` naming it if it is not whole."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._state, self.opened = path.stat(), safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ReconError(f"{str(path)!r} is not a whole safetensors file: {error}") from error

    def tensor(self, entry: str) -> Tensor:
        """A copy of a tensor, as that in the file is mapped; in float32 if it is floating-point."""
        self._check_untouched()  # reading behind the end of a shortened file would kill the process
        tensor = self.opened.get_tensor(entry)
        tensor = tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        self._check_untouched()
        return tensor

    def _check_untouched(self) -> None:
        """Raises `ReconError` if the file has been written to, by its size and time; not if another file has replaced it."""
        with contextlib.suppress(OSError):
            now, before = self.path.stat(), self._state
            same = (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
            if same and (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise ReconError(
                    f"{str(self.path)!r} has been written to while this run read from it; restore it, and give the same command again"
                )


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
        self.transforms = get_model_conversion_mapping(model)
        self._files: dict[str, _File] = {}  # by entry
        self._sources: dict[str, _Source] = {}  # by parameter
        self._unknown: set[str] = set()  # entries that the model has no place for
        self._finite: set[str] = set()  # parameters without NaN and infinity, as was checked
        self.computed: dict[str, Tensor] = {}  # parameters that no file has, because transformers computes them
        for file in files:
            self.add(file)

    def add(self, path: Path) -> None:
        """Adds the entries of one more file.

        Raises `ReconError` naming the file if it is not a complete safetensors file, or has a quantised entry, which is named too.
        """
        file = _File(path)
        renamings = [each for each in self.transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in self.transforms if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        prefix = self.model.base_model_prefix
        for entry in file.opened.keys():  # noqa: SIM118 - it is no mapping
            target, pattern = rename_source_key(entry, renamings, converters, prefix, self._known)
            if target not in self._known and entry in self._known:
                target, pattern = rename_source_key(entry, [], [], prefix, self._known)
            if target not in self._known:
                self._unknown.add(entry)
                continue
            if self._known[target][1] and (kind := file.opened.get_slice(entry).get_dtype()) not in PLAIN:
                allowed = ", ".join(PLAIN)
                raise ReconError(
                    f"{str(path)!r}: weight {entry!r} is stored as {kind}; allowed: {allowed}. Undo its quantisation first"
                )
            if entry not in self._files:
                converter = by_pattern.get(pattern)
                source = self._sources.setdefault(target, _Source(target, converter))
                source.entries.append((entry, pattern))
                source.entries.sort(key=lambda found: dot_natural_key(found[0]))
                for other in converter.target_patterns[1:] if converter else ():
                    self._sources[target.replace(converter.target_patterns[0], other)] = source
            self._files[entry] = file

    def unmatched(self) -> tuple[set[str], list[str]]:
        """Names in the model's state that no file holds, and entries that it has no place for; not those that its class ignores."""
        found = SimpleNamespace(missing_keys=self._known.keys() - self._sources.keys(), unexpected_keys=self._unknown)
        self.model._adjust_missing_and_unexpected_keys(found)
        return found.missing_keys, sorted(found.unexpected_keys)

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The parameters and buffers called `names`, in any order: floating-point ones in float32, all in memory of their own.

        A tied parameter may be stored under any of its names.

        Raises `ReconError` naming one that is missing, has another shape than the model's, or holds NaN or infinity; and a file that
        has been written to since it was opened.
        """
        wanted = {name: self._stored(name) for name in names}
        while wanted:
            stored = next(iter(wanted.values()))
            made = {stored: self.computed[stored].clone()} if stored in self.computed else self._made(stored)
            if stored not in made:
                raise ReconError(f"the checkpoint's weights do not make up {stored!r}")
            for name in [name for name, stored in wanted.items() if stored in made]:
                stored = wanted.pop(name)
                self._check(stored, made[stored])
                yield name, made[stored]

    def _stored(self, name: str) -> str:
        """The name under which parameter `name` is stored."""
        if name in self._sources or name in self.computed:
            return name
        names = next((names for names in tied(self.model).values() if name in names), ())
        return next((other for other in names if other in self), name)

    def _check(self, name: str, tensor: Tensor) -> None:
        if name not in self._finite and name not in self.computed:
            file, shape = repr(str(self._files[self._sources[name].entries[-1][0]].path)), self._known[name][0]
            if tensor.shape != shape:
                raise ReconError(f"{file}: weight {name!r} is {tuple(tensor.shape)}, not {tuple(shape)}")
            check_finite(name, tensor, file)
            self._finite.add(name)

    def _made(self, name: str) -> dict[str, Tensor]:
        """The parameters that are made from the same entries as `name`, by name."""
        if name not in self:
            raise ReconError(f"the checkpoint has no weight {name!r}")
        source = self._sources[name]
        if source.converter is None:
            entry, _ = source.entries[-1]
            return {source.target: self._files[entry].tensor(entry)}
        converter = deepcopy(source.converter)
        for entry, pattern in source.entries:
            converter.add_tensor(source.target, entry, pattern, self._files[entry].tensor(entry))
        made = converter.convert(source.target, model=self.model, config=self.model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


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

    Weights that the model has no place for are left out, with a warning, as `from_pretrained` does.

    Raises `ReconError` naming weights that are missing or quantised.
    """
    check_unquantised(config)
    model = skeleton(config, trust_remote_code)
    checkpoint = Checkpoint(model, files)
    missing, surplus = checkpoint.unmatched()
    warn_of_surplus(model, surplus)
    # Where a checkpoint holds both of two parameters that its configuration ties, they are tied only if their values are equal.
    pairs = {name for pair in model.all_tied_weights_keys.items() for name in pair if not set(pair) & missing}
    for name, value in checkpoint.read(pairs):
        place(model, name, nn.Parameter(value))
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    if missing:
        raise ReconError(f"weights that the configuration calls for are missing: {', '.join(sorted(missing))}")
    for name, names in tied(model).items():
        if not any(other in checkpoint for other in names):  # such as sinusoidal positions, which transformers computes
            owner, shape = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name).shape
            place(model, name, nn.Parameter(torch.empty(shape)))
            model._init_weights(owner)
            checkpoint.computed[name] = model.get_parameter(name).detach()
    for name, buffer in model.named_buffers():
        if name in checkpoint:
            [(_, value)] = checkpoint.read([name])
            buffer.data = value.to(buffer.dtype)
    model._weight_conversions = [rule for rule in checkpoint.transforms if rule.was_used()]  # saving reverses these
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
