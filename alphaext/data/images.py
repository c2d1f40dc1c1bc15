"""Labelled images: what every source of images looks like to the rest of the package, and how an image is decoded."""

from __future__ import annotations

import hashlib
import io
import operator
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..utils.checks import check_class_names, check_integer, if_given
from ..utils.files import open_file, what_it_is
from ..utils.packages import require
from ..utils.tensors import TensorLike, check_labels
from ..utils.text import one_form

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Self

# More classes than any data set has; a larger label is a mistake (a date, an image's own number) that would otherwise ask for
# gigabytes of counts.
MOST_CLASSES = 2**24


class ImageReadError(ValueError):
    """An image that cannot be read; the message names it and says why.

    Attributes:
        name: the image, as :meth:`LabelledImages.name` has it; empty where the error came back from another process that
            keeps its message only (a worker of torch's ``DataLoader``).
        reason: why, without the name.
    """

    # One argument must do: that is how DataLoader makes the error anew in the main process.
    def __init__(self, message: str, name: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[type[ImageReadError], tuple[str, str, str]]:
        return type(self), (str(self), self.name, self.reason)

    @classmethod
    def of(cls, name: str, reason: str) -> ImageReadError:
        """The error about the image ``name``."""
        return cls(f"cannot read image {name!r}: {reason}", name, reason)


class LabelledImages(Dataset["tuple[Image, int]"], ABC):
    """Images with a class each: a torch data set of ``(PIL image, label)`` that can also name its images.

    An image is decoded when it is asked for. It can be sent to the workers of a ``DataLoader``, by fork or by spawn.

    Args:
        labels: the class of each, integers [n].
        num_classes: N; default, the number of ``class_names``, or the largest label plus one.
        class_names: a name for each class.

    Attributes:
        labels: int64 [n], CPU, in ``0 .. num_classes - 1``.
        num_classes: N; there may be classes without images.
        class_names: a name for each class, or None where the source has none.
        noun: what one of them is called in words to the user: ``"image"``, or ``"text"``.
    """

    kind: str
    noun = "image"

    def __init__(self, labels: TensorLike, num_classes: int | None = None, class_names: Sequence[str] | None = None) -> None:
        if class_names is not None:
            class_names = check_class_names(class_names, num_classes)
            num_classes = len(class_names)
        num_classes = if_given(check_integer, num_classes, "num_classes", minimum=1, maximum=MOST_CLASSES)
        checked = check_labels(labels, MOST_CLASSES if num_classes is None else num_classes)
        if num_classes is None:
            if checked.numel() == 0:
                raise ValueError("there are no images, so the number of classes is unknown: give num_classes")
            num_classes = int(checked.max()) + 1
        # A copy: whoever holds the array that the labels came from may change it.
        self.labels: Tensor = checked.to("cpu", copy=True)
        self.num_classes: int = num_classes
        self.class_names: tuple[str, ...] | None = class_names

    def __len__(self) -> int:
        return self.labels.numel()

    def __getitem__(self, index: int) -> tuple[Image, int]:
        position = self._position(index)
        return self.load(position), int(self.labels[position])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self):,} images, {self.num_classes:,} classes)"

    def load(self, index: int) -> Image:
        """Decode an image whole.

        Returns:
            A PIL image of mode ``"L"`` where gray values are stored (16-bit ones scaled to 0..255), else ``"RGB"``. As
            torchvision's loader does, transparency is dropped and EXIF rotation not applied, so that features come out as those
            that a published checkpoint was trained on.

        Raises:
            ImageReadError: the image is missing, unreadable, truncated or too large.
            IndexError: there is no such image.
        """
        return self.decode(index, self.stored(index))

    @abstractmethod
    def name(self, index: int) -> str:
        """What the image is called in lists and messages: its relative path, or ``"file.npz[12]"``."""

    @abstractmethod
    def stored(self, index: int) -> bytes:
        """The image as it is stored: the bytes of its file, or of its pixels; equal bytes are equal images.

        Raises:
            ImageReadError: they cannot be read.
        """

    @abstractmethod
    def decode(self, index: int, stored: bytes) -> Image:
        """Make the image out of what :meth:`stored` returned; see :meth:`load`."""

    @abstractmethod
    def subset(self, indices: TensorLike) -> LabelledImages:
        """The images at ``indices`` (integers [m], repeats allowed), in that order, with the same names and classes.

        Raises:
            TypeError: indices that are not integers.
            ValueError: an index out of range.
        """

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal digits, over the kind of source, the images' names and their labels.

        Image files are not read, and where the data lie does not count. Pixels that are in memory are taken instead of names.
        """
        digest, labels = hashlib.sha256(), self.labels.numpy().astype("<i8", copy=False)
        for part in chain([self.kind.encode()], self._contents(), [labels.tobytes()]):
            # With its length, so that what ends one part cannot begin the next.
            digest.update(struct.pack("<q", len(part)))
            digest.update(part)
        return digest.hexdigest()

    def _contents(self) -> Iterator[bytes]:
        """What tells the images from others."""
        names = "\0".join(self.name(index) for index in range(len(self)))
        yield names.encode("utf-8", "surrogateescape")

    def _position(self, index: int) -> int:
        """``index`` as a position from the start, -1 being the last; IndexError where there is none."""
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"index must be in {-len(self)}..{len(self) - 1}, got {position}")
        return position % len(self)

    def _indices(self, indices: TensorLike) -> Tensor:
        return check_labels(indices, len(self), "indices").to("cpu")


class FileImages(LabelledImages):
    """Image files under one root; :func:`alphaext.data.read_list` and :func:`alphaext.data.read_image_folder` make them.

    ``labels``, ``num_classes`` and ``class_names`` are those of :class:`LabelledImages`.

    Attributes:
        root: the folder that ``paths`` are relative to.
        paths: the path of each image, with ``/`` between its parts.

    Example:
        >>> images = FileImages("photographs", ["cats/1.jpg", "dogs/1.jpg"], [0, 1], class_names=["cat", "dog"])
        >>> images, images.name(1)
        (FileImages(2 images, 2 classes), 'dogs/1.jpg')
    """

    kind = "files"

    def __init__(
        self,
        root: str | os.PathLike[str],
        paths: Sequence[str],
        labels: TensorLike,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(labels, num_classes, class_names)
        if len(paths) != len(self):
            raise ValueError(f"paths and labels must have one entry an image, got {len(paths)} and {len(self)}")
        # Absolute, so that a worker that starts elsewhere, or a later change of directory, does not lose the images.
        self.root = Path(root).absolute()
        self.paths = list(paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def _in_another_form(self, name: str) -> str | None:
        """The file that is there under this name, but for the form of its accents."""
        if name.isascii():
            return None
        found = ""
        for part in name.split("/"):
            with suppress(OSError):
                here = os.listdir(os.path.join(self.root, found))
                part = next((entry for entry in sorted(here) if one_form(entry) == one_form(part)), part)
            found = os.path.join(found, part)
        return found if found != name and os.path.isfile(os.path.join(self.root, found)) else None

    def stored(self, index: int) -> bytes:
        name = self.name(index)
        try:
            with open_file(os.path.join(self.root, name)) as file:
                content = file.read()
        except FileNotFoundError:
            cause = f"no such file in {str(self.root)!r}"
            if (other := self._in_another_form(name)) is not None:
                cause += f", but {other!r} with accents in another form of Unicode (NFC, NFD)"
            raise ImageReadError.of(name, cause) from None
        except (OSError, ValueError) as error:  # ValueError: no file can have this name
            raise ImageReadError.of(name, getattr(error, "strerror", None) or str(error)) from error
        if not content:
            raise ImageReadError.of(name, "the file is empty")
        return content

    def decode(self, index: int, stored: bytes) -> Image:
        return decode_image(stored, self.name(index))

    def subset(self, indices: TensorLike) -> FileImages:
        chosen = self._indices(indices)
        paths = [self.paths[index] for index in chosen.tolist()]
        return FileImages(self.root, paths, self.labels.index_select(0, chosen), self.num_classes, self.class_names)


class RowImages(LabelledImages):
    """Images that are rows of one whole.

    Args:
        whole: what has the images, such as a data set.
        labels: the class of each, integers [n].
        source: the name of the whole.
        num_classes: N; default, the number of ``class_names``, or the largest label plus one.
        class_names: a name for each class.
        rows: where each image is in the whole; default, all of it in order.

    Attributes:
        source: the name of the whole; images are called ``source[row]``.
        rows: int64 [n], where each image is in it.
    """

    def __init__(
        self,
        whole: Any,
        labels: TensorLike,
        source: str,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        rows: TensorLike | None = None,
    ) -> None:
        super().__init__(labels, num_classes, class_names)
        self._whole, self.source = whole, source
        everything = torch.arange(len(whole), device="cpu")
        self.rows = everything if rows is None else check_labels(rows, len(whole), "rows").to("cpu")
        if self.rows.numel() != len(self):
            raise ValueError(f"images and labels must have one entry an image, got {self.rows.numel()} and {len(self)}")

    def name(self, index: int) -> str:
        return f"{self.source}[{self._row(index)}]"

    def _row(self, index: int) -> int:
        return int(self.rows[self._position(index)])

    def subset(self, indices: TensorLike) -> Self:
        chosen = self._indices(indices)
        labels, rows = self.labels.index_select(0, chosen), self.rows.index_select(0, chosen)
        return type(self)(self._whole, labels, self.source, self.num_classes, self.class_names, rows)


class ArrayImages(RowImages):
    """Images in one array in memory; :func:`alphaext.data.read_arrays` makes them. A subset shares the array.

    ``labels``, ``num_classes`` and ``class_names`` are those of :class:`LabelledImages`; ``source`` is what the array is
    called, and ``rows`` say where in it each image is (default: all in order).

    Attributes:
        pixels: uint8 [m, height, width] (gray) or [m, height, width, 3], whose rows the images are.

    Example:
        >>> import numpy
        >>> images = ArrayImages(numpy.zeros((3, 8, 8), numpy.uint8), [0, 1, 1], "mine.npz")
        >>> images.name(2), images.subset([2, 0]).labels
        ('mine.npz[2]', tensor([1, 0]))
    """

    kind = "array"

    def __init__(
        self,
        pixels: npt.NDArray[np.uint8],
        labels: TensorLike,
        source: str,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        rows: TensorLike | None = None,
    ) -> None:
        if pixels.dtype != np.uint8:
            raise TypeError(f"images must be uint8, got {pixels.dtype}")
        if not (pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[3] == 3)) or 0 in pixels.shape[1:]:
            raise ValueError(f"images must have shape [n, height, width] or [n, height, width, 3], got {list(pixels.shape)}")
        super().__init__(pixels, labels, source, num_classes, class_names, rows)
        self.pixels = pixels

    def stored(self, index: int) -> bytes:
        return self.pixels[self._row(index)].tobytes()

    def decode(self, index: int, stored: bytes) -> Image:
        pixels = np.frombuffer(stored, dtype=np.uint8).reshape(self.pixels.shape[1:])
        return _pillow().fromarray(pixels)

    def _contents(self) -> Iterator[bytes]:
        yield repr((len(self), *self.pixels.shape[1:])).encode()
        rows = self.rows.numpy()
        for start in range(0, len(rows), 1024):
            yield self.pixels[rows[start : start + 1024]].tobytes()


class DatasetImages(RowImages):
    """The images of a data set in torchvision's manner, whose items are ``(PIL image, label)``.

    :func:`alphaext.data.from_torchvision` makes them.
    """

    kind = "dataset"

    @property
    def dataset(self) -> Any:
        """What the images are of."""
        return self._whole

    def load(self, index: int) -> Image:
        name = self.name(index)
        try:
            image = self.dataset[self._row(index)][0]
        except MemoryError:
            raise
        except Exception as error:
            raise ImageReadError.of(name, _reason(error)) from error
        if not isinstance(image, _pillow().Image):
            raise TypeError(
                f"the items of {self.source} must be (PIL image, label), got a {type(image).__name__} as the image: "
                "make the data set without a transform"
            )
        return _plain(image, name)

    def stored(self, index: int) -> bytes:
        image = self.load(index)
        size = struct.pack("<2sii", image.mode[:2].encode(), *image.size)
        return size + image.tobytes()

    def decode(self, index: int, stored: bytes) -> Image:
        mode, width, height = struct.unpack_from("<2sii", stored)
        return _pillow().frombytes("L" if mode.startswith(b"L") else "RGB", (width, height), stored[struct.calcsize("<2sii") :])


def decode_image(content: bytes, name: str) -> Image:
    """Decode the bytes of an image file whole; see :meth:`LabelledImages.load`.

    Args:
        content: the file's bytes, in any format that Pillow reads; of several frames the first is taken.
        name: of the image, for errors.

    Raises:
        ImageReadError: they are no image, or a truncated or broken one, or one too large to be meant (Pillow's bound).

    Example:
        >>> import io
        >>> from PIL import Image
        >>> file = io.BytesIO()
        >>> Image.new("CMYK", (3, 2)).save(file, "JPEG")
        >>> decode_image(file.getvalue(), "a.jpg").mode
        'RGB'
        >>> try:
        ...     decode_image(file.getvalue()[:-200], "a.jpg")
        ... except ImageReadError as error:
        ...     print(error.name)
        a.jpg
    """
    pillow = _pillow()
    try:
        with pillow.open(io.BytesIO(content)) as image:
            image.load()
            return _plain(image, name)
    except (ImageReadError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them meet.
        what = what_it_is(content)
        raise ImageReadError.of(name, f"it is {what}" if what else _reason(error)) from error


def _plain(image: Image, name: str) -> Image:
    """A decoded image of any mode as ``"L"`` or ``"RGB"``."""
    mode = image.mode
    if mode in ("L", "RGB"):
        return image.copy() if type(image) is not _pillow().Image else image
    if mode in ("1", "LA", "La"):
        return image.convert("L")
    if mode == "I" or mode.startswith("I;16"):
        # Pillow's own conversion cuts at 255, which turns nearly every 16-bit image white.
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise ImageReadError.of(name, f"gray values must be 8 or 16 bits, got {values.min()}..{values.max()}")
        return _pillow().fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if mode == "F":
        raise ImageReadError.of(name, "gray values must be 8 or 16 bits, got floating point")
    if mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # else Pillow warns of each such image; the colours are the same
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    pillow = _pillow()
    if isinstance(error, pillow.DecompressionBombError):
        return f"too many pixels to be meant ({error})"
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image of a known format"
    return str(error) or type(error).__name__


def _pillow() -> Any:
    return require("PIL.Image", "reading images needs", "'alphaext[vision]'")
