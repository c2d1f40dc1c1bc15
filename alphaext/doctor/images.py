"""The doctor's checks of images: those that cannot be read, and those that occur more than once."""

from __future__ import annotations

import itertools
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TypeAlias

from ..data.images import ArrayImages, DatasetImages, FileImages, LabelledImages
from .reading import Reading, missing_files
from .report import Finding, Level, plural

__all__ = ["content_problems", "missing_problems", "reading_problems", "repeat_problems", "truncation_problems"]

Parts: TypeAlias = Mapping[str, LabelledImages]

# Large collections have a few equal images under two names (photographs uploaded twice, drawings of a single line). One in a
# thousand moves an accuracy by a tenth of a point at most; an image *listed* in two parts is always a mistake.
_HARMLESS_SHARE = 0.001


def missing_problems(parts: Parts) -> Iterator[Finding]:
    """Images without a file, looked for but not read."""
    for part, images in parts.items():
        missing = missing_files(images)
        if missing:
            yield Finding(
                "error",
                f"missing images of {part}",
                f"{len(missing):,} of {len(images):,} images are not there{_root_hint(images, missing)}",
                tuple(images.name(index) for index in missing),
            )


def reading_problems(parts: Parts, readings: Mapping[str, Reading]) -> Iterator[Finding]:
    """Images that could not be read."""
    for part, reading in readings.items():
        images, failures = parts[part], reading.failures
        if failures:
            yield Finding(
                "error",
                f"missing or unreadable images of {part}",
                f"{len(failures):,} of {len(images):,} images cannot be read{_root_hint(images, list(failures))}",
                tuple(f"{images.name(index)}: {reason}" for index, reason in failures.items()),
            )


def _root_hint(images: LabelledImages, failed: Sequence[int]) -> str:
    """Where the images are instead, if none is where it was looked for."""
    if not isinstance(images, FileImages) or len(failed) < len(images) or os.path.exists(images.root / images.paths[0]):
        return ""
    path, root = images.paths[0], images.root
    text = f", the first was looked for at {str(root / path)!r}"
    try:
        inside = sorted(entry for entry in root.iterdir() if entry.is_dir())
    except OSError:
        inside = []
    for candidate in (*inside, *root.parents[:3]):
        if os.path.exists(candidate / path):
            return f"{text}; it is in {str(candidate)!r}: give that as the root"
    below = path
    while "/" in below:
        below = below.partition("/")[2]
        if os.path.exists(root / below):
            return f"{text}; {below!r} is in the root: the paths of the list have more folders than there are"
    return f"{text}: the root may be wrong"


def repeat_problems(parts: Parts) -> Iterator[Finding]:
    """Images that are listed twice, in one part or in two."""
    places: dict[str, dict[Hashable, int]] = {}
    for part, images in parts.items():
        first: dict[Hashable, int] = {}
        again = []
        for index, identity in enumerate(_identities(images)):
            earlier = first.setdefault(identity, index)
            if earlier != index:
                again.append((earlier, index))
        places[part] = first
        same, other = _by_label(images, again)
        if same:
            yield Finding(
                "warning",
                f"images listed twice in {part}",
                f"{plural(len(same), 'entry')} repeating an earlier one, with the same label",
                tuple(images.name(index) for _, index in same),
            )
        if other:
            yield Finding(
                "warning",
                f"images of {part} with several labels",
                f"{plural(len(other), 'entry')} repeating an earlier one, with another label",
                tuple(_two_labels(images, *pair) for pair in other),
            )
    for one, two in itertools.combinations(parts, 2):
        shared = [(places[one][key], index) for key, index in places[two].items() if key in places[one]]
        if shared:
            yield _overlap(parts, one, two, shared, by_content=False)


def content_problems(parts: Parts, readings: Mapping[str, Reading]) -> Iterator[Finding]:
    """Images whose bytes are those of another one under another name, in one part or in two."""
    identities = {part: _identities(images) for part, images in parts.items()}
    places: dict[str, dict[bytes, int]] = {}
    for part, images in parts.items():
        first: dict[bytes, int] = {}
        again = []
        for index, digest in enumerate(readings[part].digests):
            if digest is not None:
                earlier = first.setdefault(digest, index)
                if identities[part][earlier] != identities[part][index]:
                    again.append((earlier, index))
        places[part] = first
        same, other = _by_label(images, again)
        if other:
            yield Finding(
                "warning",
                f"equal images of {part} with several labels",
                f"{plural(len(other), 'image')} with the very bytes of an earlier one, and another label",
                tuple(f"{images.name(earlier)} = {_two_labels(images, earlier, index)}" for earlier, index in other),
            )
        if same:
            yield Finding(
                "note",
                f"equal images in {part}",
                f"{plural(len(same), 'image')} with the very bytes of an earlier one, and its label",
                tuple(f"{images.name(earlier)} = {images.name(index)}" for earlier, index in same),
            )
    for one, two in itertools.combinations(parts, 2):
        by_path = set(identities[one]) & set(identities[two])
        shared = [
            (places[one][digest], index)
            for index, digest in enumerate(readings[two].digests)
            if digest is not None and digest in places[one] and identities[two][index] not in by_path
        ]
        if shared:
            yield _overlap(parts, one, two, shared, by_content=True)


def truncation_problems() -> Iterator[Finding]:
    """Pillow told to read truncated images, so that nothing else finds them."""
    from PIL import ImageFile

    if ImageFile.LOAD_TRUNCATED_IMAGES:
        yield Finding(
            "warning",
            "truncated images are not noticed",
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: Pillow fills what is missing with gray",
        )


def _overlap(parts: Parts, one: str, two: str, shared: Sequence[tuple[int, int]], *, by_content: bool) -> Finding:
    def item(first: int, second: int) -> str:
        name, other = parts[one].name(first), parts[two].name(second)
        text = name if name == other else f"{name} = {other}"
        label, other_label = int(parts[one].labels[first]), int(parts[two].labels[second])
        return text if label == other_label else f"{text} (label {label} in {one}, {other_label} in {two})"

    counted = f"{len(shared):,} of {plural(len(parts[two]), 'image')} of {two}"
    if by_content:
        few = len(shared) <= _HARMLESS_SHARE * len(parts[two])
        detail = f"{counted} with the very bytes of one of {one}"
        detail += ": too few to matter much" if few else f": accuracies on {two} come out too high"
        level: Level = "warning" if few else "error"
        return Finding(level, f"{one} and {two} overlap by content", detail, tuple(item(*pair) for pair in shared))
    detail = f"{counted} in both lists: accuracies on {two} come out too high"
    return Finding("error", f"{one} and {two} overlap by path", detail, tuple(item(*pair) for pair in shared))


def _identities(images: LabelledImages) -> list[Hashable]:
    """What is the same for two entries that are one image: its absolute path, or its place in an array or data set."""
    if isinstance(images, FileImages):
        root = os.path.realpath(images.root)
        return [f"{root}/{os.path.normpath(path) if '//' in path or './' in path else path}" for path in images.paths]
    if isinstance(images, ArrayImages):
        return [(id(images.pixels), row) for row in images.rows.tolist()]
    if isinstance(images, DatasetImages):
        return [(id(images.dataset), row) for row in images.rows.tolist()]
    return [images.name(index) for index in range(len(images))]


def _by_label(images: LabelledImages, pairs: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Those of the pairs that have one label, and those that have two."""
    labels = images.labels.tolist() if pairs else []
    same = [pair for pair in pairs if labels[pair[0]] == labels[pair[1]]]
    return same, [pair for pair in pairs if labels[pair[0]] != labels[pair[1]]]


def _two_labels(images: LabelledImages, first: int, second: int) -> str:
    return f"{images.name(second)}: label {int(images.labels[first])} first, then {int(images.labels[second])}"
