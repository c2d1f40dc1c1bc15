"""The drop-in head: construction, equality with its fold, state, and the errors of bad input."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import alphaext
from alphaext import AlphaNet, reference

COUNTS = torch.tensor([200, 150, 120, 90, 60, 40, 30, 20, 12, 5])


def make_linear(bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(16, 10, bias=bias, dtype=dtype)


def make_means(seed: int = 1) -> torch.Tensor:
    return torch.randn(10, 16, generator=torch.Generator().manual_seed(seed))


def make_head(linear: nn.Linear | None = None, **options) -> AlphaNet:
    options = {"top_k": 3, "seed": 0, "first_layer": "dense", "gamma": 0.7, "projected_gradient": False, **options}
    return AlphaNet.from_linear(linear or make_linear(), class_counts=COUNTS, class_means=make_means(), **options)


def randomise(head: AlphaNet) -> AlphaNet:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in (head.w2, head.b2):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return head


@pytest.mark.parametrize("rule", reference.RULES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("first_layer", ["dense", "factored"])
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14), (torch.bfloat16, 2e-2)], ids=str
)
def test_fold_equals_head(rule, bias, first_layer, shared, dtype, tolerance):
    head = randomise(make_head(make_linear(bias, dtype), rule=rule, first_layer=first_layer, shared=shared))
    folded = head.fold()
    assert type(folded) is nn.Linear and (folded.bias is None) == (not bias) and folded.weight.dtype == dtype
    features = torch.randn(20, 16, dtype=dtype)
    expected, actual = head(features).detach(), folded(features)
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale * 4)


def test_fold_keeps_base_rows_to_the_bit():
    linear = make_linear()
    folded = randomise(make_head(linear)).fold()
    assert folded.weight[:8].equal(linear.weight[:8]) and folded.bias[:8].equal(linear.bias[:8])
    assert not folded.weight[8:].equal(linear.weight[8:])
    assert not folded.weight.requires_grad


def test_scores_match_reference():
    head = randomise(make_head(make_linear(dtype=torch.float64)))
    features = torch.randn(4, 5, 16, dtype=torch.float64)
    expected = reference.alpha_head(
        features.view(-1, 16),
        head.weight,
        head.bias,
        head.members,
        head.z,
        head.w1,
        head.b1,
        head.w2,
        head.b2,
        gamma=0.7,
    )
    torch.testing.assert_close(head(features), expected.view(4, 5, 10))
    logits = nn.functional.linear(features, head.weight, head.bias)
    torch.testing.assert_close(head.mix_logits(logits), head(features))


def test_few_classes_and_neighbours():
    head = make_head()
    means = make_means().double()
    assert head.few_classes.tolist() == [8, 9]
    for own, *neighbours in head.members.tolist():
        distances = (means[:8] - means[own]).norm(dim=1)
        assert neighbours == distances.argsort()[:3].tolist()


@pytest.mark.parametrize("rule", ["clamp", "softmax"])
@pytest.mark.parametrize("gamma", [0.05, 0.3, 0.6, 0.7, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_identity_start(rule, gamma, dtype):
    """alpha_0 = gamma, equal neighbours, and no class starts on its clamp: every gradient flows."""
    head = make_head(make_linear(dtype=dtype), rule=rule, gamma=gamma)
    expected = torch.tensor([[gamma] + [(1 - gamma) / 3] * 3] * 2, dtype=torch.float64)
    eps = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(head.alphas().double(), expected, rtol=eps, atol=eps)
    if dtype in (torch.float32, torch.float64) or rule == "clamp":
        assert not head.clamped().any()


def test_metric_and_neighbor_seed():
    few, base = torch.tensor([8, 9]), torch.arange(8)
    for options in (dict(metric="cosine"), dict(metric="random"), dict(metric="random", neighbor_seed=3)):
        wanted = dict(metric=options["metric"], seed=options.get("neighbor_seed", 0))
        head = make_head(**options)
        assert head.members.equal(alphaext.head.build_members(make_means(), few, base, 3, **wanted))
        # The seed of the weights draws no neighbours.
        assert make_head(seed=5, **options).members.equal(head.members)
    assert not make_head(metric="random").members.equal(make_head(metric="random", neighbor_seed=3).members)


def test_identity_start_at_gamma_one_is_the_original_classifier():
    linear = make_linear()
    features = torch.randn(6, 16)
    torch.testing.assert_close(make_head(linear, gamma=1.0)(features), linear(features))


def test_default_init_has_the_bounds_of_linear():
    head = make_head(init="default", hidden_dim=40)
    for tensor, fan_in in ((head.w1, head.z.shape[1]), (head.b1, head.z.shape[1]), (head.w2, 40), (head.b2, 40)):
        assert tensor.abs().max() <= fan_in**-0.5
    assert head.w1.abs().max() > 0.9 * head.z.shape[1] ** -0.5


@pytest.mark.parametrize("shared", [False, True])
def test_factored_starts_like_dense(shared):
    dense = make_head(make_linear(dtype=torch.float64), init="default", shared=shared)
    factored = make_head(make_linear(dtype=torch.float64), init="default", shared=shared, first_layer="factored")
    torch.testing.assert_close(factored.preactivation.detach(), reference.preactivations(dense.z, dense.w1, dense.b1).detach())
    features = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(factored(features), dense(features))


@pytest.mark.parametrize("first_layer", ["dense", "factored"])
def test_state_dict_round_trip(first_layer):
    head = randomise(make_head(first_layer=first_layer, gamma=0.6, rule="softmax", projected_gradient=True))
    other = make_head(make_linear(seed=3), first_layer=first_layer, seed=7)
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert all(isinstance(value, torch.Tensor) for value in head.state_dict().values())
    assert (other.gamma, other.rule, other.projected_gradient) == (0.6, "softmax", True)
    features = torch.randn(3, 16)
    assert other(features).equal(head(features))


def test_deepcopy_and_conversion():
    head = randomise(make_head())
    clone = copy.deepcopy(head)
    features = torch.randn(3, 16)
    assert clone(features).equal(head(features))
    double = copy.deepcopy(head).double()
    torch.testing.assert_close(double(features.double()).float(), head(features))
    half = copy.deepcopy(head).to(torch.bfloat16)
    assert half(features.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(features.bfloat16()).float(), head(features), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_factored_in_half_precision_trains_under_autocast(shared):
    linear = make_linear()
    with torch.no_grad():
        linear.weight.mul_(300)  # |z|^2 is then beyond the range of float16
    head = make_head(linear, first_layer="factored", shared=shared)
    scale = head.gradient_scale.clone()
    for half in (copy.deepcopy(head).half(), copy.deepcopy(head).bfloat16()):
        assert half.gradient_scale.dtype == torch.float32 and half.gradient_scale.equal(scale)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (half(torch.randn(4, 16) * 1e-5).square().mean() * 1e-3).backward()
        assert half.preactivation.grad.dtype == half.w2.dtype and half.preactivation.grad.isfinite().all()


def test_fold_and_demo_leave_random_numbers_alone():
    head = make_head()
    before = torch.get_rng_state()
    head.fold()
    assert torch.get_rng_state().equal(before)


def test_construction_ignores_the_default_device():
    expected = make_head()
    linear, means = make_linear(), make_means()
    with torch.device("meta"):
        head = AlphaNet.from_linear(linear, class_counts=COUNTS, class_means=means, top_k=3, seed=0, first_layer="dense")
    assert head.w1.equal(expected.w1) and head.members.equal(expected.members)


def test_head_on_meta():
    head = make_head().to("meta")
    assert head(torch.empty(3, 16, device="meta")).shape == (3, 10)


def test_state_of_the_other_first_layer_is_refused():
    head = make_head(first_layer="factored")
    with pytest.raises((ValueError, RuntimeError), match="first_layer"):
        head.load_state_dict(make_head(gamma=0.5, rule="softmax").state_dict())
    assert (head.gamma, head.rule) == (0.7, "clamp")


def test_drop_in_for_the_last_layer():
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), make_linear())
    model[2] = make_head(model[2])
    images = torch.randn(5, 4)
    model(images).sum().backward()
    assert model[0].weight.grad is not None and model[2].w2.grad is not None and model[2].weight.grad is None
    assert (model[2].in_features, model[2].out_features) == (16, 10)


def test_compiled_head():
    torch._dynamo.reset()
    head = randomise(make_head())
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            features = torch.randn(5, 16)
            torch.testing.assert_close(compiled(features), head(features))
            compiled(features).sum().backward()


def test_trainable_classifier_gets_gradients():
    head = randomise(make_head(make_linear(dtype=torch.float64)))
    head.weight.requires_grad_()
    features = torch.randn(5, 16, dtype=torch.float64)
    (ours,) = torch.autograd.grad(head(features).square().sum(), head.weight)
    arguments = (features, head.weight, head.bias, head.members, head.z, head.w1, head.b1, head.w2, head.b2)
    (theirs,) = torch.autograd.grad(reference.alpha_head(*arguments, gamma=0.7).square().sum(), head.weight)
    torch.testing.assert_close(ours, theirs)


def test_clamped_counts_classes_outside_the_interval():
    head = make_head()
    with torch.no_grad():
        head.b2[0, 0] = 0.9
    assert head.clamped().tolist() == [True, False]
    with torch.no_grad():
        head.b2[1, 0] = -0.1
    assert head.clamped().tolist() == [True, True]


def test_repr_tells_the_configuration():
    assert repr(make_head(shared=True)) == (
        "AlphaNet(in_features=16, out_features=10, num_few=2, top_k=3, gamma=0.7, rule='clamp', hidden_dim=10, "
        "shared=True, first_layer='dense', projected_gradient=False)"
    )


def test_defaults():
    """Those that docs/reference/defaults.md argues for: with them the start is the original classifier, to the bit."""
    linear = make_linear()
    head = AlphaNet.from_linear(linear, class_counts=COUNTS, class_means=make_means(), top_k=3, seed=0)
    assert (head.rule, head.gamma, head.projected_gradient, head.first_layer) == ("clamp", 1.0, True, "factored")
    assert head.alphas()[:, 0].eq(1).all() and head.alphas()[:, 1:].eq(0).all()
    assert head.fold().weight.equal(linear.weight) and not head.clamped().any()


def test_same_seed_same_bits():
    one, two, three = make_head(seed=4), make_head(seed=4), make_head(seed=5)
    assert one.w1.equal(two.w1) and not one.w1.equal(three.w1)
    torch.manual_seed(9)
    four = make_head(seed=None)
    torch.manual_seed(9)
    assert four.w1.equal(make_head(seed=None).w1)


def test_pca_dim():
    assert make_head(pca_dim=None).z.shape == (2, 4 * 16)
    assert make_head(pca_dim=4).z.shape == (2, 4 * 4)
    assert make_head(pca_dim=4).w1.shape == (2, 4, 16)
    assert make_head().z.shape == (2, 4 * 10)


NAN = float("nan")
BAD_HEADS = {
    "has no few class": dict(class_counts=[100] * 10),
    "no few class: the smallest has 100 samples": dict(class_counts=[100] * 9 + [0]),  # without samples it is not few
    "top_k": dict(top_k=9),
    r"gamma must be finite and above 0 and at most 1, got 0": dict(gamma=0.0),
    r"gamma must be finite and above 0 and at most 1, got 1.5": dict(gamma=1.5),
    r"gamma must be finite and above 0 and at most 1, got nan": dict(gamma=NAN),
    "class_means must be finite": dict(class_means=torch.full((10, 16), NAN)),
    r"class_means must have shape \[10, D\], got \[9, 16\]": dict(class_means=torch.randn(9, 16)),
    r"class_counts must have shape \[10\], got \[9\]": dict(class_counts=[100] * 9),
    "give class_counts or few_classes.*neither": dict(class_counts=None),
    "give class_counts or few_classes.*both": dict(few_classes=[1]),
    "class_means must be given": dict(class_means=None),
    "members already names": dict(members=torch.tensor([[0, 1]])),
    "rule must be one of": dict(rule="mean"),
    "init must be one of identity, default, got 'zeros'": dict(init="zeros"),
    "first_layer must be one of dense, factored, got 'lazy'": dict(first_layer="lazy"),
    "hidden_dim must be at least 1, got 0": dict(hidden_dim=0),
    "pca_dim": dict(pca_dim=0),
    "seed must be between 0 and": dict(seed=-1),
    "metric must be one of euclidean, cosine, random, got 'near'": dict(metric="near"),
    "neighbor_seed must be at least 0, got -1": dict(metric="random", neighbor_seed=-1),
}


@pytest.mark.parametrize("message", BAD_HEADS)
def test_bad_heads(message):
    options = {"class_counts": COUNTS, "class_means": make_means(), "top_k": 3, **BAD_HEADS[message]}
    with pytest.raises((ValueError, TypeError), match=message):
        AlphaNet.from_linear(make_linear(), **options)


BAD_MEMBERS = {
    "10": [[9, 0, 10]],
    "-1": [[9, 0, -1]],
    "repeat|twice|once|distinct": [[9, 0, 0]],
    "9": [[9, 0, 1], [9, 2, 3]],
    "K|top_k|shape": [[9]],
}


@pytest.mark.parametrize("message", BAD_MEMBERS)
def test_bad_members(message):
    with pytest.raises((ValueError, TypeError), match=f"members.*({message})"):
        AlphaNet.from_linear(make_linear(), members=torch.tensor(BAD_MEMBERS[message]))


def test_all_classes_few_means_no_base():
    with pytest.raises(ValueError, match="base|candidates"):
        AlphaNet.from_linear(make_linear(), class_counts=[5] * 10, class_means=make_means())


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_bad_classifier(value):
    linear = make_linear()
    with torch.no_grad():
        linear.weight[3, 2] = value
    with pytest.raises(ValueError, match=r"weight must be finite, got (nan|inf) at index \[3, 2\]"):
        make_head(linear)


def test_members_need_a_base_class():
    with pytest.raises(ValueError, match="members makes all 2 classes few"):
        AlphaNet.from_linear(nn.Linear(4, 2), members=[[0, 1], [1, 0]])


@pytest.mark.parametrize("columns", [0, 5])
def test_width_of_z(columns):
    with pytest.raises(ValueError, match=rf"z must have a multiple of K\+1 = 2 columns, got {columns}"):
        AlphaNet(torch.eye(4), None, torch.tensor([[0, 1]]), torch.zeros(1, columns))
    with pytest.raises(TypeError, match="z must be a tensor, got list"):
        AlphaNet(torch.eye(4), None, torch.tensor([[0, 1]]), [[1.0, 2.0]])


def test_not_a_linear_layer():
    with pytest.raises(TypeError, match="linear must have a weight"):
        AlphaNet.from_linear(nn.ReLU(), members=[[1, 0]])


def test_bad_calls():
    head = make_head()
    with pytest.raises(ValueError, match=r"features must have shape \[..., 16\], got \[2, 15\]"):
        head(torch.randn(2, 15))
    with pytest.raises(TypeError, match="features must be floating point, got torch.int64"):
        head(torch.ones(2, 16, dtype=torch.int64))
    with pytest.raises(TypeError, match="features must have the head's dtype, torch.float32, got torch.float64"):
        head(torch.randn(2, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="device"):
        head(torch.randn(2, 16, device="meta"))
    with pytest.raises(ValueError, match=r"logits must have shape \[..., 10\]"):
        head.mix_logits(torch.randn(2, 16))
    assert head(torch.randn(0, 16)).shape == (0, 10)


def test_class_counts_need_not_follow_the_paper():
    head = AlphaNet.from_linear(
        make_linear(), class_counts=COUNTS, class_means=make_means(), few_below=50, many_above=130, top_k=2
    )
    assert head.few_classes.tolist() == [5, 6, 7, 8, 9]
    assert alphaext.split_classes(COUNTS, few_below=50, many_above=130).few.tolist() == [5, 6, 7, 8, 9]
