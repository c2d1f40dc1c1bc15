"""The bytes of tensors inside a checkpoint, and copies of the file in which some rows differ and nothing else.

To load a checkpoint and save it again would lose what the loaded objects do not show: the devices that tensors were saved from,
views that share memory, the order and kind of containers, whatever else a later torch writes in another way. Here the file
itself is copied, and the numbers of the rows are written where they are (with the checksums of a zip archive, which are of
those numbers).
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import sys
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from .files import container
from .layouts import KeyPath

_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    # safetensors' names
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_BLOCK = 1 << 20


@dataclass(frozen=True)
class RowEdit:
    """New values for some rows of one tensor.

    Attributes:
        key_path: where the tensor is.
        expected: the whole tensor as it was read, by which a file that has changed since is noticed.
        rows: int64 ``[F]``.
        values: ``[F, ...]`` in the tensor's dtype.
    """

    key_path: KeyPath
    expected: Tensor
    rows: Tensor
    values: Tensor


@dataclass(frozen=True)
class Change:
    """Bytes of a file that differ from those of the file that it was copied from: where they begin, and what they are."""

    start: int
    content: bytes


@dataclass(frozen=True)
class _Stored:
    """One tensor in a file: which storage it looks at, and how (offset and strides in elements)."""

    storage: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, elements: Tensor) -> Tensor:
        return elements.as_strided(self.shape, self.strides, self.offset)

    def positions(self, rows: Tensor) -> Tensor:
        """Where the elements of some rows are in the storage, in the order of the rows' elements."""
        positions = self.offset + rows * self.strides[0]
        for size, stride in zip(self.shape[1:], self.strides[1:], strict=True):
            positions = positions[..., None] + torch.arange(size, device="cpu") * stride
        return positions.flatten()


@dataclass
class _Storage:
    """A run of numbers in a file, and where checksums of it are."""

    start: int
    size: int
    dtype: torch.dtype | None
    checksums: list[int] = field(default_factory=list)


@dataclass
class _FileMap:
    """The file's nested containers with a :class:`_Stored` for each tensor, and its storages."""

    tree: Any
    storages: dict[str, _Storage]
    foreign: set[str]  # storages that something else than a plain tensor looks at

    def find(self, edit: RowEdit, path: Path) -> _Stored:
        place = self.tree
        for key in edit.key_path:
            place = place.get(key) if isinstance(place, dict) else None
        if not isinstance(place, _Stored) or place.shape != tuple(edit.expected.shape):
            raise ValueError(f"{path} has changed since it was read: {' / '.join(edit.key_path)} is not as it was")
        return place


def changed_bytes(path: Path, edits: Sequence[RowEdit], name: Path) -> list[Change]:
    """What has to be written over a copy of the file at ``path`` for the rows of ``edits`` to have their new values.

    Args:
        path: a zip archive of ``torch.save``'s, or safetensors.
        edits: the rows.
        name: what errors call the file.

    Raises:
        ValueError: the file has changed since it was read, its numbers cannot be written in place (compressed, of the other
            byte order), or another tensor shares the memory of the rows. The same tensor under a second name changes with it.
    """
    file_map = _map_file(path, name)
    places = [(edit, file_map.find(edit, name)) for edit in edits]
    changes: list[Change] = []
    with path.open("rb") as file:
        for key in dict.fromkeys(place.storage for _, place in places):
            storage = file_map.storages[key]
            own = [(edit, place) for edit, place in places if place.storage == key]
            file.seek(storage.start)
            old = file.read(storage.size)
            if key in file_map.foreign or storage.dtype is None or len(old) < storage.size:
                raise ValueError(
                    f"the classifier of {name} is not stored as a plain tensor, so that rows cannot be written in place"
                )
            try:
                new, written = _edited(old, storage.dtype, own, name)
                _check_sharing(key, _walk(file_map.tree, set()), own, written, name)
            except RuntimeError as error:  # a view beyond its storage
                raise ValueError(f"{name} is damaged: {error}") from error
            changes.append(Change(storage.start, new))
            changes.extend(_checksums(file, storage, old, new))
    return changes


def copy_with(path: Path, file: IO[bytes], changes: Sequence[Change]) -> None:
    """Copy the file at ``path`` into ``file`` and write ``changes`` over it."""
    with path.open("rb") as source:
        shutil.copyfileobj(source, file, _BLOCK)
    for change in changes:
        file.seek(change.start)
        file.write(change.content)
    file.flush()


def check_copy(path: Path, copy: Path, changes: Sequence[Change]) -> int:
    """Read a copy back and check that it has ``changes``, and every other byte of the file at ``path``.

    Returns:
        How many bytes are those of the original.

    Raises:
        OSError: it does not: the disk or the original's file has changed meanwhile.
    """
    same = 0
    with path.open("rb") as source, copy.open("rb") as file:
        size = os.fstat(source.fileno()).st_size
        if os.fstat(file.fileno()).st_size != size:
            raise OSError(f"the copy of {path} has another size than the file: it was not written whole, or {path} has changed")
        position = 0
        for change in [*sorted(changes, key=lambda change: change.start), Change(size, b"")]:
            while position < change.start:
                length = min(_BLOCK, change.start - position)
                source.seek(position)
                file.seek(position)
                if source.read(length) != file.read(length):
                    raise OSError(f"the copy of {path} read back differently: the disk is at fault, or {path} has changed")
                position += length
                same += length
            file.seek(change.start)
            if file.read(len(change.content)) != change.content:
                raise OSError(f"the rows written into the copy of {path} read back differently: the disk is at fault")
            source.seek(change.start)
            before, after = (np.frombuffer(content, np.uint8) for content in (source.read(len(change.content)), change.content))
            same += int((before == after).sum())
            position = change.start + len(change.content)
    return same


def _edited(old: bytes, dtype: torch.dtype, own: Sequence[tuple[RowEdit, _Stored]], path: Path) -> tuple[bytes, Tensor]:
    """The storage with the new rows, and which of its elements they are."""
    new = bytearray(old)
    elements = torch.frombuffer(new, dtype=dtype)
    written = torch.zeros(elements.numel(), dtype=torch.bool, device="cpu")
    for edit, place in own:
        name = " / ".join(edit.key_path)
        if dtype != edit.expected.dtype or not _same_bits(place.view(elements), edit.expected):
            raise ValueError(f"{path} has changed since it was read: {name} is not as it was")
        positions = place.positions(edit.rows)
        if len(positions.unique()) < len(positions) or bool(written[positions].any()):
            raise ValueError(f"{name} of {path} stores one number for several rows, so that a row cannot be changed alone")
        written[positions] = True
    for edit, place in own:
        elements[place.positions(edit.rows)] = edit.values.flatten()
    return bytes(new), written


def _check_sharing(
    storage: str,
    tensors: Iterator[tuple[KeyPath, _Stored]],
    own: Sequence[tuple[RowEdit, _Stored]],
    written: Tensor,
    path: Path,
) -> None:
    ours = {place for _, place in own}
    names = " / ".join(own[0][0].key_path)
    for key_path, place in tensors:
        # The very same tensor under another name is the same parameter, and stays it.
        if place.storage == storage and place not in ours and bool(place.view(written).any()):
            raise ValueError(f"{' / '.join(key_path)} of {path} shares memory with {names}, and would change with its rows")


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def _checksums(file: IO[bytes], storage: _Storage, old: bytes, new: bytes) -> Iterator[Change]:
    """A zip archive's checksums of a storage, wherever the right one stands. (torch can be told to write none.)"""
    before, after = (zlib.crc32(content).to_bytes(4, "little") for content in (old, new))
    for place in storage.checksums:
        file.seek(place)
        if file.read(4) == before:
            yield Change(place, after)


# Where things are


def _map_file(path: Path, name: Path) -> _FileMap:
    """The file at ``path``; errors call it ``name``."""
    try:
        return (_map_safetensors if container(path) == "safetensors" else _map_zip)(path)
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is not laid out as torch.save lays out a checkpoint: {error}") from error


def _map_safetensors(path: Path) -> _FileMap:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    tree: dict[str, _Stored] = {}
    storages: dict[str, _Storage] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape = tuple(entry["shape"])
        start, end = entry["data_offsets"]
        storages[name] = _Storage(8 + length + start, end - start, _DTYPES.get(entry["dtype"]))
        tree[name] = _Stored(name, 0, shape, tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))))
    return _FileMap(tree, storages, set())


def _map_zip(path: Path) -> _FileMap:
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(entries) != len(archive.infolist()) or len(roots) != 1:
            raise zipfile.BadZipFile("two records of one name, or not one data.pkl")
        root = roots[0]
        order = entries.get(f"{root}byteorder")
        if order is not None and archive.read(order).decode() != sys.byteorder:
            raise ValueError(f"{path} has the byte order of another machine; load it and save it again with torch.save")
        outline = _Outline(archive.open(f"{root}data.pkl"))
        tree = outline.load()
        directory = dict(zip(entries, _directory_checksums(file, archive.start_dir, len(entries)), strict=True))
        storages: dict[str, _Storage] = {}
        for key, dtype in outline.storages.items():
            info = entries[f"{root}data/{key}"]
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise ValueError(f"{path} is compressed; load it and save it again with torch.save")
            start, checksums = _record(file, info)
            storages[key] = _Storage(start, info.file_size, dtype, [*checksums, directory[info.filename]])
    return _FileMap(tree, storages, outline.foreign)


def _record(file: IO[bytes], info: zipfile.ZipInfo) -> tuple[int, list[int]]:
    """Where a record's content begins, and where its checksums are beside it: in its header, or behind it."""
    file.seek(info.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no record at {info.header_offset}")
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    checksums = [info.header_offset + 14]
    if info.flag_bits & 8:
        end = start + info.file_size
        file.seek(end)
        checksums.append(end + 4 if file.read(4) == b"PK\x07\x08" else end)
    return start, checksums


def _directory_checksums(file: IO[bytes], start: int, entries: int) -> Iterator[int]:
    """Where the archive's directory, which begins at ``start``, has the checksum of each record."""
    for _ in range(entries):
        file.seek(start)
        header = file.read(46)
        if header[:4] != b"PK\x01\x02":
            raise zipfile.BadZipFile(f"no directory entry at {start}")
        yield start + 16
        start += 46 + sum(int.from_bytes(header[at : at + 2], "little") for at in (28, 30, 32))  # name, extra field, comment


def _walk(tree: Any, seen: set[int], trail: KeyPath = ()) -> Iterator[tuple[KeyPath, _Stored]]:
    """Every tensor, once, under the first of its names."""
    if isinstance(tree, _Stored):
        yield trail, tree
    elif isinstance(tree, (dict, list, tuple)) and id(tree) not in seen:
        seen.add(id(tree))
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _walk(value, seen, (*trail, key if isinstance(key, str) else repr(key)))


class _Anything:
    """Stands for every object that is no tensor and no plain container. Nothing that is done to it has an effect."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass


@dataclass(frozen=True)
class _StorageType:
    name: str


class _Outline(pickle.Unpickler):
    """Reads the structure of a checkpoint that torch's own reader has already accepted, for where its tensors are.

    No name in the pickle leads to any function or class of the process: the few known ones stand for themselves, all others for
    :class:`_Anything`.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, torch.dtype | None] = {}
        self._uses: Counter[str] = Counter()
        self._plain: Counter[str] = Counter()

    @property
    def foreign(self) -> set[str]:
        return {key for key, uses in self._uses.items() if uses != self._plain[key]}

    def find_class(self, module: str, name: str) -> Any:
        if name.endswith("Storage") and module.startswith("torch"):
            return _StorageType(name)
        known: dict[str, Any] = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": _first,
            "torch._utils._rebuild_parameter_with_state": _first,
            "torch._tensor._rebuild_from_type_v2": _rebuilt,
        }
        return known.get(f"{module}.{name}", _Anything)

    def persistent_load(self, identifier: Any) -> Any:
        if identifier[0] != "storage":
            return _Anything()
        kind, key = identifier[1], str(identifier[2])
        self.storages[key] = _DTYPES.get(kind.name) if isinstance(kind, _StorageType) else None
        self._uses[key] += 1
        return key

    def _tensor(self, storage: str, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any) -> _Stored:
        self._plain[storage] += 1
        return _Stored(storage, offset, tuple(shape), tuple(strides))


def _first(tensor: Any, *_: Any) -> Any:
    return tensor


def _rebuilt(function: Any, _: Any, arguments: Sequence[Any], __: Any) -> Any:
    return function(*arguments)
