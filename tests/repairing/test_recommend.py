"""A recommendation: every method measured alike, ties to the simpler one, bounds kept, the layer of the one that is named."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
from torch import nn

from alphaext import recommend, repair
from alphaext.baselines import run_baseline
from alphaext.checkpoints import save_linear
from alphaext.classes import ClassSplit
from alphaext.commands.recommend import Recommend
from alphaext.commands.results import read_classifier
from alphaext.features import Features, write_features
from alphaext.repairing.recommend import METHODS, Makers, Measured, choose_method, classes_alike, deal
from alphaext.repairing.recommendation import Candidate
from alphaext.training.builder import Builder

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
    assert {each.method for each in found.candidates if each.few_rows_only} == {"original", "few-bias", "few", "paper"}
    assert not any(each.error for each in found.candidates)
    assert found.method != "original" and found.advice.startswith(f"Take {found.method} (")
    linear, _, _, val_features, val_labels = problem()
    right = [layer(val_features).argmax(dim=1).eq(val_labels).float().mean() for layer in (linear, found.linear)]
    assert right[1] > right[0]


@pytest.mark.parametrize("method", ["ncm", "average", "paper"])
def test_a_method_makes_what_its_own_function_makes(method):
    linear, features, labels, *val = problem()
    builder = Builder(linear, features, labels, few_below=10, many_above=45)
    makers = Makers(linear, builder, seed=0)
    made = makers.layer(method, makers.numbers(method, *val))
    if method == "paper":
        expected = repair(linear, features, labels, preset="paper", few_below=10, many_above=45).linear
    else:
        given = {"val_features": val[0], "val_labels": val[1]} if method == "average" else {}
        expected = run_baseline(method, features, labels, linear=linear, split=builder.split, **given).linear
    torch.testing.assert_close(made.weight, expected.weight)


def test_it_shows_as_a_table(found):
    lines = str(found).splitlines()
    assert len(lines) == 2 + len(METHODS) and lines[-1] == found.advice and lines[1].startswith("original")
    assert found._repr_html_().count("<tr>") == 1 + len(METHODS)
    pandas = pytest.importorskip("pandas")
    table = found.table()
    assert isinstance(table, pandas.DataFrame) and table.loc["original", "base_change"] == 0


def test_a_repair_has_a_table_of_before_and_after():
    pandas = pytest.importorskip("pandas")
    linear, features, labels, val_features, val_labels = problem()
    val = {"val_features": val_features, "val_labels": val_labels}
    made = repair(linear, features, labels, **val, few_below=10, many_above=45, epochs=2)
    table = made.table()
    assert isinstance(table, pandas.DataFrame) and list(table.index) == ["before", "after"]
    assert table.loc["after", "few"] == made.result.after["few"]
    assert tuple(table["calibration_error"]) == made.result.calibration_errors
    assert len(repair(linear, features, labels, few_below=10, many_above=45, epochs=2).table()) == 0
    auto = repair(linear, features, labels, **val, few_below=10, many_above=45, method="auto")
    assert list(auto.table().index) == list(METHODS)


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


def test_classes_to_repair_may_be_named():
    linear, *arrays = problem()
    made = recommend(linear, *arrays, few_classes=[5, 6, 7], many_above=45)
    assert made.split.few.tolist() == [5, 6, 7]


def test_the_reason_speaks_of_bounds_where_there_are_some():
    split, found = ClassSplit(few=[2], medium=[0, 1], many=[]), candidates(original=(60, 5), few=(60, 15))
    reasons = [choose_method(found, split, "best_all", None, bound)[1] for bound in (None, 2.0)]
    assert reasons[0].endswith("the best of 2") and reasons[1].endswith("the best of 2 that keep to the bounds")


def test_folds_are_even_in_each_class():
    labels = torch.tensor([0] * 10 + [1] * 7 + [2, 2] + [3])
    folds = deal(labels, seed=0)
    assert folds[:10].bincount().tolist() == [2] * 5 and sorted(folds[10:17].bincount(minlength=5).tolist()) == [1, 1, 1, 2, 2]
    # Of two samples one is always left to train on, where a fold and the next but one are held out.
    first, second = folds[17:19].tolist()
    assert (first - second) % 5 in (1, 4) and folds[19] == -1


def candidates(**right):
    """Candidates by which of 100 samples, the last 20 of few classes, they recognise: ``(base, few)`` so many of each."""
    labels, found = torch.tensor([0] * 80 + [2] * 20), []
    for name, (b, f) in right.items():
        hits = torch.tensor([True] * b + [False] * (80 - b) + [True] * f + [False] * (20 - f))
        logits = 2 * torch.nn.functional.one_hot(torch.where(hits, labels, 1), 3).float()
        base = (hits[:80].sum() - right["original"][0]).item() / 80
        own = hits.double()
        made = Candidate(name, few=own[80:].mean().item(), all=own.mean().item(), base_change=base)
        found.append(Measured(made, labels, logits, torch.ones(100).double(), []))
    return found


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
    split = ClassSplit(few=[2], medium=[0, 1], many=[])
    assert choose_method(candidates(**right), split, policy, min_all, max_base_drop)[0] == method


def test_of_equal_accuracies_the_likeliest_is_taken_and_of_nearly_as_likely_ones_the_simplest():
    original, few, all_rows = candidates(original=(50, 5), few=(60, 10), all=(60, 10))
    surer = torch.where(all_rows.right[:, None].bool(), 1.5 * all_rows.logits, all_rows.logits)
    split = ClassSplit(few=[2], medium=[0, 1], many=[])
    assert choose_method([original, few, all_rows], split, "best_all", None, None)[0] == "few"
    likelier = Measured(all_rows.candidate, all_rows.labels, surer, all_rows.weights, [])
    method, reason = choose_method([original, few, likelier], split, "best_all", None, None)
    assert method == "all" and "few is better by no more than the noise" in reason


def test_without_validation_samples_training_samples_take_their_place():
    linear, features, labels, _, _ = problem()
    found = recommend(linear, features, labels, few_below=10, many_above=45)
    assert "on cross-validated training samples" in found.advice and found.method != "original"
    assert all(candidate.error or 0 <= candidate.all <= 1 for candidate in found.candidates)
    again = recommend(linear, features, labels, few_below=10, many_above=45)
    assert torch.equal(found.linear.weight, again.linear.weight)
    _, _, _, test, ids = problem()
    right = [layer(test).argmax(dim=1).eq(ids).float().mean() for layer in (linear, found.linear)]
    assert right[1] > right[0]


def test_each_class_counts_alike_within_the_training_samples():
    """Else few classes' samples, rare among training samples, would hardly count in a choice, or in a measure."""
    labels = torch.tensor([0] * 60 + [1] * 6 + [2])
    places = classes_alike(torch.arange(67), labels)
    assert labels[places].bincount().tolist() == [40] * 3 and set(places[40:80].tolist()) == set(range(60, 66))
    linear, features, labels, _, _ = problem()
    found = recommend(linear, features, labels, few_below=10, many_above=45)
    original = found.candidates[0]
    parts = {"few": 3, "medium": 3, "many": 2}
    assert original.all == pytest.approx(sum(count * getattr(original, part) for part, count in parts.items()) / 8)


def test_classes_of_one_or_two_samples_are_told_and_trained_on():
    linear, features, labels, _, _ = problem()
    kept = torch.cat([(labels == label).nonzero()[: {5: 1, 6: 2}.get(label), 0] for label in range(8)])
    found = recommend(linear, features[kept], labels[kept], few_below=31, many_above=45)
    assert "(1 few classes have but one sample and are not measured)" in found.advice
    assert not any(each.error for each in found.candidates if each.method in ("few", "discriminant", "crt"))


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
        ({"few_below": 2}, ValueError, "labels has no few class"),
        ({"val_labels": None}, ValueError, "val_features and val_labels must be given together"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        names = ("linear", "features", "labels", "val_features", "val_labels")
        recommend(**{**dict(zip(names, problem(), strict=True)), **options})


def test_validation_without_few_samples_is_refused():
    linear, features, labels, val_features, val_labels = problem()
    with pytest.raises(ValueError, match="val_labels must have two samples of a few class or more"):
        base = val_labels < 5
        recommend(linear, features, labels, val_features[base], val_labels[base], few_below=10)


def test_what_keeps_the_original_layer_after_all_is_called_so(monkeypatch):
    linear, features, labels, val_features, val_labels = problem()
    module = importlib.import_module("alphaext.repairing.recommend")
    made = {"taken": nn.Linear(6, 8), "original": linear}
    found = {}
    for name, layer in made.items():
        monkeypatch.setattr(module, "_made", lambda *_, layer=layer: layer)
        found[name] = recommend(*problem(), few_below=10, many_above=45)
    method = found["taken"].method
    assert method != "original" and found["original"].method == "original" and found["original"].linear is linear
    assert f"Take original (the classifier as it is): {method} was ahead" in found["original"].advice
    val = {"val_features": val_features, "val_labels": val_labels}
    kept = repair(linear, features, labels, **val, few_below=10, many_above=45, method="auto")
    assert kept.result.kept_original and kept.result.before == kept.result.after


def test_repair_takes_what_is_recommended():
    linear, features, labels, val_features, val_labels = problem()
    val, how = {"val_features": val_features, "val_labels": val_labels}, {"few_below": 10, "many_above": 45}
    made = repair(linear, features, labels, **val, method="auto", **how)
    found = recommend(linear, features, labels, **val, **how)
    assert torch.equal(made.linear.weight, found.linear.weight) and made.recommendation.advice == found.advice
    assert found.advice in str(made) and made.result.after["all"] > made.result.before["all"] and made.result.verified
    for bounds in ({"max_base_drop": 0.0}, {"policy": "best_few", "min_all": 0.9}):
        bound = repair(linear, features, labels, **val, method="auto", **how, **bounds)
        assert bound.recommendation.method == recommend(linear, features, labels, **val, **how, **bounds).method
    assert bound.recommendation.method == "original" and torch.equal(bound.linear.weight, linear.weight)
    assert bound.head is None and bound.result.kept_original
    alone = repair(linear, features, labels, method="auto", **how)
    assert "cross-validated" in str(alone) and alone.result.before is None and not alone.result.verified


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"preset": "all", "method": "auto"}, "preset"),
        ({"method": "auto", "epochs": 3}, "epochs"),
        ({"policy": "best_few"}, "policy"),
    ],
)
def test_what_does_not_go_with_a_method(options, name):
    with pytest.raises(ValueError, match=f"{name} does not go with method="):
        repair(*problem()[:3], few_below=10, **options)


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
    (tmp_path / "alone").mkdir()
    write_features(tmp_path / "alone" / "train", features, labels, num_classes=8)
    alone = Recommend(
        features=tmp_path / "alone",
        classifier=tmp_path / "linear.pth",
        output=tmp_path / "other",
        device="cpu",
        few_below=10,
        many_above=45,
    ).run()
    assert "cross-validated" in alone["advice"]
    assert torch.equal(read_classifier(tmp_path / "out", 8).weight, expected.linear.weight)
