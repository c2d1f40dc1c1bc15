"""What runs an epoch: the native engine, which trains in the extension, and torch's autograd for everything else.

Both train the same samples in the same order (:class:`alphaext.sampling.EpochSampler`) and agree to rounding wherever the
native one is allowed (docs/exactness.md): SGD, a frozen classifier, float32 or float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from . import ops
from ._checks import check_finite
from .classes import ClassSplit
from .member_logits import Columns, Samples, TrainingLogits, ValidationLogits
from .metrics import label_ranks
from .modules import AlphaNet, clamped_outputs, first_layer_scale
from .options import Sgd, TrainingOptions
from .sampling import EpochSampler

ENGINES = ("auto", "native", "autograd")

# The most bytes of cached logits of training samples; beyond it those of base samples are computed anew each epoch.
CACHE_BYTES = 2 << 30

_TILE = 16  # hidden units, as in csrc/kernels/training_params.h


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


def why_not_native(head: AlphaNet, optimizer: torch.optim.Optimizer | None) -> str | None:
    """Why the native engine cannot train this head exactly as torch would; None if it can."""
    if optimizer is not None and Sgd.of(optimizer) is None:
        return (
            f"the optimizer is {type(optimizer).__name__}, not a fresh torch.optim.SGD with one group of parameters, without "
            "maximize, hooks or a tensor for lr"
        )
    if any(p is not None and p.requires_grad for p in (head.weight, head.bias)):
        return "the classifier is trained too"
    if optimizer is not None:
        has = {id(p) for p in optimizer.param_groups[0]["params"]}
        missing = [name for name, p in head.named_parameters() if p.requires_grad and id(p) not in has]
        if missing:
            return f"the optimizer does not have {', '.join(missing)}"
    if type(head) is not AlphaNet:
        return f"the head is a {type(head).__name__}, which may compute something else than AlphaNet"
    if head.weight.dtype not in (torch.float32, torch.float64):
        return f"the head is {head.weight.dtype}, not float32 or float64"
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in head.parameters()):
        return "a parameter has a gradient hook"
    frozen = [name for name, p in head.named_parameters() if not p.requires_grad and name not in ("weight", "bias")]
    if frozen:
        return f"{', '.join(frozen)} does not ask for a gradient"
    return None


def native_device(head: AlphaNet) -> torch.device:
    """Where the native engine trains ``head``: on its GPU if the extension has kernels that run there, or else on the CPU."""
    on_gpu = head.weight.is_cuda and torch.ops.alphaext.trains_on(head.weight)
    return head.weight.device if on_gpu else torch.device("cpu")


class NativeEngine:
    """Trains in the extension, from cached member logits: no features, no classifier, no first layer.

    On one thread of the CPU, or, where the head is on a GPU and the extension has kernels for it, there. What a step needs of
    the first layer is its output; its weights are put back when the head is given its parameters.
    """

    name = "native"

    def __init__(
        self,
        head: AlphaNet,
        options: TrainingOptions,
        sgd: Sgd,
        data: TrainingData,
        first_epoch: int = 1,
        logits: SharedLogits | None = None,
    ) -> None:
        self.head, self.options, self.sgd, self.data = head, options, sgd, data
        self.device = native_device(head)
        self.sampler = data.sampler
        self.steps_per_epoch = -(-len(self.sampler) // options.batch_size)
        epochs = range(first_epoch, options.epochs + 1)
        if logits is None:
            logits = SharedLogits([head], data, epochs, [self.sampler], options.prior_correction)
        self.logits = logits
        self.columns = self.logits.columns.of(head).to(self.device)
        self.steps = 0
        self.known_hits: Tensor | None = None  # of a group, counted for all of it at once
        num_few, hidden = head.num_few, head.w2.shape[2]
        members = head.top_k + 1 + head.num_directions  # to training, a direction is a member like any other
        dtype = head.weight.dtype
        self._hidden, self._tiles = hidden, -(-hidden // _TILE)
        with torch.no_grad():
            start = _preactivations(head)
            self._scale = _gradient_scale(head).to(device=self.device, dtype=dtype).contiguous()
            w2, b2 = head.w2.detach().to(self.device), head.b2.detach().to(self.device, copy=True)
            if head.residual is not None:
                w2 = w2.new_zeros(len(w2), members, 0)
                b2 = torch.cat([b2, head.residual.detach().to(self.device)], dim=1)
            self._state = self._packed(start.to(device=self.device, dtype=dtype), w2)
            self._b2 = b2
            self._b2_momentum = torch.zeros_like(self._b2)
            self._raw = torch.empty(num_few, members, dtype=dtype, device=self.device)
            self._alpha = torch.empty(num_few, members, dtype=dtype, device=self.device)
            self._penalty = self._few_offset = None
            if options.regularize:
                identity = head.identity_outputs().to(self.device)
                self._penalty = torch.stack([torch.full_like(identity, options.regularize), identity])
            if options.prior_correction:
                self._few_offset = self.sampler.log_prior[head.few_classes.cpu()].to(device=self.device, dtype=dtype)
            # The dense first layer's change is told by how far its output has moved.
            self._start = start.to(device=self.device, dtype=torch.float64) if head.first_layer == "dense" else None
        self._call(torch.empty(0, dtype=torch.int64, device=self.device), 0.0)

    @property
    def _rows(self) -> tuple[int, int]:
        """Rows of pre-activations and of w2 in a tile: those of one network."""
        return (self.head.num_few if self._scale.dim() == 2 else 1), self.head.top_k + 1 + self.head.num_directions

    def _packed(self, preactivation: Tensor, w2: Tensor) -> Tensor:
        """The state as the extension wants it: tile by tile, each with zeros for the momentum."""
        classes, members = self._rows
        networks = len(w2)
        state = torch.zeros(
            networks, self._tiles, 2 * classes + 2 * members, _TILE, dtype=preactivation.dtype, device=self.device
        )
        missing = self._tiles * _TILE - self._hidden
        rows = nn.functional.pad(preactivation, (0, missing)).view(networks, classes, self._tiles, _TILE)
        state[:, :, :classes] = rows.transpose(1, 2)
        rows = nn.functional.pad(w2, (0, missing)).view(networks, members, self._tiles, _TILE)
        state[:, :, 2 * classes : 2 * classes + members] = rows.transpose(1, 2)
        return state

    def _unpacked(self, state: Tensor) -> tuple[Tensor, Tensor]:
        classes, members = self._rows
        preactivation = state[:, :, :classes].transpose(1, 2).reshape(self.head.num_few, -1)[:, : self._hidden]
        w2 = state[:, :, 2 * classes : 2 * classes + members].transpose(1, 2).reshape(len(state), members, -1)
        return preactivation, w2[:, :, : self._hidden]

    def _launch(self, rows: Tensor, lr: float) -> Tensor:
        """Train on ``rows``: float64 ``[3]``, the sum of their losses, and the step and class that failed, or -1."""
        head, sgd, cached = self.head, self.sgd, self.logits.training
        result: Tensor = torch.ops.alphaext.train_epoch(
            self._state, self._b2, self._b2_momentum, self._raw, self._alpha,
            rows, cached.logits, cached.base_logsumexp, cached.label_logit, cached.few_of_label, self.columns, self._scale,
            self.options.batch_size, head.gamma, ops.rule_number(head.rule), head.projected_gradient,
            lr, sgd.momentum, sgd.dampening, sgd.weight_decay, sgd.nesterov, self.steps == 0, self._penalty, self._few_offset,
        )  # fmt: skip
        return result

    def _call(self, rows: Tensor, lr: float) -> tuple[float, int, int]:
        """The same, read: on a GPU this waits for it."""
        loss, failed_step, failed_class = self._launch(rows, lr).tolist()
        return loss, int(failed_step), int(failed_class)

    def learning_rate(self, multiplier: float) -> float:
        return self.sgd.lr * multiplier

    def rows_of(self, epoch: int) -> Tensor:
        """The rows of the cached logits that an epoch trains on, in order."""
        return self.logits.rows_of(self.sampler.indices.index_select(0, self.sampler.draw(epoch)))

    def train(self, epoch: int, multiplier: float) -> float:
        return self.after_epoch(*self._call(self.rows_of(epoch), self.learning_rate(multiplier)))

    def after_epoch(self, loss: float, failed_step: int, failed_class: int) -> float:
        """The mean loss of an epoch that the extension has trained, or TrainingDiverged."""
        self.steps += self.steps_per_epoch
        if failed_step >= 0:
            where = f"step {failed_step + 1} of {self.steps_per_epoch}"
            if failed_class >= 0:
                where = f"class {int(self.head.few_classes[failed_class])}, {where}"
            raise TrainingDiverged(where)
        return loss / len(self.sampler)

    def hits(self) -> Tensor | None:
        if self.known_hits is not None:
            known, self.known_hits = self.known_hits, None
            return known
        return None if self.logits.validation is None else self.logits.validation.hits(self._alpha, self.columns)

    def original_hits(self) -> Tensor | None:
        if self.logits.validation is None:
            return None
        own = torch.zeros_like(self._alpha)
        own[:, 0] = 1
        return self.logits.validation.hits(own, self.columns)

    def clamped(self) -> int:
        return int(clamped_outputs(self._raw[:, : self.head.top_k + 1], self.head.rule, self.head.gamma).sum())

    def snapshot(self) -> list[Tensor]:
        preactivation, w2 = self._unpacked(self._state)
        return [preactivation.clone(), w2.clone(), self._b2.clone()]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor], decay: float) -> None:
        head = self.head
        preactivation, w2, b2 = snapshot
        if head.residual is None:
            head.w2.copy_(w2)
            head.b2.copy_(b2)
        else:
            own = head.top_k + 1
            head.b2.copy_(b2[:, :own])
            head.residual.copy_(b2[:, own:])
        if head.first_layer == "factored":
            head.preactivation.copy_(preactivation)
            return
        assert self._start is not None
        head._move_outputs(preactivation.double() - decay * self._start, decay)

    def state(self) -> dict[str, Any]:
        # Copies, because a part of a stacked tensor would be saved with all of it.
        tensors = {"state": self._state, "b2": self._b2, "b2_momentum": self._b2_momentum}
        return {name: tensor.clone() for name, tensor in tensors.items()} | {"steps": self.steps}

    def load_state(self, state: dict[str, Any]) -> None:
        self._state.copy_(state["state"])
        self._b2.copy_(state["b2"])
        self._b2_momentum.copy_(state["b2_momentum"])
        self.steps = state["steps"]
        self._call(torch.empty(0, dtype=torch.int64, device=self.device), 0.0)


class SharedLogits:
    """The cached logits of a training, or of many on the same samples with the same few classes."""

    def __init__(
        self,
        heads: list[AlphaNet],
        data: TrainingData,
        epochs: range,
        samplers: list[EpochSampler],
        prior_correction: bool = False,
    ) -> None:
        """For training ``heads`` in ``epochs`` on what ``samplers`` draw, which have one prior if it is corrected for."""
        self.columns = Columns(heads)
        self.samples = data.samples
        count = len(data.samples.labels)
        self._row_of = torch.full((count,), -1, dtype=torch.int64, device="cpu")
        taken = torch.zeros(count, dtype=torch.bool, device="cpu")
        for sampler in samplers:
            taken[sampler.used(epochs)] = True
        used = taken.nonzero().flatten()
        row_bytes = len(self.columns) * self.columns.few_penalty.element_size()
        self.all_at_once = len(used) * row_bytes <= CACHE_BYTES
        if not self.all_at_once:
            # Few samples take part in every epoch. Base ones get rows after them, anew each epoch.
            used = samplers[0].indices[: samplers[0].num_few]
        rows = len(used) if self.all_at_once else len(used) + max(sampler.negatives for sampler in samplers)
        self.num_kept = len(used)
        self.device = native_device(heads[0])
        prior = samplers[0].log_prior if prior_correction else None
        self.training = TrainingLogits(self.columns, rows, self.device, prior)
        self.training.fill(0, data.samples, used)
        self._row_of[used] = torch.arange(len(used), device="cpu")
        self.validation = None if data.validation is None else ValidationLogits(self.columns, data.validation, self.device)

    def rows_of(self, indices: Tensor) -> Tensor:
        """The rows of an epoch's samples, in the order they are trained on."""
        # index_select and not indexing, which waits for a second thread however few the indices.
        rows = self._row_of.index_select(0, indices)
        if not self.all_at_once:
            base = (rows < 0).nonzero().flatten()
            self.training.fill(self.num_kept, self.samples, indices[base])
            rows[base] = self.num_kept + torch.arange(len(base), device="cpu")
        return rows.to(self.device)


class AutogradEngine:
    """Trains with torch's autograd and any of its optimisers.

    With a frozen classifier the steps run on logits: those of few and validation samples are computed once, those of base
    samples once an epoch for the ones drawn.
    """

    name = "autograd"

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
        self._validation_logits: Tensor | None = None
        if data.validation is not None:
            self._validation_logits = self._logits(data.validation, torch.arange(len(data.validation.labels), device="cpu"))
            self._original_hits = self._count(self._validation_logits)

    @torch.no_grad()
    def _logits(self, samples: Samples, indices: Tensor) -> Tensor:
        head = self.head
        blocks = [nn.functional.linear(self._features(samples, block), head.weight, head.bias) for block in indices.split(8192)]
        return torch.cat(blocks)

    def _features(self, samples: Samples, indices: Tensor) -> Tensor:
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
        self._check_finite(loss)
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

    def _check_finite(self, loss: float) -> None:
        finite = self.head._outputs()[0].isfinite().all(dim=1)
        if not bool(finite.all()):
            raise TrainingDiverged(f"class {int(self.head.few_classes[int((~finite).nonzero()[0, 0])])}")
        with torch.no_grad():
            if not math.isfinite(loss) or not bool(self._scores(self._few_inputs[:1]).isfinite().all()):
                raise TrainingDiverged("the loss")

    @torch.no_grad()
    def hits(self) -> Tensor | None:
        if self._validation_logits is None or self.data.validation is None:
            return None
        logits = self._validation_logits
        if self.mixes_logits:
            return self._count(self.head.mix_logits(logits))
        blocks = torch.arange(len(logits), device="cpu").split(8192)
        return self._count(torch.cat([self.head(self._features(self.data.validation, block)) for block in blocks]))

    def _count(self, scores: Tensor) -> Tensor:
        assert self.data.validation is not None
        labels = self.data.validation.labels
        return _hits(label_ranks(scores, labels.to(scores.device)).cpu(), labels, self.head.out_features)

    def original_hits(self) -> Tensor | None:
        return None if self._validation_logits is None else self._original_hits

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
        self.optimizer.load_state_dict(state["optimizer"])
        self.restore(state["parameters"], 1.0)


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


class SplitMetrics:
    """Top-1 and top-5 accuracy for each part of a split, over samples and as mean over classes.

    Keys are ``few``, ``medium``, ``many``, ``all``, each also with ``_top5``, ``_class_mean`` and ``_class_mean_top5``; a part
    without samples is NaN.
    """

    def __init__(self, split: ClassSplit, counts: Tensor) -> None:
        """``counts``: validation samples of each class."""
        parts = {"few": split.few, "medium": split.medium, "many": split.many}
        member = np.zeros((len(counts), 4), dtype=np.int64)
        for column, ids in enumerate(parts.values()):
            member[ids.numpy(), column] = 1
        member[:, 3] = 1
        self._names = (*parts, "all")
        samples = counts.numpy()
        self._member, self._totals = member, samples @ member
        seen = member * (samples > 0)[:, None]
        # Nothing to average is nan, without a warning: 0 / 0 is what is meant.
        with np.errstate(divide="ignore", invalid="ignore"):
            self._weights = seen / (np.maximum(samples, 1)[:, None] * seen.sum(axis=0).astype(np.float64))

    def of(self, hits: Tensor) -> dict[str, float]:
        """The metrics of hits ``[2, N]``: of each class, samples ranked first, and samples among the first five."""
        # NumPy, not torch: small operations of torch's may wait for a second thread, long on a busy machine.
        numbers = hits.numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            over_samples = (numbers @ self._member) / self._totals.astype(np.float64)
        over_classes = np.where(self._totals > 0, numbers @ np.nan_to_num(self._weights), np.nan)
        result: dict[str, float] = {}
        for column, name in enumerate(self._names):
            result[name], result[f"{name}_top5"] = over_samples[:, column].tolist()
            result[f"{name}_class_mean"], result[f"{name}_class_mean_top5"] = over_classes[:, column].tolist()
        return result


@torch.no_grad()
def _preactivations(head: AlphaNet) -> Tensor:
    return head.preactivation.detach() if head.first_layer == "factored" else head._preactivations()


def _gradient_scale(head: AlphaNet) -> Tensor:
    return head.gradient_scale if head.first_layer == "factored" else first_layer_scale(head.z, len(head.w1))
