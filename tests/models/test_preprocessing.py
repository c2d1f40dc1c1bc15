"""How a model wants its images: by its library, or by what lies beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from alphaext.checkpoints import read_checkpoint
from alphaext.data import make_transform, test_transform
from alphaext.models import Preprocessing, find_preprocessing, make_model, split_model

PROCESSOR = {
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.2, 0.2],
    "resample": 3,
    "size": {"height": 48, "width": 48},
}


def test_timm_says_it_of_each_model() -> None:
    timm = pytest.importorskip("timm")
    found = find_preprocessing("timm:vit_tiny_patch16_224")
    wanted = timm.data.resolve_model_data_config(timm.create_model("vit_tiny_patch16_224"))
    assert found is not None and (found.mean, found.std) == (wanted["mean"], wanted["std"])
    assert (found.image_size, found.interpolation) == (224, "bicubic")
    assert found.resize_ratio == pytest.approx(1 / wanted["crop_pct"])


def test_torchvision_says_it_of_its_own_weights_alone() -> None:
    pytest.importorskip("torchvision")
    found = find_preprocessing("resnet50", pretrained=True)
    assert found is not None and (found.image_size, found.resize_ratio) == (224, 232 / 224)
    assert find_preprocessing("resnet50") is None and find_preprocessing("small", pretrained=True) is None
    assert find_preprocessing(None) is None


@pytest.mark.parametrize("within", [True, False])
def test_an_image_processor(tmp_path: Path, within: bool) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].config = SimpleNamespace(_name_or_path=str(tmp_path))
    found = find_preprocessing("mine:make", model if within else None, checkpoint=None if within else tmp_path / "m.pth")
    source = str(tmp_path / "preprocessor_config.json")
    assert found == Preprocessing(source, 48, 1.0, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), "bicubic", squash=True)
    crop = {**PROCESSOR, "size": {"shortest_edge": 60}, "do_center_crop": True, "crop_size": {"height": 48, "width": 48}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**crop, "do_normalize": False}))
    found = find_preprocessing(None, checkpoint=tmp_path / "m.pth")
    assert found == Preprocessing(source, 48, 1.25, (0.0,), (1.0,), "bicubic", squash=False)
    for broken in ("[1]", "{", json.dumps({"size": [1, 2]}), json.dumps({"image_mean": 3})):
        (tmp_path / "preprocessor_config.json").write_text(broken)
        with pytest.raises(ValueError, match=r"preprocessor_config.json is not an image processor"):
            find_preprocessing(None, checkpoint=tmp_path / "m.pth")


def test_interpolation_and_squashing_are_of_the_transform() -> None:
    image = pytest.importorskip("PIL.Image").effect_noise((40, 20), 50)
    usual = test_transform(16, 18)
    bicubic, squashed = test_transform(16, 18, interpolation="bicubic"), test_transform(16, 16, squash=True)
    assert set(bicubic.description) - set(usual.description) == {"interpolation"}
    assert squashed(image).shape == usual(image).shape == (3, 16, 16)
    results = [usual(image), bicubic(image), squashed(image)]
    assert not any(torch.equal(one, other) for one, other in zip(results, results[1:] + results[:1], strict=True))
    for transform in (usual, bicubic, squashed):
        assert make_transform(transform.description) == transform
    with pytest.raises(ValueError, match="interpolation must be"):
        test_transform(16, 18, interpolation="cubic")


def test_what_no_state_dict_says(tmp_path: Path) -> None:
    """GoogLeNet and Inception of torchvision's weights change their input."""
    pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = make_model("googlenet", 3, options={"aux_logits": False})
    model = model.to_empty(device="cpu")
    torch.save(model.state_dict(), tmp_path / "googlenet-1.pth")
    read_checkpoint(tmp_path / "googlenet-1.pth").load_into(model, "fc")
    assert model.transform_input
    model.transform_input = False
    plain = split_model(model, "fc").fingerprint()
    torch.save(model.state_dict(), tmp_path / "m.pth")
    with pytest.warns(UserWarning, match="does not say whether the model changes its input"):
        read_checkpoint(tmp_path / "m.pth").load_into(model, "fc")
    assert not model.transform_input
    model.transform_input = True
    assert split_model(model, "fc").fingerprint() != plain


def test_options_of_the_librarys_own_function() -> None:
    pytest.importorskip("timm")
    model = make_model("timm:vit_tiny_patch16_224", 3, options={"img_size": 32, "global_pool": "avg"})
    assert model.pos_embed.shape[1] <= 1 + (32 // 16) ** 2
    with pytest.raises(TypeError, match="nonsense"):
        make_model("resnet18", 3, options={"nonsense": 1})
