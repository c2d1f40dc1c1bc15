"""A tiny model, tiny images and quick transforms for the tests of extraction; as a program, an extraction for torchrun."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alphaext.data.images import ArrayImages, ImageReadError
from alphaext.features.extraction import extract
from alphaext.models.zoo import SplitModel, split_model

WIDTH = 32


class TinyModel(nn.Module):
    """A convolution, and a classifier on its 32 features."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 3)
        self.dropout = nn.Dropout(0.5)  # so that a model in training mode would be noticed
        self.fc = nn.Linear(WIDTH, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.dropout(torch.relu(self.convolution(images)).flatten(1)))
        return logits


def tiny_model(num_classes: int = 5, seed: int = 0) -> SplitModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return split_model(TinyModel(num_classes), "fc")


class TinyImages(ArrayImages):
    """Gray images of 6 x 6 pixels. Each one that is loaded is noted in the file ``log``, and takes ``seconds``."""

    def __init__(self, count: int, log: Path | None = None, seconds: float = 0.0, unreadable: tuple[int, ...] = ()) -> None:
        generator = np.random.default_rng(7)
        pixels = generator.integers(0, 256, (count, 6, 6), dtype=np.uint8)
        super().__init__(pixels, np.arange(count) % 5, "tiny.npz", num_classes=5)
        self.log, self.seconds, self.unreadable = log, seconds, unreadable

    def load(self, index: int) -> Any:
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write(f"{index} {os.getpid()}\n")
        if self.seconds:
            time.sleep(self.seconds)
        if index in self.unreadable:
            raise ImageReadError.of(self.name(index), "image file is truncated")
        return super().load(index)


class TinyTransform:
    """An image as numbers in 0..1."""

    random = False

    def __init__(self, scale: float = 1.0) -> None:
        self.description = {"name": "tiny", "scale": scale, "sizes": (6, 6)}
        self.scale = scale

    def __call__(self, image: Any) -> Tensor:
        return torch.from_numpy(np.array(image.convert("L"), dtype=np.float32))[None] * (self.scale / 255)


class RandomTransform(TinyTransform):
    """The same with noise."""

    random = True

    def __call__(self, image: Any) -> Tensor:
        raise AssertionError("a random transform is called with a seed")

    def seeded(self, image: Any, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return super().__call__(image) + torch.rand(1, 6, 6, generator=generator)


def loaded(log: Path) -> list[int]:
    """The images that were loaded, in order."""
    return [int(line.split()[0]) for line in log.read_text().splitlines()] if log.exists() else []


def main(options: dict[str, Any]) -> None:
    images = TinyImages(options["count"], Path(options["log"]))
    torch.set_num_threads(1)
    features = extract(tiny_model(), images, options["folder"], transform=TinyTransform(), batch_size=4, device="cpu")
    # One write a line: with PYTHONUNBUFFERED, print writes the line and its end apart, and two processes mix them.
    os.write(sys.stdout.fileno(), f"process {os.environ.get('RANK')} has {len(features)} rows\n".encode())


if __name__ == "__main__":
    from alphaext.features import shards

    shards.IMAGES_PER_SHARD = 8
    main(json.loads(sys.argv[1]))
