"""How well a model predicts held-out text, and how far it has drifted from the dense one."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from recon.decoder import Decoder
from recon.engine import Engine
from recon.errors import ReconError

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
) -> Perplexity:
    """Perplexity of `model` on `tokens` (windows, length); each window is predicted on its own, all but its first token.

    device: where to compute; default: where the model is.
    reference: the dense model to measure the divergence from, on as many windows as its states are of.
    states: the last block's output for `tokens`, (windows, length, hidden), where it is known.
    Raises `ReconError` where windows are longer than the model was made for.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    check_length(decoder, tokens.shape[1])
    engine = Engine(device or decoder.device, compute_dtype)
    windows = decoder.windows("block")
    with tqdm(total=len(windows) + 1, desc=description, unit="block", disable=not progress) as bar:
        stream = last_states(decoder, tokens, engine, bar) if states is None else states
        with engine, engine.holding_ends(decoder):
            parts = [range(i, i + 1) for i in range(len(tokens))]
            means = [_nll(decoder, *pair) / (tokens.shape[1] - 1) for pair in engine.batches([tokens, stream], parts)]
        divergences = [] if reference is None else _divergences(decoder, reference, engine, tokens, stream)
        bar.update()
    mean = sum(means) / len(means)
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, len(means) * (tokens.shape[1] - 1), means, divergences)


def last_states(decoder: Decoder, tokens: Tensor, engine: Engine, bar: tqdm | None = None) -> Tensor:
    """The last block's output for `tokens` (windows, length): (windows, length, hidden)."""
    for stream in residual_streams(decoder, tokens, engine):
        last = stream
        if bar is not None:
            bar.update()
    return last


def residual_streams(decoder: Decoder, tokens: Tensor, engine: Engine) -> Iterator[Tensor]:
    """The output (windows, length, hidden) of each block in turn for `tokens` (windows, length)."""
    # Block by block, so that one block at a time has to be on the compute device.
    stream = engine.run(decoder.embed, tokens)
    for window in decoder.windows("block"):
        with engine.holding(decoder, window):
            stream = engine.run(lambda hidden, window=window: decoder.forward(window, hidden), stream)
        yield stream


def _divergences(decoder: Decoder, reference: Reference, engine: Engine, tokens: Tensor, stream: Tensor) -> list[float]:
    """Mean over tokens of KL(dense || model) for the windows that `reference` has the states of."""
    means = []
    dense = reference.decoder
    parts = [range(i, i + 1) for i in range(min(len(reference.states), len(stream)))]
    with engine, engine.holding_ends(decoder), engine.holding_ends(dense):
        for part, wanted, found in engine.batches([tokens, reference.states, stream], parts):
            slices = zip(*(t[:, :-1].split(SLICE, 1) for t in (part, wanted, found)), strict=True)
            total = sum(kl_divergence(dense.logits(t, w)[0], decoder.logits(t, f)[0]).sum().item() for t, w, f in slices)
            means.append(total / (tokens.shape[1] - 1))
    return means


def kl_divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(wanted || found) in nats for logits (tokens, vocabulary): (tokens,), in float32."""
    p, q = wanted.float().log_softmax(-1), found.float().log_softmax(-1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def _nll(decoder: Decoder, tokens: Tensor, hidden: Tensor) -> float:
    """Sum of the negative log-likelihoods of tokens (1, length) but the first; a few logits exist at a time."""
    parts = zip(tokens[:, :-1].split(SLICE, 1), hidden[:, :-1].split(SLICE, 1), tokens[:, 1:].split(SLICE, 1), strict=True)
    return sum(
        F.cross_entropy(decoder.logits(part, states)[0].float(), following[0], reduction="sum").double().item()
        for part, states, following in parts
    )


@torch.no_grad()
def drift(
    model: Decoder,
    dense: Decoder,
    tokens: Tensor,
    compute_dtype: str = "auto",
    device: torch.device | str | None = None,
) -> tuple[list[float], Tensor]:
    """Relative squared error of the residual stream after each block, against the dense model; and the last stream of `model`.

    For a token with activations a (dense) and b it is |a - b|^2 / |a|^2, averaged over `tokens` (samples, length). Both models
    run on their own activations, so errors accumulate with depth.
    """
    engine = Engine(device or dense.device, compute_dtype)
    errors = []
    for ours, theirs in zip(*(residual_streams(decoder, tokens, engine) for decoder in (model, dense)), strict=True):
        errors.append(relative_error(ours, theirs))
    return errors, ours


def relative_error(output: Tensor, target: Tensor) -> float:
    """Mean over tokens of |output - target|^2 / |target|^2; both (batch, length, width)."""
    output, target = output.float(), target.float()
    return ((output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-30)).mean().item()


def check_length(decoder: Decoder, length: int) -> None:
    """Raises `ReconError` where sequences of `length` tokens are longer than the model was made for."""
    longest = decoder.max_length
    if longest is not None and length > longest:
        raise ReconError(f"sequence length {length} is more than the {longest} tokens that the model was made for")
