"""Pruning: gathers statistics block by block, makes masks, and zeroes what they drop."""

import time
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from recon.config import PruningConfig
from recon.errors import ReconError, check_kind, log
from recon.kernels.criteria import CRITERIA
from recon.kernels.mask_refinement import refine
from recon.kernels.patterns import Pattern
from recon.methods.allocation import allocate
from recon.methods.samples import as_tokens
from recon.methods.statistics import FEW, over_blocks
from recon.methods.structured import find_units, prune_units, set_bias
from recon.methods.weighting import row_weights
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.model.structure import Matrix
from recon.model.windows import Window
from recon.runtime.execution import Execution
from recon.runtime.seeds import generator


@dataclass(frozen=True)
class Pruning:
    """What a pruning pass made."""

    masks: MutableMapping[str, Tensor]  # by matrix name, bool (out, in), True = kept
    under_calibrated: list[str] = field(default_factory=list)  # experts pruned by magnitude, as too few tokens reached them
    seconds: float = 0.0  # spent on masks, allocation and weighting, but not on gathering statistics for the criterion


@torch.no_grad()
def prune(
    model: nn.Module | Decoder,
    samples: Tensor | Iterable | None = None,
    config: PruningConfig = PruningConfig(),
    *,
    seed: int = 0,
    execution: Execution | None = None,
) -> Pruning:
    """Prunes the matrices of every block of `model` in place, block by block; embeddings and output head stay unchanged.

    samples: calibration tokens (samples, length), or batches of them (see `recon.methods.samples`); needed by criteria and by
        options that use activations (`config.reads`).
    execution: where and in what precision to compute; default: where the model is. Only the current block is copied elsewhere.

    Raises `ReconError` for a pattern that does not divide a matrix, missing or too long samples, NaN in weights or activations,
    `config.reorder_neurons`, and a model in which heads and neurons are to be removed but not found.
    """
    check_kind("config", config, PruningConfig)
    decoder = decompose(model)
    execution = Execution.of(decoder, execution)
    if samples is not None:
        samples = as_tokens(samples, first=config.prune_samples)
        decoder.check_length(samples.shape[1])
    pruner = Pruner(decoder, config.on(0 if samples is None else len(samples)), seed, execution)
    if config.reads and samples is None:
        how = f"allocation {config.allocation}" if config.allocation != "uniform" else f"weighting {config.weighting}"
        beside = f" with {'mask refinement' if config.mask_refinement else how}" * (pruner.criterion.statistics == "none")
        raise ReconError(f"criterion {config.criterion!r}{beside} weighs activations and needs calibration samples")
    if pruner.criterion.structured:
        prune_units(decoder, pruner.criterion, config, samples, execution)
        return Pruning(execution.storage.masks)
    pruner.prepare(samples)
    description, rerun = f"prune ({config.criterion} {pruner.pattern})", config.statistics == "sparse"
    pruner.noted = over_blocks(decoder, execution, "prune", pruner.prune, description, samples, config.gathers, rerun)
    return pruner.summed_up()


class Pruner:
    """Prunes one window after another, from statistics of what its matrices read; see `recon.methods.statistics.gather`."""

    def __init__(self, decoder: Decoder, config: PruningConfig, seed: int, execution: Execution):
        if config.reorder_neurons:  # reordering changes the dense model as well
            raise ReconError("reorder_neurons is True; call recon.methods.reorder.reorder_neurons on the dense model instead")
        self.decoder, self.config, self.seed, self.execution = decoder, config, seed, execution
        self.criterion, self.pattern = CRITERIA[config.criterion], Pattern.parse(config.pattern)
        self.patterns = dict.fromkeys(decoder.matrices(), self.pattern)
        self.weights: dict[str, Tensor] = {}  # of rows, by matrix name; see `recon.methods.weighting`
        usual = self.criterion.scope if config.weighting == "none" else "matrix"
        self.scope = usual if config.scope == "auto" else config.scope
        # The names of a criterion's options begin with its own name.
        own = f"{config.criterion}_"
        self.options = {f.name.removeprefix(own): getattr(config, f.name) for f in fields(config) if f.name.startswith(own)}
        for name, matrix in decoder.matrices().items():
            self.pattern.check_columns(name, matrix.weight.shape[1])
        if execution.storage.folder is None:  # else a killed run may have left some masks there
            execution.storage.masks = {}
        self.noted = list(execution.storage.finished("prune"))  # what was noted of each pruned window
        self.before = len(self.noted)  # windows that a killed run had pruned
        self.seconds = 0.0  # spent on allocation and weighting

    def prepare(self, samples: Tensor | None) -> None:
        """Computes the pattern of each block and the weights of rows from calibration `samples`, if the config asks for them."""
        began = time.perf_counter()
        if self.config.weighting == "fisher":
            self.weights = row_weights(self.decoder, samples, self.seed, self.execution)
        if self.config.allocation != "uniform" and self.pattern.sparsity:
            found = zip(self.decoder.windows("block"), allocate(self.decoder, samples, self.config, self.execution))
            self.patterns = {name: pattern for block, pattern in found for name in self.decoder.matrices(block)}
        self.seconds = time.perf_counter() - began

    @torch.no_grad()
    def prune(self, window: Window, statistics: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
        """Prunes `window`, whose weights are in memory. Takes and returns what `visit` of `over_blocks` does."""
        changed, under_calibrated, began = {}, [], time.perf_counter()
        with self.execution.holding(self.decoder, window, trained=self.decoder.weights(window)):
            for name, matrix in self.decoder.matrices(window).items():
                if self.config.gathers != "none" and name not in statistics:
                    under_calibrated.append(name)
                weight, mask = self.pruned(matrix, statistics, self.patterns[name])
                if not (self.criterion.scores or torch.equal(weight, matrix.weight.masked_fill(~mask, 0.0).float())):
                    changed[matrix.parameter_name] = matrix.parameter
                matrix.weight.copy_(weight)
                self.execution.storage.masks[name] = mask.to(self.decoder.device)
        return {"under_calibrated": under_calibrated, "seconds": time.perf_counter() - began}, changed

    def visit(self, window: Window, statistics: dict[str, Tensor]) -> None:
        """Prunes `window`, unless a killed run has done so already, and stores what was noted."""
        storage = self.execution.storage
        if any(name not in storage.masks for name in self.decoder.matrices(window)):
            noted, changed = self.prune(window, statistics)
            self.noted.append(noted)
            storage.finish("prune", noted, tensors=changed)

    def summed_up(self) -> Pruning:
        """The result of all windows, from what was noted of each; warns of under-calibrated experts."""
        masks, notes = self.execution.storage.masks, self.noted
        under_calibrated = [name for noted in notes for name in noted["under_calibrated"]]
        if under_calibrated:
            said = "%d of %d matrices belong to experts that got fewer than %d tokens, such as %s: pruned by magnitude; give more"
            log.warning(said, len(under_calibrated), len(masks), FEW, under_calibrated[0])
        seconds = self.seconds + sum(noted["seconds"] for noted in notes[self.before :])
        return Pruning(masks, under_calibrated=under_calibrated, seconds=seconds)

    def pruned(self, matrix: Matrix, statistics: Mapping[str, Tensor], pattern: Pattern) -> tuple[Tensor, Tensor]:
        """The matrix's new weight and mask, (out, in); made by magnitude if the statistics for it are missing.

        statistics: those that the criterion asks for, or Gram matrices, by matrix name.
        """
        own = found = statistics.get(matrix.name)
        criterion, options = self.criterion, self.options
        if self.config.gathers != "none" and found is None:
            criterion, options = CRITERIA["magnitude"], {}
        elif criterion.statistics == "norm" and found.ndim == 2:  # norms are read from the Gram matrix
            own = found.diagonal().sqrt()
        weight, random = matrix.weight.float(), generator(self.seed, "criterion", matrix.name)
        rows = self.weights[matrix.name].to(weight.device)[:, None] if matrix.name in self.weights else 1.0
        try:
            pruned, mask = criterion.prune(weight * rows, own, pattern, self.scope, random, **options)
        except ReconError as error:
            raise ReconError(f"matrix {matrix.name!r}: {error}") from None
        if self.config.mask_refinement and found is not None:
            mask = refine(weight, mask, found, self.config.mask_refinement, pattern.m)
        return weight.masked_fill(~mask, 0.0) if criterion.scores else pruned / rows, mask


@torch.no_grad()
def apply(decoder: Decoder, pruning: Pruning, weights: dict[str, Tensor]) -> None:
    """Prunes `decoder`, a copy of the dense model, in place as `pruning` did another; weights: parameters that it updated."""
    matrices = decoder.matrices()
    parameters = {matrix.parameter_name: matrix.parameter for matrix in matrices.values()}  # each once, even if experts share it
    for name in parameters.keys() & weights.keys():
        parameters[name].copy_(weights[name])
    for name, matrix in matrices.items():
        if matrix.bias_name in weights:
            set_bias(matrix.module, weights[matrix.bias_name])
        matrix.weight.masked_fill_(~pruning.masks[name], 0.0)


def touched_biases(decoder: Decoder, config: PruningConfig) -> list[str]:
    """Full names of the biases that pruning the dense model by `config` may change, or add where there are none."""
    criterion = CRITERIA[config.criterion]
    halves = find_units(decoder) if criterion.structured or config.reorder_neurons else []
    return [half.reader.bias_name for half in halves if criterion.compensates]
