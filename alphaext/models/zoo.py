"""Models by name: torchvision's, timm's, and a small network of this package's own."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.checks import check_integer
from ..utils.packages import require
from .huggingface import PREFIX, load_folder
from .split import SplitModel, find_classifier, linear_layers, split_model

__all__ = ["SmallConvNet", "SplitModel", "find_classifier", "make_model", "model_names", "split_model"]

# torchvision's builders warn that this default is going to change unless it is given.
_NEEDS_INIT_WEIGHTS = ("googlenet", "inception_v3")


class SmallConvNet(nn.Module):
    """Four convolutions for small images, 8 to 64 pixels wide, the mean over positions, and the classifier ``fc``.

    Its 192 features come from convolutions of 16, 48, 96 and 192 channels, kernels of 5, 3, 3 and 3 and strides of 2, 2, 2 and
    1, each followed by batch normalisation and ReLU.

    Args:
        num_classes: N.
        in_channels: of the images, default 3.

    Raises:
        TypeError, ValueError: a number that is not an integer of at least 1.

    Example:
        >>> SmallConvNet(10, in_channels=1)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        num_classes = check_integer(num_classes, "num_classes", minimum=1)
        in_channels = check_integer(in_channels, "in_channels", minimum=1)
        self.backbone = nn.Sequential(
            *_convolution(in_channels, 16, 5, 2),
            *_convolution(16, 48, 3, 2),
            *_convolution(48, 96, 3, 2),
            *_convolution(96, 192, 3, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.fc = nn.Linear(192, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.backbone(images))
        return logits


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def model_names() -> list[str]:
    """The names that :func:`make_model` takes: ``"small"`` and torchvision's classification models.

    timm's names are its own affair (``timm.list_models()``); here they begin with ``timm:``.

    Raises:
        ImportError: torchvision is not installed.

    Example:
        >>> [name for name in model_names() if name.startswith("resnet1")]
        ['resnet101', 'resnet152', 'resnet18']
    """
    models = _torchvision_models()
    return ["small", *models.list_models(module=models)]


def make_model(
    name: str,
    num_classes: int,
    *,
    in_channels: int = 3,
    pretrained: bool = False,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Make a classification model of a known architecture, on the CPU.

    Args:
        name: one of :func:`model_names`, as in ``"resnext50_32x4d"`` (ImageNet-LT in Kang et al., ICLR 2020) or ``"resnet152"``
            (Places-LT there); ``"timm:NAME"`` with timm installed; ``"hf:FOLDER"``, an image classifier that transformers'
            ``save_pretrained`` wrote, with its weights; or ``"module:function"``, a function of your own, found as Python finds
            modules, the working directory first, which gets ``num_classes`` if it takes it.
        num_classes: N, the outputs of the last layer.
        in_channels: of the images. Other than 3 only for ``"small"`` and for timm's models.
        pretrained: with the library's own weights (downloaded if they are not on this machine), and a new last layer where
            ``num_classes`` is not theirs. Default: random weights.
        seed: of the random weights. The global random state stays as it is.
        options: of the library's own function for the model, as in ``{"img_size": 64}`` or ``{"global_pool": "avg"}``.

    Returns:
        The model, in training mode, as torchvision and timm hand them out.

    Raises:
        ImportError: torchvision or timm is needed and not installed.
        ValueError: an unknown name (close ones are in the message), or ``in_channels`` that the model cannot take.
        OSError: the pretrained weights could not be had.

    Example:
        >>> model = make_model("resnet18", 5)
        >>> find_classifier(model), model.fc.out_features
        ('fc', 5)
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be text such as 'resnet50', got {name!r}")
    num_classes = check_integer(num_classes, "num_classes", minimum=1)
    in_channels = check_integer(in_channels, "in_channels", minimum=1)
    seed = check_integer(seed, "seed")
    known: dict[str, Callable[..., nn.Module]] = {"small": _make_small, "timm": _make_timm, "hf": _make_huggingface}
    make = known.get(name.partition(":")[0], _make_own if ":" in name else _make_torchvision)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        try:
            return make(name, num_classes, in_channels, pretrained, dict(options or {}))
        except (ImportError, TypeError, ValueError):
            raise
        except Exception as error:  # of a download: what urllib, ssl, huggingface_hub and the disk raise knows no limits
            if not pretrained:
                raise
            raise OSError(
                f"the pretrained weights of {name} could not be had: {type(error).__name__}: {error}; weights that are on this "
                "machine can be loaded as a checkpoint instead: make the model with pretrained=False and load its state dict"
            ) from error


def _make_small(_: str, num_classes: int, in_channels: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    if pretrained:
        raise ValueError("pretrained must be False for 'small', which has no pretrained weights")
    return SmallConvNet(num_classes, in_channels, **options)


def _torchvision_models() -> Any:
    return require("torchvision.models", "models by name, other than 'small', need", "'alphaext[vision]'")


def _make_torchvision(name: str, num_classes: int, in_channels: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    models, known = _torchvision_models(), model_names()
    if name not in known:
        raise ValueError(_unknown(name, known, "alphaext.models.model_names() lists all; timm's are written 'timm:NAME'"))
    if in_channels != 3:
        raise ValueError(f"in_channels must be 3 for torchvision's {name}, got {in_channels}; 'small' and timm: take others")
    if not pretrained:
        initial = {"init_weights": True} if name in _NEEDS_INIT_WEIGHTS else {}
        made: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **initial, **options)
        return made
    model: nn.Module = models.get_model(name, weights="DEFAULT", **options)
    _replace_classifiers(model, name, num_classes)
    return model


def _replace_classifiers(model: nn.Module, name: str, num_classes: int) -> None:
    """Give a pretrained model a new last layer, unless it has as many classes; and new auxiliary ones, if it has such."""
    last = find_classifier(model)
    outputs = model.get_submodule(last).out_features
    if outputs == num_classes:
        return
    auxiliary = [layer for layer in linear_layers(model) if name in _NEEDS_INIT_WEIGHTS and layer.endswith(("fc", "fc2"))]
    for layer in dict.fromkeys([last, *auxiliary]):
        old = model.get_submodule(layer)
        assert isinstance(old, nn.Linear)
        model.set_submodule(layer, nn.Linear(old.in_features, num_classes, bias=old.bias is not None))


def _make_timm(name: str, num_classes: int, in_channels: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    timm = require("timm", "models named 'timm:NAME' need", "'alphaext[timm]'")
    architecture = name.removeprefix("timm:")
    if not timm.is_model(architecture.split(".")[0]):
        raise ValueError(_unknown(name, [f"timm:{model}" for model in timm.list_models()], "timm.list_models() lists all"))
    options = {"pretrained": pretrained, "num_classes": num_classes, "in_chans": in_channels, **options}
    model: nn.Module = timm.create_model(architecture, **options)
    return model


def _make_huggingface(name: str, num_classes: int, _: int, __: bool, options: dict[str, Any]) -> nn.Module:
    if options:
        raise ValueError(f"options must not be given for {name!r}, whose own configuration says all, got {', '.join(options)}")
    model = load_folder(name.removeprefix(PREFIX))
    if model.config.num_labels != num_classes:
        raise ValueError(f"num_classes must be that of {name}, {model.config.num_labels}, got {num_classes}")
    return model


def _make_own(name: str, num_classes: int, _: int, __: bool, options: dict[str, Any]) -> nn.Module:
    module_name, _, function = name.partition(":")  # type: ignore[assignment]
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"backbone {name!r} cannot be imported: {error}") from error
    parameters = inspect.signature(make).parameters
    by_name = "num_classes" in parameters or any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values())
    # Where no parameter has that name, the first one without a value is taken for it.
    first = next((entry.name for entry in parameters.values() if entry.default is entry.empty), None)
    positional = () if by_name or first is None or first in options else (num_classes,)
    options = {"num_classes": num_classes, **options} if by_name else options
    try:
        model = make(*positional, **options)
    except TypeError as error:
        call = ", ".join([*map(str, positional), *(f"{key}={value!r}" for key, value in options.items())])
        raise TypeError(
            f"backbone {name!r} cannot be called as {function}({call}): {error}; it gets num_classes if it takes it"
        ) from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"backbone {name!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _unknown(name: str, known: list[str], how_to_list: str) -> str:
    # A name cut short comes before a name mistyped.
    close = [full for full in known if full.startswith(name)] + difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(list(dict.fromkeys(close))[:3])}? " if close else ""
    return f"name must be that of a known model, got {name!r}; {hint}{how_to_list}"
