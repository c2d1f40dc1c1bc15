"""The head against its peers on a GPU: each captured in a CUDA graph and eagerly, in turns, beside the bytes it must move."""

from __future__ import annotations

import gc
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from head.providers import PROVIDERS, SIZES, Problem, Size, make_problem, make_step
from torch import Tensor, nn
from torch.nn import functional

from alphaext import reference
from gpu_proof.parts import Part
from gpu_proof.timing import Task, Times, captured, captured_backward, time_interleaved

MODES = ("forward", "backward", "forward+backward", "sgd step")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Relative to the largest score, against float64: sums of some thousand terms, and in bfloat16 the rounding of the scores and
# of the saved inputs on the way.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
# A step that is shorter than this is captured several times into one graph, so that what lies between two replays does not
# count, if its data fits into the cache: there a second step finds it anyhow.
SHORT_MS = 0.2
MOST_STEPS = 50
# Steps whose data exceeds the cache are timed alone in a graph, and so many of them in one, too.
STEPS_BEYOND_CACHE = 8

OWN = tuple(name for name in PROVIDERS if name.startswith("alphaext"))
COMPILED = tuple(name for name in PROVIDERS if "compile" in name)
LARGEST = (SIZES["imagenet-lt"],)
TINY = (Size("tiny", num_classes=12, num_few=3, pca_dim=4, few_samples=5, top_k=2, in_features=8, batch=4),)


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


def steps_in_graph(step_ms: float, num_bytes: int, cache_bytes: int) -> tuple[int, int]:
    """How many steps the graph holds whose figure counts, and how many another one beside it (0: there is none)."""
    if 2 * num_bytes > cache_bytes:
        return 1, STEPS_BEYOND_CACHE
    if step_ms >= SHORT_MS:
        return 1, 0
    return max(1, min(MOST_STEPS, math.ceil(2 * SHORT_MS / max(step_ms, 1e-4)))), 0


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
    cache_bytes: int = 0,
    eager: bool = True,
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

    times: dict[str, dict[str, Times]] = {"eager": {}, "graph": {}, "several": {}}
    if eager or device != "cuda":
        eager_tasks = tasks_of(lambda name: eager_task(modules[name], problem, PROVIDERS[name][1], mode), list(modules))
        times["eager"] = _time_safely(eager_tasks, errors, device, False, rounds, budget)
        del eager_tasks
    steps = dict.fromkeys(modules, (1, 0))
    if device == "cuda":

        def make_graph(name: str, count: int) -> Task:
            module, cached_logits = modules[name], PROVIDERS[name][1]
            for parameter in trained(module):
                parameter.grad = None  # it would be in memory that the graph does not own
            return graph_task(module, problem, cached_logits, mode, count)

        def make_first(name: str) -> Task:
            task = make_graph(name, 1)
            once = time_interleaved({name: task}, device, rounds=5, head_start=True)[name].median_ms
            steps[name] = steps_in_graph(once, moved[name], cache_bytes)
            return task if steps[name][0] == 1 else make_graph(name, steps[name][0])

        running = [name for name in modules if name not in errors]
        tasks = tasks_of(make_first, running)
        times["graph"] = _time_safely(tasks, errors, device, True, rounds, budget)
        tasks = {}
        tasks = tasks_of(lambda name: make_graph(name, steps[name][1]), [name for name in times["graph"] if steps[name][1]])
        times["several"] = _time_safely(tasks, errors, device, True, rounds, budget)
        del tasks
    rows = []
    for name in modules:
        row: dict[str, Any] = {"size": problem.size.name, "dtype": dtype, "mode": mode, "provider": name, "device": device}
        row |= {"bytes": moved[name], "steps_in_graph": steps[name][0]}
        row |= {kind: asdict(found[name]) if name in found else None for kind, found in times.items()}
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


class Bench:
    """A problem and its providers, made when they are first asked for."""

    def __init__(self, device: str, size: Size, dtype: str, providers: Sequence[str]) -> None:
        self.device, self.size, self.dtype, self.providers = device, size, dtype, providers
        self.problem: Problem | None = None
        self.modules: dict[str, nn.Module] = {}
        self.errors: dict[str, str] = {}

    def made(self) -> Problem:
        if self.problem is None:
            # Otherwise the compiler, having seen other sizes, would compile for sizes in general.
            torch.compiler.reset()
            self.problem = make_problem(self.size, self.device, DTYPES[self.dtype])
            for name in self.providers:
                torch.manual_seed(0)
                try:
                    self.modules[name] = PROVIDERS[name][0](self.problem)
                except Exception as error:  # too little memory for a peer leaves the others
                    self.errors[name] = _message(error)
        return self.problem

    def scores(self) -> float:
        """The error of the scores."""
        problem = self.made()
        return float(f"{check_scores(self.modules['alphaext dense'], problem, self.dtype):.2g}")

    def rows(self, mode: str, **options: Any) -> list[dict[str, Any]]:
        """A row for each provider; an error is a row's, and fails the part only where the package itself has one."""
        problem = self.made()
        cache_bytes = 0
        if self.device == "cuda":
            cache_bytes = int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0))
        rows = measure_mode(self.modules, problem, self.dtype, mode, self.device, cache_bytes=cache_bytes, **options)
        base = {"size": self.size.name, "dtype": self.dtype, "mode": mode, "device": self.device}
        rows += [{**base, "provider": name, "error": error} for name, error in self.errors.items()]
        _collect(self.device)
        return rows

    def forget(self) -> None:
        """Give the memory back."""
        self.problem, self.modules = None, {}
        _collect(self.device)


def parts(
    device: str,
    *,
    sizes: Sequence[Size] = tuple(SIZES.values()),
    dtypes: Sequence[str] = tuple(DTYPES),
    modes: Sequence[str] = MODES,
    providers: Sequence[str] = tuple(PROVIDERS),
    seconds: float = 25.0,
    **options: Any,
) -> Iterator[Part]:
    """All tables, the largest problem first."""
    for size in sizes:
        for dtype in dtypes:
            bench = Bench(device, size, dtype, providers)
            for mode in modes:
                yield Part(f"heads: {size.name}, {dtype}, {mode}", partial(bench.rows, mode, **options), seconds)
            if "alphaext dense" in providers:
                yield Part(f"scores: {size.name}, {dtype}", bench.scores, seconds)
            bench.forget()


def peers(device: str, small: bool) -> Iterator[Part]:
    """The package beside all peers but the compiled ones."""
    names = [name for name in PROVIDERS if name not in COMPILED]
    yield from parts(device, sizes=TINY if small else tuple(SIZES.values()), providers=names)


def compiled_peers(device: str, small: bool) -> Iterator[Part]:
    """The package beside the compiled peers, which take long to make."""
    names = [name for name in PROVIDERS if name in COMPILED or name == "alphaext dense"]
    if small:
        yield from parts(device, sizes=TINY, dtypes=["float32"], modes=["forward"], providers=names, seconds=60.0)
    else:
        yield from parts(device, providers=names, seconds=60.0)
