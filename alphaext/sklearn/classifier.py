"""Alpha Net as a scikit-learn meta-estimator: any linear classifier, its rare classes' rows repaired after its fit."""

from __future__ import annotations

import copy
import numbers
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn import get_config
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.utils import assert_all_finite, check_random_state, indexable
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping, get_routing_for_object
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, has_fit_parameter
from torch import nn

from ..classes import ClassSplit, split_classes
from ..head.alphanet import AlphaNet
from ..head.neighbors import pool_classes, pool_size
from ..training.builder import Builder
from ..training.options import OPTIONS, check_known, read_options, takes_options
from ..training.result import AlphaNetWarning, FitResult
from ..training.single import Run, split_of, train
from ..utils.linear import make_linear
from .estimators import (
    Array,
    Rows,
    Samples,
    attribute_of,
    best_scale,
    check_features,
    class_means,
    classifier_of,
    dense,
    features_of,
    held_out,
    is_frozen,
    last_step,
    with_rows,
)

__all__ = ["AlphaNetClassifier", "AlphaNetWarning"]

# Options of the table that it does not have, and its parameters that come from there.
_NOT_OFFERED = {
    *("coefficients", "residual", "neighbor_seed", "seed", "samples_per_class", "augment", "augment_samples"),
    *("augment_neighbors", "prior_correction", "regularize", "few_bias"),
}
_OPTIONS = [name for name in OPTIONS if name not in _NOT_OFFERED]

# Of each base class this part is held out to find the scale of the scores by: one number, for which that is plenty.
_SCALE_FRACTION = 0.25


def _has(method: str) -> Callable[[AlphaNetClassifier], bool]:
    def check(self: AlphaNetClassifier) -> bool:
        fitted = getattr(self, "composed_estimator_", None)
        getattr(self._estimator() if fitted is None else fitted, method)  # its AttributeError says why not
        return True

    return check


class AlphaNetClassifier(ClassifierMixin, MetaEstimatorMixin, BaseEstimator):
    """A linear classifier whose few-class rows are learned combinations of themselves and of strong base rows.

    Fits ``estimator``, trains an :class:`alphaext.AlphaNet` head on what it has learned, and replaces the rows of ``coef_``
    and ``intercept_`` of the classes with few training samples by the composed ones. The other rows stay as they are. The
    result is again a linear classifier; ``composed_estimator_`` is the estimator itself with the new rows, and needs neither
    ``alphaext`` nor ``torch``.

    Where there is no few class or no base class, the result is the plain estimator, and an :class:`AlphaNetWarning` says so.
    Of two classes both rows are multiples of one vector: under ``"clamp"`` and ``"softmax"`` that only scales the scores.

    Memory: dense ``X`` is read where it is. Of sparse ``X`` no more is made dense than ``n_samples`` times the number of
    features or of classes, whichever is smaller, in float64: ``decision_function(X)`` takes as much or more. Besides, ``coef_``
    and the class means are held in float64, a few times over.

    Args:
        estimator: a linear classifier with ``coef_``, ``intercept_`` and ``decision_function`` after its fit, such as
            LogisticRegression (default), LinearSVC, SGDClassifier or RidgeClassifier; or a Pipeline that ends in one, whose
            transformers make the features; or a FrozenEstimator around a fitted one, which is not fitted again.
        top_k: neighbours of each few class; the paper uses 5. More than there are means all there are, with a warning.
        pool: the classes that neighbours are chosen from: ``"base"`` (medium and many), as in the paper, ``"many"``, or
            ``"all"``.
        metric: what makes a class near: ``"euclidean"``, as in the paper, ``"cosine"``, or, as a control, ``"random"``.
        few_below: a class with fewer training samples is few; the paper uses 20.
        many_above: a class with more training samples is many; the paper uses 100.
        pca_dim: the sub-modules read rows of ``coef_`` reduced by PCA to at most this; the paper uses 500. None for full rows.
        hidden_dim: hidden units of a sub-module; None for as many as the width after PCA, as in the paper.
        gamma: the few class's own coefficient is kept in ``(0, gamma]``. Default 1; docs/defaults.md says why.
        rule: ``"clamp"``, ``"softmax"`` or ``"l1"``; see :class:`alphaext.AlphaNet`.
        init: ``"identity"`` starts near the original classifier, ``"default"`` as PyTorch does.
        shared: one network for all few classes instead of one each.
        projected_gradient: let a clamped coefficient come back; see :class:`alphaext.AlphaNet`.
        score_scale: the training takes scores times this for logits. 1 is right for a well regularised LogisticRegression;
            hinge and squared losses have scores of other scales, on which training with 1 can do harm. ``"auto"`` (default)
            takes the scale with the least cross-entropy over base classes on samples that the estimator has not seen: the
            validation data, or else a quarter of each base class's samples, for which a copy of the estimator is fitted to the
            rest (1 for a FrozenEstimator, which has seen all).
        epochs, batch_size, lr, momentum, dampening, weight_decay, nesterov, lr_schedule, lr_step, lr_factor, lr_milestones,
            negative_ratio, negative_sampling: of the head's training; see
            :class:`alphaext.training.TrainingOptions`.
        validation_fraction: this part of each class (at least one of two samples, none of one) is kept from both the
            estimator's and the head's training, and the epoch is selected by it. None (default) keeps none, and the last epoch
            counts, which does better where the few classes have no samples to spare (docs/sklearn.md).
        select, min_all: how the epoch is selected; see :class:`alphaext.training.TrainingOptions`.
        random_state: of the head's start, the samples drawn, and those held out; the estimator has its own.
        verbose: show a progress bar of the head's training.

    Attributes:
        classes_: class labels, ``[N]``.
        coef_, intercept_: of the composed classifier, ``[N, D]`` and ``[N]`` (one row for two classes), in the features that
            a Pipeline's transformers make.
        estimator_: the fitted estimator.
        composed_estimator_: the same with the composed rows; ``estimator_`` itself where there was nothing to repair.
        head_: the trained :class:`alphaext.AlphaNet`, or None. For two classes it has the rows ``-coef_/2`` and ``coef_/2``.
        result_: the :class:`alphaext.FitResult`, or None.
        few_classes_: labels of the repaired classes, ``[F]``.
        members_: labels ``[F, K+1]``: each few class and its neighbours, nearest first.
        alphas_: the coefficients, ``[F, K+1]``.
        score_scale_: the scale used.
        n_features_in_, feature_names_in_: as the estimator has them.

    Example:
        >>> from sklearn.datasets import make_blobs
        >>> X, y = make_blobs([60, 50, 40, 6], cluster_std=3.0, random_state=0)
        >>> model = AlphaNetClassifier(LogisticRegression(), top_k=2, random_state=0).fit(X, y)
        >>> model.few_classes_, model.members_.shape, model.coef_.shape
        (array([3]), (1, 3), (4, 2))
    """

    head_: AlphaNet | None
    result_: FitResult | None

    top_k: int
    pool: str
    metric: str
    rule: str
    select: str | None

    @takes_options(_OPTIONS)
    def __init__(
        self,
        estimator: Any = None,
        *,
        few_below: int = 20,
        many_above: int = 100,
        score_scale: float | str = "auto",
        validation_fraction: float | None = None,
        random_state: Any = None,
        verbose: int = 0,
        **options: Any,
    ) -> None:
        self.estimator = estimator
        self.few_below = few_below
        self.many_above = many_above
        self.score_scale = score_scale
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.verbose = verbose
        check_known(options, _OPTIONS)
        for name in _OPTIONS:
            setattr(self, name, options.get(name, OPTIONS[name].default))

    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, *, X_val: Any = None, y_val: Any = None, **fit_params: Any
    ) -> AlphaNetClassifier:
        """Fit the estimator, then repair the rows of its few classes.

        Args:
            X: ``[n_samples, n_features]``, dense or sparse, or whatever the estimator's first transformer takes.
            y: ``[n_samples]`` labels: numbers or strings.
            sample_weight: ``[n_samples]``, none negative; handed to the classifier's fit. Class means are weighted by them, and
                samples of weight 0 do not count. The head's training takes all other samples alike.
            X_val: validation samples, to select the epoch by.
            y_val: their labels.
            fit_params: handed to the estimator's fit (routed, where scikit-learn's metadata routing is enabled).

        Returns:
            The fitted object itself.

        Raises:
            ValueError, TypeError: for arguments out of range, or an estimator that is not a linear classifier with one row a
                class.
            FloatingPointError: when the head's training diverges; a smaller ``lr`` or ``score_scale`` may help.
        """
        self._check_parameters()
        random = check_random_state(self.random_state)
        seed = int(random.randint(2**31 - 1))
        estimator = self._estimator()
        samples, classes = self._check_samples(estimator, X, y, sample_weight, fit_params)
        validation = self._check_validation(samples.X, X_val, y_val, classes)

        counts = np.bincount(samples.labels[samples.weights > 0], minlength=len(classes))
        split, reason = self._split(counts)
        base = np.isin(np.arange(len(classes)), split.base.numpy())
        if self.validation_fraction is not None and not reason:
            held = held_out(samples, np.ones(len(classes), dtype=bool), float(self.validation_fraction), random)
            samples, validation = samples.part(~held), samples.part(held)

        self.estimator_ = samples.fit(clone(estimator))
        classifier = classifier_of(self.estimator_)
        self.classes_ = attribute_of(classifier, "classes_")
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(self.estimator_, name):
                setattr(self, name, getattr(self.estimator_, name))
            elif hasattr(self, name):  # of an earlier fit
                delattr(self, name)
        if not reason and not np.array_equal(self.classes_, classes):
            reason = f"the estimator's {len(self.classes_)} classes are not the {len(classes)} of y"
        if reason:
            return self._fall_back(classifier, reason)

        top_k = self._available_neighbours(split)
        rows = Rows.of(classifier, len(classes))
        features = features_of(self.estimator_, samples.X)
        rows.check(self.estimator_, samples.X, features)
        val_features = None if validation is None else features_of(self.estimator_, validation.X)
        self.score_scale_ = self._scale(samples, base, rows, validation, val_features, random)
        if not samples.weights.all():
            used = np.flatnonzero(samples.weights)
            features, samples = features[used], samples.part(samples.weights > 0)
        means = class_means(features, samples.labels, samples.weights, len(classes))
        val_labels = None if validation is None else validation.labels
        options = self._options() | {"top_k": top_k, "seed": seed, "neighbor_seed": seed}
        self._train(features, samples.labels, val_features, val_labels, rows, split, means, options)
        return self._compose(classifier)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OPTIONS}

    def _train(
        self, features: Any, labels: Array, val_features: Any, val_labels: Array | None, rows: Rows, split: ClassSplit,
        means: Array, options: dict[str, Any],
    ) -> None:  # fmt: skip
        """Train a head on features, or on logits where features are sparse and more than the classes."""
        weight, bias, scale = rows.weight, rows.bias, self.score_scale_
        scaled = inputs = torch.from_numpy(weight * scale)
        # A composed score is a mix of original ones, so a classifier whose features are its logits trains the same.
        from_logits = sparse.issparse(features) and weight.shape[1] > weight.shape[0]
        if from_logits:
            scaled = torch.eye(len(weight), dtype=torch.float64, device="cpu")

        def input_of(x: Any) -> Any:
            if from_logits and x is not None:
                return np.asarray(x @ weight.T) * scale
            return x.toarray() if sparse.issparse(x) else x

        builder = Builder(
            make_linear(scaled, torch.from_numpy(bias * scale)),
            input_of(features),
            labels,
            val_features=input_of(val_features),
            val_labels=val_labels,
            split=split,
            means=means,
            inputs=inputs,
        )
        head, of_training, data = builder.prepare(options)
        # Without the samples that are held out there may be fewer many classes.
        run = Run(head, of_training, data, split_of(head, data, self.many_above))
        self.result_ = train(run, progress=bool(self.verbose))
        # The coefficients are those of the unscaled classifier too.
        head.weight = nn.Parameter(torch.from_numpy(weight), requires_grad=False)
        head.bias = nn.Parameter(torch.from_numpy(bias), requires_grad=False)
        self.head_ = head

    def _compose(self, classifier: Any) -> AlphaNetClassifier:
        """Put the composed rows where the few classes' own were."""
        head = self.head_
        assert head is not None and head.bias is not None
        few = head.few_classes.numpy()
        few_weight, few_bias = (None if part is None else part.numpy() for part in head.composed())
        if len(self.classes_) == 2:
            coef, intercept = head.weight.numpy().copy(), head.bias.numpy().copy()
            coef[few], intercept[few] = few_weight, few_bias
            coef, intercept = coef[1:] - coef[:1], intercept[1:] - intercept[:1]
        else:
            coef = dense(classifier.coef_).copy()
            intercept = np.array(np.broadcast_to(classifier.intercept_, len(coef)), dtype=coef.dtype)
            coef[few], intercept[few] = few_weight, few_bias
        dtype = classifier.coef_.dtype
        self.coef_, self.intercept_ = coef.astype(dtype, copy=False), intercept.astype(dtype, copy=False)
        self.composed_estimator_ = with_rows(self.estimator_, self.coef_, self.intercept_)
        self.few_classes_ = self.classes_[few]
        self.members_ = self.classes_[head.members.numpy()]
        self.alphas_ = head.alphas().detach().numpy()
        return self

    def _fall_back(self, classifier: Any, reason: str) -> AlphaNetClassifier:
        warnings.warn(f"{reason}: the result is the plain estimator", AlphaNetWarning, stacklevel=3)
        self.coef_, self.intercept_ = attribute_of(classifier, "coef_"), attribute_of(classifier, "intercept_")
        self.composed_estimator_ = self.estimator_
        self.head_, self.result_ = None, None
        self.few_classes_ = self.classes_[:0]
        self.members_ = np.empty((0, self.top_k + 1), dtype=self.classes_.dtype)
        self.alphas_ = np.empty((0, self.top_k + 1))
        self.score_scale_ = 1.0 if self.score_scale == "auto" else float(self.score_scale)
        return self

    def _check_parameters(self) -> None:
        """Check all parameters before any work is done."""
        read_options(self._options())
        split_classes([1], few_below=self.few_below, many_above=self.many_above)
        if self.score_scale != "auto":
            _check_number(self.score_scale, "score_scale", "'auto' or a finite number above 0", np.inf)
        if self.validation_fraction is not None:
            _check_number(self.validation_fraction, "validation_fraction", "None or a number between 0 and 1", 1)

    def _check_samples(
        self, estimator: Any, X: Any, y: Any, sample_weight: Any, fit_params: dict[str, Any]
    ) -> tuple[Samples, Array]:
        """The training samples, and the classes of ``y``."""
        if y is None:
            raise ValueError(f"This {type(self).__name__} estimator requires y to be passed, but the target y is None")
        if not isinstance(estimator, Pipeline):  # whose first step may take anything
            check_features(X)
        y = np.asarray(column_or_1d(y, warn=True))
        assert_all_finite(y, input_name="y")
        check_classification_targets(y)
        (X, y) = indexable(X, y)
        classes, labels = np.unique(y, return_inverse=True)
        weights = np.ones(len(y)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        if weights.shape != (len(y),):
            raise ValueError(f"sample_weight must have shape [{len(y)}], one weight a sample, got {list(weights.shape)}")
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError("sample_weight must be finite, and no weight negative")
        if not weights.any():
            raise ValueError("sample_weight must not be zero for all samples")
        return Samples(X, y, labels, weights, self._fit_params(estimator, sample_weight, fit_params)), classes

    def _check_validation(self, X: Any, X_val: Any, y_val: Any, classes: Array) -> Samples | None:
        """The validation samples that were given."""
        if (X_val is None) != (y_val is None):
            raise ValueError("X_val and y_val must be given together")
        if X_val is None:
            if self.validation_fraction is None and self.select not in (None, "last"):
                raise ValueError(f"select={self.select!r} needs validation_fraction, or X_val and y_val")
            return None
        if self.validation_fraction is not None:
            raise ValueError("give either validation_fraction or X_val and y_val, got both")
        X_val, y_val = indexable(X_val, np.asarray(column_or_1d(y_val)))
        known = set(classes.tolist())
        unknown = [label for label in np.unique(y_val).tolist() if label not in known]
        if unknown:
            raise ValueError(f"y_val must hold classes of y only, got {', '.join(map(repr, unknown[:10]))}")
        shapes = [np.shape(array) for array in (X, X_val) if hasattr(array, "shape")]
        if len(shapes) == 2 and shapes[0][1:] != shapes[1][1:]:
            raise ValueError(f"X_val must have shape [m, {', '.join(map(str, shapes[0][1:]))}] as X, got {list(shapes[1])}")
        return Samples(X_val, y_val, np.searchsorted(classes, y_val), np.ones(len(y_val)), {})

    def _split(self, counts: Array) -> tuple[ClassSplit, str]:
        """Which classes are few, medium and many; and why there is nothing to repair, if so."""
        split = split_classes(counts, few_below=self.few_below, many_above=self.many_above)
        reason = ""
        if len(counts) < 2:
            reason = "y has one class only"
        elif len(split.few) == 0:
            reason = f"no class is few, with less than few_below={self.few_below} training samples"
        elif len(split.base) == 0:
            reason = f"no class is a base class, with at least few_below={self.few_below} training samples"
        elif len(pool_classes(split, self.pool)) == 0:
            reason = f"no class has more than many_above={self.many_above} training samples, and pool='many'"
        return split, reason

    def _available_neighbours(self, split: ClassSplit) -> int:
        """``top_k``, or the neighbours there are, with a warning."""
        available = pool_size(split, self.pool)
        if self.top_k > available:
            text = f"top_k={self.top_k} is more than the classes that neighbours can be chosen from: all {available} are taken"
            warnings.warn(text, AlphaNetWarning, stacklevel=3)
        if split.num_classes == 2 and self.rule != "l1":
            text = (
                f"of two classes, both rows are multiples of one vector: rule={self.rule!r} does no more than scale the scores"
            )
            warnings.warn(text, AlphaNetWarning, stacklevel=3)
        return min(self.top_k, available)

    def _scale(
        self, samples: Samples, base: Array, rows: Rows, validation: Samples | None, val_features: Any,
        random: np.random.RandomState,
    ) -> float:  # fmt: skip
        """What scores are multiplied with to be logits."""
        if self.score_scale != "auto":
            return float(self.score_scale)
        if base.sum() < 2:
            return 1.0
        if validation is not None and base[validation.labels].any():
            return best_scale(val_features, validation.labels, rows, base)
        if is_frozen(last_step(self.estimator_)):
            return 1.0
        held = held_out(samples, base, _SCALE_FRACTION, random)
        if not held.any():
            return 1.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are those of the estimator's own fit
            other = samples.part(~held).fit(clone(self._estimator()))
        unseen = samples.part(held)
        return best_scale(features_of(other, unseen.X), unseen.labels, Rows.of(classifier_of(other), len(base)), base)

    def _estimator(self) -> Any:
        if self.estimator is not None:
            return self.estimator
        default = LogisticRegression()
        return default.set_fit_request(sample_weight=True) if _routing_enabled() else default

    def _fit_params(self, estimator: Any, sample_weight: Any, fit_params: dict[str, Any]) -> dict[str, Any]:
        """What the estimator's fit gets besides X and y."""
        params = {name: value for name, value in fit_params.items() if value is not None}
        if _routing_enabled():
            if sample_weight is not None:
                params["sample_weight"] = sample_weight
            router = get_routing_for_object(self)
            router.validate_metadata(method="fit", params=params)
            return dict(router.route_params(caller="fit", params=params)["estimator"]["fit"])
        if sample_weight is None or is_frozen(last_step(estimator)):
            return params
        if not has_fit_parameter(last_step(estimator), "sample_weight"):
            raise TypeError(f"sample_weight was given, but {type(last_step(estimator)).__name__} does not support it")
        prefix = ""
        while isinstance(estimator, Pipeline):
            prefix += f"{estimator.steps[-1][0]}__"
            estimator = estimator.steps[-1][1]
        return params | {f"{prefix}sample_weight": sample_weight}

    def predict(self, X: Any) -> Array:
        """The labels of ``X``, ``[n_samples]``."""
        return self._fitted().predict(X)

    def decision_function(self, X: Any) -> Array:
        """Scores ``[n_samples, N]``, or ``[n_samples]`` for two classes: of the second one, above 0 where it is predicted."""
        return self._fitted().decision_function(X)

    @available_if(_has("predict_proba"))  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Any) -> Array:
        """Probabilities ``[n_samples, N]``, as the estimator makes them of scores; only where it does."""
        return self._fitted().predict_proba(X)

    @available_if(_has("predict_log_proba"))  # type: ignore[untyped-decorator]
    def predict_log_proba(self, X: Any) -> Array:
        """Logarithms of the probabilities, ``[n_samples, N]``; only where the estimator has them."""
        return self._fitted().predict_log_proba(X)

    def _fitted(self) -> Any:
        check_is_fitted(self, "composed_estimator_")
        return self.composed_estimator_

    def get_metadata_routing(self) -> MetadataRouter:
        """What this object's fit asks for, and what it hands to the estimator's."""
        mapping = MethodMapping().add(caller="fit", callee="fit")
        router = MetadataRouter(owner=type(self).__name__).add_self_request(self)
        return router.add(estimator=self._estimator(), method_mapping=mapping)

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import get_tags  # scikit-learn 1.6

        tags, inner = super().__sklearn_tags__(), get_tags(self._estimator())
        tags.input_tags = copy.deepcopy(inner.input_tags)
        if inner.classifier_tags is not None:
            tags.classifier_tags = copy.deepcopy(inner.classifier_tags)
            tags.classifier_tags.multi_label = False
        return tags


def _routing_enabled() -> bool:
    return bool(get_config().get("enable_metadata_routing", False))


def _check_number(value: object, name: str, allowed: str, below: float) -> None:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    if not 0 < float(value) < below:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
