"""An encoder-decoder as a chain of blocks: the encoder's, then the decoder's."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_map

from recon.model.decoder import Decoder
from recon.model.modules import first, replaced, watched
from recon.model.skeleton import placeholder
from recon.model.windows import Window

_ENCODED = object()  # stands for the encoder's output in a block's arguments


class EncoderDecoder(Decoder):
    """An encoder-decoder whose windows can be run, watched and trained one at a time.

    Each sample is cut in two (see `reading`), and so is the residual stream: an encoder block changes the first half, a decoder
    block the second. Errors and losses are means over all tokens, including the half that a block does not change. Only the
    encoder's first token, not the decoder's, has the special place of `recon.kernels.losses.FIRST`. Windows are whole blocks.
    Parameters that other blocks' arguments are computed from, such as relative position biases, are not trained in any window.
    """

    reading = "the encoder reads the first half of each sample, and the decoder predicts the second"
    _observing = False  # while blocks run only to compute the arguments of other blocks

    def run(self, tokens: Tensor):
        read, predicted = _cut(tokens.to(self.device))
        return self.model(input_ids=read, decoder_input_ids=predicted, use_cache=False)

    def predicted(self, sequence: Tensor) -> Tensor:
        """The part of tokens, or of a residual stream, (batch, length, ...) that the decoder reads: the second half."""
        return _cut(sequence)[1]

    def run_block(self, index: int, hidden: Tensor, silenced: Mapping[str, Callable] = {}) -> Tensor:
        read, predicted = _cut(hidden)
        args, kwargs = tree_map(lambda leaf: read if leaf is _ENCODED else leaf, self.call(hidden)[index])
        if index >= self.starts[1]:
            return torch.cat([read, first(self.blocks[index](predicted, *args, **kwargs))], 1)
        return self.skip_block(index, torch.cat([first(self.blocks[index](read, *args, **kwargs)), predicted], 1))

    def skip_block(self, index: int, hidden: Tensor) -> Tensor:
        if index != self.starts[1] - 1:
            return hidden
        read, predicted = _cut(hidden)
        with replaced(self.bypassed(index, read)):
            # `inputs_embeds`: so the embedding, which may be on another device, or a placeholder, is not used.
            return torch.cat([self.model.get_encoder()(inputs_embeds=read)[0], predicted], 1)

    def observe_calls(self, tokens: Tensor) -> list[tuple[tuple, dict]]:
        """As in a causal LM, but `_ENCODED` replaces the encoder's output."""
        encoded: list[Tensor] = []
        away = [(tensor, tensor.data) for tensor in self._around_encoder() if tensor.device != self.device]
        self._observing = True
        try:
            for tensor, data in away:  # such as one that is on the compute device with the encoder's last block
                tensor.data = data.to(self.device)
            with watched({"": self.model.get_encoder()}, after=lambda name, args, kwargs, output: encoded.append(output[0])):
                calls = self.observe(tokens, len(self.blocks) - 1, self._stand_in)
        finally:
            self._observing = False
            for tensor, data in away:
                tensor.data = data
        return tree_map(lambda leaf: _ENCODED if leaf is encoded[0] else leaf, [(args, kwargs) for _, args, kwargs in calls])

    def _stand_in(self, index: int, forward: Callable, hidden: Tensor, *args, **kwargs):
        """Runs a block that computes arguments of other blocks, unneeded parameters as placeholders; bypasses others."""
        block, path, shared = self.blocks[index], self.names[index], self.structure.shared
        if not any(isinstance(value, Tensor) for _, value in self.structure.blocks[index].beside or ()):
            return self.bypass(index, hidden, *args, **kwargs)
        tensors = {name: each.to(hidden.device) for name, each in (*block.named_parameters(), *block.named_buffers())}
        for name, parameter in block.named_parameters():
            if shared is not None and f"{path}.{name}" not in shared:
                tensors[name] = placeholder(parameter.shape, parameter.dtype, hidden.device)
        with replaced({block: forward}):
            return functional_call(block, tensors, (hidden, *args), kwargs)

    def watching(self, window: Window, see: Callable[[tuple[str, ...], Tensor], None]):
        """As in a causal LM, except while blocks run only to compute the arguments of other blocks."""
        return super().watching(window, lambda group, x: None if self._observing else see(group, x))

    def needed(self, window: Window) -> list[Tensor]:
        """As in a causal LM, plus what blocks share and, with the encoder's last block, what comes after it in the encoder."""
        tensors = super().needed(window) + [self.model.get_parameter(name) for name in sorted(self.structure.shared)]
        if self.starts[1] - 1 in window.blocks:
            tensors += self._around_encoder()
        return list(dict.fromkeys(tensors))

    def _around_encoder(self) -> list[Tensor]:
        """What the encoder holds besides its blocks and the token embedding, such as its last norm."""
        modules = self.model.get_encoder(), self.blocks, self.model.get_input_embeddings()
        inside, blocks, tokens = ([*module.parameters(), *module.buffers()] for module in modules)
        others = {*blocks, *tokens}
        return [tensor for tensor in inside if tensor not in others]


def _cut(sequence: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of a sequence (batch, length, ...): what the encoder reads, and what the decoder reads."""
    middle = sequence.shape[1] // 2
    return sequence[:, :middle], sequence[:, middle:]
