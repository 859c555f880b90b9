"""The tokens that a run reads."""

import hashlib
from dataclasses import dataclass

from torch import Tensor

from recon.data.text import sample_tokens
from recon.runtime.seeds import generator
from recon.study.spec import RunSpec


@dataclass(frozen=True)
class Texts:
    """The tokens that a run reads, each (samples, length).

    calibration: one random draw; every phase reads the first so many of it.
    held_out: of the validation split, for errors; None where none are asked for.
    evaluation: by name of the text.
    """

    calibration: Tensor
    held_out: Tensor | None
    evaluation: dict[str, Tensor]

    @classmethod
    def draw(cls, spec: RunSpec, tokenizer) -> "Texts":
        """The texts of `spec`. Raises `ReconError` for a text that is unknown, cannot be had, or is too short."""
        calibration, evaluation = spec.calibration, spec.evaluation
        name, length, held_out = calibration.text, calibration.sequence_length, None
        seed = generator(spec.seed, "calibration").initial_seed() % 2**32
        drawn = sample_tokens(name, "calibration", tokenizer, max(spec.samples_by_phase.values()), length, seed)
        if calibration.held_out_samples:
            held_out = sample_tokens(name, "validation", tokenizer, calibration.held_out_samples, length)
        return cls(
            drawn,
            held_out,
            {
                name: sample_tokens(
                    name, "evaluation", tokenizer, windows, evaluation.evaluation_length, protocol=evaluation.evaluation_protocol
                )
                for name, windows in evaluation.windows.items()
            },
        )

    def hashes(self) -> dict[str, str]:
        """Hashes of what is read, by which runs on the same tokens are known."""
        read = {"calibration": self.calibration, **{f"evaluation {name}": tokens for name, tokens in self.evaluation.items()}}
        return {name: digest(tokens) for name, tokens in read.items()}


def digest(tokens: Tensor) -> str:
    """Hash of `tokens`."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
