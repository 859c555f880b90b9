"""Random: chance decides.

    S_ij ~ Uniform(0, 1)

The floor that every other criterion has to beat.
"""

import torch
from torch import Tensor

from recon.errors import ReconError


def score(weight: Tensor, statistics: None, generator: torch.Generator | None) -> Tensor:
    """Scores (out, in) for `weight` (out, in). Drawn on the generator's device: the weight's does not matter.

    Raises `ReconError` without a generator: the mask could not be made again.
    """
    if generator is None:
        raise ReconError("criterion 'random' was given no generator; pass a seeded torch.Generator")
    return torch.rand(weight.shape, generator=generator, device=generator.device).to(weight.device)
