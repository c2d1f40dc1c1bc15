"""The first figure of a report: who lies above the front that one constant on the few logits makes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...utils.figures import INK, MUTED, PAPER, Picture, series_color, series_marker, shortened
from ..rows import ORIGINAL, Group
from .content import FigureBlock, TextBlock
from .data import StudyFiles
from .front import (
    ALL,
    FEW,
    Front,
    Height,
    accuracies_text,
    alpha_series,
    better_rivals,
    chosen,
    chosen_heights,
    height_of,
    measured_groups,
    read_front,
    rivals,
    verdict,
)
from .plots import FRONT_PLACE, ORIGINAL_MARKER, method_places, study_picture
from .tables import front_table

_SIZE = (4.2, 4.0)
_SMALL = {"markersize": 4.5, "markeredgewidth": 0.8, "zorder": 3}
_LARGE = {"markersize": 8.5, "markeredgewidth": 1.6, "zorder": 4, "markerfacecolor": PAPER}


def front_blocks(studies: Sequence[StudyFiles]) -> list[TextBlock | FigureBlock]:
    """The figure, with a panel a classifier, and what it says in words."""
    pictures: list[Picture] = []
    found: list[tuple[StudyFiles, list[Height]]] = []
    texts: list[TextBlock] = []
    fronts = [read_front(study) for study in studies]
    for study, front in zip(studies, fronts, strict=True):
        name = f" ({study.name})" if len(studies) > 1 else ""
        if front is not None:
            heights = chosen_heights(study, front)
            found.append((study, heights))
            for height in heights:
                said = verdict(height, f"{height.group.method}{name}", study.part("samples", "test"), study.original, front)
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
    block = FigureBlock(
        "Few accuracy against accuracy over all",
        _caption([front for front in fronts if front is not None]),
        tuple(pictures),
        () if table is None else (table,),
        "; ".join(dict.fromkeys(study.attribution for study in studies if study.attribution)) or None,
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
    of_compare = measured_groups(chosen(study))
    if not series and not of_compare:
        return []
    everyone = [*itertools.chain(*series), *of_compare, *others]
    places = method_places(group.method for group in everyone)
    accuracies = _Panel(places, lambda group: (group.mean(ALL) or 0.0, group.spread(ALL)))

    def draw_accuracies(axes: Any) -> None:
        if front is not None:
            few, total = [100 * value for value in front.few], [100 * value for value in front.total]
            axes.plot(few, total, color=series_color(FRONT_PLACE), linewidth=2.0, zorder=1, label="constant on few logits")
        accuracies.draw(axes, series, [*of_compare, *others], "accuracy over all, %")
        shown = [(accuracies.position(group), accuracies.spread(group)) for group in everyone]
        for coordinate, set_limits in enumerate((axes.set_xlim, axes.set_ylim)):
            _limits(set_limits, [(place[coordinate], spread[coordinate]) for place, spread in shown])

    described = "; ".join(f"{group.method}: {accuracies_text(group)}" for group in [*of_compare, *others])
    alt = f"Few accuracy against accuracy over all{name}; {described}"
    pictures = [study_picture(study, "trade-off-front", f"Accuracy{name}", alt, draw_accuracies, size=_SIZE)]
    if front is None:
        return pictures
    # Means of those that can be told, by which groups are kept; the original and the constant lie on the line itself.
    heights = {id(group): height_of(group, front) for group in everyone}
    panel = _Panel(places, lambda group: (heights[id(group)].mean or 0.0, heights[id(group)].spread))
    apart = [group for group in others if group.method not in (ORIGINAL, "few-bias")]

    def of_known_height(groups: Sequence[Group]) -> list[Group]:
        return [group for group in groups if heights[id(group)].mean is not None]

    def draw_heights(axes: Any) -> None:
        axes.axhline(0, color=series_color(FRONT_PLACE), linewidth=2.0, zorder=1)
        lines = [own for own in map(of_known_height, series) if own]
        panel.draw(axes, lines, of_known_height([*of_compare, *apart]), "above the front, points over all")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, -0.3), max(high, 0.3))
        axes.annotate("the front", (0, 0), (3, 3), ("axes fraction", "data"), "offset points", fontsize=8, color=MUTED)

    texts = [f"{group.method} {100 * (heights[id(group)].mean or 0.0):+.1f}" for group in of_known_height(of_compare)]
    alt = f"Points of accuracy over all above the front at equal few accuracy{name}; {'; '.join(texts) or 'none is known'}"
    return [*pictures, study_picture(study, "above-the-front", f"Height above the front{name}", alt, draw_heights, size=_SIZE)]


@dataclass(frozen=True)
class _Panel:
    """One of the figure's panels.

    Attributes:
        places: of methods, among colours and markers.
        height: what a group's points are drawn at, and its spread over seeds, fractions of 1.
    """

    places: Mapping[str, int]
    height: Callable[[Group], tuple[float, float | None]]

    def position(self, group: Group) -> tuple[float, float]:
        """Few accuracy and height, in percent."""
        return 100 * (group.mean(FEW) or 0.0), 100 * self.height(group)[0]

    def spread(self, group: Group) -> tuple[float, float]:
        """Standard deviations over seeds of both, in percent; 0 where there are none."""
        return 100 * (group.spread(FEW) or 0.0), 100 * (self.height(group)[1] or 0.0)

    def draw_point(self, axes: Any, group: Group, *, large: bool) -> None:
        """A point with error bars in both directions; a large one is hollow, and has the name of its method."""
        (x, y), (x_spread, y_spread) = self.position(group), self.spread(group)
        place = self.places.get(group.method)
        color, marker = (INK, ORIGINAL_MARKER) if place is None else (series_color(place), series_marker(place))
        look = _LARGE if large else {**_SMALL, "markerfacecolor": color}
        axes.errorbar(
            [x],
            [y],
            xerr=[x_spread] if x_spread else None,
            yerr=[y_spread] if y_spread else None,
            color=color,
            marker=marker,
            linestyle="none",
            elinewidth=1.0,
            label=shortened(group.method) if large else None,
            **(look | {"zorder": 5} if place is None else look),
        )

    def draw(self, axes: Any, series: Sequence[Sequence[Group]], large: Sequence[Group], ylabel: str) -> None:
        """Draw series of small points, the ends of each with its gamma, and large points with the names of their methods."""
        for groups in series:
            for group in groups:
                self.draw_point(axes, group, large=False)
            if len(groups) > 1:
                color = series_color(self.places[groups[0].method])
                axes.plot(*zip(*map(self.position, groups), strict=True), color=color, linewidth=1.0, alpha=0.7, zorder=2)
                for end in (groups[0], groups[-1]):
                    text, place = f"{end.rows[0]['gamma']:g}", self.position(end)
                    axes.annotate(text, place, (4, -9), textcoords="offset points", fontsize=7.5, color=color)
        for group in large:
            self.draw_point(axes, group, large=True)
        axes.set(xlabel="few accuracy, %", ylabel=ylabel)


def _limits(set_limits: Callable[[float, float], Any], values: Sequence[tuple[float, float]]) -> None:
    """Show the region of the points: the front goes on far beyond, where nobody wants to be."""
    low, high = min(value - spread for value, spread in values), max(value + spread for value, spread in values)
    margin = max(0.06 * (high - low), 0.3)
    set_limits(low - margin, high + margin)
