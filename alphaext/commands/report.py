"""``alphaext report``: what studies found, as one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from . import results
from .options import option
from .shared import CommonOptions


@dataclass(frozen=True, kw_only=True)
class Report(CommonOptions):
    """Turn the results of studies into one HTML file, figures (PNG and SVG) and tables (Markdown).

    Nothing is computed again: all is read from what 'alphaext study' wrote. The first figure is the trade-off front of few
    accuracy and accuracy over all, with one constant added to the few logits as the line to beat. Several studies, such as
    those of several classifiers, go into one report.

    Example:
        alphaext report --study joint-study crt-study --output report
    """

    section: ClassVar[str] = "report"
    study: tuple[Path, ...] = option(metavar="FOLDER", help="folders that 'alphaext study' wrote")
    output: Path = option(metavar="FOLDER", help="where report.html, tables.md and figures/ go")
    title: str | None = option(None, help="of the page")
    overwrite: bool = option(False, help="replace files that are there and are not an earlier report's")

    def run(self, console: Console | None = None) -> dict[str, Any]:
        """Read, draw, write; returns where the files are and what the front says."""
        from ..study.report.write import write_report

        console = results.console_or_quiet(console)
        files = write_report(self.study, self.output, overwrite=self.overwrite, title=self.title)
        for finding in files.findings:
            console.print(finding, markup=False, highlight=False)
        console.print(f"Report: {files.html}", markup=False, highlight=False, soft_wrap=True)
        return {
            "report": str(files.html),
            "tables": str(files.tables),
            "figures": [str(path) for path in files.figures],
            "findings": list(files.findings),
        }
