"""What preset ``all`` does beyond ``few``: an average with two classifiers of other making, in which every row may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..baselines.averaging import average
from ..baselines.linear_discriminant import discriminant
from ..baselines.retraining import crt, short_features_factor
from ..classes import ClassSplit
from ..training.builder import Builder
from ..training.selection import BaselineResult
from ..utils.checks import format_ids


def check_all_rows(builder: Builder) -> None:
    """Check what the preset needs, before anything is trained."""
    if builder.validation is None:
        raise ValueError("preset='all' chooses weights on validation samples: it needs val_features and val_labels")
    check_every_class(builder.split)


def check_every_class(split: ClassSplit) -> None:
    """Check that every class has training samples, of which rows are made anew."""
    if len(split.empty):
        raise ValueError(
            "preset='all' makes every row anew and needs training samples of every class, labels has none of class "
            f"{format_ids(split.empty.tolist())}; preset='few' keeps the rows of such classes"
        )


def average_all_rows(
    repaired: nn.Linear, original: nn.Module, builder: Builder, seed: int, progress: bool | None
) -> BaselineResult:
    """Average a repaired layer with the discriminant, all of its means composed, and with balanced re-training.

    Where the average is not better than ``original`` on validation samples, that is kept. (The repaired layer's constant was
    chosen by its accuracy on the same samples, and so it looks better on them than it is.)
    """
    assert builder.validation is not None
    val_features, val_labels = builder.validation.real(), builder.validation.labels
    layers = layers_to_average(repaired, builder, seed, progress)
    return average(layers, val_features, val_labels, builder.split, original=original, class_counts=builder.counts())


def layers_to_average(repaired: nn.Linear, builder: Builder, seed: int, progress: bool | None) -> list[nn.Linear]:
    """A repaired layer and the two of other making; one that cannot be made of these features is left out."""
    features, labels, split = builder.samples.real(), builder.samples.labels, builder.split
    num_classes, factor = len(builder.weight), short_features_factor(features)
    val = builder.validation
    measured: dict[str, Any] = {} if val is None else {"val_features": val.real(), "val_labels": val.labels}

    def retrained() -> nn.Linear:
        return crt(
            features,
            labels,
            num_classes,
            **measured,
            split=split,
            seed=seed,
            progress=progress,
            epochs=10,
            lr=0.2 * factor,
            weight_decay=5e-4 / factor,
        ).linear

    makers: list[Callable[[], nn.Linear]] = [
        lambda: discriminant(features, labels, num_classes, split=split, compose="all").linear,
        retrained,
    ]
    layers = [repaired]
    for make in makers:
        try:
            layers.append(make())
        except (FloatingPointError, ValueError):  # no scatter within classes; a training that diverged
            continue
    return layers if len(layers) > 1 else [repaired, repaired]
