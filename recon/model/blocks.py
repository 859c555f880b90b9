"""A causal LM run piece by piece: embedding, one block after another, head.

Each block is called with what the model itself calls it with, so that the model's own code always runs.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from recon.errors import ReconError
from recon.model import experts
from recon.model.modules import first, placeholder_tokens, replaced
from recon.model.skeleton import Lazy, max_length
from recon.model.structure import Structure

SHAPES = 64  # shapes of batches for which the blocks' arguments are kept


class Stop(Exception):
    """Ends a forward pass once everything that is needed has been captured."""


class Blocks:
    """A model's embedding, blocks and head, each of which can be run by itself.

    Args:
        model: a causal LM from transformers, in evaluation mode.
        structure: how it is built.
        lazy: where `model` is a skeleton, its parameters, which are in memory only while something here needs them.
        calls: what its blocks are known to be called with; see `call`.
    """

    def __init__(self, model: nn.Module, structure: Structure = Structure(), lazy: Lazy | None = None, calls: dict | None = None):
        self.model, self.structure, self.lazy = model, structure, lazy
        self.calls: dict[tuple, list[tuple[tuple, dict]]] = {} if calls is None else calls
        self._configs = experts.configurations(model)

    @functools.cached_property
    def blocks(self) -> nn.ModuleList:
        """All blocks, in the order in which they run."""
        return nn.ModuleList(block for path in self.structure.stacks for block in self.model.get_submodule(path))

    @functools.cached_property
    def names(self) -> list[str]:
        """Full names of the blocks."""
        return [f"{path}.{index}" for path in self.structure.stacks for index in range(len(self.model.get_submodule(path)))]

    @property
    def path(self) -> str:
        """Path of the list of blocks; of the last one where there are several."""
        return self.structure.stacks[-1]

    @property
    def starts(self) -> list[int]:
        """Numbers of the blocks that begin a list of blocks."""
        lengths = [len(self.model.get_submodule(path)) for path in self.structure.stacks]
        return [0, *accumulate(lengths[:-1])]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def max_length(self) -> int | None:
        """The longest sequence, in tokens, that the model was made for, where its configuration tells."""
        return max_length(self.model.config)

    def check_length(self, length: int) -> None:
        """Raises `ReconError` where sequences of `length` tokens are longer than the model was made for."""
        if self.max_length is not None and length > self.max_length:
            raise ReconError(f"sequence length {length} is more than the {self.max_length} tokens that the model was made for")

    # --- running the model ----------------------------------------------------------------------------------------

    def run(self, tokens: Tensor):
        """What the whole model returns for `tokens` (batch, length): its logits are those of `predicted(tokens)`."""
        with self.experts_apart():
            return self.model(input_ids=tokens.to(self.device), use_cache=False)

    def run_head(self, tokens: Tensor):
        """As `run`, for `predicted(tokens)`; what the blocks read does not matter."""
        return self.run(tokens)

    def predicted(self, sequence: Tensor) -> Tensor:
        """The part of tokens, or of a residual stream, (batch, length, ...) that the model has logits for: all of it."""
        return sequence

    def experts_apart(self) -> contextlib.AbstractContextManager:
        """Context in which the model multiplies by each expert's matrices one by one; see `experts.apart`."""
        return experts.apart(self._configs)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Input of the first block for `tokens` (batch, length): (batch, length, hidden)."""
        caught = []

        def catch(index: int, hidden: Tensor, *args, **kwargs):
            caught.append(hidden)
            if index == self.starts[-1]:
                raise Stop
            return self.bypass(index, hidden, *args, **kwargs)

        starts = {self.blocks[index]: partial(catch, index) for index in self.starts}
        with self.loaded_embedding(), replaced(self.bypassed() | starts), contextlib.suppress(Stop):
            self.run(tokens)
        return torch.cat(caught, 1) if len(caught) > 1 else caught[0]

    @torch.no_grad()
    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The model's logits (batch, length, vocabulary) where its last block returns `hidden` (batch, length, hidden).

        The model's own forward runs with its blocks by-passed, so final norms, scalings and soft caps are the model's own.
        `tokens` (batch, length) give the shape only. Both are `predicted` parts.
        """
        with self.loaded_head(), replaced(self.bypassed(-1, hidden)):
            return self.run_head(tokens).logits

    def run_block(self, index: int, hidden: Tensor, silenced: Mapping[str, Callable] = {}) -> Tensor:
        """Output of block `index` for its input `hidden`, both (batch, length, hidden).

        silenced: child of the block -> what runs in its place; see `Halves.silenced`.
        """
        args, kwargs = self.call(hidden)[index]
        modules = {child: self.blocks[index].get_submodule(child) for child in silenced}
        with replaced({modules[child]: partial(stub, modules[child]) for child, stub in silenced.items()}), self.experts_apart():
            return first(self.blocks[index](hidden, *args, **kwargs))

    def skip_block(self, index: int, hidden: Tensor) -> Tensor:
        """The residual stream after block `index` where the block is by-passed."""
        return hidden

    def bypass(self, index: int, hidden: Tensor, *args, **kwargs):
        """The output of block `index`, called with `args` and `kwargs` beside its input, with hidden states `hidden`."""
        output = self.structure.blocks[index].output
        return hidden if output is None else output.beside(hidden, args, kwargs)

    def bypassed(self, last: int = -1, hidden: Tensor | None = None) -> dict[nn.Module, Callable]:
        """Stand-ins for all blocks: each returns its input, and block `last` returns `hidden` instead, where given."""
        stubs = {block: partial(self.bypass, index) for index, block in enumerate(self.blocks)}
        if hidden is not None:
            stubs[self.blocks[last]] = lambda own, *args, **kwargs: self.bypass(last, hidden, *args, **kwargs)
        return stubs

    # --- what blocks are called with ------------------------------------------------------------------------------

    def call(self, hidden: Tensor) -> list[tuple[tuple, dict]]:
        """The arguments of each block beside `hidden` (batch, length, hidden): positions, rotary embeddings, masks.

        As no sample is padded, they depend only on the shape (batch, length), so one copy per shape and device is kept.
        """
        key = tuple(hidden.shape[:2]), hidden.device
        if key not in self.calls:
            with torch.no_grad(), self.loaded_embedding():
                calls = self.observe_calls(placeholder_tokens(self.model, key[0]))
            if len(self.calls) >= SHAPES:
                self.calls.pop(next(iter(self.calls)))
            # The blocks may be on another device than the embedding.
            self.calls[key] = tree_map_only(Tensor, lambda tensor: tensor.to(hidden.device), calls)
        return self.calls[key]

    def observe_calls(self, tokens: Tensor, stand_in: Callable | None = None) -> list[tuple[tuple, dict]]:
        """The arguments of each block beside hidden states, from a pass in which the blocks are by-passed.

        stand_in: returns what a block returns instead, from its number, its own forward, and its arguments.
        """
        calls: list[tuple[tuple, dict]] = []

        def observe(index: int, forward: Callable, hidden: Tensor, *args, **kwargs):
            calls.append((args, kwargs))
            if len(calls) == len(self.blocks):
                raise Stop
            return stand_in(index, forward, hidden, *args, **kwargs) if stand_in else self.bypass(index, hidden, *args, **kwargs)

        stubs = {block: partial(observe, index, block.forward) for index, block in enumerate(self.blocks)}
        with replaced(stubs), contextlib.suppress(Stop):
            self.run(tokens)
        return calls

    def forget(self) -> None:
        """Forgets what blocks are called with. To be called when weights have changed that it may be computed from."""
        self.calls = {}

    # --- weights that are in memory only while they are needed ----------------------------------------------------

    def present(self, parameters: Iterable[nn.Parameter]) -> contextlib.AbstractContextManager:
        """Context in which `parameters` are in memory; they always are where the model is no skeleton."""
        return contextlib.nullcontext() if self.lazy is None else self.lazy.present(parameters)

    def loaded_embedding(self) -> contextlib.AbstractContextManager:
        """Context in which everything before the first block is in memory."""
        return self.present(self._embedded)

    def loaded_head(self) -> contextlib.AbstractContextManager:
        """Context in which everything after the last block is in memory."""
        # A weight tied to the embedding is left out, unless it is the head's: its other names may be used by nothing.
        skipped = set(self._embedded).difference(self.head_weights())
        return self.present(p for name, p in self.ends.items() if name not in self.structure.embedding and p not in skipped)

    def head_weights(self) -> list[nn.Parameter]:
        """The weight of the output head, which may be the embedding's as well; empty where there is no head."""
        head = self.model.get_output_embeddings()
        return [] if head is None else [head.weight]

    @property
    def _embedded(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.ends.items() if name in self.structure.embedding]

    @functools.cached_property
    def ends(self) -> dict[str, nn.Parameter]:
        """The parameters outside the blocks, by full name; those that are tied under each of their names."""
        inside, named = tuple(f"{path}." for path in self.structure.stacks), self.model.named_parameters(remove_duplicate=False)
        return {name: parameter for name, parameter in named if not name.startswith(inside)}
