"""Training many heads on the same features, side by side: one core each, sharing all that is computed from features."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..classes import ClassSplit
from ..head.alphanet import AlphaNet
from ..utils.checks import check_integer
from ..utils.progress import task_bar
from ..utils.tensors import LabelledFeatures, TensorLike
from .builder import Builder
from .native_engine import NativeEngine, SharedLogits
from .native_group import EngineGroup, group_key
from .options import read_options
from .result import FitResult
from .single import Run


@dataclass
class SweepRun:
    """A configuration of :func:`fit_many`, and its result.

    Attributes:
        config: the configuration, as it was given.
        head: the trained head, or None if the training failed.
        result: what :func:`alphaext.fit` would return, or None.
        error: why it failed, or empty.

    Example:
        >>> labels = torch.arange(4).repeat_interleave(torch.tensor([30, 30, 30, 5]))
        >>> runs = fit_many(nn.Linear(8, 4), torch.randn(95, 8), labels, [{"gamma": 0.7, "top_k": 2, "epochs": 1}])
        >>> runs[0].config["gamma"], runs[0].head.top_k, runs[0].error
        (0.7, 2, '')
    """

    config: dict[str, Any]
    head: AlphaNet | None
    result: FitResult | None
    error: str


def fit_many(
    linear: nn.Module,
    features: TensorLike | LabelledFeatures,
    labels: TensorLike | None,
    configs: Sequence[Mapping[str, Any]],
    *,
    val_features: TensorLike | LabelledFeatures | None = None,
    val_labels: TensorLike | None = None,
    few_below: int = 20,
    many_above: int = 100,
    split: ClassSplit | None = None,
    few_classes: TensorLike | None = None,
    means: TensorLike | None = None,
    jobs: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> list[SweepRun]:
    """Make and train one head a configuration, all on the same classifier and features.

    The logits that trainings need are computed once for all of them. Each runs on one core in the native engine, and gives to
    the bit what :func:`alphaext.fit` gives alone.

    Args:
        linear: the trained classifier, such as ``nn.Linear``; see :meth:`AlphaNet.from_linear`.
        features: ``[n, D]``, the training features; class counts, class means and samples come from them.
        labels: ``[n]`` integers, where ``features`` is no :class:`alphaext.features.Features`, which has its labels.
        configs: one mapping a head, with any options of :class:`alphaext.training.HeadOptions` and
            :class:`alphaext.training.TrainingOptions` (docs/reference/options.md). ``seed`` is that of the weights and of the
            samples.
        val_features: ``[m, D]`` or features likewise, with ``val_labels``.
        val_labels: ``[m]`` integers.
        few_below: a class with fewer training samples is few; 20 in the paper.
        many_above: a class with more training samples is many; 100 in the paper.
        split: which classes are few, medium and many, instead of these two: where samples are not images one by one.
        few_classes: ids of the few classes, however many samples they have, instead of ``few_below``; or
            names, where ``features`` have such.
        means: ``[N, D]``, mean training feature of each class, if at hand.
        jobs: trainings at a time; default one a core.
        checkpoint: a directory for one checkpoint a configuration; trainings found there are not run again.
        progress: show a progress bar; None shows it where standard error is a terminal.

    Returns:
        A :class:`SweepRun` for each configuration, in their order. One that diverges says so in ``error`` and stops no other.

    Raises:
        ValueError, TypeError: for a configuration out of range, naming it, before any training.
        KeyboardInterrupt: passed on; what was finished is in the checkpoints.

    Example:
        >>> linear, labels = nn.Linear(8, 4), torch.arange(4).repeat_interleave(torch.tensor([30, 30, 30, 5]))
        >>> configs = [dict(gamma=gamma, top_k=2, epochs=2) for gamma in (0.5, 0.9)]
        >>> [run.head.gamma for run in fit_many(linear, torch.randn(95, 8), labels, configs)]
        [0.5, 0.9]
    """
    directory = _check_directory(checkpoint)
    workers = _cores() if jobs is None else check_integer(jobs, "jobs", minimum=1)
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
        means=means,
    )
    trainings: list[_Training] = []
    for number, config in enumerate(configs):
        try:
            run = Run(*builder.prepare(config), builder.split)
        except (ValueError, TypeError) as error:
            raise type(error)(f"configs[{number}]: {error}") from error
        path = _path(directory, run.head, config, {training.path for training in trainings})
        trainings.append(_Training(run, path, SweepRun(dict(config), None, None, "")))
    groups: dict[object, list[_Training]] = {}
    for training in trainings:
        groups.setdefault(_logits_key(training.run), []).append(training)
    with task_bar(progress, "epochs of all trainings", total=sum(t.run.options.epochs for t in trainings)) as report:
        for group in groups.values():
            _train_all(group, workers, report)
    return [training.outcome for training in trainings]


def _logits_key(run: Run) -> object:
    """What trainings must have in common to share their logits."""
    options = run.options
    drawn = (options.augment, options.augment_samples, options.augment_neighbors, options.seed) if options.augment else None
    balanced = options.samples_per_class is not None or options.negative_sampling == "class_balanced"
    return drawn, balanced if options.prior_correction else None, run.head.num_directions


@dataclass(eq=False)
class _Training:
    run: Run
    path: Path | None
    outcome: SweepRun

    def end(self, started: float) -> None:
        """Note what came of it, and give its engine's memory back."""
        self.outcome.result = self.run.result("", time.monotonic() - started)
        self.outcome.head = self.run.head
        self.run.release()


class _Stopped(Exception):
    """Another training was interrupted."""


def _train_all(trainings: list[_Training], workers: int, report: Callable[..., None]) -> None:
    """Carry out trainings that share their logits."""
    runs = [training.run for training in trainings]
    epochs = range(1, max(run.options.epochs for run in runs) + 1)
    samplers = [run.data.sampler for run in runs]
    logits = SharedLogits([run.head for run in runs], runs[0].data, epochs, samplers, runs[0].options.prior_correction)
    if logits.device.type == "cuda" and logits.all_at_once:
        _train_side_by_side(trainings, logits, report)
        return
    if not logits.all_at_once:
        workers = 1  # the rows of base samples are one epoch's: trainings take turns
    stop = threading.Event()

    def advance(epochs: int = 1, **_: object) -> None:
        report(epochs)
        if stop.is_set():
            raise _Stopped

    def train(training: _Training) -> None:
        started, run = time.monotonic(), training.run
        try:
            advance(0)
            run.prepare(training.path, logits=logits)
            advance(len(run.history) - 1)
            run.train(training.path, advance)
            training.end(started)
        except (FloatingPointError, ValueError) as error:  # it diverged, or its checkpoint is of something else
            training.outcome.error = str(error)

    with ThreadPoolExecutor(workers, thread_name_prefix="alphaext") as pool:
        pending = {pool.submit(train, training) for training in trainings}
        try:
            while pending:
                # Woken now and then, so that Ctrl-C reaches this thread while the others work.
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _train_side_by_side(trainings: list[_Training], logits: SharedLogits, report: Callable[..., None]) -> None:
    """Train together what has equal sizes and equally many epochs left: on a GPU an epoch of all of them is one launch."""
    started = time.monotonic()
    groups: dict[tuple[object, ...], list[_Training]] = {}
    for training in trainings:
        run = training.run
        try:
            run.prepare(training.path, logits=logits)
        except ValueError as error:
            training.outcome.error = str(error)
            continue
        report(len(run.history) - 1)
        assert isinstance(run.engine, NativeEngine)
        groups.setdefault((len(run.history), run.options.epochs, *group_key(run.engine)), []).append(training)
    for members in groups.values():
        _train_group(members, report)
    for training in (training for training in trainings if not training.outcome.error):
        try:
            training.end(started)
        except FloatingPointError as error:
            training.outcome.error = str(error)


def _train_group(trainings: list[_Training], report: Callable[..., None]) -> None:
    runs = [training.run for training in trainings]
    group = EngineGroup([run.engine for run in runs if isinstance(run.engine, NativeEngine)])
    try:
        for epoch in range(len(runs[0].history), runs[0].options.epochs + 1):
            losses = group.train(epoch, [run.options.lr_multiplier(epoch) for run in runs])
            for training, loss in zip(trainings, losses, strict=True):
                if training.outcome.error:
                    continue  # it is trained on, on numbers that are none, because the others are
                try:
                    training.run.end_epoch(loss, training.path)
                except FloatingPointError as error:
                    training.outcome.error = str(error)
                report()
    finally:
        for run in runs:
            run.finish()


def _path(directory: Path | None, head: AlphaNet, config: Mapping[str, Any], taken: set[Path | None]) -> Path | None:
    """The checkpoint of a configuration: the same however it is written, another for each that is given twice."""
    if directory is None:
        return None
    of_head, options = read_options(config)
    chosen = asdict(of_head) | asdict(options) | {"head": repr(head)}
    if of_head.metric != "random":
        del chosen["neighbor_seed"]  # it changes nothing
    text = json.dumps(chosen, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    paths = (directory / f"{name}{'' if number == 0 else f'-{number}'}.pt" for number in itertools.count())
    return next(path for path in paths if path not in taken)


def _check_directory(checkpoint: str | os.PathLike[str] | None) -> Path | None:
    if checkpoint is None:
        return None
    directory = Path(checkpoint)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"checkpoint must be a directory, got the file {str(directory)!r}")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
