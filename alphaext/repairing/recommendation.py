"""What a comparison of methods found: a table, one sentence, a layer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from torch import nn

from ..classes import ClassSplit
from ..metrics.accuracy import SPLITS_AND_ALL
from ..utils.records import data_frame
from ..utils.text import percent

__all__ = ["Candidate", "Recommendation"]


@dataclass(frozen=True)
class Candidate:
    """A method, measured on samples by which nothing of it was chosen.

    Attributes:
        method: its name, such as ``"few-bias"``, ``"few"`` or ``"discriminant"``; ``"original"`` is the classifier as it is.
        few, medium, many, all: top-1 accuracy, fractions of 1; NaN for a part without samples.
        calibration_error: expected calibration error over all.
        base_change: of the accuracy over samples of base classes, against the original classifier.
        seconds: what it took to make, once.
        few_rows_only: whether the base classes' rows stay as they are, to the bit.
        error: why there is none; empty otherwise.
    """

    method: str
    few: float = math.nan
    medium: float = math.nan
    many: float = math.nan
    all: float = math.nan
    calibration_error: float = math.nan
    base_change: float = math.nan
    seconds: float = math.nan
    few_rows_only: bool = False
    error: str = ""


@dataclass(frozen=True)
class Recommendation:
    """What :func:`recommend` found.

    Attributes:
        method: the recommended one.
        advice: one sentence that says so, and why.
        linear: its classifier, made with all samples: none is held back from it.
        candidates: all methods, what changes least first.
        split: which classes are few, medium and many.
    """

    method: str
    advice: str
    linear: nn.Linear = field(repr=False)
    candidates: list[Candidate] = field(repr=False)
    split: ClassSplit = field(repr=False)

    def table(self) -> Any:
        """The candidates as a pandas ``DataFrame`` where pandas is installed, else as a list of dictionaries."""
        return data_frame([asdict(candidate) for candidate in self.candidates], "method")

    def _cells(self) -> list[tuple[str, ...]]:
        header = ("method", *(f"{part}, %" for part in SPLITS_AND_ALL), "ECE, %", "base change, %", "seconds", "few rows only")
        rows = [
            (
                candidate.method,
                *(percent(getattr(candidate, part)) for part in (*SPLITS_AND_ALL, "calibration_error")),
                percent(candidate.base_change, sign=True),
                "-" if math.isnan(candidate.seconds) else f"{candidate.seconds:.2f}",
                candidate.error or ("yes" if candidate.few_rows_only else "no"),
            )
            for candidate in self.candidates
        ]
        return [header, *rows]

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([*lines, self.advice])

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self._cells())
        return f"<table>{rows}</table><p>{escape(self.advice)}</p>"
