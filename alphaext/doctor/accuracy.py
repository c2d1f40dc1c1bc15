"""Whether a trained network knows its images as they are transformed: its accuracy on a few hundred, beside chance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from ..data.images import ImageReadError, LabelledImages
from ..data.loading import Transform
from ..models.inference import for_cpu
from ..models.split import SplitModel
from ..utils.checks import check_integer
from ..utils.progress import task_bar
from ..utils.seeds import noise, seeded_generator
from ..utils.tensors import check_labels
from ..utils.text import percent
from .report import Finding, Level

_BATCH = 16
_SAMPLES_OF_OTHERS = 96  # each costs a pass through the network
_FIRST = 32  # of these
_FEWEST_GAINED = 10  # 2 ** -10 < _LEVEL: with fewer no other transform is better beyond chance
# Chance alone gives one such accuracy in so many.
_LEVEL = 0.001
# Of fewer samples a network that knows them well may by chance seem to know none; and small sets are often a first try.
_ENOUGH = 200


def at_chance(predicted: Tensor, labels: Tensor) -> tuple[float, float, bool]:
    """Accuracy, the accuracy that chance would have, and whether the one is no better than the other.

    Chance names as many samples after each class as the network does, in any order.

    Args:
        predicted: int64 ``[n]``, the class that each sample is taken for.
        labels: int64 ``[n]``.

    Example:
        >>> at_chance(torch.tensor([0, 1] * 20), torch.tensor([0, 1] * 20))
        (1.0, 0.5, False)
        >>> at_chance(torch.zeros(40, dtype=torch.int64), torch.tensor([0, 1] * 20))
        (0.5, 0.5, True)
    """
    predicted, labels = check_labels(predicted, None, "predicted").cpu(), check_labels(labels, None).cpu()
    num_classes = 1 + int(torch.cat([predicted, labels]).max())
    shares = [torch.bincount(ids, minlength=num_classes).double() / len(labels) for ids in (predicted, labels)]
    chance = float((shares[0] * shares[1]).sum())
    hits = int((predicted == labels).sum())
    bad = chance >= 1 - 1e-9 or binomtest(hits, len(labels), chance, alternative="greater").pvalue > _LEVEL
    return hits / len(labels), chance, bool(bad)


def chance_level(bad: bool, samples: int) -> Level:
    """How much it weighs that a network seems to be at chance: an error where so many samples say it, else a warning.

    Example:
        >>> chance_level(True, 256), chance_level(True, 20), chance_level(False, 256)
        ('error', 'warning', 'note')
    """
    if not bad:
        return "note"
    return "error" if samples >= _ENOUGH else "warning"


def check_accuracy(
    model: SplitModel,
    images: LabelledImages,
    transform: Transform,
    others: Mapping[str, Callable[[Any], Tensor]] | None = None,
    *,
    samples: int = 256,
    progress: bool | None = None,
) -> Finding:
    """Run some images through a trained network, and say its accuracy beside chance.

    Args:
        model: the network with its weights.
        images: labelled as the network counts.
        transform: of the images, as it will be used.
        others: likely ones, by their names, to say where one of them does better. They are tried only where the network
            misses so many images that one of them could.
        samples: how many images are drawn; always the same ones.
        progress: show a progress bar; None shows it where standard error is a terminal.

    Returns:
        A finding: an error where the network is no better than chance (a warning where there are few images), a warning where
        another transform is better beyond chance, else a note with the accuracy.

    Example:
        >>> import numpy
        >>> pixels = numpy.arange(2, dtype=numpy.uint8).repeat(20)[:, None, None] * numpy.full((8, 8), 200, numpy.uint8)
        >>> images = ArrayImages(pixels, [0] * 20 + [1] * 20, "mine.npz")
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> _ = network[1].weight.data.copy_(torch.tensor([[-1.0], [1.0]])), network[1].bias.data.zero_()
        >>> check_accuracy(split_model(network), images, small_test_transform(8, channels=1)).level
        'note'
    """
    samples = check_integer(samples, "samples", minimum=1)
    chosen = torch.randperm(len(images), generator=seeded_generator(0, len(images)), device="cpu")[:samples].tolist()
    loaded, labels = [], []
    for index in chosen:
        try:
            loaded.append(images.load(index))
        except ImageReadError:  # others say so
            continue
        labels.append(int(images.labels[index]))
    if not loaded:
        return Finding("warning", "no accuracy", f"none of {len(chosen)} {images.noun}s could be read")
    targets = torch.tensor(labels, device="cpu")
    some = loaded[:_SAMPLES_OF_OTHERS]
    if model.device.type == "cpu":
        model, _ = for_cpu(model, noise(2, *transform(loaded[0]).shape))
    with task_bar(progress, f"{images.noun}s through the network", total=len(loaded)) as report:
        predicted = _predicted(model, loaded, transform, report)
    usual = (predicted == targets)[: len(some)]
    tried = dict(others or {}) if int((~usual).sum()) >= _FEWEST_GAINED else {}
    hits = {}
    with task_bar(progress if tried else False, "other transforms", total=len(some) * len(tried)) as report:
        for name, each in tried.items():
            first = _predicted(model, some[:_FIRST], each, report) == targets[:_FIRST]
            if int(first.sum()) <= int(usual[:_FIRST].sum()):  # the rest would hardly make it better beyond chance
                report(len(some[_FIRST:]))
                continue
            rest = _predicted(model, some[_FIRST:], each, report) == targets[_FIRST : len(some)]
            hits[name] = torch.cat([first, rest])
    accuracy, chance, bad = at_chance(predicted, targets)
    said = f"of {len(loaded)} {images.noun}s the network knows {percent(accuracy)}%, where chance would know {percent(chance)}%"
    better = [name for name, each in hits.items() if _is_better(each, usual)]
    best = max(better, key=lambda name: int(hits[name].sum()), default=None)
    more = "" if best is None else f"; with {best} it knows {percent(float(hits[best].double().mean()))}% of {len(some)}"
    if bad:
        causes = (
            "the transform (image_size, mean, std) is another than in training, the classes are in another order, or the paths "
            "begin elsewhere"
        )
        if images.noun == "text":
            causes = "the tokenizer is another than in training, or the classes are in another order"
        level = chance_level(bad, len(loaded))
        return Finding(level, "the network is at chance level", f"{said}{more}: {causes}")
    if best is not None:
        return Finding("warning", "another transform does better", f"{said}{more}: it may be the one of the training")
    return Finding("note", f"the network knows its {images.noun}s", said)


def _predicted(model: SplitModel, images: list[Any], transform: Callable[[Any], Tensor], report: Callable[..., None]) -> Tensor:
    found = []
    for start in range(0, len(images), _BATCH):
        batch = torch.stack([transform(image) for image in images[start : start + _BATCH]])
        features = model.features(batch)
        layer = model.classifier
        with torch.no_grad():
            found.append(layer(features.to(layer.weight.dtype)).argmax(dim=1).cpu())
        report(len(batch))
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device="cpu")


def _is_better(one: Tensor, other: Tensor) -> bool:
    """Whether the first has more hits, by more than chance makes of the samples that only one of them hits."""
    gained, lost = int((one & ~other).sum()), int((other & ~one).sum())
    return gained > lost and binomtest(gained, gained + lost, alternative="greater").pvalue < _LEVEL
