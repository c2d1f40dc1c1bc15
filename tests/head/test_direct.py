"""Heads whose coefficients are learned directly, residuals, and the constant on the few scores."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from alphaext import AlphaNet, class_means, reference
from alphaext.head import residual_directions

MEMBERS = torch.tensor([[4, 0, 2], [5, 1, 0]])


def make_head(dtype=torch.float64, bias=True, directions=3, **options) -> AlphaNet:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    along = {}
    if directions:
        along = {"directions": draw(directions, 5), "direction_bias": draw(directions) if bias else None}
    head = AlphaNet(draw(6, 5), draw(6) if bias else None, MEMBERS, None, coefficients="direct", **along, **options)
    with torch.no_grad():
        head.b2.copy_(draw(2, 3) / 2)
        if head.residual is not None:
            head.residual.copy_(draw(2, directions) / 3)
    return head


def by_reference(head: AlphaNet, features: Tensor) -> Tensor:
    alpha = reference.coefficients(head.b2, head.gamma, head.rule, head.projected_gradient)
    weight, bias = reference.compose(alpha, head.weight, head.bias, head.members, head.rule)
    if head.residual is not None:
        weight, bias = reference.add_residual(weight, bias, head.residual, head.directions, head.direction_bias)
    scores = reference.scores(features, head.weight, head.bias, head.members, weight, bias)
    few = torch.zeros(head.out_features, dtype=scores.dtype)
    few[head.few_classes] = head.few_bias
    return scores + few


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rule", "directions"), [("clamp", 3), ("clamp", 0), ("softmax", 0), ("l1", 0)])
def test_scores_and_gradients_are_those_of_the_reference(bias, rule, directions):
    head = make_head(bias=bias, rule=rule, directions=directions, gamma=0.8)
    head.few_bias = 0.3
    x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parameters = [x, head.b2, *([] if head.residual is None else [head.residual])]
    expected = by_reference(head, x)
    torch.testing.assert_close(head(x), expected)
    for one, two in zip(
        torch.autograd.grad((head(x) * weights).sum(), parameters),
        torch.autograd.grad((expected * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("bias", [True, False])
def test_the_folded_layer_has_the_same_scores(bias):
    head = make_head(bias=bias)
    x = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(head.fold()(x), head(x))
    assert (head.fold().bias is not None) == bias
    head.few_bias = -0.4
    torch.testing.assert_close(head.fold()(x), head(x))
    assert head.fold().bias is not None
    assert torch.equal(head.fold().weight[:4], head.weight[:4])
    if not bias:
        assert torch.equal(head.fold().bias[:4], torch.zeros(4, dtype=torch.float64))


def test_logits_serve_where_there_is_no_residual():
    head = make_head(directions=0)
    head.few_bias = 0.25
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    logits = nn.functional.linear(x, head.weight, head.bias)
    torch.testing.assert_close(head.mix_logits(logits), head(x))
    with pytest.raises(ValueError, match="needs features"):
        make_head().mix_logits(logits)


def test_a_fresh_head_is_the_original_classifier():
    linear = nn.Linear(5, 6)
    means = torch.randn(6, 5)
    head = AlphaNet.from_linear(
        linear, class_counts=[30, 30, 30, 30, 4, 4], class_means=means, top_k=2, coefficients="direct", residual=9
    )
    x = torch.randn(3, 5)
    torch.testing.assert_close(head(x), linear(x))
    assert head.num_directions == 6 and head.residual.shape == (2, 6)  # the constant, and min(9, 6 - 1, 5) directions
    assert "coefficients='direct', num_directions=6" in repr(head)
    assert torch.equal(head.outputs().detach(), head.identity_outputs().expand(2, -1))
    without = AlphaNet.from_linear(
        nn.Linear(5, 6, bias=False), members=MEMBERS, class_means=means, coefficients="direct", residual=2
    )
    assert without.num_directions == 2 and without.direction_bias is None


def test_outputs_are_those_of_sub_modules_too():
    z = torch.randn(2, 6, dtype=torch.float64)
    for first_layer in ("dense", "factored"):
        options = {"first_layer": first_layer, "init": "default", "seed": 0}
        head = AlphaNet(torch.eye(6, dtype=torch.float64), None, MEMBERS, z, **options)
        alphas = reference.coefficients(head.outputs(), head.gamma, head.rule)
        torch.testing.assert_close(alphas.detach(), head.alphas())


@pytest.mark.parametrize("bias", [True, False])
def test_a_state_makes_the_same_head(bias):
    head = make_head(torch.float32, bias=bias, gamma=0.9)
    head.few_bias = 0.125
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    again = AlphaNet.from_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(4, 5)
    assert torch.equal(again(x), head(x)) and again.few_bias == 0.125 and again.coefficients == "direct"
    with pytest.raises((ValueError, RuntimeError)):
        AlphaNet(torch.eye(6), None, MEMBERS, torch.randn(2, 6)).load_state_dict(
            make_head(torch.float32, False, 0).state_dict()
        )


def test_a_head_moves_with_its_directions():
    head = make_head().to(torch.float32)
    assert head.directions.dtype == head.residual.dtype == torch.float32
    x = torch.randn(3, 5)
    torch.testing.assert_close(head.fold()(x), head(x))


def test_bad_heads_are_refused():
    weight, bias, directions = torch.eye(6), torch.zeros(6), torch.ones(2, 6)
    z = torch.zeros(2, 6)

    def make(*arguments, message, error=ValueError, **options):
        with pytest.raises(error, match=message):
            AlphaNet(*arguments, **options)

    direct = {"coefficients": "direct"}
    make(weight, bias, MEMBERS, z, message="to which z could apply", **direct)
    make(weight, bias, MEMBERS, None, message="hidden_dim", hidden_dim=4, **direct)
    make(weight, bias, MEMBERS, None, message="shared", shared=True, **direct)
    make(weight, bias, MEMBERS, None, message="init", init="default", **direct)
    make(weight, bias, MEMBERS, None, message="first_layer", first_layer="dense", **direct)
    make(weight, bias, MEMBERS, None, message="z must be a tensor", error=TypeError)
    make(weight, bias, MEMBERS, None, message="coefficients must be one of mlp, direct, got 'none'", coefficients="none")
    make(weight, None, MEMBERS, z, message="a residual needs coefficients='direct'", directions=directions)
    make(weight, None, MEMBERS, None, message="rule='clamp'", directions=directions, rule="softmax", **direct)
    make(weight, bias, MEMBERS, None, message="direction_bias must be given", directions=directions, **direct)
    make(weight, None, MEMBERS, None, message="goes with directions", direction_bias=torch.ones(2), **direct)
    make(weight, None, MEMBERS, None, message=r"directions must have shape", directions=torch.ones(2, 5), **direct)
    make(weight, None, MEMBERS, None, message="at least one row", directions=torch.ones(0, 6), **direct)
    make(
        weight, None, MEMBERS, None, message="directions must be a tensor, got list", error=TypeError, directions=[1], **direct
    )
    make(weight, None, MEMBERS, None, message="directions must have shape", directions=torch.tensor(1.0), **direct)
    make(weight, None, torch.tensor(1), None, message="members", **direct)
    make(weight, None, MEMBERS, None, message="dtype", error=TypeError, directions=directions.double(), **direct)
    make(weight, None, MEMBERS, None, message="finite", directions=directions * torch.inf, **direct)
    with pytest.raises(ValueError, match="class_means must be given for a residual"):
        AlphaNet.from_linear(nn.Linear(6, 6), members=MEMBERS, coefficients="direct", residual=2)
    options = dict(members=MEMBERS, class_means=torch.randn(6, 6), coefficients="direct", residual=2, directions=directions)
    with pytest.raises(ValueError, match="give one of them"):
        AlphaNet.from_linear(nn.Linear(6, 6, bias=False), **options)
    with pytest.raises(ValueError, match="has no first layer"):
        make_head().materialize_first_layer()


def test_directions_are_principal_and_as_long_as_a_row():
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(60, 4, generator=generator) * torch.tensor([3.0, 0.1, 1.0, 0.01])
    means = class_means(features, torch.arange(60) % 6)
    weight = torch.randn(6, 4, generator=generator)
    directions, bias = residual_directions(weight, means, 2)
    length = weight.norm(dim=1).mean()
    assert torch.equal(directions[0], torch.zeros(4)) and bias[0] == pytest.approx(float(length))
    torch.testing.assert_close(directions[1:].norm(dim=1), length.expand(2))
    assert abs(float(directions[1] @ directions[2])) < 1e-5
    assert directions[1].abs().argmax() == 0 and directions[2].abs().argmax() == 2
    # Along a direction the mean of all class means keeps its score.
    torch.testing.assert_close(directions[1:] @ means.mean(dim=0), -bias[1:])
    more, _ = residual_directions(weight, means, 99)
    assert more.shape == (5, 4) and torch.equal(more[:3], directions)
    with pytest.raises(ValueError, match="shape of weight"):
        residual_directions(weight[:5], means, 2)
    with pytest.raises(ValueError, match="count"):
        residual_directions(weight, means, 0)
