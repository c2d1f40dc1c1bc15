"""Writes what `pytest bench` measured to bench/results/: one JSON and one Markdown table, with the machine's description."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", default=None, help="name of the files under bench/results/ (default: none written)")
    parser.addoption("--small", action="store_true", help="tiny problems instead of the published sizes: does everything run?")
    parser.addoption("--default-malloc", action="store_true", help="give freed memory back to the system, as glibc does")


def pytest_configure(config: pytest.Config) -> None:
    # Not when the tests of the package are run: there the file is not even read.
    if not config.getoption("--default-malloc"):
        from machine import keep_freed_memory

        keep_freed_memory()
    if config.getoption("--small"):
        from head.providers import make_small

        make_small()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    name = session.config.getoption("--results")
    benchmarks = getattr(session.config, "_benchmarksession", None)
    if not name or benchmarks is None or not benchmarks.benchmarks:
        return
    from machine import describe

    rows = []
    for benchmark in benchmarks.benchmarks:
        info = dict(benchmark.extra_info)
        stats = benchmark.stats
        seconds = info.pop("seconds", None)
        parts = info.pop("divide_by", 1)  # an epoch's time is reported as that of its steps
        rows.append(
            {
                **info,
                "median_ms": 1000 * (stats.median / parts if seconds is None else seconds),
                "iqr_ms": 0.0 if seconds is not None else 1000 * stats.iqr / parts,
                "rounds": stats.rounds,
            }
        )
    kept = "Freed memory is kept by the process, so that no provider pays for fresh pages at every step."
    given_back = (
        "glibc's malloc as it comes: large gradients cost fresh pages, at every step or not, by the luck of their sizes."
    )
    memory = given_back if session.config.getoption("--default-malloc") else kept
    report = {"machine": describe(), "memory": memory, "rows": rows}
    (BENCH / "results").mkdir(exist_ok=True)
    _write(BENCH / "results" / f"{name}.json", json.dumps(report, indent=1) + "\n")
    _write(BENCH / "results" / f"{name}.md", as_markdown(report))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def as_markdown(report: dict[str, Any]) -> str:
    """A table a size and mode, each with its ratio to the paper's loop."""
    lines = ["# Benchmark of the head", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    lines += [
        "",
        "Medians of repeats in one run, float32, tensors drawn at random at the published sizes; machines are noisy, so read",
        "the ratios.",
        report["memory"],
        "Peak memory is the growth of a fresh process while it builds and runs the provider.",
    ]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        groups.setdefault((row["device"], row["size"], row["mode"]), []).append(row)
    for (device, size, mode), rows in groups.items():
        base = next((row["median_ms"] for row in rows if row["provider"] in ("paper loop", "nn.Linear")), None)
        lines += [
            "",
            f"## {size}, {mode}, {device}",
            "",
            "| | median ms | quartile range ms | times faster | peak MiB |",
        ]
        lines.append("|---|---:|---:|---:|---:|")
        for row in rows:
            faster = "" if base is None else f"{base / row['median_ms']:.2f}"
            peak = "" if row.get("peak_mib") is None else f"{row['peak_mib']:.0f}"
            extra = f" ({row['gib_per_second']:.1f} GiB/s)" if "gib_per_second" in row else ""
            lines.append(f"| {row['provider']}{extra} | {row['median_ms']:.3f} | {row['iqr_ms']:.3f} | {faster} | {peak} |")
    return "\n".join(lines) + "\n"
