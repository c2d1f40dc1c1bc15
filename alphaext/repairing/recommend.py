"""Which of all methods to take: cheap rivals, baselines and presets measured alike, one table, one sentence of advice.

What a method trains is trained once; the numbers that it leaves open are chosen on some folds of the validation samples, and
it is measured on another. Without validation samples, training samples take their place, fold by fold, out of what is trained.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..baselines.averaging import average, averaged
from ..baselines.registry import run_baseline
from ..baselines.retraining import plainly_trained, short_features_factor
from ..classes import ClassSplit
from ..metrics.accuracy import SPLITS_AND_ALL
from ..metrics.evaluation import expected_calibration_error, split_metrics
from ..metrics.predictions import predict_logits
from ..metrics.scale import best_scale
from ..training.builder import Builder
from ..training.options import CHOOSING
from ..training.result import AlphaNetWarning
from ..training.selection import BaselineResult, unfit_to_choose
from ..utils.checks import check_choice, check_number, if_given
from ..utils.linear import make_linear
from ..utils.seeds import seeded_generator
from ..utils.tensors import LabelledFeatures, TensorLike, check_finite
from ..utils.text import percent
from .all_rows import check_every_class, layers_to_average
from .preset import Repair, repair_by_preset
from .recommendation import Candidate, Recommendation

__all__ = ["recommend"]

_CHECKED_ROWS = 1024
METHODS = {
    "original": "the classifier as it is",
    "few-bias": "one constant on the few scores",
    "few": "preset few: the few rows made anew",
    "paper": "preset paper: few rows composed as published",
    "tau": "rows divided by a power of their length",
    "logit-adjustment": "scores less a multiple of the log of how frequent a class is",
    "ncm": "class means, compared by cosine",
    "lws": "each row times a factor, trained on equally many samples of each class",
    "discriminant": "class means and one covariance, few means composed with near ones",
    "crt": "all rows trained anew on equally many samples of each class",
    "average": "the classifier averaged with the discriminant",
    "all": "preset all: preset few averaged with the discriminant and with re-trained rows",
}
"""The methods that are compared. Of equal ones the first is recommended: it changes less, or is simpler."""

_FEW_ROWS_ONLY = ("original", "few-bias", "few", "paper")
_FOLDS = 5
# So many standard errors of the difference between two methods are noise: of accuracy, and of likelihood.
_NOISE, _LIKELIHOOD_NOISE = 1.0, 0.5
# Samples of a class, at most, by which something is chosen within the training samples.
_MOST_OF_A_CLASS = 40
# The spread of scores is measured on so many training samples, or up to twice as many.
_SPREAD_SAMPLES = 4096
_TRAINED = ("few", "paper", "ncm", "lws", "discriminant", "crt", "average", "all")
# What is trained for a method that is not trained itself.
_PART_OF = {"average": "discriminant"}
_TRAINED_ONCE = ("original", "paper", "ncm", "lws", "discriminant", "crt")
# Averages of the layers that are named, by the likelihood of the validation samples.
_AVERAGES = ("average", "all")


def recommend(
    linear: nn.Module,
    features: TensorLike | LabelledFeatures,
    labels: TensorLike | None = None,
    val_features: TensorLike | LabelledFeatures | None = None,
    val_labels: TensorLike | None = None,
    *,
    policy: str = "best_all",
    min_all: float | None = None,
    max_base_drop: float | None = None,
    few_below: int = 20,
    many_above: int = 100,
    split: ClassSplit | None = None,
    few_classes: TensorLike | None = None,
    refit: bool = True,
    seed: int = 0,
) -> Recommendation:
    """Say which method does most for a trained classifier, and make its result.

    What a method leaves open is chosen on four fifths of the validation samples, and it is measured on the rest, in turn.
    Accuracies within one standard error of the best are ties. Of these the method under which labels are likeliest is taken, or
    one that changes less, where that is behind by half a standard error at most. Then it is made with all validation samples.

    Without validation samples, two fifths of the training samples take no part in training, in turn: one to choose by, one to
    measure on. The classifier has seen them all, so a layer trained plainly on the others stands in for it. Each class counts
    alike, however many samples it has; its only one is always trained on. The result has means over folds of what was chosen.

    Args:
        linear: the trained classifier, such as ``nn.Linear``, in float32 or float64; it is not changed.
        features: ``[n, D]``, the training features.
        labels: ``[n]`` integers, where ``features`` is no :class:`alphaext.features.Features`, which has its labels.
        val_features: ``[m, D]``, or features likewise, that neither the classifier nor the network was trained on; or none.
        val_labels: ``[m]`` integers.
        policy: ``"best_all"`` (default), or ``"best_few"``: the best few accuracy of those that keep ``min_all``.
        min_all: for ``"best_few"``, a fraction of 1; None takes the original classifier's own accuracy over all.
        max_base_drop: points that the accuracy over base classes may lose; None (default) for any.
        few_below: a class with fewer training samples is few; 20 in the paper.
        many_above: a class with more is many; 100 in the paper.
        split: which classes are few, medium and many, instead of these two.
        few_classes: ids of the classes to repair, however many samples they have, instead of ``few_below``; or
            names, where ``features`` have such.
        refit: without validation samples, let another layer stand in for the classifier; False where it has not seen the
            features, such as scores by copies of it that were trained without them.
        seed: of the folds, and of all that is trained.

    Returns:
        A :class:`Recommendation`; printed, it is a table and the advice.

    Raises:
        TypeError, ValueError: as :func:`alphaext.repair`; a policy that there is not, or a bound out of range.

    Example:
        >>> labels, val_labels = torch.arange(4).repeat_interleave(torch.tensor([30, 30, 30, 5])), torch.arange(4).repeat(20)
        >>> centres = 3 * torch.randn(4, 8)
        >>> features, val_features = (centres[ids] + torch.randn(len(ids), 8) for ids in (labels, val_labels))
        >>> found = recommend(nn.Linear(8, 4), features, labels, val_features, val_labels)
        >>> found.linear.weight.shape, [candidate.method for candidate in found.candidates][:3]
        (torch.Size([4, 8]), ['original', 'few-bias', 'few'])
    """
    builder = Builder(
        linear,
        features,
        labels,
        val_features=val_features,
        val_labels=val_labels,
        few_below=few_below,
        many_above=many_above,
        split=split,
        few_classes=few_classes,
    )
    builder.means()  # where a feature is not finite, each method would fail by itself, and that would be no error
    if builder.validation is not None:
        for start, block in enumerate(builder.validation.real().split(_CHECKED_ROWS)):
            check_finite(block, "val_features", first_row=start * _CHECKED_ROWS)
    bounds: dict[str, Any] = {"policy": policy, "min_all": min_all, "max_base_drop": max_base_drop}
    return compare_methods(linear, builder, **bounds, refit=refit, seed=seed).recommendation


def compare_methods(
    linear: nn.Module,
    builder: Builder,
    *,
    policy: str = "best_all",
    min_all: float | None = None,
    max_base_drop: float | None = None,
    methods: Sequence[str] = tuple(METHODS),
    refit: bool = True,
    seed: int = 0,
) -> MethodComparison:
    """Compare some methods, the first of which is ``"original"``, as :func:`recommend` does all."""
    check_choice(policy, "policy", CHOOSING)
    for name, bound, most in (("min_all", min_all, 1.0), ("max_base_drop", max_base_drop, 100.0)):
        if_given(check_number, bound, name, minimum=0, maximum=most)
    if min_all is not None and policy != "best_few":
        raise ValueError(f"min_all goes with policy 'best_few', got {min_all!r} with {policy!r}")
    if builder.validation is None:
        folds = deal(builder.samples.labels, seed)
        turns = [_training_turn(builder, folds, fold, refit, seed) for fold in range(_FOLDS)]
    else:
        folds = deal(builder.validation.labels, seed)
        turns = _validation_turns(builder, folds, seed)
    measured: list[Measured] = []
    for method in methods:
        original = measured[0].right if measured else None
        measured.append(measure(method, turns, builder.split, original, alike=builder.validation is None))
    if not bool(torch.isin(measured[0].labels, builder.split.few).any()):
        name = "labels" if builder.validation is None else "val_labels"
        raise ValueError(f"{name} must have two samples of a few class or more, by which methods are compared; got none")
    how, candidates = "validation samples", [each.candidate for each in measured]
    if builder.validation is None:
        how = "cross-validated training samples, each class counting alike"
    method, reason = choose_method(measured, builder.split, policy, min_all, max_base_drop, how)
    if builder.validation is None:
        alone = int((builder.counts()[builder.split.few] == 1).sum())
        reason += f" ({alone} few classes have but one sample and are not measured)" if alone else ""
    advice = f"Take {method} ({METHODS[method]}): {reason}."
    chosen = next(each for each in measured if each.candidate.method == method)
    made = _made(method, linear, builder, turns, chosen, seed)
    repaired, layer = (made, made.linear) if isinstance(made, Repair) else (None, made)
    if method != "original" and _same_layer(layer, make_linear(builder.weight, builder.bias)):
        # Ahead on samples that it was not chosen by, and yet no better where it is made and measured on all.
        advice = (
            f"Take original ({METHODS['original']}): {method} was ahead where parts of the validation samples chose for the "
            "others, but made with all of them it is no better there than the classifier, which is kept."
        )
        method, chosen = "original", measured[0]
    found = Recommendation(method, advice, layer, candidates, builder.split)
    return MethodComparison(found, repaired, torch.cat([turn.places for turn in turns]), chosen.logits)


def _same_layer(one: nn.Linear, other: nn.Linear) -> bool:
    """Whether two layers make the same scores of everything."""
    biases = [0.0 if layer.bias is None else layer.bias.detach().double().cpu() for layer in (one, other)]
    return torch.equal(one.weight.detach().double().cpu(), other.weight.detach().double().cpu()) and bool(
        torch.as_tensor(biases[0] == biases[1]).all()
    )


def deal(labels: Tensor, seed: int) -> Tensor:
    """The fold of each sample, each class dealt out evenly; -1 for the only sample of a class."""
    folds = torch.full((len(labels),), -1, device="cpu")
    for label in labels.unique().tolist():
        own = (labels == label).nonzero().flatten()
        order = torch.randperm(len(own), generator=seeded_generator(seed, label), device="cpu")
        # What is left over of one class goes to other folds than that of the next.
        if len(own) > 1:
            folds[own[order]] = (torch.arange(len(own), device="cpu") + label) % _FOLDS
    return folds


class Makers:
    """What each method makes of a classifier and training features; what several methods need is made once.

    Args:
        linear: the classifier.
        builder: of its training features, without validation samples.
        seed: of all that is trained.
    """

    def __init__(self, linear: nn.Linear, builder: Builder, seed: int) -> None:
        self.linear, self.builder, self.split, self.seed = linear, builder, builder.split, seed
        self._parts: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}

    def numbers(self, method: str, val_features: Tensor, val_labels: Tensor) -> dict[str, Any]:
        """What validation samples choose for a method."""
        if method in _TRAINED_ONCE:
            return {}
        if method not in _AVERAGES:
            given = {"val_features": val_features, "val_labels": val_labels}
            return self._baseline(method, **given).chosen
        layers, counts = self._layers(method)
        with warnings.catch_warnings():
            warnings.simplefilter("error", AlphaNetWarning)  # what keeps it from choosing
            try:
                found = average(layers, val_features, val_labels, self.split, original=self.linear, class_counts=counts)
            except AlphaNetWarning as error:
                raise ValueError(str(error)) from error
        return found.settings

    def layer(self, method: str, numbers: Mapping[str, Any]) -> nn.Linear:
        """What a method makes with these numbers."""
        if method == "original":
            return self.linear
        if method in _TRAINED_ONCE:
            return self._part(method)
        if method in _AVERAGES:
            layers, counts = self._layers(method)
            return averaged(layers, numbers, self.split, counts)
        return self._baseline(method, **numbers).linear

    def prepare(self, method: str) -> None:
        """Train what the method needs."""
        if method in _TRAINED:
            self._part(_PART_OF.get(method, method))

    def scaled(self, method: str, numbers: Mapping[str, Any], power: int) -> dict[str, Any]:
        """Numbers relative to how widely the scores spread that they are added to or multiply (power -1), or back (1)."""
        if method in _AVERAGES:
            spreads = [self._spread(layer) for layer in self._layers(method)[0]]
            weights = [weight / spread**power for weight, spread in zip(numbers["weights"], spreads, strict=True)]
            return {**numbers, "weights": weights}
        if method in ("few-bias", "few", "logit-adjustment"):
            spread = self._spread(self._part("few") if method == "few" else self.linear)
            return {name: value * spread**power for name, value in numbers.items()}
        return dict(numbers)

    def _layers(self, method: str) -> tuple[list[nn.Linear], Tensor | None]:
        """What is averaged, and the classes' samples where their log is added."""
        if method == "average":
            return [self.linear, self._part("discriminant")], None
        return self._part("all"), self.builder.counts()

    def _spread(self, linear: nn.Linear) -> float:
        features = self.builder.samples.real()
        scores = _scores(linear, features[:: max(1, len(features) // _SPREAD_SAMPLES)]).double()
        return max(float((scores - scores.mean(dim=1, keepdim=True)).square().mean().sqrt()), 1e-12)

    def seconds(self, method: str) -> float:
        """How long what it trains has taken."""
        parts = {"few", "all"} if method == "all" else {_PART_OF.get(method, method)}
        return sum(self._seconds.get(part, 0.0) for part in parts)

    def _baseline(self, method: str, **options: Any) -> BaselineResult:
        name, linear = ("few-bias", self._part("few")) if method == "few" else (method, self.linear)
        return run_baseline(name, labels=self.builder.samples.labels, linear=linear, split=self.split, **options)

    def _part(self, name: str) -> Any:
        if name not in self._parts:
            if name == "all":
                self._part("few")
            started = time.monotonic()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AlphaNetWarning)  # that nothing is verified yet
                self._parts[name] = self._make(name)
            self._seconds[name] = time.monotonic() - started
        return self._parts[name]

    def _make(self, name: str) -> Any:
        data: dict[str, Any] = {"features": self.builder.samples.real(), "labels": self.builder.samples.labels}
        data["split"] = self.split
        if name in ("few", "paper"):
            return repair_by_preset(self.linear, self.builder, name, {"seed": self.seed}, False).linear
        if name == "all":
            check_every_class(self.split)
            return layers_to_average(self._part("few"), self.builder, self.seed, False)
        if name in ("ncm", "discriminant"):
            return run_baseline(name, linear=self.linear, **data).linear
        # One training: a search for its settings would take longer than all other methods together.
        factor = short_features_factor(data["features"]) if name == "crt" else 1.0
        settings: dict[str, Any] = {"lr": 0.2 * factor, "weight_decay": 5e-3 / factor, "seed": self.seed, "progress": False}
        return run_baseline(name, linear=self.linear, **data, **settings).linear


@dataclass(frozen=True)
class MethodComparison:
    """What came of a comparison.

    Attributes:
        recommendation: the method to take, and its layer.
        repair: what a preset made, where that is taken and there were validation samples.
        places: of the samples measured on, among the validation samples, or the training samples where there are none.
        logits: of these by the method that is taken, each by a layer that the sample had no part in.
    """

    recommendation: Recommendation
    repair: Repair | None
    places: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Turn:
    """A turn of a comparison: what makes the layers, and on which samples.

    Attributes:
        makers: of the layers.
        chosen_by: features and labels by which numbers are chosen.
        measured_on: features and labels that what was chosen is measured on.
        places: of the samples measured on, among all.
        doubt: why nothing can be chosen; empty where something can.
    """

    makers: Makers
    chosen_by: tuple[Tensor, Tensor]
    measured_on: tuple[Tensor, Tensor]
    places: Tensor
    doubt: str = ""


@dataclass(frozen=True)
class Measured:
    """A method as it was measured.

    Attributes:
        candidate: for the table.
        labels: of the samples, ``[n]``.
        logits: ``[n, N]``, of each sample by a layer that it had no part in; empty where there is none.
        weights: what each sample counts, float64 ``[n]``.
        numbers: what each turn has chosen.
    """

    candidate: Candidate
    labels: Tensor
    logits: Tensor
    weights: Tensor
    numbers: list[dict[str, Any]]

    @functools.cached_property
    def right(self) -> Tensor:
        """Which samples are recognised, float64 ``[n]``."""
        return (self.logits.argmax(dim=1) == self.labels).double()

    @functools.cached_property
    def log_likelihood(self) -> Tensor:
        """Of each sample's label, at the scale of the scores that makes all of them likeliest, float64 ``[n]``."""
        scores = self.logits.double()
        scale = best_scale(scores.numpy(), self.labels.numpy(), np.ones(scores.shape[1], dtype=bool))
        return torch.log_softmax(scale * scores, dim=1).gather(1, self.labels[:, None])[:, 0]


def _validation_turns(builder: Builder, folds: Tensor, seed: int) -> list[Turn]:
    assert builder.validation is not None
    features, labels = builder.validation.real(), builder.validation.labels
    layer = make_linear(builder.weight, builder.bias)
    makers = Makers(layer, Builder(layer, builder.samples.real(), builder.samples.labels, split=builder.split), seed)
    turns = []
    for fold in range(_FOLDS):
        others, own = folds != fold, (folds == fold).nonzero().flatten()
        turns.append(Turn(makers, (features[others], labels[others]), (features[own], labels[own]), own))
    return turns


def _training_turn(builder: Builder, folds: Tensor, fold: int, refit: bool, seed: int) -> Turn:
    features, labels = builder.samples.real(), builder.samples.labels
    # The other fold is not the next one, so that two samples of a class are never both held out.
    chosen_by, own = folds == (fold + 2) % _FOLDS, (folds == fold).nonzero().flatten()
    rest = ~chosen_by & (folds != fold)
    layer = make_linear(builder.weight, builder.bias)
    if refit:
        layer = plainly_trained(features[rest], labels[rest], len(builder.weight), seed).to(builder.weight)
    makers = Makers(layer, Builder(layer, features[rest], labels[rest], split=builder.split), seed)
    doubt = unfit_to_choose(labels[chosen_by], builder.split)
    alike = classes_alike(chosen_by.nonzero().flatten(), labels)
    return Turn(makers, (features[alike], labels[alike]), (features[own], labels[own]), own, doubt)


def classes_alike(places: Tensor, labels: Tensor) -> Tensor:
    """Places of samples such that each class has equally many: some again where it has fewer, not all where it has more."""
    of_class = [places[labels[places] == label] for label in labels[places].unique().tolist()]
    count = min(max(map(len, of_class), default=0), _MOST_OF_A_CLASS)
    return torch.cat([own[torch.arange(count, device="cpu") % len(own)] for own in of_class]) if of_class else places


def measure(
    method: str, turns: Sequence[Turn], split: ClassSplit, original: Tensor | None = None, *, alike: bool = False
) -> Measured:
    """Measure a method on each turn's samples.

    ``original`` says which of them the original classifier recognises; with ``alike`` each class counts alike, not each sample.
    """
    labels, few_rows_only = torch.cat([turn.measured_on[1] for turn in turns]), method in _FEW_ROWS_ONLY
    weights = torch.bincount(labels)[labels].double().reciprocal() if alike else torch.ones(len(labels), dtype=torch.float64)
    logits, numbers, seconds = [], [], 0.0
    try:
        for turn in turns:
            if turn.doubt and method not in _TRAINED_ONCE:
                raise ValueError(turn.doubt)
            turn.makers.prepare(method)
            started = time.monotonic()
            numbers.append(turn.makers.numbers(method, *turn.chosen_by))
            layer = turn.makers.layer(method, numbers[-1])
            seconds += (time.monotonic() - started + turn.makers.seconds(method)) / len(turns)
            logits.append(_scores(layer, turn.measured_on[0]))
    except (ValueError, FloatingPointError) as error:
        return Measured(Candidate(method, few_rows_only=few_rows_only, error=str(error)), labels, torch.empty(0), weights, [])
    scores = torch.cat(logits)
    predictions = predict_logits(scores, labels)
    metrics = split_metrics(predictions, split)
    right, base = (scores.argmax(dim=1) == labels).double(), torch.isin(labels, split.base)
    change = 0.0 if original is None else _mean((right - original)[base], weights[base])
    accuracies: dict[str, Any] = {part: metrics[f"{part}_class_mean" if alike else part] for part in SPLITS_AND_ALL}
    candidate = Candidate(
        method,
        **accuracies,
        calibration_error=expected_calibration_error(predictions, split)["all"],
        base_change=change,
        seconds=seconds,
        few_rows_only=few_rows_only,
    )
    return Measured(candidate, labels, scores, weights, numbers)


def _made(
    method: str, linear: nn.Module, builder: Builder, turns: Sequence[Turn], chosen: Measured, seed: int
) -> nn.Linear | Repair:
    """The layer of the method to take."""
    if builder.validation is None:
        layer = make_linear(builder.weight, builder.bias)
        makers = Makers(layer, builder, seed)
        of_turns = [turn.makers.scaled(method, own, -1) for turn, own in zip(turns, chosen.numbers, strict=True)]
        means = {name: np.mean([own[name] for own in of_turns], axis=0).tolist() for name in of_turns[0]}
        return makers.layer(method, makers.scaled(method, means, 1))
    val: dict[str, Any] = {"val_features": builder.validation.real(), "val_labels": builder.validation.labels}
    if method in ("few", "paper", "all"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AlphaNetWarning)  # what base classes lose stands in the table
            return repair_by_preset(linear, builder, method, {"seed": seed}, False)
    makers = turns[0].makers
    return makers.layer(method, makers.numbers(method, *val.values()))


def _scores(linear: nn.Linear, features: Tensor) -> Tensor:
    with torch.no_grad():
        return linear(features.to(linear.weight)).cpu()


def choose_method(
    found: Sequence[Measured],
    split: ClassSplit,
    policy: str,
    min_all: float | None,
    max_base_drop: float | None,
    how: str = "validation samples",
) -> tuple[str, str]:
    """The method to take, and why."""
    measured = {each.candidate.method: each for each in found if not each.candidate.error}
    original = measured["original"].candidate
    least = original.all if min_all is None and policy == "best_few" else (min_all or 0.0)
    most_lost = math.inf if max_base_drop is None else max_base_drop / 100
    allowed = [
        method
        for method, each in measured.items()
        if each.candidate.all >= least - 1e-9 and -each.candidate.base_change <= most_lost + 1e-9
    ] or ["original"]
    few = torch.isin(found[0].labels, split.few)
    part = few if policy == "best_few" else torch.ones_like(few)
    weights = measured["original"].weights[part]
    right = {method: measured[method].right[part] for method in allowed}
    best = max(allowed, key=lambda method: _mean(right[method], weights))
    tied = [method for method in allowed if not _exceeds(right[best], right[method], weights, _NOISE)]
    likelihood = {method: measured[method].log_likelihood[part] for method in tied}
    likeliest = max(tied, key=lambda method: _mean(likelihood[method], weights))
    beaten = [method for method in tied if _exceeds(likelihood[likeliest], likelihood[method], weights, _LIKELIHOOD_NOISE)]
    method = next(method for method in tied if method not in beaten)
    taken = measured[method].candidate
    gains = [percent(getattr(taken, name) - getattr(original, name), sign=True) for name in ("few", "all")]
    said = f"few {percent(taken.few)}% ({gains[0]}), all {percent(taken.all)}% ({gains[1]}) on {how}"
    bounded = " that keep to the bounds" if least > 0 or most_lost < math.inf else ""
    if method == "original":
        return method, f"{said}; no other{bounded} is better by more than the noise"
    if method == best:
        return method, f"{said}, the best of {len(allowed)}{bounded}"
    return method, f"{said}; {best} is better by no more than the noise, in accuracy and in likelihood"


def _mean(values: Tensor, weights: Tensor) -> float:
    return ((values * weights).sum() / weights.sum()).item()


def _exceeds(one: Tensor, other: Tensor, weights: Tensor, noise: float) -> bool:
    """Whether the mean of ``one`` is larger than that of ``other`` by more than so many standard errors."""
    difference, shares = one - other, weights / weights.sum()
    mean = _mean(difference, weights)
    return mean > noise * (shares * (difference - mean)).square().sum().sqrt().item()
