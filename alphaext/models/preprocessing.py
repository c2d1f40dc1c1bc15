"""How a model wants its images, where its library or the files beside its weights say it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..utils.files import read_json
from ..utils.packages import require

_PROCESSOR = "preprocessor_config.json"
_RESAMPLINGS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclass(frozen=True)
class Preprocessing:
    """From an image file to what a model takes.

    Attributes:
        source: what says so.
        image_size: height and width that the model takes, pixels.
        resize_ratio: shorter side before the crop, as a multiple of ``image_size``.
        mean: of each channel, what is subtracted from values in 0..1.
        std: of each channel, what is divided by.
        interpolation: ``"bilinear"``, ``"bicubic"``, ``"nearest"`` or ``"lanczos"``.
        squash: whether both sides are resized alike, without a crop.
    """

    source: str
    image_size: int
    resize_ratio: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    squash: bool = False


def find_preprocessing(
    name: str | None, model: nn.Module | None = None, *, pretrained: bool = False, checkpoint: Path | None = None
) -> Preprocessing | None:
    """How a model wants its images.

    Args:
        name: as :func:`alphaext.models.make_model` takes it. timm says it of each of its models; torchvision of its
            ``pretrained`` weights, not of a model that somebody has trained.
        model: the model, in which a model of Hugging Face's transformers may be; its folder has the image processor.
        pretrained: whether the weights are the library's own.
        checkpoint: the file of the weights; an image processor may lie beside it.

    Returns:
        None where nothing says it.

    Raises:
        ValueError: a file of an image processor that is none.

    Example:
        >>> find_preprocessing("timm:vit_tiny_patch16_224").interpolation
        'bicubic'
    """
    for folder in _folders(model, checkpoint):
        if (folder / _PROCESSOR).is_file():
            try:
                return _of_processor(read_json(folder / _PROCESSOR, "an image processor"), str(folder / _PROCESSOR))
            except (AttributeError, TypeError, ZeroDivisionError) as error:
                raise ValueError(f"{folder / _PROCESSOR} is not an image processor: {error}") from error
    if name is not None and name.startswith("timm:"):
        return _of_timm(name.removeprefix("timm:"))
    if name is not None and pretrained and ":" not in name and name != "small":
        return _of_torchvision(name)
    return None


def _folders(model: nn.Module | None, checkpoint: Path | None) -> Iterator[Path]:
    if checkpoint is not None:
        yield checkpoint.parent
    for module in () if model is None else model.modules():
        named = getattr(getattr(module, "config", None), "_name_or_path", None)
        if isinstance(named, str) and named:
            yield Path(named)


def _of_timm(name: str) -> Preprocessing:
    timm: Any = require("timm", "models named 'timm:NAME' need", "timm")
    configuration = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    return Preprocessing(
        source=f"timm's for {name}",
        image_size=configuration["input_size"][-1],
        resize_ratio=1 / configuration["crop_pct"],
        mean=tuple(configuration["mean"]),
        std=tuple(configuration["std"]),
        interpolation=configuration["interpolation"],
        squash=configuration["crop_mode"] == "squash",
    )


def _of_torchvision(name: str) -> Preprocessing:
    from torchvision import models

    weights = models.get_model_weights(name)["DEFAULT"]
    transform = weights.transforms()
    return Preprocessing(
        source=f"torchvision's for {weights}",
        image_size=transform.crop_size[0],
        resize_ratio=transform.resize_size[0] / transform.crop_size[0],
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=transform.interpolation.value,
    )


def _of_processor(configuration: Mapping[str, Any], source: str) -> Preprocessing:
    size, crop = configuration.get("size", 224), configuration.get("crop_size")
    normalizes = configuration.get("do_normalize", True)
    shorter = size.get("shortest_edge", size.get("height", 224)) if isinstance(size, Mapping) else size
    crops = bool(configuration.get("do_center_crop", False)) and crop is not None
    side = crop.get("height", 224) if isinstance(crop, Mapping) else crop
    image_size: Any = side if crops else shorter
    return Preprocessing(
        source=source,
        image_size=int(image_size),
        resize_ratio=shorter / image_size,
        mean=tuple(configuration.get("image_mean", (0.5,))) if normalizes else (0.0,),
        std=tuple(configuration.get("image_std", (0.5,))) if normalizes else (1.0,),
        interpolation=_RESAMPLINGS.get(configuration.get("resample", 2), "bilinear"),
        squash=not crops,
    )
