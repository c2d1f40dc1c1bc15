"""``alphaext fit``: an Alpha Net on cached features, its gamma chosen on validation features."""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..head.choices import COEFFICIENTS, INITS, METRICS, POOLS, RULES
from ..study.plans import POLICIES, check_policy
from ..study.plans import choose as choose_row
from ..training.options import AUGMENTATIONS, NEGATIVE_SAMPLINGS, SCHEDULES, SELECTIONS, selection_score
from ..training.presets import PRESETS, preset_options
from ..utils.checks import check_gamma
from ..utils.files import whole_file
from ..utils.text import percent
from . import shared
from .options import option
from .shared import CommonOptions, FeaturesOptions, LayerOptions, SplitOptions

if TYPE_CHECKING:
    import torch

    from ..classes import ClassSplit
    from ..head.alphanet import AlphaNet
    from ..training.many import SweepRun

_CHECKPOINTS = ".alphaext-fit"  # nobody else's
_TRIED = ("gamma", "top_k", "rule")
_NONE = "none"


def of_preset(name: str, help: str, choices: Sequence[str] | None = None) -> Any:
    """An option that the preset says where it is not given, which its help tells."""
    values: dict[str, list[str]] = {}
    for preset, options in PRESETS.items():
        value = options[name]
        text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        values.setdefault(text, []).append(preset)
    told = "; ".join(f"{', '.join(presets)}: {value}" for value, presets in values.items())
    return option(None, choices=choices, help=f"{help} ({told if len(values) > 1 else f'default: {next(iter(values))}'})")


@dataclass(frozen=True, kw_only=True)
class Fit(CommonOptions, FeaturesOptions, SplitOptions, LayerOptions):
    """Rebuild the few rows of a classifier: train an Alpha Net on cached features and fold it.

    With several gammas each is trained, and validation features choose. Writes classifier.pth (a plain weight and bias),
    head.pt (the Alpha Net's state), result.json and run.json into the output folder.

    Example:
        alphaext fit --features features --classifier crt --output alpha-crt
    """

    section: ClassVar[str] = "fit"
    classifier: Path = option(help="the trained classifier: a checkpoint of any known layout, or a folder that a command wrote")
    output: Path = option(metavar="FOLDER", help="where results go")
    overwrite: bool = option(False, help="replace results that are there")
    preset: str = option(
        "few",
        choices=tuple(PRESETS),
        help="what all options below are where they are not given: what gains most, or exactly the paper's form",
    )
    gamma: tuple[float, ...] | None = of_preset("gamma", "the own coefficient's bound, up to 1; of several, validation chooses")
    coefficients: str | None = of_preset("coefficients", "a sub-module's outputs, or learned directly", COEFFICIENTS)
    top_k: tuple[int, ...] | None = of_preset("top_k", "neighbours of each few class; of several, validation chooses")
    pool: str | None = of_preset("pool", "classes that neighbours are chosen from", POOLS)
    metric: str | None = of_preset("metric", "what makes a neighbour near", METRICS)
    pca_dim: int | None = of_preset(
        "pca_dim", "width to which classifiers are reduced for the sub-modules; the paper: 500, Places-LT 300"
    )
    hidden_dim: int | None = option(None, help="hidden units of a sub-module; without, as wide as a reduced classifier")
    rule: tuple[str, ...] | None = of_preset("rule", "how outputs become coefficients; of several, validation chooses", RULES)
    init: str | None = of_preset("init", "start at the original classifier, or PyTorch's start", INITS)
    shared: bool | None = of_preset("shared", "one sub-module for all few classes")
    projected_gradient: bool | None = of_preset("projected_gradient", "let a clamped coefficient return; the paper does not")
    residual: int | None = of_preset("residual", "directions along which a few row may move besides, under direct coefficients")
    epochs: int | None = of_preset("epochs", "of training")
    batch_size: int | None = of_preset("batch_size", "samples a step")
    lr: float | None = of_preset("lr", "learning rate")
    momentum: float | None = of_preset("momentum", "of SGD")
    weight_decay: float | None = of_preset("weight_decay", "L2 penalty toward 0")
    regularize: float | None = of_preset("regularize", "L2 penalty toward the original classifier")
    nesterov: bool | None = of_preset("nesterov", "Nesterov momentum")
    lr_schedule: str | None = of_preset("lr_schedule", "how the learning rate falls", SCHEDULES)
    lr_step: int | None = of_preset("lr_step", "epochs between falls, under step")
    lr_factor: float | None = of_preset("lr_factor", "what a fall multiplies by")
    lr_milestones: tuple[int, ...] | None = option(None, help="epochs of the falls, under multistep")
    negative_ratio: float | None = of_preset("negative_ratio", "base samples for each few sample")
    negative_sampling: str | None = of_preset("negative_sampling", "how base samples are drawn", NEGATIVE_SAMPLINGS)
    samples_per_class: int | None = of_preset(
        "samples_per_class", "of every class in an epoch, instead of the two above; 0 for none"
    )
    augment: str | None = of_preset(
        "augment", "train few classes on samples drawn from near base classes", (_NONE, *AUGMENTATIONS)
    )
    augment_samples: int | None = of_preset("augment_samples", "drawn samples of each few class")
    augment_neighbors: int | None = of_preset("augment_neighbors", "base classes whose samples are borrowed")
    prior_correction: bool | None = of_preset("prior_correction", "train with the log of how often classes are drawn added")
    few_bias: bool | None = of_preset("few_bias", "add the constant to the few scores that validation features choose")
    select: str | None = option(
        None,
        choices=SELECTIONS,
        help="which epoch, and which gamma; without, best_all where there are validation features, else last",
    )
    min_all: float | None = option(None, help="under best_few: the least accuracy over all; without, the classifier's own")
    policy: str | None = option(
        None,
        choices=POLICIES,
        help="how validation features choose among several gammas, top_ks and rules: accuracy over all, accuracy of few with "
        "--max-drop, or the knee of the front of both; without, as epochs are chosen (--select)",
    )
    max_drop: float | None = option(None, metavar="POINTS", help="under policy best_few: what accuracy over all may lose; 0")

    def run(self, console: Console | None = None) -> dict[str, Any]:
        """Train, choose, write; returns what result.json holds."""
        from ..metrics.evaluation import split_metrics
        from ..metrics.predictions import predict
        from ..training.many import fit_many

        console, started = shared.console_or_quiet(console), time.monotonic()
        tried = {name: self.tried(name) for name in _TRIED}
        for name, values in tried.items():
            if not values:
                raise ValueError(f"{name} must be given at least one value, got none")
        check_policy(self.policy, self.max_drop)
        if self.policy is not None and self.select is not None:
            raise ValueError(f"policy says how epochs are chosen too; got select={self.select!r} as well")
        train, val = shared.read_train_and(self.features, "val", optional=True)
        several = [name for name, values in tried.items() if len(values) > 1]
        if val is None and (several or self.policy is not None):
            where = f"where there are no validation features to choose by; there is no {str(self.features / 'val')!r}"
            if not several:
                raise ValueError(f"policy must not be given {where}")
            raise ValueError(f"{several[0]} must be one value {where.replace(';', f', got {len(tried[several[0]])};', 1)}")
        linear = shared.read_classifier(self.classifier, train.num_classes, self.classifier_layer)
        shared.warn_of_other_features(linear, train if val is None else val, str(self.classifier))
        linear = linear.to(shared.choose_device(self.device))
        for gamma in tried["gamma"]:
            check_gamma(gamma)
        split = self.split(train)
        # Without a bias in the file there would be no place for a constant: it must be asked for by name.
        own_bias: torch.Tensor | None = linear.bias
        no_constant = self.few_bias is None and own_bias is None and PRESETS[self.preset]["few_bias"]
        if no_constant:
            console.print(
                "The classifier has no bias: no constant is added to the few scores (--few-bias does).", highlight=False
            )
        configurations = self.configurations(split, val is not None and not no_constant)
        if val is not None and self.policy is not None:
            selection: dict[str, Any] = {"select": "best_all"}
            if self.policy == "best_few":
                own = split_metrics(predict(linear, val.features, val.labels, progress=False), split)["all"]
                selection = {"select": "best_few", "min_all": max(0.0, own - (self.max_drop or 0.0) / 100)}
            for configuration in configurations:
                # Epochs are measured without a constant that is yet to come: then the last is taken.
                configuration |= {} if configuration["few_bias"] and self.policy != "best_few" else selection
        with shared.output_folder(self.output, shared.CLASSIFIER, shared.HEAD, overwrite=self.overwrite) as folder:
            if self.overwrite:
                shutil.rmtree(folder.path / _CHECKPOINTS, ignore_errors=True)
            runs = fit_many(
                linear,
                train.features,
                train.labels,
                configurations,
                val_features=None if val is None else val.features,
                val_labels=None if val is None else val.labels,
                split=split,
                checkpoint=folder.path / _CHECKPOINTS,
                progress=self.progress,
            )
            for run in runs:
                if run.error and not run.error.startswith("training diverged"):
                    raise ValueError(f"{_told(run.config)}: {run.error}; --overwrite starts anew")
            run = runs[choose(runs, self.select, self.min_all, self.policy, self.max_drop)]
            assert run.head is not None and run.result is not None
            result = {
                "preset": self.preset,
                "options": run.config,
                **{name: run.config[name] for name in _TRIED},
                "few_bias": run.result.few_bias,
                "chosen_on": None if val is None else "val",
                "policy": self.policy,
                "selection": run.result.selection,
                "epoch": run.result.selected_epoch,
                "engine": run.result.engine,
                "before": run.result.metrics_before,
                "after": run.result.metrics_after,
                "clamped": run.result.clamped,
                "candidates": [_candidate(entry) for entry in runs],
                "few_classes": run.head.few_classes.tolist(),
                "members": run.head.members.tolist(),
                "alphas": run.head.alphas().tolist(),
                "history": run.result.history,
            }
            folder.clear()
            _save(run.head, folder.path)
            shared.write_results(folder.path, "fit", self, result, started)
            shutil.rmtree(folder.path / _CHECKPOINTS, ignore_errors=True)
        _print(console, self, result, self.output)
        return result

    def configurations(self, split: ClassSplit, constant: bool) -> list[dict[str, Any]]:
        """A configuration of :func:`alphaext.fit_many` for each gamma, number of neighbours and rule to try.

        ``constant``: whether a preset's constant on the few scores can be chosen and kept.
        """
        from ..head.neighbors import pool_size

        available = pool_size(split, self.pool or PRESETS[self.preset]["pool"])
        common = preset_options(self.preset, pool_size=available, validation=constant)
        names = (*(name for name in common if name not in _TRIED), *("hidden_dim", "lr_milestones", "select", "min_all"))
        common |= {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        common["augment"] = None if common["augment"] == _NONE else common["augment"]
        common["samples_per_class"] = common["samples_per_class"] or None
        tried = [[common[name]] if getattr(self, name) is None else self.tried(name) for name in _TRIED]
        return [{**common, "seed": self.seed, **dict(zip(_TRIED, each, strict=True))} for each in itertools.product(*tried)]

    def tried(self, name: str) -> list[Any]:
        """The values to try of ``gamma``, ``top_k`` or ``rule``."""
        given = getattr(self, name)
        return list(dict.fromkeys((PRESETS[self.preset][name],) if given is None else given))


def choose(
    runs: list[SweepRun], select: str | None, min_all: float | None, policy: str | None = None, max_drop: float | None = None
) -> int:
    """Which of several trainings is best by the policy, or by what chose their epochs; of equal ones the largest gamma.

    Raises:
        FloatingPointError: all of them diverged.
    """
    if policy is not None and any(run.result is not None for run in runs):
        return _choose_by_policy(runs, policy, max_drop)

    def score(run: SweepRun) -> tuple[float, float]:
        if run.result is None:
            return -math.inf, 0.0
        before, after = run.result.metrics_before, run.result.metrics_after
        if before is None or after is None or select == "last":
            return (0.0 if after is None else after["all"]), run.config["gamma"]
        bound = before["all"] if min_all is None else min_all
        return selection_score(select or "best_all", after, bound), run.config["gamma"]

    best = max(range(len(runs)), key=lambda number: score(runs[number]))
    if runs[best].result is None:
        raise FloatingPointError("; ".join(dict.fromkeys(run.error for run in runs)))
    return best


def _choose_by_policy(runs: list[SweepRun], policy: str, max_drop: float | None) -> int:
    numbers = sorted(range(len(runs)), key=lambda number: -runs[number].config["gamma"])  # nearest to no change first
    rows = []
    for number in numbers:
        result = runs[number].result
        if result is not None and result.after is not None:
            rows.append({"number": number, "val_few": result.after["few"], "val_all": result.after["all"]})
    before = next(run.result.before for run in runs if run.result is not None and run.result.before is not None)
    return int(choose_row(rows, policy, max_drop, original={"val_all": before["all"]})["number"])


def _told(config: Mapping[str, Any]) -> str:
    return f"gamma {config['gamma']:g}, top_k {config['top_k']}, rule {config['rule']}"


def _candidate(run: SweepRun) -> dict[str, Any]:
    tried = {name: run.config[name] for name in _TRIED}
    if run.result is None:
        return {**tried, "error": run.error}
    return {
        **tried,
        "epoch": run.result.selected_epoch,
        "after": run.result.after,
        "clamped": run.result.clamped,
    }


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _save(head: AlphaNet, folder: Path) -> None:
    import torch

    from ..checkpoints import save_linear

    save_linear(head.fold(), folder / shared.CLASSIFIER, overwrite=True)
    with whole_file(folder / shared.HEAD) as file:
        torch.save({name: value.cpu() for name, value in head.state_dict().items()}, file)


def _print(console: Console, options: Fit, result: dict[str, Any], folder: Path) -> None:
    if result["before"] is not None:
        table = Table(title="Top-1 accuracy on validation features, %")
        for name in ("", "few", "medium", "many", "all"):
            table.add_column(name, justify="left" if not name else "right")
        rows = [
            (shared.classifier_name(options.classifier), result["before"]),
            (f"Alpha Net, gamma {result['gamma']:g}", result["after"]),
        ]
        for name, metrics in rows:
            table.add_row(Text(name), *(percent(metrics[split]) for split in ("few", "medium", "many", "all")))
        console.print(table)
        if len(result["candidates"]) > 1:
            several = [name for name in _TRIED if len({candidate[name] for candidate in result["candidates"]}) > 1]
            for name in several:
                values = ", ".join(dict.fromkeys(_value(candidate[name]) for candidate in result["candidates"]))
                by = result["policy"] or result["selection"]
                console.print(f"{name} {_value(result[name])} chosen of {values} by {by}", highlight=False)
    for candidate in result["candidates"]:
        if "error" in candidate:
            console.print(f"{_told(candidate)}: {candidate['error']}", markup=False, highlight=False)
    console.print(f"Classifier: {folder / shared.CLASSIFIER}", markup=False, highlight=False, soft_wrap=True)
