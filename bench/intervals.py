"""Means and their intervals, for every table that compares draw by draw."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from alphaext.study.rows import half_width


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and the ends of its 95% interval of Student's t; one value has an interval without ends.

    >>> [round(value, 2) for value in t_interval([1.0, 2.0, 3.0])]
    [2.0, -0.48, 4.48]
    """
    mean, half = statistics.fmean(values), half_width(values)
    if half is None:
        return mean, -math.inf, math.inf
    return mean, mean - half, mean + half
