"""Training an AlphaNet head on cached features, as in the paper (section 4.1)."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from ._checks import (
    TensorLike,
    as_tensor,
    check_finite,
    check_floating,
    check_integer,
    check_labels,
    check_shape,
    format_ids,
)
from .classes import ClassSplit
from .metrics import split_accuracy
from .modules import AlphaNet

SELECTIONS = ("best_all", "best_few", "last")

# Rows of features that are checked, and converted to the head's dtype and device, at once.
_BLOCK_ROWS = 8192


@dataclass
class FitResult:
    """What :func:`fit` did.

    Attributes:
        history: one dictionary an epoch, from epoch 0 (before training): ``epoch``, ``loss`` (mean cross-entropy; nan for
            epoch 0), ``lr`` (what the epoch trained with), ``clamped`` (classes whose own coefficient sits on its clamp), and
            with validation data ``few``, ``medium``, ``many``, ``all``: top-1 accuracy, a fraction of 1.
        selected_epoch: the epoch whose parameters the head now has.
        selection: the policy that chose it, with its bounds.
        before: accuracies of the original classifier on the validation data, or None without.
        after: accuracies of the head as it is now on the validation data, or None without.
        clamped: classes whose own coefficient sits on its clamp now.
        engine: what ran the training.
        seconds: wall-clock time.
    """

    history: list[dict[str, float]] = field(repr=False)
    selected_epoch: int
    selection: str
    before: dict[str, float] | None
    after: dict[str, float] | None
    clamped: int
    engine: str
    seconds: float


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
    weight_decay: float = 0.0,
    nesterov: bool = False,
    lr_step: int | None = 20,
    lr_factor: float = 0.1,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    negative_ratio: float = 1.0,
    select: str | None = None,
    min_all: float | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> FitResult:
    """Train ``head`` on all samples of its few classes and as many base samples, drawn anew each epoch.

    The loss is the cross-entropy over all classes. With a frozen classifier (the default) original logits are computed once for
    few and validation samples, once an epoch for the base samples drawn, and mixed (:meth:`AlphaNet.mix_logits`): so a step
    does not touch features or classifier.

    Args:
        head: trained in place; on return it has the parameters of the selected epoch.
        features: ``[n, D]``, floating point, the training features (a NumPy memory map will do).
        labels: ``[n]`` integers.
        val_features: ``[m, D]``, to select the epoch by; with ``val_labels``.
        val_labels: ``[m]`` integers.
        epochs: 80 in the paper.
        batch_size: 64 in the paper. A last, smaller batch is kept.
        lr: learning rate, 0.1 in the paper.
        momentum: 0.9 in the paper.
        weight_decay: L2 penalty; none in the paper.
        nesterov: Nesterov momentum.
        lr_step: epochs between multiplications of the learning rate (of any optimiser) by ``lr_factor``; 20 in the paper. None
            for never.
        lr_factor: 0.1 in the paper.
        optimizer: makes any torch optimiser out of the list of parameters, instead of SGD with ``lr``, ``momentum``,
            ``weight_decay`` and ``nesterov``. A head with ``first_layer="factored"`` is exact for SGD only and refuses others.
        negative_ratio: base samples for each few sample; 1 in the paper, 0 in its appendix E.
        select: ``"best_all"``, the epoch with the best accuracy over all validation samples (default with validation data);
            ``"best_few"``, the best few accuracy among those whose accuracy over all is not below ``min_all``;
            ``"last"`` (default without). Epoch 0, before training, takes part; of equal epochs the first wins.
        min_all: for ``"best_few"``, a fraction of 1; None takes the original classifier's own.
        seed: of the samples drawn and their order.
        checkpoint: a file that is rewritten after each epoch, whole or not at all. If it exists, training goes on from it, to
            the same bits as without the interruption; a checkpoint of another head, data set or configuration is an error.
        progress: show a progress bar; None shows it where standard error is a terminal.

    Returns:
        A :class:`FitResult`.

    Raises:
        ValueError, TypeError: for arguments out of range or that disagree, before any training; the message names them.
        FloatingPointError: when the loss is no longer finite; the head then has the best epoch's parameters so far.
        KeyboardInterrupt: passed on after giving the head the best epoch's parameters so far.

    Example:
        >>> features, labels = torch.randn(40, 8), torch.arange(40) % 4
        >>> head = AlphaNet.from_linear(nn.Linear(8, 4), members=[[3, 0, 1]], seed=0)
        >>> result = fit(head, features, labels, epochs=2)
        >>> result.selected_epoch, result.engine
        (2, 'autograd')
    """
    started = time.monotonic()
    if not isinstance(head, AlphaNet):
        raise TypeError(f"head must be an AlphaNet, got {type(head).__name__}")
    _check_options(epochs, batch_size, lr, lr_step, lr_factor, negative_ratio, seed)
    path = None if checkpoint is None else _check_path(checkpoint)
    select = _check_selection(select, min_all, val_features is not None)
    data, targets = _check_samples(head, features, labels, "features", "labels")
    few, base = _few_and_base_samples(head, targets)
    negatives = _number_of_negatives(len(few), len(base), negative_ratio)
    parameters = [p for p in head.parameters() if p.requires_grad]
    algorithm = (
        torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True)
        if optimizer is None
        else optimizer(parameters)
    )
    _check_optimizer(head, algorithm)
    validation = _Validation.make(head, val_features, val_labels, targets)
    if select == "best_few" and validation is not None:
        if math.isnan(validation.before["few"]):
            raise ValueError("val_labels has no sample of a few class, so select='best_few' has nothing to go by")
        min_all = validation.before["all"] if min_all is None else min_all

    run = _Run(head, parameters, algorithm, lr_step, lr_factor, torch.Generator("cpu").manual_seed(seed))
    options = {
        "batch_size": batch_size,
        "negative_ratio": negative_ratio,
        "select": select,
        "min_all": min_all,
        "optimizer": repr(algorithm),
        "lr_step": lr_step,
        "lr_factor": lr_factor,
        "seed": seed,
        "head": repr(head),
    }
    if path is not None:
        options["head, classifier and data"] = _fingerprint(head, data, targets, validation)
    samples = _Samples(head, data, targets, few, base, negatives)
    if path is not None and path.exists():
        run.resume(path, options, epochs)
    else:
        run.record(0, math.nan, run.learning_rate(), validation, select, min_all)

    try:
        with torch.enable_grad(), _progress_bar(progress, epochs, len(run.history) - 1) as report:
            for epoch in range(len(run.history), epochs + 1):
                used_lr = run.learning_rate()
                loss = run.epoch(samples, batch_size)
                if not math.isfinite(loss) or not samples.scores_are_finite():
                    raise FloatingPointError(
                        f"training diverged: the loss or the scores are no longer finite in epoch {epoch} (loss {loss:g}, "
                        f"lr {used_lr:g}); a smaller lr may help"
                    )
                run.record(epoch, loss, used_lr, validation, select, min_all)
                if path is not None:
                    run.save(path, options)
                report(run.history[-1])
    finally:
        run.restore_selected()
    return FitResult(
        history=run.history,
        selected_epoch=run.selected_epoch,
        selection=select if select != "best_few" else f"best_few with all >= {min_all:.4f}",
        before=None if validation is None else validation.before,
        after=None if validation is None else validation.accuracy(head),
        clamped=int(head.clamped().sum()),
        engine="autograd",
        seconds=time.monotonic() - started,
    )


class _Samples:
    """The training samples: all few ones, and base ones drawn anew each epoch."""

    def __init__(self, head: AlphaNet, data: Tensor, targets: Tensor, few: Tensor, base: Tensor, negatives: int) -> None:
        self.head, self.data, self.targets, self.few, self.base, self.negatives = (
            head,
            data,
            targets,
            few,
            base,
            negatives,
        )
        self.mixes_logits = not any(p is not None and p.requires_grad for p in (head.weight, head.bias))
        self.few_inputs = self._inputs(few)

    def _inputs(self, indices: Tensor) -> Tensor:
        return _original_logits(self.head, self.data, indices) if self.mixes_logits else _on_head(self.head, self.data[indices])

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One epoch's inputs (logits, or features where the classifier learns too) and labels, in random order."""
        if self.negatives > len(self.base):
            drawn = torch.randint(len(self.base), (self.negatives,), generator=generator, device="cpu")
        else:
            drawn = torch.randperm(len(self.base), generator=generator, device="cpu")[: self.negatives]
        negatives = self.base[drawn]
        order = torch.randperm(len(self.few) + len(negatives), generator=generator, device="cpu")
        targets = self.targets[torch.cat([self.few, negatives])[order]].to(self.few_inputs.device)
        inputs = torch.cat([self.few_inputs, self._inputs(negatives)])
        return inputs[order.to(inputs.device)], targets

    def scores(self, inputs: Tensor) -> Tensor:
        return self.head.mix_logits(inputs) if self.mixes_logits else self.head(inputs)

    @torch.no_grad()
    def scores_are_finite(self) -> bool:
        """Whether the head, as it is now, still gives finite scores: of one sample, since every class's alphas enter them."""
        return bool(self.scores(self.few_inputs[:1]).isfinite().all())


class _Run:
    """The state of a training: parameters, optimiser, random numbers, history and the best epoch so far."""

    def __init__(
        self,
        head: AlphaNet,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        lr_step: int | None,
        lr_factor: float,
        generator: torch.Generator,
    ) -> None:
        self.head, self.parameters, self.optimizer, self.generator = head, parameters, optimizer, generator
        self.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, lr_step or sys.maxsize, lr_factor)
        self.history: list[dict[str, float]] = []
        self.selected_epoch = 0
        self.selected_score = -math.inf
        self.selected: list[Tensor] = []

    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def epoch(self, samples: _Samples, batch_size: int) -> float:
        """Train one epoch; the mean loss."""
        inputs, targets = samples.draw(self.generator)
        total = torch.zeros((), dtype=torch.float64, device=inputs.device)
        for batch, batch_targets in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
            losses: list[Tensor] = []

            def closure(batch: Tensor = batch, targets: Tensor = batch_targets, losses: list[Tensor] = losses) -> Tensor:
                self.optimizer.zero_grad()
                scores = samples.scores(batch)
                loss = nn.functional.cross_entropy(scores if scores.dtype == torch.float64 else scores.float(), targets)
                loss.backward()
                losses.append(loss.detach())
                return loss

            self.optimizer.step(closure)  # type: ignore[arg-type]  # closures may return tensors, as torch's own examples do
            total += losses[0] * len(batch)
        self.scheduler.step()
        return float(total) / len(inputs)

    def record(
        self, epoch: int, loss: float, lr: float, validation: _Validation | None, select: str, min_all: float | None
    ) -> None:
        """Add an epoch to the history, and keep its parameters if it is the one to select so far."""
        entry: dict[str, float] = {
            "epoch": epoch,
            "loss": loss,
            "lr": lr,
            "clamped": int(self.head.clamped().sum()),
        }
        if validation is not None:
            entry.update(validation.accuracy(self.head))
        self.history.append(entry)
        if select == "last":
            score = float(epoch)
        elif select == "best_all":
            score = entry["all"]
        else:
            # Epochs below the bound come after all others, the least bad first.
            bound = -math.inf if min_all is None else min_all
            score = entry["few"] if entry["all"] >= bound else entry["all"] - 2
        if score > self.selected_score:
            self.selected_epoch, self.selected_score = epoch, score
            self.selected = [p.detach().clone() for p in self.parameters]

    def restore_selected(self) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.selected, strict=True):
                parameter.copy_(value)

    def save(self, path: Path, options: dict[str, Any]) -> None:
        state = {
            "options": options,
            "parameters": [p.detach() for p in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if isinstance(v, (int, float, list))},
            "generator": self.generator.get_state(),
            "history": self.history,
            "selected_epoch": self.selected_epoch,
            "selected_score": self.selected_score,
            "selected": self.selected,
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            torch.save(state, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def resume(self, path: Path, options: dict[str, Any], epochs: int) -> None:
        try:
            state = torch.load(path, map_location=self.head.weight.device, weights_only=True)
            saved = state["options"]
        except (OSError, EOFError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"checkpoint {path} cannot be read as one of fit's: {type(error).__name__}: {error}") from error
        for name, value in options.items():
            if saved.get(name) != value:
                raise ValueError(
                    f"checkpoint {path} belongs to another training: {name} is {value!r} here and {saved.get(name)!r} there"
                )
        if len(state["history"]) - 1 > epochs:
            raise ValueError(f"checkpoint {path} has {len(state['history']) - 1} epochs, more than epochs={epochs}")
        # The head last: what is wrong with the rest is found before it is changed.
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"].cpu())
        self.history = state["history"]
        self.selected_epoch, self.selected_score = state["selected_epoch"], state["selected_score"]
        self.selected = state["selected"]
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)


def _check_path(checkpoint: str | os.PathLike[str]) -> Path:
    path = Path(checkpoint)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"checkpoint must be a file in a directory that exists, got {str(path)!r}")
    return path


def _fingerprint(head: AlphaNet, data: Tensor, targets: Tensor, validation: _Validation | None) -> str:
    """Tells trainings apart: a digest of what is fixed in one, of features a sample of a thousand rows."""
    digest = hashlib.sha256()
    for name, parameter in head.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} {parameter.requires_grad}".encode())
    frozen = [p for p in (head.weight, head.bias) if p is not None and not p.requires_grad]
    tensors = [head.members, head.z, *frozen, targets, data[:: max(1, len(data) // 1000)]]
    if validation is not None:
        tensors += [validation.labels, validation.data[:: max(1, len(validation.data) // 1000)]]
    for tensor in tensors:
        digest.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class _Validation:
    """Validation samples as original logits, computed once."""

    def __init__(self, head: AlphaNet, data: Tensor, labels: Tensor, split: ClassSplit) -> None:
        self.data, self.labels, self.split = data, labels, split
        self.logits = _original_logits(head, data, torch.arange(len(data), device="cpu"))
        self.before = split_accuracy(self.logits, labels.to(self.logits.device), split)

    @classmethod
    def make(
        cls, head: AlphaNet, features: TensorLike | None, labels: TensorLike | None, train_labels: Tensor
    ) -> _Validation | None:
        if (features is None) != (labels is None):
            raise ValueError("val_features and val_labels must be given together")
        if features is None or labels is None:
            return None
        data, targets = _check_samples(head, features, labels, "val_features", "val_labels")
        return cls(head, data, targets, _split_of(head, train_labels))

    @torch.no_grad()
    def accuracy(self, head: AlphaNet) -> dict[str, float]:
        frozen = not any(p is not None and p.requires_grad for p in (head.weight, head.bias))
        logits = self.logits if frozen else _original_logits(head, self.data, torch.arange(len(self.data), device="cpu"))
        return split_accuracy(head.mix_logits(logits), self.labels.to(logits.device), self.split)


def _split_of(head: AlphaNet, labels: Tensor) -> ClassSplit:
    counts = torch.bincount(labels, minlength=head.out_features)
    few = torch.zeros(head.out_features, dtype=torch.bool, device="cpu")
    few[head.few_classes.cpu()] = True
    many = (counts > 100) & ~few
    ids = torch.arange(head.out_features, device="cpu")
    return ClassSplit(few=ids[few], medium=ids[~few & ~many], many=ids[many])


def _on_head(head: AlphaNet, x: Tensor) -> Tensor:
    return x.to(device=head.weight.device, dtype=head.weight.dtype)


@torch.no_grad()
def _original_logits(head: AlphaNet, data: Tensor, indices: Tensor) -> Tensor:
    blocks = [nn.functional.linear(_on_head(head, data[block]), head.weight, head.bias) for block in indices.split(_BLOCK_ROWS)]
    return torch.cat(blocks)


def _check_options(
    epochs: int, batch_size: int, lr: float, lr_step: int | None, lr_factor: float, negative_ratio: float, seed: int
) -> None:
    check_integer(epochs, "epochs", minimum=0)
    check_integer(batch_size, "batch_size", minimum=1)
    check_integer(seed, "seed", minimum=0, maximum=2**63 - 1)
    if lr_step is not None:
        check_integer(lr_step, "lr_step", minimum=1)
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be finite and above 0, got {lr!r}")
    if not (math.isfinite(lr_factor) and lr_factor > 0):
        raise ValueError(f"lr_factor must be finite and above 0, got {lr_factor!r}")
    if not (math.isfinite(negative_ratio) and negative_ratio >= 0):
        raise ValueError(f"negative_ratio must be finite and at least 0, got {negative_ratio!r}")


def _check_selection(select: str | None, min_all: float | None, has_validation: bool) -> str:
    if select is None:
        select = "best_all" if has_validation else "last"
    if select not in SELECTIONS:
        raise ValueError(f"select must be one of {', '.join(SELECTIONS)}, got {select!r}")
    if select != "last" and not has_validation:
        raise ValueError(f"select={select!r} needs val_features and val_labels")
    if min_all is not None and (select != "best_few" or not 0 <= min_all <= 1):
        raise ValueError(f"min_all must be a fraction in [0, 1], with select='best_few'; got {min_all!r} with {select!r}")
    return select


def _check_samples(
    head: AlphaNet, features: TensorLike, labels: TensorLike, features_name: str, labels_name: str
) -> tuple[Tensor, Tensor]:
    data = as_tensor(features, features_name).detach()
    check_floating(data, features_name)
    check_shape(data, features_name, ("n", head.in_features))
    targets = check_labels(labels, head.out_features, labels_name).cpu()
    if len(targets) != len(data):
        raise ValueError(f"{features_name} and {labels_name} must have one entry a sample, got {len(data)} and {len(targets)}")
    if len(data) == 0:
        raise ValueError(f"{features_name} must not be empty")
    for first in range(0, len(data), _BLOCK_ROWS):
        check_finite(data[first : first + _BLOCK_ROWS], features_name, first_row=first)
    return data, targets


def _few_and_base_samples(head: AlphaNet, targets: Tensor) -> tuple[Tensor, Tensor]:
    few_classes = head.few_classes.cpu()
    counts = torch.bincount(targets, minlength=head.out_features)
    missing = few_classes[counts[few_classes] == 0]
    if len(missing):
        raise ValueError(f"labels has no sample of the few classes {format_ids(missing.tolist())}")
    is_few = torch.isin(targets, few_classes)
    return is_few.nonzero().flatten(), (~is_few).nonzero().flatten()


def _number_of_negatives(few: int, base: int, ratio: float) -> int:
    negatives = round(ratio * few)
    if negatives and not base:
        raise ValueError(f"labels has no sample of a base class, but negative_ratio={ratio:g} asks for {negatives}")
    if negatives > base:
        warnings.warn(
            f"negative_ratio={ratio:g} asks for {negatives} base samples an epoch, but there are {base}: they are drawn with "
            "replacement",
            stacklevel=3,
        )
    return negatives


def _check_optimizer(head: AlphaNet, optimizer: torch.optim.Optimizer) -> None:
    if head.first_layer == "factored" and not isinstance(optimizer, torch.optim.SGD):
        raise ValueError(
            f"optimizer must be torch.optim.SGD for a head with first_layer='factored', got {type(optimizer).__name__}: the "
            "factored form is exact for SGD only; make the head with first_layer='dense'"
        )


@contextmanager
def _progress_bar(progress: bool | None, epochs: int, done: int) -> Iterator[Callable[[dict[str, float]], None]]:
    console = Console(stderr=True)
    columns = (
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    shown = console.is_terminal if progress is None else progress
    with Progress(*columns, console=console, disable=not shown) as bar:
        task = bar.add_task("", total=epochs, completed=done)

        def report(entry: dict[str, float]) -> None:
            text = f"loss {entry['loss']:.3f}"
            if "all" in entry:
                text += f"  few {100 * entry['few']:.1f}  all {100 * entry['all']:.1f}"
            bar.update(task, advance=1, description=text)

        yield report
