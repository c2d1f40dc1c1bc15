"""What a report consists of, before it becomes a page: sections of texts, tables and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...utils.figures import Picture


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
    pictures: Sequence[Picture]
    tables: Sequence[DataTable] = ()
    attribution: str | None = None
    pairs: bool = False


Block = TextBlock | DataTable | FigureBlock


@dataclass(frozen=True)
class Section:
    """A part of the report: its blocks, then its own parts."""

    key: str
    title: str
    blocks: tuple[Block, ...] = ()
    sections: tuple[Section, ...] = ()


def pictures_of(sections: Sequence[Section]) -> Iterator[Picture]:
    """All pictures, in the order of the report."""
    for section in sections:
        for block in section.blocks:
            if isinstance(block, FigureBlock):
                yield from block.pictures
        yield from pictures_of(section.sections)
