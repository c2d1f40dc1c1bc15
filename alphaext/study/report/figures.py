"""The figures of a study's experiments, each with its numbers as a table and with what they say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from ...metrics.accuracy import SPLITS
from ...metrics.class_table import ClassRow
from ...utils.figures import Picture, series_color, series_marker, shortened
from ...utils.text import percent
from ..plans import EXPERIMENTS
from ..rows import Group, Row, group_rows, varied
from .content import Block, DataTable, FigureBlock, TextBlock
from .data import StudyFiles, by_gamma, label, setting_text, slug
from .plots import (
    Line,
    draw_bars,
    draw_gains,
    draw_lines,
    draw_scatter,
    draw_steps,
    in_percent,
    part_lines,
    study_picture,
)
from .tables import accuracy_table, classes_table, sharing_table

Blocks = list[Block]

_MOST_GAINS = 40
_SHOWN_CLASSES = 10
_TOPS = (("", "top-1"), ("_top5", "top-5"))


def experiment_blocks(study: StudyFiles, experiment: str) -> Blocks:
    """What an experiment shows; one that is not known gets the figure of gains and the table of accuracies."""
    rows = study.of(experiment)
    known: dict[str, Callable[[StudyFiles, list[Row], str], Blocks]] = {
        "gamma": _gamma,
        "top-k": partial(_categories, column="top_k", xlabel="neighbours (K)", figure="figure 7"),
        "pool": partial(_series, column="pool", title="Accuracy by the pool of neighbours (figure 8 of the paper)"),
        "sharing": partial(
            _series, column="shared", title="One sub-module for all few classes or one each (figure 6 of the paper)"
        ),
        "negatives": partial(_categories, column="negative_ratio", xlabel="base samples for each few sample", figure="table 4"),
        "data-size": partial(_categories, column="few_samples", xlabel="training images that each few class keeps", figure=""),
    }
    if all(row["test_all"] is None for row in rows):
        return [TextBlock(f"Nothing of {experiment} has results; why is said at the end.", "warning")]
    failed = sum(row["error"] is not None for row in rows)
    without = f"{failed} of {len(rows)} results of {experiment} are missing; why is said at the end."
    blocks: Blocks = [TextBlock(without, "warning")] if failed else []
    return blocks + known.get(experiment, _gains)(study, rows, experiment)


def _lines_picture(
    study: StudyFiles, name: str, title: str, what: str, lines: Sequence[Line], xlabel: str, ylabel: str, **options: Any
) -> Picture:
    """Lines, each of which has a value; in words, what each begins and ends with."""
    known = [(line.label, [value for value in line.y if value is not None]) for line in lines]
    ends = (f"{name} {values[0]:.1f} at the smallest {xlabel}, {values[-1]:.1f} at the largest" for name, values in known)
    draw = partial(draw_lines, lines=lines, xlabel=xlabel, ylabel=ylabel, **options)
    return study_picture(study, name, title, f"{what}: {'; '.join(ends)}", draw)


def _gamma(study: StudyFiles, rows: list[Row], experiment: str) -> Blocks:
    """Figures 5 and 9 to 12: accuracies by gamma, and gains, top-1 and top-5."""
    methods = by_gamma(_readable(group_rows(rows), rows))
    pictures = [
        _lines_picture(
            study,
            f"{experiment}-{kind}-{top}-{number}",
            f"{kind} {top}".capitalize() + _behind(method, methods),
            f"{kind} {top} by gamma, {method}",
            part_lines(groups, [group.rows[0]["gamma"] for group in groups], suffix, study.original, gain=kind == "gain"),
            "gamma",
            ylabel.format(top),
        )
        for (number, (method, groups)), (kind, ylabel), (suffix, top) in itertools.product(
            enumerate(methods.items()),
            (("accuracy", "{} accuracy, %"), ("gain", "gain over the original, points")),
            _TOPS,
        )
    ]
    said = " ".join(_best(groups, study.original, method) for method, groups in methods.items())
    table = accuracy_table(study, rows, "Accuracy by gamma, % of test samples")
    caption = f"Dotted: the original classifier. {said} These are read off test samples; none is chosen by them."
    title = "Accuracy by gamma (figures 5 and 9 to 12 of the paper)"
    return [FigureBlock(title, caption, pictures, [table], study.attribution, pairs=True)]


def _behind(name: str, several: Collection[Any]) -> str:
    """What a title ends with where it is one of several."""
    return f", {shortened(name)}" if len(several) > 1 else ""


def _highest(groups: Sequence[Group], metric: str) -> Group | None:
    """The group with the highest mean; None if none has one."""
    known = [group for group in groups if group.mean(metric) is not None]
    return max(known, key=lambda group: group.mean(metric) or 0.0) if known else None


def _best(groups: Sequence[Group], original: Row | None, method: str) -> str:
    parts = []
    for metric, words in (("test_few", "few accuracy"), ("test_all", "accuracy over all")):
        best = _highest(groups, metric)
        if best is not None:
            before = "" if original is None or original[metric] is None else f" (original {percent(original[metric])}%)"
            parts.append(f"{words} is highest at gamma {best.rows[0]['gamma']:g}, {percent(best.mean(metric))}%{before}")
    return f"{method}: {'; '.join(parts) or 'no results'}."


def _categories(study: StudyFiles, rows: list[Row], experiment: str, column: str, xlabel: str, figure: str) -> Blocks:
    """Accuracies of few, medium, many and all against what an experiment varies, for each method and gamma."""
    values = sorted({row[column] for row in rows}, key=lambda value: math.inf if value is None else value)
    pictures, said = [], []
    lots = group_rows(rows, [name for name in varied(rows) if name != column])
    for number, (own, readable) in enumerate(zip(lots, _readable(lots, rows, kept=("gamma",)), strict=True)):
        groups = {group.configuration[column]: group for group in group_rows(own.rows, (column,))}
        shown = label(own.method, readable.configuration)
        places = [float(place) for place, value in enumerate(values) if value in groups]
        there = [groups[value] for value in values if value in groups]
        pictures += [
            _lines_picture(
                study,
                f"{experiment}-{top}-{number}",
                f"{top.capitalize()}{_behind(shown, lots)}",
                f"{top} accuracy by {xlabel}, {shown}",
                part_lines(there, places, suffix, study.original),
                xlabel,
                f"{top} accuracy, %",
                ticks=["all" if value is None else f"{value:g}" for value in values],
            )
            for suffix, top in _TOPS
        ]
        changes = ", ".join(
            f"{part} from {percent(there[0].mean(f'test_{part}'))}% to {percent(there[-1].mean(f'test_{part}'))}%"
            for part in ("few", "all")
        )
        said.append(f"{shown}: {changes}.")
    caption = (
        f"Dotted: the original classifier. From {setting_text(column, values[0])} to {setting_text(column, values[-1])}, "
        f"top-1: {' '.join(said)}"
    )
    title = f"Accuracy by {xlabel}" + (f" ({figure} of the paper)" if figure else "")
    table = accuracy_table(study, rows, f"{title}, % of test samples")
    return [FigureBlock(title, caption, pictures, [table], study.attribution, pairs=True)]


def _series(study: StudyFiles, rows: list[Row], experiment: str, column: str, title: str) -> Blocks:
    """Few accuracy by gamma, a line for each value of a column; over all beside it."""
    pictures, said = [], []
    methods = group_rows(rows, ())
    for number, of_method in enumerate(methods):
        method = of_method.method
        series = {
            each.configuration[column]: sorted(group_rows(each.rows, ("gamma",)), key=lambda g: g.configuration["gamma"])
            for each in group_rows(of_method.rows, (column,))
        }
        for part, suffix, top in (("few", "", "top-1"), ("few", "_top5", "top-5"), ("all", "", "top-1")):
            lines = _lines_of_series(series, column, f"test_{part}{suffix}", study.original)
            if lines:
                name, heading = f"{experiment}-{part}-{top}-{number}", f"{part.capitalize()}, {top}{_behind(method, methods)}"
                what, ylabel = f"{part} {top} accuracy by gamma, {method}", f"{part} {top} accuracy, %"
                pictures.append(_lines_picture(study, name, heading, what, lines, "gamma", ylabel))
        said.append(f"{method}: {_best_of_each(series, column)}.")
    tables = [accuracy_table(study, rows, f"{title}, % of test samples")]
    if column == "shared":
        tables.insert(0, sharing_table(study, rows))
    caption = f"Dotted: the original classifier. Highest few accuracy over gammas, top-1: {' '.join(said)}"
    return [FigureBlock(title, caption, pictures, tables, study.attribution)]


def _lines_of_series(series: Mapping[Any, Sequence[Group]], column: str, metric: str, original: Row | None) -> list[Line]:
    """A line for each value that has results; the first has the original classifier's accuracy as its dotted line."""
    return [
        Line(
            setting_text(column, value),
            [group.configuration["gamma"] for group in groups],
            [in_percent(group.mean(metric)) for group in groups],
            [in_percent(group.spread(metric)) for group in groups],
            series_color(place),
            series_marker(place),
            None if original is None or place else in_percent(original[metric]),
            ("-", "--", "-.", ":")[place % 4],
        )
        for place, (value, groups) in enumerate(series.items())
        if _highest(groups, metric) is not None
    ]


def _best_of_each(series: Mapping[Any, Sequence[Group]], column: str) -> str:
    parts = []
    for value, groups in series.items():
        best = _highest(groups, "test_few")
        said = "has no results" if best is None else f"{percent(best.mean('test_few'))}%, gamma {best.configuration['gamma']:g}"
        parts.append(f"{setting_text(column, value)} {said}")
    return "; ".join(parts)


def _gains(study: StudyFiles, rows: list[Row], experiment: str) -> Blocks:
    """What few and all gain under each configuration, as points, with the table of accuracies."""
    title = EXPERIMENTS.get(experiment, experiment)
    heading = f"{title[:1].upper()}{title[1:]}"
    table = accuracy_table(study, rows, f"{heading}, % of test samples")
    groups = [group for group in group_rows(rows) if group.mean("test_all") is not None]
    shown = _readable(groups, rows)
    if study.original is None or len(groups) > _MOST_GAINS:
        return [table]
    best, best_shown = max(zip(groups, shown, strict=True), key=lambda each: each[0].gain("test_few", study.original) or -1.0)
    gains = [percent(best.gain(f"test_{part}", study.original), sign=True) for part in ("few", "all")]
    caption = (
        f"Gain over the original classifier on test samples, top-1, means over seeds with standard deviations. Few gain most "
        f"under {label(best.method, best_shown.configuration)}: {gains[0]} points, {gains[1]} over all."
    )
    picture = study_picture(
        study,
        experiment if experiment in EXPERIMENTS else f"{slug(experiment)}-{study.experiments.index(experiment)}".strip("-"),
        "Gain of few and of all",
        f"Gain over the original under {len(groups)} configurations. {caption}",
        lambda axes: draw_gains(axes, shown, study.original),
        size=(4.2, 1.3 + 0.4 * len(groups)),
    )
    return [FigureBlock(heading, caption, [picture], [table], study.attribution, pairs=True)]


def _readable(groups: Sequence[Group], rows: Sequence[Row], kept: Collection[str] = ()) -> list[Group]:
    """The same groups; their configuration leaves out what the method's name says already, but for what is ``kept``."""
    varies = {group.method: varied([row for row in rows if row["method"] == group.method]) for group in groups}
    return [
        replace(
            group,
            configuration={
                name: value for name, value in group.configuration.items() if name in varies[group.method] or name in kept
            },
        )
        for group in groups
    ]


def class_blocks(study: StudyFiles) -> Blocks:
    """Figures 3 and 4 and table 3 of the paper: what became of each class under the chosen Alpha Net of the first seed."""
    if not study.classes:
        return []
    gain_of = {row.class_id: row.gain for row in study.classes if not math.isnan(row.gain)}
    few = [row for row in study.classes if row.split == "few"]
    few.sort(key=lambda row: (-gain_of.get(row.class_id, -math.inf), row.class_id))
    known = [row for row in few if row.class_id in gain_of]
    # Each figure's name, title, what it says, and how it is drawn.
    shown: list[tuple[str, str, str, Callable[[Any], None]]] = []
    if known:
        gains = [100 * row.gain for row in known]
        up, down = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        text = (
            f"Of {len(gains)} few classes {up} gain and {down} lose; the mean is "
            f"{percent(float(np.mean(gains)) / 100, sign=True)} points."
        )
        shown.append(("class-gains", "Gain of each few class", text, partial(draw_bars, gains=gains)))
    measured = [(row.distance, 100 * row.gain) for row in known if row.distance is not None]
    if measured:
        x, y = zip(*measured, strict=True)
        text = _correlation_text(rank_correlation(x, y), len(measured))
        shown.append(("gain-by-distance", "Gain by distance", text, partial(draw_scatter, x=x, y=y)))
    by_split = {
        part: [100 * row.gain for row in study.classes if row.split == part and row.class_id in gain_of] for part in SPLITS
    }
    by_split = {part: values for part, values in by_split.items() if values}
    if by_split:
        means = ", ".join(f"{part} {percent(float(np.mean(values)) / 100, sign=True)}" for part, values in by_split.items())
        text = f"Mean gains over classes, in points: {means}."
        edges = _edges([gain for values in by_split.values() for gain in values])
        shown.append(("gain-histogram", "How many classes gain what", text, partial(draw_steps, gains=by_split, edges=edges)))
    blocks: Blocks = []
    if shown:
        caption = " ".join(
            ["Under the Alpha Net that validation samples chose, first seed.", *(text for _, _, text, _ in shown)]
        )
        tables = [classes_table(few, f"All {len(few)} few classes, by their gain", closed=True)] if few else []
        pictures = [study_picture(study, name, title, text, draw) for name, title, text, draw in shown]
        title = "Class by class (figures 3 and 4 of the paper)"
        blocks.append(FigureBlock(title, caption, pictures, tables, study.attribution))
    if any(row.neighbors for row in few):
        table = classes_table(
            few[:_SHOWN_CLASSES], "What the few classes that gain most are composed of (table 3 of the paper)"
        )
        note = "NN1 is the nearest neighbour; each column has its coefficient and its name. Distance: to NN1's mean feature."
        blocks.append(replace(table, note=f"{note} {table.note}".strip()))
    losers = [row for row in study.classes if row.split != "few" and row.gain < 0]
    if losers:
        losers.sort(key=lambda row: (row.gain, row.class_id))
        blocks.append(_losers_table(losers[:_SHOWN_CLASSES], len(losers)))
    return blocks


def _losers_table(losers: Sequence[ClassRow], number: int) -> DataTable:
    table = classes_table(losers, f"Medium and many classes that lose most, of {number} that lose")
    header = ("class", "split", *table.header[1:5])
    rows = tuple((cells[0], row.split, *cells[1:5]) for cells, row in zip(table.rows, losers, strict=True))
    return DataTable(table.title, header, rows, words=(0, 1))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where it is not defined (fewer than three values, or all of one equal).

    Example:
        >>> rank_correlation([1, 2, 3], [10, 20, 15]), rank_correlation([1, 1, 1], [1, 2, 3])
        (0.5, None)
    """
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return float(spearmanr(x, y).statistic)


def _correlation_text(rho: float | None, classes: int) -> str:
    if rho is None:
        return "There is no rank correlation between gain and distance to tell."
    said = "the closer the neighbour, the larger the gain" if rho < 0 else "the farther the neighbour, the larger the gain"
    # Twice the standard deviation that Spearman's coefficient has where there is none.
    if abs(rho) < 2 / math.sqrt(classes - 1):
        said = "no more than chance would make"
    return f"Gain and distance to the closest neighbour: Spearman's rank correlation {rho:+.2f} over {classes} classes, {said}."


def _edges(gains: Sequence[float]) -> list[float]:
    """Bins of 5 points (of 2 where gains are small), one of them around zero."""
    extent = max(abs(gain) for gain in gains)
    width = 5.0 if extent > 20 else 2.0 if extent > 6 else 0.5
    low, high = math.floor(min(gains) / width - 0.5), math.ceil(max(gains) / width + 0.5)
    return [(step + 0.5) * width for step in range(low - 1, high + 1)]
