"""The whole in one call."""

from __future__ import annotations

from .repair import Repair, repair

__all__ = [
    "Repair",
    "repair",
]
