"""A recommendation: every method measured alike, ties to the simpler one, bounds kept, the layer of the one that is named."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from alphaext import recommend
from alphaext.checkpoints import save_linear
from alphaext.commands.recommend import Recommend
from alphaext.commands.results import read_classifier
from alphaext.features import Features, write_features
from alphaext.repairing.recommend import METHODS, Candidate, _choose, _halves

COUNTS = [60, 50, 40, 30, 25, 9, 7, 5]


def problem(seed: int = 0):
    """A classifier that prefers frequent classes, its training features, and validation features."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.2 * torch.randn(8, 6, generator=generator)
    data = []
    for counts in (COUNTS, [20] * 8):
        labels = torch.arange(8).repeat_interleave(torch.tensor(counts))
        data += [centres[labels] + torch.randn(len(labels), 6, generator=generator), labels]
    linear = nn.Linear(6, 8)
    linear.weight.data.copy_(centres)
    linear.bias.data.copy_(-centres.square().sum(dim=1) / 2 + 2 * torch.tensor(COUNTS).log())
    return linear, *data


@pytest.fixture(scope="module")
def found():
    return recommend(*problem(), few_below=10, many_above=45)


def test_every_method_is_measured(found):
    assert [candidate.method for candidate in found.candidates] == list(METHODS)
    original, *others = found.candidates
    assert original.base_change == 0 and original.few_rows_only and original.few < 0.6
    assert all(candidate.error or 0 <= candidate.all <= 1 for candidate in others)
    assert {each.method for each in found.candidates if each.few_rows_only} == {"original", "few-bias", "few"}
    assert found.method != "original" and found.advice.startswith(f"Take {found.method} (")
    linear, _, _, val_features, val_labels = problem()
    right = [layer(val_features).argmax(dim=1).eq(val_labels).float().mean() for layer in (linear, found.linear)]
    assert right[1] > right[0]


def test_it_shows_as_a_table(found):
    lines = str(found).splitlines()
    assert len(lines) == 2 + len(METHODS) and lines[-1] == found.advice and lines[1].startswith("original")
    assert found._repr_html_().count("<tr>") == 1 + len(METHODS)
    pandas = pytest.importorskip("pandas")
    table = found.table()
    assert isinstance(table, pandas.DataFrame) and table.loc["original", "base_change"] == 0


def test_same_seed_same_table():
    names = ("few", "medium", "many", "all", "calibration_error", "base_change")
    linear, *arrays = problem(1)
    as_features = [Features(arrays[at].numpy(), arrays[at + 1], 8, None, {}) for at in (0, 2)]
    options = {"few_below": 10, "many_above": 45, "seed": 3}
    first, second = (
        recommend(linear, *arrays, **options),
        recommend(linear, as_features[0], val_features=as_features[1], **options),
    )
    assert [[getattr(each, name) for name in names] for each in first.candidates] == [
        [getattr(each, name) for name in names] for each in second.candidates
    ]
    assert first.advice == second.advice and torch.equal(first.linear.weight, second.linear.weight)


def test_halves_are_even_in_each_class():
    labels = torch.tensor([0] * 4 + [1] * 5 + [2] + [3])
    halves = _halves(labels, seed=0)
    assert [int((halves[labels == label] == 0).sum()) for label in range(2)] in ([2, 2], [2, 3])
    assert sorted([int(halves[9]), int(halves[10])]) == [0, 1]


def candidates(**right):
    """Candidates by which of 100 samples, the last 20 of few classes, they recognise: ``(base, few)`` so many of each."""
    hits = {
        name: torch.tensor([True] * b + [False] * (80 - b) + [True] * f + [False] * (20 - f)) for name, (b, f) in right.items()
    }
    made = [
        Candidate(
            name,
            few=float(own[80:].double().mean()),
            all=float(own.double().mean()),
            base_change=float(own[:80].double().mean() - hits["original"][:80].double().mean()),
        )
        for name, own in hits.items()
    ]
    return made, hits, torch.arange(100) >= 80


@pytest.mark.parametrize(
    ("right", "policy", "min_all", "max_base_drop", "method"),
    [
        ({"original": (60, 5), "few-bias": (55, 15), "few": (60, 15)}, "best_all", None, None, "few"),
        ({"original": (60, 5), "few-bias": (58, 15), "few": (58, 15)}, "best_all", None, None, "few-bias"),
        ({"original": (60, 5), "few": (60, 5)}, "best_all", None, None, "original"),
        ({"original": (60, 5), "few-bias": (44, 20), "few": (60, 15)}, "best_few", None, None, "few"),
        ({"original": (60, 5), "few-bias": (40, 20), "few": (60, 15)}, "best_few", 0.5, None, "few-bias"),
        ({"original": (60, 5), "few-bias": (50, 20), "few": (59, 12)}, "best_few", 0.0, 2.0, "few"),
        ({"original": (60, 5), "few": (40, 20)}, "best_all", None, 0.0, "original"),
    ],
)
def test_choice(right, policy, min_all, max_base_drop, method):
    made, hits, few = candidates(**right)
    assert _choose(made, hits, few, policy, min_all, max_base_drop)[0] == method


def test_a_method_that_cannot_be_made_is_told():
    linear, features, labels, val_features, val_labels = problem()
    linear.weight.data[3] = 0  # tau divides rows by their lengths
    made = recommend(linear, features, labels, val_features, val_labels, few_below=10, many_above=45)
    tau = next(each for each in made.candidates if each.method == "tau")
    assert "zero" in tau.error and math.isnan(tau.all) and made.method != "tau"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy": "best"}, ValueError, "policy must be one of best_all, best_few, got 'best'"),
        ({"min_all": 0.5}, ValueError, "min_all goes with policy 'best_few', got 0.5 with 'best_all'"),
        ({"min_all": 1.5, "policy": "best_few"}, ValueError, "min_all must be .* at most 1, got 1.5"),
        ({"max_base_drop": "some"}, TypeError, "max_base_drop must be a number"),
        ({"few_below": 2}, ValueError, "val_labels must have samples of few classes"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        recommend(*problem(), **options)


def test_the_command(tmp_path):
    linear, features, labels, val_features, val_labels = problem()
    write_features(tmp_path / "train", features, labels, num_classes=8)
    write_features(tmp_path / "val", val_features, val_labels, num_classes=8)
    save_linear(linear, tmp_path / "linear.pth")
    result = Recommend(
        features=tmp_path,
        classifier=tmp_path / "linear.pth",
        output=tmp_path / "out",
        device="cpu",
        few_below=10,
        many_above=45,
    ).run()
    expected = recommend(linear, features, labels, val_features, val_labels, few_below=10, many_above=45)
    assert (result["method"], result["advice"]) == (expected.method, expected.advice)
    json.dumps(result, allow_nan=False)
    assert torch.equal(read_classifier(tmp_path / "out", 8).weight, expected.linear.weight)
