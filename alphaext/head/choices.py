"""The forms that a head can have, by name."""

from __future__ import annotations

RULES = ("clamp", "softmax", "l1")
LEARNED_COEFFICIENTS = ("mlp", "direct")
COEFFICIENTS = (*LEARNED_COEFFICIENTS, "closed-form")
INITS = ("identity", "default")
FIRST_LAYERS = ("dense", "factored")
POOLS = ("base", "many", "all")
METRICS = ("euclidean", "cosine", "random")
