"""The native engine, which trains in the extension: SGD, a frozen classifier, float32 or float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..head.alphanet import AlphaNet
from ..head.first_layer import first_layer_scale
from ..head.outputs import clamped_outputs
from ..ops import training as ops
from ..utils.checks import check_integer
from ..utils.resume import copy_into
from ..utils.transfers import on_host, to_device
from . import cached_logits
from .cached_logits import Columns, TrainingLogits, ValidationLogits
from .engine import TrainingData, TrainingDiverged
from .options import TrainingOptions
from .sampling import EpochSampler
from .sgd import Sgd


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
        return f"the head is {head.weight.dtype}, not float32 or float64; linear.float() makes a layer that can be"
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in head.parameters()):
        return "a parameter has a gradient hook"
    frozen = [name for name, p in head.named_parameters() if not p.requires_grad and name not in ("weight", "bias")]
    if frozen:
        return f"{', '.join(frozen)} does not ask for a gradient"
    return None


def native_device(head: AlphaNet) -> torch.device:
    """Where the native engine trains ``head``: on its GPU if the extension has kernels that run there, or else on the CPU."""
    return head.weight.device if ops.trains_on(head.weight) else torch.device("cpu")


class Trained(NamedTuple):
    """What an epoch changes, as :func:`alphaext.ops.training.train_epoch` takes it; of several engines, each stacked."""

    state: Tensor
    b2: Tensor
    b2_momentum: Tensor
    raw: Tensor
    alpha: Tensor


class NativeEngine:
    """Trains in the extension, from cached member logits: no features, no classifier, no first layer.

    On one thread of the CPU, or, where the head is on a GPU and the extension has kernels for it, there. What a step needs of
    the first layer is its output; its weights are put back when the head is given its parameters.

    Attributes:
        trained: what an epoch changes.
        scale: what multiplies the gradient of the first layer's output.
        penalty: how strongly outputs are drawn to which values; None under ``regularize=0``.
        few_offset: what is added to each few score while training; None without ``prior_correction``.
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
        # What was measured with the last epoch, until it is asked for.
        self._kept_hits: Tensor | None = None
        self._kept_clamped: int | None = None
        self._drawn: tuple[int, Tensor] | None = None  # the rows of an epoch to come
        num_few, hidden = head.num_few, head.w2.shape[2]
        members = head.top_k + 1 + head.num_directions  # to training, a direction is a member like any other
        dtype = head.weight.dtype
        self._hidden = hidden
        with torch.no_grad():
            start = head.evaluate_networks()[0]
            scale = head.gradient_scale if head.first_layer == "factored" else first_layer_scale(head.z, len(head.w1))
            self.scale = scale.to(device=self.device, dtype=dtype).contiguous()
            w2, b2 = head.w2.detach().to(self.device), head.b2.detach().to(self.device, copy=True)
            if head.residual is not None:
                w2 = w2.new_zeros(len(w2), members, 0)
                b2 = torch.cat([b2, head.residual.detach().to(self.device)], dim=1)
            self.trained = Trained(
                state=ops.pack_state(start.to(device=self.device, dtype=dtype), w2),
                b2=b2,
                b2_momentum=torch.zeros_like(b2),
                raw=torch.empty(num_few, members, dtype=dtype, device=self.device),
                alpha=torch.empty(num_few, members, dtype=dtype, device=self.device),
            )
            self.penalty: Tensor | None = None
            self.few_offset: Tensor | None = None
            if options.regularize:
                identity = head.identity_outputs().to(self.device)
                self.penalty = torch.stack([torch.full_like(identity, options.regularize), identity])
            if options.prior_correction:
                self.few_offset = self.sampler.log_prior[head.few_classes.cpu()].to(device=self.device, dtype=dtype)
            # The dense first layer's change is told by how far its output has moved.
            self._start = start.to(device=self.device, dtype=torch.float64) if head.first_layer == "dense" else None
        self.train_rows(torch.empty(0, dtype=torch.int64, device=self.device), 0.0)

    def train_rows(self, rows: Tensor, lr: float) -> Tensor:
        """Train on ``rows``: float64 ``[3]``, the sum of their losses, and the step and class that failed, or -1."""
        cached = self.logits.training
        return ops.train_epoch(
            *self.trained,
            rows, cached.logits, cached.base_logsumexp, cached.label_logit, cached.few_of_label, self.columns, self.scale,
            self.options.batch_size, self.step_options(lr), self.penalty, self.few_offset,
        )  # fmt: skip

    def step_options(self, lr: float) -> ops.StepOptions:
        """The numbers of the next epoch's steps."""
        head, numbers = self.head, vars(self.sgd) | {"lr": lr}
        return ops.StepOptions(
            **numbers,
            gamma=head.gamma,
            rule=head.rule,
            projected_gradient=head.projected_gradient,
            first_step=self.steps == 0,
        )

    def learning_rate(self, multiplier: float) -> float:
        return self.sgd.lr * multiplier

    def rows_of(self, epoch: int) -> Tensor:
        """The rows of the cached logits that an epoch trains on, in order, on the CPU."""
        drawn, self._drawn = self._drawn, None
        if drawn is not None and drawn[0] == epoch:
            return drawn[1]
        return self.logits.rows_of(self.sampler.indices.index_select(0, self.sampler.draw(epoch)))

    def draw_ahead(self, epoch: int) -> None:
        """Draw the rows of the epoch after ``epoch``, while a GPU trains that one."""
        if self.logits.all_at_once and epoch < self.options.epochs:
            self._drawn = epoch + 1, self.rows_of(epoch + 1)

    def keep_measured(self, raw: Tensor, hits: Tensor | None) -> None:
        """Keep what was measured of an epoch with its loss: which classes are clamped, from the outputs, and the hits."""
        self._kept_clamped, self._kept_hits = self._count_clamped(raw), hits

    def train(self, epoch: int, multiplier: float) -> float | TrainingDiverged:
        """Train one epoch at ``multiplier`` times the learning rate; the mean loss, or why there is none."""
        lr = self.learning_rate(multiplier)
        # All that the host asks of an epoch goes to it at once: it waits for a GPU once.
        wanted = [self.train_rows(to_device(self.rows_of(epoch), self.device), lr), self.trained.raw]
        if self.logits.validation is not None:
            wanted.append(self.logits.validation.hits(self.trained.alpha, self.columns))
        self.draw_ahead(epoch)
        result, raw, *hits = on_host(wanted)
        self.keep_measured(raw, hits[0] if hits else None)
        loss, failed_step, failed_class = result.tolist()
        return self.after_epoch(epoch, lr, loss, int(failed_step), int(failed_class))

    def after_epoch(self, epoch: int, lr: float, loss: float, failed_step: int, failed_class: int) -> float | TrainingDiverged:
        """The mean loss of an epoch that the extension has trained, or why there is none."""
        self.steps += self.steps_per_epoch
        if failed_step >= 0:
            where = f"step {failed_step + 1} of {self.steps_per_epoch}"
            if failed_class >= 0:
                where = f"class {int(self.head.few_classes[failed_class])}, {where}"
            return TrainingDiverged(f"{where} is no longer finite", epoch, lr)
        return loss / len(self.sampler)

    @property
    def validation_logits(self) -> ValidationLogits | None:
        return self.logits.validation

    def hits(self) -> Tensor | None:
        """``[2, N]``: of each class the validation samples ranked first and among the first five; None without validation."""
        if self._kept_hits is not None:
            kept, self._kept_hits = self._kept_hits, None
            return kept
        return None if self.logits.validation is None else self.logits.validation.hits(self.trained.alpha, self.columns).cpu()

    def original_hits(self) -> Tensor | None:
        """The same of the original classifier."""
        if self.logits.validation is None:
            return None
        own = torch.zeros_like(self.trained.alpha)
        own[:, 0] = 1
        return self.logits.validation.hits(own, self.columns).cpu()

    def clamped(self) -> int:
        """How many classes are held by the rule's clamp."""
        if self._kept_clamped is not None:
            kept, self._kept_clamped = self._kept_clamped, None
            return kept
        return self._count_clamped(self.trained.raw)

    def _count_clamped(self, raw: Tensor) -> int:
        return int(clamped_outputs(raw[:, : self.head.top_k + 1], self.head.rule, self.head.gamma).sum())

    def snapshot(self) -> list[Tensor]:
        """What is trained, copied."""
        preactivation, w2 = ops.unpack_state(self.trained.state, self.head.num_few, self._hidden)
        return [preactivation.clone(), w2.clone(), self.trained.b2.clone()]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor], decay: float) -> None:
        """Give the head what ``snapshot`` holds; ``decay`` is what weight decay has left of the start (:class:`DecayOfStart`).

        Once, at the end: a dense first layer is moved from where the training found it.
        """
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
        head.move_first_layer_outputs(preactivation.double() - decay * self._start, decay)

    def state(self) -> dict[str, Any]:
        """All that training goes on from, for a checkpoint."""
        # Copies, because a part of a stacked tensor would be saved with all of it.
        tensors = {"state": self.trained.state, "b2": self.trained.b2, "b2_momentum": self.trained.b2_momentum}
        return {name: tensor.clone() for name, tensor in tensors.items()} | {"steps": self.steps}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, own in (("state", self.trained.state), ("b2", self.trained.b2), ("b2_momentum", self.trained.b2_momentum)):
            copy_into(own, state[name], name)
        self.steps = check_integer(state["steps"], "steps", minimum=0)
        self.train_rows(torch.empty(0, dtype=torch.int64, device=self.device), 0.0)


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
        self.all_at_once = len(used) * row_bytes <= cached_logits.CACHE_BYTES
        rows = len(used)
        if not self.all_at_once:
            # Few samples are kept where they fit. All others get rows behind them, anew each epoch.
            few = samplers[0].indices[: samplers[0].num_few]
            fits = len(few) * row_bytes <= cached_logits.CACHE_BYTES
            used = few if fits else few[:0]
            rows = len(used) + max(sampler.negatives if fits else len(sampler) for sampler in samplers)
        self.num_kept = len(used)
        self.device = native_device(heads[0])
        if self.device.type == "cpu":
            measured = 0 if data.validation is None else len(data.validation.labels)
            cached_logits.check_memory((rows + measured) * row_bytes, f"the member logits of {rows + measured} samples")
        prior = samplers[0].log_prior if prior_correction else None
        self.training = TrainingLogits(self.columns, rows, self.device, prior)
        used = used.index_select(0, self.training.fill(0, data.samples, used))
        self._row_of[used] = torch.arange(len(used), device="cpu")
        self.validation = None if data.validation is None else ValidationLogits(self.columns, data.validation, self.device)

    def rows_of(self, indices: Tensor) -> Tensor:
        """The rows of an epoch's samples, in the order they are trained on, on the CPU."""
        # index_select and not indexing, which waits for a second thread however few the indices.
        rows = self._row_of.index_select(0, indices)
        if not self.all_at_once:
            missing = (rows < 0).nonzero().flatten()
            missing = missing.index_select(0, self.training.fill(self.num_kept, self.samples, indices[missing]))
            rows[missing] = self.num_kept + torch.arange(len(missing), device="cpu")
        return rows
