"""Retraining: trains the whole model on labels or on the dense model's predictions; pruned weights stay zero."""

import contextlib
import time
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recon.config import RetrainingConfig
from recon.errors import ReconError, check_kind
from recon.kernels.adapters import ADAPTERS
from recon.kernels.gradient_descent import trained
from recon.kernels.losses import kl_divergence, negative_log_likelihood
from recon.methods.masks import check_apart, keep_masks
from recon.methods.samples import as_tokens
from recon.methods.training import NOT_FINITE, Callback, Report, adapted, check_trainable, settle, train
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.model.modules import replaced, requiring_gradients
from recon.model.structure import stored
from recon.runtime.execution import Execution
from recon.runtime.seeds import generator

RETRAINED = "retrained"


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
) -> Report:
    """Trains `model` in place on `samples`; what `masks` drop is exactly zero afterwards. Non-finite results are rolled back.

    model: the pruned model, or its `Decoder`, in float32; all of it is on the compute device during training.
    samples: tokens (samples, length), or batches of them; see `recon.methods.samples`.
    masks: keep-masks by matrix name, bool (out, in); default: wherever `model` is not zero.
    dense: the model to learn from, for objective "distil".
    callbacks: called after each step, and when LoRA is merged.

    Raises `ReconError` for models, masks, samples and options that do not fit together, naming what does not.
    """
    check_kind("config", config, RetrainingConfig)
    method, name = config.retrain, f"retrain ({config.retrain}, {config.retrain_objective})"
    if method == "none":
        raise ReconError("retrain is 'none'; name a method")
    if config.retrain_objective == "distil" and dense is None:
        raise ReconError("objective 'distil' learns from the dense model's predictions, and needs `dense`")
    student, samples = decompose(model), as_tokens(samples, first=config.retrain_samples)
    student.check_causal()
    student.check_length(samples.shape[1])
    student.check_tokens(samples)
    if student.predicted(samples).shape[1] < 2:
        raise ReconError(f"in calibration samples of {samples.shape[1]} tokens there is none to predict; give longer ones")
    check_trainable(student, method)
    execution = Execution.of(student, execution)
    teacher = decompose(dense, like=student) if config.retrain_objective == "distil" else None
    if teacher:
        check_apart(student.model, teacher.model)
    own, its = (each.model.config.get_text_config().vocab_size for each in (student, teacher or student))
    if own != its:
        raise ReconError(f"dense predicts {its} tokens, and model {own}; give a dense model with the same tokens")
    masks, schedule, began = keep_masks(student, masks), config.schedule(len(samples)), time.perf_counter()
    with contextlib.ExitStack() as homes:
        for decoder in filter(None, (student, teacher)):
            homes.callback(decoder.model.to, decoder.device)
            decoder.model.to(execution.device)
        every, matrices = dict(student.model.named_parameters()), student.matrices()
        if method in ADAPTERS:
            theta = {matrix.parameter_name: matrix.parameter for matrix in matrices.values()}
            random = generator(seed, "adapters")
            training = adapted([*matrices.values()], masks, method, config.retrain_rank, random, callbacks)
        else:
            vectors = {name for name, each in every.items() if each.ndim == 1} | {each.bias_name for each in matrices.values()}
            theta = {name: parameter for name, parameter in every.items() if method == "full" or name in vectors}
            kept = dict(stored(matrices, masks, execution.device)) if method == "full" else {}
            training = contextlib.nullcontext(trained(theta.values(), kept, [theta[name] for name in vectors & theta.keys()]))
        before = {name: execution.storage.empty(p.shape, p.dtype).copy_(p.detach()) for name, p in theta.items()}
        with requiring_gradients(every.values(), False), training as parameters:
            with requiring_gradients([each.parameter for each in parameters]):
                loss = partial(_loss, student, teacher, execution, config.retrain_checkpointing)
                losses = train(loss, [samples], parameters, schedule, generator(seed, "retrain"), execution, callbacks, name)
            seconds = time.perf_counter() - began
        fine = settle(name, theta, before, losses)
        student.forget()
    batch, count = schedule.batch_size, sum(each.parameter.numel() for each in parameters)
    return Report(count, losses, seconds, RETRAINED if fine else NOT_FINITE, min(execution.micro_batch or batch, batch))


def _loss(student: Decoder, teacher: Decoder | None, execution: Execution, checkpointing: bool, tokens: Tensor) -> Tensor:
    """Mean loss over predicted tokens, in nats, (); tokens: (batch, length); teacher: None for labels."""
    again = partial(checkpoint, use_reentrant=False)
    blocks = student.blocks if checkpointing else ()
    with execution.autocast(), replaced({block: partial(again, block.forward) for block in blocks}):
        logits = student.run(tokens).logits[:, :-1].flatten(0, 1)
    if teacher is None:
        return negative_log_likelihood(logits, student.predicted(tokens)[:, 1:].flatten()).mean()
    with execution.autocast(), torch.no_grad():
        wanted = teacher.run(tokens).logits[:, :-1].flatten(0, 1)
    return kl_divergence(wanted, logits).mean()
