"""What only a GPU can show: streams, graphs, devices, and ids that are not looked at."""

from __future__ import annotations

import pytest
import torch
from problems import Problem, assert_close, make_problem, reference_scores

from alphaext import AlphaNet, ops

pytestmark = pytest.mark.gpu

OPTIONS = {"gamma": 0.7, "rule": "clamp"}


def gradients(problem: Problem) -> list[torch.Tensor]:
    inputs = list(problem.floating().values())
    return list(torch.autograd.grad(ops.alpha_head(*problem.tensors(), **OPTIONS).square().sum(), inputs))


def test_imagenet_lt_size():
    problem = make_problem(
        batch=64, num_classes=1000, num_few=136, top_k=5, in_features=2048, pca_dim=50, hidden=500,
        dtype=torch.float32, device="cuda",
    )  # fmt: skip
    scores = ops.alpha_head(*problem.tensors(), **OPTIONS)
    expected = reference_scores(problem.map(torch.Tensor.double), **OPTIONS)
    assert_close(scores, expected, torch.float32, "scores", factor=5)


def test_same_bits_every_time():
    problem = make_problem(batch=33, num_classes=90, num_few=20, top_k=4, dtype=torch.float32, device="cuda")
    first = gradients(problem.requires_grad())
    for _ in range(3):
        for one, two in zip(first, gradients(problem.requires_grad()), strict=True):
            assert one.equal(two)


def test_uses_the_current_stream():
    problem = make_problem(batch=64, num_classes=500, num_few=60, dtype=torch.float32, device="cuda")
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


def test_cuda_graph():
    head = AlphaNet.from_linear(torch.nn.Linear(32, 20, device="cuda"), members=[[19, 0, 1], [18, 2, 3]], seed=0)
    features = torch.randn(8, 32, device="cuda")

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
    problem = make_problem(device="cuda", num_few=3)
    members = problem.members.clone()
    members[1, 2] = 10_000
    scores = ops.alpha_head(*problem.tensors()[:3], members, *problem.tensors()[4:], **OPTIONS)
    column = int(members[1, 0])
    assert scores[:, column].isnan().all()
    others = [c for c in range(scores.shape[1]) if c != column]
    assert scores[:, others].isfinite().all()


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    problem = make_problem(device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert_close(ops.alpha_head(*problem.tensors(), **OPTIONS), reference_scores(problem, **OPTIONS), torch.float64, "scores")
    assert torch.cuda.current_device() == 0


def test_mixed_devices():
    problem = make_problem(device="cuda")
    with pytest.raises(RuntimeError, match="w2 must be on the device of input"):
        ops.alpha_head(*problem.tensors()[:7], problem.w2.cpu(), problem.b2, **OPTIONS)
