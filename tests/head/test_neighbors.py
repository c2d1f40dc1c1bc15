from __future__ import annotations

import doctest
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import Tensor

import alphaext.head.neighbors
from alphaext.classes import class_means
from alphaext.head.neighbors import (
    build_members,
    check_members,
    nearest_classes,
    neighbor_distances,
    reduce_classifiers,
    submodule_inputs,
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_examples_in_docstrings() -> None:
    results = doctest.testmod(alphaext.head.neighbors)
    assert results.attempted > 0
    assert results.failed == 0


# class_means

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@settings(deadline=None, max_examples=50)
@given(
    num_classes=st.integers(1, 6),
    more=st.integers(0, 40),
    width=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    block=st.integers(1, 60),
    seed=st.integers(0, 2**16),
)
def test_means_against_a_loop(num_classes: int, more: int, width: int, dtype: torch.dtype, block: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(num_classes), torch.randint(num_classes, (more,), generator=generator)])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    features = random(len(labels), width, seed=seed, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alphaext.classes, "_BLOCK_ELEMENTS", block)
        means = class_means(features, labels)
    assert means.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wanted = torch.stack([features[labels == c].double().mean(0) for c in range(num_classes)])
    # float64 sums, rounded once to the result's dtype.
    torch.testing.assert_close(means.double(), wanted, rtol=1e-12 if dtype == torch.float64 else 2**-23, atol=1e-7)


def test_means_do_not_depend_on_blocks_layout_or_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = random(2000, 33), torch.arange(2000) % 7
    means = class_means(features, labels)
    monkeypatch.setattr(alphaext.classes, "_BLOCK_ELEMENTS", 100)
    assert torch.equal(class_means(features, labels), means)
    assert torch.equal(class_means(features.T.contiguous().T, labels), means)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(class_means(features, labels), means)
    finally:
        torch.set_num_threads(threads)


def test_means_are_summed_in_float64() -> None:
    # In float32 the sum sticks at 2**24; in float16 it would overflow.
    features = torch.full((2**15 + 1, 1), 1023.0, dtype=torch.float16)
    assert class_means(features, torch.zeros(2**15 + 1, dtype=torch.int64)).item() == 1023.0
    wide = torch.tensor([[2.0**24]] + [[1.0]] * 8)
    assert class_means(wide, [0] * 9).item() == pytest.approx((2**24 + 8) / 9, rel=2**-24)


@pytest.mark.filterwarnings("error")
def test_means_of_a_read_only_memory_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alphaext.classes, "_BLOCK_ELEMENTS", 64)
    values = random(50, 8).numpy().astype(np.float16)
    values.tofile(tmp_path / "features")
    features = np.memmap(tmp_path / "features", mode="r", dtype=np.float16, shape=(50, 8))
    labels = np.arange(50) % 3
    assert torch.equal(class_means(features, labels), class_means(torch.from_numpy(values), torch.from_numpy(labels)))


def test_means_do_not_carry_a_gradient() -> None:
    assert not class_means(torch.ones(2, 3, requires_grad=True), [0, 1]).requires_grad


def test_device_changes_nothing(device: str) -> None:
    features, labels = random(200, 16, dtype=torch.float32), torch.arange(200) % 20
    few, base = torch.arange(4), torch.arange(4, 20)
    means = class_means(features.to(device), labels.to(device))
    # Ids may stay on the CPU: they are a handful, and splits are made from lists.
    members = build_members(means, few, base)
    reduced = reduce_classifiers(means, 7)
    inputs = submodule_inputs(reduced, members)
    assert {tensor.device.type for tensor in (means, members, reduced, inputs)} == {device}
    on_cpu = class_means(features, labels)
    assert torch.equal(means.cpu(), on_cpu)
    assert torch.equal(members.cpu(), build_members(on_cpu, few, base))
    assert torch.equal(inputs.cpu(), submodule_inputs(reduce_classifiers(on_cpu, 7), members.cpu()))


def not_finite(value: float) -> Tensor:
    features = torch.zeros(4, 3)
    features[2, 1] = value
    return features


@pytest.mark.parametrize(
    ("features", "labels", "num_classes", "error", "message"),
    [
        (torch.ones(4, 3), [0, 1, 2, 3], 3, ValueError, r"labels must be in 0\.\.2, got 3 at index 3"),
        (torch.ones(4, 3), [0, 1, 2], None, ValueError, "one entry a sample, got 4 and 3"),
        (torch.ones(4), [0, 1, 2, 3], None, ValueError, r"features must have shape \[n, D\], got \[4\]"),
        (torch.ones(0, 3), [], None, ValueError, "labels is empty"),
        (torch.ones(4, 3).long(), [0] * 4, None, TypeError, "features must be floating point, got torch.int64"),
        (np.ones((4, 3), dtype=np.int32), [0] * 4, None, TypeError, "features must be floating point, got torch.int32"),
        (torch.ones(4, 3), [0.0] * 4, None, TypeError, "labels must be integers"),
        (torch.ones(4, 3), torch.zeros(4, device="meta"), None, ValueError, "labels is on meta but features is on cpu"),
        (not_finite(torch.nan), [0] * 4, None, ValueError, r"features must be finite, got nan at index \[2, 1\]"),
        (not_finite(-torch.inf), [0] * 4, None, ValueError, r"features must be finite, got -inf at index \[2, 1\]"),
        (torch.full((2, 1), 1.5e308, dtype=torch.float64), [0, 0], None, ValueError, "sum over a class of features"),
    ],
)
def test_means_refuse(features: object, labels: object, num_classes: int | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        class_means(features, labels, num_classes)  # type: ignore[arg-type]


def test_place_of_a_nan_counts_from_the_first_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alphaext.classes, "_BLOCK_ELEMENTS", 3)
    with pytest.raises(ValueError, match=r"got nan at index \[2, 1\]"):
        class_means(not_finite(torch.nan), [0] * 4)


# nearest_classes


def exact_neighbors(means: list[list[float]], target: int, candidates: list[int], top_k: int) -> list[int]:
    def key(candidate: int) -> tuple[Fraction, int]:
        pairs = zip(means[target], means[candidate], strict=True)
        return sum(((Fraction(a) - Fraction(b)) ** 2 for a, b in pairs), Fraction(0)), candidate

    return sorted((c for c in candidates if c != target), key=key)[:top_k]


@st.composite
def neighbor_cases(draw: st.DrawFn) -> tuple[list[list[float]], list[int], list[int], int]:
    num_classes, width = draw(st.integers(2, 12)), draw(st.integers(1, 19))
    # A coarse grid is exact in float64 and full of ties; its scale must not matter.
    scale = draw(st.sampled_from([1.0, 2.0**-600, 2.0**600, 2.0**1020]))
    grid = st.integers(-3, 3).map(lambda value: value * scale)
    means = draw(st.lists(st.lists(grid, min_size=width, max_size=width), min_size=num_classes, max_size=num_classes))
    ids = draw(st.permutations(range(num_classes)))
    targets = ids[: draw(st.integers(1, num_classes - 1))]
    candidates = draw(st.permutations(ids if draw(st.booleans()) else ids[len(targets) :]))
    available = len(candidates) - bool(set(targets) & set(candidates))
    return means, targets, candidates, draw(st.integers(1, available))


@settings(deadline=None)
@given(neighbor_cases())
def test_neighbors_against_exact_arithmetic(case: tuple[list[list[float]], list[int], list[int], int]) -> None:
    means, targets, candidates, top_k = case
    found = nearest_classes(torch.tensor(means, dtype=torch.float64), targets, candidates, top_k)
    assert found.dtype == torch.int64
    assert found.tolist() == [exact_neighbors(means, target, candidates, top_k) for target in targets]


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbors_of_random_means_against_brute_force(dtype: torch.dtype) -> None:
    means = random(60, 37, seed=3, dtype=dtype)
    few, base = torch.arange(0, 60, 3), torch.tensor([c for c in range(60) if c % 3])
    distances = (means[few].double()[:, None] - means[base].double()[None]).square().sum(-1)
    wanted = base[distances.argsort(dim=1, stable=True)[:, :7]]
    assert torch.equal(nearest_classes(means, few, base, 7), wanted)


@given(st.integers(1, 70), st.integers(0, 1000), st.floats(0.1, 1e6))
@settings(deadline=None, max_examples=30)
def test_copies_of_a_mean_tie_exactly_far_from_the_origin(width: int, seed: int, offset: float) -> None:
    # |a|^2 + |b|^2 - 2ab would order the copies by rounding errors.
    target, copied, nearer = random(3, width, seed=seed) * 1e-3 + offset
    means = torch.stack([copied, copied, target, target + (copied - target) * 2, copied, nearer * 0 + target])
    found = nearest_classes(means, [2], [5, 4, 3, 1, 0], 5)
    assert found[0, :4].tolist() == [5, 0, 1, 4]


def test_neighbors_take_arrays_and_do_not_depend_on_threads() -> None:
    means = random(300, 64, dtype=torch.float32)
    few, base = np.arange(100), np.arange(100, 300)
    found = nearest_classes(means.numpy(), few, base, 5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(nearest_classes(means, torch.from_numpy(few), torch.from_numpy(base), 5), found)
    finally:
        torch.set_num_threads(threads)


MEANS = torch.arange(8.0).reshape(4, 2)


@pytest.mark.parametrize(
    ("means", "targets", "candidates", "top_k", "error", "message"),
    [
        (MEANS, [0], [1, 2, 3], 0, ValueError, "top_k must be at least 1, got 0"),
        (MEANS, [0], [1, 2, 3], 4, ValueError, "got top_k=4 and 3 candidates"),
        (MEANS, [0], [0, 1, 2, 3], 4, ValueError, "got top_k=4 and 3 candidates"),
        (MEANS, [0], [1, 2, 3], 1.0, TypeError, "top_k must be an integer, got 1.0"),
        (MEANS, [], [1, 2, 3], 1, ValueError, "targets is empty: there are no few classes"),
        (MEANS, [0], [], 1, ValueError, "candidates is empty: there are no base classes"),
        (MEANS, [4], [1], 1, ValueError, r"targets must be in 0\.\.3, got 4 at index 0"),
        (MEANS, [0], [1, -1], 1, ValueError, r"candidates must be in 0\.\.3, got -1 at index 1"),
        (MEANS, [0, 0], [1], 1, ValueError, "targets must name each class once, got class 0"),
        (MEANS, [0], [2, 1, 2], 1, ValueError, "candidates must name each class once, got class 2"),
        (MEANS, [0.0], [1], 1, TypeError, "targets must be integers"),
        (MEANS.long(), [0], [1], 1, TypeError, "class_means must be floating point, got torch.int64"),
        (MEANS[0], [0], [1], 1, ValueError, r"class_means must have shape \[N, D\], got \[2\]"),
        (MEANS.log(), [0], [1], 1, ValueError, r"class_means must be finite, got -inf at index \[0, 0\]"),
    ],
)
def test_neighbors_refuse(
    means: Tensor, targets: list[int], candidates: list[int], top_k: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        nearest_classes(means, targets, candidates, top_k)


def cosine_key(means: list[list[float]], target: int, candidate: int) -> Fraction:
    """Minus the cosine, times its own size: ordered like the cosine distance, and exact."""
    pairs = [(Fraction(a), Fraction(b)) for a, b in zip(means[target], means[candidate], strict=True)]
    dot = sum((a * b for a, b in pairs), Fraction(0))
    lengths = sum((a * a for a, _ in pairs), Fraction(0)) * sum((b * b for _, b in pairs), Fraction(0))
    return -dot * abs(dot) / lengths


@settings(deadline=None, max_examples=50)
@given(neighbor_cases())
def test_cosine_neighbors_against_exact_arithmetic(case: tuple[list[list[float]], list[int], list[int], int]) -> None:
    means, targets, candidates, top_k = case
    # No mean may be zero; an entry of its own makes sure.
    means = [[*row, scale] for row, scale in zip(means, np.abs(means).max(axis=1) + 2.0**-700, strict=True)]
    found = nearest_classes(torch.tensor(means, dtype=torch.float64), targets, candidates, top_k, metric="cosine")
    for target, row in zip(targets, found.tolist(), strict=True):
        assert target not in row and len(set(row)) == top_k and set(row) <= set(candidates)
        exact = sorted(cosine_key(means, target, c) for c in candidates if c != target)[:top_k]
        # Means on one line from 0 tie only to the rounding of their lengths: nearness is compared, not the ids.
        assert [float(cosine_key(means, target, c)) for c in row] == pytest.approx([float(key) for key in exact], abs=1e-13)


def test_cosine_is_not_euclidean_and_lower_ids_win_ties() -> None:
    means = torch.tensor([[1.0, 0.0], [1.0, 0.9], [100.0, 1.0], [200.0, 2.0], [0.0, 3.0]])
    assert nearest_classes(means, [0], [1, 2, 3, 4], 4).tolist() == [[1, 4, 2, 3]]
    assert nearest_classes(means, [0], [4, 3, 2, 1], 4, metric="cosine").tolist() == [[2, 3, 1, 4]]


@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1e300])
def test_cosine_does_not_depend_on_scale(scale: float) -> None:
    means = torch.tensor([[1.0, 0.0], [1.0, 1.0], [3.0, 1.0]], dtype=torch.float64)
    means[1:] *= scale
    assert nearest_classes(means, [0], [1, 2], 2, metric="cosine").tolist() == [[2, 1]]


def test_cosine_of_a_zero_mean_is_refused_where_it_takes_part() -> None:
    means = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    assert nearest_classes(means, [0], [2], 1, metric="cosine").tolist() == [[2]]
    assert nearest_classes(means, [0], [1, 2], 1).tolist() == [[1]]
    for targets, candidates, classes in (([0], [1, 2, 3], "1, 3"), ([3], [0, 2], "3")):
        with pytest.raises(ValueError, match=rf"must not be zero with metric='cosine'.* class {classes}$"):
            nearest_classes(means, targets, candidates, 1, metric="cosine")
    with pytest.raises(ValueError, match="for class 1$"):
        neighbor_distances(means, [[0, 1]], metric="cosine")


@settings(deadline=None, max_examples=50)
@given(st.data(), st.integers(0, 2**63 - 1))
def test_random_neighbors(data: st.DataObject, seed: int) -> None:
    num_classes = data.draw(st.integers(3, 30))
    ids = data.draw(st.permutations(range(num_classes)))
    targets = ids[: data.draw(st.integers(1, num_classes - 2))]
    candidates = ids if data.draw(st.booleans()) else ids[len(targets) :]
    top_k = data.draw(st.integers(1, len(candidates) - 1))
    means = random(num_classes, 2)
    found = nearest_classes(means, targets, candidates, top_k, metric="random", seed=seed)
    assert found.dtype == torch.int64 and found.shape == (len(targets), top_k)
    for target, row in zip(targets, found.tolist(), strict=True):
        assert target not in row and len(set(row)) == top_k and set(row) <= set(candidates)
        # Whoever else is drawn for, in whatever order, and wherever the means are.
        alone = nearest_classes(-means, [target], sorted(candidates), 1, metric="random", seed=seed)
        assert alone[0, 0] == row[0]


def test_random_neighbors_are_drawn_alike_and_differ_by_seed_and_class() -> None:
    means, few, base = random(60, 3), torch.arange(20), torch.arange(20, 60)
    draws = torch.stack([build_members(means, few, base, metric="random", seed=seed)[:, 1:] for seed in range(200)])
    assert len({str(draw.tolist()) for draw in draws}) == 200
    assert len({str(row.tolist()) for row in draws[0]}) == 20
    # Each of the 40 candidates is expected 500 times among 20 000 draws; five standard deviations are 110.
    assert (draws.flatten().bincount(minlength=60)[20:] - 500).abs().max() < 110
    # And first as often as last.
    assert (draws[:, :, 0].flatten().bincount(minlength=60)[20:] - 100).abs().max() < 55


def test_the_default_is_euclidean() -> None:
    means, few, base = random(20, 5), torch.arange(4), torch.arange(4, 20)
    assert torch.equal(build_members(means, few, base), build_members(means, few, base, 5, metric="euclidean", seed=7))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(metric="manhattan"), ValueError, "metric must be one of euclidean, cosine, random, got 'manhattan'"),
        (dict(metric="random", seed=-1), ValueError, "seed must be between 0 and"),
        (dict(metric="random", seed=0.5), TypeError, "seed must be an integer, got 0.5"),
        (dict(metric="random", top_k=4), ValueError, "got top_k=4 and 3 candidates"),
    ],
)
def test_metrics_refused(options: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"top_k": 1, **options}
    with pytest.raises(error, match=message):
        nearest_classes(MEANS, [0], [1, 2, 3], **arguments)  # type: ignore[arg-type]


# neighbor_distances


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_distances_against_a_direct_computation(metric: str, dtype: torch.dtype) -> None:
    means = random(30, 17, seed=4, dtype=dtype)
    members = build_members(means, torch.arange(6), torch.arange(6, 30), 4, metric=metric)
    found = neighbor_distances(means, members, metric=metric)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = means.double()
    for row, ids in zip(found, members, strict=True):
        own, others = wide[ids[0]], wide[ids[1:]]
        wanted = (others - own).norm(dim=1) if metric == "euclidean" else 1 - torch.cosine_similarity(others, own[None], dim=1)
        torch.testing.assert_close(row.double(), wanted, rtol=1e-6, atol=1e-7)
        assert torch.equal(row, row.sort().values)


def test_distances_keep_the_scale_and_order_of_members() -> None:
    means = torch.tensor([[0.0, 0.0], [3e200, 4e200], [1e200, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert neighbor_distances(means, [[0, 1, 2], [3, 2, 0]]).tolist() == [
        pytest.approx([5e200, 1e200]),
        pytest.approx([1e200, 0.0]),
    ]
    small = torch.tensor([[1.0, 0.0], [1.0, 1e-9]], dtype=torch.float64)
    # 1 - cos is 5e-19 here, which the difference from 1 would lose altogether.
    assert neighbor_distances(small, [[0, 1]], metric="cosine").item() == pytest.approx(5e-19)
    with pytest.raises(ValueError, match="metric must be one of euclidean, cosine, got 'random'"):
        neighbor_distances(means, [[0, 1]], metric="random")
    with pytest.raises(ValueError, match="each class once in a row"):
        neighbor_distances(means, [[0, 0]])


# build_members, check_members


def test_members_are_the_class_and_its_neighbors() -> None:
    means = random(20, 5, seed=1)
    few, base = torch.tensor([7, 2, 11]), torch.tensor([c for c in range(20) if c not in (7, 2, 11)])
    members = build_members(means, few, base)
    assert members.shape == (3, 6)
    assert torch.equal(members[:, 0], few)
    assert torch.equal(members[:, 1:], nearest_classes(means, few, base, 5))
    assert torch.equal(check_members(members, 20), members)
    # Appendix D's pool of all classes: nobody is its own neighbour.
    check_members(build_members(means, few, torch.arange(20), top_k=19), 20)


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        ([[0, 1], [2, 4]], ValueError, r"in 0\.\.3, got \[2, 4\] in row 1"),
        ([[-1, 1], [2, 3]], ValueError, r"in 0\.\.3, got \[-1, 1\] in row 0"),
        ([[0, 1, 2], [2, 3, 3]], ValueError, r"each class once in a row, got \[2, 3, 3\] in row 1"),
        ([[0, 1, 0]], ValueError, r"each class once in a row, got \[0, 1, 0\] in row 0"),
        ([[0, 1], [3, 1], [0, 2]], ValueError, r"class 0 in rows 0, 2: row 2 is \[0, 2\]"),
        ([[0]], ValueError, r"at least two columns .* got \[1, 1\]"),
        (np.zeros((0, 3), dtype=np.int64), ValueError, "at least one row .* no few classes"),
        ([0, 1], ValueError, r"members must have shape \[F, K\+1\], got \[2\]"),
        ([[0.0, 1.0]], TypeError, "members must be integers, got torch.float64"),
    ],
)
def test_members_refused(members: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_members(members, 4)  # type: ignore[arg-type]


def test_members_of_any_integer_dtype_become_int64() -> None:
    assert check_members(torch.tensor([[0, 1]], dtype=torch.int32), 4).dtype == torch.int64


# reduce_classifiers, submodule_inputs


@pytest.mark.parametrize(("rows", "width", "pca_dim", "kept"), [(30, 12, 5, 5), (30, 12, 500, 12), (9, 40, 500, 9)])
def test_reduction_is_the_pca_of_all_rows(rows: int, width: int, pca_dim: int, kept: int) -> None:
    weight = random(rows, width)
    reduced = reduce_classifiers(weight, pca_dim)
    assert reduced.shape == (rows, kept)
    assert torch.equal(reduced, reduce_classifiers(weight.clone(), pca_dim))
    pca = PCA(n_components=kept, svd_solver="full").fit(weight.numpy())
    torch.testing.assert_close(reduced, torch.from_numpy(pca.transform(weight.numpy())), rtol=0, atol=1e-12)
    if kept >= min(rows, width):
        # Nothing was dropped: distances between classifiers are what they were.
        torch.testing.assert_close(torch.cdist(reduced, reduced), torch.cdist(weight, weight), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reduction_keeps_the_dtype_and_works_in_float64(dtype: torch.dtype) -> None:
    weight = random(10, 6, dtype=dtype)
    reduced = reduce_classifiers(weight, 3)
    assert reduced.dtype == dtype
    assert torch.equal(reduced, reduce_classifiers(weight.double(), 3).to(dtype))


def test_no_reduction_returns_the_rows() -> None:
    weight = torch.nn.Parameter(random(4, 6, dtype=torch.float32))
    rows = reduce_classifiers(weight, None)
    assert torch.equal(rows, weight)
    assert not rows.requires_grad


@pytest.mark.filterwarnings("error")
def test_rows_that_are_all_alike_reduce_to_zero() -> None:
    assert torch.equal(reduce_classifiers(torch.ones(3, 4), 2), torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("weight", "pca_dim", "error", "message"),
    [
        (torch.eye(3), 0, ValueError, "pca_dim must be at least 1, got 0"),
        (torch.eye(3), 2.0, TypeError, "pca_dim must be an integer, got 2.0"),
        (torch.eye(3) / 0, 2, ValueError, r"weight must be finite, got inf at index \[0, 0\]"),
        (torch.eye(3) / 0, None, ValueError, "weight must be finite"),
        (torch.eye(3).long(), 2, TypeError, "weight must be floating point"),
        (torch.ones(3), 2, ValueError, r"weight must have shape \[N, D\], got \[3\]"),
        (torch.ones(1, 3), 2, ValueError, r"at least two rows .* got \[1, 3\]"),
    ],
)
def test_reduction_refuses(weight: Tensor, pca_dim: int | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        reduce_classifiers(weight, pca_dim)


def test_inputs_are_the_rows_of_the_members_end_to_end() -> None:
    reduced, members = random(6, 3, dtype=torch.float32), torch.tensor([[5, 0, 2], [1, 2, 3]])
    inputs = submodule_inputs(reduced, members)
    assert inputs.shape == (2, 9)
    for row, ids in zip(inputs, members, strict=True):
        assert torch.equal(row, torch.cat([reduced[class_id] for class_id in ids]))
    # The inputs are fixed: a later change of the rows must not reach them.
    before = inputs.clone()
    reduced.zero_()
    assert torch.equal(inputs, before)


def test_inputs_refuse_members_of_another_classifier() -> None:
    with pytest.raises(ValueError, match=r"in 0\.\.5, got \[1, 6\] in row 0"):
        submodule_inputs(random(6, 3), [[1, 6]])
    with pytest.raises(ValueError, match="reduced must be finite"):
        submodule_inputs(not_finite(torch.nan), [[1, 2]])
