"""The policies that choose among candidates, and the accuracies they go by."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from alphaext.classes import ClassSplit
from alphaext.metrics import split_accuracy
from alphaext.training import cached_logits, selection
from alphaext.training.options import CHOOSING
from alphaext.training.selection import BaselineResult, Policy, Rescaling, Validation

SPLIT = ClassSplit(few=[3, 4], medium=[1, 2], many=[0])


def make_validation(seed: int = 0, samples: int = 40, dtype=torch.float32) -> tuple[Validation, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 3, generator=generator, dtype=torch.float64).to(dtype)
    features = torch.randn(samples, 3, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(5, (samples,), generator=generator)
    return Validation(features, labels, SPLIT, weight), weight


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 60), st.booleans())
def test_accuracies_are_those_of_each_candidates_logits(seed: int, block: int, keep: bool) -> None:
    validation, weight = make_validation(seed)
    generator = torch.Generator().manual_seed(seed)
    scale, shift = torch.rand(2, 5, generator=generator)
    candidates = [Rescaling(None, None), Rescaling(scale, None), Rescaling(None, shift), Rescaling(scale, shift)]
    logits = validation.samples.features @ weight.t()
    changed = [logits, logits * scale, logits + shift, torch.addcmul(shift, logits, scale)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_BLOCK_ELEMENTS", block)
        if keep:
            validation.keep(weight)
        found = validation.accuracies(weight, candidates)
    wanted = [split_accuracy(own, validation.samples.labels, SPLIT) for own in changed]
    assert str(found) == str(wanted)


def test_kept_products_are_used_for_their_own_classifier_alone(monkeypatch):
    validation, weight = make_validation()
    validation.keep(weight)
    assert next(iter(validation.products(weight)))[0] is next(iter(validation.products(weight)))[0]
    other = weight.flip(0).contiguous()
    assert not next(iter(validation.products(other)))[0].equal(next(iter(validation.products(weight)))[0])
    monkeypatch.setattr(cached_logits, "CACHE_BYTES", 40 * 5 * 4 - 1)
    fresh, weight = make_validation()
    fresh.keep(weight)
    assert next(iter(fresh.products(weight)))[0] is not next(iter(fresh.products(weight)))[0]


def test_a_part_without_samples_is_nan():
    validation = Validation(torch.eye(5)[:2], [0, 1], SPLIT, torch.eye(5))
    (found,) = validation.accuracies(torch.eye(5), [Rescaling(None, None)])
    assert math.isnan(found["few"]) and (found["medium"], found["many"], found["all"]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 4), [0, 1], SPLIT), ValueError, r"val_features must have shape \[n, 3\], got \[2, 4\]"),
        ((torch.ones(2, 3), [0, 5], SPLIT), ValueError, r"val_labels must be in 0\.\.4, got 5"),
        ((torch.ones(2, 3), [0], SPLIT), ValueError, "val_features and val_labels must have one entry a sample, got 2 and 1"),
        ((torch.ones(0, 3), [], SPLIT), ValueError, "val_features must not be empty"),
        ((torch.ones(2, 3).long(), [0, 1], SPLIT), TypeError, "val_features must be floating point"),
        ((torch.ones(2, 3), [0, 1], [[0], [1]]), TypeError, "split must be ClassSplit, got list"),
        (
            (torch.ones(2, 3), [0, 1], ClassSplit([0], [1], [2])),
            ValueError,
            "split must be of the classifier's 5 classes, got one of 3",
        ),
    ],
)
def test_validation_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        Validation(*arguments, torch.ones(5, 3))


def test_validation_features_must_be_finite(monkeypatch):
    monkeypatch.setattr(selection, "_BLOCK_ELEMENTS", 5)
    features = torch.ones(4, 3)
    features[2, 1] = torch.inf
    with pytest.raises(ValueError, match=r"val_features must be finite, got inf at index \[2, 1\]"):
        Validation(features, [0] * 4, SPLIT, torch.ones(5, 3)).accuracies(torch.ones(5, 3), [Rescaling(None, None)])


def accuracy(few: float, overall: float) -> dict[str, float]:
    return {"few": few, "medium": 0.5, "many": 0.5, "all": overall}


CANDIDATES = [accuracy(0.1, 0.50), accuracy(0.2, 0.52), accuracy(0.4, 0.48), accuracy(0.6, 0.40)]


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        (Policy("best_all"), 1),
        (Policy("best_few", 0.5), 1),
        (Policy("best_few", 0.48), 2),
        (Policy("best_few", 0.0), 3),
        (Policy("best_few", 0.9), 1),  # none reaches it: the best over all
    ],
)
def test_policies(policy, wanted):
    assert policy.choose(CANDIDATES, [0.0, 1.0, 2.0, 3.0]) == wanted
    backwards = policy.choose(CANDIDATES[::-1], [3.0, 2.0, 1.0, 0.0])
    assert backwards == 3 - wanted


@pytest.mark.parametrize("policy", [Policy("best_all"), Policy("best_few", 0.3)])
def test_of_equal_candidates_the_nearest_to_no_change_wins(policy):
    assert policy.choose([accuracy(0.2, 0.4)] * 3, [2.0, 0.5, 1.0]) == 1
    assert policy.choose([accuracy(0.2, 0.4)] * 3, [0.5, 0.5, 1.0]) == 0


FEW = torch.tensor([3, 4])


def test_defaults_and_their_description():
    labels = make_validation()[0].samples.labels
    assert Policy.of(None, None, None, FEW).select == "last"
    assert str(Policy.of(None, None, labels, FEW)) == "best_all"
    assert str(Policy.of("best_few", None, labels, FEW).bounded(accuracy(0.1, 0.444))) == "best_few with all >= 0.4440"
    assert Policy.of("best_few", 1, labels, FEW).bounded(None) == Policy("best_few", 1.0)


@pytest.mark.parametrize(
    ("select", "min_all", "error", "message"),
    [
        ("best", None, ValueError, "select must be one of best_all, best_few, got 'best'"),
        ("last", None, ValueError, "select must be one of best_all, best_few, got 'last'"),
        ("best_all", 0.5, ValueError, "min_all must be a fraction .* with select='best_few'; got 0.5 with 'best_all'"),
        ("best_few", 44.4, ValueError, "min_all must be a fraction"),
        ("best_few", True, TypeError, "min_all must be a fraction"),
        ("best_few", None, ValueError, "needs min_all, or linear"),
    ],
)
def test_policies_refused(select, min_all, error, message):
    with pytest.raises(error, match=message):
        Policy.of(select, min_all, make_validation()[0].samples.labels, FEW, CHOOSING).bounded(None)


def test_policies_without_what_they_go_by():
    with pytest.raises(ValueError, match="select='best_all' needs val_features and val_labels"):
        Policy.of("best_all", None, None, FEW)
    with pytest.raises(ValueError, match="val_labels has no sample of a few class"):
        Policy.of("best_few", 0.1, torch.tensor([0, 1]), FEW)


def test_result_as_json():
    table = [{"tau": 0.0, **accuracy(math.nan, 0.5)}, {"tau": 0.5, **accuracy(math.nan, 0.6)}]
    result = BaselineResult("tau", nn.Linear(2, 2), {"tau": 0.5}, table, "best_all", {}, 0.1, None, torch.tensor([1.0, 2.0]))
    entries = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert entries["accuracy"] == {"few": None, "medium": 0.5, "many": 0.5, "all": 0.6}
    assert entries["scales"] == [1.0, 2.0] and entries["table"][0]["few"] is None and entries["original"] is None
    assert BaselineResult("crt", nn.Linear(2, 2), {"epoch": 1}, [{"epoch": 1, "loss": 0.1}], "last", {}, 0.1).accuracy is None
