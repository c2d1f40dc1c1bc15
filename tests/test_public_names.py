"""The names that the package and its packages offer, and that type checkers see the same."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from public_names import PACKAGES

import alphaext
from alphaext import reference
from alphaext.head.choices import RULES
from alphaext.ops.head import RULE_NUMBERS


def test_the_package_offers_what_most_people_call():
    assert len(alphaext.__all__) <= 16
    assert set(alphaext.__all__) <= set(dir(alphaext))
    with pytest.raises(AttributeError, match="module 'alphaext' has no attribute 'fits'"):
        _ = alphaext.fits


@pytest.mark.parametrize("package", PACKAGES)
def test_each_name_is_there_and_imported_for_type_checkers(package):
    module = importlib.import_module(package)
    if not hasattr(module, "__all__"):
        return
    assert all(getattr(module, name) is not None for name in module.__all__)
    imported = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    defined = {name for name, value in vars(module).items() if getattr(value, "__module__", package) == package}
    assert set(module.__all__) <= imported | defined


def test_packages_are_found_from_the_package_alone():
    program = "import sys, alphaext; assert 'torch' not in sys.modules; print(alphaext.metrics.compare, alphaext.head.AlphaNet)"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "compare" in printed and "AlphaNet" in printed


def test_rules_are_the_specification_s():
    assert RULES == reference.RULES and set(RULES) == set(RULE_NUMBERS)


def test_operators_are_called_in_ops_alone():
    sources = {path: path.read_text() for path in Path(alphaext.__file__).parent.rglob("*.py")}
    assert {path.parent.name for path, source in sources.items() if "torch.ops.alphaext." in source} == {"ops"}
