"""A look at data and classifiers before they are used."""

from __future__ import annotations

from .accuracy import at_chance, chance_level, check_accuracy
from .check import check_classifier_order, check_data
from .other_transforms import other_transforms
from .report import DataReport, Finding

__all__ = [
    "DataReport",
    "Finding",
    "at_chance",
    "chance_level",
    "check_accuracy",
    "check_classifier_order",
    "check_data",
    "other_transforms",
]
