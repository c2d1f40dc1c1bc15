"""Packages that only some of the work needs, imported when it comes to them."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, purpose: str, install: str) -> Any:
    """Import ``module``.

    Args:
        module: its dotted name.
        purpose: what needs it, as the beginning of the error.
        install: what ``pip install`` is to be given.

    Raises:
        ImportError: it is not installed; the message has the command.
    """
    name = module.partition(".")[0].replace("PIL", "Pillow")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} {name} ({error}): pip install {install}") from error
