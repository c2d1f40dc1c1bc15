"""Copies of a checkpoint in which some rows of tensors differ and no other byte.

To load a checkpoint and save it again would lose what the loaded objects do not show: the devices that tensors were saved from,
views that share memory, the order and kind of containers, whatever else a later torch writes in another way. Here the file
itself is copied, and the numbers of the rows are written where they are (with the checksums of a zip archive, which are of
those numbers).
"""

from __future__ import annotations

import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from .files import StandIn, container, read_payload, record_start
from .layouts import KeyPath, tensor_at

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
    """What has to be written over a copy of a file: where it begins, the bytes there, and how many of them are new."""

    start: int
    content: bytes
    new: int


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
    payload = read_payload(path)
    if payload.fixed:
        raise ValueError(f"{name} {payload.fixed}; load it and save it again with torch.save")
    places = [(edit, _find(payload.content, edit, name)) for edit in edits]
    changes: list[Change] = []
    for storage in dict.fromkeys(_address(tensor) for _, tensor in places):
        own = [(edit, tensor) for edit, tensor in places if _address(tensor) == storage]
        old = torch.empty(0, dtype=own[0][1].dtype, device="cpu").set_(own[0][1].untyped_storage())
        new, written = _edited(old, own, name)
        others = ((key_path, tensor) for key_path, tensor in _walk(payload.content) if _address(tensor) == storage)
        _check_sharing(others, own, written, name)
        before, after = (numbers.view(torch.uint8).numpy() for numbers in (old, new))
        changes.append(Change(payload.places[storage], after.tobytes(), int((before != after).sum())))
        if container(path) == "zip":
            changes.extend(_checksums(path, payload.places[storage], before.tobytes(), after.tobytes()))
    return changes


def _find(content: Any, edit: RowEdit, path: Path) -> Tensor:
    try:
        tensor = tensor_at(content, edit.key_path)
    except (KeyError, TypeError, AssertionError):
        tensor = torch.empty(0, device="cpu")
    if tensor.dtype != edit.expected.dtype or tensor.shape != edit.expected.shape or not _same_bits(tensor, edit.expected):
        raise ValueError(f"{path} has changed since it was read: {' / '.join(edit.key_path)} is not as it was")
    return tensor


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
    differing = 0
    with path.open("rb") as source, copy.open("rb") as file:
        if os.fstat(source.fileno()).st_size != os.fstat(file.fileno()).st_size:
            raise OSError(f"the copy of {path} has another size than the file: it was not written whole, or {path} has changed")
        while block := source.read(_BLOCK):
            before, after = (np.frombuffer(content, np.uint8) for content in (block, file.read(len(block))))
            differing += int((before != after).sum())
        for change in changes:
            file.seek(change.start)
            if file.read(len(change.content)) != change.content:
                raise OSError(f"the rows written into the copy of {path} read back differently: the disk is at fault")
        if differing != sum(change.new for change in changes):
            raise OSError(f"the copy of {path} read back differently: the disk is at fault, or {path} has changed")
        return os.fstat(file.fileno()).st_size - differing


def _edited(old: Tensor, own: Sequence[tuple[RowEdit, Tensor]], path: Path) -> tuple[Tensor, Tensor]:
    """The numbers of a storage with the new rows, and which of them these are."""
    new, written = old.clone(), torch.zeros(len(old), dtype=torch.bool, device="cpu")
    for edit, tensor in own:
        # Where the numbers of the rows are in the storage, in the order of the rows' elements.
        positions = int(tensor.storage_offset()) + edit.rows * tensor.stride(0)
        for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True):
            positions = positions[..., None] + torch.arange(size, device="cpu") * stride
        if len(positions.unique()) < positions.numel() or bool(written[positions].any()):
            name = " / ".join(edit.key_path)
            raise ValueError(f"{name} of {path} stores one number for several rows, so that a row cannot be changed alone")
        written[positions] = True
        new[positions] = edit.values
    return new, written


def _check_sharing(
    tensors: Iterator[tuple[KeyPath, Tensor]], own: Sequence[tuple[RowEdit, Tensor]], written: Tensor, path: Path
) -> None:
    # The very same tensor under another name is the same parameter, and stays it.
    ours = {_view(tensor) for _, tensor in own}
    names = " / ".join(own[0][0].key_path)
    for key_path, tensor in tensors:
        if _view(tensor) not in ours and bool(written.as_strided(*_view(tensor)).any()):
            raise ValueError(f"{' / '.join(key_path)} of {path} shares memory with {names}, and would change with its rows")


def _view(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], int]:
    return tensor.shape, tensor.stride(), int(tensor.storage_offset())


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def _checksums(path: Path, start: int, old: bytes, new: bytes) -> Iterator[Change]:
    """A zip archive's checksums of the record that begins at ``start``, wherever the right one stands."""
    before, after = (zlib.crc32(content).to_bytes(4, "little") for content in (old, new))
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        header = archive.start_dir
        for info in archive.infolist():  # in the order of the archive's directory
            if record_start(file, info) == start:
                # In the directory, in the record's header, and behind the record, with or without a mark before it.
                for place in (header + 16, info.header_offset + 14, start + len(old), start + len(old) + 4):
                    file.seek(place)
                    if file.read(4) == before:
                        yield Change(place, after, sum(a != b for a, b in zip(before, after, strict=True)))
            file.seek(header + 28)
            lengths = file.read(6)  # of the name, the extra field and the comment
            header += 46 + sum(int.from_bytes(lengths[at : at + 2], "little") for at in (0, 2, 4))


def _walk(content: Any) -> Iterator[tuple[KeyPath, Tensor]]:
    """Every dense tensor, once, under the first of its names."""
    seen: set[int] = set()
    waiting: list[tuple[KeyPath, Any]] = [((), content)]
    while waiting:
        trail, value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.layout == torch.strided:
                yield trail, value
            continue
        if isinstance(value, StandIn):
            value = value.held
        inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (list, tuple)) else ()
        waiting.extend(((*trail, key if isinstance(key, str) else repr(key)), each) for key, each in reversed(list(inner)))
