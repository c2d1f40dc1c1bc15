"""Options that several commands take, and what they do with them."""

from __future__ import annotations

import importlib
import itertools
import os
import pickle
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console

from ..utils.checks import check_integer
from ..utils.environment import RESULT_DEPENDS_ON, versions
from ..utils.files import folder_lock, read_json, write_json
from .options import Options, option

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..checkpoints import Checkpoint
    from ..classes import ClassSplit
    from ..data.sources import LabelledImages
    from ..data.transforms import ImageTransform
    from ..features.store import Features
    from ..head.alphanet import AlphaNet
    from ..models.zoo import SplitModel

PARTS = ("train", "val", "test")
RESULT, RUN, CLASSIFIER, HEAD = "result.json", "run.json", "classifier.pth", "head.pt"


@dataclass(frozen=True, kw_only=True)
class CommonOptions(Options):
    """What every command takes."""

    section: ClassVar[str] = ""
    seed: int = option(0, help="of everything random")
    device: str | None = option(None, help='"cpu", "cuda" or "cuda:1"; without, a GPU where there is one')
    progress: bool | None = option(None, help="show progress bars; without, where standard error is a terminal")


@dataclass(frozen=True, kw_only=True)
class FeaturesOptions(Options):
    """The folder of cached features."""

    section: ClassVar[str] = ""
    features: Path = option(help="the folder of cached features, as 'alphaext extract' writes it (train, val, test in it)")


@dataclass(frozen=True, kw_only=True)
class SplitOptions(Options):
    """Which classes are few, medium and many."""

    section: ClassVar[str] = "data"
    few_below: int = option(20, help="a class with fewer training images is few")
    many_above: int = option(100, help="a class with more training images is many; those between are medium")

    def split(self, features: Features) -> ClassSplit:
        """The classes by the training features' labels."""
        from ..classes import split_classes

        return split_classes(features.class_counts(), few_below=self.few_below, many_above=self.many_above)


@dataclass(frozen=True, kw_only=True)
class DataOptions(SplitOptions):
    """Where images and labels are."""

    section: ClassVar[str] = "data"
    train: Path | None = option(
        None,
        metavar="SOURCE",
        help="training images: a list file ('relative/path label' a line), a folder of class folders, an .npz of x and y, "
        "or cifar10:train, cifar100:train",
    )
    val: Path | None = option(None, metavar="SOURCE", help="validation images, for every choice that is made")
    test: Path | None = option(None, metavar="SOURCE", help="test images; nothing is ever chosen on them")
    root: Path | None = option(None, metavar="FOLDER", help="where the paths of list files begin, or CIFAR lies")
    num_classes: int | None = option(None, help="classes there are, where the lists do not show all")
    imbalance_factor: float | None = option(
        None, help="cut the training images to a long tail: the largest class has X times the images of the smallest"
    )

    def images(
        self, part: str, *, num_classes: int | None = None, class_names: Sequence[str] | None = None
    ) -> LabelledImages | None:
        """The images of a part, or None where the options name none; ``class_names`` order the folders of classes."""
        from ..data.long_tailed import make_long_tailed
        from ..data.sources import open_images

        source = getattr(self, part)
        if source is None:
            return None
        classes = self.num_classes if self.num_classes is not None else num_classes
        try:
            names = class_names if source.is_dir() else None
            root = None if source.is_dir() or source.suffix == ".npz" else self.root
            images = open_images(os.fspath(source), root=root, num_classes=classes, class_names=names)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{part}: {error}") from error
        if part == "train" and self.imbalance_factor is not None:
            images = make_long_tailed(images, self.imbalance_factor)  # no other part is cut
        return images

    def need(self, part: str, *, num_classes: int | None = None, class_names: Sequence[str] | None = None) -> LabelledImages:
        """The same, but an error where the options name none."""
        images = self.images(part, num_classes=num_classes, class_names=class_names)
        if images is None:
            raise ValueError(f"--{part} must be given, or {part} in [data] of the configuration: the {part} images")
        return images


@dataclass(frozen=True, kw_only=True)
class LayerOptions(Options):
    """Which layer of a checkpoint is the classifier."""

    section: ClassVar[str] = "model"
    classifier_layer: str | None = option(None, metavar="NAME", help="the last linear layer's name; without, it is found")


@dataclass(frozen=True, kw_only=True)
class TransformOptions(Options):
    """How an image becomes what the network takes."""

    section: ClassVar[str] = "model"
    transform: str = option(
        "imagenet",
        choices=("imagenet", "small"),
        help="imagenet: resize, centre crop, ImageNet's mean and deviation; small: for images of some 8 to 64 pixels",
    )
    image_size: int = option(224, metavar="PIXELS", help="height and width that the network takes")
    resize: int | None = option(None, metavar="PIXELS", help="shorter side before the crop; without, 8/7 of the image size")
    channels: int = option(3, help="3 for colour, 1 for grey")
    mean: tuple[float, ...] | None = option(None, help="of each channel, what is subtracted; without, the transform's own")
    std: tuple[float, ...] | None = option(None, help="of each channel, what is divided by")

    def test_transform(self) -> ImageTransform:
        from ..data import transforms

        if self.transform == "small":
            return transforms.small_test_transform(self.image_size, **self._of_channels())
        resize = self.resize if self.resize is not None else round(self.image_size * 8 / 7)
        return transforms.test_transform(self.image_size, resize=resize, **self._of_channels())

    def train_transform(self) -> ImageTransform:
        from ..data import transforms

        make = transforms.small_train_transform if self.transform == "small" else transforms.train_transform
        return make(self.image_size, **self._of_channels())

    def _of_channels(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in ("mean", "std") if getattr(self, name) is not None}
        return {"channels": self.channels, **given}


@dataclass(frozen=True, kw_only=True)
class ModelOptions(TransformOptions, LayerOptions):
    """The network and its trained weights."""

    section: ClassVar[str] = "model"
    backbone: str | None = option(
        None,
        metavar="NAME",
        help="a torchvision classification model (resnext50_32x4d, resnet152, ...), timm:NAME, small, or module:function",
    )
    checkpoint: Path | None = option(None, help="trained weights: .pth of any known layout, or .safetensors")
    pretrained: bool = option(False, help="start from weights that torchvision or timm publishes")

    def model(self, num_classes: int, seed: int = 0) -> nn.Module:
        """The network, its weights random (from ``seed``) or published."""
        from ..models.zoo import make_model

        if self.backbone is None:
            raise ValueError("--backbone must be given, or backbone in [model] of the configuration: the network's name")
        if ":" in self.backbone and not self.backbone.startswith("timm:"):
            return _own_model(self.backbone, num_classes, seed)
        return make_model(self.backbone, num_classes, in_channels=self.channels, pretrained=self.pretrained, seed=seed)

    def read_checkpoint(self, num_classes: int | None = None) -> Checkpoint:
        from ..checkpoints import read_checkpoint

        if self.checkpoint is None:
            raise ValueError("--checkpoint must be given, or checkpoint in [model] of the configuration: the trained weights")
        return read_checkpoint(self.checkpoint, classifier=self.classifier_layer, num_classes=num_classes)

    def trained_model(self, num_classes: int | None, device: torch.device) -> SplitModel:
        """The network with the checkpoint's weights, its last linear layer found and checked on a batch of noise."""
        from ..models.zoo import find_classifier, split_model

        example = self.example().to(device)
        if self.checkpoint is None and self.pretrained:
            if num_classes is None:
                raise ValueError("--num-classes must be given with --pretrained, or num_classes in [data] of the configuration")
            model = self.model(num_classes).to(device).eval()
        else:
            checkpoint = self.read_checkpoint(num_classes)
            model = self.model(len(checkpoint.weight)).eval()
            checkpoint.load_into(model, self.classifier_layer or find_classifier(model, self.example()))
            model = model.to(device)
        return split_model(model, self.classifier_layer, example)

    def example(self) -> torch.Tensor:
        """A batch of two images of noise."""
        from ..utils.seeds import noise

        check_integer(self.image_size, "image_size", minimum=1)
        check_integer(self.channels, "channels", minimum=1)
        return noise(2, self.channels, self.image_size, self.image_size)


def _own_model(name: str, num_classes: int, seed: int) -> nn.Module:
    """A network made by a function of the user's own, found as Python finds modules, the working directory first."""
    import torch
    from torch import nn

    module_name, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"backbone {name!r} cannot be imported: {error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(num_classes)
    if not isinstance(model, nn.Module):
        raise TypeError(f"backbone {name!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def choose_device(name: str | None) -> torch.device:
    """The device asked for, checked; without a name a GPU where there is one."""
    import torch

    from ..utils.tensors import check_device

    device = check_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f'device must be "cpu", "cuda" or "cuda:NUMBER", got {name!r}')
    return device


def read_train_and(folder: Path, part: str, *, optional: bool = False) -> tuple[Features, Features | None]:
    """The training features and those of another part, which must be of the same network and classes."""
    from ..features.store import read_parts

    if optional and not (folder / part).is_dir():
        return read_parts(folder, "train")["train"], None
    found = read_parts(folder, "train", part)
    return found["train"], found[part]


def read_classifier(path: Path, num_classes: int | None = None, layer: str | None = None) -> nn.Linear:
    """A classifier from a checkpoint of any layout, or from the folder that 'baseline', 'fit' or 'train' wrote."""
    from ..checkpoints import read_checkpoint

    if path.is_dir():
        if not (path / RESULT).is_file():
            raise FileNotFoundError(
                f"classifier must be a checkpoint or a folder of finished results, there is no {RESULT} in {str(path)!r}"
            )
        inside = [path / name for name in (CLASSIFIER, "model.pth") if (path / name).is_file()]
        if not inside:
            raise FileNotFoundError(f"classifier must be a folder with {CLASSIFIER} or model.pth, {str(path)!r} has neither")
        path = inside[0]
    checkpoint = read_checkpoint(path, classifier=layer, num_classes=num_classes)
    if checkpoint.feature_normalization != "none":
        raise ValueError(
            f"{str(path)!r} wants its {checkpoint.experts} experts' features at length 1, which cached ones are not: prepare "
            "them with Checkpoint.prepare_features and alphaext.features.write_features, and save its linear() with "
            "alphaext.checkpoints.save_linear"
        )
    return checkpoint.linear()


def warn_of_other_features(linear: nn.Linear, features: Features, name: str) -> None:
    """Warn where a classifier knows none of the classes by their features: then it is not of them, or counts otherwise."""
    from ..doctor.check import check_classifier_order

    finding = check_classifier_order(linear.cpu(), features.features, features.labels, class_names=features.class_names)
    if finding.level == "error":
        warnings.warn(f"{name}: {finding.title}: {finding.detail}", stacklevel=2)


def classifier_name(path: Path) -> str:
    """How a classifier is called in tables: its folder's name, or its file's without the ending."""
    return path.resolve().name if path.is_dir() else path.stem


class OutputFolder:
    """A command's folder of results, held against other processes; :func:`output_folder` opens one.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def clear(self) -> None:
        """Remove what an earlier command left, right before new results are written: no reader may take old for new."""
        tables = []
        if (self.path / RESULT).is_file():
            tables = [str(name) for name in read_result(self.path).get("tables", [])]
        for name in (RESULT, RUN, CLASSIFIER, HEAD, *tables):
            if Path(name).name == name:
                (self.path / name).unlink(missing_ok=True)


@contextmanager
def output_folder(folder: Path, *files: str, overwrite: bool, lock: bool = True) -> Iterator[OutputFolder]:
    """Make a command's folder of results and hold it; files that are there already stay unless ``overwrite``.

    Args:
        folder: made if need be; until then nothing is touched.
        files: what the command will write beside its result.
        overwrite: whether files of these names may be replaced, which happens when new ones are written and not before.
        lock: hold the folder; not for commands whose work does so itself.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output must be a folder, got the file {str(folder)!r}")
    there = [name for name in (RESULT, RUN, *files) if (folder / name).exists()]
    if there and not overwrite:
        raise ValueError(
            f"output holds results already: there is {there[0]} in {str(folder)!r}; give another folder, or --overwrite"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder, "results") if lock else nullcontext():
        yield OutputFolder(folder)


def write_results(folder: Path, command: str, options: Options, result: dict[str, Any], started: float) -> None:
    """Write what came of a command beside how it came about: the result last, since its presence says that all is there."""
    write_json(
        folder / RUN,
        {
            "command": command,
            "options": options.to_dict(),
            "versions": versions(*RESULT_DEPENDS_ON),
            "platform": platform.platform(),
            "processors": os.cpu_count(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": time.monotonic() - started,
        },
    )
    write_json(folder / RESULT, result)


def read_result(folder: Path) -> dict[str, Any]:
    return read_json(folder / RESULT, "a result of alphaext")


def console_or_quiet(console: Console | None) -> Console:
    return console if console is not None else Console(quiet=True)


def read_head(path: Path) -> AlphaNet | None:
    """The Alpha Net of a folder that 'alphaext fit' wrote; None for every other classifier."""
    import torch

    from ..head.alphanet import AlphaNet

    file = path / HEAD
    if not file.is_file():
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{str(file)!r} is not the state of an Alpha Net: {error}") from error
    return AlphaNet.from_state_dict(state)


def classifier_names(paths: Sequence[Path]) -> list[str]:
    """A name for each classifier, no two alike; they become names of files."""
    names: list[str] = []
    for path in paths:
        name = classifier_name(path)
        same = [other for other in paths if classifier_name(other) == name]
        if len(same) > 1 and path.absolute().parent.name:
            name = f"{path.absolute().parent.name}-{name}"
        repeated = (f"{name}-{number}" for number in itertools.count(2))
        names.append(next(each for each in itertools.chain([name], repeated) if each not in names))
    return names


def is_main_process() -> bool:
    """Whether this is the one of torchrun's processes that writes files and talks to the user."""
    return not started_by_torchrun() or os.environ.get("RANK", "0") == "0"


def started_by_torchrun() -> bool:
    """Whether there are several processes."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")
