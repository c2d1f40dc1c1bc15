"""The table that matters: the package alone beside the floor of this card. Its peers come later (heads.py)."""

from __future__ import annotations

from collections.abc import Iterator

from gpu_proof import heads, limits, trainings
from gpu_proof.parts import Part

MODES = ("forward", "backward")


def parts(device: str, small: bool) -> Iterator[Part]:
    """Copy bandwidth and launches, the heads in graphs, an epoch of training, then the card's other limits."""
    yield from limits.memory_and_launches(device, small)
    sizes = heads.TINY if small else heads.LARGEST
    yield from heads.parts(device, sizes=sizes, modes=MODES, providers=heads.OWN, eager=False)
    yield from trainings.epoch_parts(device, small)
    yield from limits.rates(device, small)
