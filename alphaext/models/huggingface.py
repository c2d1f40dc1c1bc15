"""Classifiers of Hugging Face's transformers, from a folder on this machine: of images or texts, as models from one tensor to
logits."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.checks import check_integer
from ..utils.files import PathLike, check_output_folder, read_json, whole_folder
from ..utils.packages import require

PREFIX = "hf:"
_TOKENIZER = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "special_tokens", "added_tokens")
_MAX_LENGTH = 512
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class HuggingFaceModel(nn.Module):
    """A classifier of transformers as a model from one tensor to logits.

    Attributes:
        model: the classifier itself.
        config: its configuration.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config

    def names_in_files(self) -> dict[str, str]:
        """What ``save_pretrained`` calls tensors of the state dict otherwise than the module does, by their names here.

        transformers 5 has modules of other names than 4, and keeps writing those of 4.
        """
        try:
            from transformers.core_model_loading import revert_weight_conversion
        except ImportError:
            return {}
        model: Any = self.model
        own = model.state_dict()
        name_of = {id(tensor): name for name, tensor in own.items()}
        renamed = revert_weight_conversion(model, own)
        pairs = ((name_of.get(id(tensor)), name) for name, tensor in renamed.items())
        return {f"model.{name}": f"model.{other}" for name, other in pairs if name is not None and name != other}


class HuggingFaceImages(HuggingFaceModel):
    """An image classifier: of images ``[n, C, H, W]``."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


class HuggingFaceTexts(HuggingFaceModel):
    """A text classifier: of tokens ``[n, 2, T]`` as :class:`Tokens` makes them."""

    def forward(self, tokens: Tensor) -> Tensor:
        # Models are tried on noise: each of its numbers must become a token's.
        ids, mask = tokens[:, 0].long().clamp(min=0), tokens[:, 1] > 0
        used = mask.any(dim=0).nonzero().flatten().tolist() or [0]
        columns = slice(used[0], used[-1] + 1)  # what is padding in all texts takes time and changes nothing
        logits: Tensor = self.model(input_ids=ids[:, columns], attention_mask=mask[:, columns].long()).logits
        return logits


class Tokens:
    """Turns a text into float32 ``[2, max_length]``: the numbers of its tokens, and 1 where there is one, 0 for padding.

    Floating point, exact for as many tokens as any tokenizer has, is what the rest of the package takes for images too.

    Attributes:
        description: the tokenizer, by a digest of its files, and the longest text; JSON can hold it.
    """

    random = False

    def __init__(self, folder: PathLike, max_length: int | None = None) -> None:
        path = _checked(folder)
        transformers = require("transformers", "models named 'hf:FOLDER' need", "'alphaext[hf]'")
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(os.fspath(path), local_files_only=True)
        except Exception as error:  # what a library makes of foreign bytes knows no limits
            raise ValueError(
                f"there is no tokenizer in {str(path)!r}, where save_pretrained of a tokenizer writes it: "
                f"{type(error).__name__}: {error}"
            ) from error
        if self._tokenizer.pad_token is None:
            raise ValueError(
                f"the tokenizer in {str(path)!r} must have a pad_token, it has none; tokenizer.pad_token = tokenizer.eos_token "
                "gives it one before save_pretrained"
            )
        positions = getattr(
            transformers.AutoConfig.from_pretrained(path, local_files_only=True), "max_position_embeddings", None
        )
        own = min(self._tokenizer.model_max_length, positions or _MAX_LENGTH, _MAX_LENGTH)
        digest = hashlib.sha256()
        for file in sorted(path.iterdir()):
            if file.name.startswith(_TOKENIZER) and file.is_file():
                digest.update(file.name.encode() + file.read_bytes())
        length = own if max_length is None else check_integer(max_length, "max_length", minimum=1)
        self.description = {"name": "tokens", "tokenizer": digest.hexdigest(), "max_length": length}

    def __call__(self, text: str) -> Tensor:
        length = self.description["max_length"]
        made = self._tokenizer(text, truncation=True, max_length=length, padding="max_length")
        return torch.tensor([made["input_ids"], made["attention_mask"]], dtype=torch.float32, device="cpu")


_KINDS: dict[str, type[HuggingFaceModel]] = {
    "ForImageClassification": HuggingFaceImages,
    "ForSequenceClassification": HuggingFaceTexts,
}


def load_folder(folder: PathLike) -> HuggingFaceModel:
    """A classifier that ``save_pretrained`` wrote, with its weights, in float32; nothing is fetched, no code in it runs.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: there is no such folder, or no configuration in it.
        ValueError: it is no classifier of images or texts, or cannot be loaded.
    """
    path = _checked(folder)
    kinds = read_json(path / "config.json", "a model's configuration").get("architectures") or []
    kind = next((ending for ending in _KINDS if any(str(kind).endswith(ending) for kind in kinds)), None)
    if kind is None:
        raise ValueError(
            f"backbone {PREFIX}{path} must be a classifier of images or texts, got "
            f"{', '.join(map(str, kinds)) or 'no architecture'}; for other models there is "
            "alphaext.repair_model(model, loader) in Python"
        )
    transformers = require("transformers", "models named 'hf:FOLDER' need", "'alphaext[hf]'")
    load = getattr(transformers, f"AutoModel{kind}").from_pretrained
    try:
        with _without_bars(transformers.utils.logging):
            model = load(os.fspath(path), local_files_only=True, dtype=torch.float32)
            if kind == "ForSequenceClassification" and getattr(model.config, "pad_token_id", None) is None:
                # Trained a text at a time: those that read the last token must know padding from it.
                with suppress(Exception):
                    tokenizer = transformers.AutoTokenizer.from_pretrained(os.fspath(path), local_files_only=True)
                    model.config.pad_token_id = tokenizer.pad_token_id
            return _KINDS[kind](model)
    except Exception as error:  # what a library makes of foreign bytes knows no limits
        raise ValueError(f"backbone {PREFIX}{path} cannot be loaded: {type(error).__name__}: {error}") from error


@contextmanager
def _without_bars(logging: Any) -> Iterator[None]:
    """A block in which transformers shows no progress bar: to load a file takes a moment."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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
    check_output_folder(target, "output")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"output exists already: {str(target)!r}; give another name, or ask for it to be overwritten")
    if target.resolve() == source.resolve():
        raise ValueError(f"output must be another folder than the model's, got {str(target)!r}")
    with whole_folder(target) as temporary:
        others = shutil.ignore_patterns(*_WEIGHTS, "*.msgpack", "*.h5", ".*")
        shutil.copytree(source, temporary, ignore=others, dirs_exist_ok=True)
        write(temporary / weights.name)
        loaded = load_folder(temporary)
        shutil.rmtree(target.resolve(), ignore_errors=True)
    loaded.config._name_or_path = os.fspath(target)  # where its image processor is from now on
    return loaded


def _checked(folder: PathLike) -> Path:
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"backbone {PREFIX}FOLDER must name a folder that save_pretrained wrote, there is no config.json in {str(path)!r}"
        )
    return path
