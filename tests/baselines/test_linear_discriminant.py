"""The discriminant is what it says: shrunk covariance, means pulled toward neighbours', rows composed, biases anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

import alphaext.baselines.linear_discriminant as module
from alphaext import ClassSplit, class_means
from alphaext.baselines import run_baseline
from alphaext.baselines.linear_discriminant import discriminant
from alphaext.head.neighbors import nearest_classes

COUNTS = torch.tensor([60, 50, 40, 30, 8, 5, 3])


def problem(seed: int, width: int = 6, distance: float = 2.0) -> tuple[Tensor, Tensor]:
    """Classes around normal means, samples scattered by a covariance that is no multiple of the identity."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(COUNTS)).repeat_interleave(COUNTS)
    centres = distance * torch.randn(len(COUNTS), width, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(labels), width, generator=generator, dtype=torch.float64)
    return centres[labels] + noise @ torch.diag(torch.linspace(0.5, 2, width, dtype=torch.float64)), labels


def residuals(features: Tensor, labels: Tensor) -> Tensor:
    return features - class_means(features, labels)[labels]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.integers(2, 30))
def test_plain_one_is_scikit_learns(seed: int, width: int) -> None:
    features, labels = problem(seed, width)
    made = discriminant(features, labels, tau=0)
    assert made.shrinkage == pytest.approx(ledoit_wolf_shrinkage(residuals(features, labels).numpy(), assume_centered=True))
    scatter = residuals(features, labels)
    covariance = scatter.t() @ scatter / (len(labels) - len(COUNTS))
    shrunk = (1 - made.shrinkage) * covariance + made.shrinkage * covariance.trace() / width * torch.eye(
        width, dtype=torch.float64
    )

    class Given:
        def fit(self, x: np.ndarray) -> None:
            self.covariance_ = shrunk.numpy()

    theirs = LinearDiscriminantAnalysis(
        solver="lsqr", covariance_estimator=Given(), priors=np.full(len(COUNTS), 1 / len(COUNTS))
    ).fit(features.numpy(), labels.numpy())
    ours = made.linear(features).detach()
    expected = torch.from_numpy(theirs.decision_function(features.numpy()))
    torch.testing.assert_close(ours - ours[:, :1], expected - expected[:, :1])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.floats(0.1, 50), st.integers(1, 4))
def test_rows_are_composed_and_biases_are_not(seed: int, tau: float, top_k: int) -> None:
    """docs/reference/discriminant.md, in float64."""
    features, labels = problem(seed)
    plain, made = discriminant(features, labels, tau=0).linear, discriminant(features, labels, tau=tau, top_k=top_k)
    weight, bias = plain.weight.detach(), plain.bias.detach()
    few = made.members[:, 0]
    assert few.tolist() == [4, 5, 6]
    assert made.alphas[:, 0].tolist() == pytest.approx((COUNTS[4:] / (COUNTS[4:] + tau)).tolist())
    composed = (made.alphas[:, :, None] * weight[made.members]).sum(1)
    torch.testing.assert_close(made.linear.weight[few].detach(), composed)
    assert torch.equal(made.linear.weight[:4], plain.weight[:4]) and torch.equal(made.linear.bias[:4], plain.bias[:4])
    # The composed biases lack half the scatter of the members' means around the composed one.
    means = class_means(features, labels)
    centre = (made.alphas[:, :, None] * means[made.members]).sum(1)
    apart = means[made.members] - centre[:, None]
    rows_apart = weight[made.members] - composed[:, None]
    lacking = 0.5 * (made.alphas * (apart * rows_apart).sum(2)).sum(1)
    torch.testing.assert_close(made.linear.bias[few].detach(), (made.alphas * bias[made.members]).sum(1) + lacking)
    assert bool((lacking > 0).all())


def test_tau_is_that_of_the_classes() -> None:
    """Means scattered as widely around one centre as single samples around a mean are worth one sample: tau is 1."""
    generator = torch.Generator().manual_seed(0)
    classes, width, each = 300, 8, 30
    labels = torch.arange(classes).repeat_interleave(each)
    for scale, expected in ((1.0, 1.0), (0.5, 4.0)):
        centres = scale * torch.randn(classes, width, generator=generator, dtype=torch.float64)
        features = centres[labels] + torch.randn(len(labels), width, generator=generator, dtype=torch.float64)
        everyone = ClassSplit(few=[], medium=range(classes), many=[])
        # All others are neighbours: with few of them, the nearest, a mean lies nearer.
        made = discriminant(features, labels, split=everyone, compose="all", top_k=classes - 1)
        assert made.tau == pytest.approx(expected, rel=0.15)


def test_tau_where_means_are_noise() -> None:
    labels = torch.arange(10).repeat_interleave(25)
    features = torch.randn(250, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert discriminant(features, labels, top_k=9).tau == 100.0


def test_all_means() -> None:
    features, labels = problem(0)
    made = discriminant(features, labels, compose="all", tau=2.0, top_k=2)
    assert made.members[:, 0].tolist() == list(range(7))
    assert torch.equal(made.members[:4, 1:], nearest_classes(class_means(features, labels), [0, 1, 2, 3], range(4), 2))


def test_memory_map_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = problem(1)
    features.half().numpy().tofile(tmp_path / "features")
    mapped = np.memmap(tmp_path / "features", mode="r", dtype=np.float16, shape=tuple(features.shape))
    expected = discriminant(features.half().double(), labels)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 17)
    made = discriminant(mapped, labels.numpy())
    assert type(made.linear) is torch.nn.Linear and made.linear.weight.dtype == torch.float32
    torch.testing.assert_close(made.linear.weight.double(), expected.linear.weight)
    assert made.tau == pytest.approx(expected.tau) and made.shrinkage == pytest.approx(expected.shrinkage)


def test_length_one() -> None:
    features, labels = problem(2)
    unit = torch.nn.functional.normalize(features, dim=1)
    made = discriminant(features, labels, normalize=True)
    assert torch.equal(made.linear.weight, discriminant(unit, labels).linear.weight)
    longer = discriminant(3 * features, labels, normalize=True)
    torch.testing.assert_close(longer.linear.weight, made.linear.weight)


def test_one_base_class_and_none() -> None:
    features, labels = problem(3)
    one = discriminant(features, labels, split=ClassSplit(few=range(1, 7), medium=[0], many=[]))
    assert one.tau == 0 and one.members.shape == (6, 2)
    none = ClassSplit(few=range(7), medium=[], many=[])
    plain = discriminant(features, labels, tau=0)
    assert torch.equal(discriminant(features, labels, split=none).linear.weight, plain.linear.weight)
    with pytest.raises(ValueError, match="tau=2 composes means with those of base classes, and there is none"):
        discriminant(features, labels, split=none, tau=2)


def test_by_name() -> None:
    features, labels = problem(4)
    result = run_baseline("discriminant", features, labels, val_features=features, val_labels=labels, top_k=2)
    made = discriminant(features, labels, top_k=2)
    assert torch.equal(result.linear.weight, made.linear.weight)
    assert result.settings == {"top_k": 2, "compose": "few", "tau": made.tau, "shrinkage": made.shrinkage}
    assert result.accuracy is not None and result.accuracy["all"] > 0.5
    assert run_baseline("discriminant", features, labels, tau=0.0).settings["tau"] == 0


@pytest.mark.parametrize(
    ("features", "labels", "options", "error", "message"),
    [
        (torch.randn(3, 2), [0, 1, 3], {}, ValueError, "no samples of class 2"),
        (torch.randn(4, 2), [0, 0, 1, 1], dict(tau=-1), ValueError, "tau must be"),
        (torch.randn(4, 2), [0, 0, 1, 1], dict(shrinkage=1.5), ValueError, "shrinkage must be"),
        (torch.randn(4, 2), [0, 0, 1, 1], dict(compose="base"), ValueError, "compose must be one of few, all, got 'base'"),
        (torch.randn(4, 2), [0, 0, 1, 1], dict(split="few"), ValueError, "split must be a ClassSplit of 2 classes"),
        (torch.ones(4, 2), [0, 0, 1, 1], {}, ValueError, "features must scatter within classes"),
        (torch.randn(4, 9), [0, 0, 1, 1], dict(shrinkage=0), ValueError, "shrinkage=0 leaves a covariance .* no inverse"),
        (1e200 * torch.randn(4, 2).double(), [0, 0, 1, 1], {}, ValueError, "finite squares"),
        (torch.tensor([[1.0], [torch.nan]]), [0, 1], {}, ValueError, r"features must be finite, got nan at index \[1, 0\]"),
        (torch.ones(2, 2).long(), [0, 1], {}, TypeError, "features must be floating point"),
    ],
)
def test_refusals(features: Tensor, labels: list[int], options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        discriminant(features, labels, **options)
