"""The whole repair in one call: few and base classes, neighbours, training, and a plain linear layer back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..classes import ClassSplit, class_counts
from ..head.alphanet import AlphaNet
from ..head.neighbors import pool_size
from ..metrics.accuracy import SplitMetrics
from ..training.builder import Builder
from ..training.engine import hits_of
from ..training.presets import PRESETS, preset_options
from ..training.result import FitResult
from ..training.selection import BaselineResult
from ..training.single import Run, train
from ..utils.checks import check_choice
from ..utils.tensors import LabelledFeatures, TensorLike
from .all_rows import average_all_rows, check_all_rows

__all__ = ["Repair", "repair"]


@dataclass(frozen=True)
class Repair:
    """What :func:`repair` made.

    Attributes:
        linear: the repaired layer: its base rows are the original ones, to the bit, but for preset ``"all"``.
        head: the Alpha Net that it is folded from, with coefficients and neighbours.
        result: the training's history, and with validation samples the accuracies before and after.
        split: which classes are few, medium and many; ``split.empty``, classes without training samples, keep their rows.
        average: under preset ``"all"``, how the head's layer was averaged with others: which candidate was chosen, its weights.
    """

    linear: nn.Linear
    head: AlphaNet
    result: FitResult
    split: ClassSplit
    average: BaselineResult | None = None


def repair(
    linear: nn.Module,
    features: TensorLike | LabelledFeatures,
    labels: TensorLike | None = None,
    *,
    val_features: TensorLike | LabelledFeatures | None = None,
    val_labels: TensorLike | None = None,
    preset: str = "few",
    few_below: int = 20,
    many_above: int = 100,
    split: ClassSplit | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Repair:
    """Rebuild the few rows of a trained classifier, by cached features.

    Args:
        linear: the trained classifier, such as ``nn.Linear``, in float32 or float64; it is not changed.
        features: ``[n, D]``, the training features.
        labels: ``[n]`` integers, where ``features`` is no :class:`alphaext.features.Features`, which has its labels.
        val_features: ``[m, D]`` with ``val_labels``, or features likewise: what the epoch and the constant on the few scores
            are chosen by. Without, the last epoch is taken, and no constant.
        val_labels: ``[m]`` integers.
        preset: ``"few"`` or ``"paper"`` (:data:`alphaext.training.PRESETS`), which change few rows alone; or ``"all"``:
            preset few averaged with the discriminant and with balanced re-training. That may change every row, and needs
            validation samples.
        few_below: a class with fewer training samples is few; 20 in the paper.
        many_above: a class with more is many; 100 in the paper.
        split: which classes are few, medium and many, instead of these two.
        progress: show a progress bar; None shows it where standard error is a terminal.
        options: any of a configuration of :func:`alphaext.fit_many`, in place of the preset's.

    Returns:
        A :class:`Repair`.

    Raises:
        TypeError, ValueError: as :func:`alphaext.fit_many`.
        FloatingPointError: the training diverged.

    Example:
        >>> features, labels = torch.randn(95, 8), torch.arange(4).repeat_interleave(torch.tensor([30, 30, 30, 5]))
        >>> original = nn.Linear(8, 4)
        >>> made = repair(original, features, labels, epochs=2)
        >>> torch.equal(made.linear.weight[:3], original.weight[:3]), made.head.coefficients
        (True, 'direct')
    """
    check_choice(preset, "preset", (*PRESETS, "all"))
    builder = Builder(
        linear,
        features,
        labels,
        val_features=val_features,
        val_labels=val_labels,
        few_below=few_below,
        many_above=many_above,
        split=split,
    )
    available = pool_size(builder.split, options.get("pool", "base"))
    if preset == "all":
        check_all_rows(builder)
    of_few_rows = "few" if preset == "all" else preset
    config = preset_options(of_few_rows, pool_size=available, validation=val_features is not None) | options
    head, of_training, data = builder.prepare(config)
    result = train(Run(head, of_training, data, builder.split), progress=progress)
    if preset != "all" or builder.validation is None:
        return Repair(head.fold(), head, result, builder.split)
    # The average is to beat the original, not the repaired layer: that one looks better than it is on the samples that its
    # constant was chosen by, and would be kept where the average is better on other samples (as on BANKING77).
    average = average_all_rows(head.fold(), linear, builder, of_training.seed, progress)
    metrics = SplitMetrics(builder.split, class_counts(builder.validation.labels, head.out_features))
    after = metrics.of(hits_of(average.linear, builder.validation))
    return Repair(average.linear, head, replace(result, metrics_after=after), builder.split, average)
