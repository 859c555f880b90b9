"""How much the model's predictions depend on each row of a matrix: weights for rows that compete in pruning.

Let y_i be the output of row i, and p the model's predictions. If pruning changes y_i by d, -log p(t) of a token t drawn from p
grows on average by F_i d^2 / 2, to second order. F_i is the mean square of d log p(t) / d y_i: the diagonal of the Fisher
information. So the error of row i counts sqrt(F_i). But the criterion compares each row's weights times the fourth root of F_i,
which did better than sqrt(F_i): see `guides/better-masks.md`.

Van der Ouderaa et al., "The LLM Surgeon" (arXiv 2312.17244); for quantisation Kim et al., "GuidedQuant" (arXiv 2505.07004).
"""

import torch
from torch import Tensor
from tqdm.auto import tqdm

from recon.kernels.losses import negative_log_likelihood
from recon.model.decoder import Decoder
from recon.model.modules import watched
from recon.model.windows import Window
from recon.runtime.execution import Execution
from recon.runtime.seeds import generator

TOKENS, SLICE = 2048, 256  # tokens that weights are computed from, or one sample if longer; predicted at a time


@torch.no_grad()
def row_weights(decoder: Decoder, samples: Tensor, seed: int, execution: Execution) -> dict[str, Tensor]:
    """Weights of rows by matrix name, (out,), above 0, with mean about 1; by one backward pass through a dense model's blocks.

    samples: calibration tokens (samples, length). A matrix that no prediction depends on, such as an idle expert's, has none.
    """
    if execution.storage.finished("weigh"):
        return dict(execution.storage.tensors("weigh"))
    samples, blocks = samples[: max(1, TOKENS // samples.shape[1])], decoder.windows("block")
    streams = [execution.embed(decoder, samples)]  # the input of each block, then the output of the last
    for block in tqdm(blocks, "weigh rows (forward)", unit="block", disable=not execution.progress):
        streams.append(execution.forward(decoder, block, streams[-1]))
    slopes, found = _slopes_of_predictions(decoder, samples, streams.pop(), seed, execution), {}
    for block in tqdm(blocks[::-1], "weigh rows (back)", unit="block", disable=not execution.progress):
        found |= _through(decoder, block, streams.pop(), slopes, execution)
    weights = {name: squares.sqrt().sqrt() for name, squares in found.items() if squares.any()}
    weights = {name: (each / each.mean()).clamp_min(1e-3) for name, each in weights.items()}
    execution.storage.finish("weigh", len(samples), tensors=weights)
    return weights


@torch.enable_grad()
def _slopes_of_predictions(decoder: Decoder, tokens: Tensor, last: Tensor, seed: int, execution: Execution) -> Tensor:
    """Gradient of the sum of log p(t) by `last`, the last block's output (samples, length, hidden); t: drawn from predictions."""
    slopes, draw = torch.zeros_like(last), generator(seed, "weigh")
    read, hidden, wanted = map(decoder.predicted, (tokens, last, slopes))
    with execution.holding_ends(decoder):
        for index, (each,) in enumerate(execution.batches([hidden], [[sample] for sample in range(len(last))])):
            for start in range(0, each.shape[1], SLICE):
                at = slice(start, start + SLICE)
                some = each[:, at].requires_grad_()
                with execution.autocast():
                    logits = decoder.logits(read[index : index + 1, at], some)[0]
                drawn = torch.multinomial(logits.detach().float().softmax(-1).cpu(), 1, generator=draw)[:, 0]
                likelihood = -negative_log_likelihood(logits, drawn.to(logits.device)).sum()
                wanted[index, at] = torch.autograd.grad(likelihood, some)[0][0]
    return slopes


@torch.enable_grad()
def _through(decoder: Decoder, block: Window, stream: Tensor, slopes: Tensor, execution: Execution) -> dict[str, Tensor]:
    """Backward pass through `block` for its input `stream`. Changes `slopes` (samples, length, hidden), gradients by the block's
    output, to those by its input. Returns by matrix name, (out,), the sum over tokens of squared gradients by rows' outputs."""
    squares: dict[str, Tensor] = {}
    given: list[tuple[list[str], Tensor]] = []  # outputs, with the matrices that are multiplied together
    matrices = decoder.matrices(block)
    modules = {name: each.module for name, each in matrices.items() if each.expert is None}
    watching = watched(modules, after=lambda name, args, kwargs, output: given.append(([name], output)))
    fused = decoder.fused_products(block, gave=lambda names, output: given.append((names, output)))
    with execution.holding(decoder, block), watching, fused:
        for index, (read, slope) in enumerate(execution.batches([stream, slopes], [[sample] for sample in range(len(stream))])):
            given.clear()
            with execution.autocast():
                output = decoder.forward(block, read.requires_grad_())
            to = [read, *(each for _, each in given)]
            slopes[index], *by_given = torch.autograd.grad(output, to, slope.to(output), materialize_grads=True)
            for (names, _), each in zip(given, by_given):
                found = each.float().square().reshape(len(names), -1, each.shape[-1]).sum(1).to(decoder.device)
                for name, own in zip(names, found):
                    squares[name] = squares.get(name, 0.0) + own
    return squares
