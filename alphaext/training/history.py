"""A training as a figure, and as a table for notebooks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any, Protocol

from ..utils.figures import INK, MUTED, own_style, render, require_matplotlib, series_color, series_marker
from ..utils.text import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure


__all__ = ["history_html", "plot_history"]

_PARTS = ("few", "medium", "many", "all")
_MOST_ROWS = 12


class Training(Protocol):
    """What is shown of a training: fields of :class:`alphaext.FitResult`."""

    history: list[dict[str, float]]
    selected_epoch: int
    selection: str
    metrics_before: dict[str, float] | None
    metrics_after: dict[str, float] | None
    clamped: int
    engine: str
    engine_reason: str
    seconds: float


def plot_history(result: Training) -> Figure:
    """Return a figure of a training: its loss, and with validation data few accuracy and accuracy over all, by epoch.

    Args:
        result: what :func:`alphaext.fit` returned.

    Returns:
        The figure, which belongs to no window and to no global state: ``figure.savefig("training.png")``, or the last line of a
        notebook's cell. A vertical line marks the selected epoch, horizontal ones the original classifier.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.

    Example:
        >>> linear, features, labels = nn.Linear(8, 4), torch.randn(40, 8), torch.arange(40) % 4
        >>> split = ClassSplit(few=[3], medium=[2], many=[0, 1])
        >>> head = AlphaNet.from_linear(linear, members=[[3, 0, 1]], gamma=0.5, seed=0)
        >>> result = fit(head, features, labels, val_features=features, val_labels=labels, epochs=2, progress=False)
        >>> [axes.get_ylabel() for axes in plot_history(result).axes]
        ['loss', 'validation accuracy, %']
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    measured = _measured(result)
    with own_style("training"):
        figure = Figure(figsize=(8.0 if measured else 4.4, 3.2), layout="constrained")
        panels = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
        _draw_loss(panels[0], result)
        if measured:
            _draw_accuracy(panels[1], result)
        for axes in panels:
            axes.set_xlabel("epoch")
            if axes.get_legend_handles_labels()[1]:
                axes.legend(loc="best")
    return figure


def _measured(result: Training) -> list[str]:
    """Which of few and all were measured, in any epoch."""
    return [part for part in ("few", "all") if any(_known(entry.get(part)) for entry in result.history)]


def _known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _draw_loss(axes: Any, result: Training) -> None:
    known = [entry for entry in result.history if _known(entry.get("loss"))]
    axes.plot([entry["epoch"] for entry in known], [entry["loss"] for entry in known], color=series_color(4), label="loss")
    axes.set_ylabel("loss")
    _mark(axes, result)


def _draw_accuracy(axes: Any, result: Training) -> None:
    for part, place in (("few", 0), ("all", None)):
        if part not in _measured(result):
            continue
        color = INK if place is None else series_color(place)
        known = [entry for entry in result.history if _known(entry.get(part))]
        axes.plot(
            [entry["epoch"] for entry in known],
            [100 * entry[part] for entry in known],
            color=color,
            marker=series_marker(0 if part == "few" else 3),
            markersize=3,
            linewidth=1.3,
            label=part,
        )
        before = (result.metrics_before or {}).get(part)
        if before is not None and _known(before):
            axes.axhline(100 * before, color=color, linestyle=":", linewidth=1.1)
    axes.set_ylabel("validation accuracy, %")
    _mark(axes, result)


def _mark(axes: Any, result: Training) -> None:
    label = f"selected: epoch {result.selected_epoch}"
    axes.axvline(result.selected_epoch, color=MUTED, linestyle="--", linewidth=1.1, label=label)


def history_html(result: Training) -> str:
    """Return a training as HTML for notebooks: accuracies before and after, epochs, and a figure if matplotlib is there.

    Args:
        result: what :func:`alphaext.fit` returned.

    Returns:
        An element without scripts, links or anything that is fetched; whatever texts hold is shown as text.

    Example:
        >>> linear, features, labels = nn.Linear(8, 4), torch.randn(40, 8), torch.arange(40) % 4
        >>> head = AlphaNet.from_linear(linear, members=[[3, 0, 1]], gamma=0.5, seed=0)
        >>> print(history_html(fit(head, features, labels, epochs=2, progress=False))[:59])
        <div class="alphaext-training"><p>Epoch 2 of 2, selected by
    """
    last = len(result.history) - 1
    clamped = f"{result.clamped} classes on their clamp"
    text = f"Epoch {result.selected_epoch} of {last}, selected by: {result.selection}; {clamped}; {result.seconds:.2f} s"
    engine = f"engine {result.engine}" + (f" ({result.engine_reason})" if result.engine_reason else "")
    pieces = [f'<div class="alphaext-training"><p>{_text(text)}; {_text(engine)}.</p>', _accuracies(result), _figure(result)]
    return "".join([*pieces, _epochs(result), "</div>"])


def _text(text: object) -> str:
    return escape(str(text))


def _accuracies(result: Training) -> str:
    before, after = result.metrics_before, result.metrics_after
    if before is None or after is None:
        return ""
    rows = []
    for name, suffix in (("top-1", ""), ("top-5", "_top5")):
        for when, values in (("before", before), ("after", after)):
            rows.append([f"{when}, {name}", *(percent(values.get(part + suffix)) for part in _PARTS)])
    return _table(["validation accuracy, %", *_PARTS], rows)


def _figure(result: Training) -> str:
    """One small picture a number; nothing where there is no matplotlib."""
    try:
        require_matplotlib()
    except ImportError:
        return ""
    # A page may hold several trainings: ids go by what is drawn.
    shown = repr((result.history, result.metrics_before, result.selected_epoch))
    prefix = f"alphaext-{hashlib.sha256(shown.encode()).hexdigest()[:12]}"
    pictures = [render(f"{prefix}-loss", lambda axes: _axes(axes, result, _draw_loss), alt=_described(result, "loss"))]
    if _measured(result):
        alt = "; ".join(_described(result, part) for part in _measured(result))
        pictures.append(render(f"{prefix}-accuracy", lambda axes: _axes(axes, result, _draw_accuracy), alt=alt))
    # A notebook's page knows none of the report's colours: the figures lie on white.
    return f'<div style="display:flex;flex-wrap:wrap">{"".join(_on_white(picture.inline) for picture in pictures)}</div>'


def _axes(axes: Any, result: Training, draw: Any) -> None:
    draw(axes, result)
    axes.set_xlabel("epoch")


def _on_white(inline: str) -> str:
    from ..utils.figures import COLOR_VARIABLES

    for color, variable in COLOR_VARIABLES.items():
        inline = inline.replace(variable, color)
    return inline


def _described(result: Training, name: str) -> str:
    known = [entry for entry in result.history if _known(entry.get(name))]
    if not known:
        return f"no {name}"
    first, last = known[0], known[-1]
    if name == "loss":
        return f"loss {first[name]:.3g} in epoch {first['epoch']:g}, {last[name]:.3g} in epoch {last['epoch']:g}"
    return f"{name} accuracy {percent(first[name])}% in epoch {first['epoch']:g}, {percent(last[name])}% in {last['epoch']:g}"


def _epochs(result: Training) -> str:
    """Some epochs, the first, the last and the selected one among them."""
    total = len(result.history)
    step = max(1, math.ceil(total / _MOST_ROWS))
    chosen = [entry for n, entry in enumerate(result.history) if n % step == 0 or n == total - 1 or _selected(entry, result)]
    parts = [part for part in _PARTS if any(_known(entry.get(part)) for entry in chosen)]
    rows = [
        [
            f"{entry['epoch']:g}" + (" (selected)" if _selected(entry, result) else ""),
            _number(entry.get("loss"), 4),
            _number(entry.get("lr"), 3),
            f"{entry.get('clamped', math.nan):g}",
            *(percent(entry.get(part)) for part in parts),
        ]
        for entry in chosen
    ]
    table = _table(["epoch", "loss", "lr", "on their clamp", *(f"{part}, %" for part in parts)], rows)
    return f"<details><summary>Epochs</summary>{table}</details>"


def _selected(entry: Mapping[str, float], result: Training) -> bool:
    return entry["epoch"] == result.selected_epoch


def _number(value: float | None, digits: int) -> str:
    return f"{value:.{digits}g}" if value is not None and _known(value) else "-"


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
