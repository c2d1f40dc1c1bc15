"""How long whole trainings take: the native engine against the paper's form and its best rewrites, and how it scales.

    python bench/training.py --results NAME          # all parts, some five minutes on two cores
    python bench/training.py --parts training sweep

On a GPU: the stage "training" of bench/gpu.py.

Class counts are those of ImageNet-LT and Places-LT, features and classifiers are drawn at random. Peers that would take minutes
or hours are timed over enough steps for a median, and multiplied; the table says so. Each part writes its results as soon as it
is done, to bench/results/NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import machine
import torch
from head import providers
from torch import Tensor, nn
from torch.nn import functional

import alphaext
from alphaext import AlphaNet
from alphaext.training.builder import training_data
from alphaext.training.cached_logits import Columns, Samples, TrainingLogits
from alphaext.training.native_engine import NativeEngine, SharedLogits
from alphaext.training.options import TrainingOptions
from alphaext.training.single import Run, split_of

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Dataset:
    """Class counts of a published data set; everything else is drawn at random."""

    name: str
    num_classes: int
    num_few: int
    few_samples: int
    samples: int
    val_samples: int
    in_features: int = 2048
    pca_dim: int = 500
    top_k: int = 5


DATASETS = {
    "imagenet-lt": Dataset("imagenet-lt", 1000, 136, 1643, 115_846, 20_000),
    "places-lt": Dataset("places-lt", 365, 71, 804, 62_500, 7_300, pca_dim=300),
}
PEERS = ("paper loop", "batched baddbmm", "batched + torch.compile", "alphaext dense")
INATURALIST = Dataset("inaturalist-2018", 8142, 3224, 46_112, 437_513, 24_426, in_features=256, pca_dim=500)


@dataclass
class Problem:
    head: AlphaNet
    features: Tensor
    labels: Tensor
    val_features: Tensor
    val_labels: Tensor
    dataset: Dataset

    def run(self, **options: Any) -> Run:
        settings = TrainingOptions(**options)
        data = training_data(self.head, self.features, self.labels, self.val_features, self.val_labels, settings)
        return Run(self.head, settings, data, split_of(self.head, data, many_above=100))


def class_counts(dataset: Dataset) -> Tensor:
    """Training samples of each class: the few ones, the last, with their published total, the rest alike."""
    few = spread(dataset.few_samples, dataset.num_few)
    return torch.cat([spread(dataset.samples - dataset.few_samples, dataset.num_classes - dataset.num_few), few])


def spread(total: int, parts: int) -> Tensor:
    return torch.full((parts,), total // parts) + (torch.arange(parts) < total % parts)


def make_members(dataset: Dataset, generator: torch.Generator) -> Tensor:
    base = dataset.num_classes - dataset.num_few
    neighbors = [torch.randperm(base, generator=generator)[: dataset.top_k] for _ in range(dataset.num_few)]
    return torch.cat([torch.arange(base, dataset.num_classes).unsqueeze(1), torch.stack(neighbors)], dim=1)


def make_problem(dataset: Dataset, device: str = "cpu", **options: Any) -> Problem:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(dataset.num_classes, dataset.in_features, generator=generator) / dataset.in_features**0.5
    members = make_members(dataset, generator)
    width = (dataset.top_k + 1) * min(dataset.pca_dim, dataset.num_classes, dataset.in_features)
    z = torch.randn(dataset.num_few, width, generator=generator) / 20
    options = {"hidden_dim": dataset.pca_dim, "init": "default", "first_layer": "factored", "seed": 0, **options}
    head = AlphaNet(weight, torch.zeros(dataset.num_classes), members, z, **options).to(device)
    counts = class_counts(dataset)
    labels = torch.arange(dataset.num_classes).repeat_interleave(counts)
    features = torch.empty(dataset.samples, dataset.in_features).normal_(generator=generator)
    val_labels = torch.arange(dataset.val_samples) % dataset.num_classes
    val_features = torch.empty(dataset.val_samples, dataset.in_features).normal_(generator=generator)
    data = [x.to(device) for x in (features, labels, val_features, val_labels)]
    return Problem(head, *data, dataset)


def finish() -> None:
    """Wait for what a GPU was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function: Callable[[], object]) -> float:
    finish()
    started = time.perf_counter()
    function()
    finish()
    return time.perf_counter() - started


def median_of(function: Callable[[], object], repeats: int) -> float:
    function()
    return statistics.median(timed(function) for _ in range(repeats))


# ---- A whole training ----------------------------------------------------------------------------------------------------


def native_training(problem: Problem, repeats: int, **options: Any) -> dict[str, Any]:
    """Prepare, then train 80 epochs with a validation each, from the same start ``repeats`` times."""
    settings = {"epochs": 80, "lr": 0.01, "select": "best_all", **options}
    first = problem.run(**settings)
    logits = SharedLogits([problem.head], first.data, range(1, settings["epochs"] + 1), [first.data.sampler])
    state = {name: value.clone() for name, value in problem.head.state_dict().items() if isinstance(value, Tensor)}
    seconds, clocks = [], []
    for _ in range(repeats):
        problem.head.load_state_dict(state)
        run = problem.run(**settings)
        run.prepare(None, logits=logits)
        before = time.thread_time()
        seconds.append(timed(lambda run=run: run.train(None, lambda **_: None)))  # type: ignore[misc]
        clocks.append(time.thread_time() - before)
    problem.head.load_state_dict(state)
    steps = run.engine.steps_per_epoch * settings["epochs"]
    engine = run.engine
    assert isinstance(engine, NativeEngine)
    validate = median_of(lambda: engine.hits(), 9)
    state_bytes = sum(part.nbytes for part in engine.state().values() if isinstance(part, Tensor))
    return {
        "steps": steps,
        "training_s": statistics.median(seconds),
        "training_s_all": seconds,
        "processor_s": statistics.median(clocks),
        "step_ms": (statistics.median(seconds) - settings["epochs"] * validate) / steps * 1e3,
        "validation_ms": validate * 1e3,
        "state_mib": state_bytes / 2**20,
        "cached_logits_mib": logits.training.logits.nbytes / 2**20,
        "cached_validation_mib": (0 if logits.validation is None else logits.validation.logits.nbytes) / 2**20,
    }


def preparation(problem: Problem, repeats: int) -> dict[str, Any]:
    """Member logits and base log-sum-exp of all training features, against one matrix product over them."""
    head = problem.head
    assert head.bias is not None
    bias = head.bias
    columns, samples = Columns([head]), Samples(problem.features, problem.labels)
    indices = torch.arange(len(problem.labels))
    rows = TrainingLogits(columns, len(indices))
    out = torch.empty(len(indices), head.out_features)
    ours, product = [], []
    with torch.no_grad():
        for _ in range(repeats + 1):
            ours.append(timed(lambda: rows.fill(0, samples, indices)))
            product.append(timed(lambda: torch.addmm(bias, problem.features, head.weight.t(), out=out)))
    result = {"prepare_s": statistics.median(ours[1:]), "linear_s": statistics.median(product[1:])}
    return result | {"ratio": statistics.median(a / b for a, b in zip(ours[1:], product[1:], strict=True))}


class EagerFactored(nn.Module):
    """Identities (a), (b) and (c) of docs/reference/exactness.md in plain tensor operations: the best that Python can do."""

    def __init__(self, head: AlphaNet) -> None:
        super().__init__()
        self.preactivation = nn.Parameter(head.preactivation.detach().clone())
        self.w2, self.b2 = nn.Parameter(head.w2.detach().clone()), nn.Parameter(head.b2.detach().clone())
        self.gamma, self.scale = head.gamma, head.gradient_scale.unsqueeze(1)

    def forward(self, member_logits: Tensor, base_logsumexp: Tensor) -> Tensor:
        """Scores ``[batch, F + 1]``, the last column standing for all base classes, from member logits ``[batch, F, K+1]``."""
        hidden = self.preactivation.relu()
        raw = torch.baddbmm(self.b2.unsqueeze(2), self.w2, hidden.unsqueeze(2)).squeeze(2)
        alpha = torch.cat([raw[:, :1].clamp(2**-14, self.gamma), raw[:, 1:]], dim=1)
        few = torch.einsum("bfk,fk->bf", member_logits, alpha)
        return torch.cat([few, base_logsumexp.unsqueeze(1)], dim=1)


def eager_factored_step(problem: Problem, batch: int = 64) -> Callable[[], None]:
    module = EagerFactored(problem.head)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, fused=True)
    device = problem.head.weight.device
    logits = torch.randn(batch, problem.head.num_few, problem.head.top_k + 1, device=device)
    base, few_label = torch.randn(batch, device=device) + 7, torch.randint(problem.head.num_few, (batch,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(module(logits, base), few_label).backward()
        module.preactivation.grad.mul_(module.scale)  # type: ignore[union-attr]
        optimizer.step()

    return step


def peers(dataset: Dataset, problem: Problem, repeats: int) -> dict[str, dict[str, float]]:
    """Median time of an SGD step from features; fewer repeats for what takes long."""
    size = replace(providers.SIZES[dataset.name], in_features=dataset.in_features, few_samples=dataset.few_samples)
    data = providers.make_problem(size)
    results = {}
    for name in PEERS:
        torch.manual_seed(0)
        make, cached = providers.PROVIDERS[name]
        module = make(data)
        step = providers.make_step(module, data, cached, "sgd step")
        for _ in range(3):
            step()
        seconds = statistics.median(timed(step) for _ in range(repeats))
        # Parameters, gradients and momentum; what else a step holds is left out, in the peer's favour.
        held = 3 * sum(p.nbytes for p in module.parameters() if p.requires_grad)
        results[name] = {"step_ms": seconds * 1e3, "repeats": repeats, "memory_mib": held / 2**20}
        del step, module
        torch.compiler.reset()
    step = eager_factored_step(problem)
    for _ in range(20):
        step()
    results["eager factored"] = {"step_ms": statistics.median(timed(step) for _ in range(200)) * 1e3, "repeats": 200}
    return results


def training_part(arguments: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, dataset in DATASETS.items():
        problem = make_problem(dataset)
        native = native_training(problem, arguments.repeats)
        entry: dict[str, Any] = {"native": native, "preparation": preparation(problem, 3)}
        entry["shared"] = native_training(make_shared(problem), 1)
        entry["peers"] = peers(dataset, problem, arguments.repeats * 2)
        # Once more beside the peers, so that both ends of the comparison saw the same machine.
        again = native_training(problem, 2)
        native["step_ms"] = statistics.median([native["step_ms"], again["step_ms"]])
        native["training_s_all"] += again["training_s_all"]
        native["training_s"] = statistics.median(native["training_s_all"])
        for peer in entry["peers"].values():
            peer["training_s_by_multiplication"] = peer["step_ms"] * native["steps"] / 1e3
            peer["ratio_of_step"] = peer["step_ms"] / native["step_ms"]
        entry["memory_ratio"] = entry["peers"]["paper loop"]["memory_mib"] / native["state_mib"]
        results[name] = entry
        del problem
    return results


def make_shared(problem: Problem) -> Problem:
    head = problem.head
    shared = AlphaNet(
        head.weight, head.bias, head.members, head.z, hidden_dim=head.w2.shape[2], init="default", first_layer="factored",
        shared=True, seed=0,
    )  # fmt: skip
    return replace(problem, head=shared)


# ---- A second process ----------------------------------------------------------------------------------------------------


def _spin(core: int) -> None:
    os.sched_setaffinity(0, {core})
    while True:
        pass


def busy_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same training alone and while another process keeps one of the cores busy, in turn."""
    problem = make_problem(DATASETS["imagenet-lt"])
    cores = sorted(os.sched_getaffinity(0))
    alone, busy = [], []
    for _ in range(max(2, arguments.repeats)):
        alone.append(native_training(problem, 1)["training_s"])
        process = multiprocessing.get_context("fork").Process(target=_spin, args=(cores[-1],), daemon=True)
        process.start()
        try:
            busy.append(native_training(problem, 1)["training_s"])
        finally:
            process.kill()
            process.join()
    return {
        "cores": len(cores),
        "alone_s": statistics.median(alone),
        "busy_s": statistics.median(busy),
        "ratio": statistics.median(busy) / statistics.median(alone),
    }


# ---- Sweeps --------------------------------------------------------------------------------------------------------------


def sweep_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """Nine gammas times ten seeds at ImageNet-LT's size, from features to ninety trained heads."""
    problem = make_problem(DATASETS["imagenet-lt"])
    linear = nn.Linear(problem.head.in_features, problem.head.out_features)
    linear.load_state_dict({"weight": problem.head.weight, "bias": problem.head.bias})
    gammas = [round(0.1 * i, 1) for i in range(1, 10)]
    configs = [dict(gamma=gamma, seed=seed, lr=0.01) for gamma in gammas for seed in range(arguments.sweep_seeds)]
    means = torch.randn(problem.head.out_features, problem.head.in_features)
    data: dict[str, Any] = dict(val_features=problem.val_features, val_labels=problem.val_labels, means=means)
    runs: list[Any] = []
    seconds = timed(lambda: runs.extend(alphaext.fit_many(linear, problem.features, problem.labels, configs, **data)))
    failed = [run.error for run in runs if run.error]
    return {"runs": len(runs), "failed": failed, "seconds": seconds, "cores": len(os.sched_getaffinity(0))}


# ---- Scaling -------------------------------------------------------------------------------------------------------------


def step_time(dataset: Dataset, repeats: int = 5, epochs: int = 3) -> float:
    """Seconds of a step in training, preparation left out: the best median of ``repeats`` trainings."""
    problem = make_problem(dataset)
    settings: dict[str, Any] = {"epochs": epochs, "lr": 1e-3, "select": "last"}
    run = problem.run(**settings)
    logits = SharedLogits([problem.head], run.data, range(1, epochs + 1), [run.data.sampler])
    engine = NativeEngine(problem.head, run.options, alphaext.training.sgd.Sgd(1e-3, 0.9, 0.0, 0.0, False), run.data, 1, logits)
    engine.train(1, 1.0)
    times = [timed(lambda epoch=epoch: engine.train(epoch, 1.0)) for _ in range(repeats) for epoch in (2, 3)]  # type: ignore[misc]
    return statistics.median(times) / engine.steps_per_epoch


def scaling_part(arguments: argparse.Namespace) -> dict[str, Any]:
    base = Dataset("scaling", 1136, 136, 1643, 6000, 64, in_features=64, pca_dim=500)
    results: dict[str, Any] = {"base_classes": {}, "few_classes": {}, "in_features": {}}
    for classes in (1_000, 10_000, 100_000):
        dataset = replace(base, num_classes=classes + 136, samples=1643 + max(classes, 6000))
        results["base_classes"][classes] = step_time(dataset) * 1e3
    for few in (10, 100, 1_000, 10_000):
        dataset = replace(base, num_classes=few + 1000, num_few=few, few_samples=max(few, 1280), samples=max(few, 1280) + 4000)
        results["few_classes"][few] = step_time(dataset, repeats=3) * 1e3
    for width in (64, 512, 2048, 8192):
        results["in_features"][width] = step_time(replace(base, in_features=width)) * 1e3
    return results


def inaturalist_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """One epoch at the size of iNaturalist 2018, with the memory it took."""
    problem = make_problem(INATURALIST)
    memory = machine.PeakMemory("cpu")
    run = problem.run(epochs=1, lr=1e-3, select="last")
    prepare = timed(lambda: run.prepare(None))
    train = timed(lambda: run.train(None, lambda **_: None))
    return {
        "in_features": INATURALIST.in_features,
        "steps": run.engine.steps_per_epoch,
        "prepare_s": prepare,
        "epoch_s": train,
        "step_ms": train / run.engine.steps_per_epoch * 1e3,
        "peak_memory_mib": memory.above_start(),
        "paper_form_mib": 3 * 4 * problem.head.num_few * 500 * 3000 / 2**20,
    }


# First the one whose peak of memory counts: later, freed memory that the process keeps would hide it.
PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "inaturalist": inaturalist_part,
    "training": training_part,
    "busy": busy_part,
    "sweep": sweep_part,
    "scaling": scaling_part,
}


def markdown(results: dict[str, Any]) -> str:
    """The results as tables for readers."""
    lines = ["# Trainings", "", "Class counts as published; features and classifiers drawn at random.", ""]
    lines += [f"{name}: {value}  " for name, value in results["machine"].items()] + [""]
    for name, entry in results.get("training", {}).items():
        native, ready = entry["native"], entry["preparation"]
        lines += [
            f"## {name}: {native['steps']} steps, 80 validations",
            "",
            f"Native engine, one thread: **{native['training_s']:.2f} s** ({native['step_ms']:.3f} ms a step, a validation "
            f"{native['validation_ms']:.1f} ms); shared sub-module {entry['shared']['training_s']:.2f} s. State "
            f"{native['state_mib']:.1f} MiB, 1/{entry['memory_ratio']:.0f} of the paper's form; cached logits "
            f"{native['cached_logits_mib']:.0f} MiB, of validation {native['cached_validation_mib']:.0f} MiB. Preparation of "
            f"all features {ready['prepare_s']:.2f} s, {ready['ratio']:.2f} times one matrix product over them.",
            "",
            "| peer, a step from features | ms | times the native step | whole training, multiplied |",
            "|---|---:|---:|---:|",
        ]
        for peer, value in entry["peers"].items():
            whole = f"{value['training_s_by_multiplication']:.1f} s"
            lines.append(f"| {peer} | {value['step_ms']:.2f} | {value['ratio_of_step']:.1f} | {whole} |")
        lines.append("")
    if "busy" in results:
        lines += [
            f"Another process on one of {results['busy']['cores']} cores: {results['busy']['ratio']:.2f} times as long.",
            "",
        ]
    if "sweep" in results:
        sweep = results["sweep"]
        lines += [
            f"Sweep, ImageNet-LT, from features to {sweep['runs']} heads on {sweep['cores']} cores: {sweep['seconds']:.1f} s.",
            "",
        ]
    if "scaling" in results:
        lines += ["| a step by | | | | |", "|---|---:|---:|---:|---:|"]
        for name, values in results["scaling"].items():
            lines.append(f"| {name} | " + " | ".join(f"{size}: {ms:.3f} ms" for size, ms in values.items()) + " |")
        lines.append("")
    if "inaturalist" in results:
        part = results["inaturalist"]
        lines += [
            f"iNaturalist 2018's size, one epoch of {part['steps']} steps: {part['epoch_s']:.1f} s ({part['step_ms']:.2f} ms a "
            f"step), after {part['prepare_s']:.1f} s of preparation at {part['in_features']} features; peak memory "
            f"{part['peak_memory_mib']:.0f} MiB (the paper's form: {part['paper_form_mib']:.0f} MiB of parameters, gradients "
            "and momentum).",
            "",
        ]
    return "\n".join(lines)


def write(name: str, results: dict[str, Any]) -> None:
    """Both files, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    for suffix, text in ((".json", json.dumps(results, indent=1) + "\n"), (".md", markdown(results))):
        temporary = RESULTS / f".{name}{suffix}.tmp"
        temporary.write_text(text)
        temporary.replace(RESULTS / f"{name}{suffix}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sweep-seeds", type=int, default=10)
    parser.add_argument("--results", metavar="NAME", help="write bench/results/NAME.json and .md")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*with replacement")
    machine.keep_freed_memory()
    results: dict[str, Any] = {"machine": machine.describe()}
    for part in arguments.parts:
        started = time.monotonic()
        results[part] = PARTS[part](arguments)
        print(f"{part}: {time.monotonic() - started:.0f} s", flush=True)
        if arguments.results:
            write(arguments.results, results)
    print(markdown(results))


if __name__ == "__main__":
    main()
