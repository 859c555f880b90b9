"""What is measured of a model: perplexity, divergence from the dense model, zero-shot tasks, drift along the depth."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recon.config import EvaluationConfig
from recon.evaluate import perplexity as evaluation
from recon.evaluate import zero_shot
from recon.evaluate.perplexity import Perplexity, Reference
from recon.kernels.patterns import sparsity_of
from recon.model.decoder import Decoder
from recon.runtime.execution import Execution
from recon.study.texts import Texts


@dataclass(frozen=True)
class Measured:
    """How good a model is.

    perplexities: by text. zero_shot: as `recon.evaluate.zero_shot.zero_shot` gives it. held_out: perplexity on held-out samples.
    drift: share of the variance of the dense residual stream after each block that is unexplained; empty for the dense model.
    """

    perplexities: dict[str, Perplexity]
    zero_shot: dict
    drift: list[float]
    held_out: float | None

    @classmethod
    def of(cls, found: dict) -> "Measured":
        """From plain data, as `asdict` gives it."""
        perplexities = {name: Perplexity(**values) for name, values in found["perplexities"].items()}
        return cls(**(found | {"perplexities": perplexities}))


@dataclass(frozen=True)
class Measurement:
    """Measures the models of one run. Its methods give plain data, as JSON can hold it, and activations to keep with it."""

    config: EvaluationConfig
    texts: Texts
    tokenizer: PreTrainedTokenizerBase
    dense: Decoder

    def of_dense(self, execution: Execution) -> tuple[dict, dict[str, Tensor]]:
        """The dense model's `Measured`, and its last states (windows, length, hidden), which others are compared with, by number
        of the text."""
        perplexities, states = {}, {}
        for number, (text, tokens) in enumerate(self.texts.evaluation.items()):
            perplexities[text], last = evaluation.perplexity_and_states(
                self.dense, tokens, execution=execution, description=f"perplexity (dense, {text})"
            )
            first = last[: self.config.kl_windows]
            states[str(number)] = execution.empty(first.shape, first.dtype, first.device).copy_(first)  # the others go
        last = None
        if self.texts.held_out is not None:
            last = evaluation.last_states(self.dense, self.texts.held_out, execution)
        return self._of(self.dense, "dense", perplexities, [], last, execution), states

    def of(self, decoder: Decoder, name: str, states: Mapping[str, Tensor], execution: Execution) -> tuple[dict, dict]:
        """The `Measured` of `decoder`.

        name: of the model, for progress bars. states: of the dense model; see `of_dense`.
        """
        perplexities = {
            text: evaluation.perplexity(
                decoder, tokens, execution=execution, reference=Reference(self.dense, states[str(number)]),
                description=f"perplexity ({name}, {text})",
            )
            for number, (text, tokens) in enumerate(self.texts.evaluation.items())
        }  # fmt: skip
        drift, last = [], None
        if self.texts.held_out is not None:
            drift, last = evaluation.drift(decoder, self.dense, self.texts.held_out, execution=execution)
        return self._of(decoder, name, perplexities, drift, last, execution), {}

    def _of(
        self, decoder: Decoder, name: str, perplexities: dict, drift: list, last: Tensor | None, execution: Execution
    ) -> dict:
        """`Measured` as plain data, with tasks and the perplexity on held-out samples, where there are any."""
        tasks, held_out = {}, None
        if self.config.tasks:
            limit = self.config.task_limit or None
            tasks = zero_shot.zero_shot(decoder, self.tokenizer, self.config.tasks, limit, execution=execution)
        if self.texts.held_out is not None:
            held_out = evaluation.perplexity(
                decoder, self.texts.held_out, execution=execution, states=last, description=f"perplexity ({name}, held out)"
            ).value
        return asdict(Measured(perplexities, tasks, drift, held_out))


def count_zeros(decoder: Decoder) -> tuple[dict, dict]:
    """The share of zeros in all matrices of `decoder`, and in each, counted; plain data, and no activations."""
    zeros, size, shares = 0, 0, {}
    for block in decoder.windows("block"):
        with decoder.loaded(block):
            for name, matrix in decoder.matrices(block).items():
                zeros, size = zeros + int((matrix.weight == 0).sum()), size + matrix.weight.numel()
                shares[name] = sparsity_of(matrix.weight)
    return {"sparsity": zeros / size, "sparsity_by_matrix": shares}, {}
