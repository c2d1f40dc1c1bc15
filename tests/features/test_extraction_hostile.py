"""Half an extraction that somebody has changed: its shards are made anew, its note is refused with one kind of error."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tiny_images import TinyImages, TinyTransform, tiny_model

from alphaext.features import read_features, shards
from alphaext.features.extraction import extract
from alphaext.features.extraction_folder import ExtractionFolder
from alphaext.utils import files as _files

HOSTILE = (None, -1, 0, True, 10**30, 1e999, float("nan"), "text", [], {}, [[1]], "\udcff")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Shards of two batches of four images; and no waiting for the disk."""
    monkeypatch.setattr(shards, "IMAGES_PER_SHARD", 8)
    monkeypatch.setattr(_files.os, "fsync", lambda descriptor: None)


def run(folder: Path):
    return extract(tiny_model(), TinyImages(12), folder, transform=TinyTransform(), batch_size=4, device="cpu")


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """The features of a whole extraction, and the folder of half of one."""
    folder = tmp_path_factory.mktemp("extraction")

    def never(*arguments):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "IMAGES_PER_SHARD", 8)
        whole = run(folder / "whole")
        patch.setattr(ExtractionFolder, "join", never)
        with pytest.raises(KeyboardInterrupt):
            run(folder / "half")
    return np.array(whole.features), folder / "half"


def _half(right, tmp_path: Path) -> Path:
    return Path(shutil.copytree(right[1], tmp_path / "half"))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return dict(archive)


def _about(text: dict) -> np.ndarray:
    return np.frombuffer(json.dumps(text).encode("utf-8", "surrogatepass"), np.uint8)


def _shards(arrays):
    about = json.loads(arrays["about"].tobytes())
    for key in about:
        for value in HOSTILE:
            yield f"{key} {value!r:.9}", arrays | {"about": _about(about | {key: value})}
    for image in ([], [0], [0, 1, 2], ["0", None, None], [-1, "a", "b"], [10**30, "a", "b"], [8, "a", "b"], [[8], "a", "b"]):
        yield f"unreadable {image}", arrays | {"about": _about(about | {"unreadable": [image]})}
    yield "deep", arrays | {"about": np.frombuffer(b'{"a":' * 100_000, np.uint8)}
    yield "huge", arrays | {"about": np.frombuffer(b'{"seconds": ' + b"9" * 5000 + b"}", np.uint8)}
    for name in ("features", "indices"):
        for label, change in {
            "none": lambda array: array[:0],
            "longer": lambda array: np.concatenate([array, array]),
            "one number": lambda array: np.array(1),
            "as floats": lambda array: array.astype(np.float64),
            "as texts": lambda array: array.astype(str),
            "a dimension more": lambda array: array[None],
            "backwards": lambda array: array[::-1].copy() if array.ndim == 1 else array[:, :1],
        }.items():
            yield f"{name} {label}", arrays | {name: change(arrays[name])}
        yield f"{name} gone", {key: value for key, value in arrays.items() if key != name}


def test_a_hostile_shard_is_made_anew(right, tmp_path):
    folder = _half(right, tmp_path)
    path = folder / "parts" / "000000.npz"
    arrays, identity = _arrays(path), json.loads((folder / "extraction.json").read_text())["identity"]
    place = shards.ShardPlan.of(12, 1, 4).place(0)
    known = json.loads(arrays["about"].tobytes())["identity"]
    shape = arrays["features"].shape[1], str(arrays["features"].dtype)
    assert identity["num_images"] == 12 and len(shards.read_shard(path, place, known, shape).indices) == 8
    for what, changed in _shards(arrays):
        np.savez(path, **changed)
        try:
            shard = shards.read_shard(path, place, known, shape)
        except ValueError as error:
            assert "000000.npz" in str(error), what
        else:
            assert np.array_equal(shard.features, arrays["features"]), what
    assert np.array_equal(run(folder).features, right[0])


def test_arrays_larger_than_their_file(right, tmp_path):
    folder = _half(right, tmp_path)
    path, header = folder / "parts" / "000000.npz", io.BytesIO()
    arrays = _arrays(path)
    np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": (10**13, 3)})
    np.savez(path, **{name: arrays[name] for name in ("indices", "about")})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("features.npy", header.getvalue())
    known = json.loads(arrays["about"].tobytes())["identity"]
    with pytest.raises(ValueError, match=r"000000.npz is damaged: .*features.npy has 0 bytes, not the 6\d+ of its header"):
        shards.read_shard(path, shards.ShardPlan.of(12, 1, 4).place(0), known, (3, "float16"))
    assert np.array_equal(run(folder).features, right[0])


def test_a_hostile_note_is_refused(right, tmp_path):
    folder = _half(right, tmp_path)
    path = folder / "extraction.json"
    note = json.loads(path.read_text())
    for key in ("num_images", "passes", "batch_size", "width"):
        for value in HOSTILE:
            if value == note["identity"][key]:  # True is 1
                continue
            text = json.dumps({**note, "identity": {**note["identity"], key: value}})
            path.write_text(text.encode("utf-8", "replace").decode())
            with pytest.raises(ValueError, match="another extraction"):
                run(folder)
            with pytest.raises(ValueError, match=r"is not finished|extraction.json.* is not the note of an extraction"):
                read_features(folder)
    for text in (
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"format": ' + "9" * 5000 + "}",
        '{"format": "alphaext extraction 1", "identity": 3}',
    ):
        path.write_text(text)
        for use in (run, read_features):
            with pytest.raises(ValueError, match=r"extraction.json"):
                use(folder)
    path.write_text(json.dumps(note))
    assert np.array_equal(run(folder).features, right[0])
