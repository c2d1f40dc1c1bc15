"""What commands leave for each other: folders of results, classifiers in them, and what these are called."""

from __future__ import annotations

import os
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

import alphaext

from ..utils.environment import RESULT_DEPENDS_ON, versions
from ..utils.files import check_no_file, folder_lock, read_json, remove_leftovers, whole_file, write_json
from ..utils.text import first_free, percent
from .options import Options

if TYPE_CHECKING:
    from torch import nn

# There while a command writes its results: what has it is of a command that was killed.
_BEGUN = ".begun"
RESULT, RUN, CLASSIFIER, HEAD, MODEL = "result.json", "run.json", "classifier.pth", "head.pt", "model.pth"


@dataclass(frozen=True)
class OutputFolder:
    """A command's folder of results, held against other processes; :func:`output_folder` opens one.

    Attributes:
        path: the folder.
        options: of the command.
        started: when it began, by ``time.monotonic()``.
    """

    path: Path
    options: Options
    started: float

    def clear(self) -> None:
        """Remove what an earlier command left, right before new results are written: no reader may take old for new."""
        tables = read_result(self.path).get("tables", []) if (self.path / RESULT).is_file() else []
        (self.path / RESULT).unlink(missing_ok=True)
        write_json(self.path / _BEGUN, {"command": self.options.section})
        for name in (RESULT, RUN, CLASSIFIER, HEAD, *map(str, tables)):
            if Path(name).name == name:
                (self.path / name).unlink(missing_ok=True)

    def write_classifier(self, linear: nn.Linear, result: dict[str, Any]) -> None:
        """Write a classifier, as :func:`read_classifier` reads it, and what came of the command."""
        self.clear()
        alphaext.checkpoints.save_linear(linear, self.path / CLASSIFIER, overwrite=True)
        self.write(result)

    def write(self, result: dict[str, Any]) -> None:
        """Write what came of the command beside how it came about."""
        write_results(self.path, self.options, result, self.started)
        (self.path / _BEGUN).unlink(missing_ok=True)


@contextmanager
def output_folder(
    folder: Path, options: Options, *files: str, overwrite: bool, started: float, lock: bool = True
) -> Iterator[OutputFolder]:
    """Make a command's folder of results and hold it; files that are there already stay unless ``overwrite``.

    What a killed command left is no result: without its last file, the result, the same command writes it anew.

    Args:
        folder: made if need be; until then nothing is touched.
        options: of the command.
        files: what the command will write beside its result.
        overwrite: whether files of these names may be replaced, which happens when new ones are written and not before.
        started: when the command began.
        lock: hold the folder; not for commands whose work does so itself.
    """
    check_no_file(folder, "output")
    there = [name for name in (RESULT, RUN, *files) if (folder / name).exists()]
    interrupted = not (folder / RESULT).exists() and ((folder / RUN).exists() or (folder / _BEGUN).exists())
    if there and not overwrite and not interrupted:
        raise ValueError(
            f"output holds results already: there is {there[0]} in {str(folder)!r}; give another folder, or --overwrite"
        )
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    with folder_lock(folder, "results") if lock else nullcontext():
        yield OutputFolder(folder, options, started)


def write_results(folder: Path, options: Options, result: dict[str, Any], started: float) -> None:
    """Write what came of a command beside how it came about: the result last, since its presence says that all is there."""
    run = {
        "command": options.section,
        "options": options.to_dict(),
        "versions": versions(*RESULT_DEPENDS_ON),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": time.monotonic() - started,
    }
    write_json(folder / RUN, run)
    write_json(folder / RESULT, result)


def read_result(folder: Path) -> dict[str, Any]:
    return read_json(folder / RESULT, "a result of alphaext")


def console_or_quiet(console: Console | None) -> Console:
    return console if console is not None else Console(quiet=True)


def read_classifier(
    path: Path, num_classes: int | None = None, layer: str | None = None, state: str | None = None
) -> nn.Linear:
    """A classifier from a checkpoint of any layout, or from the folder that 'baseline', 'fit' or 'train' wrote."""
    if path.is_dir():
        if not (path / RESULT).is_file():
            raise FileNotFoundError(
                f"classifier must be a checkpoint or a folder of finished results, there is no {RESULT} in {str(path)!r}"
            )
        inside = [path / name for name in (CLASSIFIER, MODEL) if (path / name).is_file()]
        if not inside:
            raise FileNotFoundError(f"classifier must be a folder with {CLASSIFIER} or {MODEL}, {str(path)!r} has neither")
        path, state = inside[0], None
    checkpoint = alphaext.checkpoints.read_checkpoint(path, classifier=layer, num_classes=num_classes, state=state)
    return plain_linear(checkpoint)


def plain_linear(checkpoint: alphaext.checkpoints.Checkpoint) -> nn.Linear:
    """A checkpoint's classifier, which must take features as they are."""
    if checkpoint.feature_normalization != "none":
        raise ValueError(
            f"{str(checkpoint.path)!r} wants its {checkpoint.experts} experts' features at length 1, which cached ones are "
            "not: prepare them with Checkpoint.prepare_features and alphaext.features.write_features, and save its linear() "
            "with alphaext.checkpoints.save_linear"
        )
    return checkpoint.linear()


def read_head(path: Path) -> alphaext.AlphaNet | None:
    """The Alpha Net of a folder that 'alphaext fit' wrote; None for every other classifier."""
    from ..utils.tensors import read_saved

    file = path / HEAD
    if not file.is_file():
        return None
    try:
        return alphaext.AlphaNet.from_state_dict(read_saved(file))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what torch makes of foreign bytes knows no limits
        raise ValueError(f"{str(file)!r} is not the state of an Alpha Net: {error}") from error


def save_head(head: alphaext.AlphaNet, folder: Path) -> None:
    """Write an Alpha Net and the classifier that it folds into, as :func:`read_head` and :func:`read_classifier` read them."""
    import torch

    alphaext.checkpoints.save_linear(head.fold(), folder / CLASSIFIER, overwrite=True)
    with whole_file(folder / HEAD) as file:
        torch.save({name: value.cpu() for name, value in head.state_dict().items()}, file)


def knows_features(linear: nn.Linear, features: alphaext.features.Features, name: str) -> alphaext.doctor.Finding:
    """Whether a classifier knows more of its features than chance would: an error where it does not."""
    warn_of_other_features(linear, features, name)
    predicted = alphaext.metrics.predict(linear, features, progress=False).predicted
    accuracy, chance, bad = alphaext.doctor.at_chance(predicted, features.labels)
    said = f"{name} knows {percent(accuracy)}% of {len(features)} samples, where chance would know {percent(chance)}%"
    causes = "; the features are another network's, or were made with another transform, or the classes are in another order"
    level = alphaext.doctor.chance_level(bad, len(features))
    return alphaext.doctor.Finding(level, "the classifier is at chance level", said + causes)


def warn_of_other_features(linear: nn.Linear, features: alphaext.features.Features, name: str) -> None:
    """Warn where a classifier knows none of the classes by their features: then it is not of them, or counts otherwise."""
    names = features.class_names
    finding = alphaext.doctor.check_classifier_order(linear.cpu(), features.features, features.labels, class_names=names)
    if finding.level == "error":
        warnings.warn(f"{name}: {finding.title}: {finding.detail}", stacklevel=2)


def classifier_name(path: Path) -> str:
    """How a classifier is called in tables: its folder's name, or its file's without the ending."""
    return path.resolve().name if path.is_dir() else path.stem


def classifier_names(paths: Sequence[Path]) -> list[str]:
    """A name for each classifier, no two alike; they become names of files."""
    names: list[str] = []
    for path in paths:
        name = classifier_name(path)
        is_alone = [classifier_name(other) for other in paths].count(name) == 1
        if not is_alone and path.absolute().parent.name:
            name = f"{path.absolute().parent.name}-{name}"
        names.append(first_free(name, "-", names))
    return names


def is_main_process() -> bool:
    """Whether this is the one of torchrun's processes that writes files and talks to the user."""
    return not started_by_torchrun() or os.environ.get("RANK", "0") == "0"


def started_by_torchrun() -> bool:
    """Whether there are several processes."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")
