"""Long-tailed problems as features, draw by draw: digits, QuickDraw-345, Caltech-101 and BANKING77, each with two classifiers.

``joint`` is trained in the plain way, ``crt`` with balanced classes. Digits and QuickDraw are those of ``bench/quickdraw.py``.
Of Caltech and BANKING77 a draw takes other samples for training, validation and test, and makes a quarter of the base classes
few. What was made is kept.

Caltech: Li, Andreeto, Ranzato, Perona, Caltech 101, CC BY 4.0; features of EfficientNet-Lite0 trained on ImageNet.
BANKING77: Casanueva et al., CC BY 4.0; features by TF-IDF of characters and truncated SVD.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from quickdraw import (
    PARTS,
    Problem,
    Settings,
    default_cache,
    digits_problem,
    load_problem,
    make_all,
    problem_path,
    retrain_classifier,
    save_problem,
)
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from alphaext import class_counts
from alphaext.utils.linear import make_linear

ATTRIBUTIONS = {
    "digits": "Digits: scikit-learn.",
    "quickdraw": "Drawings: Google's Quick, Draw! data set, CC BY 4.0.",
    "caltech": "Photographs: Li, Andreeto, Ranzato, Perona, Caltech 101, CC BY 4.0.",
    "banking": "Questions: Casanueva et al., BANKING77, CC BY 4.0.",
}
MANY_ABOVE = {"quickdraw": 40}
"""In QuickDraw no class has more than 80 training images; elsewhere the paper's threshold."""

FEW_BELOW = 20
_MADE_FEW = 4  # one base class in so many


def redraw(labels: Tensor, counts: Tensor, test: int, val: int, seed: int) -> dict[str, Tensor]:
    """Which samples serve for what: ``test`` and ``val`` of every class, and training samples by ``counts`` ``[N]``.

    A quarter of the base classes get as few training samples as a few class has, drawn from these.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = counts.clone()
    few, base = counts[counts < FEW_BELOW], (counts >= FEW_BELOW).nonzero()[:, 0]
    made_few = base[torch.randperm(len(base), generator=generator)[: len(base) // _MADE_FEW]]
    counts[made_few] = few[torch.randint(len(few), (len(made_few),), generator=generator)]
    parts: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for class_id, count in enumerate(counts.tolist()):
        own = (labels == class_id).nonzero()[:, 0]
        own = own[torch.randperm(len(own), generator=generator)]
        parts["test"].append(own[:test])
        parts["val"].append(own[test : test + val])
        parts["train"].append(own[test + val : test + val + count])
    return {part: torch.cat(indices) for part, indices in parts.items()}


def train_layer(features: Tensor, labels: Tensor, num_classes: int, seed: int, epochs: int = 30) -> nn.Linear:
    """A classifier trained on all samples alike: SGD, 64 samples a step, a cosine from 0.1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = nn.Linear(features.shape[1], num_classes)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(classifier(features[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    return classifier.requires_grad_(False)


def caltech_problem(folder: Path, seed: int) -> Problem:
    with np.load(folder / "caltech101lt" / "lite0_features.npz", allow_pickle=False) as arrays:
        of_parts = {part: torch.from_numpy(arrays[f"{part}_features"]).float() for part in PARTS}
        labels_of_parts = {part: torch.from_numpy(arrays[f"{part}_labels"]).long() for part in PARTS}
    names = (folder / "caltech101lt" / "classes.txt").read_text().splitlines()
    features, labels = torch.cat(list(of_parts.values())), torch.cat(list(labels_of_parts.values()))
    parts = redraw(labels, class_counts(labels_of_parts["train"], len(names)), test=12, val=6, seed=seed)
    inputs, targets = ({part: each[own] for part, own in parts.items()} for each in (features, labels))
    data = (inputs["train"], targets["train"], len(names), seed)
    classifiers = {"joint": train_layer(*data), "crt": retrain_classifier(*data, Settings())}
    return Problem("caltech", seed, names, class_counts(targets["train"], len(names)), inputs, targets, classifiers, 0.0)


def banking_problem(folder: Path, seed: int) -> Problem:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    data = json.loads((folder / "banking77lt.json").read_text())
    names = data["classes"]
    texts = [text for part in PARTS for text, _ in data[part]]
    labels = torch.tensor([label for part in PARTS for _, label in data[part]])
    parts = redraw(labels, class_counts([label for _, label in data["train"]], len(names)), test=40, val=10, seed=seed)
    words = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2)
    reduce = TruncatedSVD(300, random_state=seed)
    known = reduce.fit_transform(words.fit_transform([texts[index] for index in parts["train"]]))
    inputs = {"train": torch.from_numpy(known).float()}
    for part in ("val", "test"):
        inputs[part] = torch.from_numpy(reduce.transform(words.transform([texts[index] for index in parts[part]]))).float()
    targets = {part: labels[own] for part, own in parts.items()}
    classifiers = {}
    for name, weights in (("joint", None), ("crt", "balanced")):
        model = LogisticRegression(C=100, class_weight=weights, max_iter=500)
        model.fit(inputs["train"].numpy(), targets["train"].numpy())
        own = make_linear(torch.from_numpy(model.coef_).float(), torch.from_numpy(model.intercept_).float())
        classifiers[name] = own.requires_grad_(False)
    return Problem("banking", seed, names, class_counts(targets["train"], len(names)), inputs, targets, classifiers, 0.0)


def problem_of(name: str, seed: int, cache: Path | None = None) -> Problem:
    """A problem of one of the four sets, made from ``$ALPHAEXT_DATA`` unless it is kept."""
    cache = cache or default_cache()
    data = Path(os.environ.get("ALPHAEXT_DATA", ""))
    if name == "quickdraw":
        return load_problem(problem_path(cache, seed)) if problem_path(cache, seed).exists() else _quickdraw(seed, cache, data)
    path = cache / f"{name}-seed{seed}.npz"
    if not path.exists():
        makers = {
            "digits": lambda: digits_problem(seed),
            "caltech": lambda: caltech_problem(data, seed),
            "banking": lambda: banking_problem(data, seed),
        }
        save_problem(makers[name](), path)
    return load_problem(path)


def _quickdraw(seed: int, cache: Path, data: Path) -> Problem:
    return make_all([seed], cache, data, Console(stderr=True))[0]
