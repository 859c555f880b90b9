"""What windows read, and what they are to match: the activations of all samples, moved on from window to window.

| propagation | inputs                          | targets                                          |
|-------------|---------------------------------|--------------------------------------------------|
| dense       | the dense model's               | the dense model's                                |
| sparse      | the reconstructed model's       | the dense window's outputs on those same inputs  |
| mixed       | the reconstructed model's       | the dense model's                                |

A stream holds the activations of all samples at one place of a model, (samples, length, width): calibration samples first, then held-out
ones. Of each model one stream is kept: the one that the next window starts from.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from recon.kernels.losses import channel_variance
from recon.methods.problem import Problem
from recon.methods.statistics import gather
from recon.model.decoder import Decoder
from recon.model.windows import Window

TOKENS = 2**17  # that tell the variance of channels


@dataclass(frozen=True)
class Task:
    """What one window is fitted to, for all samples.

    inputs: (samples, length, in). targets: (samples, length, out).
    variance: of each channel of the targets, (out,); see `recon.kernels.losses.channel_variance`.
    grams: by matrix name, X'X / tokens of what it reads, (in, in); where matrices are solved exactly.
    statistics: by matrix name, of what it reads in the dense model; where the window is yet to be pruned by them.
    """

    inputs: Tensor
    targets: Tensor
    variance: Tensor
    grams: dict[str, Tensor]
    statistics: dict[str, Tensor] = field(default_factory=dict)


class Propagation:
    """The streams of a problem's dense model and of the one that is being reconstructed, moved on window by window."""

    def __init__(self, problem: Problem):
        self.teacher, self.student, self.execution = problem.teacher, problem.student, problem.execution
        self.split, config = problem.split, problem.config
        self.kind = config.propagation
        self.exact = config.solver == "exact" or config.start == "exact"
        # Gram matrices of the dense model are then all that is fitted on, and inputs serve to measure errors alone.
        self.by_grams = config.solver == "exact" and self.kind == "dense"
        self.pruned_by = problem.pruner.statistics if problem.pruner else "none"
        self.dense: Tensor | None = None
        self.sparse: Tensor | None = None
        self._kept: dict[str, Tensor] = {}  # by name, what is known of the dense model around the window in hand

    @property
    def streams(self) -> dict[str, Tensor | None]:
        """What the next window starts from."""
        return {"dense": self.dense, "sparse": self.sparse}

    def begin(self, tokens: Tensor, streams: dict[str, Tensor]) -> None:
        """Goes on from `streams`; where there are none, embeds `tokens` (samples, length)."""
        if streams:
            self.dense, self.sparse = streams.get("dense"), streams.get("sparse")
            return
        embedded = self._known("embedded")
        if embedded is None:
            embedded = self._keep("embedded", self.execution.embed(self.teacher, tokens, self.split.calibration))
        if self.kind in ("dense", "mixed"):
            self.dense = embedded
        if self.kind in ("sparse", "mixed"):
            # Embeddings are not pruned, so both models start from the same activations, unless something else changed them.
            own = self.execution.embed(self.student, tokens, self.split.calibration)
            self.sparse = embedded if torch.equal(own, embedded) else own

    def task(self, window: Window) -> Task:
        """What `window` reads and what it is to match; one run of the dense window tells its outputs and all statistics."""
        gathered = self._gathered(window)
        if not window.matrices:
            inputs = self.dense if self.kind == "dense" else self.sparse
            if self.kind == "sparse":
                targets, gathered = self._teach(window, inputs, "gram" if self.exact else "none")
            else:
                targets = self._dense_output(window)
        elif self.kind == "dense":
            inputs = self._dense_inputs(window)
            targets = self.forward(self.teacher, window, inputs)
        else:
            inputs = self._inputs(self.student, window, self.sparse)
            theirs = self._inputs(self.teacher, window, self.dense) if self.kind == "mixed" else inputs
            targets = self.forward(self.teacher, window, theirs)
        grams = gathered if self.exact else {}
        if self.exact and window.matrices and self.kind != "dense":
            count = self.split.calibration
            grams = dict.fromkeys(window.matrices, mean_product(inputs[:count], inputs[:count]))
        statistics = gathered if self.pruned_by != "none" else {}
        if self.pruned_by == "norm" and self._gathers(window) == "gram":
            statistics = {name: gram.diagonal().sqrt() for name, gram in gathered.items()}
        enough = -(-TOKENS // targets.shape[1])
        variance = channel_variance(targets[: min(enough, self.split.calibration)])
        return Task(inputs, targets, variance, grams, statistics)

    def advance(self, window: Window) -> None:
        """Moves the streams on to what the window after `window` starts from."""
        if window.blocks[-1] == len(self.teacher.blocks) - 1 and window.ends_block:
            self.dense = self.sparse = None
        elif window.chained or window.ends_block:
            whole = window if window.chained else Window(window.blocks)
            if self.dense is not None:
                self.dense = self._dense_output(whole)
            if self.sparse is not None:
                self.sparse = self.forward(self.student, whole, self.sparse)
        if window.ends_block:
            self._kept.clear()
            self.execution.cache.release()

    def forward(self, decoder: Decoder, window: Window, stream: Tensor) -> Tensor:
        """The output of `window` for all of `stream`; no batch mixes calibration and held-out samples."""
        return self._over(decoder, window, partial(decoder.forward, window), stream)

    # --- the dense model's activations, each computed once ---------------------------------------------------------

    def _over(self, decoder: Decoder, window: Window, function: Callable[[Tensor], Tensor], stream: Tensor) -> Tensor:
        with self.execution.holding(decoder, window):
            return self.execution.run(function, stream, self.split.calibration)

    def _known(self, name: str) -> Tensor | None:
        """What this pass, or one before it on the same dense model and samples, computed under `name`."""
        return self._kept[name] if name in self._kept else self.execution.cache.get(name)

    def _keep(self, name: str, tensor: Tensor) -> Tensor:
        self._kept[name] = self.execution.cache.put(name, tensor)
        return self._kept[name]

    def _inputs(self, decoder: Decoder, window: Window, stream: Tensor) -> Tensor:
        """What `window` reads where its block (or half) reads `stream`."""
        if not window.matrices:
            return stream
        return self._over(decoder, Window(window.blocks), partial(decoder.inputs, window), stream)

    def _dense_output(self, window: Window) -> Tensor:
        """The dense model's own activations after `window`, of blocks or a half."""
        known = self._known(_place(window))
        return self._keep(_place(window), self.forward(self.teacher, window, self.dense)) if known is None else known

    def _dense_inputs(self, window: Window) -> Tensor:
        """What the matrices of `window` read in the dense model; one run of the block tells it for all of its groups."""
        group = next(g for g in self.teacher.groups[window.blocks[0]] if window.matrices[0] in g)
        if f"input of {group[0]}" not in self._kept:
            block, stream = Window(window.blocks), self.dense[self.split.measured] if self.by_grams else self.dense
            outputs, seen = self._recorded(block, stream)
            if not self.by_grams:
                self._keep(_place(block), outputs)
            # For this block only: they are larger than the stream that they come from.
            self._kept |= {f"input of {first}": x for (first, *_), x in seen.items()}
        return self._kept[f"input of {group[0]}"]

    def _recorded(self, block: Window, stream: Tensor) -> tuple[Tensor, dict[tuple[str, ...], Tensor]]:
        """The dense outputs of `block` for `stream`, and the inputs (samples, length, in) of each of its groups of matrices."""
        seen: dict[tuple[str, ...], Tensor] = {}
        filled: dict[tuple[str, ...], int] = {}

        def see(group: tuple[str, ...], x: Tensor) -> None:
            x = x.detach().reshape(-1, x.shape[-1])
            if group not in seen:
                # Matrices multiply what is rounded to the compute dtype, so nothing is lost by keeping that.
                seen[group] = self.execution.empty((*stream.shape[:2], x.shape[1]), self.execution.dtype, stream.device)
            at = filled.get(group, 0)
            seen[group].flatten(0, 1)[at : at + len(x)] = x
            filled[group] = at + len(x)

        with self.teacher.watching(block, see), self.execution.holding(self.teacher, block):
            return self.execution.run(partial(self.teacher.forward, block), stream, self.split.calibration, filled.clear), seen

    def _gathers(self, window: Window) -> str:
        """The kind of statistics to gather of what the dense model's matrices read: Gram matrices hold norms, too."""
        solved = self.exact and (self.kind == "dense" or not window.matrices)
        return "gram" if solved and self.kind != "sparse" else self.pruned_by

    def _gathered(self, window: Window) -> dict[str, Tensor]:
        """Statistics of what the matrices of `window` read in the dense model; one run tells all those of a block."""
        if (kind := self._gathers(window)) == "none":
            return {}
        # Matrices that share an input share its statistics, which are kept once, under the first one's name.
        first = {name: group[0] for index in window.blocks for group in self.teacher.groups[index] for name in group}
        place = {name: f"{kind} of {first[name]}" for name in self.teacher.matrices(window)}
        if any(self._known(key) is None for key in place.values()):
            whole = Window(window.blocks) if window.matrices else window
            outputs, found = self._teach(whole, self.dense, kind)
            if self._known(_place(whole)) is None:
                self._keep(_place(whole), outputs)
            for name, statistics in found.items():
                if name == first[name]:
                    self._keep(f"{kind} of {name}", statistics)
        return {name: found for name, key in place.items() if (found := self._known(key)) is not None}

    def _teach(self, window: Window, stream: Tensor, kind: str) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's outputs of `window`, of blocks or a half, for `stream`, and statistics of this kind on calibration samples."""
        if kind == "none":
            return self.forward(self.teacher, window, stream), {}
        return gather(self.execution, self.teacher, window, stream, kind, self.split.calibration)


def _place(window: Window) -> str:
    """Where the output of `window`, of blocks or a half, lies in the dense model: the same for windows that end at one place."""
    inside = window.half and not (window.chained and window.ends_block)
    return f"block {window.blocks[-1]}" + (f" {window.half}" if inside else "")


def mean_product(left: Tensor, right: Tensor) -> Tensor:
    """Mean over tokens of the outer product: left (samples, length, a), right (samples, length, b) -> (a, b) float32."""
    total = left.new_zeros(left.shape[-1], right.shape[-1], dtype=torch.float32)
    for a, b in zip(left, right, strict=True):
        total.addmm_(a.float().T, b.float())
    return total / left.shape[:2].numel()
