"""A class without training samples keeps its row, is in no split, and is nobody's neighbour."""

from __future__ import annotations

import io
import math

import pytest
import torch
from rich.console import Console
from torch import nn

from alphaext import AlphaNet, class_counts, class_means, fit, fit_many, repair, split_classes
from alphaext.commands import Fit
from alphaext.features.store import write_features
from alphaext.head.neighbors import pool_size, residual_directions
from alphaext.metrics import compare, split_metrics
from alphaext.metrics.predictions import predict

COUNTS = torch.tensor([30, 40, 0, 25, 6, 4, 0])
EMPTY = [2, 6]
CENTRES = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))


def features_of(labels, seed):
    return CENTRES[labels] + torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(seed)) / 2


LABELS = torch.arange(7).repeat_interleave(COUNTS)
FEATURES = features_of(LABELS, 1)
VAL_LABELS = torch.arange(7).repeat_interleave(10)
VAL = {"val_features": features_of(VAL_LABELS, 2), "val_labels": VAL_LABELS}


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(3)
    made = nn.Linear(8, 7)
    with torch.no_grad():
        made.weight.copy_(CENTRES + torch.randn(7, 8) / 3)
    return made


@pytest.mark.parametrize("options", [{}, {"pool": "all"}, {"preset": "paper"}, {"metric": "cosine"}, {"metric": "random"}])
def test_it_keeps_its_row(linear, options):
    made = repair(linear, FEATURES, LABELS, **VAL, **options, epochs=3, progress=False)
    assert made.split.empty.tolist() == EMPTY and made.split.few.tolist() == [4, 5]
    rest = [0, 1, 2, 3, 6]
    assert torch.equal(made.linear.weight[rest], linear.weight[rest]) and torch.equal(made.linear.bias[rest], linear.bias[rest])
    assert not torch.isin(made.head.members, torch.tensor(EMPTY)).any()
    # Its validation samples count in all, and it competes for those of all others.
    right = linear_hits(made.linear)
    assert made.result.metrics_after["all"] == pytest.approx(float(right.float().mean()))
    assert made.result.metrics_after["few"] == pytest.approx(float(right[(VAL_LABELS == 4) | (VAL_LABELS == 5)].float().mean()))


def linear_hits(linear):
    return linear(VAL["val_features"]).argmax(1) == VAL_LABELS


def test_a_given_head_is_measured_by_the_same_split(linear):
    head = AlphaNet.from_linear(
        linear,
        class_counts=class_counts(LABELS, 7),
        class_means=class_means(FEATURES, LABELS, 7),
        top_k=3,
        seed=0,
    )
    one = fit(head, FEATURES, LABELS, **VAL, epochs=2, progress=False)
    (two,) = fit_many(linear, FEATURES, LABELS, [dict(top_k=3, epochs=2)], **VAL, progress=False)
    assert str(one.history) == str(two.result.history) and torch.equal(head.members, two.head.members)


def test_its_mean_does_not_turn_the_residual():
    means, empty = torch.randn(7, 8, generator=torch.Generator().manual_seed(1)), torch.tensor(EMPTY)
    weight = torch.randn(7, 8, generator=torch.Generator().manual_seed(2))
    moved = means.clone()
    moved[empty] = 100.0
    for one, two in zip(
        residual_directions(weight, means, 2, empty), residual_directions(weight, moved, 2, empty), strict=True
    ):
        assert torch.equal(one, two)


def test_it_is_in_no_split(linear):
    split = split_classes(COUNTS)
    assert pool_size(split, "all") == 4 and pool_size(split, "base") == 3
    before, after = (predict(made, VAL["val_features"], VAL_LABELS, progress=False) for made in (linear, nn.Linear(8, 7)))
    found = compare(before, after, split, resamples=50)
    assert found.before["all"] == pytest.approx(float(linear_hits(linear).float().mean()))
    assert math.isnan(split_metrics(before, split_classes(COUNTS, few_below=0))["few"])


def test_the_command_names_it_once(linear, tmp_path):
    (tmp_path / "features").mkdir()
    for part, features, labels in (("train", FEATURES, LABELS), ("val", *VAL.values())):
        write_features(tmp_path / "features" / part, features, labels, num_classes=7)
    torch.save(linear.state_dict(), tmp_path / "model.pth")
    said = io.StringIO()
    command = Fit(
        features=tmp_path / "features", classifier=tmp_path / "model.pth", output=tmp_path / "out", epochs=1, progress=False
    )
    result = command.run(Console(file=said, width=200))
    assert result["empty_classes"] == EMPTY and said.getvalue().count("No training images of class 2, 6") == 1
