"""A look at data and classifiers before they are used."""

from __future__ import annotations

from .check import check_classifier_order, check_data
from .report import DataReport, Finding

__all__ = [
    "DataReport",
    "Finding",
    "check_classifier_order",
    "check_data",
]
