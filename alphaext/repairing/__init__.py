"""The whole in one call."""

from __future__ import annotations

from .loader import RepairedModel, extract_features, repair_model
from .new_classes import add_classes
from .recommend import Recommendation, recommend
from .repair import Repair, repair

__all__ = [
    "Recommendation",
    "Repair",
    "RepairedModel",
    "add_classes",
    "extract_features",
    "recommend",
    "repair",
    "repair_model",
]
