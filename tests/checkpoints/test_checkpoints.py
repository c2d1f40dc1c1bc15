"""Checkpoints of every format, written by the tests as the field's own code writes them, read, and written again."""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import doctest
import errno
import functools
import gzip
import io
import json
import os
import pickle
import re
import sys
import threading
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from alphaext import AlphaNet
from alphaext import checkpoints as checkpoints_module
from alphaext.checkpoints import Checkpoint, normalize_expert_features, read_checkpoint, save_linear, write_repaired
from alphaext.checkpoints import files as checkpoint_files
from alphaext.checkpoints import layouts as checkpoint_formats
from alphaext.checkpoints import reader as checkpoint_reader
from alphaext.checkpoints import writer as checkpoint_writer
from alphaext.checkpoints.layouts import find_layout, short_names
from alphaext.models.split import find_classifier

CLASSES, WIDTH = 7, 6
FEW = [1, 4]


class Small(nn.Module):
    """A model with batch normalisation, so that its state has buffers and integers too."""

    def __init__(self, classes: int = CLASSES, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3)
        self.bn = nn.BatchNorm2d(WIDTH)
        self.fc = nn.Linear(WIDTH, classes, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.bn(self.conv(images)).mean(dim=(2, 3)))
        return logits


def small(seed: int = 0, **options: Any) -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Small(**options)
        nn.init.normal_(model.bn.running_mean)
    return model.eval()


def prefixed(state: Mapping[str, Tensor], prefix: str) -> OrderedDict[str, Tensor]:
    return OrderedDict((prefix + name, tensor) for name, tensor in state.items())


def balanced(model: nn.Module, classifier: str = "fc", scales: Tensor | None = None, **more: Any) -> dict[str, Any]:
    """What the code of Kang et al. saves: two networks behind DataParallel, and some numbers."""
    state = model.state_dict()
    own = (f"{classifier}.weight", f"{classifier}.bias")
    layer: OrderedDict[str, Tensor] = OrderedDict()
    if scales is not None:
        layer["module.scales"] = scales
    layer.update({f"module.fc.{name.rpartition('.')[2]}": state[name] for name in own})
    features = OrderedDict((f"module.{name}", tensor) for name, tensor in state.items() if name not in own)
    networks = {"feat_model": features, "classifier": layer}
    return {"epoch": 90, "best_epoch": 88, "state_dict_best": networks, "best_acc": 0.41, "centroids": None, **more}


def repaired(checkpoint: Checkpoint, few: list[int] = FEW, seed: int = 1) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    linear = checkpoint.linear()
    with torch.no_grad():
        linear.weight[few] = torch.randn(len(few), linear.in_features, generator=generator).to(linear.weight.dtype)
        if linear.bias is not None:
            linear.bias[few] = torch.randn(len(few), generator=generator).to(linear.bias.dtype)
    return linear


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(first: Any, second: Any, *, but: set[str] = frozenset(), trail: str = "") -> None:  # type: ignore[assignment]
    """Two payloads are equal to the last bit, container by container, but for the tensors named."""
    assert type(first) is type(second), trail
    if isinstance(first, Tensor):
        assert first.dtype == second.dtype and first.shape == second.shape and first.stride() == second.stride(), trail
        assert first.requires_grad == second.requires_grad, trail
        if trail not in but:
            assert bits(first) == bits(second), trail
    elif isinstance(first, Mapping):
        assert list(first) == list(second), trail
        assert getattr(first, "__dict__", None) == getattr(second, "__dict__", None)
        for key in first:
            assert_same(first[key], second[key], but=but, trail=f"{trail}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), trail
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_same(one, other, but=but, trail=f"{trail}/{index}")
    else:
        assert first == second or first != first, trail


@pytest.mark.parametrize("module", [checkpoints_module, checkpoint_reader, checkpoint_writer, checkpoint_formats])
def test_examples_in_docstrings(module: Any) -> None:
    names = {"torch": torch, "nn": nn, "save_linear": save_linear, "read_checkpoint": read_checkpoint}
    results = doctest.testmod(module, extraglobs=names)
    assert results.attempted > 0
    assert results.failed == 0


# Kang et al.'s files


@pytest.mark.parametrize("new_form", [True, False])
def test_two_networks(tmp_path: Path, new_form: bool) -> None:
    model = small()
    path = tmp_path / "final_model_checkpoint.pth"
    torch.save(balanced(model), path, _use_new_zipfile_serialization=new_form)
    checkpoint = read_checkpoint(path, num_classes=CLASSES)
    assert (checkpoint.format, checkpoint.classifier, checkpoint.scales) == ("classifier-balancing", "fc", None)
    assert torch.equal(checkpoint.weight, model.fc.weight) and torch.equal(checkpoint.bias, model.fc.bias)
    assert checkpoint.backbone.keys() == {name for name in model.state_dict() if not name.startswith("fc.")}
    other = small(seed=5)
    checkpoint.load_into(other, "fc")
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("shape", [(CLASSES,), (CLASSES, 1)])
def test_scales_multiply_weight_and_bias(tmp_path: Path, shape: tuple[int, ...]) -> None:
    model, scales = small(), torch.linspace(0.5, 2, CLASSES)
    path = tmp_path / "lws.pth"
    torch.save(balanced(model, scales=scales.reshape(shape)), path)
    checkpoint = read_checkpoint(path)
    features = torch.randn(5, WIDTH)
    assert checkpoint.scales is not None and torch.equal(checkpoint.scales, scales)
    torch.testing.assert_close(checkpoint.linear()(features), model.fc(features) * scales)

    linear = repaired(checkpoint)
    write_repaired(checkpoint, linear, FEW, tmp_path / "new.pth")
    # As their code loads it: the layer, and its output times the scales.
    layer = torch.load(tmp_path / "new.pth", weights_only=True)["state_dict_best"]["classifier"]
    logits = nn.functional.linear(features, layer["module.fc.weight"], layer["module.fc.bias"]) * layer[
        "module.scales"
    ].reshape(-1)
    torch.testing.assert_close(logits, linear(features))
    assert torch.equal(layer["module.scales"], scales.reshape(shape))


@pytest.mark.parametrize("shape", [(CLASSES - 1,), (1, CLASSES), (CLASSES, 2), ()])
def test_scales_of_another_length(tmp_path: Path, shape: tuple[int, ...]) -> None:
    torch.save(balanced(small(), scales=torch.ones(shape)), tmp_path / "lws.pth")
    with pytest.raises(ValueError, match=rf"one scale for each of the {CLASSES} classes, got {torch.ones(shape).numel()} in"):
        read_checkpoint(tmp_path / "lws.pth")


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-40])
def test_scales_that_leave_nothing_to_store(tmp_path: Path, scale: float) -> None:
    scales = torch.ones(CLASSES)
    scales[4] = scale
    torch.save(balanced(small(), scales=scales, classes=[f"bird {c}" for c in range(CLASSES)]), tmp_path / "lws.pth")
    checkpoint = read_checkpoint(tmp_path / "lws.pth")
    with pytest.raises(ValueError, match=r"the scale of class 4 \(bird 4\) .* is -?(0|1e-40): no stored row"):
        write_repaired(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.pth")
    assert not (tmp_path / "new.pth").exists()
    # Of a class that is not written, it does not matter.
    write_repaired(checkpoint, repaired(checkpoint, [1]), [1], tmp_path / "new.pth")


@pytest.mark.parametrize("prefix", ["", "module.", "classifier."])
def test_scales_beside_a_classifier_in_one_dictionary(tmp_path: Path, prefix: str) -> None:
    scales = torch.linspace(0.5, 2, CLASSES)
    state = prefixed({"fc.weight": torch.randn(CLASSES, WIDTH), "fc.bias": torch.randn(CLASSES), "scales": scales}, prefix)
    torch.save({**state, "conv.weight": torch.ones(2, 3, 1, 1)}, tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    assert torch.equal(checkpoint.weight, state[f"{prefix}fc.weight"] * scales[:, None])
    assert list(checkpoint.backbone) == ["conv.weight"]
    linear = repaired(checkpoint)
    write_repaired(checkpoint, linear, FEW, tmp_path / "new.pth")
    torch.testing.assert_close(read_checkpoint(tmp_path / "new.pth").weight, linear.weight)


def test_the_latest_rather_than_the_best(tmp_path: Path) -> None:
    model, path = small(), tmp_path / "latest_model_checkpoint.pth"
    torch.save({"epoch": 3, "state_dict": balanced(model)["state_dict_best"]}, path)
    assert read_checkpoint(path).format == "classifier-balancing"


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True)])
@pytest.mark.parametrize("numpy_1", [True, False])
def test_numpy_numbers(tmp_path: Path, number: np.generic, numpy_1: bool) -> None:
    path = tmp_path / "old.pth"
    torch.save(balanced(small(), best_acc=number), path, _use_new_zipfile_serialization=False)
    if numpy_1:
        content = path.read_bytes()
        assert b"numpy._core" in content or b"numpy.core" in content
        path.write_bytes(content.replace(b"numpy._core", b"numpy.core"))
    before = set(torch.serialization.get_safe_globals())
    checkpoint = read_checkpoint(path)
    assert set(torch.serialization.get_safe_globals()) == before
    assert checkpoint_files.read_payload(path).content["best_acc"] == number
    write_repaired(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.pth")
    assert checkpoint_files.read_payload(tmp_path / "new.pth").content["best_acc"] == number


@pytest.mark.parametrize("value", [np.zeros(3), np.str_("x"), np.datetime64(3, "s")])
def test_other_numpy_values_are_passed_over(tmp_path: Path, value: Any) -> None:
    torch.save(balanced(small(), best_acc=value), tmp_path / "model.pth")
    assert torch.equal(read_checkpoint(tmp_path / "model.pth").weight, small().fc.weight)
    assert isinstance(checkpoint_files.read_payload(tmp_path / "model.pth").content["best_acc"], checkpoint_files.StandIn)


@pytest.mark.parametrize(("name", "classes"), [("resnext50_32x4d", 100), ("resnet18", 5)])
def test_the_backbones_are_torchvisions(tmp_path: Path, name: str, classes: int) -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        first = getattr(models, name)(num_classes=classes, weights=None).eval()
    first, generator = first.to_empty(device="cpu"), torch.Generator().manual_seed(0)
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    for tensor in first.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.01, 0.1, generator=generator)
        else:
            tensor.fill_(3)
    torch.save(balanced(first, best_acc=np.float64(0.4)), tmp_path / "model.pth")
    checkpoint = read_checkpoint(tmp_path / "model.pth", num_classes=classes)
    checkpoint.load_into(second, "fc")
    linear = repaired(checkpoint)
    write_repaired(checkpoint, linear, FEW, tmp_path / "new.pth")
    # What a user does without this package: the two networks' tensors into torchvision's model.
    networks = torch.load(tmp_path / "new.pth", weights_only=False)["state_dict_best"]
    state = {key.removeprefix("module."): tensor for part in networks.values() for key, tensor in part.items()}
    third.load_state_dict(state)
    with torch.no_grad():
        images = torch.randn(2, 3, 64, 64)
        second.fc = linear
        torch.testing.assert_close(third(images), second(images))


def test_layers_that_torchvision_lacks(tmp_path: Path) -> None:
    payload = balanced(small())
    payload["state_dict_best"]["feat_model"]["module.fc_add.weight"] = torch.zeros(3, 3)
    torch.save(payload, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"unexpected: fc_add.weight; the model was trained with use_fc"):
        read_checkpoint(tmp_path / "model.pth").load_into(small(), "fc")


@pytest.mark.parametrize("layer", [{"module.weight": torch.ones(3, 4)}, {"module.fc_hallucinator.weight": torch.ones(3, 4)}])
def test_cosine_and_memory_classifiers_are_refused(tmp_path: Path, layer: dict[str, Tensor]) -> None:
    torch.save({"state_dict_best": {"feat_model": {}, "classifier": layer}}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"must be a linear layer fc, got .*weight \[3, 4\]"):
        read_checkpoint(tmp_path / "model.pth")


# State dicts

PREFIXES = ("", "module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "model.module.", "module.model.")
WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict", "state_dict_best", "net", "my_weights")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(PREFIXES),
    st.lists(st.sampled_from(WRAPPERS), max_size=3),
    st.booleans(),
    st.booleans(),
    st.sets(st.integers(0, CLASSES - 1), min_size=1, max_size=CLASSES - 1),
)
def test_any_wrapping_is_read_and_written(
    tmp_path_factory: pytest.TempPathFactory, prefix: str, wrappers: list[str], training: bool, new_form: bool, few: set[int]
) -> None:
    model, folder = small(), tmp_path_factory.mktemp("wrapped")
    payload: Any = prefixed(model.state_dict(), prefix)
    for wrapper in wrappers:
        extra = {"epoch": 3, "optimizer": {"state": {0: {"momentum": torch.randn(4)}}}, "lr": 0.1} if training else {}
        payload = {**extra, wrapper: payload}
    torch.save(payload, folder / "model.pth", _use_new_zipfile_serialization=new_form)
    checkpoint = read_checkpoint(folder / "model.pth", num_classes=CLASSES)
    assert (checkpoint.classifier, checkpoint.format) == ("fc", "state_dict")
    assert set(checkpoint.backbone) | {"fc.weight", "fc.bias"} == set(model.state_dict())
    linear = repaired(checkpoint, sorted(few))
    write_repaired(checkpoint, linear, sorted(few), folder / "new.pth")
    keys = "".join(f"/{wrapper}" for wrapper in reversed(wrappers))
    before, after = (torch.load(folder / name, weights_only=True) for name in ("model.pth", "new.pth"))
    assert_same(before, after, but={f"{keys}/{prefix}fc.weight", f"{keys}/{prefix}fc.bias"})
    other = small(seed=3)
    read_checkpoint(folder / "new.pth").load_into(other, "fc")
    assert torch.equal(other.fc.weight, linear.weight) and torch.equal(other.fc.bias, linear.bias)


@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "densenet121", "vgg11", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "vit_b_16", "swin_t"),
        *("maxvit_t", "googlenet", "inception_v3", "mnasnet0_5", "shufflenet_v2_x0_5", "alexnet"),
        *("timm:vit_tiny_patch16_224", "timm:convnext_atto", "timm:efficientnet_b0", "timm:resnet18"),
        "timm:mobilenetv3_small_050",
    ],
)
def test_the_classifier_is_found_in_usual_models(name: str) -> None:
    if name.startswith("timm:"):
        create = pytest.importorskip("timm").create_model
        with torch.device("meta"):
            model = create(name[5:])
    else:
        models = pytest.importorskip("torchvision.models")
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        with torch.device("meta"):
            model = models.get_model(name, weights=None, **options)
    # One number seen as many: shapes without the memory.
    state = {key: torch.zeros(()).expand(tensor.shape) for key, tensor in model.state_dict().items()}
    layout = find_layout(checkpoint_files.Payload("torch", state, {}), Path("model.pth"), classifier=None)
    expected = "fc" if name in ("googlenet", "inception_v3") else find_classifier(model)
    assert layout.classifier == expected


def test_a_classifier_of_an_unknown_name_is_the_last_with_a_bias(tmp_path: Path) -> None:
    state = {"a.weight": torch.ones(8, 6), "a.bias": torch.ones(8), "b.weight": torch.ones(5, 8), "b.bias": torch.ones(5)}
    torch.save(
        {**state, "c.weight": torch.ones(9, 9), "d.weight": torch.ones(4, 4), "d.bias": torch.ones(2)}, tmp_path / "m.pth"
    )
    assert read_checkpoint(tmp_path / "m.pth").classifier == "b"
    assert read_checkpoint(tmp_path / "m.pth", classifier="a").classifier == "a"
    assert read_checkpoint(tmp_path / "m.pth", num_classes=8).classifier == "a"
    with pytest.raises(
        ValueError, match=r"classifier must name a linear layer .* got 'z'; .*: a.weight \[8, 6\], b.weight \[5, 8\]"
    ):
        read_checkpoint(tmp_path / "m.pth", classifier="z")


def test_layers_inside_blocks_are_no_classifiers(tmp_path: Path) -> None:
    state = {}
    for block in range(3):
        state[f"blocks.{block}.attention.output.weight"] = torch.ones(8, 8)
        state[f"blocks.{block}.attention.output.bias"] = torch.ones(8)
    torch.save({**state, "cls.weight": torch.ones(5, 8), "cls.bias": torch.ones(5)}, tmp_path / "m.pth")
    assert read_checkpoint(tmp_path / "m.pth").classifier == "cls"


def test_dictionaries_without_end(tmp_path: Path) -> None:
    payload: dict[str, Any] = {"model": {"a.weight": torch.ones(2, 2)}}
    payload["model"]["model"] = payload
    torch.save(payload, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"too deep within each other: model / model"):
        read_checkpoint(tmp_path / "m.pth")


def test_several_candidates_are_listed(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.ones(5, 8), "head.weight": torch.ones(9, 8), "x": torch.ones(1)}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"several .* classifier= which: fc.weight \[5, 8\], head.weight \[9, 8\]"):
        read_checkpoint(tmp_path / "m.pth")
    assert read_checkpoint(tmp_path / "m.pth", num_classes=9).classifier == "head"
    torch.save({"p.weight": torch.ones(5, 8), "q.weight": torch.ones(9, 8)}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"several .* p.weight \[5, 8\], q.weight \[9, 8\]"):
        read_checkpoint(tmp_path / "m.pth")
    assert read_checkpoint(tmp_path / "m.pth", num_classes=5).classifier == "p"


def test_no_linear_layer(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.ones(2, 2, 1, 1), "fc.weight": torch.ones(4, 4).int()}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"has no linear layer: none of its 2 tensors"):
        read_checkpoint(tmp_path / "m.pth")


def test_averages_only_when_asked_for(tmp_path: Path) -> None:
    model, average = small(), small(seed=1)
    torch.save({"state_dict_ema": average.state_dict(), "state_dict": model.state_dict()}, tmp_path / "m.pth")
    assert torch.equal(read_checkpoint(tmp_path / "m.pth").weight, model.fc.weight)
    checkpoint = read_checkpoint(tmp_path / "m.pth", state="state_dict_ema")
    assert torch.equal(checkpoint.weight, average.fc.weight)
    write_repaired(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.pth")
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("m.pth", "new.pth"))
    assert_same(before, after, but={"/state_dict_ema/fc.weight", "/state_dict_ema/fc.bias"})
    with pytest.raises(ValueError, match=r"state must name .* got 'ema'; it has: state_dict_ema, state_dict"):
        read_checkpoint(tmp_path / "m.pth", state="ema")
    torch.save({"state_dict_ema": average.state_dict(), "optimizer": {"a": torch.ones(3)}}, tmp_path / "m.pth")
    assert torch.equal(read_checkpoint(tmp_path / "m.pth").weight, average.fc.weight)


def test_several_models_are_listed(tmp_path: Path) -> None:
    torch.save({"teacher": small().state_dict(), "student": small().state_dict()}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"state= which is the model: teacher, student"):
        read_checkpoint(tmp_path / "m.pth")
    assert read_checkpoint(tmp_path / "m.pth", state="student").classifier == "fc"


@pytest.mark.parametrize("loss", ["criterion", "criterion_ce", "loss", "loss_fn"])
def test_lightning_keeps_more_than_the_model(tmp_path: Path, loss: str) -> None:
    state = prefixed(small().state_dict(), "net." if loss == "loss" else "model.")
    state[f"{loss}.weight"] = torch.ones(CLASSES)
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.4"}, tmp_path / "m.ckpt")
    checkpoint = read_checkpoint(tmp_path / "m.ckpt")
    assert checkpoint.classifier in ("fc", "net.fc")
    checkpoint.load_into(small(seed=2), "fc")


def test_short_names_keep_two_models_apart() -> None:
    assert short_names(["a.fc", "module.a.fc"]) == {"a.fc": "a.fc", "module.a.fc": "module.a.fc"}
    assert short_names(["model.fc", "other.fc"]) == {"model.fc": "model.fc", "other.fc": "other.fc"}
    assert short_names([]) == {}


@pytest.mark.parametrize("key", ["classes", "class_names", "categories"])
def test_class_names(tmp_path: Path, key: str) -> None:
    names = [f"class {c}" for c in range(CLASSES)]
    state = small().state_dict()
    torch.save({"state_dict": state, key: names}, tmp_path / "m.pth")
    assert read_checkpoint(tmp_path / "m.pth").class_names == tuple(names)
    torch.save({"state_dict": state, "meta": {key: tuple(names)}}, tmp_path / "m.pth")
    assert read_checkpoint(tmp_path / "m.pth").class_names == tuple(names)
    torch.save(
        {"state_dict": state, "class_to_idx": {name: index for index, name in reversed(list(enumerate(names)))}},
        tmp_path / "m.pth",
    )
    assert read_checkpoint(tmp_path / "m.pth").class_names == tuple(names)
    torch.save({"state_dict": state, key: names[1:]}, tmp_path / "m.pth")
    assert read_checkpoint(tmp_path / "m.pth").class_names is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_kept_in_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small().to(dtype)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    assert checkpoint.dtype == dtype and checkpoint.backbone["conv.weight"].dtype == dtype
    assert checkpoint.weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    linear = repaired(checkpoint)
    write_repaired(checkpoint, linear, FEW, tmp_path / "new.pth")
    after = torch.load(tmp_path / "new.pth", weights_only=True)["fc.weight"]
    assert after.dtype == dtype and torch.equal(after[FEW], linear.weight[FEW].to(dtype))


# Which state, which layer, under which names


def both(model: nn.Module, average: nn.Module, names: tuple[str, str]) -> dict[str, Any]:
    return {names[0]: model.state_dict(), names[1]: average.state_dict()}


@pytest.mark.parametrize("names", [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema")])
def test_a_second_state_is_named(tmp_path: Path, names: tuple[str, str]) -> None:
    model, average = small(), small(seed=1)
    torch.save({**both(model, average, names), "optimizer": {"fc.weight": torch.ones(2, 2)}}, tmp_path / "m.pth")
    with pytest.warns(UserWarning, match=rf"{names[0]} is read; {names[1]} in the same file is neither read nor repaired"):
        checkpoint = read_checkpoint(tmp_path / "m.pth")
    assert checkpoint.states == names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = read_checkpoint(tmp_path / "m.pth", state=names[1])
    assert chosen.states == names[::-1] and torch.equal(chosen.weight, average.fc.weight)


def test_a_state_within_a_state(tmp_path: Path) -> None:
    model, average = small(), small(seed=1)
    torch.save({"models": both(model, average, ("student", "teacher"))}, tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth", state="models/teacher")
    assert torch.equal(checkpoint.weight, average.fc.weight)
    write_repaired(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.pth")
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("m.pth", "new.pth"))
    assert_same(before, after, but={"/models/teacher/fc.weight", "/models/teacher/fc.bias"})


def test_an_average_beside_the_weights_in_one_dictionary(tmp_path: Path) -> None:
    model, average = small(), small(seed=1)
    state = {**prefixed(model.state_dict(), "model."), **prefixed(average.state_dict(), "ema_model.module.")}
    torch.save({"state_dict": {**state, "ema_model.n_averaged": torch.tensor(3)}}, tmp_path / "m.ckpt")
    with pytest.warns(UserWarning, match=r"state_dict is read; state_dict/ema_model in the same file"):
        checkpoint = read_checkpoint(tmp_path / "m.ckpt")
    other = small(seed=5)
    checkpoint.load_into(other, "fc")
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    read_checkpoint(tmp_path / "m.ckpt", state="state_dict/ema_model").load_into(other, "fc")
    assert_same(dict(other.state_dict()), dict(average.state_dict()))


def test_counters_are_passed_over(tmp_path: Path) -> None:
    """Those of averages and of profilers."""
    model = small()
    average = torch.optim.swa_utils.AveragedModel(model)
    state = {**average.state_dict(), "total_ops": torch.zeros(1), "module.conv.total_params": torch.zeros(1)}
    torch.save({**state, "module.fc.total_ops": torch.zeros(1)}, tmp_path / "m.pth")
    other = small(seed=5)
    read_checkpoint(tmp_path / "m.pth").load_into(other, "fc")
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("backbone", ["backbone.", "encoder.module.", "_fsdp_wrapped_module.net.", "module.model."])
@pytest.mark.parametrize("outer", ["", "net."])
def test_a_prefix_that_the_classifier_has_not(tmp_path: Path, backbone: str, outer: str) -> None:
    model = small()
    state = {name if name.startswith("fc.") else backbone + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({**state, "criterion.weight": torch.ones(3)}, tmp_path / "m.pth")
    other = nn.Sequential(OrderedDict(net=small(seed=3))) if outer else small(seed=3)
    read_checkpoint(tmp_path / "m.pth").load_into(other, f"{outer}fc")
    assert_same(dict(prefixed(model.state_dict(), outer)), dict(other.state_dict()))


@pytest.mark.parametrize("name", ["densenet121", "googlenet"])
def test_names_of_older_releases_and_heads_that_play_no_part(tmp_path: Path, name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    options = {"init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        model = models.get_model(name, num_classes=5, **options)
    state = {key: torch.full(tensor.shape, 0.5, dtype=tensor.dtype) for key, tensor in model.state_dict().items()}
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): tensor for key, tensor in state.items()}
    torch.save({key: tensor for key, tensor in old.items() if not key.startswith("aux")}, tmp_path / "m.pth")
    model = model.to_empty(device="cpu")
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    checkpoint.load_into(model, checkpoint.classifier)
    loaded = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("aux")}
    assert_same(loaded, {key: tensor for key, tensor in state.items() if not key.startswith("aux")})
    torch.save(state, tmp_path / "m.pth")  # and heads that the model has not
    if name == "googlenet":
        bare = models.googlenet(num_classes=5, init_weights=False, aux_logits=False)
        read_checkpoint(tmp_path / "m.pth").load_into(bare, "fc")
        assert torch.equal(bare.conv1.conv.weight, state["conv1.conv.weight"])


def test_a_backbone_for_other_classes(tmp_path: Path) -> None:
    model, other = small(), small(seed=3, classes=4)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    kept = other.fc.weight.clone()
    read_checkpoint(tmp_path / "m.pth").load_backbone_into(other, "fc")
    assert torch.equal(other.conv.weight, model.conv.weight) and torch.equal(other.fc.weight, kept)


NORMED = {
    "conv.weight": torch.ones(WIDTH, 3, 1, 1),
    "bn.weight": torch.ones(WIDTH),
    "linear.weight": torch.randn(WIDTH, CLASSES),
}


@pytest.mark.parametrize("num_classes", [None, CLASSES])
def test_a_normalised_layer_is_not_taken_for_a_plain_one(tmp_path: Path, num_classes: int | None) -> None:
    torch.save({"state_dict": prefixed(NORMED, "module.")}, tmp_path / "m.pth")
    with pytest.warns(UserWarning, match=r"linear.weight \[6, 7\] is read as a normalised layer that is stored transposed"):
        checkpoint = read_checkpoint(tmp_path / "m.pth", num_classes=num_classes)
    assert (checkpoint.num_classes, checkpoint.in_features, checkpoint.feature_normalization) == (CLASSES, WIDTH, "l2")
    expected = nn.functional.normalize(NORMED["linear.weight"], dim=0).t() * 30
    assert torch.equal(checkpoint.weight, expected)


def test_a_layer_that_fits_both_ways_is_asked_about(tmp_path: Path) -> None:
    state = {**NORMED, "linear.weight": torch.randn(WIDTH, 2 * WIDTH)}
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"linear.weight \[6, 12\] .* num_classes= says which it is"):
        read_checkpoint(tmp_path / "m.pth")
    assert read_checkpoint(tmp_path / "m.pth", num_classes=WIDTH).feature_normalization == "none"
    with pytest.warns(UserWarning, match="normalised"):
        assert read_checkpoint(tmp_path / "m.pth", num_classes=2 * WIDTH).feature_normalization == "l2"


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("parametrized", [True, False])
def test_weight_normalisation_is_read_and_written(tmp_path: Path, parametrized: bool) -> None:
    normalize = nn.utils.parametrizations.weight_norm if parametrized else nn.utils.weight_norm
    model = small()
    normalize(model.fc)
    with torch.no_grad():
        (model.fc.parametrizations.weight.original0 if parametrized else model.fc.weight_g).mul_(1.5)
    weight = model(torch.randn(1, 3, 8, 8)) is not None and model.fc.weight.detach()
    torch.save(model.state_dict(), tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    torch.testing.assert_close(checkpoint.weight, weight)
    linear = repaired(checkpoint)
    write_repaired(checkpoint, linear, FEW, tmp_path / "new.pth")
    other = small(seed=2)
    normalize(other.fc)
    other.load_state_dict(torch.load(tmp_path / "new.pth", weights_only=True))
    other(torch.randn(1, 3, 8, 8))
    torch.testing.assert_close(other.fc.weight, linear.weight)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fc.weight_orig": torch.ones(5, 6), "fc.weight_u": torch.ones(5)}, r"no plain linear layer: fc with fc.weight_orig"),
        ({"fc.weight": torch.ones(5, 6), "fc.sigma": torch.ones(1)}, r"classifier fc .* has fc.sigma beside its weight"),
        (
            {"fc.base_layer.weight": torch.ones(5, 6), "fc.lora_A.default.weight": torch.ones(2, 6)},
            r"classifier fc of .* an adapter is around it \(fc.base_layer.weight, fc.lora_A.default.weight\)",
        ),
        (
            {"fc.original_module.weight": torch.ones(5, 6), "fc.modules_to_save.default.weight": torch.ones(5, 6)},
            r"classifier fc of .* an adapter is around it \(fc.original_module.weight, fc.modules_to_save.default.weight\)",
        ),
        ({"fc.weight": torch.ones(5, 6, 1, 1)}, r"fc is a 1x1 convolution with fc.weight \[5, 6, 1, 1\]"),
        ({"classifier.1.weight": torch.ones(5, 6, 1, 1), "classifier.1.bias": torch.ones(5)}, r"classifier.1 is a 1x1 conv"),
        ({"fc.weight": torch.ones(5, 6, dtype=torch.int8)}, r"fc with fc.weight \[5, 6\] torch.int8"),
    ],
)
def test_no_other_layer_in_place_of_one_that_is_not_plain(tmp_path: Path, changed: dict[str, Tensor], message: str) -> None:
    torch.save({"aside.weight": torch.ones(6, 9), "aside.bias": torch.ones(6), **changed}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "m.pth")
    if "fc.base_layer.weight" in changed:
        with pytest.raises(ValueError, match=r"it has fc.lora_A.default.weight beside its weight"):
            read_checkpoint(tmp_path / "m.pth", classifier="fc.base_layer")


def test_class_names_in_a_configuration_beside_the_file(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "m.pth")
    names = [f"bird {label}" for label in range(CLASSES)]
    configuration = {"model_type": "vit", "id2label": {str(label): name for label, name in reversed(list(enumerate(names)))}}
    (tmp_path / "config.json").write_text(json.dumps(configuration))
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    assert checkpoint.class_names == tuple(names)
    with pytest.raises(ValueError, match=r"does not fit model: missing: extra.*transformers.*from_pretrained"):
        other = small()
        other.extra = nn.Linear(2, 2)
        checkpoint.load_into(other, "fc")
    (tmp_path / "config.json").write_text("{broken")
    assert read_checkpoint(tmp_path / "m.pth").class_names is None


# Classifiers alone


@pytest.mark.parametrize("payload", ["bare", "bare without bias", "fc", "module.fc", "nested"])
def test_a_linear_layer_alone(tmp_path: Path, payload: str) -> None:
    layer = nn.Linear(WIDTH, CLASSES, bias=payload != "bare without bias")
    content: Any = layer.state_dict()
    if payload in ("fc", "module.fc"):
        content = prefixed(content, f"{payload}.")
    torch.save({"state_dict": content, "epoch": 3} if payload == "nested" else content, tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    assert checkpoint.format == "linear" and checkpoint.backbone == {}
    assert torch.equal(checkpoint.weight, layer.weight) and (checkpoint.bias is None) == (layer.bias is None)
    write_repaired(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.pth")
    model = small()
    with pytest.raises(ValueError, match=r"a classifier alone.*load_classifier_into"):
        checkpoint.load_into(model, "fc")
    checkpoint.load_classifier_into(model, "fc")
    assert torch.equal(model.fc.weight, layer.weight)
    assert torch.equal(model.fc.bias, torch.zeros(CLASSES) if layer.bias is None else layer.bias)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_save_linear(tmp_path: Path, suffix: str) -> None:
    linear, path = nn.Linear(4, 3), tmp_path / f"linear{suffix}"
    save_linear(linear, path, metadata={"tau": 0.5, "class_names": ["a", "b", "ü"], "note": "x"})
    checkpoint = read_checkpoint(path, num_classes=3)
    assert_same(dict(checkpoint.linear().state_dict()), dict(linear.state_dict()))
    assert checkpoint.metadata["tau"] == "0.5" and checkpoint.metadata["note"] == "x"
    assert checkpoint.class_names == ("a", "b", "ü")
    if suffix == ".pth":  # no key that a strict loader does not know
        nn.Linear(4, 3).load_state_dict(torch.load(path, weights_only=True))
    with pytest.raises(ValueError, match=r"exists already"):
        save_linear(linear, path)
    save_linear(nn.Linear(4, 3, bias=False), path, overwrite=True)
    assert read_checkpoint(path).bias is None


def test_save_linear_refuses(tmp_path: Path) -> None:
    head = AlphaNet.from_linear(nn.Linear(8, 4), members=torch.tensor([[3, 0, 1]]), seed=0)
    with pytest.raises(TypeError, match=r"fold\(\)"):
        save_linear(head, tmp_path / "m.pth")
    with pytest.raises(TypeError, match=r"metadata must be what JSON can hold"):
        save_linear(nn.Linear(4, 3), tmp_path / "m.pth", metadata={"a": object()})
    with pytest.raises(ValueError, match=r"weight must be finite"):
        linear = nn.Linear(4, 3)
        linear.weight.data[0, 0] = float("nan")
        save_linear(linear, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"a directory that exists"):
        save_linear(nn.Linear(4, 3), tmp_path / "none" / "m.pth")
    assert list(tmp_path.iterdir()) == []


# RIDE


class Normed(nn.Module):
    """Cosines between features and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=1) @ nn.functional.normalize(self.weight, dim=0)


class Experts(nn.Module):
    """RIDE in small: each expert's features are another layer's; the logits are the experts' mean times s."""

    def __init__(self, experts: int, normed: bool, s: float = 30.0) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.layer4s = nn.ModuleList([nn.Linear(5, WIDTH) for _ in range(experts)])
        self.backbone.linears = nn.ModuleList([Normed() if normed else nn.Linear(WIDTH, CLASSES) for _ in range(experts)])
        self.s = s if normed else 1.0

    def features(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.backbone.layer4s], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.backbone.layer4s, self.backbone.linears, strict=True)
        return torch.stack([linear(layer(x)) * self.s for layer, linear in pairs], dim=1).mean(dim=1)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("experts", [1, 3])
def test_plain_experts(tmp_path: Path, experts: int, prefix: str) -> None:
    model, x = Experts(experts, normed=False), torch.randn(9, 5)
    state = prefixed(model.state_dict(), prefix)
    torch.save({"arch": "ResNet", "state_dict": state, "monitor_best": float("inf")}, tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth", num_classes=CLASSES)
    assert (checkpoint.format, checkpoint.experts, checkpoint.feature_normalization) == ("ride", experts, "none")
    torch.testing.assert_close(checkpoint.linear()(model.features(x)), model(x))

    linear = repaired(checkpoint)
    write_repaired(checkpoint, linear, FEW, tmp_path / "new.pth")
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("m.pth", "new.pth"))
    changed = {f"/state_dict/{prefix}backbone.linears.{i}.{name}" for i in range(experts) for name in ("weight", "bias")}
    assert_same(before, after, but=changed)
    other = Experts(experts, normed=False)
    other.load_state_dict({key.removeprefix("module."): tensor for key, tensor in after["state_dict"].items()})
    torch.testing.assert_close(other(x), linear(model.features(x)))
    base = [c for c in range(CLASSES) if c not in FEW]
    assert torch.equal(other(x)[:, base], model(x)[:, base])


def test_a_row_that_is_not_new_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    torch.save({"state_dict": Experts(3, normed=False).state_dict()}, tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    write_repaired(checkpoint, checkpoint.linear(), FEW, tmp_path / "new.pth")
    before, after = (torch.load(tmp_path / name, weights_only=True)["state_dict"] for name in ("m.pth", "new.pth"))
    for key in before:
        torch.testing.assert_close(after[key], before[key], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("experts", "s"), [(1, 30.0), (3, 30.0), (2, 16.0)])
def test_normalized_experts(tmp_path: Path, experts: int, s: float) -> None:
    model, x = Experts(experts, normed=True, s=s), torch.randn(9, 5)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth", num_classes=CLASSES, **({} if s == 30 else {"scale": s}))
    assert (checkpoint.experts, checkpoint.feature_normalization, checkpoint.bias) == (experts, "l2", None)
    features = checkpoint.prepare_features(model.features(x))
    torch.testing.assert_close(checkpoint.linear()(features), model(x))
    with pytest.raises(ValueError, match=r"the length of a class's column is lost.*save_linear.*safetensors"):
        write_repaired(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.pth")
    with pytest.raises(ValueError, match=rf"{experts} expert\(s\) and normalised features"):
        checkpoint.load_into(nn.Sequential(nn.Linear(2, WIDTH * experts), nn.Linear(WIDTH * experts, CLASSES)), "1")


def test_ride_with_one_expert_has_another_name(tmp_path: Path) -> None:
    state = {"backbone.conv1.weight": torch.ones(2, 3, 1, 1), "backbone.linear.weight": torch.randn(CLASSES, WIDTH)}
    torch.save({"state_dict": {**state, "backbone.linear.bias": torch.randn(CLASSES)}}, tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    assert (checkpoint.format, checkpoint.classifier, checkpoint.num_classes) == ("ride", "backbone.linear", CLASSES)
    torch.save({"state_dict": state}, tmp_path / "m.pth")
    assert read_checkpoint(tmp_path / "m.pth").num_classes == WIDTH  # normalised: a column a class


def test_ride_without_all_experts(tmp_path: Path) -> None:
    state = Experts(3, normed=False).state_dict()
    torch.save({name: tensor for name, tensor in state.items() if "linears.1" not in name}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"lacks experts: it has linears 0, 2"):
        read_checkpoint(tmp_path / "m.pth")
    torch.save({name: tensor for name, tensor in state.items() if "linears.1.bias" not in name}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"a bias for each of its 3 experts or for none"):
        read_checkpoint(tmp_path / "m.pth")
    state["backbone.linears.1.weight"] = torch.ones(CLASSES, WIDTH + 1)
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=rf"linears.1.weight .* must have shape \[{CLASSES}, {WIDTH}\], as that of the first"):
        read_checkpoint(tmp_path / "m.pth")


def test_normalize_expert_features() -> None:
    features = torch.randn(4, 6)
    parts = normalize_expert_features(features, 3).reshape(4, 3, 2)
    torch.testing.assert_close(parts.norm(dim=2), torch.ones(4, 3))
    assert torch.equal(normalize_expert_features(torch.zeros(1, 4), 2), torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"multiple of experts=4 columns, got 6"):
        normalize_expert_features(features, 4)
    with pytest.raises(TypeError, match=r"floating point"):
        normalize_expert_features(features.int(), 3)


# safetensors


def test_safetensors_with_its_metadata(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = small()
    safetensors.save_file(model.state_dict(), tmp_path / "m.safetensors", metadata={"format": "pt", "trained": "long"})
    checkpoint = read_checkpoint(tmp_path / "m.safetensors")
    assert checkpoint.classifier == "fc" and checkpoint.metadata["trained"] == "long"
    linear = repaired(checkpoint)
    write_repaired(checkpoint, linear, FEW, tmp_path / "new.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "trained": "long"}
    before, after = (safetensors.load_file(tmp_path / name) for name in ("m.safetensors", "new.safetensors"))
    assert_same(before, after, but={"/fc.weight", "/fc.bias"})
    assert torch.equal(after["fc.weight"], linear.weight)
    with pytest.raises(ValueError, match=r"path must end in .safetensors"):
        write_repaired(checkpoint, linear, FEW, tmp_path / "new.pth")
    torch.save(model.state_dict(), tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"path must not end in .safetensors"):
        write_repaired(read_checkpoint(tmp_path / "m.pth"), linear, FEW, tmp_path / "x.safetensors")


def test_safetensors_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_linear(nn.Linear(4, 3), path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"not a whole safetensors file"):
        read_checkpoint(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"not a safetensors file"):
        read_checkpoint(path)


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_linear(nn.Linear(4, 3), tmp_path / "m.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install safetensors"):
        read_checkpoint(tmp_path / "m.safetensors")
    with pytest.raises(ImportError, match=r"pip install safetensors"):
        save_linear(nn.Linear(4, 3), tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()


# Files that are not what they should be


class Touch:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


class Evaluate:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.path)!r}, 'w')",)


class Thing:
    pass


def test_the_options_of_training_scripts_are_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchvision's and timm's scripts keep them, and RIDE's; they are in the repaired file as they were."""
    script = types.ModuleType("parse_config")
    script.ConfigParser = type("ConfigParser", (), {"__module__": "parse_config"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "parse_config", script)
    config = script.ConfigParser()
    config.__dict__ |= {"_config": OrderedDict(lr=0.1), "_save_dir": Path("saved/x"), "log_levels": {0: 30}, "resume": None}
    content = {
        "model": {"conv.weight": torch.ones(WIDTH, 3, 1, 1), "fc.weight": torch.randn(CLASSES, WIDTH)},
        "args": argparse.Namespace(lr=0.1, device=torch.device("cpu"), output_dir=Path("."), names=["a"]),
        "config": config,
    }
    torch.save(content, tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    assert torch.equal(checkpoint.weight, content["model"]["fc.weight"])
    linear = checkpoint.linear()
    linear.weight.data[1] *= 2
    write_repaired(checkpoint, linear, [1], tmp_path / "repaired.pth")
    again = torch.load(tmp_path / "repaired.pth", weights_only=False)
    assert again["args"] == content["args"] and again["config"].__dict__ == config.__dict__
    assert torch.equal(again["model"]["fc.weight"], linear.weight)


@pytest.mark.parametrize("new_form", [True, False])
@pytest.mark.parametrize("payload", [Touch, Evaluate])
def test_files_that_name_code_run_none_of_it(tmp_path: Path, payload: type, new_form: bool) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    hidden = {"x": payload(trace), "args": argparse.Namespace(callback=print, more=[payload(trace)])}
    torch.save({**balanced(small()), **hidden}, path, _use_new_zipfile_serialization=new_form)
    assert torch.equal(read_checkpoint(path).weight, small().fc.weight)
    assert not trace.exists()


class Ran(Exception):
    """Raised by whatever of a foreign class is called."""


def test_no_method_of_an_object_beside_the_weights_is_called(tmp_path: Path) -> None:
    class Log:
        def __setstate__(self, state: Any) -> None:
            raise Ran

    Log.__qualname__, globals()["Log"] = "Log", Log
    log = Log()
    log.n = 1  # type: ignore[attr-defined]
    weight = torch.randn(CLASSES, WIDTH)
    beside = {
        "log": log,
        "optimizer": functools.partial(torch.optim.Adam, lr=1e-3),
        "history": collections.defaultdict(list, loss=[1.0]),
        "date": datetime.datetime(2024, 5, 1),
        "counts": np.array([5, 4]),
        "shared": argparse.Namespace(part=weight[2]),
    }
    torch.save({"state_dict": {"fc.weight": weight, "conv.weight": torch.ones(1)}, **beside}, tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    assert torch.equal(checkpoint.weight, weight) and list(checkpoint.backbone) == ["conv.weight"]
    write_repaired(checkpoint, repaired(checkpoint, [1]), [1], tmp_path / "new.pth")
    assert (tmp_path / "new.pth").stat().st_size == (tmp_path / "m.pth").stat().st_size
    # A part of the weight that such an object holds would change with it.
    with pytest.raises(ValueError, match=r"shared / 0 / part of .* shares memory with state_dict / fc.weight"):
        write_repaired(checkpoint, repaired(checkpoint, [2]), [2], tmp_path / "new2.pth")


def test_other_threads_loads_are_left_alone(tmp_path: Path) -> None:
    """What the process allows its own loads is neither used nor changed."""
    torch.save({"fc.weight": torch.ones(3, 2), "x": Thing()}, tmp_path / "thing.pth")
    failed: list[Exception] = []
    done = threading.Event()

    def load() -> None:
        while not done.is_set():
            try:
                torch.load(tmp_path / "thing.pth", weights_only=True)
            except Exception as error:
                failed.append(error)

    with torch.serialization.safe_globals([Thing]):
        thread = threading.Thread(target=load)
        thread.start()
        for _ in range(20):
            assert isinstance(checkpoint_files.read_payload(tmp_path / "thing.pth").content["x"], checkpoint_files.StandIn)
        done.set()
        thread.join()
    assert failed == []


def pickled(*opcodes: bytes) -> bytes:
    """An archive of torch.save's whose pickle has these opcodes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("m/data.pkl", b"".join((b"\x80\x02", *opcodes, b".")))
    return file.getvalue()


@pytest.mark.parametrize(
    "opcodes",
    [
        (b"}", b")", b"\x85" * 1_000_000, b"Ns"),  # a key that is a tuple in a tuple without end
        (b"(", b")", b"\x85" * 1_000_000, b"\x91"),
        (b"]" * 1_000_000, b"a" * 999_999),  # lists without end
        (b"}", b"r\xff\xff\xff\xff"),  # place number 4294967295 in the memory
        (b"\x8e" + b"\xff" * 7 + b"\x7f",),  # a text that is longer than any file
        (b"\x8b\xff\xff\xff\x7f",),
        (b"ctorch._utils\n_rebuild_tensor_v2\n", b"}", b"b"),  # a state for a function of torch's
        (b"\x82\x01",),  # a code of the process's own registry
        (b"(", b"N" * 1_000),
    ],
)
def test_hostile_pickles_are_refused(tmp_path: Path, opcodes: tuple[bytes, ...]) -> None:
    (tmp_path / "m.pth").write_bytes(pickled(*opcodes))
    with pytest.raises(ValueError, match=r"m.pth"):
        read_checkpoint(tmp_path / "m.pth")


@pytest.mark.parametrize("new_form", [True, False])
def test_tensors_that_are_larger_than_their_file(tmp_path: Path, new_form: bool) -> None:
    torch.save({"fc.weight": torch.ones(3, 7)}, tmp_path / "m.pth", _use_new_zipfile_serialization=new_form)
    content = (tmp_path / "m.pth").read_bytes()
    assert b"K\x15" in content  # 21 numbers
    huge = content.replace(b"K\x15", b"\x8a\x06" + (1 << 45).to_bytes(6, "little"), 1)
    if new_form:
        with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(tmp_path / "m.pth", "w") as changed:
            for name in archive.namelist():
                part = archive.read(name)
                changed.writestr(name, part.replace(b"K\x15", b"\x8a\x06" + (1 << 45).to_bytes(6, "little")))
    else:
        (tmp_path / "m.pth").write_bytes(huge)
    with pytest.raises(ValueError, match=r"damaged: (its tensors are larger|storage 0 has another size)"):
        read_checkpoint(tmp_path / "m.pth")


def test_a_flipped_bit_is_found_by_its_checksum(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "m.pth")
    content = bytearray((tmp_path / "m.pth").read_bytes())
    content[content.index(small().fc.weight.detach().numpy().tobytes()) + 5] ^= 1
    (tmp_path / "m.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged: Bad CRC-32"):
        read_checkpoint(tmp_path / "m.pth")


def test_files_without_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch can be told to write none."""
    torch.serialization.set_crc32_options(False)
    torch.save(small().state_dict(), tmp_path / "m.pth")
    torch.serialization.set_crc32_options(True)
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    linear = repaired(checkpoint)
    write_repaired(checkpoint, linear, FEW, tmp_path / "new.pth")
    assert torch.equal(torch.load(tmp_path / "new.pth", weights_only=True)["fc.weight"], linear.weight)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_whole_models_and_scripts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    torch.save(nn.Linear(2, 3), path)
    with pytest.raises(ValueError, match=r"holds a torch.nn.modules.linear.Linear, not a dictionary"):
        read_checkpoint(path)
    torch.jit.save(torch.jit.trace(nn.Linear(2, 3), torch.ones(1, 2)), path)
    with pytest.raises(ValueError, match=r"TorchScript archive.*state_dict\(\)"):
        read_checkpoint(path)


@pytest.mark.parametrize("new_form", [True, False])
def test_files_cut_off_anywhere(tmp_path: Path, new_form: bool) -> None:
    path = tmp_path / "m.pth"
    torch.save(balanced(small()), path, _use_new_zipfile_serialization=new_form)
    content = path.read_bytes()
    for length in sorted({0, 1, 3, 9, 100, *range(200, len(content) - 1, max(1, len(content) // 40)), len(content) - 1}):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"m.pth is (empty, not a checkpoint|not a checkpoint that torch.save wrote)"):
            read_checkpoint(path)


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=200))
@example(pickle.BYTEARRAY8 + (2**56).to_bytes(8, "little"))
@example(pickle.BYTEARRAY8 + (2**36).to_bytes(8, "little") + b"few")
def test_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "m.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"m.pth"):
        read_checkpoint(path)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*none.pth"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"must be a file, got the directory"):
        read_checkpoint(tmp_path)
    path = tmp_path / "m.pth"
    path.write_bytes(pickle.dumps({"feats": [1.0], "labels": [0]}, protocol=4))
    with pytest.raises(ValueError, match=r"not a checkpoint that torch.save wrote"):
        read_checkpoint(path)
    for payload, message in (
        (torch.ones(3), "holds a Tensor"),
        ([1, 2], "holds a list"),
        ({}, "no tensors in it; it has: none"),
        ({"epoch": 3, "optimizer": {"lr": 1.0}}, "no tensors in it; it has: epoch, optimizer"),
    ):
        torch.save(payload, path)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a pointer of Git LFS"),
        (b"\n<!DOCTYPE html><title>Quota exceeded</title>", r"a page of the web \(HTML\)"),
        (gzip.compress(b"something", mtime=0), "compressed with gzip"),
        (b'{"metadata": {"total_size": 9}, "weight_map": {}}', "a JSON document, perhaps the index of a model's shards"),
        (b"\x89HDF\r\n", "an HDF5 file"),
    ],
)
def test_files_that_people_take_for_checkpoints(tmp_path: Path, suffix: str, content: bytes, what: str) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"m{suffix} is {what}.*, not a checkpoint"):
        read_checkpoint(path)


def test_one_of_several_shards(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.safetensors"
    save_linear(nn.Linear(4, 3), path)
    with pytest.raises(ValueError, match=r"is one of 2 shards of a model, which the file model.safetensors.index.json beside"):
        read_checkpoint(path)


@pytest.mark.parametrize("kind", ["pipe", "device", "dangling link", "link"])
def test_what_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.pth"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "none.pth")
    else:
        torch.save(small().state_dict(), tmp_path / "there.pth")
        path.symlink_to(tmp_path / "there.pth")
        checkpoint = read_checkpoint(path)
        write_repaired(checkpoint, repaired(checkpoint), FEW, path, overwrite=True)
        assert path.is_symlink() and not (tmp_path / "there.pth").is_symlink()
        return
    with pytest.raises((ValueError, FileNotFoundError), match=r"must be a file, got the (pipe|device)|there is no checkpoint"):
        read_checkpoint(path)


def test_classifiers_that_do_not_fit_together(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    for changes, message in (
        (
            {"fc.bias": torch.ones(CLASSES + 1)},
            rf"fc.bias .* one number for each of the {CLASSES} classes, got 8 in shape \[8\]",
        ),
        ({"fc.weight": torch.full((CLASSES, WIDTH), float("inf"))}, r"must be finite, got NaN or infinity in fc.weight"),
        ({"fc.bias": torch.full((CLASSES,), float("nan"))}, r"must be finite, got NaN or infinity in fc.bias"),
        ({"fc.bias": torch.ones(CLASSES).int()}, r"floating point, got torch.int32"),
    ):
        torch.save({**small().state_dict(), **changes}, path)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(path)
    torch.save(small().state_dict(), path)
    with pytest.raises(ValueError, match=rf"num_classes is 365, but fc of .* has {CLASSES} classes"):
        read_checkpoint(path, num_classes=365)


def test_bad_arguments(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "m.pth")
    for options, error, message in (
        ({"num_classes": 2.5}, TypeError, "num_classes must be an integer"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1"),
        ({"classifier": 3}, TypeError, "classifier must be text"),
        ({"scale": "30"}, TypeError, "scale must be a number"),
        ({"scale": 0.0}, ValueError, "scale must be finite and above 0"),
    ):
        with pytest.raises(error, match=message):
            read_checkpoint(tmp_path / "m.pth", **options)


# Into a model


def test_load_into_names_what_does_not_fit(tmp_path: Path) -> None:
    model = small()
    state = model.state_dict()
    for name, changed, message in (
        ("conv.bias", {}, r"missing: conv.bias"),
        (None, {"extra.weight": torch.ones(1)}, r"unexpected: extra.weight"),
        (
            None,
            {"conv.weight": torch.ones(2, 3, 1, 1)},
            r"of another shape: conv.weight \[2, 3, 1, 1\] instead of \[6, 3, 3, 3\]",
        ),
    ):
        torch.save({key: tensor for key, tensor in {**state, **changed}.items() if key != name}, tmp_path / "m.pth")
        other = small(seed=3)
        before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            read_checkpoint(tmp_path / "m.pth", classifier="fc").load_into(other, "fc")
        assert_same(dict(other.state_dict()), before)
    torch.save(state, tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"model's fc has 9 classes and 6 features, the classifier of .* has 7 and 6"):
        checkpoint.load_into(small(classes=9), "fc")
    with pytest.raises(ValueError, match=r"classifier must name an nn.Linear of model, got 'head'; it has: fc"):
        checkpoint.load_into(model, "head")
    with pytest.raises(ValueError, match=r"model's fc has no bias"):
        checkpoint.load_into(small(bias=False), "fc")
    with pytest.raises(TypeError, match=r"model must be a torch module"):
        checkpoint.load_into("resnet50", "fc")  # type: ignore[arg-type]


def test_load_into_takes_old_files_and_other_prefixes(tmp_path: Path) -> None:
    model = small()
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(prefixed(state, "encoder."), tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    assert checkpoint.classifier == "encoder.fc"
    other = small(seed=3)
    checkpoint.load_into(other, "fc")
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    wrapped = nn.Sequential(OrderedDict(net=small(seed=4)))
    checkpoint.load_into(wrapped, "net.fc")
    assert torch.equal(wrapped.net.conv.weight, model.conv.weight)


# Written again


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_every_other_bit_is_kept(tmp_path: Path) -> None:
    """NaN with payloads, strides, shared memory, parameters, order and kinds of containers, devices' names."""
    flat = torch.randn(100)
    nan = torch.tensor([0x7FC12345, 0x7F800001], dtype=torch.int32).view(torch.float32)
    shared = torch.randn(4)
    state = OrderedDict(
        [
            ("z.flat", flat[:10]),
            ("fc.weight", flat[10:52].reshape(WIDTH, CLASSES).t()),  # a column-major view of a larger storage
            ("fc.bias", flat[52:59]),
            ("a.rest", flat[59:].reshape(1, -1)),
            ("tied.one", shared),
            ("tied.two", shared),
            ("nan", nan),
            ("empty", torch.empty(0, 3)),
            ("parameter", nn.Parameter(torch.randn(2))),
            ("integers", torch.arange(3)),
            ("complex", torch.randn(2, dtype=torch.complex64)),
            ("sparse", torch.eye(3).to_sparse()),
        ]
    )
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    payload = {"epoch": 1, "model": state, "list": [1, (2.5, "ü", None)], "nan": float("nan"), "set": {1, 2}}
    for new_form in (True, False):
        torch.save(payload, tmp_path / "m.pth", _use_new_zipfile_serialization=new_form)
        checkpoint = read_checkpoint(tmp_path / "m.pth", num_classes=CLASSES)
        linear = repaired(checkpoint)
        write_repaired(checkpoint, linear, FEW, tmp_path / "new.pth", overwrite=True)
        before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("m.pth", "new.pth"))
        for content in (before, after):
            assert torch.equal(content["model"]["sparse"].to_dense(), torch.eye(3))
            del content["model"]["sparse"]
        assert_same(before, after, but={"/model/fc.weight", "/model/fc.bias"})
        assert isinstance(after["model"]["parameter"], nn.Parameter)
        assert after["model"]["tied.one"].data_ptr() == after["model"]["tied.two"].data_ptr()
        assert after["model"]["fc.bias"].untyped_storage().data_ptr() == after["model"]["z.flat"].untyped_storage().data_ptr()
        assert torch.equal(after["model"]["fc.weight"], linear.weight)
        # What was written before torch 1.6 is written anew.
        assert not new_form or (tmp_path / "new.pth").stat().st_size == (tmp_path / "m.pth").stat().st_size


@pytest.mark.parametrize("new_form", [True, False])
def test_parameters_as_they_are(tmp_path: Path, new_form: bool) -> None:
    model = small()
    torch.save(dict(model.named_parameters()), tmp_path / "m.pth", _use_new_zipfile_serialization=new_form)
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    assert not checkpoint.weight.requires_grad and not checkpoint.backbone["conv.weight"].requires_grad
    linear = repaired(checkpoint)
    write_repaired(checkpoint, linear, FEW, tmp_path / "new.pth")
    after = torch.load(tmp_path / "new.pth", weights_only=True)
    assert isinstance(after["fc.weight"], nn.Parameter) and torch.equal(after["fc.weight"], linear.weight)


def test_views_of_storages_as_torch_once_wrote_them(tmp_path: Path) -> None:
    """In old files a storage may be a part of another: all tensors of a model in one."""
    numbers = torch.randn(60)
    parts = {"fc.weight": (5, (CLASSES, WIDTH)), "fc.bias": (50, (CLASSES,))}

    class Part:
        def __init__(self, name: str) -> None:
            self.name = name

    class Rebuilt(Part):
        def __reduce__(self) -> Any:
            shape = parts[self.name][1]
            strides = (WIDTH, 1)[2 - len(shape) :]
            return torch._utils._rebuild_tensor, (Part(self.name), 0, shape, strides)

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if type(obj) is not Part:
                return None
            start, shape = parts[obj.name]
            view = (obj.name, start, int(np.prod(shape)))
            return ("storage", torch.FloatStorage, "all", "cpu", numbers.numel(), view)

    path = tmp_path / "old.pth"
    with path.open("wb") as file:
        for value in (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}):
            pickle.dump(value, file, protocol=2)
        Pickler(file, protocol=2).dump({name: Rebuilt(name) for name in parts})
        pickle.dump(["all"], file, protocol=2)
        file.write(numbers.numel().to_bytes(8, "little") + numbers.numpy().tobytes())
    checkpoint = read_checkpoint(path)
    assert torch.equal(checkpoint.weight.flatten(), numbers[5 : 5 + CLASSES * WIDTH])
    linear = repaired(checkpoint)
    write_repaired(checkpoint, linear, FEW, tmp_path / "new.pth")
    again = read_checkpoint(tmp_path / "new.pth")
    assert torch.equal(again.weight, linear.weight) and torch.equal(again.bias, linear.bias)


def test_the_archive_stays_sound(tmp_path: Path) -> None:
    torch.save(balanced(small()), tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    write_repaired(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "m.pth") as before, zipfile.ZipFile(tmp_path / "new.pth") as after:
        assert after.testzip() is None
        assert before.namelist() == after.namelist()
        different = [name for name in before.namelist() if before.read(name) != after.read(name)]
    assert len(different) == 2  # the storages of weight and bias


def test_names_of_devices_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file saved from a GPU still says so: nothing but the rows' bytes differs."""
    path = tmp_path / "m.pth"
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(small().state_dict(), path)
    checkpoint = read_checkpoint(path)
    write_repaired(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.pth")
    assert b"X\x06\x00\x00\x00cuda:0" in (tmp_path / "new.pth").read_bytes()


@pytest.mark.parametrize("new_form", [True, False])
def test_options_of_a_training_script(tmp_path: Path, new_form: bool) -> None:
    """Beside the rows they stay as they are; where the file would have to be written anew, nothing is written."""
    path = tmp_path / "m.pth"
    options = argparse.Namespace(lr=0.1)
    torch.save({"args": options, "model": small().state_dict()}, path, _use_new_zipfile_serialization=new_form)
    checkpoint = read_checkpoint(path)
    if new_form:
        write_repaired(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.pth")
        assert torch.load(tmp_path / "new.pth", weights_only=False)["args"] == options
    else:
        with pytest.raises(ValueError, match=r"before torch 1\.6: it cannot be written anew"):
            write_repaired(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.pth")
        assert [entry.name for entry in tmp_path.iterdir()] == ["m.pth"]


def test_a_second_name_of_the_classifier_changes_with_it(tmp_path: Path) -> None:
    model = small()
    state = model.state_dict()
    state["alias.weight"] = state["fc.weight"]
    torch.save(state, tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth", classifier="fc")
    linear = repaired(checkpoint)
    write_repaired(checkpoint, linear, FEW, tmp_path / "new.pth")
    after = torch.load(tmp_path / "new.pth", weights_only=True)
    assert torch.equal(after["alias.weight"], linear.weight)


@pytest.mark.parametrize("new_form", [True, False])
def test_memory_that_others_share_is_not_written(tmp_path: Path, new_form: bool) -> None:
    weight = torch.randn(CLASSES, WIDTH)
    state = {"fc.weight": weight, "other.part": weight[4], "far.part": weight[6]}
    torch.save(state, tmp_path / "m.pth", _use_new_zipfile_serialization=new_form)
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"other.part of .* shares memory with fc.weight"):
        write_repaired(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.pth")
    write_repaired(checkpoint, repaired(checkpoint, [1]), [1], tmp_path / "new.pth")  # rows of nobody else
    torch.save({"fc.weight": weight, "fc.bias": torch.ones(1).expand(CLASSES)}, tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"fc.bias of .* stores one number for several rows"):
        write_repaired(checkpoint, repaired(checkpoint), FEW, tmp_path / "new2.pth")


def test_a_classifier_of_another_checkpoint(tmp_path: Path) -> None:
    torch.save({"state_dict": small().state_dict(), "classes": list("abcdefg")}, tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    linear = repaired(checkpoint)
    with torch.no_grad():
        linear.weight[5, 2] += 0.25
        linear.bias[6] += 0.125
    with pytest.raises(ValueError, match=r"was not made from this checkpoint, .*: 2 of its 5 rows .* class 5 \(f\) by 0.25"):
        write_repaired(checkpoint, linear, FEW, tmp_path / "new.pth")
    for other, message in (
        (
            nn.Linear(WIDTH, CLASSES + 1),
            rf"linear must have the shape .* \[{CLASSES}, {WIDTH}\], got \[{CLASSES + 1}, {WIDTH}\]",
        ),
        (nn.Linear(WIDTH, CLASSES, bias=False), r"the checkpoint has a bias and linear has none"),
    ):
        with pytest.raises(ValueError, match=message):
            write_repaired(checkpoint, other, FEW, tmp_path / "new.pth")
    linear = repaired(checkpoint)
    for few, error, message in (
        ([], ValueError, "few_classes is empty"),
        ([7], ValueError, "in 0..6"),
        ([0.5], TypeError, "integers"),
    ):
        with pytest.raises(error, match=message):
            write_repaired(checkpoint, linear, few, tmp_path / "new.pth")
    with pytest.raises(TypeError, match=r"checkpoint must be a Checkpoint"):
        write_repaired(tmp_path / "m.pth", linear, FEW, tmp_path / "new.pth")  # type: ignore[arg-type]
    assert not (tmp_path / "new.pth").exists()
    # A classifier that went through half precision on its way is still that of the checkpoint.
    half = repaired(checkpoint).half()
    write_repaired(checkpoint, half, FEW, tmp_path / "new.pth")
    assert torch.equal(read_checkpoint(tmp_path / "new.pth").weight[5], checkpoint.weight[5])


def test_rows_beyond_the_files_dtype(tmp_path: Path) -> None:
    torch.save(small().half().state_dict(), tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    linear = repaired(checkpoint)
    with torch.no_grad():
        linear.weight[4, 0] = 1e6
    with pytest.raises(ValueError, match=r"the row of class 4 cannot be stored as torch.float16 in fc.weight .* up to 1e\+06"):
        write_repaired(checkpoint, linear, FEW, tmp_path / "new.pth")
    assert not (tmp_path / "new.pth").exists()


def test_files_that_are_there_stay(tmp_path: Path) -> None:
    path, other = tmp_path / "m.pth", tmp_path / "other.pth"
    torch.save(small().state_dict(), path)
    other.write_bytes(b"precious")
    checkpoint, before = read_checkpoint(path), path.read_bytes()
    linear = repaired(checkpoint)
    for target in (path, other):
        with pytest.raises(ValueError, match=r"exists already"):
            write_repaired(checkpoint, linear, FEW, target)
    assert path.read_bytes() == before and other.read_bytes() == b"precious"
    write_repaired(checkpoint, linear, FEW, other, overwrite=True)
    write_repaired(checkpoint, linear, FEW, path, overwrite=True)
    assert path.read_bytes() == other.read_bytes() != before
    with pytest.raises(ValueError, match=r"has changed since it was read: fc.weight"):
        write_repaired(checkpoint, linear, FEW, tmp_path / "third.pth")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.pth", "other.pth"]


def test_a_file_that_is_another_by_now(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    torch.save(balanced(small(), scales=torch.ones(CLASSES)), path)
    checkpoint = read_checkpoint(path)
    for scaled, message in (([0], "other rows than the few are not as they were"), (FEW, "does not survive being stored")):
        scales = torch.ones(CLASSES)
        scales[scaled] = 2
        torch.save(balanced(small(), scales=scales), path)
        with pytest.raises(ValueError, match=message):
            write_repaired(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.pth")
    more = balanced(small(), scales=torch.ones(CLASSES))
    more["state_dict_best"]["feat_model"]["module.more"] = torch.ones(1)
    torch.save(more, path)
    with pytest.raises(ValueError, match=r"has changed since it was read: it is another checkpoint now"):
        write_repaired(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.pth")
    torch.save({"something": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"has changed since it was read"):
        write_repaired(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.pth")
    path.unlink()
    with pytest.raises(FileNotFoundError):
        write_repaired(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.pth")
    assert list(tmp_path.iterdir()) == []


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "failing", ["alphaext.utils.files.os.replace", "alphaext.checkpoints.row_edits.shutil.copyfileobj", "os.fsync"]
)
def test_a_full_disk_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    path, target = tmp_path / "m.pth", tmp_path / "new.pth"
    torch.save(small().state_dict(), path)
    target.write_bytes(b"older")
    checkpoint, before = read_checkpoint(path), path.read_bytes()
    linear = repaired(checkpoint)
    monkeypatch.setattr(failing, full)
    with pytest.raises(OSError, match=r"No space left"):
        write_repaired(checkpoint, linear, FEW, target, overwrite=True)
    if "shutil" not in failing:
        with pytest.raises(OSError, match=r"No space left"):
            save_linear(linear, target, overwrite=True)
    monkeypatch.undo()
    assert target.read_bytes() == b"older" and path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.pth", "new.pth"]


@pytest.mark.parametrize("place", ["rows", "elsewhere", "shorter"])
def test_a_disk_that_lies_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    torch.save(small().state_dict(), tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    linear, copy_with = repaired(checkpoint), checkpoint_writer.copy_with

    def lying(path: Path, file: Any, changes: Any) -> None:
        copy_with(path, file, changes)
        at = changes[0].start if place == "rows" else 200
        with open(file.name, "r+b") as again:
            again.seek(at)
            byte = again.read(1)
            again.seek(at)
            again.write(bytes([byte[0] ^ 1]))
            if place == "shorter":
                again.truncate(500)

    monkeypatch.setattr(checkpoint_writer, "copy_with", lying)
    with pytest.raises(OSError, match=r"the disk is at fault|not written whole"):
        write_repaired(checkpoint, linear, FEW, tmp_path / "new.pth")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.pth"]


def test_compressed_archives_are_read_but_not_written(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(small().state_dict(), buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(tmp_path / "m.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"is compressed; load it and save it again with torch.save"):
        write_repaired(checkpoint, repaired(checkpoint), FEW, tmp_path / "new.pth")


def test_a_repacked_archive_is_written(tmp_path: Path) -> None:
    """As a zip tool packs it: checksums in the headers, not behind the records."""
    buffer = io.BytesIO()
    torch.save(small().state_dict(), buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    linear = repaired(checkpoint)
    write_repaired(checkpoint, linear, FEW, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as archive:
        assert archive.testzip() is None
    assert torch.equal(read_checkpoint(tmp_path / "new.pth").weight, linear.weight)


def test_the_outline_runs_nothing(tmp_path: Path) -> None:
    """Tensors are read without resolving a name, even of a file that torch would refuse."""
    trace = tmp_path / "trace"
    torch.save({"a": torch.ones(2), "x": Touch(trace), "y": Evaluate(trace), "z": Thing()}, tmp_path / "m.pth")
    assert checkpoint_files.read_payload(tmp_path / "m.pth").content["a"].shape == (2,)
    assert not trace.exists()


def test_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "m.pth")
    before = torch.random.get_rng_state()
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    write_repaired(checkpoint, checkpoint.linear(), FEW, tmp_path / "new.pth")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_default_device_does_not_matter(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "m.pth")
    with torch.device("meta"):
        checkpoint = read_checkpoint(tmp_path / "m.pth")
        write_repaired(checkpoint, checkpoint.linear(), torch.tensor(FEW, device="cpu"), tmp_path / "new.pth")
        save_linear(checkpoint.linear(), tmp_path / "linear.pth")
    assert read_checkpoint(tmp_path / "linear.pth").weight.device.type == "cpu"


_CALLBACK = "StochasticWeightAveraging{'dirpath': '/data/run'}"  # as Lightning names them: with what they were made with


def _prefixed(tensors, prefix):
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("make", "average"),
    [
        (lambda own, other: {"state_dict": own, "current_model_state": other, "averaging_state": {}}, "current_model_state"),
        (
            lambda own, other: {"state_dict": own, "callbacks": {"EMACallback": {"ema_state_dict": other, "decay": 0.9}}},
            "callbacks/EMACallback/ema_state_dict",
        ),
        (
            lambda own, other: {"state_dict": own, "callbacks": {_CALLBACK: {"average_model_state": other}, "other": [1]}},
            f"callbacks/{_CALLBACK}/average_model_state",
        ),
        (lambda own, other: {"state_dict": {**own, **_prefixed(other, "model_ema.module.")}}, "state_dict/model_ema"),
        (lambda own, other: {"state_dict": {**own, **_prefixed(other, "swa_model.module.")}}, "state_dict/swa_model"),
        (lambda own, other: {"state_dict": {**own, **_prefixed(other, "averaged._orig_mod.")}}, "state_dict/averaged"),
    ],
    ids=["lightning's averaging", "callback", "callback with slashes", "ema beside", "swa beside", "averaged beside"],
)
def test_averages_beside_the_weights_are_told_read_and_repaired(tmp_path, make, average):
    own = {"conv.weight": torch.randn(8, 3, 1, 1), "fc.weight": torch.randn(5, 8), "fc.bias": torch.randn(5)}
    other = {name: tensor + 1 for name, tensor in own.items()}
    path, repaired = tmp_path / "epoch.ckpt", tmp_path / "repaired.ckpt"
    torch.save({"pytorch-lightning_version": "2.6.0", **make(own, other)}, path)
    with pytest.warns(UserWarning, match=rf"state_dict is read; {re.escape(average)} in the same file is neither read nor"):
        checkpoint = read_checkpoint(path)
    assert torch.equal(checkpoint.weight, own["fc.weight"]) and checkpoint.states == ("state_dict", average)
    checkpoint = read_checkpoint(path, state=average)
    assert torch.equal(checkpoint.weight, other["fc.weight"]) and checkpoint.states[0] == average
    linear = checkpoint.linear()
    linear.weight.data[3] = 7
    write_repaired(checkpoint, linear, [3], repaired)
    assert torch.equal(read_checkpoint(repaired, state=average).weight, linear.weight)
    with pytest.warns(UserWarning, match="neither read nor"):
        assert torch.equal(read_checkpoint(repaired).weight, own["fc.weight"])


def test_averages_without_names_are_told(tmp_path):
    own = {"conv.weight": torch.randn(8, 3, 1, 1), "fc.weight": torch.randn(5, 8)}
    torch.save({"state_dict": own, "callbacks": {"EMA": {"ema_weights": [*own.values()], "step": 3}}}, tmp_path / "m.ckpt")
    with pytest.warns(UserWarning, match=r"callbacks/EMA/ema_weights \(2 tensors\) has no names of layers, and is neither"):
        read_checkpoint(tmp_path / "m.ckpt")


def test_layers_that_are_called_as_averages_are_no_averages(tmp_path):
    own = {"ema_block.norm.weight": torch.randn(8), "conv.weight": torch.randn(8, 3, 1, 1), "fc.weight": torch.randn(5, 8)}
    torch.save({**own, "n_averaged": torch.tensor(3)}, tmp_path / "m.pth")
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    assert checkpoint.states == () and "ema_block.norm.weight" in checkpoint._layout.backbone


@pytest.mark.parametrize("prefix", ["_orig_mod.module.", "module._orig_mod.", "module.module.", "model._orig_mod."])
def test_prefixes_of_wrappers_in_any_order(tmp_path, prefix):
    own = {"conv.weight": torch.randn(8, 3, 1, 1), "fc.weight": torch.randn(5, 8)}
    within = {name.replace(".", "._orig_mod."): tensor for name, tensor in own.items()}
    for tensors in (_prefixed(own, prefix), within):
        torch.save(tensors, tmp_path / "m.pth")
        checkpoint = read_checkpoint(tmp_path / "m.pth")
        assert checkpoint.classifier == "fc" and torch.equal(checkpoint.weight, own["fc.weight"])
