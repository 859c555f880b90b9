"""Skeletons: models without weights, whose parameters are in memory only while they are needed."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel

from recon.errors import ReconError
from recon.model.modules import standard

LENGTHS = "max_position_embeddings", "max_target_positions", "max_seq_len"  # what configs call the longest sequence
# Takes names of parameters; yields each name with its value, in any order.
Read = Callable[[list[str]], Iterator[tuple[str, Tensor]]]


def auto_class(config: PretrainedConfig) -> type:
    """The class of transformers that builds the model of `config`."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def max_length(config: PretrainedConfig) -> int | None:
    """The longest sequence, in tokens, that the model of `config` was made for; None if `config` does not say."""
    named = (getattr(config.get_text_config(), name, None) for name in LENGTHS)
    longest = next((length for length in named if isinstance(length, int)), None)
    return longest and longest * (2 if config.is_encoder_decoder else 1)  # an encoder-decoder reads it in two halves


def skeleton(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of `config` in evaluation mode. Parameters are on torch's meta device, not tied; buffers have their values.

    Raises `ReconError` for a `config` that transformers has no language model for.
    """
    with init_empty_weights(include_buffers=False):
        try:
            return auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code).eval()
        except ValueError as error:
            said = str(error).partition("\n")[0]
            raise ReconError(f"no language model can be made of {type(config).__name__}: {said}") from error


def placeholder(shape: torch.Size, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """A tensor full of NaN that takes no memory. What is computed from weights that are not in memory is thus NaN, too."""
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)


def second(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the skeleton `model`, tied in the same way, whose parameters are placeholders."""
    # New placeholders go into the memo: made by deepcopy, they would take memory.
    return deepcopy(model, {id(parameter): nn.Parameter(placeholder(parameter.shape)) for parameter in model.parameters()})


def is_placeholder(tensor: Tensor) -> bool:
    """Whether `tensor` was made by `placeholder`."""
    return not any(tensor.stride()) and tensor.numel() > 1


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of `tensor` on another device or in another dtype; a placeholder gives another placeholder."""
    if is_placeholder(tensor):
        return placeholder(tensor.shape, dtype, device)
    return tensor.to(device, dtype, copy=True)


def place(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Sets `parameter` as the parameter of `model` with the full name `name`."""
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, parameter)


def tied(model: nn.Module) -> dict[str, list[str]]:
    """First name of each parameter -> all its names; a tied parameter has several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {found[0]: found for found in names.values()}


class Lazy:
    """The parameters of a skeleton: in memory inside `present`, otherwise placeholders in float32 on the CPU. Ties are kept.

    read: yields values in float32 that share no memory with other tensors.
    """

    def __init__(self, model: nn.Module, read: Read):
        self.model, self.read = model, read
        self.parameters: dict[str, nn.Parameter] = {}
        self._names: dict[nn.Parameter, str] = {}
        self._users: Counter[str] = Counter()
        for name, names in tied(model).items():
            self.add(name, model.get_parameter(name).shape)
            for other in names[1:]:
                place(model, other, self.parameters[name])

    def add(self, name: str, shape: torch.Size) -> None:
        """Adds the parameter `name` to the model unless it is known already: such as a bias that pruning gives a matrix."""
        path, _, attribute = name.rpartition(".")
        if getattr(self.model.get_submodule(path), attribute) not in self._names:
            self.parameters[name] = nn.Parameter(placeholder(shape))
            self._names[self.parameters[name]] = name
            place(self.model, name, self.parameters[name])

    @contextlib.contextmanager
    def made_up(self) -> Iterator[None]:
        """Context in which `read` gives random weights of usual magnitude, with which a model's structure can be found.

        Matrices of standard modules take little memory: entry (i, j) is entry i + j of one random vector.
        """

        def read(names: list[str]) -> Iterator[tuple[str, Tensor]]:
            for number, name in enumerate(self.parameters):
                if name in names:
                    shape, random = self.parameters[name].shape, torch.Generator().manual_seed(number)
                    small = len(shape) == 2 and standard(self.model, name)
                    values = torch.randn(sum(shape) if small else shape, generator=random)
                    if len(shape) < 2:
                        yield name, 0.2 * values + name.endswith("weight")
                    else:
                        yield name, (values / shape[-1] ** 0.5).as_strided(shape, (1, 1) if small else values.stride())

        own, self.read = self.read, read
        try:
            yield
        finally:
            self.read = own

    @contextlib.contextmanager
    def present(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """Context in which `parameters` are in memory; if nested, until the last one ends. Ignores parameters of other models."""
        names = [self._names[parameter] for parameter in dict.fromkeys(parameters) if parameter in self._names]
        fresh = [name for name in names if not self._users[name]]
        self._users.update(names)
        try:
            for name, value in self.read(fresh):
                self.parameters[name].data = value
            yield
        finally:
            self._users.subtract(names)
            for name in names:
                if not self._users[name]:
                    parameter = self.parameters[name]
                    parameter.data, parameter.grad = placeholder(parameter.shape), None
