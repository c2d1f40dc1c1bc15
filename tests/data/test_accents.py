"""Names with accents, composed (NFC) or with accents apart from their letters (NFD), as they come from macOS."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image

from alphaext.data import open_images, read_list, read_texts
from alphaext.data.images import ImageReadError
from alphaext.doctor.check import _likely_orders
from alphaext.doctor.labels import name_problems
from alphaext.features import write_features
from alphaext.features.store import read_parts
from alphaext.utils.checks import check_class_names
from alphaext.utils.tensors import class_ids

NAMES = ("blanc", "café", "rosé")


def _in(form: str, *names: str) -> list[str]:
    return [unicodedata.normalize(form, name) for name in names]


def _folder(path: Path, form: str) -> Path:
    for name in _in(form, *NAMES):
        (path / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (4, 4)).save(path / name / f"{number}.png")
    return path


@pytest.mark.parametrize(("form", "other"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_class_folders_are_the_classes_of_the_other_form(tmp_path, form, other):
    train, val = (open_images(_folder(tmp_path / each, each)) for each in (form, other))
    again = open_images(tmp_path / other, class_names=train.class_names)
    assert again.class_names == train.class_names == tuple(_in(form, *NAMES)) and again.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert all(again.stored(index) for index in range(6))
    assert list(name_problems({"train": train, "val": val}, None)) == []


def test_one_class_in_both_forms_is_refused(tmp_path):
    for form in ("NFC", "NFD"):
        (tmp_path / _in(form, "café")[0]).mkdir()
    with pytest.raises(ValueError, match=r"got 'café' 2 times, with accents in 2 forms of Unicode \(NFC, NFD\)"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match="got 'a' 2 times$"):
        check_class_names(["a", "a"], None)


def test_a_list_in_the_other_form_names_the_cause(tmp_path):
    _folder(tmp_path, "NFD")
    (tmp_path / "list.txt").write_text(f"{_in('NFC', 'café')[0]}/0.png 0\nblanc/9.png 1\n", encoding="utf-8")
    images = read_list(tmp_path / "list.txt", tmp_path)
    with pytest.raises(ImageReadError, match=r"no such file in '.*', but '.*0.png' with accents in another form of Unicode"):
        images.stored(0)
    with pytest.raises(ImageReadError, match=r"no such file in '[^']*'$"):
        images.stored(1)


def test_names_of_features_and_of_arguments(tmp_path):
    for part, form in (("train", "NFC"), ("val", "NFD")):
        write_features(tmp_path / part, torch.rand(3, 2), [0, 1, 2], num_classes=3, class_names=_in(form, *NAMES))
    parts = read_parts(tmp_path, "train", "val")
    names = parts["train"].class_names
    assert class_ids(_in("NFD", "rosé"), 3, "few_classes", names).tolist() == [2]
    with pytest.raises(ValueError, match="few_classes must name classes, 'rose' is none"):
        class_ids(["rose"], 3, "few_classes", names)


def test_labels_of_texts(tmp_path):
    lines = ["text,label", *(f"t,{_in(form, 'café')[0]}" for form in ("NFC", "NFD")), "t,thé"]
    (tmp_path / "t.csv").write_text("\n".join(lines), encoding="utf-8")
    assert read_texts(tmp_path / "t.csv").labels.tolist() == [0, 0, 1]
    found = read_texts(tmp_path / "t.csv", class_names=_in("NFD", "thé", "café"))
    assert found.labels.tolist() == [1, 1, 0]


def test_an_order_by_the_other_form_is_a_likely_one():
    names = _in("NFC", "forêt", "été")
    orders = dict(_likely_orders(names))
    assert [order for order in orders if "NFD" in order] and "sorted by name" not in orders
