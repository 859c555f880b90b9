"""An encoder-decoder as a chain of blocks: those of the encoder, then those of the decoder."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from recon.errors import ReconError
from recon.model.decoder import Decoder, Stop
from recon.model.discovery import find_blocks, first, placeholder_tokens, probe_tokens, reached, replaced, requiring_gradients
from recon.model.skeleton import placeholder
from recon.model.windows import Window, canonical

_ENCODED = object()  # stands for the encoder's output among what a block is called with


class EncoderDecoder(Decoder):
    """The blocks of an encoder-decoder, callable one window at a time.

    A sample is cut in two: the encoder reads its first half, and the decoder, which reads the encoder's output as well, the second,
    which it predicts. So is the residual stream (batch, length, hidden) throughout: an encoder block changes its first half, a
    decoder block its second. Hence errors and losses, means over all tokens, count the half that a block leaves alone as well.

    Windows are made of whole blocks. What one block computes for others as well, such as biases of relative positions, is no window's own:
    the parameters that it is computed from are not trained.
    """

    FOUND = (*Decoder.FOUND, "_passed_on", "_finishing")
    reading = "the encoder reads the first half of each sample, and the decoder predicts the second"
    _preparing = False

    def _find_stacks(self) -> list[str]:
        run = None if self.lazy else lambda: self.run(probe_tokens(self.model))
        return [find_blocks(self.model, run, self._path_of(half)) for half in self._halves]

    @property
    def _halves(self):
        return self.model.get_encoder(), self.model.get_decoder()

    def _path_of(self, wanted) -> str:
        return next(name for name, module in self.model.named_modules() if module is wanted)

    @property
    def first(self) -> int:
        """Number of the decoder's first block."""
        return len(self.model.get_submodule(self.stacks[0]))

    @property
    def max_length(self) -> int | None:
        """The longest sequence, in tokens, encoder's and decoder's together."""
        longest = super().max_length
        return None if longest is None else 2 * longest

    def run(self, tokens: Tensor):
        tokens = tokens.to(self.device)
        read, predicted = _cut(tokens)
        return self.model(input_ids=read, decoder_input_ids=predicted, use_cache=False)

    def predicted(self, sequence: Tensor) -> Tensor:
        """The part of tokens, or of a residual stream, (batch, length, ...) that the decoder reads: the second half."""
        return _cut(sequence)[1]

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        caught = []

        def catch(index: int, hidden: Tensor, *args, **kwargs):
            caught.append(hidden)
            if index:
                raise Stop
            return self._bypass(index, hidden, *args, **kwargs)

        ends = {self.blocks[index]: partial(catch, index) for index in (0, self.first)}
        with self.loaded_embedding(), replaced(self._bypassed() | ends), contextlib.suppress(Stop):
            self.run(tokens)
        return torch.cat(caught, 1)

    @torch.no_grad()
    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """What the model makes of `hidden` (batch, length, hidden), the last block's output for the decoder's `tokens`."""
        with self.loaded_head(), replaced(self._bypassed() | self._ending(len(self.blocks) - 1, hidden)):
            return self.model(input_ids=tokens[:, :1], decoder_input_ids=tokens, use_cache=False).logits

    def _bypassed(self) -> dict:
        return {block: partial(self._bypass, index) for index, block in enumerate(self.blocks)}

    def _ending(self, last: int, hidden: Tensor) -> dict:
        """What has the block `last` return `hidden`, whatever it is called with."""
        return {self.blocks[last]: lambda h, *args, **kwargs: self._bypass(last, hidden, *args, **kwargs)}

    def _passed_by(self, index: int, hidden: Tensor) -> Tensor:
        read, predicted = _cut(hidden)
        return torch.cat([self._finished(read), predicted], 1) if index == self.first - 1 else hidden

    def _run_block(self, index: int, hidden: Tensor, half: str | None = None) -> Tensor:
        read, predicted = _cut(hidden)
        args, kwargs = tree_map(lambda leaf: read if leaf is _ENCODED else leaf, self._call(hidden)[index])
        if index >= self.first:
            return torch.cat([read, first(self.blocks[index](predicted, *args, **kwargs))], 1)
        return self._passed_by(index, torch.cat([first(self.blocks[index](read, *args, **kwargs)), predicted], 1))

    def _finished(self, hidden: Tensor) -> Tensor:
        """What the encoder makes of its last block's output `hidden` (batch, length, hidden), for the decoder to read."""
        with replaced(self._bypassed() | self._ending(self.first - 1, hidden)):
            # Its embedding may be elsewhere than what comes after the blocks, or not be there: nothing comes of it.
            return self._halves[0](input_ids=placeholder_tokens(self.model, hidden.shape[:2]).to(self.device))[0]

    def _call(self, hidden: Tensor) -> list[tuple[tuple, dict]]:
        """What the model passes to each block beside its hidden states; where that is the encoder's output, `_ENCODED`.

        Blocks that pass on to others what depends on the length alone, such as the biases of relative positions, run for it, without
        weights but those that it is computed from.
        """
        shape = tuple(hidden.shape[:2])
        if (shape, hidden.device) not in self._calls:
            with torch.no_grad(), self.loaded_embedding():
                calls = self._calls_for(placeholder_tokens(self.model, shape))
            self._keep_call(hidden, tree_map_only(Tensor, lambda tensor: tensor.to(hidden.device), calls))
        return self._calls[shape, hidden.device]

    def _calls_for(self, tokens: Tensor) -> list[tuple[tuple, dict]]:
        calls: list[tuple[tuple, dict]] = []
        encoded: list[Tensor] = []

        def call(index: int, forward: Callable, hidden: Tensor, *args, **kwargs):
            calls.append((args, kwargs))
            if self._outputs[index] is None or not self._outputs[index].made:
                return self._bypass(index, hidden, *args, **kwargs)
            with self._passing_on(index, hidden.device):
                return forward(hidden, *args, **kwargs)

        hook = self._halves[0].register_forward_hook(lambda module, args, output: encoded.append(output[0]))
        self._preparing = True
        try:
            with replaced({block: partial(call, index, block.forward) for index, block in enumerate(self.blocks)}):
                self.run(tokens)
        finally:
            self._preparing = False
            hook.remove()
        return tree_map(lambda leaf: _ENCODED if leaf is encoded[0] else leaf, calls)

    @contextlib.contextmanager
    def _passing_on(self, index: int, device: torch.device) -> Iterator[None]:
        """Context in which block `index`, wherever it was, is on `device`, with placeholders for all weights but those of `_passed_on`."""
        block, homes = self.blocks[index], []
        named = (
            (f"{self.names[index]}.{name}", tensor) for name, tensor in chain(block.named_parameters(), block.named_buffers())
        )
        for name, tensor in named:
            homes.append((tensor, tensor.data))
            known = name in self._passed_on or not isinstance(tensor, nn.Parameter)
            tensor.data = tensor.data.to(device) if known else placeholder(tensor.shape, tensor.dtype, device)
        try:
            yield
        finally:
            for tensor, home in homes:
                tensor.data = home

    def _calls_of(self, like: Decoder) -> dict:
        return {} if self._passed_on else super()._calls_of(like)

    def _find_passed_on(self, tokens: Tensor, originals: Sequence[int]) -> None:
        """Notes the blocks' parameters, by full name, that what other blocks are called with is computed from."""
        inside = {
            f"{self.names[index]}.{name}": p for index, block in enumerate(self.blocks) for name, p in block.named_parameters()
        }
        self._passed_on = frozenset(inside)
        with torch.enable_grad(), requiring_gradients(inside.values()):
            found = reached(tree_leaves(self._calls_for(tokens)))
        names = [name for name, parameter in inside.items() if parameter in found]  # blocks that are alike pass on alike
        blocks = [(f"{self.names[original]}.", f"{self.names[index]}.") for index, original in enumerate(originals)]
        self._passed_on = frozenset(
            ours + name.removeprefix(theirs) for theirs, ours in blocks for name in names if name.startswith(theirs)
        )
        self._find_finishing(tokens)

    def _find_finishing(self, tokens: Tensor) -> None:
        """Notes the modules, by path, that what the encoder makes of its last block's output is made by."""
        read, ended = _cut(self.embed(tokens))[0], []
        with contextlib.ExitStack() as hooks:
            for path, module in self.model.named_modules():
                hooks.callback(module.register_forward_hook(lambda m, args, output, path=path: ended.append(path)).remove)
            self._finished(read)
        self._finishing = tuple(ended[ended.index(self.names[self.first - 1]) + 1 :])

    def watching(self, window: Window, see: Callable[[tuple[str, ...], Tensor], None]):
        # Not what matrices read while their blocks run to find out what they are called with.
        return super().watching(window, lambda group, x: None if self._preparing else see(group, x))

    def needed(self, window: Window) -> list[Tensor]:
        """As for a causal LM, and what blocks are called with is computed from; the encoder's last needs what comes after it as well."""
        found = super().needed(window) + [self.model.get_parameter(name) for name in sorted(self._passed_on)]
        if self.first - 1 in window.blocks:
            modules = [self.model.get_submodule(path) for path in self._finishing]
            ends = (tensor for m in modules for tensor in chain(m.parameters(recurse=False), m.buffers(recurse=False)))
            found += ends
        return list({id(tensor): tensor for tensor in found}.values())

    def trained(self, window: Window, what: str) -> dict[str, nn.Parameter]:
        return {name: p for name, p in super().trained(window, what).items() if name not in self._passed_on}

    def windows(self, granularity: str) -> list[Window]:
        if canonical(granularity) in ("matrix", "half-block"):
            raise ReconError(
                f"granularity {granularity!r} does not fit {type(self.model).__name__}: an encoder-decoder is repaired by whole blocks; "
                "use block or a larger granularity"
            )
        return super().windows(granularity)


def _cut(sequence: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of a sequence (batch, length, ...) that the encoder and the decoder read."""
    middle = sequence.shape[1] // 2
    return sequence[:, :middle], sequence[:, middle:]
