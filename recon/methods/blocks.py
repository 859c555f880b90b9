"""The loop over blocks that pruning, structured pruning and external masks share."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from recon.methods.statistics import gather
from recon.model.decoder import Decoder
from recon.model.windows import Window
from recon.runtime.execution import Execution

Visit = Callable[[Window, dict[str, Tensor]], tuple[object, dict[str, Tensor]]]


@torch.no_grad()
def over_blocks(
    decoder: Decoder,
    execution: Execution,
    phase: str,
    visit: Visit,
    description: str,
    samples: Tensor | None = None,
    statistics: str = "none",
    rerun: bool = False,
) -> list:
    """Visits in turn the blocks of a model that are not finished yet; returns what was noted of every block, finished or visited.

    Args:
        phase: the name that finished blocks are noted under in the execution's storage.
        visit: called with a block, whose weights are in memory, and the statistics of what its matrices read, by matrix name.
            Returns what to note of the block (JSON), and by full name the parameters that it changed other than by zeroing.
        description: of the progress bar.
        samples: calibration tokens (samples, length), where statistics are wanted; see `recon.methods.statistics.gather`.
        rerun: whether the next block reads this one's outputs after the visit, rather than those before it.
    """
    storage, blocks, stream = execution.storage, decoder.windows("block"), None
    notes = list(storage.finished(phase))
    if statistics != "none" and len(notes) < len(blocks):
        stream = storage.streams(phase)["stream"] if notes else execution.embed(decoder, samples)
    left, off = blocks[len(notes) :], not execution.progress
    for window in tqdm(left, desc=description, unit="block", disable=off, initial=len(notes), total=len(blocks)):
        gathered: dict[str, Tensor] = {}
        with decoder.loaded(window):
            outputs = None
            if stream is not None:
                outputs, gathered, _ = gather(execution, decoder, window, stream, statistics)
            noted, changed = visit(window, gathered)
            if stream is not None and rerun and window != blocks[-1]:
                with execution.holding(decoder, window):
                    outputs = execution.run(partial(decoder.forward, window), stream)
            stream = None if window == blocks[-1] else outputs
            storage.finish(phase, noted, {"stream": stream}, changed)
        notes.append(noted)
    return notes
