"""Random numbers as functions of a seed and of what they are for."""

from __future__ import annotations

import hashlib

import torch


def derived_seed(*parts: int | str) -> int:
    """A seed in ``0 .. 2^63 - 1`` out of several numbers or words; other parts, another seed.

    Example:
        >>> derived_seed(0, "order", 1) == derived_seed(0, "order", 2)
        False
    """
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeded_generator(*parts: int | str) -> torch.Generator:
    """A generator of random numbers on the CPU that starts at :func:`derived_seed`."""
    return torch.Generator("cpu").manual_seed(derived_seed(*parts))


def noise(*shape: int) -> torch.Tensor:
    """Normally distributed numbers on the CPU, float32, the same each time: something to try a model on."""
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
