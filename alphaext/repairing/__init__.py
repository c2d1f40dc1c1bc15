"""The whole in one call."""

from __future__ import annotations

from .loader import RepairedModel, extract_features, repair_model
from .new_classes import add_classes
from .repair import Repair, repair

__all__ = [
    "Repair",
    "RepairedModel",
    "add_classes",
    "extract_features",
    "repair",
    "repair_model",
]
