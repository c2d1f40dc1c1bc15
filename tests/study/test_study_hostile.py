"""Results of a study that somebody has changed: refused with one kind of error that names the file, or good enough."""

from __future__ import annotations

import csv
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alphaext.features import write_features
from alphaext.study import StudyOptions, run_study

HOSTILE = (None, -1, True, 10**30, 1e999, float("nan"), "text", [], {}, [[1]])
CELLS = ("", "-1", "1e999", "nan", "text", "9" * 5000, "[1]", "True", "1" + 22 * "0", "1.5")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder of features and what goes on with the study in it."""
    folder = tmp_path_factory.mktemp("study")
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(torch.tensor([30, 30, 30, 5]))
    for part in ("train", "val", "test"):
        write_features(folder / part, torch.randn(95, 8, generator=generator), labels, num_classes=4)
    linear = nn.Linear(8, 4)
    options = StudyOptions(experiments=["top-k"], top_ks=[1, 2], fixed_gammas=[1.0], epochs=1, seeds=1)

    def run():
        return run_study(folder, linear, folder / "out", options, many_above=20, progress=False)

    run()
    return folder / "out", run


def _places(value: Any, trail: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([trail] if trail else []), *itertools.chain(*(_places(entry, (*trail, key)) for key, entry in inner))]


def _changed(value: Any, trail: tuple[Any, ...], new: Any) -> Any:
    if not trail:
        return new
    if isinstance(value, dict):
        return {key: _changed(entry, trail[1:], new) if key == trail[0] else entry for key, entry in value.items()}
    return [_changed(entry, trail[1:], new) if key == trail[0] else entry for key, entry in enumerate(value)]


def _named(study, name: str, contents: dict[Any, bytes]) -> int:
    """Go on from each of these contents of a file; how many are refused."""
    (folder, run), refused = study, 0
    before = {path: path.read_bytes() for path in (folder / "results.json", folder / "results.csv")}
    for what, content in contents.items():
        (folder / name).write_bytes(content)
        try:
            run()
        except ValueError as error:
            assert name in str(error) or "holds another study" in str(error), (what, error)
            refused += 1
        for path, right in before.items():
            path.write_bytes(right)
    return refused


def test_hostile_results(study: tuple[Path, Any]) -> None:
    right = json.loads((study[0] / "results.json").read_text())
    contents = {
        trail: json.dumps(_changed(right, trail, HOSTILE[number % len(HOSTILE)])).encode()
        for number, trail in enumerate(_places(right))
    }
    for name in ("options", "experiments", "choices"):
        for value in (*HOSTILE, ["text"], [{}], {"forms": 1}):
            contents[name, str(value)] = json.dumps({**right, name: value}).encode()
    broken = (b"", b"[]", b"{", b"[" * 100_000, b'{"identity":' + b"9" * 5000 + b"}")
    assert _named(study, "results.json", contents) > 20
    assert _named(study, "results.json", dict(enumerate(broken))) == len(broken)


def test_hostile_rows(study: tuple[Path, Any]) -> None:
    content = (study[0] / "results.csv").read_bytes()
    rows = list(csv.reader(io.StringIO(content.decode())))
    contents: dict[Any, bytes] = {}
    for number, (line, column) in enumerate(itertools.product(range(len(rows)), range(len(rows[0])))):
        changed = [list(row) for row in rows]
        changed[line][column] = CELLS[number % len(CELLS)]
        text = io.StringIO()
        csv.writer(text).writerows(changed)
        contents[line, column] = text.getvalue().encode()
    assert _named(study, "results.csv", contents) > len(rows[0])
    broken = (b"", b"\xff\xfe", b"a,b\n1,2\n", content[:-40], b'"' * 10)
    assert _named(study, "results.csv", dict(enumerate(broken))) == len(broken)
