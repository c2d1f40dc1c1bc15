"""Is one classifier better than another on the same samples: what was gained, what was lost, by chance or not, and who paid."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..classes import ClassSplit
from ..utils.checks import check_integer, check_number
from ..utils.tensors import first_true
from .accuracy import SPLITS, SplitMetrics
from .bootstrap import bootstrap_percentiles
from .evaluation import check_predictions, part_of_class
from .predictions import Predictions


@dataclass(frozen=True)
class PartComparison:
    """The samples of a part of the split, under two classifiers.

    Attributes:
        samples: how many there are.
        gained: those that only the classifier after recognises.
        lost: those that only the classifier before recognised.
        lost_to_few: those of the lost that are now taken for a few class.
        p_value: of the exact McNemar test: how probable a ``gained`` and a ``lost`` that differ so much would be if a sample on
            which the classifiers differ were as likely gained as lost. 1 where they do not differ.
        verdict: ``"better"``, ``"worse"`` or ``"no difference shown"``; ``"no samples"`` for an empty part.
    """

    samples: int
    gained: int
    lost: int
    lost_to_few: int
    p_value: float
    verdict: str


@dataclass(frozen=True)
class ClassLoss:
    """A class that is recognised less often than before.

    Attributes:
        class_id: the class.
        samples: its test samples.
        before: its accuracy before, a fraction of 1.
        after: its accuracy after.
        gained: its samples that only the classifier after recognises.
        lost: its samples that only the classifier before recognised.
        went_to: what the lost samples are now taken for: (class id, samples), most samples first.
        to_few: how many of the lost samples are now taken for a few class.
    """

    class_id: int
    samples: int
    before: float
    after: float
    gained: int
    lost: int
    went_to: tuple[tuple[int, int], ...]
    to_few: int


@dataclass(frozen=True)
class Confusion:
    """``count`` samples of the class ``label`` that are taken for the class ``predicted``."""

    label: int
    predicted: int
    count: int


@dataclass(frozen=True)
class Comparison:
    """Two classifiers on the same samples, made by :func:`compare`.

    Attributes:
        before: sixteen accuracies of the first (:func:`alphaext.metrics.split_metrics`).
        after: the same of the second.
        differences: the same, after less before.
        intervals: (low, high) of each difference.
        parts: of ``few``, ``medium``, ``many`` and ``all``: counts, p-value, verdict.
        paid: the classes that lost the largest share of their samples, the largest loss first; classes that lost none are
            not there.
        confusions_gained: the pairs of classes that are confused most often now and were not before: samples that are wrong
            now, and were recognised or taken for something else.
        confusions_lost: the same the other way round: wrong before, and now recognised or taken for something else.
        confidence: of the intervals and verdicts.
        resamples: of the bootstrap.
    """

    before: dict[str, float]
    after: dict[str, float]
    differences: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(repr=False)
    parts: dict[str, PartComparison]
    paid: tuple[ClassLoss, ...] = field(repr=False)
    confusions_gained: tuple[Confusion, ...] = field(repr=False)
    confusions_lost: tuple[Confusion, ...] = field(repr=False)
    confidence: float
    resamples: int

    def to_dict(self) -> dict[str, Any]:
        """The same as numbers, text, lists and dictionaries, for JSON."""
        return asdict(self)


def compare(
    before: Predictions,
    after: Predictions,
    split: ClassSplit,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    listed: int = 10,
) -> Comparison:
    """Compare two classifiers sample by sample.

    That both were measured on the same samples tells far more than two accuracies with an interval each: what they have in
    common cancels. The verdict of a part is about its top-1 accuracy over samples: a difference is called one where the exact
    McNemar test finds it at ``1 - confidence`` and the interval of the paired bootstrap leaves out 0. (The test is exact
    however few samples differ; the bootstrap, which would call four gained and none lost a gain, is not.) The four verdicts
    are taken each for itself.

    Args:
        before: what the first classifier says of the samples.
        after: what the second one says of the same samples, in the same order.
        split: which classes are few, medium and many.
        resamples: of the bootstrap (:func:`alphaext.metrics.bootstrap_intervals`); default 1000.
        confidence: of intervals and verdicts; default 0.95.
        seed: of the bootstrap.
        listed: the most classes and pairs of classes that are listed; default 10.

    Returns:
        A :class:`Comparison`.

    Raises:
        TypeError: predictions or a split that are none.
        ValueError: different labels, samples or classes; options out of range.

    Example:
        >>> split = ClassSplit(few=[1], medium=[], many=[0])
        >>> labels = torch.arange(40) % 2
        >>> before = predict_logits(torch.tensor([[1.0, 0.0]]).expand(40, 2), labels)
        >>> after = predict_logits(nn.functional.one_hot(labels, 2).float(), labels)
        >>> found = compare(before, after, split)
        >>> found.differences["few"], found.parts["few"].verdict, found.parts["many"].verdict
        (1.0, 'better', 'no difference shown')
    """
    parts = check_pair(before, after, split)
    resamples = check_integer(resamples, "resamples", minimum=1)
    confidence = check_number(confidence, "confidence", above=0, below=1)
    seed = check_integer(seed, "seed", minimum=0)
    listed = check_integer(listed, "listed", minimum=0)

    counts = before.counts()
    gained, lost = _exchanged(before, after), _exchanged(after, before)
    metrics = SplitMetrics(parts, counts)
    hits_before, hits_after = (torch.stack([p.hits(1), p.hits(5)]) for p in (before, after))
    intervals = bootstrap_percentiles(parts, counts, gained, lost, resamples=resamples, confidence=confidence, seed=seed)
    is_few = torch.from_numpy(part_of_class(parts) == 0)
    to_few = _count_classes(before, (before.ranks == 0) & (after.ranks != 0) & is_few.index_select(0, after.predicted))
    ids = {name: getattr(parts, name) for name in SPLITS} | {"all": torch.arange(parts.num_classes, device="cpu")}
    totals = torch.stack([counts, gained[0], lost[0], to_few])
    return Comparison(
        before=metrics.of(hits_before),
        after=metrics.of(hits_after),
        differences=metrics.of(hits_after - hits_before),
        intervals=intervals,
        parts={
            name: _part(totals.index_select(1, classes).sum(dim=1).tolist(), intervals[name], 1 - confidence)
            for name, classes in ids.items()
        },
        paid=_paid(before, after, counts, gained[0], lost[0], to_few, listed),
        confusions_gained=_new_confusions(before, after, listed),
        confusions_lost=_new_confusions(after, before, listed),
        confidence=confidence,
        resamples=resamples,
    )


def mcnemar_p_value(gained: int, lost: int) -> float:
    """Return the two-sided p-value of the exact McNemar test.

    Args:
        gained: samples that only one classifier recognises.
        lost: samples that only the other one recognises.

    Returns:
        The probability that of ``gained + lost`` tosses of a fair coin the heads differ from half as much as ``gained`` does;
        1 without any.

    Raises:
        TypeError, ValueError: numbers that are no integers, or negative.

    Example:
        >>> mcnemar_p_value(0, 5), mcnemar_p_value(3, 3)
        (0.0625, 1.0)
    """
    gained = check_integer(gained, "gained", minimum=0)
    lost = check_integer(lost, "lost", minimum=0)
    if gained == lost:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue)


def check_pair(before: Predictions, after: Predictions, split: ClassSplit) -> ClassSplit:
    """Return ``split`` on the CPU after checking that two classifiers were asked about the same samples of its classes."""
    parts = check_predictions(before, split, "before")
    check_predictions(after, split, "after")
    if len(before) != len(after):
        raise ValueError(f"before and after must be of the same samples, got {len(before)} and {len(after)} samples")
    if (index := first_true(before.labels != after.labels)) is not None:
        raise ValueError(
            f"before and after must be of the same samples with the same labels, got labels {int(before.labels[index])} and "
            f"{int(after.labels[index])} at index {index}"
        )
    return parts


def _count_classes(predictions: Predictions, chosen: Tensor) -> Tensor:
    """Of each class, how many of its samples are chosen: int64 [N]."""
    return torch.bincount(predictions.labels.masked_select(chosen), minlength=predictions.num_classes)


def _exchanged(without: Predictions, with_: Predictions) -> Tensor:
    """Of each class, its samples that only ``with_`` has right: int64 [2, N], first, and among the first five."""
    return torch.stack([_count_classes(with_, (with_.ranks < k) & (without.ranks >= k)) for k in (1, 5)])


def _part(totals: list[int], interval: tuple[float, float], level: float) -> PartComparison:
    samples, gained, lost, to_few = totals
    p_value = mcnemar_p_value(gained, lost)
    if samples == 0:
        verdict = "no samples"
    elif p_value < level and interval[0] > 0:
        verdict = "better"
    elif p_value < level and interval[1] < 0:
        verdict = "worse"
    else:
        verdict = "no difference shown"
    return PartComparison(samples, gained, lost, to_few, p_value, verdict)


def _paid(
    before: Predictions, after: Predictions, counts: Tensor, gained: Tensor, lost: Tensor, to_few: Tensor, listed: int
) -> tuple[ClassLoss, ...]:
    net = (lost - gained).numpy()
    paying = np.flatnonzero(net > 0)
    # By share, then by number, then by id.
    order = np.lexsort((paying, -net[paying], -net[paying] / counts.numpy()[paying]))
    classes = paying[order[:listed]].tolist()
    was_lost = (before.ranks == 0) & (after.ranks != 0)
    went = _pairs(before.labels.masked_select(was_lost), after.predicted.masked_select(was_lost), before.num_classes)
    hits_before, hits_after = before.hits(1).tolist(), after.hits(1).tolist()
    return tuple(
        ClassLoss(
            class_id=c,
            samples=int(counts[c]),
            before=hits_before[c] / int(counts[c]),
            after=hits_after[c] / int(counts[c]),
            gained=int(gained[c]),
            lost=int(lost[c]),
            went_to=tuple((pair.predicted, pair.count) for pair in went if pair.label == c),
            to_few=int(to_few[c]),
        )
        for c in classes
    )


def _new_confusions(before: Predictions, after: Predictions, listed: int) -> tuple[Confusion, ...]:
    new = (after.ranks != 0) & (after.predicted != before.predicted)
    return tuple(_pairs(after.labels.masked_select(new), after.predicted.masked_select(new), after.num_classes)[:listed])


def _pairs(labels: Tensor, predicted: Tensor, num_classes: int) -> list[Confusion]:
    """How often each pair of classes occurs, most often first, of equally many the lower ids first."""
    keys, counts = np.unique((labels * num_classes + predicted).numpy(), return_counts=True)
    pairs = np.column_stack([keys // num_classes, keys % num_classes, counts])
    return [Confusion(*pair) for pair in pairs[np.argsort(-counts, kind="stable")].tolist()]
