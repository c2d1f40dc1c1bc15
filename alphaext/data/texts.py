"""Labelled texts from tables, a row a text: CSV, JSON lines, or a JSON list of objects."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils.checks import check_class_names
from ..utils.files import PathLike, read_text
from ..utils.text import did_you_mean, one_form
from .images import RowImages

TEXT_SUFFIXES = (".csv", ".json", ".jsonl")


class Texts(RowImages):
    """Texts with a class each, in memory; :func:`read_texts` makes them. What images are to image classifiers, for the rest of
    the package."""

    kind = "texts"
    noun = "text"

    def stored(self, index: int) -> bytes:
        text: str = self._whole[self._row(index)]
        return text.encode("utf-8", "surrogatepass")

    def decode(self, index: int, stored: bytes) -> Any:
        return stored.decode("utf-8", "surrogatepass")

    def _contents(self) -> Iterator[bytes]:
        yield from map(self.stored, range(len(self)))


def read_texts(
    path: PathLike,
    *,
    text_column: str = "text",
    label_column: str = "label",
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
) -> Texts:
    """Read texts and their labels from a table.

    Args:
        path: ``.csv`` with a line of column names, UTF-8; ``.jsonl``, an object a line; or ``.json``, a list of objects.
        text_column: the column (key) of the texts.
        label_column: that of the labels: numbers from 0, or names of classes.
        num_classes: N; default, what the labels or the names tell.
        class_names: of all classes, in the order of their labels. Default: where labels are names, all of them, sorted.

    Returns:
        The texts, in the order of the table.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a table without rows or without such a column, a row without a text or a label, a label that is no class.
            The message names the row, and the nearest column or class.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "train.csv"
        >>> _ = file.write_text("text,label\\nwhere is my card,card lost\\nhow much is a euro,exchange\\n")
        >>> texts = read_texts(file)
        >>> texts[1], texts.class_names
        (('how much is a euro', 1), ('card lost', 'exchange'))
    """
    file = Path(path)
    rows = read_rows(file)
    for column in (text_column, label_column):
        if column not in rows[0]:
            raise ValueError(f"{file} has no column {column!r}{did_you_mean(column, rows[0])}")
    texts, labels = ([row.get(column) for row in rows] for column in (text_column, label_column))
    for number, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if not isinstance(text, str) or isinstance(label, (bool, float)) or not isinstance(label, (str, int)):
            raise ValueError(
                f"{file}, row {number}: there must be a text and a label (text or integer), got {text!r}, {label!r}"
            )
    names = None if class_names is None else check_class_names(class_names, num_classes)
    if names is None and not all(_is_number(label) for label in labels):
        names = tuple(sorted({one_form(str(label)): str(label) for label in labels}.values()))
    labels = [one_form(str(label)) for label in labels]
    label_of = {one_form(name): number for number, name in enumerate(names or ())}
    if not all(str(label) in label_of for label in labels) and all(_is_number(label) for label in labels):
        ids = [int(str(label)) for label in labels]
    else:
        unknown = next(((number, str(label)) for number, label in enumerate(labels) if str(label) not in label_of), None)
        if unknown is not None:
            raise ValueError(f"{file}, row {unknown[0]}: {unknown[1]!r} is no class{did_you_mean(unknown[1], label_of)}")
        ids = [label_of[str(label)] for label in labels]
    return Texts(texts, ids, file.name, num_classes, names)


def read_rows(file: Path) -> list[Mapping[str, Any]]:
    """The rows of a table, at least one, each by the names of its columns."""
    if file.suffix.lower() not in TEXT_SUFFIXES:
        raise ValueError(f"a table of texts must end in {', '.join(TEXT_SUFFIXES)}, got {str(file)!r}")
    content = read_text(file, "a table of texts")
    try:
        if file.suffix.lower() == ".csv":
            rows: Any = list(csv.DictReader(io.StringIO(content, newline="")))
        elif file.suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in content.split("\n") if line.strip()]
        else:
            rows = json.loads(content)
    except (csv.Error, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a {file.suffix[1:]} table: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file} must hold rows with named columns, such as text and label, and at least one")
    return rows


def _is_number(label: object) -> bool:
    return str(label).isascii() and str(label).isdigit() and len(str(label)) < 10
