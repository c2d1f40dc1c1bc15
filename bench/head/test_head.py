"""Speed and memory of the head against its peers. Run with ``pytest bench``; see bench/conftest.py for the report."""

from __future__ import annotations

import gc
import time

import pytest
import torch
from head.memory import peak_in_own_process
from head.providers import MODES, PROVIDERS, SIZES, Size, make_problem, make_step
from machine import PeakMemory, seconds_to_read
from torch.nn import functional

from alphaext import fit

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def measure(benchmark, step, device: str) -> None:
    def timed() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    timed()
    # Slow steps are repeated less: a benchmark of everything should end within minutes.
    once = benchmark_seconds(timed)
    rounds = 7 if once > 0.05 else 50
    iterations = max(1, int(0.004 / once))
    benchmark.pedantic(timed, rounds=rounds, iterations=iterations, warmup_rounds=2)


def benchmark_seconds(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_head(benchmark, pytestconfig, device, size, mode, provider):
    torch.manual_seed(0)
    gc.collect()
    problem = make_problem(SIZES[size], device)
    make, cached_logits = PROVIDERS[provider]
    memory = PeakMemory(device) if device == "cuda" else None
    module = make(problem)
    step = make_step(module, problem, cached_logits, mode)
    benchmark.group = f"{size}, {mode}, {device}"
    benchmark.name = provider
    measure(benchmark, step, device)
    peak = None
    if memory is not None:
        peak = memory.above_start()
    elif benchmark.enabled and not pytestconfig.getoption("--small"):
        peak = peak_in_own_process(size, mode, provider)
    benchmark.extra_info.update(device=device, size=size, mode=mode, provider=provider, peak_mib=peak)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_step_within_fit(benchmark, device, size):
    """A step as `fit` takes it from features: an epoch's logits in one product, few ones kept; a training over its steps."""
    size_of = SIZES[size]
    problem = make_problem(size_of, device)
    head = PROVIDERS["alphaext factored"][0](problem)
    features, labels = (x.to(device) for x in make_samples(head.few_classes.cpu(), size_of))
    options = {"epochs": 3, "batch_size": size_of.batch, "negative_ratio": 1.0, "lr": 1e-4, "engine": "autograd"}

    benchmark.group = f"{size}, sgd step, {device}"
    benchmark.name = "alphaext factored, within fit"
    measure(benchmark, lambda: fit(head, features, labels, **options), device)
    steps = options["epochs"] * -(-2 * size_of.few_samples // size_of.batch)
    benchmark.extra_info.update(
        device=device, size=size, mode="sgd step", provider="alphaext factored, within fit", peak_mib=None, divide_by=steps
    )


def make_samples(few_classes: torch.Tensor, size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Few samples as many as published, and a pool of base samples that is large enough to draw as many from."""
    generator = torch.Generator("cpu").manual_seed(1)
    few_labels = few_classes[torch.arange(size.few_samples) % len(few_classes)]
    is_base = torch.ones(size.num_classes, dtype=torch.bool)
    is_base[few_classes] = False
    base_classes = is_base.nonzero().flatten()
    base_labels = base_classes[torch.randint(len(base_classes), (4 * size.few_samples,), generator=generator)]
    labels = torch.cat([few_labels, base_labels])
    return torch.randn(len(labels), size.in_features, generator=generator), labels


@pytest.mark.parametrize("provider", ["nn.Linear", "folded head"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_folded(benchmark, device, size, provider):
    """A folded head is a plain nn.Linear, and costs what one costs."""
    problem = make_problem(SIZES[size], device)
    if provider == "nn.Linear":
        layer = torch.nn.Linear(problem.weight.shape[1], problem.weight.shape[0], device=device)
    else:
        layer = PROVIDERS["alphaext factored"][0](problem).fold()

    def step() -> None:
        with torch.no_grad():
            layer(problem.features)

    benchmark.group = f"{size}, folded forward, {device}"
    benchmark.name = provider
    measure(benchmark, step, device)
    benchmark.extra_info.update(device=device, size=size, mode="folded forward", provider=provider, peak_mib=None)


@pytest.mark.parametrize("what", ["read w1 once", "logits' product"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_floor(benchmark, device, size, what):
    """What the forward cannot be faster than: w1 through memory once; and the product that scores need in any form."""
    problem = make_problem(SIZES[size], device)
    benchmark.group = f"{size}, floor, {device}"
    benchmark.name = what
    if what == "read w1 once":
        s = SIZES[size]
        w1 = torch.ones(s.num_few, s.pca_dim, (s.top_k + 1) * s.pca_dim, device=device)
        seconds = seconds_to_read(w1)
        benchmark.extra_info.update(gib_per_second=w1.numel() * 4 / seconds / 2**30, seconds=seconds)
        benchmark.pedantic(lambda: None, rounds=1)
    else:
        measure(benchmark, lambda: functional.linear(problem.features, problem.weight, problem.bias), device)
    benchmark.extra_info.update(device=device, size=size, mode="floor", provider=what, peak_mib=None)
