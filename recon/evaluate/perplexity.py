"""How well a model predicts held-out text, and how far it has drifted from the dense one."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from recon.errors import ReconError
from recon.kernels.losses import channel_variance, kl_divergence, negative_log_likelihood, unexplained
from recon.model.decoder import Decoder
from recon.model.discovery import decompose
from recon.runtime.execution import Execution

SLICE = 256  # tokens whose logits are in memory at once


@dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log-likelihood in nats) of all predicted `tokens`."""

    value: float
    tokens: int
    per_window: list[float]  # mean negative log-likelihood of each window of text
    kl_per_window: list[float] = field(default_factory=list)  # mean KL(dense || model) of the first windows; empty without dense


@torch.no_grad()
def perplexity(
    model: nn.Module | Decoder,
    tokens: Tensor,
    *,
    execution: Execution | None = None,
    reference: tuple[Decoder, Tensor] | None = None,
    states: Tensor | None = None,
    description: str = "perplexity",
) -> Perplexity:
    """Perplexity of `model` on `tokens` (windows, length). Windows of text are independent; their first tokens are not predicted.

    execution: where and in what precision; default: where the model is.
    reference: a dense model, and its last block's output for the first windows; the divergence from it is measured on these.
    states: the last block's output for `tokens`, (windows, length, hidden), if it is known; it is computed otherwise.

    Raises `ReconError` if `tokens` are not as above, windows are longer than the model was made for, or `model` is not causal.
    """
    decoder, tokens = decompose(model), torch.as_tensor(tokens)
    if tokens.ndim != 2 or len(tokens) < 1 or decoder.predicted(tokens).shape[1] < 2 or tokens.is_floating_point():
        said = f"allowed: whole numbers, (windows, length) of at least one window of {3 if decoder.reading else 2}"
        raise ReconError(f"tokens to predict are {tuple(tokens.shape)} of {tokens.dtype}; {said}")
    tokens = tokens.long()
    decoder.check_causal()
    decoder.check_length(tokens.shape[1])
    execution = Execution.of(decoder, execution)
    states = last_states(decoder, tokens, execution, description) if states is None else states
    tokens, inputs = decoder.predicted(tokens), decoder.predicted(states)
    dense, dense_states = reference or (None, ())
    compared, predicted = min(len(dense_states), len(tokens)), tokens.shape[1] - 1
    likelihoods, divergences = [0.0] * len(tokens), [0.0] * compared
    ends = execution.holding_ends(dense) if compared else contextlib.nullcontext()
    with execution.autocast(), execution.holding_ends(decoder), ends:
        batches = execution.batches([tokens, inputs], [range(i, i + 1) for i in range(len(tokens))])
        shown = tqdm(batches, f"{description}: logits", len(tokens), unit="window", leave=False, disable=not execution.progress)
        for window, (read, last) in enumerate(shown):
            if window < compared:
                dense_last = decoder.predicted(dense_states[window : window + 1]).to(execution.device)
            for start in range(0, predicted, SLICE):  # few logits are in memory at a time
                at = slice(start, min(start + SLICE, predicted))
                logits = decoder.logits(read[:, at], last[:, at])[0]
                targets = read[0, at.start + 1 : at.stop + 1]
                likelihoods[window] += negative_log_likelihood(logits, targets).double().sum().item()
                if window < compared:
                    wanted = dense.logits(read[:, at], dense_last[:, at])[0]
                    divergences[window] += kl_divergence(wanted, logits).double().sum().item()
                    del wanted
                del logits  # before the next ones are computed
    nats, divergences = ([total / predicted for total in totals] for totals in (likelihoods, divergences))
    mean = sum(nats) / len(nats)
    return Perplexity(math.inf if mean >= 700 else math.exp(mean), len(nats) * predicted, nats, divergences)


def last_states(decoder: Decoder, tokens: Tensor, execution: Execution, description: str = "") -> Tensor:
    """The last block's output (windows, length, hidden) for `tokens` (windows, length). `description` labels the progress bar."""
    shown, streams = bool(execution.progress and description), residual_streams(decoder, tokens, execution)
    for stream in tqdm(streams, description, len(decoder.blocks), unit="block", disable=not shown):
        last = stream
    return last


def residual_streams(decoder: Decoder, tokens: Tensor, execution: Execution) -> Iterator[Tensor]:
    """Yields each block's output (windows, length, hidden) in turn for `tokens` (windows, length); only one is kept."""
    stream = execution.embed(decoder, tokens)
    for window in decoder.windows("block"):
        stream = execution.forward(decoder, window, stream)
        yield stream


@torch.no_grad()
def drift(model: Decoder, dense: Decoder, tokens: Tensor, *, execution: Execution | None = None) -> tuple[list[float], Tensor]:
    """For each block, the share of the variance of the dense model's residual stream after it that the stream of `model` does not
    explain (see `recon.kernels.losses.unexplained`), on `tokens` (samples, length); and the last stream of `model`.

    Each model runs on its own activations, so errors accumulate with depth. execution: by default, where the dense model is.
    """
    execution, errors = Execution.of(dense, execution), []
    for ours, theirs in zip(*(residual_streams(each, tokens, execution) for each in (model, dense)), strict=True):
        errors.append(unexplained(ours, theirs, channel_variance(theirs)))
    return errors, ours
