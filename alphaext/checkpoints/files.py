"""Files of trained models, opened without running anything that they hold.

Known are what ``torch.save`` wrote, in its zip archive or in the form from before torch 1.6, and safetensors.
"""

from __future__ import annotations

import errno
import os
import pickle
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from ..utils.files import PathLike

SAFETENSORS_HINT = "safetensors files need the package safetensors: pip install safetensors"

_ZIP_MAGIC = b"PK\x03\x04"
_LARGEST_SAFETENSORS_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Payload:
    """What a file holds, opened.

    Attributes:
        container: ``"torch"`` or ``"safetensors"``.
        content: nested mappings with tensors, on the CPU.
        metadata: texts beside the tensors: the header's of a safetensors file, or what ``save_linear`` was given.
    """

    container: str
    content: Mapping[str, Any]
    metadata: dict[str, str]


def read_payload(path: PathLike) -> Payload:
    """Open a checkpoint of any known container.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an empty, truncated or foreign file, or one that names code to run; the latter is not opened.
    """
    file_path = Path(path)
    if not file_path.exists():
        raise FileNotFoundError(f"there is no checkpoint {os.fspath(path)!r}")
    if file_path.is_dir():
        raise ValueError(f"a checkpoint must be a file, got the directory {os.fspath(path)!r}")
    if container(file_path) == "safetensors":
        return _read_safetensors(file_path)
    content = _read_torch(file_path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{file_path} is not a checkpoint: it holds a {type(content).__name__}, not a dictionary of tensors")
    # save_linear hangs its metadata on the dictionary itself, where it is no key that a strict loader would stumble over.
    metadata = getattr(content, "alphaext_metadata", None)
    texts = {str(key): str(text) for key, text in metadata.items()} if isinstance(metadata, Mapping) else {}
    return Payload("torch", content, texts)


def container(path: Path) -> str:
    """``"safetensors"``, ``"zip"`` or ``"legacy"`` (the form of ``torch.save`` before 1.6), by the first bytes, not by the
    name.

    Raises:
        ValueError: an empty file, or one named as safetensors that is none.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise ValueError(f"{path} is empty, not a checkpoint")
    length = int.from_bytes(start[:8], "little")
    if start[8:] == b"{" and length <= _LARGEST_SAFETENSORS_HEADER:
        return "safetensors"
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} is not a safetensors file: it does not begin with a header")
    return "zip" if start.startswith(_ZIP_MAGIC) else "legacy"


def _read_safetensors(path: Path) -> Payload:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(SAFETENSORS_HINT) from error
    try:
        with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            # Clones: the tensors would otherwise be views of a file that may change.
            content = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (no mapping)
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return Payload("safetensors", content, metadata)


def _read_torch(path: Path) -> Any:
    # The file, not its path: by a path torch goes by the suffix, and this is about the content.
    with path.open("rb") as file, _only_stand_ins(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except pickle.UnpicklingError as error:
            _refuse(path, error)
        except Exception as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that one is of seeking before the start
                raise
            # A file that is cut off, or no checkpoint at all, breaks the reader in any way there is.
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            if "TorchScript" in reason:
                raise ValueError(
                    f"{path} is a TorchScript archive, which holds code, and is not opened; save the model's state_dict()"
                ) from error
            raise _damaged(path, reason) from error


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is not a checkpoint that torch.save wrote, or it is cut off or damaged: {reason[:300]}")


def _refuse(path: Path, error: pickle.UnpicklingError) -> NoReturn:
    text = str(error)
    found = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", text) or re.search(r"(numpy\.dtype\(.*?\))", text)
    if found is None:
        reason = text.split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
        raise _damaged(path, reason) from error
    raise ValueError(
        f"{path} holds {found.group(1)}: reading it would run code that the file names, so it is not opened. Tensors, numbers, "
        "texts and their containers are read. If you trust where the file comes from, save its tensors alone, once: what "
        f"torch.load({os.fspath(path)!r}, weights_only=False) gives, without what is no tensor, by torch.save"
    ) from error


class _NumpyType:
    """Stands for ``numpy.dtype`` while a checkpoint is read: number types alone, nothing of NumPy's own reading of states."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[fiub]\d{1,2}", str(code)):
            raise pickle.UnpicklingError(f"numpy.dtype({code!r}) is no type of a number")
        self.code = str(code)
        self.order = "|"

    def __setstate__(self, state: Any) -> None:
        self.order = str(state[1])

    def number(self, raw: bytes) -> Any:
        order = self.order if self.order in "<>" else "="
        (value,) = np.frombuffer(raw, np.dtype(order + self.code))
        return value


def _numpy_number(kind: _NumpyType, raw: bytes) -> Any:
    """Stands for NumPy's ``scalar`` while a checkpoint is read."""
    if not isinstance(kind, _NumpyType) or not isinstance(raw, bytes):
        raise pickle.UnpicklingError("numpy.dtype(...) is missing or no type of a number")
    return kind.number(raw)


class _Settings:
    """Stands for the objects that training scripts keep their options in: it takes what belongs to them, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __reduce__(self) -> NoReturn:
        raise ValueError(
            "the checkpoint holds a training script's options beside its tensors, and is in the form from before torch 1.6: it "
            "cannot be written anew without the script's code; save_linear writes the classifier itself"
        )


# What torch's reader may find beyond tensors and plain containers: single NumPy numbers (an accuracy), under their names in
# NumPy 1 and 2; the options of torchvision's and timm's training scripts, and those of RIDE's. No name leads to any function or
# class but the stand-ins above.
_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_numpy_number, "numpy.core.multiarray.scalar"),
    (_numpy_number, "numpy._core.multiarray.scalar"),
    (_NumpyType, "numpy.dtype"),
    (_Settings, "argparse.Namespace"),
    (_Settings, "parse_config.ConfigParser"),
    (_Settings, "pathlib.PosixPath"),
    (_Settings, "pathlib._local.PosixPath"),
]
_LOCK = threading.Lock()


@contextmanager
def _only_stand_ins() -> Iterator[None]:
    """Let torch's reader take these, and nothing else that the process may have allowed for files of its own."""
    with _LOCK:
        allowed = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(_STAND_INS)
        try:
            yield
        finally:
            added = [entry for entry in torch.serialization.get_safe_globals() if entry not in _STAND_INS]
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(allowed + added)
