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

PROBES, SLICE = 4, 256  # samples that losses are measured on; tokens whose logits exist at once


@torch.no_grad()
def allocate(decoder: Decoder, samples: Tensor, config: PruningConfig, execution: Execution) -> list[Pattern]:
    """The pattern of each block, by `config.allocation`; see `recon.kernels.allocation`. The model stays as it is.

    Where losses are measured, one block alone is pruned, by Wanda whatever the criterion, as that costs little. The loss is the
    divergence of the model's predictions from the dense model's. It is measured on the last `PROBES` samples, or on half of all
    if that is less; the norms are of the others.

    samples: calibration tokens (samples, length). Raises `ReconError` for too few.
    """
    sparsity, measured = Pattern.parse(config.pattern).sparsity, config.allocation == "measured"
    count = len(samples) - (min(PROBES, len(samples) // 2) if measured else 0)
    if measured and count == len(samples):
        raise ReconError("allocation is 'measured' with 1 calibration sample; it needs at least 2, to leave one out")
    if noted := execution.storage.finished("allocate"):
        return [Pattern(each) for each in noted[0]]
    stream, bar = execution.embed(decoder, samples, count), {"unit": "block", "disable": not execution.progress}
    sizes, medians, states = [], [], []  # states: of the probes, behind the current block, if an earlier one alone is pruned
    for window in tqdm(decoder.windows("block"), f"allocate ({config.allocation})", **bar):
        matrices, run = decoder.matrices(window), partial(execution.run, partial(decoder.forward, window))
        sizes.append(sum(matrix.weight.numel() for matrix in matrices.values()))
        probes = stream[count:]
        with decoder.loaded(window):
            stream, found, _ = gather(execution, decoder, window, stream, "norm", count)
            with execution.holding(decoder, window, trained=decoder.weights(window)):
                if not measured:
                    scores = [(matrices[name].weight.float().abs() * norm).flatten() for name, norm in found.items()]
                    medians.append(torch.cat(scores).median().item())
                    continue
                states = [run(state) for state in states]
                dense = {name: matrix.weight.clone() for name, matrix in matrices.items()}
                for reach in (-spread(sparsity), spread(sparsity)):
                    for name, norm in found.items():
                        weight, pattern = matrices[name].weight, Pattern(sparsity + reach)
                        weight.copy_(CRITERIA["wanda"].prune(weight.float(), norm, pattern, "row", None)[0])
                    states.append(run(probes))
                    for name, matrix in matrices.items():
                        matrix.weight.copy_(dense[name])
    sizes = torch.tensor(sizes, dtype=torch.float64)
    if measured:
        losses = torch.tensor(_divergences(decoder, samples[count:], stream[count:], states, execution), dtype=torch.float64)
        shares = by_curves(losses[::2], losses[1::2], sizes, sparsity).tolist()
    else:
        shares = dlp(torch.tensor(medians, dtype=torch.float64), sizes, sparsity).tolist()
    execution.storage.finish("allocate", shares)
    return [Pattern(each) for each in shares]


def _divergences(decoder: Decoder, tokens: Tensor, dense: Tensor, states: list[Tensor], execution: Execution) -> list[float]:
    """KL(dense || other) of predictions, mean over tokens, of each of `states`; all (samples, length, hidden), as is `dense`."""
    tokens, dense, states = decoder.predicted(tokens), decoder.predicted(dense), [decoder.predicted(state) for state in states]
    totals = [0.0] * len(states)
    with execution, execution.holding_ends(decoder):
        for sample in range(len(tokens)):
            for start in range(0, tokens.shape[1], SLICE):
                at = slice(sample, sample + 1), slice(start, start + SLICE)
                read, wanted, *others = (each[at].to(execution.device) for each in (tokens, dense, *states))
                wanted = decoder.logits(read, wanted)[0]
                for number, other in enumerate(others):
                    totals[number] += kl_divergence(wanted, decoder.logits(read, other)[0]).double().sum().item()
    return [max(total / tokens.numel(), torch.finfo(torch.float32).tiny) for total in totals]
