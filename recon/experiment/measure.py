"""What is measured of a model: perplexity, divergence from the dense model, zero-shot tasks, drift along the depth."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recon.config import EvaluationConfig
from recon.evaluate import perplexity as evaluation
from recon.evaluate import zero_shot
from recon.evaluate.perplexity import Perplexity, Reference
from recon.experiment.texts import Texts
from recon.kernels.patterns import sparsity_of
from recon.model.decoder import Decoder
from recon.runtime.activations import Activations
from recon.runtime.execution import Execution


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
    """Measures the models of one run. Its methods give plain data, as JSON can hold it, and activations to keep with it.

    streams: where the dense model's residual streams on held-out samples are kept.
    """

    config: EvaluationConfig
    texts: Texts
    tokenizer: PreTrainedTokenizerBase
    dense: Decoder
    streams: Activations

    def of_dense(self, execution: Execution) -> tuple[dict, dict[str, Tensor]]:
        """The dense model's `Measured`, and its last states (windows, length, hidden), which others are compared with, by number
        of the text."""
        found, _ = self.of(self.dense, "dense", {}, execution)
        first = [tokens[: evaluation.KL_WINDOWS] for tokens in self.texts.evaluation.values()]
        states = [evaluation.last_states(self.dense, tokens, execution) for tokens in first]
        return found, {str(number): state for number, state in enumerate(states)}

    def of(self, decoder: Decoder, name: str, states: Mapping[str, Tensor], execution: Execution) -> tuple[dict, dict]:
        """The `Measured` of `decoder`.

        name: of the model, for progress bars. states: of the dense model; see `of_dense`.
        """
        perplexities = {
            text: evaluation.perplexity(
                decoder, tokens, execution=execution, reference=Reference(self.dense, states[str(number)]) if states else None,
                description=f"perplexity ({name}, {text})",
            )
            for number, (text, tokens) in enumerate(self.texts.evaluation.items())
        }  # fmt: skip
        tasks, drift, held_out = {}, [], None
        if self.config.tasks:
            tasks = zero_shot.zero_shot(
                decoder, self.tokenizer, self.config.tasks, self.config.task_limit or None, execution=execution
            )  # fmt: skip
        if self.texts.held_out is not None:
            last = None
            if decoder is not self.dense:
                drift, last = evaluation.drift(
                    decoder, self.dense, self.texts.held_out, execution=execution, activations=self.streams
                )
            held_out = evaluation.perplexity(
                decoder, self.texts.held_out, execution=execution, states=last,
                description=f"perplexity ({name}, held out)",
            ).value  # fmt: skip
        return asdict(Measured(perplexities, tasks, drift, held_out)), {}


def count_zeros(decoder: Decoder) -> tuple[dict, dict]:
    """The share of zeros in all matrices of `decoder`, and in each, counted; plain data, and no activations."""
    zeros, size, shares = 0, 0, {}
    for block in decoder.windows("block"):
        with decoder.loaded(block):
            for name, matrix in decoder.matrices(block).items():
                zeros, size = zeros + int((matrix.weight == 0).sum()), size + matrix.weight.numel()
                shares[name] = sparsity_of(matrix.weight)
    return {"sparsity": zeros / size, "sparsity_by_matrix": shares}, {}
