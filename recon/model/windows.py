"""Granularities by name, and the windows that they divide a model into."""

import re
from dataclasses import dataclass
from itertools import pairwise

from recon.errors import ReconError

NAMED = ("none", "matrix", "half-block", "block", "quarter", "model")


@dataclass(frozen=True)
class Window:
    """The parameters that are adapted together: a run of blocks, one half of a block, or matrices that share an input.

    Matrices that share an input (q, k and v; gate and up) make one window. Its output is their outputs, concatenated. Under the
    squared error each is fitted as if it were alone: the loss is a sum over matrices, and AdamW updates weights independently.
    """

    blocks: range
    half: str | None = None  # "attention" | "mlp"
    matrices: tuple[str, ...] = ()  # full module names
    parallel: bool = False  # both halves of the block read the block's input
    ends_block: bool = True  # the next window starts in the next block

    @property
    def name(self) -> str:
        """Name in reports and files: the blocks and the half, or the matrices."""
        if self.matrices:
            return "+".join(self.matrices)
        numbers = str(self.blocks[0]) if len(self.blocks) == 1 else f"{self.blocks[0]}-{self.blocks[-1]}"
        return f"block {numbers}" + (f" {self.half}" if self.half else "")

    @property
    def chained(self) -> bool:
        """Whether this window's output is the next one's input."""
        return not self.matrices and not self.parallel

    @property
    def mixes_tokens(self) -> bool:
        """Whether a token's output depends on other tokens, as attention's does."""
        return not self.matrices and self.half != "mlp"

    @property
    def halves(self) -> int:
        """How many halves of blocks are adapted together: 1 for a half or for matrices, 2 for each block."""
        return 1 if self.half or self.matrices else 2 * len(self.blocks)


def canonical(granularity: str) -> str:
    """The name of a granularity given in any spelling, such as the paper's 1/2, 1, 2. Raises `ReconError` if it is unknown."""
    name = {"1/2": "half-block", "1": "block", "1-block": "block", "1-blocks": "block"}.get(granularity, granularity)
    if name in NAMED:
        return name
    if counted := re.fullmatch(r"([1-9]\d*)(-blocks)?", name):
        return f"{counted[1]}-blocks"
    raise ReconError(f"granularity is {granularity!r}; allowed: {', '.join(NAMED)}, <k>-blocks (such as 2-blocks)")


def partition(granularity: str, blocks: int) -> list[range]:
    """Divides `blocks` blocks into runs, by a `canonical` granularity of whole blocks; quarters are as even as possible."""
    if granularity == "none":
        raise ReconError("granularity none has no windows")
    if granularity == "quarter":
        return [range(a, b) for a, b in pairwise(round(blocks * i / 4) for i in range(5)) if b > a]
    size = {"block": 1, "model": blocks}.get(granularity) or int(granularity.removesuffix("-blocks"))
    if size > blocks:
        raise ReconError(f"granularity {granularity} asks for windows of {size} blocks, but the model has {blocks}")
    return [range(start, min(start + size, blocks)) for start in range(0, blocks, size)]
