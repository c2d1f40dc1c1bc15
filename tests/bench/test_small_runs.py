"""Benchmarks that need no data of others run, in part, and come to what ``bench/results/`` has of them."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import defaults
import estimators
import method
import new_classes
import numpy as np
import pytest
import recommend
from banking import read_banking
from long_tailed_sets import problem_of
from sklearn.linear_model import RidgeClassifier

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def committed(name: str, **of: str) -> dict[str, str]:
    """The one row of a table that has these values."""
    with (RESULTS / name).open(newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if of.items() <= row.items())
    return row


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_a_recommendation(tmp_path):
    found = dict(zip(recommend.COLUMNS, recommend.measure("digits", "joint", 3, tmp_path, validation=True), strict=True))
    told = committed("recommend.csv", data="digits", classifier="joint", draw="3")
    for column in ("all_recommended", "all_best", "all_original", "all_few", "all_all"):
        assert found[column] == pytest.approx(float(told[column]), abs=0.01)


@pytest.mark.parametrize("name", ["before", "few-bias", "tau", "discriminant", "preset few"])
def test_presets_and_rivals(name, tmp_path):
    found = method.Measured(problem_of("digits", 3, tmp_path), "joint", {}).row(name)
    told = committed("method/rows.csv", set="digits", draw="3", classifier="joint", method=name)
    for part in ("few", "base", "all"):
        assert float(found[part]) == pytest.approx(float(told[part]), abs=2.0)


def test_an_estimator():
    texts = {
        part: ([text for text, label in zip(*both, strict=True) if label < 12], both[1][both[1] < 12])
        for part, both in read_banking().items()
    }
    few_before, few_after, all_before, all_after, repaired, *_ = estimators.measure(RidgeClassifier(), texts, 0, "few")
    assert repaired and few_after > few_before and all_after > all_before


def test_new_classes():
    random = np.random.default_rng(0)
    centres, labels = 3 * random.standard_normal((24, 16)), np.arange(24).repeat(22)
    features, test = ((centres[labels] + random.standard_normal((len(labels), 16))).astype(np.float32) for _ in range(2))
    lines = new_classes.measure("drawn", (features, labels, test, labels), 1.0, seed=0)
    assert len(lines) == 3 * len(new_classes.SAMPLES)
    assert all(line[4] > 0.8 for line in lines if line[3] == "add_classes")


def test_defaults(tmp_path):
    few = ["--problems", "digits", "--classifiers", "joint", "--seeds", "0", "--rules", "clamp", "--inits", "identity"]
    short = ["--projected", "yes", "--gammas", "1", "--lrs", "0.1", "--epochs", "2"]
    assert defaults.main([*few, *short, "--output", str(tmp_path / "found"), "--cache", str(tmp_path)]) in (0, None)
    assert "identity" in (tmp_path / "found.md").read_text()
