"""What ``alphaext fit`` says and writes where nothing is better than the original, or nothing can be verified."""

from __future__ import annotations

import io
import json
import warnings

import pytest
import torch
from rich.console import Console
from torch import nn

from alphaext import repair
from alphaext.commands import Fit
from alphaext.features.store import read_features, write_features

COUNTS = torch.tensor([40, 40, 40, 40, 40, 5, 5, 5])
MEANS = 1.5 * torch.randn(8, 6, generator=torch.Generator().manual_seed(4))


def fit(tmp_path, val_counts, **options):
    linear = nn.Linear(6, 8)
    with torch.no_grad():
        linear.weight.copy_(MEANS)
        linear.bias.copy_(-MEANS.square().sum(1) / 2)
    torch.save(linear.state_dict(), tmp_path / "model.pth")
    (tmp_path / "features").mkdir()
    for seed, (part, counts) in enumerate({"train": COUNTS, "val": torch.tensor(val_counts)}.items()):
        labels = torch.arange(8).repeat_interleave(counts)
        noise = torch.randn(len(labels), 6, generator=torch.Generator().manual_seed(seed))
        write_features(tmp_path / "features" / part, MEANS[labels] + noise, labels, num_classes=8)
    said, out = io.StringIO(), tmp_path / "out"
    common = {"features": tmp_path / "features", "classifier": tmp_path / "model.pth", "output": out, "progress": False}
    Fit(**{**common, "preset": "paper", "epochs": 2, **options}).run(Console(file=said, width=300))
    made = torch.load(out / "classifier.pth", weights_only=True)
    return linear, made, json.loads((out / "result.json").read_text()), said.getvalue()


@pytest.mark.parametrize("gammas", [(0.5,), (0.3, 0.5)])
def test_the_original_is_kept_and_that_is_said(tmp_path, gammas):
    linear, made, result, said = fit(tmp_path, [12] * 8, gamma=gammas)
    assert result["kept_original"] and result["verified"] and result["after"] == result["before"]
    assert torch.equal(made["weight"], linear.weight) and torch.equal(made["bias"], linear.bias)
    assert "Note: Nothing is better than the original classifier on the validation samples: it is kept." in said


def test_samples_of_base_classes_alone_choose_nothing(tmp_path):
    linear, made, result, said = fit(tmp_path, [12] * 5 + [0] * 3, gamma=(0.3, 0.5))
    assert not result["verified"] and not result["kept_original"] and result["gamma"] == 0.5 and result["epoch"] == 2
    assert not torch.equal(made["weight"], linear.weight)
    assert "Note: Nothing was chosen by validation samples" in said


def test_preset_all_may_change_every_row(tmp_path):
    linear, made, result, said = fit(tmp_path, [25] * 8, preset="all")
    train, val = (read_features(tmp_path / "features" / part) for part in ("train", "val"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = repair(linear, train, val_features=val, preset="all", epochs=2, progress=False)
    assert torch.equal(made["weight"], expected.linear.weight) and not (tmp_path / "out" / "head.pt").exists()
    assert (result["preset"], result["after"]["all"]) == ("all", expected.result.after["all"])
    assert ("Note: Nothing is better" in said) == result["kept_original"]
    with pytest.raises(ValueError, match="gamma must be one value with preset 'all', got 2"):
        Fit(features=tmp_path / "features", output=tmp_path / "other", preset="all", gamma=(0.5, 1.0)).run()
