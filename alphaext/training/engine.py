"""What trains a head, and what it trains on: the native engine in the extension, torch's autograd for everything else.

Both train the same samples in the same order (:class:`alphaext.training.sampling.EpochSampler`) and agree to rounding wherever
the native one is allowed (docs/reference/exactness.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..metrics.accuracy import label_ranks
from .cached_logits import Samples
from .sampling import EpochSampler

ENGINES = ("auto", "native", "autograd")


class TrainingDiverged(FloatingPointError):
    """Numbers are no longer finite, or far too large; the message names the class where one can be named."""

    def __init__(self, what: str, epoch: int, lr: float) -> None:
        super().__init__(f"training diverged: {what} in epoch {epoch} (lr {lr:g}); a smaller lr may help")


@dataclass(frozen=True)
class TrainingData:
    """Samples of a training, and the validation samples, if there are any."""

    samples: Samples
    sampler: EpochSampler
    validation: Samples | None


@torch.no_grad()
def hits_of(linear: nn.Linear, samples: Samples) -> Tensor:
    """``[2, N]``: of each class, the samples that ``linear`` ranks first, and those among its first five."""
    weight, bias = linear.weight, linear.bias
    ranks = []
    for block in torch.arange(len(samples.labels), device="cpu").split(8192):
        features = samples.features[int(block[0]) : int(block[-1]) + 1].to(device=weight.device, dtype=weight.dtype)
        scores = nn.functional.linear(features, weight, bias)
        ranks.append(label_ranks(scores, samples.labels[block].to(scores.device)).cpu())
    return count_hits(torch.cat(ranks), samples.labels, len(weight))


def count_hits(ranks: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """``[2, N]``: of each class, the samples whose label has rank 0, and those where it is below 5."""
    return torch.stack([torch.bincount(labels[ranks < k], minlength=num_classes) for k in (1, 5)])
