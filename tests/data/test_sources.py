from __future__ import annotations

import doctest
import gzip
import importlib
import io
import itertools
import operator
import os
import pickle
import string
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from alphaext.classes import split_classes
from alphaext.data import (
    ImageReadError,
    LabelledImages,
    from_torchvision,
    long_tailed_counts,
    make_long_tailed,
    open_images,
    read_arrays,
    read_cifar,
    read_image_folder,
    read_list,
    write_list,
)
from alphaext.data.images import ArrayImages, DatasetImages, FileImages, decode_image

PIL = pytest.importorskip("PIL", reason="images need Pillow")
Image = pytest.importorskip("PIL.Image", reason="images need Pillow")


def data_folder() -> Path:
    folder = os.environ.get("ALPHAEXT_DATA")
    if not folder:
        pytest.skip("ALPHAEXT_DATA is not set: the published data are checked only where they are")
    return Path(folder)


def picture(value: int = 0, size: tuple[int, int] = (12, 8), mode: str = "RGB") -> Any:
    """A picture that no other value has, of full detail, so that its JPEG is not trivially small."""
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Any, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def make_files(root: Path, *names: str) -> None:
    for value, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(value).save(path)


def arrays(n: int = 6, num_classes: int = 3, color: bool = False) -> ArrayImages:
    shape = (n, 5, 4, 3) if color else (n, 5, 4)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return ArrayImages(pixels, torch.arange(n) % num_classes, "toy.npz", num_classes)


@pytest.mark.parametrize("name", ["data.sources", "data.images", "data.list_files", "data.long_tailed"])
def test_examples_in_docstrings(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"alphaext.{name}"), extraglobs={"torch": torch})
    assert results.attempted > 0
    assert results.failed == 0


# Lists


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "list.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_list_is_read_in_its_order(tmp_path: Path) -> None:
    images = read_list(written(tmp_path, "a/2.jpg 1\na/1.jpg 0\nb/1.jpg 4\n"), tmp_path)
    assert [images.name(i) for i in range(3)] == ["a/2.jpg", "a/1.jpg", "b/1.jpg"]
    assert images.labels.tolist() == [1, 0, 4] and images.labels.dtype == torch.int64
    assert images.num_classes == 5 and images.class_names is None and len(images) == 3


@pytest.mark.parametrize(
    "content",
    [
        "a b/1 2.jpg 3\r\nc.png 0\r\n\r\n",
        "a b/1 2.jpg\t3\nc.png \t  0\n",
        "\n  a b/1 2.jpg   3  \n\nc.png 0",
        b"\xef\xbb\xbfa b/1 2.jpg 3\nc.png 0\n",
        "a b/1 2.jpg 003\nc.png 0\n \n",
    ],
)
def test_lists_may_have_blanks_tabs_and_line_ends_of_windows(tmp_path: Path, content: str | bytes) -> None:
    images = read_list(written(tmp_path, content), tmp_path)
    assert images.paths == ["a b/1 2.jpg", "c.png"]
    assert images.labels.tolist() == [3, 0]


def test_line_separators_of_unicode_end_no_line(tmp_path: Path) -> None:
    images = read_list(written(tmp_path, "a\u2028b\x0c\x85c.jpg 1\n\u00e4/\u65e5.jpg 0\n"), tmp_path)
    assert images.paths == ["a\u2028b\x0c\x85c.jpg", "\u00e4/\u65e5.jpg"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a/1.jpg", "must be 'path label'; the line is 'a/1.jpg'"),
        ("7", "must be 'path label'; the line is '7'"),
        ("a/my cat.jpg", "label must be an integer from 0 on, got 'cat.jpg'"),
        ("a/1.jpg -1", "label must be an integer from 0 on, got '-1'"),
        ("a/1.jpg 1.0", "label must be an integer from 0 on, got '1.0'"),
        ("a/1.jpg +1", "got '+1'"),
        ("a/1.jpg 1_0", "got '1_0'"),
        ("a/1.jpg \u0663", "label must be an integer from 0 on"),
        ("a/1.jpg,0", "must be 'path label'"),
        ("a/1.jpg 20240131", "label must be below 16777216, got 20240131"),
        ("a/1.jpg 99999999999999999999999", "label must be below 16777216, got 99999999999999999999999"),
        ("/data/a/1.jpg 0", "path must be relative to the root and stay in it; the line is '/data/a/1.jpg 0'"),
        ("../a/1.jpg 0", "path must be relative to the root and stay in it"),
        ("a/../../1.jpg 0", "path must be relative to the root and stay in it"),
        ("a/.. 0", "path must be relative to the root and stay in it"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = written(tmp_path, f"ok/1..jpg 0\r\n\r\n{line}\r\nok/2.jpg 1\r\n")
    with pytest.raises(ValueError) as raised:
        read_list(path, tmp_path)
    assert f"{path}, line 3: " in str(raised.value) and message in str(raised.value)


def test_an_endless_line_is_shown_in_part(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as raised:
        read_list(written(tmp_path, "x" * 10_000), tmp_path)
    assert len(str(raised.value)) < 600


def test_labels_beyond_the_classes_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jpg 0\n\nb.jpg 5\nc.jpg 9\n")
    with pytest.raises(ValueError, match=r"line 3: label must be below num_classes = 5, got 5 for 'b.jpg' .*largest.* is 9"):
        read_list(path, tmp_path, num_classes=5)
    with pytest.raises(ValueError, match="below num_classes = 2, got 5"):
        read_list(path, tmp_path, class_names=["cat", "dog"])
    assert read_list(path, tmp_path, num_classes=11).num_classes == 11


def test_names_of_classes_are_taken(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jpg 0\n")
    images = read_list(path, tmp_path, class_names=["cat", "dog"])
    assert images.class_names == ("cat", "dog") and images.num_classes == 2
    with pytest.raises(ValueError, match="got 2 names for num_classes = 3"):
        read_list(path, tmp_path, num_classes=3, class_names=["cat", "dog"])
    with pytest.raises(ValueError, match="class_names must be different, got 'cat' 2 times"):
        read_list(path, tmp_path, class_names=["cat", "cat"])
    with pytest.raises(TypeError, match="class_names must be a sequence of texts"):
        read_list(path, tmp_path, class_names="cat")


def test_one_path_has_one_label(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 4: 'a.jpg' has label 2, but label 1 in line 1"):
        read_list(written(tmp_path, "a.jpg 1\nb.jpg 0\nb.jpg 0\na.jpg 2\n"), tmp_path)
    assert len(read_list(written(tmp_path, "a.jpg 1\na.jpg 1\n"), tmp_path)) == 2


@pytest.mark.parametrize("content", ["", "\n \r\n"])
def test_an_empty_list_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ValueError, match=r"list.txt lists no images"):
        read_list(written(tmp_path, content), tmp_path)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"list.txt is not a list: line 2: not UTF-8 \(.*byte 0xe4\)"):
        read_list(written(tmp_path, "a.jpg 0\n\u00e4.jpg 1\n".encode("latin-1")), tmp_path)
    for content, what in (
        (gzip.compress(b"a.jpg 0\n"), "compressed with gzip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html>\n", "a page of the web"),
        (b"PK\x03\x04", "a ZIP archive"),
    ):
        with pytest.raises(ValueError, match=rf"list.txt is {what}.*, not a list"):
            read_list(written(tmp_path, content), tmp_path)
    with pytest.raises(ValueError, match="line 2: a null character"):
        read_list(written(tmp_path, "a.jpg 0\nb\0.jpg 1\n"), tmp_path)


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_of_every_system_are_read(tmp_path: Path, ends: str, encoding: str) -> None:
    images = read_list(written(tmp_path, ends.join(["ä/1.jpg 0", "", "b 2.jpg\t1", ""]).encode(encoding)), tmp_path)
    assert images.paths == ["ä/1.jpg", "b 2.jpg"] and images.labels.tolist() == [0, 1]


@pytest.mark.parametrize("line", ["a/1.jpg,0", "a/1.jpg;0", '"a/1.jpg","0"', "a/1.jpg,-1"])
def test_commas_are_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(ValueError, match="line 2: must be 'path label' with a blank or a tab between, not a comma"):
        read_list(written(tmp_path, f"a,b;c, d.jpg 0\n{line}\n"), tmp_path)


@pytest.mark.parametrize("name", ["train.csv", "train.txt.gz", "train", "pipe.txt"])
def test_what_is_no_source_is_told_with_a_root_too(tmp_path: Path, name: str) -> None:
    if name == "pipe.txt":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_text("a.jpg,0\n")
    for root in (None, tmp_path):
        with pytest.raises(ValueError, match=rf"source must be a list \(.txt\), .*{name}"):
            open_images(tmp_path / name, root=root)


def test_list_and_root_must_exist(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jpg 0\n")
    with pytest.raises(FileNotFoundError, match=r"no such list.txt"):
        read_list(tmp_path / "no such list.txt", tmp_path)
    with pytest.raises(FileNotFoundError, match="root must be a folder that exists, got '.*nowhere'"):
        read_list(path, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="root must be a folder, got the file"):
        read_list(path, path)


# Anything but what ends a line or is cut off at the ends of a path.
components = st.text(st.characters(codec="utf-8", exclude_characters="/\n\r\0"), min_size=1, max_size=8).filter(
    lambda text: text == text.strip() and text not in (".", "..")
)
relative_paths = st.lists(components, min_size=1, max_size=3).map("/".join).filter(lambda path: not path.startswith("#"))


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(relative_paths, st.integers(0, 500), min_size=1, max_size=20))
@example({"a 1": 2, "a": 1, "..a/b..": 0, "\u3000x\u3000y".strip(): 3})
def test_lists_come_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, entries: dict[str, int]) -> None:
    folder = tmp_path_factory.mktemp("list")
    write_list(folder / "list.txt", list(entries), list(entries.values()))
    images = read_list(folder / "list.txt", folder)
    assert images.paths == list(entries)
    assert images.labels.tolist() == list(entries.values())


def test_names_that_would_be_read_as_comments_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names must not look like comments"):
        write_list(tmp_path / "list.txt", ["# of images"], [0])
    assert not (tmp_path / "list.txt").exists()
    write_list(tmp_path / "list.txt", ["#1.png"], [0])
    assert read_list(tmp_path / "list.txt", tmp_path).paths == ["#1.png"]


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet=string.printable, max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused_with_the_file_named(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("list")
    try:
        images = read_list(written(folder, content), folder)
    except ValueError as error:
        assert "list.txt" in str(error)
    else:
        assert len(images) > 0 and int(images.labels.min()) >= 0
        assert not any(path.startswith("/") or ".." in path.split("/") for path in images.paths)


@pytest.mark.parametrize(
    ("names", "labels", "error", "message"),
    [
        (["a.jpg"], [0, 1], ValueError, "one entry an image, got 1 and 2"),
        ([], [], ValueError, "names must have at least one entry"),
        (["a.jpg"], [-1], ValueError, "labels must be in 0..16777215, got -1"),
        (["a.jpg"], [0.0], TypeError, "labels must be integers"),
        (["a\nb.jpg"], [0], ValueError, "without line ends"),
        ([" a.jpg"], [0], ValueError, "without blanks at their ends, got ' a.jpg'"),
        ([""], [0], ValueError, "names must be non-empty"),
        (["/a.jpg"], [0], ValueError, "relative to a root"),
        (["a/../../b.jpg"], [0], ValueError, "stay in it"),
        (["a.jpg", "a.jpg"], [0, 1], ValueError, "one label each, got 0 and 1 for 'a.jpg'"),
        ("a", [0], TypeError, "names must be a sequence of texts"),
        ([b"a"], [0], TypeError, "names must be a sequence of texts"),
        (["\udcff"], [0], ValueError, "names must be valid Unicode"),
    ],
)
def test_lists_that_could_not_be_read_back_are_not_written(
    tmp_path: Path, names: Any, labels: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write_list(tmp_path / "list.txt", names, labels)
    assert list(tmp_path.iterdir()) == []


def test_a_list_is_replaced_only_when_asked_to(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    write_list(path, ["a.jpg"], torch.tensor([1]))
    with pytest.raises(ValueError, match="path exists already"):
        write_list(path, ["b.jpg"], [2])
    assert path.read_text() == "a.jpg 1\n"
    write_list(path, ["b.jpg"], np.array([2], dtype=np.int32), overwrite=True)
    assert path.read_text() == "b.jpg 2\n"


def test_published_lists_of_places(tmp_path: Path) -> None:
    folder = data_folder() / "lists"
    train = read_list(folder / "Places_LT_train.txt", tmp_path, num_classes=365)
    assert len(train) == 62_500 and train.num_classes == 365
    split = split_classes(train.labels.bincount())
    assert (len(split.few), len(split.medium), len(split.many)) == (71, 163, 131)
    test = read_list(folder / "Places_LT_test.txt", tmp_path, num_classes=365)
    assert test.labels.bincount().tolist() == [100] * 365


# Images


def test_images_are_decoded_with_their_labels(tmp_path: Path) -> None:
    make_files(tmp_path, "a/0.png", "a/1.png")
    images = FileImages(tmp_path, ["a/0.png", "a/1.png"], [3, 0], 5)
    assert [label for _, label in images] == [3, 0]
    for index in range(2):
        image, label = images[index]
        assert image.mode == "RGB" and np.array_equal(image, picture(index)) and type(label) is int
    assert np.array_equal(images[-1][0], picture(1))
    for index in (2, -3):
        with pytest.raises(IndexError, match=rf"index must be in -2..1, got {index}"):
            images[index]
    assert repr(images) == "FileImages(2 images, 5 classes)"


BEFORE_13 = int(PIL.__version__.split(".")[0]) < 13


@pytest.mark.parametrize(
    "mode",
    [
        *("L", "RGB", "1", "LA", "P", "RGBA", "CMYK", "LAB"),
        pytest.param("YCbCr", marks=pytest.mark.skipif(BEFORE_13, reason="Pillow before 13 does not read its own YCbCr files")),
    ],
)
def test_every_mode_becomes_gray_or_color(mode: str) -> None:
    image = picture(mode="L" if mode == "LA" else "RGB").convert(mode)
    content = encoded(image, "TIFF" if mode in ("CMYK", "YCbCr", "LAB") else "PNG")
    with Image.open(io.BytesIO(content)) as stored:
        assert stored.mode == mode
        expected = np.asarray(stored.convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode_image(content, "a")
    assert decoded.mode == ("L" if mode in ("L", "1", "LA") else "RGB")
    assert np.array_equal(decoded.convert("RGB"), expected), "not what torchvision's loader makes of it"


def test_palettes_with_transparency_give_their_colors_without_a_warning() -> None:
    image = picture().quantize(16)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=bytes([0, 128] * 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode_image(file.getvalue(), "a.png")
    assert np.array_equal(decoded, image.convert("RGB"))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "big-endian TIFF"])
def test_16_bits_are_scaled_to_8(form: str) -> None:
    values = np.array([[0, 128, 200, 257, 32700, 65535]], dtype=np.uint16)
    image = Image.fromarray(values)
    if form.startswith("big"):
        image = Image.frombytes("I;16B", (6, 1), values.astype(">u2").tobytes())
    decoded = decode_image(encoded(image, form.split()[-1]), "a")
    assert decoded.mode == "L"
    assert np.array_equal(np.asarray(decoded), [[0, 0, 1, 1, 127, 255]])


def test_pixels_of_unknown_range_are_refused() -> None:
    deep = Image.fromarray(np.array([[0, 70_000]], dtype=np.int32))
    with pytest.raises(ImageReadError, match=r"'a' *: gray values must be 8 or 16 bits, got 0..70000"):
        decode_image(encoded(deep, "TIFF"), "a")
    with pytest.raises(ImageReadError, match="8 or 16 bits, got floating point"):
        decode_image(encoded(Image.fromarray(np.ones((2, 2), dtype=np.float32)), "TIFF"), "a")


def test_gray_jpegs_stay_gray() -> None:
    assert decode_image(encoded(picture(mode="L"), "JPEG"), "a.jpg").mode == "L"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_file_cut_anywhere_is_an_image_read_error(form: str) -> None:
    content = encoded(picture(size=(64, 64)), form)
    for share in (0.02, 0.2, 0.5, 0.9):
        with pytest.raises(ImageReadError, match="cannot read image 'a/b': ") as raised:
            decode_image(content[: int(share * len(content))], "a/b")
        assert raised.value.name == "a/b" and raised.value.reason


@settings(deadline=None)
@given(st.binary(max_size=40), st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP"]), st.floats(0, 1))
def test_broken_bytes_are_an_image_or_an_image_read_error(noise: bytes, form: str, share: float) -> None:
    content = encoded(picture(), form)
    place = int(share * len(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = decode_image(content[:place] + noise + content[place + len(noise) :], "a")
        except ImageReadError as error:
            assert error.name == "a"
        else:
            assert image.mode in ("L", "RGB")


def test_unreadable_files_say_why(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("<html>404</html>")
    (tmp_path / "pointer.jpg").write_text("version https://git-lfs.github.com/spec/v1\nsize 1\n")
    (tmp_path / "other.jpg").write_text("an image")
    (tmp_path / "folder.jpg").mkdir()
    reasons = {
        "missing.jpg": "no such file in ",
        "empty.jpg": "the file is empty",
        "text.jpg": "it is a page of the web (HTML)",
        "pointer.jpg": "it is a pointer of Git LFS",
        "other.jpg": "not an image of a known format",
        "folder.jpg": "must be a file, got the directory",
        "a\0b.jpg": "embedded null byte",
    }
    images = FileImages(tmp_path, list(reasons), [0] * len(reasons))
    for index, (name, reason) in enumerate(reasons.items()):
        with pytest.raises(ImageReadError) as raised:
            images[index]
        assert str(raised.value).startswith(f"cannot read image {name!r}: {reason}")
        assert raised.value.name == name and raised.value.reason.startswith(reason)


def test_a_decompression_bomb_is_an_image_read_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(ImageReadError, match="cannot read image 'a': too many pixels to be meant"):
        decode_image(encoded(picture()), "a")


def test_image_read_errors_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(ImageReadError.of("a", "why")))
    assert (str(error), error.name, error.reason) == ("cannot read image 'a': why", "a", "why")
    assert ImageReadError("from a worker").name == ""


def test_a_change_of_directory_loses_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path, "a.png")
    monkeypatch.chdir(tmp_path)
    images = FileImages(".", ["a.png"], [0])
    monkeypatch.chdir("/")
    assert images[0][1] == 0


def test_numbers_of_paths_and_labels_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one entry an image, got 1 and 2"):
        FileImages(tmp_path, ["a"], [0, 1])
    with pytest.raises(ValueError, match="give num_classes"):
        FileImages(tmp_path, [], [])
    assert len(FileImages(tmp_path, [], [], 3)) == 0


# Subsets, fingerprints, workers: what all sources have in common


class Toy:
    """A data set in torchvision's manner."""

    def __init__(self, n: int = 6) -> None:
        self.targets = [i % 3 for i in range(n)]
        self.classes = ["ant", "bee", "cow"]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return picture(index), self.targets[index]


def file_images(folder: Path) -> FileImages:
    names = [f"{'abc'[i % 3]}/{i}.png" for i in range(6)]
    make_files(folder, *names)
    return FileImages(folder, names, [i % 3 for i in range(6)], 4)


SOURCES: dict[str, Callable[[Path], LabelledImages]] = {
    "files": file_images,
    "arrays": lambda folder: arrays(color=True),
    "gray arrays": lambda folder: arrays(),
    "dataset": lambda folder: from_torchvision(Toy(), "toy"),
}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> LabelledImages:
    return SOURCES[request.param](tmp_path)


def test_subsets_keep_names_labels_and_classes(source: LabelledImages) -> None:
    chosen = [4, 0, 4, 3]
    for indices in (chosen, torch.tensor(chosen), np.array(chosen)):
        subset = source.subset(indices)
        assert type(subset) is type(source) and len(subset) == 4
        assert subset.num_classes == source.num_classes and subset.class_names == source.class_names
        for place, index in enumerate(chosen):
            assert subset.name(place) == source.name(index)
            assert subset[place][1] == source[index][1] == int(subset.labels[place])
            assert np.array_equal(subset[place][0], source[index][0])
    again = source.subset(chosen).subset([1, 2])
    assert [again.name(i) for i in range(2)] == [source.name(0), source.name(4)]
    assert np.array_equal(again[1][0], source[4][0])
    assert len(source.subset([])) == 0 and source.subset([]).num_classes == source.num_classes


def test_subsets_refuse_what_is_not_there(source: LabelledImages) -> None:
    with pytest.raises(ValueError, match=r"indices must be in 0..5, got 6"):
        source.subset([6])
    with pytest.raises(ValueError, match=r"indices must be in 0..5, got -1"):
        source.subset([-1])
    with pytest.raises(TypeError, match="indices must be integers"):
        source.subset(torch.ones(6, dtype=torch.bool))


def test_fingerprints_tell_images_and_labels_apart(source: LabelledImages) -> None:
    whole = source.fingerprint()
    assert len(whole) == 64 and whole == source.fingerprint() == pickle.loads(pickle.dumps(source)).fingerprint()
    assert source.subset(range(6)).fingerprint() == whole
    # The last but one has other images under the same labels.
    parts = ([0, 1, 2, 3, 4], [1, 0, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4], [3, 1, 2, 0, 4, 5], [])
    others = [source.subset(indices).fingerprint() for indices in parts]
    relabelled = pickle.loads(pickle.dumps(source))
    relabelled.labels[0] = 2
    assert len({whole, relabelled.fingerprint(), *others}) == 7


def test_fingerprints_of_files_do_not_depend_on_the_root_or_the_files(tmp_path: Path) -> None:
    names, labels = ["a/0.png", "b/1.png"], [0, 1]
    fingerprint = FileImages(tmp_path, names, labels).fingerprint()
    assert fingerprint == FileImages(tmp_path / "elsewhere", names, labels).fingerprint()
    assert fingerprint != FileImages(tmp_path, ["a/0.png", "b/2.png"], labels).fingerprint()
    # What ends one name must not begin the next.
    assert FileImages(tmp_path, ["a", "bc"], labels).fingerprint() != FileImages(tmp_path, ["ab", "c"], labels).fingerprint()


def test_fingerprints_of_arrays_are_over_their_pixels() -> None:
    one, other = arrays(), arrays()
    other.pixels[5, 4, 3] ^= 1
    assert one.fingerprint() != other.fingerprint()
    wide = ArrayImages(one.pixels.reshape(6, 4, 5), one.labels, one.source, one.num_classes)
    assert wide.fingerprint() != one.fingerprint()


def test_images_can_be_pickled(source: LabelledImages) -> None:
    again = pickle.loads(pickle.dumps(source))
    assert again.name(5) == source.name(5) and np.array_equal(again[5][0], source[5][0])


def test_stored_bytes_are_equal_for_equal_images_alone(source: LabelledImages) -> None:
    stored = [source.stored(index) for index in range(6)]
    assert len(set(stored)) == 6 and stored == [source.stored(index) for index in range(6)]
    for index in range(6):
        assert np.array_equal(source.decode(index, stored[index]), source.load(index))


def test_labels_are_a_copy() -> None:
    labels = torch.arange(6) % 3
    images = ArrayImages(np.zeros((6, 2, 2), np.uint8), labels, "toy")
    labels.zero_()
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_labels_are_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        images = ArrayImages(np.zeros((6, 2, 2), np.uint8), [0, 1, 2, 0, 1, 2], "toy")
        assert images.labels.device.type == "cpu" and images.subset([1, 2]).labels.tolist() == [1, 2]
        assert make_long_tailed(images, 2, seed=3).labels.device.type == "cpu"


def test_workers_read_what_the_main_process_reads(source: LabelledImages) -> None:
    loader: Any = DataLoader(
        source, batch_size=1, num_workers=2, collate_fn=operator.itemgetter(0), multiprocessing_context="fork"
    )
    for index, (image, label) in enumerate(loader):
        assert np.array_equal(image, source[index][0]) and label == source[index][1]


def test_spawned_workers_read_too(tmp_path: Path) -> None:
    images = file_images(tmp_path).subset([4])
    loader: Any = DataLoader(
        images, batch_size=1, num_workers=1, collate_fn=operator.itemgetter(0), multiprocessing_context="spawn"
    )
    [(image, label)] = loader
    assert np.array_equal(image, picture(4)) and label == 1


def test_errors_come_back_from_workers(tmp_path: Path) -> None:
    images = file_images(tmp_path).subset([1])
    (tmp_path / images.name(0)).write_bytes(b"no image")
    loader: Any = DataLoader(
        images, batch_size=1, num_workers=1, collate_fn=operator.itemgetter(0), multiprocessing_context="fork"
    )
    entries = iter(loader)
    with pytest.raises(ImageReadError, match=r"cannot read image 'b/1.png': not an image"):
        next(entries)
    entries._shutdown_workers()  # left to the garbage collector, that takes five seconds


# Folders of class folders


def test_class_folders_are_sorted_and_read_whole(tmp_path: Path) -> None:
    names = ["dog/1.jpg", "cat/b/2.png", "cat/z.JPEG", "cat/b-a/3.webp", "Emu/1.bmp"]
    make_files(tmp_path, *names)
    for other in ("cat/notes.txt", "cat/.hidden.png", ".git/1.png", "cat/.cache/1.png", "top.png"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).touch()
    (tmp_path / "zebra").mkdir()
    images = read_image_folder(tmp_path)
    # By folder and then by name, as code points: capitals first.
    assert images.paths == ["Emu/1.bmp", "cat/z.JPEG", "cat/b/2.png", "cat/b-a/3.webp", "dog/1.jpg"]
    assert images.class_names == ("Emu", "cat", "dog", "zebra") and images.num_classes == 4
    assert images.labels.tolist() == [0, 1, 1, 1, 2]


def test_class_folders_are_those_of_torchvision(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    make_files(tmp_path, "b/x/1.png", "b/x-y/1.png", "b/1.png", "b/10.png", "b/2.png", "a/B.png", "a/a.png", "a/x/y/z.png")
    reference = datasets.ImageFolder(tmp_path)
    images = read_image_folder(tmp_path)
    assert [(str(tmp_path / path), label) for path, label in zip(images.paths, images.labels.tolist(), strict=True)] == (
        reference.samples
    )
    assert list(images.class_names or ()) == reference.classes
    for index in range(len(images)):
        assert np.array_equal(images[index][0], reference[index][0])


def test_names_of_classes_order_the_labels_of_folders(tmp_path: Path) -> None:
    make_files(tmp_path, "cat/1.png", "dog/1.png")
    images = read_image_folder(tmp_path, class_names=["dog", "emu", "cat"])
    assert images.labels.tolist() == [2, 0] and images.class_names == ("dog", "emu", "cat")
    with pytest.raises(ValueError, match=r"class folders must be among the 2 class_names, got 'cat' in"):
        read_image_folder(tmp_path, class_names=["dog", "emu"])


def test_folders_that_are_none_of_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="root must hold a folder for each class, got none"):
        read_image_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match=r"root must hold images \(.jpg, .*\) in its class folders, got none"):
        read_image_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="root must be a folder that exists"):
        read_image_folder(tmp_path / "dog")
    make_files(tmp_path / "all", "train/cat/1.png", "val/cat/1.png")
    with pytest.raises(ValueError, match="got train, val in .*: give one of these"):
        read_image_folder(tmp_path / "all")


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    make_files(tmp_path / "elsewhere", "1.png", "deep/2.png")
    root = tmp_path / "root"
    (root / "cat").mkdir(parents=True)
    (root / "cat" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root / "cat")
    (root / "dog").symlink_to(tmp_path / "elsewhere" / "deep")
    assert read_image_folder(root).paths == ["cat/link/1.png", "cat/link/deep/2.png", "dog/2.png"]


# Arrays


def saved(folder: Path, **content: Any) -> Path:
    path = folder / "toy.npz"
    np.savez(path, **content)
    return path


PIXELS = np.arange(4 * 3 * 2, dtype=np.uint8).reshape(4, 3, 2)


def test_arrays_are_read(tmp_path: Path) -> None:
    images = read_arrays(saved(tmp_path, x=PIXELS, y=np.array([0, 1, 1, 0]), names=np.array(["ant", "bee", "cow"])))
    assert images.num_classes == 3 and images.class_names == ("ant", "bee", "cow")
    assert images.name(2) == "toy.npz[2]" and images.subset([2]).name(0) == "toy.npz[2]"
    image, label = images[2]
    assert (image.mode, image.size, label) == ("L", (2, 3), 1) and np.array_equal(image, PIXELS[2])
    color = np.arange(2 * 3 * 2 * 3, dtype=np.uint8).reshape(2, 3, 2, 3)
    images = read_arrays(saved(tmp_path, pictures=color, kind=[0, 4]), images="pictures", labels="kind")
    assert images[1][0].mode == "RGB" and np.array_equal(images[1][0], color[1]) and images.num_classes == 5


def test_numbers_and_names_of_classes_of_arrays(tmp_path: Path) -> None:
    path = saved(tmp_path, x=PIXELS, y=[0, 1, 1, 0], names=["ant", "bee"], words=["A", "B", "C"])
    assert read_arrays(path, names=None).class_names is None
    assert read_arrays(path, names=None, num_classes=7).num_classes == 7
    assert read_arrays(path, names="words").class_names == ("A", "B", "C")
    with pytest.raises(ValueError, match=r"toy.npz: class_names must have one name a class, got 2 names for num_classes = 7"):
        read_arrays(path, num_classes=7)


def test_arrays_of_usual_names_are_found(tmp_path: Path) -> None:
    """As MedMNIST and Keras name them, labels [n, 1] and gray images [n, height, width, 1] too."""
    labels = np.array([0, 1, 1, 0])
    for images, targets in (
        ("train_images", "train_labels"),
        ("x_train", "y_train"),
        ("data", "targets"),
        ("images", "target"),
        ("image", "label"),
    ):
        more = {"val_images": PIXELS[:1], "val_labels": [[1]]} if images == "train_images" else {}
        np.savez(tmp_path / "a.npz", **{images: PIXELS[..., None], targets: labels[:, None], **more})
        for part in ("train", "val") if more else (None,):
            read = open_images(tmp_path / "a.npz", part=part)
            assert read.labels.tolist() == ([1] if part == "val" else labels.tolist())
            assert read[0][0].size == PIXELS.shape[:0:-1]
    np.savez(tmp_path / "a.npz", train_images=PIXELS, train_labels=labels, test_images=PIXELS, test_labels=labels)
    with pytest.raises(ValueError, match=r"where there are several: images='train_images', labels='train_labels' or images="):
        read_arrays(tmp_path / "a.npz")
    with pytest.raises(
        ValueError, match=r"no array 'x' for images; it has test_images, .*read_arrays\(..., images=, labels=\)"
    ):
        read_arrays(tmp_path / "a.npz", part="val")


def test_subsets_and_concatenations() -> None:
    class Toy(torch.utils.data.Dataset):
        classes = ("a", "b", "c")

        def __init__(self, targets: list[int]) -> None:
            self.targets = targets

        def __len__(self) -> int:
            return len(self.targets)

        def __getitem__(self, index: int) -> Any:
            return picture(index), np.array([self.targets[index]])

    whole = torch.utils.data.ConcatDataset([Toy([0, 1, 2]), torch.utils.data.Subset(Toy([2, 1, 0]), [2, 0])])
    images = from_torchvision(torch.utils.data.Subset(whole, [4, 0, 3]), "toy")
    assert images.labels.tolist() == [2, 0, 0] and images.class_names == ("a", "b", "c")
    other = Toy([0])
    other.classes = ("x", "y", "z")
    with pytest.raises(ValueError, match="of the same classes"):
        from_torchvision(torch.utils.data.ConcatDataset([Toy([0]), other]), "toy")


def test_other_files_of_image_folders_are_counted(tmp_path: Path) -> None:
    for name in (
        "cat/1.jpg",
        "cat/2.heic",
        "cat/3.heic",
        "cat/._1.jpg",
        "cat/Thumbs.db",
        "cat/notes.txt",
        "dog/4",
        "dog/5.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "__MACOSX").mkdir()
    with pytest.warns(UserWarning, match=r"are passed over: 2 .heic, 1 without ending$"):
        images = read_image_folder(tmp_path)
    assert images.class_names == ("cat", "dog") and images.paths == ["cat/1.jpg", "dog/5.png"]


def test_no_waiting_for_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageReadError, match="must be a file, got the pipe"):
        FileImages(tmp_path, ["pipe.png"], [0])[0]
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(ValueError, match="must be a file, got the pipe"):
        read_list(tmp_path / "list.txt", tmp_path)
    with pytest.raises(ValueError, match="must be a file, got the device"):
        read_arrays("/dev/zero")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({"y": [0]}, ValueError, "has no array 'x' for images; it has y"),
        ({"x": PIXELS}, ValueError, "has no array 'y' for labels; it has x"),
        ({"x": PIXELS.astype(np.float32), "y": [0] * 4}, TypeError, "images must be uint8, got float32"),
        ({"x": PIXELS, "y": [0] * 3}, ValueError, "one entry an image, got 4 and 3"),
        ({"x": PIXELS, "y": [0.0] * 4}, TypeError, "labels must be integers"),
        ({"x": PIXELS, "y": [[0, 1]] * 4}, ValueError, r"labels must have shape \[n\]"),
        ({"x": PIXELS, "y": [0, -1, 0, 0]}, ValueError, "labels must be in 0.*got -1"),
        ({"x": PIXELS, "y": [0, 1, 2, 0], "names": ["a", "b"]}, ValueError, r"labels must be in 0..1, got 2"),
        ({"x": PIXELS, "y": [0] * 4, "names": [1, 2]}, TypeError, r"names \('names'\) must be text \[N\], got int64"),
        ({"x": PIXELS, "y": [0] * 4, "names": ["a", "a"]}, ValueError, "class_names must be different"),
        ({"x": PIXELS[0], "y": [0] * 3}, ValueError, r"images must have shape .*, got \[3, 2\]"),
        ({"x": PIXELS[..., None, None], "y": [0] * 4}, ValueError, r"got \[4, 3, 2, 1, 1\]"),
        ({"x": PIXELS[:0], "y": np.zeros(0, np.int64)}, ValueError, "there are no images in it"),
        ({"x": PIXELS, "y": 3}, ValueError, "must have one entry an image or class"),
        ({"x": np.array([None] * 4), "y": [0] * 4}, TypeError, r"images \('x'\) must be .*, got Python objects"),
        ({"x": PIXELS, "y": np.array([[1], []], dtype=object)}, TypeError, r"labels \('y'\) must be .*, got Python objects"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, content: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        read_arrays(saved(tmp_path, **content))
    assert "toy.npz" in str(raised.value)


def test_files_that_are_no_npz_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing.npz"):
        read_arrays(tmp_path / "nothing.npz")
    np.save(tmp_path / "single.npz.npy", PIXELS)
    (tmp_path / "single.npz.npy").rename(tmp_path / "single.npz")
    with pytest.raises(ValueError, match=r"single.npz is not an .npz file: it holds a single array"):
        read_arrays(tmp_path / "single.npz")
    for content in (b"", b"text", pickle.dumps([1, 2])):
        (tmp_path / "other.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"other.npz is not an .npz file"):
            read_arrays(tmp_path / "other.npz")
    path = saved(tmp_path, x=PIXELS, y=[0] * 4)
    path.write_bytes(path.read_bytes().replace(PIXELS.tobytes(), bytes(PIXELS.size)))
    with pytest.raises(ValueError, match=r"toy.npz: images \('x'\) cannot be read"):
        read_arrays(path)
    with pytest.raises(ValueError, match="must be a file, got the directory"):
        read_arrays(tmp_path)


def test_published_quickdraw() -> None:
    images = read_arrays(data_folder() / "quickdraw345.npz")
    assert len(images) == 34_500 and images.num_classes == 345 and images[0][0].size == (28, 28)
    assert make_long_tailed(images, 50).labels.bincount().tolist() == long_tailed_counts(100, 345, 50)


# Data sets in torchvision's manner


def test_datasets_are_read_through(tmp_path: Path) -> None:
    images = from_torchvision(Toy(), "toy")
    assert isinstance(images, DatasetImages)
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2] and images.class_names == ("ant", "bee", "cow")
    assert images.name(4) == "toy[4]" and np.array_equal(images[4][0], picture(4))


@pytest.mark.parametrize("attribute", ["targets", "labels", "_labels"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_labels_of_datasets_have_several_names(attribute: str, kind: Callable[[list[int]], Any]) -> None:
    dataset = Toy()
    dataset.__class__ = type("Other", (Toy,), {"__getitem__": lambda self, index: (picture(index), index % 3)})
    labels = kind(dataset.targets)
    del dataset.targets, dataset.classes
    setattr(dataset, attribute, labels)
    dataset.__class__.__len__ = lambda self: 6  # type: ignore[method-assign]
    images = from_torchvision(dataset, "toy")
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2] and images.class_names is None


def test_datasets_that_do_not_fit_are_refused() -> None:
    dataset = Toy()
    with pytest.raises(TypeError, match="name must be a text"):
        from_torchvision(dataset, "")
    with pytest.raises(TypeError, match="dataset must have a length and items, got int"):
        from_torchvision(3, "toy")
    with pytest.raises(TypeError, match="must have its labels in targets, labels or _labels, list has none"):
        from_torchvision([1], "toy")
    with pytest.raises(ValueError, match="dataset 'toy' has no images"):
        from_torchvision(Toy(0), "toy")
    dataset.classes = ["ant"]
    with pytest.raises(ValueError, match=r"labels must be in 0..0, got 1"):
        from_torchvision(dataset, "toy")
    dataset = Toy()
    dataset.target_transform = str  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="must have no target_transform"):
        from_torchvision(dataset, "toy")
    dataset = Toy()
    dataset.targets = types.SimpleNamespace()  # type: ignore[assignment]
    with pytest.raises(TypeError):
        from_torchvision(dataset, "toy")


def test_items_of_datasets_are_checked() -> None:
    class Tensors(Toy):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            return torch.zeros(3, 4, 4), self.targets[index]

    class OtherLabels(Toy):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            return picture(index), 2

    class Broken(Toy):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            if index == 1:
                raise OSError("disk gone")
            return picture(index, mode="RGBA"), self.targets[index]

    with pytest.raises(TypeError, match=r"got a Tensor as the image: make the data set without a transform"):
        from_torchvision(Tensors(), "toy")
    with pytest.raises(ValueError, match=r"lists label 0 for its first item, but that has label 2"):
        from_torchvision(OtherLabels(), "toy")
    images = from_torchvision(Broken(), "toy")
    assert images[0][0].mode == "RGB"
    with pytest.raises(ImageReadError, match=r"cannot read image 'toy\[1\]': disk gone"):
        images.load(1)


def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")

    def make(root: str, train: bool, download: bool) -> Any:
        assert root == str(tmp_path) and not download
        n = 5 if train else 2
        pixels = np.arange(n * 32 * 32 * 3, dtype=np.uint64).astype(np.uint8).reshape(n, 32, 32, 3)
        return types.SimpleNamespace(data=pixels, targets=[1] * n, classes=["ant", "bee"])

    with pytest.raises(FileNotFoundError, match="no whole copy of cifar10 in .*download=True"):
        read_cifar("cifar10", tmp_path, "test")
    monkeypatch.setattr(datasets, "CIFAR100", make)
    images = open_images("cifar100:train", root=tmp_path)
    assert len(images) == 5 and images.name(3) == "cifar100:train[3]" and images[0][0].size == (32, 32)
    assert len(open_images("cifar100:test", root=tmp_path)) == 2
    with pytest.raises(ValueError, match="name must be one of cifar10, cifar100, got 'cifar20'"):
        read_cifar("cifar20", tmp_path, "train")
    with pytest.raises(ValueError, match="part must be one of train, test, got 'val'"):
        open_images("cifar100:val", root=tmp_path)
    with pytest.raises(ValueError, match="needs root"):
        open_images("cifar100:train")
    with pytest.raises(ValueError, match="calls class 0 'ant', class_names 'bee'"):
        open_images("cifar100:train", root=tmp_path, class_names=["bee", "ant"])


# Any source


def test_a_source_is_told_by_what_it_is(tmp_path: Path) -> None:
    make_files(tmp_path / "images", "cat/1.png", "dog/1.png")
    write_list(tmp_path / "all.txt", ["cat/1.png"], [0])
    npz = saved(tmp_path, x=PIXELS, y=[0, 1, 1, 0])
    assert isinstance(open_images(tmp_path / "images"), FileImages)
    images = open_images(str(tmp_path / "all.txt"), root=tmp_path / "images", num_classes=3)
    assert images[0][1] == 0 and images.num_classes == 3
    assert isinstance(open_images(npz), ArrayImages)
    assert open_images(npz, class_names=["a", "b", "c"]).class_names == ("a", "b", "c")
    assert open_images(npz, num_classes=4).num_classes == 4
    assert open_images(tmp_path / "images", class_names=["dog", "cat"]).labels.tolist() == [1, 0]


def test_sources_that_disagree_or_are_none_are_refused(tmp_path: Path) -> None:
    make_files(tmp_path / "images", "cat/1.png", "dog/1.png")
    write_list(tmp_path / "all.txt", ["cat/1.png"], [0])
    npz = saved(tmp_path, x=PIXELS, y=[0, 1, 1, 0], names=["ant", "bee"])
    (tmp_path / "data.csv").touch()
    with pytest.raises(FileNotFoundError, match=r"there is no 'nowhere': source must be a list file"):
        open_images("nowhere")
    with pytest.raises(ValueError, match="is a list and needs root"):
        open_images(tmp_path / "all.txt")
    with pytest.raises(ValueError, match="root is for lists and CIFAR"):
        open_images(npz, root=tmp_path)
    with pytest.raises(ValueError, match=r"source must be a list \(.txt\).*data.csv"):
        open_images(tmp_path / "data.csv")
    with pytest.raises(ValueError, match="has 2 classes, but num_classes is 3"):
        open_images(tmp_path / "images", num_classes=3)
    with pytest.raises(ValueError, match="calls class 0 'ant', class_names 'bee'"):
        open_images(npz, class_names=["bee", "ant"])
    with pytest.raises(ValueError, match="has 2 classes, but class_names has 3"):
        open_images(npz, class_names=["ant", "bee", "cow"])


# Long-tailed cuts


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 400), st.floats(1, 1000))
def test_counts_follow_the_exponential_profile(most: int, num_classes: int, factor: float) -> None:
    try:
        counts = long_tailed_counts(most, num_classes, factor)
    except ValueError as error:
        assert "the last class has no image" in str(error) and most / factor < 1 + 1e-9
        return
    assert len(counts) == num_classes and counts[0] == most
    assert all(a >= b >= 1 for a, b in itertools.pairwise(counts))
    for i, count in enumerate(counts):
        exact = most * factor ** (-i / max(1, num_classes - 1))
        assert exact - 1 - 1e-6 <= count <= exact + 1e-6


def test_counts_are_the_published_ones() -> None:
    counts = long_tailed_counts(500, 100, 100)
    assert (counts[0], counts[1], counts[-1], sum(counts)) == (500, 477, 5, 10_847)
    counts = long_tailed_counts(5000, 10, 100)
    assert counts == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 3, 10), ValueError, "most must be at least 1"),
        ((10, 0, 10), ValueError, "num_classes must be at least 1"),
        ((10, 3, 0.5), ValueError, "imbalance_factor must be finite and at least 1, got 0.5"),
        ((10, 3, float("nan")), ValueError, "imbalance_factor must be finite and at least 1, got nan"),
        ((10, 3, float("inf")), ValueError, "imbalance_factor must be finite and at least 1, got inf"),
        ((10, 3, "10"), TypeError, "imbalance_factor must be a number, finite and at least 1, got '10'"),
        ((10, 3, 20), ValueError, "imbalance_factor must be at most most = 10.*got 20"),
    ],
)
def test_counts_refuse(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        long_tailed_counts(*arguments)


def test_a_cut_keeps_the_first_images_of_each_class() -> None:
    images = arrays(n=60, num_classes=3)
    cut = make_long_tailed(images, 10)
    assert cut.labels.bincount().tolist() == long_tailed_counts(20, 3, 10) == [20, 6, 2]
    # Class c's images are c, c + 3, c + 6, ...
    kept = sorted([3 * i for i in range(20)] + [3 * i + 1 for i in range(6)] + [3 * i + 2 for i in range(2)])
    assert [cut.name(i) for i in range(len(cut))] == [f"toy.npz[{row}]" for row in kept]
    assert cut.num_classes == 3


def test_a_seed_draws_classes_and_images() -> None:
    images = arrays(n=600, num_classes=6)
    state = torch.random.get_rng_state()
    cuts = [make_long_tailed(images, 20, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.random.get_rng_state())
    names = [[cut.name(i) for i in range(len(cut))] for cut in cuts]
    assert names[0] == names[1] != names[2]
    for cut in cuts:
        assert sorted(cut.labels.bincount().tolist(), reverse=True) == long_tailed_counts(100, 6, 20)
    assert cuts[0].labels.bincount().tolist() != cuts[2].labels.bincount().tolist()


def test_cuts_that_cannot_be_made_are_refused() -> None:
    images = ArrayImages(np.zeros((5, 2, 2), np.uint8), [0, 0, 0, 1, 1], "toy", 2)
    assert make_long_tailed(images, 2).labels.bincount().tolist() == [2, 1]
    assert make_long_tailed(images, 3, most=3).labels.bincount().tolist() == [3, 1]
    with pytest.raises(ValueError, match="images must have 3 images of class 1 to keep, got 2"):
        make_long_tailed(images, 1, most=3)
    with pytest.raises(ValueError, match="images must have images of every class, got none of class 2"):
        make_long_tailed(ArrayImages(images.pixels, images.labels, "toy", 3), 2)
    with pytest.raises(TypeError, match="images must be LabelledImages, got list"):
        make_long_tailed([1, 2], 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be at least 0"):
        make_long_tailed(images, 2, seed=-1)
