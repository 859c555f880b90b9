"""Inputs and targets of windows: the activations of all samples, carried on from window to window.

| propagation | inputs X                        | targets Y                                        |
|-------------|---------------------------------|--------------------------------------------------|
| dense       | the dense model's               | the dense model's                                |
| sparse      | the reconstructed model's       | the dense window's outputs on those same inputs  |
| mixed       | the reconstructed model's       | the dense model's                                |

A stream holds the activations of all samples at one place of a model, (samples, length, width): calibration samples first, then
held-out ones. For each model one stream is kept: the one that the next window starts from.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from recon.methods.statistics import gather
from recon.model.decoder import Decoder
from recon.model.windows import Window
from recon.runtime.execution import Execution

# X (samples, length, in), Y (samples, length, out), and statistics by matrix name
Task = tuple[Tensor, Tensor, dict[str, Tensor]]


@dataclass
class Streams:
    """The streams of the dense model (teacher) and of the model that is being reconstructed (student)."""

    teacher: Decoder
    student: Decoder
    execution: Execution
    count: int  # number of calibration samples; later ones are held out: in batches of their own, and not in statistics
    statistics: str  # which ones, of what matrices read; see `recon.methods.statistics.gather`
    dense: Tensor | None = None
    sparse: Tensor | None = None
    _runs: dict[tuple, tuple] = field(default_factory=dict)  # of the dense model, in the current block; see `_dense_run`

    def task(self, propagation: str, f: Window) -> Task:
        """Inputs and targets of `f` under `propagation`, and statistics of what its matrices read."""
        if propagation == "dense":
            X = self._dense_run(f)[2][f.matrices[0]] if f.matrices else self.dense
            return X, *self._dense_outputs(f)
        X = self._sparse_inputs(f)
        if propagation == "sparse":
            Y, statistics, _ = gather(self.execution, self.teacher, f, X, "none" if f.matrices else self.statistics, self.count)
            return X, Y, statistics
        Y, statistics = self._dense_outputs(f)
        if f.parallel and f.half == "mlp":
            # Both halves of the block read its input. Attention is fitted by now, and the MLP is to compensate for its error: the
            # MLP's target is the dense block's output minus what the reconstructed attention adds.
            block, attention = Window(f.blocks), replace(f, half="attention")
            whole = self.execution.forward(self.teacher, block, self.dense, self.count)
            self._runs[block.blocks, block.half] = whole, {}, {}  # the dense stream moves on to it in `advance`
            Y = self.execution.forward(self.student, attention, X, self.count).sub_(X).neg_().add_(whole)
        return X, Y, statistics

    def begin(self, propagation: str, tokens: Tensor, stored: dict[str, Tensor]) -> None:
        """Sets the streams to those `stored`; if there are none, embeds `tokens` (samples, length)."""
        if stored:
            self.dense, self.sparse = stored.get("dense"), stored.get("sparse")
            return
        embedded = self.execution.embed(self.teacher, tokens, self.count)
        self.dense = embedded if propagation != "sparse" else None
        if propagation != "dense":
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
                known = self._runs.get((whole.blocks, whole.half))
                self.dense = known[0] if known else self.execution.forward(self.teacher, whole, self.dense, self.count)
            if self.sparse is not None:
                self.sparse = self.execution.forward(self.student, whole, self.sparse, self.count)
        if f.ends_block:
            self._runs.clear()

    def _sparse_inputs(self, f: Window) -> Tensor:
        """What `f` reads in the model that is being reconstructed."""
        if not f.matrices:
            return self.sparse
        with self.execution.holding(self.student, Window(f.blocks)):
            return self.execution.run(partial(self.student.inputs, f), self.sparse, self.count)

    def _dense_outputs(self, f: Window) -> tuple[Tensor, dict[str, Tensor]]:
        """The dense model's activations after `f`, and statistics of what its matrices read."""
        Y, statistics, inputs = self._dense_run(f)
        if f.matrices:
            Y = self.execution.forward(self.teacher, f, inputs[f.matrices[0]], self.count)
        return Y, {name: statistics[name] for name in self.teacher.matrices(f) if name in statistics}

    def _dense_run(self, f: Window) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The dense model's run through `f`, or, for matrices, through their block, once for all its windows; see `gather`."""
        whole = Window(f.blocks) if f.matrices else f
        key = whole.blocks, whole.half
        if key not in self._runs:
            run = gather(self.execution, self.teacher, whole, self.dense, self.statistics, self.count, bool(f.matrices))
            self._runs[key] = run
        return self._runs[key]
