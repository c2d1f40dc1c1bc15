"""The README's examples run as they stand, but for the files that they cannot have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parents[1] / "README.md"


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture(autouse=True)
def needs_torchvision():
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # a torchvision that does not fit the installed torch fails in many ways
        pytest.skip(f"torchvision does not import: {error}")


def test_a_model_and_folders_of_images(tmp_path, monkeypatch, capsys):
    import torchvision
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), "trained.pth")
    for part, counts in {"train": (24, 22, 21, 20, 3), "val": (2, 2, 2, 2, 2)}.items():
        for label, count in enumerate(counts):
            (tmp_path / part / f"kind {label}").mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / part / f"kind {label}" / f"{number}.png")
    code, _ = examples()
    assert len([line for line in code.splitlines() if line]) <= 12
    names: dict = {}
    exec(compile(code.replace("(224, 224)", "(32, 32)"), "README.md", "exec"), names)
    assert "1 of 5 classes are few; top-1 in % on the validation samples: few" in capsys.readouterr().out
    assert names["made"].train.class_names == tuple(f"kind {label}" for label in range(5))
    before, after = (torch.load(name, weights_only=True) for name in ("trained.pth", "repaired.pth"))
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["fc.weight", "fc.bias"]


def test_example_on_a_torchvision_model():
    _, code = examples()
    assert len(code.strip().splitlines()) <= 20
    torch.manual_seed(0)
    labels = torch.cat([torch.arange(1000).repeat_interleave(20), torch.arange(990).repeat_interleave(5)])
    labels = labels[~((labels >= 990) & (torch.rand(len(labels)) < 0.3))]
    data = {"data": (torch.rand(len(labels), 2048), labels, torch.rand(50, 2048), torch.randint(1000, (50,)))}
    code = code.replace('model.load_state_dict(torch.load("trained.pth", weights_only=True))', "")
    code = code.replace("val_labels = ...", "val_labels = data")
    code = code.replace("val_labels=val_labels)", "val_labels=val_labels, epochs=1)")
    exec(compile(code, "README.md", "exec"), data)
    assert type(data["model"].fc) is torch.nn.Linear and len(data["head"].few_classes) == 10
    assert set(data["result"].after) == {"few", "medium", "many", "all"}
