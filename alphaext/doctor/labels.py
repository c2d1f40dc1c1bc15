"""The doctor's checks of labels and classes: each takes the parts of a data set and yields what it finds."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from ..data.images import FileImages, LabelledImages
from ..utils.text import same_names
from .images import Parts
from .report import Finding, Level, few_mask

Names: TypeAlias = tuple[str, ...] | None

CHECKPOINT = "the checkpoint"


@dataclass
class ClassFolders:
    """The folders that the images of a part lie in, where there is about one a class.

    Attributes:
        label_of: the label of each folder whose images have one label.
        mixed: how often each label occurs in the folders whose images have several.
    """

    label_of: dict[str, int] = field(default_factory=dict)
    mixed: dict[str, Counter[int]] = field(default_factory=dict)


def find_class_folders(parts: Parts) -> dict[str, ClassFolders]:
    """The class folders of each part that has them, by names that mean the same in all parts.

    That is the name of the last folder; where two folders share it (``apartment/outdoor``, ``house/outdoor``), the path below
    what all images of the part have in common (``train/``).
    """
    tallies = {part: _tally(images) for part, images in parts.items() if isinstance(images, FileImages)}
    last_is_enough = all(len({folder.rpartition("/")[2] for folder in tally}) == len(tally) for tally in tallies.values())
    found = {}
    for part, tally in tallies.items():
        distinct = len(set(itertools.chain.from_iterable(tally.values())))
        single = sum(len(labels) == 1 for labels in tally.values())
        # Lists of flat folders, or of folders by camera or by patient, say nothing about the order of classes.
        if not tally or not 0.5 <= len(tally) / distinct <= 2 or single < 0.9 * len(tally):
            continue
        folders = ClassFolders()
        shared = 0 if last_is_enough else _shared_components(tally)
        for folder, labels in tally.items():
            name = folder.rpartition("/")[2] if last_is_enough else "/".join(folder.split("/")[shared:])
            if len(labels) == 1:
                folders.label_of[name] = next(iter(labels))
            else:
                folders.mixed[name] = labels
        found[part] = folders
    return found


def _tally(images: FileImages) -> dict[str, Counter[int]]:
    pairs = Counter(zip((path.rpartition("/")[0] for path in images.paths), images.labels.tolist(), strict=True))
    tally: dict[str, Counter[int]] = {}
    for (folder, label), times in pairs.items():
        if folder:
            tally.setdefault(folder, Counter())[label] = times
    return tally


def _shared_components(folders: Iterable[str]) -> int:
    """How many leading components all folders share, at least one being left of each."""
    components = [folder.split("/") for folder in folders]
    return len(os.path.commonprefix([path[:-1] for path in components]))  # noqa: RUF071  (components, not text)


def names_of_classes(
    parts: Parts, folders: Mapping[str, ClassFolders], checkpoint_names: Names, num_classes: int
) -> tuple[str, ...] | None:
    """What to call the classes: as the checkpoint does, or the data, or the class folders of the training images."""
    for names in (checkpoint_names, *(images.class_names for images in parts.values())):
        if names is not None and len(names) == num_classes:
            return names
    by_label = {label: name for name, label in folders.get("train", ClassFolders()).label_of.items()}
    return tuple(by_label[label] for label in range(num_classes)) if set(by_label) >= set(range(num_classes)) else None


def label_problems(parts: Parts, num_classes: int) -> Iterator[Finding]:
    """Labels that the classifier has no row for, and classes that it does not know of."""
    for part, images in parts.items():
        beyond = torch.nonzero(images.labels >= num_classes)[:, 0].tolist()
        if beyond:
            yield Finding(
                "error",
                f"labels of {part} beyond the classifier",
                f"{len(beyond):,} of {len(images):,} images have labels above {num_classes - 1}, but there are {num_classes} "
                "classes: the list is another data set's, or its labels do not count from 0",
                tuple(f"{images.name(index)}: label {int(images.labels[index])}" for index in beyond),
            )
        elif images.num_classes > num_classes:
            yield Finding(
                "error",
                f"{part} has more classes than the classifier",
                f"{part} has {images.num_classes} classes, the classifier {num_classes}; those beyond have no images, but the "
                "order of the others may differ",
            )


def gap_problems(train: LabelledImages, counts: Tensor, num_classes: int, names: Names) -> Iterator[Finding]:
    """Classes without training images."""
    if len(train) == 0:
        yield Finding("error", "no training images", "the training part is empty")
        return
    largest = int(train.labels.max())
    empty = torch.nonzero(counts == 0)[:, 0].tolist()
    gaps = [label for label in empty if label <= largest]
    if gaps:
        yield Finding(
            "error",
            "classes without training images",
            f"{len(gaps)} of {num_classes} class ids have no training image: labels must be 0, 1, 2, ... without gaps, in the "
            "order of the classifier's rows",
            tuple(describe_class(label, names) for label in gaps),
        )
    if len(empty) > len(gaps):
        yield Finding(
            "error",
            "fewer classes than the classifier",
            f"the training labels end at {largest}, but there are {num_classes} classes: the last {len(empty) - len(gaps)} "
            "have no training image; the list may be another data set's",
            tuple(describe_class(label, names) for label in empty if label > largest),
        )


def split_problems(
    counts: Tensor, few_below: int, many_above: int, top_k: int, few_classes: Tensor | None = None
) -> Iterator[Finding]:
    """Splits that are empty or too small."""
    present = counts[counts > 0]
    if len(present) == 0:
        return
    is_few = few_mask(counts, few_below, few_classes)
    few, many = int(is_few.sum()), int(((counts > many_above) & ~is_few).sum())
    base = len(present) - few
    if few_classes is not None and 0 in (few, base):
        yield Finding(
            "error",
            "no base classes" if few else "no few classes",
            "few_classes names every class with training images, so that there is nothing to repair them with"
            if few
            else "no class that few_classes names has training images, so that there is nothing to repair",
        )
        return
    if few == 0:
        yield Finding(
            "error",
            "no few classes",
            f"no class has fewer than {few_below} training images (the smallest has {int(present.min())}), so that there is "
            "nothing to repair; a larger few_below makes some classes few",
        )
    if base == 0:
        yield Finding(
            "error",
            "no base classes",
            f"all {few} classes have fewer than {few_below} training images (the largest has {int(present.max())}), so that "
            "there is nothing to repair them with; a smaller few_below leaves some classes as base",
        )
    elif base < top_k:
        those = "are not few" if few_classes is not None else f"have at least {few_below} training images"
        yield Finding(
            "note",
            "fewer base classes than neighbours",
            f"{base} classes {those}: presets combine each few class with these, and a training with top_k={top_k} is refused",
        )
    for name, number, rule in (
        ("medium", base - many, f"{few_below} to {many_above}" if few_classes is None else f"at most {many_above}"),
        ("many", many, f"more than {many_above}"),
    ):
        if number == 0 and base:
            yield Finding("note", f"no {name} classes", f"no class has {rule} training images: there is no {name} accuracy")


def coverage_problems(
    counts: Mapping[str, Tensor], few_below: int, names: Names, few_classes: Tensor | None = None
) -> Iterator[Finding]:
    """Classes that validation or test images leave out."""
    train = counts["train"]
    present, is_few = train > 0, few_mask(train, few_below, few_classes)
    checks: tuple[tuple[str, Level, str, Tensor, str], ...] = (
        (
            "val",
            "warning",
            "few classes without validation images",
            is_few,
            "few classes: choosing the epoch does not see them",
        ),
        ("val", "note", "base classes without validation images", present & ~is_few, "classes that are not few"),
        ("test", "warning", "classes without test images", present, "classes: the accuracies that are reported leave them out"),
    )
    for part, level, title, among, detail in checks:
        without = (among & (counts[part] == 0)).nonzero()[:, 0].tolist() if part in counts else []
        if without:
            yield Finding(
                level,
                title,
                f"{len(without)} of {int(among.sum())} {detail}",
                tuple(describe_class(label, names) for label in without),
            )


def name_problems(parts: Parts, checkpoint_names: Names) -> Iterator[Finding]:
    """Names of classes that are ordered in one way here and in another there."""
    named = [(part, images.class_names) for part, images in parts.items() if images.class_names is not None]
    if checkpoint_names is not None:
        named.insert(0, (CHECKPOINT, checkpoint_names))
    for (one, first), (other, second) in itertools.combinations(named, 2):
        if same_names(first, second):
            continue
        differing = tuple(
            f"class {label}: {a!r} in {one}, {b!r} in {other}"
            for label, (a, b) in enumerate(itertools.zip_longest(first, second))
            if a != b
        )
        if set(first) == set(second):
            what = f"both have the same {len(first)} names, in another order"
        else:
            what = (
                f"{one} has {len(first)} names and {other} {len(second)}; "
                f"{len(set(first) - set(second))} are in {one} alone, {len(set(second) - set(first))} in {other} alone"
            )
        yield Finding(
            "error",
            f"class names differ between {one} and {other}",
            f"{what}. Labels mean different classes, and every result is wrong; put the labels into the order of {one}",
            differing,
        )


def folder_problems(parts: Parts, folders: Mapping[str, ClassFolders], checkpoint_names: Names) -> Iterator[Finding]:
    """Class folders whose images have one label here and another there, or another than the names of the classes say."""
    for part, found in folders.items():
        if found.mixed:
            yield Finding(
                "warning",
                f"folders of {part} with several labels",
                f"{len(found.mixed)} of {len(found.mixed) + len(found.label_of)} folders, while all others have one label "
                "each: some lines may be wrong",
                tuple(
                    f"{name}: " + ", ".join(f"label {label} ({times:,} images)" for label, times in labels.most_common())
                    for name, labels in sorted(found.mixed.items())
                ),
            )
        names = parts[part].class_names if checkpoint_names is None else checkpoint_names
        yield from _named_otherwise(part, found, names)
    for (one, first), (other, second) in itertools.combinations(folders.items(), 2):
        shared = sorted(set(first.label_of) & set(second.label_of))
        differing = [name for name in shared if first.label_of[name] != second.label_of[name]]
        if differing:
            yield Finding(
                "error",
                f"class order differs between {one} and {other}",
                f"{len(differing)} of {len(shared)} class folders that both have carry different labels: the lists were made "
                "with different orders of the classes, and every result is wrong",
                tuple(f"{name}: {first.label_of[name]} in {one}, {second.label_of[name]} in {other}" for name in differing),
            )
    yield from _unsorted(folders.get("train", ClassFolders()).label_of)


def _named_otherwise(part: str, found: ClassFolders, names: Names) -> Iterator[Finding]:
    if names is None:
        return
    label_of = {name: label for label, name in enumerate(names)}
    known = [name for name in found.label_of if name in label_of]
    wrong = sorted(name for name in known if found.label_of[name] != label_of[name])
    if wrong:
        yield Finding(
            "error",
            f"labels of {part} disagree with the class names",
            f"{len(wrong)} of {len(known)} class folders that bear a class's name have another label than that class: the "
            "list and the class names were made with different orders of the classes",
            tuple(f"folder {name}: label {found.label_of[name]}, but class {label_of[name]} has this name" for name in wrong),
        )


def _unsorted(label_of: Mapping[str, int]) -> Iterator[Finding]:
    by_label = sorted(label_of, key=lambda name: label_of[name])
    if by_label != sorted(by_label):
        place = next(i for i, (a, b) in enumerate(itertools.pairwise(by_label)) if a > b)
        yield Finding(
            "note",
            "labels are not in the sorted order of the class folders",
            f"{by_label[place]} (label {label_of[by_label[place]]}) comes before {by_label[place + 1]} "
            f"(label {label_of[by_label[place + 1]]}): a checkpoint trained on class folders, which are read in sorted order, "
            "would not fit this list",
        )


def describe_class(label: int, names: Sequence[str] | None) -> str:
    """A class by its id, and its name where there is one."""
    return str(label) if names is None else f"{label} ({names[label]})"
