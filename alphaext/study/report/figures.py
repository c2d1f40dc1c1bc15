"""The figures of a study's experiments, each with its numbers as a table and with what they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from ...utils.figures import Picture, render, series_color, series_marker, shortened
from ...utils.text import percent
from ..plans import EXPERIMENTS
from ..rows import Row
from .content import DataTable, FigureBlock, TextBlock
from .data import Group, StudyFiles, group_rows, setting_text, varied
from .plots import Line, draw_bars, draw_gains, draw_lines, draw_scatter, draw_steps, in_percent, part_lines
from .tables import accuracy_table, classes_table, sharing_table

__all__ = ["class_blocks", "experiment_blocks", "rank_correlation"]

Blocks = list[TextBlock | DataTable | FigureBlock]

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


def _picture(study: StudyFiles, name: str, title: str, alt: str, draw: Callable[[Any], None], **options: Any) -> Picture:
    # Two dashes, which neither part has: no two figures get one name.
    return render(f"{name}--{study.key}", draw, alt=alt, title=title, attribution=study.attribution, **options)


def _slug(text: object) -> str:
    letters = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in str(text).lower())
    return "-".join(word for word in letters.split("-") if word)[:40]


def _gamma(study: StudyFiles, rows: list[Row], experiment: str) -> Blocks:
    """Figures 5 and 9 to 12: accuracies by gamma, and gains, top-1 and top-5."""
    pictures, said = [], []
    original = study.original
    for number, (method, groups) in enumerate(_by_gamma(rows).items()):
        gammas = [group.rows[0]["gamma"] for group in groups]
        several = f", {shortened(method)}" if len(_by_gamma(rows)) > 1 else ""
        for gain in (False, True):
            for suffix, top in _TOPS:
                lines = part_lines(groups, gammas, suffix, original, gain=gain)
                what = f"{'gain' if gain else 'accuracy'} {top}"
                label = "gain over the original, points" if gain else f"{top} accuracy, %"
                pictures.append(
                    _picture(
                        study,
                        f"{experiment}-{_slug(what)}-{number}",
                        f"{what.capitalize()}{several}",
                        f"{what} by gamma, {method}: {_ends(lines, 'gamma')}",
                        partial(draw_lines, lines=lines, xlabel="gamma", ylabel=label),
                    )
                )
        said.append(_best(groups, original, method))
    table = accuracy_table(study, rows, "Accuracy by gamma, % of test samples")
    caption = f"Dotted: the original classifier. {' '.join(said)} These are read off test samples; none is chosen by them."
    return [_block(study, "Accuracy by gamma (figures 5 and 9 to 12 of the paper)", caption, pictures, [table], pairs=True)]


def _by_gamma(rows: Sequence[Row]) -> dict[str, list[Group]]:
    """The groups of each method, their gammas ascending; what else differs stands with the method."""
    found: dict[str, list[Group]] = {}
    groups = group_rows(rows)
    for group, shown in zip(groups, _readable(groups, rows), strict=True):
        others = {name: value for name, value in shown.configuration.items() if name != "gamma"}
        found.setdefault(Group(group.method, others, ()).label, []).append(group)
    return {label: sorted(groups, key=lambda group: group.rows[0]["gamma"] or 0.0) for label, groups in found.items()}


def _best(groups: Sequence[Group], original: Row | None, method: str) -> str:
    parts = []
    for part, words in (("few", "few accuracy"), ("all", "accuracy over all")):
        metric = f"test_{part}"
        known = [group for group in groups if group.mean(metric) is not None]
        if known:
            best = max(known, key=lambda group: group.mean(metric) or 0.0)
            before = "" if original is None or original[metric] is None else f" (original {percent(original[metric])}%)"
            parts.append(f"{words} is highest at gamma {best.rows[0]['gamma']:g}, {percent(best.mean(metric))}%{before}")
    return f"{method}: {'; '.join(parts)}." if parts else f"{method}: no results."


def _categories(study: StudyFiles, rows: list[Row], experiment: str, column: str, xlabel: str, figure: str) -> Blocks:
    """Accuracies of few, medium, many and all against what an experiment varies, for each method and gamma."""
    values = list(dict.fromkeys(row[column] for row in rows))
    values.sort(key=lambda value: math.inf if value is None else value)
    ticks = ["all" if value is None else f"{value:g}" for value in values]
    pictures, said = [], []
    others = [name for name in varied(rows) if name != column]
    for number, own in enumerate(group_rows(rows, others)):
        groups = {group.configuration[column]: group for group in group_rows(own.rows, (column,))}
        constant = [
            name for name in others if name != "gamma" and len({r[name] for r in rows if r["method"] == own.method}) == 1
        ]
        shown = Group(own.method, {name: value for name, value in own.configuration.items() if name not in constant}, ()).label
        label = "" if len(group_rows(rows, others)) == 1 else f", {shortened(shown)}"
        there = [value for value in values if value in groups]
        places = [float(values.index(value)) for value in there]
        for suffix, top in _TOPS:
            lines = part_lines([groups[value] for value in there], places, suffix, study.original)
            pictures.append(
                _picture(
                    study,
                    f"{experiment}-{top}-{number}",
                    f"{top.capitalize()}{label}",
                    f"{top} accuracy by {xlabel}, {shown}: {_ends(lines, xlabel)}",
                    partial(draw_lines, lines=lines, xlabel=xlabel, ylabel=f"{top} accuracy, %", ticks=ticks),
                )
            )
        first, last = groups[there[0]], groups[there[-1]]
        changes = ", ".join(
            f"{part} from {percent(first.mean(f'test_{part}'))}% to {percent(last.mean(f'test_{part}'))}%"
            for part in ("few", "all")
        )
        said.append(f"{shown}: {changes}.")
    where = f"From {setting_text(column, values[0])} to {setting_text(column, values[-1])}, top-1: "
    caption = f"Dotted: the original classifier. {where}{' '.join(said)}"
    title = f"Accuracy by {xlabel}" + (f" ({figure} of the paper)" if figure else "")
    return [_block(study, title, caption, pictures, [accuracy_table(study, rows, f"{title}, % of test samples")], pairs=True)]


def _series(study: StudyFiles, rows: list[Row], experiment: str, column: str, title: str) -> Blocks:
    """Few accuracy by gamma, a line for each value of a column; over all beside it."""
    pictures, said = [], []
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for number, method in enumerate(methods):
        own = [row for row in rows if row["method"] == method]
        values = list(dict.fromkeys(row[column] for row in own))
        for part, suffix, top in (("few", "", "top-1"), ("few", "_top5", "top-5"), ("all", "", "top-1")):
            metric = f"test_{part}{suffix}"
            lines = []
            for place, value in enumerate(values):
                groups = sorted(
                    group_rows([row for row in own if row[column] == value], ("gamma",)),
                    key=lambda group: group.configuration["gamma"],
                )
                if all(group.mean(metric) is None for group in groups):
                    continue
                before = None if study.original is None or place else study.original[metric]
                lines.append(
                    Line(
                        setting_text(column, value),
                        [group.configuration["gamma"] for group in groups],
                        [in_percent(group.mean(metric)) for group in groups],
                        [in_percent(group.spread(metric)) for group in groups],
                        series_color(place),
                        series_marker(place),
                        in_percent(before),
                        ("-", "--", "-.", ":")[place % 4],
                    )
                )
            if not lines:
                continue
            label = f", {shortened(method)}" if len(methods) > 1 else ""
            pictures.append(
                _picture(
                    study,
                    f"{experiment}-{part}-{top}-{number}",
                    f"{part.capitalize()}, {top}{label}",
                    f"{part} {top} accuracy by gamma, {method}: {_ends(lines, 'gamma')}",
                    partial(draw_lines, lines=lines, xlabel="gamma", ylabel=f"{part} {top} accuracy, %"),
                )
            )
        said.append(f"{method}: {_best_of_each(own, column)}.")
    tables = [accuracy_table(study, rows, f"{title}, % of test samples")]
    if column == "shared":
        tables.insert(0, sharing_table(study, rows))
    caption = f"Dotted: the original classifier. Highest few accuracy over gammas, top-1: {' '.join(said)}"
    return [_block(study, title, caption, pictures, tables)]


def _best_of_each(rows: Sequence[Row], column: str) -> str:
    parts = []
    for value in dict.fromkeys(row[column] for row in rows):
        groups = group_rows([row for row in rows if row[column] == value], ("gamma",))
        known = [group for group in groups if group.mean("test_few") is not None]
        if known:
            best = max(known, key=lambda group: group.mean("test_few") or 0.0)
            parts.append(
                f"{setting_text(column, value)} {percent(best.mean('test_few'))}%, gamma {best.configuration['gamma']:g}"
            )
        else:
            parts.append(f"{setting_text(column, value)} has no results")
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
    best = max(groups, key=lambda group: group.gain("test_few", study.original) or -1.0)
    label = shown[groups.index(best)].label
    gains = [percent(best.gain(f"test_{part}", study.original), sign=True) for part in ("few", "all")]
    caption = (
        f"Gain over the original classifier on test samples, top-1, means over seeds with standard deviations. Few gain most "
        f"under {label}: {gains[0]} points, {gains[1]} over all."
    )
    picture = _picture(
        study,
        experiment if experiment in EXPERIMENTS else f"{_slug(experiment)}-{study.experiments.index(experiment)}".strip("-"),
        "Gain of few and of all",
        f"Gain over the original under {len(groups)} configurations. {caption}",
        lambda axes: draw_gains(axes, shown, study.original),
        size=(4.2, 1.3 + 0.4 * len(groups)),
    )
    return [_block(study, heading, caption, [picture], [table], pairs=True)]


def _readable(groups: Sequence[Group], rows: Sequence[Row]) -> list[Group]:
    """The same groups, their configuration without what the method's name says already."""
    found = []
    for group in groups:
        own = [row for row in rows if row["method"] == group.method]
        names = [name for name in group.configuration if len({row[name] for row in own}) > 1]
        found.append(Group(group.method, {name: group.configuration[name] for name in names}, group.rows))
    return found


def class_blocks(study: StudyFiles) -> Blocks:
    """Figures 3 and 4 and table 3 of the paper: what became of each class under the chosen Alpha Net of the first seed."""
    if not study.classes:
        return []
    few = [row for row in study.classes if row.split == "few"]
    few = sorted(few, key=lambda row: (math.isnan(row.gain), -row.gain if not math.isnan(row.gain) else 0.0, row.class_id))
    known = [row for row in few if not math.isnan(row.gain)]
    blocks: Blocks = []
    pictures: list[Picture] = []
    said: list[str] = []
    if known:
        gains = [100 * row.gain for row in known]
        up, down = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        mean = percent(float(np.mean(gains)) / 100, sign=True)
        text = f"Of {len(gains)} few classes {up} gain and {down} lose; the mean is {mean} points."
        said.append(text)
        pictures.append(_picture(study, "class-gains", "Gain of each few class", text, lambda axes: draw_bars(axes, gains)))
        measured = [row for row in known if row.distance is not None]
        if measured:
            x, y = [row.distance or 0.0 for row in measured], [100 * row.gain for row in measured]
            text = _correlation_text(rank_correlation(x, y), len(measured))
            said.append(text)
            pictures.append(
                _picture(study, "gain-by-distance", "Gain by distance", text, lambda axes: draw_scatter(axes, x, y))
            )
    by_split = {
        part: [100 * row.gain for row in study.classes if row.split == part and not math.isnan(row.gain)]
        for part in ("few", "medium", "many")
    }
    by_split = {part: values for part, values in by_split.items() if values}
    if by_split:
        means = ", ".join(f"{part} {percent(float(np.mean(values)) / 100, sign=True)}" for part, values in by_split.items())
        text = f"Mean gains over classes, in points: {means}."
        said.append(text)
        edges = _edges([gain for values in by_split.values() for gain in values])
        pictures.append(
            _picture(
                study, "gain-histogram", "How many classes gain what", text, lambda axes: draw_steps(axes, by_split, edges)
            )
        )
    table = classes_table(few, f"All {len(few)} few classes, by their gain", closed=True)
    others = [row for row in study.classes if row.split != "few" and row.gain < 0]
    paid = sorted(others, key=lambda row: (row.gain, row.class_id))[:_SHOWN_CLASSES]
    if pictures:
        caption = "Under the Alpha Net that validation samples chose, first seed. " + " ".join(said) + ""
        blocks.append(_block(study, "Class by class (figures 3 and 4 of the paper)", caption, pictures, [table] if few else []))
    if any(row.neighbors for row in few):
        title = "What the few classes that gain most are composed of (table 3 of the paper)"
        note = "NN1 is the nearest neighbour; each column has its coefficient and its name. Distance: to NN1's mean feature."
        blocks.append(replace(classes_table(few[:_SHOWN_CLASSES], title), note=note))
    if paid:
        blocks.append(_paid_table(paid, len(others)))
    return blocks


def _paid_table(paid: Sequence[Any], number: int) -> DataTable:
    table = classes_table(paid, f"Medium and many classes that lose most, of {number} that lose")
    return DataTable(
        table.title,
        ("class", "split", *table.header[1:5]),
        tuple((cells[0], row.split, *cells[1:5]) for cells, row in zip(table.rows, paid, strict=True)),
        words=(0, 1),
    )


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
    # Twice the standard deviation that Spearman's coefficient has where there is none.
    if abs(rho) < 2 / math.sqrt(classes - 1):
        said = "no more than chance would make"
    else:
        said = "the closer the neighbour, the larger the gain" if rho < 0 else "the farther the neighbour, the larger the gain"
    return f"Gain and distance to the closest neighbour: Spearman's rank correlation {rho:+.2f} over {classes} classes, {said}."


def _edges(gains: Sequence[float]) -> list[float]:
    """Bins of 5 points (of 2 where gains are small), one of them around zero."""
    extent = max(abs(gain) for gain in gains)
    width = 5.0 if extent > 20 else 2.0 if extent > 6 else 0.5
    low, high = math.floor(min(gains) / width - 0.5), math.ceil(max(gains) / width + 0.5)
    return [(step + 0.5) * width for step in range(low - 1, high + 1)]


def _ends(lines: Sequence[Line], what: str) -> str:
    texts = []
    for line in lines:
        known = [value for value in line.y if value is not None]
        if known:
            texts.append(f"{line.label} {known[0]:.1f} at the smallest {what}, {known[-1]:.1f} at the largest")
    return "; ".join(texts)


def _block(
    study: StudyFiles,
    title: str,
    caption: str,
    pictures: Sequence[Picture],
    tables: Sequence[DataTable],
    *,
    pairs: bool = False,
) -> FigureBlock:
    return FigureBlock(title, caption, tuple(pictures), tuple(tables), study.attribution, pairs)
