"""Training with torch's autograd and any of its optimisers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..head.alphanet import AlphaNet
from ..metrics.accuracy import label_ranks
from ..utils.resume import check_alike, load_optimizer
from ..utils.tensors import check_finite, first_true
from .cached_logits import Samples
from .engine import TrainingData, TrainingDiverged, count_hits
from .options import TrainingOptions
from .sgd import Sgd


class AutogradEngine:
    """Trains with torch's autograd and any of its optimisers; methods as those of the native engine.

    With a frozen classifier the steps run on logits: those of few and validation samples are computed once, those of base
    samples once an epoch for the ones drawn.
    """

    name = "autograd"
    validation_logits = None  # the native engine's

    def __init__(
        self,
        head: AlphaNet,
        options: TrainingOptions,
        data: TrainingData,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.head, self.options, self.data, self.optimizer = head, options, data, optimizer
        self.sampler = data.sampler
        self.sgd = Sgd.of(optimizer)
        self.steps_per_epoch = -(-len(self.sampler) // options.batch_size)
        self.parameters = [p for p in head.parameters() if p.requires_grad]
        self._lrs = [float(group["lr"]) for group in optimizer.param_groups]
        frozen = not any(p is not None and p.requires_grad for p in (head.weight, head.bias))
        self.mixes_logits = frozen and head.residual is None
        self._offset = self._identity = None
        if options.prior_correction:
            self._offset = self.sampler.log_prior.to(device=head.weight.device)
        if options.regularize:
            self._identity = head.identity_outputs()
        self._few_inputs = self._inputs(data.samples, self.sampler.indices[: self.sampler.num_few])
        self._original_hits: Tensor | None = None
        if data.validation is not None:
            indices = torch.arange(len(data.validation.labels), device="cpu")
            self._validation_logits = self._logits(data.validation, indices)
            self._original_hits = self._count(self._validation_logits, data.validation)

    @torch.no_grad()
    def _logits(self, samples: Samples, indices: Tensor) -> Tensor:
        head = self.head
        blocks = [nn.functional.linear(self._features(samples, block), head.weight, head.bias) for block in indices.split(8192)]
        return torch.cat(blocks)

    def _features(self, samples: Samples, indices: Tensor) -> Tensor:
        samples.check(indices)
        features = samples.features[indices]
        if not bool(features.isfinite().all()):
            for index in indices.tolist():
                check_finite(samples.features[index : index + 1], samples.name, first_row=index)
        return features.to(device=self.head.weight.device, dtype=self.head.weight.dtype)

    def _inputs(self, samples: Samples, indices: Tensor) -> Tensor:
        return self._logits(samples, indices) if self.mixes_logits else self._features(samples, indices)

    def _scores(self, inputs: Tensor) -> Tensor:
        return self.head.mix_logits(inputs) if self.mixes_logits else self.head(inputs)

    def learning_rate(self, multiplier: float) -> float:
        return self._lrs[0] * multiplier

    def train(self, epoch: int, multiplier: float) -> float:
        for group, lr in zip(self.optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * multiplier
        order = self.sampler.draw(epoch)
        is_few = order < self.sampler.num_few
        # Few samples are kept in the order of their numbers; base ones are computed in the order they were drawn.
        position = torch.where(is_few, order, self.sampler.num_few + (~is_few).cumsum(0) - 1)
        indices = self.sampler.indices[order]
        inputs = torch.cat([self._few_inputs, self._inputs(self.data.samples, indices[~is_few])])
        inputs = inputs[position.to(inputs.device)]
        targets = self.data.samples.labels[indices].to(inputs.device)
        total = torch.zeros((), dtype=torch.float64, device=inputs.device)
        size = self.options.batch_size
        with torch.enable_grad():
            for batch, batch_targets in zip(inputs.split(size), targets.split(size), strict=True):
                total += self._step(batch, batch_targets) * len(batch)
        loss = float(total) / len(inputs)
        self._check_finite(loss, epoch, self._lrs[0] * multiplier)
        return loss

    def _step(self, batch: Tensor, targets: Tensor) -> Tensor:
        losses: list[Tensor] = []

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            scores = self._scores(batch)
            scores = scores if scores.dtype == torch.float64 else scores.float()
            if self._offset is not None:
                scores = scores + self._offset.to(scores.dtype)
            loss = nn.functional.cross_entropy(scores, targets)
            losses.append(loss.detach())
            if self._identity is not None:
                pulled = (self.head.outputs() - self._identity).to(scores.dtype).square().sum()
                loss = loss + self.options.regularize / 2 * pulled
            loss.backward()
            return loss

        self.optimizer.step(closure)  # type: ignore[arg-type]  # closures may return tensors, as torch's own examples do
        return losses[0]

    def _check_finite(self, loss: float, epoch: int, lr: float) -> None:
        finite = self.head.evaluate_networks()[1].isfinite().all(dim=1)
        if (place := first_true(~finite)) is not None:
            raise TrainingDiverged(f"class {int(self.head.few_classes[place])} is no longer finite", epoch, lr)
        with torch.no_grad():
            if not math.isfinite(loss) or not bool(self._scores(self._few_inputs[:1]).isfinite().all()):
                raise TrainingDiverged("the loss is no longer finite", epoch, lr)

    @torch.no_grad()
    def hits(self) -> Tensor | None:
        validation = self.data.validation
        if validation is None:
            return None
        if self.mixes_logits:
            return self._count(self.head.mix_logits(self._validation_logits), validation)
        blocks = torch.arange(len(validation.labels), device="cpu").split(8192)
        return self._count(torch.cat([self.head(self._features(validation, block)) for block in blocks]), validation)

    def _count(self, scores: Tensor, validation: Samples) -> Tensor:
        ranks = label_ranks(scores, validation.labels.to(scores.device)).cpu()
        return count_hits(ranks, validation.labels, self.head.out_features)

    def original_hits(self) -> Tensor | None:
        return self._original_hits

    def clamped(self) -> int:
        return int(self.head.clamped().sum())

    def snapshot(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor], decay: float) -> None:
        for parameter, value in zip(self.parameters, snapshot, strict=True):
            parameter.copy_(value)

    def state(self) -> dict[str, Any]:
        return {"parameters": [p.detach() for p in self.parameters], "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        load_optimizer(self.optimizer, state["optimizer"])
        check_alike(state["parameters"], self.parameters, "parameters")
        self.restore(state["parameters"], 1.0)
