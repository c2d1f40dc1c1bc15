"""Options that several commands take, and what they do with them."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import alphaext

from ..utils.checks import check_class_names, check_integer
from ..utils.files import read_text
from ..utils.text import did_you_mean
from .options import Options, option
from .results import plain_linear, read_classifier

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import nn

PARTS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class CommonOptions(Options):
    """What every command takes."""

    section: ClassVar[str] = ""
    seed: int = option(0, help="of everything random")
    device: str | None = option(None, help='"cpu", "cuda" or "cuda:1"; without, a GPU where there is one')
    progress: bool | None = option(None, help="show progress bars; without, where standard error is a terminal")
    quiet: bool = option(False, help="print neither progress nor results; warnings and errors all the same")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quiet:
            object.__setattr__(self, "progress", False)

    def always_shown(self) -> bool:
        """Whether long work shows how far it is: in a line now and then where standard error is no terminal."""
        return self.progress is not False

    def chosen_device(self) -> torch.device:
        """The device asked for, checked."""
        from ..utils.tensors import choose_device

        return choose_device(self.device)


@dataclass(frozen=True, kw_only=True)
class FeaturesOptions(Options):
    """The folder of cached features."""

    section: ClassVar[str] = ""
    features: Path = option(help="the folder of cached features, as 'alphaext extract' writes it (train, val, test in it)")

    def read(self, *parts: str) -> list[alphaext.features.Features]:
        """The features of these parts, which must be of the same network and classes."""
        found = alphaext.features.store.read_parts(self.features, *parts)
        return [found[part] for part in parts]

    def read_train_and_val(self) -> tuple[alphaext.features.Features, alphaext.features.Features | None]:
        """The training features, and those for validation where there are some."""
        if (self.features / "val").is_dir():
            train, val = self.read("train", "val")
            return train, val
        return self.read("train")[0], None


@dataclass(frozen=True, kw_only=True)
class SplitOptions(Options):
    """Which classes are few, medium and many."""

    section: ClassVar[str] = "data"
    few_below: int = option(20, help="a class with fewer training images is few")
    many_above: int = option(100, help="a class with more training images is many; those between are medium")

    def split(self, features: alphaext.features.Features) -> alphaext.ClassSplit:
        """The classes by the training features' labels."""
        return alphaext.split_classes(features.class_counts(), few_below=self.few_below, many_above=self.many_above)

    def split_to_repair(self, features: alphaext.features.Features) -> alphaext.ClassSplit:
        """The same, but an error where no class is few, or every one."""
        split, counts = self.split(features), features.class_counts()
        if len(split.few) == 0:
            raise ValueError(
                f"no class is few: few are those below few_below = {self.few_below} training images, and the smallest has "
                f"{int(counts[counts > 0].min())}"
            )
        if len(split.base) == 0:
            if getattr(self, "few_classes", None) is not None:
                raise ValueError("few_classes names every class; rows are composed of classes that are not few")
            raise ValueError(
                f"every class is few: few are those below few_below = {self.few_below} training images, and the largest has "
                f"{int(counts.max())}; rows are composed of classes that are not few"
            )
        return split


@dataclass(frozen=True, kw_only=True)
class FewClassesOptions(SplitOptions):
    """The same, where the user may say which classes are few."""

    section: ClassVar[str] = "data"
    few_classes: tuple[str, ...] | None = option(
        None,
        metavar="CLASS",
        help="the few classes, however many training images they have, instead of few_below: names, or numbers where no class "
        "has that name; several, or separated by commas",
    )

    def split(self, features: alphaext.features.Features) -> alphaext.ClassSplit:
        """The classes as they are named, the others by the training features' labels."""
        few = self.named_classes(features.num_classes, features.class_names)
        if few is None:
            return super().split(features)
        return alphaext.ClassSplit.of_few(few, features.class_counts(), self.many_above)

    def named_classes(self, num_classes: int, class_names: Sequence[str] | None) -> list[int] | None:
        """The ids of the few classes that are named, or None."""
        from ..utils.tensors import check_class_ids

        if self.few_classes is None:
            return None
        id_of = {name: number for number, name in enumerate(class_names or ())}
        ids = []
        for given in self.few_classes:
            # A name may have a comma in it.
            for word in [given] if given in id_of else filter(None, map(str.strip, given.split(","))):
                number = id_of.get(word)
                if number is None and word.isdecimal():
                    number = int(word)
                if number is None:
                    if not id_of:
                        raise ValueError(f"few_classes must be numbers where the classes have no names, got {word!r}")
                    raise ValueError(f"few_classes must name classes, {word!r} is none{did_you_mean(word, id_of)}")
                ids.append(number)
        if not ids:
            raise ValueError("few_classes must name a class, got none")
        checked: list[int] = check_class_ids(ids, num_classes, "few_classes").tolist()
        return checked


@dataclass(frozen=True, kw_only=True)
class DataOptions(SplitOptions):
    """Where images and labels are."""

    section: ClassVar[str] = "data"
    train: Path | None = option(
        None,
        metavar="SOURCE",
        help="training images: a list file ('relative/path label' a line), a folder of class folders, an .npz of x and y, "
        "cifar10:train or cifar100:train; for hf: models of texts a .csv, .json or .jsonl table",
    )
    val: Path | None = option(None, metavar="SOURCE", help="validation images, for every choice that is made")
    test: Path | None = option(None, metavar="SOURCE", help="test images; nothing is ever chosen on them")
    root: Path | None = option(None, metavar="FOLDER", help="where the paths of list files begin, or CIFAR lies")
    num_classes: int | None = option(None, help="classes there are, where the lists do not show all")
    classes: Path | None = option(None, metavar="FILE", help="the classes' names, one a line, in the order of the labels")
    text_column: str = option("text", metavar="NAME", help="the column of the texts, in tables of texts")
    label_column: str = option("label", metavar="NAME", help="the column of their labels: numbers from 0, or names of classes")
    imbalance_factor: float | None = option(
        None, help="cut the training images to a long tail: the largest class has X times the images of the smallest"
    )

    def images(
        self, part: str, *, num_classes: int | None = None, class_names: Sequence[str] | None = None
    ) -> alphaext.data.LabelledImages | None:
        """The images of a part, or None where the options name none; ``class_names`` order the folders of classes."""
        source: Path | None = getattr(self, part)
        if source is None:
            return None
        if self.classes is not None:
            class_names = read_text(self.classes, "the names of classes").split("\n")
            class_names = check_class_names([name.strip() for name in class_names if name.strip()], self.num_classes)
            num_classes = len(class_names)
        classes: dict[str, Any] = {"num_classes": num_classes if self.num_classes is None else self.num_classes}
        classes["class_names"] = class_names if source.is_dir() or _is_table(source) else None
        try:
            if _is_table(source):
                classes |= {"text_column": self.text_column, "label_column": self.label_column}
                images: alphaext.data.LabelledImages = alphaext.data.read_texts(source, **classes)
            else:
                root = None if source.is_dir() or source.suffix == ".npz" else self.root
                images = alphaext.data.open_images(os.fspath(source), root=root, part=part, **classes)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{part}: {error}") from error
        if images.class_names is None and class_names is not None and len(class_names) == images.num_classes:
            images.class_names = tuple(class_names)
        if part == "train" and self.imbalance_factor is not None:
            images = alphaext.data.make_long_tailed(images, self.imbalance_factor)  # no other part is cut
        return images

    def need(
        self, part: str, *, num_classes: int | None = None, class_names: Sequence[str] | None = None
    ) -> alphaext.data.LabelledImages:
        """The same, but an error where the options name none."""
        images = self.images(part, num_classes=num_classes, class_names=class_names)
        if images is None:
            raise ValueError(f"--{part} must be given, or {part} in [data] of the configuration: the {part} images")
        return images

    def class_order(self, names: Sequence[str] | None, num_classes: int | None = None) -> Sequence[str] | None:
        """The classes' names in the order of their labels: the model's ``names``, or else those of the training data.

        Data that know classes by their names alone (class folders, a column of names) follow the model's order where it has
        their names.
        """
        from ..doctor.labels import find_class_folders, names_of_classes

        if self.train is None:
            return names
        train = self.need("train", num_classes=num_classes)
        own = train.class_names
        if not (self.train.is_dir() or _is_table(self.train)):
            parts = {"train": train}
            folders = find_class_folders(parts)
            return names or names_of_classes(parts, folders, own, num_classes or train.num_classes)
        if self.classes is not None or own is None or names is None:
            return names if own is None else own
        unknown = [name for name in own if name not in names]
        if unknown and len(unknown) <= len(own) / 2:  # otherwise the two are not meant to be the same
            raise ValueError(
                f"train has a class {unknown[0]!r} that the model does not name{did_you_mean(unknown[0], names)} "
                "--classes, or classes in [data], gives the names in the order of the model"
            )
        return own if unknown else names


def _is_table(source: Path) -> bool:
    return source.suffix.lower() in alphaext.data.TEXT_SUFFIXES


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(Options):
    """The trained weights: where they are, which of them are the model's, and which layer is the classifier."""

    section: ClassVar[str] = "model"
    state: str | None = option(
        None,
        metavar="NAME",
        help="which of a checkpoint's dictionaries is the model, as in state_dict_ema; without, the usual one",
    )
    classifier_layer: str | None = option(None, metavar="NAME", help="the last linear layer's name; without, it is found")
    allow_chance: bool = option(False, help="go on where the classifier is no better than chance on its own images")
    backbone: str | None = option(
        None,
        metavar="NAME",
        help="a torchvision classification model (resnext50_32x4d, resnet152, ...), timm:NAME, hf:FOLDER as save_pretrained "
        "wrote it, small, or module:function",
    )
    checkpoint: Path | None = option(
        None, help="trained weights: .pth of any known layout, or .safetensors; without, those in hf:FOLDER"
    )

    @property
    def saved_model(self) -> Path | None:
        """The folder that transformers saved the backbone in, if it is such a one."""
        is_saved = self.backbone is not None and self.backbone.startswith("hf:")
        return Path(str(self.backbone).removeprefix("hf:")) if is_saved else None

    def read_checkpoint(self, num_classes: int | None = None) -> alphaext.checkpoints.Checkpoint:
        if self.checkpoint is None and self.saved_model is not None:
            from ..models.huggingface import load_folder, weights_of

            name = self.classifier_layer or alphaext.models.find_classifier(load_folder(self.saved_model))
            return alphaext.checkpoints.read_checkpoint(
                weights_of(self.saved_model), classifier=name.removeprefix("model."), num_classes=num_classes
            )
        if self.checkpoint is None:
            raise ValueError("--checkpoint must be given, or checkpoint in [model] of the configuration: the trained weights")
        layer, state = self.classifier_layer, self.state
        return alphaext.checkpoints.read_checkpoint(self.checkpoint, classifier=layer, num_classes=num_classes, state=state)

    def refuse_chance(self, finding: alphaext.doctor.Finding) -> None:
        """Raise what is an error, unless told otherwise; warn of what may be wrong."""
        text = f"{finding.title}: {finding.detail}"
        if finding.level == "error" and not self.allow_chance:
            raise ValueError(f"{text}; --allow-chance goes on all the same")
        if finding.level != "note":
            warnings.warn(text, stacklevel=2)

    def classifier_or_checkpoint(self, classifier: Path | None, num_classes: int | None) -> tuple[nn.Linear, Path]:
        """The classifier that is given, or else the checkpoint's, and where it is."""
        if classifier is not None:
            return read_classifier(classifier, num_classes, self.classifier_layer, self.state), classifier
        if self.checkpoint is None and self.saved_model is None:
            raise ValueError(
                "--classifier must be given, or checkpoint in [model] of the configuration: the trained classifier"
            )
        checkpoint = self.read_checkpoint(num_classes)
        return plain_linear(checkpoint), checkpoint.path


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(CheckpointOptions):
    """The trained classifier, in the command's own section."""

    classifier: Path | None = option(
        None,
        help="the trained classifier: a checkpoint of any layout, or a folder that a command wrote; without, --checkpoint",
    )


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Options):
    """Where results go, in the command's own section."""

    output: Path = option(metavar="FOLDER", help="where results go")
    overwrite: bool = option(False, help="replace results that are there")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(CheckpointOptions):
    """The network and its trained weights, and how an image becomes what the network takes."""

    section: ClassVar[str] = "model"
    transform: str | None = option(
        None,
        choices=("imagenet", "small"),
        help="imagenet: resize, centre crop, ImageNet's mean and deviation; small: for images of some 8 to 64 pixels; without, "
        "as the network's library says, else imagenet",
    )
    image_size: int | None = option(
        None, metavar="PIXELS", help="height and width that the network takes; without, as its library says, else 224"
    )
    resize: int | None = option(
        None, metavar="PIXELS", help="shorter side before the crop; without, as the library says, else 8/7 of the image size"
    )
    channels: int = option(3, help="3 for colour, 1 for grey")
    mean: tuple[float, ...] | None = option(None, help="of each channel, what is subtracted; without, the transform's own")
    std: tuple[float, ...] | None = option(None, help="of each channel, what is divided by")
    model_options: tuple[str, ...] = option(
        (), metavar="NAME=VALUE", help="what the library's function for the model takes besides, as in img_size=64"
    )
    max_length: int | None = option(
        None, metavar="TOKENS", help="where a text is cut, for hf: models of texts; without, as the model says, at most 512"
    )
    pretrained: bool = option(False, help="start from weights that torchvision or timm publishes")

    def model(self, num_classes: int, seed: int = 0) -> nn.Module:
        """The network, its weights random (from ``seed``) or published."""
        if self.backbone is None:
            raise ValueError("--backbone must be given, or backbone in [model] of the configuration: the network's name")
        options = dict(map(_named_value, self.model_options))
        return alphaext.models.make_model(
            self.backbone, num_classes, in_channels=self.channels, pretrained=self.pretrained, seed=seed, options=options
        )

    def preprocessing(self, model: nn.Module) -> alphaext.models.Preprocessing | None:
        """How the network wants its images, where that is known and no transform is asked for."""
        if self.transform is not None:
            return None
        return alphaext.models.find_preprocessing(
            self.backbone, model, pretrained=self.pretrained and self.checkpoint is None, checkpoint=self.checkpoint
        )

    def accuracy(self, model: alphaext.models.SplitModel, images: alphaext.data.LabelledImages) -> alphaext.doctor.Finding:
        """Whether the network knows some of its images, as they are transformed; and better in another likely way."""
        transform, progress = self.test_transform(model.model), getattr(self, "progress", None)
        if self._tokens(model.model) is not None:
            return alphaext.doctor.check_accuracy(model, images, transform, progress=progress)
        size = self._of_images(model.model)["image_size"]
        others = alphaext.doctor.other_transforms(transform, size, self.channels, small=self.transform == "small")
        return alphaext.doctor.check_accuracy(model, images, transform, others, progress=progress)

    def test_transform(self, model: nn.Module) -> alphaext.data.Transform:
        """For the network's features and accuracies."""
        tokens = self._tokens(model)
        if tokens is not None:
            return tokens
        options = self._of_images(model)
        if self.transform == "small":
            return alphaext.data.small_test_transform(**options)
        known, size = self.preprocessing(model), options["image_size"]
        resize = round(size * 8 / 7)
        if known is not None:
            options["squash"], resize = known.squash, max(size, math.floor(size * known.resize_ratio))
        return alphaext.data.test_transform(resize=resize if self.resize is None else self.resize, **options)

    def train_transform(self, model: nn.Module) -> alphaext.data.ImageTransform:
        """For the network's training."""
        if self._tokens(model) is not None:
            raise ValueError("texts are not augmented: passes must be 1, and models of texts are trained elsewhere")
        make = alphaext.data.small_train_transform if self.transform == "small" else alphaext.data.train_transform
        return make(**self._of_images(model))

    def tell_transform(self, console: Console, transform: alphaext.data.Transform, model: nn.Module) -> None:
        """Say once how images are transformed, and who says so."""
        known = self.preprocessing(model)
        if self._tokens(model) is not None:
            length = transform.description["max_length"]
            text = f"Texts are cut at {length} tokens, by the tokenizer in {self.saved_model}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
            return
        source = "as the options say" if known is None else known.source
        description = ", ".join(f"{name} {value}" for name, value in transform.description.items() if name != "name")
        console.print(f"Images are transformed ({source}): {description}", markup=False, highlight=False, soft_wrap=True)

    def _tokens(self, model: nn.Module) -> Any:
        """How a model of texts wants them; None of a model of images."""
        from ..models.huggingface import HuggingFaceTexts, Tokens

        return Tokens(self.saved_model, self.max_length) if self.saved_model and isinstance(model, HuggingFaceTexts) else None

    def _of_images(self, model: nn.Module) -> dict[str, Any]:
        known = self.preprocessing(model)
        options: dict[str, Any] = {"image_size": 224}
        if known is not None:
            options = {name: getattr(known, name) for name in ("image_size", "mean", "std", "interpolation")}
        given = {name: getattr(self, name) for name in ("image_size", "mean", "std") if getattr(self, name) is not None}
        return {**options, **given, "channels": self.channels}

    def load(self, model: nn.Module, checkpoint: alphaext.checkpoints.Checkpoint) -> None:
        """Give a model, in eval mode from then on, a checkpoint's weights; of one with other classes the backbone alone."""
        layer = self.classifier_layer or alphaext.models.find_classifier(model.eval(), self.example(model))
        num_classes = model.get_submodule(layer).out_features
        if num_classes == checkpoint.num_classes:
            checkpoint.load_into(model, layer)
            return
        checkpoint.load_backbone_into(model, layer)
        warnings.warn(
            f"{checkpoint.path} has {checkpoint.num_classes} classes, the data {num_classes}: its backbone is taken, and the "
            f"last layer, {layer}, is new",
            stacklevel=2,
        )

    def trained_model(self, num_classes: int | None, device: torch.device) -> alphaext.models.SplitModel:
        """The network with the checkpoint's weights, its last linear layer found and checked on a batch of noise."""
        if self.checkpoint is not None or not self.pretrained:
            checkpoint = self.read_checkpoint(num_classes)
            model = self.model(len(checkpoint.weight))
            if self.checkpoint is not None:  # a saved model has its weights already
                self.load(model, checkpoint)
        elif num_classes is None:
            raise ValueError("--num-classes must be given with --pretrained, or num_classes in [data] of the configuration")
        else:
            model = self.model(num_classes)
        example = self.example(model).to(device)
        return alphaext.models.split_model(model.to(device).eval(), self.classifier_layer, example)

    def class_names(self, model: nn.Module) -> Sequence[str] | None:
        """The classes' names in the order of the network's scores, where its configuration or its checkpoint has them."""
        from ..models.huggingface import class_names_of

        return class_names_of(model) or (None if self.checkpoint is None else self.read_checkpoint().class_names)

    def example(self, model: nn.Module) -> torch.Tensor:
        """A batch of two images, or texts, of noise."""
        from ..utils.seeds import noise

        if self._tokens(model) is not None:
            return noise(2, 2, 8)
        size = check_integer(self._of_images(model)["image_size"], "image_size", minimum=1)
        return noise(2, check_integer(self.channels, "channels", minimum=1), size, size)


def _named_value(text: str) -> tuple[str, Any]:
    """``name=value`` as a name and a number, a truth or a text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ValueError(f"model_options must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
