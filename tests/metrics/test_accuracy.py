from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, recall_score, top_k_accuracy_score
from torch import Tensor

import alphaext.metrics.accuracy
from alphaext.classes import ClassSplit, split_classes
from alphaext.metrics import label_ranks, per_class, predict_logits, split_accuracy


def test_examples_in_docstrings() -> None:
    results = doctest.testmod(alphaext.metrics.accuracy)
    assert results.attempted > 0
    assert results.failed == 0


@st.composite
def answers(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Logits on a coarse grid, so that ties are common, and labels."""
    num_classes, samples = draw(st.integers(1, 8)), draw(st.integers(0, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    logits = torch.randint(-2, 3, (samples, num_classes), generator=generator).float()
    return logits, torch.randint(num_classes, (samples,), generator=generator)


@settings(deadline=None)
@given(answers(), st.integers(1, 50))
def test_ranks_are_places_in_a_stable_sort(case: tuple[Tensor, Tensor], block: int) -> None:
    logits, labels = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(alphaext.metrics.accuracy._BLOCK_ELEMENTS, "cpu", block)
        ranks = label_ranks(logits, labels)
    order = logits.argsort(dim=1, descending=True, stable=True).tolist()
    assert ranks.tolist() == [places.index(label) for places, label in zip(order, labels.tolist(), strict=True)]


@settings(deadline=None)
@given(answers(), st.data())
def test_split_accuracy_against_a_loop(case: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    logits, labels = case
    num_classes = logits.shape[1]
    counts = data.draw(st.lists(st.integers(1, 130), min_size=num_classes, max_size=num_classes))
    top_k = data.draw(st.integers(1, num_classes))
    split = split_classes(counts)
    right = (label_ranks(logits, labels) < top_k).tolist()
    by_sample = split_accuracy(logits, labels, split, top_k=top_k)
    by_class = split_accuracy(logits, labels, split, top_k=top_k, average="classes")
    of_class = per_class(predict_logits(logits, labels), top_k)
    assert list(by_sample) == list(by_class) == ["few", "medium", "many", "all"]
    for name, ids in [
        ("few", split.few.tolist()),
        ("medium", split.medium.tolist()),
        ("many", split.many.tolist()),
        ("all", list(range(num_classes))),
    ]:
        hits = {c: [hit for hit, label in zip(right, labels.tolist(), strict=True) if label == c] for c in ids}
        seen = [answers for answers in hits.values() if answers]
        if not seen:
            assert math.isnan(by_sample[name]) and math.isnan(by_class[name])
            continue
        assert by_sample[name] == sum(map(sum, seen)) / sum(map(len, seen))
        assert by_class[name] == pytest.approx(sum(sum(one) / len(one) for one in seen) / len(seen), abs=1e-12)
        for c in ids:
            wanted = sum(hits[c]) / len(hits[c]) if hits[c] else math.nan
            assert of_class[c].item() == pytest.approx(wanted, abs=1e-12, nan_ok=True)


def test_device_changes_nothing(device: str) -> None:
    logits = torch.randint(-2, 3, (300, 10), generator=torch.Generator().manual_seed(0)).float()
    labels, split = torch.arange(300) % 10, split_classes([10] * 3 + [50] * 4 + [500] * 3)
    moved = logits.to(device), labels.to(device)
    assert split_accuracy(*moved, split, top_k=2) == split_accuracy(logits, labels, split, top_k=2)
    assert torch.equal(per_class(predict_logits(*moved)), per_class(predict_logits(logits, labels)))


@pytest.mark.parametrize("top_k", [1, 5])
def test_against_scikit_learn(top_k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(400, 12, generator=generator)
    labels = torch.cat([torch.arange(12), torch.randint(12, (388,), generator=generator)])
    logits[torch.arange(400), labels] += 1.0
    split = split_classes([10] * 3 + [50] * 4 + [500] * 5)
    found = split_accuracy(logits, labels, split, top_k=top_k)
    every_class = list(range(12))
    wanted = top_k_accuracy_score(labels.numpy(), logits.numpy(), k=top_k, labels=every_class)
    assert found["all"] == pytest.approx(wanted, abs=1e-12)
    for name in ("few", "medium", "many"):
        of_split = torch.isin(labels, getattr(split, name))
        wanted = top_k_accuracy_score(labels[of_split], logits[of_split], k=top_k, labels=every_class)
        assert found[name] == pytest.approx(wanted, abs=1e-12)
    if top_k == 1:
        best = logits.argmax(dim=1)
        assert found["all"] == pytest.approx(accuracy_score(labels, best), abs=1e-12)
        recalls = recall_score(labels, best, average=None)
        np.testing.assert_allclose(per_class(predict_logits(logits, labels)).numpy(), recalls, atol=1e-12)
        by_class = split_accuracy(logits, labels, split, average="classes")
        assert by_class["all"] == pytest.approx(recalls.mean(), abs=1e-12)
        assert by_class["few"] == pytest.approx(recalls[:3].mean(), abs=1e-12)


SPLIT = ClassSplit(few=torch.tensor([2]), medium=torch.tensor([1]), many=torch.tensor([0]))


def test_weights_of_samples_and_of_classes_differ() -> None:
    # Class 0: three of three right; class 1: none of one; class 2 is not in the test set.
    logits = torch.tensor([[2.0, 1.0, 0.0]] * 4)
    labels = [0, 0, 0, 1]
    by_sample = split_accuracy(logits, labels, SPLIT)
    by_class = split_accuracy(logits, labels, SPLIT, average="classes")
    assert math.isnan(by_sample.pop("few")) and math.isnan(by_class.pop("few"))
    assert by_sample == {"medium": 0.0, "many": 1.0, "all": 0.75}
    assert by_class == {"medium": 0.0, "many": 1.0, "all": 0.5}


def test_ties_go_to_the_lower_class() -> None:
    logits = torch.zeros(3, 3)
    assert label_ranks(logits, [0, 1, 2]).tolist() == [0, 1, 2]
    assert split_accuracy(logits, [0, 1, 2], SPLIT) == {"few": 0.0, "medium": 0.0, "many": 1.0, "all": 1 / 3}
    assert split_accuracy(logits, [0, 1, 2], SPLIT, top_k=2)["medium"] == 1.0


def test_no_sample_at_all_is_nan() -> None:
    assert all(math.isnan(value) for value in split_accuracy(torch.zeros(0, 3), [], SPLIT).values())
    assert per_class(predict_logits(torch.zeros(0, 3), [])).isnan().all()


def test_masked_classes_rank_last() -> None:
    logits = torch.tensor([[0.0, -torch.inf, torch.inf]])
    assert [label_ranks(logits, [c]).item() for c in range(3)] == [1, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype_and_arrays(dtype: torch.dtype) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]], dtype=dtype, requires_grad=True)
    wanted = {"few": 1.0, "medium": math.nan, "many": 1.0, "all": 1.0}
    assert split_accuracy(logits, torch.tensor([0, 2], dtype=torch.int32), SPLIT) == pytest.approx(wanted, nan_ok=True)
    as_array = logits.detach().float().numpy()
    assert split_accuracy(as_array, np.array([0, 2]), SPLIT) == pytest.approx(wanted, nan_ok=True)


@pytest.mark.parametrize(
    ("logits", "labels", "options", "error", "message"),
    [
        (torch.zeros(2, 3), [0, 3], {}, ValueError, r"labels must be in 0\.\.2, got 3 at index 1"),
        (torch.zeros(2, 3), [0], {}, ValueError, "one entry a sample, got 2 and 1"),
        (torch.zeros(2, 4), [0, 1], {}, ValueError, "split must be of the classes that logits are of, got 3 and 4 classes"),
        (torch.zeros(3), [0], {}, ValueError, r"logits must have shape \[n, N\], got \[3\]"),
        (torch.zeros(2, 3).long(), [0, 1], {}, TypeError, "logits must be floating point, got torch.int64"),
        (torch.zeros(2, 3), [0.0, 1.0], {}, TypeError, "labels must be integers"),
        (torch.tensor([[0.0] * 3, [0.0, 0.0, torch.nan]]), [0, 1], {}, ValueError, "got nan for sample 1, class 2"),
        (torch.zeros(2, 3), [0, 1], {"top_k": 0}, ValueError, "top_k must be between 1 and 3, got 0"),
        (torch.zeros(2, 3), [0, 1], {"top_k": 4}, ValueError, "top_k must be between 1 and 3, got 4"),
        (torch.zeros(2, 3), [0, 1], {"average": "micro"}, ValueError, "average must be one of samples, classes, got 'micro'"),
        (torch.zeros(2, 3), [0, 1], {"split": [0, 1, 2]}, TypeError, "split must be ClassSplit, got list"),
    ],
)
def test_split_accuracy_refuses(
    logits: Tensor, labels: object, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        split_accuracy(logits, labels, **{"split": SPLIT, **options})  # type: ignore[arg-type]
