"""The baselines by name, and their options."""

from __future__ import annotations

BASELINES = {
    "ncm": "nearest class mean: no training, the mean features are the classifier (Kang et al., ICLR 2020)",
    "tau": "tau-normalisation: each row divided by a power of its length (Kang et al., ICLR 2020)",
    "crt": "classifier re-training: a new linear layer, class-balanced samples, frozen features (Kang et al., ICLR 2020)",
    "lws": "learnable weight scaling: a factor a class, class-balanced samples (Kang et al., ICLR 2020)",
    "logit-adjustment": "post-hoc logit adjustment: each logit less the log of its class's share (Menon et al., ICLR 2021)",
    "few-bias": "one constant added to the logits of all few classes",
    "discriminant": "shrunk linear discriminant: no training, few means composed with their neighbours'",
    "average": "weighted sum of the trained classifier and another, by default the discriminant, and a constant on few logits",
}
"""The baselines of :func:`alphaext.baselines.run_baseline`."""

_OF_RETRAINING = (
    "epochs",
    "batch_size",
    "lr",
    "momentum",
    "weight_decay",
    "images_per_class",
    "seed",
    "device",
    "checkpoint",
    "progress",
)

BASELINE_OPTIONS: dict[str, tuple[str, ...]] = {
    "ncm": ("metric", "center", "normalize"),
    "tau": ("tau", "taus", "keep_bias"),
    "crt": (*_OF_RETRAINING, "bias"),
    "lws": _OF_RETRAINING,
    "logit-adjustment": ("tau", "taus"),
    "few-bias": ("offset", "offsets"),
    "discriminant": ("tau", "top_k", "compose", "shrinkage"),
    "average": ("other",),
}
"""The options of each baseline's own."""

_OF_IMAGENET_LT = {"batch_size": 512, "lr": 0.2, "momentum": 0.9, "weight_decay": 5e-4, "images_per_class": 4}

_OF_PLACES_LT = {"batch_size": 256, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "images_per_class": 4}

_OF_INATURALIST = {"batch_size": 512, "lr": 0.2, "momentum": 0.9, "weight_decay": 1e-4, "images_per_class": 4}

RETRAINING_PRESETS: dict[str, dict[str, dict[str, float]]] = {
    "imagenet-lt": {"crt": {"epochs": 10, **_OF_IMAGENET_LT}, "lws": {"epochs": 5, **_OF_IMAGENET_LT}},
    "places-lt": {"crt": {"epochs": 10, **_OF_PLACES_LT}, "lws": {"epochs": 5, **_OF_PLACES_LT}},
    "inaturalist18": {"crt": {"epochs": 30, **_OF_INATURALIST}, "lws": {"epochs": 5, **_OF_INATURALIST}},
}
"""The options of :func:`alphaext.baselines.crt` and :func:`alphaext.baselines.lws` in Kang et al.'s
configurations, by data set and baseline."""
