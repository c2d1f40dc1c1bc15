"""The benchmarks that are programs of their own, at sizes of no interest: ``pytest bench --benchmark-enable --small``."""

from __future__ import annotations

import importlib

import pytest


@pytest.mark.parametrize(("name", "options"), [("whole_repair", []), ("scale", []), ("scale", ["--sweep"])])
def test_runs(name: str, options: list[str], pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]) -> None:
    if not pytestconfig.getoption("--small"):
        pytest.skip(f"python bench/{name}.py measures it")
    importlib.import_module(name).main(["--small", *options])
    shown = capsys.readouterr().out
    assert "repair" in shown and "failed" not in shown
