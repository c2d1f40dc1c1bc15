"""Files to go on from that somebody has changed: refused with one kind of error, or as good as what they were."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from alphaext import AlphaNet, baselines, fit
from alphaext.data.images import ArrayImages
from alphaext.data.transforms import small_test_transform
from alphaext.pretraining.train import train_model
from alphaext.utils.resume import ResumableTraining

LABELS = torch.arange(5).repeat_interleave(torch.tensor([25, 22, 21, 6, 4]))
FEATURES = torch.randn(len(LABELS), 6, generator=torch.Generator().manual_seed(0))


LINEAR = nn.Linear(6, 5)


def trained(path: Path, epochs: int, **options: Any) -> Any:
    torch.manual_seed(0)
    layer = "dense" if "optimizer" in options else "factored"
    head = AlphaNet.from_linear(nn.Linear(6, 5), members=[[3, 0, 1], [4, 1, 2]], first_layer=layer, hidden_dim=4, seed=0)
    validation = {"val_features": FEATURES, "val_labels": LABELS}
    return fit(head, FEATURES, LABELS, **validation, epochs=epochs, checkpoint=path, progress=False, **options)


def trained_by_torch(path: Path, epochs: int) -> Any:
    return trained(path, epochs, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01))


def retrained(path: Path, epochs: int) -> Any:
    options = {"val_features": FEATURES, "val_labels": LABELS, "lr": 0.1, "weight_decay": 0.0, "batch_size": 16}
    return baselines.crt(FEATURES, LABELS, 5, linear=LINEAR, epochs=epochs, checkpoint=path, progress=False, **options)


def rescaled(path: Path, epochs: int) -> Any:
    options = {"val_features": FEATURES, "val_labels": LABELS, "lr": 0.1, "weight_decay": 0.0, "batch_size": 16}
    return baselines.lws(LINEAR, FEATURES, LABELS, epochs=epochs, checkpoint=path, progress=False, **options)


def pretrained(path: Path, epochs: int) -> Any:
    pixels = np.arange(20 * 64, dtype=np.int64).reshape(20, 8, 8) % 251
    images = ArrayImages(pixels.astype(np.uint8), torch.arange(20) % 3, "images", num_classes=3)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    transform = small_test_transform(8, channels=1)
    return train_model(
        network, images, transform=transform, output_folder=path.parent, epochs=epochs, workers=0, progress=False
    )


TRAININGS = {
    "fit.pt": trained,
    "torch.pt": trained_by_torch,
    "crt.pt": retrained,
    "lws.pt": rescaled,
    "training.pt": pretrained,
}


def half_way(train: Callable[[Path, int], Any], path: Path) -> Any:
    """What is in the file after two of three epochs."""
    save, calls = ResumableTraining.save, []

    def stop(*arguments: Any, **state: Any) -> None:
        save(*arguments, **state)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(ResumableTraining, "save", stop)
        train(path, 2 if train is trained else 3)
    return torch.load(path, weights_only=True)


def places(value: Any, trail: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every entry of nested containers."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    found = [trail] if trail else []
    for key, entry in inner:
        found += places(entry, (*trail, key))
    return found


def at(value: Any, trail: tuple[Any, ...]) -> Any:
    return at(value[trail[0]], trail[1:]) if trail else value


def changed(value: Any, trail: tuple[Any, ...], new: Any) -> Any:
    if not trail:
        return new(value) if callable(new) else new
    kind = type(value)
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    parts = [(key, changed(entry, trail[1:], new) if key == trail[0] else entry) for key, entry in pairs]
    return dict(parts) if isinstance(value, dict) else kind(entry for _, entry in parts)


def nan(old: Any) -> Any:
    return old * float("nan") if torch.is_tensor(old) and old.is_floating_point() else float("nan")


def one_more(old: Any) -> Any:
    return old[None] if torch.is_tensor(old) else [*old, 1] if isinstance(old, list) else old


HOSTILE = (None, -1, one_more, "text", torch.ones(1), {}, nan, [], 10**30, torch.ones(1, dtype=torch.float16), float("inf"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRAININGS)
def test_hostile_entries(tmp_path: Path, name: str) -> None:
    path, train = tmp_path / name, TRAININGS[name]
    state = half_way(train, path)
    for number, trail in enumerate(places(state)):
        torch.save(changed(state, trail, HOSTILE[number % len(HOSTILE)]), path)
        try:
            train(path, 3)
        except ValueError as error:
            assert name in str(error), trail


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRAININGS)
def test_empty_histories_wrong_shapes_and_numbers_below_zero(tmp_path: Path, name: str) -> None:
    path, train = tmp_path / name, TRAININGS[name]
    state = half_way(train, path)
    for trail in places(state):
        if not torch.is_tensor(at(state, trail)) or at(state, trail).dim() == 0:
            continue
        for new in (torch.ones(1), one_more, nan):
            torch.save(changed(state, trail, new), path)
            with pytest.raises(ValueError, match=name):
                train(path, 3)
    for trail, new in ((("history",), []), (("selected_epoch",), -1), (("history", 0, "epoch"), -1)):
        torch.save(changed(state, trail, new), path)
        with pytest.raises(ValueError, match=name):
            train(path, 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRAININGS)
def test_damage_is_told_by_checksums(tmp_path: Path, name: str) -> None:
    path, train = tmp_path / name, TRAININGS[name]
    half_way(train, path)
    with zipfile.ZipFile(path) as archive:
        record = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
        start = record.header_offset + 30 + len(record.filename)
    content = bytearray(path.read_bytes())
    content[content.index(archive_bytes(path, record.filename), start)] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as .*data/0 in it is damaged"):
        train(path, 3)


def archive_bytes(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(name)


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
