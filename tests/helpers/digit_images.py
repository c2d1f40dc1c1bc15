"""scikit-learn's digits as image files in list format, long-tailed: real images for tests from end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

# Training images of each digit: 3 many (above 60), 4 medium, 3 few (below 12).
TRAIN_COUNTS = (8, 90, 6, 80, 40, 30, 9, 70, 25, 20)
VAL_PER_CLASS, TEST_PER_CLASS = 8, 20


def write_digits(folder: Path) -> dict[str, Path]:
    """Write 8x8 PNG files, as ``train/3/0012.png``, and lists of them; returns those by part: train, val, test."""
    digits = load_digits()
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for digit, count in enumerate(TRAIN_COUNTS):
        indices = np.flatnonzero(digits.target == digit)
        ends = np.cumsum([TEST_PER_CLASS, VAL_PER_CLASS, count])
        for part, chosen in zip(("test", "val", "train"), np.split(indices[: ends[-1]], ends[:-1]), strict=True):
            (folder / part / str(digit)).mkdir(parents=True)
            for index in chosen.tolist():
                name = f"{part}/{digit}/{index:04d}.png"
                Image.fromarray((digits.images[index] * 15.9).astype(np.uint8)).save(folder / name)
                lines[part].append(f"{name} {digit}\n")
    for part, entries in lines.items():
        (folder / f"{part}.txt").write_text("".join(entries))
    return {part: folder / f"{part}.txt" for part in lines}
