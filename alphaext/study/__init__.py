"""The paper's experiments on one data set, in one table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import load_at_first_use

if TYPE_CHECKING:
    from .plans import EXPERIMENTS, POLICIES, StudyOptions, choose
    from .rows import read_rows, summarize
    from .run import run_study
else:
    __getattr__, __dir__ = load_at_first_use(__name__)

__all__ = [
    "EXPERIMENTS",
    "POLICIES",
    "StudyOptions",
    "choose",
    "read_rows",
    "run_study",
    "summarize",
]
