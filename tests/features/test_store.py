"""Folders of cached features: whole or not there, opened without reading them, refused where they are not what is asked for."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import alphaext
from alphaext.features import sums
from alphaext.features.store import Features, read_features, write_array, write_features
from alphaext.features.sums import checksum, row_sums
from alphaext.utils import files as _files
from alphaext.utils.tensors import rows_check


@pytest.fixture
def folder(tmp_path):
    """Seven features of three classes."""
    features = torch.arange(28, dtype=torch.float32).reshape(7, 4)
    more = {"model": "abc", "images": "def", "transform": {"name": "test", "resize": 256, "sizes": (2, 3)}}
    path = tmp_path / "features"
    write_features(path, features, [0, 1, 2, 0, 1, 2, 0], num_classes=3, class_names=["ä", "b", "c"], metadata=more)
    return path


def sidecar(folder, **changes):
    """Change the sidecar; None removes an entry."""
    path = folder / "features.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 9),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64, torch.bfloat16]),
    kind=st.sampled_from(["tensor", "array", "strided", "list"]),
    seed=st.integers(0, 9),
)
def test_what_is_written_is_read(tmp_path_factory, rows, width, dtype, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, width, generator=generator).to(dtype)
    labels = torch.randint(0, 4, (rows,), generator=generator)
    given_ = features
    if kind == "strided":
        given_ = features.repeat_interleave(2, dim=1)[:, ::2]
    elif kind == "array" and dtype != torch.bfloat16:
        given_ = features.numpy()[::-1].copy()[::-1]
    elif kind == "list":
        given_, features = features.tolist(), features.double()
    kept = torch.float16 if features.dtype == torch.float16 else torch.float32
    folder = tmp_path_factory.mktemp("any") / "features"
    written = write_features(folder, given_, labels, num_classes=4)
    read = read_features(folder)
    for result in (written, read):
        assert torch.equal(torch.from_numpy(np.array(result.features)), features.to(kept))
        assert torch.equal(result.labels, labels) and result.labels.dtype == torch.int64
        assert (len(result), result.num_classes, result.class_names, result.passes) == (rows, 4, None, 1)
    assert sorted(os.listdir(folder)) == ["features.json", "features.npy", "labels.npy", "sums.npy"]
    read.verify()


def test_features_larger_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr("alphaext.features.store._BLOCK_BYTES", 64)
    source = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    np.save(tmp_path / "source.npy", source)
    mapped = np.load(tmp_path / "source.npy", mmap_mode="r")
    assert np.array_equal(write_features(tmp_path / "f", mapped, np.zeros(50, dtype=int), num_classes=1).features, source)
    source[41, 2] = np.inf
    with pytest.raises(ValueError, match=r"features must be finite, got inf at index \[41, 2\]"):
        write_features(tmp_path / "g", source, np.zeros(50, dtype=int), num_classes=1)


def test_they_are_a_read_only_memory_map(folder):
    features = read_features(folder).features
    assert isinstance(features, np.memmap) and not features.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        features[0, 0] = 1


def test_what_they_tell(folder):
    features = read_features(folder)
    assert repr(features) == f"Features(7 of 4 float32, 3 classes, {str(folder)!r})"
    assert features.class_names == ("ä", "b", "c")
    assert features.class_counts().tolist() == [3, 2, 2]
    assert torch.equal(features.class_means(), alphaext.class_means(features.features, features.labels, 3))
    assert features.metadata["transform"] == {"name": "test", "resize": 256, "sizes": [2, 3]}


def test_several_passes_over_an_image_count_once(tmp_path):
    rows = torch.rand(6, 2)
    features = write_features(tmp_path / "f", rows, [0, 0, 1] * 2, num_classes=3, metadata={"passes": 2})
    assert features.passes == 2 and features.class_counts().tolist() == [2, 1, 0]
    assert features.class_means()[2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fit_takes_them(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(60, 8, generator=generator).to(dtype), torch.arange(60) % 4
    features = write_features(tmp_path / "f", rows, labels, num_classes=4)
    linear = nn.Linear(8, 4)
    weights = []
    for source, targets in ((features.features, features.labels), (rows, labels)):
        head = alphaext.AlphaNet.from_linear(linear, members=[[3, 0, 1]], seed=0)
        alphaext.fit(head, source, targets, epochs=2, progress=False)
        weights.append(head.fold().weight.detach())
    assert torch.equal(*weights)


def test_the_bytes_can_be_verified(folder):
    read_features(folder).verify()
    with (folder / "features.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(ValueError, match=r"features.npy' is damaged: its content has changed .* of 7 rows 6$"):
        read_features(folder).verify()
    _as_of_an_earlier_release(folder, None)
    with pytest.raises(ValueError, match=r"features.npy' has changed since it was written: SHA-256 \w{64}, not \w{64}"):
        read_features(folder).verify()


def _as_of_an_earlier_release(folder, features_sum):
    """A folder with one checksum of all rows, or none."""
    sidecar(folder, row_sums="gone", features_sum="gone" if features_sum is None else features_sum)
    (folder / "sums.npy").unlink()


def _uses(features, other):
    """What reads cached features ``[n, 257]`` of four classes, each with its name; ``other`` is whole."""
    linear, split = nn.Linear(257, 4), alphaext.split_classes([99, 99, 99, 9])

    def head():
        return alphaext.AlphaNet.from_linear(linear, members=[[3, 0, 1]], seed=0, coefficients="direct")

    fit = partial(alphaext.fit, epochs=1, progress=False)
    return {
        "class_means": lambda: features.class_means(),
        "predict": lambda: alphaext.metrics.predict(linear, features, progress=False),
        "fit": lambda: fit(head(), features),
        "fit, autograd": lambda: fit(head(), features, engine="autograd"),
        "fit, drawn": lambda: fit(head(), features, augment="neighbors", augment_samples=5, samples_per_class=9),
        "fit, validation": lambda: fit(head(), other, val_features=features),
        "fit_many": lambda: alphaext.fit_many(linear, features, None, [{"epochs": 1}], few_classes=[3], progress=False),
        "repair": lambda: alphaext.repair(linear, features, few_classes=[3], epochs=1, progress=False),
        "recommend": lambda: alphaext.recommend(linear, features, split=split),
        "ncm": lambda: alphaext.baselines.ncm(features),
        "discriminant": lambda: alphaext.baselines.discriminant(features),
        "crt": lambda: alphaext.baselines.crt(features, epochs=1, progress=False),
        "lws": lambda: alphaext.baselines.lws(linear, features, epochs=1, progress=False),
        "few_bias": lambda: alphaext.baselines.choose_few_bias(linear, features, None, split=split),
        "add_classes": lambda: alphaext.add_classes(linear, features, None, torch.ones(2, 257), [4, 4], epochs=1),
        "write_features": lambda: write_features(features.folder.parent / "copy", features),
        "verify": lambda: features.verify(),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of features of more than a MiB, and what is left over."""
    folder, generator = tmp_path_factory.mktemp("whole") / "f", torch.Generator().manual_seed(0)
    rows, labels = torch.randn(1200, 257, generator=generator).half(), torch.arange(1200) % 4
    return write_features(folder, rows, labels, num_classes=4)


@pytest.mark.parametrize("use", list(_uses(None, None)))
def test_damage_is_named_by_what_reads_them(tmp_path, whole, use):
    path = Path(shutil.copytree(whole.folder, tmp_path / "f")) / "features.npy"
    content, row = path.read_bytes(), 257 * 2
    start = len(content) - 1200 * row
    # Of class 3, which is few: whatever reads some reads these.
    path.write_bytes(content[: start + 7 * row + 400] + b"\x00\x00" + content[start + 7 * row + 402 :])
    with pytest.raises(ValueError, match=r"f.features.npy' is damaged: its content has changed since .*, of 1200 rows 7$"):
        _uses(read_features(path.parent), whole)[use]()
    path.write_bytes(content)
    _uses(read_features(path.parent), whole)["class_means"]()


def _flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    ("damage", "rows"),
    [
        (lambda content, start, row: _flipped(content, start), "0$"),
        (lambda content, start, row: _flipped(content, len(content) - 1), "1199$"),
        (lambda content, start, row: _flipped(_flipped(content, start + 5 * row), start + 900 * row), "5, 900$"),
        (lambda content, start, row: content[: start + 9 * row] + bytes(4 * row) + content[start + 13 * row :], "9 to 12$"),
        (lambda content, start, row: content[: start + row] + bytes(2) + content[start + row : -2], r"1 to 1199$"),
        (
            lambda content, start, row: (
                content[:start]
                + content[start + row : start + 2 * row]
                + content[start : start + row]
                + content[start + 2 * row :]
            ),
            "0, 1$",
        ),
    ],
    ids=["first bit", "last bit", "two", "zeros", "shifted", "swapped"],
)
def test_the_damaged_rows_are_named(tmp_path, whole, damage, rows):
    path = Path(shutil.copytree(whole.folder, tmp_path / "f")) / "features.npy"
    content = path.read_bytes()
    path.write_bytes(damage(content, len(content) - 1200 * 514, 514))
    with pytest.raises(ValueError, match=f"of 1200 rows {rows}"):
        read_features(path.parent).class_means()
    path.write_bytes(content)


def test_damaged_labels_and_sums_are_named(tmp_path, whole):
    for name in ("labels.npy", "sums.npy"):
        folder = Path(shutil.copytree(whole.folder, tmp_path / name / "f"))
        (folder / name).write_bytes(_flipped((folder / name).read_bytes(), 200))
        with pytest.raises(ValueError, match=rf"{name}' is damaged: its content has changed .* \(checksum \w{{8}}, not"):
            read_features(folder)


def test_one_checksum_of_all_as_earlier_releases_wrote_it(tmp_path, whole):
    folder = Path(shutil.copytree(whole.folder, tmp_path / "f"))
    _as_of_an_earlier_release(folder, checksum(np.asarray(whole.features)))
    assert torch.equal(read_features(folder).class_means(), whole.class_means())
    path = folder / "features.npy"
    path.write_bytes(_flipped(path.read_bytes(), 9000))
    for use in ("class_means", "repair", "ncm"):
        with pytest.raises(ValueError, match=r"features.npy' is damaged: its content has changed .* \(checksum \w{8}, not"):
            _uses(read_features(folder), whole)[use]()


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(["<f2", "<f4"]),
    rows=st.integers(1, 30),
    width=st.integers(1, 20),
    place=st.floats(0, 1, exclude_max=True),
)
def test_a_changed_bit_changes_its_rows_sum_and_no_other(dtype, rows, width, place):
    content = np.random.default_rng(rows).standard_normal((rows, width)).astype(dtype)
    damaged = content.copy()
    byte = int(place * content.nbytes)
    damaged.reshape(-1).view(np.uint8)[byte] ^= 128
    assert np.flatnonzero(row_sums(content) != row_sums(damaged)).tolist() == [byte // (width * content.itemsize)]
    assert np.array_equal(row_sums(np.asfortranarray(content)), row_sums(content))


def test_rows_are_checked_once_and_slices_not_at_all(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(sums, "row_sums", lambda rows: calls.append(len(rows)) or row_sums(rows))
    features = read_features(folder)
    alphaext.class_means(features.features[:5], features.labels[:5], 3)
    assert calls == []
    check = rows_check(features.features)
    for some, rows in (([1, 3], None), ([3, 1], features.features[[3, 1]]), ([3, 4], None)):
        check(torch.tensor(some), rows)
    assert calls == [2, 1]
    features.class_means()
    features.class_means()
    assert calls == [2, 1, 7]


class Known:
    """A model, images or a transform."""

    def __init__(self, digest):
        self.digest = digest
        self.description = {"name": "test", "resize": 256, "sizes": (2, 3)}

    def fingerprint(self):
        return self.digest


def test_they_are_of_what_is_asked_for(folder):
    read_features(folder, model="abc", images="def", transform=Known("").description)
    read_features(folder, model=Known("abc"), images=Known("def"), transform=Known(""))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"model": Known("xyz")}, "are of another model: model is 'xyz' here and 'abc' there"),
        ({"images": "xyz"}, "are of other images: images is 'xyz' here and 'def' there"),
        (
            {"transform": {"name": "test", "resize": 224, "sizes": [2, 3], "flip": True}},
            "are of another transform: transform.resize is 224 here and 256 there; transform.flip is True here and None there",
        ),
    ],
)
def test_others_are_refused(folder, asked, message):
    with pytest.raises(ValueError) as error:
        read_features(folder, **asked)
    assert message in str(error.value) and str(folder) in str(error.value)


def test_features_that_do_not_say_cannot_be_checked(folder):
    sidecar(folder, model="gone")
    with pytest.raises(ValueError, match="do not say of which model they are"):
        read_features(folder, model="abc")
    with pytest.raises(TypeError, match="model must have a fingerprint, or be one, got int"):
        read_features(folder, model=3)
    with pytest.raises(TypeError, match="transform must have a description, or be one, got int"):
        read_features(folder, transform=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "alphaext features 2"}, "got 'alphaext features 2' and True"),
        ({"complete": False}, "is not the sidecar of whole features"),
        ({"rows": 8}, r"features.npy must be float32 \[8, 4\], as features.json says, got float32 \[7, 4\]"),
        ({"width": 3}, r"must be float32 \[7, 3\]"),
        ({"dtype": "float16"}, r"must be float16 \[7, 4\]"),
        ({"dtype": "object"}, "dtype must be one of float16, float32, got 'object'"),
        ({"rows": "seven"}, "rows must be an integer, got 'seven'"),
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"num_classes": 2, "class_names": None}, r"labels must be in 0..1, got 2 at index 2"),
        ({"class_names": ["a"]}, "class_names must have one name a class"),
        ({"class_names": [1, 2, 3]}, "class_names must be a sequence of texts"),
        ({"passes": 2}, "rows must be a multiple of the 2 passes, got 7"),
        ({"width": "gone"}, "features.json' lacks 'width'"),
    ],
)
def test_a_sidecar_that_does_not_agree(folder, changes, message):
    sidecar(folder, **changes)
    with pytest.raises(ValueError, match=message):
        read_features(folder)


def overwritten(name, value):
    return lambda folder: np.save(folder / name, value, allow_pickle=True)


def cut(folder):
    with (folder / "features.npy").open("r+b") as file:
        file.truncate(140)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "features.json").unlink(), "no whole folder of cached features: it has no features.json"),
        (lambda folder: (folder / "features.npy").unlink(), "No such file or directory: '.*features.npy'"),
        (lambda folder: (folder / "labels.npy").unlink(), "No such file or directory: '.*labels.npy'"),
        (lambda folder: (folder / "features.json").write_text("{"), "is not the sidecar of cached features"),
        (lambda folder: (folder / "features.npy").write_bytes(b""), "does not hold whole features"),
        (lambda folder: (folder / "features.npy").write_bytes(b"not an array"), "does not hold whole features"),
        (cut, "does not hold whole features"),
        (overwritten("features.npy", np.zeros((6, 4), np.float32)), r"features.npy must be float32 \[7, 4\]"),
        (overwritten("features.npy", np.zeros((7, 4), np.float64)), "got float64"),
        (overwritten("features.npy", np.zeros((4, 7), np.float32).T), "features.npy must be stored row by row"),
        (overwritten("features.npy", np.array([{}] * 28).reshape(7, 4)), "does not hold whole features"),
        (overwritten("labels.npy", np.zeros(6, np.int64)), r"labels.npy must be int64 \[7\], got int64 \[6\]"),
        (overwritten("labels.npy", np.zeros(7, np.float32)), "got float32"),
        (overwritten("labels.npy", np.array([{}] * 7)), "does not hold whole features"),
    ],
)
def test_a_folder_that_is_half_written_or_damaged(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        read_features(folder)


def test_a_folder_that_is_none_of_ours(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_features(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="got the file"):
        read_features(folder / "labels.npy")
    with pytest.raises(
        ValueError, match="no folder of cached features: it has no features.json; there are features in its folders"
    ):
        read_features(tmp_path)


class Explodes:
    def __reduce__(self):
        return (os._exit, (3,))


def test_pickles_are_refused_and_not_read(tmp_path):
    (tmp_path / "trainfeat_all.pkl").write_bytes(pickle.dumps(Explodes()))
    for path in (tmp_path, tmp_path / "trainfeat_all.pkl"):
        with pytest.raises(ValueError, match=r"trainfeat_all.pkl' is a pickle.*write_features\(FOLDER, saved\['feats'\]"):
            read_features(path)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"features": torch.ones(3, 2, dtype=torch.int64)}, TypeError, "features must be floating point"),
        ({"features": torch.ones(3)}, ValueError, r"features must have shape \[n, D\].*got \[3\]"),
        ({"features": torch.ones(0, 2), "labels": []}, ValueError, r"at least one row.*got \[0, 2\]"),
        ({"features": torch.ones(3, 0)}, ValueError, r"got \[3, 0\]"),
        ({"features": torch.ones(4, 2)}, ValueError, "one entry a row, got 4 and 3"),
        (
            {"features": torch.tensor([[0.0], [1], [float("nan")]])},
            ValueError,
            r"features must be finite, got nan at index \[2, 0\]",
        ),
        ({"features": torch.full((3, 1), 1e300, dtype=torch.float64)}, ValueError, "features must be finite, got inf"),
        ({"labels": [0, 1, 2]}, ValueError, r"labels must be in 0..1, got 2 at index 2"),
        ({"labels": [0.0, 1.0, 1.0]}, TypeError, "labels must be integers"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"class_names": ["a"]}, ValueError, "one name a class"),
        ({"metadata": {"rows": 3}}, ValueError, "metadata must leave .* to this function, got rows"),
        ({"metadata": {"what": object()}}, TypeError, "metadata must be what JSON can hold"),
        ({"metadata": {"what": "\udcff"}}, TypeError, "metadata must be what JSON can hold"),
    ],
)
def test_bad_features_are_refused_and_leave_nothing(tmp_path, arguments, kind, message):
    arguments = {"features": torch.ones(3, 2), "labels": [0, 1, 1], "num_classes": 2, **arguments}
    with pytest.raises(kind, match=message):
        write_features(tmp_path / "f", **arguments)
    assert os.listdir(tmp_path) == []


def test_only_a_new_or_an_empty_folder_is_written(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    write_features(tmp_path / "empty", torch.ones(1, 1), [0], num_classes=1)
    before = (folder / "features.npy").read_bytes()
    for path, message in ((folder, "must be new or empty"), (tmp_path / "no" / "f", "in a folder that exists")):
        with pytest.raises(ValueError, match=message):
            write_features(path, torch.ones(1, 1), [0], num_classes=1)
    assert (folder / "features.npy").read_bytes() == before


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, failing):
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_files.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        write_features(tmp_path / "f", torch.ones(3, 2), [0, 1, 1], num_classes=2)
    assert os.listdir(tmp_path) == []
    assert isinstance(write_features(tmp_path / "f", torch.ones(3, 2), [0, 1, 1], num_classes=2), Features)


def test_an_array_file_gets_all_its_rows_or_is_not_there(tmp_path):
    digest = write_array(tmp_path / "a.npy", "float16", (3, 2), [np.ones((1, 2), np.float16), np.zeros((2, 2), np.float16)])
    assert np.load(tmp_path / "a.npy").tolist() == [[1, 1], [0, 0], [0, 0]]
    assert digest == _files.file_digest(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="b.npy must get 3 rows, got 2"):
        write_array(tmp_path / "b.npy", "float16", (3, 2), [np.ones((2, 2), np.float16)])
    with pytest.raises(ValueError, match=r"rows of shape \[2\]"):
        write_array(tmp_path / "b.npy", "float16", (3, 2), [np.ones((3, 1), np.float16)])
    assert os.listdir(tmp_path) == ["a.npy"]


def test_names_that_are_no_unicode(tmp_path):
    written = write_features(tmp_path / "f", torch.ones(1, 1), [0], num_classes=1, class_names=["caf\udce9"])
    assert written.class_names == ("caf\\udce9",)
