"""What a report consists of, before it becomes a page: sections of texts, tables and figures; tables as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

from ...utils.figures import Picture, clean_text

__all__ = ["DataTable", "FigureBlock", "Section", "TextBlock", "markdown", "tables_of"]


@dataclass(frozen=True)
class DataTable:
    """A table of text cells.

    Attributes:
        title: above it.
        header: of the columns.
        rows: each as long as the header.
        words: the columns that hold text; the others hold numbers.
        note: below it.
        closed: in the page, shown when it is asked for.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)
    note: str = ""
    closed: bool = False


@dataclass(frozen=True)
class TextBlock:
    """A paragraph; ``kind`` is ``"text"``, ``"finding"`` (what the numbers say) or ``"warning"``."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class FigureBlock:
    """Pictures under one title, with what is seen in them, and their numbers.

    Attributes:
        title: above them.
        caption: below them.
        pictures: side by side where there is room.
        tables: their numbers.
        attribution: of the data, below the caption.
        pairs: two and two of the pictures belong together.
    """

    title: str
    caption: str
    pictures: tuple[Picture, ...]
    tables: tuple[DataTable, ...] = ()
    attribution: str | None = None
    pairs: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the report: its blocks, then its own parts."""

    key: str
    title: str
    blocks: tuple[TextBlock | DataTable | FigureBlock, ...] = ()
    sections: tuple[Section, ...] = field(default=())


def pictures_of(sections: Sequence[Section]) -> Iterator[Picture]:
    """All pictures, in the order of the report."""
    for section in sections:
        for block in section.blocks:
            if isinstance(block, FigureBlock):
                yield from block.pictures
        yield from pictures_of(section.sections)


def tables_of(section: Section) -> list[DataTable]:
    """The tables of a section, those of its figures too, but not of its parts."""
    found: list[DataTable] = []
    for block in section.blocks:
        if isinstance(block, DataTable):
            found.append(block)
        elif isinstance(block, FigureBlock):
            found.extend(block.tables)
    return found


_SPECIAL = re.compile(r"([\\`*_\[\]|~#])")


def markdown_text(text: object) -> str:
    """Text that Markdown takes as it stands.

    Example:
        >>> markdown_text("<b>a|b*")
        '&lt;b&gt;a\\\\|b\\\\*'
    """
    return _SPECIAL.sub(r"\\\1", escape(clean_text(text), quote=False))


def markdown(title: str, sections: Sequence[Section]) -> str:
    """All tables of a report as Markdown."""
    lines = [f"# {markdown_text(title)}", ""]

    def write(section: Section, level: int) -> None:
        tables = tables_of(section)
        findings = [block for block in section.blocks if isinstance(block, TextBlock) and block.kind != "text"]
        if tables or findings or section.sections:
            lines.extend([f"{'#' * level} {markdown_text(section.title)}", ""])
        for block in findings:
            lines.extend([markdown_text(block.text), ""])
        for table in tables:
            lines.extend(_markdown_table(table))
        for part in section.sections:
            write(part, level + 1)

    for section in sections:
        write(section, 2)
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(table: DataTable) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(markdown_text(cell) for cell in cells) + " |"

    rule = "|" + "|".join(" --- " if column in table.words else " ---: " for column in range(len(table.header))) + "|"
    note = ["", markdown_text(table.note)] if table.note else []
    return [f"**{markdown_text(table.title)}**", "", line(table.header), rule, *map(line, table.rows), *note, ""]
