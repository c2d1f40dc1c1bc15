"""What `python bench/gpu.py` found, as JSON and as a Markdown page; plain Python: no fault of a GPU keeps it unwritten."""

from __future__ import annotations

import io
import json
import os
import tarfile
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
}


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


# Of a log what is kept in the archive: its beginning and its end.
LOG_BYTES = 1 << 20


def write_report(directory: Path, name: str, report: dict[str, Any]) -> None:
    """Both files; the page is made first, so that they do not part where that fails."""
    page = as_markdown(report)
    write_whole(directory / f"{name}.json", json.dumps(report, indent=1) + "\n")
    write_whole(directory / f"{name}.md", page)


def write_logs(work: Path, target: Path) -> None:
    """What the stages' processes printed and wrote, in one archive."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for path in sorted(work.glob("*")):
            if path.suffix not in (".log", ".json", ".jsonl", ".txt"):
                continue
            data = path.read_bytes()
            if len(data) > LOG_BYTES:
                half = LOG_BYTES // 2
                data = data[:half] + b"\n[...]\n" + data[-half:]
            member = tarfile.TarInfo(path.name)
            member.size, member.mtime = len(data), int(path.stat().st_mtime)
            archive.addfile(member, io.BytesIO(data))
    write_whole(target, packed.getvalue())


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


def found_by(report: dict[str, Any], stage: str) -> dict[str, Any]:
    """What the parts of a stage found, by their names; empty where it did not run."""
    for entry in report["stages"]:
        if entry["name"] == stage:
            parts = (entry.get("result") or {}).get("parts", {})
            return {name: part["result"] for name, part in parts.items() if part["status"] == "done"}
    return {}


def limits_of(report: dict[str, Any]) -> dict[str, float]:
    """The card's limits."""
    found = found_by(report, "core")
    return {name: value for name, value in (found | found.get("launches", {})).items() if name in LIMIT_TEXTS}


def floor_ms(num_bytes: float | None, limits: dict[str, float]) -> float | None:
    """The time to move so many bytes."""
    copy = limits.get("copy_gb_per_s")
    return None if not copy or num_bytes is None else 1e-6 * num_bytes / copy


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


def several_ms(row: dict[str, Any]) -> float | None:
    """A row's median of a step among several in one graph."""
    return float(row["several"]["median_ms"]) if row.get("several") else None


def compared(rows: list[dict[str, Any]], limits: dict[str, float]) -> list[dict[str, Any]]:
    """The rows of a table with their ratios, graph against graph: to the floor, a launch, the paper's loop, the best rival."""
    by_name = {row["provider"]: row for row in rows}
    paper = graph_ms(by_name.get("paper loop"))
    rival = min((ms for ms in (graph_ms(by_name.get(name)) for name in RIVALS) if ms is not None), default=None)
    barrier = limits.get("barrier_launch_graph_us", limits.get("barrier_launch_us"))
    launch_ms = None if barrier is None else barrier / 1000
    result = []
    for row in rows:
        ms, floor = graph_ms(row), floor_ms(row.get("bytes"), limits)
        few_bytes = "factored" in row["provider"]  # their floor is the launch, not the memory
        result.append(
            {
                **row,
                "floor_ms": floor,
                "over_floor": ratio(ms, floor),
                "several_over_floor": ratio(several_ms(row), floor),
                "over_launch": ratio(ms, launch_ms) if few_bytes else None,
                "faster_than_paper": ratio(paper, ms),
                "faster_than_rival": ratio(rival, ms) if row["provider"].startswith("alphaext") else None,
            }
        )
    return result


def head_lines(found: dict[str, Any], limits: dict[str, float]) -> list[str]:
    """The tables of the heads."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for name, rows in found.items():
        for row in rows if name.startswith("heads: ") else []:
            groups.setdefault((row["size"], row["dtype"], row["mode"]), []).append(row)
    if not groups:
        return []
    lines = [
        "Medians of repeats timed with CUDA events, the peers in turns. In a graph: a CUDA graph of the step, replayed; a step",
        "shorter than 0.2 ms whose data fits the cache is captured several times into one graph. Among several: a step whose",
        "data exceeds the cache, beside it alone, several times in one graph. Eager: as PyTorch runs it, launches and all.",
        f"Floor: the fewest bytes of the step over the copy bandwidth of the stage core, {limits.get('copy_gb_per_s')} GB/s.",
        "Ratios are of the step alone in a graph, but for the column that says otherwise. The best rival is the faster of",
        "batched baddbmm and torch.compile. Over launch: against an empty cooperative launch with one grid barrier.",
    ]
    lines += [f"Largest error against float64, {name}: {error:.1e} of the largest score." for name, error in found.items()
              if name.startswith("scores: ")]  # fmt: skip
    for group, rows in groups.items():
        lines += ["", f"### {', '.join(group)}", ""]
        header = ["", "graph ms", "quartile range", "among several, ms", "eager ms", "floor ms", "over floor"]
        header += ["among several, over floor", "over launch", "faster than the paper's loop", "faster than the best rival"]
        cells = [
            [
                row["provider"],
                text_of(graph_ms(row), 4),
                text_of((row.get("graph") or {}).get("iqr_ms"), 4),
                text_of(several_ms(row), 4),
                text_of(eager_ms(row), 4),
                text_of(row["floor_ms"], 4),
                text_of(row["over_floor"]),
                text_of(row["several_over_floor"]),
                text_of(row["over_launch"]),
                text_of(row["faster_than_paper"]),
                text_of(row["faster_than_rival"]),
            ]
            for row in compared(rows, limits)
        ]
        lines += table(header, cells)
        lines += [f"- {row['provider']} failed: {row['error']}" for row in rows if "error" in row]
    return lines


def core_lines(found: dict[str, Any], limits: dict[str, float]) -> list[str]:
    """The card's limits, the heads, an epoch."""
    lines = table(["", "measured"], [[LIMIT_TEXTS[name], f"{value:g}"] for name, value in limits.items()]) if limits else []
    epoch = found.get("training: an epoch")
    if epoch:
        lines += [
            "",
            f"An epoch of training: {epoch['epoch_ms']:.4f} ms for {epoch['steps']} steps, {epoch['step_us']:.2f} us each.",
        ]
    heads = head_lines(found, limits)
    return [*lines, *(["", *heads] if heads else [])]


def list_lines(result: dict[str, Any]) -> list[str]:
    """A stage without a table of its own."""
    return [f"- {name}: {value}" for name, value in result.items() if not isinstance(value, dict | list)]


def rows_of(found: dict[str, Any], table_name: str) -> list[dict[str, Any]]:
    """All rows of the parts of a table."""
    return [row for name, rows in found.items() if name.startswith(f"{table_name}: ") for row in rows]


def large_lines(found: dict[str, Any], limits: dict[str, float]) -> list[str]:
    """Both ways of a head on either side of the crossing point, and very large heads."""
    lines: list[str] = []
    crossing, large = rows_of(found, "crossing"), rows_of(found, "large")
    if crossing:
        header = ["", "scores", "products inside, ms", "products apart, ms", "apart over inside"]
        rows = [
            [
                f"{row['size']}, {row['dtype']}, {row['mode']}",
                str(row["scores"]),
                text_of(row["one_launch_ms"], 4),
                text_of(row["products_apart_ms"], 4),
                text_of(row["apart_over_one_launch"]),
            ]
            for row in sorted(crossing, key=lambda row: (row["dtype"], row["mode"], row["scores"]))
        ]
        lines += ["Factored heads. Below 1 the products apart are faster: there the crossing point belongs.", ""]
        lines += table(header, rows)
    if large:
        header = ["", "ms", "PyTorch's linear layer, ms", "ratio", "floor of the rest, ms"]
        rows = [
            [
                f"{row['size']}, {row['dtype']}, {row['mode']}",
                text_of(row["ms"], 3),
                text_of(row["linear_ms"], 3),
                text_of(row["over_linear"]),
                text_of(floor_ms(row["bytes_of_the_rest"], limits), 3),
            ]
            for row in large
        ]
        lines += ["", *table(header, rows)]
    return lines


def training_lines(found: dict[str, Any], limits: dict[str, float]) -> list[str]:
    """Whole trainings, steps by size, and the sweep."""
    barrier = limits.get("barrier_launch_graph_us", limits.get("barrier_launch_us"))
    header = ["", "steps", "training s", "of it the host's", "shared s", "preparation s", "validation ms", "step us"]
    header += ["over an empty launch", "eager identities in a graph, us", "faster than they"]
    rows = [
        [
            name.removeprefix("training: "),
            str(entry["steps"]),
            text_of(entry["training_s"], 4),
            text_of(entry["host_s"], 4),
            text_of(entry["shared_s"], 4),
            text_of(entry["prepare_s"], 3),
            text_of(entry["validation_ms"], 3),
            text_of(entry["step_us"]),
            text_of(ratio(entry["step_us"], barrier)),
            text_of(entry["rival_step_us"]),
            text_of(entry["faster_than_rival"]),
        ]
        for name, entry in found.items()
        if name.startswith("training: ")
    ]
    lines = table(header, rows) if rows else []
    steps = [f"{name.removeprefix('step: ')}: {us:.2f}" for name, us in found.items() if name.startswith("step: ")]
    lines += ["", f"Microseconds of a step: {', '.join(steps)}."] if steps else []
    if "sweep" in found:
        lines += ["", f"Sweep from features to {found['sweep']['runs']} heads: {found['sweep']['seconds']:.2f} s."]
    return lines


def profile_lines(result: dict[str, Any]) -> list[str]:
    """What the profiler counted, a row a launch."""
    kernels = result.get("kernels", [])
    names = list(dict.fromkeys(name for row in kernels for name in row if name not in ("case", "kernel")))
    rows = [[row["case"], row["kernel"], *(text_of(row.get(name)) for name in names)] for row in kernels]
    return table(["", "kernel", *names], rows, left=2) if rows else []


def stage_lines(stages: list[dict[str, Any]]) -> list[str]:
    """Which stages ran, and how they ended."""
    rows = [[s["name"], s["status"], f"{s['seconds']:.0f}", s["commit"], s["when"], s["message"]] for s in stages]
    return table(["stage", "", "seconds", "commit", "when", ""], rows, left=6)


def body_of(stage: dict[str, Any], report: dict[str, Any]) -> list[str]:
    """A stage's tables."""
    name, limits, found = stage["name"], limits_of(report), found_by(report, stage["name"])
    if name in ("peers", "compiled"):
        return head_lines(found, limits)
    tables = {"core": core_lines, "large": large_lines, "training": training_lines}
    if name in tables:
        return tables[name](found, limits)
    return profile_lines(stage["result"]) if name == "profile" else list_lines(stage["result"])


def as_markdown(report: dict[str, Any]) -> str:
    """The whole page."""
    lines = [f"# {report['machine'].get('gpu', 'GPU')}: build, tests, sanitizers, limits, benchmarks", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    lines += ["", *stage_lines(report["stages"])]
    for stage in report["stages"]:
        parts = [body_of(stage, report), [f"- {note}" for note in stage["notes"]]]
        if stage["tail"]:
            parts.append(["```", *stage["tail"].splitlines(), "```"])
        parts = [part for part in parts if part]
        lines += ["", f"## {stage['name']}"] if parts else []
        for part in parts:
            lines += ["", *part]
    return "\n".join(lines).rstrip() + "\n"
