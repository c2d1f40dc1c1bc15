"""What a report is made of: the files of a study, read and checked, and what its rows come to over seeds."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...metrics.class_table import ClassRow, read_class_table
from ...metrics.confusions import ConfusionRow, read_confusions
from ...utils.figures import clean_text
from ...utils.files import PathLike, read_json
from ...utils.text import first_free, value_text
from ..plans import CANDIDATES, EXPERIMENTS
from ..rows import FRONT, ORIGINAL, Group, Row, read_rows
from ..run import CLASSES, CONFUSIONS, RESULTS, ROWS

COMPARE = "compare"
_NO_EXPERIMENTS = (ORIGINAL, CANDIDATES, FRONT)
_INFO: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("identity", "samples", "classes", "versions", "machine", "options"), (dict, "an object")),
    **dict.fromkeys(("classifier", "attribution", "finished"), (str, "text")),
    "choices": (list, "a list"),
}
"""What ``results.json`` holds of what kind; texts may be null, and nothing else."""


@dataclass(frozen=True)
class StudyFiles:
    """The files of a study, as read by :func:`read_study`.

    Attributes:
        folder: where they are.
        name: what its classifier is called; no two studies of a report are called the same.
        key: a name for files and anchors.
        rows: of ``results.csv``.
        info: of ``results.json``.
        classes: of ``classes.csv``; empty without it.
        confusions: of ``confusions.csv``; likewise.
    """

    folder: Path
    name: str
    key: str
    rows: tuple[Row, ...] = field(repr=False)
    info: Mapping[str, Any] = field(repr=False)
    classes: tuple[ClassRow, ...] = field(default=(), repr=False)
    confusions: tuple[ConfusionRow, ...] = field(default=(), repr=False)

    def of(self, *experiments: str) -> list[Row]:
        """The rows of experiments."""
        return [row for row in self.rows if row["experiment"] in experiments]

    @property
    def original(self) -> Row | None:
        """The row of the original classifier."""
        return next((row for row in self.rows if row["experiment"] == ORIGINAL), None)

    @property
    def experiments(self) -> list[str]:
        """The experiments that there are rows of, in the order of the rows."""
        return [name for name in dict.fromkeys(row["experiment"] for row in self.rows) if name not in _NO_EXPERIMENTS]

    @property
    def missing(self) -> list[str]:
        """The experiments that there are no rows of."""
        return [name for name in EXPERIMENTS if name not in self.experiments]

    @property
    def attribution(self) -> str | None:
        text = self.info.get("attribution")
        return clean_text(text) if text else None

    def part(self, name: str, part: str) -> int | None:
        """A number out of ``samples`` or ``classes``."""
        value = self.info.get(name, {}).get(part)
        return value if isinstance(value, int) else None


def label(method: str, configuration: Mapping[str, Any]) -> str:
    """A method and its configuration in words.

    Example:
        >>> label("Alpha Net", {"gamma": 0.5, "top_k": 1})
        'Alpha Net, gamma 0.5, 1 neighbour'
    """
    return ", ".join([method, *(setting_text(name, value) for name, value in configuration.items())])


def by_gamma(groups: Iterable[Group]) -> dict[str, list[Group]]:
    """The groups of each method, their gammas ascending; what else tells groups apart stands with the method."""
    found: dict[str, list[Group]] = {}
    for group in sorted(groups, key=lambda group: group.rows[0]["gamma"] or 0.0):
        others = {name: value for name, value in group.configuration.items() if name != "gamma"}
        found.setdefault(label(group.method, others), []).append(group)
    return found


def said_by_method(rows: Sequence[Row], name: str) -> bool:
    """Whether all rows of each method have the same in a column."""
    return len({(row["method"], row[name]) for row in rows}) == len({row["method"] for row in rows})


_WORDS: dict[str, Callable[[Any], str]] = {
    "gamma": lambda value: f"gamma {value:g}",
    "top_k": lambda value: f"{value} neighbour" + ("s" if value != 1 else ""),
    "pool": lambda value: f"from {value}",
    "metric": str,
    "shared": lambda value: "one sub-module for all" if value else "one sub-module each",
    "init": lambda value: f"{value} start",
    "projected_gradient": lambda value: "projected gradient" if value else "plain gradient",
    "few_samples": lambda value: "all images" if value is None else f"{value} image" + ("s" if value != 1 else ""),
}


def setting_text(name: str, value: Any) -> str:
    """A column of the configuration and its value in words."""
    if name in _WORDS and (value is not None or name == "few_samples"):
        return _WORDS[name](value)
    return f"{name.replace('_', ' ')} {shown_value(value)}"


def shown_value(value: Any) -> str:
    """A value of the configuration as text that a page can hold."""
    return clean_text(value_text(value))


def isolated(name: str) -> str:
    """A name in running text: one that is written from right to left turns nothing around it."""
    line = clean_text(name)
    from_right = any(unicodedata.bidirectional(letter) in ("R", "AL", "AN") for letter in line)
    return f"\u2068{line}\u2069" if from_right else line


def read_studies(folders: Sequence[PathLike]) -> list[StudyFiles]:
    """Read several studies, and call each by a name of its own.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_study`; none, or the same folder twice.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise ValueError("study must be at least one folder, got none")
    repeated = [path for number, path in enumerate(paths) if path.resolve() in [other.resolve() for other in paths[:number]]]
    if repeated:
        raise ValueError(f"study must name each folder once, got {str(repeated[0])!r} twice")
    studies = [read_study(path) for path in paths]
    times = Counter(study.name for study in studies)
    named: list[StudyFiles] = []
    for study in studies:
        name = study.name if times[study.name] == 1 else f"{study.name} ({clean_text(study.folder.resolve().name)})"
        name = first_free(name, " ", {other.name for other in named})
        named.append(replace(study, name=name, key=first_free(slug(name) or "study", "-", {other.key for other in named})))
    return named


def slug(text: str) -> str:
    """Text as a part of a file's name: at most 40 small letters and digits, with dashes between words."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower().encode("ascii", "ignore").decode()).strip("-")[:40].strip("-")


def read_study(folder: PathLike) -> StudyFiles:
    """Read and check what ``alphaext study`` wrote.

    Args:
        folder: its folder of results.

    Returns:
        The study; classes and confusions are empty where their files are not there.

    Raises:
        FileNotFoundError: no such folder, or no results in it.
        ValueError: a file that is not as it must be; the message names file and line, column or entry.
    """
    path = Path(folder)
    for name in (RESULTS, ROWS):
        if not (path / name).is_file():
            what = f"there is no {name} in" if path.is_dir() else "there is no folder"
            raise FileNotFoundError(f"study must be a folder that 'alphaext study' wrote, {what} {str(path)!r}")
    info = _read_info(path / RESULTS)
    rows = read_rows(path / ROWS)
    if not rows:
        raise ValueError(f"{str(path / ROWS)!r} has no results: it ends after its header")
    classes, confusions = path / CLASSES, path / CONFUSIONS
    return StudyFiles(
        folder=path,
        name=clean_text(info["classifier"] or "classifier"),
        key="study",
        rows=tuple(rows),
        info=info,
        classes=tuple(read_class_table(classes)) if classes.is_file() else (),
        confusions=tuple(read_confusions(confusions)) if confusions.is_file() else (),
    )


def _read_info(path: Path) -> dict[str, Any]:
    info = read_json(path, "a study's results")
    if not isinstance(info.get("identity"), dict):
        raise ValueError(f"{str(path)!r} is not a study's results: 'identity', which says of which study, is missing")
    for name, (kind, words) in _INFO.items():
        value = info.get(name)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{str(path)!r}: {name!r} must be {words}, got {value!r:.60}")
        info[name] = kind() if value is None and kind is not str else value
    for choice in info["choices"]:
        if not isinstance(choice, dict) or not isinstance(choice.get("chosen"), dict):
            raise ValueError(f"{str(path)!r}: 'choices' must be objects that say what was chosen, got {choice!r:.60}")
    return info
