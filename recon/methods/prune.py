"""The pass that gathers statistics block by block and makes masks."""

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from recon.errors import ReconError
from recon.kernels import criteria
from recon.kernels.criteria import Structured
from recon.kernels.mask_refinement import swap
from recon.kernels.patterns import Pattern, sparsity_of
from recon.methods.statistics import FEW, gather
from recon.methods.structured import find_units, prune_units, set_bias
from recon.model.decoder import Decoder
from recon.model.discovery import take_apart
from recon.model.matrices import Matrix
from recon.runtime.execution import Execution
from recon.runtime.seeds import generator
from recon.runtime.store import MemoryStore

log = logging.getLogger("recon")


@dataclass(frozen=True)
class Pruning:
    """What a pruning pass found: `masks` by matrix name, bool (out, in), True = kept; and the sparsity of each matrix.

    `biases`, (out,) by matrix name, are those that make up for what was removed; the matrix may have had none before.
    `rest`, by full name, are other parameters that are not the dense model's, where a pruned model was given (see `recon.methods.external_mask`).
    `starved` names the experts that too few calibration tokens were sent to, which were pruned by magnitude instead.
    """

    masks: dict[str, Tensor]
    sparsity: dict[str, float] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    starved: list[str] = field(default_factory=list)
    rest: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total_sparsity(self) -> float:
        """Share of zeros over all pruned matrices."""
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        return 1 - kept / sum(mask.numel() for mask in self.masks.values())


@torch.no_grad()
def prune(
    model: nn.Module | Decoder,
    samples: Tensor | None = None,
    criterion: str = "wanda",
    pattern: str | Pattern = "0.5",
    scope: str = "auto",
    propagation: str = "sparse",
    seed: int = 0,
    swaps: int = 0,
    compute_dtype: str = "auto",
    device: torch.device | str | None = None,
    progress: bool = True,
    store: MemoryStore | None = None,
    **options,
) -> Pruning:
    """Prunes the matrices of every block of `model` in place, block by block; embeddings and output head are left alone.

    Args:
        model: a causal LM, or its `Decoder`.
        samples: calibration tokens (samples, length), needed by criteria that weigh activations.
        criterion: one of `recon.kernels.criteria.CRITERIA`.
        pattern: unstructured sparsity such as "0.5", or N:M such as "2:4" (N kept of every M). Criteria that remove whole
            heads and neurons take a sparsity only, as the share of all the weights here that is to go.
        scope: weights compete within a "row" (one output neuron) or the "matrix"; "auto" is the criterion's own default, and
            all that criteria of whole heads and neurons know.
        propagation: statistics come from activations of the already pruned model ("sparse", as the Wanda and SparseGPT
            authors do) or of the dense one ("dense"). FLAP compares over the whole model before it removes anything: its
            statistics are the dense model's, whatever this says.
        swaps: exchanges of a pruned and a kept weight that are tried in each row after the criterion has chosen; see
            `recon.kernels.mask_refinement`.
        device: where to compute; default: where the model is. The model stays where it is, but for the block in hand.
        work: what is finished already, and where every finished block is noted; default: nothing, and nowhere.
        options: passed to the criterion (SparseGPT: `block_size`, `damping`; FLAP: `compensate`, False to change no bias).

    Raises:
        ReconError: an unknown name, a pattern that does not divide a matrix, missing samples, NaN in weights or activations, or a
            model without heads and neurons that could be removed.
    """
    decoder = take_apart(model)
    rule = criteria.get(criterion)
    pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
    check_options(criterion, pattern, scope, swaps)
    scope = rule.scope if scope == "auto" else scope
    if propagation not in ("sparse", "dense"):
        raise ReconError(f"unknown pruning propagation {propagation!r}; allowed: sparse, dense")
    for name, matrix in decoder.matrices().items():
        pattern.check_columns(name, matrix.weight.shape[1])
    kind = "gram" if swaps else rule.statistics
    if kind != "none" and samples is None:
        what = f"criterion {criterion!r}" if rule.statistics != "none" else f"choosing by {criterion!r} with swaps"
        raise ReconError(f"{what} weighs activations and needs calibration samples")
    store = store or MemoryStore()
    execution = Execution(device or decoder.device, compute_dtype, store)
    if isinstance(rule, Structured):
        sparsity, biases = prune_units(decoder, rule, pattern, samples, propagation, execution, store, progress, **options)
        return Pruning(store.masks, sparsity, biases)
    done = store.finished("prune")
    stream = None
    if kind != "none" and len(done) < len(decoder.blocks):
        stream = store.streams("prune")["stream"] if done else execution.embed(decoder, samples)
    bar = tqdm(
        decoder.windows("block")[len(done) :], desc=f"prune ({criterion} {pattern})", unit="block", disable=not progress,
        initial=len(done), total=len(decoder.blocks),
    )  # fmt: skip
    for window in bar:
        statistics: dict[str, Tensor] = {}
        outputs, starved = stream, []
        with decoder.loaded(window):
            if stream is not None:
                outputs, statistics = gather(execution, decoder, window, stream, kind)
            changed: dict[str, Tensor] = {}  # parameters in which more has changed than what is zero
            with execution.holding(decoder, window, trained=decoder.weights(window)):
                for name, matrix in decoder.matrices(window).items():
                    random = generator(seed, "criterion", name)
                    if kind != "none" and name not in statistics:
                        starved.append(name)
                        weight, mask = _prune_matrix(matrix, None, criteria.get("magnitude"), pattern, scope, random, 0, {})
                    else:
                        weight, mask = _prune_matrix(matrix, statistics.get(name), rule, pattern, scope, random, swaps, options)
                    if not (rule.scores or torch.equal(weight, matrix.weight.masked_fill(~mask, 0.0).float())):
                        changed[matrix.parameter_name] = matrix.parameter
                    matrix.weight.copy_(weight)
                    store.masks[name] = mask.to(decoder.device)
            if stream is not None and window.blocks[0] + 1 < len(decoder.blocks):
                if propagation == "sparse":
                    with execution.holding(decoder, window):
                        outputs = execution.run(lambda batch, window=window: decoder.forward(window, batch), stream)
                stream = outputs
            else:
                stream = None
            sparsity = {name: sparsity_of(store.masks[name]) for name in decoder.matrices(window)}
            store.finish("prune", {"sparsity": sparsity, "starved": starved}, {"stream": stream}, changed)
            done.append({"sparsity": sparsity, "starved": starved})
    starved = [name for found in done for name in found["starved"]]
    if starved:
        some = ", ".join(starved[:3]) + (", ..." if len(starved) > 3 else "")
        log.warning(
            "%d of %d matrices belong to experts that fewer than %d calibration tokens were sent to, and were pruned by magnitude "
            "instead of %s: %s; more samples help",
            len(starved), len(store.masks), FEW, criterion, some,
        )  # fmt: skip
    sparsity = {name: value for found in done for name, value in found["sparsity"].items()}
    return Pruning(store.masks, sparsity, starved=starved)


@torch.no_grad()
def apply(decoder: Decoder, pruning: Pruning, weights: dict[str, Tensor] | None = None) -> None:
    """Prunes a copy of the dense model, in place, as `pruning` found for another one.

    weights: (out, in) by matrix name, of those that pruning changed beside zeroing.
    """
    for name, matrix in decoder.matrices().items():
        matrix.weight.copy_((weights or {}).get(name, matrix.weight).masked_fill(~pruning.masks[name], 0.0))
        if name in pruning.biases:
            set_bias(matrix.module, pruning.biases[name])
    for name, value in pruning.rest.items():
        decoder.model.get_parameter(name).copy_(value)


def check_alike(pruned: nn.Module, dense: nn.Module) -> None:
    """Raises `ReconError` naming a parameter of `dense` that `pruned` lacks, or has in another shape; pruning may have added biases."""
    found = dict(pruned.named_parameters(remove_duplicate=False))
    for name, parameter in dense.named_parameters(remove_duplicate=False):
        if name not in found:
            raise ReconError(
                f"the pruned model, a {type(pruned).__name__}, lacks {name!r} of the dense one, a {type(dense).__name__}"
            )
        if found[name].shape != parameter.shape:
            raise ReconError(
                f"{name!r} is {tuple(found[name].shape)} in the pruned model, and {tuple(parameter.shape)} in the dense one"
            )


def keep_masks(student: Decoder, masks: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """`masks`, or where there are none, those that the zeros of a pruned model tell.

    Raises `ReconError` naming a mask that is missing or does not fit, and a parameter that is not in float32, as what is
    trained has to be.
    """
    for name, parameter in student.model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ReconError(f"parameter {name!r} is {parameter.dtype}; small updates are lost in it: load the model in float32")
    matrices = student.matrices()
    if student.lazy:  # whose masks are of its own run
        return masks
    if masks is None:
        return {name: matrix.weight != 0 for name, matrix in matrices.items()}
    for name, matrix in matrices.items():
        if name not in masks or masks[name].shape != matrix.weight.shape:
            found = tuple(masks[name].shape) if name in masks else None
            raise ReconError(f"mask of {name!r} has shape {found}; it must be {tuple(matrix.weight.shape)}")
    return masks


def touched_biases(decoder: Decoder, criterion: str) -> list[str]:
    """Full names of the biases that pruning the dense model by `criterion` may change, or add where there are none.

    Raises `ReconError` where the criterion removes heads and neurons, and none are found.
    """
    rule = criteria.get(criterion)
    halves = find_units(decoder) if isinstance(rule, Structured) else []
    return [f"{half.reader.name}.bias" for half in halves if rule.compensates]


def check_options(criterion: str, pattern: Pattern, scope: str, swaps: int) -> None:
    """Raises `ReconError` for an unknown criterion and for what has no meaning together with the one given."""
    rule = criteria.get(criterion)
    if swaps and not rule.scores:
        adequate = ", ".join(name for name, rule in criteria.CRITERIA.items() if rule.scores)
        does = "removes whole heads and neurons" if isinstance(rule, Structured) else "adapts weights to its own mask"
        raise ReconError(f"swaps is {swaps}, but criterion {criterion!r} {does}; swaps suit {adequate}")
    if isinstance(rule, Structured) and pattern.m is not None:
        raise ReconError(
            f"pattern is {pattern}, but criterion {criterion!r} removes whole heads and neurons; "
            "give the share of the weights that is to go, such as 0.2"
        )
    if isinstance(rule, Structured) and scope != "auto":
        raise ReconError(
            f"scope is {scope!r}, but criterion {criterion!r} compares whole heads and neurons within a {rule.scope}; allowed: auto"
        )


def _prune_matrix(
    matrix: Matrix, statistics: Tensor | None, rule, pattern: Pattern, scope: str, random, swaps: int, options: dict
) -> tuple[Tensor, Tensor]:
    """The matrix's new weight and mask. `statistics` are a Gram matrix where there are `swaps`, else what `rule` asks for."""
    weight, own = matrix.weight.float(), statistics
    if swaps:
        own = {"none": None, "norm": statistics.diagonal().sqrt(), "gram": statistics}[rule.statistics]
    try:
        pruned, mask = rule.prune(weight, own, pattern, scope, random, **options)
    except ReconError as error:
        raise ReconError(f"matrix {matrix.name!r}: {error}") from None
    if not swaps:
        return pruned, mask
    mask = swap(weight, mask, statistics, swaps, pattern.m)
    return weight.masked_fill(~mask, 0.0), mask
