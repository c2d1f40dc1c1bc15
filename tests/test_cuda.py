"""What only a GPU can show: launches, streams, graphs, devices, both sides of the crossing point, and ids not looked at."""

from __future__ import annotations

import pytest
import torch
from emulated_gpu import DIRECTORY as EMULATED
from emulated_gpu import GPU
from problems import DTYPES, Problem, assert_close, make_problem, reference_scores

from alphaext import AlphaNet, class_means, fit, fit_many, reference
from alphaext.ops import head as ops

pytestmark = pytest.mark.gpu
# Streams, graphs, profiles and several devices: what an emulated GPU has not got.
real_gpu = pytest.mark.gpu(real=True)

OPTIONS = {"gamma": 0.7, "rule": "clamp"}


def gradients(problem: Problem) -> list[torch.Tensor]:
    inputs = list(problem.floating().values())
    return list(torch.autograd.grad(ops.alpha_head(*problem.tensors(), **OPTIONS).square().sum(), inputs))


def test_imagenet_lt_size():
    problem = make_problem(
        batch=64, num_classes=1000, num_few=136, top_k=5, in_features=2048, pca_dim=50, hidden=500,
        dtype=torch.float32, device=GPU,
    )  # fmt: skip
    scores = ops.alpha_head(*problem.tensors(), **OPTIONS)
    expected = reference_scores(problem.map(torch.Tensor.double), **OPTIONS)
    assert_close(scores, expected, torch.float32, "scores", factor=5)


def test_same_bits_every_time():
    problem = make_problem(batch=33, num_classes=90, num_few=20, top_k=4, dtype=torch.float32, device=GPU)
    first = gradients(problem.requires_grad())
    for _ in range(3):
        for one, two in zip(first, gradients(problem.requires_grad()), strict=True):
            assert one.equal(two)


@real_gpu
def test_uses_the_current_stream():
    problem = make_problem(batch=64, num_classes=500, num_few=60, dtype=torch.float32, device=GPU)
    expected = ops.alpha_head(*problem.tensors(), **OPTIONS)
    stream = torch.cuda.Stream()
    late = torch.empty_like(problem.input)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(problem.input)
        scores = ops.alpha_head(late, *problem.tensors()[1:], **OPTIONS)
    stream.synchronize()
    torch.testing.assert_close(scores, expected)


@real_gpu
def test_cuda_graph():
    head = AlphaNet.from_linear(torch.nn.Linear(32, 20, device=GPU), members=[[19, 0, 1], [18, 2, 3]], seed=0)
    features = torch.randn(8, 32, device=GPU)

    def step() -> None:
        head.zero_grad(set_to_none=False)
        head(features).square().sum().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    features.copy_(torch.randn(8, 32))
    graph.replay()
    replayed = head.w2.grad.clone()
    step()
    torch.testing.assert_close(replayed, head.w2.grad)


def test_ids_out_of_range_give_nan_in_their_column_only():
    problem = make_problem(device=GPU, num_few=3)
    members = problem.members.clone()
    members[1, 2] = 10_000
    scores = ops.alpha_head(*problem.tensors()[:3], members, *problem.tensors()[4:], **OPTIONS)
    column = int(members[1, 0])
    assert scores[:, column].isnan().all()
    others = [c for c in range(scores.shape[1]) if c != column]
    assert scores[:, others].isfinite().all()


@real_gpu
def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    problem = make_problem(device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert_close(ops.alpha_head(*problem.tensors(), **OPTIONS), reference_scores(problem, **OPTIONS), torch.float64, "scores")
    assert torch.cuda.current_device() == 0


@real_gpu
def test_mixed_devices():
    problem = make_problem(device=GPU)
    with pytest.raises(RuntimeError, match="w2 must be on the device of input"):
        ops.alpha_head(*problem.tensors()[:7], problem.w2.cpu(), problem.b2, **OPTIONS)


# ---- One launch --------------------------------------------------------------------------------------------------------

# The variable that moves the crossing point: the most scores that a head of one launch may have.
FUSED_SCORES = "ALPHAEXT_FUSED_SCORES"
NEVER, ALWAYS = "0", str(2**62)

# Ragged sizes, and sizes that let every row be read 16 bytes at a time.
SIZES = {
    "ragged": dict(batch=6, num_classes=43, num_few=5, top_k=3, in_features=37, pca_dim=9, hidden=17),
    "aligned": dict(batch=64, num_classes=200, num_few=24, top_k=5, in_features=512, pca_dim=48, hidden=70),
    "long": dict(batch=130, num_classes=130, num_few=7, top_k=2, in_features=264, pca_dim=700, hidden=33),
}


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The same values in a dense tensor that starts one element past an aligned address."""
    return torch.cat([x.new_zeros(1), x.detach().reshape(-1)])[1:].view(x.shape).requires_grad_(x.requires_grad)


def all_results(problem: Problem, gradient: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    inputs = problem.floating()
    scores = ops.alpha_head(*problem.tensors(), **options)
    gradients = torch.autograd.grad(scores, list(inputs.values()), gradient)
    return {"scores": scores, **dict(zip(inputs, gradients, strict=True))}


def reference_results(problem: Problem, gradient: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    """The reference in float64, on the CPU."""
    wide = problem.map(lambda x: x.detach().double().cpu().requires_grad_())
    wide = Problem(**{**wide.__dict__, "members": problem.members.cpu()})
    inputs = wide.floating()
    scores = reference_scores(wide, **options)
    gradients = torch.autograd.grad(scores, list(inputs.values()), gradient.double().cpu(), allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs.values(), strict=True)]
    return {"scores": scores, **dict(zip(inputs, filled, strict=True))}


@pytest.mark.parametrize("crossing", [NEVER, ALWAYS], ids=["products apart", "one launch"])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "shifted"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("first_layer", ["separate", "shared", "factored"])
@pytest.mark.parametrize("from_logits", [False, True], ids=["features", "logits"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_sides_of_the_crossing_point(monkeypatch, dtype, from_logits, first_layer, size, aligned, crossing):
    monkeypatch.setenv(FUSED_SCORES, crossing)
    problem = make_problem(
        dtype=dtype, device=GPU, first_layer=first_layer, from_logits=from_logits,
        shared_second_layer=first_layer == "shared", **SIZES[size],
    ).requires_grad()  # fmt: skip
    if not aligned:
        problem = problem.map(shifted)
    gradient = torch.randn(problem.input.shape[0], SIZES[size]["num_classes"], device=GPU).to(dtype)
    for rule in reference.RULES:
        options = {"gamma": 0.7, "rule": rule}
        actual, expected = all_results(problem, gradient, **options), reference_results(problem, gradient, **options)
        for name, value in expected.items():
            assert_close(actual[name], value, dtype, f"{rule}, {name}", factor=10)


def kernels_of(function) -> list[str]:  # type: ignore[no-untyped-def]
    """Names of everything that the GPU does in a call, copies and fills included."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@real_gpu
@pytest.mark.parametrize("first_layer", ["separate", "shared", "factored"])
@pytest.mark.parametrize("from_logits", [False, True], ids=["features", "logits"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_launch_forward_and_one_backward(monkeypatch, dtype, from_logits, first_layer):
    monkeypatch.delenv(FUSED_SCORES, raising=False)
    problem = make_problem(
        dtype=dtype, device=GPU, first_layer=first_layer, from_logits=from_logits,
        shared_second_layer=first_layer == "shared", **SIZES["aligned"],
    ).requires_grad()  # fmt: skip
    inputs = list(problem.floating().values())
    scores = ops.alpha_head(*problem.tensors(), **OPTIONS)
    gradient = torch.randn_like(scores)
    forward = kernels_of(lambda: ops.alpha_head(*problem.tensors(), **OPTIONS))
    backward = kernels_of(lambda: torch.autograd.grad(scores, inputs, gradient, retain_graph=True))
    assert len(forward) == 1 and "head_forward" in forward[0], forward
    assert len(backward) == 1 and "head_backward" in backward[0], backward


@real_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_left_to_cublas_beyond_the_crossing_point(monkeypatch, dtype):
    problem = make_problem(dtype=dtype, device=GPU, **SIZES["aligned"]).requires_grad()
    scores = SIZES["aligned"]["batch"] * SIZES["aligned"]["num_classes"]
    names = {}
    for limit in (scores - 1, scores):
        monkeypatch.setenv(FUSED_SCORES, str(limit))
        names[limit] = kernels_of(lambda: ops.alpha_head(*problem.tensors(), **OPTIONS))
    assert len(names[scores]) == 1
    ours = [name for name in names[scores - 1] if "alphaext" in name]
    assert len(ours) == 1 and "large_head_forward" in ours[0] and len(names[scores - 1]) > 1


@real_gpu
def test_one_launch_each_way_from_logits_beyond_the_crossing_point(monkeypatch):
    monkeypatch.setenv(FUSED_SCORES, NEVER)
    problem = make_problem(dtype=torch.float32, device=GPU, from_logits=True, **SIZES["aligned"])
    trained = [x.requires_grad_() for name, x in problem.floating().items() if name in ("w1", "b1", "w2", "b2")]
    scores = ops.alpha_head(*problem.tensors(), **OPTIONS)
    gradient = torch.randn_like(scores)
    forward = kernels_of(lambda: ops.alpha_head(*problem.tensors(), **OPTIONS))
    backward = kernels_of(lambda: torch.autograd.grad(scores, trained, gradient, retain_graph=True))
    assert len(forward) == 1 and "large_head_forward" in forward[0], forward
    assert len(backward) == 1 and "large_head_backward" in backward[0], backward


@pytest.mark.skipif(not EMULATED, reason="every real GPU lets the blocks of a launch wait for each other")
@pytest.mark.parametrize("first_layer", ["separate", "shared", "factored"])
@pytest.mark.parametrize("from_logits", [False, True], ids=["features", "logits"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_blocks_cannot_wait_for_each_other(monkeypatch, dtype, from_logits, first_layer):
    """A launch for each stage gives the same bits as one for all."""
    options = dict(dtype=dtype, device=GPU, first_layer=first_layer, from_logits=from_logits, **SIZES["ragged"])
    problem = make_problem(shared_second_layer=first_layer == "shared", **options).requires_grad()
    gradient = torch.randn(6, 43).to(dtype)
    monkeypatch.setenv(FUSED_SCORES, NEVER)
    expected = all_results(problem, gradient, **OPTIONS)
    monkeypatch.setenv(FUSED_SCORES, ALWAYS)
    monkeypatch.setenv("SHIM_COOPERATES", "0")
    for name, value in all_results(problem, gradient, **OPTIONS).items():
        assert value.equal(expected[name]), name


@pytest.mark.parametrize("crossing", [NEVER, ALWAYS], ids=["products apart", "one launch"])
@pytest.mark.parametrize("first_layer", ["separate", "shared", "factored"])
@pytest.mark.parametrize("name", ["batch", "num_few", "hidden", "pca_dim", "in_features"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_of_zero(monkeypatch, dtype, name, first_layer, crossing):
    monkeypatch.setenv(FUSED_SCORES, crossing)
    problem = make_problem(dtype=dtype, device=GPU, first_layer=first_layer, **{**SIZES["ragged"], name: 0}).requires_grad()
    gradient = torch.randn(problem.input.shape[0], 43, device=GPU).to(dtype)
    actual, expected = all_results(problem, gradient, **OPTIONS), reference_results(problem, gradient, **OPTIONS)
    for key, value in expected.items():
        assert_close(actual[key], value, dtype, key, factor=10)


def test_float16_gradients_have_the_range_of_float32_beyond_the_crossing_point(monkeypatch):
    """Under a loss's scale the logits' gradient is larger than any float16, though that of the input is not."""
    problem = make_problem(dtype=torch.float16, device=GPU, **SIZES["ragged"]).map(lambda x: x / 64).requires_grad()
    gradient = torch.full((6, 43), 40_000.0, device=GPU).to(torch.float16)
    for crossing in (NEVER, ALWAYS):
        monkeypatch.setenv(FUSED_SCORES, crossing)
        results = all_results(problem, gradient, gamma=1.0, rule="softmax")
        assert results["input"].isfinite().all() and results["weight"].isfinite().all()


@pytest.mark.parametrize("rule", reference.RULES)
def test_more_members_than_fit_into_shared_memory(rule):
    sizes = dict(batch=3, num_classes=6100, num_few=2, top_k=6050, in_features=4, pca_dim=1, hidden=3)
    problem = make_problem(dtype=torch.float32, device=GPU, first_layer="factored", from_logits=True, **sizes).requires_grad()
    gradient = torch.randn(3, 6100, device=GPU)
    options = {"gamma": 0.7, "rule": rule}
    actual, expected = all_results(problem, gradient, **options), reference_results(problem, gradient, **options)
    for name, value in expected.items():
        assert_close(actual[name], value, torch.float32, name, factor=20)


@real_gpu
@pytest.mark.parametrize("crossing", [NEVER, ALWAYS], ids=["products apart", "one launch"])
@pytest.mark.parametrize("first_layer", ["separate", "shared", "factored"])
def test_graph_of_forward_and_backward(monkeypatch, first_layer, crossing):
    """Captured once, replayed on other inputs: launches whose blocks wait for each other can be captured, too."""
    monkeypatch.setenv(FUSED_SCORES, crossing)
    options = dict(dtype=torch.float32, device=GPU, first_layer=first_layer, **SIZES["aligned"])
    problem = make_problem(**options).requires_grad()
    gradient = torch.randn(64, 200, device=GPU)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            all_results(problem, gradient, **OPTIONS)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = all_results(problem, gradient, **OPTIONS)
    other = make_problem(seed=1, **options)
    with torch.no_grad():
        for name, x in problem.floating().items():
            x.copy_(getattr(other, name))
        problem.members.copy_(other.members)
    for result in captured.values():
        result.detach().fill_(float("nan"))
    graph.replay()
    for name, value in all_results(problem, gradient, **OPTIONS).items():
        assert captured[name].equal(value), name


@real_gpu
@pytest.mark.streams
def test_two_streams_at_once():
    problems = [make_problem(seed=seed, dtype=torch.float32, device=GPU, **SIZES["aligned"]).requires_grad() for seed in (0, 1)]
    gradient = torch.randn(64, 200, device=GPU)
    expected = [all_results(problem, gradient, **OPTIONS) for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results: list[list[dict[str, torch.Tensor]]] = [[], []]
    for _ in range(10):
        for stream, problem, made in zip(streams, problems, results, strict=True):
            with torch.cuda.stream(stream):
                made.append(all_results(problem, gradient, **OPTIONS))
    torch.cuda.synchronize()
    for made, correct in zip(results, expected, strict=True):
        for one in made:
            for name, value in correct.items():
                assert one[name].equal(value), name


@pytest.mark.parametrize("crossing", [NEVER, ALWAYS], ids=["products apart", "one launch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first_layer", ["separate", "shared", "factored"])
def test_a_head_gives_the_same_bits_every_time(monkeypatch, dtype, first_layer, crossing):
    monkeypatch.setenv(FUSED_SCORES, crossing)
    problem = make_problem(dtype=dtype, device=GPU, first_layer=first_layer, **SIZES["long"]).requires_grad()
    gradient = torch.randn(130, 130, device=GPU).to(dtype)
    first = all_results(problem, gradient, **OPTIONS)
    for _ in range(5):
        for name, value in all_results(problem, gradient, **OPTIONS).items():
            assert first[name].equal(value), name


def training_problem() -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12).repeat_interleave(torch.tensor([30] * 8 + [6] * 4))
    features = torch.randn(12, 16, generator=generator)[labels] + torch.randn(len(labels), 16, generator=generator)
    torch.manual_seed(0)
    return torch.nn.Linear(16, 12), features, labels


@real_gpu
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("first_layer", ["dense", "factored"])
def test_fit_on_a_gpu_is_fit_on_the_cpu(first_layer, shared):
    linear, features, labels = training_problem()
    heads = []
    for device in ("cpu", "cuda"):
        head = AlphaNet.from_linear(
            linear.to(device), class_counts=torch.bincount(labels), class_means=class_means(features, labels), seed=0,
            first_layer=first_layer, shared=shared,
        )  # fmt: skip
        result = fit(head, features, labels, val_features=features, val_labels=labels, epochs=4, lr=0.03, select="last")
        assert result.engine == "native" and head.w2.device.type == device
        heads.append((head, result))
    (on_cpu, expected), (on_gpu, result) = heads
    torch.testing.assert_close(on_gpu.alphas().cpu(), on_cpu.alphas(), rtol=1e-3, atol=1e-4)
    for one, two in zip(on_gpu.materialize_first_layer(), on_cpu.materialize_first_layer(), strict=True):
        torch.testing.assert_close(one.cpu(), two, rtol=1e-3, atol=1e-4)
    for name in ("loss", "few", "all"):
        assert result.history[-1][name] == pytest.approx(expected.history[-1][name], abs=1e-2)


@real_gpu
def test_fit_many_on_a_gpu():
    linear, features, labels = training_problem()
    runs = fit_many(linear.cuda(), features, labels, [dict(gamma=g, epochs=3) for g in (0.5, 0.9, 1.0)])
    assert all(run.error == "" and run.head.w2.is_cuda and run.head.alphas().isfinite().all() for run in runs)
