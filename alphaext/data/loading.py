"""Images in batches as a model takes them: decoded and transformed, by this process or by workers beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..utils.seeds import derived_seed
from .images import ImageReadError, LabelledImages

if TYPE_CHECKING:
    from PIL.Image import Image


class Transform(Protocol):
    """What turns a PIL image into a float tensor, such as :class:`alphaext.data.ImageTransform`.

    Attributes:
        description: all that says what it does, in what JSON can hold.
        random: whether it draws; then ``seeded`` draws from its seed alone.
    """

    @property
    def description(self) -> Mapping[str, Any]: ...

    @property
    def random(self) -> bool: ...

    def __call__(self, image: Image, /) -> Tensor: ...

    def seeded(self, image: Image, seed: int, /) -> Tensor: ...


@dataclass(frozen=True)
class ImageBatch:
    """A batch that has been read.

    Attributes:
        images: float ``[k, C, H, W]``, those that could be read; None where none could.
        indices: of those k images.
        unreadable: index and error of each of the others.
        failure: what went wrong with the transform, or None; with a failure there are no images.
    """

    images: Tensor | None
    indices: tuple[int, ...]
    unreadable: tuple[tuple[int, ImageReadError], ...] = ()
    failure: str | None = None

    def pin_memory(self) -> ImageBatch:
        """The same in memory that a GPU reads by itself; ``DataLoader`` calls this."""
        return self if self.images is None else replace(self, images=self.images.pin_memory())

    def whole(self) -> Tensor:
        """The images, or the error of the first that there is none of."""
        if self.unreadable:
            raise self.unreadable[0][1]
        if self.images is None:
            raise ValueError(self.failure)
        return self.images


def image_seed(seed: int, pass_number: int, index: int) -> int:
    """The seed of a random transform, which depends on nothing but the extraction's seed, the pass and the image's index."""
    return derived_seed(seed, pass_number, index)


@contextmanager
def image_batches(
    images: LabelledImages,
    transform: Transform,
    batches: Iterable[Sequence[tuple[int, int]]],
    *,
    workers: int,
    pin_memory: bool,
) -> Iterator[Callable[[], Iterator[ImageBatch]]]:
    """A block with a function that goes through ``batches``, as often as it is called, always with the same workers.

    However the block ends, the workers are gone afterwards.

    Args:
        images: decoded one by one.
        transform: of each image.
        batches: for each image its index and the seed of its transform.
        workers: processes that read and transform, each some batches ahead; 0: this process does, a batch at a time.
        pin_memory: whether the batches go to a GPU.

    Yields:
        A function that returns an iterator over the batches, in their order.

    Example:
        >>> import numpy
        >>> images = ArrayImages(numpy.zeros((4, 8, 8), numpy.uint8), [0, 1, 0, 1], "mine.npz")
        >>> batches, transform = [[(0, 0), (1, 0)], [(2, 0), (3, 0)]], small_test_transform(8, channels=1)
        >>> with image_batches(images, transform, batches, workers=0, pin_memory=False) as begin:
        ...     [(batch.indices, tuple(batch.whole().shape)) for batch in begin()]
        [((0, 1), (2, 1, 8, 8)), ((2, 3), (2, 1, 8, 8))]
    """
    loader: DataLoader[ImageBatch] = DataLoader(
        Reader(images, transform),
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        # Without a generator, each iteration would draw from the global random state.
        generator=torch.Generator("cpu").manual_seed(0),
    )
    iterator: Iterator[ImageBatch] | None = None

    def begin() -> Iterator[ImageBatch]:
        nonlocal iterator
        with torch.device("cpu"):  # it draws a seed, on the user's default device, from that generator
            iterator = iter(loader)
        return iterator

    try:
        yield begin
    finally:
        # Not left to the garbage collector: the traceback of an error holds the iterator, and the iterator its processes.
        stop: Callable[[], None] | None = getattr(iterator, "_shutdown_workers", None)
        if stop is not None:
            stop()


class Reader(Dataset[ImageBatch]):
    """Reads whole batches. Errors come back as values: as exceptions they would arrive as the text of a worker's traceback."""

    def __init__(self, images: LabelledImages, transform: Transform) -> None:
        self._images, self._transform = images, transform

    def __getitem__(self, batch: Sequence[tuple[int, int]]) -> ImageBatch:
        tensors: dict[int, Tensor] = {}
        unreadable: list[tuple[int, ImageReadError]] = []
        for place, (index, seed) in enumerate(batch):
            try:
                image = self._images.load(index)
            except ImageReadError as error:
                unreadable.append((index, error))
                continue
            try:
                tensors[place] = self._transform.seeded(image, seed) if self._transform.random else self._transform(image)
                _check_transformed(tensors[place], next(iter(tensors.values())))
            except MemoryError:
                raise
            except Exception as error:
                failure = f"the transform fails on image {self._images.name(index)!r}: {type(error).__name__}: {error}"
                return ImageBatch(None, (), (), failure)
        # In a worker, this stacks in the memory that it shares with the main process.
        stacked = default_collate(list(tensors.values())) if tensors else None
        return ImageBatch(stacked, tuple(batch[place][0] for place in tensors), tuple(unreadable))


def _check_transformed(tensor: object, first: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"it must return a tensor, got a {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"it must return floating point, got {tensor.dtype}")
    if tensor.shape != first.shape:
        raise ValueError(f"it must give all images one shape, got {list(first.shape)} and {list(tensor.shape)}")


@dataclass(frozen=True)
class Batch:
    """Images that go through the model together.

    Attributes:
        pass_number: from 0; above only where images are extracted several times.
        images: their indices.
    """

    pass_number: int
    images: range
