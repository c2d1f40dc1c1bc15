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
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} {package.replace('PIL', 'Pillow')} ({error}): pip install {install}") from error
