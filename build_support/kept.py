"""Libraries of earlier builds of the same text by the same tools, in build/kept/: what is there is not compiled again.

Without this, `pip install .` and `pip install -e .` of one checkout would compile everything twice: each builds in a folder of
its own and, in isolation, against headers in a folder of its own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

FOLDERS = ("csrc", "build_support")
MOST = 4


def fingerprint(root: Path, tools: Iterable[str]) -> str:
    """Of everything that a library depends on: setup.py, each file of FOLDERS, and `tools`, in words."""
    files = [root / "setup.py", *(path for folder in FOLDERS for path in sorted((root / folder).rglob("*")))]
    digest = hashlib.sha256("\n".join(tools).encode())
    for path in files:
        if path.is_file() and path.suffix != ".pyc":
            digest.update(f"\n{path.relative_to(root)} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def place(root: Path, name: str) -> Path:
    """Where the library with this fingerprint is kept, if it is."""
    return root / "build" / "kept" / f"{name}.so"


def keep(library: Path, kept: Path) -> None:
    """Keep a library, and forget all but the last few."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_suffix(f".{os.getpid()}.tmp")
    shutil.copyfile(library, temporary)
    temporary.replace(kept)
    for old in sorted(kept.parent.glob("*.so"), key=lambda path: path.stat().st_mtime, reverse=True)[MOST:]:
        old.unlink(missing_ok=True)
