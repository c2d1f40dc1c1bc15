"""Numbers as text."""

from __future__ import annotations

import math


def percent(fraction: float | None, *, sign: bool = False) -> str:
    """A fraction of 1 as percent with one decimal; "-" for NaN and None.

    Example:
        >>> percent(0.4567), percent(0.0123, sign=True), percent(-0.00001, sign=True), percent(float("nan"))
        ('45.7', '+1.2', '0.0', '-')
    """
    if fraction is None or math.isnan(fraction):
        return "-"
    text = f"{100 * fraction:+.1f}" if sign else f"{100 * fraction:.1f}"
    # What rounds to nothing has no direction.
    return "0.0" if text in ("+0.0", "-0.0") else text
