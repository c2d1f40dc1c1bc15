"""Numbers as text, and words that were meant."""

from __future__ import annotations

import difflib
import itertools
import math
import unicodedata
from collections.abc import Collection, Iterable


def number_text(value: float | None, form: str) -> str:
    """A number in a format such as ``".3g"``; "-" for NaN and None.

    Example:
        >>> number_text(0.123456, ".3g"), number_text(None, ".3g")
        ('0.123', '-')
    """
    return "-" if value is None or math.isnan(value) else f"{value:{form}}"


def value_text(value: object) -> str:
    """An option's value as text.

    Example:
        >>> value_text(0.7), value_text(5), value_text(True), value_text(None)
        ('0.7', '5', 'yes', 'none')
    """
    words = {None: "none", True: "yes", False: "no"}
    if value is None or isinstance(value, bool):
        return words[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def one_form(text: str) -> str:
    """Text with each accented letter as one character (NFC), as most systems write it; macOS takes them apart (NFD).

    Example:
        >>> one_form("cafe\\u0301") == "caf\\u00e9"
        True
    """
    return unicodedata.normalize("NFC", text)


def same_names(first: Iterable[str], second: Iterable[str]) -> bool:
    """Whether names are the same in the same order, whatever form their accents are in."""
    return [*map(one_form, first)] == [*map(one_form, second)]


def first_free(name: str, separator: str, taken: Collection[str]) -> str:
    """``name``, or the first that nothing else has of ``name`` with a number behind it, from 2 on.

    Example:
        >>> first_free("crt", "-", ["crt", "crt-2"])
        'crt-3'
    """
    numbered = (f"{name}{separator}{number}" for number in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if each not in taken)


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


def did_you_mean(word: str, known: Iterable[str], limit: int = 20) -> str:
    """How an error message goes on after an unknown ``word``: with the nearest of the known ones, or with the first of all.

    Example:
        >>> did_you_mean("Wild cat", ["octopus", "wild_cat"]), did_you_mean("dog", ["octopus", "wild_cat"])
        ("; did you mean 'wild_cat'?", '; known are octopus, wild_cat')
    """
    names = [name for name in known if name]
    folded = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(word.casefold(), folded, n=1)
    if close:
        return f"; did you mean {folded[close[0]]!r}?"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"; known are {', '.join(sorted(names)[:limit]) or 'none'}{more}"
