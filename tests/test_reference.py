"""The reference against numbers computed by hand and against the paper's Table 3."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaext import reference

# Table 3 of the paper: coefficients of NN1 .. NN5 and of the original classifier, gamma = 0.7, K = 5.
TABLE_3 = [
    ([0.2941, 0.0600, 0.0600, 0.0600, 0.0600], 0.7000),
    ([0.1672, 0.1326, 0.0600, 0.0600, 0.0600], 0.6996),
    ([0.0600, 0.2995, 0.0600, 0.0600, 0.0600], 0.7000),
    ([0.0600, 0.0600, 0.1534, 0.1458, 0.0600], 0.7000),
    ([0.1081, 0.0600, 0.2358, 0.0600, 0.0600], 0.6560),
    ([0.0600, 0.0600, 0.0600, 0.1760, 0.1238], 0.7000),
    ([0.0600, 0.0600, 0.0600, 0.2997, 0.0600], 0.7000),
]


@pytest.mark.parametrize(("neighbours", "own"), TABLE_3)
def test_table_3_rows_are_clamped_softmaxes(neighbours, own):
    """Each printed row is `softmax`, then two one-sided clamps: what is not on the floor sums to 1 with alpha_0."""
    floor = (1 - 0.7) / 5
    free = [a for a in neighbours if a > floor + 1e-9]
    # Where alpha_0 is on the ceiling p_0 may be larger than printed, where neighbours are on the floor p_k may be smaller.
    assert 0.993 < own + sum(free) < 1.0005
    small = (1 - own - sum(free)) / (5 - len(free))
    p = torch.tensor([[own, *(a if a > floor + 1e-9 else max(small, 1e-9) for a in neighbours)]], dtype=torch.float64)
    alpha = reference.coefficients(p.log(), gamma=0.7, rule="softmax")
    torch.testing.assert_close(alpha[0], torch.tensor([own, *neighbours], dtype=torch.float64), rtol=0, atol=5e-4)


def test_clamp_by_hand():
    raw = torch.tensor([[0.5, -2.0, 3.0], [0.9, 0.0, 0.1], [-0.4, 1.0, 1.0]], dtype=torch.float64)
    alpha = reference.coefficients(raw, gamma=0.7, rule="clamp")
    assert alpha[:, 1:].equal(raw[:, 1:])
    assert alpha[:, 0].tolist() == [0.5, 0.7, reference.ALPHA_FLOOR]


def test_softmax_by_hand():
    raw = torch.tensor([[0.9, 0.06, 0.04], [0.2, 0.5, 0.3]], dtype=torch.float64).log()
    alpha = reference.coefficients(raw, gamma=0.7, rule="softmax")
    torch.testing.assert_close(alpha, torch.tensor([[0.7, 0.15, 0.15], [0.2, 0.5, 0.3]], dtype=torch.float64))


def test_softmax_floor_above_ceiling():
    """gamma < 1/(K+1): the floor (1 - gamma)/K is above the ceiling gamma; both hold, each on its own coefficients."""
    alpha = reference.coefficients(torch.zeros(1, 3, dtype=torch.float64), gamma=0.1, rule="softmax")
    torch.testing.assert_close(alpha, torch.tensor([[0.1, 0.45, 0.45]], dtype=torch.float64))


def test_l1_by_hand():
    raw = torch.tensor([[7.0, 1.0, -3.0], [7.0, 0.0, 0.0]])
    assert reference.coefficients(raw, gamma=0.7, rule="l1").tolist() == [[1.0, 0.25, -0.75], [1.0, 0.0, 0.0]]


def test_unknown_rule():
    with pytest.raises(ValueError, match="rule must be one of clamp, softmax, l1, got 'mean'"):
        reference.coefficients(torch.zeros(1, 2), gamma=0.7, rule="mean")


def test_projected_gradient_passes_only_back_inside():
    raw = torch.tensor([[0.9, 0.0], [0.9, 0.0], [-0.1, 0.0], [-0.1, 0.0], [0.3, 0.0]], requires_grad=True)
    alpha = reference.coefficients(raw, gamma=0.7, rule="clamp", projected_gradient=True)
    # Descent moves against the gradient: above the interval only a positive gradient points back, below only a negative.
    gradient = torch.tensor([[1.0, 0], [-1.0, 0], [1.0, 0], [-1.0, 0], [-1.0, 0]])
    (out,) = torch.autograd.grad(alpha, raw, gradient)
    assert out[:, 0].tolist() == [1.0, 0.0, 0.0, -1.0, -1.0]


def test_whole_head_by_hand():
    """Two features, three classes, class 2 composed of itself and class 0, one hidden unit."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    bias = torch.tensor([0.5, -0.5, 1.0], dtype=torch.float64)
    members = torch.tensor([[2, 0]])
    z = torch.tensor([[2.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    w1 = torch.tensor([[[0.1, 0.1, 0.2, 0.0]]], dtype=torch.float64)
    b1 = torch.tensor([[0.4]], dtype=torch.float64)
    w2 = torch.tensor([[[0.5], [-0.25]]], dtype=torch.float64)
    b2 = torch.tensor([[0.1, 0.5]], dtype=torch.float64)
    # Pre-activation 0.1*2 + 0.1*2 + 0.2*1 + 0.4 = 1; raw = (0.6, 0.25); alpha = (0.6, 0.25) under gamma 0.7.
    # U = 0.6 (2, 2) + 0.25 (1, 0) = (1.45, 1.2); t = 0.6 * 1 + 0.25 * 0.5 = 0.725.
    features = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    scores = reference.alpha_head(features, weight, bias, members, z, w1, b1, w2, b2, gamma=0.7)
    # Base: 1 + 0.5 and 2 - 0.5; few: 1.45 + 2.4 + 0.725.
    torch.testing.assert_close(scores, torch.tensor([[1.5, 1.5, 4.575]], dtype=torch.float64))
    # With gamma 0.5: alpha = (0.5, 0.25), U = (1.25, 1), t = 0.625.
    scores = reference.alpha_head(features, weight, bias, members, z, w1, b1, w2, b2, gamma=0.5)
    torch.testing.assert_close(scores, torch.tensor([[1.5, 1.5, 3.875]], dtype=torch.float64))
    # l1: alpha = (1, 1), U = (3, 2), own bias only.
    scores = reference.alpha_head(features, weight, bias, members, z, w1, b1, w2, b2, gamma=0.5, rule="l1")
    torch.testing.assert_close(scores, torch.tensor([[1.5, 1.5, 8.0]], dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(
    rule=st.sampled_from(reference.RULES),
    seed=st.integers(0, 1000),
    bias=st.booleans(),
    top_k=st.integers(1, 5),
)
def test_scores_are_mixes_of_original_logits(rule, seed, bias, top_k):
    """docs/reference/exactness.md (a): the composed classifier's scores are sparse mixes of the original ones."""
    torch.manual_seed(seed)
    weight, b = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, dtype=torch.float64) if bias else None
    members = torch.stack([torch.randperm(7)[:top_k] + 2 for _ in range(2)])
    members = torch.cat([torch.tensor([[0], [1]]), members], dim=1)
    alpha = reference.coefficients(torch.randn(2, top_k + 1, dtype=torch.float64), 0.6, rule)
    features = torch.randn(5, 6, dtype=torch.float64)
    composed = reference.compose(alpha, weight, b, members, rule)
    direct = reference.scores(features, weight, b, members, *composed)
    logits = torch.nn.functional.linear(features, weight, b)
    torch.testing.assert_close(reference.mix_logits(logits, members, alpha, b, rule), direct)
    # (b): base columns never change.
    assert direct[:, 2:].equal(logits[:, 2:])
