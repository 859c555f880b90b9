"""A decoder as a language model of lm-eval. Import it only where lm-eval is installed."""

import copy
from collections import defaultdict
from types import SimpleNamespace

from lm_eval.models.huggingface import HFLM
from torch import Tensor

from recon.data.text import beginning
from recon.evaluate.perplexity import last_states
from recon.model.decoder import Decoder
from recon.model.skeleton import max_length
from recon.runtime.execution import Execution

ELEMENTS = {"cpu": 2**27}  # logits in memory at once, by kind of device; lm-eval computes as many log-probabilities from them


class BlockByBlock:
    """Stands in for a transformers model in lm-eval. It runs one block at a time, so weights may be in host memory or on disk."""

    def __init__(self, decoder: Decoder, execution: Execution):
        self.decoder, self.execution = decoder, execution
        self.device, self.config = execution.device, decoder.model.config

    def __call__(self, tokens: Tensor) -> SimpleNamespace:
        """`logits` (batch, length, vocabulary) for `tokens` (batch, length), in the precision of the parameters."""
        states = last_states(self.decoder, tokens, self.execution)
        with Execution(self.device, "float32").holding_ends(self.decoder):
            return SimpleNamespace(logits=self.decoder.logits(tokens, states))


class Scorer(HFLM):
    """lm-eval's scorer of log-likelihoods, with batches as large as the limit on logits (`ELEMENTS`) allows.

    Contexts begin as samples do, with the tokens of `recon.data.text.beginning`; none are added after them. Each batch copies
    all weights to the compute device once, so batches should be large.
    """

    def __init__(self, decoder: Decoder, tokenizer, execution: Execution):
        tokenizer = copy.deepcopy(tokenizer)  # lm-eval gives it a padding token
        self.beginning, model = beginning(tokenizer), BlockByBlock(decoder, execution)
        super().__init__(model, backend="causal", tokenizer=tokenizer, max_length=max_length(decoder.model.config))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options) -> list[int]:
        front = [] if add_special_tokens is False else self.beginning
        return front + super().tok_encode(string, add_special_tokens=False, **options)

    def _loglikelihood_tokens(self, requests, **options):
        groups = defaultdict(list)  # requests by length: at most 1, 2, 4, ... tokens
        for number, (_, context, continuation) in enumerate(requests):
            groups[1 << (len(context) + len(continuation) - 1).bit_length()].append(number)
        room = ELEMENTS.get(self.device.type, 2**29) // self.config.get_text_config().vocab_size
        answers = {}
        for length, numbers in groups.items():
            self.batch_size_per_gpu = max(1, room // length)
            found = super()._loglikelihood_tokens([requests[number] for number in numbers], **options)
            answers |= zip(numbers, found, strict=True)
        return [answers[number] for number in range(len(requests))]
