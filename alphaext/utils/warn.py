"""Warnings that name the caller's line, not one of this package."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, with the line outside this package that the work was asked for in, however deep in it the warning arises."""
    frame: FrameType | None = sys._getframe()
    level, depth = 1, 0
    while frame is not None:
        depth += 1
        if frame.f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]:
            level = depth + 1
        frame = frame.f_back
    warnings.warn(message, category, stacklevel=level)
