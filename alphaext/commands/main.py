"""The ``alphaext`` command: what the command line gives becomes options, the options run."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from rich.console import Console

from ..utils.environment import __version__
from ..utils.files import without_nan
from ..utils.text import did_you_mean
from . import COMMANDS, CONFIGURABLE, Extract, Train
from .options import Options, add_flags, from_flags, kinds_of, read_config
from .results import is_main_process, started_by_torchrun

_DESCRIPTION = """\
Alpha Net: repair the rare classes of a trained classifier.

From a trained model and lists of images to a repaired checkpoint, in two commands:

  alphaext init          look at data and checkpoint, write mine.toml
  alphaext repair        all of the steps below, by one configuration

Step by step:

  alphaext doctor data   are the lists, images and the checkpoint as they should be?
  alphaext extract       images -> features, once
  alphaext fit           features + classifier -> a classifier whose rare classes work better
  alphaext evaluate      what was gained, what it cost, who paid
  alphaext export        the same checkpoint with only those rows changed

'alphaext train' trains a network first, 'alphaext baseline' makes the classifiers to compare with or to start from.
'alphaext demo' shows it all on handwritten digits within a minute.
"""

_EPILOG = """\
Options can stand in a TOML file, which serves all commands (--config FILE); flags go over it. Standard output has the results,
with --json as one JSON object; bars and messages go to standard error. Exit codes: 0 done, 1 it failed (a full disk, a training
that diverged), 2 wrong arguments or data that are not as they must be, 130 interrupted.
"""

_WIDTH_OF_FILES = 140


class _JsonParser(argparse.ArgumentParser):
    """A parser whose errors are on standard output as well, as those of commands under ``--json``."""

    def error(self, message: str) -> NoReturn:
        _print_error(message, "ArgumentError", 2)
        super().error(message)


def build_parser(kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser of all commands; each option comes from a field of the command's options class."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = kind(prog="alphaext", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"alphaext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, cls in COMMANDS.items():
        description = inspect.cleandoc(cls.__doc__ or "")
        summary = description.split("\n", 1)[0].rstrip(".")
        # Abbreviated flags would turn into others as flags are added.
        command = commands.add_parser(
            name,
            help=summary[0].lower() + summary[1:].replace("%", "%%"),
            usage=_usage(name, cls),
            description=description,
            formatter_class=formatter,
            allow_abbrev=False,
        )
        command.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, on standard output")
        command.add_argument("--traceback", action="store_true", help="show where an error came from")
        if cls in CONFIGURABLE:
            command.add_argument("--config", metavar="FILE", help="a TOML file with options; flags go over it")
        add_flags(command, cls, configurable=cls in CONFIGURABLE)
    return parser


def _parse(arguments: Sequence[str]) -> dict[str, Any]:
    """The command and its flags by name; ends with a message on what there is none of, and what was probably meant."""
    parser = build_parser(_JsonParser if "--json" in arguments else argparse.ArgumentParser)
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        parser.error(f"unknown command {command!r}{did_you_mean(command, COMMANDS)}")
    flags, unknown = parser.parse_known_args(arguments)
    if unknown:
        cls, flag = COMMANDS[flags.command], unknown[0].split("=")[0]
        parser.usage = _usage(flags.command, cls)
        if not flag.startswith("-"):
            parser.error(f"unexpected argument {flag!r}")
        parser.error(f"unknown option {flag}{did_you_mean(flag, _flags_of(cls))}")
    return vars(flags)


def _flags_of(cls: type[Options]) -> list[str]:
    common = ["--help", "--json", "--traceback", *(["--config"] if cls in CONFIGURABLE else [])]
    own = [kind for kind in kinds_of(cls) if not kind.positional]
    return common + [kind.flag for kind in own] + [f"--no-{kind.flag[2:]}" for kind in own if kind.type is bool]


def _usage(name: str, cls: type[Options]) -> str:
    """A line; argparse would list every option, which the help does anyway."""
    places = [f"{kind.name.upper()}{' ...' if kind.many else ''}" for kind in kinds_of(cls) if kind.positional]
    return " ".join(["alphaext", name, *places, "[options]"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong arguments or data, 130 interrupted.
    """
    flags = _parse(sys.argv[1:] if arguments is None else arguments)
    cls = COMMANDS[flags.pop("command")]
    as_json, show_traceback = flags.pop("json"), flags.pop("traceback")
    config_file = flags.pop("config", None) if cls in CONFIGURABLE else None
    errors = Console(stderr=True, soft_wrap=True)
    try:
        if started_by_torchrun() and not issubclass(cls, (Extract, Train)):
            raise ValueError("torchrun starts several processes, which share the work of train and extract alone")
        config = None if config_file is None else read_config(config_file, CONFIGURABLE)
        options: Any = from_flags(cls, flags, config)
        with warnings.catch_warnings():
            # As a line of text, without the place in the source that users have no use for.
            warnings.showwarning = lambda message, *_: errors.print(f"warning: {message}", markup=False, highlight=False)
            # Where there is no terminal, there is no width to keep to: wide enough for every table.
            width = None if sys.stdout.isatty() else _WIDTH_OF_FILES
            silent = as_json or getattr(options, "quiet", False) or not is_main_process()  # demo and info are never quiet
            result = options.run(Console(quiet=silent, width=width))
        if as_json and is_main_process():
            # Without letters beyond ASCII, which standard output may not know.
            print(json.dumps(without_nan(result), indent=2), flush=True)
    except KeyboardInterrupt:
        errors.print("interrupted" + ("; run the same command again to go on" if cls.goes_on else ""))
        return 130
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        code = _exit_code(error)
        if code is None:
            raise
        if as_json and is_main_process():
            _print_error(_message(error), type(error).__name__, code)
        errors.print(f"alphaext: {_message(error)}", markup=False, highlight=False)
        return code
    return int(result.get("exit_code", 0)) if isinstance(result, dict) else 0


def _exit_code(error: Exception) -> int | None:
    """2 for what the user gave, 1 for what went wrong on the way, None for what only a mistake in the program explains."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, ImportError, ValueError, TypeError)):
        return 2
    if isinstance(error, (OSError, ArithmeticError, MemoryError)):
        return 1
    # torch says by RuntimeError that memory ran out, and much else.
    return 1 if isinstance(error, RuntimeError) else None


def _print_error(message: str, kind: str, code: int) -> None:
    print(json.dumps({"error": message, "kind": kind, "exit_code": code}, indent=2), flush=True)


def _message(error: Exception) -> str:
    return str(error) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
