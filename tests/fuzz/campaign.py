"""The attacks by hand: python tests/fuzz/campaign.py --seconds 3600 prints what came of how many; 1 where one was wrong.

Each round is a process of its own, so that a crash and a hang are seen and counted.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here), str(here.parent), str(here.parent / "helpers")]

import torch
from attacks import Original, damaged_file, hostile_operator, killed_writer, operator_against_reference
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

_LONGEST_ROUND = 300  # seconds, of a round that takes seconds


def attack(name: str, examples: int, number: int) -> Counter[str]:
    """Run one of the attacks; returns how often what came of it.

    Raises:
        AssertionError: something was wrong in silence.
        Exception: an error of another kind than bad input is answered with.
    """
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        original = Original() if name == "damaged files" else None
        attacks: dict[str, Callable[[st.DataObject], str]] = {
            "operators against the reference": operator_against_reference,
            "hostile operators": hostile_operator,
            "damaged files": lambda data: damaged_file(data, original),  # type: ignore[arg-type]
            "kills": lambda data: killed_writer(data, Path(folder)),
        }

        @seed(number)
        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.data())
        def run(data: st.DataObject) -> None:
            outcomes[attacks[name](data)] += 1

        run()
    return outcomes


# How many of each are a round.
ROUND = {"operators against the reference": 400, "hostile operators": 400, "damaged files": 200, "kills": 20}


def in_a_process(name: str, examples: int, number: int) -> tuple[Counter[str], str]:
    """Run an attack in a process of its own; returns what came of it, and what was wrong."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        faulthandler.dump_traceback_later(_LONGEST_ROUND, exit=True)
        try:
            result: tuple[Counter[str], str] = attack(name, examples, number), ""
        except BaseException:
            result = Counter(), traceback.format_exc()
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    if not content:
        kind = f"crash: signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "hang, or an end without a word"
        return Counter(), f"{kind} in {name!r} with seed {number}"
    found: tuple[Counter[str], str] = pickle.loads(content)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--only", choices=sorted(ROUND), help="one of the attacks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = [arguments.only] if arguments.only else list(ROUND)
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    wrong: list[str] = []
    end, number = time.monotonic() + arguments.seconds, arguments.seed
    while time.monotonic() < end:
        for name in names:
            outcomes, error = in_a_process(name, ROUND[name], number)
            counts[name] += outcomes
            if error:
                wrong.append(error)
                print(f"WRONG: {error}", flush=True)
        number += 1
    for name, outcomes in counts.items():
        print(f"{name}: {sum(outcomes.values()):,}")
        for outcome, times in sorted(outcomes.items()):
            print(f"    {outcome}: {times:,}")
    print(f"{len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
