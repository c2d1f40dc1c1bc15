"""From image files and lists to a repaired checkpoint, through the commands."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchvision", exc_type=ImportError)

import torchvision
from digit_images import TRAIN_COUNTS, write_digits
from PIL import Image

from alphaext import AlphaNet
from alphaext.__main__ import main as process_main
from alphaext.checkpoints import read_checkpoint, save_linear
from alphaext.commands import COMMANDS, Doctor, Evaluate, Export, Extract, Fit, Train
from alphaext.commands import main as cli
from alphaext.commands.options import read_config
from alphaext.commands.results import read_classifier
from alphaext.features.extraction_folder import ExtractionFolder
from alphaext.features.store import read_parts
from alphaext.study import choose
from alphaext.training import many as sweep

CONFIG = """
features = "features"
device = "cpu"
progress = false
[data]
train = "train.txt"
val = "val.txt"
test = "test.txt"
root = "."
few_below = 12
many_above = 60
[model]
backbone = "resnet18"
transform = "small"
image_size = 32
checkpoint = "joint/model.pth"
[train]
output = "joint"
epochs = 6
batch_size = 32
lr = 0.05
workers = 0
[extract]
batch_size = 50
[baseline]
batch_size = 32
images_per_class = 1
[fit]
top_k = 3
epochs = 10
"""

FEW = [digit for digit, count in enumerate(TRAIN_COUNTS) if count < 12]


def read_result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def run(folder: Path, *arguments: object, code: int = 0) -> str:
    """Run a command with the configuration of ``folder``; what it says must end with this exit code."""
    name, *rest = map(str, arguments)
    assert cli.main([name, *rest, "--config", str(folder / "alphaext.toml")]) == code
    return name


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A folder with image files, lists, a configuration, a trained network and its features."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    (folder / "alphaext.toml").write_text(CONFIG)
    checkpoint = "[model]\nbackbone = 'resnet18'\ntransform = 'small'\nimage_size = 32\n"
    (folder / "train.toml").write_text(CONFIG.split("[model]")[0] + checkpoint + "[train]" + CONFIG.split("[train]")[1])
    assert cli.main(["train", "--config", str(folder / "train.toml")]) == 0
    run(folder, "extract")
    return folder


def test_a_checkpoint_is_repaired_from_end_to_end(digits, capsys):
    for name, *options in (
        ["ncm"],
        ["tau", "--classifier", digits / "joint"],
        ["crt"],
        ["lws", "--classifier", digits / "joint"],
        ["logit-adjustment", "--classifier", digits / "joint"],
        ["few-bias", "--classifier", digits / "joint"],
        ["discriminant"],
        ["average", "--classifier", digits / "joint", "--other", digits / "discriminant"],
    ):
        run(digits, "baseline", name, *options, "--output", digits / name)
    run(digits, "fit", "--classifier", digits / "crt", "--gamma", "0.7", "1", "--output", digits / "alpha-crt")
    run(digits, "fit", "--classifier", digits / "joint", "--output", digits / "alpha-joint")
    capsys.readouterr()
    everything = [digits / name for name in ("joint", "ncm", "tau", "crt", "lws", "few-bias", "alpha-crt", "alpha-joint")]
    run(digits, "evaluate", *everything, "--json", "--output", digits / "evaluation")
    result = json.loads(capsys.readouterr().out)
    assert list(result["metrics"]) == [path.name for path in everything] and result["samples"] == 200
    assert result["classes"] == {"few": 3, "medium": 4, "many": 3, "empty": 0}
    # Twice chance already says that the images, labels and weights of all these steps belong together.
    assert all(metrics["all"] > 0.2 for metrics in result["metrics"].values())
    table = (digits / "evaluation" / "alpha-crt.csv").read_text().splitlines()
    assert len(table) == 11 and "neighbor_1_alpha" in table[0]

    run(digits, "export", "--repaired", digits / "alpha-joint", "--output", digits / "repaired.pth")
    before = torch.load(digits / "joint" / "model.pth", weights_only=True)
    after = torch.load(digits / "repaired.pth", weights_only=True)
    assert list(before) == list(after)
    base = [digit for digit in range(10) if digit not in FEW]
    for name in before:
        rows = base if name.startswith("fc.") else slice(None)
        assert torch.equal(
            before[name][rows] if name.startswith("fc.") else before[name],
            after[name][rows] if name.startswith("fc.") else after[name],
        )
    model = torchvision.models.resnet18(num_classes=10)
    model.load_state_dict(after)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        logits = model.eval()(images)
        model.load_state_dict(before)
        assert torch.equal(logits[:, base], model(images)[:, base])


def test_what_a_run_was_is_kept_beside_its_result(digits):
    kept = json.loads((digits / "features" / "run.json").read_text())
    assert kept["command"] == "extract" and kept["options"]["batch_size"] == 50
    assert kept["options"]["checkpoint"] == str(digits / "joint" / "model.pth") and kept["versions"]["torch"]
    # All options that there are, whether given or not.
    assert set(kept["options"]) == set(Extract(features="f").to_dict())


def test_two_processes_extract_what_one_does(digits, tmp_path):
    arguments = ["--nproc-per-node", "2", "-m", "alphaext", "extract", "--config", str(digits / "alphaext.toml")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments, "--features", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    # Started where no source tree hides an installed package.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Cached features") == 1
    for part in ("train", "val", "test"):
        one, two = (np.load(folder / part / "features.npy") for folder in (digits / "features", tmp_path))
        assert one.shape[1] == 512 and np.array_equal(one, two)


def test_python_says_the_same_as_the_command_line(digits, tmp_path, capsys):
    options = {"features": digits / "features", "few_below": 12, "many_above": 60, "top_k": 3, "epochs": 10, "progress": False}
    result = Fit(**options, classifier=digits / "joint", output=tmp_path / "python").run()
    run(digits, "fit", "--classifier", digits / "joint", "--output", tmp_path / "line", "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed["alphas"] == result["alphas"] and printed["after"] == result["after"]
    one, two = (torch.load(tmp_path / name / "classifier.pth", weights_only=True) for name in ("python", "line"))
    assert torch.equal(one["weight"], two["weight"])
    # Results that are there stay.
    run(digits, "fit", "--classifier", digits / "joint", "--output", tmp_path / "line", code=2)
    assert "output holds results already" in capsys.readouterr().err
    run(digits, "fit", "--classifier", digits / "joint", "--output", tmp_path / "line", "--overwrite")


def test_presets_of_fit(digits, tmp_path):
    common = ["--classifier", digits / "joint", "--epochs", "2"]
    run(digits, "fit", *common, "--output", tmp_path / "few")
    few = read_result(tmp_path / "few")
    assert few["preset"] == "few" and few["options"]["coefficients"] == "direct" and few["options"]["epochs"] == 2
    assert few["top_k"] == 3 and few["selection"] == "last"  # there are three base classes
    state = torch.load(tmp_path / "few" / "head.pt", weights_only=True)
    head = AlphaNet.from_state_dict(state)
    assert head.few_bias == few["few_bias"] and head.num_directions == 9 + 1
    classifier = torch.load(tmp_path / "few" / "classifier.pth", weights_only=True)
    assert torch.equal(classifier["weight"], head.fold().weight) and torch.equal(classifier["bias"], head.fold().bias)
    run(digits, "fit", *common, "--preset", "paper", "--output", tmp_path / "paper")
    paper = read_result(tmp_path / "paper")
    assert (paper["gamma"], paper["options"]["init"], paper["options"]["projected_gradient"]) == (0.7, "default", False)
    run(digits, "fit", *common, "--preset", "paper", "--init", "identity", "--output", tmp_path / "other")
    assert read_result(tmp_path / "other")["options"]["init"] == "identity"


def test_a_constant_needs_a_bias_in_the_file(digits, tmp_path, capsys):
    torch.save({"weight": read_checkpoint(digits / "joint" / "model.pth").weight}, tmp_path / "plain.pth")
    common = ["fit", "--classifier", tmp_path / "plain.pth", "--epochs", "1"]
    run(digits, *common, "--output", tmp_path / "out")
    assert "no constant is added" in capsys.readouterr().out
    made = torch.load(tmp_path / "out" / "classifier.pth", weights_only=True)
    assert set(made) == {"weight"} and read_result(tmp_path / "out")["few_bias"] == 0
    run(digits, *common, "--few-bias", "--augment", "none", "--samples-per-class", "0", "--output", tmp_path / "biased")
    assert "bias" in torch.load(tmp_path / "biased" / "classifier.pth", weights_only=True)
    options = read_result(tmp_path / "biased")["options"]
    assert options["augment"] is None and options["samples_per_class"] is None


@pytest.mark.parametrize(("policy", "max_drop"), [("best_all", None), ("best_few", 1.0), ("knee", None)])
def test_policies_of_fit(digits, tmp_path, policy, max_drop):
    arguments = ["--preset", "paper", "--init", "identity", "--projected-gradient", "--epochs", "2"]
    arguments += ["--gamma", "0.3", "0.7", "1", "--top-k", "2", "5", "--rule", "clamp", "l1"]
    drop = [] if max_drop is None else ["--max-drop", str(max_drop)]
    run(digits, "fit", "--classifier", digits / "joint", *arguments, "--policy", policy, *drop, "--output", tmp_path / "out")
    result = read_result(tmp_path / "out")
    assert len(result["candidates"]) == 12 and result["policy"] == policy
    rows = [{**each, "val_few": each["after"]["few"], "val_all": each["after"]["all"]} for each in result["candidates"]]
    rows.sort(key=lambda row: -row["gamma"])
    found = choose(rows, policy, max_drop, original={"val_all": result["before"]["all"]})
    assert all(result[name] == found[name] for name in ("gamma", "top_k", "rule"))
    if policy == "best_few":
        assert result["after"]["all"] >= result["before"]["all"] - 0.01 - 1e-9
        assert result["selection"].startswith("best_few with all >= ")


def test_policies_that_cannot_be_followed(digits, tmp_path, capsys):
    common = ["fit", "--classifier", digits / "joint", "--output", tmp_path / "out"]
    for options, message in (
        (["--policy", "knee", "--select", "last"], "policy says how epochs are chosen too"),
        (["--policy", "knee", "--max-drop", "1"], "max_drop goes with policy 'best_few'"),
        (["--max-drop", "-1", "--policy", "best_few"], "max_drop"),
    ):
        run(digits, *common, *options, code=2)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_an_interrupted_fit_goes_on(digits, tmp_path, monkeypatch, capsys):
    arguments = ["fit", "--classifier", digits / "joint", "--gamma", "0.5", "0.9", "--epochs", "400"]
    run(digits, *arguments, "--output", tmp_path / "whole")
    epochs = itertools.count(1)  # whose next number two threads cannot both get
    original = sweep.Run.end_epoch

    def interrupted(self, *rest):
        number = next(epochs)
        original(self, *rest)
        if number == 500:
            raise KeyboardInterrupt

    # Every epoch is kept, so that there is something to go on from.
    monkeypatch.setattr("alphaext.training.single._SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(sweep.Run, "end_epoch", interrupted)
    run(digits, *arguments, "--output", tmp_path / "parts", code=130)
    assert not (tmp_path / "parts" / "result.json").exists() and list((tmp_path / "parts" / ".alphaext-fit").iterdir())
    monkeypatch.setattr(sweep.Run, "end_epoch", original)
    run(digits, *arguments, "--output", tmp_path / "parts")
    whole, parts = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "parts"))
    assert whole["alphas"] == parts["alphas"] and whole["history"] == parts["history"]
    assert not (tmp_path / "parts" / ".alphaext-fit").exists()


def test_doctor_finds_nothing_wrong_and_what_is_wrong(digits, tmp_path, capsys):
    run(digits, "doctor", "data", "--features", digits / "features", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["split_sizes"] == {"few": 3, "medium": 4, "many": 3, "none": 0}
    assert report["images_read"] == sum(TRAIN_COUNTS) + 80 + 200

    lines = (digits / "train.txt").read_text().splitlines()
    (tmp_path / "train.txt").write_text("\n".join([*lines, "train/9/none.png 9", "train/8/neither.png 8"]))
    run(digits, "doctor", "data", "--train", tmp_path / "train.txt", "--json", code=2)
    report = json.loads(capsys.readouterr().out)
    named = " ".join(item for finding in report["problems"] for item in finding["items"])
    assert "train/9/none.png" in named and "train/8/neither.png" in named


def test_doctor_install(capsys):
    assert cli.main(["doctor", "install", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torchvision"] == torchvision.__version__.split("+")[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train/1/0001.png", "line 379"),
        ("../secret.png 1", "../secret.png"),
        ("/etc/hostname 1", "/etc/hostname"),
        ("train/1/0001.png one", "one"),
        ("train/1/0001.png 10", "10"),
    ],
)
def test_a_list_with_a_bad_line_stops_before_any_work(digits, tmp_path, capsys, line, message):
    (tmp_path / "train.txt").write_text((digits / "train.txt").read_text() + line + "\n")
    run(digits, "extract", "--train", tmp_path / "train.txt", "--features", tmp_path / "features", code=2)
    said = capsys.readouterr().err
    assert message in said.replace("\n", " ") and said.startswith("alphaext: train: ")
    assert not (tmp_path / "features").exists()


def test_a_truncated_image_is_named_or_skipped_on_request(digits, tmp_path, capsys):
    names = [line.split()[0] for line in (digits / "val.txt").read_text().splitlines()]
    (tmp_path / "val").mkdir()
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(digits / name, tmp_path / name)
    shutil.copy(digits / "val.txt", tmp_path / "val.txt")
    content = (tmp_path / names[5]).read_bytes()
    (tmp_path / names[5]).write_bytes(content[: len(content) // 2])
    only_val = ["--val", tmp_path / "val.txt", "--root", tmp_path, "--features", tmp_path / "features"]
    options = Extract(
        **{
            "features": tmp_path / "features",
            "val": tmp_path / "val.txt",
            "root": tmp_path,
            "device": "cpu",
            "progress": False,
        },
        **{"backbone": "resnet18", "transform": "small", "image_size": 32, "checkpoint": digits / "joint" / "model.pth"},
    )
    with pytest.raises(ValueError, match=names[5]):
        options.run()
    assert not (tmp_path / "features" / "val" / "features.json").exists()
    with pytest.raises(ValueError, match="80 images"):
        read_parts(tmp_path / "features", "val")
    run(digits, "extract", *only_val, "--train", digits / "train.txt", "--skip-unreadable", code=2)  # the root is another's
    capsys.readouterr()
    with pytest.warns(UserWarning, match="1 "):
        from dataclasses import replace

        result = replace(options, skip_unreadable=True).run()
    assert result["val"]["samples"] == 79 and result["val"]["skipped"] == [names[5]]


def write_checkpoint(path: Path, model: nn.Module, **more: object) -> None:
    """As classifier-balancing does: the backbone and the classifier apart, each with ``module.`` before its names."""
    state = model.state_dict()
    parts: dict[str, OrderedDict[str, torch.Tensor]] = {"feat_model": OrderedDict(), "classifier": OrderedDict()}
    for name, tensor in state.items():
        parts["classifier" if name.startswith("fc.") else "feat_model"][f"module.{name}"] = tensor
    torch.save({"state_dict_best": parts, "epoch": 90, "best_epoch": 89, "best_acc": 0.5, "centroids": None, **more}, path)


@pytest.mark.filterwarnings("ignore:.*class order of checkpoint and lists differ")  # a random network knows no class
@pytest.mark.parametrize("backbone", ["resnext50_32x4d", "resnet152"])
def test_the_papers_backbones_go_the_whole_way(tmp_path, backbone, capsys):
    """On a handful of images and with random weights: what is tested is that everything fits together."""
    generator = np.random.default_rng(0)
    counts, lines = (25, 24, 23, 3), []
    for label, count in enumerate(counts):
        for number in range(count):
            name = f"{label}-{number}.png"
            Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / name)
            lines.append(f"{name} {label}\n")
    (tmp_path / "train.txt").write_text("".join(lines))
    (tmp_path / "test.txt").write_text("".join(lines[::8]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Residual branches start at zero, or the features of 50 random blocks would be too large for float16.
        model = torchvision.models.get_model(backbone, num_classes=4, zero_init_residual=True)
    write_checkpoint(tmp_path / "trained.pth", model)
    common = {
        "backbone": backbone,
        "checkpoint": tmp_path / "trained.pth",
        "image_size": 32,
        "device": "cpu",
        "progress": False,
        "allow_chance": True,
    }
    data = {"train": tmp_path / "train.txt", "test": tmp_path / "test.txt", "root": tmp_path}
    found = Extract(**common, **data, features=tmp_path / "features").run()
    assert found["train"]["samples"] == 75 and found["train"]["width"] == 2048
    shared = {"features": tmp_path / "features", "progress": False, "allow_chance": True}
    fitted = Fit(**shared, classifier=tmp_path / "trained.pth", output=tmp_path / "alpha", top_k=2, epochs=2, lr=1e-3).run()
    assert fitted["few_classes"] == [3] and fitted["chosen_on"] is None
    Evaluate(**shared, classifiers=(tmp_path / "trained.pth", tmp_path / "alpha")).run()
    report = Export(**common, repaired=tmp_path / "alpha", output=tmp_path / "repaired.pth").run()
    assert report["changed_classes"] == [3] and report["batch"] == "images"
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("trained.pth", "repaired.pth"))
    assert list(before) == list(after) and after["epoch"] == 90
    for name, tensor in before["state_dict_best"]["feat_model"].items():
        assert torch.equal(tensor, after["state_dict_best"]["feat_model"][name])
    assert not torch.equal(*(state["state_dict_best"]["classifier"]["module.fc.weight"][3] for state in (before, after)))


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(digits, tmp_path, capsys):
    torch.save({"state_dict": {"fc.weight": torch.ones(10, 512)}, "more": Payload(tmp_path / "ran")}, tmp_path / "evil.pth")
    run(digits, "extract", "--checkpoint", tmp_path / "evil.pth", "--features", tmp_path / "features", code=2)
    assert "not" in capsys.readouterr().err and not (tmp_path / "ran").exists() and not (tmp_path / "features").exists()


def test_a_checkpoint_of_another_number_of_classes_shows_both(digits, tmp_path, capsys):
    torch.save({"weight": torch.randn(7, 512), "bias": torch.zeros(7)}, tmp_path / "seven.pth")
    run(digits, "fit", "--classifier", tmp_path / "seven.pth", "--output", tmp_path / "alpha", code=2)
    said = capsys.readouterr().err
    assert "7" in said and "10" in said and not (tmp_path / "alpha").exists()


def test_labels_beyond_the_classifier(digits, tmp_path, capsys):
    model = torchvision.models.resnet18(num_classes=9)
    torch.save(model.state_dict(), tmp_path / "nine.pth")
    run(digits, "extract", "--checkpoint", tmp_path / "nine.pth", "--features", tmp_path / "features", code=2)
    assert "9" in capsys.readouterr().err and not (tmp_path / "features").exists()


def test_changed_models_lists_and_transforms_are_refused(digits, tmp_path, capsys):
    shutil.copytree(digits / "features" / "val", tmp_path / "features" / "val")
    before = (tmp_path / "features" / "val" / "features.npy").read_bytes()
    model = torchvision.models.resnet18(num_classes=10)
    torch.save(model.state_dict(), tmp_path / "other.pth")
    (tmp_path / "shorter.txt").write_text("".join((digits / "val.txt").read_text().splitlines(keepends=True)[1:]))
    base = {
        **{"features": tmp_path / "features", "val": digits / "val.txt", "root": digits, "device": "cpu", "progress": False},
        **{"backbone": "resnet18", "transform": "small", "image_size": 32, "batch_size": 50},
        "checkpoint": digits / "joint" / "model.pth",
    }
    for change, named in (
        ({"checkpoint": tmp_path / "other.pth"}, "model"),
        ({"val": tmp_path / "shorter.txt"}, "images"),
        ({"image_size": 40}, "transform"),
    ):
        with pytest.raises(ValueError, match=named):
            Extract(**(base | change)).run()
        assert (tmp_path / "features" / "val" / "features.npy").read_bytes() == before
    assert Extract(**base).run()["val"]["samples"] == 80  # what it was made of is taken as it is


def test_half_a_folder_of_features_is_not_taken_for_a_whole_one(digits, tmp_path, capsys):
    shutil.copytree(digits / "features", tmp_path / "features")
    (tmp_path / "features" / "train" / "features.json").unlink()
    arguments = ["fit", "--features", tmp_path / "features", "--classifier", digits / "joint", "--output", tmp_path / "alpha"]
    run(digits, *arguments, code=2)
    assert "train" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "features" / "train")
    run(digits, *arguments, code=2)
    assert "there are test, val" in capsys.readouterr().err.replace("\n", " ")


def test_a_backbone_of_ones_own(digits, tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n"
        "def make(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes))\n"
        "def plain(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, num_classes))\n"
        "def nothing(num_classes):\n"
        "    return None\n"
    )
    monkeypatch.chdir(tmp_path)
    options = {"train": digits / "train.txt", "root": digits, "transform": "small", "image_size": 8, "epochs": 1, "workers": 0}
    options |= {"output": tmp_path / "own", "progress": False, "device": "cpu", "batch_size": 32}
    assert Train(**options, backbone="my_models:plain").run()["epoch"] == 1
    assert "3.weight" in torch.load(tmp_path / "own" / "model.pth", weights_only=True)
    with pytest.raises(ValueError, match="'my_models:missing' cannot be imported"):
        Train(**options, backbone="my_models:missing").run()
    with pytest.raises(TypeError, match="must return a torch.nn.Module, got NoneType"):
        Train(**options, backbone="my_models:nothing").run()


def test_one_gamma_without_validation_features(digits, tmp_path):
    shutil.copytree(digits / "features" / "train", tmp_path / "features" / "train")
    options = {"features": tmp_path / "features", "classifier": digits / "joint", "few_below": 12, "many_above": 60, "top_k": 3}
    with pytest.raises(ValueError, match="no validation features to choose by, got 2"):
        Fit(**options, output=tmp_path / "alpha", gamma=(0.5, 1.0)).run()
    assert Fit(**options, output=tmp_path / "alpha", epochs=2, progress=False).run()["chosen_on"] is None


def test_every_key_of_the_documented_configuration_is_known(digits):
    config = read_config(digits / "alphaext.toml", COMMANDS.values())
    assert config["data"]["train"] == digits / "train.txt" and config["fit"]["top_k"] == (3,)
    assert Doctor(train="x").topic == "data"


def test_experts_that_want_normalised_features_are_not_taken_for_a_plain_classifier(digits, tmp_path, capsys):
    columns = {f"backbone.linears.{expert}.weight": torch.randn(256, 10) for expert in range(2)}
    torch.save({"state_dict": {"backbone.conv1.weight": torch.ones(2, 3, 1, 1), **columns}}, tmp_path / "ride.pth")
    run(digits, "fit", "--classifier", tmp_path / "ride.pth", "--output", tmp_path / "alpha", code=2)
    assert "2 experts' features at length 1" in capsys.readouterr().err


def digits_copy(digits: Path, tmp_path: Path, *names: str) -> None:
    for name in names:
        shutil.copytree(digits / name, tmp_path / name)


@pytest.fixture(scope="module")
def repaired(digits) -> Path:
    run(digits, "fit", "--classifier", digits / "joint", "--output", digits / "repaired-joint")
    return digits / "repaired-joint"


def test_nothing_of_the_users_own_is_removed_or_replaced(digits, tmp_path, capsys):
    own = tmp_path / "project"
    (own / "checkpoints").mkdir(parents=True)
    for name in ("checkpoints/best.pth", "checkpoint.pt", "mine.csv"):
        (own / name).write_text("mine")
    run(digits, "fit", "--classifier", digits / "joint", "--epochs", "1", "--output", own)
    run(digits, "baseline", "tau", "--tau", "0.5", "--classifier", digits / "joint", "--output", own, "--overwrite")
    for name in ("checkpoints/best.pth", "checkpoint.pt", "mine.csv"):
        assert (own / name).read_text() == "mine"
    # A classifier of the user's own, which is the input too.
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(own / "classifier.pth", other)
    before = (other / "classifier.pth").read_bytes()
    run(digits, "baseline", "tau", "--classifier", other / "classifier.pth", "--output", other, code=2)
    assert "there is classifier.pth in" in capsys.readouterr().err and (other / "classifier.pth").read_bytes() == before
    (other / "project.csv").write_text("mine")
    run(digits, "evaluate", digits / "joint", own, "--output", other, code=2)
    assert (other / "project.csv").read_text() == "mine"


def test_old_results_stay_until_there_are_new_ones(digits, repaired, tmp_path):
    digits_copy(digits, tmp_path, "repaired-joint")
    folder = tmp_path / "repaired-joint"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for options in (["--gamma", "2"], ["--lr", "1e30", "--init", "default"], ["--top-k", "99"]):
        assert cli.main(["fit", "--config", str(digits / "alphaext.toml"), "--classifier", str(digits / "joint"), *options,
                         "--output", str(folder), "--overwrite"]) in (1, 2)  # fmt: skip
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name in before} == before


def test_old_results_are_not_taken_for_new_ones(digits, repaired, tmp_path, capsys):
    digits_copy(digits, tmp_path, "repaired-joint")
    folder = tmp_path / "repaired-joint"
    run(digits, "baseline", "crt", "--epochs", "1", "--output", folder, "--overwrite")
    assert not (folder / "head.pt").exists()
    options = ["--epochs", "1", "--batch-size", "64", "--workers", "0"]
    assert cli.main(["train", "--config", str(digits / "train.toml"), *options, "--output", str(folder), "--overwrite"]) == 0
    assert not (folder / "classifier.pth").exists()
    trained = read_classifier(folder)
    assert torch.equal(trained.weight, torch.load(folder / "model.pth", weights_only=True)["fc.weight"])
    (folder / "result.json").unlink()
    with pytest.raises(FileNotFoundError, match="finished results"):
        read_classifier(folder)


def test_overwrite_starts_a_training_anew(digits, tmp_path):
    arguments = ["train", "--config", str(digits / "train.toml"), "--output", str(tmp_path / "t"), "--batch-size", "64"]
    assert cli.main([*arguments, "--epochs", "1"]) == 0
    assert cli.main([*arguments, "--epochs", "1", "--lr", "0.01"]) == 2
    assert cli.main([*arguments, "--epochs", "1", "--lr", "0.01", "--overwrite"]) == 0
    assert json.loads((tmp_path / "t" / "run.json").read_text())["options"]["lr"] == 0.01


def test_a_head_is_no_classifier(digits, repaired, capsys):
    run(digits, "evaluate", digits / "joint", repaired / "head.pt", code=2)
    assert "is the state of an Alpha Net" in capsys.readouterr().err


def test_features_that_do_not_belong_together_are_refused(digits, tmp_path, capsys):
    digits_copy(digits, tmp_path, "features")
    sidecar = tmp_path / "features" / "val" / "features.json"
    content = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(content | {"model": "another"}))
    arguments = ["--features", tmp_path / "features", "--classifier", digits / "joint", "--output", tmp_path / "alpha"]
    run(digits, "fit", *arguments, code=2)
    assert "do not belong together: the network" in capsys.readouterr().err.replace("\n", " ")
    run(digits, "baseline", "lws", *arguments, code=2)
    run(digits, "evaluate", digits / "joint", "--part", "val", "--features", tmp_path / "features", code=2)


def test_folders_of_classes_are_in_the_training_folders_order(digits, tmp_path, capsys):
    for part in ("train", "val"):
        shutil.copytree(digits / part, tmp_path / part)
    options = {
        **{"features": tmp_path / "features", "train": tmp_path / "train", "val": tmp_path / "val", "device": "cpu"},
        **{"backbone": "resnet18", "transform": "small", "image_size": 32, "checkpoint": digits / "joint" / "model.pth"},
    }
    (tmp_path / "val" / "3").rename(tmp_path / "val" / "z3")
    with pytest.raises(ValueError, match="z3"):
        Extract(**options).run()
    (tmp_path / "val" / "z3").rename(tmp_path / "val" / "3")
    assert Extract(**options, progress=False).run()["val"]["samples"] == 80


def test_an_extraction_keeps_what_earlier_ones_found(digits, repaired, tmp_path, capsys):
    digits_copy(digits, tmp_path, "features", "repaired-joint")
    run(digits, "extract", "--features", tmp_path / "features")
    before = (tmp_path / "features" / "run.json").stat().st_mtime_ns
    run(digits, "extract", "--features", tmp_path / "features")
    assert (tmp_path / "features" / "run.json").stat().st_mtime_ns == before
    run(digits, "extract", "--features", tmp_path / "repaired-joint", code=2)
    assert "holds the results of 'fit'" in capsys.readouterr().err
    file = tmp_path / "file"
    file.touch()
    run(digits, "extract", "--features", file, code=2)


def test_a_classifier_without_bias_goes_back_into_a_file_with_one(digits, tmp_path):
    shutil.copytree(digits / "joint", tmp_path / "joint")
    run(digits, "baseline", "tau", "--tau", "0.5", "--classifier", tmp_path / "joint", "--output", tmp_path / "tau")
    options = {"repaired": tmp_path / "tau", "output": tmp_path / "tau.pth", "overwrite": True}
    options |= {"backbone": "resnet18", "image_size": 32, "device": "cpu"}
    with pytest.warns(UserWarning, match="every row of the classifier changes"):
        Export(checkpoint=digits / "joint" / "model.pth", **options).run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of the very checkpoint that it was made from nothing is to be said
        Export(checkpoint=tmp_path / "joint" / "model.pth", **options).run()
    after = torch.load(tmp_path / "tau.pth", weights_only=True)
    assert torch.count_nonzero(after["fc.bias"]) == 0


def test_the_layer_that_was_named_is_the_classifier(digits, tmp_path, capsys):
    state = {
        "a.weight": torch.ones(10, 512),
        "a.bias": torch.zeros(10),
        "b.weight": torch.zeros(10, 512),
        "b.bias": torch.ones(10),
    }
    torch.save(state, tmp_path / "two.pth")
    assert torch.equal(read_classifier(tmp_path / "two.pth", 10, "a").weight, state["a.weight"])
    run(digits, "fit", "--classifier", tmp_path / "two.pth", "--classifier-layer", "none", "--output", tmp_path / "x", code=2)
    assert "none" in capsys.readouterr().err


def test_a_backbone_of_ones_own_starts_the_same_each_time(tmp_path, monkeypatch):
    (tmp_path / "seeded_models.py").write_text("from torch import nn\ndef make(n):\n    return nn.Linear(4, n)\n")
    monkeypatch.chdir(tmp_path)
    one, two, three = (Train(output="x", backbone="seeded_models:make").model(3, seed).weight for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, three)


def test_several_processes_are_for_those_who_share_work(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["info"]) == 2 and "torchrun" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "abc")
    assert cli.main(["info", "--json"]) == 0 and json.loads(capsys.readouterr().out)["simd"]


def test_defaults_of_what_is_given_by_place(digits, capsys):
    run(digits, "doctor", "--no-read-images")
    assert cli.main(["doctor", "nothing"]) == 2
    assert "topic must be one of data, install, got 'nothing'" in capsys.readouterr().err.replace("\n", " ")


def test_names_with_brackets_are_no_markup(digits, tmp_path, capsys):
    run(digits, "fit", "--classifier", digits / "joint", "--epochs", "1", "--output", tmp_path / "alpha [/red]")
    run(digits, "fit", "--classifier", tmp_path / "alpha [/red]", "--epochs", "1", "--output", tmp_path / "again [v1]")
    assert "alpha [/red]" in capsys.readouterr().out


def test_an_extraction_says_how_far_it_is_and_that_it_goes_on(digits, tmp_path, capsys, monkeypatch):
    extract = ["extract", "--val", digits / "val.txt", "--progress", "--features", tmp_path / "features"]
    with monkeypatch.context() as patch:

        def interrupt(*_):
            raise KeyboardInterrupt

        patch.setattr(ExtractionFolder, "join", interrupt)
        run(digits, *extract, code=130)
    assert "interrupted; run the same command again to go on" in capsys.readouterr().err
    run(digits, *extract, "--processes", "1")
    said = capsys.readouterr()
    assert "val (part 2 of 3): " in said.err and "images a second" in said.err and "Cached features" in said.out
    run(digits, *extract)
    assert "val (part 2 of 3): already complete" in capsys.readouterr().err
    run(digits, *extract, "--quiet")
    assert capsys.readouterr() == ("", "")
    alone = json.loads((tmp_path / "features" / "val" / "features.json").read_text())
    usual = json.loads((digits / "features" / "val" / "features.json").read_text())
    assert alone["features_sha256"] == usual["features_sha256"] and "1 thread" in alone["device"]


def test_a_wrong_transform_is_refused_before_anything_is_extracted(digits, tmp_path, capsys):
    wrong = ["--mean", "9", "--std", "0.01"]
    run(digits, "extract", *wrong, "--features", tmp_path / "features", code=2)
    said = capsys.readouterr().err
    assert "the network is at chance level" in said and "--allow-chance goes on all the same" in said
    assert not (tmp_path / "features").exists()
    run(digits, "doctor", *wrong, code=2)
    assert "the network is at chance level" in capsys.readouterr().out
    run(digits, "doctor")
    assert "of 256 images the network knows" in capsys.readouterr().out.replace("\n", " ")


def test_a_classifier_that_does_not_know_the_features_is_refused(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("alphaext.doctor.accuracy._ENOUGH", 50)  # there are fewer than 200 samples here
    checkpoint = read_checkpoint(digits / "joint" / "model.pth")
    torch.save({"weight": checkpoint.weight.roll(1, 0), "bias": checkpoint.bias.roll(1, 0)}, tmp_path / "rolled.pth")
    arguments = ["fit", "--classifier", tmp_path / "rolled.pth", "--epochs", "1", "--output", tmp_path / "alpha"]
    run(digits, *arguments, code=2)
    assert "the classifier is at chance level" in capsys.readouterr().err and not (tmp_path / "alpha").exists()
    run(digits, *arguments, "--allow-chance")


def test_a_classifier_that_is_not_named_is_the_checkpoints(digits, tmp_path, capsys):
    run(digits, "fit", "--epochs", "1", "--output", tmp_path / "alpha")
    run(digits, "evaluate", tmp_path / "alpha", "--json", "--part", "val")
    assert list(json.loads(capsys.readouterr().out.split("Classifier: ")[1].split("\n", 1)[1])["metrics"]) == ["model", "alpha"]


def test_errors_are_json_under_json(digits, tmp_path, capsys):
    run(digits, "fit", "--json", "--few-below", "2", "--output", tmp_path / "alpha", code=2)
    failed = json.loads(capsys.readouterr().out)
    assert failed["kind"] == "ValueError" and failed["exit_code"] == 2
    assert "few are those below few_below = 2 training images" in failed["error"]
    for command in (["fit"], ["recommend"], ["baseline", "few-bias"]):
        run(digits, *command, "--few-below", "900", "--many-above", "1000", "--output", tmp_path / "alpha", code=2)
        assert "every class is few: few are those below few_below = 900" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["fit", "--prset", "few", "--json"])
    assert json.loads(capsys.readouterr().out)["error"] == "unknown option --prset; did you mean '--preset'?"


def test_few_classes_are_named_by_the_user(digits, tmp_path, capsys):
    """By name or number, in place of few_below, in each command that repairs or measures them."""
    # The largest class, and one between; of class folders and lists alike the names here are the digits themselves.
    run(digits, "fit", "--few-classes", "0,", "4", "--epochs", "1", "--output", tmp_path / "alpha")
    assert read_result(tmp_path / "alpha")["few_classes"] == [0, 4]
    run(digits, "recommend", "--few-classes", "0, 4", "--output", tmp_path / "recommended")
    before, after = (read_classifier(folder).weight for folder in (digits / "joint", tmp_path / "recommended"))
    assert before.shape == after.shape
    run(digits, "evaluate", tmp_path / "alpha", "--few-classes", "0,4", "--part", "val", "--json")
    assert json.loads(capsys.readouterr().out.rpartition("\n{")[2].join(["{", ""]))["classes"]["few"] == 2
    run(digits, "doctor", "data", "--few-classes", "0", "4", "--no-read-images")
    (few,) = (line for line in capsys.readouterr().out.splitlines() if "named" in line)
    assert few.replace("│", " ").split()[:3] == ["few", "named", "2"]
    run(digits, "baseline", "few-bias", "--few-classes", "0,4", "--offset", "1", "--output", tmp_path / "biased")
    before, after = (read_classifier(folder).bias for folder in (digits / "joint", tmp_path / "biased"))
    assert (after - before).nonzero().flatten().tolist() == [0, 4]
    for given, said in (
        (["12"], "few_classes must be in 0..9, got 12"),
        (["4", "4"], "few_classes must name each class once, got class 4 more than once"),
        ([","], "few_classes must name a class, got none"),
        ([",".join(map(str, range(10)))], "few_classes names every class; rows are composed of classes that are not few"),
    ):
        run(digits, "fit", "--few-classes", *given, "--output", tmp_path / "none", code=2)
        assert said in capsys.readouterr().err


def test_named_classes_are_names_before_numbers():
    names = ["artificial, man-made", "sparrow", "0"]
    for given, ids in (
        (["sparrow"], [1]),
        (["sparrow, 0"], [1, 2]),
        (["artificial, man-made", "sparrow"], [0, 1]),
        ([1, "0"], [1, 2]),
    ):
        assert Doctor(few_classes=given).named_classes(3, names) == ids
    with pytest.raises(ValueError, match=r"few_classes must name classes, 'sparow' is none; did you mean 'sparrow'\?"):
        Doctor(few_classes="sparow").named_classes(3, names)
    with pytest.raises(ValueError, match="few_classes must be numbers where the classes have no names, got 'sparrow'"):
        Doctor(few_classes="sparrow").named_classes(3, None)


def test_a_configuration_names_few_classes_by_number(tmp_path):
    (tmp_path / "mine.toml").write_text("[data]\nfew_classes = [3, 7]\n")
    assert read_config(tmp_path / "mine.toml", [Fit]) == {"data": {"few_classes": ("3", "7")}}


INTERRUPTED = {
    "doctor": ["doctor", "data"],
    "init": ["init", "DIGITS", "--output", "OUT/mine.toml"],
    "train": ["train", "--output", "OUT", "--epochs", "60"],
    "extract": ["extract", "--features", "OUT", "--processes", "2"],
    "baseline": ["baseline", "crt", "--epochs", "3000", "--output", "OUT"],
    "recommend": ["recommend", "--classifier", "DIGITS/joint", "--output", "OUT"],
    "fit": ["fit", "--classifier", "DIGITS/joint", "--epochs", "3000", "--output", "OUT"],
    "evaluate": ["evaluate", "DIGITS/joint", "--output", "OUT"],
    "export": ["export", "--repaired", "OUT/changed.pth", "--output", "OUT/new.pth"],
    "study": ["study", "--classifier", "DIGITS/joint", "--experiments", "top-k", "--epochs", "50", "--output", "OUT"],
    "repair": ["repair", "--output", "OUT"],
}


@pytest.mark.parametrize("name", list(INTERRUPTED))
def test_ctrl_c_is_one_sentence_and_the_same_command_can_be_run_again(digits, tmp_path, name):
    words = [word.replace("DIGITS", str(digits)).replace("OUT", str(tmp_path / "out")) for word in INTERRUPTED[name]]
    (tmp_path / "out").mkdir()
    if name == "export":
        changed = read_classifier(digits / "joint")
        changed.weight.data[FEW] += 0.1
        save_linear(changed, tmp_path / "out" / "changed.pth")
    if name != "init":
        words += ["--config", str(digits / ("train.toml" if name == "train" else "alphaext.toml"))]

    def command():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        for descriptor, said in ((1, "out.txt"), (2, "err.txt")):
            os.dup2(os.open(tmp_path / said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.stdout, sys.stderr, sys.argv = open(1, "w"), open(2, "w"), ["alphaext", *words]  # noqa: SIM115
        original = cli.main
        cli.main = lambda: ready.set() or original()  # on a busy machine the signal would come before all this
        code = process_main()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)

    def leftovers():
        return [path.name for path in tmp_path.rglob("*.tmp")]

    codes, fork = [], multiprocessing.get_context("fork")
    for delay in (0.02, 0.15, 0.4):
        ready = fork.Event()
        child = fork.Process(target=command)
        child.start()
        assert ready.wait(60)
        child.join(delay)
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGINT)
        child.join(60)
        codes.append(child.exitcode)
        said = (tmp_path / "err.txt").read_text()
        if child.exitcode == 2 and name in ("init", "export"):
            # Interrupted when its one file was there already.
            assert "exists already" in said and Path(words[words.index("--output") + 1]).exists()
            break
        assert child.exitcode in (0, 130), said
        if child.exitcode == 0:
            break
        on = "; run the same command again to go on" if COMMANDS[name].goes_on else ""
        assert said in ("interrupted\n", f"interrupted{on}\n") and not leftovers()  # the first: before it was read which one
        assert not (tmp_path / "out" / "result.json").exists()
    assert codes[0] == 130
