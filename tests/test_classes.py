from __future__ import annotations

import doctest
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import alphaext.classes
from alphaext.classes import ClassSplit, class_counts, class_means, split_classes
from alphaext.utils.checks import check_integer, check_number, format_ids
from alphaext.utils.tensors import as_tensor, check_finite, check_floating, check_labels, check_same_device, check_shape


def data_folder() -> Path:
    folder = os.environ.get("ALPHAEXT_DATA")
    if not folder:
        pytest.skip("ALPHAEXT_DATA is not set: the published list files are checked only where they are")
    return Path(folder)


def test_examples_in_docstrings() -> None:
    results = doctest.testmod(alphaext.classes)
    assert results.attempted > 0
    assert results.failed == 0


# class_counts


@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(0, 5))
def test_counts_are_the_numbers_of_labels(labels: list[int], beyond: int) -> None:
    counts = class_counts(labels)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [labels.count(c) for c in range(max(labels) + 1)]
    num_classes = max(labels) + 1 + beyond
    assert class_counts(np.array(labels), num_classes).tolist() == [labels.count(c) for c in range(num_classes)]


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_counts_take_any_integer_dtype(dtype: type[np.generic]) -> None:
    assert class_counts(np.array([2, 0, 2], dtype=dtype)).tolist() == [1, 0, 2]
    assert class_counts(torch.tensor([2, 0, 2], dtype=torch.int16)).tolist() == [1, 0, 2]


def test_counts_without_labels() -> None:
    assert class_counts([], 3).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"labels is empty.*num_classes"):
        class_counts([])


@pytest.mark.parametrize(
    ("labels", "num_classes", "error", "message"),
    [
        ([0, 1, 7, 9], 5, ValueError, r"labels must be in 0\.\.4, got 7 at index 2"),
        ([0, -1], None, ValueError, "labels must be at least 0, got -1 at index 1"),
        ([[0, 1]], 5, ValueError, r"labels must have shape \[n\], got \[1, 2\]"),
        ([0.0, 1.0], 5, TypeError, r"labels must be integers, got torch.float64; convert with .long\(\)"),
        ([True, False], 5, TypeError, "labels must be integers, got torch.bool"),
        (["cat"], 5, TypeError, "labels must be a tensor, a NumPy array or a list of numbers, got list"),
        ([0], 0, ValueError, "num_classes must be at least 1, got 0"),
        ([0], 2.5, TypeError, "num_classes must be an integer, got 2.5"),
    ],
)
def test_counts_refuse(labels: object, num_classes: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        class_counts(labels, num_classes)  # type: ignore[arg-type]


# split_classes


def test_thresholds_of_the_paper_include_both_ends_in_medium() -> None:
    split = split_classes([101, 19, 20, 100, 5000, 1, 21, 99])
    assert split.few.tolist() == [1, 5]
    assert split.medium.tolist() == [2, 3, 6, 7]
    assert split.many.tolist() == [0, 4]
    assert split.base.tolist() == [0, 2, 3, 4, 6, 7]
    assert split.num_classes == 8
    assert repr(split) == "ClassSplit(few=2, medium=4, many=2)"
    assert all(ids.dtype == torch.int64 for ids in (split.few, split.medium, split.many, split.base))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=50), st.integers(0, 40), st.integers(0, 40))
def test_split_follows_its_definition(counts: list[int], few_below: int, many_above: int) -> None:
    if few_below > many_above + 1:
        with pytest.raises(ValueError, match="few_below must be at most many_above"):
            split_classes(counts, few_below=few_below, many_above=many_above)
        return
    split = split_classes(counts, few_below=few_below, many_above=many_above)
    assert split.few.tolist() == [c for c, count in enumerate(counts) if count < few_below]
    assert split.many.tolist() == [c for c, count in enumerate(counts) if count > many_above]
    assert split.medium.tolist() == [c for c, count in enumerate(counts) if few_below <= count <= many_above]
    assert split.base.tolist() == [c for c, count in enumerate(counts) if count >= few_below]
    assert split.num_classes == len(counts)


@pytest.mark.parametrize(
    ("counts", "thresholds", "error", "message"),
    [
        ([0, 0], {}, ValueError, "counts must be above 0 for some class, all are 0"),
        ([5, -2], {}, ValueError, "counts must be at least 0, got -2 at index 1"),
        ([5.0, 2.0], {}, TypeError, "counts must be integers, got torch.float64"),
        ([], {}, ValueError, "counts is empty"),
        ([[5]], {}, ValueError, r"counts must have shape \[n\], got \[1, 1\]"),
        ([5], {"few_below": 100, "many_above": 20}, ValueError, "few_below must be at most many_above .* got 100"),
        ([5], {"few_below": -1}, ValueError, "few_below must be at least 0, got -1"),
        ([5], {"many_above": 0.5}, TypeError, "many_above must be an integer, got 0.5"),
        ([5], {"few_below": True}, TypeError, "few_below must be an integer, got True"),
    ],
)
def test_split_refuses(counts: object, thresholds: dict[str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        split_classes(counts, **thresholds)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "numbers", "few_samples"),
    [("ImageNet_LT_class_counts.txt", (385, 479, 136), 1643), ("Places_LT_train.txt", (131, 163, 71), 804)],
)
def test_published_lists_split_as_published(source: str, numbers: tuple[int, int, int], few_samples: int) -> None:
    path = data_folder() / "lists" / source
    last_numbers = np.array([int(line.rsplit(" ", 1)[-1]) for line in path.read_text().splitlines()])
    counts = torch.from_numpy(last_numbers) if "counts" in source else class_counts(last_numbers)
    split = split_classes(counts)
    assert (split.many.numel(), split.medium.numel(), split.few.numel()) == numbers
    assert int(counts[split.few].sum()) == few_samples


# ClassSplit


def test_split_by_hand_is_sorted_and_compared_by_value() -> None:
    split = ClassSplit(few=[4, 1], medium=np.array([0]), many=torch.tensor([3, 2]))  # type: ignore[arg-type]
    assert split.few.tolist() == [1, 4]
    assert split == ClassSplit(few=[1, 4], medium=[0], many=[2, 3])  # type: ignore[arg-type]
    assert split != ClassSplit(few=[1], medium=[0, 4], many=[2, 3])  # type: ignore[arg-type]
    assert split != "ClassSplit"
    with pytest.raises(AttributeError):
        split.few = torch.tensor([0])  # type: ignore[misc]


@pytest.mark.parametrize(
    ("few", "medium", "many", "message"),
    [
        ([0, 1], [1], [2], "few and medium share the classes 1"),
        ([0], [1], [0], "few and many share the classes 0"),
        ([0, 0], [1], [2], "few must name each class once, got class 0 more than once"),
        ([0], [1], [4], "must cover every class from 0 to 4, in none of them: 2, 3"),
        ([-1], [0], [1], "few must be at least 0, got -1 at index 0"),
        ([], [], [], "all empty"),
    ],
)
def test_split_by_hand_refuses(few: list[int], medium: list[int], many: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassSplit(few=few, medium=medium, many=many)  # type: ignore[arg-type]


def test_a_class_without_samples_is_in_no_split() -> None:
    split = split_classes([500, 0, 3, 30, 0])
    assert (split.few.tolist(), split.base.tolist(), split.empty.tolist()) == ([2], [0, 3], [1, 4])
    assert split.num_classes == 5 and repr(split) == "ClassSplit(few=1, medium=1, many=1, empty=2)"
    assert split == split.cpu() and split != split_classes([500, 1, 3, 30, 1])
    with pytest.raises(ValueError, match="few and empty share the classes 1"):
        ClassSplit(few=[1], medium=[0], many=[], empty=[1])  # type: ignore[arg-type]
    means = class_means(torch.ones(2, 3), [0, 2], num_classes=4)
    assert means.tolist() == [[1.0] * 3, [0.0] * 3, [1.0] * 3, [0.0] * 3]


# The checks that all modules share


@pytest.mark.parametrize("gamma", [1.0, 0.7, 1, 1e-9, np.float32(0.5)])
def test_gamma_within_its_interval(gamma: float) -> None:
    assert check_number(gamma, "gamma", above=0, maximum=1) == float(gamma)


@pytest.mark.parametrize("gamma", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_gamma_outside_its_interval(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma must be finite and above 0 and at most 1, got"):
        check_number(gamma, "gamma", above=0, maximum=1)


@pytest.mark.parametrize("gamma", ["0.7", None, True])
def test_gamma_that_is_no_number(gamma: object) -> None:
    with pytest.raises(TypeError, match="gamma must be a number, finite and above 0 and at most 1, got"):
        check_number(gamma, "gamma", above=0, maximum=1)


def test_integer_bounds() -> None:
    assert check_integer(np.int32(3), "top_k", minimum=1, maximum=3) == 3
    with pytest.raises(ValueError, match="top_k must be between 1 and 3, got 4"):
        check_integer(4, "top_k", minimum=1, maximum=3)
    with pytest.raises(ValueError, match="top_k must be at most 3, got 4"):
        check_integer(4, "top_k", maximum=3)


def test_floating() -> None:
    check_floating(torch.zeros(2, dtype=torch.bfloat16), "features")
    with pytest.raises(TypeError, match=r"features must be floating point, got torch.int64; convert with .float\(\)"):
        check_floating(torch.zeros(2, dtype=torch.int64), "features")


def test_finite_names_the_place() -> None:
    check_finite(torch.zeros(0, 3), "weight")
    values = torch.zeros(2, 3)
    values[1, 2] = -torch.inf
    with pytest.raises(ValueError, match=r"weight must be finite, got -inf at index \[1, 2\]$"):
        check_finite(values, "weight")
    values[0, 1] = torch.nan
    with pytest.raises(ValueError, match=r"weight must be finite, got nan at index \[0, 1\] \(2 such values\)"):
        check_finite(values, "weight")
    with pytest.raises(ValueError, match=r"scale must be finite, got nan at index \[\]"):
        check_finite(torch.tensor(torch.nan), "scale")


def test_shape() -> None:
    check_shape(torch.zeros(4, 2), "weight", ("N", 2))
    for shape in [(4, 3), (4,), (4, 2, 1)]:
        with pytest.raises(ValueError, match=r"weight must have shape \[N, 2\], got"):
            check_shape(torch.zeros(shape), "weight", ("N", 2))


def test_same_device_passes_over_what_is_no_tensor() -> None:
    here, elsewhere = torch.zeros(1), torch.zeros(1, device="meta")
    check_same_device(features=here, labels=np.zeros(1), means=None, weight=here)
    with pytest.raises(ValueError, match="labels is on meta but features is on cpu; move both"):
        check_same_device(features=here, means=None, labels=elsewhere)


def test_labels_come_back_as_int64() -> None:
    assert check_labels(np.array([1, 0], dtype=np.uint8), 2).dtype == torch.int64
    assert check_labels([], 2).dtype == torch.int64
    with pytest.raises(ValueError, match=r"targets must be in 0\.\.1, got 2 at index 0"):
        check_labels([2], 2, "targets")


@pytest.mark.filterwarnings("error")
def test_arrays_that_torch_would_refuse_or_warn_about() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    read_only = values.copy()
    read_only.flags.writeable = False
    for array in (read_only, values[::-1][::-1], values.astype(">f4"), values.astype("<f4")):
        assert torch.equal(as_tensor(array, "features"), torch.arange(6.0).reshape(2, 3))
    assert torch.equal(as_tensor(values[::-1], "features"), torch.tensor([[3.0, 4.0, 5.0], [0.0, 1.0, 2.0]]))


def test_ids_are_listed_up_to_a_limit() -> None:
    assert format_ids(range(10)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert format_ids(range(4), limit=2) == "0, 1, ... (4 in all)"
