"""The average: likeliest weights and constants, a plain layer, and never worse than the first on validation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from alphaext import ClassSplit
from alphaext.baselines import run_baseline
from alphaext.baselines.averaging import average
from alphaext.baselines.linear_discriminant import discriminant
from alphaext.utils.linear import make_linear

COUNTS = torch.tensor([60, 50, 40, 30, 8, 5])
SPLIT = ClassSplit(few=[4, 5], medium=[0, 1, 2, 3], many=[])


def problem(seed: int, each: int = 15) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training samples, and as many validation samples of every class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    parts = []
    for labels in (torch.arange(6).repeat_interleave(COUNTS), torch.arange(6).repeat_interleave(each)):
        parts += [centres[labels] + torch.randn(len(labels), 5, generator=generator, dtype=torch.float64), labels]
    return tuple(parts)


def layers_of(seed: int, features: Tensor, labels: Tensor) -> list[nn.Linear]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return [make_linear(weight, None), discriminant(features, labels).linear]


def log_loss(layer: nn.Linear, features: Tensor, labels: Tensor) -> float:
    return float(nn.functional.cross_entropy(layer(features), labels).detach())


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32), st.booleans())
def test_no_other_numbers_are_likelier(seed: int, slope: bool) -> None:
    features, labels, val, val_labels = problem(seed)
    layers = layers_of(seed, features, labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alphaext.baselines.averaging._PRIOR_DEVIATION", 1e6)
        made = average(layers, val, val_labels, SPLIT, class_counts=COUNTS if slope else None)
    weights, few, count_slope = (made.settings.get(name, 0.0) for name in ("weights", "few_bias", "count_slope"))

    def summed(first: float, second: float, few: float, slope: float) -> nn.Linear:
        weight = first * layers[0].weight + second * layers[1].weight
        bias = second * layers[1].bias + slope * COUNTS.log()
        bias[4:] += few
        return make_linear(weight, bias)

    best = log_loss(summed(*weights, few, count_slope), val, val_labels)
    if made.chosen == {"candidate": "average"}:
        assert log_loss(made.linear, val, val_labels) == pytest.approx(best)
    for number, step in ((0, 0.05), (1, 0.05), (2, 0.1), (3, 0.1)):
        for sign in (1, -1):
            moved = [*weights, few, count_slope]
            moved[number] = max(moved[number] + sign * step, 0.0) if number < 2 else moved[number] + sign * step
            if number < 3 or slope:
                # The prior moves the optimum by less than these steps do.
                assert log_loss(summed(*moved), val, val_labels) >= best - 1e-3
    assert min(weights) >= 0
    assert made.accuracy["all"] >= made.original["all"]


def test_where_the_first_is_best_it_is_kept_to_the_bit() -> None:
    _, _, val, val_labels = problem(1)
    sure = make_linear(discriminant(val, val_labels, tau=0).linear.weight, discriminant(val, val_labels, tau=0).linear.bias)
    noise = make_linear(torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64))
    made = average([sure, noise], val, val_labels, SPLIT)
    if made.chosen == {"candidate": "original"}:
        assert torch.equal(made.linear.weight, sure.weight) and torch.equal(made.linear.bias, sure.bias)
    assert made.accuracy["all"] >= made.original["all"]


@pytest.mark.parametrize("part", [slice(0, 60), slice(60, 90), slice(0, 1)])
def test_validation_that_does_not_show_both_chooses_nothing(part: slice) -> None:
    features, labels, val, val_labels = problem(2)
    layers = layers_of(2, features, labels)
    with pytest.warns(UserWarning, match="the original classifier is kept: the validation samples"):
        made = average(layers, val[part], val_labels[part], SPLIT)
    assert made.chosen == {"candidate": "original"} and torch.equal(made.linear.weight, layers[0].weight)
    assert made.linear.bias is None and made.accuracy == made.original


def test_separable_samples_leave_numbers_small() -> None:
    labels = torch.arange(6).repeat_interleave(15)
    features = 10 * torch.nn.functional.one_hot(labels, 6).double()
    eye = make_linear(torch.eye(6, dtype=torch.float64), None)
    made = average([eye, eye], features, labels, SPLIT)
    assert sum(made.settings["weights"]) < 100


def test_in_blocks_and_when_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, val, val_labels = problem(3)
    layers = layers_of(3, features, labels)
    expected = average(layers, val, val_labels, SPLIT)
    monkeypatch.setattr("alphaext.training.selection._BLOCK_ELEMENTS", 40)
    monkeypatch.setattr("alphaext.training.cached_logits.CACHE_BYTES", 10)
    made = average(layers, val, val_labels, SPLIT)
    torch.testing.assert_close(made.linear.weight, expected.linear.weight, rtol=1e-4, atol=1e-4)


def test_by_name() -> None:
    features, labels, val, val_labels = problem(4)
    layers = layers_of(4, features, labels)
    given = dict(linear=layers[0], val_features=val, val_labels=val_labels)
    made = run_baseline("average", features, labels, **given)
    expected = average(layers, val, val_labels, SPLIT)
    assert torch.equal(made.linear.weight, expected.linear.weight) and made.chosen == expected.chosen
    both = run_baseline("average", labels=labels, **given, other=layers[1])
    assert torch.equal(both.linear.weight, expected.linear.weight)
    with pytest.raises(ValueError, match="features and labels, or other, must be given for average"):
        run_baseline("average", class_counts=COUNTS, **given)


def test_refusals() -> None:
    features, labels, val, val_labels = problem(5)
    first, second = layers_of(5, features, labels)
    with pytest.raises(ValueError, match="layers must be at least two, got 1"):
        average([first], val, val_labels, SPLIT)
    with pytest.raises(ValueError, match="the weight of each layer"):
        average([first, nn.Linear(4, 6)], val, val_labels, SPLIT)
    with pytest.raises(TypeError, match="linear must have a weight"):
        average([first, nn.ReLU()], val, val_labels, SPLIT)
    with pytest.raises(ValueError, match="select must be one of"):
        average([first, second], val, val_labels, SPLIT, select="last")
