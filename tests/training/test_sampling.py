"""The samples of an epoch: to the number those of a plain statement of the method, and with the properties it promises."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaext.training.options import TrainingOptions
from alphaext.training.sampling import EpochSampler

MASK = 2**64 - 1


class Stream:
    """SplitMix64, from a state that mixes seed and epoch."""

    def __init__(self, seed: int, epoch: int) -> None:
        self.state = self.mix(seed) ^ self.mix((epoch + 0x632BE59BD9B4E019) & MASK)

    @staticmethod
    def mix(value: int) -> int:
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
        return value ^ (value >> 31)

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        return self.mix(self.state)

    def below(self, bound: int) -> int:
        """Lemire, "Fast random integer generation in an interval" (2019)."""
        while True:
            product = self.next() * bound
            if product & MASK >= 2**64 % bound:
                return product >> 64


def shuffle_front(stream: Stream, values: list[int], count: int) -> None:
    for i in range(count):
        other = i + stream.below(len(values) - i)
        values[i], values[other] = values[other], values[i]


def drawn_plainly(num_few: int, sizes: list[int], negatives: int, seed: int, epoch: int) -> list[int]:
    stream, order = Stream(seed, epoch), list(range(num_few))
    if negatives:
        each, left_over = divmod(negatives, len(sizes))
        groups = list(range(len(sizes)))
        shuffle_front(stream, groups, left_over)
        lucky, first = set(groups[:left_over]), num_few
        for group, size in enumerate(sizes):
            count = each + (group in lucky)
            samples = list(range(first, first + size))
            if count > size:
                order += [first + stream.below(size) for _ in range(count)]
            else:
                shuffle_front(stream, samples, count)
                order += samples[:count]
            first += size
    shuffle_front(stream, order, len(order))
    return order


def sample_epoch(num_few: int, sizes: list[int], negatives: int, seed: int, epoch: int) -> list[int]:
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return torch.ops.alphaext.sample_epoch(num_few, offsets, negatives, seed, epoch).tolist()


@settings(max_examples=200, deadline=None)
@given(
    num_few=st.integers(0, 12),
    sizes=st.lists(st.integers(1, 15), max_size=8),
    negatives=st.integers(0, 60),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 2**40),
)
def test_draws_are_those_of_the_plain_method(num_few, sizes, negatives, seed, epoch):
    negatives = negatives if sizes else 0
    assert sample_epoch(num_few, sizes, negatives, seed, epoch) == drawn_plainly(num_few, sizes, negatives, seed, epoch)


def test_a_large_draw_is_that_of_the_plain_method():
    """Places-LT: 804 few samples, a base of 61,696 images in 294 classes."""
    sizes = [209 + (c < 250) for c in range(294)]
    assert sum(sizes) == 61_696
    for groups in ([sum(sizes)], sizes):
        assert sample_epoch(804, groups, 804, 5, 17) == drawn_plainly(804, groups, 804, 5, 17)


COUNTS = torch.tensor([40, 30, 1, 25, 3, 6, 5])
FEW = torch.tensor([6, 5, 4])


def make_sampler(counts=COUNTS, few=FEW, **options) -> tuple[EpochSampler, torch.Tensor]:
    """A sampler over samples in mixed order, and the samples' labels."""
    labels = torch.arange(len(counts)).repeat_interleave(counts)
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return EpochSampler(labels, few, len(counts), TrainingOptions(**options)), labels


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    few_counts=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    ratio=st.sampled_from([0, 0.3, 0.5, 1, 2, 3.7, 20]),
    balanced=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_properties_of_an_epoch(counts, few_counts, ratio, balanced, seed):
    counts = torch.tensor([*counts, *few_counts])
    few = torch.arange(len(counts))[-len(few_counts) :].flip(0)
    ratio = ratio if int(counts[: -len(few_counts)].sum()) else 0
    sampling = "class_balanced" if balanced else "uniform"
    sampler, labels = make_sampler(counts, few, negative_ratio=ratio, negative_sampling=sampling, seed=seed)
    is_few = torch.isin(labels, few)
    assert len(sampler) == sampler.num_few + sampler.negatives
    assert sampler.num_few == int(is_few.sum()) and sampler.negatives == round(ratio * int(is_few.sum()))
    # Every sample has one number, few ones first.
    assert sorted(sampler.indices.tolist()) == list(range(len(labels)))
    assert is_few[sampler.indices[: sampler.num_few]].all() and not is_few[sampler.indices[sampler.num_few :]].any()
    for epoch in (1, 2):
        order = sampler.draw(epoch)
        assert order.dtype == torch.int64 and len(order) == len(sampler)
        drawn = sampler.indices[order]
        times = torch.bincount(drawn, minlength=len(labels))
        assert (times[is_few] == 1).all(), "every few sample takes part once"
        base_counts = counts[: -len(few_counts)]
        quotas = torch.bincount(labels[drawn], minlength=len(counts))[: len(base_counts)]
        assert quotas.sum() == sampler.negatives
        if balanced:
            present = base_counts > 0
            assert not quotas[~present].any()
            if present.any():
                assert quotas[present].max() - quotas[present].min() <= 1, "as many from each base class, or one more"
            enough = quotas <= base_counts
            once = enough[labels.clamp(max=len(base_counts) - 1)] & ~is_few
        else:
            once = ~is_few if sampler.negatives <= int(base_counts.sum()) else torch.zeros_like(is_few)
        assert (times[once] <= 1).all(), "no base sample twice where there are enough"


def test_an_epoch_depends_on_seed_and_number_alone():
    """So an interrupted training goes on with the samples it would have had, without a saved generator."""
    one, _ = make_sampler(seed=3)
    two, _ = make_sampler(seed=3)
    forwards = [one.draw(epoch) for epoch in range(1, 8)]
    backwards = [two.draw(epoch) for epoch in range(7, 0, -1)][::-1]
    torch.manual_seed(1)
    assert all(a.equal(b) for a, b in zip(forwards, backwards, strict=True))
    assert one.draw(5).equal(forwards[4])
    draws = [tuple(order.tolist()) for order in forwards]
    draws += [tuple(make_sampler(seed=seed)[0].draw(1).tolist()) for seed in (0, 1, 2, 4, 2**63 - 1)]
    assert len(set(draws)) == len(draws)
    # Seed s at epoch e + 1 is not seed s + 1 at epoch e.
    assert not make_sampler(seed=4)[0].draw(1).equal(one.draw(2))


@pytest.mark.parametrize("ratio", [0, 0.5, 1, 12])
@pytest.mark.parametrize("sampling", ["uniform", "class_balanced"])
def test_used_are_the_samples_of_all_epochs(ratio, sampling):
    sampler, _ = make_sampler(negative_ratio=ratio, negative_sampling=sampling, seed=9)
    epochs = range(3, 6)
    drawn = torch.cat([sampler.indices[sampler.draw(epoch)] for epoch in epochs])
    assert sampler.used(epochs).equal(drawn.unique())
    assert sampler.used(range(0)).equal(sampler.indices[: sampler.num_few].sort().values)


# The 99.99% points of the chi-square distribution: a fair draw of fixed seeds passes, a skewed one does not.
CHI_SQUARE_29 = 66.2
CHI_SQUARE_9 = 33.7


def chi_square(counts: torch.Tensor) -> float:
    expected = float(counts.sum()) / counts.numel()
    return float((counts - expected).square().sum() / expected)


def test_every_base_sample_is_drawn_equally_often():
    drawn = torch.zeros(33)
    for epoch in range(1500):
        drawn += torch.bincount(torch.tensor(sample_epoch(3, [30], 7, 2, epoch)), minlength=33)
    assert (drawn[:3] == 1500).all()
    # Without replacement counts vary by less than a multinomial's, by (1 - 7/30).
    assert chi_square(drawn[3:]) / (1 - 7 / 30) < CHI_SQUARE_29
    with_replacement = torch.zeros(30)
    for epoch in range(500):
        with_replacement += torch.bincount(torch.tensor(sample_epoch(0, [30], 40, 2, epoch)), minlength=30)
    assert chi_square(with_replacement) < CHI_SQUARE_29


def test_every_position_and_every_group_is_equally_likely():
    first, groups = torch.zeros(10), torch.zeros(10)
    for epoch in range(2000):
        order = sample_epoch(4, [1] * 10, 6, 1, epoch)
        first[order.index(2)] += 1
        groups += torch.bincount(torch.tensor(order), minlength=14)[4:]
    assert chi_square(first) < CHI_SQUARE_9
    assert chi_square(groups) / (1 - 6 / 10) < CHI_SQUARE_9


def test_replacement_is_said():
    labels = torch.arange(7).repeat_interleave(COUNTS)
    with pytest.warns(
        UserWarning, match="negative_ratio=8 asks for 112 base samples an epoch, but there are 96: .* with replacement"
    ):
        EpochSampler(labels, FEW, 7, TrainingOptions(negative_ratio=8))
    text = "negative_ratio=1, class-balanced, asks 1 base classes for more samples than they have: .* with replacement"
    with pytest.warns(UserWarning, match=text):
        EpochSampler(labels, FEW, 7, TrainingOptions(negative_sampling="class_balanced"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EpochSampler(labels, FEW, 7, TrainingOptions(negative_ratio=96 / 14))  # every one of them
        EpochSampler(labels, FEW, 7, TrainingOptions(negative_ratio=4 / 14, negative_sampling="class_balanced"))
        EpochSampler(labels, FEW, 7, TrainingOptions(negative_ratio=0, negative_sampling="class_balanced"))


def test_missing_samples_are_named():
    labels = torch.tensor([0, 0, 1, 5])
    with pytest.raises(ValueError, match="labels has no sample of the few classes 6, 4"):
        EpochSampler(labels, FEW, 7, TrainingOptions())
    with pytest.raises(ValueError, match="labels has no sample of a base class, but negative_ratio=2 asks for 6"):
        EpochSampler(torch.tensor([4, 5, 6]), FEW, 7, TrainingOptions(negative_ratio=2))
    assert len(EpochSampler(torch.tensor([4, 5, 6]), FEW, 7, TrainingOptions(negative_ratio=0))) == 3


OFFSETS = torch.tensor([0, 4, 9])
BAD_DRAWS = {
    "num_few and negatives must not be below 0, .* got -1, 2": (-1, OFFSETS, 2),
    "must not be below 0, .* got 3, -2": (3, OFFSETS, -2),
    "nor negatives be drawn from no group; got 3, 2, 0": (3, OFFSETS[:1], 2),
    "group_offsets must start at 0 and increase": (3, OFFSETS + 1, 2),
    "group_offsets must start at 0 and": (3, torch.tensor([0, 4, 4]), 2),
    "group_offsets must be int64, got int32": (3, OFFSETS.int(), 2),
    "group_offsets must be contiguous": (3, torch.zeros(6, dtype=torch.int64)[::2], 2),
    r"group_offsets must have shape \[n\], got \[1, 3\]": (3, OFFSETS[None], 2),
}


@pytest.mark.parametrize("message", BAD_DRAWS)
def test_bad_arguments(message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.alphaext.sample_epoch(*BAD_DRAWS[message], 0, 1)
