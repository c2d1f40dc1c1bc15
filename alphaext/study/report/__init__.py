"""What studies wrote, as one page, figures and tables."""

from __future__ import annotations

from .write import ReportFiles, write_report

__all__ = [
    "ReportFiles",
    "write_report",
]
