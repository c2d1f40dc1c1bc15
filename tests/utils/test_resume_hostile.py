"""Files to go on from that somebody has changed: refused with one kind of error, or as good as what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alphaext import AlphaNet, fit

LABELS = torch.arange(5).repeat_interleave(torch.tensor([25, 22, 21, 6, 4]))
FEATURES = torch.randn(len(LABELS), 6, generator=torch.Generator().manual_seed(0))


def trained(path: Path, epochs: int) -> Any:
    torch.manual_seed(0)
    head = AlphaNet.from_linear(nn.Linear(6, 5), members=torch.tensor([[3, 0, 1], [4, 1, 2]]), seed=0)
    validation = {"val_features": FEATURES, "val_labels": LABELS}
    return fit(head, FEATURES, LABELS, **validation, epochs=epochs, checkpoint=path, progress=False)


def places(value: Any, trail: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every entry of nested containers."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    found = [trail] if trail else []
    for key, entry in inner:
        found += places(entry, (*trail, key))
    return found


def changed(value: Any, trail: tuple[Any, ...], new: Any) -> Any:
    if not trail:
        return new(value) if callable(new) else new
    kind = type(value)
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    parts = [(key, changed(entry, trail[1:], new) if key == trail[0] else entry) for key, entry in pairs]
    return dict(parts) if isinstance(value, dict) else kind(entry for _, entry in parts)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "new",
    [None, -1, 10**30, float("nan"), "text", [], {}, torch.ones(1), lambda old: old[None] if torch.is_tensor(old) else old],
)
def test_hostile_entries(tmp_path: Path, new: Any) -> None:
    path = tmp_path / "fit.pt"
    trained(path, 2)
    state = torch.load(path, weights_only=True)
    for trail in places(state):
        torch.save(changed(state, trail, new), path)
        try:
            trained(path, 3)
        except ValueError as error:
            assert "fit.pt" in str(error), trail


def test_what_is_refused_is_named(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    trained(path, 2)
    state = torch.load(path, weights_only=True)
    for changes, message in (
        ({"history": []}, "history is of the epochs"),
        ({"history": state["history"][1:] + state["history"][:1]}, "history is of the epochs"),
        ({"selected_epoch": 7}, "it has selected epoch 7 of 2"),
        ({"engine": {**state["engine"], "steps": -1}}, "steps must be at least 0"),
        ({"engine": {}}, "cannot be read as one of fit's"),
    ):
        torch.save({**state, **changes}, path)
        with pytest.raises(ValueError, match=rf"checkpoint .*fit.pt cannot be read as .*: .*{message}|{message}"):
            trained(path, 3)
