"""Tables of options: dataclasses whose fields say what each option is and which values it takes."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import Field, field, fields
from typing import Any, TypeVar

from .checks import check_choice, check_flag, check_integer, check_number

_SAME: Any = object()
_Function = TypeVar("_Function", bound=Callable[..., Any])
_Table = TypeVar("_Table", bound="type[OptionTable]")

_CHECKS: dict[str, Any] = {"bool": check_flag, "int": check_integer, "float": check_number}
_BOUNDS = ("minimum", "maximum", "above", "below")


def table_option(default: Any, help: str = "", *, choices: Sequence[str] | None = None, **more: Any) -> Any:
    """A field of an :class:`OptionTable`.

    Args:
        default: its value where it is not given.
        help: a line that says what it is, in lower case; without, no command has a flag for it.
        choices: the words allowed.
        more: ``more_help``, sentences that :func:`documented` adds; bounds, those of :func:`check_integer` and
            :func:`check_number`; ``distinct=True``, a list of such values, each kept once; ``metavar``, what stands for the
            value in a command's help; and what else readers of a table look for.
    """
    return field(default=default, metadata={"help": help, "choices": choices, **more})


def kind_of(entry: Field[Any]) -> str:
    """The type of an option that has a value: of a list, that of its entries."""
    return str(entry.type).removesuffix(" | None").removeprefix("Sequence[").removesuffix("]")


def check_known(options: Mapping[str, Any], known: Collection[str]) -> None:
    """Check that there are such options."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; the options are {', '.join(sorted(known))}")


def with_options(entries: Iterable[Field[Any]], default: Any = _SAME) -> Callable[[_Function], _Function]:
    """A decorator: the function's ``**options`` are those of a table; its signature shows them.

    The signature shows the table's values, or ``default`` for all.
    """
    more = [
        inspect.Parameter(
            entry.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=entry.default if default is _SAME else default,
            annotation=entry.type,
        )
        for entry in entries
    ]

    def decorate(function: _Function) -> _Function:
        own = inspect.signature(function)
        kept = [each for each in own.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        function.__signature__ = own.replace(parameters=[*kept, *more])  # type: ignore[attr-defined]
        return function

    return decorate


def documented(table: _Table) -> _Table:
    """A decorator, above ``@dataclass``: what the fields say of themselves becomes the docstring's list of attributes."""
    if table.__doc__:  # none under -OO
        text = inspect.cleandoc(table.__doc__)
        around: dict[str, Any] = {"width": 120, "initial_indent": 4 * " ", "subsequent_indent": 8 * " "}
        lines = (textwrap.fill(_said(entry), **around) for entry in fields(table))  # type: ignore[arg-type]
        before, mark, after = text.partition("Raises:\n")
        table.__doc__ = f"{before}Attributes:\n" + "\n".join(lines) + f"\n\n{mark}{after}"
    return table


def _said(entry: Field[Any]) -> str:
    more = entry.metadata.get("more_help", "")
    return f"{entry.name}: {entry.metadata['help']}. {more}".rstrip()


class OptionTable:
    """Options, each checked by what its field says of it."""

    def __post_init__(self) -> None:
        # Kept as Python's own numbers: checkpoints hold them, and NumPy's would make those unreadable without unpickling.
        for entry in fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, entry.name, _checked(entry, getattr(self, entry.name)))


def _checked(entry: Field[Any], value: Any) -> Any:
    if value is None and str(entry.type).endswith("| None"):
        return None
    if not entry.metadata.get("distinct"):
        return value if str(entry.type).startswith("Sequence") else _checked_one(entry, value)
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{entry.name} must be a list, got {value!r}")
    values = tuple(dict.fromkeys(_checked_one(entry, each) for each in value))
    if not values:
        raise ValueError(f"{entry.name} must be given at least one value, got none")
    return values


def _checked_one(entry: Field[Any], value: Any) -> Any:
    given = entry.metadata
    if given["choices"] is not None:
        return check_choice(value, entry.name, given["choices"])
    check = _CHECKS.get(kind_of(entry))
    return value if check is None else check(value, entry.name, **{each: given[each] for each in _BOUNDS if each in given})
