"""A model without weights, whose parameters are in memory only while they are needed."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel


def auto_class(config: PretrainedConfig) -> type:
    """The class of transformers that makes the model of `config`."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def skeleton(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal LM, or encoder-decoder, of `config` in evaluation mode, without weights: its parameters are on torch's meta device, and untied.

    Buffers that are computed, such as rotary frequencies, are there.
    """
    with init_empty_weights(include_buffers=False):
        made = auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    return made.eval()


def placeholder(shape: torch.Size, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """A tensor that takes no memory, full of NaN: whatever is computed from weights that are not there shows it."""
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)


def second(model: PreTrainedModel) -> PreTrainedModel:
    """A second skeleton beside `model`, tied as it is; its parameters are placeholders, whatever those of `model` hold now."""
    # By itself, deepcopy would give placeholders memory.
    return deepcopy(model, {id(parameter): nn.Parameter(placeholder(parameter.shape)) for parameter in model.parameters()})


def is_placeholder(tensor: Tensor) -> bool:
    """Whether `tensor` is made by `placeholder`."""
    return not any(tensor.stride()) and tensor.numel() > 1


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of `tensor` in another place or dtype; of a placeholder, another one."""
    if is_placeholder(tensor):
        return placeholder(tensor.shape, dtype, device)
    return tensor.to(device, dtype, copy=True)


class Lazy:
    """The parameters of a skeleton: there while they are asked for, and placeholders otherwise.

    Args:
        model: its parameters become placeholders, in float32 on the CPU; what is tied stays tied.
        read: gives the values (float32, not shared with anything) of parameters by full name, in any order.
        done: called with the names of parameters that have just been read.
    """

    def __init__(
        self,
        model: nn.Module,
        read: Callable[[list[str]], Iterator[tuple[str, Tensor]]],
        done: Callable[[list[str]], None] = lambda names: None,
    ):
        self.model = model
        self.read = read
        self.done = done
        self.parameters: dict[str, nn.Parameter] = {}
        made: dict[nn.Parameter, nn.Parameter] = {}
        for path, module in model.named_modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                if parameter not in made:
                    made[parameter] = nn.Parameter(placeholder(parameter.shape))
                    self.parameters[f"{path}.{name}" if path else name] = made[parameter]
                module._parameters[name] = made[parameter]
        self._names = {parameter: name for name, parameter in self.parameters.items()}
        self._users: Counter[str] = Counter()

    def add(self, name: str, shape: torch.Size) -> bool:
        """Takes in the parameter `name` that something else gave the model, or is to, such as a bias; False: it is known."""
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        if getattr(module, attribute) in self._names:
            return False
        self.parameters[name] = nn.Parameter(placeholder(shape))
        self._names[self.parameters[name]] = name
        setattr(module, attribute, self.parameters[name])
        return True

    @contextlib.contextmanager
    def reading(self, read: Callable[[list[str]], Iterator[tuple[str, Tensor]]]) -> Iterator[None]:
        """Context in which values come from `read` instead."""
        own, self.read, done, self.done = self.read, read, self.done, lambda names: None
        try:
            yield
        finally:
            self.read, self.done = own, done

    @contextlib.contextmanager
    def present(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Context in which `parameters` are there; those that an outer context asked for already stay till its end.

        Parameters that were added to the model later, such as those of adapters, are left alone.
        """
        names = [self._names[parameter] for parameter in dict.fromkeys(parameters) if parameter in self._names]
        fresh = [name for name in names if not self._users[name]]
        self._users.update(names)
        try:
            for name, value in self.read(fresh):
                self.parameters[name].data = value
            self.done(fresh)
            yield
        finally:
            self._users.subtract(names)
            for name in names:
                if not self._users[name]:
                    parameter = self.parameters[name]
                    parameter.data, parameter.grad = placeholder(parameter.shape), None


def made_up(parameters: dict[str, nn.Parameter]) -> Callable[[list[str]], Iterator[tuple[str, Tensor]]]:
    """A `read` for `Lazy` that makes weights up: random ones of a usual size, to find a model's structure by.

    Vectors and matrices overlap with themselves in memory, of which they take next to none: entry (i, j) is number i + j of a random
    sequence. What has more dimensions repeats a random sequence.
    """

    def read(names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for number, name in enumerate(parameters):
            if name not in names:
                continue
            shape, random = parameters[name].shape, torch.Generator().manual_seed(number)
            if len(shape) < 2:
                noise = 0.2 * torch.randn(shape, generator=random)
                yield name, noise + 1 if name.endswith("weight") else noise
            elif len(shape) == 2:
                rows, columns = shape
                sequence = torch.randn(rows + columns, generator=random) / columns**0.5
                yield name, sequence.as_strided((rows, columns), (1, 1))
            else:
                sequence = torch.randn(1_000_003, generator=random) / shape[-1] ** 0.5
                yield name, sequence.repeat(-(-shape.numel() // len(sequence)))[: shape.numel()].view(shape)

    return read
