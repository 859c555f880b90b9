"""Probes of a dense, pruned and reconstructed language model: noise, gradients, ranks of matrices' inputs, choice of text."""

import copy
import itertools
from functools import lru_cache

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import recon

LOSSES = {  # of outputs y, targets t (samples, length, width) and the variance of each channel (width,)
    "whitened": lambda y, t, variance: ((y - t).square() / variance).mean(),
    "mse": lambda y, t, variance: (y - t).square().sum(-1).mean() / variance.sum(),
    "cosine": lambda y, t, variance: 1 - F.cosine_similarity(y, t, dim=-1).mean(),
}

QUIET = recon.Execution("cpu", "float32", progress=False)


@lru_cache(maxsize=1)
def states(model: str, samples: int, length: int, seed: int) -> tuple[dict[str, recon.Decoder], Tensor]:
    """Decoders: dense, pruned by Wanda to 50 %, and then reconstructed block by block; and evaluation tokens (4, length)."""
    dense, tokenizer = recon.load(model)
    read = recon.sample_tokens("wikipedia", "calibration", tokenizer, samples, length, seed)
    decoders = {"dense": recon.decompose(dense)}
    pruned = recon.decompose(copy.deepcopy(dense), like=decoders["dense"])
    recon.prune(pruned, read, seed=seed, execution=QUIET)
    fitted = recon.decompose(copy.deepcopy(pruned.model), like=decoders["dense"])
    recon.reconstruct(
        fitted, dense, read, recon.ReconstructionConfig("block", first_position="skipped", epochs=1), seed=seed, execution=QUIET
    )
    tokens = recon.sample_tokens("wikipedia", "evaluation", tokenizer, 4, length)
    return decoders | {"pruned": pruned, "reconstructed": fitted}, tokens


def probed(block: int, size: float, **which) -> dict:
    """Adds noise after a block and follows it through later ones, dense and reconstructed; compares gradients at the block.

    error: by state, block (this one and later ones) and sample, the root mean square of the noise relative to each channel's
    standard deviation; it begins as `size`. cosine: similarity of the gradient by each propagation and loss to that by the
    default, on the block's surviving weights before its reconstruction; earlier blocks are reconstructed.
    """
    decoders, tokens = states(**which)
    windows, row, reached = decoders["dense"].windows("block"), {"error": {}}, {}
    with torch.no_grad():
        for state in ("dense", "reconstructed"):
            stream, noisy, errors = decoders[state].embed(tokens), None, []
            for window in windows:
                if window.blocks[0] == block:
                    reached[state] = stream
                stream = decoders[state].forward(window, stream)
                spread = stream[:, 1:].flatten(0, 1).std(0)  # without the first token, whose activations are massive
                if window.blocks[0] == block:
                    random = torch.randn(stream[:, 1:].shape, generator=torch.Generator().manual_seed(block))
                    noisy = torch.cat([stream[:, :1], stream[:, 1:] + size * spread * random], 1)
                elif noisy is not None:
                    noisy = decoders[state].forward(window, noisy)
                if noisy is not None:
                    errors.append(((noisy - stream)[:, 1:] / spread).square().mean((1, 2)).sqrt().tolist())
            row["error"][state] = errors
        x, own = reached.values()
        y, answers = (decoders["dense"].forward(windows[block], each) for each in (x, own))
    tasks, variance = {"mixed": (own, y), "dense": (x, y), "sparse": (own, answers)}, y[:, 1:].flatten(0, 1).var(0)
    weights, gradients = decoders["pruned"].weights(windows[block]), {}
    for (task, (read, wanted)), (name, loss) in itertools.product(tasks.items(), LOSSES.items()):
        value = loss(decoders["pruned"].forward(windows[block], read)[:, 1:], wanted[:, 1:], variance)
        slopes = torch.autograd.grad(value, weights)
        surviving = [(g * (w != 0)).flatten().double() for g, w in zip(slopes, weights, strict=True)]
        gradients[f"{task}, {name}"] = torch.cat(surviving)
    usual = gradients.pop("mixed, whitened")
    return row | {"cosine": {name: F.cosine_similarity(usual, own, dim=0).item() for name, own in gradients.items()}}


@torch.no_grad()
def effective_ranks(decoder: recon.Decoder, tokens: Tensor) -> dict:
    """For each group of matrices that share an input X: its first matrix, the width of X, and the effective rank of X'X: exp of
    the entropy of its eigenvalues as shares of their sum (Roy & Vetterli 2007). First tokens are left out."""
    found = []

    def see(group: tuple[str, ...], x: Tensor) -> None:
        x = x.reshape(len(tokens), -1, x.shape[-1])[:, 1:].flatten(0, 1)
        shares = torch.linalg.eigvalsh(x.T @ x).clamp_min(1e-12)
        shares /= shares.sum()
        found.append((group[0], x.shape[1], torch.exp(-(shares * shares.log()).sum()).item()))

    stream = decoder.embed(tokens)
    for window in decoder.windows("block"):
        with decoder.watching(window, see):
            stream = decoder.forward(window, stream)
    return dict(zip(("matrix", "width", "rank"), zip(*found)))


def ranks(model: str, samples: int, length: int) -> dict:
    """`effective_ranks` of a language model on calibration samples of Wikipedia."""
    dense, tokenizer = recon.load(model)
    return effective_ranks(recon.decompose(dense), recon.sample_tokens("wikipedia", "calibration", tokenizer, samples, length, 0))


# --- domains --------------------------------------------------------------------------------------------------------------

TEXTS = ("wikipedia", "news", "code")
DOMAINS = (*TEXTS, "mix", "its own")  # a mix of the three; what the model itself wrote


@lru_cache(maxsize=1)
def domains(
    model: str, samples: int, windows: int, length: int, seed: int
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor], dict]:
    """The dense model; by `DOMAINS`, calibration tokens (samples, length) and evaluation tokens (windows, length); and its nats.

    The model's own text begins with the first token of a Wikipedia sample, and is sampled from the model's probabilities.
    """
    dense, tokenizer = recon.load(model)
    found = []
    for number, (split, count) in enumerate((("calibration", samples), ("evaluation", windows))):
        read = {text: recon.sample_tokens(text, split, tokenizer, count, length, seed) for text in TEXTS}
        read["mix"] = torch.stack([read[TEXTS[i % len(TEXTS)]][i] for i in range(count)])
        drawn = {"do_sample": True, "top_k": 0, "min_length": length, "max_length": length, "pad_token_id": 0}
        with torch.random.fork_rng():
            torch.manual_seed(2 * seed + number)
            read["its own"] = dense.generate(read["wikipedia"][:, :1], attention_mask=torch.ones(count, 1).long(), **drawn)
        found.append(read)
    return dense, *found, per_window(dense, found[1])


def per_window(network: nn.Module, evaluation: dict[str, Tensor]) -> dict[str, list[float]]:
    """The mean negative log-likelihood of each evaluation window, by text; without the mix, which has no text of its own."""
    texts = [text for text in evaluation if text != "mix"]
    return {text: recon.perplexity(network, evaluation[text], execution=QUIET).per_window for text in texts}


@lru_cache(maxsize=1)
def pruned_on(text: str, **which) -> tuple[nn.Module, dict]:
    """The model of `domains`, pruned by Wanda to 50 % on one of its texts, and its nats by text."""
    dense, calibration, evaluation, _ = domains(**which)
    pruned = copy.deepcopy(dense)
    recon.prune(pruned, calibration[text], seed=which["seed"], execution=QUIET)
    return pruned, per_window(pruned, evaluation)


def moved(prune: str, fit: str, epochs: int, **which) -> dict:
    """Prunes on one text and reconstructs blocks on another, by the default recipe; returns the nats of each state, by text."""
    dense, calibration, evaluation, own = domains(**which)
    pruned, before = pruned_on(prune, **which)
    fitted = copy.deepcopy(pruned)
    config = recon.ReconstructionConfig(granularity="block", first_position="skipped", epochs=epochs)
    recon.reconstruct(fitted, dense, calibration[fit], config, seed=which["seed"], execution=QUIET)
    return {"dense": own, "pruned": before, "reconstructed": per_window(fitted, evaluation)}


def costs_of_moving(runs: pd.DataFrame) -> dict[str, dict[str, np.ndarray]]:
    """By how many nats another text is worse than the evaluated one: (seeds,), by kind of text and by what it is used for.

    runs: a row for each run, with prune, fit, evaluated (names of texts), seed, lost (nats above the dense model's).
    """
    costs: dict[str, dict[str, np.ndarray]] = {"a foreign text": {}, "a mix": {}}
    for name, roles in {"to prune on": ["prune"], "to reconstruct on": ["fit"], "to do both on": ["prune", "fit"]}.items():
        same = runs[roles].eq(runs["evaluated"], axis=0).all(axis=1)
        mixed = runs[roles].eq("mix").all(axis=1)
        foreign = (runs[roles].ne(runs["evaluated"], axis=0) & runs[roles].ne("mix")).all(axis=1)
        for kind, chosen in (("a foreign text", foreign), ("a mix", mixed)):
            of_seeds = [runs[rows].groupby("seed")["lost"].mean() for rows in (chosen, same)]
            costs[kind][name] = (of_seeds[0] - of_seeds[1]).to_numpy()
    return costs
