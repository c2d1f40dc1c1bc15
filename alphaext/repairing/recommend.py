"""Which of all methods to take: cheap rivals, baselines and presets measured alike, one table, one sentence of advice."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from html import escape
from typing import Any

import torch
from torch import Tensor, nn

from ..baselines.registry import run_baseline
from ..baselines.retraining import short_features_factor
from ..classes import ClassSplit, class_counts, split_classes
from ..metrics.accuracy import SPLITS_AND_ALL
from ..metrics.evaluation import expected_calibration_error, split_metrics
from ..metrics.predictions import predict_logits
from ..utils.checks import check_choice, check_number
from ..utils.linear import linear_parameters, make_linear
from ..utils.seeds import seeded_generator
from ..utils.tensors import LabelledFeatures, TensorLike, as_tensor, check_labels, features_and_labels
from ..utils.text import percent
from .repair import repair

__all__ = ["POLICIES", "Candidate", "Recommendation", "makers_of", "recommend"]

POLICIES = ("best_all", "best_few")
"""What a recommendation goes by: accuracy over all; or few accuracy, with accuracy over all not below ``min_all``."""

METHODS = {
    "original": "the classifier as it is",
    "few-bias": "one constant on the few scores",
    "few": "preset few: the few rows made anew",
    "tau": "rows divided by a power of their length",
    "logit-adjustment": "scores less a multiple of the log of how frequent a class is",
    "discriminant": "class means and one covariance, few means composed with near ones",
    "crt": "all rows trained anew on equally many samples of each class",
    "all": "preset all: preset few averaged with the discriminant and with re-trained rows",
}
"""The methods that are compared. Of equal ones the first is recommended: it changes less, or is simpler."""

_FEW_ROWS_ONLY = ("original", "few-bias", "few")
_FOLDS = 2
# So many standard errors of the difference between two methods are noise.
_NOISE = 0.5


@dataclass(frozen=True)
class Candidate:
    """A method, measured on validation samples that it was not chosen by.

    Attributes:
        method: a key of the methods compared.
        few, medium, many, all: top-1 accuracy, fractions of 1; NaN for a part without samples.
        calibration_error: expected calibration error over all.
        base_change: of the accuracy over samples of base classes, against the original classifier.
        seconds: what it took to make, once.
        few_rows_only: whether the base classes' rows stay as they are, to the bit.
        error: why there is none; empty otherwise.
    """

    method: str
    few: float = math.nan
    medium: float = math.nan
    many: float = math.nan
    all: float = math.nan
    calibration_error: float = math.nan
    base_change: float = math.nan
    seconds: float = math.nan
    few_rows_only: bool = False
    error: str = ""


@dataclass(frozen=True)
class Recommendation:
    """What :func:`recommend` found.

    Attributes:
        method: the recommended one.
        advice: one sentence that says so, and why.
        linear: its classifier, made with all validation samples.
        candidates: all methods, what changes least first.
        split: which classes are few, medium and many.
    """

    method: str
    advice: str
    linear: nn.Linear = field(repr=False)
    candidates: list[Candidate] = field(repr=False)
    split: ClassSplit = field(repr=False)

    def table(self) -> Any:
        """The candidates as a pandas ``DataFrame`` where pandas is installed, else as a list of dictionaries."""
        rows = [asdict(candidate) for candidate in self.candidates]
        try:
            import pandas
        except ImportError:
            return rows
        return pandas.DataFrame(rows).set_index("method")

    def _cells(self) -> list[tuple[str, ...]]:
        header = ("method", *(f"{part}, %" for part in SPLITS_AND_ALL), "ECE, %", "base", "seconds", "few rows only")
        rows = [
            (
                candidate.method,
                *(percent(getattr(candidate, part)) for part in (*SPLITS_AND_ALL, "calibration_error")),
                percent(candidate.base_change, sign=True),
                "-" if math.isnan(candidate.seconds) else f"{candidate.seconds:.2f}",
                candidate.error or ("yes" if candidate.few_rows_only else "no"),
            )
            for candidate in self.candidates
        ]
        return [header, *rows]

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([*lines, self.advice])

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self._cells())
        return f"<table>{rows}</table><p>{escape(self.advice)}</p>"


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
    seed: int = 0,
) -> Recommendation:
    """Say which method does most for a trained classifier, and make its result.

    Each method is made twice, what it leaves open chosen on one half of the validation samples, and measured on the other half.
    Differences of less than half a standard error are noise; of what they leave, the method that changes least is taken. Then
    that method is made once more, with all validation samples.

    Args:
        linear: the trained classifier, such as ``nn.Linear``, in float32 or float64; it is not changed.
        features: ``[n, D]``, the training features. These and ``val_features`` may be :class:`alphaext.features.Features`,
            which have their labels.
        labels: ``[n]`` integers.
        val_features: ``[m, D]``, features that neither the classifier nor the network was trained on, two of each class or
            more.
        val_labels: ``[m]`` integers.
        policy: ``"best_all"`` (default), or ``"best_few"``: the best few accuracy of those that keep ``min_all``.
        min_all: for ``"best_few"``, a fraction of 1; None takes the original classifier's own accuracy over all.
        max_base_drop: points that the accuracy over base classes may lose; None (default) for any.
        few_below: a class with fewer training samples is few; 20 in the paper.
        many_above: a class with more is many; 100 in the paper.
        seed: of the halves, and of all that is trained.

    Returns:
        A :class:`Recommendation`; printed, it is a table and the advice.

    Raises:
        TypeError, ValueError: as :func:`alphaext.repair`; a policy that there is not, or a bound out of range.

    Example:
        >>> labels, val_labels = torch.arange(4).repeat_interleave(torch.tensor([30, 30, 30, 5])), torch.arange(4).repeat(10)
        >>> centres = 3 * torch.randn(4, 8)
        >>> features, val_features = (centres[ids] + torch.randn(len(ids), 8) for ids in (labels, val_labels))
        >>> found = recommend(nn.Linear(8, 4), features, labels, val_features, val_labels)
        >>> found.linear.weight.shape, [candidate.method for candidate in found.candidates][:3]
        (torch.Size([4, 8]), ['original', 'few-bias', 'few'])
    """
    check_choice(policy, "policy", POLICIES)
    for name, bound, most in (("min_all", min_all, 1.0), ("max_base_drop", max_base_drop, 100.0)):
        if bound is not None:
            check_number(bound, name, minimum=0, maximum=most)
    if min_all is not None and policy != "best_few":
        raise ValueError(f"min_all goes with policy 'best_few', got {min_all!r} with {policy!r}")
    weight, bias = linear_parameters(linear)
    features, labels = features_and_labels(features, labels)
    val_features, val_labels = features_and_labels(val_features, val_labels, "val_features", "val_labels")
    ids = check_labels(val_labels, len(weight), "val_labels").cpu()
    val = as_tensor(val_features, "val_features")
    split = split_classes(class_counts(labels, len(weight)), few_below=few_below, many_above=many_above).cpu()
    if not bool(torch.isin(ids, split.few).any()):
        raise ValueError("val_labels must have samples of few classes, by which methods are compared; got none")
    data = {"features": features, "labels": labels, "split": split}
    halves = _halves(ids, seed)
    candidates: list[Candidate] = []
    right: dict[str, Tensor] = {}
    makers = makers_of(make_linear(weight, bias), data, seed)
    for method, make in makers.items():
        logits = torch.empty(len(ids), len(weight), dtype=weight.dtype, device="cpu")
        started = time.monotonic()
        try:
            for half in range(_FOLDS):
                chosen_by, measured_on = halves != half, halves == half
                made = make(val[chosen_by], ids[chosen_by])
                logits[measured_on] = _scores(made, val[measured_on])
        except (ValueError, FloatingPointError) as error:
            candidates.append(Candidate(method, few_rows_only=method in _FEW_ROWS_ONLY, error=str(error)))
            continue
        seconds = (time.monotonic() - started) / _FOLDS
        right[method] = logits.argmax(dim=1) == ids
        predictions = predict_logits(logits, ids)
        metrics = split_metrics(predictions, split)
        base = torch.isin(ids, split.base)
        change = (right[method][base].double().mean() - right["original"][base].double().mean()).item()
        candidates.append(
            Candidate(
                method,
                few=metrics["few"],
                medium=metrics["medium"],
                many=metrics["many"],
                all=metrics["all"],
                calibration_error=expected_calibration_error(predictions, split)["all"],
                base_change=change,
                seconds=seconds,
                few_rows_only=method in _FEW_ROWS_ONLY,
            )
        )
    method, reason = _choose(candidates, right, torch.isin(ids, split.few), policy, min_all, max_base_drop)
    advice = f"Take {method} ({METHODS[method]}): {reason}."
    return Recommendation(method, advice, makers[method](val, ids), candidates, split)


def _halves(labels: Tensor, seed: int) -> Tensor:
    """The half of each sample, each class dealt out evenly."""
    halves = torch.zeros(len(labels), dtype=torch.int64, device="cpu")
    for label in labels.unique().tolist():
        own = (labels == label).nonzero().flatten()
        order = torch.randperm(len(own), generator=seeded_generator(seed, label), device="cpu")
        # The odd sample of a class goes to the one half in one class, to the other in the next.
        halves[own[order]] = (torch.arange(len(own), device="cpu") + label) % _FOLDS
    return halves


def makers_of(linear: nn.Linear, data: Mapping[str, Any], seed: int) -> dict[str, Callable[[Tensor, Tensor], nn.Linear]]:
    """What makes each method's classifier by validation features and labels."""
    factor = short_features_factor(as_tensor(data["features"], "features"))

    def baseline(name: str, val_features: Tensor, val_labels: Tensor) -> nn.Linear:
        given: dict[str, Any] = dict(data)
        if name != "discriminant":
            given |= {"val_features": val_features, "val_labels": val_labels}
        if name == "crt":
            # One training: a search for its settings would take longer than all other methods together.
            given |= {"lr": 0.2 * factor, "weight_decay": 5e-3 / factor, "seed": seed, "progress": False}
        return run_baseline(name, linear=linear, **given).linear

    def preset(name: str, val_features: Tensor, val_labels: Tensor) -> nn.Linear:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the original is kept, or what base classes lose, stands in the table
            made = repair(
                linear, **data, val_features=val_features, val_labels=val_labels, preset=name, seed=seed, progress=False
            )
        return made.linear

    makers: dict[str, Callable[[Tensor, Tensor], nn.Linear]] = {
        name: partial(preset if name in ("few", "all") else baseline, name) for name in METHODS
    }
    return makers | {"original": lambda val_features, val_labels: linear}


def _scores(linear: nn.Linear, features: Tensor) -> Tensor:
    with torch.no_grad():
        return linear(features.to(linear.weight)).cpu()


def _choose(
    candidates: list[Candidate],
    right: Mapping[str, Tensor],
    few: Tensor,
    policy: str,
    min_all: float | None,
    max_base_drop: float | None,
) -> tuple[str, str]:
    """The method to take, and why."""
    measured = [candidate for candidate in candidates if not candidate.error]
    original = measured[0]
    least = original.all if min_all is None and policy == "best_few" else (min_all or 0.0)
    most_lost = math.inf if max_base_drop is None else max_base_drop / 100
    allowed = [each for each in measured if each.all >= least - 1e-9 and -each.base_change <= most_lost + 1e-9] or [original]
    part = few if policy == "best_few" else torch.ones_like(few)
    best = max(allowed, key=lambda candidate: right[candidate.method][part].double().mean())
    for candidate in allowed:
        difference = right[best.method][part].double() - right[candidate.method][part].double()
        noise = _NOISE * difference.std().item() / math.sqrt(len(difference))
        if difference.mean().item() <= noise:
            break
    gains = [percent(getattr(candidate, name) - getattr(original, name), sign=True) for name in ("few", "all")]
    found = f"few {percent(candidate.few)}% ({gains[0]}), all {percent(candidate.all)}% ({gains[1]}) on validation samples"
    if candidate.method == "original":
        return "original", f"{found}; nothing that keeps to the bounds does better beyond the noise"
    if candidate is best:
        return candidate.method, f"{found}, the best of {len(allowed)} that keep to the bounds"
    return candidate.method, f"{found}; {best.method} has no more beyond the noise, and changes more"
