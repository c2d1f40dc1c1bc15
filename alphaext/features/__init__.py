"""Cached features: extracted once, read for everything else."""

from __future__ import annotations

from .extraction import extract
from .store import DTYPES, Features, read_features, write_features

__all__ = [
    "DTYPES",
    "Features",
    "extract",
    "read_features",
    "write_features",
]
