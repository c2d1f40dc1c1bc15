"""Seeds out of numbers and words: the same for good, since results that are kept were drawn by them."""

from __future__ import annotations

import torch

from alphaext.data.loading import image_seed
from alphaext.utils.seeds import derived_seed, seeded_generator


def test_the_same_for_good():
    assert (derived_seed(3), derived_seed(0, 17)) == (2811266800713428421, 2555867988732213553)


def test_one_derivation():
    assert image_seed(3, 1, 5) == derived_seed(3, 1, 5)
    drawn = torch.rand(3, generator=seeded_generator(0, "order", 2))
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator("cpu").manual_seed(derived_seed(0, "order", 2))))


def test_other_parts_another_seed():
    parts = [(0,), (0, 0), (0, 1), (1, 0), (10,), (0, "order", 1), (0, "draws", 1), (0, "order", 1, 0)]
    seeds = {derived_seed(*some) for some in parts}
    assert len(seeds) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)
