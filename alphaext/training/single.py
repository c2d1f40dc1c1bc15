"""Training an AlphaNet head on cached features, as in the paper (section 4.1)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from torch import Tensor, nn

from ..classes import ClassSplit
from ..head.alphanet import AlphaNet
from ..metrics.accuracy import SplitMetrics
from ..metrics.evaluation import expected_calibration_error
from ..metrics.predictions import predict
from ..utils.callers import warn_caller
from ..utils.checks import check_choice, check_integer, check_kind, check_number, format_ids
from ..utils.linear import make_linear
from ..utils.option_table import check_known, with_options
from ..utils.progress import task_bar
from ..utils.resume import ResumableTraining, check_alike, check_checkpoint
from ..utils.tensors import LabelledFeatures, TensorLike
from ..utils.text import percent
from .autograd_engine import AutogradEngine
from .builder import training_data
from .cached_logits import data_digest
from .engine import ENGINES, TrainingData, TrainingDiverged, hits_of
from .few_bias import choose_few_bias
from .native_engine import NativeEngine, SharedLogits, why_not_native
from .options import TrainingOptions
from .result import AlphaNetWarning, FitResult
from .selection import Policy, unfit_to_choose
from .sgd import DecayOfStart, Sgd

# The native engine's epochs are short: writing a checkpoint after each would take longer than they do.
_SECONDS_BETWEEN_CHECKPOINTS = 0.5

# How many times as large the loss may become as it was before training, and few rows as any of the original classifier's:
# beyond, the training has diverged.
_MOST_LOSS, _MOST_ROWS = 100, 30

# Validation samples that the calibration error is measured on, evenly over all if there are more.
_MOST_CALIBRATED = 4096

# What base classes may lose without a word, in points of accuracy.
_FEW_POINTS = 3

_OPTIONS = [entry.name for entry in fields(TrainingOptions)]


@with_options(fields(TrainingOptions))
def fit(
    head: AlphaNet,
    features: TensorLike | LabelledFeatures,
    labels: TensorLike | None = None,
    *,
    val_features: TensorLike | LabelledFeatures | None = None,
    val_labels: TensorLike | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    engine: str = "auto",
    many_above: int = 100,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    **options: Any,
) -> FitResult:
    """Train ``head`` on all samples of its few classes and as many base samples, drawn anew each epoch.

    The loss is the cross-entropy over all classes. With a frozen classifier (the default) the logits of few and base samples
    that take part are computed once, and what training needs of them is kept: a step touches neither features nor classifier.

    Args:
        head: trained in place; on return it has the parameters of the selected epoch, and no constant of a training before.
        features: ``[n, D]``, floating point, the training features (a NumPy memory map will do; float16 too).
            Or a :class:`alphaext.features.Features`, which has its labels.
        labels: ``[n]`` integers, where ``features`` has none.
        val_features: ``[m, D]`` or features likewise, to select the epoch by; with ``val_labels``.
        val_labels: ``[m]`` integers.
        optimizer: makes any torch optimiser out of the list of parameters, instead of SGD with the options above. A head with
            ``first_layer="factored"`` is exact for SGD only and refuses others, but for direct coefficients, which have none.
        engine: ``"native"``, whole epochs in compiled code, on one thread: for SGD and a frozen classifier, where it is exact
            to rounding. ``"autograd"``, torch's. ``"auto"``, the default: native wherever it is exact; the result says which.
        many_above: in the metrics, a base class with more training samples is many; 100 in the paper.
        checkpoint: a file that is rewritten after each epoch (by the native engine at most every half second, and at the
            end), whole or not at all. If it exists, training goes on from it, to the same bits as without the interruption; a
            checkpoint of another head, data set or configuration is an error. A head made without ``seed`` draws one: give it
            one to go on in another process.
        progress: show a progress bar; None shows it where standard error is a terminal.
        options: how to train, ``epochs`` to ``seed``: :class:`alphaext.training.TrainingOptions` says what each one means. The
            defaults are the paper's.

    Returns:
        A :class:`FitResult`.

    Raises:
        ValueError, TypeError: for arguments out of range or that disagree, before any training; the message names them.
        FloatingPointError: when something is no longer finite, or far too large, naming epoch, class and learning rate; the
            head then has the best epoch's parameters so far.
        KeyboardInterrupt: passed on after giving the head the best epoch's parameters so far.

    Example:
        >>> features, labels = torch.randn(40, 8), torch.arange(40) % 4
        >>> head = AlphaNet.from_linear(nn.Linear(8, 4), members=[[3, 0, 1]], seed=0)
        >>> result = fit(head, features, labels, epochs=2)
        >>> result.selected_epoch, result.engine
        (2, 'native')
    """
    check_kind(head, AlphaNet, "head")
    check_choice(engine, "engine", ENGINES)
    check_known(options, _OPTIONS)
    settings = TrainingOptions(**options)
    path = None if checkpoint is None else check_checkpoint(checkpoint)
    data = training_data(head, features, labels, val_features, val_labels, settings)
    trained, sgd = [p for p in head.parameters() if p.requires_grad], Sgd.of_options(settings)
    made = None if optimizer is None else optimizer(trained)
    if made is not None:
        _check_optimizer(head, made)
        sgd = Sgd.of(made) or sgd
    reason = why_not_native(head, made)
    if engine == "native" and reason:
        raise ValueError(f"engine='native' cannot train this exactly: {reason}; use engine='autograd'")
    native = engine != "autograd" and not reason
    made = None if native else made or sgd.optimizer(trained)
    run = Run(head, settings, data, split_of(head, data, check_integer(many_above, "many_above", minimum=0)))
    result = train(run, path, sgd, made, reason=reason if engine == "auto" else None, progress=progress)
    warn_of(result.notes)
    return result


def train(
    run: Run,
    checkpoint: Path | None = None,
    sgd: Sgd | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    reason: str | None = None,
    progress: bool | None = None,
) -> FitResult:
    """Carry out a training from first to last."""
    started = time.monotonic()
    run.prepare(checkpoint, sgd, optimizer)
    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    with task_bar(progress, "epoch", *columns, total=run.options.epochs, done=len(run.history) - 1) as report:
        run.train(checkpoint, report)
    result = run.result(reason or "", time.monotonic() - started)
    result.calibration = run.calibration(run.head.fold())
    return result


def warn_of(notes: list[str]) -> None:
    """Warn of what is to know of a result."""
    for note in notes:
        warn_caller(note, AlphaNetWarning)


class Run(ResumableTraining):
    """One training: an engine, the epochs so far, and the checkpoint they go into.

    What is selected of an epoch is a pair: what weight decay has left of the start, and the engine's snapshot.
    """

    def __init__(self, head: AlphaNet, options: TrainingOptions, data: TrainingData, split: ClassSplit) -> None:
        number = (int, float)
        super().__init__("one of fit's", {"engine": dict, "decay": list, "start_decay": number, "selected": tuple})
        self.head, self.options, self.data, self.split = head, options, data, split
        val_labels = None if data.validation is None else data.validation.labels
        if options.few_bias and val_labels is None:
            raise ValueError("few_bias is chosen on validation samples: it needs val_features and val_labels")
        # Without the constant that is yet to come, an epoch's accuracy does not say which is best with it.
        select = "last" if options.few_bias and options.select is None else options.select
        self.policy = Policy.of(select, options.min_all, val_labels, split.few)
        self.doubt = "there are no validation samples" if val_labels is None else unfit_to_choose(val_labels, split)
        if self.doubt and options.max_base_drop is not None:
            raise ValueError(f"max_base_drop={options.max_base_drop:g} cannot be held to: {self.doubt}")
        self.metrics: SplitMetrics | None = None
        if val_labels is not None:
            counts = torch.bincount(val_labels, minlength=head.out_features)
            self.metrics = SplitMetrics(split, counts)
            base_samples = int(counts[split.medium].sum()), int(counts[split.many].sum())
            policy = Policy("last") if self.doubt else self.policy
            self.policy = replace(policy, base_samples=base_samples)
        self.before: dict[str, float] | None = None
        self.engine: NativeEngine | AutogradEngine
        self._saved = time.monotonic()

    def prepare(
        self,
        path: Path | None,
        sgd: Sgd | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        logits: SharedLogits | None = None,
    ) -> None:
        """Make the engine; go on from the file ``path`` if there is one, or measure epoch 0.

        Args:
            path: the checkpoint.
            sgd: the numbers of the native engine's SGD; None for those of the options.
            optimizer: what trains instead of the native engine.
            logits: those that several trainings share.
        """
        options, data, head, resumed = self.options, self.data, self.head, path is not None and path.exists()
        sgd = sgd or Sgd.of_options(options)
        # What a training before has left in the head is no part of what it is.
        left, head.few_bias, head.keeps_original = (head.few_bias, head.keeps_original), 0.0, False
        described = repr(head)
        head.few_bias, head.keeps_original = left
        self.identity = {
            **options.identity(),
            "select": self.policy.select,
            "engine": "native" if optimizer is None else "autograd",
            "optimizer": repr(optimizer or sgd),
            "head": described,
            "seed of the head": head.seed,
        }
        if path is not None:
            frozen = [p for p in (head.weight, head.bias) if p is not None and not p.requires_grad]
            buffers = (head.members, head.z, head.directions, head.direction_bias)
            self.identity["head, classifier and data"] = data_digest(data.samples, data.validation, *buffers, *frozen)
            parameters = {name: (list(p.shape), p.requires_grad) for name, p in head.named_parameters()}
            self.identity["parameters of the head"] = repr(parameters)
        if path is not None and resumed:
            state = self.load(path, head.weight.device)
            if len(self.history) - 1 > options.epochs:
                raise ValueError(f"checkpoint {path} has {len(self.history) - 1} epochs, more than epochs={options.epochs}")
        if optimizer is None:
            self.engine = NativeEngine(head, options, sgd, data, max(len(self.history), 1), logits)
        else:
            self.engine = AutogradEngine(head, options, data, optimizer)
            if head.first_layer == "factored":
                sgd = Sgd.of_parameter(optimizer, head.preactivation) or replace(sgd, weight_decay=0.0)
        self.decay = DecayOfStart(sgd)
        self.start_decay = self.decay_at_resumption = head.first_layer_decay
        head.few_bias, head.keeps_original = 0.0, False  # of a training before; from here on nothing is refused
        self.first_loss = max(self._initial_loss(), math.log(head.out_features))
        original = self.engine.original_hits()
        if original is not None and self.metrics is not None:
            self.before = self.metrics.of(original)
            self.policy = self.policy.bounded(self.before)
            final = self.policy if self.policy.select != "last" else replace(self.policy, select="best_all")
            if options.max_base_drop is not None:
                # A little lower, so that rounding forbids nothing that exactly meets the bound.
                least = final.base_accuracy(self.before) - options.max_base_drop / 100 - 1e-9
                final = replace(final, min_base=least)
                self.policy = self.policy if options.few_bias else replace(self.policy, min_base=least)
            self.final_policy = final
        if path is not None and resumed:
            with self.applying(path):
                decay, parameters = self.selected
                for value in (decay, *state["decay"]):
                    check_number(value, "decay")
                check_alike(parameters, self.engine.snapshot(), "selected")
                self.engine.load_state(state["engine"])
                self.decay.factor, self.decay.momentum, self.decay.steps = state["decay"]
                self.start_decay = state["start_decay"]
        else:
            self._record(0, math.nan, self.engine.learning_rate(options.lr_multiplier(1)))

    @torch.no_grad()
    def _initial_loss(self) -> float:
        """The head's mean loss before training, on some of the samples that it will be trained on."""
        head, samples, indices = self.head, self.data.samples, self.data.sampler.indices
        some = indices[:: max(1, len(indices) // 256)]
        scores = head(samples.features[some].to(device=head.weight.device, dtype=head.weight.dtype))
        return float(nn.functional.cross_entropy(scores.float(), samples.labels[some].to(scores.device)))

    def train(self, path: Path | None, report: Callable[..., None]) -> None:
        """Train the remaining epochs and leave the head with the parameters of the selected one, whatever happens."""
        try:
            for epoch in range(len(self.history), self.options.epochs + 1):
                self.end_epoch(self.engine.train(epoch, self.options.lr_multiplier(epoch)), path)
                report(description=self.last_epoch())
        finally:
            self.finish()

    def end_epoch(self, loss: float | TrainingDiverged, path: Path | None) -> None:
        """Add an epoch to the history by its loss, or raise why it failed."""
        if isinstance(loss, TrainingDiverged):
            raise loss
        engine, epoch = self.engine, len(self.history)
        multiplier = self.options.lr_multiplier(epoch)
        self.decay.advance(self.decay.sgd.lr * multiplier, engine.steps_per_epoch)
        self._record(epoch, loss, engine.learning_rate(multiplier))
        due = engine.name != "native" or time.monotonic() - self._saved > _SECONDS_BETWEEN_CHECKPOINTS
        if path is not None and (due or epoch == self.options.epochs):
            decay = [self.decay.factor, self.decay.momentum, self.decay.steps]
            self.save(path, engine=engine.state(), decay=decay, start_decay=self.start_decay)
            self._saved = time.monotonic()

    def finish(self) -> None:
        """Leave the head with the parameters of the selected epoch."""
        decay, parameters = self.selected
        # Relative to what the head was when this process took it up: the start, or what an interrupted training left.
        relative = decay
        if self.start_decay != self.decay_at_resumption:
            relative *= self.start_decay / self.decay_at_resumption if self.decay_at_resumption else 0.0
        self.engine.restore(parameters, relative)
        self.head.first_layer_decay = self.start_decay * decay

    def release(self) -> None:
        """Give back what only training needs."""
        del self.engine
        self.selected = None

    def result(self, engine_reason: str, seconds: float) -> FitResult:
        """What came of the training, with the constant on the few scores if one is asked for, or with the original kept."""
        head, before = self.head, self.before
        chosen = self.history[self.selected_epoch]
        after = None if before is None else {name: chosen[name] for name in before}
        notes: list[str] = []
        sound = False
        if before is not None and after is not None and not self.doubt:
            if self.options.few_bias:
                after = self._choose_few_bias()
            sound = self.final_policy.score(after) > self.final_policy.score(before)
            if not sound and self.options.keep_original and not head.weight.requires_grad:
                head.few_bias, head.keeps_original, after = 0.0, True, before
                notes.append("Nothing is better than the original classifier on the validation samples: it is kept.")
            elif not sound:
                notes.append(
                    "This is no better than the original classifier on the validation samples: accuracy over all "
                    f"{percent(before['all'])}% before, {percent(after['all'])}% after."
                )
        diverged = None if sound or head.keeps_original else self._blown_up()
        if diverged is not None:
            head.keeps_original = True
            raise diverged
        if before is not None and after is not None:
            notes += self.notes(after, head.fold())
        return FitResult(
            history=self.history,
            selected_epoch=self.selected_epoch,
            selection=str(self.policy),
            metrics_before=before,
            metrics_after=after,
            clamped=int(chosen["clamped"]),
            engine=self.engine.name,
            engine_reason=engine_reason,
            seconds=seconds,
            few_bias=head.few_bias,
            kept_original=head.keeps_original,
            verified=not self.doubt,
            notes=notes,
        )

    def _choose_few_bias(self) -> dict[str, float]:
        """Give the head the constant on its few scores that validation samples choose, and measure it again."""
        head, validation = self.head, self.data.validation
        assert validation is not None and self.metrics is not None
        # Base logits are as they were: only the few rows' scores are computed.
        cached = self.engine.validation_logits
        scores = None if cached is None else cached.few_scores(*head.composed(), validation)
        found = choose_few_bias(
            head.fold(),
            validation.real(),
            validation.labels,
            self.split,
            policy=self.final_policy,
            known=None if cached is None or scores is None else cached.best(scores),
        )
        head.few_bias = float(found.chosen["offset"])
        if cached is None or scores is None:
            return self.metrics.of(hits_of(head.fold(), validation))
        return self.metrics.of(cached.hits_with(scores.add_(head.few_bias)).cpu())

    def notes(self, after: dict[str, float], linear: nn.Linear) -> list[str]:
        """Sentences on what validation samples do not show, and on what is lost by ``linear``, whose metrics are ``after``."""
        return self._unseen() + self._losses(after, linear)

    def _unseen(self) -> list[str]:
        if self.doubt:
            return [f"Nothing was chosen by validation samples, and the result is not verified: {self.doubt}."]
        assert self.data.validation is not None
        classes = torch.cat([self.split.few, self.split.base]).cpu().sort().values
        unseen = classes[~torch.isin(classes, self.data.validation.labels)].tolist()
        return [f"No validation sample shows what became of the classes {format_ids(unseen)}."] if unseen else []

    def calibration(self, linear: nn.Linear) -> Callable[[], tuple[float, float]] | None:
        """Measures the calibration error of the original classifier, and of ``linear``, which takes its place.

        On copies: it may be asked for long after the features have changed.
        """
        head, validation = self.head, self.data.validation
        if validation is None or head.weight.requires_grad:
            return None
        some = slice(None, None, -(-len(validation.labels) // _MOST_CALIBRATED))
        layers = make_linear(head.weight, head.bias), linear
        return partial(_calibration_errors, layers, validation.real()[some].clone(), validation.labels[some], self.split)

    def _blown_up(self) -> TrainingDiverged | None:
        """Whether the training ended in numbers that are finite, but far too large."""
        head, last = self.head, self.history[-1]
        growth = float(head.composed()[0].abs().max() / head.weight.abs().max())
        if growth > _MOST_ROWS:
            what = f"rows of few classes are {growth:.3g} times as large as any of the original classifier's"
        elif last["loss"] > _MOST_LOSS * self.first_loss:
            times = last["loss"] / self.first_loss
            what = f"the loss is {last['loss']:.3g}, {times:.3g} times that before training, or of guessing"
        else:
            return None
        # A comparison measures otherwise: its trainings are given no validation samples, though it has some.
        why = "the training is given no validation samples" if self.data.validation is None else self.doubt
        doubt = f" (no other epoch was chosen, as {why})" if self.doubt else ""
        return TrainingDiverged(what + doubt, int(last["epoch"]), last["lr"])

    def _losses(self, after: dict[str, float], linear: nn.Linear) -> list[str]:
        """What few classes lose, and base classes beyond a little."""
        before = self.before
        assert before is not None
        notes = []
        if after["few"] < before["few"]:
            notes.append(f"Few classes lose {100 * (before['few'] - after['few']):.1f} points on the validation samples.")
        lost = self.policy.base_accuracy(before) - self.policy.base_accuracy(after)
        if not lost > _FEW_POINTS / 100:
            return notes
        original, validation = self.engine.original_hits(), self.data.validation
        assert original is not None and validation is not None
        counts = torch.bincount(validation.labels, minlength=self.head.out_features)
        changes = (hits_of(linear, validation)[0] - original[0]) / counts.clamp(min=1)
        base = self.split.base.cpu()
        worst = base[changes[base].argsort(stable=True)[:3]].tolist()
        named = ", ".join(f"{number} ({percent(float(changes[number]), sign=True)})" for number in worst)
        return [
            *notes,
            f"Base classes lose {100 * lost:.1f} points on the validation samples, most of all the classes {named}.",
        ]

    def _record(self, epoch: int, loss: float, lr: float) -> None:
        """Measure an epoch and add it to the history."""
        entry: dict[str, float] = {"epoch": epoch, "loss": loss, "lr": lr, "clamped": self.engine.clamped()}
        hits = self.engine.hits()
        if hits is not None and self.metrics is not None:
            entry.update(self.metrics.of(hits))
        if self.add_epoch(entry, self.policy.score(entry)):
            self.selected = self.decay.factor, self.engine.snapshot()


def _calibration_errors(
    layers: tuple[nn.Linear, nn.Linear], features: Tensor, labels: Tensor, split: ClassSplit
) -> tuple[float, float]:
    before, after = (
        expected_calibration_error(predict(layer, features, labels, progress=False), split)["all"] for layer in layers
    )
    return before, after


def split_of(head: AlphaNet, data: TrainingData, many_above: int) -> ClassSplit:
    """The split that a head's few classes and its training samples make."""
    counts = torch.bincount(data.samples.labels[: data.samples.num_real], minlength=head.out_features)
    return ClassSplit.of_few(head.few_classes, counts, many_above)


def _check_optimizer(head: AlphaNet, optimizer: torch.optim.Optimizer) -> None:
    if head.first_layer == "factored" and head.coefficients == "mlp" and not isinstance(optimizer, torch.optim.SGD):
        raise ValueError(
            f"optimizer must be torch.optim.SGD for a head with first_layer='factored', got {type(optimizer).__name__}: the "
            "factored form is exact for SGD only; make the head with first_layer='dense'"
        )
