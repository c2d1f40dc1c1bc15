from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from alphaext import AlphaNet, ClassSplit, fit, split_classes
from alphaext.metrics import split_accuracy
from alphaext.metrics.bootstrap import bootstrap_percentiles
from alphaext.metrics.evaluation import (
    bootstrap_intervals,
    expected_calibration_error,
    part_of_class,
    per_class,
    split_metrics,
)
from alphaext.metrics.predictions import Predictions, predict, predict_logits

NAMES = [
    f"{part}{suffix}"
    for part in ("few", "medium", "many", "all")
    for suffix in ("", "_top5", "_class_mean", "_class_mean_top5")
]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, ClassSplit]:
    """Logits on a coarse grid, labels, and a split of which any part may be empty."""
    num_classes, samples = draw(st.integers(1, 9)), draw(st.integers(0, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    logits = torch.randint(-2, 3, (samples, num_classes), generator=generator).float()
    labels = torch.randint(num_classes, (samples,), generator=generator)
    counts = draw(st.lists(st.integers(1, 130), min_size=num_classes, max_size=num_classes))
    return logits, labels, split_classes(counts)


@settings(deadline=None)
@given(problems())
def test_metrics_are_those_of_the_logits(problem: tuple[Tensor, Tensor, ClassSplit]) -> None:
    logits, labels, split = problem
    predictions = predict_logits(logits, labels)
    found = split_metrics(predictions, split)
    assert list(found) == NAMES
    for top_k, top in ((1, ""), (min(5, split.num_classes), "_top5")):
        for average, suffix in (("samples", ""), ("classes", "_class_mean")):
            wanted = split_accuracy(logits, labels, split, top_k=top_k, average=average)  # type: ignore[arg-type]
            for part, accuracy in wanted.items():
                assert found[f"{part}{suffix}{top}"] == pytest.approx(accuracy, abs=1e-12, nan_ok=True)


def test_metrics_are_those_of_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([120, 60, 60, 10, 5, 3])
    labels = torch.repeat_interleave(torch.arange(6), counts)
    features = nn.functional.one_hot(labels, 8).float() + torch.randn(len(labels), 8, generator=generator)
    linear = nn.Linear(8, 6)
    head = AlphaNet.from_linear(linear, class_counts=counts, class_means=torch.eye(6, 8), top_k=2, seed=0)
    result = fit(head, features, labels, val_features=features, val_labels=labels, epochs=3, progress=False)
    split = split_classes(counts)
    for classifier, metrics in ((linear, result.metrics_before), (head, result.metrics_after)):
        assert metrics is not None
        assert split_metrics(predict(classifier, features, labels), split) == pytest.approx(metrics, abs=1e-12)


def test_a_split_on_another_device_is_taken(device: str) -> None:
    predictions = predict_logits(torch.eye(3), [0, 1, 2])
    split = ClassSplit(*(torch.tensor([c], device=device) for c in (2, 1, 0)))
    assert set(split_metrics(predictions, split).values()) == {1.0}
    assert part_of_class(split).tolist() == [2, 1, 0]


# Intervals


def of_classes(hits: list[int], samples: list[int], top5: list[int] | None = None) -> Predictions:
    """Predictions with so many samples of each class, and so many of them right."""
    num_classes = len(hits)
    ranks, labels = [], []
    for c, (right, number) in enumerate(zip(hits, samples, strict=True)):
        near = 0 if top5 is None else top5[c] - right
        ranks += [0] * right + [1] * near + [min(5, num_classes - 1)] * (number - right - near)
        labels += [c] * number
    predicted = [c if rank == 0 else (c + 1) % num_classes for c, rank in zip(labels, ranks, strict=True)]
    return Predictions(ranks, predicted, labels, num_classes)  # type: ignore[arg-type]


SPLIT = ClassSplit(few=torch.tensor([4, 5]), medium=torch.tensor([2, 3]), many=torch.tensor([0, 1]))


def test_intervals_hold_the_accuracies() -> None:
    predictions = of_classes([40, 30, 25, 20, 5, 10], [50] * 6, [45, 35, 30, 25, 20, 30])
    metrics, intervals = split_metrics(predictions, SPLIT), bootstrap_intervals(predictions, SPLIT)
    assert list(intervals) == NAMES
    for name, (low, high) in intervals.items():
        assert low < metrics[name] < high
    # With equally many samples a class there is one accuracy, and one interval.
    for part in ("few", "medium", "many", "all"):
        assert intervals[part] == pytest.approx(intervals[f"{part}_class_mean"], abs=1e-12)


def test_intervals_are_those_of_the_normal_distribution() -> None:
    samples, hits = [1000] * 6, [700, 500, 300, 200, 100, 50]
    intervals = bootstrap_intervals(of_classes(hits, samples), SPLIT, resamples=4000, confidence=0.9)
    for part, classes in {"few": (4, 5), "medium": (2, 3), "many": (0, 1), "all": range(6)}.items():
        variance = sum(hits[c] / 1000 * (1 - hits[c] / 1000) / 999 for c in classes) / len(classes) ** 2
        mean, half = sum(hits[c] / 1000 for c in classes) / len(classes), 1.6449 * math.sqrt(variance)
        assert intervals[part] == pytest.approx((mean - half, mean + half), abs=half / 10)


@pytest.mark.parametrize("per_class_samples", [1, 2, 3, 20])
def test_intervals_cover_what_they_promise(per_class_samples: int) -> None:
    """Of many test sets of the same classes, nine in ten have the classes' true mean accuracy in their 90% interval."""
    random = np.random.default_rng(0)
    classes, trials = 30, 200
    truth = random.beta(2, 2, size=classes)
    nothing = torch.zeros(0, dtype=torch.int64)
    split = ClassSplit(few=torch.arange(classes), medium=nothing, many=nothing)
    counts = torch.full((classes,), per_class_samples)
    covered = 0
    for trial in range(trials):
        hits = torch.from_numpy(random.binomial(per_class_samples, truth)).expand(2, -1)
        intervals = bootstrap_percentiles(split, counts, hits, None, resamples=150, confidence=0.9, seed=trial)
        covered += intervals["few"][0] <= truth.mean() <= intervals["few"][1]
    # Single images are given rather too much variance; otherwise two standard errors of 0.02 around nine in ten.
    assert 0.86 <= covered / trials <= (0.99 if per_class_samples == 1 else 0.94)


def test_seeds_and_options() -> None:
    predictions = of_classes([40, 30, 25, 20, 5, 10], [50] * 6)
    first = bootstrap_intervals(predictions, SPLIT, seed=1)
    assert bootstrap_intervals(predictions, SPLIT, seed=1) == first
    assert bootstrap_intervals(predictions, SPLIT, seed=2) != first
    wider = bootstrap_intervals(predictions, SPLIT, seed=1, confidence=0.99)
    assert all(wider[name][0] < first[name][0] and first[name][1] < wider[name][1] for name in ("few", "many", "all"))


def test_intervals_leave_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    bootstrap_intervals(of_classes([1, 1], [2, 2]), ClassSplit(few=[1], medium=[], many=[0]), resamples=3)  # type: ignore[arg-type]
    drawn = torch.rand(()), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    assert drawn == (torch.rand(()), np.random.rand())


def test_intervals_of_nothing_and_of_certainty() -> None:
    split = ClassSplit(few=[2], medium=[1], many=[0])  # type: ignore[arg-type]
    intervals = bootstrap_intervals(of_classes([3, 0, 0], [3, 3, 0]), split, resamples=10)
    assert intervals["many"] == (1.0, 1.0) and intervals["medium"] == (0.0, 0.0) and intervals["all"] == (0.5, 0.5)
    assert all(math.isnan(value) for value in intervals["few"] + intervals["few_class_mean_top5"])
    nothing = bootstrap_intervals(of_classes([0] * 3, [0] * 3), split, resamples=10)
    assert all(math.isnan(value) for pair in nothing.values() for value in pair)


def test_blocks_of_resamples_change_intervals_by_their_draws_only(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = of_classes([40, 30, 25, 20, 5, 10], [50] * 6)
    whole = bootstrap_intervals(predictions, SPLIT, resamples=2000)
    monkeypatch.setattr("alphaext.metrics.bootstrap._BLOCK_ELEMENTS", 6 * 300)
    pieces = bootstrap_intervals(predictions, SPLIT, resamples=2000)
    # One image of a part is 0.01.
    assert all(pieces[name] == pytest.approx(whole[name], abs=0.011) for name in NAMES)


# Calibration


@settings(deadline=None)
@given(problems(), st.integers(1, 20))
def test_calibration_against_a_loop(problem: tuple[Tensor, Tensor, ClassSplit], bins: int) -> None:
    logits, labels, split = problem
    predictions = predict_logits(logits, labels)
    assert predictions.confidence is not None
    found = expected_calibration_error(predictions, split, bins)
    samples = list(zip(predictions.confidence.tolist(), (predictions.ranks == 0).tolist(), labels.tolist(), strict=True))
    for part in ("few", "medium", "many", "all"):
        classes = range(split.num_classes) if part == "all" else getattr(split, part).tolist()
        mine = [(confidence, right) for confidence, right, label in samples if label in classes]
        if not mine:
            assert math.isnan(found[part])
            continue
        wanted = 0.0
        for b in range(bins):
            inside = [(c, r) for c, r in mine if b < c * bins <= b + 1]
            if inside:
                accuracy = sum(r for _, r in inside) / len(inside)
                wanted += len(inside) / len(mine) * abs(accuracy - sum(c for c, _ in inside) / len(inside))
        assert found[part] == pytest.approx(wanted, abs=1e-9)


def test_calibration_of_the_certain() -> None:
    split = ClassSplit(few=[2], medium=[1], many=[0])  # type: ignore[arg-type]
    sure = predict_logits(100.0 * torch.eye(3), [0, 1, 0])
    assert expected_calibration_error(sure, split) == pytest.approx(
        {"few": math.nan, "medium": 0.0, "many": 0.5, "all": 1 / 3}, nan_ok=True
    )


# Bad input

GOOD = of_classes([1, 1, 0], [1, 1, 1])
THREE = ClassSplit(few=[2], medium=[1], many=[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [split_metrics, bootstrap_intervals, expected_calibration_error])
@pytest.mark.parametrize(
    ("predictions", "split", "error", "message"),
    [
        ([0, 1, 2], THREE, TypeError, "predictions must be Predictions, got list; predict makes them"),
        (GOOD, [0, 1, 2], TypeError, "split must be ClassSplit, got list"),
        (GOOD, SPLIT, ValueError, "split must be of the classes that predictions are of, got 6 and 3 classes"),
    ],
)
def test_everything_refuses(function, predictions, split, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        function(predictions, split)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"resamples": 0}, ValueError, "resamples must be at least 1, got 0"),
        ({"resamples": 10.0}, TypeError, "resamples must be an integer"),
        ({"confidence": 1.0}, ValueError, "confidence must be finite and above 0 and below 1, got 1.0"),
        ({"confidence": math.nan}, ValueError, "confidence must be finite and above 0 and below 1, got nan"),
        ({"confidence": "0.95"}, TypeError, "confidence must be a number, finite and above 0 and below 1, got '0.95'"),
        ({"confidence": True}, TypeError, "confidence must be a number, finite and above 0 and below 1, got True"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ],
)
def test_intervals_refuse(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        bootstrap_intervals(GOOD, THREE, **options)  # type: ignore[arg-type]


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="top_k must be between 1 and 3, got 4"):
        per_class(GOOD, 4)
    with pytest.raises(TypeError, match="predictions must be Predictions, got Tensor"):
        per_class(torch.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="predictions must have confidence"):
        expected_calibration_error(GOOD, THREE)
    confident = Predictions(GOOD.ranks, GOOD.predicted, GOOD.labels, 3, torch.ones(3))
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        expected_calibration_error(confident, THREE, 0)
