"""Packages that only some of the work needs, imported when it comes to them."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import shlex
from typing import Any


def require(module: str, purpose: str, install: str) -> Any:
    """Import ``module``.

    Args:
        module: its dotted name.
        purpose: what needs it, as the beginning of the error.
        install: what ``pip install`` is to be given: packages, or ``'alphaext[EXTRA]'`` for those of an extra of this package,
            which no index has under this name.

    Raises:
        ImportError: it is not installed; the message has the command.
    """
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} {package.replace('PIL', 'Pillow')} ({error}): pip install {_installable(install)}"
        ) from error


def _installable(install: str) -> str:
    """What ``pip install`` can find: the packages of an extra in place of its name."""
    extra = re.fullmatch(r"'alphaext\[(\w+)\]'", install)
    if extra is None:
        return install
    try:
        listed = importlib.metadata.requires("alphaext") or []
    except importlib.metadata.PackageNotFoundError:  # in a copy of the sources that was not installed
        listed = []
    # As in: timm>=1.0; extra == "timm"
    parts = (requirement.partition(";") for requirement in listed)
    packages = [name.strip() for name, _, condition in parts if re.search(rf"extra == ['\"]{extra[1]}['\"]", condition)]
    return shlex.join(packages) or install
