"""Training an AlphaNet head on cached features, as in the paper (section 4.1)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from torch import nn

from ..classes import ClassSplit
from ..head.alphanet import AlphaNet
from ..metrics.accuracy import SplitMetrics
from ..utils.checks import check_choice, check_integer, check_kind
from ..utils.progress import task_bar
from ..utils.resume import ResumableTraining, check_checkpoint
from ..utils.tensors import LabelledFeatures, TensorLike
from .autograd_engine import AutogradEngine
from .builder import training_data
from .cached_logits import data_digest
from .engine import ENGINES, TrainingData, TrainingDiverged, hits_of
from .few_bias import choose_few_bias
from .native_engine import NativeEngine, SharedLogits, why_not_native
from .options import TrainingOptions, takes_options
from .result import FitResult
from .selection import Policy
from .sgd import DecayOfStart, Sgd

# The native engine's epochs are short: writing a checkpoint after each would take longer than they do.
_SECONDS_BETWEEN_CHECKPOINTS = 0.5


@takes_options([entry.name for entry in fields(TrainingOptions)])
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
        FloatingPointError: when something is no longer finite, naming epoch, class and learning rate; the head then has the
            best epoch's parameters so far.
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
    settings = TrainingOptions.of(options)
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
    return train(run, path, sgd, made, reason=reason if engine == "auto" else None, progress=progress)


def train(
    run: Run,
    checkpoint: Path | None = None,
    sgd: Sgd | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    reason: str | None = None,
    progress: bool | None = None,
) -> FitResult:
    """Carry out a training from first to last: :meth:`Run.prepare`, :meth:`Run.train`, :meth:`Run.result`."""
    started = time.monotonic()
    run.prepare(checkpoint, sgd, optimizer)
    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    with task_bar(progress, "epoch", *columns, total=run.options.epochs, done=len(run.history) - 1) as report:
        run.train(checkpoint, report)
    return run.result(reason or "", time.monotonic() - started)


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
        self.metrics: SplitMetrics | None = None
        if val_labels is not None:
            self.metrics = SplitMetrics(split, torch.bincount(val_labels, minlength=head.out_features))
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
        self.identity = {
            **options.identity(),
            "select": self.policy.select,
            "engine": "native" if optimizer is None else "autograd",
            "optimizer": repr(optimizer or sgd),
            "head": repr(head),
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
        head.few_bias = 0.0  # of a training before; from here on nothing is refused
        original = self.engine.original_hits()
        if original is not None and self.metrics is not None:
            self.before = self.metrics.of(original)
            self.policy = self.policy.bounded(self.before)
        if resumed:
            self.engine.load_state(state["engine"])
            self.decay.factor, self.decay.momentum, self.decay.steps = state["decay"]
            self.start_decay = state["start_decay"]
        else:
            self._record(0, math.nan, self.engine.learning_rate(options.lr_multiplier(1)))

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
        """What came of the training; chooses the constant on the few scores if the options ask for one."""
        chosen = self.history[self.selected_epoch]
        after = None if self.before is None else {name: chosen[name] for name in self.before}
        if self.options.few_bias:
            after = self._choose_few_bias()
        return FitResult(
            history=self.history,
            selected_epoch=self.selected_epoch,
            selection=str(self.policy),
            metrics_before=self.before,
            metrics_after=after,
            clamped=int(chosen["clamped"]),
            engine=self.engine.name,
            engine_reason=engine_reason,
            seconds=seconds,
            few_bias=self.head.few_bias,
        )

    def _choose_few_bias(self) -> dict[str, float]:
        """Give the head the constant on its few scores that validation samples choose, and measure it again."""
        head, validation = self.head, self.data.validation
        assert validation is not None and self.metrics is not None
        policy = Policy("best_all") if self.policy.select == "last" else self.policy
        chosen_by: dict[str, Any] = {"select": policy.select, "min_all": policy.min_all}
        found = choose_few_bias(head.fold(), validation.real(), validation.labels, self.split, **chosen_by)
        head.few_bias = float(found.chosen["offset"])
        return self.metrics.of(hits_of(head.fold(), validation))

    def _record(self, epoch: int, loss: float, lr: float) -> None:
        """Measure an epoch and add it to the history."""
        entry: dict[str, float] = {"epoch": epoch, "loss": loss, "lr": lr, "clamped": self.engine.clamped()}
        hits = self.engine.hits()
        if hits is not None and self.metrics is not None:
            entry.update(self.metrics.of(hits))
        if self.add_epoch(entry, self.policy.score(entry)):
            self.selected = self.decay.factor, self.engine.snapshot()


def split_of(head: AlphaNet, data: TrainingData, many_above: int) -> ClassSplit:
    """The split that a head's few classes and its training samples make."""
    counts = torch.bincount(data.samples.labels[: data.samples.num_real], minlength=head.out_features)
    few = torch.zeros(head.out_features, dtype=torch.bool, device="cpu")
    few[head.few_classes.cpu()] = True
    return ClassSplit.of_masks(few, (counts > many_above) & ~few, counts == 0)


def _check_optimizer(head: AlphaNet, optimizer: torch.optim.Optimizer) -> None:
    if head.first_layer == "factored" and head.coefficients == "mlp" and not isinstance(optimizer, torch.optim.SGD):
        raise ValueError(
            f"optimizer must be torch.optim.SGD for a head with first_layer='factored', got {type(optimizer).__name__}: the "
            "factored form is exact for SGD only; make the head with first_layer='dense'"
        )
