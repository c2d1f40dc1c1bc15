"""The README's example runs as it stands, but for the files that it cannot have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parents[1] / "README.md"


def test_example_on_a_torchvision_model():
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # a torchvision that does not fit the installed torch fails in many ways
        pytest.skip(f"torchvision does not import: {error}")
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
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
