"""Class-balanced sampling: every class alike, however many images it has."""

from __future__ import annotations

import torch
from torch import Tensor

from ..utils.checks import check_integer, format_ids
from ..utils.seeds import seeded_generator
from ..utils.tensors import TensorLike, check_labels

__all__ = ["ClassBalancedSampler"]

# Of the random number by which an image is sorted; the other bits of an int64 count rounds.
_KEY_BITS = 36


class ClassBalancedSampler:
    """Draws the images of each epoch: first a class, every class alike, then one of its images (Kang et al., ICLR 2020, 4.1).

    As in their code, classes come in shuffled rounds of all of them, and a class's images in shuffled rounds of all its images:
    within an epoch, two classes are drawn equally often to within one (or ``images_per_class``), and no image comes again
    before all of its class have come. What an epoch draws is a function of the seed and the epoch alone.

    Args:
        labels: class id of each image, integers ``[n]``; every class of ``0 .. num_classes - 1`` must have an image.
        num_classes: N.
        seed: of all draws.
        images_per_class: images drawn of a class before the next class; 1, as their paper says it (default), or 4, as their
            code is configured. It changes how many classes meet in a batch, not how often each is drawn.

    Raises:
        TypeError, ValueError: labels or numbers that are no integers or out of range, or a class without images, naming it.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2])
        >>> sampler = ClassBalancedSampler(labels, num_classes=3, seed=0)
        >>> labels[sampler.draw(epoch=1)].bincount()
        tensor([3, 3, 3])
    """

    def __init__(self, labels: TensorLike, num_classes: int, *, seed: int = 0, images_per_class: int = 1) -> None:
        self.num_classes = check_integer(num_classes, "num_classes", minimum=1)
        self.seed = check_integer(seed, "seed", minimum=0, maximum=2**63 - 1)
        self.images_per_class = check_integer(images_per_class, "images_per_class", minimum=1)
        ids = check_labels(labels, self.num_classes).cpu()
        self._counts = torch.bincount(ids, minlength=self.num_classes)
        missing = torch.nonzero(self._counts == 0)[:, 0].tolist()
        if missing:
            raise ValueError(
                f"labels must hold every class of 0..{self.num_classes - 1}, no samples of class {format_ids(missing)}"
            )
        self._by_class = ids.sort(stable=True).indices
        self._first = self._counts.cumsum(0) - self._counts

    def __len__(self) -> int:
        """Images of an epoch: as many as there are."""
        return len(self._by_class)

    def draw(self, epoch: int) -> Tensor:
        """The places in the data of an epoch's images, ``[len(self)]`` int64, in the order drawn."""
        generator = seeded_generator(self.seed, check_integer(epoch, "epoch", minimum=0))
        classes = self._draw_classes(generator)
        drawn = torch.bincount(classes, minlength=self.num_classes)
        # For each class, as many shuffled rounds of its images as it takes, end to end: the images of all rounds of all classes
        # get a random number each and are sorted, first by round, then by that number.
        rounds = (drawn + self._counts - 1) // self._counts
        sizes = self._counts.repeat_interleave(rounds)
        ends = sizes.cumsum(0)
        round_of = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)
        place = torch.arange(len(round_of), device="cpu") - (ends - sizes)[round_of]
        first = self._first.repeat_interleave(rounds)[round_of]
        keys = torch.randint(1 << _KEY_BITS, (len(round_of),), generator=generator, device="cpu")
        images = self._by_class[(first + place)[((round_of << _KEY_BITS) + keys).sort(stable=True).indices]]
        # The i-th draw of a class takes the i-th of its images.
        of_class = rounds * self._counts
        starts = (of_class.cumsum(0) - of_class) - (drawn.cumsum(0) - drawn)
        in_order = classes.sort(stable=True).indices
        result = torch.empty_like(in_order)
        result[in_order] = images[torch.arange(len(in_order), device="cpu") + starts.repeat_interleave(drawn)]
        return result

    def _draw_classes(self, generator: torch.Generator) -> Tensor:
        picks = -(-len(self) // self.images_per_class)
        rounds = -(-picks // self.num_classes)
        orders = [torch.randperm(self.num_classes, generator=generator, device="cpu") for _ in range(rounds)]
        return torch.cat(orders)[:picks].repeat_interleave(self.images_per_class)[: len(self)]
