"""What became of each class: its accuracy under two classifiers, and what the repaired few classes were composed of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from torch import Tensor

from ..classes import ClassSplit
from ..utils.checks import check_choice, names_or_ids
from ..utils.files import PathLike
from ..utils.records import Column, number, read_csv, write_records
from ..utils.tensors import TensorLike, check_labels, check_shape, finite_tensor
from .accuracy import SPLITS_AND_EMPTY
from .comparison import check_pair
from .evaluation import part_of_class, per_class
from .predictions import Predictions


class ComposedClassifier(Protocol):
    """A classifier whose few rows are composed, as those of :class:`alphaext.AlphaNet` are.

    Attributes:
        members: ``[F, K+1]`` int64 class ids: the few class itself, then its neighbours.
    """

    members: Tensor

    @property
    def out_features(self) -> int:
        """N."""

    def alphas(self) -> Tensor:
        """Their coefficients, ``[F, K+1]``."""


@dataclass(frozen=True)
class ClassRow:
    """A class under two classifiers, made by :func:`class_table`.

    Attributes:
        class_id: the class.
        name: its name; its id as text where no names are known.
        split: ``"few"``, ``"medium"`` or ``"many"``; ``"empty"`` without training images.
        training_images: how many there were.
        test_samples: how many it was measured on.
        accuracy_before: top-1, a fraction of 1; NaN without test samples.
        accuracy_after: the same of the second classifier.
        gain: after less before.
        neighbors: the classes that its classifier was composed of besides itself, as the head has them (nearest first); none
            for a class that was not repaired, or if no head was given.
        neighbor_names: their names.
        alphas: their coefficients.
        own_alpha: the coefficient of its own classifier; None for a class that was not repaired.
        distance: Euclidean, from its mean feature to that of the closest neighbour; None if it is not known.
    """

    class_id: int
    name: str
    split: str
    training_images: int
    test_samples: int
    accuracy_before: float
    accuracy_after: float
    gain: float
    neighbors: tuple[int, ...] = ()
    neighbor_names: tuple[str, ...] = ()
    alphas: tuple[float, ...] = ()
    own_alpha: float | None = None
    distance: float | None = None


def composition(row: ClassRow, most: int = 5) -> str:
    """The neighbours that a class's row is composed of, largest coefficient first, of which ``most`` are named.

    Example:
        >>> names, alphas = tuple("abc"), (0.1, -0.5, 0.2)
        >>> row = ClassRow(3, "d", "few", 5, 9, 0.1, 0.3, 0.2, (0, 1, 2), names, alphas, 0.9)
        >>> composition(row, most=2)
        'b (-0.50), c (0.20), and 1 smaller'
    """
    largest = sorted(zip(row.neighbor_names, row.alphas, strict=True), key=lambda each: -abs(each[1]))
    shown = [f"{name} ({alpha:.2f})" for name, alpha in largest[:most]]
    rest = len(largest) - len(shown)
    return ", ".join(shown + ([f"and {rest} smaller"] if rest else []))


def class_table(
    before: Predictions,
    after: Predictions,
    split: ClassSplit,
    counts: TensorLike,
    *,
    class_names: Sequence[str] | None = None,
    head: ComposedClassifier | None = None,
    class_means: TensorLike | None = None,
    sort_by: str = "class_id",
    descending: bool = False,
) -> list[ClassRow]:
    """Return a row for each class: how well it was recognised before and after, and what its classifier was composed of.

    Args:
        before: what the first classifier says of the test samples.
        after: what the second one says of the same samples, in the same order.
        split: which classes are few, medium and many.
        counts: training images of each class, integers [N] (:func:`alphaext.class_counts`).
        class_names: N names.
        head: the head that the second classifier is or was folded from, for neighbours and coefficients.
        class_means: floating point [N, D], the mean training features by which neighbours were chosen
            (:func:`alphaext.class_means`), for the distance to the closest one; only with ``head``.
        sort_by: the field of :class:`ClassRow` to sort by; default the class. What is not known comes last; equal rows come in
            the order of classes.
        descending: the largest first.

    Returns:
        N rows.

    Raises:
        TypeError: arguments of another type.
        ValueError: different samples, numbers of classes that disagree, an unknown ``sort_by``, ``class_means`` without a
            ``head``.

    Example:
        >>> split = ClassSplit(few=[3], medium=[2], many=[0, 1])
        >>> head = AlphaNet.from_linear(nn.Linear(8, 4), members=[[3, 0, 1]], gamma=0.5, seed=0)
        >>> features, labels = torch.randn(40, 8), torch.arange(40) % 4
        >>> predictions = predict(head, features, labels)
        >>> rows = class_table(predictions, predictions, split, [500, 400, 50, 5], class_names=["a", "b", "c", "d"], head=head)
        >>> rows[3].name, rows[3].split, rows[3].gain, rows[3].neighbor_names, rows[3].alphas, rows[3].own_alpha
        ('d', 'few', 0.0, ('a', 'b'), (0.25, 0.25), 0.5)
    """
    parts = check_pair(before, after, split)
    num_classes = parts.num_classes
    names = names_or_ids(class_names, num_classes)
    trained = check_labels(counts, None, "counts")
    check_shape(trained, "counts", (num_classes,))
    check_choice(sort_by, "sort_by", [*_PLAIN])
    composed = _composition(head, class_means, num_classes, names)
    accuracies = zip(per_class(before).tolist(), per_class(after).tolist(), strict=True)
    part_names = [SPLITS_AND_EMPTY[number] for number in part_of_class(parts).tolist()]
    rows = [
        ClassRow(
            class_id=c,
            name=names[c],
            split=part_names[c],
            training_images=images,
            test_samples=samples,
            accuracy_before=was,
            accuracy_after=now,
            gain=now - was,
            **composed.get(c, {}),
        )
        for c, (images, samples, (was, now)) in enumerate(
            zip(trained.tolist(), before.counts().tolist(), accuracies, strict=True)
        )
    ]
    return _sorted(rows, sort_by, descending)


def write_class_table(rows: Sequence[ClassRow], path: PathLike, *, overwrite: bool = False) -> None:
    """Write rows as CSV or JSON, whole or not at all.

    CSV (UTF-8, with a header, fields quoted where they must be) has a column for each field of :class:`ClassRow`, and three for
    each neighbour: ``neighbor_1``, ``neighbor_1_name``, ``neighbor_1_alpha``; what is not known is empty. JSON is an object
    whose ``classes`` are the rows; what is not known is null.

    Args:
        rows: as :func:`class_table` returns them.
        path: a file that ends in ``.csv`` or ``.json``, in a directory that exists.
        overwrite: replace a file that is there.

    Raises:
        TypeError: rows of another type.
        ValueError: another ending, a directory, no such directory, or a file that is there already.

    Example:
        >>> import tempfile, pathlib
        >>> row = ClassRow(0, "sea, deep", "many", 500, 50, 0.5, 0.25, -0.25)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_class_table([row], f"{folder}/classes.csv")
        ...     print(pathlib.Path(folder, "classes.csv").read_text().splitlines()[1])
        0,"sea, deep",many,500,50,0.5,0.25,-0.25,,
    """
    write_records(rows, ClassRow, path, _lines, key="classes", overwrite=overwrite)


def read_class_table(path: PathLike) -> list[ClassRow]:
    """Read the CSV file that :func:`write_class_table` wrote, each value as it was.

    Args:
        path: the file.

    Returns:
        The rows, in the file's order; an accuracy that is not known is NaN.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, or has a value that its column cannot have; the message names the line.

    Example:
        >>> import tempfile
        >>> row = ClassRow(2, "fjord", "few", 5, 50, 0.25, 0.5, 0.25, (0,), ("sea",), (0.3,), 0.7, 1.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_class_table([row], f"{folder}/classes.csv")
        ...     read_class_table(f"{folder}/classes.csv") == [row]
        True
    """
    return read_csv(path, "a table of classes", _columns, _row_of)


def _columns(number_of_columns: int) -> dict[str, Column]:
    most = (number_of_columns - len(_PLAIN)) // len(_OF_NEIGHBOR)
    return _PLAIN | dict.fromkeys(_neighbor_columns(most), Column(empty=""))


def _row_of(values: dict[str, Any]) -> ClassRow:
    cells = [values.pop(name) for name in [*values][len(_PLAIN) :]]
    neighbors = [cells[k : k + 3] for k in range(0, len(cells), 3) if cells[k] != ""]
    return ClassRow(
        **values,
        neighbors=tuple(number("neighbor", class_id, int) for class_id, _, _ in neighbors),
        neighbor_names=tuple(name for _, name, _ in neighbors),
        alphas=tuple(number("neighbor_alpha", alpha, float) for _, _, alpha in neighbors),
    )


def _composition(
    head: ComposedClassifier | None, class_means: TensorLike | None, num_classes: int, names: Sequence[str]
) -> dict[int, dict[str, Any]]:
    """Of each class that ``head`` repairs, the fields of its row that tell what it is composed of."""
    if head is None:
        if class_means is not None:
            raise ValueError("class_means tell distances to a head's neighbours: give head as well")
        return {}
    # By attribute: isinstance of a protocol does not see a module's buffers from Python 3.12 on.
    if not all(hasattr(head, name) for name in ("members", "out_features", "alphas")):
        raise TypeError(f"head must be an AlphaNet, got {type(head).__name__}")
    if head.out_features != num_classes:
        raise ValueError(f"head must be of the split's {num_classes} classes, got {head.out_features}")
    members = head.members.cpu()
    distances = None if class_means is None else _distances(class_means, members, num_classes)
    alphas = head.alphas().detach().tolist()
    return {
        own: {
            "neighbors": tuple(neighbors),
            "neighbor_names": tuple(names[c] for c in neighbors),
            "alphas": tuple(alphas[row][1:]),
            "own_alpha": alphas[row][0],
            "distance": None if distances is None else distances[row],
        }
        for row, (own, *neighbors) in enumerate(members.tolist())
    }


def _distances(class_means: TensorLike, members: Tensor, num_classes: int) -> list[float]:
    """From each few class's mean to the closest of its neighbours', [F]."""
    wide = finite_tensor(class_means, "class_means", (num_classes, "D")).cpu().double()
    # Differences, not a matrix product, which cancels where means are close.
    return [float((wide[row[1:]] - wide[row[0]]).norm(dim=1).min()) for row in members]


def _sorted(rows: list[ClassRow], sort_by: str, descending: bool) -> list[ClassRow]:
    def key(row: ClassRow) -> Any:
        value = getattr(row, sort_by)
        return SPLITS_AND_EMPTY.index(value) if sort_by == "split" else value

    def known(row: ClassRow) -> bool:
        value = getattr(row, sort_by)
        return value is not None and not (isinstance(value, float) and math.isnan(value))

    # A stable sort, in reverse too: equal rows stay in the order of classes.
    return sorted(filter(known, rows), key=key, reverse=descending) + [row for row in rows if not known(row)]


_COUNT, _ACCURACY, _MAYBE = Column(int), Column(float, empty=math.nan, fraction=True), Column(float, empty=None)
_PLAIN = {
    "class_id": _COUNT,
    "name": Column(empty=""),
    "split": Column(choices=SPLITS_AND_EMPTY),
    "training_images": _COUNT,
    "test_samples": _COUNT,
    "accuracy_before": _ACCURACY,
    "accuracy_after": _ACCURACY,
    "gain": Column(float, empty=math.nan),
    "own_alpha": _MAYBE,
    "distance": _MAYBE,
}
_OF_NEIGHBOR = ("neighbor_{}", "neighbor_{}_name", "neighbor_{}_alpha")


def _neighbor_columns(most: int) -> list[str]:
    return [name.format(k) for k in range(1, most + 1) for name in _OF_NEIGHBOR]


def _lines(rows: list[ClassRow]) -> list[list[Any]]:
    """A header and the rows of the CSV file."""
    most = max((len(row.neighbors) for row in rows), default=0)

    def line(row: ClassRow) -> list[Any]:
        neighbors = chain.from_iterable(zip(row.neighbors, row.neighbor_names, row.alphas, strict=True))
        missing = [None] * (len(_OF_NEIGHBOR) * (most - len(row.neighbors)))
        return [*(getattr(row, name) for name in _PLAIN), *neighbors, *missing]

    return [[*_PLAIN, *_neighbor_columns(most)], *map(line, rows)]
