"""The way of the data through the package: how many modules it passes, and that no layer calls one above it."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from alphaext.ops import training as ops
from alphaext.repairing import repair

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def layer_of_package(root):
    """The height of each package, by the contract of ``pyproject.toml``."""
    contracts = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    rows = contracts[0]["layers"][::-1]
    return {name.strip(): height for height, row in enumerate(rows) for name in row.split("|")}


def problem():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat_interleave(torch.tensor([30, 40, 25, 6, 4]))
    val_labels = torch.arange(5).repeat_interleave(4)
    features, val_features = (torch.randn(len(ids), 8, generator=generator) for ids in (labels, val_labels))
    return nn.Linear(8, 5), features, labels, {"val_features": val_features, "val_labels": val_labels}


@pytest.mark.parametrize("preset", ["few", "paper"])
def test_data_goes_down_ten_modules_at_most(monkeypatch, request, preset):
    linear, features, labels, val = problem()
    layers = layer_of_package(request.config.rootpath)
    climbs, ways = set(), []
    train_epoch = ops.train_epoch

    def module_of(frame):
        name = frame.f_globals.get("__name__", "")
        return name if name.startswith("alphaext.") else None

    def height(module):
        return layers[module.split(".")[1]]

    def profile(frame, event, _):
        # A call of a higher layer's function by a lower layer's is a climb; what is not ours in between is passed over.
        callee = module_of(frame) if event == "call" else None
        if callee is None:
            return
        caller = frame.f_back
        while caller is not None and module_of(caller) is None:
            caller = caller.f_back
        if caller is not None and height(module_of(caller)) < height(callee):
            climbs.add((module_of(caller), callee, frame.f_code.co_name))

    def recorded(*arguments):
        frame, way = sys._getframe(1), [ops.__name__]
        while frame is not None:
            module = module_of(frame)
            if module is not None and module != way[-1]:
                way.append(module)
            frame = frame.f_back
        ways.append(way[::-1])
        return train_epoch(*arguments)

    monkeypatch.setattr(ops, "train_epoch", recorded)
    repair(linear, features, labels, preset=preset, epochs=1, progress=False, **val)
    ways.clear()
    sys.setprofile(profile)
    try:
        repair(linear, features, labels, preset=preset, epochs=1, progress=False, **val)
    finally:
        sys.setprofile(None)
    assert not climbs
    assert ways
    for way in ways:
        assert way[0] == "alphaext.repairing.repair" and len(way) <= 10, way
        assert [height(module) for module in way] == sorted(map(height, way), reverse=True)
        assert len(way) == len(set(way)), "a module is passed twice"
