"""The report as one HTML file: no script, no file beside it, no request; light and dark, for screens of any width and paper."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from ...utils.figures import LINE, MUTED, PAPER, SERIES_COLORS, clean_text
from .content import DataTable, FigureBlock, Section, TextBlock

__all__ = ["page"]

_LONG_WORD, _LONG_CELL = 22, 18
_DARK_PAPER, _DARK_LINE, _DARK_MUTED = "#14181d", "#39424d", "#9aa5b1"

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#f4f6f8;--accent:#0b68ad;--warning:#8a4b00;%(light)s}
@media (prefers-color-scheme:dark){:root{--ink:#e6eaee;--soft:#1c2229;--accent:#7cc0f5;--warning:#f0b35a;%(dark)s}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%%;text-size-adjust:100%%}
body{margin:0 auto;padding:1rem;max-width:78rem;background:var(--paper);color:var(--ink);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:.4rem 0}
h2{font-size:1.3rem;line-height:1.25;margin:2.4rem 0 .6rem;padding-top:.6rem;border-top:1px solid var(--line)}
h3{font-size:1.1rem;line-height:1.3;margin:2rem 0 .5rem}
h4{font-size:1rem;margin:1.2rem 0 .4rem}
p{margin:.5rem 0;max-width:46rem}
a{color:var(--accent)}
nav ul{padding-left:1.2rem;margin:.4rem 0}
nav ul ul{display:flex;flex-wrap:wrap;gap:.1rem 1rem;list-style:none;padding-left:0}
.lead,.attribution,.note,figcaption .attribution{color:var(--muted);font-size:.9rem}
.finding,.warning{border-left:4px solid var(--accent);background:var(--soft);padding:.6rem .8rem;margin:.6rem 0}
.warning{border-left-color:var(--warning)}
figure{margin:1rem 0 1.5rem}
figcaption{margin-top:.5rem}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%%),1fr));gap:1.2rem 1.5rem}
.pairs{grid-template-columns:repeat(auto-fill,minmax(min(26rem,100%%),1fr))}
.plot{width:100%%;height:auto;overflow:visible}
.plot *{stroke-linejoin:round;stroke-linecap:butt}
details{margin:.6rem 0}
summary{cursor:pointer;color:var(--accent);padding:.3rem 0}
.scroll{overflow-x:auto;margin:.4rem 0;max-width:100%%}
table{border-collapse:collapse;font-size:.87rem;line-height:1.35;font-variant-numeric:tabular-nums}
.n{white-space:nowrap}
.title{font-weight:600;margin:1.2rem 0 .2rem}
th,td{overflow-wrap:break-word;padding:.28rem .55rem;border-bottom:1px solid var(--line);
text-align:right;vertical-align:top;white-space:nowrap}
th{font-weight:600;vertical-align:bottom;white-space:normal;min-width:4.2rem}
.w{text-align:left;max-width:20rem}
.l{white-space:normal}
td.l{min-width:9.5rem}
.scroll th:first-child{position:sticky;left:0;background:var(--paper);min-width:5.5rem;max-width:11rem;z-index:1}
tbody th{font-weight:400;text-align:left;vertical-align:top}
footer{margin-top:3rem;border-top:1px solid var(--line);padding-top:.6rem}
@media (max-width:30rem){body{padding:.75rem}h1{font-size:1.4rem}.w{max-width:14rem}
.scroll th:first-child{max-width:7.5rem}}
@media print{:root{color-scheme:light;--ink:#000;--soft:#fff;--accent:#000;--warning:#000;%(light)s}
body{max-width:none;padding:0;font-size:9.5pt}nav{display:none}.plot,table{break-inside:avoid}
h2,h3,h4,.title{break-after:avoid}.scroll{overflow:visible}table{font-size:7pt}th,td{padding:1pt 3pt;
white-space:normal}
th,.w,td.l{min-width:0}.scroll th:first-child{position:static;min-width:0}.pictures{grid-template-columns:1fr 1fr}}
"""

_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
"""


def page(title: str, lead: Sequence[str], sections: Sequence[Section], foot: Sequence[str]) -> str:
    """The whole page.

    Args:
        title: of the page.
        lead: paragraphs below it.
        sections: in order.
        foot: paragraphs at the end, such as an attribution.

    Returns:
        HTML; whatever texts hold is shown as text.
    """
    pieces = [_HEAD.format(title=_text(title), style=_style()), f"<header>\n<h1>{_text(title)}</h1>\n"]
    pieces += [f'<p class="lead">{_text(text)}</p>\n' for text in lead]
    pieces += ["</header>\n", _contents(sections), "<main>\n"]
    for section in sections:
        pieces += _section(section, 2)
    pieces.append("</main>\n<footer>\n")
    pieces += [f'<p class="attribution">{_text(text)}</p>\n' for text in foot]
    pieces.append("</footer>\n</body>\n</html>\n")
    return "".join(pieces)


def _style() -> str:
    light = {"--paper": PAPER, "--line": LINE, "--muted": MUTED} | {name: colors[0] for name, colors in SERIES_COLORS.items()}
    dark = {"--paper": _DARK_PAPER, "--line": _DARK_LINE, "--muted": _DARK_MUTED}
    dark |= {name: colors[1] for name, colors in SERIES_COLORS.items()}
    sides = {"light": light, "dark": dark}
    return _STYLE % {side: ";".join(f"{name}:{value}" for name, value in values.items()) for side, values in sides.items()}


def _text(text: object) -> str:
    return escape(clean_text(text))


def _contents(sections: Sequence[Section]) -> str:
    def entries(parts: Sequence[Section]) -> str:
        items = []
        for part in parts:
            inner = entries(part.sections) if part.sections else ""
            items.append(f'<li><a href="#{part.key}">{_text(part.title)}</a>{inner}</li>')
        return f"<ul>{''.join(items)}</ul>"

    return f'<nav aria-label="Contents">{entries(sections)}</nav>\n'


def _section(section: Section, level: int) -> Iterator[str]:
    yield f'<section aria-labelledby="{section.key}">\n<h{level} id="{section.key}">{_text(section.title)}</h{level}>\n'
    for block in section.blocks:
        if isinstance(block, TextBlock):
            kind = "" if block.kind == "text" else f' class="{block.kind}"'
            yield f"<p{kind}>{_text(block.text)}</p>\n"
        elif isinstance(block, DataTable):
            yield _table(block)
        else:
            yield from _figure(block, min(level + 1, 6), section.title)
    for part in section.sections:
        yield from _section(part, level + 1)
    yield "</section>\n"


def _figure(block: FigureBlock, level: int, above: str) -> Iterator[str]:
    if block.title != above:
        yield f"<h{level}>{_text(block.title)}</h{level}>\n"
    yield "<figure>\n"
    pictures = "\n".join(picture.inline for picture in block.pictures)
    yield f'<div class="pictures{" pairs" if block.pairs else ""}">\n{pictures}\n</div>\n'
    attribution = f'<p class="attribution">{_text(block.attribution)}</p>' if block.attribution else ""
    yield f"<figcaption><p>{_text(block.caption)}</p>{attribution}</figcaption>\n</figure>\n"
    opened = [table for table in block.tables if not table.closed]
    for table in block.tables:
        summary = "The numbers of the figure" if not table.closed and len(opened) == 1 else table.title
        yield f"<details><summary>{_text(summary)}</summary>{_scrolling(table)}</details>\n"


def _table(table: DataTable) -> str:
    if table.closed:
        return f"<details><summary>{_text(table.title)}</summary>{_scrolling(table)}</details>\n"
    return _scrolling(table)


def _scrolling(table: DataTable) -> str:
    """A table that scrolls by itself where the page is too narrow, also by keys."""
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    words = [_kind(table, column) for column in range(len(table.header))]
    header = "".join(f'<th scope="col"{kind}>{_header(cell)}</th>' for kind, cell in zip(words, table.header, strict=True))
    lines = []
    for row in table.rows:
        first, *others = (_cell(cell) for cell in row)
        cells = "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(words[1:], others, strict=True))
        lines.append(f'<tr><th scope="row"{words[0]}>{first}</th>{cells}</tr>\n')
    return (
        f'<p class="title">{_text(table.title)}</p>\n<div class="scroll" role="region" tabindex="0" '
        f'aria-label="{_text(table.title)}"><table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{"".join(lines)}</tbody>\n'
        f"</table></div>{note}\n"
    )


def _kind(table: DataTable, column: int) -> str:
    """Words stand on the left; long ones get a column wide enough to be read, however narrow the page is."""
    if column not in table.words:
        return ""
    longest = max((len(row[column]) for row in table.rows), default=0)
    return ' class="w l"' if longest > _LONG_CELL else ' class="w"'


def _header(cell: str) -> str:
    return re.sub(r"top-\d", lambda match: f'<span class="n">{match[0]}</span>', _text(cell))


def _cell(cell: str) -> str:
    # Isolates, which clean_text takes out of texts, come back as an element.
    pieces = cell.split("\u2068")
    shown = _breakable(pieces[0])
    for piece in pieces[1:]:
        name, _, rest = piece.partition("\u2069")
        shown += f"<bdi>{_breakable(name)}</bdi>{_breakable(rest)}"
    return shown


def _breakable(text: str) -> str:
    """Text whose longest words may be broken: a table would grow as wide as they are."""
    words = [
        "<wbr>".join(escape(word[start : start + _LONG_WORD]) for start in range(0, len(word), _LONG_WORD))
        for word in clean_text(text).split(" ")
    ]
    # clean_text takes off the blanks at the ends, which stand between this and what is beside it.
    before, after = " " * text.startswith(" "), " " * (text.endswith(" ") and len(text) > 1)
    return before + " ".join(words) + after
