"""How much memory a run takes, in closed form from the shapes of its model: by phase, on the host and on the device.

Each phase of `_Run` yields what is alive at the moments when most is. `tests/study/test_memory.py` holds it to measured peaks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from recon.evaluate.perplexity import SLICE
from recon.kernels import criteria, losses, rows
from recon.methods.problem import ERROR_SAMPLES
from recon.model.decoder import Decoder
from recon.model.modules import kind_of
from recon.model.windows import Window
from recon.runtime.attention import CHUNK, LONGEST
from recon.runtime.device import HOST
from recon.runtime.execution import TOKENS
from recon.runtime.storage import SMALL
from recon.study.spec import RunSpec

SCRATCH = 64.0 * 2**20  # bytes of what no shape tells: tokenizer, texts, libraries loaded later, kernels' own memory
Parts = dict[str, float]  # bytes, by what they are for
Phases = dict[str, Parts]
Moments = Iterator[tuple[Parts, Parts]]  # what the host keeps, what the device works with


def memory(
    spec: RunSpec, decoder: Decoder, dtype: torch.dtype, device: torch.device = HOST, streamed: bool = False
) -> dict[str, Phases]:
    """Peak bytes of a run of `spec`, by kind of device, by phase, and by what they are for; the process itself is left out.

    Args:
        decoder: the model, or its shapes alone.
        dtype: what matrices are multiplied in.
        device: where windows are computed, which need not be here.
        streamed: whether the model stays on disk; files that are mapped into memory do not count.
    """
    run, found = _Run(spec, decoder, dtype, device != HOST, streamed), {HOST.type: {}, device.type: {}}
    for phase, moments in run.phases().items():
        for kept, working in moments:
            alive: dict[str, Parts] = {HOST.type: {"texts and scratch": SCRATCH, **kept}}
            here = alive.setdefault(device.type, {})
            for part, size in working.items():
                here[part] = here.get(part, 0.0) + size
            for kind, parts in alive.items():
                if parts and sum(parts.values()) >= sum(found[kind].get(phase, {}).values()):
                    found[kind][phase] = parts
    return found


def highest(phases: Phases) -> Parts:
    """The parts of the highest peak."""
    return max(phases.values(), key=lambda parts: sum(parts.values()))


def models_in_memory(spec: RunSpec, parameters: int) -> int:
    """The least bytes that a run in memory takes: a model of so many parameters and its copy, in float32, and once more what pruning
    made of it, where that is more than zeros."""
    return 4 * parameters * (2 + spec.changes_weights)


@dataclass(frozen=True)
class Size:
    """What the memory of a window follows from.

    present, matrices, trained: elements of what it takes to run the window, of its matrices, and of what is trained in it.
    largest, columns: elements of the largest matrix; the widest input of any.
    grams: elements of the Gram matrices of its matrices' inputs; those that share an input share one.
    inputs, outputs: elements that its matrices read and write per token; `groups`: what several read counts once.
    widest: elements per token that matrices which share an input write, at most.
    heads: attention heads in all.
    blocks, halves: how many of each it runs through; no halves where it is made of single matrices.
    """

    present: int
    matrices: int
    trained: int
    largest: int
    columns: int
    grams: int
    inputs: float
    outputs: float
    groups: float
    widest: float
    heads: int
    blocks: int
    halves: int

    @classmethod
    def of(cls, decoder: Decoder, window: Window, train: str = "matrices") -> "Size":
        """That of `window`, of which `train` is trained."""
        matrices, groups, halves = decoder.matrices(window), decoder.groups, decoder.halves
        shapes = {name: matrix.weight.shape for name, matrix in matrices.items()}
        groups = [group for index in window.blocks for group in groups[index] if group[0] in matrices]
        attends = window.mixes_tokens * sum(not isinstance(halves[i], str) for i in window.blocks)
        return cls(
            present=sum(tensor.numel() for tensor in decoder.needed(window)),
            matrices=sum(shape.numel() for shape in shapes.values()),
            trained=sum(parameter.numel() for parameter in decoder.trained(window, train).values()),
            largest=max(shape.numel() for shape in shapes.values()),
            columns=max(shape[1] for shape in shapes.values()),
            grams=sum(shapes[group[0]][1] ** 2 for group in groups),
            inputs=sum(matrix.share * shapes[name][1] for name, matrix in matrices.items()),
            outputs=sum(matrix.share * shapes[name][0] for name, matrix in matrices.items()),
            groups=sum(matrices[group[0]].share * shapes[group[0]][1] for group in groups),
            widest=max(sum(matrices[name].share * shapes[name][0] for name in group) for group in groups),
            heads=attends * (getattr(decoder.model.config.get_text_config(), "num_attention_heads", 0) or 0),
            blocks=len(window.blocks),
            halves=0 if window.matrices else window.halves,
        )


def distinct(decoder: Decoder, granularity: str) -> list[Window]:
    """The windows of `granularity`, one of each kind: those of blocks that are built alike are as large as one another."""
    kinds, found = [kind_of(block) for block in decoder.blocks], {}
    for window in decoder.windows(granularity):
        inside = tuple(name.removeprefix(decoder.names[window.blocks[0]]) for name in window.matrices)
        found.setdefault((window.half, inside, *(kinds[index] for index in window.blocks)), window)
    return list(found.values())


class _Run:
    """One run, as `memory` describes it; `on_gpu`: the device has memory of its own."""

    def __init__(self, spec: RunSpec, decoder: Decoder, dtype: torch.dtype, on_gpu: bool, streamed: bool):
        self.spec, self.decoder, self.on_gpu, self.streamed = spec, decoder, on_gpu, streamed
        self.item = dtype.itemsize
        self.rounded = dtype.itemsize if dtype != torch.float32 else 0  # bytes of each weight's copy in the compute dtype
        self.masked = 1 if on_gpu else 2  # bytes a weight of masks that are multiplied by
        config = decoder.model.config.get_text_config()
        self.hidden, self.vocabulary, self.length = config.hidden_size, config.vocab_size, spec.calibration.sequence_length
        self.parameters = sum(parameter.numel() for parameter in decoder.model.parameters())
        self.matrices = sum(matrix.weight.numel() for matrix in decoder.matrices().values())
        self.embedding = decoder.model.get_input_embeddings().weight.numel()
        self.head = sum(weight.numel() for weight in decoder.head_weights())
        self.blocks = [Size.of(decoder, window) for window in distinct(decoder, "block")]

    def phases(self) -> dict[str, Moments]:
        """What is alive when most is, by phase, in their order."""
        dense = {} if self.streamed else {"dense model": 4.0 * self.parameters}
        found: dict[str, Moments] = {"load": iter([(dense, {})])}
        if not self.streamed:
            found["copy"] = iter([(dense | {"pruned model": 4.0 * self.parameters}, {})])
        if not self.spec.one_pass:
            found["prune"] = self.prune()
        if self.spec.reconstruction.granularity != "none":
            windows = distinct(self.decoder, self.spec.reconstruction.granularity)
            found["reconstruct"] = (moment for window in windows for moment in self.reconstruct(window))
        if self.spec.retraining.retrain != "none":
            found["retrain"] = self.retrain()
        return found | {"evaluate": self.evaluate()}

    # --- parts ----------------------------------------------------------------------------------------------------

    def models(self, pruned: bool = True) -> Parts:
        """Both models, where they are in memory; once the student is `pruned`, what pruning made of it, for other runs."""
        if self.streamed:
            return {}
        found = {"dense model": 4.0 * self.parameters, "pruned model": 4.0 * self.parameters, "masks": float(self.matrices)}
        return found | ({"what pruning changed": 4.0 * self.matrices} if pruned and self.spec.changes_weights else {})

    def stream(self, samples: int, length: int, width: float | None = None, item: int = 4) -> float:
        """Bytes of activations (samples, length, width) in memory; a streamed run has large ones in files."""
        size = float(samples * length * (self.hidden if width is None else width) * item)
        return 0.0 if self.streamed and size > SMALL else size

    def read(self, elements: float) -> Parts:
        """Weights that a streamed run reads from disk."""
        return {"weights in hand": 4.0 * elements} if self.streamed else {}

    def held(self, size: Size, trained: bool = False) -> Parts:
        """Weights of a window as the device holds them: matrices rounded once, unless they are trained."""
        rounded = 0 if trained or not self.rounded else size.matrices
        there = {"weights in hand": 4.0 * (size.present - rounded)} if self.on_gpu else {}
        return there | ({"rounded weights": float(self.rounded * rounded)} if rounded else {})

    def attention(self, size: Size, length: int) -> float:
        """Bytes per token of attention's probabilities, which are there as such on CPUs in bfloat16; see `recon.runtime.attention`."""
        chunked = self.rounded and not self.on_gpu and CHUNK < length <= LONGEST
        return size.heads * (length + CHUNK) / 2 * self.item if chunked else 0.0

    def passing(self, size: Size, tokens: int, length: int) -> float:
        """Bytes of a batch on its way through a block: what its widest matrices write, and the residual stream a few times."""
        each = 1.5 * size.widest * self.item + 4 * 4 * self.hidden + self.attention(size, length) / size.blocks
        return tokens * (each + 4 * self.hidden * self.on_gpu)  # where the next batch is on its way already

    def forward(self, size: Size, length: int) -> Parts:
        """A window that nothing is trained in, and as many samples as go through it at once."""
        return self.held(size) | {"one batch": self.passing(size, max(TOKENS // length, 1) * length, length)}

    def for_backward(self, size: Size, tokens: int, length: int) -> float:
        """Bytes that a forward pass keeps for the backward pass: inputs and outputs of matrices, norms, attention."""
        # Autocast rounds the input of each matrix anew.
        products = self.item * ((size.inputs if self.rounded else size.groups) + size.outputs)
        return tokens * (products + size.halves * 2 * 4 * self.hidden + self.attention(size, length))

    def grams(self, size: Size) -> Parts:
        """Gram matrices while they are made: sums, means, and what it takes to mirror one."""
        return {"statistics of inputs": 4.0 * (2 * size.grams + 3 * size.columns**2)}

    @property
    def rule(self) -> criteria.Criterion | criteria.Structured:
        """The criterion."""
        return criteria.get("magnitude" if self.spec.model.pruned else self.spec.pruning.criterion)

    @property
    def prunes_by_grams(self) -> bool:
        """Whether masks are made from Gram matrices."""
        return self.rule.statistics == "gram" or self.spec.pruning.mask_refinement > 0

    def masks(self, size: Size) -> Parts:
        """What it takes to make the masks of one window."""
        pruning, rule = self.spec.pruning, self.rule
        scores = 24 if (rule.scope if pruning.scope == "auto" else pruning.scope) == "matrix" else 16
        scratch = scores * size.largest  # scores, their order, comparisons
        if pruning.mask_refinement:
            scratch = 32 * size.largest  # gains and losses of all exchanges
        elif rule.statistics == "gram":
            scratch = 4 * 6 * size.columns**2 + 12 * size.largest  # the Hessian's factors; weights, and their errors
        return {"masks and scores": float(scratch + size.matrices * self.streamed)}

    def logits(self, tokens: int, copies: int) -> float:
        """Bytes of logits, so many times in the compute dtype, and of a few of their rows in float32 three times."""
        elements = tokens * self.vocabulary
        return elements * self.item * copies + 3 * 4.0 * min(elements, rows.ELSEWHERE if self.on_gpu else losses.ELEMENTS)

    def steps(self, trained: float, accumulated: bool, shared: Parts, forward: Parts, batch: float) -> Iterator[Parts]:
        """AdamW, at the end of a forward pass and of a backward pass. Gradients come while what the forward pass kept goes, unless
        those of several passes are added up."""
        state = "gradients and AdamW"
        yield shared | forward | {state: (12.0 if accumulated else 8.0) * trained}
        yield shared | {state: 12.0 * trained, "one batch": batch}

    # --- phases ---------------------------------------------------------------------------------------------------

    def prune(self) -> Moments:
        """Block by block: statistics are gathered, then each matrix is pruned by them."""
        grams = self.prunes_by_grams
        samples = self.spec.samples_by_phase["prune"] if grams or self.rule.statistics != "none" else 0
        streams = {"activations of all samples": 2 * self.stream(samples, self.length)}
        if samples:
            yield self.read(self.embedding) | streams, {}
        for size in self.blocks:
            kept = self.models(pruned=False) | streams | self.read(size.present)
            if samples:
                yield kept, self.forward(size, self.length) | (self.grams(size) if grams else {})
            known = {"statistics of inputs": 4.0 * size.grams} if grams else {}
            yield kept, self.held(size, trained=True) | self.masks(size) | known
            if (
                samples and self.spec.pruning.statistics == "sparse"
            ):  # the block runs again, while its outputs before are there still
                more = {"activations of all samples": 3 * self.stream(samples, self.length)}
                yield kept | more, self.forward(size, self.length) | known
        if self.spec.changes_weights and not self.streamed:
            yield self.models(), {}

    def reconstruct(self, window: Window) -> Moments:
        """One window: targets, exact solutions, gradient descent, and what the next window starts from."""
        how, samples = self.spec.reconstruction, self.spec.calibration.samples
        size = Size.of(self.decoder, window, how.train)
        whole = Size.of(self.decoder, Window(window.blocks)) if window.matrices else size
        exact, stream = how.solver == "exact" or how.start == "exact", self.stream(samples, self.length)
        prunes = self.spec.one_pass
        gathers = exact or (prunes and self.prunes_by_grams)
        streams, models = self.streams(window, size), self.models()
        target = models | self.read(whole.present) | {"activations of all samples": streams}
        yield target, self.forward(whole, self.length) | (self.grams(whole) if gathers else {})
        copied = 0.0 if self.streamed and 4 * size.trained > SMALL else 4.0 * size.trained
        kept = models | {"activations of all samples": streams, "copy of the window": copied}
        grams = {"statistics of inputs": 4.0 * (whole if how.propagation == "dense" else size).grams} if gathers else {}
        if prunes:
            yield kept | self.read(size.present), self.held(size, trained=True) | self.masks(size) | grams
        if exact:
            solving = {"exact solutions": 9 * 4.0 * size.largest}
            yield kept | self.read(2 * size.present), self.held(size, trained=True) | grams | solving
        if how.solver == "adamw":
            for working in self.descend(window, size):
                yield kept | self.read(size.present), grams | working
        if how.propagation != "dense":  # targets are there still when the student's own stream is moved on
            more = {"activations of all samples": streams + stream}
            yield models | self.read(whole.present) | more, self.forward(whole, self.length)

    def streams(self, window: Window, size: Size) -> float:
        """Bytes of the activations of all samples while a window is fitted: its inputs, its targets, and what the models are at."""
        how, length = self.spec.reconstruction, self.length
        samples = self.spec.calibration.samples + min(self.spec.calibration.held_out_samples, ERROR_SAMPLES)
        residual, mixed = self.stream(samples, length), how.propagation == "mixed"
        if not window.matrices:
            return residual * (2 + mixed + bool(window.half))  # what was embedded stays until the first block is done
        by_grams = how.solver == "exact" and how.propagation == "dense"
        fitted = ERROR_SAMPLES if by_grams else samples
        targets = self.stream(fitted, length, size.outputs, self.item)
        if how.propagation == "dense":  # one run of the block tells the inputs of all its matrices
            reads = self.stream(fitted, length, max(block.groups for block in self.blocks), self.item)
            return residual * (2 - by_grams) + reads + targets
        reads = self.stream(samples, length, size.columns, 4 if size.columns == self.hidden else self.item)
        return (residual + reads) * (1 + mixed) + targets

    def descend(self, window: Window, size: Size) -> Iterator[Parts]:
        """Gradient descent on a window's matrices, or on adapters around them."""
        how = self.spec.reconstruction
        tokens = min(how.batch_size, self.spec.calibration.samples) * self.length // how.chunks_of(window, self.length)
        widths = size.columns + size.outputs if window.matrices else 2 * self.hidden
        batch = float(4 * tokens * widths * (1 + self.on_gpu) + self.passing(size, tokens, self.length))
        shared, trained = self.held(size, trained=True), float(size.trained)
        if how.adapter != "none":
            trained = how.rank * (size.inputs + size.outputs)
        if how.adapter in ("none", "masklora"):
            shared["masks of the window"] = float(self.masked * size.matrices)
        copies = self.rounded if how.adapter == "none" else self.item  # an adapter is merged into its matrix
        forward = {"rounded weights": float(copies * size.matrices)}
        forward["one batch"] = batch + self.for_backward(size, tokens, self.length)
        return self.steps(trained, how.accumulation > 1, shared, forward, batch)

    def retrain(self) -> Moments:
        """The whole model at once, on the device; its weights before it are kept."""
        how, length = self.spec.retraining, self.length
        whole = Size.of(self.decoder, Window(range(len(self.decoder.blocks))))
        largest = max(self.blocks, key=lambda size: size.matrices)
        tokens = min(how.retrain_batch_size, self.spec.samples_by_phase["retrain"]) * length
        all_of_it, distils = how.retrain in ("full", "norms"), how.retrain_objective == "distil"
        kept = self.models() | {"copy of the model": 4.0 * (self.matrices + all_of_it * self.parameters)}
        shared = {}
        if how.retrain in ("full", "masklora"):
            shared["masks of the model"] = float(self.masked * self.matrices)
        if self.on_gpu:
            shared["weights in hand"] = 4.0 * self.parameters * (1 + distils)
            kept |= {"pruned model": 0.0} | ({"dense model": 0.0} if distils else {})
        vectors = sum(parameter.numel() for parameter in self.decoder.model.parameters() if parameter.ndim == 1)
        trained = {"full": self.parameters, "norms": vectors}.get(how.retrain, how.retrain_rank * (whole.inputs + whole.outputs))
        there = largest if how.retrain_checkpointing else whole  # in the backward pass, a block at a time
        copies = self.rounded if all_of_it else self.item  # an adapter is merged into its matrix
        batch = float(self.passing(largest, tokens, length))
        inputs = 4 * tokens * self.hidden * whole.blocks * how.retrain_checkpointing
        forward = {
            "rounded weights": float(copies * there.matrices + self.rounded * self.head),
            "one batch": batch + self.for_backward(there, tokens, length) + inputs,
            "logits": self.logits(tokens, 4 + distils),  # and those that predict something, and gradients of both
        }
        for working in self.steps(trained, how.retrain_accumulation > 1, shared, forward, batch):
            yield kept, working

    def evaluate(self) -> Moments:
        """Block by block, then the head, of both models where they are compared."""
        how = self.spec.evaluation
        kept = self.models(pruned=self.spec.reconstruction.granularity != "none" or self.spec.retraining.retrain != "none")
        stream = self.stream(how.evaluation_samples, how.evaluation_length)
        references = sum(self.stream(min(how.kl_windows, windows), how.evaluation_length) for windows in how.windows.values())
        for size in self.blocks:
            streams = {"activations of all samples": references + 2 * stream}
            copied = {"pruned block": 4.0 * size.present} if self.spec.one_pass and not self.streamed else {}
            yield (
                kept | copied | self.read(max(size.present, self.embedding)) | streams,
                self.forward(size, how.evaluation_length),
            )
        packed = self.rounded * self.head * (not self.on_gpu)  # by the CPU's kernel, for one of the two
        working = {
            "rounded weights": 2.0 * self.rounded * self.head + packed,
            "logits": self.logits(min(SLICE, how.evaluation_length), 2),
        }
        if self.on_gpu:
            ends = self.parameters - sum(p.numel() for block in self.decoder.blocks for p in block.parameters())
            working["weights in hand"] = 2 * 4.0 * (ends - self.head * bool(self.rounded))
        yield kept | self.read(2 * self.head) | {"activations of all samples": references + stream}, working
