"""What bench/gpu.py measures: floors, turns, graphs, and the measuring code itself on the CPU."""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
if not (BENCH / "gpu.py").is_file():
    pytest.skip("the tests of the benchmarks need the source tree", allow_module_level=True)

from gpu_proof import core, heads, large, limits, probe, profiled, report, smoke, stages, timing, trainings  # noqa: E402
from gpu_proof.parts import faults_of, results_of, run_parts  # noqa: E402
from head.providers import SIZES  # noqa: E402

TINY = heads.TINY[0]
UNCOMPILED = [name for name in heads.PROVIDERS if name not in heads.COMPILED]


def found(parts) -> dict:
    """What parts find, none of which may fail."""
    entries = run_parts(parts, None)
    assert faults_of(entries) == {}
    return results_of(entries)


def test_small_cases_are_right_on_the_cpu_and_cover_every_operator(monkeypatch):
    found(part for part in smoke.parts("cpu", False) if "torch.float32, l1" in part.name)
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("alphaext::")}
    on_gpu = {name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")}
    assert on_gpu <= {f"alphaext::{name}" for name in smoke.COVERED}, "give a new operator its cases in smoke.py"

    def wrong(*arguments, **options):
        raise AssertionError("planted")

    monkeypatch.setattr(smoke, "assert_close", wrong)
    (fault,) = faults_of(run_parts((part for part in smoke.parts("cpu", False) if "no samples" in part.name), None)).values()
    assert fault == "AssertionError: planted"


def test_trainings_come_first_and_every_case_has_a_name_of_its_own():
    names = [part.name for part in smoke.parts("cpu", False)]
    assert len(set(names)) == len(names) > 150 and names[0].startswith("training")
    for dtype in ("float64", "float32", "float16", "bfloat16"):
        for way in ("one launch", "products apart"):
            assert any(f"torch.{dtype}" in name and way in name for name in names)


def test_floors():
    size = SIZES["imagenet-lt"]
    weights = 136 * 500 * 3000
    assert heads.form_of("paper loop") == heads.form_of("alphaext dense") == "dense"
    assert heads.form_of("alphaext factored, cached logits") == "cached"
    forward = heads.bytes_moved(size, 4, "dense", "forward")
    assert 4 * weights < forward < 4.1 * weights
    assert 4 * weights < heads.bytes_moved(size, 4, "dense", "backward") < 4.1 * weights
    both = heads.bytes_moved(size, 4, "dense", "forward+backward")
    assert both == forward + heads.bytes_moved(size, 4, "dense", "backward")
    step = heads.bytes_moved(size, 4, "dense", "sgd step")
    assert 7 * 4 * weights < step < 7.1 * 4 * weights
    assert 2 * weights < heads.bytes_moved(size, 2, "dense", "forward") < forward / 1.99
    factored, cached = (heads.bytes_moved(size, 4, form, "forward") for form in ("factored", "cached"))
    assert factored - cached == 4 * (64 * 2048 + 1000 * 2049 - 64 * 1000)
    # By hand: 3 few of 12 classes, 3 members, 4 hidden, 12 inputs, 8 features, batch 4, in float32.
    w1, b1, w2, b2, z = 3 * 4 * 12, 3 * 4, 3 * 3 * 4, 3 * 3, 3 * 12
    forward = 4 * (w1 + b1 + w2 + b2 + z + 4 * 8 + 12 * 8 + 12 + 4 * 12) + 8 * 9
    assert heads.bytes_moved(TINY, 4, "dense", "forward") == forward
    backward = 4 * (4 * 12 + 4 * 12 + 2 * 9 + w2 + 3 * 4 + z + w1 + b1 + w2 + b2) + 8 * 9
    assert heads.bytes_moved(TINY, 4, "dense", "backward") == backward


def test_short_steps_share_a_graph_where_their_data_fits_the_cache_and_larger_ones_are_timed_both_ways():
    assert heads.steps_in_graph(0.01, 10**6, 50 * 10**6) == (40, 0)
    assert heads.steps_in_graph(0.0, 10**6, 50 * 10**6) == (heads.MOST_STEPS, 0)
    assert heads.steps_in_graph(0.5, 10**6, 50 * 10**6) == (1, 0)
    for milliseconds in (0.01, 0.2, 5.0):
        assert heads.steps_in_graph(milliseconds, 30 * 10**6, 50 * 10**6) == (1, heads.STEPS_BEYOND_CACHE)


def test_summary_and_turns():
    assert timing.summarise([3.0, 1.0, 2.0]) == timing.Times(2.0, 1.0, 3)
    assert timing.summarise([4.0]) == timing.Times(4.0, 0.0, 1)
    order: list[str] = []
    tasks = {
        "a": timing.Task(lambda: order.append("a"), prepare=lambda: order.append("before a")),
        "b": timing.Task(lambda: time.sleep(0.01), steps=10),
    }
    times = timing.time_interleaved(tasks, "cpu", rounds=6)
    assert order == ["before a", "a"] * 7  # one to warm up
    assert times["a"].rounds == 6 and 1.0 <= times["b"].median_ms < 5.0
    assert timing.time_interleaved(tasks, "cpu", rounds=50, budget_seconds=0.0)["b"].rounds == 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_benchmark_runs_on_a_cpu(dtype):
    made = found(heads.parts("cpu", sizes=[TINY], dtypes=[dtype], providers=UNCOMPILED, rounds=2))
    assert list(made) == [f"heads: tiny, {dtype}, {mode}" for mode in heads.MODES] + [f"scores: tiny, {dtype}"]
    for mode in heads.MODES:
        rows = made[f"heads: tiny, {dtype}, {mode}"]
        assert [row["provider"] for row in rows] == UNCOMPILED
        for row in rows:
            assert "error" not in row and row["graph"] is None and row["several"] is None
            assert row["eager"]["median_ms"] > 0 and math.isfinite(row["bytes"])
    assert made[f"scores: tiny, {dtype}"] < heads.TOLERANCES[dtype]
    assert "### tiny" in "\n".join(report.head_lines(made, {}))


class FakeStream:
    def wait_stream(self, other):
        pass


class FakeEvent:
    def __init__(self, enable_timing):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


class FakeGraph:
    replays = 0

    def pool(self):
        return 1

    def replay(self):
        FakeGraph.replays += 1


@pytest.fixture
def fake_cuda(monkeypatch):
    """Enough of torch.cuda for the code around graphs and events to run where there is no GPU; a capture only runs."""
    fakes = {"Stream": FakeStream, "Event": FakeEvent, "CUDAGraph": FakeGraph, "current_stream": FakeStream}
    fakes |= {"stream": lambda stream: contextlib.nullcontext(), "_sleep": lambda cycles: None, "synchronize": lambda: None}
    fakes["graph"] = lambda graph, pool=None, stream=None: contextlib.nullcontext()
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(FakeGraph, "replays", 0)


@pytest.mark.parametrize("mode", heads.MODES)
@pytest.mark.parametrize("cache_bytes", [10**9, 0], ids=["fits the cache", "exceeds it"])
def test_the_way_through_graphs_and_events(fake_cuda, mode, cache_bytes):
    problem = heads.make_problem(TINY)
    modules = {name: heads.PROVIDERS[name][0](problem) for name in UNCOMPILED}
    rows = heads.measure_mode(modules, problem, "float32", mode, "cuda", cache_bytes=cache_bytes, rounds=5)
    assert [row["provider"] for row in rows] == UNCOMPILED
    for entry in rows:
        assert "error" not in entry and entry["graph"]["rounds"] == entry["eager"]["rounds"] == 5
        # Nothing happens in a replay, so it takes no time.
        assert entry["steps_in_graph"] == (heads.MOST_STEPS if cache_bytes else 1)
        assert (entry["several"] is None) is bool(cache_bytes)
    # Once to find its length, twice to warm up, then the rounds; what exceeds the cache a second time.
    replays = len(UNCOMPILED) * (6 + (2 + 6) * (1 if cache_bytes else 2))
    assert FakeGraph.replays == replays * (2 if mode == "backward" else 1)  # a forward before every backward


def test_the_core_asks_for_graphs_alone(fake_cuda):
    problem = heads.make_problem(TINY)
    modules = {name: heads.PROVIDERS[name][0](problem) for name in heads.OWN}
    rows = heads.measure_mode(modules, problem, "float32", "forward", "cuda", cache_bytes=0, rounds=5, eager=False)
    assert all(row["eager"] is None and row["graph"] and row["several"] for row in rows)


def test_a_peer_that_cannot_be_captured_keeps_its_eager_figure(fake_cuda, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("cannot be captured\nand more")

    monkeypatch.setattr(heads, "captured", refuse)
    problem = heads.make_problem(TINY)
    modules = {"paper loop": heads.PROVIDERS["paper loop"][0](problem)}
    (entry,) = heads.measure_mode(modules, problem, "float32", "forward", "cuda", rounds=2)
    assert entry["graph"] is None and entry["eager"]["median_ms"] > 0
    assert entry["error"] == "RuntimeError: cannot be captured"


def failure_of(rows) -> str | None:
    """What the stage with these rows makes of them."""
    return stages.failing_rows(stages.Outcome(result={"parts": parts_of({"heads: tiny": rows})})).failed


def test_a_provider_that_fails_leaves_the_others_their_figures(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("planted")

    monkeypatch.setitem(heads.PROVIDERS, "batched baddbmm", (broken, False))
    providers = ["paper loop", "batched baddbmm", "alphaext factored"]
    options = {"sizes": [TINY], "dtypes": ["float32"], "modes": ["forward"], "rounds": 2}
    (rows,) = found(heads.parts("cpu", providers=providers, **options)).values()
    failed = [row for row in rows if "error" in row]
    assert [row["provider"] for row in failed] == ["batched baddbmm"] and failed[0]["error"] == "RuntimeError: planted"
    assert len(rows) == 3 and failure_of(rows) is None
    monkeypatch.setattr(heads, "make_step", broken)
    (rows,) = found(heads.parts("cpu", providers=["alphaext factored"], **options)).values()
    assert str(failure_of(rows)).startswith("1 rows of the package failed, the first: alphaext factored")


def test_the_core_runs_on_a_cpu():
    made = found(core.parts("cpu", True))
    assert next(iter(made)) == "copy_gb_per_s" and "heads: tiny, bfloat16, backward" in made
    known = report.limits_of({"stages": [{"name": "core", "result": {"parts": parts_of(made)}}]})
    assert set(known) == {name for name in made if name in report.LIMIT_TEXTS} and all(value > 0 for value in known.values())
    page = "\n".join(report.core_lines(made, known))
    assert "matrix product, TF32" in page and "An epoch of training: " in page and "### tiny, float32, forward" in page


def parts_of(made: dict) -> dict:
    return {name: {"status": "done", "result": value} for name, value in made.items()}


def test_every_main_kernel_has_a_program_for_the_profiler():
    assert len(found(profiled.parts("cpu", True))) == 5


def test_large_heads_are_measured(monkeypatch):
    monkeypatch.setenv(large.FUSED_SCORES, "77")
    made = found(large.parts("cpu", True))
    assert len(report.rows_of(made, "crossing")) == len(report.rows_of(made, "large")) == 4  # both ways in two dtypes
    page = "\n".join(report.large_lines(made, {"copy_gb_per_s": 4000.0}))
    assert "batch 6, 40 classes, 5 few, bfloat16, backward | 240 |" in page and "| ratio |" in page
    assert os.environ[large.FUSED_SCORES] == "77"


def test_a_large_head_that_fails_leaves_the_others(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(large, "measure_crossing", broken)
    entries = run_parts(large.parts("cpu", True, dtypes=["float32"]), None)
    assert faults_of(entries) == {f"crossing: {large.TINY}, float32": "RuntimeError: out of memory"}
    assert len(report.rows_of(results_of(entries), "large")) == 2


def test_bytes_of_a_large_head():
    size = large.LargeSize(batch=2, num_classes=10, num_few=3, in_features=8, hidden=4, top_k=1)
    # Logits and scores; pre-activations, w2, b2; what is kept of them; ids.
    assert large.bytes_of_large(size, 4)["forward"] == 20 * 8 + (12 + 24 + 6) * 4 + (48 + 48) + 48


def test_large_heads_through_graphs(fake_cuda, monkeypatch):
    make_problem = large.make_problem
    monkeypatch.setattr(large, "make_problem", lambda size, device, dtype: make_problem(size, "cpu", dtype))
    rows = large.measure_crossing(large.TINY, "float32", "cuda", 5, 1.0)
    assert [row["mode"] for row in rows] == ["forward", "backward"] and all(row["one_launch_ms"] > 0 for row in rows)


def test_trainings_are_measured():
    made = found(trainings.parts("cpu", True))
    tiny = made["training: tiny"]
    assert tiny["steps"] == 4 and made["sweep"]["runs"] == 9
    on_gpu = 2 * (1e-6 * tiny["step_us"] * 2 + 1e-3 * tiny["validation_ms"])
    assert tiny["host_s"] == pytest.approx(tiny["training_s"] - on_gpu)
    page = "\n".join(report.training_lines(made, {"barrier_launch_graph_us": 3.0}))
    assert "| tiny | 4 |" in page and "to 9 heads" in page and "a step: 5 few classes: " in page


def test_measuring_needs_a_gpu_and_a_gpu_build(monkeypatch):
    timing.require_gpu("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees none"):
        timing.require_gpu("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("alphaext.build_info", lambda: {"cuda": None})
    with pytest.raises(SystemExit, match="has CPU kernels only|CPU kernels only"):
        timing.require_gpu("cuda")


def test_probe_without_a_toolkit(tmp_path, monkeypatch):
    class Nothing:
        @staticmethod
        def find_toolkit(environment):
            class Search:
                toolkit, rejected = None, ["PATH: nothing there"]

            return Search()

    monkeypatch.setattr(probe, "load_build_support", lambda name: Nothing)
    assert probe.compile_probe(tmp_path, "9.0") == "no CUDA toolkit was found: PATH: nothing there"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(RuntimeError, match="there is no probe: no CUDA toolkit"):
        limits.launch_costs(tmp_path)


# ---- The page --------------------------------------------------------------------------------------------------------

MACHINE = {"gpu": "Test GPU", "capability": "9.0", "driver": "1", "cuda": "13.0", "torch": "2.11", "commit": "abc"}


def row(provider: str, ms: float | None, **more) -> dict:
    times = None if ms is None else {"median_ms": ms, "iqr_ms": 0.01, "rounds": 9}
    # Its floor is 0.2 ms at 4300 GB/s.
    base = {"size": "tiny", "dtype": "float32", "mode": "forward", "provider": provider, "bytes": 860_000_000}
    return {**base, "graph": times, "several": None, "eager": {"median_ms": 50.0, "iqr_ms": 0.0, "rounds": 9}, **more}


def test_ratios():
    rows = [
        row("paper loop", 10.0),
        row("batched baddbmm", 2.0),
        row("batched + torch.compile", 1.5),
        row("alphaext dense", 0.25, several={"median_ms": 0.21}),
        row("alphaext factored", 0.01),
    ]
    known = {"copy_gb_per_s": 4300.0, "barrier_launch_graph_us": 5.0}
    compared = {entry["provider"]: entry for entry in report.compared(rows, known)}
    dense, factored = compared["alphaext dense"], compared["alphaext factored"]
    assert dense["over_floor"] == pytest.approx(1.25) and dense["over_launch"] is None
    assert dense["several_over_floor"] == pytest.approx(1.05)
    assert dense["faster_than_paper"] == pytest.approx(40) and dense["faster_than_rival"] == pytest.approx(6)
    assert factored["over_launch"] == pytest.approx(2)
    assert compared["paper loop"]["faster_than_rival"] is None
    alone = report.compared([row("alphaext dense", None)], {})[0]
    assert [alone[name] for name in ("over_floor", "over_launch", "faster_than_paper", "faster_than_rival")] == [None] * 4


def test_page():
    entry = {"status": "passed", "seconds": 12.3, "message": "fine", "notes": ["a note"], "commit": "abc", "when": "today"}
    measured = {"copy_gb_per_s": 4300.0, "launches": {"barrier_launch_graph_us": 5.0}}
    rows = [row("paper loop", 10.0), row("alphaext dense", 0.25), row("batched + torch.compile", None, error="planted | it")]
    kernels = [{"case": "dense", "kernel": "head_forward_kernel<float>", "us": 210.0, "memory %": 91.0}]
    stages = [
        {**entry, "name": "build", "result": {"architecture": "9.0"}, "tail": ""},
        {**entry, "name": "tests", "status": "failed", "message": "1 failed", "result": {}, "tail": "the end"},
        {**entry, "name": "core", "result": {"parts": parts_of(measured)}, "tail": ""},
        {**entry, "name": "profile", "result": {"kernels": kernels}, "tail": ""},
        {**entry, "name": "peers", "result": {"parts": parts_of({"heads: tiny": rows})}, "tail": ""},
    ]
    page = report.as_markdown({"machine": MACHINE, "stages": stages})
    assert page.startswith("# Test GPU: build, tests, sanitizers, limits, benchmarks\n\n- gpu: Test GPU\n")
    assert "| tests | failed | 12 | abc | today | 1 failed |" in page
    assert "```\nthe end\n```" in page and page.count("- a note") == 5
    assert "| alphaext dense | 0.2500 | 0.0100 |  | 50.0000 | 0.2000 | 1.25 |  |  | 40.00 |  |" in page
    assert "- batched + torch.compile failed: planted | it" in page
    assert "| dense | head_forward_kernel<float> | 210.00 | 91.00 |" in page
    lines = page.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("|--"):
            assert line.count("|") == lines[number - 1].count("|") == lines[number + 1].count("|")
