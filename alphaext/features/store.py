"""Cached features: a folder with ``features.npy``, ``labels.npy`` and the sidecar ``features.json``, which says what they are.

The sidecar is written last: a folder that has one is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import classes
from ..utils.checks import check_class_names, check_integer
from ..utils.files import PathLike, file_digest, read_json, whole_file, without_nan, write_json
from ..utils.tensors import TensorLike, as_tensor, check_finite, check_floating, check_labels
from .shards import IDENTITY_FILE, PARTS_FOLDER, count_done

__all__ = ["DTYPES", "Features", "read_features", "write_features"]

FEATURES_FILE, LABELS_FILE, SIDECAR_FILE = "features.npy", "labels.npy", "features.json"
FORMAT = "alphaext features 1"

DTYPES = ("float16", "float32")
"""Of features on disk; both little-endian."""

# What the sidecar says of every folder, whoever made it.
_OWN = ("format", "complete", "rows", "width", "dtype", "num_classes", "class_names", "features_sha256")

_BLOCK_BYTES = 2**22


class HasFingerprint(Protocol):
    """A model (:class:`alphaext.models.SplitModel`) or images (:class:`alphaext.data.LabelledImages`)."""

    def fingerprint(self) -> str: ...


class HasDescription(Protocol):
    """A transform, such as :class:`alphaext.data.ImageTransform`."""

    @property
    def description(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, eq=False, repr=False)
class Features:
    """Cached features, as :func:`alphaext.features.extract`, :func:`read_features` and :func:`write_features` return them.

    They stay on disk: ``features`` is a memory map, from which :func:`alphaext.fit`, :func:`alphaext.class_means` and the rest
    read what they need.

    Attributes:
        features: float16 or float32 ``[n, D]``, read-only. Of several passes over ``m`` images, row ``p * m + i`` is image
            ``i`` in pass ``p``.
        labels: int64 ``[n]``, CPU, the class of each row.
        num_classes: N; there may be classes without rows.
        class_names: a name for each class, or None.
        metadata: all that the sidecar says, such as ``model``, ``images`` (their fingerprints) and ``transform``.
        folder: where they are.
    """

    features: np.memmap[Any, np.dtype[Any]]
    labels: Tensor
    num_classes: int
    class_names: tuple[str, ...] | None
    metadata: dict[str, Any]
    folder: Path

    def __len__(self) -> int:
        return self.labels.numel()

    def __repr__(self) -> str:
        rows, width = self.features.shape
        return f"Features({rows:,} of {width:,} {self.features.dtype}, {self.num_classes:,} classes, {str(self.folder)!r})"

    @property
    def passes(self) -> int:
        """How many rows there are of each image; above 1 where images were extracted with several random transforms."""
        return int(self.metadata.get("passes", 1))

    def class_counts(self) -> Tensor:
        """The images of each class, int64 [N]: what few, medium and many go by. Several passes over an image count once."""
        images = len(self) // self.passes
        return classes.class_counts(self.labels[:images], self.num_classes)

    def class_means(self) -> Tensor:
        """The mean feature of each class, float32 [N, D], over all rows; see :func:`alphaext.class_means`.

        Raises:
            ValueError: a class without rows.
        """
        return classes.class_means(self.features, self.labels, self.num_classes)

    def verify(self) -> None:
        """Check that ``features.npy`` still has the bytes that were written, by their SHA-256: it is read whole.

        Raises:
            ValueError: it has others.
        """
        noted, seen = self.metadata["features_sha256"], file_digest(self.folder / FEATURES_FILE)
        if seen != noted:
            raise ValueError(
                f"{str(self.folder / FEATURES_FILE)!r} has changed since it was written: SHA-256 {seen}, not {noted}"
            )


def read_parts(folder: PathLike, *parts: str) -> dict[str, Features]:
    """The cached features of several parts, each in a folder of its own in ``folder``; with their names, as given.

    Raises:
        FileNotFoundError: a part is not there.
        ValueError: parts of different networks or classes.
    """
    path = Path(folder)
    for part in parts:
        if not (path / part).is_dir():
            there = sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []
            raise FileNotFoundError(
                f"features must be a folder with the features of {', '.join(parts)} in it, there is no {str(path / part)!r}"
                + (f"; there are {', '.join(there)}" if there else "")
                + "; 'alphaext extract' writes it"
            )
    found = {part: read_features(path / part) for part in parts}
    first = found[parts[0]]
    for part, other in found.items():
        pairs = {
            "the network (its fingerprint)": (first.metadata.get("model"), other.metadata.get("model")),
            "their width": (first.features.shape[1], other.features.shape[1]),
            "the number of classes": (first.num_classes, other.num_classes),
            "the names of the classes": (first.class_names, other.class_names),
        }
        for what, (here, there_) in pairs.items():
            if here is not None and there_ is not None and here != there_:
                shown = "" if isinstance(here, tuple) else f": {here} and {there_}"
                raise ValueError(
                    f"features of {parts[0]} and {part} in {str(folder)!r} do not belong together: {what} differs{shown}"
                )
    return found


def read_features(
    folder: PathLike,
    *,
    model: HasFingerprint | str | None = None,
    images: HasFingerprint | str | None = None,
    transform: HasDescription | Mapping[str, Any] | None = None,
) -> Features:
    """Open cached features; their rows are not read.

    Args:
        folder: as :func:`alphaext.features.extract` or :func:`write_features` made it.
        model: the model that they must be of, or its fingerprint. Default: any. Its classifier does not count.
        images: the images that they must be of, or their fingerprint. Default: any.
        transform: the transform that they must be of, or its description. Default: any.

    Returns:
        The :class:`Features`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no folder of features, one that is half-written (how many images are done is in the message) or whose files
            do not agree; features of another model, other images or another transform than asked for.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp() + "/train"
        >>> _ = write_features(folder, torch.rand(3, 4), [0, 1, 1], num_classes=2)
        >>> read_features(folder).class_counts()
        tensor([1, 2])
    """
    path = Path(folder)
    _check_folder(path)
    if not (path / SIDECAR_FILE).exists():
        raise ValueError(_why_unfinished(path))
    metadata = read_json(path / SIDECAR_FILE, "the sidecar of cached features")
    if metadata.get("format") != FORMAT or metadata.get("complete") is not True:
        raise ValueError(
            f"{str(path / SIDECAR_FILE)!r} is not the sidecar of whole features of this version: format must be {FORMAT!r} and "
            f"complete true, got {metadata.get('format')!r} and {metadata.get('complete')!r}"
        )
    _check_asked("model", metadata, path, None if model is None else _fingerprint(model, "model"))
    _check_asked("images", metadata, path, None if images is None else _fingerprint(images, "images"))
    _check_asked("transform", metadata, path, None if transform is None else _description(transform))
    try:
        return _opened(path, metadata)
    except KeyError as error:
        raise ValueError(f"{str(path / SIDECAR_FILE)!r} lacks {error}") from None
    except (TypeError, ValueError, EOFError) as error:
        raise ValueError(f"{str(path)!r} does not hold whole features: {error}") from error


def write_features(
    folder: PathLike,
    features: TensorLike,
    labels: TensorLike,
    *,
    num_classes: int,
    class_names: Sequence[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Features:
    """Write features that were computed elsewhere into a folder of cached features, whole or not at all.

    Args:
        folder: a new or an empty folder; the one that it is in must exist.
        features: floating point ``[n, D]``, a memory map or a tensor on any device. float16 stays; all others become float32.
        labels: the class of each row, integers [n].
        num_classes: N.
        class_names: of all classes, in the order of their labels.
        metadata: more for the sidecar, what JSON can hold. Under ``model``, ``images`` and ``transform``
            :func:`read_features` looks for the fingerprints and the description that it is asked for.

    Returns:
        The :class:`Features`, as :func:`read_features` opens them.

    Raises:
        TypeError: features that are not floating point, labels that are not integers, metadata that JSON cannot hold.
        ValueError: a folder with something in it; no rows; numbers of rows and labels that disagree; a label beyond the
            classes; NaN or infinity, also where a float64 is too large for float32.
        OSError: the files cannot be written, for example because the disk is full.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp() + "/val"
        >>> write_features(folder, torch.rand(3, 4).half(), [0, 1, 1], num_classes=2).features.shape
        (3, 4)
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"folder must be new or empty, got {str(path)!r}, which exists already")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"folder must be in a directory that exists, got {str(path)!r}")
    num_classes = check_integer(num_classes, "num_classes", minimum=1)
    names = None if class_names is None else check_class_names(class_names, num_classes)
    label_ids = check_labels(labels, num_classes).cpu()
    source = features if isinstance(features, (Tensor, np.ndarray)) else as_tensor(features, "features")
    if source.ndim != 2 or 0 in source.shape:
        raise ValueError(f"features must have shape [n, D] with at least one row and one column, got {list(source.shape)}")
    empty = as_tensor(source[:0], "features")
    check_floating(empty, "features")
    if len(source) != len(label_ids):
        raise ValueError(f"features and labels must have one entry a row, got {len(source)} and {len(label_ids)}")
    more = _checked_metadata(metadata)

    dtype = "float16" if empty.dtype == torch.float16 else "float32"
    shape = (len(source), int(source.shape[1]))
    # Beside the folder, whose name it then takes: there is no moment at which the folder is half full.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    temporary.mkdir()
    try:
        with array_file(temporary / FEATURES_FILE, dtype, shape) as file:
            for start, block in _blocks(source, shape[1]):
                check_finite(block, "features", first_row=start)
                file.write(block.numpy())
        with array_file(temporary / LABELS_FILE, "int64", (len(label_ids),)) as labels_file:
            labels_file.write(label_ids.numpy())
        sidecar = sidecar_of(shape, dtype, num_classes, names, file.sha256)
        write_json(temporary / SIDECAR_FILE, {**sidecar, **more})
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return read_features(path)


class ArrayFile:
    """An ``.npy`` file that is being written block by block; :func:`array_file` opens one.

    Attributes:
        rows: written so far.
        sha256: of the file so far.
    """

    def __init__(self, file: IO[bytes], dtype: str, shape: tuple[int, ...]) -> None:
        self._file, self._dtype, self._shape = file, np.dtype(dtype).newbyteorder("<"), shape
        self._digest = hashlib.sha256()
        self.rows = 0
        header = io.BytesIO()
        about = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, about)
        self._put(header.getvalue())

    def write(self, block: npt.NDArray[Any]) -> None:
        """Append the rows of ``block``."""
        if block.shape[1:] != self._shape[1:]:
            raise ValueError(f"block must have rows of shape {list(self._shape[1:])}, got {list(block.shape)}")
        self._put(block.astype(self._dtype, copy=False).tobytes())
        self.rows += len(block)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def _put(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)


@contextmanager
def array_file(path: Path, dtype: str, shape: tuple[int, ...]) -> Iterator[ArrayFile]:
    """An ``.npy`` file of a known shape, to be written block by block; it is there, whole, when the block of code ends.

    Raises:
        OSError: it cannot be written; the error names the file.
        ValueError: more or fewer rows were written than the shape says; the file is not there then.
    """
    with whole_file(path) as file:
        array = ArrayFile(file, dtype, shape)
        yield array
        if array.rows != shape[0]:
            raise ValueError(f"{os.fspath(path)} must get {shape[0]} rows, got {array.rows}")


def sidecar_of(
    shape: tuple[int, int], dtype: str, num_classes: int, class_names: Sequence[str] | None, sha256: str
) -> dict[str, Any]:
    """What every sidecar says."""
    names = None if class_names is None else [printable(name) for name in class_names]
    return dict(zip(_OWN, (FORMAT, True, *shape, dtype, num_classes, names, sha256), strict=True))


def printable(text: str) -> str:
    """``text`` without what UTF-8 cannot hold: bytes of file names in other encodings, which Python keeps as surrogates."""
    return text.encode("utf-8", "backslashreplace").decode()


def _blocks(source: Tensor | npt.NDArray[Any], width: int) -> Iterator[tuple[int, Tensor]]:
    """Rows of ``source``, some megabytes at a time, as float16 or float32 on the CPU, with the number of the first."""
    rows = max(1, _BLOCK_BYTES // (4 * width))
    for start in range(0, len(source), rows):
        block = as_tensor(source[start : start + rows], "features").detach().cpu()
        yield start, block if block.dtype == torch.float16 else block.to(torch.float32)


def _checked_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    if metadata is None:
        return {}
    own = [name for name in metadata if name in _OWN]
    if own:
        raise ValueError(f"metadata must leave {', '.join(_OWN)} to this function, got {', '.join(own)}")
    try:
        more: dict[str, Any] = json.loads(json.dumps(without_nan(dict(metadata)), ensure_ascii=False).encode())
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be what JSON can hold: {error}") from error
    return more


def _check_folder(path: Path) -> None:
    pickles = [path] if path.is_file() else sorted(path.glob("*feat_all.pkl")) if not (path / SIDECAR_FILE).exists() else []
    if pickles and pickles[0].suffix == ".pkl":
        raise ValueError(
            f"{str(pickles[0])!r} is a pickle, as classifier-balancing saves features (feats, labels, idxs); reading one runs "
            "the code in it, so it is not read here. Where you trust it: saved = pickle.load(open(PATH, 'rb')); "
            "alphaext.features.write_features(FOLDER, saved['feats'], saved['labels'], num_classes=N)"
        )
    if path.is_file():
        raise ValueError(f"folder must be a folder of cached features, got the file {str(path)!r}")
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path)!r} of cached features")


def _why_unfinished(path: Path) -> str:
    if (path / IDENTITY_FILE).exists():
        done, images, passes = count_done(path)
        of = f"{done} of {images * passes} images (of {passes} passes)" if passes > 1 else f"{done} of {images} images"
        return (
            f"the extraction into {str(path)!r} is not finished: {of} are done; run the same extraction again, it goes on "
            "where it stopped"
        )
    if (path / PARTS_FOLDER).is_dir() or (path / FEATURES_FILE).exists():
        return f"{str(path)!r} is no whole folder of cached features: it has no {SIDECAR_FILE}, which is written last"
    inside = [entry.name for entry in sorted(path.iterdir()) if (entry / SIDECAR_FILE).exists()]
    hint = f"; there are features in its folders {', '.join(inside)}" if inside else ""
    return f"{str(path)!r} is no folder of cached features: it has no {SIDECAR_FILE}{hint}"


def _fingerprint(value: HasFingerprint | str, name: str) -> str:
    if isinstance(value, str):
        return value
    if not hasattr(value, "fingerprint"):
        raise TypeError(f"{name} must have a fingerprint, or be one, got {type(value).__name__}")
    return value.fingerprint()


def _description(transform: HasDescription | Mapping[str, Any]) -> dict[str, Any]:
    described = transform if isinstance(transform, Mapping) else getattr(transform, "description", None)
    if not isinstance(described, Mapping):
        raise TypeError(f"transform must have a description, or be one, got {type(transform).__name__}")
    return as_json(described)


def as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` as it comes back from a JSON file: tuples as lists, keys as text."""
    back: dict[str, Any] = json.loads(json.dumps(without_nan(dict(value))))
    return back


def _check_asked(name: str, metadata: Mapping[str, Any], path: Path, wanted: Any) -> None:
    if wanted is None:
        return
    if metadata.get(name) is None:
        raise ValueError(f"the features in {str(path)!r} do not say of which {name} they are, so this cannot be checked")
    found = differences({name: wanted}, {name: metadata[name]})
    if found:
        other = "other images" if name == "images" else f"another {name}"
        raise ValueError(f"the features in {str(path)!r} are of {other}: {'; '.join(found)}")


def differences(here: Mapping[str, Any], there: Mapping[str, Any], of: str = "") -> list[str]:
    """What differs between two descriptions, each as ``"transform.resize is 256 here and 224 there"``."""
    found: list[str] = []
    for key in [*here, *(key for key in there if key not in here)]:
        name, mine, theirs = f"{of}{key}", here.get(key), there.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            found += differences(mine, theirs, f"{name}.")
        elif mine != theirs:
            found.append(f"{name} is {mine!r} here and {theirs!r} there")
    return found


def _opened(path: Path, metadata: dict[str, Any]) -> Features:
    rows, width = (check_integer(metadata[name], name, minimum=1) for name in ("rows", "width"))
    num_classes = check_integer(metadata["num_classes"], "num_classes", minimum=1)
    dtype, names = metadata["dtype"], metadata["class_names"]
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    class_names = None if names is None else check_class_names(names, num_classes)
    passes = check_integer(metadata.get("passes", 1), "passes", minimum=1)
    if rows % passes:
        raise ValueError(f"rows must be a multiple of the {passes} passes, got {rows}")
    features = _mapped(path / FEATURES_FILE)
    expected = np.dtype(dtype).newbyteorder("<")
    if not isinstance(features, np.memmap) or features.shape != (rows, width) or features.dtype != expected:
        seen = f"{features.dtype} {list(features.shape)}"
        raise ValueError(f"{FEATURES_FILE} must be {dtype} {[rows, width]}, as {SIDECAR_FILE} says, got {seen}")
    if not features.flags.c_contiguous:
        raise ValueError(f"{FEATURES_FILE} must be stored row by row")
    labels = np.array(_mapped(path / LABELS_FILE))
    if labels.dtype != np.int64 or labels.shape != (rows,):
        raise ValueError(f"{LABELS_FILE} must be int64 {[rows]}, got {labels.dtype} {list(labels.shape)}")
    label_ids = check_labels(labels, num_classes)
    return Features(features, label_ids, num_classes, class_names, metadata, path)


def _mapped(path: Path) -> npt.NDArray[Any]:
    with suppress(FileNotFoundError):
        # A memory map of a file that is too short for its header is an error of NumPy's.
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{path.name} is not an array")
        return array
    raise ValueError(f"{path.name} is missing")
