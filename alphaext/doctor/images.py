"""The doctor's checks of images: each is read once, for those that cannot be read and those that occur more than once."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeAlias

from ..data.images import DatasetImages, FileImages, ImageReadError, LabelledImages, RowImages
from ..data.texts import Texts
from ..utils.progress import task_bar
from ..utils.text import one_form
from .report import Finding, Level, plural

Parts: TypeAlias = Mapping[str, LabelledImages]

# Large collections have a few equal images under two names (photographs uploaded twice, drawings of a single line). One in a
# thousand moves an accuracy by a tenth of a point at most; an image *listed* in two parts is always a mistake.
_HARMLESS_SHARE = 0.001

# Images of one task: enough that handing out tasks costs nothing beside decoding, few enough that the bar moves.
_CHUNK = 32


@dataclass
class Reading:
    """What came of reading the images of one part.

    Attributes:
        failures: why an image could not be read, by its index.
        digests: SHA-256 of each image as it is stored, None where it could not be read.
    """

    failures: dict[int, str] = field(default_factory=dict)
    digests: list[bytes | None] = field(default_factory=list)


def read_all(
    parts: Mapping[str, LabelledImages], *, workers: int | None = None, progress: bool | None = None
) -> dict[str, Reading]:
    """Read and decode every image of every part.

    Args:
        parts: the images, by the name of their part.
        workers: threads; decoding does not hold Python's lock. Default: two a core that this process may use, at most 32, as
            reading waits for the disk.
        progress: show a progress bar with images per second; None shows it where standard error is a terminal.

    Returns:
        A :class:`Reading` a part.

    Raises:
        KeyboardInterrupt: passed on once the threads have ended, which takes an image each.
    """
    threads = min(32, 2 * len(os.sched_getaffinity(0))) if workers is None else workers
    readings = {part: Reading(digests=[None] * len(images)) for part, images in parts.items()}
    stop = threading.Event()
    # A data set may share one open file among all reads: those of a data set go one at a time.
    locks = {id(images.dataset): threading.Lock() for images in parts.values() if isinstance(images, DatasetImages)}

    def read(part: str, indices: range) -> int:
        images, reading = parts[part], readings[part]
        lock = locks[id(images.dataset)] if isinstance(images, DatasetImages) else nullcontext()
        for index in indices:
            if stop.is_set():
                break
            try:
                with lock:
                    stored = images.stored(index)
                images.decode(index, stored)
            except ImageReadError as error:
                reading.failures[index] = error.reason or str(error)
            except BaseException:
                stop.set()  # so that no thread ends its part first
                raise
            else:
                reading.digests[index] = hashlib.sha256(stored).digest()
        return len(indices)

    tasks = [
        (part, range(len(images))[at : at + _CHUNK]) for part, images in parts.items() for at in range(0, len(images), _CHUNK)
    ]
    total = sum(len(images) for images in parts.values())
    pool = ThreadPoolExecutor(threads, thread_name_prefix="alphaext-read")
    noun = next((images.noun for images in parts.values()), "image")
    with task_bar(progress, "reading", total=total, unit=f"{noun}s") as report:
        try:
            for count in pool.map(read, *zip(*tasks, strict=True)) if tasks else ():
                report(count)
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    for reading in readings.values():
        reading.failures = dict(sorted(reading.failures.items()))
    return readings


def missing_files(images: LabelledImages) -> list[int]:
    """The indices of images without a file, found by listing each folder once; none where images are in memory."""
    if not isinstance(images, FileImages):
        return []

    @cache
    def names(folder: str) -> set[str]:
        try:
            return set(os.listdir(images.root / folder))
        except OSError:
            return set()

    return [index for index, path in enumerate(images.paths) if os.path.basename(path) not in names(os.path.dirname(path))]


def missing_problems(parts: Parts) -> Iterator[Finding]:
    """Images without a file, looked for but not read."""
    for part, images in parts.items():
        missing = {index: images.name(index) for index in missing_files(images)}
        yield from _failures(part, images, missing, "missing images", "are not there")


def reading_problems(parts: Parts, readings: Mapping[str, Reading]) -> Iterator[Finding]:
    """Images that could not be read."""
    for part, images in parts.items():
        failures = {index: f"{images.name(index)}: {reason}" for index, reason in readings[part].failures.items()}
        yield from _failures(part, images, failures, "missing or unreadable images", "cannot be read")


def _failures(part: str, images: LabelledImages, failures: Mapping[int, str], title: str, what: str) -> Iterator[Finding]:
    if failures:
        detail = f"{len(failures):,} of {len(images):,} images {what}{_root_hint(images, list(failures))}"
        yield Finding("error", f"{title} of {part}", detail, tuple(failures.values()))


def _root_hint(images: LabelledImages, failed: Sequence[int]) -> str:
    """Where the images are instead, if none is where it was looked for; or the first that is not."""
    if not isinstance(images, FileImages):
        return ""
    root = images.root
    path = next((images.paths[index] for index in failed if not os.path.exists(os.path.join(root, images.paths[index]))), None)
    if path is None:
        return ""
    text = f", the first was looked for at {str(root / path)!r}"
    if len(failed) < len(images):
        return next(
            (
                f"{text}; {other!r} is in the root: {cause}"
                for other, cause in _other_paths(root, path)
                if os.path.exists(os.path.join(root, other))
            ),
            "",
        )
    try:
        inside = sorted(entry for entry in root.iterdir() if entry.is_dir())
    except OSError:
        inside = []
    for candidate in (*inside, *root.parents[:3]):
        if os.path.exists(candidate / path):
            return f"{text}; it is in {str(candidate)!r}: give that as the root"
    for other, cause in _other_paths(root, path):
        if os.path.exists(os.path.join(root, other)):
            return f"{text}; {other!r} is in the root: {cause}"
    return f"{text}: the root may be wrong"


def _other_paths(root: Path, path: str) -> Iterator[tuple[str, str]]:
    """Paths that may be meant by one of a list, and what is the matter with the list then."""
    yield path.replace("\\", "/"), "the paths of the list have the backslashes of Windows"
    yield path.strip("\"'"), "the paths of the list are in quotes"
    yield path.rstrip(",;").strip("\"'"), "path and label are to be apart by a blank or a tab alone"
    yield path.rstrip("/"), "the paths of the list end with a slash"
    if " " in path:
        yield path.rsplit(None, 1)[0], "the lines of the list have a third column, and the label is to be the second of two"
    folder, _, name = path.rpartition("/")
    yield os.path.join(os.path.dirname(folder), name), "the list has class folders, into which the files are not sorted"
    below = path
    while "/" in below:
        below = below.partition("/")[2]
        yield below, "the paths of the list have more folders than there are"
    alike = _alike(root, path)
    if one_form(alike) == one_form(path):
        yield alike, "the list and the disk write accents in different forms of Unicode (NFC, NFD)"
    if one_form(alike).casefold() == one_form(path).casefold():
        yield alike, "upper and lower case differ"
    yield alike, "the files have another ending"


def _alike(root: Path, path: str) -> str:
    """The path on the disk that is this one but for case, the form of accents and the ending; this one where there is none."""
    found: list[str] = []
    for part in path.split("/"):
        folder = root.joinpath(*found)
        present = sorted(os.listdir(folder)) if folder.is_dir() else []
        wanted = one_form(part).casefold()
        same = [name for name in present if one_form(name).casefold() == wanted]
        stem = [name for name in present if one_form(os.path.splitext(name)[0]).casefold() == os.path.splitext(wanted)[0]]
        found.append((same or stem or [part])[0])
    return "/".join(found)


def repeat_problems(parts: Parts) -> Iterator[Finding]:
    """Images that are listed twice, in one part or in two."""
    keys = {part: _identities(images) for part, images in parts.items()}
    for part, images in parts.items():
        again, other = _repeats(images, keys[part], range(len(images)))
        if again:
            yield Finding(
                "warning",
                f"images listed twice in {part}",
                f"{plural(len(again), 'entry')} repeating an earlier one, with the same label",
                tuple(images.name(index) for _, index in again),
            )
        if other:
            yield Finding(
                "warning",
                f"images of {part} with several labels",
                f"{plural(len(other), 'entry')} repeating an earlier one, with another label",
                tuple(_two_labels(images, *pair) for pair in other),
            )
    yield from _overlaps(parts, keys, by_content=False)


def content_problems(parts: Parts, readings: Mapping[str, Reading]) -> Iterator[Finding]:
    """Images whose bytes are those of another one under another name, in one part or in two."""
    keys: dict[str, Sequence[Hashable]] = {part: reading.digests for part, reading in readings.items()}
    for part, images in parts.items():
        again, other = _repeats(images, keys[part], _identities(images))
        if other:
            yield Finding(
                "warning",
                f"equal images of {part} with several labels",
                f"{plural(len(other), 'image')} with the very bytes of an earlier one, and another label",
                tuple(f"{images.name(earlier)} = {_two_labels(images, earlier, index)}" for earlier, index in other),
            )
        if again:
            yield Finding(
                "note",
                f"equal images in {part}",
                f"{plural(len(again), 'image')} with the very bytes of an earlier one, and its label",
                tuple(f"{images.name(earlier)} = {images.name(index)}" for earlier, index in again),
            )
    yield from _overlaps(parts, keys, by_content=True)


Pairs: TypeAlias = list[tuple[int, int]]


def _repeats(images: LabelledImages, keys: Sequence[Hashable], entries: Sequence[Hashable]) -> tuple[Pairs, Pairs]:
    """The pairs of an image and the first with its key, unless both are one entry: those with one label, those with two."""
    first, labels = _first_places(keys), images.labels.tolist()
    pairs = [(first[key], index) for index, key in enumerate(keys) if key is not None]
    again = [(earlier, index) for earlier, index in pairs if entries[earlier] != entries[index]]
    same = [pair for pair in again if labels[pair[0]] == labels[pair[1]]]
    return same, [pair for pair in again if labels[pair[0]] != labels[pair[1]]]


def _overlaps(parts: Parts, keys: Mapping[str, Sequence[Hashable]], *, by_content: bool) -> Iterator[Finding]:
    """Images that two parts have in common; by their content, those that are not in both by their paths too."""
    for one, two in itertools.combinations(parts, 2):
        first = _first_places(keys[one])
        candidates = list(_first_places(keys[two]).items())
        if by_content:
            identities = _identities(parts[two])
            listed = set(_identities(parts[one])) & set(identities)
            candidates = [(key, index) for index, key in enumerate(keys[two]) if identities[index] not in listed]
        shared = [(first[key], index) for key, index in candidates if key in first]
        if shared:
            yield _overlap(parts, one, two, shared, by_content=by_content)


def _first_places(keys: Sequence[Hashable]) -> dict[Hashable, int]:
    """Where each key comes first; None is no key."""
    first: dict[Hashable, int] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    first.pop(None, None)
    return first


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
        # Two people write the same short text.
        few = len(shared) <= _HARMLESS_SHARE * len(parts[two]) or isinstance(parts[two], Texts)
        detail = f"{counted} with the very bytes of one of {one}"
        detail += ": they weigh little" if few else f": accuracies on {two} come out too high"
        level: Level = "warning" if few else "error"
        return Finding(level, f"{one} and {two} overlap by content", detail, tuple(item(*pair) for pair in shared))
    detail = f"{counted} in both lists: accuracies on {two} come out too high"
    return Finding("error", f"{one} and {two} overlap by path", detail, tuple(item(*pair) for pair in shared))


def _identities(images: LabelledImages) -> list[Hashable]:
    """What is the same for two entries that are one image: its absolute path, or its place in an array or data set."""
    if isinstance(images, FileImages):
        root = os.path.realpath(images.root)
        return [f"{root}/{os.path.normpath(path) if '//' in path or './' in path else path}" for path in images.paths]
    if isinstance(images, RowImages):
        return [(id(images._whole), row) for row in images.rows.tolist()]
    return [images.name(index) for index in range(len(images))]


def _two_labels(images: LabelledImages, first: int, second: int) -> str:
    return f"{images.name(second)}: label {int(images.labels[first])} first, then {int(images.labels[second])}"
