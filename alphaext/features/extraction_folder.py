"""The folder of an extraction from its start to its end: what it may hold, what is left to do, and joining the shards."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.filesize import decimal
from torch import Tensor

from ..utils.environment import versions
from ..utils.files import check_no_file, folder_lock, read_json, write_json
from .shards import (
    FORMAT,
    IDENTITY_FILE,
    PARTS_FOLDER,
    Shard,
    ShardPlan,
    read_identity,
    read_shard,
    remove_parts,
    shard_path,
    write_shard,
)
from .store import FEATURES_FILE, LABELS_FILE, SIDECAR_FILE, differences, printable, sidecar_of, write_array

# A network file system may show a file to another machine only after a while.
_SECONDS_TO_APPEAR = 60.0
_ROOM_TO_SPARE = 2**24


class ExtractionFolder:
    """A folder that features are, or shall be, extracted into.

    Args:
        path: of the folder.
        identity: all that the features depend on, as it comes back from JSON.
        plan: how the work is cut.
        skip_unreadable: whether shards and features may lack images.
        several: whether other machines may write into it too.
    """

    def __init__(self, path: Path, identity: dict[str, Any], plan: ShardPlan, *, skip_unreadable: bool, several: bool) -> None:
        self.path, self.identity, self.plan = path, identity, plan
        self.skip_unreadable, self.several = skip_unreadable, several
        self.width, self.dtype = int(identity["width"]), str(identity["dtype"])
        self._digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def start(self, held: ExitStack) -> dict[str, Any] | None:
        """Take the folder and find out what is left to do.

        Args:
            held: gets the folder's lock, where there is something left.

        Returns:
            The numbers of the ``missing`` shards, and how many images are ``done``; None where the folder is complete.

        Raises:
            ValueError: it holds something else, or another process works in it. Nothing in it has been touched then.
            OSError: the disk has too little room.
        """
        if self._is_complete():
            with suppress(OSError, ValueError):  # left over by a kill in the last moment; or in use by who is about to do it
                self._tidy_up()
            return None
        self._check_same_as_begun()
        self.path.mkdir(parents=True, exist_ok=True)
        held.enter_context(folder_lock(self.path, "features"))
        # Again: another process may have done it before the folder was ours.
        if self._is_complete():
            return None
        if not self._check_same_as_begun():
            write_json(self.path / IDENTITY_FILE, {"format": FORMAT, "identity": self.identity})
        (self.path / PARTS_FOLDER).mkdir(exist_ok=True)
        self._remove_temporaries()
        missing, done = [], 0
        for number in range(len(self.plan)):
            if self._is_done(number):
                done += len(self.plan.place(number).images)
            else:
                missing.append(number)
        self._check_room(done)
        return {"missing": missing, "done": done}

    def write(self, number: int, shard: Shard) -> None:
        """Write a shard, whole or not at all."""
        write_shard(shard_path(self.path, number), shard, self.plan.place(number), self._digest)

    def join(self, labels: Tensor, class_names: Sequence[str] | None) -> None:
        """Put the shards together, one in memory at a time, write the sidecar and remove the shards.

        Args:
            labels: of the images, int64 [m].
            class_names: of the classes, if they have names.

        Raises:
            ValueError: a shard is gone or damaged, or no image at all can be read.
            OSError: the disk is full.
        """
        shards = [self._shard(number, features=False) for number in range(len(self.plan))]
        # An image that could not be read in one pass is left out of all: the rows of each pass are the same images.
        unreadable = {image.index: image for shard in shards for image in shard.unreadable}
        left_out = [unreadable[index] for index in sorted(unreadable)]
        readable = np.ones(self.plan.num_images, dtype=bool)
        readable[[*unreadable]] = False
        if not readable.any():
            first = left_out[0]
            raise ValueError(f"none of the {len(readable)} images can be read; the first, {first.name!r}: {first.reason}")
        shape = (int(readable.sum()) * self.plan.passes, self.width)
        whole = (self._shard(number, features=True) for number in range(len(self.plan)))
        blocks = (shard.features[readable[shard.indices]] for shard in whole)
        digest = write_array(self.path / FEATURES_FILE, self.dtype, shape, blocks)
        write_array(self.path / LABELS_FILE, "int64", shape[:1], [labels.numpy()[readable]] * self.plan.passes)
        about = {
            **sidecar_of(self.path, shape, self.dtype, int(self.identity["num_classes"]), class_names, digest),
            **self.identity,
            "skipped": [
                {"index": image.index, "name": printable(image.name), "reason": printable(image.reason)} for image in left_out
            ],
            "device": ", ".join(sorted({shard.device for shard in shards} - {""})),
            "seconds": round(sum(shard.seconds for shard in shards), 3),
            "versions": versions("alphaext", "torch", "torchvision", "numpy", "python"),
        }
        write_json(self.path / SIDECAR_FILE, about)
        remove_parts(self.path)

    def _is_complete(self) -> bool:
        """Whether the folder holds just what is asked for. An error where it holds the features of something else."""
        if not (self.path / SIDECAR_FILE).exists():
            return False
        sidecar = read_json(self.path / SIDECAR_FILE, "the sidecar of cached features")
        found = differences(self.identity, {key: sidecar.get(key) for key in self.identity})
        if found:
            raise ValueError(self._refusal("holds other features", found))
        skipped = sidecar.get("skipped") or ()
        if skipped and not self.skip_unreadable:
            raise ValueError(
                f"folder {str(self.path)!r} holds these features without {len(skipped)} images that could not be read, such as "
                f"{skipped[0].get('name')!r}; set skip_unreadable=True, or remove the folder and start again"
            )
        return True

    def _check_same_as_begun(self) -> bool:
        """Whether the folder has begun just what is asked for. An error where it holds something else."""
        check_no_file(self.path, "folder")
        if (self.path / IDENTITY_FILE).exists():
            found = differences(self.identity, read_identity(self.path))
            if found:
                raise ValueError(self._refusal("has begun another extraction", found))
            return True
        inside = [entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")] if self.path.exists() else []
        if inside:
            raise ValueError(
                f"folder must be new, empty or an extraction's, but in {str(self.path)!r} there is {min(inside)!r}"
            )
        return False

    def _refusal(self, what: str, found: Sequence[str]) -> str:
        return f"folder {str(self.path)!r} {what}: {'; '.join(found)}. Choose another folder, or remove this one"

    def _is_done(self, number: int) -> bool:
        place, shape = self.plan.place(number), (self.width, self.dtype)
        try:
            shard = read_shard(shard_path(self.path, number), place, self._digest, shape)
        except (FileNotFoundError, ValueError):
            return False
        # Where images must not be left out, what was left out earlier is tried again.
        return self.skip_unreadable or not shard.unreadable

    def _shard(self, number: int, *, features: bool) -> Shard:
        path = shard_path(self.path, number)
        wait_for(path, several=self.several)
        try:
            return read_shard(path, self.plan.place(number), self._digest, (self.width, self.dtype), features=features)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"a shard was lost while the others were made ({error}); run the same extraction again") from error

    def _remove_temporaries(self) -> None:
        """Remove what a killed process was writing."""
        for temporary in [*self.path.glob(".*.tmp"), *(self.path / PARTS_FOLDER).glob(".*.tmp")]:
            temporary.unlink(missing_ok=True)

    def _tidy_up(self) -> None:
        if (self.path / PARTS_FOLDER).exists() or (self.path / IDENTITY_FILE).exists():
            with folder_lock(self.path, "features"):
                remove_parts(self.path)

    def _check_room(self, done: int) -> None:
        """Check that the disk takes the missing shards and, beside all shards, the joined features."""
        row, rows = self.width * np.dtype(self.dtype).itemsize, self.plan.num_images * self.plan.passes
        needed = (rows - done) * row + rows * (row + 8) + len(self.plan) * 4096 + _ROOM_TO_SPARE
        free = shutil.disk_usage(self.path).free
        if free < needed:
            half = ', or dtype="float16"' if self.dtype == "float32" else ""
            raise OSError(
                errno.ENOSPC,
                f"{decimal(needed)} of disk are needed while the features of {rows:,} images are written, and "
                f"{decimal(free)} are free: make room, or take another folder{half}",
                os.fspath(self.path),
            )


def wait_for(path: Path, *, several: bool) -> None:
    """Wait for a file that another machine has written; for one of this process's own there is nothing to wait for.

    Raises:
        FileNotFoundError: it did not appear.
    """
    end = time.monotonic() + _SECONDS_TO_APPEAR
    while several and not path.exists():
        if time.monotonic() > end:
            raise FileNotFoundError(
                f"{os.fspath(path)} was written by another process and cannot be seen by this one: folder must be on a file "
                "system that all processes share"
            )
        time.sleep(0.2)
        with suppress(OSError):
            os.listdir(path.parent)  # makes a network file system look again
