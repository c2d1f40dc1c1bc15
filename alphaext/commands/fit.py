"""``alphaext fit``: an Alpha Net on cached features, its gamma chosen on validation features."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import Field, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..study.plans import POLICIES, check_policy
from ..study.plans import choose as choose_row
from ..training.options import OPTIONS, selection_score
from ..training.presets import PRESETS, preset_options
from ..utils.checks import check_gamma, format_ids
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
_UNSAID = {"none", "[]"}  # what the help itself says, or needs no word
_FitType = TypeVar("_FitType")


def _with_table(cls: type[_FitType]) -> type[_FitType]:
    """Give a command every option of the table; its help says what a preset makes of it where it is not given."""
    hints = {"int": int, "float": float, "bool": bool, "str": str, "Sequence[int]": tuple[int, ...]}
    for name in PRESETS["paper"]:
        entry = OPTIONS[name]
        values: dict[str, list[str]] = {}
        for preset, options in PRESETS.items():
            values.setdefault(json.dumps(options[name]).strip('"').replace("null", _NONE), []).append(preset)
        text = "; ".join(f"{', '.join(presets)}: {value}" for value, presets in values.items())
        if len(values) == 1:
            text = f"default: {next(iter(values))}"
        choices = entry.metadata["choices"]
        if _may_be_none(entry):
            choices = choices and (_NONE, *choices)
            text += "" if choices else "; 0 for none"
        hint: Any = hints[str(entry.type).removesuffix(" | None")]
        cls.__annotations__[name] = (tuple[hint, ...] if entry.metadata["several"] else hint) | None
        help = entry.metadata["help"] + (f" ({text})" if values.keys() - _UNSAID else "")
        setattr(cls, name, option(None, choices=choices, help=help))
    return cls


def _may_be_none(entry: Field[Any]) -> bool:
    """Whether no value at all can be asked for, against a preset that has one."""
    return str(entry.type).endswith("| None") and any(value is not None for value in entry.metadata["presets"].values())


@dataclass(frozen=True, kw_only=True)
@_with_table
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
        given = self.given()
        select, min_all = given.get("select"), given.get("min_all")
        if self.policy is not None and select is not None:
            raise ValueError(f"policy says how epochs are chosen too; got select={select!r} as well")
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
        if len(split.empty):
            ids = format_ids(split.empty.tolist())
            console.print(f"No training images of class {ids}: its row stays, and is nobody's neighbour.", highlight=False)
        # Without a bias in the file there would be no place for a constant: it must be asked for by name.
        own_bias: torch.Tensor | None = linear.bias
        no_constant = "few_bias" not in given and own_bias is None and PRESETS[self.preset]["few_bias"]
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
                    raise ValueError(f"{_named(run.config)}: {run.error}; --overwrite starts anew")
            run = runs[choose(runs, select, min_all, self.policy, self.max_drop)]
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
                "empty_classes": split.empty.tolist(),
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

        given = self.given()
        available = pool_size(split, given.get("pool", PRESETS[self.preset]["pool"]))
        common = preset_options(self.preset, pool_size=available, validation=constant)
        tried = [self.tried(name) if name in given else [common[name]] for name in _TRIED]
        for name, value in given.items():
            common[name] = None if _may_be_none(OPTIONS[name]) and value in (0, _NONE) else value
        return [{**common, "seed": self.seed, **dict(zip(_TRIED, each, strict=True))} for each in itertools.product(*tried)]

    def given(self) -> dict[str, Any]:
        """The options of the table that were given."""
        return {name: getattr(self, name) for name in PRESETS[self.preset] if getattr(self, name) is not None}

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


def _named(config: Mapping[str, Any]) -> str:
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
            console.print(f"{_named(candidate)}: {candidate['error']}", markup=False, highlight=False)
    console.print(f"Classifier: {folder / shared.CLASSIFIER}", markup=False, highlight=False, soft_wrap=True)
