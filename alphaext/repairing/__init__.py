"""The whole in one call."""

from __future__ import annotations

from .loader import RepairedModel, extract_features, repair_model
from .new_classes import add_classes
from .preset import Repair
from .recommend import recommend
from .recommendation import Recommendation
from .repair import repair

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
