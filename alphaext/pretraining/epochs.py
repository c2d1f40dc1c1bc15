"""Which images an epoch of training has, in which order and how transformed: a function of the seed and the epoch alone.

Neither the number of worker processes nor the number of processes that train together changes it: every process draws the whole
epoch, and takes its share of each batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..data.images import ImageReadError, LabelledImages
from ..data.loading import worker_reader
from ..data.transforms import ImageTransform
from ..utils.processes import Group
from ..utils.seeds import derived_seed

__all__ = ["SAMPLINGS", "EpochBatches", "default_workers", "epoch_order", "image_reader"]

SAMPLINGS = ("instance", "class_balanced", "square_root")

# Kang et al. (ICLR 2020) load with as many.
_MOST_WORKERS = 12

_Item: TypeAlias = tuple[Tensor, int] | ImageReadError


def epoch_order(labels: Tensor, sampling: str, seed: int, epoch: int) -> Tensor:
    """The images of an epoch, in the order they are trained on. There are always as many as the data set has.

    Args:
        labels: int64 ``[n]``, class of each image.
        sampling: ``"instance"``, every image once; ``"class_balanced"``, every class as often as any other;
            ``"square_root"``, every class in proportion to the square root of its images (the three of Kang et al., ICLR 2020).
            The images of a class take turns, so that none comes twice before all have come.
        seed: of the draws.
        epoch: 1 is the first.

    Returns:
        int64 ``[n]``, indices into ``labels``.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 0, 1])
        >>> labels[epoch_order(labels, "class_balanced", seed=0, epoch=1)].sum()
        tensor(3)
    """
    generator = torch.Generator("cpu").manual_seed(derived_seed(seed, "order", epoch))
    samples = len(labels)
    if sampling == "instance":
        return torch.randperm(samples, generator=generator, device="cpu")
    counts = torch.bincount(labels)
    shares = (counts > 0).double() if sampling == "class_balanced" else counts.double().sqrt()
    # Systematic sampling: each class gets its share, rounded up or down at random, and all add up.
    offset = torch.rand((), generator=generator, dtype=torch.float64, device="cpu")
    bounds = (shares.cumsum(0) * (samples / float(shares.sum())) + offset).floor().long()
    bounds[-1] = samples
    draws = bounds.diff(prepend=bounds.new_zeros(1)).tolist()
    by_class = labels.argsort(stable=True).split(counts.tolist())
    turns = []
    for images, wanted in zip(by_class, draws, strict=True):
        while wanted > 0:
            shuffled = images.index_select(0, torch.randperm(len(images), generator=generator, device="cpu"))
            turns.append(shuffled[:wanted])
            wanted -= len(images)
    chosen = torch.cat(turns)
    return chosen.index_select(0, torch.randperm(samples, generator=generator, device="cpu"))


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """A process's share of each batch of an epoch: for each image its index and the seed of its augmentation.

    An image's seed follows from the seed, the epoch and its place in the epoch: an image that comes several times in an epoch
    comes in several forms.

    Attributes:
        epoch: the epoch that the next iteration is of; 1 is the first.
        sizes: images of each batch, of all processes together.

    Args:
        labels: int64 ``[n]``, class of each image.
        sampling: one of :data:`SAMPLINGS`.
        batch_size: images of all processes together, a multiple of their number.
        seed: of the draws.
        group: the processes.
        drop_last: leave an incomplete last batch out, unless it is the only one. Otherwise it is kept as far as it divides
            among the processes with at least two images each, because batch normalisation needs two.
    """

    def __init__(self, labels: Tensor, sampling: str, batch_size: int, seed: int, group: Group, drop_last: bool = True) -> None:
        self.labels, self.sampling, self.seed, self.group = labels, sampling, seed, group
        self.epoch = 1
        full, rest = divmod(len(labels), batch_size)
        rest -= rest % group.world_size
        if (drop_last and full) or rest < 2 * group.world_size:
            rest = 0
        self.sizes = [batch_size] * full + ([rest] if rest else [])

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = epoch_order(self.labels, self.sampling, self.seed, self.epoch).tolist()
        begin = 0
        for size in self.sizes:
            places = range(begin + self.group.rank, begin + size, self.group.world_size)
            yield [(order[place], derived_seed(self.seed, "augmentation", self.epoch, place)) for place in places]
            begin += size


@contextmanager
def image_reader(
    images: LabelledImages,
    transform: ImageTransform,
    batches: EpochBatches | list[list[tuple[int, int]]],
    *,
    workers: int,
    device: torch.device,
) -> Iterator[Callable[[], Iterator[tuple[Tensor, Tensor]]]]:
    """A block with a function that goes through ``batches``, as often as it is called, always with the same workers.

    However the block ends, the workers are gone afterwards.

    Args:
        images: where the images come from.
        transform: what is made of each.
        batches: for each image its index and the seed of its transform.
        workers: processes that read images beside this one; 0 for none.
        device: where the batches are going to.

    Yields:
        A function that returns an iterator over the batches: images ``[b, C, H, W]`` and labels int64 ``[b]``, on the device.
        It raises ImageReadError for an image that cannot be read.
    """
    reader = worker_reader(
        _Transformed(images, transform),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )
    with reader as begin:

        def read() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in begin():
                if isinstance(batch, ImageReadError):
                    raise batch
                inputs, labels = batch
                yield inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)

        yield read


class _Transformed(Dataset[_Item]):
    """Images, each transformed with a seed of its own. One that cannot be read comes as the error.

    Raised in a worker, the error would come back with the worker's traceback as its message.
    """

    def __init__(self, images: LabelledImages, transform: ImageTransform) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, item: tuple[int, int]) -> _Item:
        index, seed = item
        try:
            image, label = self.images[index]
        except ImageReadError as error:
            return error
        return self.transform.seeded(image, seed), label


def _collate(items: list[_Item]) -> tuple[Tensor, Tensor] | ImageReadError:
    pairs = []
    for item in items:
        if isinstance(item, ImageReadError):
            return item
        pairs.append(item)
    labels = torch.tensor([label for _, label in pairs], dtype=torch.int64, device="cpu")
    return torch.stack([image for image, _ in pairs]), labels


def default_workers() -> int:
    """Worker processes for each of the processes that train on this machine: one a processor, at most twelve."""
    processors = len(os.sched_getaffinity(0))
    try:
        processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except ValueError:
        processes = 1
    return min(_MOST_WORKERS, processors // processes)
