"""The fused operator against the reference, and its behaviour inside PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPES, Problem, assert_close, make_problem, reference_scores

from alphaext import reference
from alphaext.ops import head as ops

RULES = reference.RULES


def head(problem: Problem, **options) -> torch.Tensor:
    return ops.alpha_head(*problem.tensors(), **options)


def check_against_reference(problem: Problem, dtype: torch.dtype, **options) -> None:
    """Scores and every gradient, against the reference in float64 on the same inputs."""
    ours, theirs = problem.requires_grad(), problem.map(torch.Tensor.double).requires_grad()
    scores, expected = head(ours, **options), reference_scores(theirs, **options)
    assert scores.dtype == dtype
    assert_close(scores, expected, dtype, "scores")
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(scores.shape, generator=generator, dtype=torch.float64).to(dtype).to(scores.device)
    inputs, reference_inputs = ours.floating(), theirs.floating()
    gradients = torch.autograd.grad(scores, list(inputs.values()), gradient, allow_unused=True)
    wanted = torch.autograd.grad(expected, list(reference_inputs.values()), gradient.double(), allow_unused=True)
    for name, actual, correct in zip(inputs, gradients, wanted, strict=True):
        if correct is None:  # the bias, when the input is logits: the operator reports that as zeros
            correct = torch.zeros_like(reference_inputs[name])
        assert actual is not None and actual.dtype == dtype, name
        assert_close(actual, correct, dtype, f"gradient of {name}", factor=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("first_layer", ["separate", "shared", "factored"])
@pytest.mark.parametrize("from_logits", [False, True], ids=["features", "logits"])
def test_matches_reference(device, dtype, rule, first_layer, from_logits):
    problem = make_problem(
        dtype=dtype, device=device, first_layer=first_layer, from_logits=from_logits, batch=6, pca_dim=9, hidden=17
    )
    check_against_reference(problem, dtype, gamma=0.7, rule=rule)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 9),
    num_few=st.integers(0, 5),
    extra=st.integers(1, 20),
    top_k=st.integers(1, 6),
    in_features=st.integers(1, 40),
    pca_dim=st.integers(1, 40),
    hidden=st.integers(1, 40),
    bias=st.booleans(),
    shared_second_layer=st.booleans(),
    first_layer=st.sampled_from(["separate", "shared", "factored"]),
    from_logits=st.booleans(),
    projected_gradient=st.booleans(),
    rule=st.sampled_from(RULES),
    gamma=st.sampled_from([0.05, 0.3, 0.7, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_matches_reference_everywhere(num_few, extra, top_k, dtype, rule, gamma, projected_gradient, **sizes):
    problem = make_problem(num_classes=num_few + max(extra, top_k), num_few=num_few, top_k=top_k, dtype=dtype, **sizes)
    check_against_reference(problem, dtype, gamma=gamma, rule=rule, projected_gradient=projected_gradient)


def strided(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values in another memory layout."""
    if kind == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "sliced":
        padded = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"), dtype=x.dtype)
        padded[..., 1::2] = x
        return padded[..., 1::2]
    offset = torch.cat([x.new_zeros(1), x.reshape(-1)])
    return offset[1:].view(x.shape)  # dense but not aligned


@pytest.mark.parametrize("kind", ["transposed", "sliced", "offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs(kind, dtype):
    dense = make_problem(dtype=dtype, batch=6)
    other = dense.map(lambda x: strided(x, kind))
    assert_close(head(other, gamma=0.7), head(dense, gamma=0.7), dtype, "scores")


@pytest.mark.parametrize("kind", ["expanded", "transposed", "sum", "cat"])
def test_strided_gradients(kind):
    """Gradients that arrive expanded, transposed or out of a concatenation; gradcheck alone feeds dense ones."""
    problem = make_problem().requires_grad()

    def loss(scores: torch.Tensor) -> torch.Tensor:
        if kind == "expanded":
            return scores.sum()
        if kind == "transposed":
            return (scores.t() * torch.arange(scores.numel()).view(scores.t().shape)).sum()
        if kind == "sum":
            return scores.mean(dim=0).square().sum()
        return torch.cat([scores, scores * 2], dim=1).cumsum(dim=1).square().sum()

    inputs = list(problem.floating().values())
    ours = torch.autograd.grad(loss(head(problem, gamma=0.7)), inputs)
    theirs = torch.autograd.grad(loss(reference_scores(problem, gamma=0.7, rule="clamp")), inputs)
    for actual, correct in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, correct)


def test_expanded_weights():
    """One sub-module's weights expanded over all classes, without a copy by the caller."""
    problem = make_problem(num_few=4)
    one = torch.Tensor.expand_as
    expanded = Problem(**{**problem.__dict__, "w1": one(problem.w1[:1], problem.w1), "w2": one(problem.w2[:1], problem.w2)})
    torch.testing.assert_close(
        head(expanded, gamma=0.7), reference_scores(expanded, gamma=0.7, rule="clamp"), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("needs", [("w2",), ("input",), ("w1", "b2"), ("weight",), ("bias",), ("z",), ("b1",)], ids=str)
@pytest.mark.parametrize("rule", ["clamp", "l1"])
def test_only_the_gradients_asked_for(needs, rule):
    problem = make_problem()
    for name in needs:
        getattr(problem, name).requires_grad_()
    inputs = [getattr(problem, name) for name in needs]
    ours = torch.autograd.grad(head(problem, gamma=0.7, rule=rule).square().sum(), inputs)
    theirs = torch.autograd.grad(reference_scores(problem, gamma=0.7, rule=rule).square().sum(), inputs)
    for actual, correct in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, correct)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("from_logits", [False, True], ids=["features", "logits"])
@pytest.mark.parametrize("first_layer", ["separate", "shared", "factored"])
def test_gradcheck(rule, from_logits, first_layer):
    problem = make_problem(
        from_logits=from_logits, first_layer=first_layer, shared_second_layer=first_layer == "shared"
    ).requires_grad()
    names = list(problem.floating())

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return head(Problem(**{**problem.__dict__, **dict(zip(names, tensors, strict=True))}), gamma=0.7, rule=rule)

    assert torch.autograd.gradcheck(function, tuple(problem.floating().values()))


def test_second_derivative_raises():
    problem = make_problem().requires_grad()
    (gradient,) = torch.autograd.grad(head(problem, gamma=0.7).square().sum(), problem.w2, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        gradient.sum().backward()


@pytest.mark.parametrize("from_logits", [False, True], ids=["features", "logits"])
@pytest.mark.parametrize("first_layer", ["separate", "shared", "factored"])
def test_opcheck(device, from_logits, first_layer):
    problem = make_problem(dtype=torch.float32, device=device, first_layer=first_layer, from_logits=from_logits)
    torch.library.opcheck(torch.ops.alphaext.head, (*problem.requires_grad().tensors(), 0.7, 1, False))
    outputs = torch.ops.alphaext.head(*problem.tensors(), 0.7, 1, False)
    wanted = sum(1 << bit for bit, x in enumerate((*problem.tensors()[:3], *problem.tensors()[4:])) if x is not None)
    arguments = (torch.randn_like(outputs[0]), *problem.tensors(), *outputs[1:], 0.7, 1, False, wanted)
    torch.library.opcheck(torch.ops.alphaext.head_backward, arguments)


def test_compile_fullgraph_without_recompiles():
    torch._dynamo.reset()

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return ops.alpha_head(*tensors, gamma=0.7).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            problem = make_problem(seed=seed).requires_grad()
            inputs = list(problem.floating().values())
            ours = torch.autograd.grad(compiled(*problem.tensors()), inputs)
            theirs = torch.autograd.grad(loss(*problem.tensors()), inputs)
            for actual, correct in zip(ours, theirs, strict=True):
                torch.testing.assert_close(actual, correct)


def test_functional_transforms():
    problem = make_problem()

    def loss(w2: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        return head(Problem(**{**problem.__dict__, "w2": w2, "input": input}), gamma=0.7).square().sum()

    def reference_loss(w2: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        changed = Problem(**{**problem.__dict__, "w2": w2, "input": input})
        return reference_scores(changed, gamma=0.7, rule="clamp").square().sum()

    for ours, theirs in itertools.zip_longest(
        torch.func.grad(loss, (0, 1))(problem.w2, problem.input),
        torch.func.grad(reference_loss, (0, 1))(problem.w2, problem.input),
    ):
        torch.testing.assert_close(ours, theirs)
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))
    expected = torch.func.vmap(torch.func.grad(reference_loss), (None, 0))
    samples = problem.input.unsqueeze(1)
    torch.testing.assert_close(per_sample(problem.w2, samples), expected(problem.w2, samples))


@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_runs_in_the_widest_dtype(input_dtype):
    problem = make_problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = ops.alpha_head(problem.input.to(input_dtype), *problem.tensors()[1:], gamma=0.7)
    rounded = Problem(**{**problem.__dict__, "input": problem.input.to(input_dtype).float()})
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, head(rounded, gamma=0.7))


@pytest.mark.parametrize("direct", [False, True], ids=["alpha_head", "operator"])
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_gradients(input_dtype, direct):
    problem = make_problem(dtype=torch.float32).requires_grad()
    input = problem.input.detach().to(input_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if direct:
            scores = torch.ops.alphaext.head(input, *problem.tensors()[1:], 0.7, 1, False)[0]
        else:
            scores = ops.alpha_head(input, *problem.tensors()[1:], gamma=0.7)
        loss = scores.square().sum()
    ours = torch.autograd.grad(loss, [problem.w2, input])
    rounded = Problem(**{**problem.__dict__, "input": input.detach().float().requires_grad_()})
    theirs = torch.autograd.grad(head(rounded, gamma=0.7).square().sum(), [rounded.w2, rounded.input])
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1].dtype == input_dtype
    torch.testing.assert_close(ours[1], theirs[1].to(input_dtype))


@pytest.mark.parametrize("first_layer", ["separate", "shared", "factored"])
def test_backward_inside_autocast(first_layer):
    """The products of the backward, too, stay in the dtype of the forward."""
    problem = make_problem(dtype=torch.float32, first_layer=first_layer, shared_second_layer=True).requires_grad()
    inputs = list(problem.floating().values())
    theirs = torch.autograd.grad(head(problem, gamma=0.7).square().sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = torch.autograd.grad(head(problem, gamma=0.7).square().sum(), inputs)
    for actual, correct in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, correct)


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("autocast", [False, True])
def test_scaled_gradient_of_the_preactivation(shared, autocast):
    """`b1_scale` multiplies the gradient of b1 alone, in plain autograd and under torch.func alike."""
    problem = make_problem(dtype=torch.float32, first_layer="factored")
    scale = torch.rand(3, 3) if shared else torch.rand(3)

    def loss(b1: torch.Tensor, b1_scale: torch.Tensor | None = None) -> torch.Tensor:
        changed = Problem(**{**problem.__dict__, "b1": b1})
        return head(changed, gamma=0.7, b1_scale=b1_scale).square().sum()

    b1 = problem.b1.clone().requires_grad_()
    (plain,) = torch.autograd.grad(loss(b1), b1)
    expected = scale @ plain if shared else scale.unsqueeze(1) * plain
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        (ours,) = torch.autograd.grad(loss(b1, scale), b1)
        functional = torch.func.grad(loss)(problem.b1, scale)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(functional, expected)


def test_unread_z_has_no_gradient():
    problem = make_problem(first_layer="factored").requires_grad()
    z = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    scores = ops.alpha_head(*problem.tensors()[:4], z, *problem.tensors()[5:], gamma=0.7)
    assert torch.autograd.grad(scores.sum(), [z, problem.w2], allow_unused=True)[0] is None


def test_vmap_over_nothing_is_an_error():
    problem = make_problem()
    with pytest.raises(ValueError, match="vmap over no samples"):
        torch.func.vmap(lambda x: ops.alpha_head(x, *problem.tensors()[1:], gamma=0.7))(torch.zeros(0, 2, 7).double())


def test_same_bits_for_any_number_of_threads():
    problem = make_problem(
        batch=64, num_classes=300, num_few=40, top_k=5, pca_dim=60, hidden=70, in_features=32, dtype=torch.float32
    ).requires_grad()
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            scores = head(problem, gamma=0.7)
            results.append([scores, *torch.autograd.grad(scores.square().sum(), [problem.w1, problem.w2, problem.b2])])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -1e30])
def test_extreme_values_stay_in_their_class(value, rule):
    """A broken sub-module spoils its own column only, and is not hidden by a clamp."""
    problem = make_problem(num_few=3, dtype=torch.float32)
    problem.b2[1, 0] = value
    scores = head(problem, gamma=0.7, rule=rule)
    expected = reference_scores(problem, gamma=0.7, rule=rule)
    torch.testing.assert_close(scores, expected, equal_nan=True)
    others = [c for c in range(11) if c != problem.members[1, 0]]
    assert scores[:, others].isfinite().all()


@pytest.mark.large
def test_more_than_two_to_the_31_elements():
    hidden, inputs = 1024, 2**21 + 8
    w1 = torch.zeros(1, hidden, inputs, dtype=torch.bfloat16)
    w1[0, -1, -1] = 1
    z = torch.zeros(1, inputs, dtype=torch.bfloat16)
    z[0, -1] = 2
    assert w1.numel() > 2**31
    _, preactivation, *_ = torch.ops.alphaext.head(
        torch.zeros(1, 3, dtype=torch.bfloat16),
        None,
        None,
        torch.tensor([[0, 1]]),
        z,
        w1,
        torch.zeros(1, hidden, dtype=torch.bfloat16),
        torch.zeros(1, 2, hidden, dtype=torch.bfloat16),
        torch.zeros(1, 2, dtype=torch.bfloat16),
        0.7,
        1,
        False,
    )
    assert preactivation[0, -1] == 2 and preactivation[0, :-1].abs().max() == 0


BAD_CALLS = {
    "input must be float32": dict(input=torch.zeros(5, 7, dtype=torch.int64)),
    "input must have shape": dict(input=torch.zeros(5, dtype=torch.float64)),
    "weight must have shape": dict(weight=torch.zeros(11, 8, dtype=torch.float64)),
    "weight must have the dtype of input, float64, got float32": dict(weight=torch.zeros(11, 7)),
    "bias must have shape": dict(bias=torch.zeros(12, dtype=torch.float64)),
    "members must be int64, got int32": dict(members=torch.zeros(3, 3, dtype=torch.int32)),
    r"members must have shape \[num_few, top_k \+ 1\]": dict(members=torch.zeros(3, 1, dtype=torch.int64)),
    r"members\[1, 2\] must be in \[0, 11\), got 11": dict(members=torch.tensor([[0, 5, 6], [1, 5, 11], [2, 5, 6]])),
    r"members\[0, 0\] must be in \[0, 11\), got -1": dict(members=torch.tensor([[-1, 5, 6], [1, 5, 6], [2, 5, 6]])),
    "class 0 appears twice": dict(members=torch.tensor([[0, 5, 6], [1, 5, 6], [0, 5, 6]])),
    "z must be given": dict(z=None),
    "z must have shape": dict(z=torch.zeros(2, 12, dtype=torch.float64)),
    "w1 must have shape": dict(w1=torch.zeros(3, 5, 12, dtype=torch.float64)),
    "b1 must have shape": dict(b1=torch.zeros(1, 6, dtype=torch.float64)),
    "w2 must have shape": dict(w2=torch.zeros(3, 2, 6, dtype=torch.float64)),
    "b2 must have shape": dict(b2=torch.zeros(3, 2, dtype=torch.float64)),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_arguments(message):
    arguments = {**make_problem().__dict__, **BAD_CALLS[message]}
    with pytest.raises(RuntimeError, match=message):
        head(Problem(**arguments), gamma=0.7)


@pytest.mark.parametrize("gamma", [0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_bad_gamma(gamma):
    with pytest.raises(RuntimeError, match=r"gamma must be in \(0, 1\]"):
        head(make_problem(), gamma=gamma)


def test_bad_rule():
    with pytest.raises(ValueError, match="rule must be one of clamp, l1, softmax, got 'relu'"):
        head(make_problem(), gamma=0.7, rule="relu")


def test_wrong_device():
    problem = make_problem()
    with pytest.raises((RuntimeError, NotImplementedError)):
        ops.alpha_head(problem.input.to("meta"), *problem.tensors()[1:], gamma=0.7)
