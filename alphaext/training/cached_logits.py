"""What training needs of each sample, computed once: its logits of the few classes' members, and its base classes' log-sum-exp.

With a frozen classifier these are constants (docs/reference/exactness.md, identities a and b), so neither features nor
classifier are touched again, and no ``[samples, num_classes]`` matrix is ever held: logits are made and thrown away block by
block.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops import training as ops
from ..utils.tensors import (
    LabelledFeatures,
    TensorLike,
    check_finite,
    check_not_meta,
    check_targets,
    features_and_labels,
    floating_tensor,
    rows_check,
    tensor_digest,
)
from .augmentation import DrawnFeatures

if TYPE_CHECKING:
    from ..head.alphanet import AlphaNet

__all__ = [
    "Columns",
    "Samples",
    "TrainingLogits",
    "ValidationLogits",
    "check_samples",
]

# The most bytes of cached logits of training samples; beyond it those of base samples are computed anew each epoch.
CACHE_BYTES = 2 << 30

# Elements of a block of logits. On the CPU it stays in cache between the product and what is kept of it; a GPU wants few and
# large blocks, as each takes some thirty launches and some waits.
_BLOCK_ELEMENTS = 1 << 20
_BLOCK_ELEMENTS_ELSEWHERE = 1 << 24
_FEWEST_ROWS = 256  # of a block: with fewer, a product of many classes is mostly reading the classifier
_WIDTH_MULTIPLE = 16  # of features, in a product
_ALIGNMENT = 64  # of the rows of a product, in bytes: what torch allocates has it


def _unchecked(indices: Tensor | None = None, rows: Tensor | None = None) -> None:
    """What is not cached has no checksum."""


@dataclass(frozen=True)
class Samples:
    """Features ``[n, D]``, any floating dtype, in memory or memory-mapped, and their labels ``[n]`` int64 on the CPU.

    ``check`` compares cached features with their checksums: the rows of an index, or all.
    """

    features: Tensor | DrawnFeatures
    labels: Tensor
    name: str = "features"
    check: Callable[..., None] = _unchecked

    def real(self) -> Tensor:
        """The features, where none are drawn."""
        assert isinstance(self.features, Tensor)
        return self.features

    @property
    def num_real(self) -> int:
        """How many stand before those that were drawn."""
        return len(self.features.real) if isinstance(self.features, DrawnFeatures) else len(self.features)


def check_samples(
    weight: Tensor,
    features: TensorLike | LabelledFeatures | None,
    labels: TensorLike | None,
    features_name: str = "features",
    labels_name: str = "labels",
) -> Samples:
    """Features and labels for a classifier ``weight`` ``[N, D]``, checked for all but their values."""
    features, labels = features_and_labels(features, labels, features_name, labels_name)
    data = floating_tensor(features, features_name, ("n", weight.shape[1]))
    check_not_meta(data, features_name)
    targets = check_targets(labels, len(weight), len(data), features_name, labels_name).cpu()
    if len(data) == 0:
        raise ValueError(f"{features_name} must not be empty")
    return Samples(data, targets, features_name, rows_check(features) or _unchecked)


def data_digest(samples: Samples, validation: Samples | None, *tensors: Tensor | None) -> str:
    """Tells data sets apart: a digest of labels and given tensors, and of a thousand rows of the features."""
    parts = [tensor for tensor in tensors if tensor is not None]
    for some in (samples, validation):
        if some is not None:
            parts += [some.labels, some.features[:: max(1, len(some.features) // 1000)]]
    return tensor_digest(parts)[:16]


class Columns:
    """The distinct columns of logits that the members of some heads need.

    A column is a class's logits, or under the rule ``"l1"``, where neighbours come without their bias, its logits less its
    bias. Heads of one classifier share columns and everything computed from them. Directions of a residual are rows behind
    the classifier's, numbered from N on: to training they are members like any other.

    Attributes:
        weight: ``[N + R, D]``, the classifier's rows and the directions.
        own_bias: ``[N + R]``, or None.
        class_ids: ``[U]`` int64, rows of ``weight``.
        bias: ``[U]``, what is subtracted.
        few_penalty: ``[N + R]``, 0 for base classes and minus infinity for all others.
        few_of_class: ``[N]`` int32, which few class a class is, or -1.
        few_classes: ``[F]`` int32.
    """

    def __init__(self, heads: list[AlphaNet]) -> None:
        first = heads[0]
        self.weight, self.own_bias = first.weight.detach(), None if first.bias is None else first.bias.detach()
        self.num_classes = first.out_features
        # The directions of one residual begin with those of a smaller one.
        most = max(heads, key=lambda head: head.num_directions)
        if most.directions is not None:
            self.weight = torch.cat([self.weight, most.directions])
            if self.own_bias is not None and most.direction_bias is not None:
                self.own_bias = torch.cat([self.own_bias, most.direction_bias])
        num_classes, dtype = len(self.weight), first.weight.dtype
        self._width = num_classes
        biases = torch.zeros(num_classes, dtype=dtype, device="cpu") if self.own_bias is None else self.own_bias.cpu()
        keys = torch.cat([self._keys(head).flatten() for head in heads]).unique()
        self._known = keys
        self.class_ids = keys % num_classes
        self.bias = torch.where(keys >= num_classes, biases[self.class_ids], torch.zeros((), dtype=dtype, device="cpu"))
        few = first.few_classes.cpu()
        self.few_classes = few.to(torch.int32)
        self.few_penalty = torch.zeros(num_classes, dtype=dtype, device="cpu")
        self.few_penalty[few] = -torch.inf
        self.few_penalty[self.num_classes :] = -torch.inf
        self.few_of_class = torch.full((self.num_classes,), -1, dtype=torch.int32, device="cpu")
        self.few_of_class[few] = torch.arange(len(few), dtype=torch.int32, device="cpu")

    def _keys(self, head: AlphaNet) -> Tensor:
        keys = head.members.cpu().clone()
        if head.rule == "l1" and head.bias is not None:
            keys[:, 1:] += self._width
        if head.num_directions:
            directions = self.num_classes + torch.arange(head.num_directions, device="cpu")
            keys = torch.cat([keys, directions.expand(len(keys), -1)], dim=1)
        return keys

    def with_log_prior(self, log_prior: Tensor) -> Columns:
        """The same with ``log_prior`` ``[N]`` added to the base classes' logits where their log-sum-exp is taken."""
        columns = copy.copy(self)
        columns.few_penalty = self.few_penalty.clone()
        columns.few_penalty[: self.num_classes] += log_prior.to(columns.few_penalty.dtype).masked_fill(log_prior.isnan(), 0)
        columns.few_penalty[self.few_classes.long()] = -torch.inf
        return columns

    @property
    def kept(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is kept of a block of logits, as :func:`alphaext.ops.training.cache_logits` takes it."""
        return self.few_penalty, self.class_ids, self.bias

    def __len__(self) -> int:
        return len(self.class_ids)

    def of(self, head: AlphaNet) -> Tensor:
        """Where ``head`` finds its members, and directions: ``[F, K+1 (+ R)]`` int32 positions among the columns."""
        return torch.searchsorted(self._known, self._keys(head)).to(torch.int32)


class TrainingLogits:
    """A row for each of some samples: ``logits`` ``[rows, U]``, and ``[rows]`` of the other three."""

    def __init__(
        self, columns: Columns, rows: int, device: torch.device | str = "cpu", log_prior: Tensor | None = None
    ) -> None:
        """``log_prior`` ``[N]`` is added to the base classes' logits; few ones get theirs in training, with their scores."""
        self.columns = columns if log_prior is None else columns.with_log_prior(log_prior)
        self._log_prior = None if log_prior is None else log_prior.masked_fill(log_prior.isinf(), 0)
        dtype = columns.few_penalty.dtype
        self.logits = _allocate((rows, len(columns)), dtype, device)
        self.base_logsumexp = torch.empty(rows, dtype=dtype, device=device)
        self.label_logit = torch.empty(rows, dtype=dtype, device=device)
        self.few_of_label = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self._of_means: tuple[DrawnFeatures, tuple[Tensor, Tensor]] | None = None

    def fill(self, first_row: int, samples: Samples, indices: Tensor) -> Tensor:
        """Compute rows from ``first_row`` on for the samples ``indices``; in which order they then lie there.

        The logits of a drawn sample are sums of others: it has no product of its own.
        """
        drawn = samples.features if isinstance(samples.features, DrawnFeatures) else None
        place = indices if drawn is None else drawn.origin(indices)
        origins, place = place.unique(return_inverse=True)
        of_drawn = torch.zeros_like(indices) if drawn is None else (indices >= samples.num_real).long()
        shifts = None if drawn is None or not bool(of_drawn.any()) else self._shifts(drawn)
        weight, bias = self.columns.weight, self.columns.own_bias
        size = _block_rows(weight)
        kinds = place // size * 2 + of_drawn  # block by block, real ones first
        order = (kinds * size + place % size).argsort(stable=True)
        counts = torch.bincount(kinds, minlength=2 * -(-len(origins) // size)).view(-1, 2).tolist()
        indices, place = indices.index_select(0, order), place.index_select(0, order)
        labels = samples.labels[indices]
        rows = slice(first_row, first_row + len(indices))
        self.few_of_label[rows] = self.columns.few_of_class[labels].to(self.few_of_label.device)
        real = samples if drawn is None else Samples(drawn.real, samples.labels, samples.name)
        stop = 0
        for (part, products), of_kinds in zip(_blocks(weight, bias, real, origins), counts, strict=True):
            for is_drawn, count in enumerate(of_kinds):
                own = slice(stop, stop + count)
                here, stop = slice(first_row + own.start, first_row + own.stop), own.stop
                taken, logits = place[own] - part.start, products
                if is_drawn or not torch.equal(taken, torch.arange(len(products), device="cpu")):
                    logits = products.index_select(0, taken.to(products.device))
                if is_drawn and drawn is not None and shifts is not None:
                    number = indices[own] - samples.num_real
                    for sign, shift, of in ((1, shifts[0], drawn.few_of), (-1, shifts[1], drawn.base_of)):
                        logits.add_(shift.index_select(0, of.index_select(0, number).to(shift.device)), alpha=sign)
                ops.cache_logits(
                    logits,
                    labels[own],
                    *self.columns.kept,
                    self.logits[here],
                    self.base_logsumexp[here],
                    self.label_logit[here],
                )
        if self._log_prior is not None:
            self.label_logit[rows] += self._log_prior[labels].to(self.label_logit)
        _check_finite(self.base_logsumexp[rows], samples, indices)
        return order

    def _shifts(self, drawn: DrawnFeatures) -> tuple[Tensor, Tensor]:
        """What the few classes' means, and those of all classes, give to logits: ``[F, N + R]`` and ``[N, N + R]``."""
        if self._of_means is None or self._of_means[0] is not drawn:
            first, second = (_logits(self.columns.weight, None, means) for means in (drawn.few_means, drawn.means))
            self._of_means = drawn, (first, second)
        return self._of_means[1]


class ValidationLogits:
    """Validation samples in blocks, with the constants of their base columns."""

    def __init__(self, columns: Columns, samples: Samples, device: torch.device | str = "cpu") -> None:
        self.columns, self.labels = columns, samples.labels.to(device)
        count, dtype = len(samples.labels), columns.few_penalty.dtype
        shape = ops.validation_shape(count, len(columns))
        self.logits = _allocate(shape, dtype, device)
        self.logits[-1:].zero_()  # the last block may have room to spare
        self.label_logit = torch.empty(count, dtype=dtype, device=device)
        self.top_logits = torch.empty(count, ops.TOP_CLASSES, dtype=dtype, device=device)
        self.top_ids = torch.empty(count, ops.TOP_CLASSES, dtype=torch.int32, device=device)
        self.few_of_label = columns.few_of_class[samples.labels].to(device)
        self._few_classes = columns.few_classes.to(device)
        base_logsumexp = torch.empty(count, dtype=dtype, device=device)
        indices = torch.arange(count, device="cpu")
        for part, logits in _blocks(columns.weight, columns.own_bias, samples, indices):
            blocks_here = self.logits[ops.blocks_of(part)]
            ops.cache_logits(
                logits, samples.labels[part], *columns.kept, blocks_here, base_logsumexp[part], self.label_logit[part],
                self.top_logits[part], self.top_ids[part],
            )  # fmt: skip
        _check_finite(base_logsumexp, samples, indices)

    def hits(self, alphas: Tensor, member_columns: Tensor) -> Tensor:
        """``[2, N]`` int64: of each class, the samples that it wins, and those that it is among the first five of.

        With a leading dimension of both arguments, ``[R, F, K+1]``, those of R heads: ``[R, 2, N]``. The result is where the
        logits are.
        """
        return ops.validate(
            alphas, member_columns, self._few_classes, self.logits, self.label_logit, self.top_logits, self.top_ids,
            self.labels, self.few_of_label, self.columns.num_classes,
        )  # fmt: skip

    def few_scores(self, weight: Tensor, bias: Tensor | None, samples: Samples) -> Tensor:
        """The scores of other few rows ``[F, D]``, in blocks as the logits are: ``[blocks, F, BLOCK_SAMPLES]``."""
        scores = self.logits.new_zeros(len(self.logits), len(weight), ops.BLOCK_SAMPLES)
        for part, found in _blocks(weight, bias, samples, torch.arange(len(samples.labels), device="cpu")):
            blocks = scores[ops.blocks_of(part)]
            missing = len(blocks) * ops.BLOCK_SAMPLES - len(found)
            found = nn.functional.pad(found, (0, 0, 0, missing)) if missing else found
            blocks.copy_(found.view(-1, ops.BLOCK_SAMPLES, len(weight)).transpose(1, 2))
        return scores

    def best(self, few_scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of each sample the best few score and its class, the best base logit and its class, and the label."""
        few, order = self._few_classes.sort()
        scores, ids = few_scores.index_select(1, order).max(dim=1)
        count = len(self.labels)
        few_ids = few.index_select(0, ids.flatten()[:count]).long()
        return scores.flatten()[:count], few_ids, self.top_logits[:, 0], self.top_ids[:, 0].long(), self.labels

    def hits_with(self, few_scores: Tensor) -> Tensor:
        """:meth:`hits` where the few classes have these scores."""
        columns = torch.arange(few_scores.shape[1], dtype=torch.int32, device=few_scores.device)
        alpha = few_scores.new_tensor([1.0, 0.0]).repeat(len(columns), 1)
        return ops.validate(
            alpha, columns[:, None].repeat(1, 2), self._few_classes, few_scores, self.label_logit, self.top_logits,
            self.top_ids, self.labels, self.few_of_label, self.columns.num_classes,
        )  # fmt: skip


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    memory = torch.empty(shape, dtype=dtype, device=device)
    if memory.is_cpu:
        ops.advise_huge_pages(memory)
    return memory


def check_memory(needed: int, what: str) -> None:
    """Raise a MemoryError where ``what`` does not fit, instead of being killed by the system on the way."""
    available = _available_bytes()
    if needed > available:
        raise MemoryError(
            f"{what} need {needed / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB of memory are free: less "
            "samples_per_class, negative_ratio, top_k or residual need less"
        )


def _available_bytes() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf  # not Linux: let the allocation itself fail
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf)


def _block_rows(weight: Tensor) -> int:
    elements = _BLOCK_ELEMENTS if weight.is_cpu else _BLOCK_ELEMENTS_ELSEWHERE
    return max(_FEWEST_ROWS, elements // len(weight)) // ops.BLOCK_SAMPLES * ops.BLOCK_SAMPLES


def _logits(weight: Tensor, bias: Tensor | None, features: Tensor) -> Tensor:
    """All logits of some features ``[n, D]``."""
    rows = torch.arange(len(features), device="cpu")
    return torch.cat([part for _, part in _blocks(weight, bias, Samples(features, rows), rows)])


def _blocks(weight: Tensor, bias: Tensor | None, samples: Samples, indices: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The logits of real samples, block by block, with the slice of ``indices`` that they belong to."""
    source = samples.real()
    # Matrix libraries round a row by its place in the product where rows begin at odd addresses. Zeros change no sum.
    width = weight.shape[1] + -weight.shape[1] % _WIDTH_MULTIPLE
    if width > weight.shape[1]:
        weight = nn.functional.pad(weight, (0, width - weight.shape[1]))
    rows = _block_rows(weight)
    own = weight.new_zeros(min(rows, len(indices) + -len(indices) % ops.BLOCK_SAMPLES), width)
    # Rows that lie as those of ``own`` do are multiplied where they are.
    alike = source.dtype == own.dtype and source.device == own.device
    in_place = alike and source.shape[1] == width and source.is_contiguous() and source.data_ptr() % _ALIGNMENT == 0
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        for start in range(0, len(indices), rows):
            part = slice(start, min(start + rows, len(indices)))
            wanted = indices[part]
            first, last, count = int(wanted[0]), int(wanted[-1]), len(wanted)
            contiguous = last - first == count - 1 and bool((wanted.diff() == 1).all())
            # Matrix libraries round the last few rows otherwise than those before; a sample's logits must not depend on the
            # samples beside it.
            whole = count + -count % ops.BLOCK_SAMPLES
            if contiguous and in_place and whole == count:
                block = source[first : last + 1]
                samples.check(wanted, block)
            else:
                block = own[:whole]
                filled = block[:count, : source.shape[1]]
                if contiguous:
                    filled.copy_(source[first : last + 1])
                elif alike:
                    torch.index_select(source, 0, wanted.to(source.device), out=filled)
                else:
                    filled.copy_(source.index_select(0, wanted.to(source.device)))
                block[count:] = block[count - 1]
                samples.check(wanted, filled if alike and source.shape[1] == width else None)
            yield part, nn.functional.linear(block, weight, bias)[:count]


def _check_finite(base_logsumexp: Tensor, samples: Samples, indices: Tensor) -> None:
    """A feature that is not finite shows in the base classes' sums, which are cheaper to look at than all features."""
    finite = base_logsumexp.isfinite()
    if bool(finite.all()):
        return
    row = int(finite.logical_not().nonzero()[0, 0])
    index = int(indices[row])
    check_finite(samples.features[index : index + 1], samples.name, first_row=index)
    raise ValueError(
        f"the original classifier's logits must be finite, but those of {samples.name}[{int(indices[row])}] are not: the "
        "classifier's values are too large for its dtype"
    )
