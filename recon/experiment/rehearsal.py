"""A run rehearsed on shapes: the pipeline itself on tensors that have no values, with every byte they would take written down.

Nothing about memory is written here a second time. The passes run as they are, on torch's fake tensors, which know their shape,
dtype and device and hold nothing; a ledger adds up what is alive at every place in the code. Blocks that are alike are not all
rehearsed: what a few of them take tells what more would.
"""

import contextlib
import copy
import itertools
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from recon.experiment import run as runs
from recon.experiment.config import RunSpec
from recon.experiment.record import RunRecord
from recon.experiment.run import Measured, Pruned, Run, Session
from recon.kernels import adapters, losses
from recon.kernels.criteria import sparsegpt
from recon.kernels.gradient_descent import Curve, Schedule
from recon.methods import reconstruct as reconstruction
from recon.methods import statistics
from recon.methods.fit import fit
from recon.model.decoder import Decoder
from recon.model.discovery import take_apart
from recon.model.skeleton import Lazy, auto_class, skeleton
from recon.runtime.activations import SMALL
from recon.runtime.device import HOST, PeakMemory
from recon.runtime.execution import Execution
from recon.runtime.store import MemoryStore

# What a tensor is for, by the function of this library that made it: the innermost one that is named here counts.
PARTS = {
    "Rehearsal.load": "dense model",
    "StreamedRehearsal.read": "weights in hand",
    "Run.copy_of_dense": "pruned model",
    "Run.prune": "pruned model",
    "prune": "masks and scores",
    "prune_units": "masks and scores",
    "apply": "pruned model",
    "_prune_matrix": "masks and scores",
    "gather": "statistics of inputs",
    "_Pass.begin": "activations of all samples",
    "_Pass.dense_inputs": "activations of all samples",
    "_Pass.error": "measuring errors",
    "_Pass.copied": "copy of the window",
    "_Pass.repair": "copy of the window",
    "_Pass.solve_exactly": "exact solutions",
    "optimise": "gradients and AdamW",
    "retrain": "copy of the model",
    "Execution._holding": "weights in the compute dtype",
    "Execution.run": "activations of all samples",
    "Execution._batch": "one batch",
    "Execution._read": "one batch",
    "Decoder.forward": "one batch",
    "Blocks.embed": "one batch",
    "Blocks.logits": "logits",
    "_loss": "one batch",
    "drift": "measuring errors",
    "perplexity": "logits",
    "Spilled.mapped": "in mapped files",
}
FILES = "in mapped files"  # which are no memory that has to be there
OTHER = "other"
_HOME = str(Path(__file__).parents[1])


@dataclass
class Peaks:
    """The most bytes alive at once at each place in the code, divided by what they are for (see `PARTS`).

    A place is the phase, the kind of device, and the lines of this library that led to an allocation.
    """

    found: dict[tuple, dict[str, float]] = field(default_factory=dict)

    def highest(self, device: str = "cpu") -> dict[str, dict[str, float]]:
        """Of each phase, the parts of the highest peak on that kind of device; none of phases that take nothing there."""
        highest: dict[str, dict[str, float]] = {}
        for (phase, where, *_), parts in self.found.items():
            if where == device and sum(parts.values()) > sum(highest.get(phase, {}).values()):
                highest[phase] = parts
        return highest

    def plus(self, other: "Peaks", factor: float) -> "Peaks":
        """This and `factor` times the other's, place by place, as far as both know the place."""
        both = {}
        for place in self.found.keys() & other.found.keys():
            mine, theirs = self.found[place], other.found[place]
            both[place] = {part: mine.get(part, 0.0) + factor * theirs.get(part, 0.0) for part in mine | theirs}
        return Peaks(both)


class Ledger(TorchDispatchMode):
    """While active, notes the bytes of all tensors that are made, and those that go."""

    def __init__(self, equal: bool, device: torch.device = HOST):
        super().__init__()
        self.equal = equal
        self.device = device
        self.phase = "copy"
        self.all_experts = False
        self.peaks = Peaks()
        self._alive: dict[str, dict[str, int]] = {}
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:  # torch's own code asks; see `_as_if_on`
            return HOST if (device := _device(args[0])) == self.device else device
        if function is torch.ops.aten._local_scalar_dense.default:
            known = _known(args[0])
            return _answer(args[0].dtype) if known is None else known.item()
        if function is torch.ops.aten.equal.default:
            return self.equal
        if kwargs and kwargs.get("device") == HOST and torch._C._current_autograd_node() is not None:
            kwargs = kwargs | {"device": self.device}  # gradients are where all is computed, whatever the answer above was
        if function is torch.ops.aten._to_copy.default and "layout" in (kwargs or {}):
            # Torch's own code, in the midst of something else, takes the tensor for one of the host; what Python asks for goes by `_moved`.
            kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        made = (partial(_of_host, function) if function in CONVOLUTIONS else function)(*args, **(kwargs or {}))
        if function in ROUTERS:
            _choose(made, self.all_experts, *args)
        elif function.overloadpacket in COUNTERS and made.numel() <= VALUES:
            with no_dispatch():
                made.constant = function(*args, **(kwargs or {}) | ({"device": HOST} if "device" in (kwargs or {}) else {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                if _known(tensor) is not None:  # values are computed on the host, wherever they are said to be
                    tensor.fake_device = _where(args, kwargs) or tensor.fake_device
                self._note(tensor)
        return made

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size, device = storage._cdata, storage.nbytes(), _device(tensor).type
        if key in self._known:
            return
        part, lines = _place()
        if part == FILES and device == HOST.type:
            size = 0  # of memory; noted all the same, as what is made of it is no other piece
        alive = self._alive.setdefault(device, {})

        def gone(_) -> None:
            del self._known[key]
            alive[part] -= size

        self._known[key] = weakref.ref(storage, gone)
        alive[part] = alive.get(part, 0) + size
        place = (self.phase, device, lines)
        if sum(alive.values()) > sum(self.peaks.found.get(place, {}).values()):
            self.peaks.found[place] = dict(alive)


def _of_host(function: Callable, *args, **kwargs) -> object:
    """What `function` makes, which asks the driver of its tensors' device; it is told that they are the host's, and what it makes is theirs."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
    homes = [tensor.fake_device for tensor in tensors]
    for tensor in tensors:
        tensor.fake_device = HOST
    try:
        made = function(*args, **kwargs)
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.fake_device = home
    for tensor in tree_leaves(made):
        if isinstance(tensor, FakeTensor):
            tensor.fake_device = homes[0]
    return made


def _device(tensor: Tensor) -> torch.device:
    """Its device, without asking the modes that are active for it, as `tensor.device` would."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def _where(args: tuple, kwargs: dict | None) -> torch.device | None:
    """The device that is asked for, or that the tensors among the arguments are on."""
    if kwargs and kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    found = [_device(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    return next((device for device in found if device != HOST), HOST) if found else None


def _place() -> tuple[str, tuple]:
    """What the tensor that is being made is for, and the lines of this library that led to it."""
    part, lines, frame = None, [], sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_HOME) and code.co_filename != __file__ or code.co_qualname in PARTS:
            lines.append((code, frame.f_lineno))
            part = part or PARTS.get(code.co_qualname)
        frame = frame.f_back
    return part or OTHER, tuple(lines)


def _answer(dtype: torch.dtype) -> bool | int | float:
    """What a tensor without values says when it is asked for one: all is well, and nothing failed."""
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0


CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
ROUTERS = (torch.ops.aten.topk.default, torch.ops.aten.argmax.default)  # what chooses the experts of a token
COUNTERS = tuple(getattr(torch.ops.aten, name) for name in ("zeros", "arange"))  # what choices are compared with, or written to
EXPERTS = 8  # among which all tokens are divided, unless each has to be seen
VALUES = 2**26  # entries of the largest tensor that has values


def _known(tensor: Tensor) -> Tensor | None:
    """The values of a tensor that does have some."""
    return getattr(tensor, "constant", None)


def _choose(made: Tensor | tuple[Tensor, Tensor], all_of_them: bool, tensor: Tensor, *options) -> None:
    """Gives values to the choices that a router `made` along a dimension of `tensor`: each entry is chosen as often as any other.

    What is computed from them, such as which tokens an expert reads, then has values and shapes as well: torch sees to that. How many
    tokens go through all experts together is the same however they are divided, and a few experts are rehearsed faster than many.
    """
    one = isinstance(made, Tensor)
    places, count, dim = (made, 1, (*options, None)[0]) if one else (made[1], options[0], (*options[1:], -1)[0])
    if dim is None or places.numel() > VALUES:
        return
    among = tensor.shape[dim] if all_of_them else min(tensor.shape[dim], max(count, EXPERTS))
    shape = places.shape if one else places.movedim(dim, -1).shape
    with no_dispatch():
        chosen = torch.arange(places.numel()).remainder_(among).view(shape)
        places.constant = chosen if one else chosen.movedim(-1, dim)


class _Answers(TorchFunctionMode):
    """Answers what Python asks tensors without values; cuts short what would only be repeated."""

    def __init__(self, order: int):
        super().__init__()
        self.order = order

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.tolist:
            known = _known(args[0])
            return _zeros(args[0].shape) if known is None else known.tolist()
        if function is torch.Tensor.__deepcopy__ and _known(args[0]) is not None:
            args[0].constant = None  # which cannot be copied like this; what lies about as a module's attribute needs no values
        if function in (torch.Tensor.isnan, torch.isnan):
            return _Nowhere(args[0])
        if (
            function is torch.Tensor.__getitem__
            and isinstance(args[1], Tensor)
            and args[1].dtype == torch.bool
            and _known(args[1]) is None
        ):
            return args[0].clone()  # all that a condition could choose
        if function is torch.randperm:  # the order of samples: more steps would only repeat those before
            args = (min(args[0], self.order),)
        if function is torch.Tensor.to:
            return _moved(*args, **(kwargs or {}))
        if function is torch.Tensor.cpu:
            return _moved(args[0], HOST)
        made = function(*args, **(kwargs or {}))
        if function == _SET_DATA:  # which leaves alone what Python knows of a tensor
            args[0].fake_device = args[1].fake_device
        return made


_SET_DATA = torch.Tensor.data.__set__


class _Nowhere:
    """What `isnan` finds in a tensor: nothing."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def any(self) -> bool:
        return False


def _zeros(shape: torch.Size) -> list | int:
    return [_zeros(shape[1:]) for _ in range(shape[0])] if shape else 0


class _Stream(contextlib.nullcontext):
    """Stands for a stream of a device that is not there: all is done at once."""

    def __init__(self, *device):
        super().__init__()

    def wait_stream(self, other) -> None:
        pass

    def synchronize(self) -> None:
        pass


@contextlib.contextmanager
def _as_if_on(device: torch.device) -> Iterator[None]:
    """While active, there can be tensors without values on `device`, though this machine has none, nor this build of torch.

    Python sees them there, and what mixes devices fails as it would. Torch's own code, which would look for a driver, takes them for
    tensors of the CPU; so does autocast, whose lists for the two kinds of device agree on products.
    """
    if device == HOST:
        yield
        return
    make, autocast = torch.Tensor._make_subclass, torch.autocast

    def on_host(*args, **options):
        return make(*args, **(options | {"device_for_backend_keys": HOST} if "device_for_backend_keys" in options else options))

    def of_host(function):
        return lambda device_type, *args, **options: function(HOST.type, *args, **options)

    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in (
            (torch.Tensor, "_make_subclass", on_host),
            (torch, "autocast", of_host(autocast)),
            (torch.amp, "autocast", of_host(autocast)),
            (torch, "is_autocast_enabled", of_host(torch.is_autocast_enabled)),
            (torch, "get_autocast_dtype", of_host(torch.get_autocast_dtype)),
            (torch.cuda, "Stream", _Stream),
            (torch.cuda, "current_stream", _Stream),
            (torch.cuda, "stream", _Stream),
            (torch.Tensor, "record_stream", lambda tensor, stream: None),
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        yield


def _moved(tensor: Tensor, *args, copy: bool = False, **options) -> Tensor:
    """As `tensor.to`, which would look at what torch's own code takes for the tensor's device."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **options)
    dtype = dtype or tensor.dtype
    if device in (None, tensor.device) and dtype == tensor.dtype and not copy:
        return tensor
    return torch.ops.aten._to_copy(tensor, dtype=dtype, device=device or tensor.device)


def _brought(module: torch.nn.Module, *args, **options) -> torch.nn.Module:
    """As `module.to`, which does not know what to do with tensors without values; they keep their dtype."""
    device = torch._C._nn._parse_to(*args, **options)[0]
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        for part in (tensor.grad, tensor):
            if part is not None and device not in (None, part.device):
                part.data = part.data.to(device)
    return module


class _Fake(FakeTensorMode):
    """Copies of fake tensors belong to the same mode."""

    def __deepcopy__(self, memo: dict) -> "_Fake":
        return self


REPEATED = 2  # batches that a pass is rehearsed on: the second runs while what the first gave is still there


@contextlib.contextmanager
def _cut_short(order: int, ledger: Ledger) -> Iterator[None]:
    """While active, what is done over and over in the same memory is done once or twice.

    order: samples that a training sees.
    """
    every_batch, every_step, watching = Execution.batches, Schedule.steps, Decoder.watching

    def some_batches(execution: Execution, streams, parts) -> Iterator[tuple[Tensor, ...]]:
        parts = list(parts)
        few = 1 if len(streams) > 1 else REPEATED  # predictions are repeated within a batch, slice by slice
        return every_batch(execution, streams, parts[:few] if isinstance(parts[0], range) else parts)

    def all_columns(weight: Tensor, *rest, **options) -> tuple[Tensor, Tensor, Tensor]:
        return weight.clone(), torch.ones_like(weight, dtype=torch.bool), torch.zeros_like(weight)

    @contextlib.contextmanager
    def seeing_all(*args) -> Iterator[None]:
        with reached(), watching(*args):
            yield

    @contextlib.contextmanager
    def reached() -> Iterator[None]:
        """All experts are, by some token."""
        ledger.all_experts = True
        yield
        ledger.all_experts = False

    def train_all(*args) -> Curve:
        with reached():
            return fit(*args)

    with contextlib.ExitStack() as stack:
        for owner, name, short in (
            (Execution, "batches", some_batches),
            (Decoder, "watching", seeing_all),
            (reconstruction, "fit", train_all),
            (Schedule, "steps", lambda schedule, samples: every_step(schedule, min(samples, order))),
            (losses, "parts", _first_two(losses.parts)),
            (adapters, "parts", _first_two(adapters.parts)),
            (sparsegpt, "_prune_block", all_columns),
            (torch.nn.Module, "to", _brought),
            (runs, "environment", lambda *args: {}),
            (statistics, "FEW", 0),  # few batches are no reason to leave an expert out
            (fake_tensor, "CONSTANT_NUMEL_LIMIT", VALUES),
        ):
            stack.enter_context(patch.object(owner, name, short))
        yield


def _first_two(parts: Callable[..., list]) -> Callable[..., list]:
    return lambda *whole: parts(*whole)[:2]


class Rehearsal(Run):
    """The pipeline with a model, texts and measurements that are shapes alone."""

    def __init__(
        self, spec: RunSpec, config: PretrainedConfig, like: Decoder, ledger: Ledger, evaluated: bool, device: torch.device = HOST
    ):
        self.spec, self.session, self.progress, self.executor = spec, Session(), False, "serial"
        self.record = RunRecord(asdict(spec), "")
        self.device = device
        self.store = MemoryStore()
        self.config, self.like, self.ledger, self.evaluated = config, like, ledger, evaluated

    def load(self) -> None:
        """Makes a model and texts of the right shapes."""
        spec = self.spec
        self.dense, self.tokenizer = self.decoder(self.like), None
        self.dense.forget()  # what blocks are called with is made anew, without values
        structure = self.dense.structure
        self.dense.structure = replace(structure, blocks=structure.blocks[: len(self.dense.blocks)])
        most = max(spec.samples_by_phase.values())
        self.calibration = torch.zeros(most, spec.calibration.sequence_length, dtype=torch.long)
        self.held_out = torch.zeros(spec.calibration.held_out_samples, spec.calibration.sequence_length, dtype=torch.long)
        self.held_out = self.held_out if spec.calibration.held_out_samples else None
        shape = (spec.evaluation.samples, spec.evaluation.length)
        self.texts = {name: torch.zeros(shape, dtype=torch.long) for name in spec.evaluation.texts}

    def decoder(self, like: Decoder) -> Decoder:
        """The model, built as `like` is."""
        return take_apart(auto_class(self.config).from_config(self.config, dtype=torch.float32).eval(), like=like)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is allocated inside belongs to the phase `name`."""
        before, self.ledger.phase = self.ledger.phase, name
        self.record.seconds[name] = 0.0
        self.record.peak_memory_bytes_by_phase[name] = 0
        try:
            yield
        finally:
            self.ledger.phase = before

    def peak_memory(self) -> PeakMemory:
        """Of nobody's interest."""
        return PeakMemory(HOST)

    def announce(self) -> None:
        """Says nothing."""

    def prune(self, student: Decoder):
        """As it is, in a phase of its own."""
        with self.phase("prune"):
            return super().prune(student)

    def measure(self, decoder: Decoder, what: str) -> Measured:
        """Once, in the end: all that is kept is there then."""
        repaired = self.spec.reconstruction.granularity != "none" or self.spec.retraining.method != "none"
        if self.evaluated and what == ("repaired" if repaired else "pruned"):
            return super().measure(decoder, what)
        return Measured({}, {}, [], None)

    def fill(self, *measured) -> None:
        """There are no figures to fill in."""


class _MaskFiles(dict):
    """Masks by name, in memory until they are written; then one is read anew each time that it is asked for."""

    def __getitem__(self, name: str) -> Tensor:
        mask = super().__getitem__(name)
        return mask if isinstance(mask, Tensor) else torch.empty(mask, dtype=torch.bool)

    def write(self) -> None:
        self.update({name: mask.shape if isinstance(mask, Tensor) else mask for name, mask in self.items()})


class Spilled(MemoryStore):
    """The work of a streamed run: masks are in files, and what else is large, as in `recon.runtime.folder_store.FolderStore`."""

    def __init__(self):
        self.masks = _MaskFiles()

    def empty(self, shape: Sequence[int], dtype: torch.dtype, pinned: bool = False) -> Tensor:
        """A tensor to be filled."""
        if math.prod(shape) * dtype.itemsize > SMALL:
            return self.mapped(shape, dtype)
        return super().empty(shape, dtype, pinned)

    def mapped(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """One that lies in a file."""
        return torch.empty(shape, dtype=dtype)

    def finish(self, *found, **kept) -> None:
        """Writes the masks."""
        self.masks.write()


class StreamedRehearsal(Rehearsal):
    """The same with the model on disk: weights are there while they are asked for, as in `recon.experiment.streamed.StreamedRun`."""

    def __init__(self, *args):
        super().__init__(*args)
        self.store = Spilled()

    def decoder(self, like: Decoder) -> Decoder:
        """The model, none of whose weights is there yet."""
        model = skeleton(self.config)
        model.tie_weights()
        lazy = Lazy(model, lambda names: self.read(lazy, names))
        return take_apart(model, like=like, lazy=lazy)

    def read(self, lazy: Lazy, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Weights of the right shapes."""
        for name in names:
            value = torch.empty(lazy.parameters[name].shape)
            value.isfinite()  # which is checked of what is read for the first time
            yield name, value

    def copy_of_dense(self) -> Decoder:
        """As on disk."""
        return self.decoder(self.dense)

    def pruned_student(self, student: Decoder) -> Pruned:
        """Pruned once more by every run."""
        return self.prune(student)

    def changed(self, student: Decoder, masks) -> dict[str, Tensor]:
        """They are in files."""
        return {}


def streamed_peaks(
    spec: RunSpec, config: PretrainedConfig, like: Decoder, evaluated: bool = True, device: torch.device = HOST
) -> Peaks:
    """As `peaks`, of a run whose model and masks stay on disk, and what else is large.

    One window more than the largest tells it all, if blocks have equal shapes: what else there is of the model takes no memory.
    """
    size = (
        1
        if spec.reconstruction.granularity == "none"
        else max(len(window.blocks) for window in like.windows(spec.reconstruction.granularity))
    )
    if len(_shapes(like)) == 1 and size < len(like.blocks):
        spec = spec.replaced(granularity=f"{size}-blocks") if size > 1 else spec
        config = shortened(config, size + 1)
    return rehearse(spec, config, like, evaluated, device, StreamedRehearsal)


def _shapes(decoder: Decoder) -> set[tuple]:
    """Shapes of the parameters of each kind of block."""
    return {tuple((name, p.shape) for name, p in block.named_parameters()) for block in decoder.blocks}


def peaks(spec: RunSpec, config: PretrainedConfig, like: Decoder, evaluated: bool = True, device: torch.device = HOST) -> Peaks:
    """Peaks of a run of `spec` on the model of `config`, whose structure is that of `like`.

    evaluated: False leaves out what is measured of the model.
    device: where windows are computed, which need not be here.

    With blocks of equal shapes, bytes at a place in the code are so many, plus so many for each block of the model, plus so many for
    each block of a window: these are found from models of a few blocks.
    """
    blocks = len(like.blocks)
    size = (
        1
        if spec.reconstruction.granularity == "none"
        else max(len(window.blocks) for window in like.windows(spec.reconstruction.granularity))
    )
    if len(_shapes(like)) > 1 or blocks <= min(size, 2) + 2:
        return rehearse(spec, config, like, evaluated, device)

    def small(window: int, blocks: int) -> Peaks:
        in_blocks = spec.replaced(granularity=f"{window}-blocks") if size > 1 else spec
        return rehearse(in_blocks, shortened(config, blocks), like, evaluated, device)

    window = min(size, 2)
    first, longer = small(window, window + 1), small(window, window + 2)
    more, wider = blocks - window - 1, size - window
    found = first.plus(longer, more).plus(first, -more)
    return found.plus(small(window + 1, window + 2), wider).plus(longer, -wider) if wider else found


def shortened(config: PretrainedConfig, blocks: int) -> PretrainedConfig:
    """`config` with the first so many of its blocks."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    before = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list | tuple) and len(value) == before:  # something for each block
            setattr(text, name, value[:blocks])
    text.num_hidden_layers = blocks
    return config


def rehearse(
    spec: RunSpec,
    config: PretrainedConfig,
    like: Decoder,
    evaluated: bool = True,
    device: torch.device = HOST,
    kind: type[Rehearsal] = Rehearsal,
) -> Peaks:
    """As `peaks`, of the model of `config` as it is; its blocks are built as the first ones of `like`."""
    ledger = Ledger(equal=not spec.changes_weights, device=device)
    if spec.model.pruned:  # a given mask costs what the plainest criterion does
        spec = spec.replaced(pruned=None, pruned_revision=None, criterion="magnitude", pattern="0.5")
    order = max(
        batch * (accumulation + 1)
        for batch, accumulation in (
            (spec.reconstruction.batch_size, spec.reconstruction.accumulation),
            (spec.retraining.batch_size, spec.retraining.accumulation),
        )
    )
    # What is repeated in place is rehearsed once or twice.
    spec = spec.replaced(
        epochs=1,
        retrain_epochs=1,
        mask_refinement=min(spec.pruning.mask_refinement, 2),
        exact_iterations=min(spec.reconstruction.exact_iterations, 2),
        tasks=(),
    )
    with warnings.catch_warnings(), _Fake(allow_non_fake_inputs=True), ledger, _Answers(order):
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # `nn.Parameter` is copied so
        with _as_if_on(device), _cut_short(order, ledger):
            kind(spec, config, like, ledger, evaluated, device).execute(None, "")
    return ledger.peaks
