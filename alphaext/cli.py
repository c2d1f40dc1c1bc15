"""The ``alphaext`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console


def _integer(text: str, minimum: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
    if not minimum <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be at least {minimum} and below 2^32, got {value}")
    return value


def _count(text: str) -> int:
    return _integer(text, 1)


def _seed(text: str) -> int:
    return _integer(text, 0)


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a directory that exists, got {text!r}")
    return path


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="alphaext", description="Alpha Net: repair the rare classes of a trained classifier.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="long-tailed digits, before and after (no network, no GPU, under a minute)",
        description="Make scikit-learn's handwritten digits long-tailed, train a small network on them, and repair its "
        "classifier: a table of the accuracies before and after, the learned alphas, and a picture of both.",
    )
    demo.add_argument("--draws", type=_count, default=8, help="long-tailed data sets to draw (default: %(default)s)")
    demo.add_argument("--seed", type=_seed, default=0, help="of the first draw (default: %(default)s)")
    demo.add_argument("--output", type=_png, default=Path("alphaext_demo.png"), help="PNG to write (default: %(default)s)")
    commands.add_parser("info", help="how the extension was built", description="Print how the extension was built.")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 1 failed, 2 wrong arguments, 130 interrupted)."""
    options = build_parser().parse_args(arguments)
    console = Console()
    try:
        if options.command == "demo":
            from .demo import run_demo

            run_demo(options.draws, options.seed, options.output, console)
        else:
            from .ops import build_info

            for name, value in build_info().items():
                console.print(f"{name}: {value}", highlight=False, markup=False)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        return 130
    except OSError as error:
        Console(stderr=True).print(f"alphaext: {error}", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
