"""Files that are written whole or not at all, and read without trusting them."""

from __future__ import annotations

import codecs
import errno
import fcntl
import glob
import hashlib
import io
import json
import math
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any, TypeAlias

PathLike: TypeAlias = str | os.PathLike[str]

# How files begin that people take for others.
_BEGINNINGS = {
    b"version https://git-lfs": "a pointer of Git LFS, in place of the file itself ('git lfs pull' fetches that)",
    b"<!doctype": "a page of the web (HTML), as a server sends it instead of a file",
    b"<html": "a page of the web (HTML), as a server sends it instead of a file",
    b"<?xml": "an XML document, as a server sends it instead of a file",
    b"\x1f\x8b": "compressed with gzip (gunzip unpacks it)",
    b"bzh": "compressed with bzip2 (bunzip2 unpacks it)",
    b"\xfd7zxz": "compressed with xz (unxz unpacks it)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd (unzstd unpacks it)",
    b"7z\xbc\xaf": "an archive of 7-Zip",
    b"rar!": "a RAR archive",
    b"\x89hdf": "an HDF5 file, as Keras writes it",
    b"\x93numpy": "an array of NumPy",
    b"gguf": "a GGUF file",
    b"pk\x03\x04": "a ZIP archive",
    b"{": "a JSON document, perhaps the index of a model's shards",
}
LONGEST_START = 64


def what_it_is(start: bytes) -> str:
    """What a file is by its first ``LONGEST_START`` bytes, where it often stands in the place of another; else empty."""
    start = start[:LONGEST_START].lstrip().lower()
    return next((what for beginning, what in _BEGINNINGS.items() if start.startswith(beginning)), "")


def open_file(path: PathLike) -> IO[bytes]:
    """Open a file to read. What is none (a pipe, a device, a folder) is refused at once, where reading could wait for ever.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise ValueError(f"must be a file, got {_kind(mode)} {os.fspath(path)!r}")
    return os.fdopen(handle, "rb")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "the directory", stat.S_IFIFO: "the pipe", stat.S_IFSOCK: "the socket", stat.S_IFREG: "the file"}
    return kinds.get(stat.S_IFMT(mode), "the device")


def read_text(path: PathLike, name: str) -> str:
    """A text file's content, UTF-8 or, with its mark, UTF-16; ``name`` says in errors what it should be.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no file, or no text.
    """
    with open_file(path) as file:
        content = file.read()
    what = what_it_is(content)
    if what and not content.startswith(b"{"):
        raise ValueError(f"{os.fspath(path)} is {what}, not {name}")
    try:
        # With its mark, as Windows' editors and PowerShell write it.
        return content.decode("utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        seen = f"{error.reason}: byte 0x{content[error.start]:02x}"
        raise ValueError(f"{os.fspath(path)} is not {name}: line {line}: not UTF-8 ({seen})") from None


class _Remembering(io.FileIO):
    """A file that remembers why it could not be written."""

    failed: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.failed = error
            raise


@contextmanager
def whole_file(path: PathLike, *, overwrite: bool | None = None) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of ``path`` when the block ends, and is gone if the block fails.

    Its content is on the disk before it is seen under ``path``, so that neither a kill nor a full disk nor a power cut leaves
    half a file behind that looks whole. A link stays, and what it leads to is replaced. The directory must exist.

    Args:
        path: the file.
        overwrite: of a file that a user named: whether one that is there is replaced. Then no two processes write it at once.
            Without, whoever writes holds the folder that it is in.

    Raises:
        OSError: it cannot be written; the error names ``path``.
        ValueError: another process is writing it, or has written it since :func:`check_output_file`.
    """
    target = Path(os.path.realpath(path))
    temporary, raw = temporary_for(target), None
    try:
        with ExitStack() as stack:
            with nullcontext() if overwrite is None else _alone(target, overwrite):
                raw = _Remembering(temporary, "wb")
                file = stack.enter_context(io.BufferedWriter(raw))
                fcntl.flock(file, fcntl.LOCK_SH)  # by which others see that its process lives
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)  # while it is held
    except OSError as error:
        if error.errno is not None and str(error.filename) in ("None", str(temporary)):
            # A full disk does not say which file it had no room for, and a folder that cannot be written names the temporary.
            error.filename = os.fspath(target)
        raise
    except RuntimeError:
        # torch.save makes something else of it.
        if raw is None or raw.failed is None:
            raise
        raise OSError(raw.failed.errno, raw.failed.strerror, os.fspath(target)) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: PathLike) -> Iterator[Path]:
    """A folder to fill that takes the place of ``path``, new or empty, when the block ends, and is gone if that fails."""
    target = Path(os.path.realpath(path))
    temporary = temporary_for(target)
    temporary.mkdir()
    try:
        with _held(temporary, fcntl.LOCK_SH):
            yield temporary
            os.replace(temporary, target)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise ValueError(f"{str(target)!r} exists already: another process has written it in the meantime") from None
        if isinstance(error.filename, str) and error.filename.startswith(str(temporary)):
            # What it was written for is known to the user, and the temporary folder is gone by then.
            error.filename = str(target) + error.filename[len(str(temporary)) :]
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _alone(target: Path, overwrite: bool) -> Iterator[None]:
    """Keep others out while a process begins to write ``target``, after looking whether one does already."""
    if target.parent.suffix == ".tmp":  # a folder that is being written, by this process
        yield
        return
    with _held(target.parent, fcntl.LOCK_EX):
        for other in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
            try:
                with _held(other, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    pass  # nobody's
            except BlockingIOError:
                raise ValueError(f"another process is writing {str(target)!r}; wait for it or stop it") from None
            except FileNotFoundError:  # done in this moment
                pass
        if target.exists() and not overwrite:
            raise ValueError(f"{str(target)!r} exists already: another process has written it in the meantime")
        yield


def temporary_for(target: Path) -> Path:
    """Where what is to become ``target`` can be written."""
    return target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.tmp")


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what killed processes were writing in ``folder``, all or what was to become the file ``name``."""
    for left in folder.glob(f".{name if name == '*' else glob.escape(name)}.*.tmp"):
        process = left.name.split(".")[-3]
        # A process on another machine has a number that means nothing here, but holds the lock.
        with suppress(OSError):
            if process.isdecimal() and not Path(f"/proc/{process}").exists() and (left.is_file() or left.is_dir()):
                with _held(left, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    if left.is_dir():
                        shutil.rmtree(left, ignore_errors=True)
                    else:
                        left.unlink(missing_ok=True)


@contextmanager
def _held(path: Path, how: int) -> Iterator[None]:
    """Hold what is being written, by which others see that its process lives, or what one has left."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)


def write_json(path: PathLike, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all. NaN is written as null, which every reader of JSON knows."""
    text = json.dumps(without_nan(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with whole_file(path) as file:
        # Names of files that are no UTF-8 come as surrogates, which become escapes that JSON knows.
        file.write(text.encode("utf-8", "backslashreplace"))


def without_nan(value: Any) -> Any:
    """The same with None for each number that JSON cannot write (NaN, infinity), tuples as lists, paths as text."""
    if isinstance(value, dict):
        return {str(key): without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def read_json(path: PathLike, what: str) -> dict[str, Any]:
    """The object in a JSON file; ``what`` says in an error what the file should have been.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a JSON object.
    """
    text = read_text(path, what)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets without end
        raise ValueError(f"{os.fspath(path)} is not {what}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{os.fspath(path)} is not {what}: it holds a {type(value).__name__}, not an object")
    return value


def file_digest(path: PathLike) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_output_file(path: PathLike, name: str, *, overwrite: bool = False) -> Path:
    """Check before any work that ``path`` can be written: in a directory that exists, no file yet unless ``overwrite``."""
    target = Path(path)
    if target.exists() and not target.is_file():
        raise ValueError(f"{name} must be a file, got {_kind(target.stat().st_mode)} {str(target)!r}")
    if not Path(os.path.realpath(target)).parent.is_dir():  # of what a link leads to
        raise ValueError(f"{name} must be a file in a directory that exists, got {str(target)!r}")
    if target.exists() and not overwrite:
        raise ValueError(f"{name} exists already: {str(target)!r}; give another name, or ask for it to be overwritten")
    remove_leftovers(Path(os.path.realpath(target)).parent, target.name)
    return target


def check_no_file(path: PathLike, name: str) -> Path:
    """The path of a folder, which may be there or not, but not as a file."""
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{name} must be a folder, got {_kind(target.stat().st_mode)} {str(target)!r}")
    if target.is_symlink() and not target.exists():
        raise ValueError(f"{name} must be a folder, got a link that leads to none: {str(target)!r}")
    return target


def check_output_folder(path: PathLike, name: str) -> Path:
    """Check before any work that ``path`` can be a folder: in one that exists, and no file."""
    target = check_no_file(path, name)
    if not target.absolute().parent.is_dir():
        raise ValueError(f"{name} must be in a folder that exists, got {str(target)!r}")
    remove_leftovers(Path(os.path.realpath(target)).parent, target.name)
    return target


_locked: set[IO[bytes]] = set()


def _let_go() -> None:
    """Close a forked child's copies of locked files: with them it would hold the lock for as long as it outlives its parent."""
    for file in _locked:
        file.close()
    _locked.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def folder_lock(folder: PathLike, what: str) -> Iterator[None]:
    """Hold ``folder`` (which exists) against a second process that would write into it; a killed process holds nothing.

    Raises:
        ValueError: another process holds it.
    """
    path = Path(folder) / ".lock"
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {what} into {os.fspath(folder)!r}; wait for it or stop it") from None
        _locked.add(file)
        try:
            yield
        finally:
            _locked.discard(file)
