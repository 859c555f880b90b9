"""One random generator per purpose: drawing more numbers for one purpose never changes those of another."""

import hashlib

import torch


def generator(seed: int, *purpose: str) -> torch.Generator:
    """A random generator, seeded by `seed` and its purpose, such as ("shuffle", window name)."""
    digest = hashlib.sha256("\0".join([str(seed), *purpose]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
