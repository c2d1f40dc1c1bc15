"""Accuracies, comparisons and classes as tables for the terminal, in percent with one decimal, "-" for what is not known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Column, Table
from rich.text import Text

from ..utils.checks import check_choice, check_integer, check_kind
from ..utils.text import number_text, percent
from .accuracy import SPLITS_AND_ALL
from .class_table import ClassRow, composition
from .comparison import Comparison

_VERDICT_STYLES = {"better": "green", "worse": "red"}


def metrics_table(
    metrics: Mapping[str, Mapping[str, float]],
    *,
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    interval_style: str = "plus_minus",
    top5: bool = True,
    average: str = "samples",
    title: str | None = None,
) -> Table:
    """Accuracies of several classifiers, side by side: a row each, or two with top-5.

    Args:
        metrics: of each classifier, by its name, what :func:`alphaext.metrics.split_metrics` returned.
        intervals: of each classifier that has some, what :func:`alphaext.metrics.bootstrap_intervals` returned.
        interval_style: ``"plus_minus"``, half the width of the interval (default), or ``"range"``, from low to high.
        top5: a second row with the top-5 accuracies.
        average: ``"samples"`` (default), or ``"classes"`` for the mean over classes.
        title: above the table.

    Returns:
        The table, for ``rich.print`` or a console's ``print``.

    Raises:
        ValueError: an unknown ``interval_style`` or ``average``, intervals of a classifier without metrics.

    Example:
        >>> metrics = {"few": 0.1, "medium": 0.4, "many": 0.661, "all": float("nan")}
        >>> table = metrics_table({"before": metrics}, intervals={"before": {"few": (0.09, 0.12)}}, top5=False)
        >>> [[str(cell) for cell in column.cells] for column in table.columns]
        [['before'], ['1'], ['10.0 ±1.5'], ['40.0'], ['66.1'], ['-']]
    """
    check_choice(interval_style, "interval_style", ("plus_minus", "range"))
    check_choice(average, "average", ("samples", "classes"))
    unknown = [name for name in intervals or {} if name not in metrics]
    if unknown:
        raise ValueError(f"intervals must be of classifiers that metrics has, got {', '.join(map(repr, unknown))}")
    table = _table(title, "classifier", *map(_number, ("top", *SPLITS_AND_ALL)))
    suffix = "" if average == "samples" else "_class_mean"
    for name, values in metrics.items():
        found = (intervals or {}).get(name, {})
        for top in ("", "_top5") if top5 else ("",):
            keys = [f"{part}{suffix}{top}" for part in SPLITS_AND_ALL]
            cells = [_with_interval(values.get(key), found.get(key), interval_style) for key in keys]
            table.add_row(Text("" if top else name), "5" if top else "1", *cells, end_section=bool(top) or not top5)
    return table


def comparison_table(comparison: Comparison, *, title: str | None = None) -> Table:
    """What a second classifier gains and loses against the first: a row for few, medium, many and all classes.

    Args:
        comparison: what :func:`alphaext.metrics.compare` returned.
        title: above the table.

    Returns:
        The table: top-1 accuracy before and after, the difference with its interval, samples gained and lost, how many of the
        lost went to few classes, the p-value of the exact McNemar test, and the verdict.

    Raises:
        TypeError: something else than a comparison.
    """
    check_kind(comparison, Comparison, "comparison")
    table = _table(
        title,
        "classes",
        *map(_number, ("samples", "before", "after", "difference", "gained", "lost", "to few", "p")),
        "verdict",
    )
    for name, part in comparison.parts.items():
        low, high = comparison.intervals[name]
        difference = percent(comparison.differences[name], sign=True)
        if not math.isnan(low):
            difference += f" [{percent(low, sign=True)}, {percent(high, sign=True)}]"
        table.add_row(
            name,
            f"{part.samples:,}",
            percent(comparison.before[name]),
            percent(comparison.after[name]),
            Text(difference),
            f"{part.gained:,}",
            f"{part.lost:,}",
            f"{part.lost_to_few:,}",
            "-" if part.samples == 0 else _p_value(part.p_value),
            Text(part.verdict, style=_VERDICT_STYLES.get(part.verdict, "")),
        )
    return table


def losses_table(comparison: Comparison, *, class_names: Sequence[str] | None = None, title: str | None = None) -> Table:
    """The classes that a second classifier recognises less often than the first, and what their samples are taken for now.

    Args:
        comparison: what :func:`alphaext.metrics.compare` returned.
        class_names: N names; default the ids.
        title: above the table.

    Returns:
        The table, a row for each class in ``comparison.paid``.

    Raises:
        TypeError: something else than a comparison.
        ValueError: fewer names than classes.
    """
    check_kind(comparison, Comparison, "comparison")
    largest = max((c for loss in comparison.paid for c in (loss.class_id, *(c for c, _ in loss.went_to))), default=-1)
    if class_names is not None and largest >= len(class_names):
        raise ValueError(
            f"class_names must be one a class, got {len(class_names)} names, and class {largest} in the comparison"
        )
    table = _table(
        title,
        "class",
        *map(_number, ("samples", "before", "after", "gained", "lost", "to few")),
        "lost samples are taken for",
    )

    names = range(largest + 1) if class_names is None else class_names
    for loss in comparison.paid:
        shown = [f"{names[class_id]} ({count})" for class_id, count in loss.went_to[:5]]
        more = len(loss.went_to) - len(shown)
        table.add_row(
            Text(str(names[loss.class_id])),
            f"{loss.samples:,}",
            percent(loss.before),
            percent(loss.after),
            f"{loss.gained:,}",
            f"{loss.lost:,}",
            f"{loss.to_few:,}",
            Text(", ".join(shown) + (f", {more} more" if more else "")),
        )
    return table


def class_rows_table(rows: Sequence[ClassRow], *, limit: int | None = None, title: str | None = None) -> Table:
    """Classes, one a row, in the order given, with neighbours and coefficients where they are known.

    Args:
        rows: what :func:`alphaext.metrics.class_table` returned.
        limit: the most rows to show; default all.
        title: above the table.

    Returns:
        The table; coefficients stand behind the names of what they multiply, the class's own in a column of its own.

    Raises:
        TypeError: rows of another type, a ``limit`` that is not an integer.
        ValueError: a negative ``limit``.
    """
    rows = list(rows)
    for row in rows:
        check_kind(row, ClassRow, "rows")
    if limit is not None:
        rows = rows[: check_integer(limit, "limit", minimum=0)]
    columns = {
        "class": [Text(row.name) for row in rows],
        "split": [row.split for row in rows],
        "trained": [f"{row.training_images:,}" for row in rows],
        "tested": [f"{row.test_samples:,}" for row in rows],
        "before": [percent(row.accuracy_before) for row in rows],
        "after": [percent(row.accuracy_after) for row in rows],
        "gain": [percent(row.gain, sign=True) for row in rows],
    }
    if any(row.neighbors for row in rows):
        columns["alpha"] = [number_text(row.own_alpha, ".2f") for row in rows]
    if any(row.distance is not None for row in rows):
        columns["distance"] = [number_text(row.distance, ".3g") for row in rows]
    if any(row.neighbors for row in rows):
        columns["neighbours (alpha)"] = [Text(composition(row)) for row in rows]
    texts = ("class", "split", "neighbours (alpha)")
    table = _table(title, *(name if name in texts else _number(name) for name in columns))
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def _table(title: str | None, *columns: str | Column) -> Table:
    shown = [Column(column, overflow="fold") if isinstance(column, str) else column for column in columns]
    return Table(*shown, title=None if title is None else Text(title), box=box.SIMPLE_HEAD, pad_edge=False)


def _number(name: str) -> Column:
    return Column(name, justify="right", no_wrap=True)


def _with_interval(value: float | None, interval: tuple[float, float] | None, style: str) -> Text:
    text = percent(value)
    if interval is not None and text != "-" and not math.isnan(interval[0]):
        low, high = interval
        text += f" ±{percent((high - low) / 2)}" if style == "plus_minus" else f" [{percent(low)}, {percent(high)}]"
    return Text(text)


def _p_value(p_value: float) -> str:
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"
