"""What `python bench/gpu.py` found, as JSON and as a Markdown page; plain Python: no fault of a GPU keeps it unwritten."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# Of the peers those that the package is to be faster than, besides the paper's loop.
RIVALS = ("batched baddbmm", "batched + torch.compile")
LIMIT_TEXTS = {
    "copy_gb_per_s": "copy within the device's memory, bytes read plus written, GB/s",
    "read_gb_per_s": "reading the device's memory, GB/s",
    "float32_tflop_per_s": "matrix product, float32, TFLOP/s",
    "tf32_tflop_per_s": "matrix product, TF32, TFLOP/s",
    "bfloat16_tflop_per_s": "matrix product, bfloat16, TFLOP/s",
    "smallest_torch_kernel_us": "PyTorch's smallest kernel in a graph, us",
    "blocks": "blocks of the empty launches below, one a multiprocessor",
    "empty_launch_us": "empty launch, one after another, us",
    "empty_launch_graph_us": "empty launch in a graph, us",
    "barrier_launch_us": "empty cooperative launch with one grid barrier, us",
    "barrier_launch_graph_us": "empty cooperative launch with one grid barrier in a graph, us",
    "probe": "the probe of launches",
}


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_report(directory: Path, name: str, report: dict[str, Any]) -> None:
    """Both files; the page is made first, so that they do not part where that fails."""
    page = as_markdown(report)
    write_whole(directory / f"{name}.json", json.dumps(report, indent=1) + "\n")
    write_whole(directory / f"{name}.md", page)


def merged(old: dict[str, Any] | None, machine: dict[str, Any], stages: list[dict[str, Any]]) -> dict[str, Any]:
    """The report: what an earlier run on the same GPU has of other stages is kept; each stage names its own commit."""
    kept = []
    if old is not None and old.get("machine", {}).get("gpu") == machine.get("gpu"):
        names = {stage["name"] for stage in stages}
        kept = [stage for stage in old.get("stages", []) if stage["name"] not in names]
    return {"machine": machine, "stages": kept + stages}


def read_report(path: Path) -> dict[str, Any] | None:
    """An earlier report, or None where there is none that can be read."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None


def result_of(report: dict[str, Any], stage: str) -> dict[str, Any]:
    """What a stage measured; empty where it did not run."""
    for entry in report["stages"]:
        if entry["name"] == stage:
            result: dict[str, Any] = entry.get("result") or {}
            return result
    return {}


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Their quotient, where both are there."""
    return None if not numerator or not denominator else numerator / denominator


def text_of(value: float | None, digits: int = 2, suffix: str = "") -> str:
    """A figure for a table; empty where there is none."""
    return "" if value is None else f"{value:.{digits}f}{suffix}"


def table(header: list[str], rows: list[list[str]], left: int = 1) -> list[str]:
    """A Markdown table, its first ``left`` columns aligned left."""
    marks = ["---"] * left + ["---:"] * (len(header) - left)
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(marks)}|"]
    return lines + [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]


def graph_ms(row: dict[str, Any] | None) -> float | None:
    """A row's median in a graph."""
    return None if row is None or not row.get("graph") else float(row["graph"]["median_ms"])


def eager_ms(row: dict[str, Any] | None) -> float | None:
    """A row's median when run eagerly."""
    return None if row is None or not row.get("eager") else float(row["eager"]["median_ms"])


def compared(rows: list[dict[str, Any]], barrier_launch_us: float | None) -> list[dict[str, Any]]:
    """The rows of a table with their ratios, graph against graph: to the floor, a launch, the paper's loop, the best rival."""
    by_name = {row["provider"]: row for row in rows}
    paper = graph_ms(by_name.get("paper loop"))
    rival = min((ms for ms in (graph_ms(by_name.get(name)) for name in RIVALS) if ms is not None), default=None)
    launch_ms = None if barrier_launch_us is None else barrier_launch_us / 1000
    result = []
    for row in rows:
        ms = graph_ms(row)
        few_bytes = "factored" in row["provider"]  # their floor is the launch, not the memory
        result.append(
            {
                **row,
                "over_floor": ratio(ms, row.get("floor_ms")),
                "over_launch": ratio(ms, launch_ms) if few_bytes else None,
                "faster_than_paper": ratio(paper, ms),
                "faster_than_rival": ratio(rival, ms) if row["provider"].startswith("alphaext") else None,
            }
        )
    return result


def bench_lines(result: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    """The tables of the benchmark."""
    if not result.get("rows"):
        return []
    barrier = limits.get("barrier_launch_graph_us", limits.get("barrier_launch_us"))
    lines = [
        "Medians of repeats timed with CUDA events, the peers in turns. In a graph: a CUDA graph of the step, replayed; a step",
        "shorter than 0.2 ms whose data fits the cache is captured several times into one graph. Eager: as PyTorch runs it,",
        f"launches and all. Floor: the fewest bytes of the step over {result.get('copy_gb_per_s')} GB/s, the copy bandwidth",
        "measured beside. All ratios are of the figures in graphs; the best rival is the faster of batched baddbmm and",
        "torch.compile. Over launch: against an empty cooperative launch with one grid barrier.",
    ]
    for name, error in result.get("score_errors", {}).items():
        lines.append(f"Largest error of the scores against float64, {name}: {error:.1e} of the largest score.")
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in result.get("rows", []):
        groups.setdefault((row["size"], row["dtype"], row["mode"]), []).append(row)
    for group, rows in groups.items():
        lines += ["", f"### {', '.join(group)}", ""]
        header = ["", "graph ms", "quartile range", "eager ms", "floor ms", "over floor", "over launch"]
        header += ["faster than the paper's loop", "faster than the best rival"]
        cells = [
            [
                row["provider"],
                text_of(graph_ms(row), 4),
                text_of((row.get("graph") or {}).get("iqr_ms"), 4),
                text_of(eager_ms(row), 4),
                text_of(row.get("floor_ms"), 4),
                text_of(row["over_floor"]),
                text_of(row["over_launch"]),
                text_of(row["faster_than_paper"]),
                text_of(row["faster_than_rival"]),
            ]
            for row in compared(rows, barrier)
        ]
        lines += table(header, cells)
        lines += [f"- {row['provider']} failed: {row['error']}" for row in rows if "error" in row]
    return lines


def limit_lines(result: dict[str, Any]) -> list[str]:
    """The card's limits."""
    if not result:
        return []
    rows = [[LIMIT_TEXTS.get(name, name), value if isinstance(value, str) else f"{value:g}"] for name, value in result.items()]
    return table(["", "measured"], rows)


def list_lines(result: dict[str, Any]) -> list[str]:
    """A stage without a table of its own."""
    return [f"- {name}: {value}" for name, value in result.items() if not isinstance(value, dict | list)]


def large_lines(result: dict[str, Any]) -> list[str]:
    """Both ways of a head on either side of the crossing point, and very large heads."""
    lines: list[str] = []
    if result.get("crossing"):
        header = ["", "scores", "products inside, ms", "products apart, ms", "apart over inside"]
        rows = [
            [
                f"{row['size']}, {row['dtype']}, {row['mode']}",
                str(row["scores"]),
                text_of(row["one_launch_ms"], 4),
                text_of(row["products_apart_ms"], 4),
                text_of(row["apart_over_one_launch"]),
            ]
            for row in sorted(result["crossing"], key=lambda row: (row["dtype"], row["mode"], row["scores"]))
        ]
        lines += ["Factored heads. Below 1 the products apart are faster: there the crossing point belongs.", ""]
        lines += table(header, rows)
    if result.get("large"):
        header = ["", "ms", "PyTorch's linear layer, ms", "ratio", "floor of the rest, ms"]
        rows = [
            [
                f"{row['size']}, {row['dtype']}, {row['mode']}",
                text_of(row["ms"], 3),
                text_of(row["linear_ms"], 3),
                text_of(row["over_linear"]),
                text_of(row["floor_of_the_rest_ms"], 3),
            ]
            for row in result["large"]
        ]
        lines += ["", *table(header, rows)]
    return lines + [f"- {error}" for error in result.get("errors", [])]


def training_lines(result: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    """Whole trainings, steps by size, and the sweep."""
    if not result:
        return []
    barrier = limits.get("barrier_launch_graph_us", limits.get("barrier_launch_us"))
    header = ["", "steps", "training s", "shared s", "preparation s", "validation ms", "step us", "over an empty launch"]
    header += ["eager identities in a graph, us", "faster than they"]
    rows = [
        [
            name,
            str(entry["steps"]),
            text_of(entry["training_s"], 4),
            text_of(entry["shared_s"], 4),
            text_of(entry["prepare_s"], 3),
            text_of(entry["validation_ms"], 3),
            text_of(entry["step_us"]),
            text_of(ratio(entry["step_us"], barrier)),
            text_of(entry["rival_step_us"]),
            text_of(entry["faster_than_rival"]),
        ]
        for name, entry in result.get("trainings", {}).items()
    ]
    lines = table(header, rows)
    if "step_us_by_few_classes" in result:
        steps = ", ".join(f"{few}: {us:.2f}" for few, us in result["step_us_by_few_classes"].items())
        lines += ["", f"Microseconds of a step, by the number of few classes: {steps}."]
    if "sweep" in result:
        lines += ["", f"Sweep from features to {result['sweep']['runs']} heads: {result['sweep']['seconds']:.2f} s."]
    return lines


def stage_lines(stages: list[dict[str, Any]]) -> list[str]:
    """Which stages ran, and how they ended."""
    rows = [[s["name"], s["status"], f"{s['seconds']:.0f}", s["commit"], s["when"], s["message"]] for s in stages]
    return table(["stage", "", "seconds", "commit", "when", ""], rows, left=6)


def as_markdown(report: dict[str, Any]) -> str:
    """The whole page."""
    lines = [f"# {report['machine'].get('gpu', 'GPU')}: build, tests, sanitizers, limits, benchmarks", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    lines += ["", *stage_lines(report["stages"])]
    for stage in report["stages"]:
        result = stage.get("result") or {}
        if stage["name"] == "bench":
            body = bench_lines(result, result_of(report, "limits"))
        elif stage["name"] == "limits":
            body = limit_lines(result)
        elif stage["name"] == "large":
            body = large_lines(result)
        elif stage["name"] == "training":
            body = training_lines(result, result_of(report, "limits"))
        else:
            body = list_lines(result)
        parts = [body, [f"- {note}" for note in stage["notes"]]]
        if stage["status"] != "passed" and stage["tail"]:
            parts.append(["```", *stage["tail"].splitlines(), "```"])
        parts = [part for part in parts if part]
        lines += ["", f"## {stage['name']}"] if parts else []
        for part in parts:
            lines += ["", *part]
    return "\n".join(lines).rstrip() + "\n"
