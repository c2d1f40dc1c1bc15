"""Checksums of cached features, one a row: whoever reads some rows checks these, and names what is damaged."""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..utils.checks import format_ids

_BLOCK_BYTES = 2**20  # stays in cache where rows are gathered
_SUMMED_BYTES, _SUMMED_ROW = 2**20, 2**15


def checksum(array: npt.NDArray[Any]) -> str:
    """The checksum of labels, of rows' sums, and of whole features of earlier releases: the CRC-32 of sums, over each MiB, of
    every 4,096th word of 64 bits.

    Changed, missing, foreign and shifted bytes change it; it is no protection against somebody who means it.
    """
    content = array.reshape(-1).view(np.uint8)
    found = 0
    for start in range(0, len(content), _SUMMED_BYTES):
        block = content[start : start + _SUMMED_BYTES]
        words = block[: len(block) // _SUMMED_ROW * _SUMMED_ROW].view(np.uint64).reshape(-1, _SUMMED_ROW // 8)
        found = zlib.crc32(words.sum(0).tobytes() + block[words.nbytes :].tobytes(), found)
    return f"{found:08x}"


def compare(path: str, noted: str, array: npt.NDArray[Any]) -> None:
    """Compare the checksum of all that is in a file with the one that was noted.

    Raises:
        ValueError: it has changed; the file is named.
    """
    seen = checksum(array)
    if seen != noted:
        raise ValueError(f"{path!r} is damaged: its content has changed since it was written (checksum {seen}, not {noted})")


def row_sums(rows: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """A sum for each of some rows ``[n, D]``, uint64 ``[n]``: of its words, each times an odd number of its place, modulo 2^64.

    One changed word always changes it. The words are the largest that a row is whole ones of; NumPy sums those of 64 bits at
    the speed of memory.

    Example:
        >>> first, second, third = row_sums(np.array([[1, 2, 3, 4], [1, 2, 3, 4], [3, 4, 1, 2]], np.float32))
        >>> bool(first == second), bool(first == third)
        (True, False)
    """
    row_bytes = rows.shape[1] * rows.dtype.itemsize
    size = next(size for size in (8, 4, 2) if row_bytes % size == 0)
    weights = _weights(row_bytes // size)
    step, sums = _block_rows(row_bytes), np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), step):
        words = np.ascontiguousarray(rows[start : start + step]).view(f"<u{size}")
        np.einsum("ij,j->i", words, weights, out=sums[start : start + step])
    return sums


class RowSums:
    """The sums that were noted of rows; called, it compares rows with them, each row once.

    Args:
        path: of the file that the rows are of.
        noted: uint64 ``[n]``, as :func:`row_sums` gave them.
    """

    def __init__(self, path: str, noted: npt.NDArray[np.uint64]) -> None:
        self._path, self._noted = path, noted
        self._open = np.ones(len(noted), dtype=bool)
        self._done = False

    def __call__(self, features: npt.NDArray[Any], indices: Tensor | None = None, rows: Tensor | None = None) -> None:
        """Compare the rows ``indices`` of ``features`` ``[n, D]``, or all.

        Args:
            features: all rows.
            indices: int64 ``[k]``.
            rows: ``[k, D]``, the same rows where they have been gathered, and are in cache.

        Raises:
            ValueError: some have changed since they were written; the file and the rows are named.
        """
        if self._done:
            return
        every = np.asarray(features)
        if indices is None:
            bad = np.flatnonzero(row_sums(every) != self._noted)
            self._done = not len(bad)
        else:
            ids = indices.cpu().numpy()
            fresh = self._open[ids]
            if not fresh.any():
                return
            if rows is not None and 3 * fresh.sum() > len(ids):  # to gather fewer anew takes longer
                bad = ids[row_sums(rows.numpy()) != self._noted[ids]]
            else:
                ids = ids[fresh]
                step = _block_rows(every.shape[1] * every.dtype.itemsize)
                parts = [ids[start : start + step] for start in range(0, len(ids), step)]
                bad = np.concatenate([ids[:0], *(part[row_sums(every[part]) != self._noted[part]] for part in parts)])
            bad = np.unique(bad)
            self._open[ids] = False
        if len(bad):
            self._open[:] = True
            first, last = int(bad[0]), int(bad[-1])
            in_a_row = len(bad) > 2 and last - first == len(bad) - 1
            which = f"{first} to {last}" if in_a_row else format_ids(bad.tolist())
            raise ValueError(
                f"{self._path!r} is damaged: its content has changed since it was written, of {len(every)} rows {which}"
            )


class WholeSum:
    """One checksum of all rows, as earlier releases noted it; called, it compares all rows with it, once, and some never."""

    def __init__(self, path: str, noted: str) -> None:
        self._path, self._noted = path, noted
        self._done = False

    def __call__(self, features: npt.NDArray[Any], indices: Tensor | None = None, rows: Tensor | None = None) -> None:
        """As :class:`RowSums`."""
        if indices is None and not self._done:
            compare(self._path, self._noted, features)
            self._done = True


def _block_rows(row_bytes: int) -> int:
    return max(1, _BLOCK_BYTES // row_bytes)


@lru_cache(maxsize=8)
def _weights(count: int) -> npt.NDArray[np.uint64]:
    """Odd numbers that nothing is known to repeat in: the bits of 1, 2, ... mixed as SplitMix64 does."""
    mixed = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)
