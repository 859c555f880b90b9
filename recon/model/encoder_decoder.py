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

_ENCODED = object()  # stands for the encoder's output among a block's arguments


class EncoderDecoder(Decoder):
    """An encoder-decoder whose windows can be run, watched and trained one at a time.

    Each sample is cut in two, see `reading`, and so is the residual stream: an encoder block changes its first half, a decoder
    block its second. Errors and losses are means over all tokens, and so include the half that a block does not change; of first
    tokens, the encoder's alone is left out. Windows are made of whole blocks.
    Parameters that other blocks' arguments are computed from, such as biases of relative positions, are in no window.
    """

    reading = "the encoder reads the first half of each sample, and the decoder predicts the second"
    _observing = False  # while blocks run for the arguments of others

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
            # Its embedding, which may be on another device than its last norm, or a placeholder, is not asked.
            return torch.cat([self.model.get_encoder()(inputs_embeds=read)[0], predicted], 1)

    def observe_calls(self, tokens: Tensor) -> list[tuple[tuple, dict]]:
        """As in a causal LM; the encoder's output is replaced by `_ENCODED`."""
        encoded: list[Tensor] = []
        away = [(tensor, tensor.data) for tensor in self._around_encoder() if tensor.device != self.device]
        self._observing = True
        try:
            for tensor, data in away:  # such as on the compute device with the encoder's last block
                tensor.data = data.to(self.device)
            with watched({"": self.model.get_encoder()}, after=lambda name, args, kwargs, output: encoded.append(output[0])):
                calls = self.observe(tokens, len(self.blocks) - 1, self._stand_in)
        finally:
            self._observing = False
            for tensor, data in away:
                tensor.data = data
        return tree_map(lambda leaf: _ENCODED if leaf is encoded[0] else leaf, [(args, kwargs) for _, args, kwargs in calls])

    def _stand_in(self, index: int, forward: Callable, hidden: Tensor, *args, **kwargs):
        """Runs a block that computes arguments of others, with placeholders for what they do not take; by-passes any other."""
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
        """As in a causal LM; not while blocks run for the arguments of others."""
        return super().watching(window, lambda group, x: None if self._observing else see(group, x))

    def needed(self, window: Window) -> list[Tensor]:
        """As in a causal LM, and what blocks share; for the encoder's last block, also what comes after it in the encoder."""
        tensors = super().needed(window) + [self.model.get_parameter(name) for name in sorted(self.structure.shared)]
        if self.starts[1] - 1 in window.blocks:
            tensors += self._around_encoder()
        return list(dict.fromkeys(tensors))

    def _around_encoder(self) -> list[Tensor]:
        """What the encoder holds beside blocks and the embedding of tokens, such as its last norm."""
        modules = self.model.get_encoder(), self.blocks, self.model.get_input_embeddings()
        inside, blocks, tokens = ([*module.parameters(), *module.buffers()] for module in modules)
        others = {*blocks, *tokens}
        return [tensor for tensor in inside if tensor not in others]


def _cut(sequence: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of a sequence (batch, length, ...) that the encoder and the decoder read."""
    middle = sequence.shape[1] // 2
    return sequence[:, :middle], sequence[:, middle:]
