"""What trains a head, and what it trains on: the native engine in the extension, torch's autograd for everything else.

Both train the same samples in the same order (:class:`alphaext.training.sampling.EpochSampler`) and agree to rounding wherever
the native one is allowed (docs/exactness.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..metrics.accuracy import label_ranks
from .cached_logits import Samples
from .sampling import EpochSampler
from .sgd import Sgd

ENGINES = ("auto", "native", "autograd")


class TrainingDiverged(FloatingPointError):
    """Something is no longer finite; the message names the class where one can be named."""


class Engine(Protocol):
    """What :func:`alphaext.fit` asks of an engine."""

    name: str
    steps_per_epoch: int

    @property
    def sgd(self) -> Sgd | None:
        """The numbers of the SGD that trains; None for another optimiser."""

    def train(self, epoch: int, multiplier: float) -> float:
        """Train one epoch at ``multiplier`` times the learning rate; the mean loss."""

    def learning_rate(self, multiplier: float) -> float: ...

    def hits(self) -> Tensor | None:
        """``[2, N]``: of each class the validation samples ranked first and among the first five; None without validation."""

    def original_hits(self) -> Tensor | None:
        """The same of the original classifier."""

    def clamped(self) -> int: ...

    def snapshot(self) -> list[Tensor]:
        """What is trained, copied."""

    def restore(self, snapshot: list[Tensor], decay: float) -> None:
        """Give the head what ``snapshot`` holds; ``decay`` is what weight decay has left of the start (:class:`DecayOfStart`).

        Once, at the end: the native engine moves a dense first layer from where the training found it.
        """

    def state(self) -> dict[str, Any]:
        """All that training goes on from, for a checkpoint."""

    def load_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class TrainingData:
    """Samples of a training, and the validation samples, if there are any."""

    samples: Samples
    sampler: EpochSampler
    validation: Samples | None
    num_real: int | None = None  # samples before those that were drawn; None where none were


@torch.no_grad()
def hits_of(linear: nn.Linear, samples: Samples) -> Tensor:
    """``[2, N]``: of each class, the samples that ``linear`` ranks first, and those among its first five."""
    weight, bias = linear.weight, linear.bias
    ranks = []
    for block in torch.arange(len(samples.labels), device="cpu").split(8192):
        features = samples.features[int(block[0]) : int(block[-1]) + 1].to(device=weight.device, dtype=weight.dtype)
        scores = nn.functional.linear(features, weight, bias)
        ranks.append(label_ranks(scores, samples.labels[block].to(scores.device)).cpu())
    return _hits(torch.cat(ranks), samples.labels, len(weight))


def _hits(ranks: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return torch.stack([torch.bincount(labels[ranks < k], minlength=num_classes) for k in (1, 5)])
