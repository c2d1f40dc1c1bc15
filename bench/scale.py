"""Whether a repair of iNaturalist-2018's size ends within 8 GiB of its own memory and 30 minutes, on two cores.

    python bench/scale.py --results NAME               # up to an hour; 4 GB of disk under --folder
    python bench/scale.py --fraction 4                 # a quarter of classes and samples
    python bench/scale.py --sweep --results NAME       # `repair` by classes, few classes, width and samples; two minutes

437,513 training samples of 2,048 float16 features on disk, 8,142 classes, 3,224 of them few, 24,426 validation samples:
features are drawn at random around a centre a class. ``alphaext.repair`` and ``alphaext fit`` with their default preset, each
in a process of its own; memory is what is not a file's (RssAnon), every tenth of a second. Writes bench/results/NAME.json and
NAME.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from torch import nn
from training import INATURALIST, Dataset, class_counts

from alphaext import repair
from alphaext.features import read_features, write_features

RESULTS = Path(__file__).parent / "results"
SIZE = replace(INATURALIST, in_features=2048)
MOST_GIB, MOST_MINUTES = 8, 30
# From which each size is doubled and doubled again, the others staying as they are.
SWEPT = Dataset("swept", 1000, 250, 2500, 100_000, 5000, in_features=1024)
SIZES = {"classes": "num_classes", "few classes": "num_few", "features": "in_features", "samples": "samples"}


def smaller(dataset: Dataset, fraction: int) -> Dataset:
    names = ("num_classes", "num_few", "few_samples", "samples", "val_samples")
    return replace(dataset, **{name: getattr(dataset, name) // fraction for name in names})


def grown(dataset: Dataset, name: str, times: int) -> Dataset:
    """``dataset`` with ``times`` as much of one size; few classes keep their samples a class, classes theirs of validation."""
    larger = replace(dataset, **{name: getattr(dataset, name) * times})
    if name == "num_few":
        return replace(larger, few_samples=dataset.few_samples * times)
    return replace(larger, val_samples=dataset.val_samples * times) if name == "num_classes" else larger


def sweep(dataset: Dataset, work: list[str], threads: int, place: Path | None) -> dict[str, dict[str, Any]]:
    """``repair`` by each size; of the tiny problem by one."""
    cases = [("as it is", dataset)]
    for label, name in list(SIZES.items())[: 1 if work else None]:
        most = 2 if name == "num_few" else 4  # of four times as many, all classes would be few
        cases += [(f"{times} x the {label}", grown(dataset, name, times)) for times in (2, 4) if times <= most]
    results = {}
    for label, case in cases:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            write_problem(case, Path(folder))
            row = {"size": sizes_of(case), **measured([sys.executable, __file__, "--work", folder, *work], threads)}
        print(label, row, flush=True)
        results[label] = row
    return results


def sizes_of(dataset: Dataset) -> str:
    return (
        f"{dataset.samples:,} training samples of {dataset.in_features:,} float16 features on disk, {dataset.num_classes:,} "
        f"classes, {dataset.num_few:,} of them few, {dataset.val_samples:,} validation samples"
    )


def write_problem(dataset: Dataset, folder: Path) -> None:
    """Features on disk and a classifier that knows the classes' centres, written a block of samples at a time."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(dataset.num_classes, dataset.in_features, generator=generator)
    bias = torch.zeros(dataset.num_classes)
    bias[-dataset.num_few :] -= 1
    torch.save({"weight": centres / dataset.in_features**0.5, "bias": bias}, folder / "classifier.pth")
    labels_of = {
        "train": torch.arange(dataset.num_classes).repeat_interleave(class_counts(dataset)),
        "val": torch.arange(dataset.val_samples) % dataset.num_classes,
    }
    (folder / "features").mkdir()
    for part, labels in labels_of.items():
        scratch = folder / f"{part}.npy"
        drawn = np.lib.format.open_memmap(scratch, "w+", np.float16, (len(labels), dataset.in_features))
        for start in range(0, len(labels), 8192):
            own = labels[start : start + 8192]
            noise = torch.empty(len(own), dataset.in_features).normal_(0, 10, generator=generator)
            drawn[start : start + 8192] = noise.add_(centres[own]).numpy()
        write_features(folder / "features" / part, drawn, labels, num_classes=dataset.num_classes)
        scratch.unlink()


def repaired(folder: Path, options: dict[str, Any]) -> None:
    """What a process that measures ``repair`` does."""
    warnings.simplefilter("ignore")
    state = torch.load(folder / "classifier.pth", weights_only=True)
    linear = nn.Linear(*reversed(state["weight"].shape))
    linear.load_state_dict(state)
    train, val = (read_features(folder / "features" / part) for part in ("train", "val"))
    print(repair(linear, train, val_features=val, progress=False, **options).result.after)


def measured(command: list[str], threads: int) -> dict[str, Any]:
    """Runs a command to its end: seconds, of the processor too, and the most memory of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started, most, before = time.perf_counter(), 0, os.times()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        most = max(most, own_memory(process.pid))
        time.sleep(0.1)
    seconds, after = time.perf_counter() - started, os.times()
    assert process.stderr is not None
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    found = {
        "minutes": round(seconds / 60, 2),
        "processor_minutes": round(processor / 60, 2),
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "own_gib": round(most / 2**20, 2),
    }
    return found if process.returncode == 0 else {**found, "failed": "failed: " + process.stderr.read().strip()[-500:]}


def own_memory(process: int) -> int:
    """KiB in memory that no file has."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def both_ways(
    dataset: Dataset, parts: list[str], work: list[str], options: dict[str, Any], threads: int, place: Path | None
) -> dict[str, dict[str, Any]]:
    """``repair`` from Python, and ``alphaext fit``."""
    results = {}
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        folder = Path(temporary)
        write_problem(dataset, folder)
        fit = [sys.executable, "-m", "alphaext", "fit", "--features", str(folder / "features"), "--quiet"]
        fit += ["--classifier", str(folder / "classifier.pth"), "--output", str(folder / "fitted")]
        fit += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        for part in parts:
            command = {"repair": [sys.executable, __file__, "--work", str(folder), *work], "fit": fit}[part]
            results[part] = measured(command, threads)
            print(part, results[part], flush=True)
    return results


def as_markdown(report: dict[str, Any]) -> str:
    lines = [f"# {report['title']}", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    unit = "seconds" if report["sweep"] else "minutes"
    lines += ["", report["size"], "", f"| | {unit} | of the processor | GiB of its own | |", "|---|---:|---:|---:|---|"]
    for name, row in report["results"].items():
        note = row.get("failed", row.get("size", ""))
        lines.append(f"| {name} | {row[unit]} | {row[f'processor_{unit}']} | {row['own_gib']} | {note} |")
    lines += [] if report["sweep"] else [f"| at most | {MOST_MINUTES} | | {MOST_GIB} | |"]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", metavar="NAME", help="write bench/results/NAME.json and NAME.md")
    parser.add_argument("--fraction", type=int, default=1, help="divide classes and samples by this")
    parser.add_argument("--sweep", action="store_true", help="`repair` by each size instead")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=("repair", "fit"), default=["repair", "fit"])
    parser.add_argument("--folder", type=Path, help="where the features go for the time; default: where temporary files go")
    parser.add_argument("--small", action="store_true", help="a tiny problem: does everything run?")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    options = {"top_k": 10, "residual": 16, "epochs": 2} if given.small else {}
    if given.work:
        repaired(given.work, options)
        return {}
    dataset = smaller(SIZE, given.fraction)
    if given.small:
        dataset = Dataset("small", 60, 20, 200, 6000, 600, in_features=64)
    tiny = ["--small"] if given.small else []
    if given.sweep:
        title = "Time and memory of a repair by size"
        results = sweep(dataset if given.small else SWEPT, tiny, given.threads, given.folder)
    else:
        title = "A repair at iNaturalist-2018's size"
        results = both_ways(dataset, given.parts, tiny, options, given.threads, given.folder)
    size = f"{sizes_of(SWEPT if given.sweep else dataset)}, drawn at random; {given.threads} threads."
    report = {"title": title, "machine": machine.describe(), "size": size, "sweep": given.sweep, "results": results}
    print(as_markdown(report))
    if given.results:
        (RESULTS / f"{given.results}.json").write_text(json.dumps(report, indent=1) + "\n")
        (RESULTS / f"{given.results}.md").write_text(as_markdown(report))
    return report


if __name__ == "__main__":
    main()
