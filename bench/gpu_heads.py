"""The head against its peers on a GPU: each captured in a CUDA graph and eagerly, in turns, beside the floor that memory sets.

``python bench/gpu_heads.py --output FILE`` writes JSON after each table; ``python bench/gpu.py --stage bench`` runs it.
"""

from __future__ import annotations

import argparse
import gc
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_limits import copy_bandwidth, usable_bytes
from gpu_timing import Task, Times, captured, captured_backward, require_gpu, time_interleaved, write_json
from head.providers import PROVIDERS, SIZES, Problem, Size, make_problem, make_step
from torch import Tensor, nn
from torch.nn import functional

from alphaext import reference

MODES = ("forward", "backward", "forward+backward", "sgd step")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Relative to the largest score, against float64: sums of some thousand terms, and in bfloat16 the rounding of the scores and
# of the saved inputs on the way.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
# A step that is shorter than this is captured several times into one graph, so that what lies between two replays does not
# count; only where its data fits into the cache anyhow, since a second step finds it there.
SHORT_MS = 0.2
MOST_STEPS = 50


# ---- Floors --------------------------------------------------------------------------------------------------------------


def form_of(provider: str) -> str:
    """What a provider must move at the least: "dense" weights, "factored" ones, or "cached" logits and no classifier."""
    if "cached" in provider:
        return "cached"
    return "factored" if "factored" in provider else "dense"


def bytes_moved(size: Size, element: int, form: str, mode: str) -> int:
    """The fewest bytes of one step: each array read once, each result written once, sums kept in 4 bytes.

    The classifier is frozen. The loss is not counted. The update reads parameter, gradient and momentum, and writes parameter
    and momentum: what torch.optim's fused SGD does, which every provider uses.
    """
    few, hidden, members, classes, batch = size.num_few, size.pca_dim, size.top_k + 1, size.num_classes, size.batch
    inputs = members * size.pca_dim
    first = few * hidden * (inputs if form == "dense" else 0) + few * hidden
    second = few * members * hidden + few * members
    z = few * inputs if form == "dense" else 0
    source = batch * classes if form == "cached" else batch * size.in_features + classes * (size.in_features + 1)
    scores = batch * classes
    ids, alpha, logits = 8 * few * members, 4 * few * members, 4 * batch * classes
    forward = (first + second + z + source + scores) * element + ids
    # Read: the scores' gradient, the logits, alpha and what it came from, w2, z. Written: every parameter's gradient.
    backward = (scores + few * members * hidden + z + first + second) * element + logits + 2 * alpha + 4 * few * hidden + ids
    update = 5 * (first + second) * element
    return {"forward": forward, "backward": backward}.get(mode, forward + backward + (update if mode == "sgd step" else 0))


def steps_in_graph(step_ms: float, num_bytes: int, cache_bytes: int) -> int:
    """How many steps one graph holds."""
    if step_ms >= SHORT_MS or 2 * num_bytes > cache_bytes:
        return 1
    return max(1, min(MOST_STEPS, math.ceil(2 * SHORT_MS / max(step_ms, 1e-4))))


# ---- What is timed -------------------------------------------------------------------------------------------------------


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that have a gradient."""
    return [p for p in module.parameters() if p.requires_grad]


def make_loss(module: nn.Module, problem: Problem, cached_logits: bool) -> Callable[[], Tensor]:
    """The loss whose backward is timed, as in ``providers.make_step``."""
    inputs = problem.logits() if cached_logits else problem.features
    return lambda: functional.cross_entropy(module(inputs), problem.labels)


def eager_task(module: nn.Module, problem: Problem, cached_logits: bool, mode: str) -> Task:
    """One step as PyTorch runs it."""
    if mode != "backward":
        return Task(make_step(module, problem, cached_logits, mode))
    loss, parameters = make_loss(module, problem, cached_logits), trained(module)
    waiting: list[Tensor] = []
    return Task(lambda: torch.autograd.grad(waiting.pop(), parameters), prepare=lambda: waiting.append(loss()))


def graph_task(module: nn.Module, problem: Problem, cached_logits: bool, mode: str, steps: int) -> Task:
    """The same, captured in a CUDA graph."""
    if mode != "backward":
        return captured(make_step(module, problem, cached_logits, mode), steps)
    return captured_backward(make_loss(module, problem, cached_logits), trained(module), steps)


def check_scores(module: nn.Module, problem: Problem, dtype: str) -> float:
    """The largest error of the scores, relative to the largest score, against the reference in float64."""
    wide = [x.double() for x in (problem.features, problem.weight, problem.bias)]
    w1, b1, w2, b2 = (getattr(module, name).detach().double() for name in ("w1", "b1", "w2", "b2"))
    z, members = problem.z.double(), problem.members
    expected = reference.alpha_head(wide[0], wide[1], wide[2], members, z, w1, b1, w2, b2, gamma=0.7)
    with torch.no_grad():
        actual = module(problem.features).double()
    error = float((actual - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCES[dtype]:
        raise ValueError(f"scores differ from the reference by {error:.2g} of the largest; allowed is {TOLERANCES[dtype]}")
    return error


# ---- One table -----------------------------------------------------------------------------------------------------------


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def _time_safely(
    tasks: dict[str, Task], errors: dict[str, str], device: str, head_start: bool, rounds: int, budget: float
) -> dict[str, Times]:
    """Times of the tasks that run; one that does not is dropped with its error, so that the others keep their turns."""
    for name, task in list(tasks.items()):
        try:
            for _ in range(2):
                if task.prepare is not None:
                    task.prepare()
                task.run()
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            errors[name] = _message(error)
            del tasks[name]
    return time_interleaved(tasks, device, rounds=rounds, budget_seconds=budget, head_start=head_start) if tasks else {}


def measure_mode(
    modules: dict[str, nn.Module],
    problem: Problem,
    dtype: str,
    mode: str,
    device: str,
    *,
    copy_bytes_per_s: float,
    cache_bytes: int = 0,
    rounds: int = 15,
    budget: float = 2.0,
) -> list[dict[str, Any]]:
    """A row for each provider."""
    errors: dict[str, str] = {}
    moved = {name: bytes_moved(problem.size, DTYPES[dtype].itemsize, form_of(name), mode) for name in modules}

    def tasks_of(make: Callable[[str], Task], names: Sequence[str]) -> dict[str, Task]:
        tasks = {}
        for name in names:
            try:
                tasks[name] = make(name)
            except Exception as error:  # a peer that cannot be captured leaves the others their table
                errors[name] = _message(error)
                traceback.print_exc()
        return tasks

    eager_tasks = tasks_of(lambda name: eager_task(modules[name], problem, PROVIDERS[name][1], mode), list(modules))
    eager = _time_safely(eager_tasks, errors, device, False, rounds, budget)
    del eager_tasks
    graphs: dict[str, Times] = {}
    steps = dict.fromkeys(modules, 1)
    if device == "cuda":

        def make_graph(name: str) -> Task:
            module, cached_logits = modules[name], PROVIDERS[name][1]
            for parameter in trained(module):
                parameter.grad = None  # it would be in memory that the graph does not own
            task = graph_task(module, problem, cached_logits, mode, 1)
            once = time_interleaved({name: task}, device, rounds=5, head_start=True)[name].median_ms
            steps[name] = steps_in_graph(once, moved[name], cache_bytes)
            return task if steps[name] == 1 else graph_task(module, problem, cached_logits, mode, steps[name])

        graph_tasks = tasks_of(make_graph, list(eager))
        graphs = _time_safely(graph_tasks, errors, device, True, rounds, budget)
        del graph_tasks
    rows = []
    for name in modules:
        row: dict[str, Any] = {"size": problem.size.name, "dtype": dtype, "mode": mode, "provider": name, "device": device}
        row |= {"bytes": moved[name], "floor_ms": 1e3 * moved[name] / copy_bytes_per_s}
        row |= {"graph": asdict(graphs[name]) if name in graphs else None, "steps_in_graph": steps[name]}
        row |= {"eager": asdict(eager[name]) if name in eager else None}
        rows.append(row | ({"error": errors[name]} if name in errors else {}))
    for module in modules.values():
        for parameter in module.parameters():
            parameter.grad = None
    return rows


def _collect(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def measure(
    device: str,
    output: Path | None,
    *,
    sizes: Sequence[Size] = tuple(SIZES.values()),
    dtypes: Sequence[str] = tuple(DTYPES),
    modes: Sequence[str] = MODES,
    providers: Sequence[str] = tuple(PROVIDERS),
    rounds: int = 15,
    budget: float = 2.0,
    num_bytes: int = 2**30,
) -> dict[str, Any]:
    """All tables, the largest problem first; the file is written after each."""
    num_bytes = usable_bytes(device, num_bytes)
    copy_bytes_per_s = copy_bandwidth(device, num_bytes)
    cache_bytes = int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) if device == "cuda" else 0
    report: dict[str, Any] = {"copy_gb_per_s": round(copy_bytes_per_s / 1e9, 1), "cache_bytes": cache_bytes}
    report |= {"score_errors": {}, "rows": []}
    for size in sizes:
        for dtype in dtypes:
            # Otherwise the compiler, having seen other sizes, would compile for sizes in general.
            torch.compiler.reset()
            problem = make_problem(size, device, DTYPES[dtype])
            modules: dict[str, nn.Module] = {}
            for name in providers:
                torch.manual_seed(0)
                try:
                    modules[name] = PROVIDERS[name][0](problem)
                except Exception as error:
                    row = {"size": size.name, "dtype": dtype, "mode": "-", "provider": name, "device": device}
                    report["rows"].append(row | {"graph": None, "eager": None, "error": _message(error)})
            if "alphaext dense" in modules:
                try:
                    error_of_scores = check_scores(modules["alphaext dense"], problem, dtype)
                    report["score_errors"][f"{size.name}, {dtype}"] = float(f"{error_of_scores:.2g}")
                except Exception as error:
                    row = {"size": size.name, "dtype": dtype, "mode": "check", "provider": "alphaext dense", "device": device}
                    report["rows"].append(row | {"graph": None, "eager": None, "error": _message(error)})
            _collect(device)
            for mode in modes:
                report["rows"] += measure_mode(
                    modules,
                    problem,
                    dtype,
                    mode,
                    device,
                    copy_bytes_per_s=copy_bytes_per_s,
                    cache_bytes=cache_bytes,
                    rounds=rounds,
                    budget=budget,
                )
                write_json(output, report)
                _collect(device)
                print(f"{size.name}, {dtype}, {mode}", flush=True)
            del modules, problem
            _collect(device)
    return report


def own_failures(report: dict[str, Any]) -> list[str]:
    """What did not run of this package itself; a peer that fails is a note in the table."""
    return [
        f"{row['provider']}, {row['size']}, {row['dtype']}, {row['mode']}: {row['error']}"
        for row in report["rows"]
        if "error" in row and row["provider"].startswith("alphaext")
    ]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--size", choices=list(SIZES), action="append", help="default: all")
    parser.add_argument("--dtype", choices=list(DTYPES), action="append", help="default: all")
    parser.add_argument("--mode", choices=list(MODES), action="append", help="default: all")
    parser.add_argument("--provider", choices=list(PROVIDERS), action="append", help="default: all")
    options = parser.parse_args()
    require_gpu(options.device)
    report = measure(
        options.device,
        options.output,
        sizes=[SIZES[name] for name in options.size or SIZES],
        dtypes=options.dtype or list(DTYPES),
        modes=options.mode or list(MODES),
        providers=options.provider or list(PROVIDERS),
    )
    failures = own_failures(report)
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
