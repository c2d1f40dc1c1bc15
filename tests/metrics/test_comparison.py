from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from alphaext import ClassSplit, split_classes
from alphaext.metrics.comparison import ClassLoss, Confusion, _part, compare, mcnemar_p_value
from alphaext.metrics.evaluation import split_metrics
from alphaext.metrics.predictions import Predictions, predict_logits
from alphaext.utils.files import write_json


def by_hand(labels: list[int], predicted: list[int], num_classes: int) -> Predictions:
    """Predictions whose right class comes second where it does not come first."""
    ranks = [int(label != p) for label, p in zip(labels, predicted, strict=True)]
    return Predictions(ranks, predicted, labels, num_classes)  # type: ignore[arg-type]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Predictions, Predictions, ClassSplit]:
    num_classes, samples = draw(st.integers(1, 8)), draw(st.integers(0, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    labels = torch.randint(num_classes, (samples,), generator=generator)
    before, after = (torch.randint(-2, 3, (samples, num_classes), generator=generator).float() for _ in range(2))
    counts = draw(st.lists(st.integers(1, 130), min_size=num_classes, max_size=num_classes))
    return predict_logits(before, labels), predict_logits(after, labels), split_classes(counts)


@settings(deadline=None)
@given(pairs())
def test_against_a_loop(pair: tuple[Predictions, Predictions, ClassSplit]) -> None:
    before, after, split = pair
    found = compare(before, after, split, resamples=20, listed=1000)
    assert found.before == pytest.approx(split_metrics(before, split), nan_ok=True)
    assert found.after == pytest.approx(split_metrics(after, split), nan_ok=True)
    for name, difference in found.differences.items():
        assert difference == pytest.approx(found.after[name] - found.before[name], abs=1e-12, nan_ok=True)
    few = split.few.tolist()
    rows = list(zip(before.labels.tolist(), before.predicted.tolist(), after.predicted.tolist(), strict=True))
    assert list(found.parts) == ["few", "medium", "many", "all"]
    for name, part in found.parts.items():
        classes = range(split.num_classes) if name == "all" else getattr(split, name).tolist()
        mine = [(b == label, a == label, a in few) for label, b, a in rows if label in classes]
        assert part.samples == len(mine)
        assert part.gained == sum(a and not b for b, a, _ in mine)
        assert part.lost == sum(b and not a for b, a, _ in mine)
        assert part.lost_to_few == sum(b and not a and to_few for b, a, to_few in mine)
        if mine:
            assert found.differences[name] == pytest.approx((part.gained - part.lost) / len(mine), abs=1e-12)

    losses = {}
    for c in range(split.num_classes):
        mine = [(b == c, a == c, a) for label, b, a in rows if label == c]
        gained, lost = sum(a and not b for b, a, _ in mine), sum(b and not a for b, a, _ in mine)
        if lost > gained:
            went = [a for was, now, a in mine if was and not now]
            losses[c] = ClassLoss(
                c,
                len(mine),
                sum(b for b, _, _ in mine) / len(mine),
                sum(a for _, a, _ in mine) / len(mine),
                gained,
                lost,
                tuple(sorted(((a, went.count(a)) for a in set(went)), key=lambda one: (-one[1], one[0]))),
                sum(a in few for a in went),
            )
    assert {loss.class_id: loss for loss in found.paid} == losses
    shares = [loss.after - loss.before for loss in found.paid]
    assert shares == pytest.approx(sorted(shares), abs=1e-12)

    for confusions, new, old in ((found.confusions_gained, 2, 1), (found.confusions_lost, 1, 2)):
        wrong = [(row[0], row[new]) for row in rows if row[new] not in (row[0], row[old])]
        assert {(c.label, c.predicted): c.count for c in confusions} == {key: wrong.count(key) for key in set(wrong)}
        assert [(-c.count, c.label, c.predicted) for c in confusions] == sorted(
            (-c.count, c.label, c.predicted) for c in confusions
        )


@settings(deadline=None, max_examples=30)
@given(pairs(), st.integers(0, 5))
def test_identical_classifiers_do_not_differ(pair: tuple[Predictions, Predictions, ClassSplit], seed: int) -> None:
    before, _, split = pair
    found = compare(before, before, split, resamples=20, seed=seed)
    for name, difference in found.differences.items():
        assert math.isnan(found.before[name]) or (difference == 0 and found.intervals[name] == (0, 0))
    for part in found.parts.values():
        assert (part.gained, part.lost, part.p_value) == (0, 0, 1.0)
        assert part.verdict == ("no difference shown" if part.samples else "no samples")
    assert found.paid == found.confusions_gained == found.confusions_lost == ()


@settings(deadline=None, max_examples=30)
@given(pairs())
def test_the_other_way_round(pair: tuple[Predictions, Predictions, ClassSplit]) -> None:
    before, after, split = pair
    there, back = compare(before, after, split, resamples=20), compare(after, before, split, resamples=20)
    opposite = {"better": "worse", "worse": "better"}
    for name, part in there.parts.items():
        other = back.parts[name]
        assert (part.gained, part.lost, part.p_value) == (other.lost, other.gained, other.p_value)
        assert there.differences[name] == pytest.approx(-back.differences[name], nan_ok=True)
        # The intervals, which both have a say, are of other draws.
        assert other.verdict in (opposite.get(part.verdict, part.verdict), "no difference shown") or part.verdict[:2] == "no"
    assert there.confusions_gained == back.confusions_lost


# McNemar


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (0, 5, 0.0625),
        (6, 0, 0.03125),
        (1, 8, 0.0390625),  # (1 + 9) / 2^8
        (10, 10, 1.0),
        (9, 10, 1.0),
        (3, 12, 0.03515625),  # (1 + 15 + 105 + 455) / 2^14
    ],
)
def test_known_p_values(gained: int, lost: int, p_value: float) -> None:
    assert mcnemar_p_value(gained, lost) == pytest.approx(p_value, rel=1e-12)


@settings(deadline=None)
@given(st.integers(0, 1500), st.integers(0, 1500))
def test_p_values_in_whole_numbers(gained: int, lost: int) -> None:
    number = gained + lost
    tail = term = 1
    for heads in range(1, min(gained, lost) + 1):
        term = term * (number - heads + 1) // heads
        tail += term
    wanted = min(1.0, 2 * tail / 2**number)
    assert mcnemar_p_value(gained, lost) == pytest.approx(wanted, rel=1e-9, abs=1e-250)  # SciPy keeps no more digits below


def test_p_values_of_very_many_samples() -> None:
    assert mcnemar_p_value(500_000, 498_000) == pytest.approx(binomtest(500_000, 998_000, 0.5).pvalue, rel=1e-7)
    assert mcnemar_p_value(0, 10_000_000) == 0.0
    with pytest.raises(ValueError, match="lost must be at least 0, got -1"):
        mcnemar_p_value(3, -1)


# Verdicts and intervals


SPLIT = ClassSplit(few=torch.tensor([2]), medium=torch.tensor([1]), many=torch.tensor([0]))


def changed(gained: int, lost: int, samples: int = 100) -> tuple[Predictions, Predictions]:
    """Samples of class 2, of which some are gained and some lost, and of the rest one half right both times."""
    rest = samples - gained - lost
    before = [0] * gained + [2] * lost + [2] * (rest // 2) + [1] * (rest - rest // 2)
    after = [2] * gained + [1] * lost + [2] * (rest // 2) + [1] * (rest - rest // 2)
    return by_hand([2] * samples, before, 3), by_hand([2] * samples, after, 3)


@pytest.mark.parametrize(
    ("gained", "lost", "verdict"),
    [
        (20, 2, "better"),
        (2, 20, "worse"),
        (10, 8, "no difference shown"),
        (4, 0, "no difference shown"),  # the bootstrap alone would call it a gain
        (6, 0, "better"),
        (0, 6, "worse"),
    ],
)
def test_verdicts(gained: int, lost: int, verdict: str) -> None:
    found = compare(*changed(gained, lost), SPLIT)
    assert found.parts["few"].verdict == found.parts["all"].verdict == verdict
    assert found.parts["medium"].verdict == "no samples"
    assert found.parts["medium"].p_value == 1.0 and math.isnan(found.differences["medium"])
    low, high = found.intervals["few"]
    assert low <= found.differences["few"] == (gained - lost) / 100 <= high


def test_both_test_and_interval_have_a_say() -> None:
    assert _part([100, 6, 0, 0], (0.01, 0.1), 0.05).verdict == "better"
    assert _part([100, 6, 0, 0], (0.0, 0.1), 0.05).verdict == "no difference shown"
    assert _part([100, 0, 6, 0], (-0.1, 0.0), 0.05).verdict == "no difference shown"


def test_a_verdict_at_another_confidence() -> None:
    pair = changed(14, 4)  # p = 0.031
    assert compare(*pair, SPLIT, confidence=0.95).parts["few"].verdict == "better"
    assert compare(*pair, SPLIT, confidence=0.99).parts["few"].verdict == "no difference shown"


@pytest.mark.parametrize(("gained", "lost"), [(20, 5), (500, 400)])
def test_intervals_are_those_of_pairs(gained: int, lost: int) -> None:
    """Of the difference, and not of two independent accuracies."""
    found = compare(*changed(gained, lost, samples=1000), SPLIT, resamples=4000)
    middle = (gained - lost) / 1000
    half = 1.96 * math.sqrt((gained + lost) / 1000 - middle**2) / math.sqrt(1000)
    assert found.intervals["few"] == pytest.approx((middle - half, middle + half), abs=half / 8)


def test_verdicts_of_equal_classifiers_are_rarely_wrong() -> None:
    """Of comparisons of classifiers that are equally good, at most one in twenty finds a difference."""
    random = np.random.default_rng(0)
    labels = [2] * 60
    found = []
    for trial in range(100):
        first, second = (np.where(random.random(60) < 0.4, 2, 1).tolist() for _ in range(2))
        comparison = compare(by_hand(labels, first, 3), by_hand(labels, second, 3), SPLIT, resamples=100, seed=trial)
        found.append(comparison.parts["few"].verdict != "no difference shown")
    assert sum(found) / len(found) <= 0.08


def test_who_paid() -> None:
    #        lost to 2, 2, 1; kept          lost to 2, kept      gained
    labels = [0, 0, 0, 0, 1, 1, 2, 2]
    before = by_hand(labels, [0, 0, 0, 0, 1, 1, 0, 0], 3)
    after = by_hand(labels, [2, 2, 1, 0, 2, 1, 2, 1], 3)
    found = compare(before, after, SPLIT, resamples=10)
    assert found.paid == (
        ClassLoss(0, 4, 1.0, 0.25, 0, 3, ((2, 2), (1, 1)), 2),
        ClassLoss(1, 2, 1.0, 0.5, 0, 1, ((2, 1),), 1),
    )
    assert found.confusions_gained == (Confusion(0, 2, 2), Confusion(0, 1, 1), Confusion(1, 2, 1), Confusion(2, 1, 1))
    assert found.confusions_lost == (Confusion(2, 0, 2),)
    assert found.parts["many"].lost_to_few == 2 and found.parts["all"].lost_to_few == 3
    few = compare(before, after, SPLIT, resamples=10, listed=1)
    assert few.paid == found.paid[:1] and few.confusions_gained == found.confusions_gained[:1]
    assert compare(before, after, SPLIT, resamples=10, listed=0).paid == ()


def test_as_json(tmp_path: Path) -> None:
    found = compare(*changed(20, 2), SPLIT, resamples=10)
    write_json(tmp_path / "comparison.json", found.to_dict())
    read = json.loads((tmp_path / "comparison.json").read_text())
    assert read["parts"]["few"]["verdict"] == "better" and read["differences"]["medium"] is None
    assert read["confusions_lost"][0] == {"label": 2, "predicted": 0, "count": 20}
    assert read["intervals"]["few"] == list(found.intervals["few"])


GOOD = by_hand([0, 1, 2], [0, 1, 2], 3)


@pytest.mark.parametrize(
    ("after", "options", "error", "message"),
    [
        (by_hand([0, 1], [0, 1], 3), {}, ValueError, "must be of the same samples, got 3 and 2 samples"),
        (by_hand([0, 2, 2], [0, 1, 2], 3), {}, ValueError, "with the same labels, got labels 1 and 2 at index 1"),
        (
            by_hand([0, 1, 2], [0, 1, 2], 4),
            {},
            ValueError,
            "the classes that after are of, got 3 and 4 classes",
        ),
        ([0, 1, 2], {}, TypeError, "after must be Predictions, got list"),
        (GOOD, {"split": None}, TypeError, "split must be ClassSplit, got NoneType"),
        (GOOD, {"resamples": 0}, ValueError, "resamples must be at least 1, got 0"),
        (GOOD, {"confidence": 95}, ValueError, "confidence must be finite and above 0 and below 1, got 95"),
        (GOOD, {"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        (GOOD, {"listed": -1}, ValueError, "listed must be at least 0, got -1"),
    ],
)
def test_compare_refuses(after: object, options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        compare(GOOD, after, **{"split": SPLIT, **options})  # type: ignore[arg-type]
