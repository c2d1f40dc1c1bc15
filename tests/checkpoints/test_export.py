"""Export: what is written scores as it should, or nothing is written."""

from __future__ import annotations

import doctest
import errno
import importlib
import json
import os
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphaext.checkpoints import Checkpoint, read_checkpoint, save_linear
from alphaext.checkpoints import onnx as export_onnx
from alphaext.checkpoints.export import EXPORT_FORMATS, ExportReport, export

# As an attribute of the package it is the function.
export_module = importlib.import_module("alphaext.checkpoints.export")

CLASSES, WIDTH = 5, 8
FEW = [1, 3]
BASE = [0, 2, 4]


class Small(nn.Module):
    def __init__(self, channels: int = 3, side: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, WIDTH, 3, stride=2)
        self.bn = nn.BatchNorm2d(WIDTH)
        self.fc = nn.Linear(WIDTH, CLASSES)
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        if self.side is not None and images.shape[-1] != self.side:
            raise ValueError(f"images must be {self.side} pixels wide")
        return self.fc(torch.relu(self.bn(self.conv(images))).mean(dim=(2, 3)))


def small(seed: int = 0, **options: Any) -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Small(**options)
        nn.init.uniform_(model.bn.running_mean)
        nn.init.normal_(model.fc.weight)
    return model


def written(folder: Path, model: nn.Module, name: str = "model.pth", **more: Any) -> Checkpoint:
    torch.save({"state_dict": model.state_dict(), "classes": list("abcde"), **more}, folder / name)
    return read_checkpoint(folder / name)


def repaired(checkpoint: Checkpoint, few: list[int] = FEW) -> nn.Linear:
    generator, linear = torch.Generator().manual_seed(7), checkpoint.linear()
    with torch.no_grad():
        linear.weight[few] = torch.randn(len(few), linear.in_features, generator=generator)
        if linear.bias is not None:
            linear.bias[few] = torch.randn(len(few), generator=generator)
    return linear


def images(count: int = 4, channels: int = 3, side: int = 16) -> Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(3))


def composed(model: Small, linear: nn.Linear, batch: Tensor) -> Tensor:
    """What the model returns with the repaired layer in the place of its own."""
    model.eval()
    with torch.no_grad():
        features = torch.relu(model.bn(model.conv(batch))).mean(dim=(2, 3))
        return linear(features)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_examples_in_docstrings() -> None:
    results = doctest.testmod(export_module, extraglobs={"torch": torch, "nn": nn})
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize(
    ("format", "name"),
    [("same", "new.pth"), ("safetensors", "new.safetensors"), ("linear", "new.pth"), ("linear", "new.safetensors")],
)
def test_formats(tmp_path: Path, format: str, name: str, with_model: bool) -> None:
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    model, batch = small(), images()
    checkpoint = written(tmp_path, model)
    linear = repaired(checkpoint)
    given: dict[str, Any] = {"model": model, "example": batch} if with_model else {}
    report = export(checkpoint, linear, FEW, tmp_path / name, format=format, **given)
    assert (report.format, report.few_classes, report.path, report.tolerance) == (format, 2, tmp_path / name, 1e-4)
    assert (report.batch, report.samples) == (("images", 4) if with_model else ("random features", 64))
    assert report.size == (tmp_path / name).stat().st_size
    assert report.largest_difference < 1e-6 < report.largest_score and report.largest_base_difference == 0
    assert (report.unchanged_bytes is not None) == (format == "same")

    again = read_checkpoint(tmp_path / name, num_classes=CLASSES)
    assert torch.equal(again.weight, linear.weight) and torch.equal(again.bias, linear.bias)
    assert again.class_names == tuple("abcde")
    if format == "linear":
        assert again.format == "linear"
        return
    state = torch.load(tmp_path / name, weights_only=True)["state_dict"] if format == "same" else load(tmp_path / name)
    fresh = small(seed=9).eval()
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(batch), composed(model, linear, batch))


def load(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_the_report_is_json_and_text(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, small())
    report = export(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.pth")
    assert isinstance(report, ExportReport)
    assert json.loads(json.dumps(report.to_dict()))["largest_base_difference"] == 0
    text = str(report)
    assert "2 rows new" in text and "64 random features" in text and "bytes are those of the original" in text
    unchanged, size = report.unchanged_bytes, report.size
    # All but the rows' numbers and two checksums, written twice.
    assert unchanged is not None and 0 < size - unchanged <= 2 * (WIDTH + 1) * 4 + 4 * 4


def test_the_model_is_not_touched(tmp_path: Path) -> None:
    model = small().train()
    checkpoint = written(tmp_path, small(seed=1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    export(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.pth", model=model)
    assert model.training and model.bn.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_random_images_where_none_are_given(tmp_path: Path) -> None:
    gray = small(channels=1)
    checkpoint = written(tmp_path, gray)
    report = export(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.pth", model=gray)
    assert (report.batch, report.samples) == ("random images", 4)
    fixed = small(side=20)
    checkpoint = written(tmp_path, fixed)
    with pytest.raises(ValueError, match=r"images must be 20 pixels wide.*noise in place of example"):
        export(checkpoint, repaired(checkpoint), FEW, tmp_path / "new2.pth", model=fixed)
    fixed.image_size = 20  # as torchvision's vision transformers say it
    export(checkpoint, repaired(checkpoint), FEW, tmp_path / "new2.pth", model=fixed)
    del fixed.image_size
    fixed.pretrained_cfg = {"input_size": (3, 20, 20)}  # as timm's models do
    export(checkpoint, repaired(checkpoint), FEW, tmp_path / "new3.pth", model=fixed)


def test_a_classifier_alone_and_the_model_it_belongs_to(tmp_path: Path) -> None:
    model, batch = small(), images()
    save_linear(model.fc, tmp_path / "fc.pth")
    checkpoint = read_checkpoint(tmp_path / "fc.pth")
    linear = repaired(checkpoint)
    for format, name in (("same", "new.pth"), ("safetensors", "new.safetensors")):
        report = export(checkpoint, linear, FEW, tmp_path / name, format=format, model=model, example=batch)
        assert report.batch == "images"
    fresh = small(seed=9).eval()
    fresh.load_state_dict(load(tmp_path / "new.safetensors"))
    torch.testing.assert_close(fresh(batch), composed(model, linear, batch))


@pytest.mark.parametrize("with_model", [True, False])
def test_learned_scales(tmp_path: Path, with_model: bool) -> None:
    model, batch = small(), images()
    state = model.state_dict()
    layer = {"module.scales": torch.linspace(0.3, 3, CLASSES), "module.fc.weight": state.pop("fc.weight")}
    layer["module.fc.bias"] = state.pop("fc.bias")
    networks = {"feat_model": {f"module.{name}": tensor for name, tensor in state.items()}, "classifier": OrderedDict(layer)}
    torch.save({"state_dict_best": networks}, tmp_path / "lws.pth")
    checkpoint = read_checkpoint(tmp_path / "lws.pth")
    linear = repaired(checkpoint)
    given: dict[str, Any] = {"model": model, "example": batch} if with_model else {}
    report = export(checkpoint, linear, FEW, tmp_path / "new.pth", **given)
    assert report.largest_difference <= 1e-6 * report.largest_score
    export(checkpoint, linear, FEW, tmp_path / "new.safetensors", format="safetensors", **given)
    fresh = small(seed=9).eval()
    fresh.load_state_dict(load(tmp_path / "new.safetensors"))
    torch.testing.assert_close(fresh(batch), composed(model, linear, batch))


@pytest.mark.parametrize("normed", [True, False])
def test_experts(tmp_path: Path, normed: bool) -> None:
    state: dict[str, Tensor] = {"backbone.conv1.weight": torch.ones(2, 3, 1, 1)}
    for expert in range(3):
        state[f"backbone.linears.{expert}.weight"] = torch.randn((WIDTH, CLASSES) if normed else (CLASSES, WIDTH))
        if not normed:
            state[f"backbone.linears.{expert}.bias"] = torch.randn(CLASSES)
    torch.save({"state_dict": state}, tmp_path / "ride.pth")
    checkpoint = read_checkpoint(tmp_path / "ride.pth")
    linear = repaired(checkpoint)
    if normed:
        with pytest.raises(ValueError, match=r"length of a class's column is lost"):
            export(checkpoint, linear, FEW, tmp_path / "new.pth")
    else:
        assert export(checkpoint, linear, FEW, tmp_path / "new.pth").largest_difference < 1e-5
    for format, name in (("safetensors", "new.safetensors"), ("linear", "linear.safetensors"), ("linear", "linear.pth")):
        export(checkpoint, linear, FEW, tmp_path / name, format=format)
        again = read_checkpoint(tmp_path / name)
        assert (again.experts, again.feature_normalization) == (3, "l2" if normed else "none")
        assert torch.equal(again.weight, linear.weight)
        features = torch.randn(4, 3 * WIDTH)
        assert torch.equal(again.prepare_features(features), checkpoint.prepare_features(features))
    with pytest.raises(ValueError, match=r"3 expert\(s\)"):
        flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 3 * WIDTH), nn.Linear(3 * WIDTH, CLASSES))
        export(checkpoint, linear, FEW, tmp_path / "x.pth", model=flat, example=torch.randn(2, 3, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = written(tmp_path, small().to(dtype))
    linear = repaired(checkpoint)
    report = export(checkpoint, linear, FEW, tmp_path / "new.pth", model=small(), example=images())
    assert 0 < report.largest_difference < report.tolerance * report.largest_score
    report = export(checkpoint, linear, FEW, tmp_path / "new.safetensors", format="safetensors")
    assert load(tmp_path / "new.safetensors")["fc.weight"].dtype == dtype
    with pytest.raises(
        ValueError, match=r"are off by up to .* tolerance=1e-06 of the largest score allows .* nothing was written"
    ):
        export(checkpoint, linear, FEW, tmp_path / "strict.pth", tolerance=1e-6)
    assert "strict.pth" not in names(tmp_path)


@pytest.mark.parametrize("format", ["same", "safetensors", "linear"])
def test_what_scores_otherwise_is_not_written(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, name = small(), "new.safetensors" if format == "safetensors" else "new.pth"
    checkpoint = written(tmp_path, model)
    linear = repaired(checkpoint)
    method = "load_classifier_into" if format == "linear" else "load_into"
    loads = getattr(Checkpoint, method)
    times = 0

    def spoiled(self: Checkpoint, model: Small, classifier: str) -> None:
        nonlocal times
        loads(self, model, classifier)
        times += self.path != checkpoint.path  # the original loads as it should, the new file does not
        if self.path != checkpoint.path:
            with torch.no_grad():
                model.fc.weight[BASE[0]] += 0.1

    monkeypatch.setattr(Checkpoint, method, spoiled)
    with pytest.raises(ValueError, match=r"scores of 4 images with the repaired classifier are off by up to"):
        export(checkpoint, linear, FEW, tmp_path / name, format=format, model=model, example=images())
    assert times == 1
    assert names(tmp_path) == ["model.pth"]


def test_scores_must_be_finite(tmp_path: Path) -> None:
    model = small()
    checkpoint = written(tmp_path, model)
    batch = images()
    batch[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"finite|NaN|nan"):
        export(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.pth", model=model, example=batch)
    assert names(tmp_path) == ["model.pth"]


def test_bad_arguments(tmp_path: Path) -> None:
    model = small()
    checkpoint = written(tmp_path, model)
    linear = repaired(checkpoint)
    changed = repaired(checkpoint, [0, 1])
    (tmp_path / "there.pth").write_bytes(b"precious")
    for options, error, message in (
        ({"format": "tflite"}, ValueError, r"format must be one of same, safetensors, linear, onnx, got 'tflite'"),
        ({"format": "safetensors"}, ValueError, r"output must end in .safetensors for format='safetensors'"),
        ({"format": "onnx", "output": "new.onnx"}, ValueError, r"model must be given for 'onnx'"),
        ({"example": images()}, ValueError, r"model must be given with example"),
        ({"classifier": "fc"}, ValueError, r"model must be given with classifier"),
        ({"model": "resnet50"}, TypeError, r"model must be a torch module"),
        ({"model": model, "example": 3}, TypeError, r"example must be a tensor of images"),
        ({"model": model, "example": images().int()}, TypeError, r"example must be floating point"),
        ({"model": model, "example": images(0)}, ValueError, r"example must be images \[n, C, H, W\], at least one"),
        ({"model": model, "example": images(channels=5)}, ValueError, r"cannot take images \[4, 5, 16, 16\]"),
        ({"model": model, "classifier": "conv", "example": images()}, ValueError, r"classifier must name an nn.Linear"),
        ({"model": small(channels=1), "example": images(channels=1)}, ValueError, r"of another shape: conv.weight"),
        ({"tolerance": "1"}, TypeError, r"tolerance must be a number"),
        ({"tolerance": 0.0}, ValueError, r"tolerance must be finite and above 0"),
        ({"linear": changed}, ValueError, r"was not made from this checkpoint"),
        ({"few_classes": [9]}, ValueError, r"few_classes must be in 0..4"),
        ({"output": "there.pth"}, ValueError, r"output exists already"),
        ({"output": "none/new.pth"}, ValueError, r"output must be a file in a directory that exists"),
        ({"output": "new.safetensors"}, ValueError, r"path must not end in .safetensors"),
        ({"checkpoint": "model.pth"}, TypeError, r"checkpoint must be a Checkpoint"),
    ):
        arguments: dict[str, Any] = {
            "checkpoint": checkpoint,
            "linear": linear,
            "few_classes": FEW,
            "output": "new.pth",
            **options,
        }
        arguments["output"] = tmp_path / arguments["output"]
        with pytest.raises(error, match=message):
            export(**arguments)
    assert names(tmp_path) == ["model.pth", "there.pth"]
    assert (tmp_path / "there.pth").read_bytes() == b"precious"
    export(checkpoint, linear, FEW, tmp_path / "there.pth", overwrite=True)


@pytest.mark.parametrize(
    ("format", "name"), [("same", "new.pth"), ("safetensors", "new.safetensors"), ("linear", "new.pth"), ("onnx", "new.onnx")]
)
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, name: str) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript")
        monkeypatch.setattr(export_module, "onnx_content", lambda model, images: b"content")
        monkeypatch.setattr(export_module, "run_onnx", lambda path, images: (None, "onnx.checker"))
    checkpoint = written(tmp_path, small())
    (tmp_path / name).write_bytes(b"older")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("alphaext.utils.files.os.replace", full)
    given: dict[str, Any] = {"model": small(), "example": images()} if format == "onnx" else {}
    with pytest.raises(OSError, match=r"No space left"):
        export(checkpoint, repaired(checkpoint), FEW, tmp_path / name, format=format, overwrite=True, **given)
    assert (tmp_path / name).read_bytes() == b"older"
    assert names(tmp_path) == sorted(["model.pth", name])


@pytest.mark.parametrize(("format", "package"), [("safetensors", "safetensors"), ("onnx", "onnxscript"), ("onnx", "onnx")])
def test_packages_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, package: str) -> None:
    model = small()
    checkpoint = written(tmp_path, model)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install"):
        export(checkpoint, repaired(checkpoint), FEW, tmp_path / f"new.{format}", format=format, model=model)
    assert names(tmp_path) == ["model.pth"]


def test_all_formats_are_tested() -> None:
    assert set(EXPORT_FORMATS) == {"same", "safetensors", "linear", "onnx"}


# ONNX


def scores(path: Path, batch: Tensor) -> Tensor:
    from onnx.reference import ReferenceEvaluator

    return torch.from_numpy(ReferenceEvaluator(str(path)).run(None, {"images": batch.numpy()})[0])


def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model = small()
    checkpoint = written(tmp_path, model)
    linear = repaired(checkpoint)
    # From one image, of which a batch of two is made: of one alone, one would become a constant.
    report = export(checkpoint, linear, FEW, tmp_path / "new.onnx", format="onnx", model=model, example=images(1))
    assert report.onnx_checked_by in ("onnxruntime", "onnx.reference")
    assert report.onnx_difference is not None and report.onnx_difference < 1e-4
    assert f"by {report.onnx_checked_by}" in str(report)
    for number in (1, 5):
        torch.testing.assert_close(scores(tmp_path / "new.onnx", images(number)), composed(model, linear, images(number)))
    assert names(tmp_path) == ["model.pth", "new.onnx"]


def test_onnx_that_scores_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    model = small()
    checkpoint = written(tmp_path, model)
    monkeypatch.setattr(export_module, "onnx_content", lambda model, images: b"nothing")
    monkeypatch.setattr(export_module, "run_onnx", lambda path, images: (torch.zeros(3, CLASSES), "onnx.reference"))
    with pytest.raises(ValueError, match=r"the ONNX file's scores, computed by onnx.reference, are off by up to"):
        export(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.onnx", format="onnx", model=model, example=images())
    monkeypatch.setattr(export_module, "run_onnx", lambda path, images: (None, "onnx.checker"))
    assert names(tmp_path) == ["model.pth"]
    report = export(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.onnx", format="onnx", model=model, example=images())
    assert report.onnx_checked_by == "onnx.checker" and report.onnx_difference is None
    assert "form checked by onnx.checker" in str(report)


def test_what_reads_onnx_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    path = tmp_path / "new.onnx"
    path.write_bytes(export_onnx.onnx_content(small().eval(), images(2)))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export_onnx.run_onnx(path, images(3))[1] == "onnx.reference"

    def lacking(*_: Any) -> None:
        raise NotImplementedError("an operator")

    monkeypatch.setattr(reference, "ReferenceEvaluator", lacking)
    assert export_onnx.run_onnx(path, images(3)) == (None, "onnx.checker")

    class Runtime:
        """Stands for onnxruntime, which need not be installed."""

        class InferenceSession:
            def __init__(self, path: str, providers: list[str]) -> None:
                assert providers == ["CPUExecutionProvider"]

            def run(self, outputs: None, inputs: dict[str, Any]) -> list[Any]:
                return [inputs["images"][:, 0, 0]]

    monkeypatch.setitem(sys.modules, "onnxruntime", Runtime)  # type: ignore[arg-type]
    found, name = export_onnx.run_onnx(path, images(3))
    assert name == "onnxruntime" and found is not None and torch.equal(found, images(3)[:, 0, 0])


def test_models_beyond_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")

    class Branching(Small):
        def forward(self, images: Tensor) -> Tensor:
            scores = super().forward(images)
            return scores if float(scores.detach().sum()) > 1e9 else scores + 0

    with pytest.raises(ValueError, match=r"a Branching, cannot be written as ONNX"):
        export_onnx.onnx_content(Branching().eval(), images(2))
    monkeypatch.setattr(export_onnx, "_LARGEST_FILE", 100)
    with pytest.raises(ValueError, match=r"bytes of tensors, but one ONNX file holds less than 100"):
        export_onnx.onnx_content(small().eval(), images(2))
