"""Choosing among classifiers by their accuracy on validation features: what all baselines share, and what they return.

Candidates that differ from one classifier by a factor and a constant a class (tau-normalisation, LWS, logit adjustment) are
all measured from logits computed once, block by block, so that no ``[samples, classes]`` matrix is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..classes import ClassSplit, check_split
from ..metrics.accuracy import SPLITS_AND_ALL, SplitMetrics, label_ranks
from ..utils.checks import check_choice
from ..utils.files import without_nan
from ..utils.linear import wide
from ..utils.tensors import LabelledFeatures, TensorLike, check_finite
from . import cached_logits
from .cached_logits import check_samples
from .options import SELECTIONS, check_min_all, selection_score

__all__ = [
    "BaselineResult",
    "Policy",
    "Rescaling",
    "Validation",
]

# Elements of a block of logits: few enough to stay in a processor's cache between the product and the candidates.
_BLOCK_ELEMENTS = 1 << 20

# What a score is lowered by below a bound: no other score is lower than -2.
_BELOW_ALL_OTHERS = 4

# Fewer validation samples, of few or of base classes, are a handful, by which nothing is chosen.
_HANDFUL = 10


@dataclass
class BaselineResult:
    """A classifier made by a baseline, and how it was chosen.

    Attributes:
        name: the baseline, a key of :data:`alphaext.baselines.BASELINES`.
        linear: the classifier, which an Alpha Net can start from (:meth:`alphaext.AlphaNet.from_linear`).
        chosen: what was chosen, such as ``{"tau": 0.7}`` or ``{"epoch": 9}``; empty where there was no choice.
        table: a dictionary for each candidate, with its value under the name that ``chosen`` has and, with validation data, its
            top-1 accuracy ``few``, ``medium``, ``many`` and ``all`` over samples, fractions of 1 (nan for a part without
            samples).
        policy: how the choice was made: ``"best_all"``, ``"best_few with all >= 0.4440"``, ``"last"``, or ``"fixed"`` for what
            the caller had set.
        settings: the other options that made the classifier what it is.
        seconds: wall-clock time.
        original: the accuracy of the classifier that the baseline started from, or None without one or without validation
            data.
        scales: what LWS multiplied the rows by, ``[N]``; None for the other baselines.
    """

    name: str
    linear: nn.Linear = field(repr=False)
    chosen: dict[str, Any]
    table: list[dict[str, Any]] = field(repr=False)
    policy: str
    settings: dict[str, Any] = field(repr=False)
    seconds: float
    original: dict[str, float] | None = None
    scales: Tensor | None = field(default=None, repr=False)

    @property
    def accuracy(self) -> dict[str, float] | None:
        """Validation accuracy of the chosen candidate: ``few``, ``medium``, ``many``, ``all``; None without validation data."""
        for row in self.table:
            if "all" in row and all(row.get(name) == value for name, value in self.chosen.items()):
                return {name: row[name] for name in SPLITS_AND_ALL}
        return None

    def to_dict(self) -> dict[str, Any]:
        """All but the classifier as numbers, texts and lists, for JSON; nan becomes None."""
        return {
            "name": self.name,
            "chosen": without_nan(self.chosen),
            "table": without_nan(self.table),
            "policy": self.policy,
            "settings": without_nan(self.settings),
            "seconds": self.seconds,
            "original": without_nan(self.original),
            "accuracy": without_nan(self.accuracy),
            "scales": None if self.scales is None else self.scales.tolist(),
        }


@dataclass(frozen=True)
class Policy:
    """Which candidate to take: the one with the largest :meth:`score`; of equal ones, the one nearest to no change.

    Made by :meth:`of`, which checks it.

    Example:
        >>> accuracies = [{"few": 0.1, "all": 0.5}, {"few": 0.3, "all": 0.48}, {"few": 0.4, "all": 0.4}]
        >>> Policy("best_few", min_all=0.45).choose(accuracies, changes=[0, 1, 2])
        1

    Attributes:
        select: ``"best_all"``, the best accuracy over all validation samples; ``"best_few"``, the best few accuracy among those
            whose accuracy over all is not below ``min_all`` (if none is, the best accuracy over all); or ``"last"``.
        min_all: a fraction of 1.
        min_base: the least accuracy over samples of base classes, a fraction of 1; candidates below it come after all others.
        base_samples: validation samples of medium and of many classes, whose accuracies that one is made of.
    """

    select: str
    min_all: float | None = None
    min_base: float | None = None
    base_samples: tuple[int, int] = (0, 0)

    @classmethod
    def of(
        cls,
        select: str | None,
        min_all: float | None,
        val_labels: Tensor | None,
        few_classes: Tensor,
        choices: tuple[str, ...] = SELECTIONS,
    ) -> Policy:
        """A policy, checked; without ``select``, ``"best_all"`` where there are validation samples, else ``"last"``.

        Raises:
            TypeError, ValueError: an unknown policy; one that needs validation samples (``"best_few"``: of few classes), where
                there are none; a ``min_all`` that is no fraction or goes with another policy.
        """
        if select is None:
            select = "last" if val_labels is None else "best_all"
        check_choice(select, "select", choices)
        min_all = check_min_all(min_all, select)
        if select != "last" and val_labels is None:
            raise ValueError(f"select={select!r} needs val_features and val_labels")
        if select == "best_few" and val_labels is not None and not bool(torch.isin(val_labels, few_classes.cpu()).any()):
            raise ValueError("val_labels has no sample of a few class, so select='best_few' has nothing to go by")
        return cls(select, min_all)

    def bounded(self, original: dict[str, float] | None) -> Policy:
        """The same, with the original classifier's own accuracy over all where ``"best_few"`` has no other bound."""
        if self.select != "best_few" or self.min_all is not None:
            return self
        if original is None:
            raise ValueError("select='best_few' needs min_all, or linear, whose own accuracy over all is the default")
        return replace(self, min_all=original["all"])

    def score(self, accuracy: dict[str, float]) -> float:
        """How good a candidate is by its validation accuracy; under ``"last"``, by its ``epoch``."""
        base = self.base_accuracy(accuracy)
        if self.min_base is not None and base < self.min_base:
            return base - _BELOW_ALL_OTHERS
        return float(accuracy["epoch"]) if self.select == "last" else selection_score(self.select, accuracy, self.min_all)

    def base_accuracy(self, accuracy: dict[str, float]) -> float:
        """The accuracy over samples of base classes; 0 where there are none."""
        parts = [(accuracy[name], count) for name, count in zip(("medium", "many"), self.base_samples, strict=True) if count]
        return sum(share * count for share, count in parts) / max(sum(self.base_samples), 1)

    def choose(self, accuracies: Sequence[dict[str, float]], changes: Sequence[float]) -> int:
        """The index of the candidate to take; ``changes`` says how far from no change each one is, at least 0."""
        return max(range(len(accuracies)), key=lambda index: (self.score(accuracies[index]), -changes[index], -index))

    def __str__(self) -> str:
        return self.select if self.select != "best_few" else f"best_few with all >= {self.min_all:.4f}"


@dataclass(frozen=True)
class Rescaling:
    """A change of a classifier that leaves the direction of each row as it is.

    Attributes:
        scale: ``[N]``, what multiplies the logits without bias; None for 1.
        shift: ``[N]``, what is added then, the bias; None for 0.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __call__(self, products: Tensor) -> Tensor:
        """The logits of the changed classifier, from the products of features and rows ``[n, N]``."""
        if self.scale is None:
            return products if self.shift is None else products + self.shift
        return products * self.scale if self.shift is None else torch.addcmul(self.shift, products, self.scale)


def unfit_to_choose(labels: Tensor, split: ClassSplit) -> str:
    """Why nothing can be chosen by validation samples of these labels; empty where they will do."""
    for name, classes in (("few", split.few), ("base", split.base)):
        shown = torch.isin(labels, classes.to(labels.device))
        if len(classes) and int(shown.sum()) < _HANDFUL:
            return f"the validation samples have {int(shown.sum())} of {name} classes, and less than {_HANDFUL} say nothing"
        if 2 * len(labels[shown].unique()) < len(classes):
            return f"the validation samples show {len(labels[shown].unique())} of {len(classes)} {name} classes"
    return ""


class Validation:
    """Validation samples, by which candidates are measured.

    Args:
        features: ``[m, D]``, floating point; a tensor, an array or a memory map.
        labels: ``[m]`` integers.
        split: which classes are few, medium and many.
        weight: a classifier ``[N, D]`` they are for (only its shape matters).

    Attributes:
        counts: samples of each class, int64 ``[N]`` on the CPU.
        split: as given, on the CPU.

    Example:
        >>> split = ClassSplit(few=[1], medium=[], many=[0])
        >>> weight = torch.eye(2)
        >>> validation = Validation(torch.tensor([[2.0, 1.0], [2.0, 1.5]]), [0, 1], split, weight)
        >>> validation.accuracies(weight, [Rescaling(None, None), Rescaling(torch.tensor([1.0, 1.5]), None)])
        [{'few': 0.0, 'medium': nan, 'many': 1.0, 'all': 0.5}, {'few': 1.0, 'medium': nan, 'many': 1.0, 'all': 1.0}]
    """

    def __init__(
        self, features: TensorLike | LabelledFeatures, labels: TensorLike | None, split: ClassSplit, weight: Tensor
    ) -> None:
        self.split = check_split(split, len(weight))
        self.samples = check_samples(weight, features, labels, "val_features", "val_labels")
        self.samples.check()  # all rows are read
        self.counts = torch.bincount(self.samples.labels, minlength=len(weight))
        self._kept: tuple[Tensor, list[tuple[Tensor, Tensor]]] | None = None

    def check_fit_to_choose(self, number: str) -> None:
        """Refuse to choose a number by samples that show too little of few or of base classes."""
        doubt = unfit_to_choose(self.samples.labels, self.split)
        if doubt:
            raise ValueError(f"val_labels must be fit to choose {number} by, but {doubt}; give {number} itself")

    def accuracy(self, hits: Tensor) -> dict[str, float]:
        """Top-1 accuracy over samples from the samples of each class that are recognised, int64 ``[N]``."""
        found = SplitMetrics(self.split, self.counts).of(torch.stack([hits, hits]))
        return {name: found[name] for name in SPLITS_AND_ALL}

    def accuracies(self, weight: Tensor, candidates: Sequence[Rescaling]) -> list[dict[str, float]]:
        """The accuracy of each change of the classifier ``weight`` ``[N, D]``."""
        hits = torch.zeros(len(candidates), len(weight), dtype=torch.int64, device="cpu")
        for products, labels in self.products(weight):
            for candidate, own in zip(candidates, hits, strict=True):
                recognised = labels.masked_select(label_ranks(candidate(products), labels) == 0)
                own += torch.bincount(recognised, minlength=len(weight)).cpu()
        return [self.accuracy(own) for own in hits]

    def of_layer(self, weight: Tensor, bias: Tensor | None) -> dict[str, float]:
        """The accuracy of a linear layer."""
        return self.accuracies(wide(weight), [Rescaling(None, None if bias is None else wide(bias))])[0]

    def products(self, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Block by block, the products of features and rows ``[block, N]``, and the labels, where ``weight`` is."""
        if self._kept is not None and self._kept[0] is weight:
            yield from self._kept[1]
            return
        features = self.samples.features
        rows = max(1, _BLOCK_ELEMENTS // max(weight.shape))
        for start in range(0, len(features), rows):
            block = features[start : start + rows].to(weight.device, weight.dtype)
            check_finite(block, "val_features", first_row=start)
            with torch.autocast(weight.device.type, enabled=False):
                products = block @ weight.t()
            yield products, self.samples.labels[start : start + rows].to(weight.device)

    def keep(self, weight: Tensor) -> None:
        """Keep the products with ``weight``, which are asked for time and again, if they fit the bound of cached logits."""
        if len(self.samples.labels) * len(weight) * weight.dtype.itemsize <= cached_logits.CACHE_BYTES:
            self._kept = weight, list(self.products(weight))
