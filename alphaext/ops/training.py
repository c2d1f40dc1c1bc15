"""The operators of the native training engine, and how the memory they work on is laid out.

Letters: ``F`` few classes, ``M`` members of each (``K+1``, and directions), ``H`` hidden units, ``N`` classes, ``U`` distinct
columns of logits that the members need, ``n`` networks (``F``, or 1 that all classes share), ``R`` trainings side by side.
Floating tensors are all float32 or all float64. Tensors that are written are changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..utils.transfers import to_device
from .extension import LAYOUT
from .head import rule_number

BLOCK_SAMPLES = LAYOUT["block_samples"]
"""Validation samples come in blocks of this many."""
TOP_CLASSES = LAYOUT["top_classes"]
"""How many of its best base classes are kept of a validation sample."""
_TILE = LAYOUT["tile_width"]
_NO_CLASS = 2**31 - 1


def sample_epoch(num_few: int, group_offsets: Tensor, negatives: int, seed: int, epoch: int) -> Tensor:
    """Draw the samples of an epoch: all few ones, and as many base ones from each group.

    Args:
        num_few: few samples, numbered from 0 on.
        group_offsets: ``[groups + 1]`` int64, where among the base samples each group begins, and where the last one ends.
        negatives: base samples to draw; with replacement where a group has too few.
        seed: of the draws, with ``epoch``.
        epoch: 1 is the first.

    Returns:
        ``[num_few + negatives]`` int64 numbers of samples, in the order they are trained on.

    Example:
        >>> sorted(sample_epoch(2, torch.tensor([0, 3]), 3, seed=0, epoch=1).tolist())
        [0, 1, 2, 3, 4]
    """
    return torch.ops.alphaext.sample_epoch(num_few, group_offsets, negatives, seed, epoch)


def advise_huge_pages(memory: Tensor) -> None:
    """Ask the system for large pages behind a new tensor on the CPU, before anything is written to it."""
    torch.ops.alphaext.advise_huge_pages(memory)


# ---- Cached logits -----------------------------------------------------------------------------------------------------


def validation_shape(samples: int, columns: int) -> tuple[int, int, int]:
    """The shape that validation samples' member logits ``[samples, U]`` have in blocks: ``[blocks, U, BLOCK_SAMPLES]``."""
    return -(-samples // BLOCK_SAMPLES), columns, BLOCK_SAMPLES


def blocks_of(samples: slice) -> slice:
    """The blocks that hold ``samples``, which begin with a block."""
    return slice(samples.start // BLOCK_SAMPLES, -(-samples.stop // BLOCK_SAMPLES))


def cache_logits(
    logits: Tensor,
    labels: Tensor,
    few_penalty: Tensor,
    column_class: Tensor,
    column_bias: Tensor,
    member_logits: Tensor,
    base_logsumexp: Tensor,
    label_logit: Tensor,
    top_logits: Tensor | None = None,
    top_ids: Tensor | None = None,
) -> None:
    """Keep of the original logits of some samples what training or validation needs.

    Args:
        logits: ``[rows, N]``, on any device.
        labels: ``[rows]`` int64.
        few_penalty: ``[N]``, added for the sum and the best classes: 0 for base classes, minus infinity for few ones.
        column_class: ``[U]`` int64, the class of each column.
        column_bias: ``[U]``, what is subtracted from its logits.
        member_logits: ``[rows, U]``, written; for validation, with ``top_logits``, in blocks (:func:`validation_shape`).
        base_logsumexp: ``[rows]``, written: the log-sum-exp of the base classes' logits.
        label_logit: ``[rows]``, written: the logit of the label.
        top_logits: ``[rows, TOP_CLASSES]``, written: the best base classes' logits, best first; minus infinity where there
            are no more.
        top_ids: ``[rows, TOP_CLASSES]`` int32, written: their ids; of equal logits the lower one comes first.
    """
    on_cpu = logits.is_cpu and member_logits.is_cpu
    keep = torch.ops.alphaext.cache_logits if on_cpu else cache_logits_elsewhere
    keep(
        logits, labels, few_penalty, column_class, column_bias, member_logits, base_logsumexp, label_logit, top_logits, top_ids
    )


def cache_logits_elsewhere(
    logits: Tensor,
    labels: Tensor,
    few_penalty: Tensor,
    column_class: Tensor,
    column_bias: Tensor,
    member_logits: Tensor,
    base_logsumexp: Tensor,
    label_logit: Tensor,
    top_logits: Tensor | None = None,
    top_ids: Tensor | None = None,
) -> None:
    """:func:`cache_logits` in torch's operators, for logits that live on another device than the results."""
    device = logits.device
    masked = logits + few_penalty.to(device)
    base_logsumexp.copy_(masked.logsumexp(dim=1))
    label_logit.copy_(logits.gather(1, labels.to(device).unsqueeze(1)).squeeze(1))
    kept = logits[:, column_class.to(device)] - column_bias.to(device)
    if top_logits is None or top_ids is None:
        member_logits.copy_(kept)
        return
    missing = len(member_logits) * BLOCK_SAMPLES - len(kept)
    padded = nn.functional.pad(kept, (0, 0, 0, missing))
    member_logits.copy_(padded.view(-1, BLOCK_SAMPLES, len(column_class)).transpose(1, 2))
    # A stable sort, so that of equal logits the lower id comes first.
    values, ids = masked.sort(dim=1, descending=True, stable=True)
    count = min(TOP_CLASSES, masked.shape[1])
    top_logits.fill_(-torch.inf)
    top_ids.fill_(_NO_CLASS)
    top_logits[:, :count] = values[:, :count].to(top_logits.device)
    top_ids[:, :count] = ids[:, :count].to(top_ids.device, torch.int32)
    top_ids[top_logits == -torch.inf] = _NO_CLASS


def validate(
    alpha: Tensor,
    member_columns: Tensor,
    few_classes: Tensor,
    member_logits: Tensor,
    label_logit: Tensor,
    top_logits: Tensor,
    top_ids: Tensor,
    labels: Tensor,
    few_of_label: Tensor,
    num_classes: int,
) -> Tensor:
    """Count the validation samples that are recognised.

    Args:
        alpha: ``[F, M]`` coefficients; ``[R, F, M]`` for R heads at once.
        member_columns: ``[F, M]`` or ``[R, F, M]`` int32, where among the columns the members are.
        few_classes: ``[F]`` int32 class ids.
        member_logits: in blocks, as :func:`cache_logits` writes them, like the next three.
        label_logit: ``[samples]``.
        top_logits: ``[samples, TOP_CLASSES]``.
        top_ids: ``[samples, TOP_CLASSES]`` int32.
        labels: ``[samples]`` int64.
        few_of_label: ``[samples]`` int32, which few class the label is, or -1.
        num_classes: N.

    Returns:
        ``[2, N]`` int64, or ``[R, 2, N]``: of each class the samples that it comes first for, and those that it is among the
        first five for.
    """
    operator = torch.ops.alphaext.validate if alpha.dim() == 2 else torch.ops.alphaext.validate_many
    return operator(
        alpha, member_columns, few_classes, member_logits, label_logit, top_logits, top_ids, labels, few_of_label, num_classes
    )


# ---- Training ----------------------------------------------------------------------------------------------------------


def trains_on(tensor: Tensor) -> bool:
    """Whether the extension trains on the GPU that ``tensor`` is on; False for a tensor on the CPU."""
    return bool(tensor.is_cuda and torch.ops.alphaext.trains_on(tensor))


def pack_state(preactivation: Tensor, w2: Tensor) -> Tensor:
    """The state that a training starts from, tile by tile of hidden units, with zeros for the momentum.

    Args:
        preactivation: ``[F, H]``, the first layer's outputs before the ReLU.
        w2: ``[n, M, H]``.
    """
    networks, members, hidden = w2.shape[0], w2.shape[1], preactivation.shape[1]
    classes, tiles = len(preactivation) // networks, -(-hidden // _TILE)
    state = preactivation.new_zeros(networks, tiles, 2 * classes + 2 * members, _TILE)
    missing = tiles * _TILE - hidden
    rows = nn.functional.pad(preactivation, (0, missing)).view(networks, classes, tiles, _TILE)
    state[:, :, :classes] = rows.transpose(1, 2)
    rows = nn.functional.pad(w2, (0, missing)).view(networks, members, tiles, _TILE)
    state[:, :, 2 * classes : 2 * classes + members] = rows.transpose(1, 2)
    return state


def unpack_state(state: Tensor, num_few: int, hidden: int) -> tuple[Tensor, Tensor]:
    """What a state holds now: pre-activations ``[F, H]`` and w2 ``[n, M, H]``."""
    classes = num_few // len(state)
    members = state.shape[2] // 2 - classes
    preactivation = state[:, :, :classes].transpose(1, 2).reshape(num_few, -1)[:, :hidden]
    w2 = state[:, :, 2 * classes : 2 * classes + members].transpose(1, 2).reshape(len(state), members, -1)
    return preactivation, w2[:, :, :hidden]


@dataclass(frozen=True)
class SgdNumbers:
    """The numbers of SGD.

    Attributes:
        lr: learning rate.
        momentum: what the direction before is multiplied by.
        dampening: of the momentum.
        weight_decay: times the weights, added to their gradient.
        nesterov: Nesterov's form of the momentum.
    """

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool


@dataclass(frozen=True)
class StepOptions(SgdNumbers):
    """The numbers of the steps of an epoch.

    Attributes:
        gamma: upper end of the interval of ``alpha_0``.
        rule: the coefficient rule's name.
        projected_gradient: let a clamped coefficient's gradient through when descent would move it back inside.
        first_step: whether no step was done before, so that there is no momentum yet.
    """

    gamma: float
    rule: str
    projected_gradient: bool
    first_step: bool


def train_epoch(
    state: Tensor,
    b2: Tensor,
    b2_momentum: Tensor,
    raw: Tensor,
    alpha: Tensor,
    order: Tensor,
    member_logits: Tensor,
    base_logsumexp: Tensor,
    label_logit: Tensor,
    few_of_label: Tensor,
    member_columns: Tensor,
    gradient_scale: Tensor,
    batch: int,
    options: StepOptions,
    penalty: Tensor | None = None,
    few_offset: Tensor | None = None,
) -> Tensor:
    """Train one epoch.

    Args:
        state: from :func:`pack_state`, written.
        b2: ``[n, M]``, written, as is ``b2_momentum`` of the same shape.
        raw: ``[F, M]``, written: the sub-modules' outputs after the last step.
        alpha: ``[F, M]``, written: the coefficients after the last step.
        order: ``[samples]`` int64, the epoch, as rows of the next four; with none only ``raw`` and ``alpha`` are computed.
        member_logits: ``[rows, U]``, from :func:`cache_logits`.
        base_logsumexp: ``[rows]``.
        label_logit: ``[rows]``, read where the label is a base class.
        few_of_label: ``[rows]`` int32, which few class the label is, or -1.
        member_columns: ``[F, M]`` int32, where among the columns the members are.
        gradient_scale: ``[F]``, or ``[F, F]`` with one network (docs/reference/exactness.md).
        batch: samples of a step.
        options: the numbers of the steps.
        penalty: ``[2, M]``, strengths and centres: half of strength times the square of (output - centre) is added to a step's
            loss, but not to the one returned.
        few_offset: ``[F]``, added to the few scores.

    Returns:
        ``[3]`` float64: the sum of the samples' losses, and the step and the few class after which something was not finite, or
        -1; the class is -1, too, where none can be named.
    """
    o = options
    return torch.ops.alphaext.train_epoch(
        state, b2, b2_momentum, raw, alpha, order, member_logits, base_logsumexp, label_logit, few_of_label, member_columns,
        gradient_scale, batch, o.gamma, rule_number(o.rule), o.projected_gradient, o.lr, o.momentum, o.dampening,
        o.weight_decay, o.nesterov, o.first_step, penalty, few_offset,
    )  # fmt: skip


def train_epoch_many(
    state: Tensor,
    b2: Tensor,
    b2_momentum: Tensor,
    raw: Tensor,
    alpha: Tensor,
    orders: Sequence[Tensor],
    member_logits: Tensor,
    base_logsumexp: Tensor,
    label_logit: Tensor,
    few_of_label: Tensor,
    member_columns: Tensor,
    gradient_scale: Tensor,
    batch: int,
    options: Sequence[StepOptions],
    penalty: Tensor | None = None,
    few_offset: Tensor | None = None,
) -> Tensor:
    """Train one epoch of several runs of equal sizes, bit for bit what :func:`train_epoch` does to each alone.

    Args are those of :func:`train_epoch` with a leading dimension of R; ``orders`` and ``options`` are lists of R. The runs may
    share ``member_logits``, ``base_logsumexp``, ``label_logit`` and ``few_of_label``, which then are as they are there.

    Returns:
        ``[R, 3]`` float64, a row as :func:`train_epoch` returns it.
    """
    order = to_device(nn.utils.rnn.pad_sequence(list(orders), batch_first=True), state.device)
    settings = [
        [
            float(value)
            for value in (
                o.gamma, rule_number(o.rule), o.projected_gradient, o.lr, o.momentum, o.dampening, o.weight_decay, o.nesterov,
                o.first_step, len(rows),
            )
        ]
        for o, rows in zip(options, orders, strict=True)
    ]  # fmt: skip
    return torch.ops.alphaext.train_epoch_many(
        state, b2, b2_momentum, raw, alpha, order, member_logits, base_logsumexp, label_logit, few_of_label, member_columns,
        gradient_scale, batch, to_device(torch.tensor(settings, dtype=torch.float64, device="cpu"), state.device), penalty,
        few_offset,
    )  # fmt: skip
