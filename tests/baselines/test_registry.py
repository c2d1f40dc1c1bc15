"""Baselines by name: each is what its own function makes, and what is missing is named."""

from __future__ import annotations

import doctest
import importlib
import json

import pytest
import torch
from public_names import public_names
from test_retraining import FAST, FEATURES, JOINT, LABELS, SIZES, SPLIT, VALIDATION, accuracy_of
from torch import nn

from alphaext.baselines import (
    BASELINES,
    choose_few_bias,
    choose_logit_adjustment,
    choose_tau,
    crt,
    discriminant,
    few_bias,
    logit_adjusted,
    lws,
    ncm,
    run_baseline,
    tau_normalized,
)
from alphaext.features import Features

GIVEN = dict(features=FEATURES, labels=LABELS, linear=JOINT, **VALIDATION)


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_features_are_taken_in_place_of_arrays(name, tmp_path):
    sizes = {"num_classes": len(JOINT.weight), "class_names": None, "metadata": {}}
    train = Features(FEATURES.numpy(), LABELS, **sizes)
    val = Features(VALIDATION["val_features"].numpy(), VALIDATION["val_labels"], **sizes)
    options = FAST if name in ("crt", "lws") else {}
    split = {"split": VALIDATION["split"]} if "split" in VALIDATION else {}
    one = run_baseline(name, train, linear=JOINT, val_features=val, **split, **options)
    two = run_baseline(name, **GIVEN, **options)
    assert torch.equal(one.linear.weight, two.linear.weight) and one.chosen == two.chosen


def test_every_baseline_takes_features_by_itself():
    sizes = {"num_classes": len(JOINT.weight), "class_names": None, "metadata": {}}
    train = Features(FEATURES.numpy(), LABELS, **sizes)
    val = Features(VALIDATION["val_features"].numpy(), VALIDATION["val_labels"], **sizes)
    counts = train.class_counts()
    made = [
        (ncm(train, center=True), ncm(FEATURES, LABELS, center=True)),
        (discriminant(train).linear, discriminant(FEATURES, LABELS).linear),
        (crt(train, val_features=val, split=SPLIT, **FAST).linear, crt(FEATURES, LABELS, **VALIDATION, **FAST).linear),
        (
            lws(JOINT, train, val_features=val, split=SPLIT, **FAST).linear,
            lws(JOINT, FEATURES, LABELS, **VALIDATION, **FAST).linear,
        ),
        (choose_tau(JOINT, val, None, SPLIT).linear, choose_tau(JOINT, val.features, val.labels, SPLIT).linear),
        (choose_few_bias(JOINT, val, None, SPLIT).linear, choose_few_bias(JOINT, val.features, val.labels, SPLIT).linear),
        (
            choose_logit_adjustment(JOINT, counts, val).linear,
            choose_logit_adjustment(JOINT, counts, val.features, val.labels).linear,
        ),
    ]
    assert all(torch.equal(one.weight, two.weight) for one, two in made)


@pytest.mark.parametrize(
    "name",
    [
        "training.selection",
        "baselines.balanced_sampling",
        "baselines.retraining",
        "baselines.nearest_mean",
        "baselines.post_hoc",
        "baselines.linear_discriminant",
        "baselines.averaging",
    ],
)
def test_examples(name):
    module = importlib.import_module(f"alphaext.{name}")
    results = doctest.testmod(module, extraglobs=public_names())
    assert results.failed == 0 and results.attempted > 0


def equal(first: nn.Linear, second: nn.Linear) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(one.equal(two) for one, two in pairs)


@pytest.mark.parametrize(
    ("name", "options", "function"),
    [
        ("tau", {}, lambda: choose_tau(JOINT, **VALIDATION, split=SPLIT)),
        (
            "tau",
            dict(taus=[0.3, 0.6], keep_bias=True),
            lambda: choose_tau(JOINT, **VALIDATION, split=SPLIT, taus=[0.3, 0.6], keep_bias=True),
        ),
        ("logit-adjustment", {}, lambda: choose_logit_adjustment(JOINT, SIZES, **VALIDATION)),
        ("few-bias", {}, lambda: choose_few_bias(JOINT, **VALIDATION, split=SPLIT)),
        ("few-bias", dict(select="best_few"), lambda: choose_few_bias(JOINT, **VALIDATION, split=SPLIT, select="best_few")),
        ("crt", FAST, lambda: crt(FEATURES, LABELS, linear=JOINT, **VALIDATION, **FAST)),
        (
            "lws",
            dict(**FAST, select="best_few", min_all=0.2),
            lambda: lws(JOINT, FEATURES, LABELS, **VALIDATION, **FAST, select="best_few", min_all=0.2),
        ),
    ],
)
def test_by_name_is_by_function(name, options, function):
    result, expected = run_baseline(name, **GIVEN, **options), function()
    assert equal(result.linear, expected.linear)
    left, right = result.to_dict(), expected.to_dict()
    left.pop("seconds"), right.pop("seconds")
    assert left == right and left["name"] == name


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_gives_a_layer_with_its_accuracy_and_json(name):
    options = FAST if name in ("crt", "lws") else {}
    result = run_baseline(name, **GIVEN, **options)
    assert type(result.linear) is nn.Linear and result.name == name
    assert result.accuracy == accuracy_of(result.linear)
    assert result.original == accuracy_of(JOINT)
    # On this problem every baseline helps the few classes.
    assert result.accuracy["few"] > result.original["few"]
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("name", "options", "chosen", "expected"),
    [
        ("tau", dict(tau=0.7), {"tau": 0.7}, lambda: tau_normalized(JOINT, 0.7)),
        ("tau", dict(tau=1, keep_bias=True), {"tau": 1.0}, lambda: tau_normalized(JOINT, 1, keep_bias=True)),
        ("logit-adjustment", dict(tau=0.5), {"tau": 0.5}, lambda: logit_adjusted(JOINT, SIZES, 0.5)),
        ("few-bias", dict(offset=2), {"offset": 2.0}, lambda: few_bias(JOINT, [6, 7], 2)),
        ("ncm", {}, {}, lambda: ncm(FEATURES, LABELS)),
        ("ncm", dict(center=True, normalize=True), {}, lambda: ncm(FEATURES, LABELS, center=True, normalize=True)),
        ("ncm", dict(metric="euclidean"), {}, lambda: ncm(FEATURES, LABELS, metric="euclidean")),
    ],
)
@pytest.mark.parametrize("validate", [True, False])
def test_where_nothing_is_left_to_choose(name, options, chosen, expected, validate):
    given = GIVEN if validate else {key: value for key, value in GIVEN.items() if not key.startswith("val_")}
    result = run_baseline(name, **given, **options)
    assert equal(result.linear, expected()) and result.chosen == chosen and result.policy == "fixed"
    if validate:
        assert result.table == [{**chosen, **accuracy_of(result.linear)}] and result.original == accuracy_of(JOINT)
    else:
        assert result.table == [] and result.accuracy is None and result.original is None
    for option, value in options.items():
        assert option in chosen or result.settings[option] == value


def test_what_can_be_counted_need_not_be_given():
    by_labels = run_baseline("logit-adjustment", labels=LABELS, linear=JOINT, **VALIDATION)
    by_counts = run_baseline("logit-adjustment", class_counts=SIZES.tolist(), linear=JOINT, **VALIDATION)
    assert equal(by_labels.linear, by_counts.linear) and by_labels.table == by_counts.table
    by_split = run_baseline("few-bias", split=SPLIT, linear=JOINT, **VALIDATION)
    assert equal(by_split.linear, run_baseline("few-bias", labels=LABELS, linear=JOINT, **VALIDATION).linear)
    # Thresholds are those of the split.
    wider = run_baseline("few-bias", labels=LABELS, linear=JOINT, few_below=50, many_above=200, offset=1.0)
    assert equal(wider.linear, few_bias(JOINT, [5, 6, 7], 1.0))
    without_linear = run_baseline("crt", FEATURES, LABELS, **VALIDATION, **FAST)
    assert without_linear.original is None and without_linear.policy == "best_all"


def test_options_of_none_are_not_given():
    result = run_baseline("tau", **GIVEN, tau=None, keep_bias=None)
    assert result.policy == "best_all"
    assert run_baseline("crt", FEATURES, LABELS, **FAST, device=None, checkpoint=None).settings["lr"] == FAST["lr"]


BAD = {
    "name must be one of ncm, tau, crt, lws, logit-adjustment, few-bias, discriminant, average, got 'svm'": ("svm", {}),
    "tau has no option 'epochs'; its options are tau, taus, keep_bias": ("tau", dict(epochs=3)),
    "lws has no option 'bias'": ("lws", dict(bias=True)),
    "linear must be given for tau": ("tau", dict(linear=None)),
    "linear must be given for lws": ("lws", dict(linear=None)),
    "features must be given for crt": ("crt", dict(features=None)),
    "labels must be given for ncm": ("ncm", dict(labels=None)),
    "val_features and val_labels must be given together": ("tau", dict(val_labels=None)),
    "must be given for tau to choose tau by; or give tau itself": ("tau", dict(val_features=None, val_labels=None)),
    "must be given for few-bias to choose offset by": ("few-bias", dict(val_features=None, val_labels=None)),
    r"split \(or class_counts or labels, to count\) must be given for tau": ("tau", dict(labels=None)),
    r"split \(or class_counts or labels, to count\) must be given for few-bias": ("few-bias", dict(labels=None)),
    r"class_counts \(or labels, to count\) must be given for logit-adjustment": ("logit-adjustment", dict(labels=None)),
    r"labels must be in 0\.\.7, got 8": ("tau", dict(labels=LABELS + 1)),
    "no samples of class 0": ("ncm", dict(labels=LABELS.clamp(min=1), val_features=None, val_labels=None)),
    "min_all must be a fraction": ("tau", dict(min_all=40, select="best_few")),
    "linear must have a weight": ("tau", dict(linear=nn.ReLU())),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_calls(message):
    name, options = BAD[message]
    with pytest.raises((ValueError, TypeError), match=message):
        run_baseline(name, **{**GIVEN, **options})


def test_a_class_without_training_samples_is_no_obstacle_where_none_is_needed():
    result = run_baseline("tau", **{**GIVEN, "labels": LABELS.clamp(min=1)})
    assert result.linear.weight.shape == JOINT.weight.shape and result.linear.weight.isfinite().all()
