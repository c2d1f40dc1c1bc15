"""What training keeps of the samples' logits: against logits computed whole, and accuracies against ranks of all scores."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import TOLERANCES, assert_close
from torch import Tensor
from torch.nn import functional

from alphaext import AlphaNet, class_means, reference
from alphaext.metrics.accuracy import label_ranks
from alphaext.ops import training as ops
from alphaext.ops.training import BLOCK_SAMPLES, TOP_CLASSES
from alphaext.training import cached_logits
from alphaext.training.augmentation import draw_features
from alphaext.training.cached_logits import Columns, Samples, TrainingLogits, ValidationLogits
from alphaext.utils.tensors import as_tensor

IN_FEATURES = 6
NOBODY = 2**31 - 1


def whole_numbers(*shape: int, low: int = -2, high: int = 3, seed: int = 0) -> Tensor:
    """So small that sums and products of them are exact in every dtype: ties are ties."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).double()


def make_head(num_classes=9, num_few=3, top_k=2, dtype=torch.float64, bias=True, rule="clamp", seed=0, weight=None) -> AlphaNet:
    """Few classes anywhere among the others; their neighbours are any class, few ones too."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randperm(num_classes, generator=generator)[:num_few].tolist()
    members = []
    for own in few:
        others = torch.tensor([c for c in range(num_classes) if c != own])
        members.append([own, *others[torch.randperm(len(others), generator=generator)[:top_k]].tolist()])
    if weight is None:
        weight = torch.randn(num_classes, IN_FEATURES, generator=generator, dtype=torch.float64)
    offsets = whole_numbers(num_classes, seed=seed + 1).to(dtype) if bias else None
    z = torch.randn(num_few, 3 * (top_k + 1), generator=generator, dtype=torch.float64)
    return AlphaNet(weight.to(dtype), offsets, torch.tensor(members), z.to(dtype), rule=rule, hidden_dim=4, seed=0)


def make_samples(count: int, num_classes: int, dtype=torch.float64, seed: int = 3, whole: bool = False) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, IN_FEATURES, generator=generator, dtype=torch.float64)
    if whole:
        features = whole_numbers(count, IN_FEATURES, seed=seed)
    return Samples(features.to(dtype), torch.randint(num_classes, (count,), generator=generator))


def logits_of(head: AlphaNet, samples: Samples, indices: Tensor) -> Tensor:
    """In double precision, of what the head's dtype holds of the features."""
    bias = None if head.bias is None else head.bias.double()
    return functional.linear(samples.features[indices].to(head.weight.dtype).double(), head.weight.double(), bias)


def member_columns(head: AlphaNet, logits: Tensor) -> Tensor:
    """What the coefficients multiply, ``[n, F, K+1]``."""
    mixed = logits[:, head.members].clone()
    if head.rule == "l1" and head.bias is not None:
        mixed[:, :, 1:] -= head.bias.double()[head.members[:, 1:]]
    return mixed


def base_of(head: AlphaNet, logits: Tensor) -> Tensor:
    return logits.index_fill(1, head.few_classes, -math.inf)


def check_training_rows(
    head: AlphaNet, samples: Samples, indices: Tensor, kept: TrainingLogits, first: int, exact: bool
) -> None:
    rows, dtype = slice(first, first + len(indices)), head.weight.dtype
    logits, labels = logits_of(head, samples, indices), samples.labels[indices]
    own = logits.gather(1, labels[:, None]).squeeze(1)
    mixed = kept.logits[rows][:, kept.columns.of(head).long()]
    if exact:
        assert mixed.double().equal(member_columns(head, logits)) and kept.label_logit[rows].double().equal(own)
    else:
        assert_close(mixed, member_columns(head, logits), dtype, "logits of members")
        assert_close(kept.label_logit[rows], own, dtype, "label's logit")
    assert_close(kept.base_logsumexp[rows], base_of(head, logits).logsumexp(dim=1), dtype, "base log-sum-exp")
    position = {int(c): f for f, c in enumerate(head.few_classes)}
    assert kept.few_of_label[rows].tolist() == [position.get(int(label), -1) for label in labels]


def check_top(head: AlphaNet, samples: Samples, kept: ValidationLogits, exact: bool) -> None:
    """The best base classes, best first, of equal ones the lower id first; what is missing is nobody's."""
    masked = base_of(head, logits_of(head, samples, torch.arange(len(samples.labels))))
    values, ids = masked.sort(dim=1, descending=True, stable=True)
    there = min(TOP_CLASSES, head.out_features - head.num_few)
    assert kept.top_ids[:, :there].equal(ids[:, :there].int())
    if exact:
        assert kept.top_logits[:, :there].double().equal(values[:, :there])
    else:
        assert_close(kept.top_logits[:, :there], values[:, :there], head.weight.dtype, "top logits")
    assert (kept.top_logits[:, there:] == -math.inf).all() and (kept.top_ids[:, there:] == NOBODY).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rule", reference.RULES)
@pytest.mark.parametrize(("num_classes", "num_few"), [(9, 3), (3, 2), (2, 1), (40, 5)])
def test_rows_are_those_of_whole_logits(dtype, bias, rule, num_classes, num_few):
    head = make_head(num_classes, num_few, 1 if num_classes < 4 else 3, dtype, bias, rule)
    samples = make_samples(70, num_classes, dtype)
    columns = Columns([head])
    assert len(columns) <= head.members.numel() and len(set(zip(columns.class_ids, columns.bias, strict=True))) == len(columns)
    indices = torch.arange(70).flip(0)[::3]
    kept = TrainingLogits(columns, len(indices))
    indices = indices[kept.fill(0, samples, indices)]
    check_training_rows(head, samples, indices, kept, 0, exact=False)
    check_top(head, samples, ValidationLogits(columns, samples), exact=False)


@settings(max_examples=60, deadline=None)
@given(
    count=st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129, 200]),
    num_classes=st.integers(2, 12),
    data=st.data(),
    block=st.sampled_from([1, 64 * 5, 64 * 12 * 2, 1 << 20]),
    order=st.sampled_from(["ascending", "descending", "shuffled", "repeated", "contiguous from the middle"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_nothing_depends_on_blocks(count, num_classes, data, block, order, dtype):
    """In whole numbers all is exact: samples lie where they belong, however logits are cut into blocks."""
    num_few = data.draw(st.integers(1, num_classes - 1))
    head = make_head(num_classes, num_few, 1, dtype, rule="l1", weight=whole_numbers(num_classes, IN_FEATURES, seed=5))
    samples = make_samples(count, num_classes, dtype, whole=True)
    generator = torch.Generator().manual_seed(count)
    indices = {
        "ascending": torch.arange(count),
        "descending": torch.arange(count).flip(0),
        "shuffled": torch.randperm(count, generator=generator),
        "repeated": torch.randint(count, (count,), generator=generator),
        "contiguous from the middle": torch.arange(count // 3, count),
    }[order]
    columns = Columns([head])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cached_logits, "_BLOCK_ELEMENTS", block)
        patch.setattr(cached_logits, "_FEWEST_ROWS", BLOCK_SAMPLES)
        kept, validation = TrainingLogits(columns, len(indices) + 3), ValidationLogits(columns, samples)
        kept.logits.fill_(-77)
        indices = indices[kept.fill(2, samples, indices)]
    check_training_rows(head, samples, indices, kept, 2, exact=True)
    assert (kept.logits[:2] == -77).all() and (kept.logits[-1:] == -77).all(), "other rows stay as they were"
    check_top(head, samples, validation, exact=True)
    blocks = -(-count // BLOCK_SAMPLES)
    assert validation.logits.shape == (blocks, len(columns), BLOCK_SAMPLES)
    flat = validation.logits.transpose(1, 2).reshape(blocks * BLOCK_SAMPLES, -1)
    expected = member_columns(head, logits_of(head, samples, torch.arange(count)))
    assert flat[:count][:, columns.of(head).long()].double().equal(expected)
    assert not flat[count:].any(), "what fills up the last block is zero"


@pytest.mark.parametrize(
    ("stored", "on_disk"),
    [
        *((stored, False) for stored in (torch.float16, torch.bfloat16, torch.float32, torch.float64)),
        *((stored, True) for stored in (torch.float16, torch.float32, torch.float64)),  # NumPy has no bfloat16
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_features_of_any_dtype_in_memory_or_mapped(tmp_path, monkeypatch, on_disk, stored, dtype):
    head, samples = make_head(dtype=dtype), make_samples(150, 9, stored)
    if on_disk:
        path = tmp_path / "features.npy"
        numpy.save(path, samples.features.numpy())
        mapped = numpy.load(path, mmap_mode="r")
        assert not mapped.flags.writeable
        samples = Samples(as_tensor(mapped, "features"), samples.labels)
    monkeypatch.setattr(cached_logits, "_BLOCK_ELEMENTS", 64 * 9)
    monkeypatch.setattr(cached_logits, "_FEWEST_ROWS", BLOCK_SAMPLES)
    indices = torch.tensor([*range(10, 90), 149, 3, 3])
    kept = TrainingLogits(Columns([head]), len(indices))
    indices = indices[kept.fill(0, samples, indices)]
    check_training_rows(head, samples, indices, kept, 0, exact=False)
    check_top(head, samples, ValidationLogits(Columns([head]), samples), exact=False)


@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.float64], ids=str)
def test_logits_of_drawn_samples_are_sums(stored, monkeypatch):
    """Of samples and means; of those that nothing is drawn from, only the ones asked for."""
    head, samples = make_head(dtype=torch.promote_types(stored, torch.float32)), make_samples(150, 9, stored)
    means = class_means(samples.features, samples.labels, 9)
    features, labels = draw_features(samples.features, samples.labels, means, head.few_classes, 40, seed=0)
    drawn = Samples(features, labels)
    monkeypatch.setattr(cached_logits, "_BLOCK_ELEMENTS", 64 * 9)
    monkeypatch.setattr(cached_logits, "_FEWEST_ROWS", BLOCK_SAMPLES)
    indices = torch.cat([torch.arange(20, 90), torch.tensor([7, 7, 200]), torch.arange(150, len(labels), 2)])
    kept = TrainingLogits(Columns([head]), len(indices))
    indices = indices[kept.fill(0, drawn, indices)]
    every = Samples(features[: len(features)], labels)
    check_training_rows(head, every, indices, kept, 0, exact=False)


def test_no_samples():
    columns = Columns([make_head()])
    TrainingLogits(columns, 0).fill(0, make_samples(5, 9), torch.empty(0, dtype=torch.int64))


def test_heads_share_columns():
    weight = torch.randn(9, IN_FEATURES, generator=torch.Generator().manual_seed(1))
    one, two = (make_head(seed=0, weight=weight, rule=rule, top_k=k) for rule, k in (("clamp", 2), ("l1", 4)))
    assert one.few_classes.equal(two.few_classes)
    columns, samples, indices = Columns([one, two]), make_samples(20, 9), torch.arange(20)
    assert len(columns) < len(Columns([one])) + len(Columns([two])), "few classes' own columns are common to both"
    kept = TrainingLogits(columns, 20)
    indices = indices[kept.fill(0, samples, indices)]
    for head in (one, two):
        check_training_rows(head, samples, indices, kept, 0, exact=False)


@settings(max_examples=80, deadline=None)
@given(
    count=st.sampled_from([1, 5, 64, 65, 130]),
    num_classes=st.integers(2, 14),
    data=st.data(),
    span=st.sampled_from([1, 3, 1000]),
    validation=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_on_a_device_torch_keeps_the_same(count, num_classes, data, span, validation, dtype):
    """The form for logits on a GPU, run on the CPU: all but the log-sum-exp to the bit, ties included."""
    num_few = data.draw(st.integers(1, num_classes - 1))
    head = make_head(num_classes, num_few, 1, dtype, rule=data.draw(st.sampled_from(reference.RULES)))
    columns, samples = Columns([head]), make_samples(count, num_classes)
    logits = whole_numbers(count, num_classes, low=-span, high=span + 1, seed=count).to(dtype)
    kept = []
    for keep in (ops.cache_logits, ops.cache_logits_elsewhere):
        rows = TrainingLogits(columns, count)
        members, top = rows.logits, (None, None)
        if validation:
            members = torch.zeros(-(-count // BLOCK_SAMPLES), len(columns), BLOCK_SAMPLES, dtype=dtype)
            top = (torch.empty(count, TOP_CLASSES, dtype=dtype), torch.empty(count, TOP_CLASSES, dtype=torch.int32))
        columns_of = (columns.few_penalty, columns.class_ids, columns.bias)
        keep(logits, samples.labels, *columns_of, members, rows.base_logsumexp, rows.label_logit, *top)
        kept.append((rows.base_logsumexp, members, rows.label_logit, *top))
    sums, others = zip(*((values[0], values[1:]) for values in kept), strict=True)
    assert_close(*sums, dtype, "base log-sum-exp")
    assert all(one is two or one.equal(two) for one, two in zip(*others, strict=True))


@settings(max_examples=100, deadline=None)
@given(
    count=st.sampled_from([1, 30, 64, 65, 200]),
    num_classes=st.integers(2, 14),
    data=st.data(),
    rule=st.sampled_from(reference.RULES),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_hits_are_those_of_ranks_among_all_scores(count, num_classes, data, rule, bias, dtype):
    """Coefficients in quarters of whole numbers: many ties, between base classes, few classes and both, and all exact."""
    num_few = data.draw(st.integers(1, num_classes - 1))
    top_k = data.draw(st.integers(1, min(6, num_classes - 1)))
    weight = whole_numbers(num_classes, IN_FEATURES, seed=7)
    head = make_head(num_classes, num_few, top_k, dtype, bias, rule, weight=weight)
    samples = make_samples(count, num_classes, dtype, whole=True)
    alpha = (whole_numbers(num_few, top_k + 1, low=-3, high=5, seed=8) / 4).to(dtype)
    columns = Columns([head])
    hits = ValidationLogits(columns, samples).hits(alpha, columns.of(head))
    logits = logits_of(head, samples, torch.arange(count))
    offsets = None if head.bias is None else head.bias.double()
    scores = reference.mix_logits(logits, head.members, alpha.double(), offsets, rule)
    ranks = label_ranks(scores, samples.labels)
    expected = [torch.bincount(samples.labels[ranks < k], minlength=num_classes) for k in (1, 5)]
    assert hits.dtype == torch.int64 and hits.equal(torch.stack(expected))


@pytest.mark.parametrize("rule", reference.RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_hits_of_a_head(rule, dtype):
    head = make_head(30, 6, 5, dtype, rule=rule)
    with torch.no_grad():
        head.w2.normal_(generator=torch.Generator().manual_seed(1))
    samples, columns = make_samples(500, 30, dtype), Columns([head])
    hits = ValidationLogits(columns, samples).hits(head.alphas(), columns.of(head))
    ranks = label_ranks(head(samples.features).detach(), samples.labels)
    assert hits.sum(dim=1).tolist() == [int((ranks < k).sum()) for k in (1, 5)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32], ids=str)
def test_a_feature_that_is_not_finite_is_named(value, stored):
    head, samples = make_head(dtype=torch.float32), make_samples(140, 9, stored)
    samples.features[77, 4] = value
    columns = Columns([head])
    with pytest.raises(ValueError, match=rf"features must be finite, got {value} at index \[77, 4\]"):
        TrainingLogits(columns, 140).fill(0, samples, torch.arange(140).flip(0))
    with pytest.raises(ValueError, match=rf"held out must be finite, got {value} at index \[77, 4\]"):
        ValidationLogits(columns, Samples(samples.features, samples.labels, "held out"))
    others = torch.tensor([i for i in range(140) if i != 77])
    TrainingLogits(columns, 139).fill(0, samples, others)  # what takes no part is not looked at


def test_logits_too_large_for_their_dtype_are_named():
    head, samples = make_head(dtype=torch.float32), make_samples(9, 9, torch.float32)
    with torch.no_grad():
        head.weight.mul_(1e38)
    samples.features.mul_(1e-37)
    TrainingLogits(Columns([head]), 9).fill(0, samples, torch.arange(9))
    samples.features[5] *= 1e38
    message = r"the original classifier's logits must be finite, but those of features\[5\] are not: .* too large for its dtype"
    with pytest.raises(ValueError, match=message):
        TrainingLogits(Columns([head]), 4).fill(0, samples, torch.tensor([2, 3, 5, 6]))


def test_log_sum_exp_of_logits_far_apart():
    """Differences that no exponential holds count as nothing, and the largest logit as itself."""
    for dtype in (torch.float32, torch.float64):
        head = make_head(12, 2, 1, dtype, bias=False)
        columns, labels = Columns([head]), torch.zeros(6, dtype=torch.int64)
        logits = whole_numbers(6, 12, low=-9, high=9).to(dtype)
        logits *= torch.tensor([[0.0], [1], [10], [1e3], [1e5], [-1e30]], dtype=dtype)
        kept = TrainingLogits(columns, 6)
        ops.cache_logits(logits, labels, *columns.kept, kept.logits, kept.base_logsumexp, kept.label_logit)
        expected = base_of(head, logits.double()).logsumexp(dim=1)
        torch.testing.assert_close(
            kept.base_logsumexp.double(), expected, rtol=TOLERANCES[dtype] / 20, atol=TOLERANCES[dtype] / 20
        )
