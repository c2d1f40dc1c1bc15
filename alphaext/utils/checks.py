"""Checks of arguments: numbers and choices. Those of tensors are in ``tensors``.

A check raises ``TypeError`` for a wrong type or dtype and ``ValueError`` for a wrong value, shape or device. Its
message names the argument, what was seen and what is allowed.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from .text import one_form

_Checked = TypeVar("_Checked")

PRECISIONS = ("float32", "bfloat16")
"""What a network computes in. ``"bfloat16"`` is that of products and convolutions; weights stay as they are."""


def format_ids(ids: Iterable[object], limit: int = 10) -> str:
    """Write the first ``limit`` ids, and how many there are in all if there are more."""
    listed = list(ids)
    text = ", ".join(str(identifier) for identifier in listed[:limit])
    return text if len(listed) <= limit else f"{text}, ... ({len(listed)} in all)"


def _is_bool(value: object) -> bool:
    # NumPy's too, by its name: options are checked before NumPy is loaded.
    return isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")


def check_integer(value: int, name: str, minimum: int | None = None, maximum: int | None = None) -> int:
    """Return ``value`` as an ``int`` after checking that it is an integer (not a bool) within the bounds."""
    if _is_bool(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if (minimum is not None and integer < minimum) or (maximum is not None and integer > maximum):
        if minimum is not None and maximum is not None:
            allowed = f"between {minimum} and {maximum}"
        else:
            allowed = f"at least {minimum}" if minimum is not None else f"at most {maximum}"
        raise ValueError(f"{name} must be {allowed}, got {_shown(integer)}")
    return integer


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes no number of so many digits
        return "one of more than 4,000 digits"


def check_together(**values: object) -> None:
    """Check that all of ``values`` (name=value) are given, or none (None)."""
    if len({value is None for value in values.values()}) > 1:
        raise ValueError(f"{' and '.join(values)} must be given together")


def check_choice(value: str, name: str, choices: Sequence[str]) -> str:
    """Return ``value`` after checking that it is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {_shown(value)}")
    return value


def check_flag(value: object, name: str) -> bool:
    """Return ``value`` as a ``bool`` after checking that it is True or False, Python's or NumPy's."""
    if not _is_bool(value):
        raise TypeError(f"{name} must be True or False, got {_shown(value)}")
    return bool(value)


def check_kind(value: object, kind: type, name: str, *, what: str = "", hint: str = "") -> None:
    """Check that ``value`` is a ``kind``; the error ends with ``hint``, which says how to make one."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what or kind.__name__}, got {type(value).__name__}{hint and '; '}{hint}")


def check_text(value: object, name: str) -> None:
    """Check that ``value`` is a text, or None."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be text or None, got {value!r}")


def if_given(check: Callable[..., _Checked], value: Any, *how: Any, **bounds: Any) -> _Checked | None:
    """An argument that may be left out: what ``check`` makes of it, or None."""
    return None if value is None else check(value, *how, **bounds)


def check_number(
    value: object,
    name: str,
    *,
    above: float | None = None,
    minimum: float | None = None,
    below: float | None = None,
    maximum: float | None = None,
) -> float:
    """Return ``value`` as a ``float`` after checking that it is a finite number (not a bool) within the bounds."""
    bounds = (
        ("above", above, operator.gt),
        ("at least", minimum, operator.ge),
        ("below", below, operator.lt),
        ("at most", maximum, operator.le),
    )
    given = [(words, bound, holds) for words, bound, holds in bounds if bound is not None]
    allowed = " and ".join(["finite", *(f"{words} {bound:g}".replace("e+0", "e") for words, bound, _ in given)])
    if _is_bool(value) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, {allowed}, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not all(holds(number, bound) for _, bound, holds in given):
        raise ValueError(f"{name} must be {allowed}, got {_shown(value)}")
    return number


def check_thresholds(few_below: int, many_above: int) -> tuple[int, int]:
    """Return both as ``int`` after checking that no class would be both few and many."""
    few_below = check_integer(few_below, "few_below", minimum=0)
    many_above = check_integer(many_above, "many_above", minimum=0)
    if few_below > many_above + 1:
        raise ValueError(
            f"few_below must be at most many_above + 1 = {many_above + 1}, got {few_below}: "
            f"classes of {many_above + 1} to {few_below - 1} samples would be both few and many"
        )
    return few_below, many_above


def check_class_names(names: Sequence[str], num_classes: int | None, *, distinct: bool = True) -> tuple[str, ...]:
    """Return ``names`` as a tuple after checking that they are texts, one a class, and different if ``distinct``."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"class_names must be a sequence of texts, got {names!r:.200}")
    checked = tuple(names)
    if not checked:
        raise ValueError("class_names must name at least one class, got none")
    if num_classes is not None and len(checked) != num_classes:
        raise ValueError(f"class_names must have one name a class, got {len(checked)} names for num_classes = {num_classes}")
    most_common, times = Counter(map(one_form, checked)).most_common(1)[0]
    if distinct and times > 1:
        forms = len({name for name in checked if one_form(name) == most_common})
        how = f", with accents in {forms} forms of Unicode (NFC, NFD)" if forms > 1 else ""
        raise ValueError(f"class_names must be different, got {most_common!r} {times} times{how}")
    return checked


def names_or_ids(class_names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """A name for each class: those given, checked, or else the ids as text."""
    if class_names is None:
        return tuple(map(str, range(num_classes)))
    return check_class_names(class_names, num_classes, distinct=False)
