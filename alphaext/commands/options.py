"""Options of the commands: one dataclass a command, filled from a TOML file and from flags.

Each field is an option: its name is the flag's (``top_k`` is ``--top-k``) and the key in the TOML file, its default and its
help are said once. A class that brings options names the section of the file where they stand in ``section``; a command
inherits from the classes whose options it takes, so that one file serves all commands.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..utils.files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from ..utils.option_table import kind_of
from ..utils.text import did_you_mean

__all__ = ["Options", "add_flags", "from_flags", "from_table", "option", "read_config"]

OptionsType = TypeVar("OptionsType", bound="Options")
_ClassType = TypeVar("_ClassType")

# In words, and what stands for a value in the help.
_TYPES: dict[type, tuple[str, str | None]] = {
    bool: ("true or false", None),
    int: ("an integer", "N"),
    float: ("a number", "X"),
    str: ("text", "TEXT"),
    Path: ("a path", "PATH"),
}

# "cifar100:train" stands where the path of a data set may stand, and is not one.
_MAY_BE_NAMES = ("train", "val", "test")
# Classes are named by text or by number.
_MAY_BE_NUMBERS = ("few_classes",)
_NAME = re.compile(r"[\w.-]+:[\w.-]+")


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    positional: bool = False,
) -> Any:
    """A field of an :class:`Options` class. Without ``default`` the option must be given, in the file or as a flag.

    Args:
        default: its value where it is given nowhere.
        help: a line that says what it is, in lower case; the default is added to it.
        choices: the words allowed.
        metavar: what stands for the value in the help.
        positional: given by place instead of by name on the command line.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar, "positional": positional})


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all options classes share. Values are checked for their type and their choices when one is made."""

    section: ClassVar[str] = ""
    goes_on: ClassVar[bool] = False
    """Whether the same command goes on where it was interrupted."""

    def __post_init__(self) -> None:
        for kind in kinds_of(type(self)):
            object.__setattr__(self, kind.name, kind.check(getattr(self, kind.name), kind.name))

    def to_dict(self) -> dict[str, Any]:
        """All options by name, paths as text: what JSON can hold."""
        return {kind.name: _plain(getattr(self, kind.name)) for kind in kinds_of(type(self))}


def from_table(
    entries: Iterable[Field[Any]], made_of: Callable[[Field[Any]], tuple[Any, Any]] | None = None
) -> Callable[[type[_ClassType]], type[_ClassType]]:
    """A decorator, below ``@dataclass``: give a command options of an :class:`alphaext.utils.option_table.OptionTable`.

    Args:
        entries: the table's fields.
        made_of: what becomes of each, its type and its :func:`option`; without, the same with the same default.
    """

    def decorate(cls: type[_ClassType]) -> type[_ClassType]:
        for entry in entries:
            cls.__annotations__[entry.name], made = (made_of or _the_same)(entry)
            setattr(cls, entry.name, made)
        return cls

    return decorate


def type_of(entry: Field[Any]) -> Any:
    """The type of a table's option that has a value."""
    plain = next(each for each in _TYPES if each.__name__ == kind_of(entry))
    return tuple[plain, ...] if str(entry.type).startswith("Sequence") else plain  # type: ignore[valid-type]


def _the_same(entry: Field[Any]) -> tuple[Any, Any]:
    given, kind = entry.metadata, type_of(entry)
    made = option(entry.default, help=given["help"], choices=given["choices"], metavar=given.get("metavar"))
    return kind | None if str(entry.type).endswith("| None") else kind, made


@dataclass(frozen=True)
class Kind:
    """What an option takes: its type without None and without tuple, and what surrounds it."""

    name: str
    section: str
    type: type
    optional: bool
    many: bool
    default: Any
    help: str
    choices: Sequence[str] | None
    metavar: str | None
    positional: bool

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def place(self) -> str:
        """Where it stands in a configuration."""
        return f"in [{self.section}]" if self.section else "at the top"

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def check(self, value: Any, name: str, folder: Path | None = None) -> Any:
        """``value`` as what the option holds; ``folder`` is what a relative path is relative to."""
        if value is None and self.optional:
            return None
        if self.many:
            if isinstance(value, (str, os.PathLike)) or not isinstance(value, Iterable):
                value = (value,)
            return tuple(self._check_one(entry, name, folder) for entry in value)
        return self._check_one(value, name, folder)

    def _check_one(self, value: Any, name: str, folder: Path | None) -> Any:
        wanted = self.type
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"{name} must be a number of at most 64 bits, got one of {value.bit_length()}")
        if wanted is Path and isinstance(value, (str, os.PathLike)):
            path = Path(value).expanduser()
            is_name = self.name in _MAY_BE_NAMES and _NAME.fullmatch(os.fspath(value))
            return path if folder is None or is_name else folder / path
        if isinstance(value, str) and value.startswith("hf:") and folder is not None:
            return f"hf:{folder / Path(value[3:]).expanduser()}"
        if self.name in _MAY_BE_NUMBERS and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool)):
            raise TypeError(f"{name} must be {_TYPES[wanted][0]}{' or nothing' if self.optional else ''}, got {value!r}")
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"{name} must be one of {', '.join(self.choices)}, got {value!r}")
        return value

    def parse(self, text: str) -> Any:
        """One value from the command line."""
        try:
            value = self.type(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {_TYPES[self.type][0]}, got {text!r}") from None
        return value.expanduser() if isinstance(value, Path) else value


def kinds_of(cls: type[Options]) -> list[Kind]:
    """The options of a class, those of its own section last; of bases without a section they are in its own."""
    sections: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        for name in inspect.get_annotations(base):
            sections[name] = base.__dict__.get("section", cls.section)
    hints = typing.get_type_hints(cls)
    kinds = []
    for entry in dataclasses.fields(cls):
        kinds.append(Kind(entry.name, sections[entry.name], *_unwrap(hints[entry.name]), entry.default, **entry.metadata))
    return kinds


def _unwrap(hint: Any) -> tuple[type, bool, bool]:
    """A type hint as (the plain type, may be None, is a tuple of many)."""
    arguments = typing.get_args(hint)
    optional = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    if optional:
        (hint,) = (argument for argument in arguments if argument is not type(None))
        arguments = typing.get_args(hint)
    many = typing.get_origin(hint) is tuple
    plain = arguments[0] if many else hint
    assert plain in (bool, int, float, str, Path), hint
    return plain, optional, many


def add_flags(parser: argparse.ArgumentParser, cls: type[Options], *, configurable: bool = True) -> None:
    """Give ``parser`` a flag for every option of ``cls``, in groups by section. What is not given is not in the result."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    # The command's own options first, and of these what must be given.
    own = cls.__dict__.get("section", "")

    def place(kind: Kind) -> tuple[bool, str, bool, bool]:
        return kind.section != own, kind.section, not kind.positional, not kind.required

    for kind in sorted(kinds_of(cls), key=place):
        if kind.section not in groups:
            title = f"options, {kind.place} of a configuration" if configurable else "its options"
            groups[kind.section] = parser.add_argument_group(title)
        group = groups[kind.section]
        text = kind.help.replace("%", "%%") + (" (required)" if kind.required else "")
        if not kind.required and kind.default not in (None, ()):
            default = kind.default if not isinstance(kind.default, tuple) else " ".join(map(str, kind.default))
            text += f" (default: {str(default).lower() if kind.type is bool else default})".replace("%", "%%")
        if kind.type is bool:
            group.add_argument(kind.flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
            continue
        settings: dict[str, Any] = {"type": kind.parse, "help": text, "choices": kind.choices}
        settings["metavar"] = kind.metavar or (None if kind.choices else _TYPES[kind.type][1])
        if kind.positional and kind.choices:
            # argparse would ask whether the default is among them; they are checked when the options are made.
            settings |= {"choices": None, "metavar": "{" + ",".join(kind.choices) + "}"}
        if kind.many:
            settings["nargs"] = "*" if kind.positional or kind.optional else "+"
        elif kind.positional:
            settings["nargs"] = "?"
        # With SUPPRESS as default argparse would still set an empty list: from_flags passes those over.
        group.add_argument(kind.name if kind.positional else kind.flag, default=argparse.SUPPRESS, **settings)


def from_flags(
    cls: type[OptionsType], flags: Mapping[str, Any], config: Mapping[str, Mapping[str, Any]] | None = None
) -> OptionsType:
    """Make the options of a command: flags first, then the file's, then the defaults.

    Args:
        cls: the command's options.
        flags: what the command line gave, by name.
        config: what :func:`read_config` returned.

    Raises:
        ValueError, TypeError: an option that must be given and is not, or a value that does not fit; the message names it.
    """
    values = {}
    for kind in kinds_of(cls):
        if kind.name in flags and not (kind.positional and kind.many and not flags[kind.name]):
            values[kind.name] = flags[kind.name]
        elif config is not None and kind.name in config.get(kind.section, {}):
            values[kind.name] = config[kind.section][kind.name]
        elif kind.required:
            given = kind.name.upper() if kind.positional else kind.flag
            raise ValueError(f"{given} must be given, or {kind.name} {kind.place} of the configuration: {kind.help}")
    return cls(**values)


_LONGEST = 2**20


def read_config(path: str | os.PathLike[str], commands: Iterable[type[Options]]) -> dict[str, dict[str, Any]]:
    """Read a TOML file that serves all ``commands``: options by section, those at its top under "".

    Relative paths are relative to the file, so that it can be used from anywhere.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no TOML, or has a section or a key that no command knows (with what was probably meant).
        TypeError: a value of another type than its option's.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"config must be a TOML file, there is no {str(file)!r}")
    text = read_text(file, "a configuration")
    if len(text) > _LONGEST or max(line.count(".") for line in text.splitlines() or [""]) > 1000:  # a key in keys in keys ...
        raise ValueError(f"config {str(file)!r} is no configuration: it is longer than {_LONGEST:,}, or a line has 1,000 dots")
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets without end
        raise ValueError(f"config {str(file)!r} is not TOML: {error}") from error
    known: dict[str, dict[str, Kind]] = {"": {}}
    for cls in commands:
        for kind in kinds_of(cls):
            known.setdefault(kind.section, {})[kind.name] = kind
    folder = file.absolute().parent
    result: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        if key in known and isinstance(value, dict):
            entries, section = value, key
        elif key in known[""] or not isinstance(value, dict):
            entries, section = {key: value}, ""
        else:
            raise ValueError(f"config {str(file)!r} has an unknown section [{key}]{did_you_mean(key, known)}")
        for name, entry in entries.items():
            place = f"{name} in [{section}]" if section else name
            if name not in known[section]:
                where = f"in section [{section}]" if section else "at its top"
                raise ValueError(
                    f"config {str(file)!r} has an unknown key {name!r} {where}{did_you_mean(name, known[section])}"
                )
            checked = known[section][name].check(entry, f"config {str(file)!r}: {place}", folder)
            result.setdefault(section, {})[name] = checked
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
