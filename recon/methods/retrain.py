"""Retraining a pruned model as a whole, on labels or against the dense model's predictions, without losing a zero."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from recon.errors import ReconError
from recon.kernels.adapters import ADAPTERS, ALPHA, check_adapter
from recon.kernels.gradient_descent import Schedule
from recon.kernels.likelihood import kl_divergence, negative_log_likelihood
from recon.methods.adapters import adapted, check_adaptable
from recon.methods.fit import optimise
from recon.methods.prune import keep_masks
from recon.model.decoder import Decoder
from recon.model.discovery import take_apart
from recon.model.matrices import stored
from recon.model.modules import replaced, requiring_gradients
from recon.runtime.execution import Execution
from recon.runtime.seeds import generator

log = logging.getLogger("recon")
METHODS = {
    "full": "every parameter, embeddings included; the mask is applied after every step",
    **ADAPTERS,
    "norms": "biases and norms only (Zimmer et al. 2023, arXiv 2312.15230)",
}
OBJECTIVES = {
    "labels": "cross-entropy of the next token",
    "distil": "KL divergence from the dense model's predictions (Hinton et al. 2015, arXiv 1503.02531)",
}


@dataclass(frozen=True)
class RetrainingReport:
    """What became of a retraining."""

    parameters: int  # trained
    losses: list[float]  # nats per token, one per optimiser step
    gradient_norms: list[float]  # see `recon.kernels.gradient_descent.Curve`
    movement: float  # |after - before| / |before| over the matrices of the blocks
    seconds: float
    status: str  # "retrained", or "restored" where training gave numbers that are not finite
    micro_batch: int = 0  # samples per forward pass; fewer than asked for where memory ran out


def check_options(method: str, objective: str) -> None:
    """Raises `ReconError` for unknown names."""
    for kind, value, known in (("retraining method", method, METHODS), ("objective", objective, OBJECTIVES)):
        if value not in known:
            raise ReconError(f"unknown {kind} {value!r}; allowed: {', '.join(known)}")


def retrain(
    model: nn.Module | Decoder,
    samples: Tensor,
    masks: dict[str, Tensor] | None = None,
    method: str = "masklora",
    objective: str = "labels",
    dense: nn.Module | Decoder | None = None,
    schedule: Schedule = Schedule(learning_rate=1e-3),
    rank: int = 16,
    checkpointing: bool = False,
    merged: Callable[[], None] = lambda: None,
    seed: int = 0,
    compute_dtype: str = "auto",
    device: torch.device | str | None = None,
    progress: bool = True,
) -> RetrainingReport:
    """Trains `model` in place on `samples`; weights that `masks` drop are exact zeros afterwards.

    Args:
        model: the pruned model, or its `Decoder`, in float32; all of it is on the compute device meanwhile.
        samples: tokens (samples, length).
        masks: keep-masks by matrix name, bool (out, in); default: wherever `model` is not zero.
        method, objective: see `METHODS` and `OBJECTIVES`.
        dense: the model to learn from, for objective distil.
        rank: of the adapters, where the method has them.
        checkpointing: keep the blocks' inputs alone for the backward pass, and run each block once more there.
        merged: called once LoRA is merged and before the mask is applied again, to see what that costs.

    Raises:
        ReconError: an unknown name, a missing dense model, a mask that does not fit, a model not in float32, samples longer than
            the model was made for.
    """
    check_options(method, objective)
    if objective == "distil" and dense is None:
        raise ReconError("objective 'distil' learns from the dense model's predictions, and needs `dense`")
    student = take_apart(model)
    student.check_length(samples.shape[1])
    if method not in ("full", "norms"):
        check_adaptable(student)
    masks = keep_masks(student, masks)
    execution = Execution(device or student.device, compute_dtype)
    teacher = None
    if objective == "distil":
        teacher = take_apart(dense, like=student)
    began = time.perf_counter()
    before = {name: matrix.weight.detach().clone() for name, matrix in student.matrices().items()}
    rest = {name: p.detach().clone() for name, p in student.model.named_parameters()} if method in ("full", "norms") else {}
    with contextlib.ExitStack() as stack:
        for decoder in filter(None, (student, teacher)):
            stack.enter_context(_at(decoder.model, execution.device))
        stack.enter_context(student.experts_apart())  # also where checkpointed blocks run again
        stack.enter_context(requiring_gradients(student.model.parameters(), False))
        aside = 0.0  # seconds of looking at the merged model

        def look() -> None:
            nonlocal aside
            started = time.perf_counter()
            merged()
            aside = time.perf_counter() - started

        with _trained(student, masks, method, rank, seed, look) as parameters:
            count = sum(p.numel() for p in parameters.values())
            kept = []
            if method == "full":
                kept = stored(student.matrices(), masks, execution.device)
            steps = schedule.steps(len(samples))
            bar = stack.enter_context(
                tqdm(total=steps, desc=f"retrain ({method}, {objective})", unit="step", disable=not progress)
            )
            with requiring_gradients(parameters.values()):
                curve = optimise(
                    partial(_loss, student, teacher, execution, checkpointing),
                    [samples], list(parameters.values()), kept, schedule, generator(seed, "retrain"), execution,
                    lambda value: bar.update(),
                )  # fmt: skip
    status = "retrained"
    broken = "" if all(map(math.isfinite, curve.losses)) else "losses"
    if not all(bool(torch.isfinite(p).all()) for p in student.model.parameters()):
        broken = "weights"
    if broken:
        log.warning("retraining (%s, %s) gave NaN or infinite %s; the weights before it are restored", method, objective, broken)
        status = "restored"
        with torch.no_grad():
            for name, parameter in student.model.named_parameters():
                if name in rest:
                    parameter.copy_(rest[name])
            for name, matrix in student.matrices().items():
                matrix.weight.copy_(before[name])
    student.forget()
    moved = sum((m.weight - before[name]).square().sum().item() for name, m in student.matrices().items())
    norm = sum(weight.square().sum().item() for weight in before.values())
    movement = (moved / max(norm, 1e-30)) ** 0.5
    seconds = time.perf_counter() - began - aside
    return RetrainingReport(count, curve.losses, curve.gradient_norms, movement, seconds, status, curve.micro_batch)


@contextlib.contextmanager
def _at(model: nn.Module, device: torch.device) -> Iterator[None]:
    """All of `model` is on `device` for a while."""
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


@contextlib.contextmanager
def _trained(
    student: Decoder, masks: dict[str, Tensor], method: str, rank: int, seed: int, merged: Callable[[], None]
) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters that `method` trains, by name; what it put around the matrices is merged at the end."""
    matrices = student.matrices()
    if method == "full":
        yield dict(student.model.named_parameters())
    elif method == "norms":
        yield {name: p for name, p in student.model.named_parameters() if p.ndim == 1}
    elif method == "lora":
        check_adapter(method, rank)
        with _peft(student.model, list(matrices), rank, seed) as parameters:
            yield parameters
        merged()
        with torch.no_grad():
            for name, matrix in matrices.items():
                matrix.weight.mul_(masks[name].to(matrix.weight.device))
    else:
        with adapted(matrices.values(), masks, method, rank, generator(seed, "adapters")) as parameters:
            yield parameters


@contextlib.contextmanager
def _peft(model: nn.Module, names: list[str], rank: int, seed: int) -> Iterator[dict[str, nn.Parameter]]:
    """The modules called `names` carry LoRA adapters made by `peft`, which are merged in the end."""
    from peft import LoraConfig, LoraModel  # slow to import

    config = LoraConfig(r=rank, lora_alpha=round(ALPHA * rank), target_modules=names, lora_dropout=0.0, bias="none")
    with torch.random.fork_rng():  # peft draws from the global generator
        torch.manual_seed(generator(seed, "adapters").initial_seed() % 2**32)
        tuner = LoraModel(model, {"default": config}, "default")
    try:
        yield {name: p for name, p in tuner.named_parameters() if ".lora_" in name}
    finally:
        tuner.merge_and_unload(progressbar=False)


def _loss(student: Decoder, teacher: Decoder | None, execution: Execution, checkpointing: bool, tokens: Tensor) -> Tensor:
    """Mean over predicted tokens, in nats; tokens (batch, length)."""
    blocks = student.blocks if checkpointing else ()
    # In the backward pass the blocks run under the execution again, which it is not part of otherwise.
    again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), execution))
    with execution, replaced({block: partial(again, block.forward) for block in blocks}):
        logits = student.run(tokens).logits[:, :-1].flatten(0, 1)
    if teacher is None:
        return negative_log_likelihood(logits, student.predicted(tokens)[:, 1:].flatten()).mean()
    with execution, torch.no_grad():
        wanted = teacher.run(tokens).logits[:, :-1].flatten(0, 1)
    return kl_divergence(wanted, logits).mean()
