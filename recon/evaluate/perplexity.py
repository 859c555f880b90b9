"""How well a model predicts held-out text, and how far it has drifted from the dense one."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from recon.kernels.likelihood import kl_divergence, negative_log_likelihood
from recon.kernels.losses import relative_error
from recon.model.decoder import Decoder, check_length
from recon.runtime.activations import Activations
from recon.runtime.execution import Execution
from recon.runtime.store import MemoryStore

SLICE = 256  # tokens whose logits exist at once
KL_WINDOWS = 4  # windows that the divergence from the dense model is measured on: the head runs for both models there


@dataclass(frozen=True)
class Perplexity:
    """`value` = exp(mean negative log-likelihood in nats) over `tokens` predicted tokens; `per_window` is that mean for each window.

    `kl_per_window`: KL(dense || model) of the predictions in nats, mean over tokens, for the first windows; empty where there was
    no dense model to compare with.
    """

    value: float
    tokens: int
    per_window: list[float]
    kl_per_window: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """What predictions are compared with: a dense model, and its last block's output (windows, length, hidden)."""

    decoder: Decoder
    states: Tensor


@torch.no_grad()
def perplexity(
    model: nn.Module | Decoder,
    tokens: Tensor,
    compute_dtype: str = "auto",
    progress: bool = True,
    description: str = "perplexity",
    device: torch.device | str | None = None,
    reference: Reference | None = None,
    states: Tensor | None = None,
    store: MemoryStore | None = None,
) -> Perplexity:
    """Perplexity of `model` on `tokens` (windows, length); each window is predicted on its own, all but its first token.

    device: where to compute; default: where the model is.
    reference: the dense model to measure the divergence from, on as many windows as its states are of.
    states: the last block's output for `tokens`, (windows, length, hidden), where it is known.
    work: where there is room for activations; default: memory.
    Raises `ReconError` where windows are longer than the model was made for.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    check_length(decoder, tokens.shape[1])
    execution = Execution(device or decoder.device, compute_dtype, store)
    windows = decoder.windows("block")
    with tqdm(total=len(windows) + 1, desc=description, unit="block", disable=not progress) as bar:
        stream = last_states(decoder, tokens, execution, bar) if states is None else states
        tokens = decoder.predicted(tokens)
        means, divergences = _scores(decoder, execution, tokens, decoder.predicted(stream), reference)
        bar.update()
    mean = sum(means) / len(means)
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, len(means) * (tokens.shape[1] - 1), means, divergences)


def last_states(decoder: Decoder, tokens: Tensor, execution: Execution, bar: tqdm | None = None) -> Tensor:
    """The last block's output for `tokens` (windows, length): (windows, length, hidden)."""
    for stream in residual_streams(decoder, tokens, execution):
        last = stream
        if bar is not None:
            bar.update()
    return last


def residual_streams(decoder: Decoder, tokens: Tensor, execution: Execution) -> Iterator[Tensor]:
    """The output (windows, length, hidden) of each block in turn for `tokens` (windows, length)."""
    # Block by block, so that one block at a time has to be on the compute device.
    stream = execution.embed(decoder, tokens)
    for window in decoder.windows("block"):
        with execution.holding(decoder, window):
            stream = execution.run(lambda hidden, window=window: decoder.forward(window, hidden), stream)
        yield stream


def _scores(
    decoder: Decoder, execution: Execution, tokens: Tensor, stream: Tensor, reference: Reference | None
) -> tuple[list[float], list[float]]:
    """Of each window, the mean over its predicted tokens of the negative log-likelihood; and of KL(dense || model), for the windows
    that `reference` has the states of. `stream` (windows, length, hidden) is the last block's output for `tokens`."""
    compared = 0 if reference is None else min(len(reference.states), len(tokens))
    with contextlib.ExitStack() as stack:
        stack.enter_context(execution)
        stack.enter_context(execution.holding_ends(decoder))
        if compared:
            stack.enter_context(execution.holding_ends(reference.decoder))
        likelihoods, divergences = [], []
        for window, (part, found) in enumerate(
            execution.batches([tokens, stream], [range(i, i + 1) for i in range(len(tokens))])
        ):
            states = reference.states[window : window + 1] if window < compared else None
            wanted = None if states is None else decoder.predicted(states).to(execution.device)
            likelihood = divergence = 0.0
            for start in range(0, part.shape[1] - 1, SLICE):  # a few logits exist at a time
                at = slice(start, min(start + SLICE, part.shape[1] - 1))
                logits = decoder.logits(part[:, at], found[:, at])[0]
                following = part[0, at.start + 1 : at.stop + 1]
                likelihood += negative_log_likelihood(logits, following).double().sum().item()
                if wanted is not None:
                    dense = reference.decoder.logits(part[:, at], wanted[:, at])[0]
                    divergence += kl_divergence(dense, logits).double().sum().item()
            likelihoods.append(likelihood / (part.shape[1] - 1))
            if wanted is not None:
                divergences.append(divergence / (part.shape[1] - 1))
    return likelihoods, divergences


@torch.no_grad()
def drift(
    model: Decoder,
    dense: Decoder,
    tokens: Tensor,
    compute_dtype: str = "auto",
    device: torch.device | str | None = None,
    activations: Activations | None = None,
    store: MemoryStore | None = None,
) -> tuple[list[float], Tensor]:
    """Relative squared error of the residual stream after each block, against the dense model; and the last stream of `model`.

    For a token with activations a (dense) and b it is |a - b|^2 / |a|^2, averaged over `tokens` (samples, length). Both models
    run on their own activations, so errors accumulate with depth.

    activations: where calls with the same dense model and tokens share its streams.
    work: where there is room for activations; default: memory.
    """
    execution = Execution(device or dense.device, compute_dtype, store)
    errors = []
    wanted = _shared_streams(dense, tokens, execution, activations or Activations(limit=0))
    for ours, theirs in zip(residual_streams(model, tokens, execution), wanted, strict=True):
        errors.append(relative_error(ours, theirs))
    if activations is not None:
        activations.release()  # read once per model: no reason to stay in memory until then
    return errors, ours


def _shared_streams(decoder: Decoder, tokens: Tensor, execution: Execution, activations: Activations) -> Iterable[Tensor]:
    """`residual_streams`, from `activations` where all of them are there."""
    known = [activations.get(index) for index in range(len(decoder.blocks))]
    if all(stream is not None for stream in known):
        return known
    return (activations.put(index, stream) for index, stream in enumerate(residual_streams(decoder, tokens, execution)))
