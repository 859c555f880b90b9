"""What is measured: a model with its calibration samples, and the loops that reconstruct it."""

import copy
import gc
import time
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn

from recon.config import PruningConfig, ReconstructionConfig
from recon.data import models, text
from recon.evaluate import perplexity as evaluation
from recon.methods.prune import prune
from recon.methods.reconstruct import reconstruct
from recon.model.decoder import Decoder
from recon.model.discovery import take_apart
from recon.paper.bench import reference
from recon.runtime import device
from recon.runtime.execution import Execution
from recon.runtime.seeds import generator


class Subject:
    """The model and the samples of a `BenchSpec`, loaded once."""

    def __init__(self, spec, progress: bool):
        self.spec, self.progress = spec, progress
        self.device = device.pick_device(spec.device)
        self.dtype = device.pick_compute_dtype("auto", self.device)
        model, self.tokenizer = models.load(spec.model)
        self.dense = take_apart(model)
        self.dense.check_length(max(spec.sequence_length, spec.evaluation_length))
        seed = generator(0, "calibration").initial_seed() % 2**32
        self.samples = text.sample_tokens(spec.text, "calibration", self.tokenizer, spec.samples, spec.sequence_length, seed)

    @cached_property
    def masks(self) -> dict[str, Tensor]:
        """Wanda's masks of the whole model."""
        return self.prune("wanda").masks

    @property
    def execution(self) -> Execution:
        return Execution(self.device, progress=self.progress)

    @property
    def loops(self) -> dict[str, Callable]:
        """The loops that are compared, by name; see `measured`."""
        return {"reference": self.reference, "ours": self.equal_steps}

    def prune(self, criterion: str):
        """Prunes a copy of the whole model."""
        student = copy.deepcopy(self.dense.model)
        config = PruningConfig(criterion=criterion, pattern=self.spec.pattern)
        return prune(student, self.samples, config, execution=self.execution)

    def reference(self, student: Decoder, dense: Decoder, samples: Tensor, masks: dict, **options) -> None:
        """The straightforward loop. options: of `reference.reconstruct`."""
        for decoder in (student, dense):
            decoder.model.to(self.device)
        reference.reconstruct(student, dense, samples, masks, progress=self.progress, **options)
        for decoder in (student, dense):
            decoder.model.to("cpu")

    def ours(self, student: Decoder, dense: Decoder, samples: Tensor, masks: dict, **options) -> None:
        """This library's loop. options: of `ReconstructionConfig`."""
        reconstruct(student, dense, samples, ReconstructionConfig(**options), masks=masks, execution=self.execution)

    def equal_steps(self, student: Decoder, dense: Decoder, samples: Tensor, masks: dict) -> None:
        """This library's loop, with the steps and the inputs of the straightforward one."""
        self.ours(student, dense, samples, masks, epochs=1, batch_size=reference.BATCH_SIZE, propagation="dense")

    def measured(self, loop: Callable, dense: Decoder, samples: Tensor, masks: dict, **options) -> tuple[dict, Decoder]:
        """Runs a loop on a pruned copy of `dense`; returns its seconds and peak memory, total and added, and the copy."""
        student = pruned(dense, masks)
        gc.collect()
        device.release_memory()
        self._wait()
        with device.PeakMemory(self.device) as peak:
            began = time.perf_counter()
            loop(student, dense, samples, masks, **options)
            self._wait()
            seconds = time.perf_counter() - began
        return {"seconds": seconds, "peak_memory_bytes": peak.bytes, "added_memory_bytes": peak.bytes - peak.before}, student

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def short(self, blocks: int) -> tuple[Decoder, dict[str, Tensor]]:
        """The first blocks of the model, and magnitude masks of them: only time is measured on them."""
        dense = shortened(self.dense, min(blocks, len(self.dense.blocks)))
        return dense, self.magnitude_masks(dense)

    def magnitude_masks(self, dense: Decoder) -> dict[str, Tensor]:
        config = PruningConfig(criterion="magnitude", pattern=self.spec.pattern)
        return prune(copy.deepcopy(dense.model), None, config, execution=Execution("cpu", progress=False)).masks

    def perplexity(self, decoder: Decoder, description: str) -> float:
        """On the evaluation split."""
        spec = self.spec
        tokens = text.sample_tokens(spec.text, "evaluation", self.tokenizer, spec.evaluation_samples, spec.evaluation_length)
        description = f"perplexity ({description})"
        return evaluation.perplexity(decoder, tokens, execution=self.execution, description=description).value


def pruned(dense: Decoder, masks: dict[str, Tensor]) -> Decoder:
    """A copy of `dense` with what `masks` do not keep set to zero."""
    student = take_apart(copy.deepcopy(dense.model), like=dense)
    with torch.no_grad():
        for name, matrix in student.matrices().items():
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
    return take_apart(model)
