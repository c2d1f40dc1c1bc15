"""What is inside scikit-learn's linear classifiers: rows, scores of samples not seen, and copies with other rows."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.base import clone
from sklearn.pipeline import Pipeline
from sklearn.utils import _safe_indexing, check_array
from sklearn.utils.validation import _num_samples

try:
    from sklearn.frozen import FrozenEstimator
except ImportError:  # scikit-learn before 1.6
    FrozenEstimator = None

Array = npt.NDArray[Any]

# Samples on which a classifier's scores are compared with those of its rows in another order.
_COMPARED_SAMPLES = 64


@dataclass(frozen=True)
class FitSamples:
    """Samples with all that has one entry for each; ``params`` are of a fit and may hold more."""

    X: Any
    y: Array
    labels: Array  # class ids
    weights: Array
    params: dict[str, Any]

    def part(self, mask: Array) -> FitSamples:
        indices = np.flatnonzero(mask)

        def cut(value: Any) -> Any:
            if isinstance(value, (str, dict)) or not (hasattr(value, "__len__") or hasattr(value, "shape")):
                return value
            return _safe_indexing(value, indices) if _num_samples(value) == len(self.y) else value

        params = {name: cut(value) for name, value in self.params.items()}
        return FitSamples(_safe_indexing(self.X, indices), self.y[mask], self.labels[mask], self.weights[mask], params)

    def fit(self, estimator: Any) -> Any:
        return estimator.fit(self.X, self.y, **self.params)


@dataclass(frozen=True)
class Rows:
    """Weight ``[N, D]`` and bias ``[N]`` in float64, with a row for each class also where there are two."""

    weight: Array
    bias: Array

    @classmethod
    def of(cls, estimator: Any, num_classes: int) -> Rows:
        """The rows of a fitted classifier."""
        coef, intercept = own_rows(estimator)
        if len(coef) != (1 if num_classes == 2 else num_classes):
            raise TypeError(
                f"estimator must have a row of coef_ and an intercept_ for each class, {num_classes} here (of two classes, "
                f"one); {type(classifier_of(estimator)).__name__} has coef_ {list(coef.shape)}"
            )
        return cls(_of_two(coef.astype(np.float64).T).T, _of_two(intercept.astype(np.float64)))

    def mixed(self, mix: Array, shift: Array) -> Rows:
        """Rows that are mixes ``[F, N]`` of these, all taken relative to their mean, with ``shift`` ``[F]`` in the bias.

        To subtract one row from all of them changes no prediction.
        """
        mean, mean_bias = self.weight.mean(axis=0), self.bias.mean()
        return Rows(mean + mix @ (self.weight - mean), mean_bias + mix @ (self.bias - mean_bias) + shift)


def own_rows(estimator: Any) -> tuple[Array, Array]:
    """Copies of ``coef_`` and ``intercept_`` of the classifier inside, with a row and an entry for each that it has."""
    classifier = classifier_of(estimator)
    coef = np.array(np.atleast_2d(dense(attribute_of(classifier, "coef_"))))
    intercept = np.ravel(attribute_of(classifier, "intercept_"))
    if len(intercept) not in (1, len(coef)):
        raise TypeError(f"estimator must have an intercept_ for each row of coef_, {len(coef)} here, got {len(intercept)}")
    return coef, np.array(np.broadcast_to(intercept, len(coef)), dtype=coef.dtype)


def _of_two(values: Array) -> Array:
    """Values whose last axis is the classes': of two classes, which scikit-learn gives one, one for each."""
    # The second class against the first: their difference stays what it was.
    return np.concatenate([-values / 2, values / 2], axis=-1) if values.shape[-1] == 1 else values


def check_scores_follow_rows(estimator: Any, X: Any) -> None:
    """Check that a fitted classifier's scores follow its rows, one for each class: those of one class against one do not."""
    X = _safe_indexing(X, np.arange(min(_COMPARED_SAMPLES, _num_samples(X))))
    coef, intercept = own_rows(estimator)
    changed = with_rows(estimator, 2 * np.roll(coef, 1, axis=0), 2 * np.roll(intercept, 1))
    own, others = (np.asarray(attribute_of(each, "decision_function")(X)) for each in (estimator, changed))
    expected = 2 * (np.roll(own, 1, axis=1) if own.ndim == 2 else own)
    # What rounding may make of a sum of such terms, with a wide margin.
    tolerance = np.sqrt(np.finfo(own.dtype).eps) * (np.abs(expected).max() + np.abs(intercept).max())
    if not np.allclose(others, expected, rtol=0, atol=tolerance):
        raise TypeError(
            f"estimator must be a linear classifier with a row of coef_ for each class, but the decision_function of "
            f"{type(classifier_of(estimator)).__name__} is not X @ coef_.T + intercept_"
        )


def scores_of(estimator: Any, X: Any) -> Array:
    """The scores ``[n, N]`` of a fitted classifier in float64, one for each class also where there are two."""
    scores = np.asarray(attribute_of(estimator, "decision_function")(X), dtype=np.float64)
    return _of_two(scores.reshape(len(scores), -1))


def make_folds(samples: FitSamples, count: int, random: np.random.RandomState) -> Array:
    """The fold of each sample, each class dealt out evenly; -1 for the only sample of a class, which is never held out."""
    folds = np.full(len(samples.y), -1)
    for label in np.unique(samples.labels):
        indices = random.permutation(np.flatnonzero(samples.labels == label))
        if len(indices) > 1:
            folds[indices] = np.arange(len(indices)) % count
    return folds


def held_out_scores(estimator: Any, fitted: Any, samples: FitSamples, folds: Array) -> Array:
    """Scores ``[n, N]`` of each sample by a copy of ``estimator`` that has not seen it, or, without a fold, by ``fitted``."""
    scores = scores_of(fitted, samples.X)
    for fold in range(folds.max() + 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are those of the estimator's own fit
            other = samples.part(folds != fold).fit(clone(estimator))
        scores[folds == fold] = scores_of(other, samples.part(folds == fold).X)
    return scores


def last_step(estimator: Any) -> Any:
    """The last step of a pipeline, also of one that ends in another."""
    while isinstance(estimator, Pipeline):
        estimator = estimator.steps[-1][1]
    return estimator


def is_frozen(estimator: Any) -> bool:
    return FrozenEstimator is not None and isinstance(estimator, FrozenEstimator)


def classifier_of(estimator: Any) -> Any:
    """The classifier inside pipelines and frozen estimators."""
    estimator = last_step(estimator)
    return classifier_of(estimator.estimator) if is_frozen(estimator) else estimator


def features_of(estimator: Any, X: Any) -> Any:
    """What the classifier inside ``estimator`` sees of ``X``: ``[n, D]``, an array or a sparse matrix of rows."""
    if is_frozen(estimator):
        return features_of(estimator.estimator, X)
    if isinstance(estimator, Pipeline):
        for _, step in estimator.steps[:-1]:
            X = step.transform(X) if hasattr(step, "transform") else X  # steps that resample leave samples as they are
        return features_of(estimator.steps[-1][1], X)
    return check_array(X, accept_sparse="csr", dtype=[np.float64, np.float32])


def with_rows(estimator: Any, coef: Array, intercept: Array, classes: Array | None = None) -> Any:
    """A copy of ``estimator`` with other rows, and other classes where they are given; all else is shared with it."""
    if is_frozen(estimator):
        return type(estimator)(with_rows(estimator.estimator, coef, intercept, classes))
    other = copy.copy(estimator)
    if isinstance(estimator, Pipeline):
        name, last = estimator.steps[-1]
        other.steps = [*estimator.steps[:-1], (name, with_rows(last, coef, intercept, classes))]
        return other
    if classes is not None and hasattr(other, "_label_binarizer"):  # RidgeClassifier's classes may be those
        other._label_binarizer = copy.copy(other._label_binarizer)
        other._label_binarizer.classes_ = classes
    if classes is not None and not isinstance(getattr(type(other), "classes_", None), property):
        other.classes_ = classes
    try:
        other.coef_, other.intercept_ = coef, intercept
    except AttributeError as error:
        raise TypeError(f"estimator must allow that its coef_ is set; {type(estimator).__name__} says {error}") from None
    return other


def dense(array: Any) -> Any:
    return array.toarray() if sparse.issparse(array) else np.asarray(array)


def attribute_of(estimator: Any, name: str) -> Any:
    try:
        return getattr(estimator, name)
    except AttributeError:
        raise TypeError(
            f"estimator must be a linear classifier, or a Pipeline that ends in one; {type(estimator).__name__} has no {name} "
            "after its fit"
        ) from None


def class_mean_accuracy(scores: Array, labels: Array, among: Array) -> float:
    """The mean over the classes ``among`` of their accuracies; NaN where none has a sample."""
    right = scores.argmax(axis=1) == labels
    found = [right[labels == label].mean() for label in np.intersect1d(among, labels)]
    return float(np.mean(found)) if found else np.nan


def gain_and_noise(before: Array, after: Array, labels: Array) -> tuple[float, float]:
    """What the mean over classes of their accuracies gains from one set of scores to another, and its standard error.

    NaN and 0 where there are no samples.
    """
    gains = (after.argmax(axis=1) == labels) * 1.0 - (before.argmax(axis=1) == labels)
    classes = [gains[labels == label] for label in np.unique(labels)]
    if not classes:
        return np.nan, 0.0
    # The spread of a class's samples is taken from all: four samples say little of theirs.
    variance = np.var(gains) * sum(1 / len(own) for own in classes) / len(classes) ** 2
    return float(np.mean([own.mean() for own in classes])), float(np.sqrt(variance))
