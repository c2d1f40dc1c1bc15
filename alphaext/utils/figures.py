"""Small figures as PNG and SVG: matplotlib without its global state, the same bytes for the same content."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

from .packages import require

INK, MUTED, LINE, PAPER = "#1b1f24", "#59636e", "#d0d7de", "#ffffff"

# For white and for near black, with a contrast of 3 and more, in an order in which those who are colour-blind tell them apart.
_SERIES = (
    ("#b3430b", "#f2905a"),
    ("#0b68ad", "#63b3ee"),
    ("#0a7d57", "#40c596"),
    ("#9c3f7c", "#e390c6"),
    ("#8a6300", "#e0b234"),
    ("#5a4bb0", "#aca0f4"),
    ("#66717c", "#a5afb9"),
    ("#7d5238", "#cda386"),
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")

COLOR_VARIABLES = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    PAPER: "var(--paper)",
    **{light: f"var(--series-{number})" for number, (light, _) in enumerate(_SERIES)},
}
"""What stands for each colour of a figure inside a page, which knows whether it is light or dark."""

SERIES_COLORS = {f"--series-{number}": colors for number, colors in enumerate(_SERIES)}
"""The series' colours in a light and in a dark page."""

_PNG_DPI = 170
_HEX = re.compile(r"#[0-9a-f]{6}")
_STYLE = re.compile(r'(?<= style=")[^"]*')
_FONT_FAMILY = re.compile(r"font-family:[^;]*(;\s*|$)")
_FONT = re.compile(r"font:\s*(?P<before>[^;']*?)(?P<size>[\d.]+px)[^;]*")
_REFERENCE = re.compile(r'(?P<before>url\(#|href="#)(?P<id>[^)"]+)')
# What a page has no use for: what stands before the element, comments, metadata, styles of the whole page.
_NOT_INLINE = re.compile(
    r"^.*?(?=<svg)|<!--.*?-->|<(metadata|style)\b.*?</\1>| xmlns(:\w+)?=\"[^\"]*\"|xlink:(?=href)", re.DOTALL
)
# What XML cannot hold.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_DIRECTIONS = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Picture:
    """A drawn figure.

    Attributes:
        name: of its files, without their endings.
        alt: what is to be seen, in words.
        png: an image file.
        svg: a file of its own, on white.
        inline: the same as an element of a page, in the page's colours and font; no two pictures of different names have an
            id in common.
    """

    name: str
    alt: str
    png: bytes
    svg: bytes
    inline: str


def require_matplotlib() -> None:
    """Check that figures can be drawn.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    require("matplotlib", "figures need", "'alphaext[report]'")


def series_color(number: int) -> str:
    """The colour of a series; after the last the first again, told apart by its marker."""
    return _SERIES[number % len(_SERIES)][0]


def series_marker(number: int) -> str:
    """The marker of a series. Colours come round sooner, so that the first repetition of one has another marker."""
    return _MARKERS[(number + number // len(_SERIES)) % len(_MARKERS)]


def clean_text(text: object) -> str:
    """Text in one line that every file can hold: no control characters, nor what turns the direction of text that follows.

    Example:
        >>> clean_text("a\\nb\\x00\\u202ec")
        'a b\\ufffdc'
    """
    line = " ".join(_DIRECTIONS.sub("", str(text)).split())
    return _UNSAFE.sub("\ufffd", line)


def shortened(text: object, most: int = 40) -> str:
    """The same, cut to ``most`` letters.

    Example:
        >>> shortened("x" * 50, 10)
        'xxxxxxxxx…'
    """
    line = clean_text(text)
    return line if len(line) <= most else line[: most - 1] + "…"


@contextmanager
def own_style(name: str) -> Iterator[None]:
    """Matplotlib's defaults and what this file needs, whatever the user has set; everything as it was afterwards."""
    import matplotlib

    with warnings.catch_warnings():
        # Letters that the font lacks are left to whoever shows the SVG; a PNG has a box for them.
        warnings.simplefilter("ignore")
        defaults: dict[Any, Any] = {
            key: matplotlib.rcParamsDefault[key]
            for key in matplotlib.rcParamsDefault
            if not key.startswith(("backend", "interactive", "toolbar", "webagg", "savefig.directory"))
        }
        own: dict[Any, Any] = {
            "svg.fonttype": "none",
            "svg.hashsalt": name,
            "text.parse_math": False,
            "font.size": 9,
            "axes.titlesize": 9.5,
            "axes.labelsize": 9,
            "legend.fontsize": 8.5,
            "xtick.labelsize": 8.5,
            "ytick.labelsize": 8.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "axes.grid": True,
            "grid.color": LINE,
            "grid.linewidth": 0.7,
            "axes.edgecolor": MUTED,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "figure.facecolor": PAPER,
            "axes.facecolor": "none",
            "savefig.facecolor": "auto",
            "legend.frameon": False,
            "legend.handlelength": 1.8,
            "legend.columnspacing": 1.2,
            "lines.linewidth": 1.6,
            "lines.markersize": 5,
        }
        with matplotlib.rc_context({**defaults, **own}):
            yield


def render(
    name: str,
    draw: Callable[[Any], None],
    *,
    alt: str,
    title: str = "",
    attribution: str | None = None,
    size: tuple[float, float] = (4.0, 3.1),
) -> Picture:
    """Draw a figure of one axes.

    Args:
        name: of its files; also what ids inside a page begin with.
        draw: is given the axes, and draws.
        alt: what is to be seen, in words.
        title: above the axes.
        attribution: a text below the axes; not in :attr:`Picture.inline`, whose page shows it.
        size: width and height in inches; small ones can be read on a telephone.

    Returns:
        The picture.

    Raises:
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    with own_style(name):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title, loc="left", fontweight="bold")
        if axes.get_legend_handles_labels()[1]:
            columns = legend_columns(axes.get_legend_handles_labels()[1], size[0])
            figure.legend(loc="outside upper left", ncols=columns, borderaxespad=0.2)
        if attribution:
            lines = wrapped(clean_text(attribution), int(size[0] * 18), 3)
            figure.supxlabel(lines, x=0.01, ha="left", fontsize=6.5, color=MUTED)
        svg, png = _saved(figure, "svg", {"Date": None, "Creator": "alphaext"}), _saved(figure, "png", {"Software": None})
        if attribution:
            figure.supxlabel("")
        return Picture(name, alt, png, svg, inline_svg(_saved(figure, "svg", None), name, alt))


def _saved(figure: Any, form: str, metadata: dict[str, Any] | None) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=form, dpi=_PNG_DPI, metadata=metadata)
    # Everything has its place now: finding it again takes half of the time.
    figure.set_layout_engine(None)
    return file.getvalue()


def legend_columns(labels: list[str], width: float) -> int:
    """How many entries of a legend fit side by side."""
    longest = max(len(label) for label in labels)
    return max(1, min(len(labels), int(width * 16 / (longest + 6))))


def wrapped(text: str, width: int, lines: int) -> str:
    """Text in lines of at most ``width`` letters; what does not fit into so many lines is cut."""
    import textwrap

    return "\n".join(textwrap.wrap(text, max(width, 8), max_lines=lines, placeholder=" …"))


def inline_svg(svg: bytes, prefix: str, alt: str) -> str:
    """An SVG file as an element of a page: its colours the page's, ids that begin with ``prefix``, and only those needed."""
    text = " ".join(_NOT_INLINE.sub("", svg.decode()).split())
    referenced = {found["id"] for found in _REFERENCE.finditer(text)}
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in referenced else "", text)
    text = _REFERENCE.sub(rf"\g<before>{prefix}-\g<id>", text)
    text = _STYLE.sub(lambda found: _page_style(found[0]), text)
    box = re.search(r'viewBox="(\S+ \S+ (\S+) \S+)"', text)
    assert box is not None
    width = f"width:100%;max-width:{float(box[2]) * 4 / 3:.0f}px"
    start = f'<svg viewBox="{box[1]}" class="plot" role="img" aria-label="{escape(alt)}" style="{width}">'
    return start + text[text.index(">") + 1 :]


def _page_style(style: str) -> str:
    """A style with the page's colours and font."""
    colored = _HEX.sub(lambda match: COLOR_VARIABLES.get(match[0], match[0]), style)
    plain = _FONT.sub(
        lambda match: f"font-size:{match['size']}" + (";font-weight:bold" if "b" in match["before"] else ""), colored
    )
    return _FONT_FAMILY.sub("", plain)
