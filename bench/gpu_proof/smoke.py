"""Every operator, forward and backward, at small sizes, against the reference; the sanitizers watch the same cases.

All dtypes, rules and forms of the layers, ragged sizes, arrays that start unaligned or are not dense, several blocks a kernel.
A name holds what the sanitizers choose by: the dtype, "one launch" or "products apart".
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import test_cuda_training as training  # of tests/, which __main__.py puts on the path
import torch
from problems import DTYPES, Problem, assert_close, make_problem, reference_scores
from torch import Tensor

from alphaext import reference
from alphaext.ops import head as ops
from gpu_proof.parts import Part

# The operators that the cases below run; a test holds this against those that have CUDA kernels.
COVERED = {"head", "head_backward", "trains_on", "train_epoch", "validate", "train_epoch_many", "validate_many"}


# The variable that moves the crossing point: the most scores of a head that goes in one launch.
FUSED_SCORES = "ALPHAEXT_FUSED_SCORES"


@dataclass(frozen=True)
class Case:
    """One problem and how the head is to treat it."""

    name: str
    dtype: torch.dtype
    rule: str = "clamp"
    layout: str = "dense"
    projected_gradient: bool = False
    products_apart: bool = False  # as beyond the crossing point
    sizes: dict[str, Any] = field(default_factory=dict)


def cases() -> Iterator[Case]:
    """All cases: small ones in every combination, larger ones where a size changes the path that a kernel takes."""
    for dtype, rule, first_layer, from_logits in itertools.product(
        DTYPES, reference.RULES, ("separate", "shared", "factored"), (False, True)
    ):
        sizes = {"first_layer": first_layer, "from_logits": from_logits, "batch": 6, "pca_dim": 9, "hidden": 17}
        yield Case("small", dtype, rule, sizes=sizes)
    several_blocks = {"batch": 33, "num_classes": 90, "num_few": 20, "top_k": 4, "pca_dim": 16, "hidden": 70}
    aligned = {"batch": 8, "num_classes": 64, "num_few": 8, "top_k": 3, "pca_dim": 16, "hidden": 64, "in_features": 64}
    for dtype, products_apart in itertools.product(DTYPES, (False, True)):
        make = partial(Case, dtype=dtype, products_apart=products_apart)
        yield make("several blocks", sizes=several_blocks)
        yield make("several blocks, factored", sizes={**several_blocks, "first_layer": "factored"})
        yield make("several blocks, shared", rule="l1", sizes={**several_blocks, "first_layer": "shared"})
        yield make("aligned", rule="softmax", sizes=aligned)
        for layout in ("transposed", "sliced", "offset"):
            yield make("strided", layout=layout, sizes={"batch": 6, "pca_dim": 8, "hidden": 16})
            yield make("strided", layout=layout, sizes={**aligned, "from_logits": True})
    for rule in reference.RULES:
        yield Case("no bias", torch.float32, rule, sizes={"bias": False})
        yield Case("shared second layer", torch.float32, rule, sizes={"shared_second_layer": True, "num_few": 4})
        yield Case("projected", torch.float32, rule, projected_gradient=True)
        yield Case("one of each", torch.float32, rule, sizes={"batch": 1, "num_few": 1, "top_k": 1, "pca_dim": 1, "hidden": 1})
    yield Case("no samples", torch.float32, sizes={"batch": 0})
    yield Case("no few classes", torch.float32, sizes={"num_few": 0})


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        padded = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype, device=x.device)
        padded[..., 1::2] = x
        return padded[..., 1::2]
    if layout == "offset":  # dense, but not aligned
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    return x


def check(case: Case, device: str) -> None:
    """Scores and every gradient against the reference, in float64 on the CPU: there nothing of ours runs."""
    before = os.environ.pop(FUSED_SCORES, None)
    if case.products_apart:
        os.environ[FUSED_SCORES] = "0"
    try:
        check_results(case, device)
    finally:
        os.environ.pop(FUSED_SCORES, None)
        if before is not None:
            os.environ[FUSED_SCORES] = before


def check_results(case: Case, device: str) -> None:
    options: dict[str, Any] = {"gamma": 0.7, "rule": case.rule, "projected_gradient": case.projected_gradient}
    problem: Problem = make_problem(dtype=case.dtype, **case.sizes)
    theirs = problem.map(Tensor.double).requires_grad()
    moved: dict[str, Any] = {name: None if x is None else x.to(device) for name, x in vars(problem).items()}
    ours = Problem(**moved).map(lambda x: laid_out(x, case.layout)).requires_grad()
    tensors: tuple[Any, ...] = ours.tensors()
    scores, expected = ops.alpha_head(*tensors, **options), reference_scores(theirs, **options)
    assert_close(scores, expected, case.dtype, "scores")
    gradient = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs, wanted_inputs = ours.floating(), theirs.floating()
    gradient = gradient.to(case.dtype)
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
        scores, list(inputs.values()), gradient.to(device), allow_unused=True
    )
    wanted: tuple[Tensor | None, ...] = torch.autograd.grad(
        expected, list(wanted_inputs.values()), gradient.double(), allow_unused=True
    )
    for name, actual, correct in zip(inputs, gradients, wanted, strict=True):
        if actual is None:
            assert correct is None, f"no gradient of {name}"
            continue
        correct = torch.zeros_like(wanted_inputs[name]) if correct is None else correct
        assert_close(actual, correct, case.dtype, f"gradient of {name}", factor=4)


def check_training(dtype: torch.dtype, shape: dict[str, Any], device: str) -> None:
    """An epoch of several runs, and of one alone, against the kernels of the CPU."""
    expected = training.make_runs(dtype=dtype, **shape)
    actual, alone = expected.copy(device), expected.copy(device)
    result, expected_result = actual.train(), expected.train()
    training.assert_trained_alike(actual, result, expected, expected_result, dtype)
    torch.testing.assert_close(alone.train_alone(1), result[1])


def check_validation(dtype: torch.dtype, device: str) -> None:
    """Hits of several runs, and of one alone, against the kernels of the CPU."""
    arguments = training.make_validation(3, 150, dtype)
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    expected = torch.ops.alphaext.validate_many(*arguments)
    assert torch.ops.alphaext.validate_many(*moved).cpu().equal(expected)
    assert torch.ops.alphaext.validate(moved[0][1], moved[1][1], *moved[2:]).cpu().equal(expected[1])


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every check by its description: trainings first, whose kernel has most to go wrong."""
    for dtype in (torch.float32, torch.float64):
        for shape in training.SHAPES:
            yield f"training, {dtype}, {shape}", partial(check_training, dtype, shape, device)
        yield f"validation, {dtype}", partial(check_validation, dtype, device)
    for case in cases():
        way = "products apart" if case.products_apart else "one launch"
        text = f"{case.name}, {case.dtype}, {case.rule}, {case.layout}, {way}, {case.sizes}"
        text += ", projected gradient" if case.projected_gradient else ""
        yield text, partial(check, case, device)


def parts(device: str, small: bool) -> Iterator[Part]:
    """Every check, waited for."""

    def checked(work: Callable[[], None]) -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    for text, work in itertools.islice(checks(device), 0, None, 6 if small else 1):
        yield Part(text, partial(checked, work), 15.0)
