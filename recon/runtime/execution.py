"""Where and in what precision windows run. Weights and batches are on the compute device only while they are needed."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from recon.errors import ReconError, check_kind, log
from recon.model.decoder import Decoder
from recon.model.skeleton import moved
from recon.model.windows import Window
from recon.runtime.device import out_of_memory, pick_compute_dtype, pick_device, release_memory
from recon.runtime.storage import Storage

TOKENS = 1024  # in a batch of a pass without training


@dataclass(eq=False)
class Execution:
    """Where and how passes over a model run.

    Models may be elsewhere, such as in host memory beside a small GPU. One window at a time is then copied to the compute device,
    and activations are copied there and back batch by batch. Raises `ReconError` as `pick_device` and `pick_compute_dtype`.
    """

    device: torch.device | str = "auto"  # as `recon.runtime.device.pick_device` takes it
    compute_dtype: str = "auto"  # as `recon.runtime.device.pick_compute_dtype` takes it
    storage: Storage | None = None  # keeps finished windows, masks and activations; default: in memory
    progress: bool = True  # whether passes show progress bars
    loop: Callable | None = None  # runs the windows; default: `recon.methods.reconstruct.one_after_another`

    def __post_init__(self):
        # The batch sizes in use after memory ran out with larger ones; None: it has not.
        self.micro_batch: int | None = None  # samples per forward pass in training
        self.tokens: int | None = None  # per batch without training
        self.storage = self.storage or Storage()
        self.device = pick_device(str(self.device))
        self.dtype = pick_compute_dtype(self.compute_dtype, self.device)
        self._copying: torch.cuda.Stream | None = None  # one for all batches, as freed memory can be reused only in its stream

    @classmethod
    def of(cls, decoder: Decoder, given: "Execution | None" = None) -> "Execution":
        """`given`; default: where the model is. float16 on a CPU computes in float32: torch cannot round it to bfloat16 there."""
        if given is not None:
            check_kind("execution", given, cls)
            return given
        return cls(decoder.device, "float32" if decoder.device.type == "cpu" and _in_float16(decoder) else "auto")

    def autocast(self) -> torch.autocast:
        """Context in which matrix products run in the compute dtype; parameters keep theirs."""
        # No cache of rounded weights: each is used once in a pass, and what is cached for a placeholder would outlive it.
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)

    @contextlib.contextmanager
    def holding(self, decoder: Decoder, window: Window, trained: Iterable[nn.Parameter] = ()) -> Iterator[None]:
        """Context in which what `window` needs is on the compute device, its matrices rounded to the compute dtype once.

        `trained` parameters keep their dtype, and their new values are written back at the end.
        """
        with decoder.loaded(window), self._holding(decoder.needed(window), decoder.weights(window), trained):
            yield

    @contextlib.contextmanager
    def holding_ends(self, decoder: Decoder) -> Iterator[None]:
        """Context in which all but the blocks (and a skeleton's embedding) is on the compute device, with the head rounded."""
        inside = {*decoder.blocks.parameters(), *decoder.blocks.buffers()}
        ends = (each for each in (*decoder.model.parameters(), *decoder.model.buffers()) if each not in inside)
        with decoder.loaded_head(), self._holding(ends, decoder.head_weights()):
            yield

    @contextlib.contextmanager
    def _holding(self, tensors: Iterable[Tensor], rounded: Iterable[Tensor], trained: Iterable[Tensor] = ()) -> Iterator[None]:
        keep, round_off, places = set(trained), set(rounded), []
        try:
            for tensor in tensors:
                rounds = tensor in round_off and tensor not in keep and tensor.dtype == torch.float32
                dtype = self.dtype if rounds else tensor.dtype
                if self.elsewhere(tensor) or dtype != tensor.dtype:
                    places.append((tensor, tensor.data))
                    tensor.data = moved(tensor.data, self.device, dtype)
            yield
        finally:
            for tensor, place in places:
                if tensor in keep:
                    place.copy_(tensor.data)
                tensor.grad = None  # the gradient is on the compute device
                tensor.data = place

    def elsewhere(self, tensor: Tensor) -> bool:
        """Whether `tensor` has to be copied to the compute device."""
        return tensor.device != self.device

    def embed(self, decoder: Decoder, tokens: Tensor, count: int | None = None) -> Tensor:
        """Input of the first block, (samples, length, hidden), for `tokens` (samples, length); see `run` and `check_tokens`."""
        decoder.check_tokens(tokens)
        if self.dtype != torch.float32 and self.device.type == "cpu" and _in_float16(decoder):
            raise ReconError("the model is in float16, which a CPU cannot round to bfloat16; let it compute in float32")
        with decoder.loaded_embedding():
            return self.run(decoder.embed, tokens, count)

    def forward(self, decoder: Decoder, window: Window, stream: Tensor, count: int | None = None) -> Tensor:
        """Output of `window` for its input `stream`, (samples, length, width) each; see `run`."""
        with self.holding(decoder, window):
            return self.run(partial(decoder.forward, window), stream, count)

    def run(self, function: Callable, stream: Tensor, count: int | None = None, anew: Callable = lambda: None) -> Tensor:
        """`function` applied to `stream` (samples, length, ...), a batch at a time; the result is on the device of `stream`.

        If memory runs out, `anew()` is called, to discard what `function` has gathered, and all of `stream` is run again in
        smaller batches; later calls use these too. No batch mixes the first `count` samples with later ones.
        """
        samples, length = stream.shape[:2]
        edges = list(pairwise((0, samples if count is None else min(count, samples), samples)))
        size = min(max(1, (self.tokens or TOKENS) // length), max(stop - start for start, stop in edges))

        def attempt(fewer: int) -> Tensor:
            if fewer < size:
                self.tokens = fewer * length
                anew()
            parts = [range(i, min(i + fewer, stop)) for start, stop in edges for i in range(start, stop, fewer)]
            result = None
            with self.autocast(), torch.no_grad():
                for part, (batch,) in zip(parts, self.batches([stream], parts)):
                    output = function(batch)
                    if result is None:
                        result = self.empty((samples, *output.shape[1:]), output.dtype, stream.device)
                    result[part.start : part.stop].copy_(output, non_blocking=self.device.type == "cuda")
                if self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).synchronize()  # copies to host memory may not be finished
            return result

        return self.halving(attempt, size)[0]

    def halving(self, attempt: Callable[[int], Tensor], size: int) -> tuple[Tensor, int]:
        """The result of `attempt(size)`, retried at half the size whenever memory runs out, and the size (samples) that fitted.

        Raises `ReconError` if memory does not suffice for one sample at a time.
        """
        while True:
            try:
                return attempt(size), size
            except Exception as error:
                if not out_of_memory(error):
                    raise
                fault = str(error).splitlines()[0]
            release_memory()  # after the except clause: the exception and the tensors that it refers to are gone
            if size == 1:
                raise ReconError(f"{self.device} lacks memory for one sample ({fault}); use shorter ones, or smaller windows")
            log.warning("out of memory with %d samples at a time: %d from here on (%s)", size, -(-size // 2), fault)
            size = -(-size // 2)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor to fill with activations; on the CPU, `storage` makes it."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        return self.storage.empty(shape, dtype, pinned=self.device.type == "cuda")

    def batches(self, streams: Sequence[Tensor], parts: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, ...]]:
        """Yields, for each of `parts` (indices of samples), these samples of every stream, on the compute device.

        On CUDA, the next batch is copied while the device computes with the one before.
        """
        copying, coming = None, None
        if self.device.type == "cuda" and any(map(self.elsewhere, streams)):
            copying = self._copying = self._copying or torch.cuda.Stream(self.device)
        for part in [*parts, None]:
            ready = coming
            if part is not None:
                with torch.cuda.stream(copying):
                    coming = tuple(self._read(stream, part) for stream in streams)
            if ready is not None:
                yield ready
            if copying and part is not None:
                computing = torch.cuda.current_stream(self.device)
                computing.wait_stream(copying)
                for tensor in coming:
                    tensor.record_stream(computing)

    def _read(self, stream: Tensor, part: Sequence[int]) -> Tensor:
        if isinstance(part, range):
            return stream[part.start : part.stop].to(self.device, non_blocking=True)
        if not self.elsewhere(stream):
            return stream[torch.as_tensor(part, device=stream.device)]
        # Sample by sample: the GPU copies slices of pinned memory by itself.
        return torch.stack([stream[index].to(self.device, non_blocking=True) for index in part])


def _in_float16(decoder: Decoder) -> bool:
    return any(each.dtype == torch.float16 for each in decoder.model.parameters())
