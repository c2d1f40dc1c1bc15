"""What is inside scikit-learn's linear classifiers: their rows, the features they see, and copies with other rows."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from sklearn.pipeline import Pipeline
from sklearn.utils import _safe_indexing, check_array
from sklearn.utils.validation import _num_samples

try:
    from sklearn.frozen import FrozenEstimator
except ImportError:  # scikit-learn before 1.6
    FrozenEstimator = None

Array = npt.NDArray[Any]

# Samples on which scores by coef_ and intercept_ are compared with the estimator's own.
_COMPARED_SAMPLES = 64

# Elements of a block of features that is converted to float64.
_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Samples:
    """Samples with all that has one entry for each; ``params`` are of a fit and may hold more."""

    X: Any
    y: Array
    labels: Array  # class ids
    weights: Array
    params: dict[str, Any]

    def part(self, mask: Array) -> Samples:
        indices = np.flatnonzero(mask)

        def cut(value: Any) -> Any:
            if isinstance(value, (str, dict)) or not (hasattr(value, "__len__") or hasattr(value, "shape")):
                return value
            return _safe_indexing(value, indices) if _num_samples(value) == len(self.y) else value

        params = {name: cut(value) for name, value in self.params.items()}
        return Samples(_safe_indexing(self.X, indices), self.y[mask], self.labels[mask], self.weights[mask], params)

    def fit(self, estimator: Any) -> Any:
        return estimator.fit(self.X, self.y, **self.params)


@dataclass(frozen=True)
class Rows:
    """Weight ``[N, D]`` and bias ``[N]`` in float64, with a row for each class also where there are two."""

    weight: Array
    bias: Array

    @classmethod
    def of(cls, classifier: Any, num_classes: int) -> Rows:
        coef, intercept = np.atleast_2d(dense(attribute_of(classifier, "coef_"))), attribute_of(classifier, "intercept_")
        rows = 1 if num_classes == 2 else num_classes
        if coef.shape[0] != rows or np.size(intercept) not in (1, rows):
            raise TypeError(
                f"estimator must have a row of coef_ and an intercept_ for each class, {rows} here; "
                f"{type(classifier).__name__} has coef_ {list(coef.shape)} and intercept_ {list(np.shape(intercept))}"
            )
        weight = np.array(coef, dtype=np.float64)
        bias = np.array(np.broadcast_to(np.ravel(intercept), rows), dtype=np.float64)
        if num_classes == 2:  # scores of the second class against the first: their difference stays what it was
            return cls(np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2]))
        return cls(weight, bias)

    def check(self, estimator: Any, X: Any, features: Any) -> None:
        """Check that the estimator's scores are those of its rows: those of one class against one are not."""
        some = np.arange(min(_COMPARED_SAMPLES, features.shape[0]))
        X, features, classifier = _safe_indexing(X, some), features[some], classifier_of(estimator)
        own = np.asarray(attribute_of(estimator, "decision_function")(X))
        scores = np.asarray(features @ self.weight.T) + self.bias
        if len(self.weight) == 2:
            scores = scores[:, 1] - scores[:, 0]
        # What rounding may make of a sum of such terms, with a wide margin.
        narrow = np.float32 if np.float32 in (own.dtype, features.dtype) else np.float64
        tolerance = np.sqrt(np.finfo(narrow).eps) * np.max(np.asarray(abs(features) @ abs(self.weight).T) + abs(self.bias))
        same = own.shape == scores.shape and np.allclose(own, scores, rtol=0, atol=tolerance)
        if same:  # rows twice as large show whether scores follow the rows
            doubled = with_rows(estimator, 2 * dense(classifier.coef_), 2 * np.asarray(classifier.intercept_))
            same = np.allclose(doubled.decision_function(X), 2 * own, rtol=0, atol=2 * tolerance)
        if not same:
            raise TypeError(
                f"estimator must be a linear classifier with a row of coef_ for each class, but the decision_function of "
                f"{type(classifier).__name__} is not X @ coef_.T + intercept_"
            )


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
        return features_of(estimator.steps[-1][1], estimator[:-1].transform(X) if len(estimator.steps) > 1 else X)
    return check_features(X)


def with_rows(estimator: Any, coef: Array, intercept: Array) -> Any:
    """A copy of ``estimator`` with other rows; all else is shared with it."""
    if is_frozen(estimator):
        return type(estimator)(with_rows(estimator.estimator, coef, intercept))
    other = copy.copy(estimator)
    if isinstance(estimator, Pipeline):
        name, last = estimator.steps[-1]
        other.steps = [*estimator.steps[:-1], (name, with_rows(last, coef, intercept))]
    else:
        try:
            other.coef_, other.intercept_ = coef, intercept
        except AttributeError as error:
            raise TypeError(f"estimator must allow that its coef_ is set; {type(estimator).__name__} says {error}") from None
    return other


def check_features(X: Any) -> Any:
    return check_array(X, accept_sparse="csr", dtype=[np.float64, np.float32], estimator="AlphaNetClassifier", input_name="X")


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


def held_out(samples: Samples, classes: Array, fraction: float, random: np.random.RandomState) -> Array:
    """Mark a fraction of each of the ``classes``: at least one sample, but not all, so none where there is one only."""
    held = np.zeros(len(samples.y), dtype=bool)
    for label in np.flatnonzero(classes):
        indices = random.permutation(np.flatnonzero((samples.labels == label) & (samples.weights > 0)))
        held[indices[: min(max(1, round(fraction * len(indices))), max(0, len(indices) - 1))]] = True
    return held


def class_means(features: Any, labels: Array, weights: Array, num_classes: int) -> Array:
    """``[N, D]`` in float64, of dense or sparse features; 0 for a class without samples."""
    samples, width = features.shape
    sums = np.zeros((num_classes, width))
    block = samples if sparse.issparse(features) else max(1, _BLOCK_ELEMENTS // max(1, width))
    for start in range(0, samples, block):
        part = slice(start, min(start + block, samples))
        columns = np.arange(part.stop - part.start)
        of_class = sparse.csr_matrix((weights[part], (labels[part], columns)), shape=(num_classes, len(columns)))
        sums += dense(of_class @ features[part])
    totals = np.bincount(labels, weights=weights, minlength=num_classes)
    return sums / np.where(totals > 0, totals, 1)[:, None]


def best_scale(features: Any, labels: Array, rows: Rows, base: Array) -> float:
    """What to multiply scores with for the least cross-entropy over base classes; 1 where they tell nothing of the labels."""
    of_base = np.flatnonzero(base[labels])
    scores = np.asarray(features[of_base] @ rows.weight[base].T) + rows.bias[base]
    samples, num_classes = scores.shape
    own = scores[np.arange(samples), (np.cumsum(base) - 1)[labels[of_base]]]
    others = (scores.sum(axis=1) - own) / (num_classes - 1)
    # Platt's correction: if targets were certain, samples all classified rightly would ask for an infinite scale.
    smoothing = 1 / (samples + 2)
    expected = float(np.mean((1 - smoothing) * own + smoothing * others))

    def loss(exponent: float) -> float:
        scale = 10.0**exponent
        return float(np.mean(logsumexp(scale * scores, axis=1))) - scale * expected

    best = minimize_scalar(loss, bounds=(-6, 6), method="bounded", options={"xatol": 1e-4})
    return 10.0 ** float(best.x) if best.fun < np.log(num_classes) - 1e-6 else 1.0
