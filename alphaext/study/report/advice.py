"""What a report opens with: which method to take for these data, why, and what it costs the classes that were fine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from ...metrics.accuracy import SPLITS, SPLITS_AND_ALL
from ...utils.text import percent
from ..plans import FORM_NAMES, RETRAINED, ROWS
from ..rows import ORIGINAL, Group, group_rows
from .content import TextBlock
from .data import COMPARE, StudyFiles

Gain: TypeAlias = tuple[float, float | None, float | None]
"""A gain in fractions of 1 and the ends of its 95% interval, which are None where there is none."""

# So many standard errors of an accuracy are noise, as in alphaext.recommend.
_NOISE = 0.5
# Of methods that are alike the first is advised: it changes less. Alpha Nets come after the second.
_ORDER = (ORIGINAL, "few-bias", "tau", "logit-adjustment", "lws", "ncm", "crt")
_ALPHA_NETS = 1.5
_CALLS = {
    ORIGINAL: "nothing is to be done",
    **{method: f"alphaext baseline {method}" for method in ("few-bias", "tau", "logit-adjustment", "ncm", *RETRAINED)},
    **{FORM_NAMES[form]: f"alphaext fit --preset {form}" for form in ("few", "paper")},
}


def advice_blocks(studies: Sequence[StudyFiles]) -> list[TextBlock]:
    """The advice for each study; none for those without the experiment "compare"."""
    blocks: list[TextBlock] = []
    for study in studies:
        groups = [
            group
            for group in group_rows(study.of(COMPARE), by=())
            if group.mean("val_all") is not None and group.method != FORM_NAMES[ROWS]  # a control
        ]
        original = next((group for group in groups if group.method == ORIGINAL), None)
        samples = study.part("samples", "val")
        if original is None or not samples:
            continue
        named = f"{study.name}: take" if len(studies) > 1 else "Take"
        best = _choose(groups, samples)
        said = [f"{named} {_called(best)}. {_reason(best, groups, original, samples)}", _measured(best, study)]
        of_few = _choose([group for group in groups if _changes(group) <= _ALPHA_NETS], samples)
        if _changes(best) > _ALPHA_NETS and of_few.method != ORIGINAL:
            said.append(
                f"Where the base classes' rows must stay as they are, take {_called(of_few)}. {_measured(of_few, study)}"
            )
        blocks.append(TextBlock(" ".join(said), "finding"))
    if blocks:
        blocks.append(TextBlock(_note(studies)))
    return blocks


def gains_text(gains: Mapping[str, Gain], base: Sequence[str] = ("medium", "many")) -> str:
    """What few classes and all gain, and what the other classes pay.

    Args:
        gains: of some of few, medium, many and all.
        base: the parts that may pay.

    Example:
        >>> gains_text({"few": (0.1, 0.08, 0.12), "many": (-0.01, -0.02, 0.0), "all": (0.03, None, None)})
        'few +10.0 points (+8.0 to +12.0), all +3.0. Base classes pay: many -1.0 (-2.0 to 0.0).'
    """

    def shown(part: str, unit: str = "") -> str:
        gain, low, high = gains[part]
        ends = "" if low is None or high is None else f" ({percent(low, sign=True)} to {percent(high, sign=True)})"
        return f"{part} {percent(gain, sign=True)}{unit}{ends}"

    measured = [part for part in SPLITS_AND_ALL if part in gains]
    paid = [part for part in measured if part in base and percent(gains[part][0], sign=True).startswith("-")]
    gained = [part for part in measured if part not in paid]
    first = ", ".join(shown(part, "" if place else " points") for place, part in enumerate(gained))
    text = [f"{first}."] if gained else []
    if paid:
        text.append(f"Base classes pay: {', '.join(map(shown, paid))}.")
    elif any(part in base for part in measured):
        text.append("No loss of base classes is seen.")
    return " ".join(text)


def _choose(groups: Sequence[Group], samples: int) -> Group:
    """Of the methods that have no less on validation samples than the best, but for noise, the one that changes least."""
    best = max(groups, key=lambda group: group.mean("val_all") or 0.0)
    least = (best.mean("val_all") or 0.0) - _noise(best, samples)
    alike = [group for group in groups if (group.mean("val_all") or 0.0) >= least]
    return min(alike, key=lambda group: (_changes(group), -(group.mean("val_all") or 0.0)))


def _changes(group: Group) -> float:
    """How much of a classifier a method changes: Alpha Nets and what comes before them change few rows only."""
    if group.method.startswith(FORM_NAMES["plain"]):
        return _ALPHA_NETS
    return _ORDER.index(group.method) if group.method in _ORDER else math.inf


def _noise(group: Group, samples: int) -> float:
    accuracy = group.mean("val_all") or 0.0
    return _NOISE * math.sqrt(accuracy * (1 - accuracy) / samples)


def _called(group: Group) -> str:
    call = _CALLS.get(group.method)
    return group.method + (f" ({call})" if call else "")


def _reason(best: Group, groups: Sequence[Group], original: Group, samples: int) -> str:
    highest = max(groups, key=lambda group: group.mean("val_all") or 0.0)
    over = f"{percent(best.mean('val_all'))}% over all on validation samples"
    before = "" if best.method == ORIGINAL else f" (original {percent(original.mean('val_all'))}%)"
    if highest is best:
        return f"Of {len(groups)} methods it has the most: {over}{before}."
    more = percent((highest.mean("val_all") or 0.0) - (best.mean("val_all") or 0.0))
    return (
        f"It has {over}{before}; {highest.method} has {more} points more, which is within the noise of {samples:,} samples "
        f"({percent(_noise(highest, samples))} points), and changes more."
    )


def _measured(group: Group, study: StudyFiles) -> str:
    """What a method gains and costs on test samples."""
    if group.method == ORIGINAL:
        return ""
    gains: dict[str, Gain] = {}
    for part in SPLITS_AND_ALL:
        gain, half = group.gain(f"test_{part}", study.original), group.half_width(f"test_{part}")
        if gain is not None:
            gains[part] = (gain, None if half is None else gain - half, None if half is None else gain + half)
    return f"On test samples: {gains_text(gains, SPLITS[1:])}" if gains else ""


def _note(studies: Sequence[StudyFiles]) -> str:
    tested = [
        (samples, accuracy)
        for study in studies
        if (samples := study.part("samples", "test")) and (accuracy := (study.original or {}).get("test_all")) is not None
    ]
    text = "Intervals are 95% over seeds; a method without seeds has none."
    if tested:
        samples, accuracy = min(tested)
        moved = 1.96 * math.sqrt(accuracy * (1 - accuracy) / samples)
        text += (
            f" Another {samples:,} test samples would move an accuracy over all by up to {percent(moved)} points either way."
        )
    return f"{text} Preset all, which may change every row, is not among these methods: alphaext recommend compares it, too."
