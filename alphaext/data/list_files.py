"""List files, ``relative/path label`` a line: the form in which long-tailed data sets are published."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..utils.checks import check_class_names, if_given
from ..utils.files import PathLike, check_output_file, read_text, whole_file
from ..utils.tensors import TensorLike, check_labels
from .images import MOST_CLASSES, FileImages


def read_list(
    path: PathLike,
    root: PathLike,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
) -> FileImages:
    """Read a list file: ``relative/path label`` a line, as ImageNet-LT, Places-LT and iNaturalist are published.

    The label is the last field of its line, so that paths may have blanks; labels count from 0. Tabs, several blanks, Windows'
    line ends and empty lines pass. A path may occur twice with the same label. The images are not looked for.

    Args:
        path: the list, UTF-8.
        root: the folder that the paths are relative to.
        num_classes: N; default, the largest label plus one.
        class_names: of all classes, in the order of their labels.

    Returns:
        The images, in the order of the list.

    Raises:
        FileNotFoundError: no such list, or no such root.
        ValueError: the list is empty or not UTF-8; a line without a label or with one that is no class, with a path that is
            absolute or leaves the root, or with a path that had another label before. The message shows the line.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "val.txt").write_text("val/a cat.jpg 0\\nval/dog.jpg 2\\n")
        >>> images = read_list(folder / "val.txt", folder)
        >>> images.name(0), images.labels, images.num_classes
        ('val/a cat.jpg', tensor([0, 2]), 3)
    """
    file = os.fspath(path)
    names = if_given(check_class_names, class_names, num_classes)
    classes = num_classes if names is None else len(names)
    lines = _lines(file)
    if not lines:
        raise ValueError(f"{file} lists no images")
    paths, labels = zip(*(_parsed(file, number, line) for number, line in lines), strict=True)
    label_ids = np.array(labels, dtype=np.int64)
    if classes is not None and label_ids.max() >= classes:
        first = int(np.argmax(label_ids >= classes))
        raise ValueError(
            f"{file}, line {lines[first][0]}: label must be below num_classes = {classes}, got {labels[first]} "
            f"for {paths[first]!r} (the largest label of the list is {int(label_ids.max())})"
        )
    for earlier, later in _relabelled(paths, labels):
        raise ValueError(
            f"{file}, line {lines[later][0]}: {paths[later]!r} has label {labels[later]}, but label {labels[earlier]} in line "
            f"{lines[earlier][0]}"
        )
    return FileImages(existing_folder(root, "root"), paths, label_ids, classes, names)


def _lines(file: str) -> list[tuple[int, str]]:
    """The lines that are not empty, with their numbers, of whatever system's line ends."""
    text = read_text(file, "a list")
    if "\0" in text:
        raise ValueError(f"{file}, line {text.count(chr(10), 0, text.index(chr(0))) + 1}: a null character, so it is no list")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _parsed(file: str, number: int, line: str) -> tuple[str, int]:
    """The path and the label of a line."""
    *paths, label = line.rsplit(None, 1)
    path = paths[0].lstrip() if paths else ""
    if not paths:
        comma = re.search(r"[,;][\"']?-?\d+[\"']?$", label)
        problem = "must be 'path label'" + (" with a blank or a tab between, not a comma or a semicolon" if comma else "")
    elif looks_like_comment(path):
        problem = "begins with '#', but lists have no comments"
    elif not (label.isascii() and label.isdecimal()):
        problem = f"label must be an integer from 0 on, got {label!r}"
    elif len(label) > 9 or int(label) >= MOST_CLASSES:
        problem = f"label must be below {MOST_CLASSES}, got {label}"
    elif leaves_root(path):
        problem = "path must be relative to the root and stay in it"
    else:
        return path, int(label)
    shown = repr(line if len(line) <= 200 else f"{line[:200]}...")
    raise ValueError(f"{file}, line {number}: {problem}; the line is {shown}")


def looks_like_comment(path: str) -> bool:
    """Whether a line that begins with this path is taken for a comment, which lists do not have."""
    return path.startswith("#") and not os.path.splitext(path)[1]


def leaves_root(path: str) -> bool:
    """Whether a path leads out of the folder that it is relative to."""
    return path.startswith("/") or (".." in path and ".." in path.split("/"))


def _relabelled(paths: Sequence[str], labels: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Places of one path with different labels: where it comes first, and where with another label."""
    first: dict[str, int] = {}
    for place, path in enumerate(paths):
        earlier = first.setdefault(path, place)
        if labels[earlier] != labels[place]:
            yield earlier, place


def write_list(path: PathLike, names: Sequence[str], labels: TensorLike, *, overwrite: bool = False) -> None:
    """Write a list file that :func:`read_list` reads back: ``path label`` a line.

    Args:
        path: the file to write, whole or not at all.
        names: relative path of each image.
        labels: integers [n].
        overwrite: replace a file that is there.

    Raises:
        TypeError: names that are not texts, labels that are not integers.
        ValueError: nothing to write; numbers of names and labels that disagree; a name that a list cannot hold (line ends,
            blanks at its ends, absolute, leaving the root); one name with two labels; a file that is there.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "train.txt"
        >>> write_list(path, ["cat/1.jpg", "dog/1.jpg"], [0, 1])
        >>> path.read_text()
        'cat/1.jpg 0\\ndog/1.jpg 1\\n'
    """
    label_list: list[int] = check_labels(labels, MOST_CLASSES).tolist()
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be a sequence of texts, got {names!r:.200}")
    if len(names) != len(label_list):
        raise ValueError(f"names and labels must have one entry an image, got {len(names)} and {len(label_list)}")
    if not label_list:
        raise ValueError("names must have at least one entry: a list without images cannot be read back")
    for name in names:
        if not name or name != name.strip() or any(character in name for character in "\n\r\0"):
            raise ValueError(f"names must be non-empty, without line ends and without blanks at their ends, got {name!r}")
        if leaves_root(name):
            raise ValueError(f"names must be paths relative to a root and stay in it, got {name!r}")
        if looks_like_comment(name):
            raise ValueError(f"names must not look like comments, which begin with '#' and have no ending, got {name!r}")
    for earlier, later in _relabelled(names, label_list):
        raise ValueError(
            f"names must have one label each, got {label_list[earlier]} and {label_list[later]} for {names[later]!r}"
        )
    target = check_output_file(path, "path", overwrite=overwrite)
    text = "".join(f"{name} {label}\n" for name, label in zip(names, label_list, strict=True))
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"names must be valid Unicode, got {text[error.start]!r} in {text[: error.end].count(chr(10))}"
        ) from None
    with whole_file(target, overwrite=overwrite) as file:
        file.write(content)


def existing_folder(path: PathLike, name: str) -> Path:
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{name} must be a folder that exists, got {str(folder)!r}")
    if not folder.is_dir():
        raise ValueError(f"{name} must be a folder, got the file {str(folder)!r}")
    return folder
