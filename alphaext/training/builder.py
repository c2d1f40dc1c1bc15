"""The one way from a classifier, features, labels and options to a head, its samples, and the engine that trains it.

:func:`alphaext.fit_many`, :func:`alphaext.repair`, the scikit-learn estimator and the study go through here; so does
:func:`alphaext.fit`, which enters behind the making of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..classes import ClassSplit, class_counts, class_means, split_classes
from ..head.alphanet import AlphaNet
from ..head.neighbors import build_members, pool_classes, reduce_classifiers, residual_directions, submodule_inputs
from ..utils.linear import linear_parameters
from ..utils.tensors import TensorLike, as_tensor
from .augmentation import draw_features
from .autograd_engine import AutogradEngine
from .cached_logits import Samples, check_samples
from .engine import Engine, TrainingData
from .native_engine import NativeEngine, SharedLogits, why_not_native
from .options import HeadOptions, TrainingOptions
from .sampling import EpochSampler
from .sgd import Sgd

__all__ = ["Builder", "make_engine", "training_data"]


class Builder:
    """Makes heads of one classifier, and their samples; what they share is computed once.

    Args:
        linear: the trained classifier, as for :func:`alphaext.fit_many`, as are all others but the last.
        features: ``[n, D]``.
        labels: ``[n]`` integers.
        inputs: ``[N, P]``, what sub-modules read instead of the classifier's rows, before PCA.

    Attributes:
        split: which classes are few, medium and many.
        validation: the validation samples, or None.
    """

    def __init__(
        self,
        linear: nn.Module,
        features: TensorLike,
        labels: TensorLike,
        *,
        val_features: TensorLike | None = None,
        val_labels: TensorLike | None = None,
        few_below: int = 20,
        many_above: int = 100,
        split: ClassSplit | None = None,
        means: TensorLike | None = None,
        inputs: Tensor | None = None,
    ) -> None:
        self.weight, self.bias = linear_parameters(linear)
        self.samples, self.validation = check_all_samples(self.weight, features, labels, val_features, val_labels)
        counts = class_counts(self.samples.labels, len(self.weight))
        if split is not None and not isinstance(split, ClassSplit):
            raise TypeError(f"split must be a ClassSplit, got {type(split).__name__}")
        if split is not None and split.num_classes != len(self.weight):
            raise ValueError(f"split must be of the classifier's {len(self.weight)} classes, got one of {split.num_classes}")
        self.split: ClassSplit = split or split_classes(counts, few_below=few_below, many_above=many_above)
        if len(self.split.few) == 0:
            smallest = int(counts[counts > 0].min())
            raise ValueError(f"labels has no few class: the smallest has {smallest} samples, few are those below {few_below}")
        self._inputs = self.weight if inputs is None else inputs
        self._means = means
        self._members: dict[tuple[str, int, str, int], Tensor] = {}
        self._reduced: dict[int | None, Tensor] = {}
        self._directions: tuple[Tensor, Tensor] | None = None
        self._drawn: dict[tuple[object, ...], Samples] = {}
        self._first: AlphaNet | None = None

    def head(self, options: HeadOptions, seed: int) -> AlphaNet:
        """A head; ``seed`` is that of its weights."""
        members = self._members_of(options.pool, options.top_k, options.metric, options.neighbor_seed).to(self.weight.device)
        z = None
        if options.coefficients != "direct":
            z = submodule_inputs(self._reduced_to(options.pca_dim), members)
        head = AlphaNet(
            self.weight,
            self.bias,
            members,
            z,
            coefficients=options.coefficients,
            hidden_dim=options.hidden_dim,
            gamma=options.gamma,
            rule=options.rule,
            init=options.init,
            shared=options.shared,
            projected_gradient=options.projected_gradient,
            seed=seed,
            **self._directions_of(options.residual),
        )
        # One copy of the frozen classifier's numbers for all heads, but a parameter each, which can go its own way.
        self._first = self._first or head
        for name in ("weight", "bias"):
            if getattr(head, name) is not None:
                setattr(head, name, nn.Parameter(getattr(self._first, name).detach(), requires_grad=False))
        reason = why_not_native(head, None)
        if reason:
            raise ValueError(f"the native engine cannot train this: {reason}")
        return head

    def data(self, head: AlphaNet, options: TrainingOptions) -> TrainingData:
        """The samples of a training; what is drawn with equal options is drawn once."""
        check_selection(options, self.validation, head.few_classes)
        key = (options.augment, options.augment_samples, options.augment_neighbors, options.seed)
        if key not in self._drawn:
            self._drawn[key] = with_drawn(self.samples, head, options, self.means)
        return sampled(self._drawn[key], self.validation, head, options, len(self.samples.labels))

    def means(self) -> Tensor:
        """The mean feature of each class, ``[N, D]``; 0 for a class without samples."""
        if self._means is None:
            self._means = class_means(self.samples.real(), self.samples.labels, len(self.weight))
        return as_tensor(self._means, "means")

    def _members_of(self, pool: str, top_k: int, metric: str, seed: int) -> Tensor:
        key = (pool, top_k, metric, seed)
        if key not in self._members:
            candidates = pool_classes(self.split, pool)
            self._members[key] = build_members(self.means(), self.split.few, candidates, top_k, metric=metric, seed=seed).cpu()
        return self._members[key]

    def _directions_of(self, count: int) -> dict[str, Any]:
        if count == 0:
            return {}
        if self._directions is None or len(self._directions[0]) < count + 1:
            self._directions = residual_directions(self.weight, self.means(), count, empty=self.split.empty)
        directions, bias = (part[: count + 1] for part in self._directions)
        if self.bias is None:
            return {"directions": directions[1:], "direction_bias": None}
        return {"directions": directions, "direction_bias": bias}

    def _reduced_to(self, pca_dim: int | None) -> Tensor:
        if pca_dim not in self._reduced:
            self._reduced[pca_dim] = reduce_classifiers(self._inputs, pca_dim)
        return self._reduced[pca_dim]


def check_all_samples(
    weight: Tensor, features: TensorLike, labels: TensorLike, val_features: TensorLike | None, val_labels: TensorLike | None
) -> tuple[Samples, Samples | None]:
    """Training samples, and validation samples, if there are any, checked."""
    if (val_features is None) != (val_labels is None):
        raise ValueError("val_features and val_labels must be given together")
    samples = check_samples(weight, features, labels, "features", "labels")
    if val_features is None or val_labels is None:
        return samples, None
    return samples, check_samples(weight, val_features, val_labels, "val_features", "val_labels")


def training_data(
    head: AlphaNet,
    features: TensorLike,
    labels: TensorLike,
    val_features: TensorLike | None,
    val_labels: TensorLike | None,
    options: TrainingOptions,
) -> TrainingData:
    """The data of a training of a head that there is, checked."""
    samples, validation = check_all_samples(head.weight, features, labels, val_features, val_labels)
    check_selection(options, validation, head.few_classes)

    def means() -> Tensor:
        return class_means(samples.real(), samples.labels, head.out_features)

    return sampled(with_drawn(samples, head, options, means), validation, head, options, len(samples.labels))


def check_selection(options: TrainingOptions, validation: Samples | None, few_classes: Tensor) -> None:
    """Check that a policy which needs validation data has some."""
    if options.select not in (None, "last") and validation is None:
        raise ValueError(f"select={options.select!r} needs val_features and val_labels")
    if options.few_bias and validation is None:
        raise ValueError("few_bias is chosen on validation samples: it needs val_features and val_labels")
    if options.select != "best_few" or validation is None:
        return
    if not bool(torch.isin(validation.labels, few_classes.cpu()).any()):
        raise ValueError("val_labels has no sample of a few class, so select='best_few' has nothing to go by")


def with_drawn(samples: Samples, head: AlphaNet, options: TrainingOptions, means: Callable[[], Tensor]) -> Samples:
    """The samples, and behind them those that ``augment`` asks for; ``means`` makes the class means ``[N, D]``."""
    if options.augment is None:
        return samples
    features, labels = draw_features(
        samples.real(),
        samples.labels,
        means(),
        head.few_classes,
        options.augment_samples,
        options.seed,
        options.augment_neighbors,
    )
    return Samples(features, labels, samples.name)


def sampled(
    samples: Samples, validation: Samples | None, head: AlphaNet, options: TrainingOptions, num_real: int
) -> TrainingData:
    """The data of a training; of ``samples`` the first ``num_real`` are real, and all others drawn."""
    drawn_from = num_real if options.augment is not None else None
    sampler = EpochSampler(samples.labels, head.few_classes, head.out_features, options, drawn_from or 0)
    return TrainingData(samples, sampler, validation, drawn_from)


def make_engine(
    head: AlphaNet,
    options: TrainingOptions,
    data: TrainingData,
    sgd: Sgd,
    optimizer: torch.optim.Optimizer | None,
    first_epoch: int = 1,
    logits: SharedLogits | None = None,
) -> Engine:
    """What trains ``head``: the native engine by the numbers ``sgd``, or torch's with ``optimizer``."""
    if optimizer is None:
        return NativeEngine(head, options, sgd, data, first_epoch, logits)
    return AutogradEngine(head, options, data, optimizer)
