"""How often the right class is among the best scores: for each split, for each class, and over all samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..classes import ClassSplit
from ..utils.tensors import TensorLike, check_same_device, check_targets, floating_tensor

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
    scores = floating_tensor(logits, "logits", ("n", "N"))
    samples, num_classes = scores.shape
    label_ids = check_targets(labels, num_classes, samples, "logits").to(scores.device)
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


class SplitMetrics:
    """Top-1 and top-5 accuracy for each part of a split, over samples and as mean over classes.

    Keys are ``few``, ``medium``, ``many``, ``all``, each also with ``_top5``, ``_class_mean`` and ``_class_mean_top5``; a part
    without samples is NaN.
    """

    def __init__(self, split: ClassSplit, counts: Tensor) -> None:
        """``counts``: validation samples of each class."""
        member = np.zeros((len(counts), 4), dtype=np.int64)
        for column, name in enumerate(SPLITS):
            member[getattr(split, name).cpu().numpy(), column] = 1
        member[:, 3] = 1
        samples = counts.numpy()
        self._member, self._totals = member, samples @ member
        seen = member * (samples > 0)[:, None]
        # Nothing to average is nan, without a warning: 0 / 0 is what is meant.
        with np.errstate(divide="ignore", invalid="ignore"):
            self._weights = np.nan_to_num(seen / (np.maximum(samples, 1)[:, None] * seen.sum(axis=0).astype(np.float64)))

    def of(self, hits: Tensor) -> dict[str, float]:
        """The metrics of hits ``[2, N]``: of each class, samples ranked first, and samples among the first five."""
        # NumPy, not torch: small operations of torch's may wait for a second thread, long on a busy machine.
        numbers = hits.numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            over_samples = (numbers @ self._member) / self._totals.astype(np.float64)
        over_classes = np.where(self._totals > 0, numbers @ self._weights, np.nan)
        result: dict[str, float] = {}
        for column, name in enumerate(SPLITS_AND_ALL):
            result[name], result[f"{name}_top5"] = over_samples[:, column].tolist()
            result[f"{name}_class_mean"], result[f"{name}_class_mean_top5"] = over_classes[:, column].tolist()
        return result
