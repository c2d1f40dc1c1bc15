"""Image classifiers of Hugging Face's transformers, from a folder on this machine: as models from images to logits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.files import PathLike, read_json
from ..utils.packages import require

PREFIX = "hf:"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class HuggingFaceImages(nn.Module):
    """An image classifier of transformers as a model from images to logits.

    Attributes:
        model: the model itself.
        config: its configuration.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


def load_folder(folder: PathLike) -> HuggingFaceImages:
    """An image classifier that ``save_pretrained`` wrote, with its weights, in float32; nothing is fetched, no code in it runs.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: there is no such folder, or no configuration in it.
        ValueError: it is no image classifier, or cannot be loaded.
    """
    path = _checked(folder)
    kinds = read_json(path / "config.json", "a model's configuration").get("architectures") or []
    if not any(str(kind).endswith("ForImageClassification") for kind in kinds):
        raise ValueError(
            f"backbone {PREFIX}{path} must be an image classifier, got {', '.join(map(str, kinds)) or 'no architecture'}; for "
            "other models there is alphaext.repair_model(model, loader) in Python"
        )
    transformers = require("transformers", "models named 'hf:FOLDER' need", "'alphaext[hf]'")
    load = transformers.AutoModelForImageClassification.from_pretrained
    try:
        return HuggingFaceImages(load(os.fspath(path), local_files_only=True, dtype=torch.float32))
    except Exception as error:  # what a library makes of foreign bytes knows no limits
        raise ValueError(f"backbone {PREFIX}{path} cannot be loaded: {type(error).__name__}: {error}") from error


def class_names_of(model: nn.Module) -> tuple[str, ...] | None:
    """The classes' names in a model's configuration (``id2label``), or None where it has none of its own."""
    labels = getattr(getattr(model, "config", None), "id2label", None) or {}
    names = tuple(str(labels.get(index)) for index in range(len(labels)))
    return None if names == tuple(f"LABEL_{index}" for index in range(len(names))) else names


def weights_of(folder: PathLike) -> Path:
    """The one file with a saved model's weights.

    Raises:
        FileNotFoundError: there is none.
        ValueError: they are in several.
    """
    path = _checked(folder)
    found = [path / name for name in _WEIGHTS if (path / name).is_file()]
    if found:
        return found[0]
    if any(path.glob("*.index.json")):
        raise ValueError(f"{str(path)!r} has its weights in several files; save_pretrained(max_shard_size='100GB') writes one")
    raise FileNotFoundError(f"there is no {' or '.join(_WEIGHTS)} in {str(path)!r}")


def copy_folder(folder: PathLike, output: PathLike, write: Callable[[Path], None], *, overwrite: bool = False) -> nn.Module:
    """Copy a saved model with other weights; transformers loads the copy before it takes its name.

    Args:
        folder: the saved model.
        output: the new folder.
        write: writes the weights' file at the path that it is given.
        overwrite: replace a folder that is there.

    Returns:
        The model that the new folder holds.
    """
    source, target, weights = _checked(folder), Path(output), weights_of(folder)
    if target.is_file() or not target.absolute().parent.is_dir():
        raise ValueError(f"output must be a folder in a directory that exists, got {str(target)!r}")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"output exists already: {str(target)!r}; give another name, or ask for it to be overwritten")
    if target.resolve() == source.resolve():
        raise ValueError(f"output must be another folder than the model's, got {str(target)!r}")
    temporary = target.absolute().with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        others = shutil.ignore_patterns(*_WEIGHTS, "*.msgpack", "*.h5", ".*")
        shutil.copytree(source, temporary, ignore=others)
        write(temporary / weights.name)
        loaded = load_folder(temporary)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        loaded.config._name_or_path = os.fspath(target)  # where its image processor is from now on
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return loaded


def _checked(folder: PathLike) -> Path:
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"backbone {PREFIX}FOLDER must name a folder that save_pretrained wrote, there is no config.json in {str(path)!r}"
        )
    return path
