"""Images in batches as a model takes them: decoded and transformed, by this process or by workers beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from .images import ImageReadError, LabelledImages

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Batch",
    "ImageBatch",
    "Transform",
    "image_batches",
    "image_seed",
]


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


def image_seed(seed: int, pass_number: int, index: int) -> int:
    """The seed of a random transform, which depends on nothing but the extraction's seed, the pass and the image's index."""
    digest = hashlib.sha256(f"{seed}/{pass_number}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextmanager
def image_batches(
    images: LabelledImages,
    transform: Transform,
    batches: Iterable[Batch],
    *,
    seed: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[Iterator[ImageBatch]]:
    """Read and transform ``batches`` in their order.

    Args:
        images: decoded one by one.
        transform: of each image.
        batches: which images go together.
        seed: of a random transform.
        workers: processes that do it, each some batches ahead; 0: this process does, one batch when it is asked for. They are
            gone when the block ends, however it ends.
        pin_memory: whether the batches go to a GPU.

    Yields:
        An iterator over the batches.
    """
    reader = worker_reader(
        _ReadBatches(images, transform, seed),
        sampler=_Order(batches),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
    )
    with reader as begin:
        yield begin()


@contextmanager
def worker_reader(dataset: Dataset[Any], **options: Any) -> Iterator[Callable[[], Iterator[Any]]]:
    """A block with a function that begins to go through a data set, as often as it is called.

    However the block ends, the workers are gone afterwards.

    Args:
        dataset: what is read.
        options: of torch's ``DataLoader``.
    """
    # Without a generator, each iteration would draw from the global random state.
    loader: DataLoader[Any] = DataLoader(dataset, generator=torch.Generator("cpu").manual_seed(0), **options)
    iterator: Iterator[Any] | None = None

    def begin() -> Iterator[Any]:
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


class _Order:
    """Batches as a sampler."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


class _ReadBatches(Dataset[ImageBatch]):
    """Reads whole batches. Errors come back as values: as exceptions they would arrive as the text of a worker's traceback."""

    def __init__(self, images: LabelledImages, transform: Transform, seed: int) -> None:
        self._images, self._transform, self._seed = images, transform, seed

    def __getitem__(self, batch: Batch) -> ImageBatch:
        tensors: list[Tensor] = []
        indices: list[int] = []
        unreadable: list[tuple[int, ImageReadError]] = []
        for index in batch.images:
            try:
                image = self._images.load(index)
            except ImageReadError as error:
                unreadable.append((index, error))
                continue
            try:
                tensor = self._transformed(image, batch.pass_number, index)
            except MemoryError:
                raise
            except Exception as error:
                failure = f"the transform fails on image {self._images.name(index)!r}: {type(error).__name__}: {error}"
                return ImageBatch(None, (), (), failure)
            wrong = self._why_wrong(tensor, tensors)
            if wrong:
                failure = f"the transform must {wrong}, for image {self._images.name(index)!r}"
                return ImageBatch(None, (), (), failure)
            tensors.append(tensor)
            indices.append(index)
        # In a worker, this stacks in the memory that it shares with the main process.
        stacked = default_collate(tensors) if tensors else None
        return ImageBatch(stacked, tuple(indices), tuple(unreadable))

    def _transformed(self, image: Image, pass_number: int, index: int) -> Tensor:
        if self._transform.random:
            return self._transform.seeded(image, image_seed(self._seed, pass_number, index))
        return self._transform(image)

    @staticmethod
    def _why_wrong(tensor: object, others: list[Tensor]) -> str:
        if not isinstance(tensor, Tensor):
            return f"return a tensor, got a {type(tensor).__name__}"
        if not tensor.is_floating_point():
            return f"return floating point, got {tensor.dtype}"
        if others and tensor.shape != others[0].shape:
            return f"give all images one shape, got {list(others[0].shape)} and {list(tensor.shape)}"
        return ""


def _as_it_is(batch: Any) -> Any:
    return batch


@dataclass(frozen=True)
class Batch:
    """Images that go through the model together.

    Attributes:
        pass_number: from 0; above only where images are extracted several times.
        images: their indices.
    """

    pass_number: int
    images: range
