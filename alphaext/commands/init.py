"""``alphaext init``: a configuration, filled in as far as data and checkpoint show."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console

import alphaext

from ..utils.files import check_output_file, whole_file
from . import results
from .options import Options, option
from .shared import PARTS

if TYPE_CHECKING:
    from torch import nn

_WEIGHTS = (".pth", ".pt", ".ckpt", ".tar", ".bin", ".safetensors")
_CLASSES = ("classes.txt", "class_names.txt", "labels.txt", "names.txt")
_TEXT_COLUMNS = ("text", "sentence", "question", "query", "utterance", "content", "review", "title")
_LABEL_COLUMNS = ("label", "labels", "category", "class", "intent", "target", "y")
_PART_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
# What a checkpoint's tensors are compared with, the most common first.
_KNOWN = (
    *("resnet50", "resnet18", "resnet34", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2"),
    *("efficientnet_b0", "efficientnet_v2_s", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "densenet121"),
    *("convnext_tiny", "convnext_small", "vit_b_16", "swin_t", "vgg16", "googlenet", "inception_v3"),
)


@dataclass(frozen=True, kw_only=True)
class Init(Options):
    """Look at data and checkpoint, and write a commented configuration, filled in as far as can be seen.

    Looks in a folder for lists or folders of images called train, val and test, for a file of weights, and for a model that
    transformers saved. What is not found stands in the file as a comment.

    Example:
        alphaext init . --checkpoint trained.pth
    """

    section: ClassVar[str] = "init"
    folder: Path = option(Path("."), positional=True, help="where to look")
    checkpoint: Path | None = option(None, help="the trained weights; without, the only such file in the folder")
    output: Path | None = option(None, metavar="FILE", help="the configuration; without, mine.toml in the folder")
    overwrite: bool = option(False, help="replace a file that is there")

    def run(self, console: Console | None = None) -> dict[str, Any]:
        """Look and write; returns what was found."""
        console = results.console_or_quiet(console)
        if not self.folder.is_dir():
            raise ValueError(f"folder must be a folder, got {str(self.folder)!r}")
        output = check_output_file(self.output or self.folder / "mine.toml", "output", overwrite=self.overwrite)
        found = self._look(console)
        with whole_file(output, overwrite=self.overwrite) as file:
            file.write(_configuration(found, output.absolute().parent).encode("utf-8"))
        for name, value in found.items():
            if name == "alike":
                text = f"other models have just these tensors, and may compute otherwise: {', '.join(value)}"
                console.print(text, markup=False, highlight=False, soft_wrap=True)
                continue
            console.print(f"{name}: {'not found' if value is None else value}", markup=False, highlight=False)
        if found["backbone"] is None:
            known = "" if found["checkpoint"] is None else ": the checkpoint's tensors are those of no model that is known here"
            console.print(
                f"backbone must be written in{known}; timm:NAME for timm's, module:function for your own",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        console.print(f"Configuration: {output}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"Look through it, then: alphaext repair --config {output}", markup=False, highlight=False)
        return {"configuration": str(output), **found}

    def _look(self, console: Console) -> dict[str, Any]:
        entries = sorted(self.folder.iterdir())
        parts = {part: _named(entries, names) for part, names in _PART_NAMES.items()}
        columns = next(
            (_columns(path) for path in parts.values() if path is not None and path.suffix in alphaext.data.TEXT_SUFFIXES), {}
        )
        classes = next((self.folder / name for name in _CLASSES if (self.folder / name).is_file()), None)
        root = next((_root(path, self.folder) for path in parts.values() if path is not None and path.is_file()), None)
        saved = next((path for path in [self.folder, *entries] if (path / "config.json").is_file()), None)
        weights = [path for path in entries if path.is_file() and path.suffix in _WEIGHTS]
        checkpoint = self.checkpoint
        if checkpoint is None and saved is None and len(weights) == 1:
            checkpoint = weights[0]
        backbone, channels = None if saved is None else f"hf:{saved}", 3
        alike: list[str] = []
        if checkpoint is not None:
            read = alphaext.checkpoints.read_checkpoint(checkpoint)
            names, channels = recognised(read, console), in_channels(read)
            backbone, alike = next(iter(names), None), names[1:]
        found = {**parts, "root": root, "classes": classes, **columns, "checkpoint": checkpoint, "backbone": backbone}
        return found | ({"channels": channels} if channels != 3 else {}) | ({"alike": alike} if alike else {})


def _named(entries: Iterable[Path], names: Sequence[str]) -> Path | None:
    """The folder, list or array file of one of these names; or a list in whose name one stands."""
    lists = [path for path in entries if path.is_file() and path.suffix in (".txt", ".npz", *alphaext.data.TEXT_SUFFIXES)]
    # A list comes before a folder, which may be what the list is of.
    exact = [path for path in [*lists, *filter(Path.is_dir, entries)] if path.stem.lower() in names]
    within = [path for path in lists if set(path.stem.lower().replace("-", "_").split("_")) & set(names)]
    return next(iter([*exact, *within]), None)


def _root(path: Path, folder: Path) -> Path | None:
    """Where the paths of a list file begin: the folder below which the first of them is there."""
    if path.suffix != ".txt":
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        name = file.readline().rpartition(" ")[0]
    places = [folder, path.parent, *(entry for entry in sorted(folder.iterdir()) if entry.is_dir())]
    return next((place for place in places if name and (place / name).is_file()), None)


def _columns(path: Path) -> dict[str, str]:
    """Which columns of a table hold texts and labels, where they are called otherwise than the options suppose."""
    names = list(alphaext.data.texts.read_rows(path)[0])
    likely = {"text_column": _TEXT_COLUMNS, "label_column": _LABEL_COLUMNS}
    found = {option: next((name for name in names if name.lower() in known), None) for option, known in likely.items()}
    return {option: name for option, name in found.items() if name is not None and name != likely[option][0]}


def recognised(checkpoint: alphaext.checkpoints.Checkpoint, console: Console | None = None) -> list[str]:
    """The names of the models that have just a checkpoint's tensors: the small network, a common one of torchvision's, or those
    of timm's, where these are installed."""
    import torch

    given = {name: tuple(value.shape) for name, value in checkpoint.backbone.items() if value.dim() > 0}
    channels = in_channels(checkpoint)

    def fits(name: str) -> bool:
        with torch.device("meta"):
            options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            try:
                model = alphaext.models.make_model(name, checkpoint.num_classes, in_channels=channels, options=options)
            except (ImportError, RuntimeError, TypeError, ValueError):
                return False
        return _shapes(model) == given

    own = next((name for name in ("small", *(_KNOWN if channels == 3 else ())) if fits(name)), None)
    if own is not None:
        return [own]
    if importlib.util.find_spec("timm"):
        results.console_or_quiet(console).print("No common torchvision model; looking through timm's, which may take a minute")
    likely = _likely_of_timm(checkpoint)
    found = next(filter(fits, likely), None)
    if found is None:
        return []
    # All others would take as long again; the same under another name is called alike.
    base = found.removeprefix("timm:").removeprefix("tf_")
    return [found, *(name for name in likely if base in name and fits(name))]


def in_channels(checkpoint: alphaext.checkpoints.Checkpoint) -> int:
    """How many channels the first convolution takes; 3 where there is none."""
    kernels = (value for value in checkpoint.backbone.values() if value.dim() == 4)
    first = next(kernels, None)
    return 1 if first is not None and first.shape[1] == 1 else 3


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors by their names, but for numbers and the classifier's."""
    layer = alphaext.models.find_classifier(model)
    state = {name: tuple(value.shape) for name, value in model.state_dict().items() if value.dim() > 0}
    return {name: shape for name, shape in state.items() if name not in (f"{layer}.weight", f"{layer}.bias")}


def _likely_of_timm(checkpoint: alphaext.checkpoints.Checkpoint) -> Iterator[str]:
    """The models of timm's whose first convolution and classifier are called as the checkpoint's, of families that call their
    tensors as it does."""
    import torch

    try:
        import timm
    except ImportError:
        return
    kinds = {re.sub(r"\d+", "0", name) for name in checkpoint.backbone}
    for family in timm.list_modules():
        likely = []
        for name in timm.list_models(module=family):
            known = timm.get_pretrained_cfg(name)
            firsts, layers = (
                [value] if isinstance(value, str) else list(value or ())
                for value in (getattr(known, "first_conv", None), getattr(known, "classifier", None))
            )
            if checkpoint.classifier in layers and all(f"{first}.weight" in checkpoint.backbone for first in firsts):
                likely.append(name)
        likely.sort(key=len)  # the plain ones first, which are more common and smaller
        for example in dict.fromkeys(likely[:: max(1, len(likely) // 2)]):
            with torch.device("meta"):
                own = {re.sub(r"\d+", "0", name) for name in timm.create_model(example, num_classes=2).state_dict()}
            if len(kinds & own) >= 0.5 * len(kinds | own):
                yield from (f"timm:{name}" for name in likely)
                break


_TEMPLATE = """\
# A configuration of alphaext: it serves all commands, and flags go over it. Paths are relative to this file.
# Run: alphaext repair --config {file}
features = "features"            # the folder of cached features

[data]
{train}  # a list file ('relative/path label' a line), a folder of class folders, an .npz of x and y, or a table of texts
{val}  # every choice is made on these
{test}  # and none on these
{root}  # where the paths of list files begin
{classes}  # the classes' names, one a line, in the order of the labels
{text_column}{label_column}few_below = 20                   # a class with fewer training images is few, and is repaired
# few_classes = ["lynx"]         # the few classes by name or number, instead of few_below
many_above = 100                 # a class with more is many

[model]
{backbone}  # torchvision's name, timm:NAME, hf:FOLDER, small, or module:function
{checkpoint}  # the trained weights
{channels}# image_size = 224               # what the network takes; images become that as its library says, where it does
"""


def _configuration(found: dict[str, Any], folder: Path) -> str:
    lines = {"file": "mine.toml"}
    for name in ("text_column", "label_column"):
        lines[name] = f"{name} = {json.dumps(found[name])}\n" if name in found else ""
    lines["channels"] = f"channels = {found['channels']}                     # grey images\n" if "channels" in found else ""
    for name in (*PARTS, "root", "classes", "backbone", "checkpoint"):
        value = found[name]
        lines[name] = f'# {name} = ""' if value is None else f"{name} = {json.dumps(_relative(str(value), folder))}"
    return _TEMPLATE.format(**lines)


def _relative(path: str, folder: Path) -> str:
    prefix, path = ("hf:", path[3:]) if path.startswith("hf:") else ("", path)
    absolute = Path(path).absolute()
    exists = Path(path).exists() and absolute.is_relative_to(folder)
    return prefix + (str(absolute.relative_to(folder)) if exists else path)
