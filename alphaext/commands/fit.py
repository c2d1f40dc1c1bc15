"""``alphaext fit``: an Alpha Net on cached features, its gamma chosen on validation features."""

from __future__ import annotations

import itertools
import json
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import Field, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

import alphaext

from ..study.plans import POLICIES, check_policy
from ..training.options import OPTIONS, selection_score
from ..training.presets import PRESETS, PRESETS_AND_ALL, preset_options
from ..utils.checks import check_number, format_ids
from ..utils.text import percent, value_text
from . import results
from .options import from_table, option, type_of
from .shared import ClassifierOptions, CommonOptions, FeaturesOptions, FewClassesOptions, OutputOptions

if TYPE_CHECKING:
    import torch

_CHECKPOINTS = ".alphaext-fit"  # nobody else's
_TRIED = ("gamma", "top_k", "rule")
_NONE = "none"
_UNSAID = {"none", "[]"}  # what the help itself says, or needs no word


def _tried_or_given(entry: Field[Any]) -> tuple[Any, Any]:
    """The flag of an option of the table; its help says what a preset makes of it where it is not given."""
    values: dict[str, list[str]] = {}
    for preset, options in PRESETS.items():
        values.setdefault(json.dumps(options[entry.name]).strip('"').replace("null", _NONE), []).append(preset)
    text = "; ".join(f"{', '.join(presets)}: {value}" for value, presets in values.items())
    if len(values) == 1:
        text = f"default: {next(iter(values))}"
    choices = entry.metadata["choices"]
    if _may_be_none(entry):
        choices = choices and (_NONE, *choices)
        text += "" if choices else "; 0 for none"
    help = entry.metadata["help"] + (f" ({text})" if values.keys() - _UNSAID else "")
    kind: Any = type_of(entry)
    return (tuple[kind, ...] if entry.metadata["several"] else kind) | None, option(None, choices=choices, help=help)


def _may_be_none(entry: Field[Any]) -> bool:
    """Whether no value at all can be asked for, against a preset that has one."""
    return str(entry.type).endswith("| None") and any(value is not None for value in entry.metadata["presets"].values())


@dataclass(frozen=True, kw_only=True)
@from_table([OPTIONS[name] for name in PRESETS["paper"]], _tried_or_given)
class Fit(CommonOptions, FeaturesOptions, FewClassesOptions, OutputOptions, ClassifierOptions):
    """Rebuild the few rows of a classifier: train an Alpha Net on cached features and fold it.

    With several gammas each is trained, and validation features choose. Writes classifier.pth (a plain weight and bias),
    head.pt (the Alpha Net's state; preset all writes none), result.json and run.json into the output folder.

    Example:
        alphaext fit --features features --classifier crt --output alpha-crt
    """

    section: ClassVar[str] = "fit"
    goes_on: ClassVar[bool] = True
    preset: str = option(
        "few",
        choices=PRESETS_AND_ALL,
        help="what all options below are where they are not given: what gains most, or the paper's form, but that epoch 0 and "
        "the original classifier take part in the choice of the epoch; all: preset few averaged with the discriminant "
        "and balanced re-training, which may change every row",
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
        console, started = results.console_or_quiet(console), time.monotonic()
        tried = {name: self.tried(name) for name in _TRIED}
        check_policy(self.policy, self.max_drop)
        for gamma in tried["gamma"]:
            check_number(gamma, "gamma", above=0, maximum=1)
        given = self.given()
        select, min_all = given.get("select"), given.get("min_all")
        if self.policy is not None and select is not None:
            raise ValueError(f"policy says how epochs are chosen too; got select={select!r} as well")
        train, val = self.read_train_and_val()
        several = [name for name, values in tried.items() if len(values) > 1]
        if val is None and (several or self.policy is not None):
            wrong = f"{several[0]} must be one value" if several else "policy must not be given"
            got = f", got {len(tried[several[0]])}" if several else ""
            raise ValueError(
                f"{wrong} where there are no validation features to choose by{got}; there is no {str(self.features / 'val')!r}"
            )
        if several and self.preset == "all":
            raise ValueError(f"{several[0]} must be one value with preset 'all', got {len(tried[several[0]])}")
        linear, path = self.classifier_or_checkpoint(self.classifier, train.num_classes)
        known = train if val is None else val
        self.refuse_chance(results.knows_features(linear, known, str(path)))
        linear = linear.to(self.chosen_device())
        split = self.split_to_repair(train)
        if len(split.empty):
            ids = format_ids(split.empty.tolist())
            console.print(f"No training images of class {ids}: its row stays, and is nobody's neighbour.", highlight=False)
        # Without a bias in the file there would be no place for a constant: it must be asked for by name.
        own_bias: torch.Tensor | None = linear.bias
        no_constant = "few_bias" not in given and own_bias is None and PRESETS[self.of_few_rows]["few_bias"]
        if no_constant:
            console.print(
                "The classifier has no bias: no constant is added to the few scores (--few-bias does).", highlight=False
            )
        configurations = self.configurations(split, val is not None and not no_constant)
        if val is not None and self.policy is not None:
            selection: dict[str, Any] = {"select": "best_all"}
            if self.policy == "best_few":
                predictions = alphaext.metrics.predict(linear, val.features, val.labels, progress=False)
                own = alphaext.metrics.split_metrics(predictions, split)["all"]
                selection = {"select": "best_few", "min_all": max(0.0, own - (self.max_drop or 0.0) / 100)}
            for configuration in configurations:
                # Epochs are measured without a constant that is yet to come: then the last is taken.
                configuration |= {} if configuration["few_bias"] and self.policy != "best_few" else selection
        files = (results.CLASSIFIER, results.HEAD)
        with results.output_folder(self.output, self, *files, overwrite=self.overwrite, started=started) as folder:
            checkpoints = folder.path / _CHECKPOINTS
            if self.overwrite:
                shutil.rmtree(checkpoints, ignore_errors=True)
            data: dict[str, Any] = {"val_features": val, "split": split, "progress": self.progress}
            if self.preset == "all":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", alphaext.training.AlphaNetWarning)  # the notes are printed
                    made = alphaext.repair(linear, train, **data, preset="all", **configurations[0])
                runs = [alphaext.training.SweepRun(configurations[0], made.head, made.result, "")]
            else:
                runs = alphaext.fit_many(linear, train, None, configurations, **data, checkpoint=checkpoints)
            for run in runs:
                if run.error and not run.error.startswith("training diverged"):
                    raise ValueError(f"{_named(run.config)}: {run.error}; --overwrite starts anew")
            run = runs[best_run(runs, select, min_all, self.policy, self.max_drop)]
            head, trained = run.head, run.result
            assert head is not None and trained is not None
            result = {
                "preset": self.preset,
                "options": run.config,
                **{name: run.config[name] for name in _TRIED},
                "few_bias": trained.few_bias,
                "chosen_on": None if val is None else "val",
                "policy": self.policy,
                "selection": trained.selection,
                "epoch": trained.selected_epoch,
                "engine": trained.engine,
                "before": trained.metrics_before,
                "after": trained.metrics_after,
                "clamped": trained.clamped,
                "verified": trained.verified,
                "kept_original": trained.kept_original,
                "notes": trained.notes,
                "candidates": [_candidate(entry) for entry in runs],
                "few_classes": head.few_classes.tolist(),
                "empty_classes": split.empty.tolist(),
                "members": head.members.tolist(),
                "alphas": head.alphas().tolist(),
                "history": trained.history,
            }
            folder.clear()
            if self.preset == "all":
                alphaext.checkpoints.save_linear(made.linear, folder.path / results.CLASSIFIER, overwrite=True)
            else:
                results.save_head(head, folder.path)
            folder.write(result)
            shutil.rmtree(checkpoints, ignore_errors=True)
        self._print(console, result, results.classifier_name(path))
        return result

    def configurations(self, split: alphaext.ClassSplit, constant: bool) -> list[dict[str, Any]]:
        """A configuration of :func:`alphaext.fit_many` for each gamma, number of neighbours and rule to try.

        ``constant``: whether a preset's constant on the few scores can be chosen and kept.
        """
        given = self.given()
        available = alphaext.head.neighbors.pool_size(split, given.get("pool", PRESETS[self.of_few_rows]["pool"]))
        common = preset_options(self.of_few_rows, pool_size=available, validation=constant)
        tried = [self.tried(name) if name in given else [common[name]] for name in _TRIED]
        for name, value in given.items():
            common[name] = None if _may_be_none(OPTIONS[name]) and value in (0, _NONE) else value
        return [{**common, "seed": self.seed, **dict(zip(_TRIED, each, strict=True))} for each in itertools.product(*tried)]

    @property
    def of_few_rows(self) -> str:
        """The preset that few rows are made anew by."""
        return "few" if self.preset == "all" else self.preset

    def given(self) -> dict[str, Any]:
        """The options of the table that were given."""
        return {name: getattr(self, name) for name in PRESETS[self.of_few_rows] if getattr(self, name) is not None}

    def tried(self, name: str) -> list[Any]:
        """The values to try of ``gamma``, ``top_k`` or ``rule``."""
        given = getattr(self, name)
        if given == ():
            raise ValueError(f"{name} must be given at least one value, got none")
        return list(dict.fromkeys(given or (PRESETS[self.of_few_rows][name],)))

    def _print(self, console: Console, result: dict[str, Any], name_before: str) -> None:
        if result["before"] is not None:
            parts = ("few", "medium", "many", "all")
            columns = (Column(part, justify="right") for part in parts)
            table = Table(Column(), *columns, title="Top-1 accuracy on validation features, %")
            after = "preset all" if self.preset == "all" else f"Alpha Net, gamma {result['gamma']:g}"
            for name, metrics in ((name_before, result["before"]), (after, result["after"])):
                table.add_row(Text(name), *(percent(metrics[part]) for part in parts))
            console.print(table)
            for name in _TRIED:
                values = dict.fromkeys(value_text(candidate[name]) for candidate in result["candidates"])
                if len(values) > 1:
                    by = result["policy"] or result["selection"]
                    console.print(f"{name} {value_text(result[name])} chosen of {', '.join(values)} by {by}", highlight=False)
        for note in result["notes"]:
            console.print(f"Note: {note}", markup=False, highlight=False)
        for candidate in result["candidates"]:
            if "error" in candidate:
                console.print(f"{_named(candidate)}: {candidate['error']}", markup=False, highlight=False)
        console.print(f"Classifier: {self.output / results.CLASSIFIER}", markup=False, highlight=False, soft_wrap=True)


def best_run(
    runs: list[alphaext.training.SweepRun],
    select: str | None,
    min_all: float | None,
    policy: str | None = None,
    max_drop: float | None = None,
) -> int:
    """Which of several trainings is best by the policy, or by what chose their epochs; of equal ones the largest gamma.

    Raises:
        FloatingPointError: all of them diverged.
    """
    # The one nearest to no change comes first.
    order = sorted(range(len(runs)), key=lambda number: -runs[number].config["gamma"])
    trained = {number: result for number in order if (result := runs[number].result) is not None}
    if not trained:
        raise FloatingPointError("; ".join(dict.fromkeys(run.error for run in runs)))
    if policy is not None:
        accuracies = {number: result.after for number, result in trained.items() if result.after is not None}
        rows = [{"number": number, "val_few": after["few"], "val_all": after["all"]} for number, after in accuracies.items()]
        before = next(result.before for result in trained.values() if result.before is not None)
        return int(alphaext.study.choose(rows, policy, max_drop, original={"val_all": before["all"]})["number"])

    def score(number: int) -> float:
        before, after = trained[number].metrics_before, trained[number].metrics_after
        if before is None or after is None or not trained[number].verified:
            return 0.0
        if select == "last":
            return after["all"]
        return selection_score(select or "best_all", after, before["all"] if min_all is None else min_all)

    return max(trained, key=score)


def _named(config: Mapping[str, Any]) -> str:
    return f"gamma {config['gamma']:g}, top_k {config['top_k']}, rule {config['rule']}"


def _candidate(run: alphaext.training.SweepRun) -> dict[str, Any]:
    tried = {name: run.config[name] for name in _TRIED}
    if run.result is None:
        return {**tried, "error": run.error}
    return {**tried, "epoch": run.result.selected_epoch, "after": run.result.after, "clamped": run.result.clamped}
