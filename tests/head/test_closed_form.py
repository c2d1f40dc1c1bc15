"""Coefficients by the number of samples alone: an Alpha Net without training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alphaext import AlphaNet, class_counts, class_means, fit_many, repair
from alphaext.baselines import discriminant

COUNTS = torch.tensor([60, 50, 40, 30, 8, 5])
LABELS = torch.arange(6).repeat_interleave(COUNTS)
FEATURES = torch.randn(len(LABELS), 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + LABELS[:, None]
LINEAR = nn.Linear(4, 6, dtype=torch.float64)
MEANS = class_means(FEATURES, LABELS)


def test_head_is_the_composition() -> None:
    head = AlphaNet.from_linear(LINEAR, class_counts=COUNTS, class_means=MEANS, top_k=2, coefficients="closed-form", tau=4.0)
    own = torch.tensor([8 / 12, 5 / 9], dtype=torch.float64)
    torch.testing.assert_close(head.alphas(), torch.stack([own, (1 - own) / 2, (1 - own) / 2], dim=1))
    expected = (head.alphas()[:, :, None] * LINEAR.weight[head.members]).sum(1)
    torch.testing.assert_close(head.fold().weight[4:], expected.detach())
    again = AlphaNet.from_state_dict(head.state_dict())
    assert torch.equal(again.alphas(), head.alphas()) and again.coefficients == "direct"


def test_on_the_plain_discriminant_rows_are_the_composed_ones() -> None:
    plain, composed = discriminant(FEATURES, LABELS, tau=0).linear, discriminant(FEATURES, LABELS, tau=3.0, top_k=2).linear
    head = AlphaNet.from_linear(plain, class_counts=COUNTS, class_means=MEANS, top_k=2, coefficients="closed-form", tau=3.0)
    torch.testing.assert_close(head.fold().weight, composed.weight)
    assert bool((head.fold().bias[4:] < composed.bias[4:]).all())


def test_repair_and_fit_many_train_nothing() -> None:
    made = repair(LINEAR, FEATURES, LABELS, coefficients="closed-form", tau=2.0, progress=False)
    (swept,) = fit_many(LINEAR, FEATURES, LABELS, [dict(coefficients="closed-form", tau=2.0, top_k=4)], progress=False)
    expected = AlphaNet.from_linear(
        LINEAR, class_counts=class_counts(LABELS), class_means=MEANS, top_k=4, coefficients="closed-form", tau=2.0
    )
    assert len(made.result.history) == 1 and torch.equal(made.head.alphas(), expected.alphas())
    assert swept.head is not None and torch.equal(swept.head.alphas(), expected.alphas())


def test_refusals() -> None:
    given = dict(class_means=MEANS, coefficients="closed-form", top_k=2)
    with pytest.raises(ValueError, match="class_counts must be given for coefficients='closed-form'"):
        AlphaNet.from_linear(LINEAR, few_classes=[4, 5], **given)
    with pytest.raises(ValueError, match="closed-form coefficients need rule='clamp' and gamma=1, got 'softmax' and 1.0"):
        AlphaNet.from_linear(LINEAR, class_counts=COUNTS, rule="softmax", **given)
    with pytest.raises(ValueError, match="tau must be"):
        AlphaNet.from_linear(LINEAR, class_counts=COUNTS, tau=-1, **given)
    with pytest.raises(ValueError, match="coefficients must be one of mlp, direct, got 'closed-form'"):
        AlphaNet(LINEAR.weight, LINEAR.bias, torch.tensor([[4, 0]]), None, coefficients="closed-form")
