"""How long a run will take and how much memory it needs, roughly, said before it starts."""

import functools
import logging
import time

import torch

from recon.kernels import criteria
from recon.kernels.adapters import ADAPTERS
from recon.kernels.moments import triangle
from recon.methods.reconstruct import ERROR_SAMPLES
from recon.model.decoder import Decoder
from recon.model.windows import Window, canonical
from recon.runtime.activations import LIMIT
from recon.runtime.device import pick_compute_dtype, resident

log = logging.getLogger("recon")
EFFICIENCY = 0.6  # of a bare matrix product's speed that a whole pass reaches, measured on CPUs


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


def forward_flops(decoder: Decoder, length: int) -> float:
    """Floating-point operations per token of one pass through all blocks, in samples of `length` tokens."""
    model = _Model(decoder)
    return 2 * model.weights + model.attention(length)


def flops(spec, decoder: Decoder) -> dict[str, float]:
    """Floating-point operations of a run of `spec` by phase: "prune", "reconstruct", "retrain", "evaluate".

    In closed form from the shapes, as if the run shared nothing with others: two per weight and token for each product (forward,
    weight gradient, input gradient), attention over the causal half, Gram matrices, adapters, exact solvers; no element-wise
    work. Evaluation is that of perplexity.
    """
    model = _Model(decoder)
    samples = spec.samples_by_phase
    tokens = {phase: count * spec.calibration.sequence_length for phase, count in samples.items()}
    forward = 2 * model.weights + model.attention(spec.calibration.sequence_length)
    again = 1 - 1 / len(decoder.blocks)  # nothing reads what comes after the last block
    found = dict.fromkeys(("prune", "reconstruct", "retrain"), 0.0)

    rule = criteria.get("none" if spec.model.pruned else spec.pruning.criterion)
    if rule.statistics != "none" or spec.pruning.mask_refinement:
        passes = 1 + again if spec.pruning.statistics == "sparse" and rule.scope != "model" else 1
        found["prune"] = passes * forward * tokens["prune"]
    if rule.statistics == "gram" or spec.pruning.mask_refinement:
        found["prune"] += model.grams * tokens["prune"]
    if spec.pruning.criterion == "sparsegpt":
        found["prune"] += model.inverses

    if spec.reconstruction.granularity != "none":
        windows = decoder.windows(spec.reconstruction.granularity)
        dense, sparse = spec.reconstruction.propagation != "sparse", spec.reconstruction.propagation != "dense"
        per_token = forward + sparse * again * forward  # the dense model's pass, and the student's own
        if spec.reconstruction.granularity == "matrix":
            # Targets come matrix by matrix; inputs too, unless one run of the dense block tells them all.
            targets = 0 if spec.reconstruction.solver == "exact" and not sparse else 2 * model.weights
            per_token += targets - (0 if dense else forward) + sparse * (1 + dense) * model.prefixes
        if spec.reconstruction.solver == "adamw":
            per_token += spec.reconstruction.epochs * (forward + 2 * model.weights)  # the student, and its weights' gradients
            if spec.reconstruction.granularity != "matrix":
                first = 0 if spec.reconstruction.train == "all" else sum(model.first(window) for window in windows)
                per_token += spec.reconstruction.epochs * (
                    2 * (model.weights - first) + 2 * model.attention(spec.calibration.sequence_length)
                )
            else:
                per_token -= spec.reconstruction.epochs * model.attention(spec.calibration.sequence_length)
            if spec.reconstruction.adapter != "none":
                batches = spec.reconstruction.epochs * -(-samples["reconstruct"] // spec.reconstruction.batch_size)
                found["reconstruct"] += batches * 6 * spec.reconstruction.rank * model.weights
        if spec.reconstruction.solver == "exact" or spec.reconstruction.start == "exact":
            used = (
                tokens["reconstruct"]
                * min(spec.reconstruction.exact_samples or spec.calibration.samples, spec.calibration.samples)
                / spec.calibration.samples
            )
            found["reconstruct"] += model.grams * used + 2 * model.products * (1 + spec.reconstruction.exact_iterations)
        found["reconstruct"] += per_token * tokens["reconstruct"]
        # Errors: on held-out samples, through the dense windows too; before and after through the student's.
        extra = ERROR_SAMPLES * spec.calibration.sequence_length
        found["reconstruct"] += extra * forward * ((spec.calibration.held_out_samples > 0) + 2)

    if spec.retraining.method != "none":
        whole = forward + 2 * model.head
        backward = 2 * (model.weights + model.head) + 2 * model.attention(spec.calibration.sequence_length)
        if spec.retraining.method == "full":
            backward += 2 * (model.weights + model.head)
        elif spec.retraining.method == "lora":
            backward += (3 + spec.retraining.checkpointing) * 2 * spec.reconstruction.rank * model.edges
        elif spec.retraining.method in ADAPTERS:
            backward += 2 * model.weights
            batches = spec.retraining.epochs * -(-samples["retrain"] // spec.retraining.batch_size)
            found["retrain"] += batches * (6 + 2 * spec.retraining.checkpointing) * spec.reconstruction.rank * model.weights
        per_token = (
            whole
            + backward
            + (whole if spec.retraining.objective == "distil" else 0)
            + (forward if spec.retraining.checkpointing else 0)
        )
        found["retrain"] += spec.retraining.epochs * per_token * tokens["retrain"]

    evaluated = len(spec.evaluation.texts) * spec.evaluation.samples * spec.evaluation.length
    repaired = spec.reconstruction.granularity != "none" or spec.retraining.method != "none"
    found["evaluate"] = (2 + repaired) * evaluated * (
        2 * (model.weights + model.head) + model.attention(spec.evaluation.length)
    )  # fmt: skip
    return found


class _Model:
    """Sizes of a model that its costs follow from."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.matrices = {name: matrix.weight.shape for name, matrix in decoder.matrices().items()}
        shapes = self.matrices.values()
        # A matrix of an expert multiplies some of the tokens only.
        self.share = {name: matrix.share for name, matrix in decoder.matrices().items()}
        self.weights = sum(map(self.per_token, self.matrices))
        self.edges = sum(rows + columns for rows, columns in shapes)
        self.products = sum(rows * columns**2 for rows, columns in shapes)  # of every matrix with its Gram matrix
        predicted = decoder.predicted(torch.empty(1, 2)).shape[1] / 2  # of all tokens; an encoder-decoder predicts half of them
        self.head = predicted * sum(weight.numel() for weight in decoder.head_weights())
        read = [self.matrices[group[0]][1] for groups in decoder.groups for group in groups]
        shares = [self.share[group[0]] for groups in decoder.groups for group in groups]
        self.grams = sum(2 * triangle(columns) * share for columns, share in zip(read, shares, strict=True))  # per token
        sizes = [[sum(map(self.per_token, group)) for group in groups] for groups in decoder.groups]
        # What runs before each group of matrices in its block, when only that group's input is wanted.
        self.prefixes = sum(2.0 * sum(sizes_of[:number]) for sizes_of in sizes for number in range(len(sizes_of)))
        self.inverses = sum(2 * columns**3 for columns in read) + self.products

    def per_token(self, name: str) -> float:
        """Weights of the matrix `name` that a token is multiplied by, on average."""
        return self.share[name] * self.matrices[name].numel()

    def attention(self, length: int) -> float:
        """Scores and weighted sums per token at `length` tokens, over the causal half; none where a block has no halves."""
        width = 0
        for index, halves in enumerate(self.decoder.halves):
            if not isinstance(halves, str):
                names = list(self.decoder.matrices(Window(range(index, index + 1), half="attention")))
                width += self.matrices[names[-1]][1]
        return 2.0 * length * width

    def first(self, window: Window) -> int:
        """Weights of `window` that read its input, through which no gradient has to go."""
        names = list(self.decoder.matrices(window))
        group = next(group for group in self.decoder.groups[window.blocks[0]] if names[0] in group)
        return sum(self.per_token(name) for name in group if name in names)


def cost(spec, decoder: Decoder) -> tuple[dict[str, float], int]:
    """FLOPs by phase (see `flops`) and, roughly, peak bytes that a run of `spec` adds to the process that holds the dense model."""
    everything = sum(p.numel() for p in decoder.model.parameters())
    trained = 0
    if canonical(spec.reconstruction.granularity) != "none":
        trained = max(
            sum(p.numel() for p in decoder.parameters(w).values()) for w in decoder.windows(spec.reconstruction.granularity)
        )
    if spec.retraining.method == "full":
        trained = everything
    elif spec.retraining.method != "none":
        trained = max(trained, sum(matrix.weight.numel() for matrix in decoder.matrices().values()) // 2)
    hidden = decoder.model.config.get_text_config().hidden_size
    activations = 4 * (spec.calibration.samples + spec.calibration.held_out_samples) * spec.calibration.sequence_length * hidden
    # The student; inputs, targets and one stream on its way; weights' backup, gradient and two moments of AdamW.
    return flops(spec, decoder), 4 * everything + 3 * activations + 4 * 4 * trained


def streamed_peak(spec, decoder: Decoder) -> int:
    """Roughly, peak bytes that a streamed run of `spec` adds to its process: one window while it is trained, or a block, or an end.

    See `recon.experiment.streamed.StreamedRun` for what is in memory when.
    """
    blocks = [sum(p.numel() for p in block.parameters()) for block in decoder.blocks]
    windows = [] if canonical(spec.reconstruction.granularity) == "none" else decoder.windows(spec.reconstruction.granularity)
    trained = max((sum(p.numel() for p in decoder.parameters(window).values()) for window in windows), default=0)
    ends = max((weight.numel() for weight in decoder.head_weights()), default=0)
    # Weights, gradients, two moments and the rounded copy that autocast keeps, masks twice (1 byte, 2 bytes); or weights and rounded ones.
    return max(21 * trained, 6 * max(blocks), 6 * ends)


def announce(spec, decoder: Decoder, device: torch.device, streamed: bool = False) -> None:
    """Logs the estimate for a run of `spec`."""
    flops, peak = cost(spec, decoder)
    if streamed:
        peak = streamed_peak(spec, decoder)
    rate = speed(device, pick_compute_dtype(spec.compute.compute_dtype, device))
    seconds = {phase: count / rate for phase, count in flops.items()}
    parts = ", ".join(f"{phase} {duration(value)}" for phase, value in seconds.items() if value)
    log.info(
        "%s, %s %s, %s: about %s on this machine (%s); about %.1f GiB",
        spec.model.model, spec.pruning.criterion, spec.pruning.pattern, spec.reconstruction.granularity, duration(sum(seconds.values())), parts, (resident() + peak) / 2**30,
    )  # fmt: skip


def announce_study(specs: list, decoder: Decoder, device: torch.device) -> None:
    """Logs the estimate for `specs`, runs of one study on the model of `decoder` that share what they can."""
    spent, dense, pruned, peak, disk = 0.0, set(), set(), 0, 0
    for spec in specs:
        by_phase, bytes_needed = cost(spec, decoder)
        once = by_phase["evaluate"] / (2 + (spec.reconstruction.granularity != "none" or spec.retraining.method != "none"))
        spent += by_phase["evaluate"] - 2 * once + by_phase["reconstruct"] + by_phase["retrain"]
        shared = (spec.evaluation.texts, spec.evaluation.samples, spec.evaluation.length)
        if shared not in dense:
            dense.add(shared)
            spent += once
        shared += spec.pruned_by
        if shared not in pruned:
            pruned.add(shared)
            spent += once + by_phase["prune"]
        peak = max(peak, bytes_needed)
        hidden = decoder.model.config.get_text_config().hidden_size
        tokens = (2 * spec.calibration.samples + spec.calibration.held_out_samples) * spec.calibration.sequence_length
        disk = max(disk, 4 * tokens * hidden * len(decoder.blocks))
    seconds = spent / speed(device, pick_compute_dtype(specs[0].compute_dtype, device))
    log.info(
        "study: %d run%s of %s, about %s on this machine (%s); about %.1f GiB of memory, up to %.1f GiB of disk while it runs",
        len(specs), "s" * (len(specs) > 1), specs[0].model, duration(seconds), device.type, (resident() + peak) / 2**30, min(disk, LIMIT) / 2**30,
    )  # fmt: skip


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
