"""How much memory a run takes, in closed form from the shapes of its model: by phase, on the host and on the device.

Each method of `_Run` walks through one phase, and yields what is alive at the moments at which most is. Held against measured
peaks by `tests/experiment/test_memory.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from recon.evaluate.perplexity import KL_WINDOWS, SLICE
from recon.experiment.config import RunSpec
from recon.kernels import criteria, losses, rows
from recon.kernels.adapters import ADAPTERS
from recon.methods.problem import ERROR_SAMPLES
from recon.model.decoder import Decoder
from recon.model.modules import kind_of
from recon.model.windows import Window
from recon.runtime.activations import SMALL
from recon.runtime.attention import CHUNK, LONGEST
from recon.runtime.device import HOST
from recon.runtime.execution import TOKENS

SCRATCH = 64.0 * 2**20  # bytes of tokenizer, texts, libraries loaded later, kernels' scratch: what no shape tells, roughly
Parts = dict[str, float]  # bytes, by what they are for
Phases = dict[str, Parts]
Moments = Iterator[tuple[str, Parts, Parts]]  # phase, what is kept on the host, what the device works with


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
    found: dict[str, Phases] = {HOST.type: {}, device.type: {}}
    for phase, kept, working in _Run(spec, decoder, dtype, device, streamed).moments():
        alive: dict[str, Parts] = {HOST.type: {"texts and scratch": SCRATCH, **kept}}
        here = alive.setdefault(device.type, {})
        for part, size in working.items():
            here[part] = here.get(part, 0.0) + size
        for kind, parts in alive.items():
            if (parts or kind == HOST.type) and sum(parts.values()) >= sum(found[kind].get(phase, {}).values()):
                found[kind][phase] = parts
    return found


def highest(phases: Phases) -> Parts:
    """The parts of the highest peak."""
    return max(phases.values(), key=lambda parts: sum(parts.values()))


def models_in_memory(spec: RunSpec, parameters: int) -> int:
    """Bytes of the dense model of so many parameters and its copy, in float32, and once more what pruning made of it, where that is more
    than zeros: the least that a run takes that is not streamed."""
    return 4 * parameters * (2 + spec.changes_weights)


@dataclass(frozen=True)
class Size:
    """What the memory of a window follows from; numbers of elements, but for the last three.

    present: what it takes to run the window: its parameters, and others of the same blocks that they are computed with.
    matrices, trained: its matrices; all that is trained in it.
    largest, columns: the largest matrix, and the widest input of any.
    grams: Gram matrices of what its matrices read; those that share an input share one.
    inputs, outputs: what its matrices read and write, per token; `groups`: reads of those that share an input once.
    widest: most of what matrices that share an input write, per token.
    heads: attention heads of its blocks in all.
    blocks, halves: how many of each it runs through; no halves where it is single matrices.
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

    @staticmethod
    def of(decoder: Decoder, window: Window, train: str = "matrices") -> "Size":
        """That of `window`, of which `train` is trained."""
        matrices = decoder.matrices(window)
        shapes = {name: matrix.weight.shape for name, matrix in matrices.items()}
        every, halves = decoder.groups, decoder.halves
        groups = [group for index in window.blocks for group in every[index] if group[0] in matrices]
        attends = window.half != "mlp" and not window.matrices
        divided = [index for index in window.blocks if not isinstance(halves[index], str)]
        return Size(
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
            heads=attends * len(divided) * (getattr(decoder.model.config.get_text_config(), "num_attention_heads", 0) or 0),
            blocks=len(window.blocks),
            halves=0 if window.matrices else window.halves,
        )


def distinct(decoder: Decoder, granularity: str) -> list[Window]:
    """The windows of `granularity`, one of each kind: those of blocks that are built alike are as large as one another."""
    kinds = [kind_of(block) for block in decoder.blocks]
    found: dict[tuple, Window] = {}
    for window in decoder.windows(granularity):
        inside = tuple(name.removeprefix(decoder.names[window.blocks[0]]) for name in window.matrices)
        found.setdefault((window.half, inside, *(kinds[index] for index in window.blocks)), window)
    return list(found.values())


class _Run:
    """One run, as `memory` describes it."""

    def __init__(self, spec: RunSpec, decoder: Decoder, dtype: torch.dtype, device: torch.device, streamed: bool):
        self.spec, self.decoder, self.streamed = spec, decoder, streamed
        self.on_gpu = device != HOST
        self.item = dtype.itemsize
        self.rounded = dtype.itemsize if dtype != torch.float32 else 0  # bytes of each weight's copy in the compute dtype
        self.hidden = decoder.model.config.get_text_config().hidden_size
        self.parameters = sum(parameter.numel() for parameter in decoder.model.parameters())
        self.weights = sum(matrix.weight.numel() for matrix in decoder.matrices().values())
        self.head = [weight.numel() for weight in decoder.head_weights()]
        self.vocabulary = decoder.model.config.get_text_config().vocab_size
        self.embedding = decoder.model.get_input_embeddings().weight.numel()
        self.blocks = [Size.of(decoder, window) for window in distinct(decoder, "block")]

    def moments(self) -> Moments:
        """What is alive when most is, phase by phase."""
        dense = {} if self.streamed else {"dense model": 4.0 * self.parameters}
        yield "load", dense, {}
        if not self.streamed:
            yield "copy", dense | {"pruned model": 4.0 * self.parameters}, {}
        yield from self.prune()
        if self.spec.reconstruction.granularity != "none":
            for window in distinct(self.decoder, self.spec.reconstruction.granularity):
                yield from self.reconstruct(window)
        if self.spec.retraining.method != "none":
            yield from self.retrain()
        yield from self.evaluate()

    # --- what there is of everything ------------------------------------------------------------------------------

    def models(self, finished: bool = True) -> Parts:
        """Both models, where they are in memory, and what pruning left beside the student, once it is `finished`."""
        if self.streamed:
            return {}
        found = {"dense model": 4.0 * self.parameters, "pruned model": 4.0 * self.parameters, "masks": float(self.weights)}
        return found | ({"what pruning changed": 4.0 * self.weights} if finished and self.spec.changes_weights else {})

    def stream(self, samples: int, length: int, width: float | None = None, item: int = 4) -> float:
        """Bytes of activations (samples, length, width) in memory; a streamed run has large ones in files."""
        size = samples * length * (self.hidden if width is None else width) * item
        return 0.0 if self.streamed and size > SMALL else float(size)

    def in_hand(self, size: Size, copies: int = 1) -> Parts:
        """Weights of a window that a streamed run reads from disk."""
        return {"weights in hand": 4.0 * size.present * copies} if self.streamed else {}

    def held(self, size: Size, trained: bool = False) -> Parts:
        """Weights of a window as the device holds them: matrices rounded once, unless they are trained."""
        if trained:
            return {"weights in hand": 4.0 * size.present} if self.on_gpu else {}
        rounded = {"rounded weights": float(self.rounded * size.matrices)}
        rest = size.present - (size.matrices if self.rounded else 0)
        return rounded | ({"weights in hand": 4.0 * rest} if self.on_gpu else {})

    def attention(self, size: Size, length: int) -> float:
        """Bytes per token of attention's probabilities, which the CPU's attention in bfloat16 keeps; see `recon.runtime.attention`."""
        if self.on_gpu or not self.rounded or not CHUNK < length <= LONGEST:
            return 0.0
        return 2.0 * size.heads / size.blocks * (length + CHUNK) / 2

    def one_batch(self, size: Size, tokens: int, length: int, width: float | None = None) -> float:
        """Bytes of a batch on its way through one block: inputs and outputs of matrices, and the residual stream a few times."""
        width = self.hidden if width is None else width
        passing = 1.5 * size.widest * self.item + 4 * 4 * width + self.attention(size, length)
        return tokens * (passing + self.on_gpu * 4 * width)  # where the next one is on its way already

    def untrained_batch(self, size: Size, length: int) -> Parts:
        """As `one_batch`, of as many samples as go through a window at once where nothing is trained."""
        return {"one batch": self.one_batch(size, max(TOKENS // length, 1) * length, length)}

    def for_backward(self, size: Size, tokens: int, length: int) -> float:
        """Bytes that a forward pass of a window keeps for the backward pass: inputs and outputs of matrices, norms, attention."""
        # Autocast rounds the input of each matrix anew.
        products = self.item * ((size.inputs if self.rounded else size.groups) + size.outputs)
        return tokens * (products + size.halves * 2 * 4 * self.hidden + size.blocks * self.attention(size, length))

    def grams(self, size: Size, made: bool = False) -> Parts:
        """Gram matrices of a window; twice, and with what it takes to mirror one, where they are being `made`."""
        return {"statistics of inputs": 4.0 * (2 * size.grams + 3 * size.columns**2 if made else size.grams)}

    # --- phases ---------------------------------------------------------------------------------------------------

    def prune(self) -> Moments:
        """Block by block: statistics are gathered, then each matrix is pruned by them."""
        spec = self.spec
        rule = criteria.get("magnitude" if spec.model.pruned else spec.pruning.criterion)
        kind = "gram" if spec.pruning.mask_refinement else rule.statistics
        length, samples = spec.calibration.sequence_length, 0 if kind == "none" else spec.samples_by_phase["prune"]
        streams = {"activations of all samples": 2 * self.stream(samples, length)}
        scope = rule.scope if spec.pruning.scope == "auto" else spec.pruning.scope
        if samples and self.streamed:
            yield "prune", {"weights in hand": 4.0 * self.embedding} | streams, {}
        for size in self.blocks:
            kept = self.models(finished=False) | streams | self.in_hand(size)
            grams = self.grams(size) if kind == "gram" else {}
            if samples:
                made = self.grams(size, made=True) if kind == "gram" else {}
                yield "prune", kept, self.held(size) | self.untrained_batch(size, length) | made
            each = 24 if scope == "matrix" else 16  # scores, their order, and comparisons
            scratch = each * size.largest
            if spec.pruning.mask_refinement:
                scratch = 32 * size.largest
            elif not (rule.scores or rule.statistics != "gram"):
                scratch = (
                    4 * 6 * size.columns**2 + 12 * size.largest
                )  # factors of the Hessian; the weights, and what they make up for
            own = {"masks and scores": float(scratch + (size.matrices if self.streamed else 0))}
            yield "prune", kept, self.held(size, trained=True) | grams | own
        if not self.streamed and spec.changes_weights:
            yield "prune", self.models(), {}

    def reconstruct(self, window: Window) -> Moments:
        """One window: targets, exact solutions, gradient descent, and what the next window starts from."""
        spec, phase = self.spec, "reconstruct"
        size = Size.of(self.decoder, window, spec.reconstruction.train)
        whole = Size.of(self.decoder, Window(window.blocks)) if window.matrices else size
        exact = spec.reconstruction.solver == "exact" or spec.reconstruction.start == "exact"
        one, kept = self.streams_of(window, size), self.models()
        length = spec.calibration.sequence_length
        forward = self.held(whole) | self.untrained_batch(whole, length)
        # The teacher's outputs; with Gram matrices, outputs for the samples that these are made of lie apart.
        extra = exact * self.stream(spec.calibration.samples, length)
        made = self.grams(whole, made=True) if exact else {}
        yield phase, kept | self.in_hand(whole) | {"activations of all samples": one + extra}, forward | made
        kept |= {"activations of all samples": one, "copy of the window": self.copy_of(size)}
        grams = self.grams(whole if spec.reconstruction.propagation == "dense" else size) if exact else {}
        if exact:
            solving = {"exact solutions": 9 * 4.0 * size.largest}
            yield phase, kept | self.in_hand(size, 2), self.held(size, trained=True) | grams | solving
        if spec.reconstruction.solver == "adamw":
            for working in self.descend(window, size):
                yield phase, kept | self.in_hand(size), grams | working
        if spec.reconstruction.propagation != "dense":  # targets are there still when the student's own stream is moved on
            more = one + self.stream(spec.calibration.samples, length)
            yield phase, self.models() | self.in_hand(whole) | {"activations of all samples": more}, forward

    def streams_of(self, window: Window, size: Size) -> float:
        """Bytes of the activations of all samples while a window is fitted: its inputs and targets, and those of both models before it."""
        spec, length = self.spec, self.spec.calibration.sequence_length
        samples = spec.calibration.samples + min(spec.calibration.held_out_samples, ERROR_SAMPLES)
        residual = self.stream(samples, length)
        if not window.matrices:
            between = window.half is not None  # what was embedded is there until the first block is done
            return residual * ({"dense": 2, "sparse": 2, "mixed": 3}[spec.reconstruction.propagation] + between)
        by_grams = spec.reconstruction.solver == "exact" and spec.reconstruction.propagation == "dense"
        fitted = min(samples, ERROR_SAMPLES) if by_grams else samples
        targets = self.stream(fitted, length, size.outputs, self.item)
        if spec.reconstruction.propagation == "dense":  # one run of the block tells the inputs of all its matrices
            block = max(block.groups for block in self.blocks)
            return residual * (2 - by_grams) + self.stream(fitted, length, block, self.item) + targets
        reads = self.stream(samples, length, size.columns, 4 if size.columns == self.hidden else self.item)
        return (residual + reads) * (1 + (spec.reconstruction.propagation == "mixed")) + targets

    def copy_of(self, size: Size) -> float:
        """Bytes of what a window was before it is fitted, which a streamed run has in a file where it is large."""
        return 0.0 if self.streamed and 4 * size.trained > SMALL else 4.0 * size.trained

    def descend(self, window: Window, size: Size) -> Iterator[Parts]:
        """At the end of a forward pass, and at the end of the backward pass after it."""
        spec, length = self.spec, self.spec.calibration.sequence_length
        tokens = min(spec.reconstruction.batch_size, spec.calibration.samples) * length
        if window.matrices or window.half == "mlp":
            tokens = -(-tokens // spec.reconstruction.chunks)
        widths = size.columns + size.outputs if window.matrices else 2 * self.hidden
        batch = 4 * tokens * widths * (1 + self.on_gpu) + self.one_batch(size, tokens, length)
        activations = {"one batch": batch + self.for_backward(size, tokens, length)}
        shared = self.held(size, trained=True)
        rounded = {"rounded weights": float(self.rounded * size.matrices)}
        if spec.reconstruction.adapter != "none":
            trained = spec.reconstruction.rank * (size.inputs + size.outputs)
            rounded = {"rounded weights": float(self.item * size.matrices)}  # W and BA, merged
            shared |= {"masks": float((1 if self.on_gpu else 2) * size.matrices * (spec.reconstruction.adapter == "masklora"))}
        else:
            trained = size.trained
            shared |= {"masks of the window": float((1 if self.on_gpu else 2) * size.matrices)}
        yield from self.steps(trained, spec.reconstruction.accumulation > 1, shared, rounded | activations, batch)

    def steps(self, trained: float, accumulated: bool, shared: Parts, forward: Parts, batch: float) -> Iterator[Parts]:
        """AdamW: gradients are made while what the forward pass kept goes, unless those of several passes are added up."""
        state = "gradients and AdamW"
        yield shared | forward | {state: (12.0 if accumulated else 8.0) * trained}
        yield shared | {state: 12.0 * trained, "one batch": float(batch)}

    def retrain(self) -> Moments:
        """The whole model at once, on the device; its weights before it are kept."""
        spec, phase = self.spec, "retrain"
        whole = Size.of(self.decoder, Window(range(len(self.decoder.blocks))))
        length, item = spec.calibration.sequence_length, self.item
        tokens = min(spec.retraining.batch_size, spec.samples_by_phase["retrain"]) * length
        kept = self.models()
        before = 4.0 * (self.weights + (self.parameters if spec.retraining.method in ("full", "norms") else 0))
        kept |= {"copy of the model": before}
        vectors = sum(parameter.numel() for parameter in self.decoder.model.parameters() if parameter.ndim == 1)
        low_rank = spec.retraining.rank * (whole.inputs + whole.outputs)
        trained = {"full": self.parameters, "norms": vectors}.get(spec.retraining.method, low_rank)
        masked = spec.retraining.method in ("full", "masklora")
        shared = {"masks of the model": float((1 if self.on_gpu else 2) * self.weights * masked)}
        distils = spec.retraining.objective == "distil"
        if self.on_gpu:
            shared |= {"weights in hand": 4.0 * self.parameters * (1 + distils)}
            kept |= {"pruned model": 0.0} | ({"dense model": 0.0} if distils else {})
        largest = max(self.blocks, key=lambda size: size.matrices)
        blocks = self.for_backward(whole, tokens, length)
        if spec.retraining.checkpointing:
            blocks = self.for_backward(largest, tokens, length) + 4 * tokens * self.hidden * whole.blocks
        batch = self.one_batch(largest, tokens, length)
        merged = item if spec.retraining.method in ADAPTERS and spec.retraining.method != "lora" else self.rounded
        weights = (largest.matrices if spec.retraining.checkpointing else self.weights) * merged + self.rounded * sum(self.head)
        # Logits, their part that predicts something, its gradient, and that of all; in float32, a few rows.
        logits = tokens * self.vocabulary * item * (4 + distils) + 3 * self.rows(tokens)
        forward = {"rounded weights": float(weights), "one batch": blocks + batch, "logits": float(logits)}
        for working in self.steps(trained, spec.retraining.accumulation > 1, shared, forward, batch):
            yield phase, kept, working

    def evaluate(self) -> Moments:
        """Block by block, then the head, of both models where they are compared."""
        spec, phase = self.spec, "evaluate"
        kept = self.models(finished=spec.reconstruction.granularity != "none" or spec.retraining.method != "none")
        samples, length = spec.evaluation.samples, spec.evaluation.length
        references = len(spec.evaluation.texts) * self.stream(min(KL_WINDOWS, samples), length)
        stream = self.stream(samples, length)
        if self.streamed:
            yield phase, {"weights in hand": 4.0 * self.embedding, "activations of all samples": references + stream}, {}
        for size in self.blocks:
            streams = {"activations of all samples": references + 2 * stream}
            yield phase, kept | self.in_hand(size) | streams, self.held(size) | self.untrained_batch(size, length)
        streams = {"activations of all samples": references + stream}
        head = sum(self.head)
        if self.streamed:
            streams["weights in hand"] = 2 * 4.0 * head
        rows = min(SLICE, length)
        working = {
            "rounded weights": 2.0 * self.rounded * head,
            "logits": 2.0 * rows * self.vocabulary * self.item + 3 * self.rows(rows),
        }
        if self.on_gpu:
            apart = self.parameters - sum(parameter.numel() for block in self.decoder.blocks for parameter in block.parameters())
            working["weights in hand"] = 2 * 4.0 * (apart - (head if self.rounded else 0))
        yield phase, kept | streams, working

    def rows(self, tokens: int) -> float:
        """Bytes of the rows of logits that a loss has in float32 at once."""
        most = rows.ELSEWHERE if self.on_gpu else losses.ELEMENTS
        return 4.0 * min(tokens * self.vocabulary, max(most, self.vocabulary))
