"""Presets, and the repair in one call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alphaext import fit, fit_many
from alphaext.repairing import repair
from alphaext.training import PRESETS, preset_options
from alphaext.training.options import TrainingOptions

COUNTS = (30, 40, 25, 22, 6, 4)
LABELS = torch.arange(6).repeat_interleave(torch.tensor(COUNTS))
CENTRES = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def features_of(labels, seed):
    return CENTRES[labels] + torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(seed)) / 2


FEATURES = features_of(LABELS, 1)
VAL_LABELS = torch.arange(6).repeat_interleave(10)
VAL = {"val_features": features_of(VAL_LABELS, 2), "val_labels": VAL_LABELS}


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(3)
    made = nn.Linear(8, 6)
    with torch.no_grad():
        made.weight.copy_(CENTRES + torch.randn(6, 8) / 3)
    return made


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_repairs(linear, preset):
    before = {name: value.clone() for name, value in linear.state_dict().items()}
    made = repair(linear, FEATURES, LABELS, **VAL, preset=preset, epochs=3, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in linear.state_dict().items())
    assert made.split.few.tolist() == [4, 5] and made.head.top_k == 4 if preset == "few" else True
    for name in ("weight", "bias"):
        assert torch.equal(getattr(made.linear, name)[:4], before[name][:4])
        assert not torch.equal(getattr(made.linear, name)[4:], before[name][4:]) or made.result.selected_epoch == 0
    scores = made.linear(VAL["val_features"])
    assert made.result.metrics_after["all"] == pytest.approx(float((scores.argmax(1) == VAL_LABELS).float().mean()))
    assert made.result.engine == "native"


def test_the_plain_form_is_what_fit_does_without_options(linear):
    plain = {**PRESETS["paper"], "gamma": 1.0, "init": "identity", "projected_gradient": True}
    del plain["top_k"]
    one, two = (
        fit_many(linear, FEATURES, LABELS, [{"top_k": 2, "epochs": 2} | options], progress=False)[0]
        for options in ({}, {**plain, "epochs": 2})
    )
    assert torch.equal(one.head.alphas(), two.head.alphas())
    for name in ("epochs", "lr", "batch_size", "augment_samples", "augment_neighbors", "lr_schedule", "lr_step"):
        assert plain[name] == getattr(TrainingOptions(), name) or name == "epochs"
    assert set(PRESETS["paper"]) == set(PRESETS["few"])


def test_the_papers_preset_is_the_papers():
    paper = PRESETS["paper"]
    published = dict(
        coefficients="mlp", top_k=5, pool="base", metric="euclidean", pca_dim=500, rule="clamp", init="default", shared=False,
        projected_gradient=False, residual=0, epochs=80, batch_size=64, lr=0.1, momentum=0.9, lr_step=20, lr_factor=0.1,
        negative_ratio=1.0, negative_sampling="uniform", samples_per_class=None, augment=None, regularize=0.0, gamma=0.7,
        weight_decay=0.0, prior_correction=False, few_bias=False,
    )  # fmt: skip
    assert {name: paper[name] for name in published} == published


def test_presets_fit_what_there_is(linear):
    assert preset_options("few", pool_size=7)["top_k"] == 7 and not preset_options("few", validation=False)["few_bias"]
    assert preset_options("paper", pool_size=100)["top_k"] == 5
    with pytest.raises(ValueError, match="preset must be one of few, paper, got 'good'"):
        preset_options("good")
    with pytest.raises(TypeError):
        PRESETS["few"]["lr"] = 1.0  # a user's change would be everybody's
    made = repair(linear, FEATURES, LABELS, epochs=1, progress=False)
    assert made.result.few_bias == 0 and made.result.metrics_after is None


def test_options_take_the_place_of_the_presets(linear):
    made = repair(linear, FEATURES, LABELS, preset="few", epochs=1, top_k=2, residual=0, progress=False, **VAL)
    assert made.head.top_k == 2 and made.head.num_directions == 0
    with pytest.raises(ValueError, match=r"^a residual needs coefficients='direct'"):
        repair(linear, FEATURES, LABELS, coefficients="mlp", progress=False)
    with pytest.raises(TypeError, match="unknown option 'gama'"):
        repair(linear, FEATURES, LABELS, gama=1.0, progress=False)
    with pytest.raises(ValueError, match="labels"):
        repair(linear, FEATURES, LABELS + 1, progress=False)


def test_pools(linear):
    assert repair(linear, FEATURES, LABELS, pool="all", epochs=1, progress=False).head.top_k == 5
    largest = int(LABELS.bincount().max())
    with pytest.raises(ValueError, match=f"pool must have a class, 'many' has none: the largest class has {largest} samples"):
        repair(linear, FEATURES, LABELS, pool="many", epochs=1, progress=False)
    with pytest.raises(ValueError, match=f"every class is few, the largest having {largest} samples, .* a smaller few_below"):
        repair(linear, FEATURES, LABELS, few_below=largest + 1, many_above=largest + 1, progress=False)
    with pytest.raises(TypeError, match="split must be ClassSplit, got int"):
        repair(linear, FEATURES, LABELS, split=3)


def test_a_diverged_training_says_so(linear):
    with torch.no_grad():
        linear.weight *= 1e4
    with pytest.raises(FloatingPointError, match="diverged"):
        repair(linear, FEATURES, LABELS, preset="paper", lr=1e30, epochs=3, progress=False)


def test_the_repaired_head_can_be_trained_on(linear):
    made = repair(linear, FEATURES, LABELS, **VAL, epochs=1, progress=False)
    result = fit(made.head, FEATURES, LABELS, epochs=1, progress=False)
    assert result.engine == "native"
