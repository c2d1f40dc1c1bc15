"""The comparison of baselines, rivals and Alpha Nets: choices on validation images alone, and the table."""

from __future__ import annotations

import json

import comparison
import pytest
import quickdraw
import sklearn_digits
import torch
from sklearn.linear_model import LogisticRegression
from test_quickdraw import made_up_problem


@pytest.fixture(scope="module")
def rows():
    return comparison.measure_problem(made_up_problem(), epochs=3, retraining_epochs=1, top_k=2)


def test_every_method_is_measured(rows):
    assert len(rows) == comparison.METHODS == len({row["method"] for row in rows})
    joint = rows[0]
    problem = made_up_problem()
    assert joint["method"] == "Joint" and joint["test"]["all"] == problem.accuracy("joint", "test")["all"]
    assert all(len(row["test"]) == 16 for row in rows)
    # An epoch before training is a candidate, so that a repair never does worse on validation images than what it repairs.
    by_name = {row["method"]: row["validation"]["all"] for row in rows}
    assert all(by_name[f"Alpha-{name}"] >= by_name[name] for name in ("Joint", "cRT", "LWS"))


def test_test_images_choose_nothing():
    problem = made_up_problem()
    chosen = [row["chosen"] for row in comparison.measure_problem(problem, epochs=2, retraining_epochs=1, top_k=2)]
    problem.labels["test"] = problem.labels["test"].roll(3)
    problem.features["test"] = torch.randn_like(problem.features["test"])
    assert [row["chosen"] for row in comparison.measure_problem(problem, epochs=2, retraining_epochs=1, top_k=2)] == chosen


def test_results_are_a_file_of_rows_and_a_table(rows, tmp_path):
    comparison.write_results([*rows, *({**row, "seed": 1} for row in rows)], tmp_path / "name")
    report = json.loads((tmp_path / "name.json").read_text())
    assert len(report["rows"]) == 2 * comparison.METHODS and report["many_above"] == comparison.MANY_ABOVE
    text = (tmp_path / "name.md").read_text()
    lines = text.splitlines()
    assert sum(line.startswith("| ") for line in lines) == comparison.METHODS + 1 and quickdraw.ATTRIBUTION in text
    joint = next(line for line in lines if line.startswith("| Joint |"))
    assert f"{100 * rows[0]['test']['all']:.1f} ± 0.0" in joint and joint.endswith("|  |")
    assert len(list(tmp_path.iterdir())) == 2


def test_missing_features_are_an_error(tmp_path, capsys):
    assert comparison.main(["--results", "x", "--cache", str(tmp_path)]) == 1
    assert "comparison:" in capsys.readouterr().err


def test_linear_classifiers_of_digits_are_measured_in_every_way():
    found = sklearn_digits.measure(LogisticRegression(max_iter=5000), 0)
    assert set(found) == {"plain", "scale", *sklearn_digits.OPTIONS} and found["auto"][0] > found["plain"][0]
    text = sklearn_digits.as_markdown({"LogisticRegression()": [found]}, 1)
    assert f"{found['auto'][0]:.1f} / {found['auto'][1]:.1f}" in text
