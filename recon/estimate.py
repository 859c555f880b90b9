"""How long a run will take and how much memory it needs, roughly, said before it starts."""

import logging
import time

import torch

from recon import criteria
from recon.decoder import Decoder
from recon.device import pick_compute_dtype
from recon.windows import Window, canonical

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


def cost(spec, decoder: Decoder) -> tuple[dict[str, float], int]:
    """FLOPs by phase and peak bytes in memory for a run of `spec` on the model of `decoder`; attention scores left out."""
    matrices = decoder.matrices()
    weights = sum(m.weight.numel() for m in matrices.values())
    everything = sum(p.numel() for p in decoder.model.parameters())
    head = decoder.model.get_output_embeddings()
    head_weights = head.weight.numel() if head is not None else 0
    tokens = spec.samples * spec.sequence_length
    evaluated = len(spec.evaluation_texts) * spec.evaluation_samples * spec.evaluation_length
    rule = criteria.get(spec.criterion)
    grams = sum(matrices[group[0]].weight.shape[1] ** 2 for groups in decoder.groups for group in groups)
    flops = {"evaluate": (3 if spec.granularity != "none" else 2) * 2 * evaluated * (weights + head_weights)}
    passes = 0 if rule.statistics == "none" else 2 if spec.prune_propagation == "sparse" else 1
    flops["prune"] = passes * 2 * tokens * weights + (2 * tokens * grams if rule.statistics == "gram" else 0)
    window_weights = 0
    if canonical(spec.granularity) != "none":
        windows: list[Window] = decoder.windows(spec.granularity)
        window_weights = max(sum(p.numel() for p in decoder.parameters(w).values()) for w in windows)
        steps = 3 * spec.epochs if spec.solver == "adamw" else 0
        flops["reconstruct"] = 2 * tokens * weights * (1 + steps + (spec.granularity == "matrix"))
        if spec.start == "exact" or spec.solver == "exact":
            flops["reconstruct"] += 2 * tokens * grams
    hidden = decoder.model.config.get_text_config().hidden_size
    activations = 4 * (tokens + spec.held_out_samples * spec.sequence_length) * hidden
    # Two models; inputs, targets and one stream on its way; weights' backup, gradient and two moments of AdamW.
    peak = 4 * 2 * everything + 3 * activations + 4 * 4 * window_weights
    return flops, peak


def announce(spec, decoder: Decoder, device: torch.device) -> None:
    """Logs the estimate for a run of `spec`."""
    flops, peak = cost(spec, decoder)
    rate = EFFICIENCY * gemm_rate(device, pick_compute_dtype(spec.compute_dtype, device))
    seconds = {phase: count / rate for phase, count in flops.items()}
    parts = ", ".join(f"{phase} {duration(value)}" for phase, value in seconds.items())
    log.info(
        "%s, %s %s, %s: about %s on this machine (%s); about %.1f GiB",
        spec.model, spec.criterion, spec.pattern, spec.granularity, duration(sum(seconds.values())), parts, peak / 2**30,
    )  # fmt: skip


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
