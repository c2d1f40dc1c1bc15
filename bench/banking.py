"""Banking77, long-tailed: 77 kinds of bank customers' questions (Casanueva et al., CC BY 4.0), the examples' file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

Texts = dict[str, tuple[list[str], "np.ndarray[Any, Any]"]]


def read_banking() -> Texts:
    """Texts and labels of train, val and test."""
    path = Path(__file__).resolve().parents[1] / "docs" / "examples" / "banking77lt.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    return {
        part: ([text for text, _ in data[part]], np.array([label for _, label in data[part]]))
        for part in ("train", "val", "test")
    }


def draw(texts: Texts, seed: int) -> tuple[tuple[list[str], Any], tuple[list[str], Any]]:
    """As many questions of each class as the training list has, out of training and validation; and the test questions."""
    pool = [*texts["train"][0], *texts["val"][0]]
    labels = np.concatenate([texts["train"][1], texts["val"][1]])
    random, chosen = np.random.default_rng(seed), []
    for label, count in enumerate(np.bincount(texts["train"][1])):
        chosen.append(random.permutation(np.flatnonzero(labels == label))[:count])
    indices = random.permutation(np.concatenate(chosen))
    return ([pool[index] for index in indices], labels[indices]), texts["test"]
