"""Trainings that go on where an earlier run stopped: their file, whose training it is, and the epoch selected so far."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import whole_file
from .tensors import check_shape, read_saved


class ResumableTraining:
    """The epochs of a training and the one selected so far, kept in a file together with what the training itself needs.

    Attributes:
        identity: what must be equal for one training to go on from another's file; set before :meth:`load` and :meth:`save`.
        history: an entry for each epoch, with its number under ``"epoch"``.
        selected_epoch: the epoch with the best score so far; 0 before the first.
        selected_score: its score.
        selected: its parameters, in whatever form the training has them.

    Args:
        name: of the training's files in errors, such as ``"one of fit's"``.
        content: the types of what the training itself keeps in the file.
    """

    def __init__(self, name: str, content: Mapping[str, type | tuple[type, ...]]) -> None:
        number = (int, float)
        self._name = name
        self._content = {"identity": dict, "history": list, "selected_epoch": int, "selected_score": number, **content}
        self.identity: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.selected_epoch, self.selected_score = 0, -math.inf
        self.selected: Any = None

    def add_epoch(self, entry: dict[str, Any], score: float) -> bool:
        """Add an epoch to the history: whether its score is above all before, and so its parameters are those to select."""
        self.history.append(entry)
        if not score > self.selected_score:  # nan included
            return False
        self.selected_epoch, self.selected_score = int(entry["epoch"]), float(score)
        return True

    def last_epoch(self) -> str:
        """The last epoch's loss and accuracies, for a progress bar."""
        entry = self.history[-1]
        text = f"loss {entry['loss']:.3f}"
        return f"{text}  few {100 * entry['few']:.1f}  all {100 * entry['all']:.1f}" if "all" in entry else text

    def save(self, path: Path, **state: Any) -> None:
        """Write the file, whole or not at all; ``state`` is what the training itself needs."""
        names = ("identity", "history", "selected_epoch", "selected_score", "selected")
        with whole_file(path) as file:
            torch.save({**{name: getattr(self, name) for name in names}, **state}, file)

    @contextmanager
    def applying(self, path: Path) -> Iterator[None]:
        """A block that takes over what :meth:`load` returned; what does not fit is an error of the file's.

        Raises:
            ValueError: an entry is missing, or has another type or shape than the training's own.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"checkpoint {path} cannot be read as {self._name}: {type(error).__name__}: {error}") from error

    def load(
        self, path: Path, device: torch.device | str = "cpu", *, advice: Callable[[str], str] = lambda _: ""
    ) -> dict[str, Any]:
        """Read and check a file, its tensors on ``device``, and go on from its epochs.

        Args:
            path: the file.
            device: of its tensors.
            advice: what to do where the entry of this name in ``identity`` differs, for the error.

        Returns:
            All that :meth:`save` wrote.

        Raises:
            ValueError: it cannot be read, or belongs to another training.
        """
        try:
            state: dict[str, Any] = read_saved(path, device)
            if not isinstance(state, dict):
                raise TypeError(f"it holds a {type(state).__name__}")
            for name, kind in self._content.items():
                if not isinstance(state[name], kind):
                    raise TypeError(f"{name} is a {type(state[name]).__name__}")
        except Exception as error:  # what torch makes of foreign bytes knows no limits
            raise ValueError(f"checkpoint {path} cannot be read as {self._name}: {type(error).__name__}: {error}") from error
        saved = state["identity"]
        # Of an option that only one of them has, the other has the default.
        for name in {**self.identity, **saved}:
            here, there = self.identity.get(name), saved.get(name)
            if here != there:
                raise ValueError(
                    f"checkpoint {path} belongs to another training: {name} is {here!r} here and {there!r} there{advice(name)}"
                )
        with self.applying(path):
            epochs = [entry["epoch"] for entry in state["history"]]
            if not epochs or epochs != list(range(epochs[0], epochs[0] + len(epochs))) or epochs[0] < 0:
                raise ValueError(f"its history is of the epochs {epochs[:5]}")
            if len({tuple((name, type(value)) for name, value in entry.items()) for entry in state["history"]}) > 1:
                raise ValueError("its history has other entries in one epoch than in another")
            if state["selected_epoch"] not in (0, *epochs):
                raise ValueError(f"it has selected epoch {state['selected_epoch']} of {epochs[-1]}")
            _check_numbers(state, "")
        self.history, self.selected = state["history"], state["selected"]
        self.selected_epoch, self.selected_score = state["selected_epoch"], state["selected_score"]
        return state


def copy_into(own: Tensor, kept: Tensor, name: str) -> None:
    """Copy a tensor of a file into one of the training, whose shape it must have: nothing is repeated to fit."""
    check_shape(kept, name, own.shape)
    own.copy_(kept)


def _check_numbers(value: Any, place: str) -> None:
    """Check that no tensor holds NaN: a training that has diverged writes no file."""
    if isinstance(value, Tensor):
        if bool(value.isnan().any()):
            raise ValueError(f"{place} holds NaN")
    elif isinstance(value, (Mapping, list, tuple)):
        for name, entry in value.items() if isinstance(value, Mapping) else enumerate(value):
            _check_numbers(entry, f"{place}.{name}" if place else str(name))


def check_alike(kept: Iterable[Tensor], own: Iterable[Tensor], name: str) -> None:
    """Check that tensors of a file have the shapes and dtypes of those of the training whose place they are to take."""
    for there, here in zip(kept, own, strict=True):
        check_shape(there, name, here.shape)
        if there.dtype != here.dtype:
            raise TypeError(f"{name} must be {here.dtype}, got {there.dtype}")


# What torch's optimizers keep of each element of a parameter. Fused ones write to it without looking at its size.
_OF_EACH_ELEMENT = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over the state of an optimizer of the same kind, of parameters of the same shapes.

    Raises:
        Exception: the state is of another.
    """
    own = optimizer.state_dict()["param_groups"]
    for here, there in zip(own, state["param_groups"], strict=True):
        if str(here["params"]) != str(there["params"]):
            raise ValueError("optimizer must have the same groups of parameters")
        for name, value in here.items():
            kept = there[name]
            if type(kept) is not type(value) and {type(kept), type(value)} != {int, float}:
                raise TypeError(f"optimizer's {name} must be a {type(value).__name__}, got a {type(kept).__name__}")
            for one, other in zip(kept, value, strict=True) if isinstance(value, tuple) else [(kept, value)]:
                if isinstance(other, (int, float)) and not (math.isfinite(one) and (one >= 0 or other < 0)):
                    raise ValueError(f"optimizer's {name} must be a finite number, not negative, got {kept!r}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in own for number in group["params"]]
    shapes = {number: parameter.shape for number, parameter in zip(numbers, parameters, strict=True)}
    there_is = [{name for name, value in entries.items() if value is not None} for entries in state["state"].values()]
    kinds = {frozenset(names.intersection({"step", *_OF_EACH_ELEMENT})) for names in there_is}
    if len(kinds) > 1:
        raise ValueError(f"optimizer must keep the same of each parameter, got {' and '.join(str(sorted(k)) for k in kinds)}")
    for number, entries in state["state"].items():
        for name, value in entries.items():
            if name in _OF_EACH_ELEMENT and value is not None:
                check_shape(value, f"optimizer's {name}", shapes[number])
            elif name == "step" and not 0 <= float(value) < 2**53:
                raise ValueError(f"optimizer's step must be at least 0, got {value}")
    optimizer.load_state_dict(state)


def check_checkpoint(checkpoint: str | os.PathLike[str]) -> Path:
    """Return the path after checking that a checkpoint can be there."""
    path = Path(checkpoint)
    if path.is_dir() or not Path(os.path.realpath(path)).parent.is_dir():  # of what a link leads to
        raise ValueError(f"checkpoint must be a file in a directory that exists, got {str(path)!r}")
    return path
