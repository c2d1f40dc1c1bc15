"""The trade-off front of few accuracy and accuracy over all: one constant on the few logits, and who lies above it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...utils.text import percent
from ..plans import CANDIDATES
from ..rows import FRONT, SETTINGS, Group, Row, group_rows
from .data import COMPARE, StudyFiles, by_gamma

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
    few, total = height.group.mean(FEW), height.group.mean(ALL)
    if mean is None:
        beyond = front is not None and few is not None and few > front.few[-1]
        above = beyond and front is not None and total is not None and total > front.total[-1]
        where = "lies above the front's end" if above else "cannot be compared with the front"
        return f"{name} {where}: {_beyond(height.group, front)}"
    rows = [row for row in height.group.rows if is_measured(row)]
    if original is not None and all((row[FEW], row[ALL]) == (original[FEW], original[ALL]) for row in rows):
        return f"{name} changes nothing: validation samples chose what leaves few accuracy and accuracy over all as they were."
    seeds, points = len(height.heights), percent(abs(mean))
    spread = f" ±{percent(height.spread)}" if height.spread is not None else ""
    images = f", {abs(mean) * samples:.0f} of {samples:,} test samples" if samples else ""
    of = f"over {seeds} seeds" if seeds > 1 else "one seed"
    left_out = seeds - len(known)
    more = f" {left_out} of {seeds} seeds lie beyond the front's ends and are not counted." if left_out else ""
    if abs(mean) < _NOTHING or (min(known) < 0 < max(known)):
        said = (
            f"on the front: {percent(mean, sign=True)}{spread} points over all at equal few accuracy ({of}), no better and no "
            "worse than one constant on the few logits"
        )
    elif mean > 0:
        said = (
            f"above the front: {points}{spread} points more over all at equal few accuracy than one constant on the few "
            f"logits ({of}{images})"
        )
    else:
        said = (
            f"below the front: one constant on the few logits does better, by {points}{spread} points over all at equal few "
            f"accuracy ({of}{images})"
        )
    return f"{name} lies {said}.{more}"


def _beyond(group: Group, front: Front | None) -> str:
    """Why a method cannot be compared with the front: what is at the front's nearest end."""
    few, total = group.mean(FEW), group.mean(ALL)
    if front is None or few is None or total is None:
        return "its few accuracy lies beyond the front's ends."
    which, place = ("largest", -1) if few > front.few[-1] else ("smallest", 0)
    return (
        f"no constant that was measured has its few accuracy, {percent(few)}% with {percent(total)}% over all; the {which} is "
        f"{percent(front.few[place])}% with {percent(front.total[place])}% over all."
    )
