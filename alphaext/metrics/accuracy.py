"""How often the right class is among the best scores: for each split, for each class, and over all samples."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..classes import ClassSplit
from ..utils.checks import check_integer
from ..utils.tensors import TensorLike, as_tensor, check_floating, check_labels, check_same_device, check_shape

__all__ = [
    "SPLITS",
    "SPLITS_AND_ALL",
    "SPLITS_AND_EMPTY",
    "label_ranks",
    "per_class_accuracy",
    "split_accuracy",
]

SPLITS = ("few", "medium", "many")
SPLITS_AND_ALL = (*SPLITS, "all")
SPLITS_AND_EMPTY = (*SPLITS, "empty")  # what a class can be: without training samples it is in no split

# Elements of one block of logits. On the CPU it stays in cache with the masks of its comparisons, and torch starts its
# threads from 2**15 elements on: waiting for them costs more than such light work, many times more on a busy machine.
# A GPU wants few and large blocks.
_BLOCK_ELEMENTS = {"cpu": 2**15 - 1}
_BLOCK_ELEMENTS_ELSEWHERE = 2**24


def label_ranks(logits: TensorLike, labels: TensorLike) -> Tensor:
    """Return how many classes stand before the right one in each sample's scores.

    A class stands before the right one if its logit is larger, or equal and its id lower: ties have one answer, the
    same on every device.

    Args:
        logits: floating point [n, N]; infinities are ranked as such (a class may be masked by -inf).
        labels: right class of each sample, integers [n].

    Returns:
        int64 [n] on the device of ``logits``, 0 where the right class comes first; the sample counts as right among the
        best k where its rank is below k.

    Raises:
        TypeError: logits that are not floating point, labels that are not integers.
        ValueError: NaN among the logits, labels out of range, numbers of samples or devices that disagree.

    Example:
        >>> label_ranks(torch.tensor([[1.0, 3.0, 2.0], [2.0, 2.0, 2.0]]), [2, 1])
        tensor([1, 1])
    """
    check_same_device(logits=logits, labels=labels)
    scores = as_tensor(logits, "logits").detach()
    check_shape(scores, "logits", ("n", "N"))
    check_floating(scores, "logits")
    samples, num_classes = scores.shape
    label_ids = check_labels(labels, num_classes).to(scores.device)
    if label_ids.numel() != samples:
        raise ValueError(f"logits and labels must have one entry a sample, got {samples} and {label_ids.numel()}")
    class_ids = torch.arange(num_classes, device=scores.device)
    ranks = torch.empty(samples, dtype=torch.int64, device=scores.device)
    rows = max(1, _BLOCK_ELEMENTS.get(scores.device.type, _BLOCK_ELEMENTS_ELSEWHERE) // max(1, num_classes))
    for start in range(0, samples, rows):
        block, right = scores[start : start + rows], label_ids[start : start + rows, None]
        # A NaN is neither larger nor equal: unnoticed, it would put the right class first.
        not_numbers = torch.isnan(block)
        if bool(not_numbers.any()):
            row, column = torch.nonzero(not_numbers)[0].tolist()
            raise ValueError(f"logits must not be NaN, got nan at index [{start + row}, {column}]")
        own = block.gather(1, right)
        before = (block > own) | ((block == own) & (class_ids < right))
        ranks[start : start + rows] = before.sum(dim=1)
    return ranks


def _hits_and_counts(logits: TensorLike, labels: TensorLike, num_classes: int | None, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the right answers and the samples of each class, both int64 [N] on the CPU."""
    ranks = label_ranks(logits, labels)
    width = as_tensor(logits, "logits").shape[1]
    if num_classes is not None and num_classes != width:
        raise ValueError(f"logits must have one column a class, got {width} columns and {num_classes} classes")
    top_k = check_integer(top_k, "top_k", minimum=1, maximum=width)
    label_ids = check_labels(labels, width).to(ranks.device)
    hits = torch.bincount(label_ids[ranks < top_k], minlength=width)
    return hits.cpu(), torch.bincount(label_ids, minlength=width).cpu()


def per_class_accuracy(logits: TensorLike, labels: TensorLike, num_classes: int | None = None, *, top_k: int = 1) -> Tensor:
    """Return the accuracy of each class: the share of its samples whose right class is among the ``top_k`` best scores.

    Args:
        logits: floating point [n, N].
        labels: right class of each sample, integers [n].
        num_classes: N, if given checked against the logits.
        top_k: default 1; ties as in ``label_ranks``.

    Returns:
        float64 [N] on the device of ``logits``, fractions 0 to 1, NaN for a class without samples.

    Raises:
        TypeError, ValueError: as ``label_ranks``; ``top_k`` outside ``1 .. N``, ``num_classes`` other than N.

    Example:
        >>> per_class_accuracy(torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]), [0, 1])
        tensor([1., 0., nan], dtype=torch.float64)
    """
    hits, counts = _hits_and_counts(logits, labels, num_classes, top_k)
    # 0 / 0 is the NaN that is promised.
    return (hits.to(torch.float64) / counts).to(as_tensor(logits, "logits").device)


def split_accuracy(
    logits: TensorLike,
    labels: TensorLike,
    split: ClassSplit,
    *,
    top_k: int = 1,
    average: Literal["samples", "classes"] = "samples",
) -> dict[str, float]:
    """Return the accuracy on the few, medium and many classes and on all of them.

    All N classes compete for every sample; the split only says whose samples are averaged.

    Args:
        logits: floating point [n, N].
        labels: right class of each sample, integers [n].
        split: which classes are few, medium and many, by training samples.
        top_k: default 1; the paper's tables show 1 and 5. Ties as in ``label_ranks``.
        average: ``"samples"`` (default) weighs every sample alike; ``"classes"`` is the mean of the accuracies of the
            classes that have samples. On test sets with equally many samples a class the two agree.

    Returns:
        Fractions 0 to 1 (the paper prints 100 times them) under ``few``, ``medium``, ``many`` and ``all``. A part
        without a sample is NaN, not an error.

    Raises:
        TypeError, ValueError: as ``label_ranks``; ``top_k`` outside ``1 .. N``, an unknown ``average``, a split of
            another number of classes than N.

    Example:
        >>> split = ClassSplit(few=[2], medium=[1], many=[0])
        >>> split_accuracy(torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]), [0, 1], split)
        {'few': nan, 'medium': 0.0, 'many': 1.0, 'all': 0.5}
    """
    if not isinstance(split, ClassSplit):
        raise TypeError(f"split must be a ClassSplit, got {type(split).__name__}; split_classes makes one from counts")
    if average not in ("samples", "classes"):
        raise ValueError(f'average must be "samples" or "classes", got {average!r}')
    hits, counts = _hits_and_counts(logits, labels, split.num_classes, top_k)

    found = SplitMetrics(split, counts).of(torch.stack([hits, hits]))
    return {name: found[name if average == "samples" else f"{name}_class_mean"] for name in SPLITS_AND_ALL}


class SplitMetrics:
    """Top-1 and top-5 accuracy for each part of a split, over samples and as mean over classes.

    Keys are ``few``, ``medium``, ``many``, ``all``, each also with ``_top5``, ``_class_mean`` and ``_class_mean_top5``; a part
    without samples is NaN.
    """

    def __init__(self, split: ClassSplit, counts: Tensor) -> None:
        """``counts``: validation samples of each class."""
        parts = (split.few, split.medium, split.many)
        member = np.zeros((len(counts), 4), dtype=np.int64)
        for column, ids in enumerate(parts):
            member[ids.cpu().numpy(), column] = 1
        member[:, 3] = 1
        samples = counts.numpy()
        self._member, self._totals = member, samples @ member
        seen = member * (samples > 0)[:, None]
        # Nothing to average is nan, without a warning: 0 / 0 is what is meant.
        with np.errstate(divide="ignore", invalid="ignore"):
            self._weights = seen / (np.maximum(samples, 1)[:, None] * seen.sum(axis=0).astype(np.float64))

    def of(self, hits: Tensor) -> dict[str, float]:
        """The metrics of hits ``[2, N]``: of each class, samples ranked first, and samples among the first five."""
        # NumPy, not torch: small operations of torch's may wait for a second thread, long on a busy machine.
        numbers = hits.numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            over_samples = (numbers @ self._member) / self._totals.astype(np.float64)
        over_classes = np.where(self._totals > 0, numbers @ np.nan_to_num(self._weights), np.nan)
        result: dict[str, float] = {}
        for column, name in enumerate(SPLITS_AND_ALL):
            result[name], result[f"{name}_top5"] = over_samples[:, column].tolist()
            result[f"{name}_class_mean"], result[f"{name}_class_mean_top5"] = over_classes[:, column].tolist()
        return result
