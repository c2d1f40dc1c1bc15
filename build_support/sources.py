"""The one list of kernel sources, csrc/sources.txt, which CMakeLists.txt reads too."""

from __future__ import annotations

from pathlib import Path


def read_sources(root: Path, suffix: str) -> list[str]:
    """The listed sources with this suffix (".cpp" or ".cu"), as paths relative to the repository's root."""
    listing = root / "csrc" / "sources.txt"
    names = []
    for line in listing.read_text(encoding="utf-8").splitlines():
        name = line.partition("#")[0].strip()
        if not name:
            continue
        if not name.endswith((".cpp", ".cu")):
            raise ValueError(f"{listing}: {name!r} must end in .cpp or .cu")
        if not (root / "csrc" / name).is_file():
            raise ValueError(f"{listing}: {name!r} is listed, but there is no such file under {listing.parent}")
        if name.endswith(suffix):
            names.append(f"csrc/{name}")
    return names
