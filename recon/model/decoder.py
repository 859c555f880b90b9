"""A causal LM as a chain of windows between embedding and head. Each window can be run, watched and trained by itself.

Each block is called with the arguments that the model itself passes to it, so the model's own code always runs.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, cached_property, partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from recon.errors import ReconError
from recon.model.experts import FusedProducts
from recon.model.modules import Stop, first, placeholder_tokens, replaced, watched
from recon.model.skeleton import Lazy, max_length
from recon.model.structure import OTHER, Halves, Matrix, Structure
from recon.model.windows import Window, canonical, partition

SHAPES = 64  # how many shapes of batches the blocks' arguments are kept for


class Decoder:
    """A causal LM whose windows can be run, watched and trained one at a time. Made by `recon.decompose`.

    model: in evaluation mode; see `recon.decompose`. structure: how it is built. lazy: the parameters of a skeleton, which are in
    memory only while a method needs them. calls: arguments of the blocks that are known already; see `call`.
    """

    reading = ""  # describes how a sample is divided before the model reads it

    def __init__(self, model: nn.Module, structure: Structure = Structure(), lazy: Lazy | None = None, calls: dict | None = None):
        self.model, self.structure, self.lazy = model, structure, lazy
        self.calls: dict[tuple, list[tuple[tuple, dict]]] = {} if calls is None else calls

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """All blocks, in the order in which they run."""
        return nn.ModuleList(block for path in self.structure.stacks for block in self.model.get_submodule(path))

    @cached_property
    def names(self) -> list[str]:
        """Full names of the blocks."""
        return [f"{path}.{index}" for path in self.structure.stacks for index in range(len(self.model.get_submodule(path)))]

    @property
    def starts(self) -> list[int]:
        """Numbers of the blocks that are the first in their list (encoder-decoders have two lists)."""
        return [index for index, name in enumerate(self.names) if name.endswith(".0")]

    @property
    def device(self) -> torch.device:
        """Where the model is, by its first parameter."""
        return next(self.model.parameters()).device

    def check_length(self, length: int) -> None:
        """Raises `ReconError` if sequences of `length` tokens are longer than the model was made for."""
        longest = max_length(self.model.config)
        if longest is not None and length > longest:
            raise ReconError(f"sequence length {length} is more than the {longest} tokens that the model was made for")

    def check_tokens(self, tokens: Tensor) -> None:
        """Raises `ReconError` for tokens outside the model's vocabulary, such as those of another tokenizer."""
        known = self.model.config.get_text_config().vocab_size
        for found in (int(end) for end in tokens.aminmax()):
            if not 0 <= found < known:
                raise ReconError(f"samples hold token {found}; the model knows 0 to {known - 1}: is this its tokenizer?")

    def check_causal(self) -> None:
        """Raises `ReconError` if the model does not predict the next token after each one."""
        if not self.structure.causal:
            raise ReconError(f"{type(self.model).__name__} is not a causal language model, which predicts from earlier tokens")

    def run(self, tokens: Tensor):
        """What the whole model returns for `tokens` (batch, length); its logits are those of `predicted(tokens)`."""
        return self.model(input_ids=tokens.to(self.device), use_cache=False)

    def predicted(self, sequence: Tensor) -> Tensor:
        """The part of `sequence`, tokens or a residual stream (batch, length, ...), that the model has logits for: all of it."""
        return sequence

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Input of the first block for `tokens` (batch, length): (batch, length, hidden)."""
        with self.loaded_embedding():
            calls = self.observe(tokens, self.starts[-1])
        return torch.cat([calls[index][0] for index in self.starts], 1)

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The model's logits (batch, length, vocabulary) if its last block returns `hidden` (batch, length, hidden).

        The model's own forward runs, with its blocks bypassed. `tokens` give only the shape. Both are `predicted` parts.
        """
        with self.loaded_head(), replaced(self.bypassed(-1, hidden)):
            return self.run(tokens.repeat(1, len(self.starts))).logits  # each list of blocks reads a part of the tokens

    def forward(self, window: Window, hidden: Tensor) -> Tensor:
        """Output of `window` for its input (batch, length, width): the residual stream, or its matrices' outputs concatenated."""
        if window.matrices:
            return torch.cat([self.model.get_submodule(name)(hidden) for name in window.matrices], dim=-1)
        for index in window.blocks:
            hidden = self.run_block(index, hidden, self.halves[index].silenced(window.half) if window.half else {})
        return hidden

    def run_block(self, index: int, hidden: Tensor, silenced: Mapping[str, Callable] = {}) -> Tensor:
        """Output of block `index` for its input `hidden`, both (batch, length, hidden); silenced: see `Halves.silenced`."""
        block, (args, kwargs) = self.blocks[index], self.call(hidden)[index]
        with replaced({block.get_submodule(child): stub for child, stub in silenced.items()}):
            return first(block(hidden, *args, **kwargs))

    def skip_block(self, index: int, hidden: Tensor) -> Tensor:
        """The residual stream after block `index` if the block is bypassed."""
        return hidden

    def bypass(self, index: int, hidden: Tensor, *args, **kwargs):
        """What block `index` returns, in its own format, if its hidden states are `hidden`; args, kwargs: its other arguments."""
        beside, named = self.structure.blocks[index].beside, {**dict(enumerate(args)), **kwargs}
        if beside is None:
            return hidden
        return (hidden, *(value if name is None else named.get(name) for name, value in beside))

    def bypassed(self, last: int, hidden: Tensor) -> dict[nn.Module, Callable]:
        """Stand-in forwards for all blocks: each returns its input, but block `last` returns `hidden`."""
        stubs = {block: partial(self.bypass, index) for index, block in enumerate(self.blocks)}
        stubs[self.blocks[last]] = lambda own, *args, **kwargs: self.bypass(last, hidden, *args, **kwargs)
        return stubs

    @torch.no_grad()
    def inputs(self, window: Window, hidden: Tensor) -> Tensor:
        """Input (batch, length, in) of the matrices of `window`, if their block's input is `hidden` (batch, length, hidden)."""
        caught, name = [], window.matrices[0]

        def stop(name, args, kwargs):
            caught.append(args[0])
            raise Stop

        with watched({name: self.model.get_submodule(name)}, stop), contextlib.suppress(Stop):
            self.run_block(window.blocks[0], hidden)
        # Some blocks (OPT's) flatten batch and length into one axis.
        return caught[0].reshape(len(hidden), -1, caught[0].shape[-1])

    @contextlib.contextmanager
    def watching(self, window: Window, see: Callable[[tuple[str, ...], Tensor], None]) -> Iterator[None]:
        """Context in which `see(group, input)` is called whenever a group of the window's matrices reads its input."""
        wanted = self.matrices(window)
        groups = [group for index in window.blocks for group in self.groups[index] if group[0] in wanted]
        modules = {group: self.model.get_submodule(group[0]) for group in groups if wanted[group[0]].expert is None}
        fused = self.fused_products(window, see=lambda product: see((product.name,), product.x))
        with watched(modules, lambda group, args, kwargs: see(group, args[0])), fused:
            yield

    def fused_products(self, window: Window, **how) -> contextlib.AbstractContextManager:
        """`FusedProducts` for the experts of `window` that share a parameter, if there are any; how: its other arguments."""
        fused = {each.parameter_name: each.parameter for each in self.matrices(window).values() if each.expert is not None}
        return FusedProducts(fused, **how) if fused else contextlib.nullcontext()

    def call(self, hidden: Tensor) -> list[tuple[tuple, dict]]:
        """The arguments of each block besides `hidden` (batch, length, hidden): positions, rotary embeddings, masks.

        No sample is padded, so they depend only on the shape (batch, length). One copy per shape, device and precision is kept.
        """
        kind = next(self.model.parameters()).dtype, any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
        key = tuple(hidden.shape[:2]), hidden.device, *kind
        if key not in self.calls:
            with torch.no_grad(), self.loaded_embedding():
                calls = self.observe_calls(placeholder_tokens(self.model, key[0]))
            while len(self.calls) >= SHAPES:
                self.calls.pop(next(iter(self.calls)))
            # The blocks may be on another device than the embedding. A tensor that several blocks take is copied there once.
            there = cache(lambda tensor: tensor.to(hidden.device))
            self.calls[key] = tree_map_only(Tensor, there, calls)
        return self.calls[key]

    def observe_calls(self, tokens: Tensor) -> list[tuple[tuple, dict]]:
        """The arguments of each block when the model reads `tokens`, except hidden states, which the others do not depend on."""
        return [(args, kwargs) for _, args, kwargs in self.observe(tokens, len(self.blocks) - 1)]

    def observe(self, tokens: Tensor, last: int, stand_in: Callable | None = None) -> list[tuple[Tensor, tuple, dict]]:
        """What each block up to number `last` is called with: hidden states, other positional arguments, keyword arguments.

        stand_in: gets a block's number, its own forward and these arguments, and returns the block's output; default: bypass it.
        """
        calls: list[tuple[Tensor, tuple, dict]] = []

        def note(index: int, forward: Callable, *args, **kwargs):
            if not args:
                raise ReconError(f"block {index} of {type(self.model).__name__} is not given hidden states as its first argument")
            hidden, *args = args
            calls.append((hidden, args, kwargs))
            if index == last:
                raise Stop
            return stand_in(index, forward, hidden, *args, **kwargs) if stand_in else self.bypass(index, hidden, *args, **kwargs)

        stubs = {block: partial(note, index, block.forward) for index, block in enumerate(self.blocks)}
        with replaced(stubs), contextlib.suppress(Stop):
            self.run(tokens)
        return calls

    def forget(self) -> None:
        """Forgets the blocks' arguments. Call it after changing weights that these may be computed from."""
        self.calls = {}

    def present(self, parameters: Iterable[Tensor]) -> contextlib.AbstractContextManager:
        """Context in which `parameters` are in memory; if the model is not a skeleton, they always are."""
        return contextlib.nullcontext() if self.lazy is None else self.lazy.present(parameters)

    def loaded(self, window: Window) -> contextlib.AbstractContextManager:
        """Context in which everything needed to run `window` is in memory."""
        return self.present(self.needed(window))

    def loaded_embedding(self) -> contextlib.AbstractContextManager:
        """Context in which everything before the first block is in memory."""
        return self.present(p for name, p in self.ends.items() if name in self.structure.embedding)

    def loaded_head(self) -> contextlib.AbstractContextManager:
        """Context in which everything after the last block is in memory."""
        # A weight tied to the embedding is left out, unless it is the head's: perhaps nothing uses it under its other names.
        skipped = {self.ends[name] for name in self.structure.embedding}.difference(self.head_weights())
        return self.present(p for name, p in self.ends.items() if name not in self.structure.embedding and p not in skipped)

    def head_weights(self) -> list[nn.Parameter]:
        """The weight of the output head, if there is one; it may be tied to the embedding."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        return [] if head is None else [head.weight]

    def needed(self, window: Window) -> list[Tensor]:
        """The parameters and buffers needed to run `window`: those of its blocks, without silenced children."""
        if window.matrices:
            return list(self.parameters(window).values())
        silenced = {i: self.halves[i].children[OTHER[window.half]] if window.half else () for i in window.blocks}
        tensors = ((i, each) for i in silenced for each in (*self.blocks[i].named_parameters(), *self.blocks[i].named_buffers()))
        return [tensor for index, (name, tensor) in tensors if name.partition(".")[0] not in silenced[index]]

    @cached_property
    def ends(self) -> dict[str, nn.Parameter]:
        """The parameters outside the blocks, by full name; a tied parameter is under each of its names."""
        inside, named = tuple(f"{path}." for path in self.structure.stacks), self.model.named_parameters(remove_duplicate=False)
        return {name: parameter for name, parameter in named if not name.startswith(inside)}

    @property
    def groups(self) -> list[list[tuple[str, ...]]]:
        """For each block, groups of full names of its matrices, in running order; the matrices of a group read the same input."""
        blocks = zip(self.names, self.structure.blocks)
        return [[tuple(f"{path}.{name}" for name in group) for group in block.groups] for path, block in blocks]

    @property
    def halves(self) -> list[Halves | str]:
        """For each block, its halves, or why it does not divide."""
        return [block.halves for block in self.structure.blocks]

    def windows(self, granularity: str) -> list[Window]:
        """The windows of the model at `granularity`, in running order. Raises `ReconError` if that does not fit the model."""
        granularity, kind = canonical(granularity), type(self.model).__name__
        if self.reading and granularity in ("matrix", "half-block"):
            why = "an encoder-decoder is reconstructed by whole blocks; use block or a larger granularity"
            raise ReconError(f"granularity {granularity!r} does not fit {kind}: {why}")
        if granularity == "matrix":
            if routed := next((name for name, matrix in self.matrices().items() if matrix.routed), None):
                why = f"it has experts, such as {routed!r}, which read tokens of their own; use half-block or a larger one"
                raise ReconError(f"matrix windows do not fit {kind}: {why}")
            if (empty := next((index for index, groups in enumerate(self.groups) if not groups), None)) is not None:
                why = f"block {empty} has no matrix that can be pruned; use half-block or a larger one"
                raise ReconError(f"matrix windows do not fit {kind}: {why}")
            groups = [(index, group, group == groups[-1]) for index, groups in enumerate(self.groups) for group in groups]
            return [Window(range(index, index + 1), matrices=group, ends_block=last) for index, group, last in groups]
        if granularity == "half-block":
            for index, halves in enumerate(self.halves):
                if isinstance(halves, str):
                    why = f"block {index} ({type(self.blocks[index]).__name__}) {halves}; use granularity block, or a larger one"
                    raise ReconError(f"half-block windows do not fit this model: {why}")
            return [
                Window(range(i, i + 1), half=half, parallel=halves.layout == "parallel", ends_block=half == "mlp")
                for i, halves in enumerate(self.halves)
                for half in OTHER
            ]
        return [Window(blocks) for blocks in partition(granularity, len(self.blocks))]

    def parameters(self, window: Window) -> dict[str, nn.Parameter]:
        """The parameters of `window`, by full name: matrices, norms and biases that its output depends on."""
        modules = window.matrices or [self.names[index] for index in window.blocks]
        return {
            f"{path}.{name}": parameter
            for path in modules
            for name, parameter in self.model.get_submodule(path).named_parameters()
            if not window.half or self.halves[window.blocks[0]].has(window.half, name)
        }

    def trained(self, window: Window, what: str) -> dict[str, nn.Parameter]:
        """The parameters of `window` to train, by full name: "matrices" with their biases, or "all"; never shared ones."""
        wanted = {name for m in self.matrices(window).values() for name in (m.parameter_name, m.bias_name)}
        own = {name: p for name, p in self.parameters(window).items() if name not in self.structure.shared}
        return {name: p for name, p in own.items() if what == "all" or name in wanted}

    def matrices(self, window: Window | None = None) -> dict[str, Matrix]:
        """The prunable matrices of `window` (default: of all blocks), by name, in the order in which they run."""
        blocks = window.blocks if window else range(len(self.blocks))
        own = self.parameters(window) if window and (window.half or window.matrices) else None
        known = ((index, matrix) for index in blocks for matrix in self.structure.blocks[index].matrices.values())
        inside = [matrix.within(self.names[index], self.blocks[index]) for index, matrix in known]
        return {matrix.name: matrix for matrix in inside if own is None or matrix.parameter_name in own}

    def weights(self, window: Window) -> list[nn.Parameter]:
        """The parameters that hold the matrices of `window`."""
        return list(dict.fromkeys(matrix.parameter for matrix in self.matrices(window).values()))
