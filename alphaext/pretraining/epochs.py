"""Which images an epoch of training has, in which order and how transformed: a function of the seed and the epoch alone.

Neither the number of worker processes nor the number of processes that train together changes it: every process draws the whole
epoch, and takes its share of each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..data.images import LabelledImages
from ..data.loading import image_batches
from ..data.transforms import ImageTransform
from ..utils.processes import Group, processors_per_process
from ..utils.seeds import derived_seed, seeded_generator

# Kang et al. (ICLR 2020) load with as many.
_MOST_WORKERS = 12


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
    generator = seeded_generator(seed, "order", epoch)
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
    with image_batches(images, transform, batches, workers=workers, pin_memory=device.type == "cuda") as begin:

        def read() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in begin():
                inputs, labels = batch.whole(), images.labels[list(batch.indices)]
                yield inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)

        yield read


def default_workers() -> int:
    """Worker processes for each of the processes that train on this machine: one a processor, at most twelve."""
    return min(_MOST_WORKERS, processors_per_process())
