"""Drawn samples of few classes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaext import class_means
from alphaext.training.augmentation import draw_features

COUNTS = (9, 1, 7, 3, 2)
LABELS = torch.arange(5).repeat_interleave(torch.tensor(COUNTS))
FEATURES = torch.randn(len(LABELS), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FEW = torch.tensor([4, 3])
MEANS = class_means(FEATURES, LABELS)


def test_a_drawn_sample_is_what_it_is_said_to_be():
    drawn, labels = draw_features(FEATURES, LABELS, MEANS, FEW, count=50, seed=1, neighbors=2)
    assert drawn.shape == (len(LABELS) + 100, 3) and len(drawn) == len(labels) and drawn.dtype == torch.float64
    assert labels[len(LABELS) :].tolist() == [4] * 50 + [3] * 50
    assert torch.equal(drawn[: len(LABELS)], FEATURES)
    base = torch.tensor([0, 1, 2])
    for place, few_class in enumerate(FEW.tolist()):
        near = base[(MEANS[base] - MEANS[few_class]).norm(dim=1).argsort()[:2]]
        own = COUNTS[few_class] / (COUNTS[few_class] + 5)
        mean = own * MEANS[few_class] + (1 - own) * MEANS[near].mean(dim=0)
        rows = drawn[len(LABELS) + 50 * place : len(LABELS) + 50 * (place + 1)]
        possible = torch.cat([mean + FEATURES[k == LABELS] - MEANS[k] for k in near.tolist()])
        distances = (rows[:, None] - possible).norm(dim=2)
        assert float(distances.min(dim=1).values.max()) < 1e-12
        # Of fifty draws, most that could come have come.
        assert len(distances.argmin(dim=1).unique()) > len(possible) / 2


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, len(LABELS) + 19), min_size=0, max_size=12))
def test_rows_do_not_depend_on_their_company(index):
    drawn, _ = draw_features(FEATURES, LABELS, MEANS, FEW, count=10, seed=1)
    whole = drawn[:]
    assert torch.equal(drawn[torch.tensor(index, dtype=torch.int64)], whole[torch.tensor(index, dtype=torch.int64)])
    assert torch.equal(drawn[3:25], whole[3:25]) and torch.equal(drawn[::7], whole[::7])


def test_draws_are_a_function_of_seed_and_class():
    one, _ = draw_features(FEATURES, LABELS, MEANS, FEW, count=10, seed=1)
    again, _ = draw_features(FEATURES, LABELS, MEANS, FEW, count=10, seed=1)
    other, _ = draw_features(FEATURES, LABELS, MEANS, FEW, count=10, seed=2)
    alone, _ = draw_features(FEATURES, LABELS, MEANS, FEW, count=10, seed=1)
    assert torch.equal(one[:], again[:]) and not torch.equal(one[:], other[:]) and torch.equal(alone[:], one[:])


def test_narrow_features_are_moved_in_float32():
    narrow = FEATURES.half()
    drawn, _ = draw_features(narrow, LABELS, class_means(narrow, LABELS), FEW, count=10, seed=1)
    assert drawn[:5].dtype == torch.float16 and drawn[len(LABELS) :].dtype == torch.float32
    assert drawn[len(LABELS) - 1 : len(LABELS) + 1].dtype == torch.float32


def test_what_cannot_be_drawn_from_is_refused():
    with pytest.raises(ValueError, match="no sample of the few classes 4"):
        draw_features(FEATURES[:20], LABELS[:20], MEANS, FEW, count=1, seed=0)
    with pytest.raises(ValueError, match="labels has none"):
        draw_features(FEATURES, LABELS, MEANS, torch.arange(5), count=1, seed=0)
