"""Class-balanced samples: every class alike, in shuffled rounds, as a function of seed and epoch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaext.baselines.balanced_sampling import ClassBalancedSampler


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=9),
    st.integers(1, 5),
    st.integers(0, 2**63 - 1),
    st.integers(0, 1000),
)
def test_every_class_alike_and_every_image_in_its_turn(sizes: list[int], run: int, seed: int, epoch: int) -> None:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    sampler = ClassBalancedSampler(labels, len(sizes), seed=seed, images_per_class=run)
    drawn = sampler.draw(epoch)
    assert drawn.dtype == torch.int64 and len(drawn) == len(sampler) == len(labels)
    classes = labels[drawn]
    counts = classes.bincount(minlength=len(sizes))
    assert counts.max() - counts.min() <= run
    # Runs of one class, and rounds of all classes.
    starts = classes[::run]
    assert torch.equal(classes, starts.repeat_interleave(run)[: len(classes)])
    for first in range(0, len(starts), len(sizes)):
        round_of_classes = starts[first : first + len(sizes)].tolist()
        assert len(set(round_of_classes)) == len(round_of_classes)
    # Rounds of a class's images: each is all of them, but the last, which has none twice.
    for class_id, size in enumerate(sizes):
        images = drawn[classes == class_id].tolist()
        for first in range(0, len(images), size):
            part = images[first : first + size]
            assert len(set(part)) == len(part)
    assert torch.equal(drawn, ClassBalancedSampler(labels.numpy(), len(sizes), seed=seed, images_per_class=run).draw(epoch))


def test_every_order_of_images_and_classes_is_as_likely() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    orders: dict[tuple[int, ...], int] = {}
    first_class = 0
    for seed in range(20):
        sampler = ClassBalancedSampler(labels, 2, seed=seed)
        for epoch in range(90):
            drawn = sampler.draw(epoch)
            own = tuple(drawn[labels[drawn] == 0].tolist())
            orders[own] = orders.get(own, 0) + 1
            first_class += int(labels[drawn[0]])
    # 1800 draws of 6 orders: 300 each, standard deviation 16; and 900 of each class first, standard deviation 21.
    assert len(orders) == 6 and all(abs(count - 300) < 80 for count in orders.values())
    assert abs(first_class - 900) < 110


def test_epochs_and_seeds_differ_and_disturb_nothing() -> None:
    labels = torch.arange(50) % 5
    state = torch.random.get_rng_state()
    draws = {tuple(ClassBalancedSampler(labels, 5, seed=seed).draw(epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(draws) == 16
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("labels", "num_classes", "options", "error", "message"),
    [
        ([0, 2, 2], 4, {}, ValueError, r"labels must hold every class of 0\.\.3, no samples of class 1, 3"),
        ([], 2, {}, ValueError, "no samples of class 0, 1"),
        ([0, 2], 2, {}, ValueError, r"labels must be in 0\.\.1, got 2 at index 1"),
        ([0.0], 1, {}, TypeError, "labels must be integers"),
        ([0], 0, {}, ValueError, "num_classes must be at least 1, got 0"),
        ([0], 1, dict(seed=-1), ValueError, "seed must be between 0 and"),
        ([0], 1, dict(images_per_class=0), ValueError, "images_per_class must be at least 1, got 0"),
    ],
)
def test_refusals(labels: list[int], num_classes: int, options: dict[str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ClassBalancedSampler(labels, num_classes, **options)
