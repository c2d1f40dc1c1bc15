"""Numbers as text."""

from __future__ import annotations

import math


def number_text(value: float | None, form: str) -> str:
    """A number in a format such as ``".3g"``; "-" for NaN and None.

    Example:
        >>> number_text(0.123456, ".3g"), number_text(None, ".3g")
        ('0.123', '-')
    """
    return "-" if value is None or math.isnan(value) else f"{value:{form}}"


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
