"""Cached features: a folder with ``features.npy``, ``labels.npy``, ``sums.npy`` (a checksum of each row) and the sidecar
``features.json``, which says what they are.

The sidecar is written last: a folder that has one is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import classes
from ..data.images import LabelledImages
from ..data.loading import Transform
from ..models.split import SplitModel
from ..utils.checks import check_choice, check_class_names, check_integer, if_given
from ..utils.files import (
    PathLike,
    check_output_folder,
    file_digest,
    open_file,
    read_json,
    whole_file,
    whole_folder,
    without_nan,
    write_json,
)
from ..utils.tensors import TensorLike, as_tensor, check_finite, check_labels, check_rows, check_whole
from ..utils.text import one_form
from .shards import IDENTITY_FILE, PARTS_FOLDER, count_done
from .sums import RowSums, WholeSum, checksum, compare, row_sums

FEATURES_FILE, LABELS_FILE, SUMS_FILE, SIDECAR_FILE = "features.npy", "labels.npy", "sums.npy", "features.json"
FORMAT = "alphaext features 1"

DTYPES = ("float16", "float32")
"""Of features on disk; both little-endian."""

# What the sidecar says of every folder, whoever made it.
_OWN = (
    "format",
    "complete",
    "rows",
    "width",
    "dtype",
    "num_classes",
    "class_names",
    "features_sha256",
    "row_sums",
    "labels_sum",
)

_BLOCK_BYTES = 2**22


@dataclass(frozen=True, eq=False, repr=False)
class Features:
    """Features with their labels, as :func:`alphaext.features.extract`, :func:`read_features` and :func:`write_features` return
    them, and :func:`alphaext.extract_features`.

    Cached ones stay on disk: ``features`` is a memory map, from which :func:`alphaext.fit`, :func:`alphaext.class_means` and
    the rest read what they need. Each row is checked against its checksum when it is first read; damage is a ``ValueError``
    that names the rows.

    Attributes:
        features: float16 or float32 ``[n, D]``, read-only. Of several passes over ``m`` images, row ``p * m + i`` is image
            ``i`` in pass ``p``.
        labels: int64 ``[n]``, CPU, the class of each row.
        num_classes: N; there may be classes without rows.
        class_names: a name for each class, or None.
        metadata: all that the sidecar says, such as ``model``, ``images`` (their fingerprints) and ``transform``.
        folder: where they are; None for those in memory alone.

    Example:
        >>> data = torch.randn(30, 6), torch.tensor([0] * 29 + [2])
        >>> found = extract_features(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), data)
        >>> found, found.class_counts()
        (Features(30 of 8 float32, 3 classes, in memory), tensor([29,  0,  1]))
    """

    features: npt.NDArray[Any]
    labels: Tensor
    num_classes: int
    class_names: tuple[str, ...] | None
    metadata: dict[str, Any]
    folder: Path | None = None

    def __len__(self) -> int:
        return self.labels.numel()

    def __repr__(self) -> str:
        rows, width = self.features.shape
        place = "in memory" if self.folder is None else repr(str(self.folder))
        return f"Features({rows:,} of {width:,} {self.features.dtype}, {self.num_classes:,} classes, {place})"

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
        """Check that ``features.npy`` still has the bytes that were written, by the rows' checksums and by SHA-256: it is read
        whole.

        Raises:
            ValueError: it has others.
        """
        if self.folder is None:
            return
        check_whole(self.features)
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
            "the names of the classes": tuple(
                None if each.class_names is None else tuple(map(one_form, each.class_names)) for each in (first, other)
            ),
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
    model: SplitModel | str | None = None,
    images: LabelledImages | str | None = None,
    transform: Transform | Mapping[str, Any] | None = None,
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
    for name, wanted in {"model": model, "images": images, "transform": transform}.items():
        if wanted is not None:
            _check_asked(name, _as_noted(name, wanted), metadata, path)
    try:
        return _opened(path, metadata)
    except KeyError as error:
        raise ValueError(f"{str(path / SIDECAR_FILE)!r} lacks {error}") from None
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # what NumPy makes of damaged bytes knows no limits
        raise ValueError(f"{str(path)!r} does not hold whole features: {error}") from error


def write_features(
    folder: PathLike,
    features: TensorLike | Features,
    labels: TensorLike | None = None,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Features:
    """Write features that were computed elsewhere into a folder of cached features, whole or not at all.

    Args:
        folder: a new or an empty folder; the one that it is in must exist.
        features: floating point ``[n, D]``, a memory map or a tensor on any device. float16 stays; all others become float32.
            Or :class:`Features` in memory, as :func:`alphaext.extract_features` makes them, which know the rest.
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
    if isinstance(features, Features):
        num_classes = features.num_classes if num_classes is None else num_classes
        class_names = features.class_names if class_names is None else class_names
        labels, features = features.labels if labels is None else labels, features.features
    if labels is None or num_classes is None:
        raise ValueError("labels and num_classes must be given, or features that know them: alphaext.features.Features")
    path = check_output_folder(folder, "folder")
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"folder must be new or empty, got {str(path)!r}, which exists already")
    num_classes = check_integer(num_classes, "num_classes", minimum=1)
    names = if_given(check_class_names, class_names, num_classes)
    label_ids = check_labels(labels, num_classes).cpu()
    source, empty = check_rows(features, "features", "D")
    if 0 in source.shape:
        raise ValueError(f"features must have at least one row and one column, got {list(source.shape)}")
    if len(source) != len(label_ids):
        raise ValueError(f"features and labels must have one entry a row, got {len(source)} and {len(label_ids)}")
    more = as_json(metadata or {}, "metadata")
    own = [name for name in more if name in _OWN]
    if own:
        raise ValueError(f"metadata must leave {', '.join(_OWN)} to this function, got {', '.join(own)}")

    dtype = "float16" if empty.dtype == torch.float16 else "float32"
    shape = (len(source), int(source.shape[1]))
    # Beside the folder, whose name it then takes: there is no moment at which the folder is half full.
    with whole_folder(path) as temporary:
        digest = write_array(temporary / FEATURES_FILE, dtype, shape, _blocks(source, shape[1]))
        write_array(temporary / LABELS_FILE, "int64", shape[:1], [label_ids.numpy()])
        sidecar = sidecar_of(temporary, shape, dtype, num_classes, names, digest)
        write_json(temporary / SIDECAR_FILE, {**sidecar, **more})
    return read_features(path)


def write_array(path: Path, dtype: str, shape: tuple[int, ...], blocks: Iterable[npt.NDArray[Any]]) -> str:
    """Write an ``.npy`` file block by block, whole or not at all; returns its SHA-256 in hexadecimal digits.

    Raises:
        OSError: it cannot be written; the error names the file.
        ValueError: ``blocks`` have other rows, or more or fewer of them, than ``shape`` says; the file is not there then.
    """
    stored, digest, rows = np.dtype(dtype).newbyteorder("<"), hashlib.sha256(), 0
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": stored.str, "fortran_order": False, "shape": shape})
    with whole_file(path) as file:
        file.write(header.getvalue())
        digest.update(header.getvalue())
        for block in blocks:
            if block.shape[1:] != shape[1:]:
                raise ValueError(f"blocks must have rows of shape {list(shape[1:])}, got {list(block.shape)}")
            content = block.astype(stored, copy=False).tobytes()
            file.write(content)
            digest.update(content)
            rows += len(block)
        if rows != shape[0]:
            raise ValueError(f"{os.fspath(path)} must get {shape[0]} rows, got {rows}")
    return digest.hexdigest()


def sidecar_of(
    folder: Path, shape: tuple[int, int], dtype: str, num_classes: int, class_names: Sequence[str] | None, sha256: str
) -> dict[str, Any]:
    """What every sidecar says; features and labels are in ``folder`` already."""
    names = None if class_names is None else [printable(name) for name in class_names]
    of_rows = row_sums(np.load(folder / FEATURES_FILE, mmap_mode="r"))
    write_array(folder / SUMS_FILE, "uint64", shape[:1], [of_rows])
    sums = checksum(of_rows), checksum(np.load(folder / LABELS_FILE, mmap_mode="r"))
    return dict(zip(_OWN, (FORMAT, True, *shape, dtype, num_classes, names, sha256, *sums), strict=True))


def printable(text: str) -> str:
    """``text`` without what UTF-8 cannot hold: bytes of file names in other encodings, which Python keeps as surrogates."""
    return text.encode("utf-8", "backslashreplace").decode()


def _blocks(source: Tensor | npt.NDArray[Any], width: int) -> Iterator[npt.NDArray[Any]]:
    """The rows of ``source``, checked, some megabytes at a time: float16, or float32."""
    rows = max(1, _BLOCK_BYTES // (4 * width))
    for start in range(0, len(source), rows):
        block = as_tensor(source[start : start + rows], "features").detach().cpu()
        block = block if block.dtype == torch.float16 else block.to(torch.float32)
        check_finite(block, "features", first_row=start)
        yield block.numpy()


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


def _as_noted(name: str, value: Any) -> Any:
    """``value`` as a sidecar has it: the fingerprint of a model or of images, the description of a transform."""
    said = "description" if name == "transform" else "fingerprint"
    found = getattr(value, said, value)
    noted = found() if callable(found) else found
    if not isinstance(noted, Mapping if name == "transform" else str):
        raise TypeError(f"{name} must have a {said}, or be one, got {type(value).__name__}")
    return as_json({name: noted}, name)[name]


def as_json(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """``value`` as it comes back from a JSON file: tuples as lists, keys as text.

    Raises:
        TypeError: JSON cannot hold it; ``name`` says in the error what it is.
    """
    try:
        back: dict[str, Any] = json.loads(json.dumps(without_nan(dict(value)), ensure_ascii=False).encode())
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be what JSON can hold: {error}") from error
    return back


def _check_asked(name: str, wanted: Any, metadata: Mapping[str, Any], path: Path) -> None:
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
    check_choice(dtype, "dtype", DTYPES)
    class_names = if_given(check_class_names, names, num_classes)
    passes = check_integer(metadata.get("passes", 1), "passes", minimum=1)
    if rows % passes:
        raise ValueError(f"rows must be a multiple of the {passes} passes, got {rows}")
    for name in (FEATURES_FILE, LABELS_FILE):
        open_file(path / name).close()  # NumPy would wait for a pipe
    # A memory map of a file that is too short for its header is an error of NumPy's.
    features = np.load(path / FEATURES_FILE, mmap_mode="r", allow_pickle=False)
    expected = np.dtype(dtype).newbyteorder("<")
    if not isinstance(features, np.memmap) or features.shape != (rows, width) or features.dtype != expected:
        seen = f"{features.dtype} {list(features.shape)}"
        raise ValueError(f"{FEATURES_FILE} must be {dtype} {[rows, width]}, as {SIDECAR_FILE} says, got {seen}")
    if not features.flags.c_contiguous:
        raise ValueError(f"{FEATURES_FILE} must be stored row by row")
    if metadata.get("row_sums") is not None:
        open_file(path / SUMS_FILE).close()
        sums = np.array(np.load(path / SUMS_FILE, mmap_mode="r", allow_pickle=False))
        if sums.dtype != np.uint64 or sums.shape != (rows,):
            raise ValueError(f"{SUMS_FILE} must be uint64 {[rows]}, got {sums.dtype} {list(sums.shape)}")
        compare(str(path / SUMS_FILE), metadata["row_sums"], sums)
        features.check_rows = RowSums(str(path / FEATURES_FILE), sums)  # type: ignore[attr-defined]
    elif metadata.get("features_sum") is not None:  # of an earlier release: one sum of all
        features.check_rows = WholeSum(str(path / FEATURES_FILE), metadata["features_sum"])  # type: ignore[attr-defined]
    labels = np.array(np.load(path / LABELS_FILE, mmap_mode="r", allow_pickle=False))
    if labels.dtype != np.int64 or labels.shape != (rows,):
        raise ValueError(f"{LABELS_FILE} must be int64 {[rows]}, got {labels.dtype} {list(labels.shape)}")
    if metadata.get("labels_sum") is not None:
        compare(str(path / LABELS_FILE), metadata["labels_sum"], labels)
    label_ids = check_labels(labels, num_classes)
    return Features(features, label_ids, num_classes, class_names, metadata, path)
