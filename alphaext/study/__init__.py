"""The paper's experiments on one data set, in one table."""

from __future__ import annotations

from .plans import EXPERIMENTS, POLICIES, StudyOptions, choose
from .rows import read_rows, summarize
from .run import run_study

__all__ = [
    "EXPERIMENTS",
    "POLICIES",
    "StudyOptions",
    "choose",
    "read_rows",
    "run_study",
    "summarize",
]
