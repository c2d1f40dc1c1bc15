"""Files of trained models, opened without running anything that they hold.

Known are what ``torch.save`` wrote, in its zip archive or in the form from before torch 1.6, and safetensors.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor

from ..utils.files import LONGEST_START, PathLike, open_file, what_it_is
from ..utils.packages import require

if TYPE_CHECKING:
    from typing_extensions import Self

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?=\.)")
_ZIP_MAGIC = b"PK\x03\x04"
_LARGEST_SAFETENSORS_HEADER = 100_000_000  # the format's own limit
_BLOCK = 1 << 20
_LARGEST_READ = 1 << 30


@dataclass(frozen=True)
class Payload:
    """What a file holds, opened.

    Attributes:
        container: ``"torch"`` or ``"safetensors"``.
        content: nested mappings with tensors, on the CPU.
        metadata: texts beside the tensors: the header's of a safetensors file, or what ``save_linear`` was given.
        places: where in the file each storage of numbers begins, by its address in memory.
        fixed: why rows cannot be written where they are in the file; empty where they can.
    """

    container: str
    content: Mapping[str, Any]
    metadata: dict[str, str]
    places: dict[int, int] = field(default_factory=dict, repr=False)
    fixed: str = ""


def read_payload(path: PathLike) -> Payload:
    """Open a checkpoint of any known container.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an empty, truncated or foreign file.
    """
    file_path = Path(path)
    if not file_path.exists():
        raise FileNotFoundError(f"there is no checkpoint {os.fspath(path)!r}")
    kind = container(file_path)
    if kind == "safetensors":
        return _read_safetensors(file_path)
    try:
        with open_file(file_path) as file:
            content, places, fixed = (_read_zip if kind == "zip" else _read_legacy)(file)
    except Exception as error:  # a damaged file breaks its reader in any way there is
        # EINVAL is of seeking before the start.
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if "TorchScript" in reason:
            raise ValueError(
                f"{path} is a TorchScript archive, which holds code, and is not opened; save the model's state_dict()"
            ) from error
        raise ValueError(
            f"{path} is not a checkpoint that torch.save wrote, or it is cut off or damaged: {reason[:300]}"
        ) from error
    if not isinstance(content, Mapping):
        what = content.name if isinstance(content, StandIn) else type(content).__name__
        raise ValueError(f"{file_path} is not a checkpoint: it holds a {what}, not a dictionary of tensors")
    # save_linear hangs its metadata on the dictionary itself, where it is no key that a strict loader would stumble over.
    metadata = getattr(content, "alphaext_metadata", None)
    texts = {str(key): str(text) for key, text in metadata.items()} if isinstance(metadata, Mapping) else {}
    return Payload("torch", content, texts, places, fixed)


def container(path: Path) -> str:
    """``"safetensors"``, ``"zip"`` or ``"legacy"`` (the form of ``torch.save`` before 1.6), by the first bytes, not by the
    name.

    Raises:
        ValueError: an empty file, or one named as safetensors that is none.
    """
    with open_file(path) as file:
        start = file.read(LONGEST_START)
    if not start:
        raise ValueError(f"{path} is empty, not a checkpoint")
    shard = _SHARD.search(path.name)
    if shard is not None and int(shard.group(2)) > 1:
        raise ValueError(
            f"{path} is one of {int(shard.group(2))} shards of a model, which the file {_index_name(path, shard)} beside it "
            "lists: a whole file is read; the model's own save_pretrained(..., max_shard_size='100GB') writes one"
        )
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and length <= _LARGEST_SAFETENSORS_HEADER:
        return "safetensors"
    what = "" if start.startswith(_ZIP_MAGIC) else what_it_is(start)
    if what:
        raise ValueError(f"{path} is {what}, not a checkpoint")
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} is not a safetensors file: it does not begin with a header")
    return "zip" if start.startswith(_ZIP_MAGIC) else "legacy"


def require_safetensors() -> Any:
    """The package ``safetensors``, or an ImportError that says how to install it."""
    return require("safetensors", "safetensors files need the package", "safetensors")


def _index_name(path: Path, shard: re.Match[str]) -> str:
    return f"{path.name[: shard.start()]}{path.suffix}.index.json"


def _read_safetensors(path: Path) -> Payload:
    package = require_safetensors()
    try:
        with package.safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            # Clones: the tensors would otherwise be views of a file that may change.
            content = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (no mapping)
            metadata = dict(file.metadata() or {})
    except package.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    places = {
        tensor.untyped_storage().data_ptr(): 8 + length + header[name]["data_offsets"][0] for name, tensor in content.items()
    }
    return Payload("safetensors", content, metadata, places)


def _read_zip(file: IO[bytes]) -> tuple[Any, dict[int, int], str]:
    """The content of an archive of ``torch.save``'s, where its storages are, and why they cannot be written in place."""
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(entries) != len(archive.infolist()) or len(roots) != 1:
            raise zipfile.BadZipFile("two records of one name, or not one data.pkl")
        root = roots[0]
        if f"{root}constants.pkl" in entries:
            raise zipfile.BadZipFile("a TorchScript archive")
        for info in entries.values():
            if info.CRC == 0:  # what torch writes where it is told to compute no checksums
                info.CRC = None  # type: ignore[assignment]
        order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in entries else sys.byteorder
        places: dict[int, int] = {}
        fixed = "" if order == sys.byteorder else "has the byte order of another machine"

        def storage(key: str, dtype: torch.dtype, size: int) -> torch.UntypedStorage:
            nonlocal fixed
            info = entries[f"{root}data/{key}"]
            if info.file_size != size:
                raise ValueError(f"storage {key} has another size than its tensors")
            with archive.open(info) as record:
                made = _filled(record, size, dtype if order != sys.byteorder else None)
            if info.compress_type == zipfile.ZIP_STORED:
                places[made.data_ptr()] = record_start(file, info)
            else:
                fixed = "is compressed"
            return made

        content = _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")), storage).load()
    return content, places, fixed


def record_start(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where the content of an archive's record begins."""
    file.seek(info.header_offset + 26)
    lengths = file.read(4)  # of the name and of the extra field
    return info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def _read_legacy(file: IO[bytes]) -> tuple[Any, dict[int, int], str]:
    """The content of a file from before torch 1.6: pickles, and then the numbers of all storages."""
    if _Unpickler(file).load() != torch.serialization.MAGIC_NUMBER:
        raise pickle.UnpicklingError("it does not begin as such a file does")
    _Unpickler(file).load()  # the version of the form
    about = _Unpickler(file).load()
    swapped = isinstance(about, Mapping) and about.get("little_endian", True) != (sys.byteorder == "little")
    declared: dict[str, tuple[torch.dtype, torch.UntypedStorage]] = {}
    room = os.fstat(file.fileno()).st_size

    def declare(key: str, dtype: torch.dtype, size: int) -> torch.UntypedStorage:
        nonlocal room
        room -= size
        if room < 0:
            raise ValueError("its tensors are larger than the file")
        declared[key] = dtype, torch.zeros(size, dtype=torch.uint8, device="cpu").untyped_storage()
        return declared[key][1]

    # Twice: first for which storages there are, since their numbers come last; a sparse tensor is checked by its numbers.
    start = file.tell()
    _Unpickler(file, declare).load()
    for key in _Unpickler(file).load():
        dtype, storage = declared[str(key)]
        if int.from_bytes(file.read(8), "little") * dtype.itemsize != storage.nbytes():
            raise ValueError(f"storage {key} has another size than its tensors")
        storage.copy_(_filled(file, storage.nbytes(), dtype if swapped else None))
    file.seek(start)
    content = _Unpickler(file, lambda key, dtype, size: declared[key][1]).load()
    return content, {}, "has the form from before torch 1.6"


def _filled(file: IO[bytes], size: int, swapped: torch.dtype | None) -> torch.UntypedStorage:
    """A storage with the next ``size`` bytes of ``file``; numbers of the dtype ``swapped`` have the other byte order there."""
    storage = torch.UntypedStorage(size, device="cpu")
    target = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).numpy()
    for start in range(0, size, _BLOCK):
        block = file.read(min(_BLOCK, size - start))
        target[start : start + len(block)] = np.frombuffer(block, np.uint8)
        if len(block) < min(_BLOCK, size - start):
            raise EOFError("it ends within a tensor")
    if swapped is not None:
        storage.byteswap(swapped)
    return storage


# Pickles


class StandIn:
    """Stands for an object that is no tensor, number, text or container of these. Nothing that is done to it has an effect.

    Attributes:
        name: of the class or function that the file names.
        held: what the file gives the object, in which tensors may be.
    """

    name = "an object"
    held: list[Any]

    def __new__(cls, *given: Any, **_: Any) -> Self:
        made = super().__new__(cls)
        made.held = list(given)
        return made

    def __setstate__(self, state: Any) -> None:
        self.held.append(state)

    def __setitem__(self, _: Any, value: Any) -> None:
        self.held.append(value)

    append = add = __setstate__

    def __reduce__(self) -> NoReturn:
        raise ValueError(
            f"the checkpoint holds {self.name} beside its tensors, and is in the form from before torch 1.6: it cannot be "
            "written anew without the code of that object; save_linear writes the classifier itself"
        )


class _NumpyType(StandIn):
    """Stands for ``numpy.dtype``: types of numbers alone, nothing of NumPy's own reading of states."""

    name = "numpy.dtype"

    def number(self, raw: bytes) -> Any:
        code, order = str(self.held[0]), str(self.held[-1][1])
        (value,) = np.frombuffer(raw, np.dtype((order if order in "<>" else "=") + code))
        return value


def _numpy_number(kind: Any, raw: Any) -> Any:
    """Stands for NumPy's ``scalar``."""
    if isinstance(kind, _NumpyType) and isinstance(raw, bytes) and re.fullmatch(r"[fiub]\d{1,2}", str(kind.held[0])):
        return kind.number(raw)
    return StandIn(kind, raw)


class _DefaultDict(dict[Any, Any]):
    """Stands for ``collections.defaultdict``, whose function for what is missing is of no use here."""

    __reduce__ = StandIn.__reduce__
    name = "a defaultdict"

    def __init__(self, *_: Any) -> None:
        super().__init__()


def _ordered(items: Iterable[tuple[Any, Any]] = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((_checked_key(key), value) for key, value in items)


def _set(items: Iterable[Any] = ()) -> set[Any]:
    return {_checked_key(item) for item in items}


def _counter(counts: Mapping[Any, int]) -> Counter[Any]:
    return Counter(dict(counts))


def _parameter(data: Tensor, requires_grad: bool, *_: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(data, requires_grad)


def _sparse(layout: torch.layout, parts: Any) -> Any:
    if layout != torch.sparse_coo:
        return StandIn(layout, parts)
    # Not torch's own function, which leaves the check to the process's next torch.load.
    return torch.sparse_coo_tensor(*parts[:3], check_invariants=True)


def _plain_tensor(rebuild: Callable[..., Any], _: Any, arguments: Iterable[Any], __: Any) -> Any:
    """Stands for torch's function for tensors of subclasses: the tensor, without what its class adds."""
    return rebuild(*arguments)


def _checked_key(key: Any) -> Any:
    # The hash of a tuple in a tuple in a tuple without end breaks the process.
    if isinstance(key, tuple) and any(isinstance(part, tuple) for part in key):
        raise pickle.UnpicklingError("a key is a tuple within a tuple")
    return key


# All functions and classes of this process that a name in a file leads to. Every other name leads to a StandIn.
_NAMES: dict[str, Any] = {
    "collections.OrderedDict": _ordered,
    "collections.Counter": _counter,
    "collections.defaultdict": _DefaultDict,
    "builtins.set": _set,
    "builtins.bytearray": bytearray,
    "builtins.complex": complex,
    "_codecs.encode": str.encode,
    "numpy.dtype": _NumpyType,
    "numpy.core.multiarray.scalar": _numpy_number,
    "numpy._core.multiarray.scalar": _numpy_number,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch.serialization._get_layout": torch.serialization._get_layout,
    "torch._tensor._rebuild_from_type_v2": _plain_tensor,
    "torch.nn.parameter.Parameter": torch.nn.Parameter,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_qtensor": torch._utils._rebuild_qtensor,
    "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": torch._utils._rebuild_tensor_v3,
}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "QUInt8Storage": torch.quint8,
    "QInt8Storage": torch.qint8,
    "QInt32Storage": torch.qint32,
    "UntypedStorage": torch.uint8,
}


def _with_checked_keys(load: str, keys: slice) -> Callable[[Any], None]:
    """One of the reader's methods, once the keys that it takes from the stack have been looked at."""

    def checked(reader: Any) -> None:
        for key in reader.stack[keys]:
            _checked_key(key)
        getattr(reader, load)()

    return checked


class _Unpickler(pickle._Unpickler):
    """Reads a checkpoint's pickle, and calls nothing but what stands in ``_NAMES``.

    Python's own reader in Python, not the one in C: that one takes memory for as many objects as a file claims to have.

    Args:
        file: the pickle.
        storage: makes the numbers ``(key, dtype, bytes)`` of a storage.
    """

    def __init__(self, file: IO[bytes], storage: Callable[[str, torch.dtype, int], torch.UntypedStorage] | None = None) -> None:
        super().__init__(file, encoding="utf-8")
        self._file_read = lambda size: file.read(min(size, _LARGEST_READ))  # a file may ask for more than it has
        self._make = storage
        self._storages: dict[Any, torch.storage.TypedStorage] = {}

    def _bytearray(self) -> None:
        """Python's own makes one as large as the file claims, before it reads."""
        read: Callable[[int], bytes] = self.read  # type: ignore[attr-defined]
        length = int.from_bytes(read(8), "little")
        content = read(length)
        if len(content) < length:
            raise EOFError("a bytearray is longer than the file")
        self.stack.append(bytearray(content))  # type: ignore[attr-defined]

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if module.startswith("torch") and name in _STORAGES:
            return _STORAGES[name]
        constant = getattr(torch, name, None) if module == "torch" else None
        if isinstance(constant, (torch.dtype, torch.qscheme, torch.layout)):
            return constant
        return _NAMES.get(full) or type("Named", (StandIn,), {"name": full})

    def get_extension(self, code: int) -> NoReturn:
        raise pickle.UnpicklingError(f"code {code} of a registry that files do not share")

    def persistent_load(self, identifier: Any) -> Any:
        kind, dtype, key, _, numbers, *view = identifier
        if kind != "storage" or self._make is None or not isinstance(dtype, torch.dtype) or not isinstance(numbers, int):
            raise pickle.UnpicklingError("an unknown kind of storage")
        if key not in self._storages:
            self._storages[key] = _typed(self._make(str(key), dtype, numbers * dtype.itemsize), dtype)
        if not view or view[0] is None:
            return self._storages[key]
        part, start, length = view[0]  # in old files a storage may be a part of another
        if part not in self._storages:
            whole, size = self._storages[key]._untyped_storage, dtype.itemsize
            self._storages[part] = _typed(whole[start * size : (start + length) * size], dtype)
        return self._storages[part]

    def _build(self) -> None:
        stack: list[Any] = self.stack  # type: ignore[attr-defined]
        state, made = stack.pop(), stack[-1]
        if isinstance(made, StandIn):
            made.__setstate__(state)
        elif isinstance(made, OrderedDict) and isinstance(state, dict):
            made.__dict__.update({name: state[name] for name in ("_metadata", "alphaext_metadata") if name in state})
        elif not isinstance(made, dict):
            raise pickle.UnpicklingError(f"a state for a {type(made).__name__}")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: _build,
        pickle.BYTEARRAY8[0]: _bytearray,
        pickle.SETITEM[0]: _with_checked_keys("load_setitem", slice(-2, -1)),
        pickle.SETITEMS[0]: _with_checked_keys("load_setitems", slice(None, None, 2)),
        pickle.DICT[0]: _with_checked_keys("load_dict", slice(None, None, 2)),
        pickle.ADDITEMS[0]: _with_checked_keys("load_additems", slice(None)),
        pickle.FROZENSET[0]: _with_checked_keys("load_frozenset", slice(None)),
    }


def _typed(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.storage.TypedStorage:
    return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
