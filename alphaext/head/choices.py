"""The forms that a head can have, by name."""

from __future__ import annotations

POOLS = ("base", "many", "all")

METRICS = ("euclidean", "cosine", "random")

INITS = ("identity", "default")

FIRST_LAYERS = ("dense", "factored")

COEFFICIENTS = ("mlp", "direct")
