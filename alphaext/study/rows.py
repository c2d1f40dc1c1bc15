"""The results of a study as tidy rows: their columns, their CSV file, and what they come to over seeds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from ..metrics.accuracy import SPLITS_AND_ALL
from ..training.options import OPTIONS
from ..utils.checks import check_choice
from ..utils.files import PathLike, without_nan
from ..utils.records import Column, read_csv, write_csv
from .plans import CANDIDATES, CONFIGURATION, EXPERIMENTS, FORM_NAMES, RETRAINED, Configuration

Row = dict[str, Any]

ORIGINAL, FRONT = "original", "few-bias-front"
ROW_EXPERIMENTS = (ORIGINAL, *(name for name in EXPERIMENTS if name != "compare"), CANDIDATES, FRONT, "compare")
"""What the column ``experiment`` may hold, in the order of the rows."""

MEASURES = (
    *(f"{part}{kind}" for part in SPLITS_AND_ALL for kind in ("", "_top5", "_class_mean", "_class_mean_top5")),
    *(f"{part}_calibration_error" for part in SPLITS_AND_ALL),
)
"""The columns of each of validation and test samples, after ``val_`` and ``test_``: fractions of 1."""

_TEXT, _INTEGER, _NUMBER = Column(empty=None), Column(int, empty=None), Column(float, empty=None)
_OF_TYPE = {"str": _TEXT, "int": _INTEGER, "float": _NUMBER, "bool": Column(bool, empty=None)}
_COLUMNS: dict[str, Column] = {
    **dict.fromkeys(("experiment", "method"), Column()),
    "classifier": _TEXT,
    "seed": _INTEGER,
    **{
        name: _OF_TYPE[str(OPTIONS[name].type).removesuffix(" | None")] if name in OPTIONS else _INTEGER
        for name in CONFIGURATION
    },
    **dict.fromkeys(("tau", "offset"), _NUMBER),
    **dict.fromkeys(("policy", "chosen_on"), _TEXT),
    **dict.fromkeys(("epoch", "clamped"), _INTEGER),
    "seconds": _NUMBER,
    **dict.fromkeys(("parameter_bytes", "dense_parameter_bytes"), _INTEGER),
    "error": _TEXT,
    **{f"{part}_{metric}": Column(float, empty=None, fraction=True) for part in ("val", "test") for metric in MEASURES},
}
COLUMNS = tuple(_COLUMNS)
"""The columns of the results."""

SETTINGS = (*CONFIGURATION, "tau", "offset")
"""The columns that say what a row is a result of: what is trained, and what is chosen, which may differ between seeds."""

# What tells rows of one experiment apart: no two rows have all of these in common.
_KEY = ("experiment", "method", "seed", *SETTINGS)
# The method's name says these, unless an experiment is about them.
_SAID_BY_METHOD = (
    *("init", "projected_gradient", "epochs", "batch_size", "lr", "lr_schedule", "coefficients", "residual", "regularize"),
    *("samples_per_class", "augment", "augment_neighbors", "prior_correction", "few_bias"),
)
_SECONDS_BETWEEN_WRITES = 5.0


def make_row(**values: Any) -> Row:
    """A row with all columns, None where nothing is given or the value is NaN.

    Raises:
        TypeError: a value for a column that there is none of.

    Example:
        >>> row = make_row(experiment="gamma", gamma=0.5, test_few=float("nan"))
        >>> row["gamma"], row["test_few"], row["seed"]
        (0.5, None, None)
    """
    unknown = sorted(set(values) - set(COLUMNS))
    if unknown:
        raise TypeError(f"there is no column {unknown[0]!r}; the columns are {', '.join(COLUMNS)}")
    return without_nan({name: values.get(name) for name in COLUMNS})


def row_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a row from all others of a study."""
    return tuple(row[name] for name in _KEY)


def write_rows(rows: Iterable[Mapping[str, Any]], path: PathLike) -> None:
    """Write rows as CSV (UTF-8, with a header), whole or not at all: None as an empty field, numbers with all their digits.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = [make_row(experiment="gamma", method="Alpha Net", gamma=0.1, shared=False, top_k=5)]
        ...     write_rows(rows, f"{folder}/results.csv")
        ...     read_rows(f"{folder}/results.csv") == rows
        True
    """
    write_csv([COLUMNS, *([row[name] for name in COLUMNS] for row in rows)], path)


def read_rows(path: PathLike) -> list[Row]:
    """Read what :func:`write_rows` wrote, each value as it was.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: other columns, or a value that its column cannot have; the message names the line.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_rows([make_row(experiment="gamma", method="Alpha Net", gamma=0.1)], f"{folder}/results.csv")
        ...     [row["gamma"] for row in read_rows(f"{folder}/results.csv")]
        [0.1]
    """
    return read_csv(path, "a study's results", lambda _: _COLUMNS, dict)


def _checked(row: Row, place: str) -> Row:
    """A row that a study can go on from, of an experiment and of a configuration that there is."""
    try:
        check_choice(row["experiment"], "experiment", ROW_EXPERIMENTS)
        if row["top_k"] is not None:
            Configuration.of(**{name: row[name] for name in CONFIGURATION})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None
    return row


class ResultsFile:
    """The rows of a study and the file that they are kept in; rows that it holds already are read.

    Attributes:
        rows: by :func:`row_key`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[Any, ...], Row] = {}
        if path.exists():
            for number, row in enumerate(read_rows(path), start=2):
                self.rows[row_key(row)] = _checked(row, f"{path}, line {number}")
        self._written, self._changed = time.monotonic(), not path.exists()

    def add(self, row: Row) -> None:
        """Take up a row, in the place of one with the same key; the file is rewritten every few seconds."""
        self.rows[row_key(row)] = row
        self._changed = True
        if time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Write what the file does not have yet."""
        if self._changed:
            write_rows(self.in_order(), self.path)
            self._written, self._changed = time.monotonic(), False

    def arrange(self, keys: Iterable[tuple[Any, ...]]) -> None:
        """Put the rows of these keys first, in this order; :meth:`in_order` then goes by experiment."""
        first = {key: self.rows[key] for key in keys if key in self.rows}
        arranged = {**first, **self.rows}
        self._changed = self._changed or list(arranged) != list(self.rows)
        self.rows = arranged

    def in_order(self) -> list[Row]:
        """The rows, those of an experiment together."""
        return sorted(self.rows.values(), key=lambda row: ROW_EXPERIMENTS.index(row["experiment"]))

    def remove(self, experiment: str) -> None:
        """Forget the rows of an experiment."""
        kept = {key: row for key, row in self.rows.items() if row["experiment"] != experiment}
        self._changed = self._changed or len(kept) < len(self.rows)
        self.rows = kept


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95% interval of a mean (Student's t); None of fewer than two values.

    Example:
        >>> round(half_width([0.1, 0.2, 0.3]), 3), half_width([0.1])
        (0.248, None)
    """
    if len(values) < 2:
        return None
    return float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))


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
    rows: tuple[Mapping[str, Any], ...]

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

    def half_width(self, metric: str) -> float | None:
        """Half of the mean's 95% interval over seeds; None of one seed."""
        return half_width(self.values(metric))

    def gain(self, metric: str, original: Mapping[str, Any] | None) -> float | None:
        """By how much the mean lies above the original classifier."""
        mean = self.mean(metric)
        return None if mean is None or original is None or original[metric] is None else mean - original[metric]

    @property
    def failed(self) -> int:
        """How many seeds have no results."""
        return sum(row["error"] is not None for row in self.rows)


def group_rows(rows: Iterable[Mapping[str, Any]], by: Sequence[str] | None = None) -> list[Group]:
    """The rows of each method and configuration, in the order in which they come.

    Args:
        rows: of one experiment.
        by: the columns of the configuration; default those that vary among ``rows``.

    Example:
        >>> rows = [make_row(method="Alpha Net", seed=s, gamma=g, test_few=g / 2 + s / 8) for g in (0.5, 1.0) for s in (0, 1)]
        >>> [(group.configuration, group.mean("test_few")) for group in group_rows(rows)]
        [({'gamma': 0.5}, 0.3125), ({'gamma': 1.0}, 0.5625)]
    """
    rows = list(rows)
    names = varied(rows) if by is None else by
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], *(row[name] for name in names)), []).append(row)
    return [
        Group(method, dict(zip(names, values, strict=True)), tuple(members)) for (method, *values), members in groups.items()
    ]


def varied(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of configuration in which rows differ."""
    return [name for name in SETTINGS if len({row[name] for row in rows}) > 1]


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what the results come to over seeds: for each method and configuration the test accuracies of few and all.

    Args:
        rows: the results, with that of the original classifier among them.

    Returns:
        A dictionary for each: ``experiment``, ``method``, ``configuration`` (of what is varied in the experiment; of what was
        chosen, the values with a comma between), ``seeds`` (how many), ``errors`` (how many failed), and for ``few`` and
        ``all`` the mean, ``_std`` (of the sample; None of one seed) and ``_gain`` over the original.

    Example:
        >>> rows = [make_row(experiment="original", method="original", test_few=0.1, test_all=0.5)]
        >>> rows += [make_row(experiment="gamma", method="Alpha Net", seed=s, gamma=1.0, test_few=0.2 + s / 10, test_all=0.5)
        ...          for s in (0, 1)]
        >>> found = summarize(rows)[1]
        >>> found["seeds"], round(found["few"], 3), round(found["few_std"], 3), round(found["few_gain"], 3), found["all_gain"]
        (2, 0.25, 0.071, 0.15, 0.0)
    """
    original = next((row for row in rows if row["experiment"] == ORIGINAL), None)
    found = []
    for experiment in ROW_EXPERIMENTS:
        own = [row for row in rows if row["experiment"] == experiment]
        said = set(() if experiment == "start" else _SAID_BY_METHOD)
        said |= {"top_k", "metric"} if experiment == "beyond" else set()
        names = [name for name in varied(own) if name not in said]
        for group in group_rows(own, () if experiment == "compare" else names):
            # Of the rivals' rows and of Alpha Nets what validation chose for them, not what they were all trained with.
            shown = [name for name in names if experiment != "compare" or name in chosen_columns(group.method)]
            entry = {
                "experiment": experiment,
                "method": group.method,
                "configuration": {name: _one_or_all(group.values(name)) for name in shown if group.values(name)},
                "seeds": len(group.rows),
                "errors": group.failed,
            }
            for name in ("few", "all"):
                metric = f"test_{name}"
                entry[name], entry[f"{name}_std"] = group.mean(metric), group.spread(metric)
                entry[f"{name}_gain"] = group.gain(metric, original)
            found.append(entry)
    return found


def chosen_columns(method: str) -> tuple[str, ...]:
    """The columns that hold what validation chose for a method of "compare"."""
    if method in FORM_NAMES.values():
        return ("gamma",)
    return ("lr",) if method in RETRAINED else ("metric", "tau", "offset")


def _one_or_all(values: Sequence[Any]) -> Any:
    distinct = list(dict.fromkeys(values))
    if len(distinct) == 1:
        return distinct[0]
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
