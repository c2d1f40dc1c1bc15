"""Checks of tensors and arrays.

Those that read a tensor's values make the CPU wait for the GPU: they belong where data enters (constructors, ``fit``, metrics),
not inside a training step.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .checks import format_ids
from .files import PathLike, open_file
from .text import did_you_mean, one_form

TensorLike: TypeAlias = Tensor | npt.NDArray[Any] | Sequence[Any]
"""What users have at hand: a tensor, a NumPy array (also a read-only memory map), or nested lists of numbers."""


class LabelledFeatures(Protocol):
    """Features that know their labels, such as :class:`alphaext.features.Features`."""

    @property
    def features(self) -> npt.NDArray[Any]: ...

    @property
    def labels(self) -> Tensor: ...


def features_and_labels(
    features: TensorLike | LabelledFeatures | None,
    labels: TensorLike | None,
    name: str = "features",
    labels_name: str = "labels",
) -> tuple[TensorLike, TensorLike]:
    """Features and labels apart, which may be given as one."""
    both: Any = features
    if hasattr(both, "features") and hasattr(both, "labels"):
        features, labels = both.features, both.labels if labels is None else labels
    if features is None or labels is None:
        raise ValueError(f"{name} and {labels_name} must be given together, or as one, such as alphaext.features.Features")
    return features, labels  # type: ignore[return-value]


def optional_features_and_labels(
    features: TensorLike | LabelledFeatures | None, labels: TensorLike | None, name: str, labels_name: str
) -> tuple[TensorLike | None, TensorLike | None]:
    """The same of features that need not be given."""
    if features is None and labels is None:
        return None, None
    return features_and_labels(features, labels, name, labels_name)


def as_tensor(value: TensorLike, name: str) -> Tensor:
    """Return ``value`` as a tensor: a tensor as it is, an array or a list on the CPU (an array shares its memory)."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {value.layout}; convert with .to_dense()")
        return value.resolve_neg()  # views that torch negates as it reads, such as imag of a conjugate, are no NumPy arrays
    try:
        array = value if isinstance(value, np.ndarray) else np.asarray(value)
        # torch refuses negative strides and foreign byte order.
        if not array.dtype.isnative or any(stride < 0 for stride in array.strides):
            array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
        # from_numpy, because as_tensor would follow torch.set_default_device.
        return torch.from_numpy(array if array.flags.writeable else np.asarray(_ReadOnly(array)))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be a tensor, a NumPy array or a list of numbers, got {type(value).__name__}: {error}"
        ) from error


def check_whole(value: object) -> None:
    """Check rows that know how (cached features do) before all of them are read."""
    check = rows_check(value)
    if check is not None:
        check()


def rows_check(value: object) -> Callable[..., None] | None:
    """How rows of ``value`` are checked, if it knows: all, or those of an index int64 ``[k]``, which may come gathered."""
    check = getattr(value, "check_rows", None)
    return None if check is None else partial(check, value)


class _ReadOnly:
    """An array that torch takes without a warning: nothing here writes to what users hand in, so it need not be copied."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array  # whose memory it is
        self.__array_interface__ = {**array.__array_interface__, "data": (array.__array_interface__["data"][0], False)}


def check_floating(tensor: Tensor, name: str) -> None:
    """Check that ``tensor`` has a real floating-point dtype."""
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}; convert with .float()")


def check_not_meta(values: object, name: str) -> None:
    """Check that there are numbers: a tensor on the device "meta" has a shape alone."""
    if isinstance(values, Tensor) and values.is_meta:
        raise ValueError(f'{name} must hold numbers, got a tensor on device "meta", which has none')


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


def first_true(mask: Tensor) -> int | None:
    """Where a mask ``[n]`` is first true; None where it nowhere is."""
    return int(mask.int().argmax()) if bool(mask.any()) else None


def check_shape(tensor: Tensor, name: str, shape: Sequence[int | str]) -> None:
    """Check the shape of ``tensor``: a number in ``shape`` must match, a letter such as ``"N"`` stands for any size."""
    sizes = tuple(tensor.shape)
    if len(sizes) == len(shape) and all(isinstance(want, str) or want == size for want, size in zip(shape, sizes, strict=True)):
        return
    wanted = ", ".join(str(want) for want in shape)
    raise ValueError(f"{name} must have shape [{wanted}], got {list(sizes)}")


def floating_tensor(value: TensorLike, name: str, shape: Sequence[int | str]) -> Tensor:
    """``value`` as a tensor of floating point numbers in that shape."""
    tensor = as_tensor(value, name).detach()
    check_shape(tensor, name, shape)
    check_floating(tensor, name)
    return tensor


def finite_tensor(value: TensorLike, name: str, shape: Sequence[int | str]) -> Tensor:
    """Return ``value`` as a tensor without gradient after checking that it is floating point, finite and of this shape."""
    tensor = floating_tensor(value, name, shape)
    check_finite(tensor, name)
    return tensor


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
    bare = isinstance(labels, (list, tuple)) and not labels
    tensor = torch.zeros(0, dtype=torch.int64, device="cpu") if bare else as_tensor(labels, name)
    check_integral(tensor, name)
    check_shape(tensor, name, ("n",))
    tensor = tensor.detach().to(torch.int64).contiguous()
    outside = tensor < 0
    if num_classes is not None:
        outside = outside | (tensor >= num_classes)
    if (index := first_true(outside)) is not None:
        allowed = "at least 0" if num_classes is None else f"in 0..{num_classes - 1}"
        raise ValueError(f"{name} must be {allowed}, got {int(tensor[index])} at index {index}")
    return tensor


def check_targets(labels: TensorLike, num_classes: int | None, samples: int, name: str, labels_name: str = "labels") -> Tensor:
    """Return ``labels`` after checking them (:func:`check_labels`) and that there is one for each of ``samples``."""
    targets = check_labels(labels, num_classes, labels_name)
    if len(targets) != samples:
        raise ValueError(f"{name} and {labels_name} must have one entry a sample, got {samples} and {len(targets)}")
    return targets


def check_rows(values: TensorLike, name: str, width: str) -> tuple[Tensor | npt.NDArray[Any], Tensor]:
    """``values`` [n, width] to be read by slices, and an empty slice, which has its dtype and device."""
    check_whole(values)
    source = values if isinstance(values, np.ndarray) else as_tensor(values, name)
    check_not_meta(source, name)
    if source.ndim != 2:
        raise ValueError(f"{name} must have shape [n, {width}], got {list(source.shape)}")
    # Of a memory map, this reads no data.
    empty = as_tensor(source[:0], name)
    check_floating(empty, name)
    return source, empty


def check_class_ids(ids: TensorLike, num_classes: int | None, name: str) -> Tensor:
    """Return ``ids`` as int64 after checking that they are 1-D, in range, and that none is repeated."""
    tensor = check_labels(ids, num_classes, name)
    values, counts = torch.unique(tensor, return_counts=True)
    repeated = values[counts > 1]
    if len(repeated):
        raise ValueError(f"{name} must name each class once, got class {format_ids(repeated.tolist())} more than once")
    return tensor


def class_ids(classes: TensorLike, num_classes: int, name: str, class_names: Sequence[str] | None = None) -> Tensor:
    """The ids, int64, of classes that are given by ids or, where they have names, by these; each once."""
    words = [classes] if isinstance(classes, str) else classes
    if not isinstance(words, (list, tuple)) or not any(isinstance(word, str) for word in words):
        return check_class_ids(classes, num_classes, name)
    if class_names is None:
        raise ValueError(f"{name} must be ids where classes have no names (those of alphaext.features.Features), got {words!r}")
    id_of = {one_form(word): number for number, word in enumerate(class_names)}
    words = [one_form(word) if isinstance(word, str) else word for word in words]
    for word in words:
        if word not in id_of:
            raise ValueError(f"{name} must name classes, {word!r} is none{did_you_mean(str(word), id_of)}")
    return check_class_ids([id_of[word] for word in words], num_classes, name)


def check_list(values: Sequence[float], name: str) -> list[float]:
    """Return the numbers to choose from as a list; there must be one."""
    if not isinstance(values, (list, tuple, range, np.ndarray)):
        raise TypeError(f"{name} must be a list of numbers, got {values!r}")
    if len(values) == 0:
        raise ValueError(f"{name} is empty: there is nothing to choose from")
    return list(values)


def read_saved(path: PathLike, device: torch.device | str = "cpu") -> Any:
    """What ``torch.save`` wrote of tensors, numbers, texts and containers; its checksums are checked, which torch does not.

    Raises:
        OSError: there is no such file, or it cannot be read.
        Exception: it is none, damaged, or holds something else; what torch makes of foreign bytes knows no limits.
    """
    with open_file(path) as file:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.CRC == 0:  # what torch writes where it is told to compute no checksums
                    record.CRC = None  # type: ignore[assignment]
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} in it is damaged")
        file.seek(0)
        return torch.load(file, map_location=device, weights_only=True)


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the shapes, dtypes and bytes of tensors, as hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor's numbers, in the order of its elements."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def check_device(device: torch.device | str) -> torch.device:
    """Return ``device`` after checking that torch can compute on it."""
    try:
        place = torch.device(device)
        if place.type != "cuda":  # to ask a GPU would start its driver
            torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f'device must be "cpu", "cuda" or "cuda:NUMBER", got {device!r}: {error}') from error
    if place.type == "meta":
        raise ValueError(f'device must be "cpu", "cuda" or "cuda:NUMBER", got {device!r}')
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if place.type == "cuda" and not gpus:
        raise ValueError(f'device must be "cpu", got {str(place)!r}: torch sees no GPU')
    if place.type == "cuda" and (place.index or 0) >= gpus:
        raise ValueError(f"device must be one of {gpus} GPUs that torch sees, got {str(place)!r}")
    return place


def choose_device(device: torch.device | str | None) -> torch.device:
    """The CPU or the GPU asked for, checked; without a name a GPU where there is one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = check_device(device)
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f'device must be "cpu", "cuda" or "cuda:NUMBER", got {str(device)!r}')
    return chosen
