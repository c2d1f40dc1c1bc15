"""Argument checks shared by every module.

A check raises ``TypeError`` for a wrong type or dtype and ``ValueError`` for a wrong value, shape or device. Its
message names the argument, what was seen and what is allowed. Those that read a tensor's values make the CPU wait for
the GPU: they belong where data enters (constructors, ``fit``, metrics), not inside a training step.
"""

from __future__ import annotations

import math
import numbers
import operator
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TensorLike: TypeAlias = Tensor | npt.NDArray[Any] | Sequence[Any]
"""What users have at hand: a tensor, a NumPy array (also a read-only memory map), or nested lists of numbers."""


def as_tensor(value: TensorLike, name: str) -> Tensor:
    """Return ``value`` as a tensor: a tensor as it is, an array or a list on the CPU (an array shares its memory)."""
    if isinstance(value, Tensor):
        return value
    try:
        array = value if isinstance(value, np.ndarray) else np.asarray(value)
        # torch refuses negative strides and foreign byte order.
        if not array.dtype.isnative or any(stride < 0 for stride in array.strides):
            array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
        with warnings.catch_warnings():
            # Nothing here writes to what users hand in, so a read-only memory map need not be copied into memory.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            # from_numpy, because as_tensor would follow torch.set_default_device.
            return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be a tensor, a NumPy array or a list of numbers, got {type(value).__name__}: {error}"
        ) from error


def format_ids(ids: Iterable[int], limit: int = 10) -> str:
    """Write the first ``limit`` ids, and how many there are in all if there are more."""
    listed = list(ids)
    text = ", ".join(str(identifier) for identifier in listed[:limit])
    return text if len(listed) <= limit else f"{text}, ... ({len(listed)} in all)"


def check_integer(value: int, name: str, minimum: int | None = None, maximum: int | None = None) -> int:
    """Return ``value`` as an ``int`` after checking that it is an integer (not a bool) within the bounds."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if (minimum is not None and integer < minimum) or (maximum is not None and integer > maximum):
        if minimum is not None and maximum is not None:
            allowed = f"between {minimum} and {maximum}"
        else:
            allowed = f"at least {minimum}" if minimum is not None else f"at most {maximum}"
        raise ValueError(f"{name} must be {allowed}, got {integer}")
    return integer


def check_gamma(gamma: object) -> float:
    """Return ``gamma`` as a ``float`` after checking that it lies in (0, 1]."""
    if isinstance(gamma, (bool, np.bool_)) or not isinstance(gamma, numbers.Real):
        raise TypeError(f"gamma must be a number in (0, 1], got {gamma!r}")
    number = float(gamma)
    # Written so that NaN fails too.
    if not 0.0 < number <= 1.0:
        raise ValueError(f"gamma must be in (0, 1], got {gamma!r}")
    return number


def check_choice(value: object, name: str, choices: Sequence[str]) -> None:
    """Check that ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_number(value: object, name: str, *, above: float | None = None, minimum: float | None = None) -> float:
    """Return ``value`` as a ``float`` after checking that it is a finite number (not a bool) above or at least a bound."""
    allowed = f"finite and above {above}" if above is not None else f"finite and at least {minimum}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, {allowed}, got {value!r}")
    bad = not math.isfinite(value) or (above is not None and value <= above) or (minimum is not None and value < minimum)
    if bad:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return float(value)


def check_floating(tensor: Tensor, name: str) -> None:
    """Check that ``tensor`` has a real floating-point dtype."""
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}; convert with .float()")


def check_integral(tensor: Tensor, name: str) -> None:
    """Check that ``tensor`` has an integer dtype (bool is none)."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {tensor.dtype}; convert with .long()")


def check_finite(tensor: Tensor, name: str, first_row: int | None = None) -> None:
    """Check that ``tensor`` has no NaN and no infinity; ``first_row`` says where a block begins in the whole."""
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return
    bad = torch.nonzero(~finite)
    place = [int(coordinate) for coordinate in bad[0]]
    value = tensor[tuple(place)].item()
    if first_row is not None:
        place[0] += first_row
    more = f" ({len(bad)} such values)" if len(bad) > 1 and first_row is None else ""
    raise ValueError(f"{name} must be finite, got {value} at index {place}{more}")


def check_shape(tensor: Tensor, name: str, shape: Sequence[int | str]) -> None:
    """Check the shape of ``tensor``: a number in ``shape`` must match, a letter such as ``"N"`` stands for any size."""
    sizes = tuple(tensor.shape)
    if len(sizes) == len(shape) and all(isinstance(want, str) or want == size for want, size in zip(shape, sizes, strict=True)):
        return
    wanted = ", ".join(str(want) for want in shape)
    raise ValueError(f"{name} must have shape [{wanted}], got {list(sizes)}")


def check_same_device(**values: object) -> None:
    """Check that all tensors among ``values`` (name=value) are on one device; anything but a tensor is passed over."""
    devices = [(name, value.device) for name, value in values.items() if isinstance(value, Tensor)]
    for name, device in devices[1:]:
        if device != devices[0][1]:
            raise ValueError(f"{name} is on {device} but {devices[0][0]} is on {devices[0][1]}; move both to the same device")


def check_labels(labels: TensorLike, num_classes: int | None, name: str = "labels") -> Tensor:
    """Return ``labels`` as int64 after checking that they are 1-D integers in ``0 .. num_classes - 1``.

    With ``num_classes=None`` only negative labels are out of range.
    """
    # A bare [] has no dtype of its own: NumPy would call it float64.
    tensor = torch.zeros(0, dtype=torch.int64, device="cpu") if _is_empty_list(labels) else as_tensor(labels, name)
    check_integral(tensor, name)
    check_shape(tensor, name, ("n",))
    tensor = tensor.detach().to(torch.int64)
    outside = tensor < 0
    if num_classes is not None:
        outside = outside | (tensor >= num_classes)
    if bool(outside.any()):
        index = int(torch.nonzero(outside)[0, 0])
        allowed = "at least 0" if num_classes is None else f"in 0..{num_classes - 1}"
        raise ValueError(f"{name} must be {allowed}, got {int(tensor[index])} at index {index}")
    return tensor


def _is_empty_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 0


def check_class_ids(ids: TensorLike, num_classes: int | None, name: str) -> Tensor:
    """Return ``ids`` as int64 after checking that they are 1-D, in range, and that none is repeated."""
    tensor = check_labels(ids, num_classes, name)
    values, counts = torch.unique(tensor, return_counts=True)
    repeated = values[counts > 1]
    if len(repeated):
        raise ValueError(f"{name} must name each class once, got class {format_ids(repeated.tolist())} more than once")
    return tensor
