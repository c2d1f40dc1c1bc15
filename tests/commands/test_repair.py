"""From a folder to a repaired checkpoint: 'init', then 'repair'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision", exc_type=ImportError)

from digit_images import write_digits

from alphaext.commands import Init, Repair, Train
from alphaext.commands import main as cli
from alphaext.features import read_features
from alphaext.utils.text import percent

CONFIG = """
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
backbone = "small"
transform = "small"
image_size = 32
checkpoint = "trained.pth"
[fit]
epochs = 4
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_digits(folder)
    model = {"backbone": "small", "transform": "small", "image_size": 32}
    common = {"epochs": 6, "batch_size": 32, "lr": 0.05, "workers": 0, "device": "cpu", "progress": False}
    Train(train=folder / "train.txt", root=folder, output=folder / "joint", **common, **model).run()
    (folder / "joint" / "model.pth").rename(folder / "trained.pth")
    (folder / "mine.toml").write_text(CONFIG)
    return folder


def test_one_command_repairs_and_goes_on(project, capsys):
    arguments = ["repair", "--config", str(project / "mine.toml"), "--method", "fit"]
    assert cli.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["evaluate"]["part"] == "test" and result["fit"]["chosen_on"] == "val"
    names = tuple(map(str, range(10)))  # of the class folders in the list
    assert all(read_features(project / "repaired" / "features" / part).class_names == names for part in ("train", "test"))
    # Names that come later need no new features.
    (project / "classes.txt").write_text("\n".join(f"digit {name}" for name in names))
    extract = ["extract", "--config", str(project / "mine.toml"), "--features", str(project / "repaired" / "features")]
    assert cli.main([*extract, "--classes", str(project / "classes.txt")]) == 0
    (project / "classes.txt").unlink()
    assert read_features(project / "repaired" / "features" / "val").class_names[3] == "digit 3"
    assert cli.main(extract) == 0
    capsys.readouterr()
    repaired = project / "repaired"
    text = (repaired / "report.html").read_text()
    assert text.startswith("<!DOCTYPE html>") and result["page"].endswith("report.html")
    gain, (low, high) = (result["evaluate"]["comparisons"]["fit"][what]["few"] for what in ("differences", "intervals"))
    few = f"few {percent(gain, sign=True)} points ({percent(low, sign=True)} to {percent(high, sign=True)})"
    assert text.rindex("What to take, and what it costs") < text.index(few) < text.rindex("Who gained, and who paid")
    before, after = (
        torch.load(path, weights_only=True) for path in (project / "trained.pth", repaired / "trained-repaired.pth")
    )
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["fc.weight", "fc.bias"]
    # All is there already.
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("done before") == 4 and "$ alphaext fit --config" in printed
    # Each command can be run alone; what depends on another option runs anew.
    (project / "mine.toml").write_text(CONFIG.replace("epochs = 4", "epochs = 5"))
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.count("done before") == 1
    assert json.loads((repaired / "fit" / "result.json").read_text())["options"]["epochs"] == 5


def test_a_killed_repair_has_no_result_and_goes_on(project, tmp_path, monkeypatch):
    from alphaext.commands.evaluate import Evaluate

    options = Repair(config=project / "mine.toml", output=tmp_path / "out", method="fit")
    with monkeypatch.context() as patch:
        patch.setattr(Evaluate, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            options.run()
    assert not (tmp_path / "out" / "report.html").exists()
    assert Path(options.run()["page"]).is_file()


def test_the_best_of_all_methods_is_taken(project, tmp_path, capsys):
    features = str(project / "repaired" / "features")
    (project / "best.toml").write_text(f'features = "{features}"\n' + CONFIG)
    assert cli.main(["repair", "--config", str(project / "best.toml"), "--output", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["recommend"]["method"] and Path(result["page"]).is_file()
    assert ("export" in result) == (result["recommend"]["method"] != "original")


def test_what_doctor_finds_stops_a_repair(project, tmp_path, capsys):
    lines = (project / "train.txt").read_text()
    (project / "broken.txt").write_text(lines + "train/9/none.png 9\n")
    (project / "broken.toml").write_text(CONFIG.replace('"train.txt"', '"broken.txt"'))
    assert cli.main(["repair", "--config", str(project / "broken.toml"), "--output", str(tmp_path / "out")]) == 2
    assert "doctor found errors" in capsys.readouterr().err and not (tmp_path / "out" / "fit").exists()


def test_init_sees_data_and_checkpoint(project, tmp_path, capsys):
    assert cli.main(["init", str(project), "--output", str(project / "seen.toml")]) == 0
    text = (project / "seen.toml").read_text()
    for line in ('train = "train.txt"', 'val = "val.txt"', 'test = "test.txt"', 'root = "."', 'checkpoint = "trained.pth"'):
        assert f"\n{line} " in text
    assert '\nbackbone = "small" ' in text and "channels" not in text.partition("[model]")[2]
    (project / "seen.toml").write_text(text.replace('backbone = "small"', '# backbone = ""'))
    capsys.readouterr()
    assert cli.main(["repair", "--config", str(project / "seen.toml"), "--output", str(tmp_path / "none")]) == 2
    assert "backbone must be given in [model] of" in capsys.readouterr().err and not (tmp_path / "none").exists()
    (project / "classes.txt").write_text("\n".join(map(str, range(10))))
    assert Init(folder=project, output=project / "named.toml").run()["classes"] == project / "classes.txt"
    (project / "classes.txt").unlink()
    assert cli.main(["init", str(project), "--output", str(project / "seen.toml")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert Init(folder=tmp_path).run()["train"] is None and (tmp_path / "mine.toml").is_file()


def test_init_knows_a_model_by_its_tensors(tmp_path):
    import torchvision

    torch.save(torchvision.models.resnet18(num_classes=7).state_dict(), tmp_path / "best.pth")
    (tmp_path / "train" / "ant").mkdir(parents=True)
    found = Init(folder=tmp_path).run()
    assert found["backbone"] == "resnet18" and found["train"] == tmp_path / "train"
    assert 'backbone = "resnet18"' in (tmp_path / "mine.toml").read_text()
