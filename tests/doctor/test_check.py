from __future__ import annotations

import doctest
import importlib
import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from alphaext.classes import split_classes
from alphaext.data import ImageReadError, LabelledImages, from_torchvision, read_image_folder, write_list
from alphaext.data.images import ArrayImages, FileImages
from alphaext.doctor import images as image_reading
from alphaext.doctor.check import DataReport, Finding, check_classifier_order, check_data
from alphaext.doctor.report import plural

Image = pytest.importorskip("PIL.Image", reason="images need Pillow")

COUNTS = [130, 60, 30, 25, 22, 21, 4]
"""Training images of seven classes that are as they should be: one many, five medium, one few."""


def arrays(labels: Any, first: int = 0, num_classes: int | None = None, names: Any = None) -> ArrayImages:
    """Images whose pixels are different wherever ``first`` + index is."""
    values = np.arange(first, first + len(labels), dtype=np.uint32)
    pixels = values.view(np.uint8).reshape(len(labels), 2, 2)
    return ArrayImages(pixels, labels, f"from{first}.npz", num_classes, names)


def healthy(names: Any = None) -> tuple[ArrayImages, ArrayImages, ArrayImages]:
    train = arrays(torch.arange(7).repeat_interleave(torch.tensor(COUNTS)), names=names)
    return train, arrays(torch.arange(7).repeat(2), 1000, 7), arrays(torch.arange(7).repeat(3), 2000, 7)


def files(root: Path, entries: dict[str, int], num_classes: int | None = None, names: Any = None) -> FileImages:
    """Image files, made where they are not there yet, each of its own."""
    for path in entries:
        target = root / path
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(list(path.encode())).integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(target)
    return FileImages(root, list(entries), list(entries.values()), num_classes, names)


def lists(tmp_path: Path, *parts: dict[str, int], num_classes: int | None = None) -> list[FileImages]:
    """Lists alone, for checks that read no image."""
    return [FileImages(tmp_path, list(entries), list(entries.values()), num_classes) for entries in parts]


def check(*parts: LabelledImages, **options: Any) -> DataReport:
    """The report, with small thresholds: few below 3, many above 5, two neighbours."""
    return check_data(*parts, **{"few_below": 3, "many_above": 5, "top_k": 2, "progress": False, "workers": 2, **options})


def found(report: DataReport, title: str) -> Finding:
    matching = [finding for finding in report.problems if finding.title == title]
    assert len(matching) == 1, [finding.title for finding in report.problems]
    return matching[0]


def titles(report: DataReport, level: str | None = None) -> set[str]:
    return {finding.title for finding in report.problems if level in (None, finding.level)}


@pytest.mark.parametrize("name", ["doctor.check"])
def test_examples_in_docstrings(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"alphaext.{name}"), extraglobs={"torch": torch, "nn": nn})
    assert results.attempted > 0
    assert results.failed == 0


# The report


def test_healthy_data_have_no_findings() -> None:
    train, val, test = healthy()
    report = check_data(train, val, test, progress=False)
    assert report.problems == [] and report.ok
    assert report.split == split_classes(COUNTS) and report.num_classes == 7 and report.class_names is None
    assert {part: counts.tolist() for part, counts in report.counts.items()} == {
        "train": COUNTS,
        "val": [2] * 7,
        "test": [3] * 7,
    }
    assert report.images == {"train": 292, "val": 14, "test": 21} and report.images_read == 327
    assert report.split_sizes() == {"few": 1, "medium": 5, "many": 1, "none": 0}


def test_validation_and_test_images_are_optional() -> None:
    train, val, test = healthy()
    assert check_data(train, progress=False).problems == []
    assert check_data(train, test=test, progress=False).images == {"train": 292, "test": 21}
    assert check_data(train, val, progress=False).problems == []


def test_arguments_are_checked_before_anything_is_read() -> None:
    train = healthy()[0]
    for arguments, options, error, message in (
        (([1],), {}, TypeError, "train must be LabelledImages, got list; alphaext.data.open_images makes them"),
        ((None,), {}, TypeError, "train must be LabelledImages"),
        ((train, "val.txt"), {}, TypeError, "val must be LabelledImages"),
        ((train,), {"few_below": 200}, ValueError, "few_below must be at most many_above"),
        ((train,), {"few_below": 0}, ValueError, "few_below must be at least 1"),
        ((train,), {"top_k": 0}, ValueError, "top_k must be at least 1"),
        ((train,), {"workers": 0}, ValueError, "workers must be at least 1"),
        ((train,), {"num_classes": 2.0}, TypeError, "num_classes must be an integer"),
        ((train,), {"num_classes": 3, "class_names": ["a"]}, ValueError, "class_names must have one name a class"),
    ):
        with pytest.raises(error, match=message):
            check_data(*arguments, progress=False, **options)  # type: ignore[arg-type]


def bad_report(tmp_path: Path) -> DataReport:
    names = [f"{'ab' if i % 2 else 'cd'}/{i} [red].png" for i in range(50)]
    train = FileImages(tmp_path, names, [i % 2 for i in range(50)], class_names=["[bold]x", "y\x1b[31m"])
    return check(train, healthy()[1])


@pytest.mark.parametrize(
    ("line", "disk", "cause"),
    [
        ("c/0.png", "c\\0.png", "backslashes"),
        ("c/0.png", '"c/0.png"', "in quotes"),
        ("c/0.png", "c/0.png/", "end with a slash"),
        ("c/0.png", "c/0.png,", "apart by a blank or a tab alone"),
        ("c/0.png", '"c/0.png",', "apart by a blank or a tab alone"),
        ("c/0.png", "c/0.png 7", "a third column"),
        ("val/0.png", "val/c/0.png", "class folders, into which the files are not sorted"),
        ("0.png", "val/c/0.png", "more folders than there are"),
        ("C/0.PNG", "c/0.png", "upper and lower case differ"),
        ("c/0.jpeg", "c/0.png", "another ending"),
        ("c\u00e9/0.png", "ce\u0301/0.png", "accents"),
    ],
)
def test_the_likely_cause_of_missing_images_is_named(tmp_path: Path, line: str, disk: str, cause: str) -> None:
    (tmp_path / line).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / line).touch()
    report = check(FileImages(tmp_path, [disk, disk + "x"], [0, 1]), read_images=False)
    assert cause in found(report, "missing images of train").detail
    (tmp_path / "there.png").touch()
    report = check(FileImages(tmp_path, ["there.png", disk], [0, 1]), read_images=False)
    assert cause in found(report, "missing images of train").detail


def test_a_report_is_json(tmp_path: Path) -> None:
    for report in (bad_report(tmp_path), check_data(*healthy(), progress=False)):
        content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert content["ok"] == report.ok
        assert content["counts"]["train"] == report.counts["train"].tolist()
        assert [problem["title"] for problem in content["problems"]] == [finding.title for finding in report.problems]
        assert [problem["items"] for problem in content["problems"]] == [list(finding.items) for finding in report.problems]
    assert content["split"] == {"few": [6], "medium": [1, 2, 3, 4, 5], "many": [0]}


def test_a_printed_report_shows_the_first_items_and_how_many_more(tmp_path: Path) -> None:
    report = bad_report(tmp_path)
    out = io.StringIO()
    report.print(Console(file=out, width=200))
    text = out.getvalue()
    assert "error: missing or unreadable images of train" in text and "50 of 50 images" in text
    # What looks like markup is printed as it is, and what would command the terminal is not.
    assert "cd/0 [red].png: no such file" in text and "[bold]x" in text
    assert "\x1b" not in text and "y\\x1b[31m" in text
    assert "cd/18 [red].png" in text and "cd/20 [red].png" not in text and "... and 30 more" in text
    assert len(found(report, "missing or unreadable images of train").items) == 50
    assert f"{len(report.of_level('error'))} errors, " in text


def test_a_healthy_report_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    check_data(*healthy(names=[f"kind {i}" for i in range(7)]), progress=False).print()
    text = capsys.readouterr().out
    assert "fewer than 20" in text and "20 to 100" in text and "more than 100" in text
    assert "kind 6" in text and "130" in text and "0 errors, 0 warnings, 0 notes (327 images read" in text


def test_many_classes_are_printed_in_part() -> None:
    out = io.StringIO()
    names = [f"kind {i}" for i in range(40)]
    check(arrays(torch.arange(40).repeat_interleave(4), names=names)).print(Console(file=out, width=100))
    shown = {name for name in names if f" {name} " in out.getvalue()}
    assert shown == {f"kind {i}" for i in (0, 1, 2, 3, 4, 35, 36, 37, 38, 39)}


def test_errors_come_first(tmp_path: Path) -> None:
    train, val = lists(tmp_path, {"a/1": 1, "a/2": 1, "a/3": 1, "b/1": 0}, {"c/1": 2})
    levels = [finding.level for finding in check(train, val, read_images=False).problems]
    assert set(levels) == {"error", "warning", "note"}
    assert levels == sorted(levels, key=["error", "warning", "note"].index)


@pytest.mark.parametrize(
    ("number", "noun", "text"), [(1, "image", "1 image"), (0, "entry", "0 entries"), (2000, "class", "2,000 classes")]
)
def test_plurals(number: int, noun: str, text: str) -> None:
    assert plural(number, noun) == text


# Labels and splits


def test_gaps_are_named_with_the_names_of_the_classes() -> None:
    report = check(arrays([0] * 6 + [2] * 4 + [4] * 4 + [5] * 2, num_classes=6, names=list("abcdef")))
    finding = found(report, "classes without training images")
    assert finding.level == "error" and finding.items == ("1 (b)", "3 (d)")
    assert report.split is None and not report.ok
    assert report.split_sizes() == {"few": 1, "medium": 2, "many": 1, "none": 2}
    json.dumps(report.to_dict())
    report.print(Console(file=io.StringIO()))


def test_a_classifier_with_more_rows_than_the_data_have_classes() -> None:
    report = check(arrays([0] * 6 + [1] * 4 + [2] * 2), num_classes=5)
    finding = found(report, "fewer classes than the classifier")
    assert finding.level == "error" and finding.items == ("3", "4")
    assert "end at 2, but there are 5 classes: the last 2" in finding.detail


def test_a_classifier_with_fewer_rows_than_the_data_have_classes() -> None:
    train = arrays([0] * 6 + [1] * 4 + [2] * 4 + [3] * 2)
    report = check(train, arrays([0, 1, 2, 5], 100), num_classes=3)
    assert found(report, "labels of train beyond the classifier").items == tuple(f"from0.npz[{i}]: label 3" for i in (14, 15))
    finding = found(report, "labels of val beyond the classifier")
    assert finding.items == ("from100.npz[3]: label 5",) and "1 of 4 images have labels above 2" in finding.detail
    assert report.counts["train"].tolist() == [6, 4, 4]
    # Labels within, but more classes by name.
    named = arrays([0] * 6 + [1] * 4 + [2] * 2, names=list("abcd"))
    assert found(check(named, num_classes=3), "train has more classes than the classifier").level == "error"


def test_labels_that_only_validation_has() -> None:
    report = check(arrays([0] * 6 + [1] * 4 + [2] * 2), arrays([0, 1, 2, 3], 100))
    assert found(report, "labels of val beyond the classifier").items == ("from100.npz[3]: label 3",)


def test_no_training_images() -> None:
    report = check(arrays(np.zeros(0, np.int64), num_classes=3), healthy()[1])
    assert found(report, "no training images").level == "error"
    assert "classes without training images" not in titles(report)
    report.print(Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("counts", "errors", "notes"),
    [
        ([6, 3, 2], set(), set()),
        ([6, 6, 3], {"no few classes"}, set()),
        ([2, 1, 2], {"no base classes"}, set()),
        ([6, 2, 2], set(), {"fewer base classes than neighbours", "no medium classes"}),
        ([5, 4, 2], set(), {"no many classes"}),
        ([6, 6, 1], set(), {"no medium classes"}),
        ([3, 3, 3], {"no few classes"}, {"no many classes"}),
    ],
)
def test_splits_that_cannot_be_worked_with(counts: list[int], errors: set[str], notes: set[str]) -> None:
    report = check(arrays(torch.arange(3).repeat_interleave(torch.tensor(counts))))
    assert titles(report, "error") == errors and titles(report, "note") == notes
    assert titles(report, "warning") == set() and report.ok == (not errors)


def test_classes_that_validation_and_test_leave_out() -> None:
    train = arrays([0] * 6 + [1] * 4 + [2] * 2 + [3] * 2)
    report = check(train, arrays([2], 100, 4), arrays([0, 2], 200, 4), class_names=["ant", "bee", "cow", "dog"])
    few = found(report, "few classes without validation images")
    assert few.level == "warning" and few.items == ("3 (dog)",) and "1 of 2 few classes" in few.detail
    assert found(report, "base classes without validation images").items == ("0 (ant)", "1 (bee)")
    tested = found(report, "classes without test images")
    assert tested.level == "warning" and tested.items == ("1 (bee)", "3 (dog)")
    assert report.ok


# The order of the classes


def test_names_in_another_order() -> None:
    train, val, test = healthy(names=list("abcdefg"))
    assert check_data(train, val, test, class_names=list("abcdefg"), progress=False).problems == []
    report = check_data(train, val, test, class_names=list("bacdefg"), progress=False)
    finding = found(report, "class names differ between the checkpoint and train")
    assert finding.level == "error" and "same 7 names, in another order" in finding.detail
    assert finding.items == (
        "class 0: 'b' in the checkpoint, 'a' in train",
        "class 1: 'a' in the checkpoint, 'b' in train",
    )
    assert report.class_names == tuple("bacdefg")


def test_names_that_are_others_or_of_another_number() -> None:
    train, _, test = healthy(names=list("abcdefg"))
    val = arrays(torch.arange(7), 1000, names=list("abcdefx"))
    report = check_data(train, val, test, class_names=list("abcdefgh"), progress=False)
    between = found(report, "class names differ between train and val")
    assert "1 are in train alone, 1 in val alone" in between.detail
    assert between.items == ("class 6: 'g' in train, 'x' in val",)
    assert found(report, "class names differ between the checkpoint and train").items == (
        "class 7: 'h' in the checkpoint, None in train",
    )
    assert found(report, "fewer classes than the classifier").items == ("7 (h)",)


def places(part: str, labels: dict[str, int], n: int = 4, start: int = 0) -> dict[str, int]:
    return {f"{part}/{folder}/{i}.jpg": label for folder, label in labels.items() for i in range(start, start + n)}


def test_class_folders_with_another_label_in_another_list(tmp_path: Path) -> None:
    labels = {"attic": 0, "bar": 1, "cave": 2, "dam": 3}
    train, val, same = lists(
        tmp_path, places("train", labels), places("val", labels | {"bar": 2, "cave": 1}), places("test", labels)
    )
    report = check(train, val, same, read_images=False)
    finding = found(report, "class order differs between train and val")
    assert finding.level == "error" and "2 of 4 class folders" in finding.detail
    assert finding.items == ("bar: 1 in train, 2 in val", "cave: 2 in train, 1 in val")
    assert found(report, "class order differs between val and test").items == (
        "bar: 2 in val, 1 in test",
        "cave: 1 in val, 2 in test",
    )
    assert "class order differs between train and test" not in titles(report)
    assert report.class_names == ("attic", "bar", "cave", "dam")


def test_class_folders_below_others_of_the_same_name(tmp_path: Path) -> None:
    labels = {"house/indoor": 0, "house/outdoor": 1, "shop/indoor": 2, "shop/outdoor": 3}
    swapped = labels | {"shop/indoor": 3, "shop/outdoor": 2}
    train, val = lists(tmp_path, places("data/train", labels), places("val", swapped))
    assert found(check(train, val, read_images=False), "class order differs between train and val").items == (
        "shop/indoor: 2 in train, 3 in val",
        "shop/outdoor: 3 in train, 2 in val",
    )
    assert "class order differs between train and val" not in titles(
        check(train, *lists(tmp_path, places("val", labels)), read_images=False)
    )


def test_labels_against_the_names_of_the_classes(tmp_path: Path) -> None:
    [train] = lists(tmp_path, places("train", {"attic": 0, "bar": 2, "cave": 1}))
    report = check(train, class_names=["attic", "bar", "cave"], read_images=False)
    finding = found(report, "labels of train disagree with the class names")
    assert finding.level == "error" and "2 of 3 class folders" in finding.detail
    assert finding.items == (
        "folder bar: label 2, but class 1 has this name",
        "folder cave: label 1, but class 2 has this name",
    )
    assert "labels of train disagree with the class names" not in titles(
        check(train, class_names=["attic", "cave", "bar"], read_images=False)
    )
    # Names of another kind say nothing.
    assert titles(check(train, class_names=["1", "2", "3"], read_images=False)) == titles(check(train, read_images=False))


def test_folders_with_a_few_wrong_lines(tmp_path: Path) -> None:
    labels = {f"class{i:02}": i for i in range(12)}
    entries = places("train", labels) | {"train/class03/9.jpg": 7}
    report = check(*lists(tmp_path, entries), read_images=False)
    finding = found(report, "folders of train with several labels")
    assert finding.level == "warning" and finding.items == ("class03: label 3 (4 images), label 7 (1 images)",)


def test_folders_that_are_no_class_folders_say_nothing(tmp_path: Path) -> None:
    flat = {f"val/{i}.jpg": i % 4 for i in range(20)}
    top = {f"{i}.jpg": i % 4 for i in range(20)}
    cameras = {f"camera{i % 3}/{i}.jpg": i % 4 for i in range(24)}
    patients = {f"patient{i}/1.jpg": i % 4 for i in range(40)}
    shifted = {path: (label + 1) % 4 for path, label in patients.items()}
    for one, two in ((flat, flat), (top, top), (cameras, cameras), (patients, shifted)):
        train, val = lists(tmp_path, one, {f"other/{path}": label for path, label in two.items()})
        report = check(train, val, read_images=False)
        assert not any("order" in title or "folders" in title for title in titles(report))


def test_labels_that_do_not_follow_the_sorted_folders(tmp_path: Path) -> None:
    [train] = lists(tmp_path, places("train", {"2": 0, "10": 1, "11": 2}))
    finding = found(check(train, read_images=False), "labels are not in the sorted order of the class folders")
    assert finding.level == "note" and "2 (label 0) comes before 10 (label 1)" in finding.detail
    [train] = lists(tmp_path, places("train", {"10": 0, "11": 1, "2": 2}))
    assert "labels are not in the sorted order of the class folders" not in titles(check(train, read_images=False))


def test_image_folders_of_train_and_test_that_sort_otherwise(tmp_path: Path) -> None:
    files(tmp_path / "train", {f"{c}/{i}.png": 0 for c in "abcd" for i in range(4)})
    files(tmp_path / "test", {f"{c}/t{i}.png": 0 for c in "acd" for i in range(2)})
    train, test = read_image_folder(tmp_path / "train"), read_image_folder(tmp_path / "test")
    report = check(train, None, test)
    assert found(report, "class order differs between train and test").items == (
        "c: 2 in train, 1 in test",
        "d: 3 in train, 2 in test",
    )
    assert not report.ok
    repaired = read_image_folder(tmp_path / "test", class_names=train.class_names)
    assert titles(check(train, None, repaired), "error") == {"no few classes"}


# Images


def few_files(root: Path, part: str, n: int = 4) -> dict[str, int]:
    """As many images of each of three classes: 2n, n, 2."""
    return {
        f"{part}/{c}/{i}.png": label for label, (c, k) in enumerate(zip("abc", (2 * n, n, 2), strict=True)) for i in range(k)
    }


def test_images_that_cannot_be_read_are_all_listed(tmp_path: Path) -> None:
    entries = few_files(tmp_path, "train")
    train = files(tmp_path, entries)
    (tmp_path / "train/a/1.png").unlink()
    (tmp_path / "train/a/5.png").write_bytes((tmp_path / "train/a/5.png").read_bytes()[:-30])
    (tmp_path / "train/b/0.png").write_text("no image")
    report = check(train, files(tmp_path, few_files(tmp_path, "val")))
    finding = found(report, "missing or unreadable images of train")
    assert finding.level == "error" and "3 of 14 images" in finding.detail
    names, reasons = zip(*(item.split(": ", 1) for item in finding.items), strict=True)
    assert names == ("train/a/1.png", "train/a/5.png", "train/b/0.png")
    assert reasons[0].startswith("no such file") and reasons[2] == "not an image of a known format"
    assert titles(report) == {"missing or unreadable images of train"}
    assert report.images_read == 28


def test_a_truncated_jpeg_is_found(tmp_path: Path) -> None:
    train = files(tmp_path, few_files(tmp_path, "train") | {"train/a/x.jpg": 0})
    path = tmp_path / "train/a/x.jpg"
    path.write_bytes(path.read_bytes()[:-8])
    assert [item.split(":")[0] for item in found(check(train), "missing or unreadable images of train").items] == [
        "train/a/x.jpg"
    ]


def test_a_pillow_that_hides_truncation_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("PIL.ImageFile"), "LOAD_TRUNCATED_IMAGES", True)
    assert found(check(healthy()[0]), "truncated images are not noticed").level == "warning"


def test_without_reading_files_are_looked_for(tmp_path: Path) -> None:
    entries = few_files(tmp_path, "train")
    train = files(tmp_path, entries)
    (tmp_path / "train/a/1.png").unlink()
    (tmp_path / "train/b/0.png").write_text("no image")
    report = check(train, read_images=False)
    assert report.images_read == 0
    assert found(report, "missing images of train").items == ("train/a/1.png",)
    assert check(healthy()[0], read_images=False, few_below=5).ok


@pytest.mark.parametrize("read_images", [True, False])
def test_a_wrong_root_is_told(tmp_path: Path, read_images: bool) -> None:
    entries = few_files(tmp_path, "train")
    files(tmp_path / "data", entries)

    def detail(root: Path, prefix: str = "") -> str:
        images = FileImages(root, [f"{prefix}{path}" for path in entries], list(entries.values()))
        report = check(images, read_images=read_images)
        return next(finding.detail for finding in report.problems if "missing" in finding.title)

    first = str(tmp_path / "data" / "wrong" / "train/a/0.png")
    (tmp_path / "data" / "wrong").mkdir()
    assert f"{first!r}; it is in {str(tmp_path / 'data')!r}: give that as the root" in detail(tmp_path / "data" / "wrong")
    assert f"it is in {str(tmp_path / 'data')!r}: give that" in detail(tmp_path)
    assert "'train/a/0.png' is in the root: the paths of the list have more folders" in detail(tmp_path / "data", "places/")
    assert detail(tmp_path / "data", "x").endswith("the root may be wrong")
    assert detail(tmp_path / "gone" / "a" / "b" / "c" / "d").endswith("the root may be wrong")


def test_images_listed_twice(tmp_path: Path) -> None:
    entries = few_files(tmp_path, "train")
    files(tmp_path, entries)
    paths = [*entries, "train/a/0.png", "train/b/.//1.png", "train/a/2.png"]
    train = FileImages(tmp_path, paths, [*entries.values(), 0, 1, 2])
    report = check(train)
    twice = found(report, "images listed twice in train")
    assert twice.level == "warning" and twice.items == ("train/a/0.png", "train/b/.//1.png")
    several = found(report, "images of train with several labels")
    assert several.level == "warning" and several.items == ("train/a/2.png: label 0 first, then 2",)
    # The same file is not the same content under another name.
    assert "equal images in train" not in titles(report)


def test_equal_images_under_other_names(tmp_path: Path) -> None:
    train = files(tmp_path, few_files(tmp_path, "train") | {"train/a/x.png": 0, "train/b/y.png": 1})
    for copy, original in (("a/x", "a/1"), ("b/y", "a/0")):
        (tmp_path / f"train/{copy}.png").write_bytes((tmp_path / f"train/{original}.png").read_bytes())
    report = check(train)
    assert found(report, "equal images in train").items == ("train/a/1.png = train/a/x.png",)
    assert found(report, "equal images in train").level == "note"
    several = found(report, "equal images of train with several labels")
    assert several.level == "warning" and several.items == ("train/a/0.png = train/b/y.png: label 0 first, then 1",)


def test_parts_that_overlap_by_path(tmp_path: Path) -> None:
    entries = few_files(tmp_path, "train")
    train = files(tmp_path, entries)
    val = files(tmp_path, {"val/a/0.png": 0, "train/b/1.png": 1, "val/c/0.png": 2})
    test = files(tmp_path / "train", {"a/0.png": 1, "b/x.png": 1, "c/x.png": 2})
    report = check(train, val, test)
    finding = found(report, "train and val overlap by path")
    assert finding.level == "error" and finding.items == ("train/b/1.png",) and "1 of 3 images of val" in finding.detail
    assert found(report, "train and test overlap by path").items == ("train/a/0.png = a/0.png (label 0 in train, 1 in test)",)
    assert not any("overlap by content" in title or "val and test overlap" in title for title in titles(report))
    assert "train and val overlap by path" in titles(check(train, val, test, read_images=False))


def test_parts_that_overlap_by_content(tmp_path: Path) -> None:
    train = files(tmp_path, few_files(tmp_path, "train"))
    test = files(tmp_path, {"test/a/0.png": 0, "test/b/0.png": 1, "test/c/0.png": 2})
    (tmp_path / "test/b/0.png").write_bytes((tmp_path / "train/a/3.png").read_bytes())
    finding = found(check(train, None, test), "train and test overlap by content")
    assert finding.level == "error" and finding.items == ("train/a/3.png = test/b/0.png (label 0 in train, 1 in test)",)
    assert check(train, None, test, read_images=False, num_classes=3).ok


def test_a_few_equal_images_in_a_large_part_are_a_warning() -> None:
    train, val, _ = healthy()
    labels = torch.arange(7).repeat(300)
    for equal, level in ((2, "warning"), (3, "error")):
        test = arrays(labels, 292 - equal, 7)
        assert found(check_data(train, None, test, progress=False), "train and test overlap by content").level == level
    assert check_data(train, val, arrays(labels, 292 + 1000, 7), progress=False).ok


def test_parts_of_one_array_overlap_where_their_rows_do() -> None:
    whole = arrays(torch.arange(300) % 3)
    train, test = whole.subset(range(200)), whole.subset(range(198, 300))
    assert found(check(train, None, test), "train and test overlap by path").items == ("from0.npz[198]", "from0.npz[199]")
    assert "train and test overlap by path" not in titles(check(train, None, whole.subset(range(200, 300))))


def test_datasets_are_read_one_image_at_a_time() -> None:
    class Dataset:
        def __init__(self) -> None:
            self.targets = [i % 3 for i in range(100)]
            self.inside = self.most = 0

        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> tuple[Any, int]:
            self.inside += 1
            self.most = max(self.most, self.inside)
            threading.Event().wait(0.0005)
            self.inside -= 1
            if index == 70:
                raise OSError("torn")
            return Image.new("RGB", (2, 2), (index, 0, 0)), self.targets[index]

    dataset = Dataset()
    images = from_torchvision(dataset, "toy")
    report = check(images.subset(range(60)), None, images.subset(range(60, 100)), workers=4)
    assert dataset.most == 1
    assert found(report, "missing or unreadable images of test").items == ("toy[70]: torn",)


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_overlaps_are_found_whatever_they_are(one: list[int], two: list[int]) -> None:
    pixels = np.arange(31, dtype=np.uint8).reshape(31, 1, 1)
    train = ArrayImages(pixels[one], [0] * len(one), "one", 1)
    test = ArrayImages(pixels[two], [0] * len(two), "two", 1)
    report = check(train, None, test, workers=1)
    expected = sum(value in one for value in two)
    assert ("train and test overlap by content" in titles(report)) == (expected > 0)
    if expected:
        assert len(found(report, "train and test overlap by content").items) == expected
    if len(set(one)) < len(one):
        assert len(found(report, "equal images in train").items) == len(one) - len(set(one))


def test_reading_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    train = arrays([0] * 5000)
    calls = []

    def decode(self: ArrayImages, index: int, stored: bytes) -> Any:
        calls.append(index)
        if len(calls) == 100:
            raise KeyboardInterrupt
        if len(calls) > 100:
            threading.Event().wait(0.02)
        return None

    monkeypatch.setattr(ArrayImages, "decode", decode)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        check(train)
    assert len(calls) < 120 and threading.active_count() == before


def test_errors_of_the_users_own_images_are_not_swallowed() -> None:
    class Own(ArrayImages):
        def decode(self, index: int, stored: bytes) -> Any:
            raise RuntimeError("a mistake") if index == 50 else ImageReadError("without a name")

    labels = torch.arange(100) % 3
    with pytest.raises(RuntimeError, match="a mistake"):
        check(Own(arrays(labels).pixels, labels, "own"))
    report = check(Own(arrays(labels[:50]).pixels, labels[:50], "own"))
    assert len(found(report, "missing or unreadable images of train").items) == 50


def test_findings_are_in_the_order_of_the_images() -> None:
    class Slow(ArrayImages):
        def decode(self, index: int, stored: bytes) -> Any:
            if index == 0:
                threading.Event().wait(0.3)
            raise ImageReadError.of(self.name(index), "torn")

    labels = torch.arange(100) % 3
    items = found(check(Slow(arrays(labels).pixels, labels, "own")), "missing or unreadable images of train").items
    assert items == tuple(f"own[{i}]: torn" for i in range(100))


def test_progress_is_shown_on_standard_error_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    check(healthy()[0])
    assert capsys.readouterr() == ("", "")
    check(healthy()[0], progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "292 of 292 images" in captured.err
    check(healthy()[0], progress=None)
    assert capsys.readouterr().err == ""


def test_workers_do_not_change_the_report(tmp_path: Path) -> None:
    train = files(tmp_path, few_files(tmp_path, "train", 40))
    for path in ("train/a/5.png", "train/a/70.png", "train/b/3.png"):
        (tmp_path / path).write_text(path)
    one, many = check(train, workers=1).to_dict(), check(train, workers=8).to_dict()
    assert one | {"seconds": 0} == many | {"seconds": 0}
    assert image_reading.read_all({"train": train}, progress=False)["train"].failures.keys() == {5, 70, 83}


def test_lists_written_for_a_subset_are_healthy(tmp_path: Path) -> None:
    train = files(tmp_path, few_files(tmp_path, "train"))
    write_list(tmp_path / "train.txt", train.paths, train.labels)
    from alphaext.data.sources import open_images

    assert check(open_images(tmp_path / "train.txt", root=tmp_path)).problems == []


# The classifier's order


def classifier(rows: torch.Tensor, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(rows.shape[1], rows.shape[0], bias=bias)
    with torch.no_grad():
        linear.weight.copy_(rows)
        if bias:
            linear.bias.zero_()
    return linear


def means(num_classes: int = 40) -> torch.Tensor:
    return torch.randn(num_classes, 64, generator=torch.Generator().manual_seed(0))


def test_a_classifier_in_order() -> None:
    finding = check_classifier_order(classifier(means(), bias=False), means())
    assert finding.level == "note" and finding.items == ()
    assert "100.0% of the classes to that class (chance is 2.5%)" in finding.detail


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("as_array", [False, True])
def test_features_instead_of_means(dtype: torch.dtype, as_array: bool) -> None:
    labels = torch.arange(40).repeat(3)
    labels = labels[labels != 7]
    features: Any = (means()[labels] + 0.1 * torch.randn(len(labels), 64, generator=torch.Generator().manual_seed(1))).to(dtype)
    if as_array:
        features, labels = features.numpy(), labels.numpy()  # type: ignore[assignment]
    assert check_classifier_order(classifier(means()), features, labels).level == "note"
    shifted = check_classifier_order(classifier(means().roll(1, 0)), features, labels)
    assert shifted.level == "error" and len(shifted.items) == 39
    assert shifted.items[0] == "class 0 is taken for 1"


def test_another_order_is_told_from_other_features() -> None:
    finding = check_classifier_order(classifier(means().flip(0)), means(), class_names=[f"c{i:02}" for i in range(40)])
    assert finding.level == "error" and finding.title == "class order of checkpoint and lists differ"
    assert finding.detail.endswith("the 40 means go to 40 different rows: the order of the classes is another")
    assert finding.items[0] == "class 0 (c00) is taken for 39"
    one_way = means(100).abs() @ torch.ones(64, 1) @ torch.ones(1, 64)
    finding = check_classifier_order(classifier(means(100)), one_way)
    assert finding.level == "error" and finding.detail.endswith("(another backbone, another transform)")


@pytest.mark.parametrize(
    ("names", "ordered", "how"),
    [
        ([str(i) for i in range(40)], sorted(str(i) for i in range(40)), "sorted by name"),
        (sorted(str(i) for i in range(40)), [str(i) for i in range(40)], "sorted as numbers"),
        ([f"{'Xx'[i % 2]}{i:02}" for i in range(40)], sorted(f"{'Xx'[i % 2]}{i:02}" for i in range(40)), "sorted by name"),
        (
            sorted(f"{'Xx'[i % 2]}{i:02}" for i in range(40)),
            [f"{'Xx'[i % 2]}{i:02}" for i in range(40)],
            "sorted by name without regard to case",
        ),
    ],
)
def test_the_order_that_would_fit_is_named(names: list[str], ordered: list[str], how: str) -> None:
    # Row r of the classifier is the class ordered[r], whose mean is at its place in names.
    rows = means()[[names.index(name) for name in ordered]]
    finding = check_classifier_order(classifier(rows), means(), class_names=names)
    assert finding.level == "error" and f"with the classes {how} it is 100.0%" in finding.detail
    assert check_classifier_order(classifier(means()), means(), class_names=names).level == "note"
    present = torch.tensor([c for c in range(40) if c not in (0, 7)])
    finding = check_classifier_order(classifier(rows), means()[present], present, class_names=names)
    assert f"with the classes {how} it is 100.0%" in finding.detail


def test_a_weak_classifier_in_order_is_no_error() -> None:
    rows = means(200).flip(0)
    right = torch.arange(0, 200, 16)
    rows[right] = means(200)[right]
    finding = check_classifier_order(classifier(rows), means(200))
    assert finding.level == "warning" and finding.title == "class order of checkpoint and lists may differ"
    few_right = means(40).flip(0)
    few_right[:6] = means(40)[:6]
    assert check_classifier_order(classifier(few_right), means(40)).level == "note"


def test_two_classes_the_wrong_way_round() -> None:
    rows = torch.eye(2)
    assert check_classifier_order(classifier(rows), rows).level == "note"
    assert check_classifier_order(classifier(rows.flip(0)), rows).level == "error"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(39, 64),), {}, ValueError, r"features must have shape \[40, D\], got \[39, 64\]"),
        ((torch.zeros(40, 63),), {}, ValueError, "features must have the classifier's 64 columns, got 63"),
        ((torch.zeros(40, 64, dtype=torch.int64),), {}, TypeError, "features must be floating point"),
        ((torch.full((40, 64), float("nan")),), {}, ValueError, "features must be finite"),
        ((torch.zeros(3, 64), [0, 1]), {}, ValueError, "features and labels must have one entry|3 and 2"),
        ((torch.zeros(2, 64), [0, 40]), {}, ValueError, r"labels must be in 0..39, got 40"),
        ((torch.zeros(0, 64), []), {}, ValueError, "features must have at least one row"),
        ((torch.zeros(40, 64),), {"class_names": ["a"]}, ValueError, "class_names must have one name a class"),
    ],
)
def test_what_does_not_fit_the_classifier(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_classifier_order(classifier(means()), *arguments, **options)
    with pytest.raises(TypeError, match="linear must have a weight"):
        check_classifier_order(nn.ReLU(), means())


def test_few_classes_that_the_user_names() -> None:
    """They are few however many images they have, and no other class is."""
    train, val, test = healthy(names=[f"class {label}" for label in range(7)])
    report = check_data(train, val, test, few_classes=["class 0", "class 2"], many_above=50)
    assert report.split is not None and report.split.few.tolist() == [0, 2] and report.split.many.tolist() == [1]
    assert report.split_sizes() == {"few": 2, "medium": 4, "many": 1, "none": 0} and report.to_dict()["few_classes"] == [0, 2]
    assert report.ok
    (error,) = check_data(train, few_classes=range(7)).of_level("error")
    assert error.title == "no base classes" and "names every class" in error.detail
    with pytest.raises(ValueError, match="few_classes must name classes, 'class 9' is none; did you mean"):
        check_data(train, few_classes=["class 9"])
