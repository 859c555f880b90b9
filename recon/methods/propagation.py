"""What windows read, and what they are to match: the activations of all samples, moved on from window to window.

| propagation | inputs X                        | targets Y                                        |
|-------------|---------------------------------|--------------------------------------------------|
| dense       | the dense model's               | the dense model's                                |
| sparse      | the reconstructed model's       | the dense window's outputs on those same inputs  |
| mixed       | the reconstructed model's       | the dense model's                                |

A stream holds the activations of all samples at one place of a model, (samples, length, width): calibration samples first, then
held-out ones. Of each model one stream is kept: the one that the next window starts from.
"""

from functools import partial

import torch
from torch import Tensor

from recon.methods.statistics import gather
from recon.model.decoder import Decoder
from recon.model.windows import Window
from recon.runtime.execution import Execution

# X (samples, length, in), Y (samples, length, out), and statistics by matrix name
Task = tuple[Tensor, Tensor, dict[str, Tensor]]


class Streams:
    """The streams of the dense model and of the one that is being reconstructed.

    Args:
        count: calibration samples; all later ones are held out, no batch mixes them, and statistics leave them out.
        statistics: what to gather of what matrices read; see `recon.methods.statistics.gather`.
    """

    def __init__(self, teacher: Decoder, student: Decoder, execution: Execution, count: int, statistics: str):
        self.teacher, self.student, self.execution = teacher, student, execution
        self.count, self.statistics = count, statistics
        self.dense: Tensor | None = None
        self.sparse: Tensor | None = None
        self._runs: dict[tuple, tuple] = {}  # of the dense model, through the current block

    # --- by propagation ---------------------------------------------------------------------------------------------

    def dense_task(self, f: Window) -> Task:
        """Inputs and targets are the dense model's own activations, before and after the window."""
        return self.dense_inputs(f), *self.dense_outputs(f)

    def sparse_task(self, f: Window) -> Task:
        """Inputs are what the reconstructed model hands on; targets, what the dense window makes of them."""
        X = self.sparse_inputs(f)
        Y, statistics, _ = gather(self.execution, self.teacher, f, X, "none" if f.matrices else self.statistics, self.count)
        return X, Y, statistics

    def mixed_task(self, f: Window) -> Task:
        """Inputs are what the reconstructed model hands on; targets are the dense model's own activations."""
        return self.sparse_inputs(f), *self.dense_outputs(f)

    def task(self, propagation: str, f: Window) -> Task:
        return {"dense": self.dense_task, "sparse": self.sparse_task, "mixed": self.mixed_task}[propagation](f)

    # --- from window to window --------------------------------------------------------------------------------------

    def begin(self, propagation: str, tokens: Tensor, stored: dict[str, Tensor]) -> None:
        """Goes on from `stored` streams; where there are none, embeds `tokens` (samples, length)."""
        if stored:
            self.dense, self.sparse = stored.get("dense"), stored.get("sparse")
            return
        embedded = self.execution.embed(self.teacher, tokens, self.count)
        if propagation in ("dense", "mixed"):
            self.dense = embedded
        if propagation in ("sparse", "mixed"):
            # Embeddings are not pruned, so both models start from the same activations, unless something else changed them.
            own = self.execution.embed(self.student, tokens, self.count)
            self.sparse = embedded if torch.equal(own, embedded) else own

    def advance(self, f: Window) -> None:
        """Moves the streams on to what the window after `f` starts from."""
        if f.blocks[-1] == len(self.teacher.blocks) - 1 and f.ends_block:
            self.dense = self.sparse = None
        elif f.chained or f.ends_block:
            whole = f if f.chained else Window(f.blocks)
            if self.dense is not None:
                self.dense = self._dense_run(whole, "none")[0]
            if self.sparse is not None:
                self.sparse = self.forward(self.student, whole, self.sparse)
        if f.ends_block:
            self._runs.clear()

    def forward(self, decoder: Decoder, f: Window, X: Tensor) -> Tensor:
        """f(X), for all samples."""
        with self.execution.holding(decoder, f):
            return self.execution.run(partial(decoder.forward, f), X, self.count)

    def sparse_inputs(self, f: Window) -> Tensor:
        """What `f` reads in the model that is being reconstructed."""
        if not f.matrices:
            return self.sparse
        block = Window(f.blocks)
        with self.execution.holding(self.student, block):
            return self.execution.run(partial(self.student.inputs, f), self.sparse, self.count)

    # --- of the dense model, each computed once -----------------------------------------------------------------------

    def dense_inputs(self, f: Window) -> Tensor:
        """What `f` reads in the dense model."""
        return self._dense_run(f)[2][f.matrices[0]] if f.matrices else self.dense

    def dense_outputs(self, f: Window) -> tuple[Tensor, dict[str, Tensor]]:
        """The dense model's activations after `f`, and statistics of what its matrices read."""
        Y, statistics, inputs = self._dense_run(f)
        if not f.matrices:
            return Y, statistics
        own = {name: statistics[name] for name in f.matrices if name in statistics}
        return self.forward(self.teacher, f, inputs[f.matrices[0]]), own

    def _dense_run(self, f: Window, statistics: str | None = None) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The dense model's run through `f`, or through its block, which serves all windows of matrices in it; see `gather`."""
        whole, kind = Window(f.blocks) if f.matrices else f, self.statistics if statistics is None else statistics
        key = whole.blocks, whole.half
        if key not in self._runs:
            self._runs[key] = gather(self.execution, self.teacher, whole, self.dense, kind, self.count, bool(f.matrices))
        return self._runs[key]
