"""One random generator per purpose, so that drawing more for one never changes another."""

import hashlib

import torch


def generator(seed: int, *purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` that depends on `seed` and on what it is for, such as ("shuffle", window name)."""
    digest = hashlib.sha256("\0".join([str(seed), *purpose]).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))
