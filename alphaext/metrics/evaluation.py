"""How good a classifier is: accuracies of the parts of a split, with intervals; accuracy of each class; calibration.

Everything is computed from :class:`alphaext.metrics.Predictions`, a few numbers a sample. The sixteen accuracies have the
names of :class:`alphaext.training.FitResult`: ``few``, ``medium``, ``many`` and ``all``, top-1 over samples; each also with
``_top5``, ``_class_mean`` and ``_class_mean_top5``.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..classes import ClassSplit
from ..utils.checks import check_choice, check_integer, check_kind, check_number
from ..utils.tensors import TensorLike
from .accuracy import SPLITS_AND_ALL, SPLITS_AND_EMPTY, SplitMetrics
from .bootstrap import bootstrap_percentiles
from .predictions import Predictions, predict_logits


def split_metrics(predictions: Predictions, split: ClassSplit) -> dict[str, float]:
    """Return top-1 and top-5 accuracy of the few, medium and many classes and of all, over samples and as mean over classes.

    All N classes compete for every sample; the split only says whose samples are averaged.

    Args:
        predictions: of the samples to measure on.
        split: which classes are few, medium and many, by training samples.

    Returns:
        Sixteen fractions of 1: ``few``, ``few_top5``, ``few_class_mean``, ``few_class_mean_top5``, and the same of ``medium``,
        ``many`` and ``all``. With fewer than five classes, the best five are all there are. A class without samples does not
        count; a part without samples is NaN.

    Raises:
        TypeError: predictions or a split that are none.
        ValueError: a split of another number of classes.

    Example:
        >>> predictions = Predictions(ranks=[0, 1], predicted=[0, 0], labels=[0, 1], num_classes=3)
        >>> found = split_metrics(predictions, ClassSplit(few=[2], medium=[1], many=[0]))
        >>> found["few"], found["medium"], found["medium_top5"], found["all"]
        (nan, 0.0, 1.0, 0.5)
    """
    parts = check_predictions(predictions, split)
    return SplitMetrics(parts, predictions.counts()).of(torch.stack([predictions.hits(1), predictions.hits(5)]))


def per_class(predictions: Predictions, top_k: int = 1) -> Tensor:
    """Return the accuracy of each class: the share of its samples that have it among their best ``top_k`` classes.

    Args:
        predictions: of the samples to measure on.
        top_k: default 1; at most N.

    Returns:
        float64 [N], fractions of 1, NaN for a class without samples.

    Raises:
        TypeError, ValueError: ``predictions`` that are none, ``top_k`` outside ``1 .. N``.

    Example:
        >>> per_class(Predictions(ranks=[0, 1], predicted=[0, 0], labels=[0, 1], num_classes=3))
        tensor([1., 0., nan], dtype=torch.float64)
    """
    check_kind(predictions, Predictions, "predictions", hint="predict makes them")
    top_k = check_integer(top_k, "top_k", minimum=1, maximum=predictions.num_classes)
    # 0 / 0 is the NaN that is promised.
    return predictions.hits(top_k).to(torch.float64) / predictions.counts()


def split_accuracy(
    logits: TensorLike,
    labels: TensorLike,
    split: ClassSplit,
    *,
    top_k: int = 1,
    average: Literal["samples", "classes"] = "samples",
) -> dict[str, float]:
    """Return the accuracy on the few, medium and many classes and on all of them, for any ``top_k``.

    Args:
        logits: floating point [n, N].
        labels: right class of each sample, integers [n].
        split: which classes are few, medium and many, by training samples.
        top_k: default 1; the paper's tables show 1 and 5. Of equal scores the class of lower id comes first.
        average: ``"samples"`` (default) weighs every sample alike; ``"classes"`` is the mean of the accuracies of the
            classes that have samples. On test sets with equally many samples a class the two agree.

    Returns:
        Fractions 0 to 1 (the paper prints 100 times them) under ``few``, ``medium``, ``many`` and ``all``. A part
        without a sample is NaN, not an error.

    Raises:
        TypeError, ValueError: as :func:`predict_logits`; ``top_k`` outside ``1 .. N``, an unknown ``average``, a split of
            another number of classes than N.

    Example:
        >>> split = ClassSplit(few=[2], medium=[1], many=[0])
        >>> split_accuracy(torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]), [0, 1], split)
        {'few': nan, 'medium': 0.0, 'many': 1.0, 'all': 0.5}
    """
    check_choice(average, "average", ("samples", "classes"))
    predictions = predict_logits(logits, labels)
    parts = check_predictions(predictions, split, "logits")
    hits = predictions.hits(check_integer(top_k, "top_k", minimum=1, maximum=predictions.num_classes))
    found = SplitMetrics(parts, predictions.counts()).of(torch.stack([hits, hits]))
    return {name: found[name if average == "samples" else f"{name}_class_mean"] for name in SPLITS_AND_ALL}


def bootstrap_intervals(
    predictions: Predictions, split: ClassSplit, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return an interval for each of the sixteen accuracies: how they might differ on another test set like this one.

    A percentile bootstrap with the test images of each class resampled by themselves, because benchmarks fix how many a class
    has: resampling all images together would also vary those numbers, and make intervals wider than the chance that is left.
    On test sets with equally many images a class, the intervals over samples and over classes agree up to their draws. Classes
    with very few test images are allowed for (``n - 1`` of ``n`` images are drawn, which makes the variance right).

    Which training run it was, and which training images, is not in these intervals. An accuracy of exactly 0 or 1 resamples
    to itself: its interval has no width, however few the samples.

    Args:
        predictions: of the samples to measure on.
        split: which classes are few, medium and many.
        resamples: test sets drawn; default 1000.
        confidence: of the intervals, between 0 and 1; default 0.95.
        seed: of the draws; the same seed gives the same intervals.

    Returns:
        (low, high) under the names of :func:`split_metrics`, fractions of 1; NaN for a part without samples.

    Raises:
        TypeError, ValueError: as :func:`split_metrics`; ``resamples`` below 1, ``confidence`` outside (0, 1), a negative seed.

    Example:
        >>> labels = torch.arange(200) % 2
        >>> predictions = Predictions(ranks=[0, 1] * 50 + [0, 0] * 50, predicted=[0, 0] * 50 + [0, 1] * 50,
        ...                           labels=labels, num_classes=2)
        >>> low, high = bootstrap_intervals(predictions, ClassSplit(few=[1], medium=[], many=[0]))["few"]
        >>> 0.35 < low < 0.45, 0.55 < high < 0.65
        (True, True)
    """
    return bootstrap_percentiles(
        check_predictions(predictions, split),
        predictions.counts(),
        torch.stack([predictions.hits(1), predictions.hits(5)]),
        None,
        resamples=check_integer(resamples, "resamples", minimum=1),
        confidence=check_number(confidence, "confidence", above=0, below=1),
        seed=check_integer(seed, "seed", minimum=0),
    )


def expected_calibration_error(predictions: Predictions, split: ClassSplit, bins: int = 15) -> dict[str, float]:
    """Return how far a classifier's confidence is from how often it is right: the expected calibration error of each part.

    Samples are sorted into bins of equal width by the probability of the predicted class; in each bin the mean of these is
    compared with the share that is right, and the differences are averaged, each bin weighed by its samples (C. Guo et al.,
    "On Calibration of Modern Neural Networks", ICML 2017).

    Args:
        predictions: with their confidence, as :func:`predict` makes them.
        split: which classes are few, medium and many: a sample belongs to the part of its right class.
        bins: default 15, as in Guo et al.

    Returns:
        Fractions of 1 under ``few``, ``medium``, ``many`` and ``all``; 0 is perfect, NaN is a part without samples.

    Raises:
        TypeError, ValueError: as :func:`split_metrics`; predictions without confidence, ``bins`` below 1.

    Example:
        >>> predictions = predict_logits(torch.tensor([[0.0, 0.0], [9.0, 9.0]]), [0, 1])
        >>> expected_calibration_error(predictions, ClassSplit(few=[1], medium=[], many=[0]))
        {'few': 0.5, 'medium': nan, 'many': 0.5, 'all': 0.0}
    """
    parts = check_predictions(predictions, split)
    bins = check_integer(bins, "bins", minimum=1)
    if predictions.confidence is None:
        raise ValueError("predictions must have confidence for a calibration error, got None; predict computes it")
    confidence = predictions.confidence.to(torch.float64).numpy()
    right = (predictions.ranks == 0).numpy()
    bin_of_sample = np.clip(np.ceil(confidence * bins).astype(np.int64), 1, bins) - 1
    part_of_sample = part_of_class(parts)[predictions.labels.numpy()]
    # Of each bin, how many are right beyond what their confidence adds up to.
    excess = np.bincount(part_of_sample * bins + bin_of_sample, weights=right - confidence, minlength=4 * bins).reshape(4, bins)
    errors = np.abs(np.vstack([excess[:3], excess.sum(axis=0)])).sum(axis=1).tolist()
    samples = [*np.bincount(part_of_sample, minlength=4).tolist()[:3], len(predictions)]
    return {
        name: error / number if number else math.nan
        for name, error, number in zip(SPLITS_AND_ALL, errors, samples, strict=True)
    }


def part_of_class(split: ClassSplit) -> npt.NDArray[np.int64]:
    """Which of :data:`~alphaext.metrics.accuracy.SPLITS_AND_EMPTY` each class belongs to, [N].

    Example:
        >>> part_of_class(ClassSplit(few=[2], medium=[1], many=[0])).tolist()
        [2, 1, 0]
    """
    parts = np.empty(split.num_classes, dtype=np.int64)
    for number, name in enumerate(SPLITS_AND_EMPTY):
        parts[getattr(split, name).cpu().numpy()] = number
    return parts


def check_predictions(predictions: Predictions, split: ClassSplit, name: str = "predictions") -> ClassSplit:
    """Return ``split`` on the CPU after checking that it is of the classes that ``predictions`` are of.

    Raises:
        TypeError: predictions or a split that are none.
        ValueError: another number of classes.
    """
    check_kind(predictions, Predictions, name, hint="predict makes them")
    check_kind(split, ClassSplit, "split", hint="split_classes makes one from counts")
    if split.num_classes != predictions.num_classes:
        raise ValueError(
            f"split must be of the classes that {name} are of, got {split.num_classes} and {predictions.num_classes} classes"
        )
    return split.cpu()
