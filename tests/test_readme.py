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
    code = examples()[0]
    assert len([line for line in code.splitlines() if line]) <= 12
    names: dict = {}
    exec(compile(code.replace("(224, 224)", "(32, 32)"), "README.md", "exec"), names)
    assert "1 of 5 classes are few; top-1 in % on the validation samples: few" in capsys.readouterr().out
    assert names["made"].train.class_names == tuple(f"kind {label}" for label in range(5))
    before, after = (torch.load(name, weights_only=True) for name in ("trained.pth", "repaired.pth"))
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["fc.weight", "fc.bias"]


def test_texts_in_scikit_learn(monkeypatch, capsys):
    monkeypatch.chdir(README.parent)
    exec(compile(examples()[1], "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "'before': " in said and "'after': " in said


def test_it_is_short():
    assert len(README.read_text().split()) <= 900
