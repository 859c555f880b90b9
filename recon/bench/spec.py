"""What `recon bench` is asked for."""

from dataclasses import dataclass
from pathlib import Path

from recon.errors import ReconError

SECTIONS = ("products", "loops", "profile", "growth", "prune", "quality", "sweep")


@dataclass(frozen=True)
class BenchSpec:
    """What is measured, and on how much."""

    output: Path = Path("build/bench.json")
    """File for the results (JSON); sections measured before are kept."""
    sections: tuple[str, ...] = SECTIONS
    """What to measure."""
    model: str = "smollm2-135m"
    """A bundled name, a local folder, or a Hub id."""
    text: str = "wikipedia"
    """Calibration and evaluation text."""
    samples: int = 64
    """Calibration samples."""
    sequence_length: int = 512
    """Tokens per calibration sample."""
    pattern: str = "0.5"
    """Sparsity, or N:M."""
    evaluation_samples: int = 40
    """Windows that perplexity is measured on."""
    evaluation_length: int = 1024
    """Tokens per evaluation window."""
    blocks: int = 4
    """Blocks of the shortened model that loops are timed on in turn."""
    repeats: int = 3
    """Rounds of timing in turn on the shortened model."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def __post_init__(self):
        if unknown := sorted(set(self.sections) - set(SECTIONS)):
            raise ReconError(f"unknown section {unknown[0]!r}; allowed: {', '.join(SECTIONS)}")
        for name in ("samples", "sequence_length", "evaluation_samples", "evaluation_length", "blocks", "repeats"):
            if getattr(self, name) < 1:
                raise ReconError(f"{name} is {getattr(self, name)}; allowed: a whole number from 1 up")
