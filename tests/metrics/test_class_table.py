from __future__ import annotations

import csv
import doctest
import importlib
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from public_names import public_names
from rich.console import Console
from rich.table import Table
from torch import nn

from alphaext import AlphaNet, ClassSplit
from alphaext.metrics.class_table import ClassRow, class_table, write_class_table
from alphaext.metrics.comparison import compare
from alphaext.metrics.evaluation import bootstrap_intervals, per_class, split_metrics
from alphaext.metrics.predictions import Predictions, predict_logits
from alphaext.metrics.terminal import class_rows_table, comparison_table, losses_table, metrics_table
from alphaext.utils.text import percent


@pytest.mark.parametrize("name", ["predictions", "bootstrap", "evaluation", "comparison", "class_table"])
def test_examples_in_docstrings(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"alphaext.metrics.{name}"), extraglobs=public_names())
    assert results.failed == 0 and results.attempted > 0


SPLIT = ClassSplit(few=torch.tensor([3, 4]), medium=torch.tensor([2]), many=torch.tensor([0, 1]))
COUNTS = [500, 300, 50, 5, 3]
NAMES = ["cat", "dog, big", 'the "fox"', "=1+1", "Bär\nzwei"]
LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 3, 3, 4])  # none of class 2


def predictions(predicted: Sequence[int]) -> Predictions:
    return predict_logits(nn.functional.one_hot(torch.tensor(predicted), 5).float(), LABELS)


BEFORE = predictions([0, 0, 0, 0, 1, 1, 0, 1, 0])
AFTER = predictions([0, 0, 3, 4, 1, 1, 3, 1, 4])
MEANS = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0], [6.0, 7.0], [0.0, 1.0]])


def head(gamma: float = 0.5) -> AlphaNet:
    return AlphaNet.from_linear(nn.Linear(2, 5), members=[[4, 0, 1], [3, 2, 1]], gamma=gamma, seed=0)


def test_rows() -> None:
    rows = class_table(BEFORE, AFTER, SPLIT, COUNTS, class_names=NAMES, head=head(), class_means=MEANS)
    assert [row.class_id for row in rows] == [0, 1, 2, 3, 4] and [row.name for row in rows] == NAMES
    assert [row.split for row in rows] == ["many", "many", "medium", "few", "few"]
    assert [row.training_images for row in rows] == COUNTS
    assert [row.test_samples for row in rows] == [4, 2, 0, 2, 1]
    assert [row.accuracy_before for row in rows] == pytest.approx(per_class(BEFORE).tolist(), nan_ok=True)
    assert [row.accuracy_after for row in rows] == pytest.approx([0.5, 1.0, math.nan, 0.5, 1.0], nan_ok=True)
    assert [row.gain for row in rows] == pytest.approx([-0.5, 0.0, math.nan, 0.5, 1.0], nan_ok=True)
    assert rows[3].neighbors == (2, 1) and rows[3].neighbor_names == ('the "fox"', "dog, big")
    assert rows[3].own_alpha == 0.5 and rows[3].alphas == (0.25, 0.25)
    assert rows[3].distance == 1.0 and rows[4].distance == 1.0
    for row in rows[:3]:
        assert (row.neighbors, row.neighbor_names, row.alphas, row.own_alpha, row.distance) == ((), (), (), None, None)


def test_rows_without_names_or_head() -> None:
    rows = class_table(BEFORE, AFTER, SPLIT, torch.tensor(COUNTS))
    assert [row.name for row in rows] == ["0", "1", "2", "3", "4"]
    assert all(row.neighbors == () and row.own_alpha is None for row in rows)
    rows = class_table(BEFORE, AFTER, SPLIT, COUNTS, head=head())
    assert rows[4].neighbor_names == ("0", "1") and rows[4].distance is None


def test_the_closest_neighbour_need_not_be_the_first() -> None:
    means = MEANS.clone()
    means[2] = torch.tensor([100.0, 100.0])
    rows = class_table(BEFORE, AFTER, SPLIT, COUNTS, head=head(), class_means=means)
    assert rows[3].distance == pytest.approx(math.hypot(3, 3))


@pytest.mark.parametrize(
    ("sort_by", "descending", "order"),
    [
        ("class_id", True, [4, 3, 2, 1, 0]),
        ("gain", False, [0, 1, 3, 4, 2]),
        ("gain", True, [4, 3, 1, 0, 2]),
        ("accuracy_before", True, [0, 1, 3, 4, 2]),
        ("accuracy_after", False, [0, 3, 1, 4, 2]),
        ("training_images", False, [4, 3, 2, 1, 0]),
        ("test_samples", True, [0, 1, 3, 4, 2]),
        ("split", False, [3, 4, 2, 0, 1]),
        ("name", False, [3, 4, 0, 1, 2]),
        ("distance", True, [3, 4, 0, 1, 2]),
        ("own_alpha", False, [3, 4, 0, 1, 2]),
    ],
)
def test_sorting(sort_by: str, descending: bool, order: list[int]) -> None:
    """What is not known comes last either way, and equal rows in the order of classes."""
    rows = class_table(
        BEFORE, AFTER, SPLIT, COUNTS, class_names=NAMES, head=head(), class_means=MEANS, sort_by=sort_by, descending=descending
    )
    assert [row.class_id for row in rows] == order


def test_csv(tmp_path: Path) -> None:
    rows = class_table(BEFORE, AFTER, SPLIT, COUNTS, class_names=NAMES, head=head(), class_means=MEANS)
    write_class_table(rows, tmp_path / "classes.csv")
    with (tmp_path / "classes.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [row["name"] for row in read] == NAMES
    assert [float(row["accuracy_after"]) if row["accuracy_after"] else math.nan for row in read] == pytest.approx(
        [row.accuracy_after for row in rows], nan_ok=True
    )
    assert read[2]["gain"] == "" and read[0]["own_alpha"] == "" and read[0]["neighbor_2"] == ""
    assert [read[3][f"neighbor_{k}_name"] for k in (1, 2)] == ['the "fox"', "dog, big"]
    assert [float(read[3][f"neighbor_{k}_alpha"]) for k in (1, 2)] == list(rows[3].alphas)
    assert read[3]["distance"] == "1.0" and read[3]["neighbor_1"] == "2"
    assert all(None not in row and None not in row.values() for row in read)  # no row is longer or shorter than the header


def test_json(tmp_path: Path) -> None:
    rows = class_table(BEFORE, AFTER, SPLIT, COUNTS, class_names=NAMES, head=head())
    write_class_table(rows, tmp_path / "classes.json")
    read = json.loads((tmp_path / "classes.json").read_text(encoding="utf-8"))["classes"]
    assert read[2]["gain"] is None and read[3]["neighbors"] == [2, 1] and read[4]["name"] == "Bär\nzwei"
    assert [row["class_id"] for row in read] == [0, 1, 2, 3, 4]


def test_files_are_replaced_only_on_request_and_never_left_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = class_table(BEFORE, AFTER, SPLIT, COUNTS)
    path = tmp_path / "classes.csv"
    write_class_table(rows, path)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="path exists already"):
        write_class_table(rows[:1], path)
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_class_table(rows[:1], path, overwrite=True)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write_class_table([], path, overwrite=True)
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("path", "rows", "error", "message"),
    [
        ("classes.txt", [], ValueError, "path must end in .csv or .json, got"),
        ("missing/classes.csv", [], ValueError, "path must be a file in a directory that exists"),
        (".", [], ValueError, "path must be a file, got the directory"),
        ("classes.csv", [{"class_id": 0}], TypeError, "rows must be ClassRow, got dict"),
    ],
)
def test_write_refuses(tmp_path: Path, path: str, rows: list[object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        write_class_table(rows, tmp_path / path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


OTHER = predict_logits(torch.eye(5), [0, 1, 2, 3, 4])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"after": OTHER}, ValueError, "must be of the same samples, got 9 and 5 samples"),
        ({"before": None}, TypeError, "before must be Predictions, got NoneType"),
        ({"split": ClassSplit(few=[1], medium=[], many=[0])}, ValueError, "split must be of the classes that before are of"),
        ({"counts": [1, 2]}, ValueError, "counts must have shape [5], got [2]"),
        ({"counts": [1.0] * 5}, TypeError, "counts must be integers"),
        ({"counts": [1, 2, 3, 4, -5]}, ValueError, "counts must be at least 0, got -5 at index 4"),
        ({"class_names": ["a", "b"]}, ValueError, "class_names must have one name a class, got 2 names for num_classes = 5"),
        ({"class_names": "abcde"}, TypeError, "class_names must be a sequence of texts"),
        ({"class_names": [0, 1, 2, 3, 4]}, TypeError, "class_names must be a sequence of texts"),
        ({"sort_by": "losses"}, ValueError, "sort_by must be one of class_id, name, split"),
        ({"class_means": MEANS}, ValueError, "give head as well"),
        ({"head": nn.Linear(2, 5)}, TypeError, "head must be an AlphaNet, got Linear"),
        (
            {"head": AlphaNet.from_linear(nn.Linear(2, 3), members=[[2, 0]], seed=0)},
            ValueError,
            "head must be of the split's 5 classes, got 3",
        ),
        ({"head": head(), "class_means": MEANS[:4]}, ValueError, "class_means must have shape [5, D], got [4, 2]"),
        ({"head": head(), "class_means": MEANS.long()}, TypeError, "class_means must be floating point"),
        ({"head": head(), "class_means": MEANS / 0}, ValueError, "class_means must be finite"),
    ],
)
def test_class_table_refuses(options: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"before": BEFORE, "after": AFTER, "split": SPLIT, "counts": COUNTS}
    with pytest.raises(error, match=re.escape(message)):
        class_table(**{**arguments, **options})  # type: ignore[arg-type]


# Tables for the terminal


def printed(table: Table) -> list[list[str]]:
    """The cells of each line, the header first, as a terminal shows them."""
    console = Console(width=200, color_system=None, record=True, file=io.StringIO())
    console.print(table)
    lines = [line for line in console.export_text().splitlines() if line.strip() and "─" not in line]
    return [re.split(r"\s{2,}", line.strip()) for line in lines]


def test_percent() -> None:
    assert percent(0.12345) == "12.3" and percent(1.0) == "100.0" and percent(-0.0) == "0.0"
    assert percent(0.02, sign=True) == "+2.0" and percent(-0.02, sign=True) == "-2.0" and percent(1e-5, sign=True) == "0.0"
    assert percent(math.nan) == percent(None) == "-"


def test_metrics_table() -> None:
    metrics = {"before [red]": split_metrics(BEFORE, SPLIT), "after": split_metrics(AFTER, SPLIT)}
    assert printed(metrics_table(metrics, top5=False)) == [
        ["classifier", "top", "few", "medium", "many", "all"],
        ["before [red]", "1", "0.0", "-", "100.0", "66.7"],
        ["after", "1", "66.7", "-", "66.7", "66.7"],
    ]
    assert printed(metrics_table(metrics, average="classes"))[1:] == [
        ["before [red]", "1", "0.0", "-", "100.0", "50.0"],
        ["5", "100.0", "-", "100.0", "100.0"],
        ["after", "1", "75.0", "-", "75.0", "75.0"],
        ["5", "100.0", "-", "100.0", "100.0"],
    ]
    intervals = {"after": {"few": (0.5, 0.9), "medium": (math.nan, math.nan)}}
    assert printed(metrics_table(metrics, intervals=intervals, top5=False))[2][2:4] == ["66.7 ±20.0", "-"]
    ranges = metrics_table(metrics, intervals=intervals, interval_style="range", top5=False)
    assert printed(ranges)[2][2:4] == ["66.7 [50.0, 90.0]", "-"]
    whole = {"before [red]": bootstrap_intervals(BEFORE, SPLIT), "after": bootstrap_intervals(AFTER, SPLIT)}
    assert len(printed(metrics_table(metrics, intervals=whole))) == 5


def test_comparison_table() -> None:
    labels = torch.arange(200) % 2
    split = ClassSplit(few=[1], medium=[], many=[0])  # type: ignore[arg-type]
    before = predict_logits(torch.tensor([[1.0, 0.0]]).expand(200, 2), labels)
    after = predict_logits(nn.functional.one_hot(labels, 2).float(), labels)
    assert printed(comparison_table(compare(before, after, split), title="a [b]")) == [
        ["a [b]"],
        ["classes", "samples", "before", "after", "difference", "gained", "lost", "to few", "p", "verdict"],
        ["few", "100", "0.0", "100.0", "+100.0 [+100.0, +100.0]", "100", "0", "0", "<0.001", "better"],
        ["medium", "0", "-", "-", "-", "0", "0", "0", "-", "no samples"],
        ["many", "100", "100.0", "100.0", "0.0 [0.0, 0.0]", "0", "0", "0", "1.000", "no difference shown"],
        ["all", "200", "50.0", "100.0", "+50.0 [+50.0, +50.0]", "100", "0", "0", "<0.001", "better"],
    ]


def test_losses_table() -> None:
    comparison = compare(BEFORE, AFTER, SPLIT, resamples=10)
    header, row = printed(losses_table(comparison, class_names=["[a]", "b", "c", "d", "e"]))
    assert header[0] == "class" and header[-1] == "lost samples are taken for"
    assert row == ["[a]", "4", "100.0", "50.0", "0", "2", "2", "d (1), e (1)"]
    assert printed(losses_table(comparison))[1][-1] == "3 (1), 4 (1)"


def test_class_rows_table() -> None:
    rows = class_table(BEFORE, AFTER, SPLIT, COUNTS, class_names=["[a]", "b", "c", "d", "e"], head=head(), class_means=MEANS)
    lines = printed(class_rows_table(rows))
    assert lines[0][-3:] == ["alpha", "distance", "neighbours (alpha)"] and len(lines) == 6
    assert lines[1] == ["[a]", "many", "500", "4", "100.0", "50.0", "-50.0", "-", "-"]
    assert lines[4] == ["d", "few", "5", "2", "0.0", "50.0", "+50.0", "0.50", "1", "c (0.25), b (0.25)"]
    assert len(printed(class_rows_table(rows, limit=2))) == 3
    assert printed(class_rows_table(class_table(BEFORE, AFTER, SPLIT, COUNTS)))[0][-1] == "gain"


def test_tables_refuse() -> None:
    metrics = {"before": split_metrics(BEFORE, SPLIT)}
    with pytest.raises(ValueError, match="interval_style must be one of plus_minus, range, got 'bars'"):
        metrics_table(metrics, interval_style="bars")
    with pytest.raises(ValueError, match="average must be one of samples, classes, got 'all'"):
        metrics_table(metrics, average="all")
    with pytest.raises(ValueError, match="intervals must be of classifiers that metrics has, got 'after'"):
        metrics_table(metrics, intervals={"after": {}})
    with pytest.raises(TypeError, match="comparison must be Comparison, got dict"):
        comparison_table({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="comparison must be Comparison, got dict"):
        losses_table({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="class_names must be one a class, got 3 names, and class 4 in the comparison"):
        losses_table(compare(BEFORE, AFTER, SPLIT, resamples=10), class_names=["a", "b", "c"])
    with pytest.raises(TypeError, match="rows must be ClassRow, got int"):
        class_rows_table([1])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="limit must be at least 0, got -1"):
        class_rows_table([ClassRow(0, "a", "few", 1, 1, 0.0, 0.0, 0.0)], limit=-1)
