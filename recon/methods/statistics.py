"""Statistics of what matrices read, gathered in one pass over calibration samples: for one window, or block by block."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from recon.errors import ReconError
from recon.kernels.moments import add_gram, add_moments, add_squares, mirrored
from recon.model.decoder import Decoder
from recon.model.modules import requiring_gradients
from recon.model.windows import Window
from recon.runtime.execution import Execution

FEW = 32  # an expert that reads fewer tokens has no statistics


@torch.no_grad()
def gather(
    execution: Execution, decoder: Decoder, window: Window, stream: Tensor, kind: str, count: int = 0, keep: bool = False
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Runs `window` on `stream` (samples, length, hidden), and gathers statistics of what its matrices read.

    kind: see `recon.kernels.criteria.Criterion`. An expert's are over the tokens sent to it; if fewer than `FEW`, it has none.
    count: statistics are of the first `count` samples; 0: of all. keep: whether to keep what the matrices read.

    Returns the window's outputs; statistics by matrix name; and, if kept, what each reads, (samples, rows, in), compute dtype.
    Statistics accumulate in float32 outside autocast: a Gram matrix formed in bfloat16 is useless.
    """
    totals: dict[tuple[str, ...], Tensor] = {}
    inputs: dict[tuple[str, ...], Tensor] = {}  # matrices that share an input share one tensor
    tokens: Counter = Counter()
    count, ran, size = count or len(stream), 0, 0  # numbers of samples: for statistics, before this batch, in it

    def see(group: tuple[str, ...], x: Tensor) -> None:
        """Adds x (..., in), which the matrices of `group` read, to the totals."""
        x = x.detach().reshape(-1, x.shape[-1])
        if keep:
            if group not in inputs:
                shape = len(stream), len(x) // size, x.shape[1]  # rows: tokens, or others where matrices mix tokens
                inputs[group] = execution.empty(shape, execution.dtype, stream.device)
            inputs[group][ran : ran + size] = x.unflatten(0, (size, -1))
        if kind == "none" or ran >= count or not len(x):
            return
        if group not in totals:
            rows = {"gram": (x.shape[1],), "moments": (2,)}.get(kind, ())
            totals[group] = x.new_zeros((*rows, x.shape[1]), dtype=torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            if kind == "gram":
                add_gram(totals[group], x.float())
            elif kind == "moments":
                add_moments(totals[group], tokens[group], x.float())
            else:
                add_squares(totals[group], x)
        tokens[group] += len(x)

    def anew() -> None:
        nonlocal ran
        totals.clear()
        tokens.clear()
        ran = 0

    def forward(batch: Tensor) -> Tensor:
        nonlocal ran, size
        size = len(batch)
        output = decoder.forward(window, batch)
        ran += size
        return output

    with execution.holding(decoder, window), decoder.watching(window, see):
        outputs = execution.run(forward, stream, count, anew)
    statistics, matrices = {}, decoder.matrices(window)
    for group, total in totals.items():
        if tokens[group] < FEW and matrices[group[0]].routed:
            continue
        if not torch.isfinite(total).all():
            raise ReconError(f"the input of {group[0]!r} holds NaN or infinite activations on the calibration samples")
        if kind != "moments":
            total /= count if kind == "gradient" else tokens[group]
            total = mirrored(total) if kind == "gram" else total.sqrt()
        statistics |= dict.fromkeys(group, total)
    if kind == "gradient":
        slopes = output_gradients(execution, decoder, window, stream[:count])
        statistics = {name: torch.cat([norm[None], slopes[name].to(norm.device)]) for name, norm in statistics.items()}
    return outputs, statistics, {name: x for group, x in inputs.items() for name in group}


@torch.enable_grad()
def output_gradients(execution: Execution, decoder: Decoder, window: Window, stream: Tensor) -> dict[str, Tensor]:
    """By matrix name, the root mean square over samples of the gradient of ||f(X)|| by the matrix, (out, in). f(X): the output of
    `window` for one sample X of `stream` (samples, length, hidden)."""
    weights, found = decoder.weights(window), decoder.matrices(window)
    with execution.holding(decoder, window), requiring_gradients(weights):
        totals = {each: torch.zeros(each.shape, dtype=torch.float32, device=execution.device) for each in weights}
        for (x,) in execution.batches([stream], [[sample] for sample in range(len(stream))]):
            with execution.autocast():
                size = decoder.forward(window, x).float().norm()
            for parameter, slope in zip(weights, torch.autograd.grad(size, weights, allow_unused=True), strict=True):
                if slope is not None:  # None for an expert that no token was sent to
                    totals[parameter] += slope.float().square() / len(stream)
        return {name: each.oriented(each.part_of(totals[each.parameter])).sqrt() for name, each in found.items()}


@torch.no_grad()
def over_blocks(
    decoder: Decoder,
    execution: Execution,
    phase: str,
    visit: Callable[[Window, dict[str, Tensor]], tuple[object, dict[str, Tensor]]],
    description: str,
    samples: Tensor | None = None,
    statistics: str = "none",
    rerun: bool = False,
) -> list:
    """Visits, in order, the blocks of a model that are not finished yet; returns what was noted of all blocks.

    phase: name under which the execution's storage keeps finished blocks. description: of the progress bar.
    visit: called with a block, whose weights are in memory, and the statistics of what its matrices read, by matrix name. Returns
        what to note of the block (JSON), and by full name the parameters that it changed other than by zeroing.
    samples: calibration tokens (samples, length), needed unless `statistics`, the kind for `gather`, is "none".
    rerun: whether the next block reads this block's outputs from after the visit instead of before.
    """
    storage, blocks, stream = execution.storage, decoder.windows("block"), None
    notes = list(storage.finished(phase))
    if statistics != "none" and len(notes) < len(blocks):
        stream = storage.streams(phase)["stream"] if notes else execution.embed(decoder, samples)
    left, off = blocks[len(notes) :], not execution.progress
    for window in tqdm(left, desc=description, unit="block", disable=off, initial=len(notes), total=len(blocks)):
        outputs, gathered = None, {}
        with decoder.loaded(window):
            if stream is not None:
                outputs, gathered, _ = gather(execution, decoder, window, stream, statistics)
            noted, changed = visit(window, gathered)
            if stream is not None and rerun and window != blocks[-1]:
                outputs = execution.forward(decoder, window, stream)
            stream = None if window == blocks[-1] else outputs
            storage.finish(phase, noted, {"stream": stream}, changed)
        notes.append(noted)
    return notes
