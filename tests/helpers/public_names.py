"""What examples in docstrings may use by its bare name: all that a package of alphaext exports."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import torch

import alphaext

PACKAGES = ["alphaext", *(f"alphaext.{info.name}" for info in pkgutil.iter_modules(alphaext.__path__) if info.ispkg)]


def public_names() -> dict[str, Any]:
    names: dict[str, Any] = {"torch": torch, "nn": torch.nn}
    for package in PACKAGES:
        module = importlib.import_module(package)
        names |= {name: getattr(module, name) for name in getattr(module, "__all__", ())}
    return names
