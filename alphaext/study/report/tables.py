"""The tables of a report: what the rows, classes and confusions of studies come to, as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ...metrics.accuracy import SPLITS_AND_ALL
from ...metrics.class_table import ClassRow
from ...metrics.confusions import ConfusionRow
from ...utils.figures import clean_text
from ...utils.text import number_text, percent
from ..rows import ORIGINAL, Group, Row, group_rows, varied
from .content import DataTable
from .data import COMPARE, StudyFiles, isolated, label, said_by_method, shown_value

_MOST_CLASSES, _MOST_NEIGHBORS = 400, 5
_MOST_CONFUSIONS, _MOST_ERRORS = 15, 10


def mean_text(group: Group, metric: str) -> str:
    """The mean over seeds in percent, with half of its 95% interval where there are several.

    Example:
        >>> from alphaext.study.rows import make_row
        >>> mean_text(Group("Alpha Net", {}, tuple(make_row(test_few=few) for few in (0.1, 0.11, 0.12))), "test_few")
        '11.0 ±2.5'
    """
    return percent(group.mean(metric)) + half_width_text(group.half_width(metric))


def half_width_text(half: float | None) -> str:
    """What stands behind a mean that has an interval."""
    return "" if half is None else f" ±{percent(half)}"


_Rows = Iterable[tuple[str, ...]]
_ACCURACIES = tuple(f"{part}{top}" for part in SPLITS_AND_ALL for top in ("", "_top5"))
_ACCURACY_NAMES = tuple(f"{part} {top}" for part in SPLITS_AND_ALL for top in ("top-1", "top-5"))


def _accuracy_texts(group: Group) -> list[str]:
    return [mean_text(group, f"test_{name}") for name in _ACCURACIES]


def _gain_texts(group: Group, study: StudyFiles, parts: Iterable[str]) -> list[str]:
    gains = [(group.gain(f"test_{part}", study.original), group.half_width(f"test_{part}")) for part in parts]
    return [percent(gain, sign=True) + ("" if gain is None else half_width_text(half)) for gain, half in gains]


def of_studies(
    studies: int, title: str, header: tuple[str, ...], rows: _Rows, words: tuple[int, ...], **others: Any
) -> list[DataTable]:
    """A table with a column "classifier", which is left out of one study's; of no rows there is no table."""
    cells = tuple(rows)
    if not cells:
        return []
    columns = [number for number, name in enumerate(header) if name != "classifier" or studies > 1]
    return [
        DataTable(
            title,
            tuple(header[column] for column in columns),
            tuple(tuple(row[column] for column in columns) for row in cells),
            words=tuple(place for place, column in enumerate(columns) if column in words),
            **others,
        )
    ]


def _compared(studies: Sequence[StudyFiles]) -> Iterator[tuple[StudyFiles, Group]]:
    """The methods of "compare", each over its seeds, with the study that they are of."""
    for study in studies:
        for group in group_rows(study.of(COMPARE), by=()):
            yield study, group


def compare_table(studies: Sequence[StudyFiles]) -> list[DataTable]:
    """Tables 1 and 2 of the paper: rivals and Alpha Nets of all classifiers."""
    return of_studies(
        len(studies),
        "Accuracy on test samples, % (tables 1 and 2 of the paper)",
        ("method", "classifier", "chosen on validation", "candidates", "seeds", *_ACCURACY_NAMES),
        (
            (group.method, study.name, _chosen(study, group), _candidates(study, group), _seeds(group), *_accuracy_texts(group))
            for study, group in _compared(studies)
        ),
        (0, 1, 2),
        note="± is half of the 95% interval over seeds. What a method leaves open was chosen on validation samples, out of "
        "so many candidates.",
    )


def cost_table(studies: Sequence[StudyFiles]) -> list[DataTable]:
    """What each method of "compare" gains and costs over the original classifier, and what of it sits on a clamp."""
    rows = []
    for study, group in _compared(studies):
        few, clamped = study.part("classes", "few"), group.mean("clamped")
        stuck = number_text(clamped, ".4g") + ("" if clamped is None or few is None else f" of {few}")
        gains = _gain_texts(group, study, SPLITS_AND_ALL)
        epoch, seconds = number_text(group.mean("epoch"), ".4g"), number_text(group.mean("seconds"), ".3g")
        rows.append((group.method, study.name, *gains, stuck, epoch, seconds))
    return of_studies(
        len(studies),
        "Gain over the original classifier, top-1 on test samples",
        ("method", "classifier", *(f"{part}, points" for part in SPLITS_AND_ALL), "classes on their clamp", "epoch", "seconds"),
        (row for row in rows if row[0] != ORIGINAL),
        (0, 1),
        note="± is half of the 95% interval over seeds. A class is on its clamp where its own coefficient sits on an end of "
        "what gamma allows it.",
    )


def calibration_table(studies: Sequence[StudyFiles]) -> list[DataTable]:
    """Expected calibration errors of the methods of "compare", the original first."""
    rows = (
        (group.method, study.name, *(mean_text(group, f"test_{part}_calibration_error") for part in SPLITS_AND_ALL))
        for study, group in _compared(studies)
    )
    return of_studies(
        len(studies),
        "Expected calibration error on test samples, % (0 is best)",
        ("method", "classifier", *SPLITS_AND_ALL),
        (row for row in rows if set(row[2:]) != {"-"}),
        (0, 1),
        note="How far the probability of the predicted class lies from how often it is right, before (original) and after.",
    )


def accuracy_table(study: StudyFiles, rows: Iterable[Row], title: str) -> DataTable:
    """All accuracies of an experiment's methods and configurations."""
    rows = list(rows)
    names = [name for name in varied(rows) if not said_by_method(rows, name)]
    # Where configurations differ from method to method alone, that is what the experiment is about.
    names = names if any(name != "gamma" for name in names) else varied(rows)
    return DataTable(
        title,
        ("method", *names, "seeds", *_ACCURACY_NAMES, "few gain", "all gain"),
        tuple(
            (
                group.method,
                *(_setting(group, name) for name in names),
                _seeds(group),
                *_accuracy_texts(group),
                *_gain_texts(group, study, ("few", "all")),
            )
            for group in group_rows(rows)
        ),
        words=tuple(range(1 + len(names))),
    )


def sharing_table(study: StudyFiles, rows: Iterable[Row]) -> DataTable:
    """What one sub-module for all few classes saves, and what it costs."""
    return DataTable(
        "What sharing saves and costs, means over gammas and seeds",
        ("method", "sub-modules", "few, %", "all, %", "trained", "both layers as in the paper", "seconds a training"),
        tuple(
            (
                group.method,
                "one for all" if group.configuration["shared"] else "one each",
                *(percent(group.mean(f"test_{part}")) for part in ("few", "all")),
                *(_bytes(group.mean(name)) for name in ("parameter_bytes", "dense_parameter_bytes")),
                number_text(group.mean("seconds"), ".3g"),
            )
            for group in group_rows(rows, by=("shared",))
        ),
        words=(0, 1),
    )


def classes_table(rows: Sequence[ClassRow], title: str, *, closed: bool = False) -> DataTable:
    """Classes with what their classifiers are composed of (table 3 of the paper)."""
    most = max((len(row.neighbors) for row in rows), default=0)
    shown = min(most, _MOST_NEIGHBORS)
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
                number_text(row.distance, ".3g"),
                number_text(row.own_alpha, ".2f"),
                *neighbors[:shown],
                *["-"] * (shown - len(neighbors)),
            )
        )
    columns = ("class", "training images", "before, %", "after, %", "gain", "distance", "own alpha")
    left_out = {"classes": len(rows) - len(found), "neighbours of a class": most - shown}
    return DataTable(
        title,
        (*columns, *(f"NN{k}" for k in range(1, shown + 1))),
        tuple(found),
        words=(0, *range(len(columns), len(columns) + shown)),
        note=" ".join(f"{number} more {what} are in classes.csv." for what, number in left_out.items() if number),
        closed=closed,
    )


def confusion_tables(study: StudyFiles) -> list[DataTable]:
    """Which confusions were mended, which are new, and what all of them come to."""
    totals = [row for row in study.confusions if row.is_total]
    pairs = [row for row in study.confusions if not row.is_total]
    sums = [sum(getattr(row, name) for row in totals) for name in ("before", "after", "mended", "new")]
    header = ("right class", "split", "taken for", "its split", "before", "after")
    tables = [
        DataTable(
            "Confused test samples, all pairs of classes",
            ("right class", "taken for", "before", "after", "mended", "new"),
            (
                *((r.true_split, r.predicted_split, *map("{:,}".format, (r.before, r.after, r.mended, r.new))) for r in totals),
                *([("all", "all", *map("{:,}".format, sums))] if totals else []),
            ),
            words=(0, 1),
            note="Mended: how many fewer, over those pairs of classes that are confused less often than before; new: how "
            "many more, over the others.",
        ),
        DataTable("Confusions mended most", header, _pair_rows([row for row in pairs if row.mended]), words=(0, 1, 2, 3)),
        DataTable("Confusions that are new", header, _pair_rows([row for row in pairs if row.new]), words=(0, 1, 2, 3)),
    ]
    return [table for table in tables if table.rows]


def _pair_rows(pairs: Sequence[ConfusionRow]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (
            isolated(row.true_name),
            row.true_split,
            isolated(row.predicted_name),
            row.predicted_split,
            f"{row.before:,}",
            f"{row.after:,}",
        )
        for row in pairs[:_MOST_CONFUSIONS]
    )


def error_table(studies: Sequence[StudyFiles]) -> list[DataTable]:
    """What has no results, and why."""
    rows = []
    for study in studies:
        failed = [row for row in study.rows if row["error"] is not None]
        for experiment in dict.fromkeys(row["experiment"] for row in failed):
            own = [row for row in failed if row["experiment"] == experiment]
            for group in group_rows(own, varied(study.of(experiment))):
                seeds = ", ".join(str(row["seed"]) for row in group.rows if row["seed"] is not None) or "-"
                reasons = "; ".join(dict.fromkeys(clean_text(row["error"]) for row in group.rows))
                rows.append((study.name, experiment, label(group.method, group.configuration), seeds, reasons))
    return of_studies(
        len(studies),
        "Without results",
        ("classifier", "experiment", "what", "seeds", "why"),
        rows,
        (0, 1, 2, 3, 4),
        closed=len(rows) > _MOST_ERRORS,
    )


def settings_table(study: StudyFiles) -> DataTable:
    """How a study was made."""
    settings, identity = dict(study.info["options"]), study.info["identity"]
    settings |= {name: identity.get(name) for name in ("few_below", "many_above")}
    settings |= {"few_classes": identity["few_classes"]} if "few_classes" in identity else {}
    rows = [
        ("classifier", study.name),
        ("finished", clean_text(study.info["finished"] or "not finished")),
        *((name, _listed(study.info[name])) for name in ("samples", "classes")),
        *((clean_text(name), _flat(value)) for name, value in settings.items()),
        *((name, _listed(study.info[name])) for name in ("versions", "machine")),
    ]
    return DataTable(f"Settings of {study.name}", ("setting", "value"), tuple(rows), words=(0, 1), closed=True)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{clean_text(name)} {_flat(value)}" for name, value in values.items()) or "-"


def _flat(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_flat(entry) for entry in value) or "-"
    return _listed(value) if isinstance(value, dict) else shown_value(value)


def _setting(group: Group, name: str) -> str:
    value = group.configuration.get(name)
    absent = "all" if name == "few_samples" else "-"
    return absent if value is None else shown_value(value)


def _chosen(study: StudyFiles, group: Group) -> str:
    """What validation samples chose for a method: what its candidates differ in."""
    found: dict[str, list[str]] = {}
    for choice in _choices(study, group):
        table = [entry for entry in choice.get("table") or [] if isinstance(entry, dict)]
        for name, value in choice["chosen"].items():
            if len({str(entry.get(name)) for entry in table}) != 1:
                found.setdefault(name, []).append(shown_value(value))
    if not _choices(study, group):
        found = {name: [shown_value(value) for value in group.values(name)] for name in ("tau", "offset", "gamma")}
    texts = [f"{name} {', '.join(values if len(set(values)) > 1 else values[:1])}" for name, values in found.items() if values]
    return clean_text("; ".join(texts)) or "-"


def _choices(study: StudyFiles, group: Group) -> list[dict[str, Any]]:
    return [choice for choice in study.info["choices"] if choice.get("method") == group.method]


def _candidates(study: StudyFiles, group: Group) -> str:
    numbers = {choice.get("candidates") for choice in _choices(study, group)}
    return ", ".join(str(number) for number in sorted(number for number in numbers if isinstance(number, int))) or "-"


def _seeds(group: Group) -> str:
    there = len(group.rows) - group.failed
    return f"{there} of {len(group.rows)}" if group.failed else str(there)


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
