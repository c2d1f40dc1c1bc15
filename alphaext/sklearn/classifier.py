"""Alpha Net as a scikit-learn meta-estimator: any linear classifier, its rare classes' rows repaired after its fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn import get_config
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.utils import assert_all_finite, check_random_state, indexable
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping, get_routing_for_object
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, has_fit_parameter

from ..classes import ClassSplit, split_classes
from ..head.alphanet import AlphaNet
from ..head.neighbors import pool_size
from ..metrics.scale import best_scale
from ..repairing.new_classes import add_classes
from ..repairing.preset import Repair
from ..repairing.recommend import METHODS, compare_methods
from ..repairing.recommendation import Recommendation
from ..repairing.repair import repair
from ..training.builder import Builder
from ..training.options import OPTIONS, HeadOptions, read_options
from ..training.presets import PRESETS_AND_ALL, preset_options
from ..training.result import AlphaNetWarning, FitResult
from ..utils.callers import warn_caller
from ..utils.checks import check_choice, check_integer, check_number, if_given
from ..utils.linear import make_linear
from ..utils.option_table import check_known, with_options
from .estimators import (
    Array,
    FitSamples,
    Rows,
    attribute_of,
    check_scores_follow_rows,
    class_mean_accuracy,
    classifier_of,
    dense,
    features_of,
    gain_and_noise,
    held_out_scores,
    is_frozen,
    last_step,
    make_folds,
    own_rows,
    scores_of,
    with_rows,
)

__all__ = ["AlphaNetClassifier", "AlphaNetWarning"]

# Seeds come from random_state. What base classes lose is bounded by a constant, chosen on scores of samples not seen.
_OPTIONS = [name for name in OPTIONS if name not in ("seed", "neighbor_seed", "few_bias", "max_base_drop")]
_CONSTANTS = 200


def _has(method: str) -> Callable[[AlphaNetClassifier], bool]:
    def check(self: AlphaNetClassifier) -> bool:
        fitted = getattr(self, "composed_estimator_", None)
        getattr(self._estimator() if fitted is None else fitted, method)  # its AttributeError says why not
        return True

    return check


class AlphaNetClassifier(ClassifierMixin, MetaEstimatorMixin, BaseEstimator):
    """A linear classifier whose few-class rows are rebuilt from their own and strong base rows.

    ``fit`` fits ``estimator``, then copies of it to parts of the samples, which give scores of samples that they have not seen.
    On these scores :func:`alphaext.repair` trains the rows of the classes with few training samples. They take the place of the
    old ones in ``coef_`` and ``intercept_``; all other rows stay as they are. The result is again a linear classifier:
    ``composed_estimator_`` is the estimator itself with the new rows, and needs neither ``alphaext`` nor ``torch``.

    The new rows are kept where they are better on samples not seen: where the mean over classes of their accuracies gains more
    than its standard error. Else the result is the plain estimator, as it is where there is no few class or no base class; an
    :class:`AlphaNetWarning` says so.

    Rows are mixed relative to the mean of all rows, which changes no prediction: scores of one class against all others lie
    far from zero, all on one side, and would make the training ill-conditioned.

    Memory: ``X`` stays as it is, dense or sparse. Besides there are scores, ``[n_samples, N]`` in float64, a few times over.

    Args:
        estimator: a linear classifier with ``coef_``, ``intercept_`` and ``decision_function`` after its fit, such as
            LogisticRegression (default), LinearSVC, SGDClassifier or RidgeClassifier; or a Pipeline that ends in one, whose
            transformers make the features, also one with a resampling step (imbalanced-learn's); or a FrozenEstimator around a
            fitted one, which is not fitted again.
        preset: ``"few"`` (default) or ``"paper"`` (:data:`alphaext.training.PRESETS`); or ``"all"``: every row becomes a
            combination of all rows, by preset few averaged with a discriminant of the scores and with balanced re-training.
        method: ``"auto"``: the one of these, of cheaper ones and of the plain estimator that :func:`alphaext.recommend` takes.
            None (default) for ``preset``. Neither it nor preset ``"all"`` goes with options of a training.
        max_base_drop: points (0.5 is half a percent) that the mean accuracy of base classes may lose on samples not seen; a
            constant on the few scores keeps to it. None (default) for any.
        folds: parts of the samples, at least 2, default 5; a copy of the estimator is fitted to all but each of them.
        few_below: a class with fewer training samples is few; the paper uses 20.
        many_above: a class with more training samples is many; the paper uses 100.
        score_scale: the training takes scores times this for logits. ``"auto"`` (default) takes the scale with the least
            cross-entropy over base classes on samples not seen (1 for a FrozenEstimator, which has seen all).
        random_state: of the parts, the head's start and the samples drawn; the estimator has its own.
        verbose: show a progress bar of the head's training.
        top_k, gamma, epochs, lr, ...: any option of :class:`alphaext.training.HeadOptions` and
            :class:`alphaext.training.TrainingOptions`, in place of the preset's; None (default) for the preset's.
            Neighbours are classes with near mean scores. More than there are means all there are, with a warning.

    Attributes:
        classes_: class labels, ``[N]``.
        coef_, intercept_: of the composed classifier, ``[N, D]`` and ``[N]`` (one row for two classes), in the features that
            a Pipeline's transformers make.
        estimator_: the fitted estimator.
        repaired_: whether the new rows are kept.
        composed_estimator_: the estimator with the new rows; ``estimator_`` itself where they are not kept.
        head_: the trained :class:`alphaext.AlphaNet`, or None, as with preset ``"all"`` and ``method="auto"``. Its inputs are
            scores, times ``score_scale_``, less their mean.
        result_: the :class:`alphaext.FitResult`, or None likewise.
        recommendation_: with ``method="auto"`` the :class:`alphaext.repairing.Recommendation`, a table; else None.
        few_classes_: labels of the few classes, ``[F]``.
        members_: labels ``[F, K+1]``: each few class and its neighbours, nearest first.
        alphas_: the coefficients, ``[F, K+1]``.
        score_scale_: the scale used.
        accuracies_: ``before`` and ``after``, on samples not seen, each the mean accuracy of the ``few``, the ``base`` and of
            ``all`` classes; empty where nothing was repaired.
        n_features_in_, feature_names_in_: as the estimator has them.

    Example:
        >>> from sklearn.datasets import make_blobs
        >>> X, y = make_blobs([60, 50, 40, 6], cluster_std=3.0, random_state=0)
        >>> model = AlphaNetClassifier(LogisticRegression(), top_k=2, random_state=0).fit(X, y)
        >>> model.few_classes_, model.members_.shape, model.coef_.shape
        (array([3]), (1, 3), (4, 2))
    """

    accuracies_: dict[str, dict[str, float]]
    classes_: Array
    coef_: Array
    intercept_: Array
    head_: AlphaNet | None
    recommendation_: Recommendation | None
    result_: FitResult | None

    pool: str | None
    select: str | None
    top_k: int | None

    @with_options((OPTIONS[name] for name in _OPTIONS), default=None)
    def __init__(
        self,
        estimator: Any = None,
        *,
        preset: str = "few",
        method: str | None = None,
        max_base_drop: float | None = None,
        folds: int = 5,
        few_below: int = 20,
        many_above: int = 100,
        score_scale: float | str = "auto",
        random_state: Any = None,
        verbose: int = 0,
        **options: Any,
    ) -> None:
        self.estimator = estimator
        self.preset = preset
        self.method = method
        self.max_base_drop = max_base_drop
        self.folds = folds
        self.few_below = few_below
        self.many_above = many_above
        self.score_scale = score_scale
        self.random_state = random_state
        self.verbose = verbose
        check_known(options, _OPTIONS)
        for name in _OPTIONS:
            setattr(self, name, options.get(name))

    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, *, X_val: Any = None, y_val: Any = None, **fit_params: Any
    ) -> AlphaNetClassifier:
        """Fit the estimator, then repair the rows of its few classes.

        Args:
            X: ``[n_samples, n_features]``, dense or sparse, or whatever the estimator's first transformer takes.
            y: ``[n_samples]`` labels: numbers or strings.
            sample_weight: ``[n_samples]``, none negative; handed to the classifier's fits. Samples of weight 0 do not count.
                The head's training takes all other samples alike.
            X_val: validation samples, which choose the epoch and the constant on the few scores, and say what is better.
            y_val: their labels.
            fit_params: handed to the estimator's fits (routed, where scikit-learn's metadata routing is enabled).

        Returns:
            The fitted object itself.

        Raises:
            ValueError, TypeError: for arguments out of range, or an estimator that is not a linear classifier with one row a
                class.
            FloatingPointError: when the head's training diverges; a smaller ``lr`` or ``score_scale`` may help.
        """
        head_options = self._check_parameters()
        random = check_random_state(self.random_state)
        seed = int(random.randint(2**31 - 1))
        estimator = self._estimator()
        samples, classes = self._check_samples(estimator, X, y, sample_weight, fit_params)
        validation = self._check_validation(samples.X, X_val, y_val, classes)
        split, reason = self._split(np.bincount(samples.labels[samples.weights > 0], minlength=len(classes)))

        self.estimator_ = samples.fit(clone(estimator))
        self.classes_ = attribute_of(classifier_of(self.estimator_), "classes_")
        for name in ("n_features_in_", "feature_names_in_"):
            self.__dict__.pop(name, None)  # of an earlier fit
            if hasattr(self.estimator_, name):
                setattr(self, name, getattr(self.estimator_, name))
        if not reason and not np.array_equal(self.classes_, classes):
            reason = f"the estimator's {len(self.classes_)} classes are not the {len(classes)} of y"
        self.head_, self.result_, self.accuracies_, self.score_scale_, self.recommendation_ = None, None, {}, 1.0, None
        self.few_classes_ = self.classes_[:0]
        self.members_, self.alphas_ = np.empty((0, 0), dtype=self.classes_.dtype), np.empty((0, 0))
        if reason:
            return self._keep_plain(reason)

        options = self._given() | self._neighbors(split, head_options) | {"seed": seed, "neighbor_seed": seed}
        rows = Rows.of(self.estimator_, len(classes))
        check_scores_follow_rows(self.estimator_, samples.X)
        samples = samples.part(samples.weights > 0)
        refitted = not is_frozen(last_step(self.estimator_))
        folds = make_folds(samples, self.folds, random) if refitted else np.full(len(samples.y), -1)
        scores, labels = held_out_scores(estimator, self.estimator_, samples, folds), samples.labels
        seen = folds < 0
        unseen, unseen_labels = scores[~seen], labels[~seen]
        if validation is not None:
            unseen, unseen_labels = scores_of(self.estimator_, validation.X), validation.labels
        self.score_scale_ = self._scale(unseen, unseen_labels, split)
        logits, unseen = self._logits(scores), self._logits(unseen)

        eye = torch.eye(len(classes), dtype=torch.float64, device="cpu")
        layer = make_linear(eye, torch.zeros_like(eye[0]))

        val = None if validation is None else (unseen, unseen_labels)
        if self._compares():
            if val is None and not refitted:
                raise ValueError("X_val and y_val must be given, which a FrozenEstimator has not seen, to choose a method by")
            reason = self._compare(rows, layer, (logits, labels), val, split, seed)
            return self._keep_plain(reason) if reason else self

        def repaired(some: Array, **more: Any) -> Repair:
            return repair(layer, logits[some], labels[some], preset=self.preset, split=split, **options, **more)

        data = {} if val is None else {"val_features": unseen, "val_labels": unseen_labels}
        made = repaired(np.ones(len(labels), dtype=bool), progress=bool(self.verbose), **data)
        after = _apply(made, unseen)
        if validation is None:
            for fold in range(folds.max() + 1):
                own = folds[~seen] == fold
                after[own] = _apply(repaired(folds != fold, progress=False), unseen[own])
        self.head_, self.result_ = made.head, made.result
        assert made.head is not None
        self.members_, self.alphas_ = self.classes_[made.head.members.numpy()], made.head.alphas().detach().numpy()
        reason = self._take(rows, made.linear, split.few.numpy(), (unseen, after, unseen_labels), split)
        return self._keep_plain(reason) if reason else self

    def _compare(
        self, rows: Rows, layer: Any, data: tuple[Array, Array], val: tuple[Array, Array] | None, split: ClassSplit, seed: int
    ) -> str:
        """Take what a comparison of methods takes; or say why not."""
        self.few_classes_ = self.classes_[split.few.numpy()]
        logits, labels = val or data
        val_features, val_labels = val or (None, None)
        builder = Builder(layer, *data, val_features=val_features, val_labels=val_labels, split=split)
        auto = self.method == "auto"
        try:
            methods, bound = (tuple(METHODS), self.max_base_drop) if auto else (("original", "all"), None)
            found = compare_methods(layer, builder, methods=methods, max_base_drop=bound, refit=False, seed=seed)
        except ValueError as error:
            return str(error)
        self.recommendation_ = found.recommendation if auto else None
        taken = next(each for each in found.recommendation.candidates if each.method == found.recommendation.method)
        if taken.method == "original":
            errors = "; ".join(dict.fromkeys(each.error for each in found.recommendation.candidates if each.error))
            return f"no method is better on samples not seen{errors and f' ({errors})'}"
        changed = split.few.numpy() if taken.few_rows_only else np.arange(split.num_classes)
        places = found.places.numpy()
        measured = (logits[places], found.logits.numpy(), labels[places])
        return self._take(rows, found.recommendation.linear, changed, measured, split)

    def _take(self, rows: Rows, linear: Any, changed: Array, measured: tuple[Array, Array, Array], split: ClassSplit) -> str:
        """Take the ``changed`` rows of a layer; or say why not: its scores are to be better on samples not seen.

        ``measured`` are scores before and after, and labels.
        """
        before, after, labels = measured
        few = split.few.numpy()
        constant = self._constant(before, after, labels, split)
        after[:, few] += constant
        self.accuracies_ = {"before": _accuracies(before, labels, split), "after": _accuracies(after, labels, split)}
        gain, noise = gain_and_noise(before, after, labels)
        self._compose(rows, linear, changed, constant * np.isin(changed, few))
        self.few_classes_ = self.classes_[few]
        if gain <= noise:
            return (
                f"the repaired rows are no better on samples not seen: {100 * gain:+.1f} points over all classes, where "
                f"{100 * noise:.1f} are noise"
            )
        return ""

    def add_classes(self, X: Any, y: Any, X_new: Any, y_new: Any) -> AlphaNetClassifier:
        """Add classes that the fitted classifier has never seen; the rows of its own classes stay as they are, to the bit.

        :func:`alphaext.add_classes` trains the new rows, on the features that a Pipeline's transformers make, reduced to the
        span of all rows and class means, in which nothing that it reads is lost.

        Args:
            X: ``[n_samples, n_features]``, training samples of the classes there are, or some of them.
            y: ``[n_samples]`` their labels.
            X_new: samples of the new classes, one of each or more.
            y_new: their labels, none of which the classifier knows; of the same kind.

        Returns:
            The object itself: ``classes_``, ``coef_``, ``intercept_`` and ``composed_estimator_`` have the new classes last.

        Raises:
            ValueError, TypeError: labels in ``y`` that the classifier does not know, or in ``y_new`` that it does; samples of
                another width.
            FloatingPointError: the training diverged.

        Example:
            >>> from sklearn.datasets import make_blobs
            >>> X, y = make_blobs([60, 50, 40, 3], cluster_std=2.0, random_state=0)
            >>> model = AlphaNetClassifier(random_state=0, few_below=2).fit(X[y < 3], y[y < 3])
            >>> model.add_classes(X[y < 3], y[y < 3], X[y == 3], y[y == 3]).classes_, model.coef_.shape
            (array([0, 1, 2, 3]), (4, 2))
        """
        fitted, known = self._fitted(), self.classes_.tolist()
        y, y_new = (np.asarray(column_or_1d(labels)) for labels in (y, y_new))
        added = np.unique(y_new)
        for name, labels, must in (("y", y, True), ("y_new", y_new, False)):
            wrong = [label for label in np.unique(labels).tolist() if (label in known) != must]
            if wrong:
                kind = "classes that the classifier knows" if must else "classes that it does not know"
                raise ValueError(f"{name} must hold {kind}, got {', '.join(map(repr, wrong[:10]))}")
        if added.dtype.kind != self.classes_.dtype.kind:
            raise TypeError(f"y_new must hold labels of the kind of {self.classes_[0]!r}, got {added[0]!r}")
        classes = np.concatenate([self.classes_, added])
        ids, new_ids = (np.array([classes.tolist().index(label) for label in labels.tolist()]) for labels in (y, y_new))
        features, new = features_of(fitted, X), features_of(fitted, X_new)
        rows = Rows.of(fitted, len(known))
        scale = self.score_scale_
        if self.head_ is None:  # no scale was looked for
            scale = best_scale(scores_of(fitted, X), ids, np.ones(len(known), dtype=bool))
        mean, mean_bias = rows.weight.mean(axis=0), rows.bias.mean()
        parts = ((features, ids), (new, new_ids))
        means = [dense(part[own == label].mean(axis=0)).reshape(1, -1) for part, own in parts for label in np.unique(own)]
        _, sizes, directions = np.linalg.svd(np.concatenate([rows.weight - mean, *means]), full_matrices=False)
        span = directions[sizes > sizes[0] * np.finfo(np.float64).eps * max(directions.shape)].T
        layer = make_linear(
            torch.from_numpy(scale * (rows.weight - mean) @ span), torch.from_numpy(scale * (rows.bias - mean_bias))
        )
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        made = add_classes(layer, features @ span, ids, new @ span, new_ids, seed=seed, progress=bool(self.verbose))
        weight, bias = (each.detach().numpy()[len(known) :] / scale for each in made.linear.parameters())
        dtype = self.coef_.dtype
        coef = rows.weight.astype(dtype) if len(known) == 2 else self.coef_
        intercept = rows.bias.astype(dtype) if len(known) == 2 else self.intercept_
        self.classes_ = classes
        self.coef_ = np.concatenate([coef, (mean + weight @ span.T).astype(dtype)])
        self.intercept_ = np.concatenate([intercept, (mean_bias + bias).astype(dtype)])
        self.composed_estimator_ = with_rows(fitted, self.coef_, self.intercept_, classes)
        return self

    def _compares(self) -> bool:
        """Whether methods are compared, with settings of their own."""
        return self.method == "auto" or self.preset == "all"

    def _given(self) -> dict[str, Any]:
        """The options that take the place of the preset's."""
        return {name: getattr(self, name) for name in _OPTIONS if getattr(self, name) is not None}

    def _logits(self, scores: Array) -> Array:
        scaled = scores * self.score_scale_
        return np.asarray(scaled - scaled.mean(axis=1, keepdims=True))

    def _constant(self, before: Array, after: Array, labels: Array, split: ClassSplit) -> float:
        """What the few scores get added, at most 0, so that base classes lose no more than ``max_base_drop``."""
        base, few = split.base.numpy(), split.few.numpy()
        if self.max_base_drop is None or not np.isin(labels, base).any():
            return 0.0
        least = class_mean_accuracy(before, labels, base) - self.max_base_drop / 100 - 1e-9
        gap = np.max(after[:, few].max(axis=1) - after[:, base].max(axis=1))
        moved = after.copy()
        for constant in np.linspace(0, -max(gap, 0) - 1e-9, _CONSTANTS):
            moved[:, few] = after[:, few] + constant
            if class_mean_accuracy(moved, labels, base) >= least:
                break
        return float(constant)

    def _compose(self, rows: Rows, linear: Any, changed: Array, constants: Array) -> None:
        """Put new rows where the ``changed`` classes' own were."""
        mix, shift = (each.detach().numpy() for each in linear.parameters())
        new = rows.mixed(mix[changed], (shift[changed] + constants) / self.score_scale_)
        coef, intercept = own_rows(self.estimator_)
        if len(self.classes_) == 2:
            rows.weight[changed], rows.bias[changed] = new.weight, new.bias
            coef[:], intercept[:] = rows.weight[1] - rows.weight[0], rows.bias[1] - rows.bias[0]
        else:
            coef[changed], intercept[changed] = new.weight, new.bias
        self.coef_, self.intercept_ = coef, intercept
        self.composed_estimator_ = with_rows(self.estimator_, coef, intercept)
        self.repaired_ = True

    def _keep_plain(self, reason: str) -> AlphaNetClassifier:
        warn_caller(f"{reason}: the result is the plain estimator", AlphaNetWarning)
        self.coef_, self.intercept_ = own_rows(self.estimator_)
        self.composed_estimator_ = self.estimator_
        self.repaired_ = False
        return self

    def _check_parameters(self) -> HeadOptions:
        """Check all parameters before any work is done; what the head's options are."""
        check_choice(self.preset, "preset", PRESETS_AND_ALL)
        check_choice(self.method or "auto", "method", ("auto",))
        if self.method == "auto" and self.preset != "few":
            raise ValueError(f"preset={self.preset!r} does not go with method='auto'")
        for name in self._given() if self._compares() else ():
            raise ValueError(f"{name} does not go with preset='all' or method='auto'")
        of_few_rows = "few" if self.preset == "all" else self.preset
        head, _ = read_options(preset_options(of_few_rows, validation=False) | self._given())
        split_classes([1], few_below=self.few_below, many_above=self.many_above)
        check_integer(self.folds, "folds", minimum=2)
        if self.score_scale != "auto":
            check_number(self.score_scale, "score_scale (a number, or 'auto')", above=0)
        if_given(check_number, self.max_base_drop, "max_base_drop", minimum=0)
        return head

    def _check_samples(
        self, estimator: Any, X: Any, y: Any, sample_weight: Any, fit_params: dict[str, Any]
    ) -> tuple[FitSamples, Array]:
        """The training samples, and the classes of ``y``."""
        if y is None:
            raise ValueError(f"This {type(self).__name__} estimator requires y to be passed, but the target y is None")
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
        return FitSamples(
            X, y, labels, weights, self._fit_params(estimator, None if sample_weight is None else weights, fit_params)
        ), classes

    def _check_validation(self, X: Any, X_val: Any, y_val: Any, classes: Array) -> FitSamples | None:
        """The validation samples that were given."""
        if (X_val is None) != (y_val is None):
            raise ValueError("X_val and y_val must be given together")
        if X_val is None:
            if self.select not in (None, "last"):
                raise ValueError(f"select={self.select!r} needs X_val and y_val")
            return None
        X_val, y_val = indexable(X_val, np.asarray(column_or_1d(y_val)))
        known = set(classes.tolist())
        unknown = [label for label in np.unique(y_val).tolist() if label not in known]
        if unknown:
            raise ValueError(f"y_val must hold classes of y only, got {', '.join(map(repr, unknown[:10]))}")
        shapes = [np.shape(array) for array in (X, X_val) if hasattr(array, "shape")]
        if len(shapes) == 2 and shapes[0][1:] != shapes[1][1:]:
            raise ValueError(f"X_val must have shape [m, {', '.join(map(str, shapes[0][1:]))}] as X, got {list(shapes[1])}")
        return FitSamples(X_val, y_val, np.searchsorted(classes, y_val), np.ones(len(y_val)), {})

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
        elif self.pool == "many" and len(split.many) == 0:
            reason = f"no class has more than many_above={self.many_above} training samples, and pool='many'"
        return split, reason

    def _neighbors(self, split: ClassSplit, options: HeadOptions) -> dict[str, int]:
        """``top_k``, if it was given, or the neighbours there are, with a warning."""
        available = pool_size(split, options.pool)
        if self.top_k is not None and self.top_k > available:
            text = f"top_k={self.top_k} is more than the classes that neighbours can be chosen from: all {available} are taken"
            warn_caller(text, AlphaNetWarning)
        if split.num_classes == 2 and options.rule != "l1" and not options.residual:
            text = (
                f"of two classes, both rows are multiples of one vector: rule={options.rule!r} does no more than scale the "
                "scores"
            )
            warn_caller(text, AlphaNetWarning)
        return {} if self.top_k is None else {"top_k": min(self.top_k, available)}

    def _scale(self, scores: Array, labels: Array, split: ClassSplit) -> float:
        """What scores are multiplied with to be logits."""
        if self.score_scale != "auto":
            return float(self.score_scale)
        return best_scale(scores, labels, np.isin(np.arange(split.num_classes), split.base.numpy()))

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


def _apply(made: Repair, logits: Array) -> Array:
    weight, bias = (each.detach().numpy() for each in made.linear.parameters())
    return np.asarray(logits @ weight.T + bias)


def _accuracies(logits: Array, labels: Array, split: ClassSplit) -> dict[str, float]:
    among = {"few": split.few.numpy(), "base": split.base.numpy(), "all": np.arange(split.num_classes)}
    return {name: class_mean_accuracy(logits, labels, classes) for name, classes in among.items()}
