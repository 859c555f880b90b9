"""An encoder-decoder as a chain of blocks: those of the encoder, then those of the decoder."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from recon.decoder import Decoder, Stop
from recon.errors import ReconError
from recon.structure import find_blocks, first, placeholder_tokens, probe_tokens, replaced
from recon.windows import Window, canonical

_ENCODED = object()  # stands for the encoder's output among what a block is called with


class EncoderDecoder(Decoder):
    """The blocks of an encoder-decoder, callable one window at a time.

    A sample is cut in two: the encoder reads its first half, and the decoder, which reads the encoder's output as well, the second,
    which it predicts. So is the residual stream (batch, length, hidden) throughout: an encoder block changes its first half, a
    decoder block its second. Hence errors and losses, means over all tokens, count the half that a block leaves alone as well.

    Windows are made of whole blocks.
    """

    reading = "the encoder reads the first half of each sample, and the decoder predicts the second"
    _preparing = False

    def _find_stacks(self) -> list[str]:
        if self.lazy:
            raise ReconError(f"{type(self.model).__name__} is an encoder-decoder, whose weights have to be in memory")
        probe = probe_tokens(self.model)
        return [find_blocks(self.model, lambda: self.run(probe), self._path_of(half)) for half in self._halves]

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
            return self._bypass(index, hidden)

        ends = {self.blocks[index]: partial(catch, index) for index in (0, self.first)}
        with replaced(self._bypassed() | ends):
            try:
                self.run(tokens)
            except Stop:
                pass
        return torch.cat(caught, 1)

    @torch.no_grad()
    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """What the model makes of `hidden` (batch, length, hidden), the last block's output for the decoder's `tokens`."""
        last = len(self.blocks) - 1
        stubs = self._bypassed() | {self.blocks[last]: lambda *a, **k: self._bypass(last, hidden)}
        with replaced(stubs):
            return self.model(input_ids=tokens[:, :1], decoder_input_ids=tokens, use_cache=False).logits

    def _bypassed(self) -> dict:
        return {block: partial(self._bypass, index) for index, block in enumerate(self.blocks)}

    def _run_block(self, index: int, hidden: Tensor, half: str | None = None) -> Tensor:
        read, predicted = _cut(hidden)
        args, kwargs = tree_map(lambda leaf: read if leaf is _ENCODED else leaf, self._call(hidden)[index])
        if index >= self.first:
            return torch.cat([read, first(self.blocks[index](predicted, *args, **kwargs))], 1)
        read = first(self.blocks[index](read, *args, **kwargs))
        return torch.cat([self._finished(read) if index == self.first - 1 else read, predicted], 1)

    def _finished(self, hidden: Tensor) -> Tensor:
        """What the encoder makes of its last block's output `hidden` (batch, length, hidden), for the decoder to read."""
        last = self.first - 1
        stubs = self._bypassed() | {self.blocks[last]: lambda *a, **k: self._bypass(last, hidden)}
        with replaced(stubs):
            return self._halves[0](input_ids=placeholder_tokens(self.model, hidden.shape[:2]).to(hidden.device))[0]

    def _call(self, hidden: Tensor) -> list[tuple[tuple, dict]]:
        """What the model passes to each block beside its hidden states; where that is the encoder's output, `_ENCODED`.

        The blocks run: some pass on to the next what depends on the length alone, such as the biases of relative positions.
        """
        shape = tuple(hidden.shape[:2])
        if (shape, hidden.device) not in self._calls:
            calls: list[tuple[tuple, dict]] = []
            encoded: list[Tensor] = []
            hooks = [self._halves[0].register_forward_hook(lambda module, args, output: encoded.append(output[0]))]
            for block in self.blocks:
                see = block.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args[1:], kwargs)), with_kwargs=True)
                hooks.append(see)
            self._preparing = True
            try:
                with torch.no_grad():
                    self.run(placeholder_tokens(self.model, shape))
            finally:
                self._preparing = False
                for hook in hooks:
                    hook.remove()

            def kept(leaf):
                if isinstance(leaf, Tensor):
                    return _ENCODED if leaf is encoded[0] else leaf.to(hidden.device)
                return leaf

            self._keep_call(hidden, tree_map(kept, calls))
        return self._calls[shape, hidden.device]

    def watching(self, window: Window, see: Callable[[tuple[str, ...], Tensor], None]):
        # Not what matrices read while their blocks run to find out what they are called with.
        return super().watching(window, lambda group, x: None if self._preparing else see(group, x))

    def needed(self, window: Window) -> list[Tensor]:
        """As for a causal LM; the encoder's last block needs what comes after it as well."""
        found = super().needed(window)
        if self.first - 1 in window.blocks:
            known = {id(tensor) for block in self.blocks for tensor in (*block.parameters(), *block.buffers())}
            encoder = self._halves[0]
            found += [tensor for tensor in (*encoder.parameters(), *encoder.buffers()) if id(tensor) not in known]
        return found

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
