"""What a report is made of: the files of a study, read and checked, and what its rows come to over seeds."""

from __future__ import annotations

import itertools
import math
import re
import statistics
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...metrics.class_table import ClassRow, read_class_table
from ...metrics.confusions import ConfusionRow, read_confusions
from ...utils.figures import clean_text
from ...utils.files import PathLike, read_json
from ..plans import CANDIDATES, CONFIGURATION, EXPERIMENTS
from ..rows import FRONT, MEASURES, ORIGINAL, Row, read_rows
from ..run import CLASSES, CONFUSIONS, RESULTS, ROWS

__all__ = ["Group", "StudyFiles", "group_rows", "read_studies", "read_study", "setting_text", "value_text"]

COMPARE = "compare"
SETTINGS = (*CONFIGURATION, "tau", "offset")
"""The columns that say what a row is a result of."""

_NO_EXPERIMENTS = (ORIGINAL, CANDIDATES, FRONT)
_INFO: dict[str, type] = {
    "identity": dict,
    "classifier": str,
    "samples": dict,
    "classes": dict,
    "versions": dict,
    "machine": dict,
    "options": dict,
    "attribution": str,
    "choices": list,
    "finished": str,
}


@dataclass(frozen=True)
class StudyFiles:
    """The files of a study, as read by :func:`read_study`.

    Attributes:
        folder: where they are.
        name: what its classifier is called; no two studies of a report are called the same.
        key: a name for files and anchors.
        rows: of ``results.csv``.
        info: of ``results.json``.
        classes: of ``classes.csv``; empty without it.
        confusions: of ``confusions.csv``; likewise.
    """

    folder: Path
    name: str
    key: str
    rows: tuple[Row, ...] = field(repr=False)
    info: Mapping[str, Any] = field(repr=False)
    classes: tuple[ClassRow, ...] = field(default=(), repr=False)
    confusions: tuple[ConfusionRow, ...] = field(default=(), repr=False)

    def of(self, *experiments: str) -> list[Row]:
        """The rows of experiments."""
        return [row for row in self.rows if row["experiment"] in experiments]

    @property
    def original(self) -> Row | None:
        """The row of the original classifier."""
        return next((row for row in self.rows if row["experiment"] == ORIGINAL), None)

    @property
    def experiments(self) -> list[str]:
        """The experiments that there are rows of, in the order of the rows."""
        found = dict.fromkeys(row["experiment"] for row in self.rows)
        return [name for name in found if name not in _NO_EXPERIMENTS]

    @property
    def missing(self) -> list[str]:
        """The experiments that there are no rows of."""
        return [name for name in EXPERIMENTS if name not in self.experiments]

    @property
    def attribution(self) -> str | None:
        text = self.info.get("attribution")
        return clean_text(text) if text else None

    def part(self, name: str, part: str) -> int | None:
        """A number out of ``samples`` or ``classes``."""
        value = self.info.get(name, {}).get(part)
        return value if isinstance(value, int) else None


@dataclass(frozen=True)
class Group:
    """The rows of a method and configuration, one a seed.

    Attributes:
        method: as the rows have it.
        configuration: what tells it from others of its experiment.
        rows: its rows.
    """

    method: str
    configuration: Mapping[str, Any]
    rows: tuple[Row, ...]

    def values(self, metric: str) -> list[float]:
        """A metric of each seed that has it."""
        return [row[metric] for row in self.rows if row[metric] is not None]

    def mean(self, metric: str) -> float | None:
        """The mean over seeds; None if no seed has it."""
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def spread(self, metric: str) -> float | None:
        """The standard deviation over seeds (of the sample); None of one seed."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else None

    def gain(self, metric: str, original: Row | None) -> float | None:
        """By how much the mean lies above the original classifier."""
        mean = self.mean(metric)
        return None if mean is None or original is None or original[metric] is None else mean - original[metric]

    @property
    def failed(self) -> int:
        """How many seeds have no results."""
        return sum(row["error"] is not None for row in self.rows)

    @property
    def label(self) -> str:
        """The method and its configuration in words."""
        return ", ".join([self.method, *(setting_text(name, value) for name, value in self.configuration.items())])


def group_rows(rows: Iterable[Row], by: Sequence[str] | None = None) -> list[Group]:
    """The rows of each method and configuration, in the order in which they come.

    Args:
        rows: of one experiment.
        by: the columns of the configuration; default those that vary among ``rows``.

    Example:
        >>> from alphaext.study.rows import make_row
        >>> rows = [make_row(method="Alpha Net", seed=s, gamma=g, test_few=g / 2 + s / 8) for g in (0.5, 1.0) for s in (0, 1)]
        >>> [(group.label, group.mean("test_few")) for group in group_rows(rows)]
        [('Alpha Net, gamma 0.5', 0.3125), ('Alpha Net, gamma 1', 0.5625)]
    """
    rows = list(rows)
    names = varied(rows) if by is None else by
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], *(row[name] for name in names)), []).append(row)
    return [
        Group(method, dict(zip(names, values, strict=True)), tuple(members)) for (method, *values), members in groups.items()
    ]


def varied(rows: Sequence[Row]) -> list[str]:
    """The columns of configuration in which rows differ."""
    return [name for name in SETTINGS if len({row[name] for row in rows}) > 1]


def said_by_method(rows: Sequence[Row], name: str) -> bool:
    """Whether all rows of each method have the same in a column."""
    seen: dict[str, set[Any]] = {}
    for row in rows:
        seen.setdefault(row["method"], set()).add(row[name])
    return all(len(values) == 1 for values in seen.values())


_WORDS: dict[str, Callable[[Any], str]] = {
    "gamma": lambda value: f"gamma {value:g}",
    "top_k": lambda value: f"{value} neighbour" + ("s" if value != 1 else ""),
    "pool": lambda value: f"from {value}",
    "metric": str,
    "shared": lambda value: "one sub-module for all" if value else "one sub-module each",
    "init": lambda value: f"{value} start",
    "projected_gradient": lambda value: "projected gradient" if value else "plain gradient",
    "few_samples": lambda value: "all images" if value is None else f"{value} image" + ("s" if value != 1 else ""),
}


def setting_text(name: str, value: Any) -> str:
    """A column of the configuration and its value in words."""
    if name in _WORDS and (value is not None or name == "few_samples"):
        return _WORDS[name](value)
    return f"{name.replace('_', ' ')} {value_text(value)}"


def value_text(value: Any) -> str:
    """A value of the configuration as text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else clean_text(value)


def isolated(name: str) -> str:
    """A name in running text: one that is written from right to left turns nothing around it."""
    line = clean_text(name)
    if any(unicodedata.bidirectional(letter) in ("R", "AL", "AN") for letter in line):
        return f"\u2068{line}\u2069"
    return line


def read_studies(folders: Sequence[PathLike]) -> list[StudyFiles]:
    """Read several studies, and call each by a name of its own.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_study`; none, or the same folder twice.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise ValueError("study must be at least one folder, got none")
    repeated = [path for number, path in enumerate(paths) if path.resolve() in [other.resolve() for other in paths[:number]]]
    if repeated:
        raise ValueError(f"study must name each folder once, got {str(repeated[0])!r} twice")
    studies = [read_study(path) for path in paths]
    named: list[StudyFiles] = []
    for study in studies:
        name = study.name
        if sum(other.name == name for other in studies) > 1:
            name = f"{name} ({clean_text(study.folder.resolve().name)})"
        name = _free(name, " ", {other.name for other in named})
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower().encode("ascii", "ignore").decode()).strip("-")[:40].strip("-")
        key = _free(slug or "study", "-", {other.key for other in named})
        named.append(StudyFiles(study.folder, name, key, study.rows, study.info, study.classes, study.confusions))
    return named


def _free(name: str, separator: str, taken: set[str]) -> str:
    """The name, or the first of it with a number that nobody has."""
    numbered = (f"{name}{separator}{number}" for number in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if each not in taken)


def read_study(folder: PathLike) -> StudyFiles:
    """Read and check what ``alphaext study`` wrote.

    Args:
        folder: its folder of results.

    Returns:
        The study; classes and confusions are empty where their files are not there.

    Raises:
        FileNotFoundError: no such folder, or no results in it.
        ValueError: a file that is not as it must be; the message names file and line, column or entry.
    """
    path = Path(folder)
    for name in (RESULTS, ROWS):
        if not (path / name).is_file():
            what = f"there is no {name} in" if path.is_dir() else "there is no folder"
            raise FileNotFoundError(f"study must be a folder that 'alphaext study' wrote, {what} {str(path)!r}")
    info = _read_info(path / RESULTS)
    rows = _read_rows(path / ROWS)
    classes, confusions = path / CLASSES, path / CONFUSIONS
    return StudyFiles(
        folder=path,
        name=clean_text(info.get("classifier") or "classifier"),
        key="study",
        rows=tuple(rows),
        info=info,
        classes=tuple(_check_classes(classes)) if classes.is_file() else (),
        confusions=tuple(read_confusions(confusions)) if confusions.is_file() else (),
    )


def _read_info(path: Path) -> dict[str, Any]:
    info = read_json(path, "a study's results")
    if not isinstance(info.get("identity"), dict):
        raise ValueError(f"{str(path)!r} is not a study's results: it says not of which ('identity')")
    for name, kind in _INFO.items():
        value = info.get(name)
        if value is None:
            info[name] = None if kind is str else kind()
        elif not isinstance(value, kind):
            raise ValueError(f"{str(path)!r}: {name!r} must be {_KINDS[kind]}, got {value!r:.60}")
    for choice in info["choices"]:
        if not isinstance(choice, dict) or not isinstance(choice.get("chosen"), dict):
            raise ValueError(f"{str(path)!r}: 'choices' must be objects that say what was chosen, got {choice!r:.60}")
    return info


_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "text"}


def _read_rows(path: Path) -> list[Row]:
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{str(path)!r} has no results: it ends after its header")
    accuracies = [f"{part}_{metric}" for part in ("val", "test") for metric in MEASURES]
    for number, row in enumerate(rows, 1):
        for name in ("experiment", "method"):
            if row[name] is None:
                raise ValueError(f"{str(path)!r}, row {number}: {name} is empty")
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{str(path)!r}, row {number}: {name} must be finite, got {value}")
        for name in accuracies:
            if row[name] is not None and not 0 <= row[name] <= 1:
                raise ValueError(f"{str(path)!r}, row {number}: {name} must be between 0 and 1, got {row[name]}")
    return rows


def _check_classes(path: Path) -> list[ClassRow]:
    rows = read_class_table(path)
    for number, row in enumerate(rows, 1):
        for name in ("accuracy_before", "accuracy_after"):
            value = getattr(row, name)
            if not math.isnan(value) and not 0 <= value <= 1:
                raise ValueError(f"{str(path)!r}, row {number}: {name} must be between 0 and 1, got {value}")
    return rows
