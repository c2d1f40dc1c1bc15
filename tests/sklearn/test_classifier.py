"""The scikit-learn meta-estimator: scikit-learn's own checks, and what Alpha Net makes of its linear classifiers."""

from __future__ import annotations

import doctest
import pickle
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from joblib import Parallel, delayed
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse
from sklearn import config_context
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, RidgeClassifier, SGDClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

import alphaext.sklearn.classifier
from alphaext.classes import ClassSplit
from alphaext.metrics.scale import best_scale
from alphaext.sklearn.classifier import AlphaNetClassifier, AlphaNetWarning
from alphaext.sklearn.estimators import Rows, held_out_scores, make_folds

# Training images of each digit: 3 many, 4 medium and 3 few classes.
COUNTS = (110, 105, 102, 80, 60, 45, 30, 8, 6, 4)
DIGITS, DIGIT_LABELS = load_digits(return_X_y=True)


class LastClassFew(AlphaNetClassifier):
    """Takes the last class for few whatever the counts, so that each of scikit-learn's small problems trains a head."""

    def _split(self, counts):
        few = np.flatnonzero(counts)[1:][-1:]
        base = np.setdiff1d(np.flatnonzero(counts), few)
        split = ClassSplit(few=few, medium=base, many=[], empty=np.flatnonzero(counts == 0))
        return split, "" if len(few) else "one class only"


def long_tailed_digits(seed: int = 0):
    """Train and test images and labels; which digits are rare is random."""
    random = np.random.default_rng(seed)
    train, test = [], []
    for count, digit in zip(COUNTS, random.permutation(10), strict=True):
        indices = random.permutation(np.flatnonzero(digit == DIGIT_LABELS))
        test.append(indices[:50])
        train.append(indices[50 : 50 + count])
    train, test = random.permutation(np.concatenate(train)), np.concatenate(test)
    return DIGITS[train] / 16, DIGIT_LABELS[train], DIGITS[test] / 16, DIGIT_LABELS[test]


def make_blobs(counts=(60, 50, 40, 30, 6, 4), width: int = 8, seed: int = 0):
    random = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(counts)), counts)
    X = 1.5 * random.standard_normal((len(counts), width))[y] + random.standard_normal((len(y), width))
    order = random.permutation(len(y))
    return X[order], y[order]


def small(estimator=None, **options) -> AlphaNetClassifier:
    """A classifier that is quickly fitted."""
    options = {"top_k": 3, "epochs": 5, "random_state": 0} | options
    return AlphaNetClassifier(LogisticRegression() if estimator is None else estimator, **options)


NOT_EQUIVALENT = "check_sample_weight_equivalence_on_dense_data", "check_sample_weight_equivalence_on_sparse_data"


def expected_failed_checks(model):
    if not isinstance(model.estimator, (LinearSVC, SGDClassifier)):
        return {}
    reason = "scikit-learn expects the same of the estimator itself: its solver goes through the samples in random order"
    return dict.fromkeys(NOT_EQUIVALENT, reason)


BASES = (
    None,
    LinearSVC(random_state=0),
    SGDClassifier(loss="log_loss", random_state=0),
    RidgeClassifier(),
    make_pipeline(Normalizer(), LogisticRegression(C=10)),
)


@parametrize_with_checks(
    [AlphaNetClassifier(base, epochs=3, top_k=2) for base in BASES]
    + [LastClassFew(base, epochs=1, top_k=2) for base in (None, LinearSVC(random_state=0), BASES[-1])]
    + [LastClassFew(preset="all"), AlphaNetClassifier(method="auto")],
    expected_failed_checks=expected_failed_checks,
)
@pytest.mark.filterwarnings("ignore")
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


def test_the_default_fails_none_of_the_checks():
    assert expected_failed_checks(AlphaNetClassifier()) == {}


def test_examples():
    names = {"LogisticRegression": LogisticRegression}
    results = doctest.testmod(alphaext.sklearn.classifier, extraglobs=names)
    assert results.failed == 0 and results.attempted > 0


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(
    "estimator",
    [
        LogisticRegression(),
        LogisticRegression(C=0.01),
        LinearSVC(C=0.001, random_state=0),
        SGDClassifier(random_state=0),
        RidgeClassifier(),
    ],
    ids=lambda estimator: str(estimator)[:35],
)
def test_few_classes_get_better_and_the_rest_not_worse(estimator):
    few_gains, gains = [], []
    for seed in range(3):
        X, y, X_test, y_test = long_tailed_digits(seed)
        model = AlphaNetClassifier(make_pipeline(StandardScaler(), estimator), random_state=0).fit(X, y)
        gain = (model.predict(X_test) == y_test) * 1.0 - (model.estimator_.predict(X_test) == y_test)
        few_gains.append(gain[np.isin(y_test, model.few_classes_)].mean())
        gains.append(gain.mean())
        assert model.few_classes_.shape == (3,)
    assert np.mean(few_gains) > 0.05 and np.mean(gains) > 0


@pytest.fixture
def always_kept(monkeypatch):
    """Repaired rows are kept, whatever they gain."""
    monkeypatch.setattr(alphaext.sklearn.classifier, "gain_and_noise", lambda *_: (1.0, 0.0))


def test_rows_are_composed_as_alphas_and_members_say(always_kept):
    X, y, X_test, _ = long_tailed_digits()
    X, X_test = 3 * X, 3 * X_test
    model = small(LogisticRegression(C=0.01), residual=0, epochs=40).fit(X, y)
    plain = LogisticRegression(C=0.01).fit(X, y)
    few = model.few_classes_
    assert model.repaired_
    assert_array_equal(np.sort(few), np.flatnonzero(np.bincount(y) < 20))
    base = np.setdiff1d(np.arange(10), few)
    assert_array_equal(model.coef_[base], plain.coef_[base])
    assert_array_equal(model.intercept_[base], plain.intercept_[base])
    assert_array_equal(model.members_[:, 0], few)
    assert np.isin(model.members_[:, 1:], base).all()
    mean, mean_bias = plain.coef_.mean(axis=0), plain.intercept_.mean()
    rows, biases = plain.coef_[model.members_] - mean, plain.intercept_[model.members_] - mean_bias
    assert_allclose(model.coef_[few], mean + np.einsum("fk,fkd->fd", model.alphas_, rows), rtol=1e-10, atol=1e-12)
    assert_allclose(model.intercept_[few], mean_bias + (model.alphas_ * biases).sum(1), rtol=1e-10, atol=1e-12)
    assert np.abs(model.alphas_[:, 1:]).max() > 1e-3 and (model.alphas_[:, 0] <= 1).all()

    scores = X_test @ model.coef_.T + model.intercept_
    assert_allclose(model.decision_function(X_test), scores, rtol=1e-10, atol=1e-10)
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    assert_allclose(model.predict_proba(X_test), exponentials / exponentials.sum(axis=1, keepdims=True), atol=1e-12)
    assert_allclose(np.exp(model.predict_log_proba(X_test)), model.predict_proba(X_test))
    assert_array_equal(model.predict(X_test), model.classes_[scores.argmax(axis=1)])
    assert_array_equal(model.estimator_.coef_, plain.coef_)

    assert type(model.composed_estimator_) is LogisticRegression
    assert b"alphaext" not in pickle.dumps(model.composed_estimator_)
    assert len(model.result_.history) == 41


@pytest.mark.parametrize("preset", ["few", "paper"])
def test_the_head_takes_scaled_scores_less_their_mean(always_kept, preset):
    X, y, X_test, _ = long_tailed_digits()
    model = small(RidgeClassifier(alpha=10), preset=preset, epochs=20).fit(X, y)
    assert model.repaired_
    logits = model.score_scale_ * model.estimator_.decision_function(X_test)
    mean = logits.mean(axis=1, keepdims=True)
    found = model.head_(torch.from_numpy(logits - mean)).detach().numpy() + mean
    assert_allclose(found, model.score_scale_ * (X_test @ model.coef_.T + model.intercept_), atol=1e-9)


def test_what_is_no_better_on_samples_not_seen_is_not_kept():
    X, y = make_blobs()
    model = small(preset="paper", epochs=0)  # PyTorch's start, and nothing trained
    with pytest.warns(AlphaNetWarning, match="no better on samples not seen: .* the plain estimator") as caught:
        model.fit(X, y)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert not model.repaired_ and model.composed_estimator_ is model.estimator_
    assert_array_equal(model.coef_, model.estimator_.coef_)
    assert model.head_ is not None and model.few_classes_.tolist() == [4, 5]
    assert model.accuracies_["after"]["all"] <= model.accuracies_["before"]["all"]


def test_base_classes_lose_no_more_than_they_may():
    X, y, _, _ = long_tailed_digits()
    free = small(SGDClassifier(random_state=0), epochs=40).fit(X, y)
    lost = 100 * (free.accuracies_["before"]["base"] - free.accuracies_["after"]["base"])
    assert lost > 0.5
    bound = small(SGDClassifier(random_state=0), epochs=40, max_base_drop=lost / 2).fit(X, y)
    assert 100 * (bound.accuracies_["before"]["base"] - bound.accuracies_["after"]["base"]) <= lost / 2 + 1e-6
    if bound.repaired_:
        assert_array_equal(bound.coef_, free.coef_)
        change = (bound.intercept_ - free.intercept_)[bound.few_classes_]
        assert (change < 0).all()
        assert_allclose(change, change[0], atol=1e-9)


def test_scores_of_samples_not_seen():
    X, y = make_blobs((30, 20, 2, 1))
    samples = alphaext.sklearn.estimators.FitSamples(X, y, y, np.ones(len(y)), {})
    folds = make_folds(samples, 3, np.random.RandomState(0))
    assert folds[y == 3].tolist() == [-1] and sorted(folds[y == 2]) == [0, 1]
    assert np.bincount(folds[y == 0]).tolist() == [10, 10, 10]
    fitted = LogisticRegression().fit(X, y)
    scores = held_out_scores(LogisticRegression(), fitted, samples, folds)
    for fold in range(3):
        other = LogisticRegression().fit(X[folds != fold], y[folds != fold])
        assert_array_equal(scores[folds == fold], other.decision_function(X[folds == fold]))
    assert_allclose(scores[y == 3], fitted.decision_function(X[y == 3]))


@pytest.mark.parametrize("sampler", ["SMOTE", "RandomOverSampler"])
def test_pipelines_with_a_resampling_step(sampler):
    over_sampling = pytest.importorskip("imblearn.over_sampling")
    pipeline = pytest.importorskip("imblearn.pipeline").make_pipeline(
        StandardScaler(),
        getattr(over_sampling, sampler)(random_state=0, **({"k_neighbors": 1} if sampler == "SMOTE" else {})),
        LogisticRegression(),
    )
    X, y, X_test, y_test = long_tailed_digits()
    model = small(pipeline, epochs=40).fit(X, y)
    assert_array_equal(np.sort(model.few_classes_), np.flatnonzero(np.bincount(y) < 20))
    features = model.composed_estimator_[0].transform(X_test)
    assert_allclose(model.decision_function(X_test), features @ model.coef_.T + model.intercept_)
    assert model.score(X_test, y_test) > pipeline.fit(X, y).score(X_test, y_test) - 0.03


def test_dtype_and_read_only_data():
    X, y = make_blobs()
    X = X.astype(np.float32)
    X.setflags(write=False)
    model = small().fit(X, y)
    assert model.coef_.dtype == model.estimator_.coef_.dtype  # float32, but float64 before scikit-learn 1.8
    assert model.alphas_.dtype == np.float64
    assert_allclose(model.coef_, small().fit(X.astype(float), y).coef_, atol=1e-3)
    integers = (X > 0).astype(int)
    assert_array_equal(small().fit(integers, y).coef_, small().fit(integers.astype(float), y).coef_)


def test_labels_may_be_strings():
    X, y = make_blobs()
    names = np.array(["apple", "banana", "cherry", "date", "elder", "fig"])
    model, named = small().fit(X, y), small().fit(X, names[y].tolist())
    assert_array_equal(named.coef_, model.coef_)
    assert_array_equal(named.classes_, names)
    assert_array_equal(named.few_classes_, ["elder", "fig"])
    assert_array_equal(named.members_, names[model.members_])
    assert_array_equal(named.predict(X), names[model.predict(X)])


@pytest.mark.parametrize("preset", ["few", "paper"])
@pytest.mark.parametrize("container", [sparse.csr_matrix, sparse.csr_array, sparse.csc_array, sparse.coo_matrix])
def test_sparse_is_dense(container, preset):
    X, y = make_blobs(width=12)
    X[np.abs(X) < 0.5] = 0
    estimator = LogisticRegression(tol=1e-10, max_iter=1000)
    dense, found = (small(estimator, preset=preset, epochs=10).fit(each, y) for each in (X, container(X)))
    assert_array_equal(found.members_, dense.members_)
    assert found.repaired_ == dense.repaired_
    assert_allclose(found.coef_, dense.coef_, atol=1e-5)
    assert_allclose(found.intercept_, dense.intercept_, atol=1e-5)
    assert_allclose(found.decision_function(container(X)), dense.decision_function(X), atol=1e-4)
    losses = [[entry["loss"] for entry in model.result_.history[1:]] for model in (found, dense)]
    assert_allclose(*losses, atol=1e-5)


def test_wide_sparse_features_are_not_made_dense():
    """Dense, they would take 440 MB."""
    _, y = make_blobs((300, 250, 5))
    n, width = len(y), 100_000
    columns = np.stack([y, 10 + (7919 * np.arange(n)) % (width - 10)], axis=1)
    X = sparse.csr_matrix((np.ones(2 * n), columns.ravel(), np.arange(0, 2 * n + 1, 2)), shape=(n, width))
    tracemalloc.start()
    model = small(SGDClassifier(random_state=0), epochs=2, top_k=2).fit(X, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert model.coef_.shape == (3, width) and len(model.few_classes_) == 1
    assert peak < 60e6


def test_pipeline_takes_raw_samples():
    words = ["red", "green", "blue", "black", "white", "grey"]
    random = np.random.default_rng(0)
    _, y = make_blobs()
    texts = [" ".join([words[label], *random.choice(words, 2)]) for label in y]
    inner = make_pipeline(Normalizer(), LogisticRegression(C=10))
    model = small(make_pipeline(TfidfVectorizer(), inner)).fit(texts, y)
    assert not hasattr(model, "n_features_in_")
    assert_array_equal(model.few_classes_, [4, 5])
    features = model.estimator_[0].transform(texts)
    assert_allclose(model.decision_function(texts), features @ model.coef_.T + model.intercept_)
    assert model.composed_estimator_[0] is model.estimator_[0]
    assert_array_equal(model.estimator_.predict(texts), model.estimator_[-1].predict(features))
    assert_array_equal(model.predict_proba(texts).shape, (len(y), 6))

    X, y = make_blobs()
    scaled = StandardScaler().fit(X)
    whole, last = small(make_pipeline(FrozenEstimator(scaled), LogisticRegression())), small()
    assert_array_equal(whole.fit(X, y).coef_, last.fit(scaled.transform(X), y).coef_)
    assert whole.n_features_in_ == 8


def test_grid_search():
    X, y = make_blobs()
    grid = {"gamma": [0.5, 1.0], "estimator__C": [0.01, 1.0], "score_scale": ["auto", 1.0]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the repaired rows are no better")
        search = GridSearchCV(small(), grid, cv=2, error_score="raise").fit(X, y)
    assert len(search.cv_results_["params"]) == 8 and search.best_score_ > 0.6
    assert search.best_estimator_.alphas_.max(axis=0)[0] <= search.best_params_["gamma"]
    assert len(set(search.cv_results_["mean_test_score"].tolist())) > 2


def test_clone_and_pickle():
    X, y = make_blobs()
    model = small(RidgeClassifier(alpha=3), gamma=0.9, lr_schedule="multistep", lr_milestones=(2, 4)).fit(X, y)
    copy = pickle.loads(pickle.dumps(model))
    assert_array_equal(copy.decision_function(X), model.decision_function(X))
    assert_array_equal(copy.alphas_, model.alphas_)
    assert_array_equal(copy.head_.alphas(), model.head_.alphas())
    assert copy.result_.history[1:] == model.result_.history[1:]
    twin = clone(model)
    assert not hasattr(twin, "coef_") and twin.get_params()["estimator__alpha"] == 3
    assert_array_equal(twin.fit(X, y).coef_, model.coef_)
    assert model.set_params(estimator__alpha=5, lr=0.05).estimator.alpha == 5


def test_same_seed_same_bits_and_nothing_else_is_touched():
    X, y = make_blobs()
    state, torch_state, threads = np.random.get_state()[1].copy(), torch.get_rng_state(), torch.get_num_threads()
    first = small().fit(X, y)
    assert_array_equal(np.random.get_state()[1], state)
    assert torch.equal(torch.get_rng_state(), torch_state) and torch.get_num_threads() == threads
    assert_array_equal(small().fit(X, y).coef_, first.coef_)
    assert_array_equal(small(random_state=np.random.RandomState(0)).fit(X, y).coef_, first.coef_)
    assert (small(random_state=1).fit(X, y).alphas_ != first.alphas_).any()
    assert_array_equal(small().fit(X, y).alphas_, first.alphas_)
    jobs = Parallel(n_jobs=2, backend="threading")(delayed(small().fit)(X, y) for _ in range(4))
    assert all((job.coef_ == first.coef_).all() for job in jobs)
    with torch.device("meta"):
        assert_array_equal(small().fit(X, y).coef_, first.coef_)


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ((40, 30, 20), {}, "no class is few, with less than few_below=20 training samples: the result is the plain estimator"),
        ((10, 12, 15), {}, "no class is a base class, with at least few_below=20 training samples"),
        ((40, 30, 5), {"pool": "many"}, "no class has more than many_above=100 training samples, and pool='many'"),
        ((10, 12), {}, "no class is a base class"),
    ],
)
@pytest.mark.parametrize("base", [LogisticRegression(), make_pipeline(StandardScaler(), LinearSVC(random_state=0))])
def test_falls_back_to_the_plain_estimator(base, counts, options, message):
    X, y = make_blobs(counts)
    model = small(base, **options)
    with pytest.warns(AlphaNetWarning, match=message) as caught:
        model.fit(X, y)
    assert len(caught) == 1 and caught[0].filename == __file__
    plain = clone(base).fit(X, y)
    assert_array_equal(model.decision_function(X), plain.decision_function(X))
    assert_array_equal(model.predict(X), plain.predict(X))
    assert model.composed_estimator_ is model.estimator_
    assert model.head_ is None and model.result_ is None
    assert model.few_classes_.shape == (0,) and model.members_.shape == model.alphas_.shape == (0, 0)
    assert model.coef_.shape == (1 if len(counts) == 2 else len(counts), 8)


def test_takes_the_neighbours_there_are():
    X, y = make_blobs((40, 30, 5))
    with pytest.warns(AlphaNetWarning, match=r"top_k=3 is more than the classes .* chosen from: all 2 are taken") as caught:
        model = small().fit(X, y)
    assert caught[0].filename == __file__
    assert model.members_.shape == (1, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the repaired rows are no better")
        assert small(pool="all", top_k=2).fit(X, y).members_.shape == (1, 3)


@pytest.mark.parametrize("base", [LogisticRegression(), RidgeClassifier(), LinearSVC(fit_intercept=False, random_state=0)])
@pytest.mark.parametrize("counts", [(60, 8), (8, 60)])
@pytest.mark.filterwarnings("ignore:top_k=3 is more")
@pytest.mark.filterwarnings("ignore:the repaired rows are no better")
def test_two_classes(counts, base):
    X, y = make_blobs(counts, seed=3)
    model = small(base, epochs=20).fit(X, y)
    assert model.coef_.shape == (1, 8) and model.intercept_.shape == (1,)
    scores = model.decision_function(X)
    assert scores.shape == (68,)
    assert_allclose(scores, X @ model.coef_[0] + model.intercept_[0], atol=1e-12)
    if model.repaired_:
        own = model.score_scale_ * model.estimator_.decision_function(X) / 2
        two = model.head_(torch.from_numpy(np.stack([-own, own], axis=1))).detach().numpy()
        assert_allclose(two[:, 1] - two[:, 0], model.score_scale_ * scores, atol=1e-9)
    assert_array_equal(model.predict(X), (scores > 0).astype(int))
    assert_array_equal(model.few_classes_, [int(counts[1] < counts[0])])
    with pytest.warns(AlphaNetWarning, match="of two classes, both rows are multiples of one vector"):
        small(base, preset="paper").fit(X, y)


def test_probabilities_only_where_the_estimator_has_them():
    X, y = make_blobs()
    for base, has in ((LogisticRegression(), True), (RidgeClassifier(), False), (SGDClassifier(), False)):
        for model in (small(base), small(base).fit(X, y)):
            assert hasattr(model, "predict_proba") == hasattr(model, "predict_log_proba") == has
    ovr = SGDClassifier(loss="log_loss", random_state=0)
    assert_allclose(small(ovr).fit(X, y).predict_proba(X).sum(axis=1), 1)
    with pytest.raises(AttributeError, match="predict_proba"):
        small(LinearSVC()).predict_proba(X)


def test_sample_weight_reaches_the_classifier():
    X, y = make_blobs()
    weights = np.random.default_rng(0).uniform(0.5, 3, len(y))
    expected = LogisticRegression().fit(X, y, sample_weight=weights)
    assert_array_equal(small().fit(X, y, weights).estimator_.coef_, expected.coef_)
    inner = make_pipeline("passthrough", LogisticRegression())
    model = small(make_pipeline("passthrough", inner)).fit(X, y, sample_weight=weights)
    assert_array_equal(model.estimator_[-1][-1].coef_, expected.coef_)
    by_name = small(inner).fit(X, y, logisticregression__sample_weight=weights)
    assert_array_equal(by_name.estimator_[-1].coef_, expected.coef_)
    with pytest.raises(TypeError, match="sample_weight was given, but LinearDiscriminantAnalysis does not support it"):
        small(LinearDiscriminantAnalysis()).fit(X, y, weights)


def test_samples_of_weight_zero_do_not_count():
    X, y = make_blobs()
    extra, extra_y = make_blobs((0, 0, 0, 0, 40, 40), seed=1)
    weights = np.repeat([1.0, 0.0], [len(y), len(extra_y)])
    both = np.concatenate([X, 50 + extra]), np.concatenate([y, extra_y]), weights
    base = LogisticRegression(tol=1e-10, max_iter=1000)
    model, alone = small(base, epochs=10).fit(*both), small(base, epochs=10).fit(X, y)
    assert_array_equal(model.members_, alone.members_)
    assert_allclose(model.coef_, alone.coef_, atol=1e-5)


def test_metadata_routing():
    X, y = make_blobs()
    weights = np.random.default_rng(0).uniform(0.5, 3, len(y))
    expected = LogisticRegression().fit(X, y, sample_weight=weights).coef_
    with config_context(enable_metadata_routing=True):
        model = small(LogisticRegression().set_fit_request(sample_weight=True))
        assert_array_equal(model.fit(X, y, sample_weight=weights).estimator_.coef_, expected)
        assert_array_equal(AlphaNetClassifier(epochs=1, top_k=2).fit(X, y, sample_weight=weights).estimator_.coef_, expected)
        pipeline = make_pipeline(StandardScaler().set_fit_request(sample_weight=False), clone(model.estimator))
        assert small(pipeline).fit(X, y, sample_weight=weights).fit(X, y).few_classes_.tolist() == [4, 5]
        search = GridSearchCV(model.set_fit_request(sample_weight=True, X_val=True, y_val=True), {"gamma": [0.9]}, cv=2)
        model.set_score_request(sample_weight=False)
        best = search.fit(X, y, sample_weight=weights, X_val=X[:50], y_val=y[:50]).best_estimator_
        assert "all" in best.result_.history[0]
        with pytest.raises(ValueError, match="sample_weight"):
            small().fit(X, y, sample_weight=weights)
        with pytest.raises(TypeError, match="unexpected argument"):
            model.fit(X, y, groups=weights)


@pytest.mark.filterwarnings("ignore:the repaired rows are no better")
def test_options_reach_the_training(capsys):
    X, y, X_val, y_val = long_tailed_digits()
    options = {"many_above": 50, "epochs": 2, "lr": 0.02, "lr_schedule": "constant", "verbose": 1}
    given = {"X_val": X_val, "y_val": y_val}
    model = small(**options).fit(X, y, **given)
    assert "epoch" in capsys.readouterr().err
    history = model.result_.history
    assert [entry["lr"] for entry in history[1:]] == [0.02, 0.02] and not np.isnan(history[0]["many"])
    quiet = small(**options | {"verbose": 0}).fit(X, y, **given)
    assert capsys.readouterr() == ("", "")
    assert_array_equal(quiet.coef_, model.coef_)
    sub_modules = small(preset="paper", hidden_dim=3, shared=True, epochs=1).fit(X, y)
    assert sub_modules.head_.w2.shape == (1, 4, 3) and sub_modules.head_.gamma == 0.7


@pytest.mark.filterwarnings("ignore:the repaired rows are no better")
def test_what_makes_a_class_near():
    X, y, _, _ = long_tailed_digits()
    near = [small(metric=metric, epochs=1).fit(X, y).members_ for metric in ("euclidean", "cosine")]
    base = [label for label in range(10) if (y == label).sum() >= 20]
    assert all(np.isin(members[:, 1:], base).all() for members in near)
    drawn = [small(metric="random", epochs=1, random_state=seed).fit(X, y).members_ for seed in (0, 0, 1)]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()


def test_a_class_of_one_sample_is_repaired():
    X, y = make_blobs((40, 30, 25, 2, 1))
    model = small(top_k=2).fit(X, y)
    assert_array_equal(model.few_classes_, [3, 4])


def test_validation_samples_that_are_given():
    X, y, X_val, y_val = long_tailed_digits()
    model = small(epochs=20).fit(X, y, X_val=X_val, y_val=y_val)
    assert model.result_.after["all"] == pytest.approx(model.score(X_val, y_val))
    assert model.accuracies_["after"]["all"] == pytest.approx(model.score(X_val, y_val))
    assert model.result_.before["all"] == pytest.approx(model.estimator_.score(X_val, y_val))
    assert_array_equal(model.estimator_.coef_, LogisticRegression().fit(X, y).coef_)
    found = small(epochs=20).fit(sparse.csr_matrix(X), y, X_val=sparse.csc_matrix(X_val), y_val=y_val.tolist())
    assert found.result_.after["all"] == pytest.approx(found.score(X_val, y_val))


@pytest.mark.parametrize("options", [{"preset": "all"}, {"method": "auto"}])
def test_every_row_may_change_where_that_is_better_on_samples_not_seen(options):
    X, y, X_test, y_test = long_tailed_digits()
    model = AlphaNetClassifier(LinearSVC(C=0.01, random_state=0), random_state=0, few_below=46, **options).fit(X, y)
    assert model.repaired_ and model.accuracies_["after"]["all"] > model.accuracies_["before"]["all"] + 0.05
    assert model.score(X_test, y_test) > model.estimator_.score(X_test, y_test) + 0.05
    assert model.head_ is None and len(model.few_classes_) == 5
    found = model.recommendation_
    assert (found is None) == ("preset" in options) and (found is None or found.method in str(found))
    if found is None or not found.method.startswith("few"):
        assert (model.coef_ != model.estimator_.coef_).any(axis=1).all()
    again = AlphaNetClassifier(LinearSVC(C=0.01, random_state=0), random_state=0, few_below=46, **options).fit(X, y)
    assert_array_equal(again.coef_, model.coef_)


@pytest.mark.parametrize("options", [{"preset": "all"}, {"method": "auto"}])
def test_methods_by_validation_samples_that_are_given(options):
    X, y, X_test, y_test = long_tailed_digits()
    fitted = FrozenEstimator(LinearSVC(C=0.01, random_state=0).fit(X, y))
    with pytest.raises(ValueError, match="X_val and y_val must be given, which a FrozenEstimator has not seen"):
        AlphaNetClassifier(fitted, **options).fit(X, y)
    model = AlphaNetClassifier(fitted, few_below=46, random_state=0, **options)
    model.fit(X, y, X_val=X_test[::2], y_val=y_test[::2])
    assert model.score(X_test[1::2], y_test[1::2]) > fitted.score(X_test[1::2], y_test[1::2])


def test_samples_that_cannot_choose_leave_the_plain_estimator():
    X, y = make_blobs()
    with pytest.warns(AlphaNetWarning, match="no method is better on samples not seen .*of few classes, and less than 10"):
        model = AlphaNetClassifier(preset="all", random_state=0).fit(X, y)
    assert not model.repaired_ and model.composed_estimator_ is model.estimator_


def test_frozen_estimator_is_repaired_without_a_fit():
    X, y = make_blobs()
    fitted = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, y)
    coef = fitted[-1].coef_.copy()
    model = small(FrozenEstimator(fitted)).fit(X[3:], y[3:], sample_weight=np.ones(len(y) - 3))
    assert model.score_scale_ == 1
    assert_array_equal(fitted[-1].coef_, coef)
    assert_array_equal(model.coef_[:4], coef[:4])
    assert (model.coef_[4:] != coef[4:]).any()
    features = fitted[:-1].transform(X)
    assert_allclose(model.decision_function(X), features @ model.coef_.T + model.intercept_)
    assert model.n_features_in_ == 8
    with pytest.warns(AlphaNetWarning, match="the estimator's 6 classes are not the 5 of y"):
        model.fit(X[y < 5], y[y < 5])


@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_scale_undoes_a_factor(factor, seed):
    random = np.random.default_rng(seed)
    weight, labels = random.standard_normal((5, 3)), random.integers(0, 5, 200)
    scores = (weight[labels] + random.standard_normal((200, 3))) @ weight.T
    base = np.array([True, True, False, True, True])
    scale = best_scale(scores, labels, base)
    assert 0.05 < scale < 5
    assert best_scale(factor * scores, labels, base) * factor == pytest.approx(scale, rel=1e-3)


def test_scale_is_bounded_and_one_where_scores_say_nothing():
    labels = np.arange(200) % 4
    base = np.ones(4, dtype=bool)
    # All rightly classified: Platt's correction wants the probability 1 - 1 / 202.
    scale = best_scale(np.eye(4)[labels], labels, base)
    assert 1 / (1 + 3 * np.exp(-scale)) == pytest.approx(1 - 1 / 202, rel=1e-4)
    assert best_scale(np.zeros((200, 4)), labels, base) == 1
    assert best_scale(-np.eye(4)[labels], labels, base) == 1
    assert best_scale(np.eye(4)[labels], labels, np.arange(4) == 0) == 1


def test_gain_and_its_noise():
    labels = np.repeat(np.arange(3), (80, 15, 5))
    before, after = np.eye(3)[np.where(np.arange(100) % 5 == 0, (labels + 1) % 3, labels)], np.eye(3)[labels]
    gain, noise = alphaext.sklearn.estimators.gain_and_noise(before, after, labels)
    assert gain == pytest.approx(0.2) and 0.02 < noise < 0.08
    assert alphaext.sklearn.estimators.gain_and_noise(before, before, labels) == (0, 0)
    gain, noise = alphaext.sklearn.estimators.gain_and_noise(before[:0], after[:0], labels[:0])
    assert np.isnan(gain) and noise == 0


def test_rows_are_mixed_relative_to_their_mean():
    random = np.random.default_rng(0)
    rows = Rows(random.standard_normal((4, 3)), random.standard_normal(4))
    moved = Rows(rows.weight + 5, rows.bias + 7)
    mix, shift = random.standard_normal((2, 4)), random.standard_normal(2)
    assert_allclose(moved.mixed(mix, shift).weight - 5, rows.mixed(mix, shift).weight)
    assert_allclose(moved.mixed(mix, shift).bias - 7, rows.mixed(mix, shift).bias)
    own = rows.mixed(np.eye(4)[:2], np.zeros(2))
    assert_allclose(own.weight, rows.weight[:2])
    assert_allclose(own.bias, rows.bias[:2])


@pytest.mark.parametrize("estimator", [LogisticRegression(), LinearSVC(random_state=0), RidgeClassifier(), SGDClassifier()])
@pytest.mark.filterwarnings("ignore:the repaired rows are no better")
def test_classes_are_added(estimator):
    X, y, X_test, y_test = long_tailed_digits()
    names = np.array([f"digit {label}" for label in range(10)])
    taken = np.flatnonzero(np.bincount(y) > 100)[:2]
    old, first = ~np.isin(y, taken), [np.flatnonzero(y == label)[:5] for label in taken]
    new = np.concatenate(first)
    model = small(make_pipeline(StandardScaler(), estimator)).fit(X[old], names[y[old]])
    coef, intercept, plain = model.coef_.copy(), model.intercept_.copy(), model.estimator_.predict(X)
    added = model.add_classes(sparse.csr_matrix(X[old]).toarray(), names[y[old]], X[new], names[y[new]])
    assert added is model and model.classes_.tolist()[-2:] == names[taken].tolist()
    assert_array_equal(model.coef_[:8], coef)
    assert_array_equal(model.intercept_[:8], intercept)
    assert_array_equal(model.estimator_.predict(X), plain)
    predicted = model.predict(X_test)
    assert (predicted == names[y_test])[np.isin(y_test, taken)].mean() > 0.6
    assert (predicted == names[y_test])[~np.isin(y_test, taken)].mean() > 0.6
    features = model.composed_estimator_[0].transform(X_test)
    assert_allclose(model.decision_function(X_test), features @ model.coef_.T + model.intercept_)
    if hasattr(model, "predict_proba"):
        assert_allclose(model.predict_proba(X_test).sum(axis=1), 1)


def test_classes_are_added_to_two_and_to_sparse_features():
    X, y = make_blobs((40, 30, 5))
    model = small(few_below=2)
    with pytest.warns(AlphaNetWarning, match="no class is few"):
        model.fit(sparse.csr_matrix(X[y < 2]), y[y < 2])
    scores = model.decision_function(X)
    model.add_classes(sparse.csr_matrix(X[y < 2]), y[y < 2], sparse.csr_matrix(X[y == 2]), y[y == 2])
    made = model.decision_function(X)
    assert made.shape == (75, 3)
    assert_allclose(made[:, 1] - made[:, 0], scores, atol=1e-12)
    assert (model.predict(X) == y).mean() > 0.8


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y_new": [0, 1]}, ValueError, "y_new must hold classes that it does not know, got 0, 1"),
        ({"y": np.full(190, 7)}, ValueError, "y must hold classes that the classifier knows, got 7"),
        ({"y_new": ["a", "b"]}, TypeError, "y_new must hold labels of the kind of"),
        ({"X_new": np.zeros((2, 3))}, ValueError, ""),
    ],
)
@pytest.mark.filterwarnings("ignore:the repaired rows are no better")
def test_errors_of_added_classes(change, error, message):
    X, y = make_blobs()
    model = small().fit(X, y)
    with pytest.raises(error, match=message):
        model.add_classes(**({"X": X, "y": y, "X_new": X[:2], "y_new": [8, 9]} | change))
    assert len(model.classes_) == 6


def test_another_fit_leaves_nothing_behind():
    X, y = make_blobs()
    model = small().fit(X, y)
    model.set_params(estimator=make_pipeline(TfidfVectorizer(), LogisticRegression()))
    model.fit([f"class{label}" for label in y], y)
    assert not hasattr(model, "n_features_in_")
    with pytest.warns(AlphaNetWarning):
        model.set_params(few_below=1).fit([f"class{label}" for label in y], y)
    assert model.head_ is None and model.result_ is None and model.few_classes_.size == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"gamma": 1.5}, ValueError, "gamma must be finite and above 0 and at most 1, got 1.5"),
        ({"rule": "max"}, ValueError, "rule"),
        ({"init": "zeros"}, ValueError, "init must be one of identity, default, got 'zeros'"),
        ({"pool": "few"}, ValueError, "pool must be one of base, many, all, got 'few'"),
        ({"metric": "far"}, ValueError, "metric must be one of euclidean, cosine, random, got 'far'"),
        ({"few_below": 200}, ValueError, "few_below must be at most many_above + 1"),
        ({"pca_dim": 0}, ValueError, "pca_dim must be at least 1, got 0"),
        ({"hidden_dim": 2.5}, TypeError, "hidden_dim must be an integer, got 2.5"),
        ({"epochs": -1}, ValueError, "epochs"),
        ({"lr": "fast"}, TypeError, "lr must be a number"),
        ({"select": "best_few"}, ValueError, "select='best_few' needs X_val and y_val"),
        ({"preset": "best"}, ValueError, "preset must be one of few, paper, all, got 'best'"),
        ({"method": "best"}, ValueError, "method must be one of auto, got 'best'"),
        ({"method": "auto", "top_k": None, "preset": "all"}, ValueError, "preset='all' does not go with method='auto'"),
        ({"method": "auto"}, ValueError, "top_k does not go with preset='all' or method='auto'"),
        ({"folds": 1}, ValueError, "folds must be at least 2, got 1"),
        ({"max_base_drop": -1}, ValueError, "max_base_drop must be finite and at least 0, got -1"),
        ({"score_scale": 0}, ValueError, "score_scale (a number, or 'auto') must be finite and above 0, got 0"),
        (
            {"score_scale": "own"},
            TypeError,
            "score_scale (a number, or 'auto') must be a number, finite and above 0, got 'own'",
        ),
    ],
)
def test_bad_parameters_are_named_before_any_work(options, error, message):
    class Untouched(LogisticRegression):
        def fit(self, X, y, sample_weight=None):
            raise AssertionError("fitted")

    X, y = make_blobs()
    with pytest.raises(error) as caught:
        small(Untouched(), **options).fit(X, y)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"X_val": 1}, ValueError, "X_val and y_val must be given together"),
        ({"X_val": np.zeros((2, 8)), "y_val": [0, 9]}, ValueError, "y_val must hold classes of y only, got 9"),
        ({"X_val": np.zeros((2, 8)), "y_val": ["a", "b"]}, ValueError, "y_val must hold classes of y only, got 'a', 'b'"),
        ({"X_val": np.zeros((2, 7)), "y_val": [0, 1]}, ValueError, "X_val must have shape [m, 8] as X, got [2, 7]"),
        ({"X_val": np.zeros((2, 8)), "y_val": [0]}, ValueError, "inconsistent numbers of samples"),
        ({"sample_weight": np.ones(3)}, ValueError, "sample_weight must have shape [190], one weight a sample, got [3]"),
        ({"sample_weight": -np.ones(190)}, ValueError, "sample_weight must be finite, and no weight negative"),
        ({"y": None}, ValueError, "requires y to be passed"),
        ({"y": np.linspace(0, 1, 190)}, ValueError, "Unknown label type"),
    ],
)
def test_bad_arguments_of_fit(arguments, error, message):
    X, y = make_blobs()
    with pytest.raises(error) as caught:
        small().fit(X, **({"y": y} | arguments))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (
            DecisionTreeClassifier(),
            "estimator must be a linear classifier.*; DecisionTreeClassifier has no coef_",
        ),
        (SVC(kernel="linear"), r"estimator must have a row of coef_ .* for each class, 4 here .*; SVC has coef_ \[6, 8\]"),
        (make_pipeline(StandardScaler(), "passthrough"), "estimator must be a linear classifier"),
    ],
)
def test_estimators_that_are_not_linear_classifiers(estimator, message):
    X, y = make_blobs((40, 30, 30, 5))
    with pytest.raises(TypeError, match=message):
        small(estimator).fit(X, y)


def test_one_row_for_each_pair_of_classes_is_not_one_for_each_class():
    """Of three classes there are as many pairs."""
    X, y = make_blobs((40, 30, 5))
    with pytest.raises(TypeError, match="estimator must allow that its coef_ is set; SVC says"):
        small(SVC(kernel="linear"), top_k=2).fit(X, y)


def test_estimators_that_do_not_take_new_rows():
    class Remembers(LogisticRegression):
        def fit(self, X, y, sample_weight=None):
            super().fit(X, y, sample_weight)
            self.copy_ = self.coef_.copy()
            return self

        def decision_function(self, X):
            return X @ self.copy_.T + self.intercept_

    X, y = make_blobs((40, 30, 30, 5))
    with pytest.raises(TypeError, match="the decision_function of Remembers is not X @ coef_.T"):
        small(Remembers(), epochs=10**9).fit(X, y)
    X, y = make_blobs((40, 5))
    with (
        pytest.warns(AlphaNetWarning),
        pytest.raises(TypeError, match="estimator must allow that its coef_ is set; SVC says"),
    ):
        small(SVC(kernel="linear"), epochs=10**9).fit(X, y)


def test_divergence_says_what_may_help():
    X, y = make_blobs()
    with pytest.raises(FloatingPointError, match="a smaller lr may help"):
        small(lr=1e200).fit(X, y)
