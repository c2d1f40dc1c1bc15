"""The trade-off front of few accuracy and accuracy over all: one constant on the few logits, and who lies above it."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from sklearn.isotonic import isotonic_regression

from ...utils.figures import INK, MUTED, PAPER, Picture, series_color, series_marker, shortened
from ...utils.text import percent
from ..plans import CANDIDATES
from ..rows import FRONT, ORIGINAL, SETTINGS, Group, Row, group_rows, half_width
from .content import DataTable, FigureBlock, TextBlock
from .data import COMPARE, StudyFiles, by_gamma
from .plots import FRONT_PLACE, ORIGINAL_MARKER, method_places, study_picture
from .tables import half_width_text, mean_text, of_studies

FEW, ALL = "test_few", "test_all"
# A difference of less than a twentieth of a point is called none.
_NOTHING = 0.0005
_MOST_NAMED = 3
_SIZE = (4.4, 3.4)
_NAMES_GAP = 0.095  # of the axes' height
_CROWD, _TOUCHING = 3, 0.055  # so many points, so much of the axes apart, are a crowd
Box = tuple[tuple[float, float], tuple[float, float]]
_SMALL = {"markersize": 4.5, "markeredgewidth": 0.8, "zorder": 3}
_LARGE = {"markersize": 8.5, "markeredgewidth": 1.6, "zorder": 4, "markerfacecolor": PAPER}


@dataclass(frozen=True)
class Front:
    """What accuracy over all comes to at each few accuracy when a constant is added to the few logits.

    Attributes:
        few: ascending, fractions of 1.
        total: accuracy over all at each.
        constants: how many were measured.
    """

    few: tuple[float, ...]
    total: tuple[float, ...]
    constants: int

    def all_at(self, few: float) -> float | None:
        """Accuracy over all where few accuracy is ``few``, on straight lines between the constants; None beyond their ends.

        Example:
            >>> front = Front(few=(0.1, 0.3), total=(0.5, 0.4), constants=2)
            >>> round(front.all_at(0.15), 3), front.all_at(0.4)
            (0.475, None)
        """
        if not self.few or not self.few[0] <= few <= self.few[-1]:
            return None
        return float(np.interp(few, self.few, self.total))


@dataclass(frozen=True)
class Height:
    """How far a result lies above the front (below it where negative).

    Attributes:
        group: the result, one row a seed.
        heights: of each seed, accuracy over all less that of the front at equal few accuracy; None beyond the front's ends.
    """

    group: Group
    heights: tuple[float | None, ...]

    @property
    def known(self) -> list[float]:
        """Those that can be told."""
        return [height for height in self.heights if height is not None]

    @property
    def mean(self) -> float | None:
        """Over seeds."""
        return statistics.fmean(self.known) if self.known else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None of one."""
        return statistics.stdev(self.known) if len(self.known) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The mean's 95% interval over seeds; None of one."""
        half = half_width(self.known)
        return None if half is None or self.mean is None else (self.mean - half, self.mean + half)


def read_front(study: StudyFiles) -> Front | None:
    """The front of a study; None if "compare" was not run, or there are no test samples of few classes.

    The original classifier (constant 0) and the chosen constant lie on it as well.
    """
    measured = study.of(FRONT)
    more = [row for row in study.of(COMPARE) if row["offset"] is not None] + [row for row in [study.original] if row]
    best: dict[float, float] = {}
    for row in [*measured, *more]:
        if is_measured(row):
            best[row[FEW]] = max(row[ALL], best.get(row[FEW], 0.0))
    if not measured or len(best) < 2:
        return None
    few = sorted(best)
    offsets = {row["offset"] or 0.0 for row in [*measured, *more]}
    return Front(tuple(few), tuple(best[value] for value in few), len(offsets))


def alpha_series(study: StudyFiles) -> list[list[Group]]:
    """Trained heads by gamma: one series for each form (and whatever else differs), its gammas ascending.

    They are those that "compare" chooses among, and those of the experiment "gamma".
    """
    rows = {
        (row["method"], row["seed"], *(row[name] for name in SETTINGS)): row
        for row in study.of(CANDIDATES, "gamma")
        if row["top_k"] is not None and is_measured(row)
    }
    return list(by_gamma(group_rows(rows.values())).values())


def chosen(study: StudyFiles) -> list[Group]:
    """The trained heads that "compare" chose, one row a seed."""
    return group_rows([row for row in study.of(COMPARE) if row["top_k"] is not None], by=())


def rivals(study: StudyFiles) -> list[Group]:
    """The other methods of "compare"; of a study without it, the original classifier alone."""
    rows = [row for row in study.of(COMPARE) if row["top_k"] is None and row["error"] is None]
    if not rows and study.original is not None:
        rows = [study.original]
    return measured_groups(group_rows(rows, by=()))


def is_measured(row: Mapping[str, Any]) -> bool:
    """Whether a row has both few accuracy and accuracy over all."""
    return row[FEW] is not None and row[ALL] is not None


def measured_groups(groups: Iterable[Group]) -> list[Group]:
    """Those that have both accuracies."""
    return [group for group in groups if group.mean(FEW) is not None and group.mean(ALL) is not None]


def height_of(group: Group, front: Front) -> Height:
    """How far the rows of a group lie above the front."""
    rows = [row for row in group.rows if is_measured(row)]
    below = [front.all_at(row[FEW]) for row in rows]
    return Height(group, tuple(None if own is None else row[ALL] - own for row, own in zip(rows, below, strict=True)))


def chosen_heights(study: StudyFiles, front: Front) -> list[Height]:
    """How far each chosen head lies above the front, for those that have results."""
    return [height for group in chosen(study) if (height := height_of(group, front)).heights]


def better_rivals(group: Group, others: Sequence[Group]) -> list[str]:
    """A sentence about the rivals that have more of both few accuracy and accuracy over all; none where there are none."""
    few, total = group.mean(FEW), group.mean(ALL)
    better = [
        f"{other.method} ({accuracies_text(other)})"
        for other in others
        if few is not None and (other.mean(FEW) or 0.0) > few and total is not None and (other.mean(ALL) or 0.0) > total
    ]
    if not better:
        return []
    more = f" and {len(better) - _MOST_NAMED} more" if len(better) > _MOST_NAMED else ""
    return [f"Better in both few ({percent(few)}%) and all ({percent(total)}%): {', '.join(better[:_MOST_NAMED])}{more}."]


def accuracies_text(group: Group) -> str:
    """Both accuracies of a group, means over its seeds."""
    return f"few {percent(group.mean(FEW))}%, all {percent(group.mean(ALL))}%"


def verdict(height: Height, name: str, samples: int | None, original: Row | None = None, front: Front | None = None) -> str:
    """A sentence that says where a method lies.

    Args:
        height: of the method.
        name: what it is called.
        samples: test samples there are, to say what the distance comes to; None if not known.
        original: of the original classifier; a method that leaves its accuracies as they are is said to.
        front: to say how far it goes where the method lies beyond it.
    """
    known, mean = height.known, height.mean
    if mean is None:
        return f"{name} {_beyond(height.group, front)}"
    rows = [row for row in height.group.rows if is_measured(row)]
    if original is not None and all((row[FEW], row[ALL]) == (original[FEW], original[ALL]) for row in rows):
        return f"{name} changes nothing: validation samples chose what leaves few accuracy and accuracy over all as they were."
    seeds, points, interval = len(height.heights), percent(abs(mean)), height.interval
    left_out = seeds - len(known)
    more = f" {left_out} of {seeds} seeds lie beyond the front's ends and are not counted." if left_out else ""
    if interval is None:
        seen = "one seed, no interval"
    else:
        # The smaller number comes first, also where the distance is one below the front.
        low, high = interval if mean > 0 else (-interval[1], -interval[0])
        seen = f"95% interval {percent(low)} to {percent(high)}, {len(known)} seeds"
    images = f", {abs(mean) * samples:.0f} of {samples:,} test samples" if samples else ""
    if abs(mean) < _NOTHING or (interval is not None and interval[0] <= 0 <= interval[1]):
        low, high = interval or (mean, mean)
        seen = (
            seen
            if interval is None
            else f"95% interval {percent(low, sign=True)} to {percent(high, sign=True)}, {len(known)} seeds"
        )
        said = f"is not told from the front: {percent(mean, sign=True)} points over all at equal few accuracy ({seen})"
    elif mean > 0:
        said = (
            f"lies above the front: {points} points more over all at equal few accuracy than one constant on the few logits "
            f"({seen}{images})"
        )
    else:
        said = (
            f"lies below the front: one constant on the few logits does better, by {points} points over all at equal few "
            f"accuracy ({seen}{images})"
        )
    return f"{name} {said}.{more}"


def _beyond(group: Group, front: Front | None) -> str:
    """Why a method cannot be compared with the front: what is at the front's nearest end."""
    few, total = group.mean(FEW), group.mean(ALL)
    if front is None or few is None or total is None:
        return "cannot be compared with the front: its few accuracy lies beyond the front's ends."
    which, place = ("largest", -1) if few > front.few[-1] else ("smallest", 0)
    above = place == -1 and total > front.total[-1]
    where = "lies above the front's end" if above else "cannot be compared with the front"
    return (
        f"{where}: no constant that was measured has its few accuracy, {percent(few)}% with {percent(total)}% over all; "
        f"the {which} is {percent(front.few[place])}% with {percent(front.total[place])}% over all."
    )


def front_table(studies: Sequence[tuple[StudyFiles, Sequence[Height]]]) -> list[DataTable]:
    """How far the chosen heads lie above the front."""
    rows = []
    for study, heights in studies:
        for height in heights:
            group = height.group
            totals = [row["test_all"] for row in group.rows if is_measured(row)]
            fronts = [total - h for total, h in zip(totals, height.heights, strict=True) if h is not None]
            front = percent(sum(fronts) / len(fronts)) if fronts else "-"
            each = ", ".join("beyond its ends" if h is None else percent(h, sign=True) for h in height.heights)
            rows.append(
                (
                    group.method,
                    study.name,
                    mean_text(group, "test_few"),
                    mean_text(group, "test_all"),
                    front,
                    percent(height.mean, sign=True) + half_width_text(half_width(height.known)),
                    each,
                )
            )
    return of_studies(
        len(studies),
        "The chosen Alpha Nets against the front, top-1 on test samples",
        ("method", "classifier", "few, %", "all, %", "front at equal few, %", "above the front, points", "each seed"),
        rows,
        (0, 1, 6),
        note="Below zero, one constant on all few logits has more accuracy over all at the same few accuracy. ± is half of the "
        "95% interval over seeds.",
    )


def front_blocks(studies: Sequence[StudyFiles]) -> list[TextBlock | FigureBlock]:
    """A figure for each classifier, and what they say in words."""
    pictures: list[tuple[StudyFiles, list[Picture]]] = []
    found: list[tuple[StudyFiles, list[Height]]] = []
    texts: list[TextBlock] = []
    fronts = [read_front(study) for study in studies]
    for study, front in zip(studies, fronts, strict=True):
        name = f" ({study.name})" if len(studies) > 1 else ""
        if front is not None:
            found.append((study, chosen_heights(study, front)))
            for height in found[-1][1]:
                said = verdict(height, f"{height.group.method}{name}", study.part("samples", "test"), study.original, front)
                texts.append(
                    TextBlock(" ".join([said, *better_rivals(height.group, [*rivals(study), *chosen(study)])]), "finding")
                )
        elif not any(row[FEW] is not None for row in study.rows):
            texts.append(TextBlock(f"There are no test samples of few classes{name}: no front can be drawn.", "warning"))
        else:
            texts.append(TextBlock(f"The front was not measured{name}: it comes with the experiment compare.", "warning"))
        if own := _pictures(study, front, name):
            pictures.append((study, own))
    figures = [
        FigureBlock(
            "Few accuracy against accuracy over all" + (f": {study.name}" if len(studies) > 1 else ""),
            _caption([front for front in fronts if front is not None]) if place == 0 else f"{study.name}; read as above.",
            own,
            front_table(found) if place + 1 == len(pictures) else (),
            study.attribution,
        )
        for place, (study, own) in enumerate(pictures)
    ]
    return [*figures, *texts]


def _caption(fronts: Iterable[Front]) -> str:
    constants = " and ".join(dict.fromkeys(str(front.constants) for front in fronts))
    text = (
        "Right is better for few classes, up is better over all; names stand in the order of the points' heights. Small "
        "markers are an Alpha Net's gammas (smallest and largest named); large hollow ones what validation chose, and rivals, "
        "with standard deviations; all are means over seeds. Where large ones crowd, their box is drawn closer, and they are "
        "named there."
    )
    if not constants:
        return text
    return (
        f"{text} The line is the front: the original classifier with one constant added to all few logits, {constants} of "
        "them, straight between. An Alpha Net is worth its training where it lies above this line. The last panel has the "
        "same points by their height above it, but for those beyond its ends."
    )


def _pictures(study: StudyFiles, front: Front | None, name: str) -> list[Picture]:
    series, others = alpha_series(study), rivals(study)
    of_compare = measured_groups(chosen(study))
    if not series and not of_compare:
        return []
    large = [*of_compare, *others]
    everyone = [*itertools.chain(*series), *large]
    places = method_places(group.method for group in everyone)
    accuracies = _Panel(places, lambda group: (group.mean(ALL) or 0.0, group.spread(ALL)))
    crowded = crowd(np.array([accuracies.position(group) for group in everyone]), len(everyone) - len(large))

    def draw_accuracies(axes: Any, box: Box | None) -> None:
        if front is not None:
            few, total = [100 * value for value in front.few], [100 * value for value in front.total]
            axes.plot(few, total, color=series_color(FRONT_PLACE), linewidth=2.0, zorder=1)
        accuracies.draw(axes, series, large, "accuracy over all, %")
        limits = box or _limits_of(np.array([accuracies.position(group) for group in everyone]))
        axes.set(xlim=limits[0], ylim=limits[1])
        if crowded is not None and box is None:
            (left, right), (low, high) = crowded
            axes.plot([left, right, right, left, left], [low, low, high, high, low], color=MUTED, linewidth=0.9, linestyle=":")
        accuracies.name(
            axes,
            [
                group
                for group in large
                if box is not None or crowded is None or not _inside(accuracies.position(group), crowded)
            ],
        )

    described = "; ".join(f"{group.method}: {accuracies_text(group)}" for group in large)
    alt = f"Few accuracy against accuracy over all{name}; {described}"
    pictures = [
        study_picture(study, "trade-off-front", f"Accuracy{name}", alt, lambda axes: draw_accuracies(axes, None), size=_SIZE)
    ]
    if crowded is not None:
        inside = [group for group in large if _inside(accuracies.position(group), crowded)]
        alt = f"The same closer{name}, where {', '.join(group.method for group in inside)} are"
        title = f"The box closer{name}"
        pictures.append(
            study_picture(study, "closer-front", title, alt, lambda axes: draw_accuracies(axes, crowded), size=_SIZE)
        )
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
        named = of_known_height([*of_compare, *apart])
        panel.draw(axes, lines, named, "above the front, points over all")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, -0.3), max(high, 0.3))
        axes.annotate("the front", (0, 0), (3, 3), ("axes fraction", "data"), "offset points", fontsize=8, color=MUTED)
        panel.name(axes, named)

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

    def look(self, group: Group, *, large: bool) -> dict[str, Any]:
        """Colour and marker; a large one is hollow."""
        place = self.places.get(group.method)
        color, marker = (INK, ORIGINAL_MARKER) if place is None else (series_color(place), series_marker(place))
        look = _LARGE if large else {**_SMALL, "markerfacecolor": color}
        return {"color": color, "marker": marker, **look} | ({"zorder": 5} if place is None else {})

    def draw_point(self, axes: Any, group: Group, *, large: bool) -> None:
        """A point; a large one has error bars in both directions."""
        (x, y), (x_spread, y_spread) = self.position(group), self.spread(group) if large else (0.0, 0.0)
        axes.errorbar(
            [x],
            [y],
            xerr=[x_spread] if x_spread else None,
            yerr=[y_spread] if y_spread else None,
            linestyle="none",
            elinewidth=1.0,
            **self.look(group, large=large),
        )

    def draw(self, axes: Any, series: Sequence[Sequence[Group]], large: Sequence[Group], ylabel: str) -> None:
        """Draw series of small points, the ends of each with its gamma, and large points."""
        for groups in series:
            for group in groups:
                self.draw_point(axes, group, large=False)
            if len(groups) > 1:
                color = series_color(self.places[groups[0].method])
                axes.plot(*zip(*map(self.position, groups), strict=True), color=color, linewidth=1.0, alpha=0.7, zorder=2)
                for end in (groups[0], groups[-1]):
                    text, place = f"{end.rows[0]['gamma']:g}", self.position(end)
                    axes.annotate(
                        text, place, (4, -9), textcoords="offset points", fontsize=7.5, color=color, annotation_clip=True
                    )
        for group in large:
            self.draw_point(axes, group, large=True)
        axes.set(xlabel="few accuracy, %", ylabel=ylabel)

    def name(self, axes: Any, groups: Sequence[Group]) -> None:
        """Names beside the axes in the order of their points' heights, each with a line to its point: none covers another.

        Points outside of the axes have none.
        """
        (left, right), (low, high) = limits = axes.get_xlim(), axes.get_ylim()
        named = sorted(
            (group for group in groups if _inside(self.position(group), limits)), key=lambda group: self.position(group)[1]
        )
        if not named:
            return
        wanted = np.array([(self.position(group)[1] - low) / (high - low) for group in named])
        at = apart(wanted, _NAMES_GAP)
        for group, height in zip(named, at, strict=True):
            x, y = self.position(group)
            look = self.look(group, large=True)
            start = (x - left) / (right - left), (y - low) / (high - low)
            axes.plot(
                [start[0], 1.0, 1.04],
                [start[1], height, height],
                transform=axes.transAxes,
                clip_on=False,
                color=look["color"],
                linewidth=0.6,
                alpha=0.55,
                zorder=1.5,
            )
            axes.plot(
                [1.06], [height], transform=axes.transAxes, clip_on=False, **look | {"markersize": 6.5, "markeredgewidth": 1.2}
            )
            axes.text(1.10, height, shortened(group.method, 26), transform=axes.transAxes, va="center", fontsize=8.5)


def apart(wanted: NDArray[np.float64], gap: float) -> NDArray[np.float64]:
    """Places from 0 to 1 as near as can be to those wanted, which ascend, with ``gap`` between, or less where it is too much.

    Example:
        >>> apart(np.array([0.5, 0.5, 0.9]), 0.1).round(2).tolist()
        [0.45, 0.55, 0.9]
    """
    shift = min(gap, 1 / len(wanted)) * np.arange(len(wanted))
    return np.asarray(isotonic_regression(wanted - shift, y_min=0.0, y_max=1 - shift[-1]) + shift)


def crowd(points: NDArray[np.float64], first: int) -> Box | None:
    """The box around most points that lie so close to each other that their markers touch; None where fewer than three do.

    Args:
        points: ``[n, 2]``, all that are shown.
        first: of the points that count.
    """
    extents = np.array([high - low for low, high in _limits_of(points)])
    own = points[first:] / extents
    if len(own) < _CROWD:
        return None
    _, lots = connected_components(np.abs(own[:, None] - own[None]).max(axis=2) < _TOUCHING, directed=False)
    sizes = np.bincount(lots)
    if sizes.max() < _CROWD:
        return None
    inside = points[first:][lots == sizes.argmax()]
    (left, right), (low, high) = _limits_of(inside, margin=0.2)
    return (left, right), (low, high)


def _inside(point: tuple[float, float], box: Box) -> bool:
    return all(low <= value <= high for value, (low, high) in zip(point, box, strict=True))


def _limits_of(points: NDArray[np.float64], margin: float = 0.06) -> Box:
    """Limits of the region of the points: the front goes on far beyond, where nobody wants to be."""
    low, high = points.min(axis=0), points.max(axis=0)
    more = np.maximum(margin * (high - low), 0.3)
    (left, bottom), (right, top) = (low - more).tolist(), (high + more).tolist()
    return (left, right), (bottom, top)
