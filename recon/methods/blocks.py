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
    """Visits the blocks of a model in turn, but for those that are finished already; returns what every visit found.

    Args:
        phase: the name that finished blocks are noted under in the execution's store.
        visit: called with a block, in memory, and the statistics of what its matrices read, by matrix name. Returns what is to be noted
            of it, as JSON can hold it, and the parameters in which it changed more than it zeroed, by full name.
        description: of the progress bar.
        samples: calibration tokens (samples, length), where statistics are wanted.
        statistics: what to gather; see `recon.methods.statistics.gather`.
        rerun: whether the next block reads what this one gives after the visit, and not before.
    """
    store, blocks = execution.store, decoder.windows("block")
    found = list(store.finished(phase))
    stream = None
    if statistics != "none" and len(found) < len(blocks):
        stream = store.streams(phase)["stream"] if found else execution.embed(decoder, samples)
    bar = tqdm(
        blocks[len(found) :],
        desc=description,
        unit="block",
        disable=not execution.progress,
        initial=len(found),
        total=len(blocks),
    )
    for window in bar:
        gathered: dict[str, Tensor] = {}
        outputs = None
        with decoder.loaded(window):
            if stream is not None:
                outputs, gathered = gather(execution, decoder, window, stream, statistics)
            noted, changed = visit(window, gathered)
            if window == blocks[-1]:
                outputs = None
            elif stream is not None and rerun:
                with execution.holding(decoder, window):
                    outputs = execution.run(partial(decoder.forward, window), stream)
            stream = outputs
            store.finish(phase, noted, {"stream": stream}, changed)
        found.append(noted)
    return found
