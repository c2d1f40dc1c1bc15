"""The results of a study as tidy rows: their columns, their CSV file, and what they come to over seeds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..metrics.accuracy import SPLITS_AND_ALL
from ..utils.files import PathLike
from ..utils.records import number, read_csv, write_csv
from .plans import CANDIDATES, CONFIGURATION, EXPERIMENTS, METHODS, RETRAINED

__all__ = ["COLUMNS", "FRONT", "MEASURES", "ORIGINAL", "ResultsFile", "Row", "make_row", "read_rows", "summarize", "write_rows"]

Row = dict[str, Any]

ORIGINAL, FRONT = "original", "few-bias-front"
ROW_EXPERIMENTS = (ORIGINAL, *(name for name in EXPERIMENTS if name != "compare"), CANDIDATES, FRONT, "compare")
"""What the column ``experiment`` may hold, in the order of the rows."""

MEASURES = (
    *(f"{part}{kind}" for part in SPLITS_AND_ALL for kind in ("", "_top5", "_class_mean", "_class_mean_top5")),
    *(f"{part}_calibration_error" for part in SPLITS_AND_ALL),
)
"""The columns of each of validation and test samples, after ``val_`` and ``test_``: fractions of 1."""

COLUMNS = (
    *("experiment", "method", "classifier", "seed"),
    *CONFIGURATION,
    *("tau", "offset", "policy", "chosen_on"),
    *("epoch", "clamped", "seconds", "parameter_bytes", "dense_parameter_bytes", "error"),
    *(f"{part}_{metric}" for part in ("val", "test") for metric in MEASURES),
)
"""The columns of the results."""

_TEXT = (
    *("experiment", "method", "classifier", "pool", "metric", "rule", "init", "coefficients", "augment", "lr_schedule"),
    *("policy", "chosen_on", "error"),
)
_INTEGER = (
    *("seed", "top_k", "residual", "samples_per_class", "augment_neighbors", "few_samples", "epochs", "batch_size"),
    *("epoch", "clamped", "parameter_bytes", "dense_parameter_bytes"),
)
_TRUTH = ("shared", "projected_gradient", "prior_correction", "few_bias")

# What tells rows of one experiment apart: no two rows have all of these in common.
_KEY = ("experiment", "method", "seed", *CONFIGURATION, "tau", "offset")
# What is chosen, and may differ from seed to seed.
_CHOSEN = (*CONFIGURATION, "tau", "offset")
# Said by the method, but where they are what an experiment is about.
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


def without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with None for NaN, which equals nothing, not even what it is read back as."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def row_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a row from all others of a study."""
    return tuple(row[name] for name in _KEY)


def write_rows(rows: Iterable[Mapping[str, Any]], path: PathLike) -> None:
    """Write rows as CSV (UTF-8, with a header), whole or not at all: None as an empty field, numbers with all their digits.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = [make_row(experiment="gamma", gamma=0.1, shared=False, top_k=5)]
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
    """
    return read_csv(
        path,
        "a study's results",
        _check_header,
        lambda line: {name: _value(name, cell) for name, cell in zip(COLUMNS, line, strict=True)},
    )


def _check_header(header: list[str]) -> None:
    if tuple(header) != COLUMNS:
        different = sorted({*header} ^ {*COLUMNS})
        raise ValueError(f"its columns differ in {', '.join(different[:5]) or 'their order'}")


def _value(name: str, cell: str) -> Any:
    if cell == "":
        return None
    if name in _TEXT:
        return cell
    if name in _TRUTH:
        if cell not in ("true", "false"):
            raise ValueError(f"{name} must be true or false, got {cell!r}")
        return cell == "true"
    return number(name, cell, int if name in _INTEGER else float)


class ResultsFile:
    """The rows of a study and the file that they are kept in; rows that it holds already are read.

    Attributes:
        rows: by :func:`row_key`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[Any, ...], Row] = {}
        if path.exists():
            self.rows = {row_key(row): row for row in read_rows(path)}
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
        said = () if experiment == "start" else _SAID_BY_METHOD
        if experiment == "beyond":
            said = (*said, "top_k", "metric")
        varied = [name for name in _CHOSEN if name not in said and len({row[name] for row in own}) > 1]
        groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for row in own:
            group = (row["method"], *(() if experiment == "compare" else (row[name] for name in varied)))
            groups.setdefault(group, []).append(row)
        for (method, *_), members in groups.items():
            found.append(_summary(experiment, method, members, varied, original))
    return found


def _summary(
    experiment: str,
    method: str,
    rows: Sequence[Mapping[str, Any]],
    varied: Sequence[str],
    original: Mapping[str, Any] | None,
) -> dict[str, Any]:
    # Of the rivals' rows and of Alpha Nets what validation chose for them, not what they were all trained with.
    shown = [name for name in varied if experiment != "compare" or name in _chosen_of(method)]
    configuration = {
        name: _one_or_all([row[name] for row in rows]) for name in shown if any(row[name] is not None for row in rows)
    }
    result: dict[str, Any] = {
        "experiment": experiment,
        "method": method,
        "configuration": configuration,
        "seeds": len(rows),
        "errors": sum(row["error"] is not None for row in rows),
    }
    for name in ("few", "all"):
        values = [row[f"test_{name}"] for row in rows if row[f"test_{name}"] is not None]
        before = None if original is None else original[f"test_{name}"]
        mean = statistics.fmean(values) if values else None
        result[name] = mean
        result[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
        result[f"{name}_gain"] = None if mean is None or before is None else mean - before
    return result


def _chosen_of(method: str) -> tuple[str, ...]:
    if method in METHODS.values():
        return ("gamma",)
    if method in RETRAINED:
        return ("lr",)
    return ("metric", "tau", "offset")


def _one_or_all(values: Sequence[Any]) -> Any:
    distinct = list(dict.fromkeys(values))
    if len(distinct) == 1:
        return distinct[0]
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
