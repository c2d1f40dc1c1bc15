"""The original of a repaired file, from what was kept beside it: the bytes that the repair changed."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..utils.files import PathLike, check_output_file, file_digest, open_file, whole_file
from .row_edits import Change, copy_with

_SUFFIX = ".undo.npz"


def undo_path(path: PathLike) -> Path:
    """Where the changed bytes of a repaired file are kept."""
    return Path(f"{os.fspath(path)}{_SUFFIX}")


def keep_changes(original: Path, copy: Path, changes: Sequence[Change], path: Path) -> None:
    """Write beside the file that is to become ``path``, now ``copy``, how the ``original`` comes out of it again."""
    arrays: dict[str, np.ndarray] = {"digests": np.array([file_digest(copy), file_digest(original)])}
    with open_file(original) as file:
        for number, change in enumerate(changes):
            file.seek(change.start)
            before, after = (np.frombuffer(part, np.uint8) for part in (file.read(len(change.content)), change.content))
            # What differs is little, and the rest is zeros, which take no room.
            arrays |= {f"start{number}": np.array(change.start), f"bits{number}": before ^ after}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    with whole_file(undo_path(path)) as kept:
        kept.write(content.getvalue())


def undo(path: PathLike, output: PathLike, *, overwrite: bool = False) -> int:
    """Write the original of a repaired file, the same to the last byte.

    Args:
        path: the file that ``export(..., keep_original=True)`` wrote; what was kept lies beside it, as ``path.undo.npz``.
        output: the new file.
        overwrite: replace a file that is there, be it ``path`` itself.

    Returns:
        How many bytes of the file are other than in the repaired one.

    Raises:
        FileNotFoundError: there is no such file, or nothing was kept beside it.
        ValueError: what was kept is damaged or of another file, or there is an output already; nothing is written then.
        OSError: the disk is full or fails.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from alphaext.checkpoints import export, read_checkpoint
        >>> folder = Path(tempfile.mkdtemp())
        >>> torch.save({"fc.weight": torch.ones(4, 8)}, folder / "model.pth")
        >>> checkpoint = read_checkpoint(folder / "model.pth")
        >>> linear = checkpoint.linear()
        >>> _ = linear.weight.data[3].mul_(2)
        >>> _ = export(checkpoint, linear, [3], folder / "repaired.pth", keep_original=True)
        >>> _ = undo(folder / "repaired.pth", folder / "again.pth")
        >>> (folder / "again.pth").read_bytes() == (folder / "model.pth").read_bytes()
        True
    """
    repaired, kept = Path(path), undo_path(path)
    for needed, what in ((repaired, "repaired file"), (kept, "original rows: export(..., keep_original=True) keeps them")):
        if not needed.exists():
            raise FileNotFoundError(f"there is no {os.fspath(needed)!r}, {what}")
    target = check_output_file(output, "output", overwrite=overwrite)
    try:
        with open_file(kept) as file, np.load(file, allow_pickle=False) as arrays:
            digests = [str(digest) for digest in arrays["digests"]]
            parts = [(int(arrays[f"start{number}"]), arrays[f"bits{number}"]) for number in range((len(arrays.files) - 1) // 2)]
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what NumPy and zipfile make of damaged bytes knows no limits
        raise ValueError(f"{kept} is damaged: {error}") from error
    if file_digest(repaired) != digests[0]:
        raise ValueError(f"{repaired} has changed since {kept} was written beside it")
    changes = []
    with open_file(repaired) as file:
        for start, bits in parts:
            file.seek(start)
            content = np.frombuffer(file.read(len(bits)), np.uint8) ^ bits
            changes.append(Change(start, content.tobytes(), int((bits != 0).sum())))
    with whole_file(target, overwrite=overwrite) as written:
        copy_with(repaired, written, changes)
        if file_digest(written.name) != digests[1]:
            raise ValueError(f"{kept} does not make the original of {repaired}; nothing was written")
    return sum(change.new for change in changes)
