"""How long a whole repair takes, as multiples of one product over the same features, on one thread.

    python bench/whole_repair.py --results NAME          # some three minutes on an idle core

The sizes are those of ImageNet-LT: 115,846 x 2,048 training features, 1,000 classes, 20,000 validation samples. Features are
drawn at random around a centre a class. Product and repairs take turns; the first turn, in which a virtual machine may be given
its memory, counts for the memory alone. Writes bench/results/NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor, nn
from training import DATASETS, Dataset, class_counts

from alphaext import repair

RESULTS = Path(__file__).parent / "results"
SMALL = Dataset("small", 40, 6, 72, 1500, 400, in_features=64, pca_dim=16)
# What is asked of each, as a multiple of the product.
GOALS = {"paper": 1.6, "few": 3.2}
# Options that a preset does not fit a small problem with.
OF_SMALL: dict[str, dict[str, Any]] = {"paper": {"pca_dim": 16, "epochs": 3}, "few": {"top_k": 10, "residual": 16, "epochs": 3}}


def make_problem(dataset: Dataset) -> tuple[nn.Linear, dict[str, Tensor]]:
    """A classifier that knows the classes' centres, and samples around them."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(dataset.num_classes, dataset.in_features, generator=generator)
    linear = nn.Linear(dataset.in_features, dataset.num_classes)
    with torch.no_grad():
        linear.weight.copy_(centres / dataset.in_features**0.5)
        linear.bias.zero_()
        linear.bias[-dataset.num_few :] -= 1
    labels = torch.arange(dataset.num_classes).repeat_interleave(class_counts(dataset))
    val_labels = torch.arange(dataset.val_samples) % dataset.num_classes
    data = {"labels": labels, "val_labels": val_labels}
    for name, own in (("features", labels), ("val_features", val_labels)):
        data[name] = torch.empty(len(own), dataset.in_features).normal_(0, 10, generator=generator)
        for start in range(0, len(own), 4096):
            data[name][start : start + 4096] += centres[own[start : start + 4096]]
    return linear, data


def product(linear: nn.Linear, features: Tensor) -> None:
    """Logits of all features, of which none are kept."""
    with torch.no_grad():
        for block in features.split(1024):
            linear(block)


def seconds_of(function: Callable[[], object]) -> tuple[float, float]:
    """By the clock, and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - clock, time.process_time() - processor


def measure(dataset: Dataset, rounds: int, options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    linear, data = make_problem(dataset)

    def repaired(preset: str) -> Callable[[], object]:
        return lambda: repair(linear, **data, preset=preset, progress=False, **options.get(preset, {}))

    parts: dict[str, Callable[[], object]] = {"product": lambda: product(linear, data["features"])}
    parts |= {preset: repaired(preset) for preset in GOALS}
    small_linear, small = make_problem(replace(SMALL, name="to load what is loaded once"))
    for preset in GOALS:
        repair(small_linear, **small, preset=preset, progress=False, **OF_SMALL[preset])
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in parts}
    peaks: dict[str, float | None] = {}
    for number in range(rounds + 1):
        for name, function in parts.items():
            memory = machine.PeakMemory("cpu")
            taken = seconds_of(function)
            if number > 0:
                times[name].append(taken)
            peaks.setdefault(name, memory.above_start())
    results = {}
    for name in parts:
        clock, processor = zip(*times[name], strict=True)
        results[name] = {
            "seconds": round(statistics.median(clock), 2),
            "processor_seconds": round(statistics.median(processor), 2),
            "times_the_product": round(ratio(times, name, 0), 2),
            "times_the_product_processor": round(ratio(times, name, 1), 2),
            "peak_mib": None if peaks[name] is None else round(float(peaks[name] or 0)),
        }
    return results


def ratio(times: dict[str, list[tuple[float, float]]], name: str, which: int) -> float:
    """The median over rounds."""
    pairs = zip(times[name], times["product"], strict=True)
    return statistics.median(own[which] / product[which] for own, product in pairs)


def as_markdown(report: dict[str, Any]) -> str:
    lines = ["# Whole repairs as multiples of one product over the features", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    lines += [
        "",
        f"{report['size']}. Medians of {report['rounds']} rounds; the processor's time is of use where other work runs beside.",
        "Memory is what the first run needs beyond features and what was loaded before, the cache of member logits included.",
        "",
        "| | seconds | times the product | processor seconds | times the product | at most | MiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in report["results"].items():
        shown = [row[key] for key in ("seconds", "times_the_product", "processor_seconds", "times_the_product_processor")]
        cells = [name if name == "product" else f"repair, preset {name}", *shown, GOALS.get(name, ""), row["peak_mib"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", metavar="NAME", help="write bench/results/NAME.json and NAME.md")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a tiny problem: does everything run?")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dataset, options = (SMALL, OF_SMALL) if given.small else (DATASETS["imagenet-lt"], {})
    results = measure(dataset, 1 if given.small else given.rounds, options)
    size = f"{dataset.samples} x {dataset.in_features}, {dataset.num_classes} classes, {dataset.val_samples} validation samples"
    report = {"machine": machine.describe(), "size": size, "rounds": given.rounds, "results": results}
    print(as_markdown(report))
    if given.results:
        (RESULTS / f"{given.results}.json").write_text(json.dumps(report, indent=1) + "\n")
        (RESULTS / f"{given.results}.md").write_text(as_markdown(report))


if __name__ == "__main__":
    main()
