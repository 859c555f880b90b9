"""What is measured: a model with its calibration samples, and the loops that reconstruct it."""

import contextlib
import copy
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from recon.config import PruningConfig, ReconstructionConfig
from recon.data import models, text
from recon.evaluate import perplexity as evaluation
from recon.methods.prune import prune
from recon.methods.reconstruct import reconstruct
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.paper.bench import reference
from recon.runtime import device
from recon.runtime.execution import Execution
from recon.runtime.seeds import generator

# The straightforward loop's steps and inputs.
EQUAL = {"epochs": 1, "batch_size": reference.BATCH_SIZE, "propagation": "dense", "chunks": 1}


class Subject:
    """The model and the samples of a `BenchSpec`, loaded once."""

    def __init__(self, spec, progress: bool):
        self.spec, self.progress = spec, progress
        self.device = device.pick_device(spec.device)
        self.dtype = device.pick_compute_dtype("auto", self.device)
        model, self.tokenizer = models.load(spec.model)
        self.dense = decompose(model)
        self.dense.check_length(max(spec.sequence_length, spec.evaluation_length))
        seed = generator(0, "calibration").initial_seed() % 2**32
        self.samples = text.sample_tokens(spec.text, "calibration", self.tokenizer, spec.samples, spec.sequence_length, seed)

    @property
    def execution(self) -> Execution:
        return Execution(self.device, progress=self.progress)

    @property
    def loops(self) -> dict[str, Callable]:
        """The ways to prune by Wanda and reconstruct that are compared, by name; see `measured`."""
        return {"reference": self.reference, "ours": partial(self.ours, **EQUAL)}

    @property
    def pruning(self) -> PruningConfig:
        return PruningConfig(pattern=self.spec.pattern, statistics="dense")

    def prune(self, student: Decoder, dense: Decoder, samples: Tensor, criterion: str = "wanda") -> dict[str, Tensor]:
        """This library's pruning alone, in place; returns the masks by matrix name."""
        return prune(student, samples, replace(self.pruning, criterion=criterion), execution=self.execution).masks

    def reconstruct(self, student: Decoder, dense: Decoder, samples: Tensor, masks: dict, **options) -> None:
        """This library's reconstruction alone. options: of `ReconstructionConfig`."""
        reconstruct(student, dense, samples, ReconstructionConfig(**options), masks=masks, execution=self.execution)

    def forward(self, student: Decoder, dense: Decoder, samples: Tensor, stream: Tensor) -> None:
        """A pass of the dense model over `stream`, the embedded samples, block by block."""
        for window in dense.windows("block"):
            with self.execution.holding(dense, window):
                stream = self.execution.run(partial(dense.forward, window), stream)

    def evaluate(self, student: Decoder, dense: Decoder, samples: Tensor) -> None:
        """Perplexity of the dense model."""
        self.perplexity(dense, "dense")

    def ours(self, student: Decoder, dense: Decoder, samples: Tensor, **options) -> None:
        """Prunes a copy of `dense` and reconstructs it, in one pass. options: of `ReconstructionConfig`."""
        reconstruct(student, dense, samples, ReconstructionConfig(**options), pruning=self.pruning, execution=self.execution)

    def reference(self, student: Decoder, dense: Decoder, samples: Tensor) -> None:
        """The straightforward way."""
        masks = self.reference_prune(student, dense, samples)
        self.reference_reconstruct(student, dense, samples, masks)

    def reference_prune(self, student: Decoder, dense: Decoder, samples: Tensor) -> dict[str, Tensor]:
        """Masks as published code makes them; see `recon.paper.bench.reference`."""
        with self._on_device(student):
            return reference.prune(student, samples, self.spec.pattern, self.progress)

    def reference_reconstruct(self, student: Decoder, dense: Decoder, samples: Tensor, masks: dict) -> None:
        """The paper's loop, written down without any care for speed."""
        with self._on_device(student, dense):
            reference.reconstruct(student, dense, samples, masks, progress=self.progress)

    @contextlib.contextmanager
    def _on_device(self, *decoders: Decoder) -> Iterator[None]:
        for decoder in decoders:
            decoder.model.to(self.device)
        yield
        for decoder in decoders:
            decoder.model.to("cpu")

    def measured(self, work: Callable, dense: Decoder, samples: Tensor, **options) -> tuple[dict, Decoder]:
        """Does `work(student, dense, samples, **options)` on a copy of `dense`, pruned where `options` hold masks; returns its
        seconds and peak memory, total and added, and the copy."""
        student = pruned(dense, options.get("masks", {}))
        gc.collect()
        device.release_memory()
        self._wait()
        with device.PeakMemory(self.device) as peak:
            began = time.perf_counter()
            work(student, dense, samples, **options)
            self._wait()
            seconds = time.perf_counter() - began
        return {"seconds": seconds, "peak_memory_bytes": peak.bytes, "added_memory_bytes": peak.bytes - peak.before}, student

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def short(self, blocks: int) -> Decoder:
        """The first blocks of the model: only time is measured on them."""
        return shortened(self.dense, min(blocks, len(self.dense.blocks)))

    def perplexity(self, decoder: Decoder, description: str) -> float:
        """On the evaluation split."""
        spec = self.spec
        tokens = text.sample_tokens(spec.text, "evaluation", self.tokenizer, spec.evaluation_samples, spec.evaluation_length)
        description = f"perplexity ({description})"
        return evaluation.perplexity(decoder, tokens, execution=self.execution, description=description).value


def pruned(dense: Decoder, masks: dict[str, Tensor]) -> Decoder:
    """A copy of `dense` with what `masks` do not keep set to zero."""
    student = decompose(copy.deepcopy(dense.model), like=dense)
    with torch.no_grad():
        for name, matrix in student.matrices().items():
            if name in masks:
                matrix.weight.mul_(masks[name])
    return student


def shortened(decoder: Decoder, blocks: int) -> Decoder:
    """A copy of the model with its first `blocks` blocks only."""
    whole = decoder.model.get_submodule(decoder.path)
    decoder.model.set_submodule(decoder.path, nn.ModuleList(list(whole)[:blocks]))
    try:
        model = copy.deepcopy(decoder.model)
    finally:
        decoder.model.set_submodule(decoder.path, whole)
    model.config.num_hidden_layers = blocks
    return decompose(model)
