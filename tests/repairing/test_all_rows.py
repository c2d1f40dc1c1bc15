"""Preset all: never worse than the original on validation, a plain layer, and in words where it cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from alphaext import ClassSplit, repair
from alphaext.metrics import split_accuracy

COUNTS = torch.tensor([60, 50, 40, 30, 8, 5])
FAST = dict(epochs=3, progress=False, many_above=45)


def problem(seed: int, width: int = 8) -> tuple[nn.Linear, tuple[Tensor, Tensor], dict[str, Tensor]]:
    """A classifier that scores few classes too low, training samples, validation samples."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, width, generator=generator)
    labels, val_labels = torch.arange(6).repeat_interleave(COUNTS), torch.arange(6).repeat_interleave(30)
    samples = [centres[each] + torch.randn(len(each), width, generator=generator) for each in (labels, val_labels)]
    linear = nn.Linear(width, 6)
    with torch.no_grad():
        linear.weight.copy_(centres + 0.3 * torch.randn(6, width, generator=generator))
        linear.bias.copy_(-centres.square().sum(1) / 2)
        linear.bias[4:] -= 2
    return linear, (samples[0], labels), dict(val_features=samples[1], val_labels=val_labels)


@pytest.mark.parametrize("seed", range(3))
def test_all_is_at_least_the_original_on_validation_and_says_what_it_is(seed: int) -> None:
    linear, train, val = problem(seed)
    few = repair(linear, *train, **val, **FAST)
    made = repair(linear, *train, **val, preset="all", **FAST)
    assert type(made.linear) is nn.Linear and made.linear.weight.dtype == torch.float32
    assert made.average is not None and few.average is None
    assert made.result.before == few.result.before and made.result.after["all"] >= made.result.before["all"]
    assert made.result.after == split_accuracy(made.linear(val["val_features"]), val["val_labels"], made.split)
    assert torch.equal(made.head.fold().weight, few.linear.weight)
    if made.average.chosen["candidate"] == "original":
        assert torch.equal(made.linear.weight, linear.weight)
    else:
        assert len(made.average.settings["weights"]) == 3 and made.result.few_bias == made.average.settings["few_bias"]
    again = repair(linear, *train, **val, preset="all", **FAST)
    assert torch.equal(again.linear.weight, made.linear.weight) and torch.equal(again.linear.bias, made.linear.bias)


def test_features_of_one_value_a_class_leave_the_discriminant_out() -> None:
    linear, (features, labels), val = problem(0)
    still = torch.stack([features[labels == each].mean(0) for each in range(6)])[labels]
    made = repair(linear, still, labels, **val, preset="all", **FAST)
    assert made.average is not None and bool(made.linear.weight.isfinite().all())
    assert len(made.average.settings["weights"]) == 2


def test_what_it_needs_is_said_before_training() -> None:
    linear, (features, labels), val = problem(0)
    with pytest.raises(ValueError, match="preset='all' chooses weights on validation samples"):
        repair(linear, features, labels, preset="all")
    with pytest.raises(ValueError, match="labels has none of class 5; preset='few' keeps"):
        repair(linear, features[labels < 5], labels[labels < 5], **val, preset="all")
    with pytest.raises(ValueError, match="preset must be one of few, paper, all, got 'best'"):
        repair(linear, features, labels, preset="best")


def test_validation_without_few_samples_keeps_what_it_has() -> None:
    linear, train, val = problem(1)
    base = val["val_labels"] < 4
    part = {name: value[base] for name, value in val.items()}
    with pytest.warns(UserWarning, match="Nothing was chosen by validation samples"):
        made = repair(linear, *train, **part, preset="all", few_bias=False, **FAST)
    assert made.average is None and torch.equal(made.linear.weight[:4], linear.weight[:4])


def test_split_may_be_given() -> None:
    linear, train, val = problem(2)
    split = ClassSplit(few=[3, 4, 5], medium=[0, 1, 2], many=[])
    assert repair(linear, *train, **val, split=split, preset="all", epochs=3).split == split
