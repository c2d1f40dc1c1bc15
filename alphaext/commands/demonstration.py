"""The demonstration: handwritten digits made long-tailed, a small network, and its classifier repaired."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table
from torch import Tensor, nn

from ..classes import class_counts, split_classes
from ..head.alphanet import AlphaNet
from ..metrics.accuracy import SPLITS_AND_ALL
from ..metrics.evaluation import split_accuracy
from ..training.many import fit_many
from ..utils.files import whole_file
from ..utils.modules import one_thread
from .fit import best_run

# Training images of each class, in an order of classes that is drawn anew each time: 3 many, 4 medium and 3 few classes.
TRAIN_COUNTS = (110, 105, 102, 80, 60, 45, 30, 8, 6, 4)
VAL_PER_CLASS, TEST_PER_CLASS = 20, 40
GAMMAS = (0.5, 0.7, 0.9, 1.0)


@dataclass
class Draw:
    """One long-tailed draw of the digits: a network trained on it, before and after the repair."""

    seed: int
    gamma: float
    before: dict[str, float]
    after: dict[str, float]
    counts: Tensor
    head: AlphaNet
    test_images: Tensor
    test_labels: Tensor
    predicted_before: Tensor
    predicted_after: Tensor


def load_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 bundled digits: images ``[n, 8, 8]`` in 0..1, labels ``[n]``."""
    from sklearn.datasets import load_digits as load

    digits = load()
    return torch.tensor(digits.images / 16.0, dtype=torch.float32), torch.tensor(digits.target, dtype=torch.int64)


def long_tailed_indices(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw train, validation and test indices: which class is rare and which images it has are random."""
    train, val, test = [], [], []
    for count, digit in zip(TRAIN_COUNTS, torch.randperm(10, generator=generator).tolist(), strict=True):
        indices = (labels == digit).nonzero().flatten()
        indices = indices[torch.randperm(len(indices), generator=generator)]
        test.append(indices[:TEST_PER_CLASS])
        val.append(indices[TEST_PER_CLASS : TEST_PER_CLASS + VAL_PER_CLASS])
        train.append(indices[TEST_PER_CLASS + VAL_PER_CLASS :][:count])
    return torch.cat(train), torch.cat(val), torch.cat(test)


def train_network(images: Tensor, labels: Tensor, seed: int, epochs: int = 40) -> tuple[nn.Module, nn.Linear]:
    """A small network trained on the long-tailed images: its backbone and its last layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        classifier = nn.Linear(32, 10)
    parameters = [*backbone.parameters(), *classifier.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(classifier(backbone(images[batch])), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    return backbone.requires_grad_(False).eval(), classifier


def run_draw(images: Tensor, labels: Tensor, seed: int) -> Draw:
    """Draw a data set, train a network, and repair its classifier with the gamma that is best on validation images."""
    train, val, test = long_tailed_indices(labels, torch.Generator().manual_seed(seed))
    backbone, classifier = train_network(images[train], labels[train], seed)
    features = backbone(images)
    configurations = [{"gamma": gamma, "select": "last", "seed": seed} for gamma in GAMMAS]
    samples = {"val_features": features[val], "val_labels": labels[val]}
    runs = fit_many(classifier, features[train], labels[train], configurations, **samples, progress=False)
    # The best accuracy over all validation images; of equal ones the largest gamma, which changes the least.
    best = runs[best_run(runs, "last", None)]
    assert best.head is not None
    counts = class_counts(labels[train], 10)
    with torch.no_grad():
        logits_before, logits_after = classifier(features[test]), best.head(features[test])
    return Draw(
        seed=seed,
        gamma=best.head.gamma,
        before=split_accuracy(logits_before, labels[test], split_classes(counts)),
        after=split_accuracy(logits_after, labels[test], split_classes(counts)),
        counts=counts,
        head=best.head,
        test_images=images[test],
        test_labels=labels[test],
        predicted_before=logits_before.argmax(dim=1),
        predicted_after=logits_after.argmax(dim=1),
    )


def run_demo(draws: int = 8, seed: int = 0, output: Path | None = None, console: Console | None = None) -> list[Draw]:
    """Run the demonstration and print its table; write its picture to ``output`` (needs matplotlib).

    Args:
        draws: long-tailed data sets, each with its own rare digits, images and network.
        seed: of the first draw; the others count up from it.
        output: a PNG file, written whole or not at all; None for no picture.
        console: where to print; None for standard output.
    """
    console = console or Console()
    started = time.monotonic()
    images, labels = load_digits()
    results = []
    with one_thread(), Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training and repairing", total=draws)
        for draw in range(draws):
            results.append(run_draw(images, labels, seed + draw))
            bar.advance(task)
    console.print(
        f"scikit-learn's digits, made long-tailed {draws} times: {sum(TRAIN_COUNTS)} training images, of 4 to 110 a class; "
        f"each time a new choice of rare digits, images and network.\n"
    )
    console.print(accuracy_table(results))
    console.print(summary(results), highlight=False)
    console.print()
    console.print(alpha_table(results[0]))
    if output is not None:
        write_picture(results[0], output, console)
    console.print(f"Time: {time.monotonic() - started:.1f} s")
    return results


def accuracy_table(draws: list[Draw]) -> Table:
    columns = (Column(split, justify="right") for split in SPLITS_AND_ALL)
    title = f"Top-1 accuracy on test images in %, mean +- standard deviation over {len(draws)} draws"
    table = Table("", *columns, title=title)
    before, after = (
        100 * torch.tensor([[accuracy[split] for split in SPLITS_AND_ALL] for accuracy in accuracies], dtype=torch.float64)
        for accuracies in ([draw.before for draw in draws], [draw.after for draw in draws])
    )
    for name, values, sign in (
        ("trained classifier", before, ""),
        ("with Alpha Net", after, ""),
        ("gain", after - before, "+"),
    ):
        spread = values.std(dim=0, correction=min(1, len(draws) - 1))
        table.add_row(name, *(f"{mean:{sign}.1f} +- {std:.1f}" for mean, std in zip(values.mean(dim=0), spread, strict=True)))
    return table


def summary(draws: list[Draw]) -> str:
    """In words: where it helped, where it did not, and the gammas that validation chose."""
    lines = []
    for split in ("few", "all"):
        gains = [draw.after[split] - draw.before[split] for draw in draws]
        better, worse = sum(gain > 0 for gain in gains), [i for i, gain in enumerate(gains) if gain < 0]
        line = f"{split}: better on {better} of {len(draws)} draws"
        if worse:
            line += "; worse on " + ", ".join(f"draw {draws[i].seed} ({100 * gains[i]:+.1f})" for i in worse)
        lines.append(line)
    lines.append("gamma, chosen on validation images: " + ", ".join(f"{draw.gamma:g}" for draw in draws))
    return "\n".join(lines)


def alpha_table(draw: Draw) -> Table:
    head = draw.head
    table = Table(
        "few digit",
        *(Column(name, justify="right") for name in ("images", "own")),
        *(Column(f"NN{k + 1}", justify="right", no_wrap=True) for k in range(head.top_k)),
        title=f"Learned alphas of draw {draw.seed} (gamma {draw.gamma:g}): nearest neighbours (NN), each with its coefficient",
    )
    for members, alphas in zip(head.members.tolist(), head.alphas().tolist(), strict=True):
        cells = [f"{member} {alpha:+.2f}" for member, alpha in zip(members[1:], alphas[1:], strict=True)]
        table.add_row(str(members[0]), str(int(draw.counts[members[0]])), f"{alphas[0]:+.2f}", *cells)
    return table


def write_picture(draw: Draw, output: Path, console: Console) -> None:
    """The alphas of each few class as bars, and rare test images that are recognised only after the repair."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        console.print("No picture: matplotlib is missing. Install it with: pip install 'alphaext\\[demo]'")
        return
    head = draw.head
    rescued = (draw.predicted_before != draw.test_labels) & (draw.predicted_after == draw.test_labels)
    columns = 8
    figure = Figure(figsize=(11, 2.6 * head.num_few + 0.6), layout="constrained")
    figure.suptitle(
        f"Alpha Net on long-tailed digits, draw {draw.seed}: few accuracy {100 * draw.before['few']:.1f}% -> "
        f"{100 * draw.after['few']:.1f}%, all {100 * draw.before['all']:.1f}% -> {100 * draw.after['all']:.1f}%"
    )
    grid = figure.add_gridspec(head.num_few, columns + 4)
    for row, (members, alphas) in enumerate(zip(head.members.tolist(), head.alphas().tolist(), strict=True)):
        axes = figure.add_subplot(grid[row, :4])
        names = [f"own ({members[0]})", *(str(member) for member in members[1:])]
        axes.bar(names, alphas, color=["tab:orange"] + ["tab:blue"] * head.top_k)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(f"digit {members[0]}, {int(draw.counts[members[0]])} training images", fontsize=10)
        axes.set_ylabel("alpha")
        of_class = (rescued & (draw.test_labels == members[0])).nonzero().flatten().tolist()
        for column in range(columns):
            cell = figure.add_subplot(grid[row, 4 + column])
            cell.axis("off")
            if column < len(of_class):
                image = of_class[column]
                cell.imshow(draw.test_images[image].numpy(), cmap="gray_r")
                cell.set_title(f"was {int(draw.predicted_before[image])}", fontsize=8)
            if column == 0:
                text = f"newly right: {len(of_class)}" if of_class else "none newly right"
                cell.text(0, -0.12, text, transform=cell.transAxes, fontsize=8, va="top")
    with whole_file(output) as file:
        figure.savefig(file, format="png", dpi=110)
    console.print(f"Picture of the alphas and of newly recognised images: {output}")
