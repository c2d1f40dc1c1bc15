"""Random numbers as functions of a seed and of what they are for."""

from __future__ import annotations

import hashlib

import torch


def seeded_generator(*key: int) -> torch.Generator:
    """A generator of random numbers on the CPU whose start is a function of all numbers of ``key``."""
    digest = hashlib.sha256(" ".join(str(number) for number in key).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def derived_seed(*parts: int | str) -> int:
    """A seed in ``0 .. 2^63 - 1`` out of several numbers or texts; other parts, another seed.

    Example:
        >>> derived_seed(0, "order", 1) == derived_seed(0, "order", 2)
        False
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def noise(*shape: int) -> torch.Tensor:
    """Normally distributed numbers on the CPU, float32, the same each time: something to try a model on."""
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
