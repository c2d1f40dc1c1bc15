"""Training an AlphaNet head on cached features, as in the paper (section 4.1)."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from torch import Tensor, nn

from ..classes import ClassSplit
from ..head.alphanet import AlphaNet
from ..metrics.accuracy import SplitMetrics
from ..utils.checks import check_integer
from ..utils.progress import progress_bar
from ..utils.tensors import TensorLike
from .builder import make_engine, training_data
from .engine import ENGINES, Engine, TrainingData, TrainingDiverged, hits_of
from .few_bias import choose_few_bias
from .native_engine import SharedLogits, why_not_native
from .options import TrainingOptions, selection_score, takes_options
from .result import FitResult
from .sgd import DecayOfStart, Sgd

# The native engine's epochs are short: writing a checkpoint after each would take longer than they do.
_SECONDS_BETWEEN_CHECKPOINTS = 0.5

# What a checkpoint holds.
_CHECKPOINT: dict[str, type | tuple[type, ...]] = {
    "options": dict,
    "engine": dict,
    "decay": dict,
    "history": list,
    "selected_epoch": int,
    "selected_score": (int, float),
    "selected_decay": (int, float),
    "selected": list,
    "start_decay": (int, float),
}


@takes_options([entry.name for entry in fields(TrainingOptions)])
def fit(
    head: AlphaNet,
    features: TensorLike,
    labels: TensorLike,
    *,
    val_features: TensorLike | None = None,
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
        labels: ``[n]`` integers.
        val_features: ``[m, D]``, to select the epoch by; with ``val_labels``.
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
    _check_head(head)
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    settings = TrainingOptions.of(options)
    path = None if checkpoint is None else _check_path(checkpoint)
    data = training_data(head, features, labels, val_features, val_labels, settings)

    made = None
    if optimizer is not None:
        made = optimizer([p for p in head.parameters() if p.requires_grad])
        _check_optimizer(head, made)
    reason = why_not_native(head, made)
    if engine == "native" and reason:
        raise ValueError(f"engine='native' cannot train this exactly: {reason}; use engine='autograd'")
    native = engine != "autograd" and not reason
    split = split_of(head, data, check_integer(many_above, "many_above", minimum=0))
    reason = "" if engine == "autograd" else reason
    return train(Run(head, settings, data, split), path, made, native=native, reason=reason, progress=progress)


def train(
    run: Run,
    checkpoint: Path | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    native: bool = True,
    reason: str | None = None,
    progress: bool | None = None,
) -> FitResult:
    """Carry out a training from first to last; ``reason`` is why it is not the native engine that does."""
    started = time.monotonic()
    run.prepare(checkpoint, optimizer, native=native)
    with _progress_bar(progress, run.options.epochs, len(run.history) - 1) as report:
        run.train(checkpoint, report)
    return run.result(reason or "", time.monotonic() - started)


class Run:
    """One training: an engine, the history, the best epoch so far, and the checkpoint they go into."""

    def __init__(
        self,
        head: AlphaNet,
        options: TrainingOptions,
        data: TrainingData,
        split: ClassSplit,
    ) -> None:
        self.head, self.options, self.data, self.split = head, options, data, split
        # Without the constant that is yet to come, an epoch's accuracy does not say which is best with it.
        self.select = options.select or ("last" if data.validation is None or options.few_bias else "best_all")
        self.min_all = options.min_all
        self.metrics: SplitMetrics | None = None
        if data.validation is not None:
            counts = torch.bincount(data.validation.labels, minlength=head.out_features)
            self.metrics = SplitMetrics(split, counts)
        self.history: list[dict[str, float]] = []
        self.before: dict[str, float] | None = None
        self.selected_epoch = 0
        self.selected_score = -math.inf
        self.selected_decay = 1.0
        self.selected: list[Tensor] = []
        self.engine: Engine
        self._saved = time.monotonic()

    def prepare(
        self,
        path: Path | None,
        optimizer: torch.optim.Optimizer | None,
        *,
        native: bool,
        logits: SharedLogits | None = None,
    ) -> None:
        """Make the engine; go on from the checkpoint at ``path``, if it exists, or evaluate epoch 0."""
        options, data, head = self.options, self.data, self.head
        sgd = Sgd(options.lr, options.momentum, options.dampening, options.weight_decay, options.nesterov)
        if optimizer is None and not native:
            parameters = [p for p in head.parameters() if p.requires_grad]
            # On a CPU, fused SGD left 16-bit parameters as they were before torch 2.14, all but the last few of each.
            fused = head.w2.device.type != "cpu" or head.w2.dtype in (torch.float32, torch.float64)
            optimizer = torch.optim.SGD(parameters, **vars(sgd), fused=fused)
        elif optimizer is not None:
            sgd = Sgd.of(optimizer) or sgd
        state = None
        self._identity = {
            **options.identity(),
            "select": self.select,
            "engine": "native" if native else "autograd",
            "optimizer": repr(sgd) if native else repr(optimizer),
            "head": repr(head),
            "seed of the head": head.seed,
        }
        if path is not None:
            self._identity["head, classifier and data"] = _fingerprint(head, data)
            state = self._load(path) if path.exists() else None
        first = 1 if state is None else len(state["history"])
        self.engine = make_engine(head, options, data, sgd, None if native else optimizer, first, logits)
        if optimizer is not None and head.first_layer == "factored":
            sgd = Sgd.of_parameter(optimizer, head.preactivation) or replace(sgd, weight_decay=0.0)
        self.decay = DecayOfStart(sgd)
        self.start_decay = self.taken_up_decay = head.first_layer_decay
        head.few_bias = 0.0  # of a training before; from here on nothing is refused
        original = self.engine.original_hits()
        if original is not None and self.metrics is not None:
            self.before = self.metrics.of(original)
            if self.select == "best_few":
                self.min_all = self.before["all"] if self.min_all is None else self.min_all
        if state is None:
            self._record(0, math.nan, self.engine.learning_rate(options.lr_multiplier(1)))
        else:
            self._resume(state)

    def train(self, path: Path | None, report: Callable[[dict[str, float]], None]) -> None:
        """Train the remaining epochs and leave the head with the parameters of the selected one, whatever happens."""
        try:
            for epoch in range(len(self.history), self.options.epochs + 1):
                try:
                    loss: float | TrainingDiverged = self.engine.train(epoch, self.options.lr_multiplier(epoch))
                except TrainingDiverged as error:
                    loss = error
                self.end_epoch(loss, path)
                report(self.history[-1])
        finally:
            self.finish()

    def end_epoch(self, loss: float | TrainingDiverged, path: Path | None) -> None:
        """Take up what the engine made of an epoch: its loss, or why it failed (a FloatingPointError)."""
        engine, epoch = self.engine, len(self.history)
        multiplier = self.options.lr_multiplier(epoch)
        lr = engine.learning_rate(multiplier)
        if isinstance(loss, TrainingDiverged):
            raise FloatingPointError(
                f"training diverged: {loss} is no longer finite in epoch {epoch} (lr {lr:g}); a smaller lr may help"
            )
        self.decay.advance(self.decay.sgd.lr * multiplier, engine.steps_per_epoch)
        self._record(epoch, loss, lr)
        due = engine.name != "native" or time.monotonic() - self._saved > _SECONDS_BETWEEN_CHECKPOINTS
        if path is not None and (due or epoch == self.options.epochs):
            self._save(path)

    def finish(self) -> None:
        """Leave the head with the parameters of the selected epoch."""
        # Relative to what the head was when this process took it up: the start, or what an interrupted training left.
        relative = self.selected_decay
        if self.start_decay != self.taken_up_decay:
            relative *= self.start_decay / self.taken_up_decay if self.taken_up_decay else 0.0
        self.engine.restore(self.selected, relative)
        self.head.first_layer_decay = self.start_decay * self.selected_decay

    def release(self) -> None:
        """Give back what only training needs."""
        del self.engine
        self.selected = []

    def result(self, engine_reason: str, seconds: float) -> FitResult:
        chosen = self.history[self.selected_epoch]
        after = None if self.before is None else {name: chosen[name] for name in self.before}
        if self.options.few_bias:
            after = self._choose_few_bias()
        return FitResult(
            history=self.history,
            selected_epoch=self.selected_epoch,
            selection=self.select if self.select != "best_few" else f"best_few with all >= {self.min_all:.4f}",
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
        head.few_bias = 0.0
        policy = "best_all" if self.select == "last" else self.select
        found = choose_few_bias(
            head.fold(),
            validation.real(),
            validation.labels,
            self.split,
            select=policy,
            min_all=self.min_all if policy == "best_few" else None,
        )
        head.few_bias = float(found.chosen["offset"])
        return self.metrics.of(hits_of(head.fold(), validation))

    def _record(self, epoch: int, loss: float, lr: float) -> None:
        """Add an epoch to the history, and keep its parameters if it is the one to select so far."""
        entry: dict[str, float] = {"epoch": epoch, "loss": loss, "lr": lr, "clamped": self.engine.clamped()}
        hits = self.engine.hits()
        if hits is not None and self.metrics is not None:
            entry.update(self.metrics.of(hits))
        self.history.append(entry)
        score = float(epoch) if self.select == "last" else selection_score(self.select, entry, self.min_all)
        if score > self.selected_score:
            snapshot = self.engine.snapshot()
            self.selected, self.selected_decay = snapshot, self.decay.factor
            self.selected_epoch, self.selected_score = epoch, score

    def _save(self, path: Path) -> None:
        state = {
            "options": self._identity,
            "engine": self.engine.state(),
            "decay": vars(self.decay) | {"sgd": None},
            "history": self.history,
            "selected_epoch": self.selected_epoch,
            "selected_score": self.selected_score,
            "selected_decay": self.selected_decay,
            "selected": self.selected,
            "start_decay": self.start_decay,
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            torch.save(state, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        self._saved = time.monotonic()

    def _load(self, path: Path) -> dict[str, Any]:
        try:
            state: dict[str, Any] = torch.load(path, map_location=self.head.weight.device, weights_only=True)
            if not isinstance(state, dict):
                raise TypeError(f"it holds a {type(state).__name__}")
            missing = [name for name in _CHECKPOINT if not isinstance(state[name], _CHECKPOINT[name])]
            if missing:
                raise TypeError(f"{missing[0]} is a {type(state[missing[0]]).__name__}")
            saved, done = state["options"], len(state["history"]) - 1
        except Exception as error:  # what torch makes of foreign bytes knows no limits
            raise ValueError(f"checkpoint {path} cannot be read as one of fit's: {type(error).__name__}: {error}") from error
        # Of an option that only one of them tells the other has the default.
        for name in {**self._identity, **saved}:
            value = self._identity.get(name)
            if saved.get(name) != value:
                raise ValueError(
                    f"checkpoint {path} belongs to another training: {name} is {value!r} here and {saved.get(name)!r} there"
                )
        if done > self.options.epochs:
            raise ValueError(f"checkpoint {path} has {done} epochs, more than epochs={self.options.epochs}")
        return state

    def _resume(self, state: dict[str, Any]) -> None:
        self.engine.load_state(state["engine"])
        for name in ("factor", "momentum", "steps"):
            setattr(self.decay, name, state["decay"][name])
        self.history = state["history"]
        self.start_decay = state["start_decay"]
        self.selected_epoch, self.selected_score = state["selected_epoch"], state["selected_score"]
        self.selected_decay, self.selected = state["selected_decay"], state["selected"]


def _check_head(head: object) -> None:
    if not isinstance(head, AlphaNet):
        raise TypeError(f"head must be an AlphaNet, got {type(head).__name__}")


def _check_path(checkpoint: str | os.PathLike[str]) -> Path:
    path = Path(checkpoint)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"checkpoint must be a file in a directory that exists, got {str(path)!r}")
    return path


def _fingerprint(head: AlphaNet, data: TrainingData) -> str:
    """Tells trainings apart: a digest of what is fixed in one, of features a sample of a thousand rows."""
    digest = hashlib.sha256()
    for name, parameter in head.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.requires_grad}".encode())
    frozen = [p for p in (head.weight, head.bias) if p is not None and not p.requires_grad]
    tensors = [head.members, head.z, *frozen, *(t for t in (head.directions, head.direction_bias) if t is not None)]
    for samples in (data.samples, data.validation):
        if samples is not None:
            tensors += [samples.labels, samples.features[:: max(1, len(samples.features) // 1000)]]
    for tensor in tensors:
        digest.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def split_of(head: AlphaNet, data: TrainingData, many_above: int) -> ClassSplit:
    """The split that a head's few classes and its training samples make."""
    counts = torch.bincount(data.samples.labels[: data.num_real], minlength=head.out_features)
    few = torch.zeros(head.out_features, dtype=torch.bool, device="cpu")
    few[head.few_classes.cpu()] = True
    return ClassSplit.of_masks(few, (counts > many_above) & ~few, counts == 0)


def _check_optimizer(head: AlphaNet, optimizer: torch.optim.Optimizer) -> None:
    if head.first_layer == "factored" and head.coefficients == "mlp" and not isinstance(optimizer, torch.optim.SGD):
        raise ValueError(
            f"optimizer must be torch.optim.SGD for a head with first_layer='factored', got {type(optimizer).__name__}: the "
            "factored form is exact for SGD only; make the head with first_layer='dense'"
        )


@contextmanager
def _progress_bar(progress: bool | None, epochs: int, done: int) -> Iterator[Callable[[dict[str, float]], None]]:
    columns = (
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
    )
    with progress_bar(progress, *columns) as bar:
        task = bar.add_task("", total=epochs, completed=done)

        def report(entry: dict[str, float]) -> None:
            text = f"loss {entry['loss']:.3f}"
            if "all" in entry:
                text += f"  few {100 * entry['few']:.1f}  all {100 * entry['all']:.1f}"
            bar.update(task, advance=1, description=text)

        yield report
