"""Packages whose names are loaded at their first use, so that the command line can answer without PyTorch."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from typing import Any


def load_at_first_use(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` (PEP 562) of a package whose public names stand in imports under ``if TYPE_CHECKING:``.

    Type checkers read these imports; at run time the first use of a name does the one that it needs.

    Args:
        package: the package's ``__name__``.
    """

    @cache
    def modules() -> dict[str, str]:
        with open(str(sys.modules[package].__file__), encoding="utf-8") as file:
            body = ast.parse(file.read()).body
        imports = next(node for node in body if isinstance(node, ast.If)).body
        return {
            name.name: "." * node.level + node.module
            for node in imports
            if isinstance(node, ast.ImportFrom) and node.module is not None
            for name in node.names
        }

    def load(name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if name in modules():
            value = getattr(importlib.import_module(modules()[name], package), name)
        elif importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    return load, lambda: sorted({*vars(sys.modules[package]), *modules()})
