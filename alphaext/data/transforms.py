"""From a PIL image to the tensor that a backbone takes, with a description that says exactly how.

The transforms are torchvision's (``torchvision.transforms.v2``). Each is made from its description, a dict that JSON can hold:
cached features keep it, so that they are never mistaken for those of another transform.
"""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..utils.checks import check_choice, check_flag, check_integer, check_kind, check_number
from ..utils.packages import require

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Of ImageNet's training images, red, green, blue, in 0..1; what torchvision's and Kang et al.'s models were trained with."""
IMAGENET_STD = (0.229, 0.224, 0.225)
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
"""Of CIFAR's training images, as used by Cao et al. (NeurIPS 2019)."""
CIFAR_STD = (0.2023, 0.1994, 0.2010)

# torchvision draws from torch's one global generator, so that two threads with seeds must not draw at a time.
_drawing = threading.Lock()


def _forget_drawing() -> None:
    """A new lock for a child process: the old one may be held by a thread that the child does not have."""
    global _drawing
    _drawing = threading.Lock()


os.register_at_fork(after_in_child=_forget_drawing)


class ImageTransform:
    """Turns a PIL image into a float32 tensor [channels, height, width]; made by :func:`make_transform` and its shorthands.

    Can be pickled, so that it works in the workers of a ``DataLoader``. Two are equal if their descriptions are.

    Attributes:
        random: whether it draws: the same image then comes out differently each time.
    """

    random: bool

    def __init__(self, description: Mapping[str, Any]) -> None:
        kind, options = _checked(description)
        self._description = {"name": kind, **options}
        self.random = kind in _RANDOM
        self._mode = "L" if options["channels"] == 1 else "RGB"
        self._apply = _compose(kind, options)

    @property
    def description(self) -> dict[str, Any]:
        """All that says what the transform does; JSON can hold it, and :func:`make_transform` makes the same again."""
        return copy.deepcopy(self._description)

    def __call__(self, image: Image) -> Tensor:
        """Transform ``image``, of any number of channels; a random transform draws from torch's global generator."""
        if not hasattr(image, "convert"):
            raise TypeError(f"image must be a PIL image, got {type(image).__name__}")
        # Where the user's default device is a GPU, torchvision would draw there.
        with torch.device("cpu"):
            tensor: Tensor = self._apply(image.convert(self._mode))
        return tensor

    def seeded(self, image: Image, seed: int) -> Tensor:
        """Transform ``image``, drawing from ``seed`` alone: the same tensor in any process, and nobody else's draws disturbed.

        Args:
            image: a PIL image.
            seed: 0 or larger, below 2^63.
        """
        seed = check_integer(seed, "seed", minimum=0, maximum=2**63 - 1)
        if not self.random:
            return self(image)
        # Not torch.manual_seed, which would reseed the GPUs too, whose states are not put back.
        with _drawing, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self(image)

    def __eq__(self, other: object) -> bool:
        return self._description == other._description if isinstance(other, ImageTransform) else NotImplemented

    def __hash__(self) -> int:
        return hash(json.dumps(self._description, sort_keys=True))

    def __reduce__(self) -> tuple[type[ImageTransform], tuple[dict[str, Any]]]:
        return type(self), (self._description,)

    def __repr__(self) -> str:
        return f"ImageTransform({self._description})"


def test_transform(
    image_size: int = 224,
    resize: int = 256,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    channels: int = 3,
    *,
    interpolation: str = "bilinear",
    squash: bool = False,
) -> ImageTransform:
    """The usual test transform: shorter side to ``resize`` (antialiased), centre crop, 0..1, normalise.

    Args:
        image_size: side of the crop in pixels, 224 for ImageNet's models.
        resize: shorter side before, at least ``image_size``; 256 for ImageNet's models.
        mean: one value a channel, or a single one for all, in 0..1. Three for one channel are averaged.
        std: likewise, above 0.
        channels: 3, or 1 for gray; images of the other kind are converted.
        interpolation: of the resize: ``"bilinear"``, ``"bicubic"``, ``"nearest"`` or ``"lanczos"``.
        squash: resize both sides to ``resize``, whatever the image's shape.

    Raises:
        TypeError, ValueError: arguments of another type or out of range.
        ImportError: torchvision is not installed.

    Example:
        >>> from PIL import Image
        >>> transform = test_transform()
        >>> transform(Image.new("RGB", (400, 300))).shape, transform.random
        (torch.Size([3, 224, 224]), False)
    """
    return ImageTransform(
        dict(
            name="test",
            image_size=image_size,
            resize=resize,
            mean=mean,
            std=std,
            channels=channels,
            interpolation=interpolation,
            squash=squash,
        )
    )


# pytest takes whatever begins with test_, in any test file that imports it.
test_transform.__test__ = False  # type: ignore[attr-defined]


def train_transform(
    image_size: int = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    channels: int = 3,
    *,
    flip: bool = True,
    jitter: float = 0.4,
    interpolation: str = "bilinear",
) -> ImageTransform:
    """The training transform of Kang et al. (ICLR 2020): a crop of random size and place, flip, colour jitter, normalise.

    Args:
        image_size: side that the crop is resized to, in pixels. The crop takes 8% to 100% of the image's area at an aspect
            ratio of 3/4 to 4/3.
        mean: see :func:`test_transform`.
        std: see :func:`test_transform`.
        channels: 3, or 1 for gray.
        flip: mirror every other image, left to right.
        jitter: how far brightness, contrast and saturation are scaled, by a factor in 1 - jitter .. 1 + jitter; 0.4 there.
        interpolation: see :func:`test_transform`.

    Raises:
        TypeError, ValueError: arguments of another type or out of range.
        ImportError: torchvision is not installed.

    Example:
        >>> from PIL import Image
        >>> transform, image = train_transform(64), Image.new("RGB", (100, 80))
        >>> torch.equal(transform.seeded(image, 1), transform.seeded(image, 1)), transform.random
        (True, True)
    """
    return ImageTransform(
        dict(
            name="train",
            image_size=image_size,
            mean=mean,
            std=std,
            channels=channels,
            flip=flip,
            jitter=jitter,
            interpolation=interpolation,
        )
    )


def small_test_transform(
    image_size: int = 32, channels: int = 3, mean: Sequence[float] = (0.5,), std: Sequence[float] = (0.5,)
) -> ImageTransform:
    """For images of 28 to 64 pixels: resized and cropped at the centre if they have another size, then normalised.

    Args:
        image_size: side in pixels, 32 for CIFAR.
        channels: 3, or 1 for gray.
        mean: see :func:`test_transform`; 0.5 with a ``std`` of 0.5 maps 0..1 to -1..1. :data:`CIFAR_MEAN` where a model was
            trained with that.
        std: likewise.

    Raises:
        TypeError, ValueError: arguments of another type or out of range.
        ImportError: torchvision is not installed.

    Example:
        >>> from PIL import Image
        >>> small_test_transform(28, channels=1)(Image.new("L", (28, 28), 255)).unique()
        tensor([1.])
    """
    return ImageTransform(dict(name="small test", image_size=image_size, mean=mean, std=std, channels=channels))


def small_train_transform(
    image_size: int = 32,
    channels: int = 3,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
    *,
    padding: int | None = None,
    flip: bool = True,
) -> ImageTransform:
    """For images of 28 to 64 pixels: padded with black, cropped at random and flipped, the usual training of CIFAR.

    Args:
        image_size: side in pixels, 32 for CIFAR; images of another size are resized and cropped at the centre first.
        channels: 3, or 1 for gray.
        mean: see :func:`small_test_transform`.
        std: likewise.
        padding: pixels on each side. Default: an eighth of ``image_size``, CIFAR's 4 of 32.
        flip: mirror every other image, left to right; not for digits and letters.

    Raises:
        TypeError, ValueError: arguments of another type or out of range.
        ImportError: torchvision is not installed.

    Example:
        >>> from PIL import Image
        >>> small_train_transform(28, channels=1, flip=False)(Image.new("L", (28, 28))).shape
        torch.Size([1, 28, 28])
    """
    size = check_integer(image_size, "image_size", minimum=1)
    pad = size // 8 if padding is None else padding
    return ImageTransform(
        dict(name="small train", image_size=size, mean=mean, std=std, channels=channels, padding=pad, flip=flip)
    )


def make_transform(description: Mapping[str, Any]) -> ImageTransform:
    """Make the transform that has this :attr:`~ImageTransform.description`.

    Raises:
        TypeError, ValueError: no such transform, options that it does not have or lacks, or that are out of range.
        ImportError: torchvision is not installed.

    Example:
        >>> import json
        >>> text = json.dumps(test_transform(32, 36).description)
        >>> make_transform(json.loads(text)) == test_transform(32, 36)
        True
    """
    return ImageTransform(description)


_OPTIONS = {
    "test": ("image_size", "resize", "mean", "std", "channels"),
    "train": ("image_size", "mean", "std", "channels", "flip", "jitter"),
    "small test": ("image_size", "mean", "std", "channels"),
    "small train": ("image_size", "mean", "std", "channels", "padding", "flip"),
}
# What a description says only where it is something else.
_USUAL: dict[str, dict[str, Any]] = {
    "test": {"interpolation": "bilinear", "squash": False},
    "train": {"interpolation": "bilinear"},
}
_RANDOM = ("train", "small train")


def _checked(description: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and the options of a description, each in one form only, so that equal transforms have equal descriptions."""
    check_kind(description, Mapping, "description", what="a dict")
    kind: Any = description.get("name")
    check_choice(kind, "a transform's name", [*_OPTIONS])
    usual = _USUAL.get(kind, {})
    wanted, given = set(_OPTIONS[kind]), set(description) - {"name", *usual}
    if wanted != given:
        parts = (("lacks", wanted - given), ("has unknown", given - wanted))
        wrong = " and ".join(f"{verb} {', '.join(sorted(map(str, names)))}" for verb, names in parts if names)
        raise ValueError(f"the description of a {kind!r} transform {wrong}")
    channels = check_integer(description["channels"], "channels", minimum=1)
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    size = check_integer(description["image_size"], "image_size", minimum=1)
    checks: dict[str, Callable[[Any], Any]] = {
        "image_size": lambda _: size,
        "channels": lambda _: channels,
        "mean": lambda values: _per_channel(values, "mean", channels),
        "std": lambda values: _per_channel(values, "std", channels, above=0),
        "resize": lambda value: check_integer(value, "resize", minimum=size),
        "padding": lambda value: check_integer(value, "padding", minimum=0, maximum=size),
        "flip": lambda value: check_flag(value, "flip"),
        "jitter": lambda value: check_number(value, "jitter", minimum=0, maximum=1),
        "squash": lambda value: check_flag(value, "squash"),
    }
    check_choice(description.get("interpolation", "bilinear"), "interpolation", ["bilinear", "bicubic", "nearest", "lanczos"])
    unusual = {name: description[name] for name in usual if description.get(name, usual[name]) != usual[name]}
    options = {name: checks[name](description[name]) for name in _OPTIONS[kind]}
    return kind, {**options, **{name: checks.get(name, str)(value) for name, value in unusual.items()}}


def _per_channel(values: object, name: str, channels: int, above: float | None = None) -> list[float]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of numbers, got {values!r}")
    checked = [check_number(value, name, above=above) for value in values]
    if len(checked) == 1:
        return checked * channels
    if len(checked) == 3 and channels == 1:
        # Rounded, so that the same list does not give two descriptions on two platforms.
        return [round(sum(checked) / 3, 6)]
    if len(checked) != channels:
        raise ValueError(f"{name} must have a value for each of {channels} channels, or one for all, got {checked}")
    return checked


def _compose(kind: str, options: Mapping[str, Any]) -> Callable[[Any], Any]:
    v2 = require("torchvision.transforms.v2", "image transforms need", "'alphaext[vision]'")
    size = options["image_size"]
    way = v2.InterpolationMode(options.get("interpolation", "bilinear"))
    # All but the last three work on the PIL image, as the published models' pipelines did: Pillow's resize differs from that of
    # tensors in the last bits.
    steps: list[Any] = []
    if kind == "train":
        steps.append(v2.RandomResizedCrop(size, interpolation=way, antialias=True))
    else:
        resize = options.get("resize", size)
        steps.append(v2.Resize([resize, resize] if options.get("squash") else resize, interpolation=way, antialias=True))
        steps.append(v2.CenterCrop(size))
    if options.get("padding"):
        steps.append(v2.RandomCrop(size, padding=options["padding"]))
    if options.get("flip"):
        steps.append(v2.RandomHorizontalFlip())
    if options.get("jitter"):
        amount = options["jitter"]
        steps.append(v2.ColorJitter(brightness=amount, contrast=amount, saturation=amount, hue=0))
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(options["mean"], options["std"])]
    return v2.Compose(steps)
