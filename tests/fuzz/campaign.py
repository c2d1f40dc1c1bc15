"""The attacks by hand: python tests/fuzz/campaign.py --seconds 3600 prints what came of how many; 1 where one was wrong.

Each round is a forked process, so that a crash and a hang are seen and counted, and nothing is imported again.
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
from attacks import CALLS, Original, damaged_file, hostile_operator, killed_writer, operator_against_reference
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

_LONGEST = 60  # seconds, of an example that takes milliseconds

# How many of each are a round.
ROUND = {"operators against the reference": 2000, "hostile operators": 1000, "damaged files": 250, "kills": 20}


def attack(name: str, number: int) -> Counter[str]:
    """Run a round of one of the attacks; returns how often what came of it.

    Raises:
        AssertionError: something was wrong in silence.
        Exception: an error of another kind than bad input is answered with.
    """
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        original = Original() if name == "damaged files" else None
        attacks: dict[str, Callable[[st.DataObject], list[str]]] = {
            "operators against the reference": operator_against_reference,
            "hostile operators": lambda data: [hostile_operator(data)],
            "damaged files": lambda data: [damaged_file(data, original)],  # type: ignore[arg-type]
            "kills": lambda data: [killed_writer(data, Path(folder))],
        }
        examples = ROUND[name] // (CALLS if name == "operators against the reference" else 1)

        @seed(number)
        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.data())
        def run(data: st.DataObject) -> None:
            faulthandler.dump_traceback_later(_LONGEST, exit=True)
            outcomes.update(attacks[name](data))

        run()
        faulthandler.cancel_dump_traceback_later()
    return outcomes


def in_a_process(name: str, number: int) -> tuple[Counter[str], str, str]:
    """Run a round in a process of its own; returns what came of it, and of what kind and what was wrong."""
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.close(reading)
            os.dup2(said.fileno(), 2)  # torch writes a page for each refusal of some kinds
            try:
                result = attack(name, number), "", ""
            except BaseException as error:
                kind = "wrong in silence" if isinstance(error, AssertionError) else "an error of another kind"
                result = Counter(), kind, traceback.format_exc()
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(result, pipe)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            content = pipe.read()
        _, status = os.waitpid(child, 0)
        if content:
            found: tuple[Counter[str], str, str] = pickle.loads(content)
            return found
        said.seek(0)
        last_words = said.read().decode(errors="replace")[-4000:]
        kind = f"crash by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "hang"
        return Counter(), kind, last_words


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, help="how long; 60 where nothing else is said")
    parser.add_argument("--count", type=int, help="how many of each, or a little more: rounds are whole")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--only", choices=sorted(ROUND), help="one of the attacks")
    arguments = parser.parse_args()
    if arguments.seconds is None and arguments.count is None:
        arguments.seconds = 60
    torch.set_num_threads(1)
    names = [arguments.only] if arguments.only else list(ROUND)
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    wrong: Counter[str] = Counter()
    begin, rounds = time.monotonic(), 0
    while arguments.seconds is None or time.monotonic() - begin < arguments.seconds:
        due = [name for name in names if arguments.count is None or rounds * ROUND[name] < arguments.count]
        if not due:
            break
        number = arguments.seed + rounds
        for name in due:
            outcomes, kind, error = in_a_process(name, number)
            counts[name] += outcomes
            if kind:
                wrong[f"{name}: {kind}"] += 1
                again = f"python tests/fuzz/campaign.py --only {name!r} --seed {number} --count 1"
                print(f"WRONG, {name}: {kind}\n{error}\nAgain: {again}", flush=True)
        rounds += 1
    last = arguments.seed + rounds - 1
    print(f"rounds with seeds {arguments.seed} to {last}, {time.monotonic() - begin:.0f} s")
    for name, outcomes in counts.items():
        print(f"{name}: {sum(outcomes.values()):,}")
        for outcome, times in sorted(outcomes.items()):
            print(f"    {outcome}: {times:,}")
    for kind, times in wrong.items():
        print(f"{kind}: {times}")
    print(f"{sum(wrong.values())} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
