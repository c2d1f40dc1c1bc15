"""The nearest class mean as a linear layer answers as a search for the nearest mean does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import alphaext.head.neighbors
from alphaext.baselines.nearest_mean import ncm


def problem(
    seed: int, num_classes: int = 6, width: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Training features, their labels, and queries of all lengths."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(num_classes), torch.randint(num_classes, (60,), generator=generator)])
    centres = torch.randn(num_classes, width, generator=generator, dtype=torch.float64) + 1
    features = centres[labels] + torch.randn(len(labels), width, generator=generator, dtype=torch.float64)
    queries = (
        torch.randn(300, width, generator=generator, dtype=torch.float64)
        * torch.logspace(-2, 2, 300, dtype=torch.float64)[:, None]
    )
    return features.to(dtype), labels, queries


def means_of(features: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([features[labels == c].mean(0) for c in range(int(labels.max()) + 1)])


def cosines(queries: Tensor, means: Tensor) -> Tensor:
    return torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(means, dim=1).t()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.booleans(), st.booleans())
def test_cosine_answers_as_a_search_by_angle(seed: int, center: bool, normalize: bool) -> None:
    features, labels, queries = problem(seed)
    linear = ncm(features, labels, center=center, normalize=normalize)
    origin = features.mean(0) if center else torch.zeros(features.shape[1], dtype=torch.float64)
    shifted = features - origin
    if normalize:
        shifted = torch.nn.functional.normalize(shifted, dim=1)
    means = means_of(shifted, labels)
    assert torch.equal(linear(queries).argmax(1), cosines(queries - origin, means).argmax(1))
    assert (linear.bias is None) == (not center)
    torch.testing.assert_close(linear.weight.norm(dim=1).detach(), torch.ones(6, dtype=torch.float64))
    # "The Euclidean distance computed on L2 normalized mean features" is the same classifier.
    distances = torch.cdist(queries - origin, torch.nn.functional.normalize(means, dim=1))
    assert torch.equal(linear(queries).argmax(1), distances.argmin(1))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32))
def test_euclidean_answers_as_a_search_by_distance(seed: int) -> None:
    features, labels, queries = problem(seed)
    linear = ncm(features, labels, metric="euclidean")
    distances = (queries[:, None] - means_of(features, labels)[None]).norm(dim=2)
    assert torch.equal(linear(queries).argmax(1), distances.argmin(1))


@pytest.mark.parametrize("options", [{}, dict(center=True, normalize=True), dict(metric="euclidean")])
def test_half_precision_memory_map_in_blocks(options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, _ = problem(1, dtype=torch.float16)
    features.numpy().tofile(tmp_path / "features")
    mapped = np.memmap(tmp_path / "features", mode="r", dtype=np.float16, shape=tuple(features.shape))
    monkeypatch.setattr(alphaext.classes, "_BLOCK_ELEMENTS", 17)
    linear, expected = ncm(mapped, labels.numpy(), **options), ncm(features.float(), labels, **options)
    assert type(linear) is torch.nn.Linear and linear.weight.dtype == torch.float32
    assert linear.weight.equal(expected.weight)
    assert linear.bias is None or linear.bias.equal(expected.bias)


def test_device_and_random_numbers_are_left_alone(device: str) -> None:
    features, labels, _ = problem(1, dtype=torch.float32)
    state = torch.random.get_rng_state()
    linear = ncm(features.to(device), labels.to(device), center=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert linear.weight.device.type == device and linear.weight.requires_grad
    assert linear.weight.cpu().equal(ncm(features, labels, center=True).weight)


def test_lengths_neither_overflow_nor_vanish() -> None:
    features = torch.tensor([[1e300, 0.0], [3e300, 4e300], [5e-324, 0.0], [0.0, 0.0]], dtype=torch.float64)
    weight = ncm(features, [0, 1, 2, 2], normalize=True).weight.detach()
    torch.testing.assert_close(weight, torch.tensor([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("features", "labels", "options", "error", "message"),
    [
        (torch.ones(3, 2), [0, 1, 3], {}, ValueError, "no samples of class 2"),
        (torch.ones(2, 2), [0, 1], dict(num_classes=3), ValueError, "no samples of class 2"),
        (
            torch.tensor([[1.0], [0.0], [-1.0], [1.0]]),
            [0, 1, 2, 2],
            {},
            ValueError,
            "other than zero in each class .* class 1, 2$",
        ),
        (torch.ones(2, 2), [0, 1], dict(center=True), ValueError, "other than that over all samples .* class 0, 1$"),
        (
            torch.ones(2, 2),
            [0, 1],
            dict(metric="manhattan"),
            ValueError,
            "metric must be one of cosine, euclidean, got 'manhattan'",
        ),
        (
            torch.ones(2, 2),
            [0, 1],
            dict(metric="euclidean", center=True),
            ValueError,
            "center and normalize go with metric='cosine'",
        ),
        (torch.ones(2, 2), [0, 1], dict(metric="euclidean", normalize=True), ValueError, "no linear layer gives them"),
        (torch.tensor([[1.0], [torch.nan]]), [0, 1], {}, ValueError, r"features must be finite, got nan at index \[1, 0\]"),
        (torch.ones(2, 2).long(), [0, 1], {}, TypeError, "features must be floating point"),
    ],
)
def test_refusals(features: Tensor, labels: list[int], options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ncm(features, labels, **options)
