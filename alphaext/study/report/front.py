"""The trade-off front of few accuracy and accuracy over all: one constant on the few logits, and who lies above it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...utils.text import percent
from ..plans import CANDIDATES
from ..rows import FRONT, Row
from .data import COMPARE, SETTINGS, Group, StudyFiles, group_rows, varied

__all__ = ["Front", "Height", "alpha_series", "better_rivals", "chosen_heights", "height_of", "read_front", "rivals", "verdict"]

FEW, ALL = "test_few", "test_all"
# Less is not told from nothing: a twentieth of a point.
_NOTHING = 0.0005
_MOST_NAMED = 3


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


def read_front(study: StudyFiles) -> Front | None:
    """The front of a study; None if "compare" was not run, or there are no test samples of few classes.

    The original classifier (constant 0) and the chosen constant lie on it as well.
    """
    measured = study.of(FRONT)
    if not measured:
        return None
    more = [row for row in study.of(COMPARE) if row["offset"] is not None] + [row for row in [study.original] if row]
    best: dict[float, float] = {}
    for row in [*measured, *more]:
        if row[FEW] is not None and row[ALL] is not None:
            best[row[FEW]] = max(row[ALL], best.get(row[FEW], 0.0))
    if len(best) < 2:
        return None
    few = sorted(best)
    offsets = {row["offset"] or 0.0 for row in [*measured, *more]}
    return Front(tuple(few), tuple(best[value] for value in few), len(offsets))


def alpha_series(study: StudyFiles) -> list[list[Group]]:
    """Trained heads by gamma: one series for each form (and whatever else differs), its gammas ascending.

    They are those that "compare" chooses among, and those of the experiment "gamma".
    """
    rows: dict[tuple[object, ...], Row] = {}
    for row in study.of(CANDIDATES, "gamma"):
        if row["top_k"] is not None and row[FEW] is not None and row[ALL] is not None:
            rows.setdefault((row["method"], row["seed"], *(row[name] for name in SETTINGS)), row)
    names = varied(list(rows.values()))
    series: dict[tuple[object, ...], list[Group]] = {}
    for group in group_rows(rows.values(), names):
        others = tuple(value for name, value in group.configuration.items() if name != "gamma")
        series.setdefault((group.method, others), []).append(group)
    return [sorted(groups, key=lambda group: group.rows[0]["gamma"] or 0.0) for groups in series.values()]


def chosen(study: StudyFiles) -> list[Group]:
    """The trained heads that "compare" chose, one row a seed."""
    return group_rows([row for row in study.of(COMPARE) if row["top_k"] is not None], by=())


def rivals(study: StudyFiles) -> list[Group]:
    """The other methods of "compare"; of a study without it, the original classifier alone."""
    found = group_rows([row for row in study.of(COMPARE) if row["top_k"] is None and row["error"] is None], by=())
    if not found and study.original is not None:
        found = group_rows([study.original], by=())
    return [group for group in found if group.mean(FEW) is not None and group.mean(ALL) is not None]


def height_of(group: Group, front: Front) -> Height:
    """How far the rows of a group lie above the front."""
    heights: list[float | None] = []
    for row in group.rows:
        if row[FEW] is None or row[ALL] is None:
            continue
        below = front.all_at(row[FEW])
        heights.append(None if below is None else row[ALL] - below)
    return Height(group, tuple(heights))


def chosen_heights(study: StudyFiles, front: Front) -> list[Height]:
    """How far each chosen head lies above the front, for those that have results."""
    return [height for group in chosen(study) if (height := height_of(group, front)).heights]


def better_rivals(group: Group, others: Sequence[Group]) -> list[str]:
    """A sentence about the rivals that have more of both few accuracy and accuracy over all; none where there are none."""
    few, total = group.mean(FEW), group.mean(ALL)
    if few is None or total is None:
        return []
    better = [other for other in others if (other.mean(FEW) or 0.0) > few and (other.mean(ALL) or 0.0) > total]
    if not better:
        return []
    shown = [
        f"{other.method} (few {percent(other.mean(FEW))}%, all {percent(other.mean(ALL))}%)" for other in better[:_MOST_NAMED]
    ]
    named = ", ".join(shown) + (f" and {len(better) - len(shown)} more" if len(better) > len(shown) else "")
    return [f"Better in both few ({percent(few)}%) and all ({percent(total)}%): {named}."]


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
        few, total = height.group.mean(FEW), height.group.mean(ALL)
        if front is not None and few is not None and total is not None and few > front.few[-1] and total > front.total[-1]:
            return f"{name} lies above the front's end: {_beyond(height.group, front)}"
        return f"{name} cannot be compared with the front: {_beyond(height.group, front)}"
    seeds = len(height.heights)
    rows = [row for row in height.group.rows if row[FEW] is not None and row[ALL] is not None]
    if original is not None and all((row[FEW], row[ALL]) == (original[FEW], original[ALL]) for row in rows):
        return f"{name} changes nothing: validation samples chose what leaves few accuracy and accuracy over all as they were."
    points = percent(abs(mean))
    spread = f" ±{percent(height.spread)}" if height.spread is not None else ""
    images = f", {abs(mean) * samples:.0f} of {samples:,} test samples" if samples else ""
    of = f"over {seeds} seeds" if seeds > 1 else "one seed"
    left_out = seeds - len(known)
    more = f" {left_out} of {seeds} seeds lie beyond the front's ends and are not counted." if left_out else ""
    if abs(mean) < _NOTHING or (min(known) < 0 < max(known)):
        where = f"on the front: {_signed(mean)}{spread} points over all at equal few accuracy ({of})"
        return f"{name} lies {where}, no better and no worse than one constant on the few logits.{more}"
    if mean > 0:
        return (
            f"{name} lies above the front: {points}{spread} points more over all at equal few accuracy than one constant on "
            f"the few logits ({of}{images}).{more}"
        )
    return (
        f"{name} lies below the front: one constant on the few logits does better, by {points}{spread} points over all at "
        f"equal few accuracy ({of}{images}).{more}"
    )


def _beyond(group: Group, front: Front | None) -> str:
    """Why a method cannot be compared with the front: what is at the front's nearest end."""
    few, total = group.mean(FEW), group.mean(ALL)
    if front is None or few is None or total is None:
        return "its few accuracy lies beyond the front's ends."
    place = -1 if few > front.few[-1] else 0
    reached = "no constant that was measured has its few accuracy"
    end = (
        f"the {'largest' if place else 'smallest'} is {percent(front.few[place])}% with {percent(front.total[place])}% over all"
    )
    return f"{reached}, {percent(few)}% with {percent(total)}% over all; {end}."


def _signed(value: float) -> str:
    return percent(value, sign=True)
