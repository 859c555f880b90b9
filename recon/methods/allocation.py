"""Chooses how sparse each block is to be, from one pass over the dense model; formulas: `recon.kernels.allocation`."""

from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from recon.config import PruningConfig
from recon.kernels.allocation import by_losses, dlp, spread
from recon.kernels.criteria import CRITERIA
from recon.kernels.losses import kl_divergence
from recon.kernels.patterns import Pattern
from recon.methods.statistics import gather
from recon.model.decoder import Decoder
from recon.runtime.execution import Execution

# See `allocate`. More than the first few dozen tokens are measured, as these have little to attend to.
NORMS, PROBES, LENGTH, EVERY = 2048, 2, 128, 2


@torch.no_grad()
def allocate(decoder: Decoder, samples: Tensor, config: PruningConfig, execution: Execution) -> list[Pattern]:
    """The pattern of each block, by `config.allocation`; see `recon.kernels.allocation`. The model stays as it is.

    With allocation "measured", each block in turn is pruned alone, to the highest sparsity that a block may get (`spread`), by
    Wanda whatever the criterion, as Wanda is cheap. Its loss is the KL divergence of the predictions from the dense model's, at
    every `EVERY`th of the first `LENGTH` tokens of each of the last `PROBES` samples. Wanda's norms are over about `NORMS` tokens
    of the samples before these, or over one sample if that is longer.

    samples: calibration tokens (samples, length); at least two with allocation "measured".
    """
    sparsity, measured = Pattern.parse(config.pattern).sparsity, config.allocation == "measured"
    probed = min(PROBES, len(samples) - 1) if measured else 0
    samples, probes = samples.split([len(samples) - probed, probed])
    samples, probes = samples[-max(1, NORMS // samples.shape[1]) :] if measured else samples, probes[:, :LENGTH]
    if noted := execution.storage.finished("allocate"):
        return [Pattern(each) for each in noted[0]]
    stream, bar = execution.embed(decoder, samples), {"unit": "block", "disable": not execution.progress}
    # states: of the probes, after the current block: in the dense model, then with each earlier block pruned alone
    sizes, medians, states = [], [], execution.embed(decoder, probes) if measured else None
    for window in tqdm(decoder.windows("block"), f"allocate ({config.allocation})", **bar):
        matrices, run = decoder.matrices(window), partial(execution.run, partial(decoder.forward, window))
        sizes.append(sum(matrix.weight.numel() for matrix in matrices.values()))
        with decoder.loaded(window):
            stream, found, _ = gather(execution, decoder, window, stream, "norm")
            with execution.holding(decoder, window, trained=decoder.weights(window)):
                if not measured:
                    scores = [(matrices[name].weight.float().abs() * norm).flatten() for name, norm in found.items()]
                    medians.append(torch.cat(scores).median().item())
                    continue
                dense = {name: matrix.weight.clone() for name, matrix in matrices.items()}
                for name, norm in found.items():
                    weight, pattern = matrices[name].weight, Pattern(sparsity + spread(sparsity))
                    weight.copy_(CRITERIA["wanda"].prune(weight.float(), norm, pattern, "row", None)[0])
                pruned = run(states[:probed])
                for name, matrix in matrices.items():
                    matrix.weight.copy_(dense[name])
                states = torch.cat([run(states), pruned])
    rule, told = (by_losses, _divergences(decoder, probes, states, execution)) if measured else (dlp, medians)
    shares = rule(*(torch.tensor(each, dtype=torch.float64) for each in (told, sizes)), sparsity).tolist()
    execution.storage.finish("allocate", shares)
    return [Pattern(each) for each in shares]


def _divergences(decoder: Decoder, tokens: Tensor, states: Tensor, execution: Execution) -> list[float]:
    """KL(dense || other) of the predictions of each other model, mean over every `EVERY`th of `tokens` (probes, length).
    states: outputs of the last block, (models * probes, length, hidden): first the dense model's, then the others'."""
    tokens, states = (decoder.predicted(each).to(execution.device) for each in (tokens, states))
    tokens, states = (each[:, min(EVERY, each.shape[1]) - 1 :: EVERY] for each in (tokens, states))
    with execution.autocast(), execution.holding_ends(decoder):
        logits = (decoder.logits(tokens, each).flatten(0, 1) for each in states.split(len(tokens)))
        wanted = next(logits)
        losses = [kl_divergence(wanted, found).double().mean().item() for found in logits]
    return [max(loss, torch.finfo(torch.float32).tiny) for loss in losses]
