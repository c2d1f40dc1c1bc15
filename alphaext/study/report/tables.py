"""The tables of a report: what the rows, classes and confusions of studies come to, as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...metrics.accuracy import SPLITS_AND_ALL
from ...metrics.class_table import ClassRow
from ...utils.figures import clean_text
from ...utils.text import percent
from ..rows import Row
from .content import DataTable
from .data import COMPARE, SETTINGS, Group, StudyFiles, group_rows, isolated, said_by_method, value_text, varied
from .front import Height

__all__ = [
    "accuracy_table",
    "calibration_table",
    "classes_table",
    "compare_table",
    "confusion_tables",
    "cost_table",
    "error_table",
    "front_table",
    "settings_table",
]

_MOST_CLASSES = 400
_MOST_CONFUSIONS, _MOST_ERRORS = 15, 10


def mean_text(group: Group, metric: str) -> str:
    """The mean over seeds in percent, with the standard deviation where there are several.

    Example:
        >>> from alphaext.study.rows import make_row
        >>> mean_text(Group("Alpha Net", {}, (make_row(test_few=0.1), make_row(test_few=0.2))), "test_few")
        '15.0 ±7.1'
    """
    spread = group.spread(metric)
    return percent(group.mean(metric)) + (f" ±{percent(spread)}" if spread is not None else "")


def _one_classifier(table: DataTable, classifiers: int) -> DataTable:
    """The same without the column that names the classifier, where there is but one."""
    if classifiers > 1:
        return table
    place = table.header.index("classifier")

    def without(cells: tuple[str, ...]) -> tuple[str, ...]:
        return cells[:place] + cells[place + 1 :]

    words = tuple(column - (column > place) for column in table.words if column != place)
    return replace(table, header=without(table.header), rows=tuple(map(without, table.rows)), words=words)


def compare_table(studies: Sequence[StudyFiles]) -> DataTable | None:
    """Tables 1 and 2 of the paper: rivals and Alpha Nets of all classifiers."""
    rows = []
    for study in studies:
        for group in group_rows(study.of(COMPARE), by=()):
            cells = [mean_text(group, f"test_{part}{top}") for part in SPLITS_AND_ALL for top in ("", "_top5")]
            rows.append((group.method, study.name, _chosen(study, group), _candidates(study, group), _seeds(group), *cells))
    if not rows:
        return None
    columns = [f"{part} {top}" for part in SPLITS_AND_ALL for top in ("top-1", "top-5")]
    return _one_classifier(
        DataTable(
            "Accuracy on test samples, % (tables 1 and 2 of the paper)",
            ("method", "classifier", "chosen on validation", "candidates", "seeds", *columns),
            tuple(rows),
            words=(0, 1, 2),
            note="± is the standard deviation over seeds. What a method leaves open was chosen on validation samples, out of "
            "so many candidates.",
        ),
        len(studies),
    )


def cost_table(studies: Sequence[StudyFiles]) -> DataTable | None:
    """What each method of "compare" gains and costs over the original classifier, and what of it sits on a clamp."""
    rows = []
    for study in studies:
        few = study.part("classes", "few")
        for group in group_rows([row for row in study.of(COMPARE) if row["method"] != "original"], by=()):
            gains = [percent(group.gain(f"test_{part}", study.original), sign=True) for part in SPLITS_AND_ALL]
            clamped = group.mean("clamped")
            of = "" if few is None else f" of {few}"
            stuck = "-" if clamped is None else f"{clamped:.4g}{of}"
            rows.append((group.method, study.name, *gains, stuck, _number(group.mean("epoch")), _seconds(group)))
    if not rows:
        return None
    columns = [f"{part}, points" for part in SPLITS_AND_ALL]
    return _one_classifier(
        DataTable(
            "Gain over the original classifier, top-1 on test samples",
            ("method", "classifier", *columns, "classes on their clamp", "epoch", "seconds"),
            tuple(rows),
            words=(0, 1),
            note="Means over seeds. A class is on its clamp where its own coefficient sits on an end of what gamma allows it.",
        ),
        len(studies),
    )


def calibration_table(studies: Sequence[StudyFiles]) -> DataTable | None:
    """Expected calibration errors of the methods of "compare", the original first."""
    rows = []
    for study in studies:
        for group in group_rows(study.of(COMPARE), by=()):
            cells = [mean_text(group, f"test_{part}_calibration_error") for part in SPLITS_AND_ALL]
            if any(cell != "-" for cell in cells):
                rows.append((group.method, study.name, *cells))
    if not rows:
        return None
    return _one_classifier(
        DataTable(
            "Expected calibration error on test samples, % (0 is best)",
            ("method", "classifier", *SPLITS_AND_ALL),
            tuple(rows),
            words=(0, 1),
            note="How far the probability of the predicted class lies from how often it is right, before (original) and after.",
        ),
        len(studies),
    )


def front_table(studies: Sequence[tuple[StudyFiles, Sequence[Height]]]) -> DataTable | None:
    """How far the chosen heads lie above the front."""
    rows = []
    for study, heights in studies:
        for height in heights:
            group = height.group
            below = [
                None if h is None else row["test_all"] - h for row, h in zip(_measured(group), height.heights, strict=True)
            ]
            known = [value for value in below if value is not None]
            front = percent(sum(known) / len(known)) if known else "-"
            spread = "" if height.spread is None else f" ±{percent(height.spread)}"
            each = ", ".join("beyond its ends" if h is None else percent(h, sign=True) for h in height.heights)
            cells = (mean_text(group, "test_few"), mean_text(group, "test_all"), front)
            rows.append((group.method, study.name, *cells, percent(height.mean, sign=True) + spread, each))
    if not rows:
        return None
    return _one_classifier(
        DataTable(
            "The chosen Alpha Nets against the front, top-1 on test samples",
            (
                "method",
                "classifier",
                "few, %",
                "all, %",
                "front at equal few, %",
                "above the front, points",
                "each seed",
            ),
            tuple(rows),
            words=(0, 1, 6),
            note="Below zero, one constant on all few logits has more accuracy over all at the same few accuracy.",
        ),
        len(studies),
    )


def accuracy_table(study: StudyFiles, rows: Iterable[Row], title: str, *, note: str = "", closed: bool = False) -> DataTable:
    """All accuracies of an experiment's methods and configurations."""
    rows = list(rows)
    names = [name for name in varied(rows) if not said_by_method(rows, name)]
    # Where configurations differ from method to method alone, that is what the experiment is about.
    names = names if any(name != "gamma" for name in names) else varied(rows)
    found = []
    for group in group_rows(rows, varied(rows)):
        settings = [_setting(group, name) for name in names]
        cells = [mean_text(group, f"test_{part}{top}") for part in SPLITS_AND_ALL for top in ("", "_top5")]
        gains = [percent(group.gain(f"test_{part}", study.original), sign=True) for part in ("few", "all")]
        found.append((group.method, *settings, _seeds(group), *cells, *gains))
    columns = [f"{part} {top}" for part in SPLITS_AND_ALL for top in ("top-1", "top-5")]
    return DataTable(
        title,
        ("method", *names, "seeds", *columns, "few gain", "all gain"),
        tuple(found),
        words=tuple(range(1 + len(names))),
        note=note,
        closed=closed,
    )


def sharing_table(study: StudyFiles, rows: Iterable[Row]) -> DataTable:
    """What one sub-module for all few classes saves, and what it costs."""
    found = []
    for group in group_rows(rows, by=("shared",)):
        sizes = [_bytes(group.mean(name)) for name in ("parameter_bytes", "dense_parameter_bytes")]
        cells = [percent(group.mean(f"test_{part}")) for part in ("few", "all")]
        found.append(
            (group.method, "one for all" if group.configuration["shared"] else "one each", *cells, *sizes, _seconds(group))
        )
    return DataTable(
        "What sharing saves and costs, means over gammas and seeds",
        ("method", "sub-modules", "few, %", "all, %", "trained", "both layers as in the paper", "seconds a training"),
        tuple(found),
        words=(0, 1),
    )


def classes_table(rows: Sequence[ClassRow], title: str, *, closed: bool = False) -> DataTable:
    """Classes with what their classifiers are composed of (table 3 of the paper)."""
    most = max((len(row.neighbors) for row in rows), default=0)
    found = []
    for row in rows[:_MOST_CLASSES]:
        neighbors = [f"{alpha:.2f} {isolated(name)}" for name, alpha in zip(row.neighbor_names, row.alphas, strict=True)]
        found.append(
            (
                isolated(row.name),
                str(row.training_images),
                percent(row.accuracy_before),
                percent(row.accuracy_after),
                percent(row.gain, sign=True),
                "-" if row.distance is None else f"{row.distance:.3g}",
                "-" if row.own_alpha is None else f"{row.own_alpha:.2f}",
                *neighbors,
                *["-"] * (most - len(neighbors)),
            )
        )
    columns = ("class", "training images", "before, %", "after, %", "gain", "distance", "own alpha")
    left_out = len(rows) - len(found)
    return DataTable(
        title,
        (*columns, *(f"NN{k}" for k in range(1, most + 1))),
        tuple(found),
        words=(0, *range(len(columns), len(columns) + most)),
        note=f"{left_out} more are in classes.csv." if left_out else "",
        closed=closed,
    )


def confusion_tables(study: StudyFiles) -> list[DataTable]:
    """Which confusions were mended, which are new, and what all of them come to."""
    totals = [row for row in study.confusions if row.is_total]
    pairs = [row for row in study.confusions if not row.is_total]
    tables = []
    if totals:
        found = [(r.true_split, r.predicted_split, *map(_count, (r.before, r.after, r.mended, r.new))) for r in totals]
        sums = [sum(getattr(row, name) for row in totals) for name in ("before", "after", "mended", "new")]
        tables.append(
            DataTable(
                "Confused test samples, all pairs of classes",
                ("right class", "taken for", "before", "after", "mended", "new"),
                (*found, ("all", "all", *map(_count, sums))),
                words=(0, 1),
                note="Mended: how many fewer, over those pairs of classes that are confused less often than before; new: how "
                "many more, over the others.",
            )
        )
    for title, own in (
        ("Confusions mended most", [row for row in pairs if row.mended]),
        ("Confusions that are new", [row for row in pairs if row.new]),
    ):
        if own:
            cells = [
                (
                    isolated(r.true_name),
                    r.true_split,
                    isolated(r.predicted_name),
                    r.predicted_split,
                    *map(_count, (r.before, r.after)),
                )
                for r in own[:_MOST_CONFUSIONS]
            ]
            header = ("right class", "split", "taken for", "its split", "before", "after")
            tables.append(DataTable(title, header, tuple(cells), words=(0, 1, 2, 3)))
    return tables


def error_table(studies: Sequence[StudyFiles]) -> DataTable | None:
    """What has no results, and why."""
    rows = []
    for study in studies:
        failed = [row for row in study.rows if row["error"] is not None]
        for experiment in dict.fromkeys(row["experiment"] for row in failed):
            own = [row for row in failed if row["experiment"] == experiment]
            for group in group_rows(own, [name for name in SETTINGS if name in varied(study.of(experiment))]):
                seeds = ", ".join(str(row["seed"]) for row in group.rows if row["seed"] is not None) or "-"
                reasons = "; ".join(dict.fromkeys(clean_text(row["error"]) for row in group.rows))
                rows.append((study.name, experiment, group.label, seeds, reasons))
    if not rows:
        return None
    header = ("classifier", "experiment", "what", "seeds", "why")
    return _one_classifier(
        DataTable("Without results", header, tuple(rows), words=(0, 1, 2, 3, 4), closed=len(rows) > _MOST_ERRORS), len(studies)
    )


def settings_table(study: StudyFiles) -> DataTable:
    """How a study was made."""
    identity = study.info["identity"]
    settings = {**study.info["options"], **{name: identity.get(name) for name in ("few_below", "many_above")}}
    rows = [("classifier", study.name), ("finished", clean_text(study.info["finished"] or "not finished"))]
    for name in ("samples", "classes"):
        rows.append((name, _listed(study.info[name])))
    rows += [(clean_text(name), _flat(value)) for name, value in settings.items()]
    rows += [(name, _listed(study.info[name])) for name in ("versions", "machine")]
    return DataTable(f"Settings of {study.name}", ("setting", "value"), tuple(rows), words=(0, 1), closed=True)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{clean_text(name)} {_flat(value)}" for name, value in values.items()) or "-"


def _flat(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_flat(entry) for entry in value) or "-"
    return _listed(value) if isinstance(value, dict) else value_text(value)


def _setting(group: Group, name: str) -> str:
    if name == "few_samples" and group.configuration.get(name) is None:
        return "all"
    value = group.configuration.get(name)
    return "-" if value is None else value_text(value)


def _chosen(study: StudyFiles, group: Group) -> str:
    """What validation samples chose for a method: what its candidates differ in."""
    choices = [choice for choice in study.info["choices"] if choice.get("method") == group.method]
    found: dict[str, list[str]] = {}
    for choice in choices:
        table = [entry for entry in choice.get("table") or [] if isinstance(entry, dict)]
        for name, value in choice["chosen"].items():
            if len({str(entry.get(name)) for entry in table}) != 1:
                found.setdefault(name, []).append(value_text(value))
    if not choices:
        values = {
            name: [value_text(row[name]) for row in group.rows if row[name] is not None] for name in ("tau", "offset", "gamma")
        }
        found = {name: entries for name, entries in values.items() if entries}
    texts = [f"{name} {', '.join(entries if len(set(entries)) > 1 else entries[:1])}" for name, entries in found.items()]
    return clean_text("; ".join(texts)) or "-"


def _candidates(study: StudyFiles, group: Group) -> str:
    numbers = {choice.get("candidates") for choice in study.info["choices"] if choice.get("method") == group.method}
    return ", ".join(str(number) for number in sorted(number for number in numbers if isinstance(number, int))) or "-"


def _seeds(group: Group) -> str:
    there = len(group.rows) - group.failed
    return f"{there} of {len(group.rows)}" if group.failed else str(there)


def _measured(group: Group) -> list[Row]:
    return [row for row in group.rows if row["test_few"] is not None and row["test_all"] is not None]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _count(value: int) -> str:
    return f"{value:,}"


def _seconds(group: Group) -> str:
    mean = group.mean("seconds")
    return "-" if mean is None or math.isnan(mean) else f"{mean:.3g}"


def _bytes(value: float | None) -> str:
    """A size in the largest unit that leaves a number above 1.

    Example:
        >>> _bytes(812.0), _bytes(2.5e6), _bytes(None)
        ('812 B', '2.5 MB', '-')
    """
    if value is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
