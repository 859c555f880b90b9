"""What `recon bench` is asked for."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from recon.errors import ReconError

SECTIONS = {  # functions of `recon.paper.bench.sections` -> what they measure
    "products": "the machine's speed at large squares and at the very products of our pruning and reconstruction; the share reached",
    "phases": "the seconds of each phase, a straightforward way beside ours, and how many times the least that products take; in turn on a shortened model",
    "profile": "time by kind of operation, of both ways on a shortened model",
    "growth": "time and memory against samples, sequence length, depth and width, of both ways",
    "quality": "perplexity against time to prune and reconstruct the whole model, of both ways and of ours with less",
    "sweep": "a study of 2 criteria x 6 granularities or solvers, against its runs done singly",
    "workers": "a study, and the windows of one model, one after the other and by Ray workers of one thread",
    "compile": "a block's forward and backward passes through torch.compile (needs a C++ compiler)",
    "large": "half-blocks of a random model of the shape of Llama-3-8B on a GPU",
}
DEFAULT = tuple(name for name in SECTIONS if name not in ("workers", "compile", "large"))
_HELP = "What to measure. " + "; ".join(f"{name}: {measured}" for name, measured in SECTIONS.items())


@dataclass(frozen=True)
class BenchSpec:
    """What is measured, and on how much."""

    output: Path = Path("build/bench.json")
    """File for the results (JSON); what it holds already is not measured again."""
    redo: bool = False
    """Measure again what the file holds."""
    sections: Annotated[tuple[str, ...], tyro.conf.arg(help=_HELP)] = DEFAULT
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
    """Blocks of the shortened model that phases are timed on in turn."""
    repeats: int = 3
    """Rounds of timing in turn on the shortened model; seeds of the study that workers are timed on."""
    large_samples: int = 128
    """Samples for the section large."""
    large_length: int = 2048
    """Tokens per sample for the section large."""
    large_blocks: int = 32
    """Blocks of the model for the section large."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def __post_init__(self):
        if unknown := sorted(set(self.sections) - set(SECTIONS)):
            raise ReconError(f"unknown section {unknown[0]!r}; allowed: {', '.join(SECTIONS)}")
        for field in fields(self):
            if field.type is int and getattr(self, field.name) < 1:
                raise ReconError(f"{field.name} is {getattr(self, field.name)}; allowed: a whole number from 1 up")
