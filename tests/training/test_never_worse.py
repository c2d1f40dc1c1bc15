"""A result is never worse than the original classifier in silence."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from alphaext import AlphaNet, class_counts, class_means, fit, fit_many, repair
from alphaext.training import AlphaNetWarning
from alphaext.training.selection import Policy, unfit_to_choose

NUM_CLASSES, FEW = 8, 3


def problem(seed: int, per_class: int = 12, lowered: float = 2.0):
    """A classifier that is right about its Gaussians, but for few classes that it scores too low."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([40] * (NUM_CLASSES - FEW) + [5] * FEW)
    labels, val_labels = (torch.arange(NUM_CLASSES).repeat_interleave(n) for n in (counts, torch.tensor(per_class)))
    means = 1.5 * torch.randn(NUM_CLASSES, 6, generator=generator)
    features, val_features = (torch.randn(len(ids), 6, generator=generator) + means[ids] for ids in (labels, val_labels))
    linear = nn.Linear(6, NUM_CLASSES)
    with torch.no_grad():
        linear.weight.copy_(means)
        linear.bias.copy_(-0.5 * means.square().sum(1))
        linear.bias[-FEW:] -= lowered
    return linear, features, labels, {"val_features": val_features, "val_labels": val_labels}


def accuracy(layer, val, part=slice(None)):
    return float((layer(val["val_features"]).argmax(1) == val["val_labels"])[part].float().mean())


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from(["paper", "few"]), st.floats(0, 3))
def test_no_repair_is_worse_on_the_samples_that_it_was_chosen_by(seed, preset, lowered):
    linear, features, labels, val = problem(seed, lowered=lowered)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made = repair(linear, features, labels, **val, preset=preset, epochs=4, progress=False)
    before, after = accuracy(linear, val), accuracy(made.linear, val)
    assert made.result.verified
    assert (after > before) != made.result.kept_original
    if made.result.kept_original:
        assert torch.equal(made.linear.weight, linear.weight) and torch.equal(made.linear.bias, linear.bias)
        assert made.result.metrics_after == made.result.metrics_before and made.result.few_bias == 0
        assert any("it is kept" in str(each.message) for each in told)


def kept_head():
    linear, features, labels, val = problem(0, lowered=0.0)
    head = AlphaNet.from_linear(
        linear, class_counts=class_counts(labels), class_means=class_means(features, labels), top_k=2, gamma=0.5, seed=0
    )
    with pytest.warns(AlphaNetWarning, match="it is kept"):
        result = fit(head, features, labels, **val, epochs=0, progress=False)
    assert result.kept_original
    return head, linear, val["val_features"]


def test_a_head_that_keeps_the_original_is_the_original():
    head, linear, x = kept_head()
    logits = linear(x)
    for scores in (head(x), head.mix_logits(logits), head.fold()(x), AlphaNet.from_state_dict(head.state_dict())(x)):
        assert torch.equal(scores, logits)
    assert torch.equal(head.alphas(), torch.tensor([[1.0, 0, 0]]).expand(FEW, 3)) and "keeps_original=True" in repr(head)
    head.keeps_original = False
    assert not torch.equal(head(x), logits)


def test_what_was_trained_can_be_asked_for():
    linear, features, labels, val = problem(4, lowered=0.0)
    options = dict(preset="paper", epochs=4, progress=False, **val)
    assert repair(linear, features, labels, **options).result.kept_original
    with pytest.warns(AlphaNetWarning, match=r"no better than the original .* before, .* after"):
        made = repair(linear, features, labels, keep_original=False, **options)
    assert not made.result.kept_original and not torch.equal(made.linear.weight, linear.weight)


def test_every_configuration_is_compared():
    linear, features, labels, val = problem(4, lowered=0.0)
    runs = fit_many(linear, features, labels, [{"gamma": gamma, "epochs": 2, "top_k": 2} for gamma in (0.3, 1.0)], **val)
    before = accuracy(linear, val)
    assert all((accuracy(run.head.fold(), val) > before) != run.result.kept_original for run in runs)


PARTS = {
    "no sample of few classes": lambda labels: labels < NUM_CLASSES - FEW,
    "few classes alone": lambda labels: labels >= NUM_CLASSES - FEW,
    "one few class of three": lambda labels: labels <= NUM_CLASSES - FEW,
    "two base classes of five": lambda labels: (labels < 2) | (labels >= NUM_CLASSES - FEW),
    "a handful": lambda labels: torch.arange(len(labels)) % 40 == 0,
    "one": lambda labels: torch.arange(len(labels)) == 0,
}


@pytest.mark.parametrize("preset", ["few", "paper"])
@pytest.mark.parametrize("part", PARTS)
def test_samples_that_show_too_little_choose_nothing(part, preset):
    linear, features, labels, val = problem(2, per_class=60)
    shown = PARTS[part](val["val_labels"])
    some = {name: values[shown] for name, values in val.items()}
    blind = repair(linear, features, labels, preset=preset, epochs=4, progress=False)
    with pytest.warns(AlphaNetWarning, match="Nothing was chosen by validation samples"):
        made = repair(linear, features, labels, **some, preset=preset, epochs=4, progress=False)
    assert torch.equal(made.linear.weight, blind.linear.weight) and torch.equal(made.linear.bias, blind.linear.bias)
    assert not made.result.verified and not blind.result.verified and made.result.metrics_after is not None
    with pytest.raises(ValueError, match=r"max_base_drop=1 cannot be held to: "):
        repair(linear, features, labels, **some, max_base_drop=1, progress=False)


def test_ten_samples_of_each_half_will_do():
    split = repair(*problem(0)[:3], epochs=1, progress=False).split
    labels = torch.tensor([0, 1, 2] * 4 + [5, 6] * 5)
    assert unfit_to_choose(labels, split) == ""
    assert "9 of few classes" in unfit_to_choose(labels[:-1], split)


def test_a_loss_of_base_classes_is_told_and_bounded():
    linear, features, labels, val = problem(3, per_class=40, lowered=4.0)
    base = val["val_labels"] < NUM_CLASSES - FEW
    options = dict(epochs=10, progress=False, **val)
    with pytest.warns(AlphaNetWarning, match=r"Base classes lose \d+\.\d points .* the classes \d \(-\d+\.\d\), "):
        made = repair(linear, features, labels, **options)
    lost = accuracy(linear, val, base) - accuracy(made.linear, val, base)
    assert lost > 0.03
    for bound in (100 * lost - 1, 1.0, 0.0):
        bounded = repair(linear, features, labels, max_base_drop=bound, **options)
        assert 100 * (accuracy(linear, val, base) - accuracy(bounded.linear, val, base)) <= bound + 1e-4
        assert accuracy(bounded.linear, val) >= accuracy(linear, val)
    with pytest.raises(ValueError, match="max_base_drop=1 cannot be held to: there are no validation samples"):
        repair(linear, features, labels, max_base_drop=1.0, progress=False)


def test_candidates_below_the_bound_come_last():
    policy = Policy("best_all", min_base=0.5, base_samples=(10, 30))
    poor, good = {"few": 1.0, "medium": 0.0, "many": 0.6, "all": 0.9}, {"few": 0.0, "medium": 0.5, "many": 0.5, "all": 0.3}
    assert policy.base_accuracy(poor) == pytest.approx(0.45) and policy.choose([poor, good], [0, 1]) == 1
    assert policy.score(poor) < Policy("best_few", min_all=1.0).score(good) < policy.score(good)


@pytest.mark.parametrize("engine", ["native", "autograd"])
@pytest.mark.parametrize("how", [{"epochs": 8, "lr": 300.0}, {"epochs": 1, "lr": 1e8, "batch_size": 10**6}])
def test_large_numbers_are_a_divergence(engine, how):
    linear, features, labels, _ = problem(0)
    head = AlphaNet.from_linear(
        linear, class_counts=class_counts(labels), class_means=class_means(features, labels), top_k=2, gamma=0.5, seed=0
    )
    with pytest.raises(FloatingPointError, match=r"training diverged: .* a smaller lr may help"):
        fit(head, features, labels, **how, engine=engine, progress=False)
    assert head(features).isfinite().all()
    (run,) = fit_many(linear, features, labels, [{"top_k": 2, "gamma": 0.5, **how}], progress=False)
    assert run.head is None and run.error.startswith("training diverged")


def test_classes_that_no_sample_shows_are_told():
    linear, features, labels, val = problem(2, per_class=60)
    shown = ~torch.isin(val["val_labels"], torch.tensor([1, 7]))
    with pytest.warns(AlphaNetWarning, match=r"No validation sample shows what became of the classes 1, 7\."):
        made = repair(
            linear, features, labels, val_features=val["val_features"][shown], val_labels=val["val_labels"][shown], epochs=4,
            progress=False,
        )  # fmt: skip
    assert made.result.verified


def test_preset_all_tells_them_too():
    linear, features, labels, val = problem(2, per_class=60)
    shown = val["val_labels"] != 1
    some = {name: values[shown] for name, values in val.items()}
    with pytest.warns(AlphaNetWarning, match=r"No validation sample shows what became of the classes 1\."):
        repair(linear, features, labels, **some, preset="all", epochs=4, progress=False)


@pytest.mark.parametrize("options", [{"few_bias": True}, {"gamma": 0.3}])
def test_a_finished_training_is_taken_up_by_its_own_head_again(tmp_path, options):
    linear, features, labels, val = problem(4, lowered=0.0 if "gamma" in options else 4.0)
    common = dict(class_counts=class_counts(labels), class_means=class_means(features, labels), top_k=2, seed=0)
    head = AlphaNet.from_linear(linear, **common, gamma=options.pop("gamma", 1.0))
    how = dict(epochs=2, checkpoint=tmp_path / "fit.pt", progress=False, **val, **options)
    first = fit(head, features, labels, **how)
    assert first.kept_original or first.few_bias
    again = fit(head, features, labels, **how)
    assert (again.kept_original, again.few_bias) == (first.kept_original, first.few_bias)
    assert again.after["all"] == first.after["all"]


def test_samples_of_base_classes_alone_still_tell_what_those_lose():
    linear, features, labels, val = problem(3, per_class=40, lowered=4.0)
    base = val["val_labels"] < NUM_CLASSES - FEW
    some = {name: values[base] for name, values in val.items()}
    with pytest.warns(AlphaNetWarning, match=r"Base classes lose \d+\.\d points"):
        made = repair(linear, features, labels, **some, epochs=10, progress=False)
    assert not made.result.verified and accuracy(linear, val, base) - accuracy(made.linear, val, base) > 0.03
