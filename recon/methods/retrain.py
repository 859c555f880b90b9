"""Retraining: changes the whole model's weights, on labels or against the dense model's predictions, without losing a zero."""

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from recon.config import RetrainingConfig
from recon.errors import ReconError
from recon.kernels.gradient_descent import Trained, trained
from recon.kernels.losses import kl_divergence, negative_log_likelihood
from recon.methods.adapters import adapted, check_adaptable
from recon.methods.callbacks import Callback, ProgressBar
from recon.methods.masks import check_trainable, keep_masks
from recon.methods.samples import as_tokens
from recon.methods.training import movement, train
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.model.matrices import stored
from recon.model.modules import replaced, requiring_gradients
from recon.runtime.execution import Execution
from recon.runtime.seeds import generator

log = logging.getLogger("recon")

RETRAINED, NOT_FINITE = "retrained", "rolled back: not finite"


@dataclass(frozen=True)
class RetrainingReport:
    """What became of a retraining."""

    parameters: int  # elements trained
    losses: list[float]  # nats per token, one per optimiser step
    movement: float  # |after - before| / |before| over the matrices of the blocks
    seconds: float
    status: str  # RETRAINED or NOT_FINITE
    micro_batch: int = 0  # samples per forward pass; fewer than asked for where memory ran out


def retrain(
    model: nn.Module | Decoder,
    samples: Tensor | Iterable,
    config: RetrainingConfig = RetrainingConfig(retrain="masklora"),
    *,
    masks: dict[str, Tensor] | None = None,
    dense: nn.Module | Decoder | None = None,
    seed: int = 0,
    execution: Execution | None = None,
    callbacks: Sequence[Callback] = (),
) -> RetrainingReport:
    """Trains `model` in place on `samples`; weights that `masks` drop are exact zeros afterwards.

    Args:
        model: the pruned model, or its `Decoder`, in float32; all of it is on the compute device meanwhile.
        samples: tokens (samples, length), or batches of them; see `recon.methods.samples`.
        masks: keep-masks by matrix name, bool (out, in); default: wherever `model` is not zero.
        dense: the model to learn from, for objective distil.
        callbacks: told of each step, and when LoRA is merged.

    Raises:
        ReconError: no method, a missing dense model, a mask that does not fit, a model not in float32, samples longer than the model was
            made for.
    """
    if config.retrain == "none":
        raise ReconError("retrain is 'none'; name a method")
    if config.retrain_objective == "distil" and dense is None:
        raise ReconError("objective 'distil' learns from the dense model's predictions, and needs `dense`")
    student = decompose(model)
    samples = as_tokens(samples)
    student.check_length(samples.shape[1])
    if config.retrain not in ("full", "norms"):
        check_adaptable(student)
    execution = execution or Execution(student.device)
    teacher = None
    if config.retrain_objective == "distil":
        teacher = decompose(dense, like=student)
    check_trainable(student)
    task = _Retraining(student, teacher, keep_masks(student, masks), config, seed, execution)
    with contextlib.ExitStack() as stack:
        for decoder in filter(None, (student, teacher)):
            stack.enter_context(_at(decoder.model, execution.device))
        bar = tqdm(
            total=config.schedule(len(samples)).steps(len(samples)), desc=f"retrain ({config.retrain}, {config.retrain_objective})", unit="step",
            disable=not execution.progress,
        )  # fmt: skip
        return task.run(samples, [ProgressBar(stack.enter_context(bar)), *callbacks])


class _Retraining:
    """One retraining of `student`, against `teacher` or, where that is None, on labels."""

    def __init__(
        self,
        student: Decoder,
        teacher: Decoder | None,
        masks: dict[str, Tensor],
        config: RetrainingConfig,
        seed: int,
        execution: Execution,
    ):
        self.student, self.teacher, self.masks, self.config = student, teacher, masks, config
        self.seed, self.execution = seed, execution
        self.aside = 0.0  # seconds that callbacks spent on the merged model

    def run(self, samples: Tensor, callbacks: Sequence[Callback]) -> RetrainingReport:
        """Trains, and rolls everything back where losses or weights became non-finite."""
        began, student, method = time.perf_counter(), self.student, self.config.retrain
        before = {name: matrix.weight.detach().clone() for name, matrix in student.matrices().items()}
        rest = {}
        if method in ("full", "norms"):
            rest = {name: p.detach().clone() for name, p in student.model.named_parameters()}

        def after_step(loss: Tensor) -> None:
            for callback in callbacks:
                callback.on_step(loss)

        with requiring_gradients(student.model.parameters(), False), self._trained(callbacks) as parameters:
            count = sum(each.parameter.numel() for each in parameters)
            with requiring_gradients([each.parameter for each in parameters]):
                random = generator(self.seed, "retrain")
                losses = train(
                    self._loss, [samples], parameters, self.config.schedule(len(samples)), random, self.execution, after_step
                )
        status = self._rolled_back(losses, before, rest)
        student.forget()
        moved = movement((before[name], matrix.weight) for name, matrix in student.matrices().items())
        seconds = time.perf_counter() - began - self.aside
        batch = self.execution.micro_batch or self.config.retrain_batch_size
        return RetrainingReport(count, losses, moved, seconds, status, batch)

    @torch.no_grad()
    def _rolled_back(self, losses: list[float], before: dict[str, Tensor], rest: dict[str, Tensor]) -> str:
        """Restores the weights `before`, and the `rest`, where losses or weights are not finite; returns the status."""
        student = self.student
        broken = "" if all(map(math.isfinite, losses)) else "losses"
        if not all(bool(torch.isfinite(p).all()) for p in student.model.parameters()):
            broken = "weights"
        if not broken:
            return RETRAINED
        log.warning(
            "retraining (%s, %s) gave NaN or infinite %s; it is rolled back",
            self.config.retrain,
            self.config.retrain_objective,
            broken,
        )
        for name, value in rest.items():
            student.model.get_parameter(name).copy_(value)
        for name, matrix in student.matrices().items():
            matrix.weight.copy_(before[name])
        return NOT_FINITE

    @contextlib.contextmanager
    def _trained(self, callbacks: Sequence[Callback]) -> Iterator[list[Trained]]:
        """The parameters that the method trains; what it put around the matrices is merged at the end."""
        matrices, config = self.student.matrices(), self.config
        if config.retrain == "full":
            yield trained(self.student.model.parameters(), dict(stored(matrices, self.masks, self.execution.device)))
        elif config.retrain == "norms":
            yield trained((p for p in self.student.model.parameters() if p.ndim == 1), {})
        else:
            random = generator(self.seed, "adapters")

            def merged() -> None:
                began = time.perf_counter()
                for callback in callbacks:
                    callback.on_merged()
                self.aside = time.perf_counter() - began

            look = {"merged": merged} if config.retrain == "lora" else {}  # the others lose no zero by merging
            with adapted(matrices.values(), self.masks, config.retrain, config.retrain_rank, random, **look) as parameters:
                yield list(parameters.values())

    def _loss(self, tokens: Tensor) -> Tensor:
        """Mean over predicted tokens, in nats; tokens (batch, length)."""
        student, teacher, execution = self.student, self.teacher, self.execution
        blocks = student.blocks if self.config.retrain_checkpointing else ()
        # In the backward pass the blocks run under the execution again, which it is not part of otherwise.
        again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), execution))
        with execution, replaced({block: partial(again, block.forward) for block in blocks}):
            logits = student.run(tokens).logits[:, :-1].flatten(0, 1)
        if teacher is None:
            return negative_log_likelihood(logits, student.predicted(tokens)[:, 1:].flatten()).mean()
        with execution, torch.no_grad():
            wanted = teacher.run(tokens).logits[:, :-1].flatten(0, 1)
        return kl_divergence(wanted, logits).mean()


@contextlib.contextmanager
def _at(model: nn.Module, device: torch.device) -> Iterator[None]:
    """All of `model` is on `device` for a while."""
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
