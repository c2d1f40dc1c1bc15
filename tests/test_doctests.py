"""The examples in the docstrings run, and print what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

import alphaext

MODULES = ("classes", "metrics", "modules", "neighbors", "ops", "reference", "training")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(f"alphaext.{name}")
    names = {"torch": torch, "nn": torch.nn, **{name: getattr(alphaext, name) for name in alphaext.__all__}}
    results = doctest.testmod(module, extraglobs=names)
    assert results.failed == 0 and results.attempted > 0
