"""Floating-point operations of a run, in closed form from the shapes of its model; how fast this machine is at them."""

import functools
import logging
import time
from collections.abc import Iterable

import torch
from torch import nn

from recon.config import ReconstructionConfig, RetrainingConfig
from recon.kernels import criteria
from recon.kernels.adapters import ADAPTERS
from recon.kernels.gradient_descent import Schedule, descend, trained
from recon.kernels.moments import triangle
from recon.methods.problem import ERROR_SAMPLES
from recon.model.decoder import Decoder
from recon.model.matrices import factors
from recon.model.windows import Window
from recon.runtime.activations import LIMIT
from recon.runtime.device import HOST, pick_compute_dtype, resident
from recon.study.memory import highest, memory
from recon.study.spec import RunSpec

log = logging.getLogger("recon")
EFFICIENCY = 0.6  # of a bare matrix product's speed that a whole pass reaches, measured on CPUs
STEP = 0.5e-3  # seconds of a training step for each matrix, beside products and updates: what Python and autograd take, measured on CPUs


def gemm_rate(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.1) -> float:
    """Floating-point operations per second of a square matrix product on this machine, measured now."""
    a, b = torch.ones(size, size, device=device, dtype=dtype), torch.ones(size, size, device=device, dtype=dtype)
    (a @ b).sum().item()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        (a @ b).sum().item()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - began)


@functools.cache
def speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a whole pass on this machine; measured once per process."""
    return EFFICIENCY * gemm_rate(device, dtype)


@functools.cache
def update_rate(device: torch.device, dtype: torch.dtype, steps: int = 6) -> float:
    """Weights per second that training steps round, update and mask on this machine; measured once per process.

    Memory bounds it, not products: with few tokens in a step, it takes as long as they do.
    """
    weights = nn.Parameter(torch.ones(1536, 1024, device=device))
    gradient, mask = torch.ones_like(weights, dtype=dtype), factors(torch.ones_like(weights, dtype=torch.bool), device)

    def gradients(step: int) -> torch.Tensor:
        weights.to(dtype)
        weights.grad = gradient.float()
        return gradient[0, 0].float()

    updated = trained([weights], {weights: mask})
    descend(gradients, updated, Schedule(), 1)
    began = time.perf_counter()
    descend(gradients, updated, Schedule(), steps)  # returns losses as numbers, so the device is done
    return steps * weights.numel() / (time.perf_counter() - began)


def seconds(spec: RunSpec, decoder: Decoder, device: torch.device, by_phase: dict[str, float]) -> dict[str, float]:
    """Seconds that a run of `spec` will take on this machine by phase, from its floating-point operations (see `flops`)."""
    dtype = pick_compute_dtype(spec.compute.compute_dtype, device)
    found = {phase: count / speed(device, dtype) for phase, count in by_phase.items()}
    for phase, (steps, weights) in updates(spec, decoder).items():
        if weights:
            found[phase] += steps * STEP + weights / update_rate(device, dtype)
    return found


def updates(spec: RunSpec, decoder: Decoder) -> dict[str, tuple[int, int]]:
    """By phase that trains: how often training steps run through a matrix, and update a weight, in all."""
    found, calibration = {"reconstruct": (0, 0), "retrain": (0, 0)}, spec.calibration
    matrices = {name: matrix.weight.shape for name, matrix in decoder.matrices().items()}

    def add(phase: str, how: ReconstructionConfig | RetrainingConfig, samples: int, names: Iterable[str], rank: int) -> None:
        schedule, shapes = how.schedule(samples), [matrices[name] for name in names]
        runs = schedule.epochs * -(-samples // schedule.batch_size)  # forward passes; an update takes `accumulation` of them
        size = sum(rank * (rows + columns) if rank else rows * columns for rows, columns in shapes)
        steps, weights = found[phase]
        found[phase] = steps + runs * len(shapes), weights + schedule.steps(samples) * size

    how, samples = spec.reconstruction, calibration.samples
    if how.granularity != "none" and how.solver == "adamw":
        for window in decoder.windows(how.granularity):
            chunks = how.chunks_of(window, calibration.sequence_length)
            add("reconstruct", how, samples * chunks, decoder.matrices(window), how.rank * (how.adapter != "none"))
    if spec.retraining.retrain != "none":
        rank = spec.retraining.retrain_rank * (spec.retraining.retrain != "full")
        add("retrain", spec.retraining, spec.samples_by_phase["retrain"], matrices, rank)
    return found


def forward_flops(decoder: Decoder, length: int) -> float:
    """Floating-point operations per token of one pass through all blocks, in samples of `length` tokens."""
    model = _Model(decoder)
    return 2 * model.weights + model.attention(length)


def flops(spec: RunSpec, decoder: Decoder) -> dict[str, float]:
    """Floating-point operations of a run of `spec` by phase: "prune", "reconstruct", "retrain", "evaluate".

    As if the run shared nothing with others: two per weight and token for each product (forward, weight gradient, input gradient),
    attention over the causal half, Gram matrices, adapters, exact solvers; no element-wise work. Evaluation is that of perplexity.
    """
    model = _Model(decoder)
    return {
        "prune": _prune(spec, model),
        "reconstruct": _reconstruct(spec, model) if spec.reconstruction.granularity != "none" else 0.0,
        "retrain": _retrain(spec, model) if spec.retraining.retrain != "none" else 0.0,
        "evaluate": _evaluate(spec, model),
    }


def _prune(spec: RunSpec, model: "_Model") -> float:
    pruning, length = spec.pruning, spec.calibration.sequence_length
    rule = criteria.get("none" if spec.model.pruned else pruning.criterion)
    tokens, found = spec.samples_by_phase["prune"] * length, 0.0
    if rule.statistics != "none" or pruning.mask_refinement:
        passes = 1 + model.again if pruning.statistics == "sparse" and rule.scope != "model" else 1
        if not spec.one_pass:  # in which the dense model's pass is that of reconstruction
            found = passes * model.forward(length) * tokens
    if rule.statistics == "gram" or pruning.mask_refinement:
        found += model.grams * tokens
    return found + model.inverses if pruning.criterion == "sparsegpt" else found


def _reconstruct(spec: RunSpec, model: "_Model") -> float:
    how, samples, length = spec.reconstruction, spec.calibration.samples, spec.calibration.sequence_length
    forward, tokens, found = model.forward(length), samples * length, 0.0
    dense, sparse = how.propagation != "sparse", how.propagation != "dense"
    windows = model.decoder.windows(how.granularity)
    again = 1 - len(windows[-1].blocks) / len(model.decoder.blocks)  # nothing reads what comes after the last window
    per_token = forward + sparse * again * forward  # the dense model's pass, and the student's own
    if how.granularity == "matrix":
        # Targets come matrix by matrix; inputs too, unless one run of the dense block tells them all.
        targets = 0 if how.solver == "exact" and not sparse else 2 * model.weights
        per_token += targets - (0 if dense else forward) + sparse * (1 + dense) * model.prefixes
    if how.solver == "adamw":
        epochs = how.schedule(samples).epochs
        per_token += epochs * _descend(how, length, model)
        if how.adapter != "none":
            for window in windows:
                steps = epochs * -(-samples * how.chunks_of(window, length) // how.batch_size)
                found += steps * 6 * how.rank * sum(matrix.weight.numel() for matrix in model.decoder.matrices(window).values())
    if how.solver == "exact" or how.start == "exact":
        found += model.grams * tokens + 2 * model.products * (1 + how.exact_iterations)
    found += per_token * tokens
    # Errors: on held-out samples, through the dense windows too; before and after through the student's.
    return found + ERROR_SAMPLES * length * forward * ((spec.calibration.held_out_samples > 0) + 2)


def _descend(how: ReconstructionConfig, length: int, model: "_Model") -> float:
    """Per token of the samples and epoch: the student's forward and backward passes."""
    found = model.forward(length) + 2 * model.weights  # the student, and its weights' gradients
    if how.granularity == "matrix":
        return found - model.attention(length)
    first = 0 if how.train == "all" else sum(map(model.first, model.decoder.windows(how.granularity)))
    return found + 2 * (model.weights - first) + 2 * model.attention(length)


def _retrain(spec: RunSpec, model: "_Model") -> float:
    how, samples, length = spec.retraining, spec.samples_by_phase["retrain"], spec.calibration.sequence_length
    forward, found, epochs = model.forward(length), 0.0, how.schedule(samples).epochs
    whole = forward + 2 * model.head
    backward = 2 * (model.weights + model.head) + 2 * model.attention(length)
    if how.retrain == "full":
        backward += 2 * (model.weights + model.head)
    elif how.retrain in ADAPTERS:
        backward += 2 * model.weights
        found += (
            epochs
            * -(-samples // how.retrain_batch_size)
            * (6 + 2 * how.retrain_checkpointing)
            * how.retrain_rank
            * model.weights
        )
    per_token = whole + backward + whole * (how.retrain_objective == "distil") + forward * how.retrain_checkpointing
    return found + epochs * per_token * samples * length


def _evaluate(spec: RunSpec, model: "_Model") -> float:
    tokens = sum(spec.evaluation.windows.values()) * spec.evaluation.evaluation_length
    changed = spec.reconstruction.granularity != "none" or spec.retraining.retrain != "none"  # so that it is evaluated once more
    return (2 + changed) * tokens * (2 * model.head + model.forward(spec.evaluation.evaluation_length))


def beside_perplexity(spec: RunSpec, decoder: Decoder) -> float:
    """Floating-point operations of what evaluation measures beside perplexity: KL's second head; on held-out samples, drift along
    the depth, for which the dense model runs again beside each other one, and perplexity."""
    model, how, calibration = _Model(decoder), spec.evaluation, spec.calibration
    others = 1 + (spec.reconstruction.granularity != "none" or spec.retraining.retrain != "none")  # than the dense model
    compared = sum(min(how.kl_windows, windows) for windows in how.windows.values()) * how.evaluation_length
    held_out, forward = calibration.held_out_samples * calibration.sequence_length, model.forward(calibration.sequence_length)
    return others * compared * 2 * model.head + held_out * ((1 + 2 * others) * forward + (1 + others) * 2 * model.head)


class _Model:
    """Sizes of a model that its operations follow from."""

    def __init__(self, decoder: Decoder):
        self.decoder, self.groups = decoder, decoder.groups
        self.matrices = {name: matrix.weight.shape for name, matrix in decoder.matrices().items()}
        shapes = self.matrices.values()
        # A matrix of an expert multiplies some of the tokens only.
        self.share = {name: matrix.share for name, matrix in decoder.matrices().items()}
        self.weights = sum(map(self.per_token, self.matrices))
        self.products = sum(rows * columns**2 for rows, columns in shapes)  # of every matrix with its Gram matrix
        predicted = decoder.predicted(torch.empty(1, 2)).shape[1] / 2  # of all tokens; an encoder-decoder predicts half of them
        self.head = predicted * sum(weight.numel() for weight in decoder.head_weights())
        read = [self.matrices[group[0]][1] for groups in self.groups for group in groups]
        shares = [self.share[group[0]] for groups in self.groups for group in groups]
        self.grams = sum(2 * triangle(columns) * share for columns, share in zip(read, shares, strict=True))  # per token
        sizes = [[sum(map(self.per_token, group)) for group in groups] for groups in self.groups]
        # What runs before each group of matrices in its block, when only that group's input is wanted.
        self.prefixes = sum(2.0 * sum(sizes_of[:number]) for sizes_of in sizes for number in range(len(sizes_of)))
        self.inverses = sum(2 * columns**3 for columns in read) + self.products
        self.again = 1 - 1 / len(decoder.blocks)  # share of a pass: nothing reads what comes after the last block

    def per_token(self, name: str) -> float:
        """Weights of the matrix `name` that a token is multiplied by, on average."""
        return self.share[name] * self.matrices[name].numel()

    def forward(self, length: int) -> float:
        """One pass through all blocks, per token."""
        return 2 * self.weights + self.attention(length)

    def attention(self, length: int) -> float:
        """Scores and weighted sums per token at `length` tokens, over the causal half; none where a block has no halves."""
        width = 0
        for index, halves in enumerate(self.decoder.halves):
            if not isinstance(halves, str):
                names = list(self.decoder.matrices(Window(range(index, index + 1), half="attention")))
                width += self.matrices[names[-1]][1]
        return 2.0 * length * width

    def first(self, window: Window) -> float:
        """Weights of `window` that read its input, through which no gradient has to go."""
        names = list(self.decoder.matrices(window))
        group = next(group for group in self.groups[window.blocks[0]] if names[0] in group)
        return sum(self.per_token(name) for name in group if name in names)


def announce(spec: RunSpec, decoder: Decoder, device: torch.device) -> None:
    """Logs how long a run of `spec` will take, and how much memory; the model of `decoder` is in memory, unless it is a skeleton."""
    by_phase = flops(spec, decoder)
    by_phase["evaluate"] += beside_perplexity(spec, decoder)
    found = seconds(spec, decoder, device, by_phase)
    parts = ", ".join(f"{phase} {duration(value)}" for phase, value in found.items() if value)
    log.info(
        "%s, %s %s, %s: about %s on this machine (%s); about %.1f GiB of memory",
        spec.model.model, spec.pruning.criterion, spec.pruning.pattern, spec.reconstruction.granularity, duration(sum(found.values())), parts,
        _peak([spec], decoder, device) / 2**30,
    )  # fmt: skip


def announce_study(specs: list[RunSpec], decoder: Decoder, device: torch.device) -> None:
    """Logs the same for `specs`, runs of one study on the model of `decoder` that share what they can."""
    spent, dense, pruned, disk = 0.0, set(), set(), 0
    for spec in specs:
        by_phase = seconds(spec, decoder, device, flops(spec, decoder))
        once = by_phase["evaluate"] / (2 + (spec.reconstruction.granularity != "none" or spec.retraining.retrain != "none"))
        spent += by_phase["evaluate"] - 2 * once + by_phase["reconstruct"] + by_phase["retrain"]
        shared = (spec.evaluation.evaluation_texts, spec.evaluation.evaluation_samples, spec.evaluation.evaluation_length)
        if shared not in dense:
            dense.add(shared)
            spent += once
        shared += spec.pruned_by
        if shared not in pruned:
            pruned.add(shared)
            spent += once + by_phase["prune"]
        tokens = (2 * spec.calibration.samples + spec.calibration.held_out_samples) * spec.calibration.sequence_length
        disk = max(disk, 4 * tokens * decoder.model.config.get_text_config().hidden_size * len(decoder.blocks))
    log.info(
        "study: %d run%s of %s, about %s on this machine (%s); about %.1f GiB of memory, up to %.1f GiB of disk while it runs",
        len(specs), "s" * (len(specs) > 1), specs[0].model.model, duration(spent), device.type,
        _peak(specs, decoder, device) / 2**30, min(disk, LIMIT) / 2**30,
    )  # fmt: skip


def _peak(specs: list[RunSpec], decoder: Decoder, device: torch.device) -> float:
    """Peak bytes of host memory that this process will have, which has loaded the model of `decoder` unless that is a skeleton."""
    streamed = decoder.lazy is not None
    found = (memory(spec, decoder, pick_compute_dtype(spec.compute.compute_dtype, device), device, streamed) for spec in specs)
    loaded = 0 if streamed else sum(parameter.nbytes for parameter in decoder.model.parameters())
    return resident() - loaded + max(sum(highest(phases[HOST.type]).values()) for phases in found)


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
