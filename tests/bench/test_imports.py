"""Every benchmark finds the names of the package that it uses."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
if not BENCH.is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)

OWN = {"alphaext", *(path.stem for path in BENCH.iterdir())}
SCRIPTS = sorted(path.stem for path in BENCH.glob("*.py") if path.stem not in ("conftest", "test_scripts"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_can_be_imported(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OWN:
            raise
        pytest.skip(f"needs {error.name}")  # an extra of the benchmark, which its first lines name
