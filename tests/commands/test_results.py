"""Folders of results: whole, or no result."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from alphaext.commands.extract import Extract
from alphaext.commands.results import CLASSIFIER, RESULT, RUN, output_folder, read_result

OPTIONS = Extract(features=Path("features"))


def write(folder: Path, *, steps: int = 3) -> None:
    """What a command does; with fewer steps it is killed before the next."""
    with output_folder(folder, OPTIONS, CLASSIFIER, overwrite=False, started=0.0) as opened:
        if steps > 0:
            opened.clear()
        if steps > 1:
            (folder / CLASSIFIER).write_bytes(b"new")
        if steps > 2:
            opened.write({"a": 1})


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_what_a_killed_command_left_is_no_result(tmp_path: Path, steps: int) -> None:
    write(tmp_path / "a", steps=steps)
    write(tmp_path / "a")
    assert read_result(tmp_path / "a") == {"a": 1}
    assert sorted(os.listdir(tmp_path / "a")) == sorted([".lock", CLASSIFIER, RESULT, RUN])
    with pytest.raises(ValueError, match="output holds results already"):
        write(tmp_path / "a")


def test_the_last_file_decides(tmp_path: Path) -> None:
    write(tmp_path / "a")
    (tmp_path / "a" / RESULT).unlink()
    write(tmp_path / "a")
    assert read_result(tmp_path / "a") == {"a": 1}


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / CLASSIFIER).write_bytes(b"precious")
    with pytest.raises(ValueError, match="output holds results already"):
        write(tmp_path)
    assert (tmp_path / CLASSIFIER).read_bytes() == b"precious"
