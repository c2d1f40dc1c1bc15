"""The first figure of a report: who lies above the front that one constant on the few logits makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ...utils.figures import INK, MUTED, Picture, render, series_color, series_marker
from ..rows import ORIGINAL
from .content import FigureBlock, TextBlock
from .data import Group, StudyFiles
from .front import (
    ALL,
    FEW,
    Front,
    Height,
    alpha_series,
    better_rivals,
    chosen,
    chosen_heights,
    height_of,
    read_front,
    rivals,
    verdict,
)
from .plots import FRONT_PLACE, ORIGINAL_MARKER, Point, draw_points, method_places
from .tables import front_table

__all__ = ["front_blocks"]

_SIZE = (4.2, 4.0)


def front_blocks(studies: Sequence[StudyFiles]) -> list[TextBlock | FigureBlock]:
    """The figure, with a panel a classifier, and what it says in words."""
    pictures: list[Picture] = []
    found: list[tuple[StudyFiles, list[Height]]] = []
    texts: list[TextBlock] = []
    for study in studies:
        name = f" ({study.name})" if len(studies) > 1 else ""
        front = read_front(study)
        if front is not None:
            heights = chosen_heights(study, front)
            found.append((study, heights))
            for height in heights:
                name_of = f"{height.group.method}{name}"
                said = verdict(height, name_of, study.part("samples", "test"), study.original, front)
                better = better_rivals(height.group, [*rivals(study), *chosen(study)])
                texts.append(TextBlock(" ".join([said, *better]), "finding"))
        elif not any(row[FEW] is not None for row in study.rows):
            texts.append(TextBlock(f"There are no test samples of few classes{name}: no front can be drawn.", "warning"))
        else:
            texts.append(TextBlock(f"The front was not measured{name}: it comes with the experiment compare.", "warning"))
        pictures += _pictures(study, front, name)
    if not pictures:
        return list(texts)
    table = front_table(found)
    attributions = list(dict.fromkeys(study.attribution for study in studies if study.attribution))
    block = FigureBlock(
        "Few accuracy against accuracy over all",
        _caption([front for study in studies if (front := read_front(study)) is not None]),
        tuple(pictures),
        () if table is None else (table,),
        "; ".join(attributions) or None,
        pairs=True,
    )
    return [block, *texts]


def _caption(fronts: Iterable[Front]) -> str:
    constants = " and ".join(dict.fromkeys(str(front.constants) for front in fronts))
    text = (
        "Right is better for few classes, up is better over all. Small markers are an Alpha Net's gammas, means over seeds "
        "with standard deviations (smallest and largest named); large hollow ones what validation chose, and rivals."
    )
    if not constants:
        return text
    return (
        f"{text} The line is the front: the original classifier with one constant added to all few logits, {constants} of "
        "them, straight between. An Alpha Net is worth its training where it lies above this line. The second panel has the "
        "same points by their height above it, but for those beyond its ends."
    )


def _pictures(study: StudyFiles, front: Front | None, name: str) -> list[Picture]:
    series, others = alpha_series(study), rivals(study)
    of_compare = [group for group in chosen(study) if group.mean(FEW) is not None and group.mean(ALL) is not None]
    if not series and not of_compare:
        return []
    places = method_places([group.method for group in [*(s[0] for s in series), *of_compare, *others]])

    def accuracies(axes: Any) -> None:
        shown = [_point(group, places) for group in [*(g for s in series for g in s), *of_compare, *others]]
        if front is not None:
            few, total = [100 * value for value in front.few], [100 * value for value in front.total]
            axes.plot(few, total, color=series_color(FRONT_PLACE), linewidth=2.0, zorder=1, label="constant on few logits")
        _draw(axes, series, of_compare, others, places, lambda group: 100 * (group.mean(ALL) or 0.0), lambda g: g.spread(ALL))
        _limits(axes, shown)
        axes.set_xlabel("few accuracy, %")
        axes.set_ylabel("accuracy over all, %")

    title = f"Accuracy{name}"
    pictures = [
        render(
            f"trade-off-front--{study.key}",
            accuracies,
            alt=f"Few accuracy against accuracy over all{name}; {_described([*of_compare, *others])}",
            title=title,
            attribution=study.attribution,
            size=_SIZE,
        )
    ]
    if front is None:
        return pictures

    def heights(axes: Any) -> None:
        axes.axhline(0, color=series_color(FRONT_PLACE), linewidth=2.0, zorder=1)

        def measured(groups: Sequence[Group]) -> list[Group]:
            return [group for group in groups if height_of(group, front).mean is not None]

        # The original and the constant lie on the line itself.
        apart = measured([group for group in others if group.method not in (ORIGINAL, "few-bias")])
        _draw(
            axes,
            [own for groups in series if (own := measured(groups))],
            measured(of_compare),
            apart,
            places,
            lambda group: 100 * (height_of(group, front).mean or 0.0),
            lambda group: height_of(group, front).spread,
        )
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, -0.3), max(high, 0.3))
        axes.set_xlabel("few accuracy, %")
        axes.set_ylabel("above the front, points over all")
        axes.annotate("the front", (0, 0), (3, 3), ("axes fraction", "data"), "offset points", fontsize=8, color=MUTED)

    known = [(group, height_of(group, front).mean) for group in of_compare]
    heights_text = "; ".join(f"{group.method} {100 * mean:+.1f}" for group, mean in known if mean is not None)
    pictures.append(
        render(
            f"above-the-front--{study.key}",
            heights,
            alt=f"Points of accuracy over all above the front at equal few accuracy{name}; {heights_text or 'none is known'}",
            title=f"Height above the front{name}",
            attribution=study.attribution,
            size=_SIZE,
        )
    )
    return pictures


def _draw(
    axes: Any,
    series: Sequence[Sequence[Group]],
    of_compare: Sequence[Group],
    others: Sequence[Group],
    places: dict[str, int],
    y: Any,
    spread: Any,
) -> None:
    for groups in series:
        points = [_point(group, places, y(group), spread(group)) for group in groups]
        draw_points(axes, points, connected=True)
        ends = [groups[0], groups[-1]] if len(groups) > 1 else []
        for group, point in zip(ends, [points[0], points[-1]], strict=False):
            gamma = group.rows[0]["gamma"]
            if gamma is not None:
                axes.annotate(
                    f"{gamma:g}", (point.x, point.y), (4, -9), textcoords="offset points", fontsize=7.5, color=point.color
                )
    for group in [*of_compare, *others]:
        point = _point(group, places, y(group), spread(group), group.method)
        draw_points(axes, [point], large=True)


def _point(group: Group, places: dict[str, int], y: float | None = None, spread: float | None = None, label: str = "") -> Point:
    if group.method == ORIGINAL:
        color, marker = INK, ORIGINAL_MARKER
    else:
        color, marker = series_color(places[group.method]), series_marker(places[group.method])
    height = 100 * (group.mean(ALL) or 0.0) if y is None else y
    return Point(
        label, 100 * (group.mean(FEW) or 0.0), height, 100 * (group.spread(FEW) or 0.0), 100 * (spread or 0.0), color, marker
    )


def _limits(axes: Any, points: Sequence[Point]) -> None:
    """The region of the points: the front goes on far beyond, where nobody wants to be."""
    for values, spreads, set_limits in (
        ([p.x for p in points], [p.x_spread for p in points], axes.set_xlim),
        ([p.y for p in points], [p.y_spread for p in points], axes.set_ylim),
    ):
        low = min(value - spread for value, spread in zip(values, spreads, strict=True))
        high = max(value + spread for value, spread in zip(values, spreads, strict=True))
        margin = max(0.06 * (high - low), 0.3)
        set_limits(low - margin, high + margin)


def _described(groups: Sequence[Group]) -> str:
    return "; ".join(f"{g.method}: few {100 * (g.mean(FEW) or 0):.1f}%, all {100 * (g.mean(ALL) or 0):.1f}%" for g in groups)
