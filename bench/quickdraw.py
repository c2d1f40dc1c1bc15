"""Trained models on long-tailed data, kept as features: what studies of the method need and take minutes to train.

    python bench/quickdraw.py --seeds 0 1 2 --cache DIRECTORY

makes a long-tailed problem of 345 classes from ``$ALPHAEXT_DATA/quickdraw345.npz`` for each seed, trains a small convolutional
network on it (the "joint" classifier), then a new classifier on its frozen features with class-balanced samples ("crt": Kang et
al., Decoupling representation and classifier, ICLR 2020), and writes one file a seed. Seeds whose file is there are not trained
again. :func:`load_problem` reads a file; :func:`digits_problem` makes the same of the demonstration's digits, in a second.

Which drawing serves for what. Of the 100 drawings of a class, 20 are its test images and ``int(80 * (5 / 80) ** (i / 344))``
its training images, ``i`` being the class's place in an order shuffled by the seed: 80 down to 5, 9,181 in all. So 172 of the
classes are few, 173 medium, and none is many. Choices (of an epoch, of a gamma) need images that are neither: they are taken
from those that the long tail leaves unused, 10 a class. The 15 most frequent classes have fewer left, the first one none. So
test and training images are exactly as prescribed and every few class has all its validation images, but the accuracy over all
validation images (3,371 in place of 3,450) counts those base classes less. Nothing is ever chosen on test images.

Results are the same to the bit for the same seed, machine, number of threads and version of torch.

The drawings are from Google's Quick, Draw! data set, https://quickdraw.withgoogle.com/data, CC BY 4.0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from alphaext import class_counts, split_classes
from alphaext.commands import demonstration as demo
from alphaext.metrics import split_accuracy

ATTRIBUTION = "Drawings: Google's Quick, Draw! data set, CC BY 4.0."
PARTS = ("train", "val", "test")
CLASSIFIERS = ("joint", "crt")
FEATURES = 192
SPLITS = ("few", "medium", "many", "all")


@dataclass(frozen=True)
class Settings:
    """Everything but the seed that a file of features depends on; it is kept in the file."""

    test_per_class: int = 20
    val_per_class: int = 10
    most: int = 80
    fewest: int = 5
    epochs: int = 45
    batch_size: int = 64
    lr: float = 1e-2
    weight_decay: float = 0.02
    crt_epochs: int = 15
    crt_lr: float = 0.1
    crt_weight_decay: float = 5e-4


@dataclass
class Problem:
    """A long-tailed problem as a classifier's last layer sees it.

    Attributes:
        name: of the data set.
        seed: of the class order, the images of each part, and the training.
        class_names: of each class, in order of its id.
        counts: ``[N]`` int64, training images of each class.
        features: ``[n, D]`` float32 under "train", "val" and "test".
        labels: ``[n]`` int64 under the same.
        classifiers: under "joint", trained with the network; under "crt", trained on its features with balanced classes.
        seconds: that the training took.
    """

    name: str
    seed: int
    class_names: list[str]
    counts: Tensor
    features: dict[str, Tensor]
    labels: dict[str, Tensor]
    classifiers: dict[str, nn.Linear]
    seconds: float

    @torch.no_grad()
    def accuracy(self, classifier: str, part: str) -> dict[str, float]:
        """Top-1 accuracy of few / medium / many / all, fractions of 1; nan for a split without classes."""
        logits = self.classifiers[classifier](self.features[part])
        return split_accuracy(logits, self.labels[part], split_classes(self.counts))


def long_tailed_counts(num_classes: int, most: int = 80, fewest: int = 5) -> list[int]:
    """Training images by rank: falling exponentially from ``most`` to ``fewest``, rounded down."""
    if not 1 <= fewest <= most:
        raise ValueError(f"fewest must be between 1 and most = {most}, got {fewest}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    return [int(most * (fewest / most) ** (rank / (num_classes - 1))) for rank in range(num_classes)]


def split_images(
    labels: Tensor, counts: Sequence[int], test_per_class: int, val_per_class: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw which class has which rank and which image serves for what.

    Args:
        labels: ``[n]`` int64, class of each image.
        counts: training images by rank, one entry a class.
        test_per_class: test images of every class.
        val_per_class: validation images of every class, or what is left after test and training.
        generator: of the draws.

    Returns:
        Indices into ``labels`` under "train", "val" and "test"; no index is in two parts.

    Raises:
        ValueError: a class with fewer images than its test and training images together.
    """
    parts: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for count, class_id in zip(counts, torch.randperm(len(counts), generator=generator).tolist(), strict=True):
        images = (labels == class_id).nonzero().flatten()
        if len(images) < test_per_class + count:
            raise ValueError(
                f"class {class_id} must have {test_per_class} test and {count} training images, but has {len(images)} in all"
            )
        images = images[torch.randperm(len(images), generator=generator)]
        test, train, rest = images.split([test_per_class, count, len(images) - test_per_class - count])
        for part, indices in (("train", train), ("val", rest[:val_per_class]), ("test", test)):
            parts[part].append(indices)
    return {part: torch.cat(indices) for part, indices in parts.items()}


def load_drawings(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """The drawings of ``quickdraw345.npz``: images ``[n, 1, 28, 28]`` in 0..1, labels ``[n]``, names of the classes."""
    with np.load(folder / "quickdraw345.npz", allow_pickle=False) as arrays:
        images, labels, names = arrays["x"], arrays["y"], arrays["names"]
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise ValueError(f"quickdraw345.npz must have x [n, 28, 28] and y [n], got {images.shape} and {labels.shape}")
    return torch.from_numpy(images).unsqueeze(1) / 255, torch.from_numpy(labels).to(torch.int64), names.tolist()


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def make_backbone() -> nn.Sequential:
    """Four convolutions, 28 x 28 to 4 x 4, and the mean over positions: ``FEATURES`` features."""
    return nn.Sequential(
        *_convolution(1, 16, 5, 2),
        *_convolution(16, 48, 3, 2),
        *_convolution(48, 96, 3, 2),
        *_convolution(96, FEATURES, 3, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored or not, turned by up to 15 degrees, scaled by up to 15% and shifted by up to two pixels."""
    samples = len(images)

    def draw(extent: float) -> Tensor:
        return extent * (2 * torch.rand(samples, generator=generator) - 1)

    angle, scale, mirror = draw(math.radians(15)), 1 + draw(0.15), draw(1.0).sign()
    cos, sin = angle.cos() * scale, angle.sin() * scale
    # Shifts are in halves of the image's width.
    rows = [mirror * cos, -sin, draw(2 / 14), mirror * sin, cos, draw(2 / 14)]
    grid = functional.affine_grid(torch.stack(rows, dim=1).view(samples, 2, 3), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def train_network(
    images: Tensor, labels: Tensor, num_classes: int, seed: int, settings: Settings, report: Callable[[], None]
) -> tuple[nn.Module, nn.Linear]:
    """The network trained on all images alike: its backbone, frozen, and its last layer. Calls ``report`` after each epoch."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # The layout in which the processor's convolutions are fastest.
        backbone = make_backbone().to(memory_format=torch.channels_last)
        classifier = nn.Linear(FEATURES, num_classes)
    parameters = [*backbone.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay, fused=True)
    steps = settings.epochs * (len(labels) // settings.batch_size)
    # A short rise from a small rate, because the first steps of Adam are as large as the rate lets them; then a cosine.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, steps, pct_start=0.1)
    for _ in range(settings.epochs):
        # An incomplete last batch is left out: its few samples would disturb batch normalisation. Each epoch leaves out others.
        for batch in torch.randperm(len(labels), generator=generator).split(settings.batch_size):
            if len(batch) < settings.batch_size:
                continue
            optimizer.zero_grad()
            scores = classifier(backbone(augment(images[batch], generator)))
            functional.cross_entropy(scores, labels[batch]).backward()
            optimizer.step()
            schedule.step()
        report()
    return backbone.requires_grad_(False).eval(), classifier.requires_grad_(False)


def retrain_classifier(features: Tensor, labels: Tensor, num_classes: int, seed: int, settings: Settings) -> nn.Linear:
    """A new classifier on frozen features; each sample's class is drawn first, every class alike, then one of its images."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = nn.Linear(features.shape[1], num_classes)
    counts = class_counts(labels, num_classes)
    by_class, starts = labels.argsort(stable=True), counts.cumsum(0) - counts
    optimizer = torch.optim.SGD(
        classifier.parameters(), lr=settings.crt_lr, momentum=0.9, weight_decay=settings.crt_weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.crt_epochs)
    for _ in range(settings.crt_epochs):
        classes = torch.randint(num_classes, labels.shape, generator=generator)
        places = (torch.rand(len(labels), generator=generator, dtype=torch.float64) * counts[classes]).to(torch.int64)
        for batch in by_class[starts[classes] + places].split(settings.batch_size):
            optimizer.zero_grad()
            functional.cross_entropy(classifier(features[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    return classifier.requires_grad_(False)


@torch.no_grad()
def _features(backbone: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([backbone(block) for block in images.split(512)])


def quickdraw_problem(
    images: Tensor,
    labels: Tensor,
    class_names: list[str],
    seed: int,
    settings: Settings | None = None,
    report: Callable[[], None] = lambda: None,
) -> Problem:
    """Make a long-tailed problem of the drawings and train both classifiers. Calls ``report`` after each epoch."""
    settings = settings or Settings()
    started = time.monotonic()
    num_classes = len(class_names)
    parts = split_images(
        labels,
        long_tailed_counts(num_classes, settings.most, settings.fewest),
        settings.test_per_class,
        settings.val_per_class,
        torch.Generator().manual_seed(seed),
    )
    targets = {part: labels[indices] for part, indices in parts.items()}
    backbone, joint = train_network(images[parts["train"]], targets["train"], num_classes, seed, settings, report)
    features = {part: _features(backbone, images[indices]) for part, indices in parts.items()}
    crt = retrain_classifier(features["train"], targets["train"], num_classes, seed, settings)
    counts = class_counts(targets["train"], num_classes)
    classifiers = {"joint": joint, "crt": crt}
    return Problem("quickdraw", seed, class_names, counts, features, targets, classifiers, time.monotonic() - started)


def digits_problem(seed: int) -> Problem:
    """The demonstration's digits of this seed: its split, its network, and a classifier re-trained on that one's features."""
    started = time.monotonic()
    images, labels = demo.load_digits()
    parts = dict(zip(PARTS, demo.long_tailed_indices(labels, torch.Generator().manual_seed(seed)), strict=True))
    targets = {part: labels[indices] for part, indices in parts.items()}
    backbone, joint = demo.train_network(images[parts["train"]], targets["train"], seed)
    features = {part: _features(backbone, images[indices]) for part, indices in parts.items()}
    crt = retrain_classifier(features["train"], targets["train"], 10, seed, Settings())
    counts = class_counts(targets["train"], 10)
    classifiers = {"joint": joint.requires_grad_(False), "crt": crt}
    return Problem("digits", seed, list("0123456789"), counts, features, targets, classifiers, time.monotonic() - started)


def save_problem(problem: Problem, path: Path, settings: Settings | None = None) -> None:
    """Write a problem as a NumPy archive without pickles, whole or not at all."""
    description = {
        "name": problem.name,
        "seed": problem.seed,
        "settings": asdict(settings or Settings()),
        "seconds": problem.seconds,
        "attribution": ATTRIBUTION if problem.name == "quickdraw" else "",
    }
    arrays = {"description": np.array(json.dumps(description)), "class_names": np.array(problem.class_names)}
    arrays["counts"] = problem.counts.numpy()
    for part in PARTS:
        arrays[f"{part}_features"], arrays[f"{part}_labels"] = problem.features[part].numpy(), problem.labels[part].numpy()
    for name, linear in problem.classifiers.items():
        arrays[f"{name}_weight"], arrays[f"{name}_bias"] = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # none of the names is one of its options
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_problem(path: Path, settings: Settings | None = None) -> Problem:
    """Read what :func:`save_problem` wrote.

    Raises:
        ValueError: the file was made with other settings than these, or is no such file.
    """
    expected = asdict(settings or Settings())
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        description = json.loads(str(arrays["description"]))
        if description["settings"] != expected:
            raise ValueError(f"{path} was made with other settings; delete it, or choose another directory with --cache")
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind in "if"}
        return Problem(
            name=description["name"],
            seed=description["seed"],
            class_names=arrays["class_names"].tolist(),
            counts=tensors["counts"],
            features={part: tensors[f"{part}_features"] for part in PARTS},
            labels={part: tensors[f"{part}_labels"] for part in PARTS},
            classifiers={name: _linear(tensors[f"{name}_weight"], tensors[f"{name}_bias"]) for name in CLASSIFIERS},
            seconds=description["seconds"],
        )
    except (KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a file of bench/quickdraw.py: {error}") from error


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    return linear


def default_cache() -> Path:
    """Where features are kept unless said otherwise: they are large, and made anew from the data in minutes."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alphaext" / "quickdraw"


def problem_path(cache: Path, seed: int) -> Path:
    return cache / f"quickdraw-seed{seed}.npz"


def progress_bar(console: Console) -> Progress:
    """A bar with time left, on standard error: nothing of it is in a redirected output."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def make_all(seeds: Sequence[int], cache: Path, data: Path | None, console: Console) -> list[Problem]:
    """The problems of ``seeds``: read where their file is there, otherwise made, and written before the next."""
    # What is there is read first: a file that does not fit should be reported before minutes of training, not after.
    problems = {seed: load_problem(problem_path(cache, seed)) for seed in seeds if problem_path(cache, seed).exists()}
    missing = [seed for seed in dict.fromkeys(seeds) if seed not in problems]
    if missing:
        if data is None:
            raise ValueError(
                "ALPHAEXT_DATA must be the folder of quickdraw345.npz: there are features to make, but no drawings"
            )
        drawings = load_drawings(data)
        with progress_bar(Console(stderr=True)) as bar:
            task = bar.add_task("", total=len(missing) * Settings().epochs)
            for seed in missing:
                bar.update(task, description=f"training, seed {seed}, epochs")
                problems[seed] = quickdraw_problem(*drawings, seed, report=lambda: bar.advance(task))
                path = problem_path(cache, seed)
                save_problem(problems[seed], path)
                line = f"seed {seed}: {problems[seed].seconds:.0f} s, {path}"
                console.print(line, highlight=False, markup=False, soft_wrap=True)
    return [problems[seed] for seed in dict.fromkeys(seeds)]


def accuracy_table(problems: Sequence[Problem]) -> Table:
    table = Table(title="Top-1 accuracy in %", caption=ATTRIBUTION)
    for name in ("seed", "classifier", "images", *SPLITS):
        table.add_column(name, justify="left" if name in ("classifier", "images") else "right")
    for problem in problems:
        for classifier in CLASSIFIERS:
            for part in ("val", "test"):
                accuracy = problem.accuracy(classifier, part)
                cells = ("-" if math.isnan(accuracy[split]) else f"{100 * accuracy[split]:.1f}" for split in SPLITS)
                table.add_row(str(problem.seed), classifier, part, *cells)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train networks on long-tailed drawings and keep their features.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="directory of the features (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="of torch (default: its own choice)")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    data = os.environ.get("ALPHAEXT_DATA")
    console = Console()
    try:
        console.print(accuracy_table(make_all(options.seeds, options.cache, Path(data) if data else None, console)))
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; seeds that were done are kept")
        return 130
    except (OSError, ValueError) as error:
        Console(stderr=True).print(f"quickdraw: {error}", markup=False, soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
