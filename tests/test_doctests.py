"""The examples in the docstrings run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
from public_names import public_names

import alphaext

# A program that runs when it is imported.
SKIPPED = ("__main__",)
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(alphaext.__path__, "alphaext.")
    if name.rpartition(".")[2] not in SKIPPED and not name.endswith("._C")
]


def test_most_modules_have_examples():
    with_examples = [name for name in MODULES if examples(name)]
    assert len(with_examples) > 30 and "alphaext.training.single" in with_examples


def examples(name: str) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name)) if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name), extraglobs=public_names()).failed == 0
