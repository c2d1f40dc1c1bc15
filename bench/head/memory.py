"""Peak memory of one provider, in a process of its own: ``python bench/head/memory.py SIZE MODE PROVIDER`` prints MiB.

A process that has measured another provider before keeps freed memory, and would report too little.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch


def peak_in_own_process(size: str, mode: str, provider: str) -> float | None:
    """Growth of a fresh process while it builds and runs the provider; None where it cannot be measured."""
    command = [sys.executable, str(Path(__file__).resolve()), size, mode, provider]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    text = result.stdout.split()[-1]
    return None if text == "None" else float(text)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from head.providers import PROVIDERS, SIZES, make_problem, make_step
    from machine import PeakMemory

    size, mode, provider = sys.argv[1:]
    problem = make_problem(SIZES[size])
    # What the libraries load and allocate on first use is nobody's cost.
    torch.nn.functional.linear(problem.features, problem.weight)
    warm = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(warm.parameters(), lr=0.1, momentum=0.9, fused=True)
    torch.nn.functional.cross_entropy(warm(torch.ones(1, 2)), torch.zeros(1, dtype=torch.int64)).backward()
    optimizer.step()
    memory = PeakMemory("cpu")
    make, cached_logits = PROVIDERS[provider]
    step = make_step(make(problem), problem, cached_logits, mode)
    for _ in range(3):
        step()
    print(memory.above_start())


if __name__ == "__main__":
    main()
