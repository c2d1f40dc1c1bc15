"""The report as one HTML file (no script, no file beside it, no request; light and dark), and its tables as Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ...utils.figures import LINE, MUTED, PAPER, SERIES_COLORS, clean_text
from .content import DataTable, Section

_SPECIAL = re.compile(r"([\\`*_\[\]|~#])")
_LONG_CELL = 18
_LONG_WORD = re.compile(r"(\S{22})(?=\S)")
_LIGHT = {"--paper": PAPER, "--line": LINE, "--muted": MUTED, **{name: light for name, (light, _) in SERIES_COLORS.items()}}
_DARK = {
    **{"--paper": "#14181d", "--line": "#39424d", "--muted": "#9aa5b1"},
    **{name: dark for name, (_, dark) in SERIES_COLORS.items()},
}
# Private letters that stand for the isolates around a name, which clean_text takes out of texts.
_ISOLATES = {0x2068: "\ue000", 0x2069: "\ue001"}


def page(title: str, lead: Sequence[str], sections: Sequence[Section], foot: Sequence[str]) -> str:
    """The whole page, out of the template ``page.html``.

    Args:
        title: of the page.
        lead: paragraphs below it.
        sections: in order.
        foot: paragraphs at the end, such as an attribution.

    Returns:
        HTML; whatever texts hold is shown as text.
    """
    template = _environment(
        autoescape=True, finalize=lambda value: value if isinstance(value, Markup) else clean_text(value)
    ).get_template("page.html")
    return template.render(title=title, lead=lead, sections=sections, foot=foot, light=_LIGHT, dark=_DARK) + "\n"


def markdown(title: str, sections: Sequence[Section]) -> str:
    """All tables and findings of a report as Markdown, out of the template ``tables.md``."""
    return _environment().get_template("tables.md").render(title=title, sections=sections).rstrip() + "\n"


def _environment(**options: Any) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, undefined=StrictUndefined, **options
    )
    environment.filters |= {"kind": _kind, "header": _header, "breakable": _breakable, "text": markdown_text}
    return environment


def markdown_text(text: object) -> str:
    """Text that Markdown takes as it stands.

    Example:
        >>> markdown_text("<b>a|b*")
        '&lt;b&gt;a\\\\|b\\\\*'
    """
    return _SPECIAL.sub(r"\\\1", html.escape(clean_text(text), quote=False))


def _kind(table: DataTable, column: int) -> Markup:
    """Words stand on the left; long ones get a column wide enough to be read, however narrow the page is."""
    if column not in table.words:
        return Markup("")
    longest = max((len(row[column]) for row in table.rows), default=0)
    return Markup(' class="w l"' if longest > _LONG_CELL else ' class="w"')


def _header(cell: str) -> Markup:
    return Markup(re.sub(r"top-\d", r'<span class="n">\g<0></span>', str(escape(clean_text(cell)))))


def _breakable(cell: str) -> Markup:
    """Text whose longest words may be broken: a table would grow as wide as they are. Isolated names become elements."""
    text = _LONG_WORD.sub("\\1\u200b", clean_text(cell.translate(_ISOLATES)))
    return Markup(escape(text).translate({0x200B: "<wbr>", 0xE000: "<bdi>", 0xE001: "</bdi>"}))
