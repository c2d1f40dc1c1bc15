"""The original of a repaired file comes back to the last byte, or nothing is written."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from alphaext.checkpoints import export, read_checkpoint, save_linear, undo

# As an attribute of the package it is the function.
module = importlib.import_module("alphaext.checkpoints.undo")


def repaired(folder: Path, suffix: str = ".pth", **options: bool) -> Path:
    torch.manual_seed(0)
    save_linear(nn.Linear(8, 5), folder / f"m{suffix}")
    checkpoint = read_checkpoint(folder / f"m{suffix}")
    linear = checkpoint.linear()
    with torch.no_grad():
        linear.weight[[1, 3]] += 1
    export(checkpoint, linear, [1, 3], folder / f"new{suffix}", **{"keep_original": True, **options})
    return folder / f"new{suffix}"


def test_examples_in_docstrings() -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0 and results.failed == 0


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_undo(tmp_path: Path, suffix: str) -> None:
    path = repaired(tmp_path, suffix)
    original = (tmp_path / f"m{suffix}").read_bytes()
    assert path.read_bytes() != original
    assert 0 < undo(path, tmp_path / f"again{suffix}") <= 2 * 9 * 4 + 4 * 4
    assert (tmp_path / f"again{suffix}").read_bytes() == original
    undo(path, path, overwrite=True)
    assert path.read_bytes() == original


def test_what_cannot_be_undone(tmp_path: Path) -> None:
    path = repaired(tmp_path)
    kept = tmp_path / "new.pth.undo.npz"
    content = kept.read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        undo(path, tmp_path / "m.pth")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"new.pth has changed since"):
        undo(path, tmp_path / "again.pth")
    for damaged in (b"", content[:-40], content[:100] + b"\0" * 20 + content[120:]):
        kept.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"undo.npz is damaged|has changed since"):
            undo(path, tmp_path / "again.pth")
    kept.unlink()
    with pytest.raises(FileNotFoundError, match=r"new.pth.undo.npz.*keep_original"):
        undo(path, tmp_path / "again.pth")
    with pytest.raises(FileNotFoundError, match="repaired file"):
        undo(tmp_path / "none.pth", tmp_path / "again.pth")
    assert not (tmp_path / "again.pth").exists()


def test_keeping_is_for_copies(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(nn.Linear(8, 5).state_dict(), path, _use_new_zipfile_serialization=False)
    checkpoint = read_checkpoint(path)
    with pytest.raises(ValueError, match="keep_original must be False for .*old.pth"):
        export(checkpoint, checkpoint.linear(), [1], tmp_path / "new.pth", keep_original=True)
    with pytest.raises(ValueError, match="keep_original must be False for format='linear'"):
        export(checkpoint, checkpoint.linear(), [1], tmp_path / "new.pth", format="linear", keep_original=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["old.pth"]
