"""How the figures of a report are drawn: lines, points, bars and steps, in percent, on one axes each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...metrics.accuracy import SPLITS_AND_ALL
from ...utils.figures import INK, MUTED, Picture, render, series_color, series_marker, shortened, wrapped
from ..plans import FORM_NAMES, ROWS
from ..rows import ORIGINAL, Group, Row
from .data import StudyFiles, label

# Colour and marker of each split, wherever splits stand beside each other.
PART_PLACES = {"few": 0, "medium": 2, "many": 1}
ALL_MARKER, ORIGINAL_MARKER = "D", "*"

# Known methods look the same in every figure; those that nobody knows get the next places.
_METHODS = (
    *(FORM_NAMES[form] for form in ("plain", "paper")),
    *("ncm", "tau", "logit-adjustment", "few-bias"),
    *(FORM_NAMES[form] for form in ("few", ROWS)),
)
FRONT_PLACE = _METHODS.index("few-bias")


@dataclass(frozen=True)
class Line:
    """Values against x, with their spread; those that are None are left out."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    spread: Sequence[float | None]
    color: str
    marker: str
    baseline: float | None = None
    dash: str = "-"


def study_picture(study: StudyFiles, name: str, title: str, alt: str, draw: Callable[[Any], None], **options: Any) -> Picture:
    """Draw a figure of a study."""
    # Two dashes, which neither part has: no two figures get one name.
    return render(f"{name}--{study.key}", draw, alt=alt, title=title, attribution=study.attribution, **options)


def method_places(methods: Iterable[str]) -> dict[str, int]:
    """The place of each method among colours and markers."""
    names = dict.fromkeys([*_METHODS, *(method for method in methods if method != ORIGINAL)])
    return {method: place for place, method in enumerate(names)}


def part_look(part: str) -> tuple[str, str]:
    """Colour and marker of a split."""
    if part == "all":
        return INK, ALL_MARKER
    return series_color(PART_PLACES[part]), series_marker(PART_PLACES[part])


def in_percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def part_lines(
    groups: Sequence[Group], x: Sequence[float], suffix: str, original: Row | None, *, gain: bool = False
) -> list[Line]:
    """A line for few, medium, many and all, dotted where the original classifier is; those without samples are left out."""
    lines = []
    for part in SPLITS_AND_ALL:
        metric = f"test_{part}{suffix}"
        values = [group.gain(metric, original) if gain else group.mean(metric) for group in groups]
        if all(value is None for value in values):
            continue
        before = None if original is None or gain else original[metric]
        color, marker = part_look(part)
        y, spread = [in_percent(value) for value in values], [in_percent(group.spread(metric)) for group in groups]
        lines.append(Line(part, x, y, spread, color, marker, in_percent(before)))
    return lines


def draw_lines(axes: Any, lines: Sequence[Line], xlabel: str, ylabel: str, ticks: Sequence[str] | None = None) -> None:
    """Lines with error bars; ``ticks`` name the places 0, 1, 2 ... of categories."""
    if lines and ylabel.startswith("gain"):
        axes.axhline(0, color=MUTED, linewidth=1.0)
    for line in lines:
        known = [(x, y, s) for x, y, s in zip(line.x, line.y, line.spread, strict=True) if y is not None]
        if line.baseline is not None:
            axes.axhline(line.baseline, color=line.color, linestyle=":", linewidth=1.2)
        axes.errorbar(
            [x for x, _, _ in known],
            [y for _, y, _ in known],
            yerr=[s or 0.0 for _, _, s in known] if any(s for _, _, s in known) else None,
            color=line.color,
            marker=line.marker,
            linestyle=line.dash,
            elinewidth=1.0,
            label=shortened(line.label),
        )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if ticks is not None:
        axes.set_xticks(range(len(ticks)), [shortened(tick, 16) for tick in ticks])
        axes.set_xlim(-0.4, len(ticks) - 0.6)


def draw_gains(axes: Any, groups: Sequence[Group], original: Row | None) -> None:
    """A row for each configuration: what few and all gain, with their spread."""
    axes.axvline(0, color=MUTED, linewidth=1.0)
    for part, shift in (("few", -0.14), ("all", 0.14)):
        color, marker = part_look(part)
        gains = [in_percent(group.gain(f"test_{part}", original)) for group in groups]
        spreads = [100 * (group.spread(f"test_{part}") or 0.0) for group in groups]
        known = [place for place, gain in enumerate(gains) if gain is not None]
        if known:
            spread = [spreads[place] for place in known]
            axes.errorbar(
                [gains[place] for place in known],
                [place + shift for place in known],
                xerr=spread if any(spread) else None,
                color=color,
                marker=marker,
                linestyle="none",
                elinewidth=1.0,
                label=part,
            )
    names = [wrapped(shortened(label(group.method, group.configuration), 72), 26, 3) for group in groups]
    axes.set_yticks(range(len(groups)), names, fontsize=7.5)
    axes.set(ylim=(len(groups) - 0.5, -0.5), xlabel="gain over the original, points")


def draw_bars(axes: Any, gains: Sequence[float]) -> None:
    """A bar for each class, those above and those below zero in different colours."""
    places = range(1, len(gains) + 1)
    colors = [series_color(1) if gain >= 0 else series_color(0) for gain in gains]
    axes.bar(places, gains, width=0.8 if len(gains) < 60 else 1.0, color=colors)
    axes.axhline(0, color=MUTED, linewidth=1.0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="few classes, by their gain", ylabel="gain, points")
    axes.margins(x=0.01)


def draw_scatter(axes: Any, x: Sequence[float], y: Sequence[float]) -> None:
    """A point for each class."""
    axes.axhline(0, color=MUTED, linewidth=1.0)
    axes.scatter(x, y, s=16, color=series_color(0), alpha=0.55, linewidths=0)
    axes.set(xlabel="distance to the closest neighbour's mean", ylabel="gain, points")


def draw_steps(axes: Any, gains: Mapping[str, Sequence[float]], edges: Sequence[float]) -> None:
    """How many of each split's classes gain so much, in percent of the split's."""
    axes.axvline(0, color=MUTED, linewidth=1.0)
    dashes = {"few": "-", "medium": "--", "many": "-."}
    for part, values in gains.items():
        shares = 100 * np.histogram(values, bins=np.asarray(edges))[0] / max(len(values), 1)
        axes.stairs(
            shares,
            edges,
            label=f"{part} ({len(values)} classes)",
            color=part_look(part)[0],
            linewidth=1.8,
            linestyle=dashes[part],
        )
    axes.set(xlabel="gain, points", ylabel="classes of the split, %")
