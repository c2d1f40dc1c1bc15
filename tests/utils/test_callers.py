"""Warnings name the line that asked for the work."""

from __future__ import annotations

import warnings

import torch
from torch import nn

import alphaext


def test_a_warning_is_where_the_package_was_called():
    torch.manual_seed(0)
    labels, rows = torch.arange(3).repeat_interleave(torch.tensor([40, 30, 5])), torch.randn(75, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Labels by chance: no repair is better, which is said.
        alphaext.repair(nn.Linear(4, 3), rows, labels, val_features=rows, val_labels=labels, epochs=2)
        alphaext.repair_model(nn.Sequential(nn.Linear(4, 3)), (rows, labels), (rows, labels), epochs=2)
    ours = [each for each in caught if issubclass(each.category, UserWarning)]
    assert len({each.lineno for each in ours}) == 2 and {each.filename for each in ours} == {__file__}
