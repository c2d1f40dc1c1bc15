"""What a repair hands back: printed, shown, saved, put into a model; and which classes it repairs."""

from __future__ import annotations

import copy
import importlib.util
import json

import pytest
import torch
from torch import nn

from alphaext import AlphaNet, fit, fit_many, repair, repair_model
from alphaext.baselines import run_baseline
from alphaext.checkpoints import read_checkpoint
from alphaext.metrics import expected_calibration_error, predict
from alphaext.training import AlphaNetWarning, single

COUNTS = torch.tensor([40, 30, 25, 22, 6, 4])
CENTRES = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def samples(counts, seed):
    labels = torch.arange(6).repeat_interleave(counts)
    return CENTRES[labels] + torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(seed)), labels


FEATURES, LABELS = samples(COUNTS, 1)
VAL = dict(zip(("val_features", "val_labels"), samples(torch.full((6,), 30), 2), strict=True))
QUICK = {"epochs": 3, "progress": False}


def model() -> nn.Sequential:
    torch.manual_seed(3)
    made = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
    with torch.no_grad():
        made[0].weight.copy_(torch.eye(8))
        made[0].bias.zero_()
        made[1].weight.copy_(CENTRES)
        made[1].bias.copy_(-CENTRES.square().sum(1) / 2)
        made[1].bias[4:] -= 3
    return made


@pytest.fixture(scope="module")
def made():
    return repair(model()[1], FEATURES, LABELS, **VAL, **QUICK)


def test_calibration_errors_wait_until_they_are_asked_for_and_are_of_what_there_was(made, monkeypatch):
    features, layer, asked = VAL["val_features"].clone(), model()[1], []
    monkeypatch.setattr(single, "predict", lambda *given, **options: asked.append(1) or predict(*given, **options))
    late = repair(layer, FEATURES, LABELS, **VAL | {"val_features": features}, **QUICK)
    assert not asked
    for tensor in (features, layer.weight.data, late.linear.weight.data, late.head.weight.data):
        tensor.zero_()
    measured = late.result.calibration_errors
    assert str(late).count("calibration error") == 1 and len(asked) == 2
    assert measured == made.result.calibration_errors


def test_print_and_show(made):
    text = str(made)
    result = made.result
    assert not result.kept_original and text.splitlines()[0] == "2 of 6 classes are few"
    wanted = [
        expected_calibration_error(predict(layer, *VAL.values(), progress=False), made.split)["all"]
        for layer in (model()[1], made.linear)
    ]
    assert result.calibration_errors == tuple(wanted)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:4]}
    for name, metrics, error in (("before", result.before, wanted[0]), ("after", result.after, wanted[1])):
        assert rows[name][0] == f"{100 * metrics['few']:.1f}" and rows[name][-1] == f"{100 * error:.1f}"
    assert f"Constant on the few scores: {result.few_bias:+.3g}" in text
    shown = made._repr_html_()
    assert "<script" not in shown and all(note in shown for note in result.notes)
    assert "Not verified" in str(repair(model()[1], FEATURES, LABELS, **QUICK))


@pytest.mark.parametrize("name", ["layer.pth", "layer.safetensors", "layer"])
def test_save(made, name, tmp_path, monkeypatch):
    if name != "layer.pth":
        pytest.importorskip("safetensors")
    path = made.save(tmp_path / name)
    assert path.suffix in (".pth", ".safetensors")
    read = read_checkpoint(path)
    assert torch.equal(read.weight, made.linear.weight) and torch.equal(read.bias, made.linear.bias)
    assert (
        json.loads(read.metadata["few_classes"]) == [4, 5]
        and json.loads(read.metadata["after"])["few"] == made.result.after["few"]
    )
    with pytest.raises(ValueError, match="path exists already"):
        made.save(path)
    assert made.save(path, overwrite=True) == path
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    plain = made.save(tmp_path / "plain")
    assert plain.name == "plain.pth" and set(torch.load(plain, weights_only=True)) == {"weight", "bias"}


def test_apply(made):
    whole, x = model().half().eval(), VAL["val_features"].half()
    whole[1].weight.requires_grad_(False)
    repaired = made.apply(whole)
    assert repaired is whole and whole[1].weight.dtype == torch.float16 and not whole[1].weight.requires_grad
    assert not whole[1].training and torch.allclose(whole(x).float(), made.linear(x.float()), atol=0.2)
    named = made.apply(copy.deepcopy(model()), "1")
    assert torch.equal(named[1].weight, made.linear.weight)
    for name in ("0", "2", "nowhere"):
        with pytest.raises(
            ValueError, match=rf"classifier must name a linear layer of shape \[6, 8\], got '{name}'.*'1' \[6, 8\]"
        ):
            made.apply(model(), name)
    with pytest.raises(TypeError, match="model must be Module"):
        made.apply(made.linear.weight)


def test_named_classes_are_repaired_whatever_they_have():
    layer = model()[1]
    with pytest.raises(ValueError, match="few_classes names them"):
        repair(layer, FEATURES, LABELS, few_below=2, **QUICK)
    found = repair(layer, FEATURES, LABELS, few_below=2, few_classes=[1, 4], **QUICK)
    assert found.split.few.tolist() == [1, 4]
    kept = [0, 2, 3, 5]
    assert torch.equal(found.linear.weight[kept], layer.weight[kept])
    assert not torch.equal(found.linear.weight[[1, 4]], layer.weight[[1, 4]])
    (run,) = fit_many(layer, FEATURES, LABELS, [{"epochs": 1, "top_k": 2}], few_classes=[1, 4], progress=False)
    assert run.head.few_classes.tolist() == [1, 4]
    with pytest.raises(ValueError, match="do not give few_classes as well"):
        repair(layer, FEATURES, LABELS, split=found.split, few_classes=[1])
    with pytest.raises(ValueError, match=r"few_classes must be in 0\.\.5"):
        repair(layer, FEATURES, LABELS, few_classes=[6])


def test_a_loss_of_few_classes_is_told():
    with pytest.warns(UserWarning, match=r"Few classes lose \d+\.\d points"):
        repair(model()[1], FEATURES, LABELS, few_classes=[0, 1], **VAL, **QUICK, keep_original=False, select="last", lr=5.0)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return nn.functional.normalize(x) @ nn.functional.normalize(self.weight).T


class Transposed(Normed):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize("layer", [Normed(), Transposed(), nn.Conv2d(8, 6, 1), nn.Embedding(6, 8), nn.BatchNorm1d(8)])
def test_a_layer_that_is_not_one_row_a_class_is_refused_in_words(layer):
    with pytest.raises(ValueError, match=rf"linear must have one row a class.*{type(layer).__name__} with weight"):
        repair(layer, FEATURES, LABELS)


def test_a_layer_of_one_row_is_refused_in_words():
    with pytest.raises(ValueError, match="linear must have one row a class, so two or more; its weight has one"):
        repair(nn.Linear(8, 1), torch.randn(50, 8), torch.arange(2).repeat(25))


def test_a_layer_of_another_make_will_do():
    layer = nn.utils.parametrizations.weight_norm(model()[1])
    assert repair(layer, FEATURES, LABELS, **QUICK).linear.out_features == 6


@pytest.mark.parametrize("call", ["repair", "repair_model", "run_baseline", "fit"])
def test_a_warning_names_the_line_of_the_caller(call):
    few = {"val_features": FEATURES[:4], "val_labels": LABELS[:4]}
    with pytest.warns(AlphaNetWarning, match="not verified|no epoch is chosen") as caught:
        if call == "repair":
            repair(model()[1], FEATURES, LABELS, **few, **QUICK)
        elif call == "repair_model":
            repair_model(nn.Sequential(nn.Identity(), model()[1]), (FEATURES, LABELS), tuple(few.values()), **QUICK)
        elif call == "run_baseline":
            run_baseline("crt", FEATURES, LABELS, **few, **QUICK)
        else:
            fit(AlphaNet.from_linear(model()[1], members=[[5, 0, 1]], seed=0), FEATURES, LABELS, **few, **QUICK)
    assert {each.filename for each in caught} == {__file__}
