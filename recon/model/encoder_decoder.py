"""An encoder-decoder as a chain of blocks: the encoder's, then the decoder's."""

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from recon.errors import ReconError
from recon.model.decoder import Decoder
from recon.model.modules import first, placeholder_tokens, replaced, requiring_gradients, sources
from recon.model.skeleton import placeholder
from recon.model.windows import Window, canonical

_ENCODED = object()  # stands for the encoder's output among a block's arguments


class EncoderDecoder(Decoder):
    """An encoder-decoder whose windows can be run, watched and trained one at a time.

    Each sample is cut in two: the encoder reads its first half, and the decoder predicts the second, given the first. The residual
    stream (batch, length, hidden) is divided in the same way: an encoder block changes its first half, a decoder block its second.
    Errors and losses are means over all tokens, and so include the half that a block does not change.

    Windows are made of whole blocks. Parameters that other blocks' arguments are computed from, such as biases of relative
    positions, belong to no window and are not trained.
    """

    reading = "the encoder reads the first half of each sample, and the decoder predicts the second"
    divisible = False
    _observing = False  # while blocks run for the arguments of others

    @property
    def stack_owners(self) -> tuple[str, str]:
        paths = {module: name for name, module in self.model.named_modules()}
        return paths[self.model.get_encoder()], paths[self.model.get_decoder()]

    def run(self, tokens: Tensor):
        read, predicted = _cut(tokens.to(self.device))
        with self.experts_apart():
            return self.model(input_ids=read, decoder_input_ids=predicted, use_cache=False)

    def run_head(self, tokens: Tensor):
        with self.experts_apart():
            return self.model(input_ids=tokens[:, :1], decoder_input_ids=tokens, use_cache=False)

    def predicted(self, sequence: Tensor) -> Tensor:
        """The part of tokens, or of a residual stream, (batch, length, ...) that the decoder reads: the second half."""
        return _cut(sequence)[1]

    def run_block(self, index: int, hidden: Tensor, silenced: Mapping[str, Callable] = {}) -> Tensor:
        read, predicted = _cut(hidden)
        args, kwargs = tree_map(lambda leaf: read if leaf is _ENCODED else leaf, self.call(hidden)[index])
        with self.experts_apart():
            if index >= self.starts[1]:
                return torch.cat([read, first(self.blocks[index](predicted, *args, **kwargs))], 1)
            return self.skip_block(index, torch.cat([first(self.blocks[index](read, *args, **kwargs)), predicted], 1))

    def skip_block(self, index: int, hidden: Tensor) -> Tensor:
        read, predicted = _cut(hidden)
        return torch.cat([self._finished(read), predicted], 1) if index == self.starts[1] - 1 else hidden

    def _finished(self, hidden: Tensor) -> Tensor:
        """The encoder's output where its last block returns `hidden`, both (batch, length, hidden)."""
        with replaced(self.bypassed(self.starts[1] - 1, hidden)):
            # Its embedding may be on another device than its last norm, or be a placeholder: what it gives is not used.
            return self.model.get_encoder()(input_ids=placeholder_tokens(self.model, hidden.shape[:2]).to(self.device))[0]

    # --- what blocks are called with ------------------------------------------------------------------------------

    def observe_calls(self, tokens: Tensor) -> list[tuple[tuple, dict]]:
        """As in a causal LM; the encoder's output is replaced by `_ENCODED`."""
        return self._observe(tokens, self.shared)

    def _observe(self, tokens: Tensor, shared: Collection[str]) -> list[tuple[tuple, dict]]:
        encoded: list[Tensor] = []
        hook = self.model.get_encoder().register_forward_hook(lambda module, args, output: encoded.append(output[0]))
        self._observing = True
        try:
            calls = super().observe_calls(tokens, partial(self._stand_in, shared))
        finally:
            self._observing = False
            hook.remove()
        return tree_map(lambda leaf: _ENCODED if leaf is encoded[0] else leaf, calls)

    def _stand_in(self, shared: Collection[str], index: int, forward: Callable, hidden: Tensor, *args, **kwargs):
        """Runs a block that computes arguments of others, such as biases of relative positions, and by-passes any other.

        Weights are placeholders, except those called `shared`.
        """
        output, block, homes = self.structure.blocks[index].output, self.blocks[index], []
        if output is None or not output.made:
            return self.bypass(index, hidden, *args, **kwargs)
        try:
            for name, tensor in chain(block.named_parameters(), block.named_buffers()):
                homes.append((tensor, tensor.data))
                known = f"{self.names[index]}.{name}" in shared or not isinstance(tensor, nn.Parameter)
                tensor.data = tensor.data.to(hidden.device) if known else placeholder(tensor.shape, tensor.dtype, hidden.device)
            return forward(hidden, *args, **kwargs)
        finally:
            for tensor, home in homes:
                tensor.data = home

    @functools.cached_property
    def shared(self) -> frozenset[str]:
        """Full names of the blocks' parameters that other blocks' arguments are computed from."""
        blocks = zip(self.names, self.blocks, strict=True)
        inside = {f"{path}.{name}": p for path, block in blocks for name, p in block.named_parameters()}
        with torch.enable_grad(), self.loaded_embedding(), requiring_gradients(inside.values()):
            found = sources(tree_leaves(self._observe(placeholder_tokens(self.model, (1, 2)), ())))
        return frozenset(name for name, parameter in inside.items() if parameter in found)

    def watching(self, window: Window, see: Callable[[tuple[str, ...], Tensor], None]):
        """As in a causal LM; not while blocks run for the arguments of others."""
        return super().watching(window, lambda group, x: None if self._observing else see(group, x))

    # --- what is in a window --------------------------------------------------------------------------------------

    def needed(self, window: Window) -> list[Tensor]:
        """As in a causal LM, with shared parameters; for the encoder's last block, with everything before the encoder's output."""
        found = super().needed(window) + [self.model.get_parameter(name) for name in sorted(self.shared)]
        if self.starts[1] - 1 in window.blocks:
            found += (tensor for m in self._finishing for tensor in chain(m.parameters(recurse=False), m.buffers(recurse=False)))
        return list({id(tensor): tensor for tensor in found}.values())

    @functools.cached_property
    def _finishing(self) -> list[nn.Module]:
        """The modules that run after the encoder's last block."""
        ended: list[nn.Module] = []
        encoder, tokens = self.model.get_encoder(), placeholder_tokens(self.model, (1, 2)).to(self.device)
        with contextlib.ExitStack() as hooks, replaced(self.bypassed()), torch.no_grad():
            for module in encoder.modules():
                hooks.callback(module.register_forward_hook(lambda m, args, output: ended.append(m)).remove)
            encoder(input_ids=tokens)
        return ended[ended.index(self.blocks[self.starts[1] - 1]) + 1 :]

    def trained(self, window: Window, what: str) -> dict[str, nn.Parameter]:
        return {name: p for name, p in super().trained(window, what).items() if name not in self.shared}

    def windows(self, granularity: str) -> list[Window]:
        if canonical(granularity) in ("matrix", "half-block"):
            raise ReconError(
                f"granularity {granularity!r} does not fit {type(self.model).__name__}: an encoder-decoder is reconstructed by whole "
                "blocks; use block or a larger granularity"
            )
        return super().windows(granularity)


def _cut(sequence: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of a sequence (batch, length, ...) that the encoder and the decoder read."""
    middle = sequence.shape[1] // 2
    return sequence[:, :middle], sequence[:, middle:]
