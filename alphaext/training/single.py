"""Training an AlphaNet head on cached features, as in the paper (section 4.1)."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from torch import Tensor, nn

from ..classes import ClassSplit, class_means
from ..head.alphanet import AlphaNet
from ..metrics.accuracy import SplitMetrics
from ..utils.checks import check_integer
from ..utils.progress import progress_bar
from ..utils.tensors import TensorLike
from .augmentation import draw_features
from .autograd_engine import AutogradEngine
from .cached_logits import Samples, check_samples
from .engine import ENGINES, Engine, TrainingData, TrainingDiverged, hits_of
from .few_bias import choose_few_bias
from .native_engine import NativeEngine, SharedLogits, why_not_native
from .options import TrainingOptions, selection_score
from .result import FitResult
from .sampling import EpochSampler
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


def fit(
    head: AlphaNet,
    features: TensorLike,
    labels: TensorLike,
    *,
    val_features: TensorLike | None = None,
    val_labels: TensorLike | None = None,
    epochs: int = 80,
    batch_size: int = 64,
    lr: float = 0.1,
    momentum: float = 0.9,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    lr_schedule: str = "step",
    lr_step: int = 20,
    lr_factor: float = 0.1,
    lr_milestones: Sequence[int] = (),
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    engine: str = "auto",
    negative_ratio: float = 1.0,
    negative_sampling: str = "uniform",
    samples_per_class: int | None = None,
    augment: str | None = None,
    augment_samples: int = 200,
    augment_neighbors: int = 5,
    prior_correction: bool = False,
    regularize: float = 0.0,
    few_bias: bool = False,
    select: str | None = None,
    min_all: float | None = None,
    many_above: int = 100,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
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
        epochs: 80 in the paper.
        batch_size: 64 in the paper. A last, smaller batch is kept.
        lr: learning rate, 0.1 in the paper.
        momentum: 0.9 in the paper.
        dampening: of the momentum; none in the paper.
        weight_decay: L2 penalty; none in the paper.
        nesterov: Nesterov momentum.
        lr_schedule: ``"step"``, times ``lr_factor`` every ``lr_step`` epochs (default, as in the paper); ``"multistep"``, at
            each of ``lr_milestones``; ``"cosine"``, down to 0 after ``epochs``; ``"constant"``. Of any optimiser.
        lr_step: 20 in the paper.
        lr_factor: 0.1 in the paper.
        lr_milestones: for ``"multistep"``, after how many epochs.
        optimizer: makes any torch optimiser out of the list of parameters, instead of SGD with the options above. A head with
            ``first_layer="factored"`` is exact for SGD only and refuses others, but for direct coefficients, which have none.
        engine: ``"native"``, whole epochs in compiled code, on one thread: for SGD and a frozen classifier, where it is exact
            to rounding. ``"autograd"``, torch's. ``"auto"``, the default: native wherever it is exact; the result says which.
        negative_ratio: base samples for each few sample; 1 in the paper, 0 in its appendix E.
        negative_sampling: ``"uniform"`` over base images, or ``"class_balanced"``: as many from each base class.
        samples_per_class: so many samples of every class, few and base, in each epoch, instead of all few ones and
            ``negative_ratio`` times as many base ones; None, as in the paper, for the latter. With replacement where a class
            has fewer.
        augment: ``"neighbors"``: few classes are trained on drawn samples instead of their own, each the class's mean moved
            the way a sample of a near base class lies around its own mean (:mod:`alphaext.training.augmentation`); with
            ``samples_per_class``.
        augment_samples: drawn samples that there are of each few class.
        augment_neighbors: nearest base classes whose samples are borrowed.
        prior_correction: train with the log of how often an epoch has each class added to its score, so that the scores
            themselves do not take up how often classes are drawn (which ``samples_per_class`` makes equal anyway).
        regularize: half of this times the squared distance of the outputs (coefficients before ``rule``, and amounts of the
            residual) from those of the original classifier is added to the loss of a step; not to the ``loss`` told.
        few_bias: after training, add to all few scores the constant that is best on validation samples by ``select`` (under
            ``"last"``, by ``"best_all"``). It is in the head and its ``fold()``, and in ``metrics_after``.
        select: ``"best_all"``, the epoch with the best accuracy over all validation samples (default with validation data);
            ``"best_few"``, the best few accuracy among those whose accuracy over all is not below ``min_all``;
            ``"last"`` (default without, and with ``few_bias``, which epochs are measured without). Epoch 0, before training,
            takes part; of equal epochs the first wins.
        min_all: for ``"best_few"``, a fraction of 1; None takes the original classifier's own.
        many_above: in the metrics, a base class with more training samples is many; 100 in the paper.
        seed: of the samples drawn and their order.
        checkpoint: a file that is rewritten after each epoch (by the native engine at most every half second, and at the
            end), whole or not at all. If it exists, training goes on from it, to the same bits as without the interruption; a
            checkpoint of another head, data set or configuration is an error. A head made without ``seed`` draws one: give it
            one to go on in another process.
        progress: show a progress bar; None shows it where standard error is a terminal.

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
    started = time.monotonic()
    _check_head(head)
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    settings = TrainingOptions(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        lr_schedule=lr_schedule,
        lr_step=lr_step,
        lr_factor=lr_factor,
        lr_milestones=lr_milestones,
        negative_ratio=negative_ratio,
        negative_sampling=negative_sampling,
        samples_per_class=samples_per_class,
        augment=augment,
        augment_samples=augment_samples,
        augment_neighbors=augment_neighbors,
        prior_correction=prior_correction,
        regularize=regularize,
        few_bias=few_bias,
        select=select,
        min_all=min_all,
        seed=seed,
    )
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
    run = Run(head, settings, data, check_integer(many_above, "many_above", minimum=0))
    run.prepare(path, made, native=native)
    with _progress_bar(progress, settings.epochs, len(run.history) - 1) as report:
        run.train(path, report)
    return run.result("" if native or engine == "autograd" else reason or "", time.monotonic() - started)


class Run:
    """One training: an engine, the history, the best epoch so far, and the checkpoint they go into."""

    def __init__(
        self,
        head: AlphaNet,
        options: TrainingOptions,
        data: TrainingData,
        many_above: int = 100,
        split: ClassSplit | None = None,
    ) -> None:
        self.head, self.options, self.data = head, options, data
        # Without the constant that is yet to come, an epoch's accuracy does not say which is best with it.
        self.select = options.select or ("last" if data.validation is None or options.few_bias else "best_all")
        self.min_all = options.min_all
        self.metrics: SplitMetrics | None = None
        if data.validation is not None:
            counts = torch.bincount(data.validation.labels, minlength=head.out_features)
            self.split = split or _split_of(head, data.samples.labels[: data.num_real], many_above)
            self.metrics = SplitMetrics(self.split, counts)
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
            **options.fingerprint(),
            "select": self.select,
            "engine": "native" if native else "autograd",
            "optimizer": repr(sgd) if native else repr(optimizer),
            "head": repr(head),
            "seed of the head": head.seed,
        }
        if path is not None:
            self._identity["head, classifier and data"] = _fingerprint(head, data)
            state = self._load(path) if path.exists() else None
        if native:
            first = 1 if state is None else len(state["history"])
            self.engine = NativeEngine(head, options, sgd, data, first, logits)
        else:
            assert optimizer is not None
            self.engine = AutogradEngine(head, options, data, optimizer)
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


def check_selection(options: TrainingOptions, validation: Samples | None, few_classes: Tensor) -> None:
    """Check that a policy which needs validation data has some."""
    if options.select not in (None, "last") and validation is None:
        raise ValueError(f"select={options.select!r} needs val_features and val_labels")
    if options.few_bias and validation is None:
        raise ValueError("few_bias is chosen on validation samples: it needs val_features and val_labels")
    if options.select != "best_few" or validation is None:
        return
    if not bool(torch.isin(validation.labels, few_classes.cpu()).any()):
        raise ValueError("val_labels has no sample of a few class, so select='best_few' has nothing to go by")


def training_data(
    head: AlphaNet,
    features: TensorLike,
    labels: TensorLike,
    val_features: TensorLike | None,
    val_labels: TensorLike | None,
    options: TrainingOptions,
) -> TrainingData:
    """The data of a training, checked."""
    if (val_features is None) != (val_labels is None):
        raise ValueError("val_features and val_labels must be given together")
    samples = check_samples(head.weight, features, labels, "features", "labels")
    validation = None
    if val_features is not None and val_labels is not None:
        validation = check_samples(head.weight, val_features, val_labels, "val_features", "val_labels")
    check_selection(options, validation, head.few_classes)
    return sampled(with_drawn(samples, head, options), validation, head, options, len(samples.labels))


def with_drawn(samples: Samples, head: AlphaNet, options: TrainingOptions, means: Tensor | None = None) -> Samples:
    """The samples, and behind them those that ``augment`` asks for; ``means`` ``[N, D]`` of the classes, if at hand."""
    if options.augment is None:
        return samples
    if means is None:
        means = _means_of(samples, head.out_features)
    features, labels = draw_features(
        samples.real(),
        samples.labels,
        means,
        head.few_classes,
        options.augment_samples,
        options.seed,
        options.augment_neighbors,
    )
    return Samples(features, labels, samples.name)


def sampled(
    samples: Samples, validation: Samples | None, head: AlphaNet, options: TrainingOptions, num_real: int
) -> TrainingData:
    """The data of a training; of ``samples`` the first ``num_real`` are real, and all others drawn."""
    drawn_from = num_real if options.augment is not None else None
    sampler = EpochSampler(samples.labels, head.few_classes, head.out_features, options, drawn_from or 0)
    return TrainingData(samples, sampler, validation, drawn_from)


def _means_of(samples: Samples, num_classes: int) -> Tensor:
    """The class means ``[N, D]``, 0 for classes without samples, which nothing is drawn from."""
    present, labels = samples.labels.unique(return_inverse=True)
    found = class_means(samples.real(), labels, len(present))
    means = found.new_zeros(num_classes, found.shape[1])
    means[present.to(found.device)] = found
    return means


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


def _split_of(head: AlphaNet, labels: Tensor, many_above: int) -> ClassSplit:
    counts = torch.bincount(labels, minlength=head.out_features)
    few = torch.zeros(head.out_features, dtype=torch.bool, device="cpu")
    few[head.few_classes.cpu()] = True
    many = (counts > many_above) & ~few
    ids = torch.arange(head.out_features, device="cpu")
    return ClassSplit(few=ids[few], medium=ids[~few & ~many], many=ids[many])


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
