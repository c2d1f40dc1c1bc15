"""``alphaext repair``: from a configuration to a repaired checkpoint and a page that says what was gained."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from ..utils.files import read_json, whole_file, write_json
from ..utils.packages import require
from . import results
from .doctor import Doctor
from .evaluate import Evaluate
from .export import Export
from .extract import Extract
from .fit import Fit
from .options import Options, from_flags, option, read_config
from .recommend import Recommend
from .shared import PARTS, CommonOptions, ModelOptions

_STEPS = "steps.json"
_PAGE = "report.html"


@dataclass(frozen=True, kw_only=True)
class Repair(Options):
    """Repair a trained checkpoint by one configuration: check, extract, repair, evaluate, export, and one page.

    Each step's own command is shown as it runs, and can be run alone. Run again, it goes on where it stopped; a step whose
    options have changed, and all that follow it, run anew. Test features, where there are some, measure the result.

    Example:
        alphaext repair --config mine.toml
    """

    section: ClassVar[str] = "repair"
    goes_on: ClassVar[bool] = True
    config: Path = option(metavar="FILE", help="a TOML file with the options of all steps; 'alphaext init' writes one")
    output: Path | None = option(None, metavar="FOLDER", help="where results go; without, 'repaired' beside the configuration")
    method: str | None = option(
        None,
        choices=("recommend", "fit"),
        help="recommend: the best of all methods on validation features; fit: an Alpha Net, by [fit]; without, recommend where "
        "there are validation images",
    )

    def run(self, console: Console | None = None) -> dict[str, Any]:
        """Do all steps that are not done yet; returns what came of each."""
        from . import CONFIGURABLE

        console = results.console_or_quiet(console)
        require("jinja2", "the page of a repair needs", "'alphaext[report]'")
        output = self.output or self.config.absolute().parent / "repaired"
        config = read_config(self.config, CONFIGURABLE)
        features = Path(config.get("", {}).get("features", output / "features"))
        data = from_flags(Extract, {"features": features}, config)
        if data.backbone is None:
            raise ValueError(
                f"backbone must be given in [model] of {self.config}: torchvision's name, timm:NAME, or module:function"
            )
        if data.checkpoint is None and data.saved_model is None:
            raise ValueError(f"checkpoint must be given in [model] of {self.config}: the trained weights")
        steps = _Steps(self.config, config, output, console)
        part = next((part for part in reversed(PARTS) if getattr(data, part) is not None), "test")
        method = self.method or ("fit" if data.val is None else "recommend")
        made, evaluation = output / method, output / "evaluation"
        steps.run(Doctor, {})
        if steps.results["doctor"]["exit_code"]:
            raise ValueError("doctor found errors, which are above: mend them and run the same command again")
        steps.run(Extract, {"features": features}, always=True, checked=True)
        by = {"recommend": Recommend, "fit": Fit}[method]
        steps.run(by, {"features": features, "output": made}, made=made / results.RESULT)
        steps.run(
            Evaluate,
            {"features": features, "part": part, "classifiers": (made,), "output": evaluation},
            made=evaluation / results.RESULT,
        )
        repair = steps.results[method]
        if repair.get("kept_original") or repair.get("method") == "original":
            console.print("Nothing was better on the validation samples than the checkpoint as it is: no other is written.")
        else:
            repaired, flags = output / _name_of(data), {}
            if data.read_checkpoint().bias is None and results.read_classifier(made).bias is not None:
                console.print(
                    "The repaired classifier has a bias and the network's code makes none: it is written alone, as weight and "
                    "bias of an nn.Linear to put into the network",
                    highlight=False,
                )
                repaired, flags = output / "classifier.pth", {"format": "linear"}
            steps.run(Export, {"repaired": made, "output": repaired, **flags}, made=repaired)
        fitted = [f"Preset {repair.get('preset')} was asked for, and no other method compared.", *repair.get("notes", ())]
        page = _page(self.config, steps, evaluation, [repair["advice"]] if "advice" in repair else fitted)
        with whole_file(output / _PAGE) as file:
            file.write(page.encode("utf-8"))
        console.print(f"Page: {output / _PAGE}", markup=False, highlight=False, soft_wrap=True)
        return {**steps.results, "page": str(output / _PAGE)}


class _Steps:
    """The steps of a repair, and what an earlier run has done of them.

    Attributes:
        results: of each step, by its name.
        commands: the command of each step.
    """

    def __init__(self, file: Path, config: Mapping[str, Mapping[str, Any]], output: Path, console: Console) -> None:
        self._file, self._config, self._output, self._console = file, config, output, console
        output.mkdir(parents=True, exist_ok=True)
        self._kept = read_json(output / _STEPS, "the steps of a repair") if (output / _STEPS).is_file() else {}
        self._anew = False
        self.results: dict[str, dict[str, Any]] = {}
        self.commands: dict[str, str] = {}

    def run(
        self, cls: type[CommonOptions], flags: dict[str, Any], *, made: Path | None = None, always: bool = False, **how: Any
    ) -> None:
        """Run a step, and hand it ``how``, unless the same was done before and what it ``made`` is there still.

        With ``always`` it runs all the same.
        """
        name = cls.section
        options: Any = from_flags(cls, flags, self._config)
        identity = {**options.to_dict(), "checkpoint's file": _stamp(options)}
        self.commands[name] = _command(cls, flags, self._file)
        kept = self._kept.get(name)
        same = kept is not None and kept["options"] == identity and (made is None or made.exists()) and not self._anew
        self._console.print(f"\n$ {self.commands[name]}", style="bold", markup=False, highlight=False, soft_wrap=True)
        if kept is not None and same and not always:
            self._console.print("done before", highlight=False)
            self.results[name] = kept["result"]
            return
        if made is not None and made.exists():
            options = from_flags(cls, {**flags, "overwrite": True}, self._config)
        self._anew = self._anew or not same
        self.results[name] = options.run(self._console, **how)
        self._kept[name] = {"options": identity, "result": self.results[name]}
        write_json(self._output / _STEPS, self._kept)


def _stamp(options: CommonOptions) -> list[int] | None:
    """What tells that a checkpoint has another content than before."""
    path = options.checkpoint if isinstance(options, ModelOptions) else None
    if path is None or not path.exists():
        return None
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _command(cls: type[CommonOptions], flags: Mapping[str, Any], config: Path) -> str:
    words = ["alphaext", cls.section, "--config", str(config)]
    for name, value in flags.items():
        if name == "classifiers":
            words[2:2] = map(str, value)
        else:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _name_of(options: ModelOptions) -> str:
    """What the repaired checkpoint is called."""
    if options.checkpoint is None:
        return "model"
    return f"{options.checkpoint.stem}-repaired{options.checkpoint.suffix}"


# ---- The page ----------------------------------------------------------------------------------------------------------


def _page(config: Path, steps: _Steps, evaluation: Path, notes: Sequence[str]) -> str:
    from ..metrics.accuracy import SPLITS_AND_ALL
    from ..metrics.class_table import composition, read_class_table
    from ..study.report.advice import Gain, gains_text
    from ..study.report.content import Block, DataTable, Section, TextBlock
    from ..study.report.page import page
    from ..utils.text import percent

    found = steps.results["evaluate"]
    measured = f"{found['samples']:,} {found['part']} samples"
    blocks: list[Block] = [TextBlock(note, "finding") for note in notes if note]
    for name, compared in found["comparisons"].items():
        gains: dict[str, Gain] = {
            part: (compared["differences"][part], *compared["intervals"][part])
            for part in SPLITS_AND_ALL
            if compared["parts"][part]["samples"]
        }
        blocks.append(TextBlock(f"On {measured}: {gains_text(gains)}", "finding"))
        counts = tuple(
            (part, *(str(compared["parts"][part][what]) for what in ("samples", "gained", "lost", "lost_to_few", "verdict")))
            for part in gains
        )
        columns = ("part", "samples", "now right", "now wrong", "of these taken for few", "shown")
        note = "Shown: better or worse where the exact McNemar test and the paired interval agree."
        blocks.append(DataTable(f"{name}: samples that changed", columns, counts, words=(0, 5), note=note))
    accuracies = []
    for name, metrics in found["metrics"].items():
        cells = []
        for part in SPLITS_AND_ALL:
            low, high = found["intervals"][name][part]
            cells.append(f"{percent(metrics[part])} ({percent(low)} to {percent(high)})")
        accuracies.append((name, *cells))
    title = f"Top-1 accuracy on {measured}, % ({found['confidence']:.0%} intervals)"
    blocks.append(DataTable(title, ("classifier", *SPLITS_AND_ALL), tuple(accuracies)))
    classes = []
    header = ("class", "split", "trained", "before", "after", "gain", "composed of")
    rows = read_class_table(evaluation / found["tables"][0])
    for heading, chosen in (
        ("Classes that gained most", sorted((row for row in rows if row.gain > 0), key=lambda row: -row.gain)),
        ("Classes that lost most", sorted((row for row in rows if row.gain < 0), key=lambda row: row.gain)),
    ):
        shown = [
            (row.name, row.split, str(row.training_images), percent(row.accuracy_before), percent(row.accuracy_after),
             percent(row.gain, sign=True), composition(row))
            for row in chosen[:20]
        ]  # fmt: skip
        if shown:
            classes.append(DataTable(heading, header, tuple(shown), words=(0, 1, 6), note=f"{len(shown)} of {len(chosen)}"))
    done = DataTable("Commands", ("step", "command"), tuple(steps.commands.items()), words=(0, 1))
    sections = [
        Section("gain", "What to take, and what it costs", tuple(blocks)),
        Section("classes", "Who gained, and who paid", tuple(classes)),
        Section("steps", "How it was done", (done,)),
    ]
    foot = [f"Intervals are of {found['confidence']:.0%}, by the bootstrap over these samples; those of gains are paired."]
    return page(f"Repair by {config.name}", [], sections, foot)
