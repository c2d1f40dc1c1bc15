"""List files, ``relative/path label`` a line: the form in which long-tailed data sets are published."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..utils.checks import check_class_names
from ..utils.files import PathLike, check_output_file, whole_file
from ..utils.tensors import TensorLike, check_labels
from .images import MOST_CLASSES, FileImages

__all__ = ["read_list", "write_list"]


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
    names = None if class_names is None else check_class_names(class_names, num_classes)
    classes = num_classes if names is None else len(names)
    paths, labels, lines = _parse_list(file, _read_text(file))
    if not paths:
        raise ValueError(f"{file} lists no images")
    label_ids = np.array(labels, dtype=np.int64)
    if classes is not None and label_ids.max() >= classes:
        first = int(np.argmax(label_ids >= classes))
        raise ValueError(
            f"{file}, line {lines[first]}: label must be below num_classes = {classes}, got {labels[first]} "
            f"for {paths[first]!r} (the largest label of the list is {int(label_ids.max())})"
        )
    _check_repeats(file, paths, labels, lines)
    return FileImages(existing_folder(root, "root"), paths, label_ids, classes, names)


def _read_text(file: str) -> str:
    content = Path(file).read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: not UTF-8 ({error.reason}: byte 0x{content[error.start]:02x})") from None
    if "\0" in text:
        raise ValueError(f"{file}, line {text.count(chr(10), 0, text.index(chr(0))) + 1}: a null character, so it is no list")
    return text


def _parse_list(file: str, text: str) -> tuple[list[str], list[int], list[int]]:
    """The paths, labels and line numbers of a list."""
    paths: list[str] = []
    labels: list[int] = []
    lines: list[int] = []
    for number, line in enumerate(text.split("\n"), start=1):
        fields = line.rsplit(None, 1)
        if not fields:
            continue
        problem = ""
        if len(fields) < 2:
            problem = "must be 'path label'"
        elif not (fields[1].isascii() and fields[1].isdecimal()):
            problem = f"label must be an integer from 0 on, got {fields[1]!r}"
        elif len(fields[1]) > 9 or int(fields[1]) >= MOST_CLASSES:
            problem = f"label must be below {MOST_CLASSES}, got {fields[1]}"
        else:
            path = fields[0].lstrip()
            if path.startswith("/"):
                problem = "path must be relative to the root, got an absolute one"
            elif ".." in path and ".." in path.split("/"):
                problem = "path must stay in the root, but it has '..'"
        if problem:
            raise ValueError(f"{file}, line {number}: {problem}; the line is {_shown(line)}")
        paths.append(path)
        labels.append(int(fields[1]))
        lines.append(number)
    return paths, labels, lines


def _check_repeats(file: str, paths: list[str], labels: list[int], lines: list[int]) -> None:
    if len(set(paths)) == len(paths):
        return
    first: dict[str, int] = {}
    for index, path in enumerate(paths):
        earlier = first.setdefault(path, index)
        if labels[earlier] != labels[index]:
            raise ValueError(
                f"{file}, line {lines[index]}: {path!r} has label {labels[index]}, "
                f"but label {labels[earlier]} in line {lines[earlier]}"
            )


def _shown(line: str) -> str:
    line = line.rstrip("\r")
    return repr(line if len(line) <= 200 else f"{line[:200]}...")


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
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"names must be paths relative to a root and stay in it, got {name!r}")
    first: dict[str, int] = {}
    for name, label in zip(names, label_list, strict=True):
        if first.setdefault(name, label) != label:
            raise ValueError(f"names must have one label each, got {first[name]} and {label} for {name!r}")
    target = check_output_file(path, "path", overwrite=overwrite)
    text = "".join(f"{name} {label}\n" for name, label in zip(names, label_list, strict=True))
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"names must be valid Unicode, got {text[error.start]!r} in {text[: error.end].count(chr(10))}"
        ) from None
    with whole_file(target) as file:
        file.write(content)


def existing_folder(path: PathLike, name: str) -> Path:
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{name} must be a folder that exists, got {str(folder)!r}")
    if not folder.is_dir():
        raise ValueError(f"{name} must be a folder, got the file {str(folder)!r}")
    return folder
