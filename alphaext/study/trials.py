"""The Alpha Nets of a study: which are trained together, on what, and how they are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..classes import ClassSplit
from ..features.store import Features
from ..head.alphanet import AlphaNet
from ..head.choices import POOLS
from ..head.neighbors import pool_size
from ..metrics.evaluation import expected_calibration_error, split_metrics
from ..metrics.predictions import predict
from ..training import cached_logits
from ..training.many import SweepRun, fit_many
from ..training.options import HeadOptions
from ..training.result import FitResult
from ..utils.checks import check_integer
from ..utils.files import without_nan
from ..utils.progress import task_bar
from ..utils.seeds import seeded_generator
from ..utils.tensors import as_tensor
from .plans import CANDIDATES, CONFIGURATION, FORM_NAMES, Configuration, StudyOptions, Trial, plan
from .rows import MEASURES, ORIGINAL, ResultsFile, Row, make_row, row_key

CHECKPOINTS = ".alphaext-study"  # nobody else's

# All heads of one call exist at once, each with its momentum and the parameters of its best epoch.
_MOST_HEAD_BYTES = 1 << 30
_OF_A_TRAINING = (
    *("epoch", "clamped", "seconds", "parameter_bytes", "dense_parameter_bytes", "error"),
    *(f"{part}_{metric}" for part in ("val", "test") for metric in MEASURES),
)

Training = tuple[Configuration, int | None]


def cut_few_samples(labels: Tensor, few: Tensor, most: int, seed: int, *, passes: int = 1) -> Tensor:
    """Return which rows of training features stay when each few class keeps at most ``most`` of its images.

    Which images a class keeps depends on the seed and the class alone, and of two cuts the smaller one keeps a part of what
    the larger one keeps.

    Args:
        labels: int64 [n], the class of each row.
        few: ids of the few classes.
        most: images that each keeps at most, at least 1.
        seed: of the choice.
        passes: rows of each image, as :attr:`alphaext.features.Features.passes`; an image's rows stay or go together.

    Returns:
        int64, ascending, rows that stay; those of other classes all do.

    Raises:
        TypeError, ValueError: ``most`` below 1.

    Example:
        >>> cut_few_samples(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1]), most=1, seed=0)[:3]
        tensor([0, 1, 2])
    """
    most = check_integer(most, "most", minimum=1)
    of_images = labels[: len(labels) // passes]
    stays = torch.ones(len(of_images), dtype=torch.bool, device="cpu")
    for own in few.tolist():
        images = (of_images == own).nonzero().flatten()
        order = torch.randperm(len(images), generator=seeded_generator(seed, own), device="cpu")
        stays[images[order[most:]]] = False
    return stays.repeat(passes).nonzero().flatten()


class Problem:
    """A classifier and features that a study is about, and the results so far.

    Attributes:
        options: the study's.
        linear: the original classifier.
        parts: the features of train, val and test.
        split: which classes are few, medium and many.
        name: what the classifier is called in results.
        file: the results.
        progress: whether to show progress bars.
    """

    def __init__(
        self,
        options: StudyOptions,
        linear: nn.Linear,
        parts: Mapping[str, Features],
        split: ClassSplit,
        name: str,
        file: ResultsFile,
        progress: bool | None,
    ) -> None:
        self.options, self.linear, self.parts, self.split = options, linear, parts, split
        self.name, self.file, self.progress = name, file, progress
        for row in file.rows.values():
            row["classifier"] = name
        self.original = self.found(self.row(ORIGINAL, ORIGINAL))
        """The row of the original classifier; :meth:`measure_original` fills it."""

    def measure_original(self) -> None:
        """Measure the original classifier, against which all others stand."""
        if self.original["val_all"] is None:
            self.original = self.original | self.measured(self.linear)
            self.file.add(self.original)

    def row(self, experiment: str, method: str, **values: Any) -> Row:
        """A row of these results."""
        return make_row(experiment=experiment, method=method, classifier=self.name, **values)

    def found(self, row: Row) -> Row:
        """The row of the same key that the results have, or else this one, nothing measured yet."""
        return self.file.rows.get(row_key(row), row)

    def measured(self, classifier: nn.Module) -> dict[str, Any]:
        """All metrics of a classifier on validation and test samples."""
        found: dict[str, float] = {}
        for part in ("val", "test"):
            predictions = predict(classifier, self.parts[part].features, self.parts[part].labels, progress=False)
            errors = expected_calibration_error(predictions, self.split)
            found |= {f"{part}_{name}": value for name, value in split_metrics(predictions, self.split).items()}
            found |= {f"{part}_{name}_calibration_error": value for name, value in errors.items()}
        return without_nan(found)

    def measuring(self, total: int) -> AbstractContextManager[Callable[[], None]]:
        """A progress bar over classifiers; it is given a function to call after each."""
        return task_bar(self.progress, "classifiers measured", total=total)

    @cached_property
    def class_means(self) -> Tensor:
        """The mean feature of each class over all training samples."""
        return self.parts["train"].class_means()

    def selection(self) -> dict[str, Any]:
        """The policy for what chooses among many candidates by itself; "knee" compares only those that are left."""
        if self.options.policy != "best_few":
            return {"select": "best_all"}
        return {"select": "best_few", "min_all": max(0.0, self.original["val_all"] - (self.options.max_drop or 0.0) / 100)}


class Trainings:
    """The trainings of a study.

    Args:
        problem: what is trained on.
        folder: where checkpoints go.
        jobs: trainings at a time; None for one a core.
    """

    def __init__(self, problem: Problem, folder: Path, jobs: int | None) -> None:
        self.problem, self.options, self.split = problem, problem.options, problem.split
        self.folder, self.jobs = folder, jobs
        most = {pool: min(len(self.split.base), pool_size(self.split, pool)) for pool in POOLS}
        self.trials = plan(problem.options, most)
        self._heads: dict[Training, AlphaNet] = {}
        # One of them may be the chosen one, whose classes are shown.
        self._kept = {trial.training for trial in self.candidates(self.options.forms[0], self.options.first_seed)}

    def run(self) -> None:
        """Train and measure all trials that the results do not have yet."""
        known = self._known()
        known |= {t.training: {"error": error} for t in self.trials if (error := self._why_impossible(t.configuration))}
        waiting: dict[Training, list[Trial]] = {}
        for trial in self.trials:
            if trial.training in known:
                self._add(trial, known[trial.training])
            else:
                waiting.setdefault(trial.training, []).append(trial)
        # Of all there are: a study that goes on makes the calls that it would have made, for the last bits of a training's
        # logits may depend on the others of its call. (Before any of a call is measured all of it is trained.)
        possible = dict.fromkeys(t.training for t in self.trials if not self._why_impossible(t.configuration))
        for call in self._calls(list(possible)):
            trainings = [training for training in call if training in waiting]
            if not trainings:
                continue
            runs = self.train(trainings)
            with self.problem.measuring(len(runs)) as advance:
                for training in trainings:
                    result = self._result_of(training, runs.pop(training))
                    for trial in waiting[training]:
                        self._add(trial, result)
                    advance()

    def candidates(self, form: str, seed: int) -> list[Trial]:
        """The trials that "compare" chooses among, the largest gamma first, which changes least."""
        found = [
            trial
            for trial in self.trials
            if (trial.experiment, trial.method, trial.seed) == (CANDIDATES, FORM_NAMES[form], seed)
        ]
        return sorted(found, key=lambda trial: -trial.configuration.head.gamma)

    def row(self, trial: Trial, values: Mapping[str, Any] | None = None) -> Row:
        """The row of a trial."""
        cells = trial.configuration.cells() | dict(values or {})
        return self.problem.row(trial.experiment, trial.method, seed=trial.seed, **cells)

    def head(self, trial: Trial) -> AlphaNet:
        """The trained head of one of the first seed's candidates; trained again if its results are of an earlier run."""
        if trial.training not in self._heads:
            self._heads[trial.training] = _trained(self.train([trial.training])[trial.training])[0]
        return self._heads[trial.training]

    def train(self, trainings: Sequence[Training]) -> dict[Training, SweepRun]:
        """Train configurations that see the same samples."""
        configuration, seed = trainings[0]
        data, val = self.problem.parts["train"], self.problem.parts["val"]
        features, labels, few_samples = as_tensor(data.features, "features"), data.labels, configuration.few_samples
        name = "all"
        if few_samples is not None:
            own_seed = self._seed_of(seed)
            rows = cut_few_samples(labels, self.split.few, few_samples, own_seed, passes=data.passes)
            features, labels = features.index_select(0, rows), labels.index_select(0, rows)
            name = f"few-{few_samples}-seed-{own_seed}"
        checkpoints = self.folder / CHECKPOINTS / name
        checkpoints.mkdir(parents=True, exist_ok=True)
        runs = fit_many(
            self.problem.linear,
            features,
            labels,
            [self._options_of(*training) for training in trainings],
            val_features=val.features,
            val_labels=val.labels,
            split=self.split,
            means=self.problem.class_means if few_samples is None else None,
            jobs=self.jobs,
            checkpoint=checkpoints,
            progress=self.problem.progress,
        )
        return dict(zip(trainings, runs, strict=True))

    def _known(self) -> dict[Training, dict[str, Any]]:
        """What the results say of trainings, whichever experiment asked for them."""
        return {
            (Configuration.of(**{name: row[name] for name in CONFIGURATION}), row["seed"]): {
                name: row[name] for name in _OF_A_TRAINING
            }
            for row in self.problem.file.rows.values()
            if row["top_k"] is not None
        }

    def _add(self, trial: Trial, values: Mapping[str, Any]) -> None:
        row = self.row(trial, values)
        if self.problem.file.rows.get(row_key(row)) != row:
            self.problem.file.add(row)

    def _why_impossible(self, configuration: Configuration) -> str:
        """Why there are not neighbours enough, or nothing; one such configuration must not stop a study."""
        head = configuration.head
        available = pool_size(self.split, head.pool)
        if head.top_k <= available:
            return ""
        return f"not trained: top_k={head.top_k}, but there are {available} classes in the pool {head.pool!r}"

    def _calls(self, trainings: Sequence[Training]) -> Iterator[list[Training]]:
        """The trainings of each call of :func:`alphaext.fit_many`: as many as see the same samples and fit into memory."""
        weight = self.problem.linear.weight
        columns = 2 * len(weight)  # under l1 a class's logits are kept with and without bias
        together = len(self.problem.parts["train"]) * columns * weight.element_size() <= cached_logits.CACHE_BYTES
        groups: dict[tuple[Any, ...], list[Training]] = {}
        for configuration, seed in trainings:
            head, few_samples = configuration.head, configuration.few_samples
            cut = () if few_samples is None else (few_samples, seed)
            neighbors = () if together else (head.pool, head.metric, head.rule == "l1")
            groups.setdefault((cut, neighbors), []).append((configuration, seed))
        for group in groups.values():
            ends = np.cumsum([self._head_bytes(configuration.head) for configuration, _ in group])
            start = 0
            while start < len(group):
                held = ends[start - 1] if start else 0
                stop = max(start + 1, int(np.searchsorted(ends, held + _MOST_HEAD_BYTES, side="right")))
                yield group[start:stop]
                start = stop

    def _head_bytes(self, head: HeadOptions) -> int:
        weight, members = self.problem.linear.weight, head.top_k + 1
        reduced = min(self.options.pca_dim or weight.shape[1], *weight.shape)
        # The fixed input; then both layers' parameters, their momentum, and the best epoch's.
        numbers = members * reduced + 3 * (members + 1) * reduced
        if head.coefficients == "direct":
            numbers = 3 * (members + head.residual)
        return len(self.split.few) * numbers * weight.element_size()

    def _seed_of(self, seed: int | None) -> int:
        return self.options.first_seed if seed is None else seed

    def _options_of(self, configuration: Configuration, seed: int | None) -> dict[str, Any]:
        own = {"seed": self._seed_of(seed), "neighbor_seed": self._seed_of(seed), "pca_dim": self.options.pca_dim}
        own["keep_original"] = False  # it is the trained that is measured
        options = {name: value for name, value in configuration.cells().items() if name != "few_samples"} | own
        selection = self.problem.selection()
        # Epochs are measured without the constant that is yet to come: fit then takes the last.
        last = configuration.training.few_bias and selection["select"] == "best_all"
        return options if last else options | selection

    def _result_of(self, training: Training, run: SweepRun) -> dict[str, Any]:
        if run.error.startswith("training diverged"):
            return {"error": run.error}
        head, result = _trained(run)
        if training in self._kept:
            self._heads[training] = head
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        return {
            "epoch": result.selected_epoch,
            "clamped": result.clamped,
            "seconds": result.seconds,
            "parameter_bytes": sum(parameter.numel() * parameter.element_size() for parameter in trained),
            "dense_parameter_bytes": _dense_bytes(head),
            **self.problem.measured(head.fold()),
        }


def _trained(run: SweepRun) -> tuple[AlphaNet, FitResult]:
    if run.head is None or run.result is None:
        raise ValueError(f"{run.config}: {run.error}; with overwrite the study starts anew")
    return run.head, run.result


def _dense_bytes(head: AlphaNet) -> int:
    """What the sub-modules' two layers hold as the paper has them, weights and biases (a factored head holds less)."""
    networks, members, hidden = head.w2.shape
    numbers = networks * ((head.z.shape[1] + 1) * hidden + members * (hidden + 1))
    if head.coefficients == "direct":
        numbers = head.b2.numel() + (0 if head.residual is None else head.residual.numel())
    return int(numbers * head.w2.element_size())
