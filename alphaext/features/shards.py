"""The shards of an extraction that is under way: which images each holds, and its file in the folder ``parts``.

A shard is some whole batches of one pass over the images. Which images are in which batch depends on the number of images and
on the batch size alone, so that the features come out the same, to the bit, whoever computes a shard and after whatever
interruption.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.loading import Batch
from ..utils.checks import check_integer
from ..utils.files import open_file, read_json, whole_file

PARTS_FOLDER = "parts"
IDENTITY_FILE = "extraction.json"

# What a kill can lose: seconds of work on a GPU, minutes on a CPU. Enough for a file each: ImageNet makes 5,000.
IMAGES_PER_SHARD = 256

FORMAT = "alphaext extraction 1"

_MOST = 10**12  # images, passes, or images a batch; beyond it, a note is damaged


@dataclass(frozen=True)
class ShardPlan:
    """How the work is cut: ``len(plan)`` shards of whole batches, the last of each pass being smaller.

    Example:
        >>> plan = ShardPlan(num_images=10, passes=2, batch_size=3, images_per_shard=6)
        >>> len(plan), plan.batches(1)
        (4, [Batch(pass_number=0, images=range(6, 9)), Batch(pass_number=0, images=range(9, 10))])
    """

    num_images: int
    passes: int
    batch_size: int
    images_per_shard: int

    @classmethod
    def of(cls, num_images: int, passes: int, batch_size: int) -> ShardPlan:
        """The plan of an extraction, with shards of some hundred images, but of one batch at least."""
        return cls(num_images, passes, batch_size, batch_size * max(1, IMAGES_PER_SHARD // batch_size))

    def __len__(self) -> int:
        return self._shards_per_pass * self.passes

    def place(self, number: int) -> Batch:
        """The pass and the images of shard ``number``."""
        pass_number, place = divmod(number, self._shards_per_pass)
        start = place * self.images_per_shard
        return Batch(pass_number, range(start, min(start + self.images_per_shard, self.num_images)))

    def batches(self, number: int) -> list[Batch]:
        """The batches of shard ``number``, in order."""
        shard = self.place(number)
        starts = range(0, len(shard.images), self.batch_size)
        return [Batch(shard.pass_number, shard.images[start : start + self.batch_size]) for start in starts]

    @property
    def _shards_per_pass(self) -> int:
        return math.ceil(self.num_images / self.images_per_shard)


@dataclass(frozen=True)
class Unreadable:
    """An image that was left out: its index, its name, and why it could not be read."""

    index: int
    name: str
    reason: str


@dataclass(frozen=True)
class Shard:
    """What a shard's file holds.

    Attributes:
        features: ``[k, D]``, of the images that could be read.
        indices: int64 ``[k]``, ascending, which images they are.
        unreadable: the other images of the shard.
        seconds: that the shard took.
        device: that it was computed on.
    """

    features: npt.NDArray[Any]
    indices: npt.NDArray[np.int64]
    unreadable: tuple[Unreadable, ...]
    seconds: float
    device: str


def shard_path(folder: Path, number: int) -> Path:
    """The file of shard ``number`` of the extraction into ``folder``."""
    return folder / PARTS_FOLDER / f"{number:06d}.npz"


def write_shard(path: Path, shard: Shard, place: Batch, identity: str) -> None:
    """Write a shard's file, whole or not at all; ``identity`` is the digest of what is extracted.

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    about = {
        "identity": identity,
        "place": _as_list(place),
        "unreadable": [[image.index, image.name, image.reason] for image in shard.unreadable],
        "seconds": shard.seconds,
        "device": shard.device,
    }
    # In memory first: a ZipFile whose disk is full cannot be closed in peace.
    content = io.BytesIO()
    text = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    np.savez(content, features=shard.features, indices=shard.indices, about=text)
    with whole_file(path) as file:
        file.write(content.getbuffer())


def read_shard(path: Path, place: Batch, identity: str, shape: tuple[int, str], *, features: bool = True) -> Shard:
    """Read a shard's file.

    Args:
        path: the file.
        place: the pass and the images that it must hold.
        identity: the digest of what is extracted.
        shape: the width of the features and their dtype.
        features: whether they are wanted; without, only their place is read, and ``features`` has no rows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or the shard of another extraction.
    """
    width, dtype = shape
    try:
        with open_file(path) as file, np.load(file, allow_pickle=False) as archive:
            _check_sizes(archive.zip)
            about = json.loads(archive["about"].tobytes())
            shard = Shard(
                archive["features"] if features else np.empty((0, width), dtype),
                archive["indices"],
                tuple(Unreadable(int(index), str(name), str(reason)) for index, name, reason in about["unreadable"]),
                float(about["seconds"]),
                str(about["device"]),
            )
            same = about["identity"] == identity and about["place"] == _as_list(place)
            present = sorted([*shard.indices.tolist(), *(image.index for image in shard.unreadable)])
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # what NumPy and zipfile make of damaged bytes knows no limits
        raise ValueError(f"{os.fspath(path)} is damaged: {type(error).__name__}: {error}") from error
    if not same:
        raise ValueError(f"{os.fspath(path)} belongs to another extraction")
    rows = len(shard.indices) if features else 0
    of_others = present != list(place.images) or shard.indices.dtype != np.int64
    if of_others or shard.features.shape != (rows, width) or shard.features.dtype != dtype:
        raise ValueError(f"{os.fspath(path)} does not hold the features of its images")
    return shard


def _check_sizes(archive: zipfile.ZipFile) -> None:
    """Check that arrays are as large as their headers say, for NumPy takes the memory before it reads."""
    for member in archive.infolist():
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            said, there = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
        if said != there:
            raise ValueError(f"{member.filename} has {there} bytes, not the {said} of its header")


def read_identity(folder: Path) -> dict[str, Any]:
    """What is being extracted into ``folder``.

    Raises:
        FileNotFoundError: nothing is.
        ValueError: the note is damaged, or of another version.
    """
    path = folder / IDENTITY_FILE
    noted = read_json(path, "the note of an extraction")
    identity = noted.get("identity")
    if noted.get("format") != FORMAT or not isinstance(identity, dict):
        raise ValueError(f"{os.fspath(path)} is not the note of an extraction of this version ({FORMAT!r})")
    return identity


def count_done(folder: Path) -> tuple[int, int, int]:
    """How far the extraction into ``folder`` is: images that are done, counted in each pass; images in all; passes.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_identity`.
    """
    identity = read_identity(folder)
    try:
        numbers = [check_integer(identity[name], name, 1, _MOST) for name in ("num_images", "passes", "batch_size")]
        plan = ShardPlan.of(*numbers)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(folder / IDENTITY_FILE)} is not the note of an extraction: {error}") from error
    present = {path.stem for path in (folder / PARTS_FOLDER).glob("*.npz")}
    numbered = (int(stem) for stem in present if stem.isascii() and stem.isdecimal())
    done = sum(len(plan.place(number).images) for number in numbered if number < len(plan))
    return done, plan.num_images, plan.passes


def remove_parts(folder: Path) -> None:
    """Remove the shards and the note: the features have been joined."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder / PARTS_FOLDER)
    (folder / IDENTITY_FILE).unlink(missing_ok=True)


def _as_list(place: Batch) -> list[int]:
    return [place.pass_number, place.images.start, place.images.stop]
