"""How well a model predicts held-out text, and how far it has drifted from the dense one."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from recon import device
from recon.decoder import Decoder
from recon.errors import ReconError
from recon.structure import in_dtype

SLICE = 256  # tokens whose logits exist at once
WINDOWS = 8  # evaluation windows whose last hidden states exist at once


@dataclass(frozen=True)
class Perplexity:
    """`value` = exp(mean negative log-likelihood in nats) over `tokens` predicted tokens; `per_window` is that mean for each window."""

    value: float
    tokens: int
    per_window: list[float]


@torch.no_grad()
def perplexity(
    model: nn.Module | Decoder,
    tokens: Tensor,
    compute_dtype: str = "auto",
    progress: bool = True,
    description: str = "perplexity",
) -> Perplexity:
    """Perplexity of `model` on `tokens` (windows, length); each window is predicted on its own, all but its first token.

    Raises `ReconError` where windows are longer than the model was made for.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    check_length(decoder, tokens.shape[1])
    arithmetic = device.arithmetic(decoder.device, compute_dtype)
    means = []
    with tqdm(total=len(tokens), desc=description, unit="window", disable=not progress) as bar, arithmetic:
        # Weights are rounded once for several windows, and those of the head apart: they may be the embedding's too.
        for windows in tokens.to(decoder.device).split(WINDOWS):
            with in_dtype(decoder.weights(), arithmetic.dtype):
                hidden = [_last_hidden(decoder, window[None]) for window in windows]
            with in_dtype(decoder.head_weights(), arithmetic.dtype):
                for window, states in zip(windows, hidden, strict=True):
                    means.append(_nll(decoder, window[None], states) / (len(window) - 1))
                    bar.update()
    mean = sum(means) / len(means)
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, len(means) * (tokens.shape[1] - 1), means)


def _last_hidden(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Output of the last block for tokens (batch, length): (batch, length, hidden)."""
    hidden = decoder.embed(tokens)
    for window in decoder.windows("block"):
        hidden = decoder.forward(window, hidden)
    return hidden


def _nll(decoder: Decoder, tokens: Tensor, hidden: Tensor) -> float:
    """Sum of the negative log-likelihoods of tokens (1, length) but the first; a few logits exist at a time."""
    parts = zip(tokens[:, :-1].split(SLICE, 1), hidden[:, :-1].split(SLICE, 1), tokens[:, 1:].split(SLICE, 1), strict=True)
    return sum(
        F.cross_entropy(decoder.logits(part, states)[0].float(), following[0], reduction="sum").double().item()
        for part, states, following in parts
    )


@torch.no_grad()
def drift(model: Decoder, dense: Decoder, tokens: Tensor, compute_dtype: str = "auto", batch_size: int = 2) -> list[float]:
    """Relative squared error of the residual stream after each block, against the dense model: one number per block.

    For a token with activations a (dense) and b it is |a - b|^2 / |a|^2, averaged over `tokens` (samples, length). Both models
    run on their own activations, so errors accumulate with depth.
    """
    arithmetic = device.arithmetic(dense.device, compute_dtype)
    totals = torch.zeros(len(dense.blocks), dtype=torch.float64)
    with arithmetic, in_dtype(model.weights() + dense.weights(), arithmetic.dtype):
        for batch in tokens.split(batch_size):
            ours, theirs = model.embed(batch), dense.embed(batch)
            for index, window in enumerate(dense.windows("block")):
                ours, theirs = model.forward(window, ours), dense.forward(window, theirs)
                totals[index] += relative_error(ours, theirs) * len(batch)
    return (totals / len(tokens)).tolist()


def relative_error(output: Tensor, target: Tensor) -> float:
    """Mean over tokens of |output - target|^2 / |target|^2; both (batch, length, width)."""
    output, target = output.float(), target.float()
    return ((output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-30)).mean().item()


def check_length(decoder: Decoder, length: int) -> None:
    """Raises `ReconError` where sequences of `length` tokens are longer than the model was made for."""
    longest = decoder.max_length
    if longest is not None and length > longest:
        raise ReconError(f"sequence length {length} is more than the {longest} tokens that the model was made for")
