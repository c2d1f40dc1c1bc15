"""Which confusions a second classifier mends and makes."""

from __future__ import annotations

import csv
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from alphaext import ClassSplit
from alphaext.features import read_features, write_features
from alphaext.metrics import Predictions, predict
from alphaext.metrics.confusions import ConfusionRow, confusion_changes, read_confusions, write_confusions
from alphaext.study.plans import StudyOptions
from alphaext.study.run import CONFUSIONS, run_study

SPLIT = ClassSplit(few=[3, 4], medium=[2], many=[0, 1])
PART = {0: "many", 1: "many", 2: "medium", 3: "few", 4: "few"}
ODD = ["<script>alert(1)</script>", 'a,"b"\nc', "🦄 unicorn", "שלום", "x" * 200]


def predictions(labels: list[int], predicted: list[int], num_classes: int = 5) -> Predictions:
    ranks = [0 if label == guess else 1 for label, guess in zip(labels, predicted, strict=True)]
    return Predictions(ranks=ranks, predicted=predicted, labels=labels, num_classes=num_classes)


def pairs_of(rows: list[ConfusionRow]) -> dict[tuple[int, int], tuple[int, int]]:
    return {(r.true_class, r.predicted_class): (r.before, r.after) for r in rows if not r.is_total}


samples = st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=60)


@settings(deadline=None)
@given(samples)
def test_rows_count_what_a_plain_count_does(drawn):
    labels, was, now = (list(column) for column in zip(*drawn, strict=True))
    rows = confusion_changes(predictions(labels, was), predictions(labels, now), SPLIT)
    before = Counter((label, guess) for label, guess in zip(labels, was, strict=True) if label != guess)
    after = Counter((label, guess) for label, guess in zip(labels, now, strict=True) if label != guess)
    changed = {pair: (before[pair], after[pair]) for pair in {*before, *after} if before[pair] != after[pair]}
    assert pairs_of(rows) == changed
    changes = [abs(row.change) for row in rows if not row.is_total]
    assert changes == sorted(changes, reverse=True)
    totals = {(r.true_split, r.predicted_split): r for r in rows if r.is_total}
    assert sum(r.before for r in totals.values()) == before.total() and sum(r.after for r in totals.values()) == after.total()
    for (true, predicted), total in totals.items():
        own = {pair for pair in {*before, *after} if (PART[pair[0]], PART[pair[1]]) == (true, predicted)}
        assert total.mended == sum(max(before[pair] - after[pair], 0) for pair in own)
        assert total.new == sum(max(after[pair] - before[pair], 0) for pair in own)
        assert total.before - total.mended + total.new == total.after


def test_totals_are_of_all_pairs_whatever_the_limit():
    before = predictions([3, 3, 4, 0], [0, 0, 1, 4])
    after = predictions([3, 3, 4, 0], [3, 3, 4, 0])
    rows = confusion_changes(before, after, SPLIT, limit=1)
    assert pairs_of(rows) == {(3, 0): (2, 0)}
    assert [(r.true_split, r.predicted_split, r.before, r.after, r.mended, r.new) for r in rows if r.is_total] == [
        ("few", "many", 3, 0, 3, 0),
        ("many", "few", 1, 0, 1, 0),
    ]
    assert not pairs_of(confusion_changes(before, after, SPLIT, limit=0))


def test_equal_changes_come_in_the_order_of_classes():
    rows = confusion_changes(predictions([4, 3, 0], [0, 1, 2]), predictions([4, 3, 0], [4, 3, 0]), SPLIT)
    assert list(pairs_of(rows)) == [(0, 2), (3, 1), (4, 0)]


def test_classifiers_that_confuse_nothing():
    same = predictions([0, 1], [0, 1])
    assert confusion_changes(same, same, SPLIT) == []


def test_the_file_is_read_as_it_was_written(tmp_path):
    before, after = predictions([0, 1, 2, 3, 4], [1, 2, 3, 4, 0]), predictions([0, 1, 2, 3, 4], [2, 1, 2, 4, 1])
    rows = confusion_changes(before, after, SPLIT, class_names=ODD)
    write_confusions(rows, tmp_path / "confusions.csv")
    assert read_confusions(tmp_path / "confusions.csv") == rows
    with pytest.raises(ValueError, match="exists already"):
        write_confusions(rows, tmp_path / "confusions.csv")
    write_confusions(rows, tmp_path / "confusions.json")
    assert (tmp_path / "confusions.json").read_text(encoding="utf-8").count('"true_class"') == len(rows)
    with pytest.raises(ValueError, match=r"must end in .csv or .json"):
        write_confusions(rows, tmp_path / "confusions.txt")
    with pytest.raises(TypeError, match="ConfusionRow"):
        write_confusions([1], tmp_path / "other.csv")  # type: ignore[list-item]


def test_other_samples_and_bad_arguments_are_refused():
    before = predictions([0, 1], [0, 1])
    with pytest.raises(ValueError, match="same samples"):
        confusion_changes(before, predictions([1, 0], [1, 0]), SPLIT)
    with pytest.raises(ValueError, match="limit must be at least 0"):
        confusion_changes(before, before, SPLIT, limit=-1)
    with pytest.raises(ValueError, match="class_names must have one name a class"):
        confusion_changes(before, before, SPLIT, class_names=["a"])
    with pytest.raises(TypeError, match="before"):
        confusion_changes(torch.zeros(2), before, SPLIT)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("header", 0), "class", "line 1: its columns must be true_class"),
        ((1, 2), "rare", "line 2: true_split must be one of few, medium, many, empty, got 'rare'"),
        ((1, 6), "-3", "line 2: before must be an integer and at least 0, got '-3'"),
        ((2, 0), "x", "line 3: true_class must be an integer"),
    ],
)
def test_a_bad_file_is_told_by_its_line(tmp_path, place, value, message):
    path = tmp_path / "confusions.csv"
    write_confusions(confusion_changes(predictions([3, 0], [0, 1]), predictions([3, 0], [3, 0]), SPLIT), path)
    lines = list(csv.reader(path.open(encoding="utf-8")))
    row, column = place
    lines[0 if row == "header" else row][column] = value
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    with pytest.raises(ValueError, match="confusions.csv' is not a table of confusions") as error:
        read_confusions(path)
    assert message in str(error.value)


def test_a_file_of_other_bytes_is_refused(tmp_path):
    path = tmp_path / "confusions.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not a table of confusions: line 1: not UTF-8"):
        read_confusions(path)
    path.write_text("")
    with pytest.raises(ValueError, match="its columns must be"):
        read_confusions(path)


def test_a_study_writes_them_and_again_where_they_are_missing(tmp_path):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(5).repeat_interleave(torch.tensor([30, 30, 30, 9, 5]))
    for part in ("train", "val", "test"):
        features = torch.randn(len(labels), 8, generator=generator)
        write_features(tmp_path / part, features, labels, num_classes=5, class_names=ODD)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = nn.Linear(8, 5)
    options = StudyOptions(experiments=["compare"], gammas=[0.5], epochs=1, seeds=1, top_k=2)
    path = tmp_path / "study" / CONFUSIONS

    def run() -> bytes:
        run_study(tmp_path, linear, tmp_path / "study", options, many_above=20, progress=False)
        return path.read_bytes()

    written = run()
    rows = read_confusions(path)
    test = read_features(tmp_path / "test")
    before = predict(linear, test.features, test.labels)
    assert sum(row.before for row in rows if row.is_total) == int((before.ranks > 0).sum())
    assert {row.true_name for row in rows if not row.is_total} <= set(ODD)
    path.unlink()
    assert run() == written
