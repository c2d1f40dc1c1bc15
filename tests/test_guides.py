"""Every command and every example of the guides runs as it stands, on data that are made up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

GUIDES = Path(__file__).resolve().parents[1] / "docs" / "guides"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (GUIDES / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("page", "package"), [("pytorch.md", "torch"), ("huggingface.md", "transformers")])
def test_examples(page, package, tmp_path, monkeypatch, capsys):
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), names)
    assert "classes are few" in capsys.readouterr().out


def test_folders(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    from PIL import Image

    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=4).state_dict(), tmp_path / "trained.pth")
    for part, counts in {"train": (22, 21, 20, 3), "val": (2, 2, 2, 2), "test": (2, 2, 2, 2)}.items():
        for label, count in enumerate(counts):
            (tmp_path / part / f"kind {label}").mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (40, 40, 3), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / part / f"kind {label}" / f"{number}.png")
    (settings,), (commands,) = blocks("folders.md", "toml"), blocks("folders.md", "sh")
    (tmp_path / "mine.toml").write_text(settings + "allow_chance = true\n")  # the network is random
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-ec", commands], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("trained.pth", "repaired.pth"))
    assert {name for name in before if not torch.equal(before[name], after[name])} <= {"fc.weight", "fc.bias"}


def test_the_head_step_by_step():
    pytest.importorskip("torchvision")
    (code,) = blocks("head.md", "python")
    torch.manual_seed(0)
    labels = torch.cat([torch.arange(1000).repeat_interleave(20), torch.arange(990).repeat_interleave(5)])
    labels = labels[~((labels >= 990) & (torch.rand(len(labels)) < 0.3))]
    data = {"data": (torch.rand(len(labels), 2048), labels, torch.rand(50, 2048), torch.randint(1000, (50,)))}
    code = code.replace('model.load_state_dict(torch.load("trained.pth", weights_only=True))', "")
    code = code.replace("val_labels = ...", "val_labels = data")
    code = code.replace("val_labels=val_labels)", "val_labels=val_labels, epochs=1)")
    exec(compile(code, "head.md", "exec"), data)
    assert type(data["model"].fc) is torch.nn.Linear and len(data["head"].few_classes) == 10
    assert set(data["result"].after) == {"few", "medium", "many", "all"}
