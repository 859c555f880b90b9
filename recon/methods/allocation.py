"""How sparse each block is to be, from one pass over the dense model; the mathematics: `recon.kernels.allocation`."""

from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from recon.config import PruningConfig
from recon.errors import ReconError
from recon.kernels.allocation import by_curves, dlp, spread
from recon.kernels.criteria import CRITERIA
from recon.kernels.losses import kl_divergence
from recon.kernels.patterns import Pattern
from recon.methods.statistics import gather
from recon.model.decoder import Decoder
from recon.runtime.execution import Execution

NORMS, SLICE = 2048, 256  # tokens that norms are of where losses are measured; tokens whose logits exist at once


@torch.no_grad()
def allocate(decoder: Decoder, samples: Tensor, config: PruningConfig, execution: Execution) -> list[Pattern]:
    """The pattern of each block, by `config.allocation`; see `recon.kernels.allocation`. The model stays as it is.

    Where losses are measured, one block alone is pruned, by Wanda whatever the criterion, as that costs little. The loss is the
    divergence of the model's predictions from the dense model's. It is measured on the last sample; the norms are of the
    `NORMS` tokens before it, or of one sample if that is more.

    samples: calibration tokens (samples, length). Raises `ReconError` for too few.
    """
    sparsity, measured = Pattern.parse(config.pattern).sparsity, config.allocation == "measured"
    if measured and len(samples) == 1:
        raise ReconError("allocation is 'measured' with 1 calibration sample; it needs at least 2, to leave one out")
    samples = samples[-1 - max(1, NORMS // samples.shape[1]) :] if measured else samples
    count = len(samples) - measured
    if noted := execution.storage.finished("allocate"):
        return [Pattern(each) for each in noted[0]]
    stream, bar = execution.embed(decoder, samples, count), {"unit": "block", "disable": not execution.progress}
    # states: of the last sample, behind the current block, if an earlier one alone is pruned
    sizes, medians, states = [], [], stream[:0]
    for window in tqdm(decoder.windows("block"), f"allocate ({config.allocation})", **bar):
        matrices, run = decoder.matrices(window), partial(execution.run, partial(decoder.forward, window))
        sizes.append(sum(matrix.weight.numel() for matrix in matrices.values()))
        probe = stream[count:]
        with decoder.loaded(window):
            stream, found, _ = gather(execution, decoder, window, stream, "norm", count)
            with execution.holding(decoder, window, trained=decoder.weights(window)):
                if not measured:
                    scores = [(matrices[name].weight.float().abs() * norm).flatten() for name, norm in found.items()]
                    medians.append(torch.cat(scores).median().item())
                    continue
                pruned = []
                dense = {name: matrix.weight.clone() for name, matrix in matrices.items()}
                for reach in (-spread(sparsity), spread(sparsity)):
                    for name, norm in found.items():
                        weight, pattern = matrices[name].weight, Pattern(sparsity + reach)
                        weight.copy_(CRITERIA["wanda"].prune(weight.float(), norm, pattern, "row", None)[0])
                    pruned.append(run(probe))
                    for name, matrix in matrices.items():
                        matrix.weight.copy_(dense[name])
                states = torch.cat([run(states), *pruned] if len(states) else pruned)
    sizes = torch.tensor(sizes, dtype=torch.float64)
    if measured:
        losses = torch.tensor(_divergences(decoder, samples[count:], stream[count:], states, execution), dtype=torch.float64)
        shares = by_curves(losses[::2], losses[1::2], sizes, sparsity).tolist()
    else:
        shares = dlp(torch.tensor(medians, dtype=torch.float64), sizes, sparsity).tolist()
    execution.storage.finish("allocate", shares)
    return [Pattern(each) for each in shares]


def _divergences(decoder: Decoder, tokens: Tensor, dense: Tensor, states: Tensor, execution: Execution) -> list[float]:
    """KL(dense || other) of predictions, mean over the `tokens` (1, length), of each of `states` (n, length, hidden)."""
    tokens, dense, states = decoder.predicted(tokens), decoder.predicted(dense), decoder.predicted(states)
    totals = [0.0] * len(states)
    with execution, execution.holding_ends(decoder):
        for start in range(0, tokens.shape[1], SLICE):
            read, wanted, others = (each[:, start : start + SLICE].to(execution.device) for each in (tokens, dense, states))
            wanted = decoder.logits(read, wanted)[0]
            for number, other in enumerate(others.split(1)):
                totals[number] += kl_divergence(wanted, decoder.logits(read, other)[0]).double().sum().item()
    return [max(total / tokens.numel(), torch.finfo(torch.float32).tiny) for total in totals]
