"""The one way from a classifier, features, labels and options to a head and its samples.

:func:`alphaext.fit_many`, :func:`alphaext.repair`, the scikit-learn estimator and the study go through here; so does
:func:`alphaext.fit`, which enters behind the making of the head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..classes import ClassSplit, check_split, class_counts, class_means, split_classes
from ..head.alphanet import AlphaNet
from ..head.composition import direction_options
from ..head.neighbors import build_members, pool_classes, reduce_classifiers, residual_directions, submodule_inputs
from ..utils.linear import linear_parameters
from ..utils.tensors import LabelledFeatures, TensorLike, as_tensor, class_ids
from .augmentation import draw_features
from .cached_logits import Samples, check_samples
from .engine import TrainingData
from .native_engine import why_not_native
from .options import HeadOptions, TrainingOptions, read_options
from .sampling import EpochSampler

__all__ = ["Builder", "training_data"]


class Builder:
    """Makes heads of one classifier, and their samples; what they share is computed once.

    Args:
        linear: the trained classifier, as for :func:`alphaext.fit_many`, as are all others.
        features: ``[n, D]``, or features that know their labels.
        labels: ``[n]`` integers, where the features do not know them.

    Attributes:
        split: which classes are few, medium and many.
        validation: the validation samples, or None.
    """

    def __init__(
        self,
        linear: nn.Module,
        features: TensorLike | LabelledFeatures,
        labels: TensorLike | None = None,
        *,
        val_features: TensorLike | LabelledFeatures | None = None,
        val_labels: TensorLike | None = None,
        few_below: int = 20,
        many_above: int = 100,
        split: ClassSplit | None = None,
        few_classes: TensorLike | None = None,
        means: TensorLike | None = None,
    ) -> None:
        self.weight, self.bias = linear_parameters(linear)
        if len(self.weight) < 2:
            raise ValueError("linear must have one row a class, so two or more; its weight has one")
        self.samples, self.validation = check_all_samples(self.weight, features, labels, val_features, val_labels)
        self.samples.check()  # for the class means, of which all rows are read
        counts = class_counts(self.samples.labels, len(self.weight))
        if few_classes is not None:
            if split is not None:
                raise ValueError("split already says which classes are few; do not give few_classes as well")
            few = class_ids(few_classes, len(counts), "few_classes", getattr(features, "class_names", None))
            split = ClassSplit.of_few(few, counts, many_above)
        below = "" if split is not None else f", few are those below {few_below}"
        if split is None:
            split = split_classes(counts, few_below=few_below, many_above=many_above)
        self.split = check_split(split, len(self.weight))
        if len(self.split.few) == 0:
            smallest = int(counts[counts > 0].min())
            raise ValueError(
                f"labels has no few class: the smallest has {smallest} samples{below}; few_classes names them whatever they "
                "have"
            )
        self._means = means
        self._directions: tuple[Tensor, Tensor] | None = None
        # What heads of equal options share.
        self._members_of = functools.cache(self._find_members)
        self._reduced_to = functools.cache(functools.partial(reduce_classifiers, self.weight))
        self._drawn: dict[tuple[object, ...], Samples] = {}
        self._first: AlphaNet | None = None

    def prepare(self, config: Mapping[str, Any]) -> tuple[AlphaNet, TrainingOptions, TrainingData]:
        """A head, how it is to be trained, and on what, by options of both."""
        of_head, options = read_options(config)
        head = self.head(of_head, options.seed)
        return head, options, self.data(head, options)

    def head(self, options: HeadOptions, seed: int) -> AlphaNet:
        """A head; ``seed`` is that of its weights."""
        members = self._members_of(options.pool, options.top_k, options.metric, options.neighbor_seed).to(self.weight.device)
        of_form: dict[str, Any] = {"gamma": options.gamma, "rule": options.rule, "seed": seed}
        of_form["projected_gradient"] = options.projected_gradient
        if options.coefficients == "closed-form":
            counts = class_counts(self.samples.labels, len(self.weight))
            head = AlphaNet.closed_form(self.weight, self.bias, members, counts, tau=options.tau, **of_form)
        else:
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
                init=options.init,
                shared=options.shared,
                **of_form,
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
        key = (options.augment, options.augment_samples, options.augment_neighbors, options.seed)
        if key not in self._drawn:
            self._drawn[key] = with_drawn(self.samples, head, options, self.means)
        return _data(head, self._drawn[key], self.validation, options)

    def counts(self) -> Tensor:
        """Training samples of each class, int64 ``[N]``."""
        return class_counts(self.samples.labels, len(self.weight))

    def means(self) -> Tensor:
        """The mean feature of each class, ``[N, D]``; 0 for a class without samples."""
        if self._means is None:
            self._means = class_means(self.samples.real(), self.samples.labels, len(self.weight))
        return as_tensor(self._means, "means")

    def _find_members(self, pool: str, top_k: int, metric: str, seed: int) -> Tensor:
        return build_members(
            self.means(), self.split.few, pool_classes(self.split, pool), top_k, metric=metric, seed=seed
        ).cpu()

    def _directions_of(self, count: int) -> dict[str, Any]:
        if count == 0:
            return {}
        if self._directions is None or len(self._directions[0]) < count + 1:
            self._directions = residual_directions(self.weight, self.means(), count, empty=self.split.empty)
        directions, bias = (part[: count + 1] for part in self._directions)
        return direction_options(directions, bias, self.bias)


def check_all_samples(
    weight: Tensor,
    features: TensorLike | LabelledFeatures,
    labels: TensorLike | None,
    val_features: TensorLike | LabelledFeatures | None,
    val_labels: TensorLike | None,
) -> tuple[Samples, Samples | None]:
    """Training samples, and validation samples, if there are any, checked."""
    samples = check_samples(weight, features, labels)
    if val_features is None and val_labels is None:
        return samples, None
    validation = check_samples(weight, val_features, val_labels, "val_features", "val_labels")
    validation.check()  # all of its rows are read
    return samples, validation


def with_drawn(
    samples: Samples, head: AlphaNet, options: TrainingOptions, means: Callable[[], Tensor] | None = None
) -> Samples:
    """The samples, and behind them those that ``augment`` asks for; ``means`` makes the class means ``[N, D]``."""
    if options.augment is None:
        return samples
    features, labels = samples.real(), samples.labels
    samples.check()  # all of them, for the class means
    of_classes = class_means(features, labels, head.out_features) if means is None else means()
    asked = (options.augment_samples, options.seed, options.augment_neighbors)
    return Samples(*draw_features(features, labels, of_classes, head.few_classes, *asked), samples.name)


def training_data(
    head: AlphaNet,
    features: TensorLike | LabelledFeatures,
    labels: TensorLike | None,
    val_features: TensorLike | LabelledFeatures | None,
    val_labels: TensorLike | None,
    options: TrainingOptions,
) -> TrainingData:
    """The data of a training of a head that there is, checked."""
    samples, validation = check_all_samples(head.weight, features, labels, val_features, val_labels)
    return _data(head, with_drawn(samples, head, options), validation, options)


def _data(head: AlphaNet, samples: Samples, validation: Samples | None, options: TrainingOptions) -> TrainingData:
    """The data of a training; ``samples`` are what :func:`with_drawn` gave."""
    first_few = 0 if options.augment is None else samples.num_real
    sampler = EpochSampler(samples.labels, head.few_classes, head.out_features, options, first_few)
    return TrainingData(samples, sampler, validation)
