"""Other ways in which networks are often given their images, to tell a wrong transform by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..data.loading import Transform
from ..data.transforms import IMAGENET_MEAN, IMAGENET_STD, ImageTransform, small_test_transform, test_transform


def other_transforms(used: Transform, size: int, channels: int, *, small: bool) -> dict[str, Callable[[Any], Tensor]]:
    """Transforms by what is special about them, without the one that is used.

    Args:
        used: the transform in use.
        size: of the images that the network takes.
        channels: 1 or 3.
        small: whether images are only resized, as small ones are.

    Example:
        >>> list(other_transforms(small_test_transform(8, channels=1), 8, 1, small=True))[-1]
        'values of 0 to 255 (mean 0, std 0.0039216)'
    """

    def usual(mean: Sequence[float], std: Sequence[float], squash: bool = False) -> ImageTransform:
        if small:
            return small_test_transform(size, channels, mean, std)
        resize = size if squash else round(size * 8 / 7)
        return test_transform(size, resize, mean, std, channels, squash=squash)

    mean, std = IMAGENET_MEAN, IMAGENET_STD
    others: dict[str, Callable[[Any], Tensor]] = {
        "ImageNet's mean and std": usual(mean, std),
        "mean and std of 0.5": usual((0.5,), (0.5,)),
        "mean and std of 0.5, both sides resized alike": usual((0.5,), (0.5,), squash=True),
        "values of 0 to 1 (mean 0, std 1)": usual((0,), (1,)),
        "values of 0 to 255 (mean 0, std 0.0039216)": usual((0,), (1 / 255,)),
    }
    if channels == 3:
        others["blue before red, values of 0 to 255 less ImageNet's mean"] = _Backwards(usual(mean[::-1], (1 / 255,)))
        others["blue before red"] = _Backwards(used)
    return {name: each for name, each in others.items() if getattr(each, "description", None) != used.description}


class _Backwards:
    """A transform for networks whose first channel is blue, as OpenCV reads images."""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self._transform = transform

    def __call__(self, image: Any) -> Tensor:
        from PIL import Image

        return self._transform(Image.merge("RGB", image.convert("RGB").split()[::-1]))
