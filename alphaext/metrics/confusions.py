"""Which confusions a second classifier mends and which are new: pairs of the right class and the one taken for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..classes import ClassSplit
from ..utils.checks import check_integer, names_or_ids
from ..utils.files import PathLike
from ..utils.records import Column, read_csv, write_records
from .accuracy import SPLITS_AND_EMPTY
from .comparison import check_pair
from .evaluation import part_of_class
from .predictions import Predictions

MOST_ROWS = 200


@dataclass(frozen=True)
class ConfusionRow:
    """How often samples of one class are taken for another under two classifiers, made by :func:`confusion_changes`.

    Attributes:
        true_class: the right class; None in a total.
        true_name: its name; empty in a total.
        true_split: ``"few"``, ``"medium"`` or ``"many"``; ``"empty"`` without training images.
        predicted_class: the class that is taken for it; None in a total.
        predicted_name: its name; empty in a total.
        predicted_split: as ``true_split``.
        before: samples that the first classifier confuses so.
        after: samples that the second one does.
        mended: by how many there are fewer now; in a total, over those pairs of classes alone of which there are fewer.
        new: by how many there are more now; likewise.
    """

    true_class: int | None
    true_name: str
    true_split: str
    predicted_class: int | None
    predicted_name: str
    predicted_split: str
    before: int
    after: int
    mended: int
    new: int

    @property
    def is_total(self) -> bool:
        """Whether this is the sum over all pairs of classes of two splits."""
        return self.true_class is None

    @property
    def change(self) -> int:
        """After less before."""
        return self.after - self.before


def confusion_changes(
    before: Predictions,
    after: Predictions,
    split: ClassSplit,
    *,
    class_names: Sequence[str] | None = None,
    limit: int = MOST_ROWS,
) -> list[ConfusionRow]:
    """Return how often classes are confused before and after, the largest changes first.

    Args:
        before: what the first classifier says of the test samples.
        after: what the second one says of the same samples, in the same order.
        split: which classes are few, medium and many.
        class_names: N names; default the ids.
        limit: the most pairs of classes to return; those that change most stay. Totals are of all pairs.

    Returns:
        First the totals, one for each pair of splits that has confusions at all, few, medium, many; then pairs of classes
        that change, by how much, equal ones in the order of classes.

    Raises:
        TypeError: arguments of another type.
        ValueError: different samples, numbers of classes that disagree, a negative ``limit``.

    Example:
        >>> split = ClassSplit(few=[2], medium=[], many=[0, 1])
        >>> before = Predictions(ranks=[1, 1, 0], predicted=[0, 0, 0], labels=[2, 2, 0], num_classes=3)
        >>> after = Predictions(ranks=[0, 1, 1], predicted=[2, 0, 2], labels=[2, 2, 0], num_classes=3)
        >>> for row in confusion_changes(before, after, split, class_names=["sea", "lake", "fjord"])[2:]:
        ...     print(row.true_name, "->", row.predicted_name, row.before, row.after)
        sea -> fjord 0 1
        fjord -> sea 2 1
    """
    parts = check_pair(before, after, split)
    num_classes = parts.num_classes
    names = names_or_ids(class_names, num_classes)
    limit = check_integer(limit, "limit", minimum=0)
    pairs, was, now = _counts(before, after)
    part = torch.from_numpy(part_of_class(parts))
    true, predicted = pairs // num_classes, pairs % num_classes
    change = now - was
    changed = change.nonzero().flatten()
    # A stable sort by size, so that equal changes stay in the order of classes.
    shown = changed[change[changed].abs().argsort(stable=True, descending=True)][:limit]
    rows = list(_totals(part[true], part[predicted], was, now))
    for index in shown.tolist():
        t, p, b, a = int(true[index]), int(predicted[index]), int(was[index]), int(now[index])
        splits = SPLITS_AND_EMPTY[int(part[t])], SPLITS_AND_EMPTY[int(part[p])]
        rows.append(ConfusionRow(t, names[t], splits[0], p, names[p], splits[1], b, a, max(b - a, 0), max(a - b, 0)))
    return rows


def _counts(before: Predictions, after: Predictions) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of classes that either confuses, as ``true * N + predicted`` in ascending order, and how often each does."""

    def confused(predictions: Predictions) -> Tensor:
        pairs = predictions.labels * predictions.num_classes + predictions.predicted
        return pairs.masked_select(predictions.ranks > 0)

    found = [confused(before), confused(after)]
    # Not a matrix of all pairs, which for thousands of classes has more cells than there are samples by far.
    pairs, place = torch.cat(found).unique(sorted=True, return_inverse=True)
    was, now = (torch.bincount(own, minlength=len(pairs)) for own in place.split([len(keys) for keys in found]))
    return pairs, was, now


def _totals(true: Tensor, predicted: Tensor, was: Tensor, now: Tensor) -> Iterator[ConfusionRow]:
    change = now - was
    for (row, true_split), (column, predicted_split) in product(enumerate(SPLITS_AND_EMPTY), repeat=2):
        own = (true == row) & (predicted == column)
        if bool(own.any()):
            counts = (was[own], now[own], (-change[own]).clamp(min=0), change[own].clamp(min=0))
            yield ConfusionRow(None, "", true_split, None, "", predicted_split, *(int(values.sum()) for values in counts))


def write_confusions(rows: Iterable[ConfusionRow], path: PathLike, *, overwrite: bool = False) -> None:
    """Write rows as CSV or JSON, whole or not at all.

    CSV (UTF-8, with a header, fields quoted where they must be) has a column for each field of :class:`ConfusionRow`; what a
    total does not have is empty. JSON is an object whose ``confusions`` are the rows.

    Args:
        rows: as :func:`confusion_changes` returns them.
        path: a file that ends in ``.csv`` or ``.json``, in a directory that exists.
        overwrite: replace a file that is there.

    Raises:
        TypeError: rows of another type.
        ValueError: another ending, a directory, no such directory, or a file that is there already.

    Example:
        >>> import tempfile, pathlib
        >>> row = ConfusionRow(2, "lake, deep", "few", 0, "sea", "many", 9, 4, 5, 0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_confusions([row], f"{folder}/confusions.csv")
        ...     print(pathlib.Path(folder, "confusions.csv").read_text().splitlines()[1])
        ...     read_confusions(f"{folder}/confusions.csv") == [row]
        2,"lake, deep",few,0,sea,many,9,4,5,0
        True
    """
    write_records(rows, ConfusionRow, path, _lines, key="confusions", overwrite=overwrite)


def _lines(rows: list[ConfusionRow]) -> list[Any]:
    return [[*_COLUMNS], *map(astuple, rows)]


_CLASS, _NAME, _SPLIT, _COUNT = Column(int, empty=None), Column(empty=""), Column(choices=SPLITS_AND_EMPTY), Column(int)
_KINDS = (_CLASS, _NAME, _SPLIT, _CLASS, _NAME, _SPLIT, _COUNT, _COUNT, _COUNT, _COUNT)
_COLUMNS = dict(zip((entry.name for entry in fields(ConfusionRow)), _KINDS, strict=True))


def read_confusions(path: PathLike) -> list[ConfusionRow]:
    """Read the CSV file that :func:`write_confusions` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, or has a value that its column cannot have; the message names the line.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_confusions([ConfusionRow(2, "lake", "few", 0, "sea", "many", 9, 4, 5, 0)], f"{folder}/confusions.csv")
        ...     [row.true_name for row in read_confusions(f"{folder}/confusions.csv")]
        ['lake']
    """
    return read_csv(path, "a table of confusions", lambda _: _COLUMNS, lambda values: ConfusionRow(**values))
