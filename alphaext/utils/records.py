"""Tables of records: dataclasses as CSV or JSON, written whole or not at all, and read back each value as it was."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from .checks import check_choice, check_kind
from .files import PathLike, check_output_file, read_text, whole_file, write_json

_Record = TypeVar("_Record")

_NOT_ALLOWED = object()


@dataclass(frozen=True)
class Column:
    """What the cells of a column hold.

    Attributes:
        kind: ``int`` (0 or larger), ``float`` (finite) or ``bool`` (``true`` or ``false``); None for text.
        choices: the texts that are allowed; none for any text.
        empty: the value of an empty cell. Without it no cell may be empty.
        fraction: whether a number must be between 0 and 1.

    Example:
        >>> Column(int, empty=None).read("epoch", ""), Column(int).read("epoch", "12")
        (None, 12)
    """

    kind: type[int] | type[float] | None = None
    choices: tuple[str, ...] = ()
    empty: Any = _NOT_ALLOWED
    fraction: bool = False

    def read(self, name: str, cell: str) -> Any:
        """The value of a cell of the column ``name``; a ValueError says what it must be."""
        if cell == "":
            if self.empty is _NOT_ALLOWED:
                raise ValueError(f"{name} is empty")
            return self.empty
        if self.choices:
            check_choice(cell, name, self.choices)
        if self.kind is None:
            return cell
        if self.kind is bool:
            return check_choice(cell, name, ("true", "false")) == "true"
        value = number(name, cell, self.kind)
        if self.kind is int and value < 0:
            raise ValueError(f"{name} must be an integer and at least 0, got {cell!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
        if self.fraction and not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
        return value


def write_records(
    records: Iterable[Any],
    kind: type,
    path: PathLike,
    lines: Callable[[list[Any]], Iterable[Sequence[Any]]],
    *,
    key: str,
    overwrite: bool,
) -> None:
    """Write dataclasses of one kind as CSV or JSON, by the ending of ``path``.

    Args:
        records: to be written.
        kind: their class.
        path: a file that ends in ``.csv`` or ``.json``, in a directory that exists.
        lines: makes the lines of the CSV file of them, the header first.
        key: what they are called in the JSON object.
        overwrite: replace a file that is there.

    Raises:
        TypeError: records of another class.
        ValueError: another ending, a directory, no such directory, or a file that is there already.
    """
    listed = list(records)
    for record in listed:
        check_kind(record, kind, "rows")
    target = check_output_file(path, "path", overwrite=overwrite)
    if target.suffix == ".json":
        write_json(target, {key: [asdict(record) for record in listed]})
    elif target.suffix == ".csv":
        write_csv(lines(listed), target)
    else:
        raise ValueError(f"path must end in .csv or .json, got {str(target)!r}")


def write_csv(lines: Iterable[Sequence[Any]], path: PathLike) -> None:
    """Write lines as CSV in UTF-8: None and NaN as an empty field, truth values in lower case, all digits."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([_cell(value) for value in line] for line in lines)
    with whole_file(path) as file:
        file.write(text.getvalue().encode("utf-8", "backslashreplace"))


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return None if isinstance(value, float) and math.isnan(value) else value


def read_csv(
    path: PathLike,
    what: str,
    columns_of: Callable[[int], Mapping[str, Column]],
    record: Callable[[dict[str, Any]], _Record],
) -> list[_Record]:
    """Read the lines behind the header, each as a record.

    Args:
        path: the file.
        what: what it should be, for errors.
        columns_of: the columns, by name, of a table that has so many.
        record: makes a record of a line's values, or raises ValueError.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a table; the message names the line.
    """
    with io.StringIO(read_text(path, what), newline="") as file:
        lines = csv.reader(file)
        records = []
        try:
            header = next(lines, [])
            columns = columns_of(len(header))
            if header != [*columns]:
                allowed = textwrap.shorten(", ".join(columns), 400, placeholder=" ...")
                different = ", ".join(sorted({*header} ^ {*columns})[:5]) or "their order"
                raise ValueError(f"its columns must be {allowed}; they differ in {different}")
            for line in lines:
                if len(line) != len(header):
                    raise ValueError(f"there must be {len(header)} fields, got {len(line)}")
                cells = zip(columns.items(), line, strict=True)
                records.append(record({name: column.read(name, cell) for (name, column), cell in cells}))
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{str(path)!r} is not {what}: line {lines.line_num}: {error}") from error
    return records


def number(name: str, cell: str, kind: type[int] | type[float]) -> Any:
    """The number in a cell of the column ``name``."""
    try:
        return kind(cell)
    except ValueError:
        raise ValueError(f"{name} must be {'an integer' if kind is int else 'a number'}, got {cell!r}") from None


def data_frame(rows: list[dict[str, Any]], index: str) -> Any:
    """Rows as a pandas ``DataFrame`` by one of their entries where pandas is installed, else as they are.

    Example:
        >>> table = data_frame([{"part": "few", "accuracy": 0.5}], "part")
    """
    try:
        import pandas
    except ImportError:
        return rows
    return pandas.DataFrame(rows, columns=None if rows else [index]).set_index(index)
