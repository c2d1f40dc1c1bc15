"""How far a task is: a bar on a terminal, lines in a file, nothing where nobody asked."""

from __future__ import annotations

import pytest

from alphaext.utils import progress
from alphaext.utils.progress import task_bar


class Clock:
    """A time that passes when it is told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_line_now_and_then_where_there_is_no_terminal(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with task_bar(True, "train (part 1 of 3)", total=1000, done=100, unit="images") as report:
        for _ in range(3):
            clock.now += 10
            report(100)
        said = capsys.readouterr()
        assert said.err == "train (part 1 of 3): 400 of 1,000 images, 10.0 images a second, 0:01:00 left\n"
        clock.now += 30
        report(600, description="joining")
        capsys.readouterr()
    said = capsys.readouterr()
    assert said.err == "train (part 1 of 3): 1,000 of 1,000 images, joining, 15.0 images a second, 0:01:00 taken\n"
    assert said.out == ""


def test_a_task_of_unknown_length(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with task_bar(True, "batches", total=None) as report:
        report()
        clock.now += 5
    assert capsys.readouterr().err == "batches: 1, 0:00:05 taken\n"


def test_how_far_it_was_is_said_when_it_ends_early(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), task_bar(True, "extracting", total=30, unit="images") as report:
        report(8)
        clock.now += 2
        raise KeyboardInterrupt
    assert capsys.readouterr().err.startswith("extracting: 8 of 30 images")


@pytest.mark.parametrize("wanted", [None, False])
def test_nothing_is_printed_unasked(wanted: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    with task_bar(wanted, "extracting", total=30) as report:
        report(30)
    assert capsys.readouterr() == ("", "")
