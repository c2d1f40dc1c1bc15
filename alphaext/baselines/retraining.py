"""cRT and LWS: training the classifier again on frozen features, with class-balanced samples (Kang et al., ICLR 2020, 4.2).

Frozen features make both small: cRT is one linear layer, two matrix products a step; LWS needs only the trained classifier's
logits, which are computed once.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..classes import ClassSplit
from ..training import cached_logits
from ..training.cached_logits import check_samples
from ..training.options import TrainingOptions
from ..training.result import AlphaNetWarning
from ..training.selection import BaselineResult, Rescaling, Validation
from ..utils.callers import warn_caller
from ..utils.checks import check_integer
from ..utils.linear import linear_parameters, make_linear, wide
from ..utils.resume import check_checkpoint
from ..utils.seeds import seeded_generator
from ..utils.tensors import (
    LabelledFeatures,
    TensorLike,
    check_device,
    check_labels,
    check_not_meta,
    check_whole,
    features_and_labels,
    floating_tensor,
)
from .balanced_training import BalancedTraining, Model

__all__ = ["crt", "lws"]


# Tried where none are given; the first are Kang et al.'s for ImageNet-LT.
LRS = (0.2, 0.02)
WEIGHT_DECAYS = (5e-4, 5e-3, 5e-2)

# They are for features whose mean squared length is at least this; networks' features have some hundreds.
_LENGTH = 100.0
# The length is measured on so many samples, or up to twice as many: on each second, third, ... of all.
_MEASURED = 4096

# Steps that a training has at least where the number of epochs is not given: on small data ten epochs are a few dozen.
_LEAST_STEPS = 250

# Elements of a block of logits that are computed at a time.
_BLOCK_ELEMENTS = 1 << 22


def crt(
    features: TensorLike | LabelledFeatures,
    labels: TensorLike | None = None,
    num_classes: int | None = None,
    *,
    linear: nn.Module | None = None,
    val_features: TensorLike | LabelledFeatures | None = None,
    val_labels: TensorLike | None = None,
    split: ClassSplit | None = None,
    bias: bool = True,
    epochs: int | None = None,
    batch_size: int = 512,
    lr: float | None = None,
    momentum: float = 0.9,
    weight_decay: float | None = None,
    images_per_class: int = 1,
    select: str | None = None,
    min_all: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> BaselineResult:
    """Train a new linear classifier on frozen features, with class-balanced samples (classifier re-training, cRT).

    The loss is the cross-entropy over all classes; SGD with momentum; the learning rate falls along a cosine, epoch by epoch.
    :data:`RETRAINING_PRESETS` has Kang et al.'s settings, by data set. Those of ImageNet-LT are the defaults, but small data
    get more epochs, and learning rate and weight decay are chosen on validation samples. (Their scheduler steps before it
    trains, so that their epochs run one ahead on the cosine, and their last epoch trains nothing.)

    Args:
        features: ``[n, D]``, floating point, the training features; a tensor, an array or a memory map, float16 too. They are
            read batch by batch, and trained on in float32 (float64 for float64 features). These and ``val_features`` may be
            :class:`alphaext.features.Features`, which have their labels.
        labels: ``[n]`` integers; every class must have a sample.
        num_classes: N. Default: that of ``linear`` or ``split``, or the largest label plus one.
        linear: the classifier to do better than, whose own accuracy over all is the default of ``min_all``. Training does not
            use it.
        val_features: ``[m, D]``, to select the epoch by; with ``val_labels``.
        val_labels: ``[m]`` integers.
        split: which classes are few, medium and many, for the validation accuracies. Default: by the training samples, with the
            paper's thresholds.
        bias: whether the classifier has one; Kang et al.'s has.
        epochs: 10, or as many as make 250 steps. An epoch draws as many samples as there are, less what fills no batch.
        batch_size: 512.
        lr: learning rate of the first epoch. Default: 0.02 or 0.2, whichever does better on validation samples in a training of
            about 250 steps; 0.2 where they cannot choose (none, ``select="last"``, less than ten of few or of base classes).
            Where the features' mean squared length is below 100, as of TF-IDF, 100 divided by it multiplies these.
        momentum: 0.9.
        weight_decay: L2 penalty, of the bias too. Default: 5e-4, 5e-3 or 5e-2, chosen likewise, together; or 5e-4. For short
            features it is divided by what multiplies ``lr``.
        images_per_class: see :class:`alphaext.baselines.balanced_sampling.ClassBalancedSampler`.
        select: ``"best_all"``, the epoch with the best accuracy over all validation samples (default with validation data, as
            Kang et al. select); ``"best_few"``, the best few accuracy among those whose accuracy over all is not below
            ``min_all``; ``"last"`` (default without, and, with a warning, where validation samples show too little of few or of
            base classes). Of equal epochs the first wins.
        min_all: for ``"best_few"``, a fraction of 1; None takes that of ``linear``.
        seed: of the initial weights, U(+-1/sqrt(D)), and of the samples.
        device: where to train; None where the features are.
        checkpoint: a file that is rewritten after each epoch, whole or not at all. If it exists, training goes on from it, to
            the same bits as without the interruption; a checkpoint of another data set or configuration is an error.
        progress: show a progress bar; None shows it where standard error is a terminal.

    Returns:
        A :class:`alphaext.baselines.BaselineResult`; its table has a row an epoch, with ``loss`` (mean cross-entropy), ``lr``.

    Raises:
        ValueError, TypeError: for arguments out of range or that disagree, a class without samples, or features that are not
            finite, before any training; the message names them.
        FloatingPointError: when the loss is no longer finite, naming epoch and learning rate.
        KeyboardInterrupt: passed on; the epochs that were finished are in the checkpoint.

    Example:
        >>> labels = torch.tensor([0] * 60 + [1] * 6)
        >>> features = torch.randn(66, 4) + 2 * labels[:, None]
        >>> crt(features, labels, epochs=2, batch_size=32, lr=0.1).chosen
        {'epoch': 2}
    """
    started = time.monotonic()
    path = None if checkpoint is None else check_checkpoint(checkpoint)
    original = None if linear is None else linear_parameters(linear)
    features, labels = features_and_labels(features, labels)
    check_whole(features)
    source = floating_tensor(features, "features", ("n", "D"))
    check_not_meta(source, "features")
    if num_classes is not None:
        num_classes = check_integer(num_classes, "num_classes", minimum=1)
    elif original is not None:
        num_classes = len(original[0])
    else:
        ids = check_labels(labels, None)
        num_classes = split.num_classes if isinstance(split, ClassSplit) else int(ids.max()) + 1 if len(ids) else 1
    place = source.device if device is None else check_device(device)
    shape = torch.empty(num_classes, source.shape[1], dtype=wide(source[:0]).dtype, device="meta")
    if original is not None and original[0].shape != shape.shape:
        raise ValueError(f"linear must have shape {list(shape.shape)}, got {list(original[0].shape)}")
    measured: dict[str, Any] = {
        "val_features": val_features,
        "val_labels": val_labels,
        "split": split,
        "select": select,
        "min_all": min_all,
    }

    def make(options: TrainingOptions) -> BalancedTraining:
        return BalancedTraining("crt", shape, source, labels, options, images_per_class, original=original, **measured)

    def train(training: BalancedTraining, path: Path | None) -> None:
        training.train(_Classifier(training, shape, bool(bias), place), path, progress)

    options = _options(10 if epochs is None else epochs, batch_size, momentum, seed)
    training = _trained(make, train, options, epochs is None, lr, weight_decay, path, short_features_factor(source))
    weight, *biases = training.selected
    return training.result(make_linear(weight, biases[0] if biases else None), {"bias": bool(bias)}, started)


def lws(
    linear: nn.Module,
    features: TensorLike | LabelledFeatures,
    labels: TensorLike | None = None,
    *,
    val_features: TensorLike | LabelledFeatures | None = None,
    val_labels: TensorLike | None = None,
    split: ClassSplit | None = None,
    epochs: int | None = None,
    batch_size: int = 512,
    lr: float | None = None,
    momentum: float = 0.9,
    weight_decay: float | None = None,
    images_per_class: int = 1,
    select: str | None = None,
    min_all: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> BaselineResult:
    """Learn one factor a class for a trained classifier, with class-balanced samples (learnable weight scaling, LWS).

    A factor multiplies the class's whole logit, its row and its bias, as in Kang et al.'s code, and starts at 1. Training is
    that of :func:`crt` with the classifier frozen: it needs only the classifier's logits of the samples that are drawn, which
    are computed once (beyond 2 GiB of them, batch by batch).

    Args:
        linear: the trained classifier, such as ``nn.Linear``.
        features: ``[n, D]``, as for :func:`crt`, as are all others; scores are computed in the classifier's dtype, but at least
            float32.
        labels: ``[n]`` integers; every class must have a sample.
        val_features: ``[m, D]``, to select the epoch by; with ``val_labels``.
        val_labels: ``[m]`` integers.
        split: which classes are few, medium and many.
        epochs: 5, or as many as make 250 steps.
        batch_size: 512.
        lr: as for :func:`crt`.
        momentum: 0.9.
        weight_decay: L2 penalty of the factors, as for :func:`crt`.
        images_per_class: as for :func:`crt`.
        select: as for :func:`crt`. Epoch 0, the classifier as it was, takes part.
        min_all: for ``"best_few"``, a fraction of 1; None takes the classifier's own.
        seed: of the samples drawn and their order.
        device: where to train; None where ``linear`` is.
        checkpoint: as for :func:`crt`.
        progress: show a progress bar; None shows it where standard error is a terminal.

    Returns:
        A :class:`alphaext.baselines.BaselineResult`: ``linear`` has the factors multiplied in, ``scales`` are the factors.

    Raises:
        ValueError, TypeError, FloatingPointError, KeyboardInterrupt: as :func:`crt`.

    Example:
        >>> labels = torch.tensor([0] * 60 + [1] * 6)
        >>> result = lws(nn.Linear(4, 2), torch.randn(66, 4), labels, epochs=2, batch_size=32)
        >>> result.chosen, result.scales.shape
        ({'epoch': 2}, torch.Size([2]))
    """
    started = time.monotonic()
    path = None if checkpoint is None else check_checkpoint(checkpoint)
    own_weight, own_bias = linear_parameters(linear)
    place = own_weight.device if device is None else check_device(device)
    weight = wide(own_weight).to(place)
    bias = None if own_bias is None else wide(own_bias).to(place)
    measured: dict[str, Any] = {
        "val_features": val_features,
        "val_labels": val_labels,
        "split": split,
        "select": select,
        "min_all": min_all,
    }

    def make(options: TrainingOptions) -> BalancedTraining:
        made = BalancedTraining("lws", weight, features, labels, options, images_per_class, original=(weight, bias), **measured)
        if made.validation is not None:
            made.validation.keep(weight)
        return made

    def train(training: BalancedTraining, path: Path | None) -> None:
        training.train(_Scales(training, weight, bias), path, progress, weight, bias)

    options = _options(5 if epochs is None else epochs, batch_size, momentum, seed)
    training = _trained(make, train, options, epochs is None, lr, weight_decay, path)
    scales = training.selected[0]
    # On the classifier's own device and in its dtype, whatever it was trained on.
    scaled_bias = None if bias is None else (bias * scales).to(own_weight)
    result = training.result(make_linear((weight * scales[:, None]).to(own_weight), scaled_bias), {}, started)
    result.scales = scales.cpu()
    return result


class _Classifier(Model):
    """A linear layer, trained from random weights."""

    def __init__(self, training: Any, shape: Tensor, bias: bool, device: torch.device) -> None:
        self.samples, self.options = training.samples, training.options
        generator = seeded_generator(self.options.seed)
        bound = 1 / math.sqrt(max(shape.shape[1], 1))
        # Drawn in float32 in every dtype, so that all start alike.
        shapes = [shape.shape, shape.shape[:1]] if bias else [shape.shape]
        start = [
            torch.empty(own, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator) for own in shapes
        ]
        self.parameters = [tensor.to(device, shape.dtype) for tensor in start]
        self.momentum = [torch.zeros_like(parameter) for parameter in self.parameters]

    def step(self, indices: Tensor, lr: float) -> Tensor:
        weight, options = self.parameters[0], self.options
        rows = _take(self.samples.real(), indices).to(weight.device).to(weight.dtype)
        labels = self.samples.labels.index_select(0, indices).to(weight.device)
        scores = rows @ weight.t() if len(self.parameters) == 1 else torch.addmm(self.parameters[1], rows, weight.t())
        loss, gradient = _loss_and_gradient(scores, labels)
        self.momentum[0].addmm_(gradient.t(), rows, beta=options.momentum)
        if len(self.parameters) == 2:
            self.momentum[1].mul_(options.momentum).add_(gradient.sum(dim=0))
        for parameter, velocity in zip(self.parameters, self.momentum, strict=True):
            velocity.add_(parameter, alpha=options.weight_decay)
            parameter.sub_(velocity, alpha=lr)
        return loss

    def accuracy(self, validation: Validation) -> dict[str, float]:
        weight, *biases = self.parameters
        return validation.of_layer(weight, biases[0] if biases else None)


class _Scales(Model):
    """One factor a class, on the logits of a frozen classifier."""

    first_candidate = 0

    def __init__(self, training: BalancedTraining, weight: Tensor, bias: Tensor | None) -> None:
        self.samples, self.weight, self.bias, self.options = training.samples, weight, bias, training.options
        self.parameters = [torch.ones(len(weight), dtype=weight.dtype, device=weight.device)]
        self.momentum = [torch.zeros_like(self.parameters[0])]
        drawn = torch.zeros(len(self.samples.labels), dtype=torch.bool, device="cpu")
        for epoch in range(1, self.options.epochs + 1):
            drawn[training.sampler.draw(epoch)] = True
        self._drawn = drawn.nonzero()[:, 0]
        fits = len(self._drawn) * len(weight) * weight.dtype.itemsize <= cached_logits.CACHE_BYTES
        self._rows = max(1, _BLOCK_ELEMENTS // max(weight.shape))
        self.blocks = -(-len(self._drawn) // self._rows) if fits else 0
        self._logits: Tensor | None = None

    def prepare(self, report: Callable[[], None]) -> None:
        """Compute the logits of all samples that any epoch draws, in blocks that an interruption does not change."""
        if self.blocks == 0:
            return
        logits = torch.empty(len(self._drawn), len(self.weight), dtype=self.weight.dtype, device=self.weight.device)
        for start in range(0, len(self._drawn), self._rows):
            logits[start : start + self._rows] = self._compute(self._drawn[start : start + self._rows])
            report()
        self._place = torch.empty_like(self.samples.labels)
        self._place[self._drawn] = torch.arange(len(self._drawn), device="cpu")
        self._logits = logits

    def _compute(self, indices: Tensor) -> Tensor:
        rows = _take(self.samples.real(), indices).to(self.weight.device).to(self.weight.dtype)
        return rows @ self.weight.t() if self.bias is None else torch.addmm(self.bias, rows, self.weight.t())

    def step(self, indices: Tensor, lr: float) -> Tensor:
        scales, velocity = self.parameters[0], self.momentum[0]
        logits = self._compute(indices) if self._logits is None else _take(self._logits, self._place.index_select(0, indices))
        labels = self.samples.labels.index_select(0, indices).to(scales.device)
        loss, gradient = _loss_and_gradient(logits * scales, labels)
        velocity.mul_(self.options.momentum).add_(gradient.mul_(logits).sum(dim=0)).add_(
            scales, alpha=self.options.weight_decay
        )
        scales.sub_(velocity, alpha=lr)
        return loss

    def accuracy(self, validation: Validation) -> dict[str, float]:
        scales = self.parameters[0]
        return validation.accuracies(self.weight, [Rescaling(scales, None if self.bias is None else scales * self.bias)])[0]


def plainly_trained(features: Tensor, labels: Tensor, num_classes: int, seed: int) -> nn.Linear:
    """A linear layer trained on all samples alike, with the first settings that :func:`crt` tries."""
    samples = check_samples(torch.empty(num_classes, features.shape[1], device="meta"), features, labels)
    count = len(samples.labels)
    batch = min(512, count)
    factor, steps = short_features_factor(features), count // batch
    options = replace(_options(max(10, -(-_LEAST_STEPS // steps)), batch, 0.9, seed), lr=factor * LRS[0])
    options = replace(options, weight_decay=WEIGHT_DECAYS[0] / factor)
    shape = torch.empty(num_classes, features.shape[1], dtype=wide(features[:0]).dtype, device="meta")
    model = _Classifier(SimpleNamespace(samples=samples, options=options), shape, True, features.device)
    for epoch in range(1, options.epochs + 1):
        order = torch.randperm(count, generator=seeded_generator(seed, epoch), device="cpu")
        for some in order[: steps * batch].view(steps, batch):
            model.step(some, options.lr * options.lr_multiplier(epoch))
    if not all(bool(each.isfinite().all()) for each in model.parameters):
        raise FloatingPointError(f"a plain training of the last layer diverged (lr {options.lr:g})")
    return make_linear(*model.parameters)


def short_features_factor(features: Tensor) -> float:
    """What multiplies a learning rate, and divides a weight decay, for features as short as these; 1 for long ones.

    A classifier of features ``c`` times as long makes the same of rows ``c`` times as short. SGD goes the same way there with a
    learning rate divided, and a weight decay multiplied, by the square of ``c``.
    """
    some = wide(features[:: max(1, len(features) // _MEASURED)].detach())
    square = float(some.double().square().sum(dim=1).mean()) if len(some) else 0.0
    return max(1.0, _LENGTH / square) if square > 0 and math.isfinite(square) else 1.0


def _options(epochs: int, batch_size: int, momentum: float, seed: int) -> TrainingOptions:
    return TrainingOptions(
        epochs=check_integer(epochs, "epochs", minimum=1),
        batch_size=batch_size,
        momentum=momentum,
        lr_schedule="cosine",
        seed=seed,
    )


def _trained(
    make: Callable[[TrainingOptions], BalancedTraining],
    train: Callable[[BalancedTraining, Path | None], None],
    options: TrainingOptions,
    more_epochs: bool,
    lr: float | None,
    weight_decay: float | None,
    path: Path | None,
    factor: float = 1.0,
) -> BalancedTraining:
    """Train; what is None of learning rate and weight decay, validation samples choose by shorter trainings.

    Args:
        make: a training of these options, not begun.
        train: carries it out, with a checkpoint.
        options: all others.
        more_epochs: whether there may be more epochs, for a floor of steps.
        lr: as given.
        weight_decay: as given.
        path: the checkpoint of the training that is kept.
        factor: what multiplies the learning rates tried, and divides the weight decays.
    """
    rates = [factor * rate for rate in LRS] if lr is None else [lr]
    decays = [decay / factor for decay in WEIGHT_DECAYS] if weight_decay is None else [weight_decay]
    options = replace(options, lr=rates[0], weight_decay=decays[0])
    training = make(options)
    if training.doubt:
        warn_caller(f"no epoch is chosen, and the last one is taken: {training.doubt}", AlphaNetWarning)
    enough = -(-_LEAST_STEPS // training.steps)
    if more_epochs:
        options = replace(options, epochs=max(options.epochs, enough))
    candidates = [
        replace(options, epochs=min(options.epochs, enough), lr=rate, weight_decay=decay)
        for rate, decay in itertools.product(rates, decays)
    ]
    tried: list[dict[str, Any]] = []
    if len(candidates) > 1 and training.policy.select != "last":
        for candidate in candidates:
            shorter = make(candidate)
            try:
                train(shorter, None)
            except FloatingPointError:
                continue
            tried.append({"lr": candidate.lr, "weight_decay": candidate.weight_decay, "score": shorter.selected_score})
    if tried:
        best = max(tried, key=lambda each: float(each["score"]))
        options = replace(options, lr=best["lr"], weight_decay=best["weight_decay"])
    training = make(options)
    train(training, path)
    training.settings |= {"tried": tried} if tried else {}
    return training


def _take(tensor: Tensor, indices: Tensor) -> Tensor:
    return tensor.index_select(0, indices.to(tensor.device))


def _loss_and_gradient(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropies, and the gradient of their mean by the scores ``[batch, N]``."""
    log_probabilities = torch.log_softmax(scores, dim=1)
    right = labels.unsqueeze(1)
    own = log_probabilities.gather(1, right)
    gradient = log_probabilities.exp_()
    gradient.scatter_(1, right, own.expm1())
    return -own.sum(), gradient.div_(len(scores))
