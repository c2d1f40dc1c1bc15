"""A network's accuracy on some of its images, beside chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchvision", exc_type=ImportError)

from alphaext.commands.shared import ModelOptions
from alphaext.data import ArrayImages, test_transform
from alphaext.doctor import at_chance, check_accuracy
from alphaext.models import split_model

LABELS = torch.arange(4).repeat(60)
# Each class has a brightness of its own.
PIXELS = (40 + 50 * LABELS.numpy()[:, None, None, None] + np.zeros((240, 8, 8, 3))).astype(np.uint8)


class Brightness(nn.Module):
    """Knows each class by its brightness, where images come as 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 4)
        centers = (40 + 50 * torch.arange(4.0)) / 255
        with torch.no_grad():
            self.fc.weight.copy_(2 * centers[:, None])
            self.fc.bias.copy_(-(centers**2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images.mean(dim=(1, 2, 3))[:, None])


def transform(mean: float, std: float):
    return test_transform(8, resize=8, mean=(mean,) * 3, std=(std,) * 3)


def check(mean: float, std: float, labels: torch.Tensor = LABELS, others=None):
    return check_accuracy(
        split_model(Brightness()), ArrayImages(PIXELS, labels, "pixels"), transform(mean, std), others, progress=False
    )


def test_a_network_that_knows_its_images():
    finding = check(0.0, 1.0)
    assert finding.level == "note" and "of 240 images the network knows 100.0%, where chance would know 25.0%" in finding.detail


def test_a_wrong_transform_is_at_chance_and_the_right_one_is_named():
    finding = check(3.0, 0.1, others={"values of 0 to 1": transform(0.0, 1.0)})
    assert finding.level == "error" and "with values of 0 to 1 it knows 100.0%" in finding.detail
    assert "another order" in finding.detail


def test_another_transform_that_does_better_is_a_warning():
    finding = check(0.05, 1.0 / 1.4, others={"values of 0 to 1": transform(0.0, 1.0)})
    assert finding.level == "warning" and "values of 0 to 1" in finding.detail


def test_others_are_tried_only_where_one_could_do_better():
    def never(_):
        raise AssertionError("nothing is to be gained")

    assert check(0.0, 1.0, others={"never": never}).level == "note"


class Blue(nn.Module):
    """Knows each class by how blue it is in the last channel, where values are as ``layer`` has them."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 4)
        centers = scale * (40 + 50 * torch.arange(4.0))
        with torch.no_grad():
            self.fc.weight.copy_(2 * centers[:, None])
            self.fc.bias.copy_(-(centers**2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images[:, -1].mean(dim=(1, 2))[:, None])


BLUE = np.concatenate([PIXELS[..., :2] * 0, PIXELS[..., 2:]], axis=3)


@pytest.mark.parametrize(
    ("network", "pixels", "options", "found"),
    [
        (Blue(1.0), PIXELS, {"mean": (0.0,), "std": (1.0,)}, "values of 0 to 255 "),
        (Blue(1 / 255), PIXELS, {}, "values of 0 to 1 "),
        (Blue(1 / 255), BLUE[..., ::-1], {"mean": (0.0,), "std": (1.0,)}, "blue before red"),
    ],
)
def test_likely_causes_of_a_wrong_transform_are_named(network, pixels, options, found):
    settings = ModelOptions(image_size=8, **options)
    images = ArrayImages(np.ascontiguousarray(pixels), LABELS, "pixels")
    finding = settings.accuracy(split_model(network), images)
    assert finding.level in ("warning", "error") and f"with {found}" in finding.detail


def test_another_class_order_is_at_chance():
    assert check(0.0, 1.0, (LABELS + 1) % 4).level == "error"


def test_chance_is_that_of_the_classes_named():
    labels = torch.tensor([0] * 90 + [1] * 10)
    assert at_chance(torch.zeros(100, dtype=torch.int64), labels) == (0.9, 0.9, True)
    guessed = torch.randint(4, (1000,), generator=torch.Generator().manual_seed(0))
    assert at_chance(guessed, guessed.roll(1))[2]
