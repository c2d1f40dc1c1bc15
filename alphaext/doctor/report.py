"""What the doctor finds: findings, and the report that holds them beside the sizes of classes and splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from torch import Tensor

from ..classes import ClassSplit
from ..metrics.accuracy import SPLITS

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")

_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_SHOWN_ITEMS = 20
_SHOWN_CLASSES = 5


@dataclass(frozen=True)
class Finding:
    """One thing that the doctor has to say.

    Attributes:
        level: ``"error"``, results would be wrong or nothing would run; ``"warning"``, results may not be what they seem;
            ``"note"``, good to know.
        title: what it is, in a few words.
        detail: what it means and what to do about it.
        items: all images or classes that it is about, a line each; printing cuts them, nothing else does.
    """

    level: Level
    title: str
    detail: str
    items: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON can hold it."""
        return {"level": self.level, "title": self.title, "detail": self.detail, "items": list(self.items)}

    def print(self, console: Console | None = None) -> None:
        """Print the finding with its first items."""
        out = Console() if console is None else console
        out.print(f"[{_STYLES[self.level]}]{self.level}[/]: [bold]{escape(self.title)}[/]", highlight=False)
        out.print(f"  {self.detail}", highlight=False, markup=False)
        for item in self.items[:_SHOWN_ITEMS]:
            out.print(f"    {_one_line(item)}", highlight=False, markup=False)
        if len(self.items) > _SHOWN_ITEMS:
            out.print(f"    ... and {len(self.items) - _SHOWN_ITEMS:,} more", highlight=False)


def few_mask(counts: Tensor, few_below: int, few_classes: Tensor | None = None) -> Tensor:
    """Which classes with training images are few, by their number of images or because they are named."""
    is_few = counts < few_below
    if few_classes is not None:
        is_few = torch.zeros_like(is_few)
        is_few[few_classes] = True
    return is_few & (counts > 0)


@dataclass
class DataReport:
    """What :func:`alphaext.doctor.check_data` found.

    Attributes:
        counts: images of each class, int64 [N], for each part that there is: ``"train"``, ``"val"``, ``"test"``. Images whose
            label is no class are in none of them.
        images: images of each part.
        num_classes: N.
        class_names: the names of the classes, from the checkpoint, the data or the class folders; None where none tells.
        split: few, medium and many by the training images, or None if a class has none.
        few_below: a class with fewer training images is few.
        many_above: a class with more training images is many.
        few_classes: ids of the classes that were named as few, instead of ``few_below``; or None.
        problems: all findings, errors first.
        images_read: how many images were read whole.
        seconds: how long all took.
        noun: what a sample is called: ``"image"`` or ``"text"``.
    """

    counts: dict[str, Tensor]
    images: dict[str, int]
    num_classes: int
    class_names: tuple[str, ...] | None
    split: ClassSplit | None
    few_below: int
    many_above: int
    problems: list[Finding] = field(default_factory=list)
    images_read: int = 0
    seconds: float = 0.0
    noun: str = "image"
    few_classes: Tensor | None = None

    @property
    def ok(self) -> bool:
        """Whether there is no error among the findings."""
        return not self.of_level("error")

    def of_level(self, level: Level) -> list[Finding]:
        """The findings of one level."""
        return [finding for finding in self.problems if finding.level == level]

    def split_sizes(self) -> dict[str, int]:
        """How many classes are few, medium, many, and without training images, by name."""
        return {name: int(mask.sum()) for name, mask in self._masks().items()}

    def _masks(self) -> dict[str, Tensor]:
        counts = self.counts["train"]
        few, none = few_mask(counts, self.few_below, self.few_classes), counts == 0
        many = (counts > self.many_above) & ~few
        return {"few": few, "medium": ~(few | many | none), "many": many, "none": none}

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON can hold it."""
        split = self.split
        return {
            "ok": self.ok,
            "images": dict(self.images),
            "images_read": self.images_read,
            "seconds": self.seconds,
            "num_classes": self.num_classes,
            "class_names": None if self.class_names is None else list(self.class_names),
            "few_below": self.few_below,
            "many_above": self.many_above,
            "few_classes": None if self.few_classes is None else self.few_classes.tolist(),
            "split_sizes": self.split_sizes(),
            "split": None if split is None else {name: getattr(split, name).tolist() for name in SPLITS},
            "counts": {part: counts.tolist() for part, counts in self.counts.items()},
            "problems": [finding.to_dict() for finding in self.problems],
        }

    def print(self, console: Console | None = None) -> None:
        """Print tables of the parts, the splits and the classes (of many, the largest and smallest), and then the findings."""
        out = Console() if console is None else console
        out.print(self._parts_table())
        out.print(self._splits_table())
        out.print(self._classes_table())
        for finding in self.problems:
            finding.print(out)
        summary = ", ".join(plural(len(self.of_level(level)), level) for level in LEVELS)
        read = f"{plural(self.images_read, self.noun)} read" if self.images_read else f"{self.noun}s not read"
        out.print(f"[{'green' if self.ok else 'bold red'}]{summary}[/] ({read}, {self.seconds:.1f} s)", highlight=False)

    def _parts_table(self) -> Table:
        samples = f"{self.noun}s"
        table = _table(samples.capitalize(), ("", samples, "classes", "smallest", "largest"), left=("",))
        for part, counts in self.counts.items():
            present = int((counts > 0).sum())
            table.add_row(
                part,
                f"{self.images[part]:,}",
                f"{present:,} of {self.num_classes:,}",
                f"{int(counts.min()):,}",
                f"{int(counts.max()):,}",
            )
        return table

    def _splits_table(self) -> Table:
        trained = f"training {self.noun}s"
        table = _table(f"Splits by {trained}", ("split", trained, "classes", *self.counts), left=("split",))
        rules = {
            "few": f"fewer than {self.few_below}" if self.few_classes is None else "named",
            "medium": f"{self.few_below} to {self.many_above}" if self.few_classes is None else f"at most {self.many_above}",
            "many": f"more than {self.many_above}",
        }
        masks = self._masks()
        for name, rule in rules.items():
            images = (f"{int(counts[masks[name]].sum()):,}" for counts in self.counts.values())
            table.add_row(name, rule, f"{int(masks[name].sum()):,}", *images)
        return table

    def _classes_table(self) -> Table:
        order = torch.argsort(self.counts["train"], descending=True, stable=True).tolist()
        table = _table("Classes", ("class", "name", *self.counts), left=("name",))
        for place, label in enumerate(order):
            if _SHOWN_CLASSES <= place < len(order) - _SHOWN_CLASSES:
                if place == _SHOWN_CLASSES:
                    table.add_row(*["..."] * (2 + len(self.counts)))
                continue
            name = "" if self.class_names is None else escape(_one_line(self.class_names[label]))
            table.add_row(str(label), name, *(f"{int(counts[label]):,}" for counts in self.counts.values()))
        return table


def _table(title: str, columns: Sequence[str], left: Sequence[str]) -> Table:
    return Table(*(Column(name, justify="left" if name in left else "right") for name in columns), title=title)


def plural(number: int, noun: str) -> str:
    """``number`` with ``noun`` in its singular or plural: ``"1 image"``, ``"2,000 classes"``, ``"3 entries"``."""
    if number != 1:
        noun = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun}"


def _one_line(text: str) -> str:
    """``text`` without what would break a line or a terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
