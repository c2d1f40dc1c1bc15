"""Alpha Net in plain PyTorch: the specification that every kernel is held to.

Equation numbers are those of "Alpha Net: Adaptation with Composition in Classifier Space". Everything here is differentiable by
plain autograd (twice, too), works in any floating dtype, and is written to be read, not to be fast.

Shapes: ``N`` classes, ``F`` few classes, ``K`` neighbours, ``D`` features, ``P`` width of a reduced classifier, ``H`` hidden
units, ``I = (K+1) P`` inputs of a sub-module.
"""

from __future__ import annotations

import torch
from torch import Tensor

RULES = ("clamp", "softmax", "l1")

# The paper's interval (0, gamma] is open at 0. This is the smallest positive number that is normal in every dtype.
ALPHA_FLOOR = 2.0**-14
# Keeps the l1 rule finite where all neighbours' outputs are 0.
NORM_FLOOR = 1e-12


class _ProjectedClamp(torch.autograd.Function):
    """Clamp whose gradient also passes outside the interval when a descent step would move the value back inside."""

    @staticmethod
    def forward(value: Tensor, low: float, high: float) -> Tensor:
        return value.clamp(low, high)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        value, ctx.low, ctx.high = inputs
        ctx.save_for_backward(value)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        (value,) = ctx.saved_tensors
        blocked = ((value > ctx.high) & (gradient <= 0)) | ((value < ctx.low) & (gradient >= 0))
        return gradient.masked_fill(blocked, 0), None, None


def _clamp(value: Tensor, low: float, high: float) -> Tensor:
    """torch.clamp with the gradient passing at both ends, where that of torch.clamp is 1 before torch 2.15 and 0 since."""
    return torch.where((value < low) | (value > high), value.detach().clamp(low, high), value)


def coefficients(raw: Tensor, gamma: float, rule: str = "clamp", projected_gradient: bool = False) -> Tensor:
    """Turn the sub-modules' raw outputs into the coefficients alpha (paper, section 3.2 and Table 3).

    Args:
        raw: ``[F, K+1]``, floating point; column 0 belongs to the few class itself.
        gamma: upper end of the interval ``(0, gamma]`` of ``alpha_0``; the paper uses 0.7.
        rule: ``"clamp"``, the paper's text: ``alpha_0`` is clamped to ``(0, gamma]``, the others are free.
            ``"softmax"``, what the paper's Table 3 shows: ``p = softmax(raw)``, ``alpha_0 = min(p_0, gamma)``,
            ``alpha_k = max(p_k, (1 - gamma) / K)``, not renormalised. These are two one-sided clamps: for
            ``gamma < 1 / (K+1)`` the floor lies above the ceiling.
            ``"l1"``, the authors' later form: ``alpha_0 = 1``, the others are divided by their L1 norm.
        projected_gradient: let the gradient of a clamped coefficient through when descent would move it back inside, so
            that a class that left the interval can return. Not differentiable twice.

    Returns:
        ``[F, K+1]``, the dtype of ``raw``.

    Example:
        >>> coefficients(torch.tensor([[2.0, 0.1, -0.3]]), gamma=0.7)
        tensor([[ 0.7000,  0.1000, -0.3000]])
    """
    clamp = _ProjectedClamp.apply if projected_gradient else _clamp
    own, neighbours = raw[:, :1], raw[:, 1:]
    if rule == "clamp":
        own = clamp(own, min(ALPHA_FLOOR, gamma), gamma)
    elif rule == "softmax":
        p = raw.softmax(dim=1)
        floor = (1 - gamma) / neighbours.shape[1]
        own = clamp(p[:, :1], 0.0, gamma)
        neighbours = clamp(p[:, 1:], floor, 2.0)
    elif rule == "l1":
        own = torch.ones_like(own)
        neighbours = neighbours / neighbours.abs().sum(dim=1, keepdim=True).clamp(min=NORM_FLOOR)
    else:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    return torch.cat([own, neighbours], dim=1)


def preactivations(z: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    """First layer of every sub-module before its ReLU, ``[F, H]``.

    Args:
        z: ``[F, I]``, each class's fixed input: its members' reduced classifiers, concatenated.
        w1: ``[F, H, I]``, or ``[1, H, I]`` shared by all classes (paper, appendix A).
        b1: ``[F, H]`` or ``[1, H]``.
    """
    return torch.einsum("fhi,fi->fh", w1.expand(z.shape[0], -1, -1), z) + b1


def raw_outputs(preactivation: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Second layer of every sub-module, ``[F, K+1]``, from ``preactivation`` ``[F, H]``.

    ``w2`` is ``[F, K+1, H]`` or ``[1, K+1, H]``, ``b2`` is ``[F, K+1]`` or ``[1, K+1]``.
    """
    return torch.einsum("fkh,fh->fk", w2.expand(preactivation.shape[0], -1, -1), preactivation.relu()) + b2


def compose(
    alpha: Tensor, weight: Tensor, bias: Tensor | None, members: Tensor, rule: str = "clamp"
) -> tuple[Tensor, Tensor | None]:
    """The composed few classifiers ``U`` ``[F, D]`` and their biases ``t`` ``[F]`` (equations 1 and 2).

    Args:
        alpha: ``[F, K+1]``.
        weight: ``[N, D]``, the original classifier's rows.
        bias: ``[N]``, or None for a classifier without bias; then ``t`` is None.
        members: ``[F, K+1]`` int64 class ids; column 0 is the few class itself.
        rule: under ``"l1"`` the few class keeps its own bias, else biases are composed like weights.
    """
    composed_weight = torch.einsum("fk,fkd->fd", alpha, weight[members])
    if bias is None:
        return composed_weight, None
    composed_bias = bias[members[:, 0]] if rule == "l1" else (alpha * bias[members]).sum(dim=1)
    return composed_weight, composed_bias


def add_residual(
    composed_weight: Tensor,
    composed_bias: Tensor | None,
    residual: Tensor,
    directions: Tensor,
    direction_bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Composed classifiers moved along given directions: ``U_f + sum_r rho_fr d_r``, which the paper does not have.

    Args:
        composed_weight: ``[F, D]``.
        composed_bias: ``[F]``, or None.
        residual: ``[F, R]``, the amounts rho.
        directions: ``[R, D]``.
        direction_bias: ``[R]``, what each direction adds to the bias; None without a bias.
    """
    moved = composed_weight + residual @ directions
    if composed_bias is None or direction_bias is None:
        return moved, composed_bias
    return moved, composed_bias + residual @ direction_bias


def scores(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    members: Tensor,
    composed_weight: Tensor,
    composed_bias: Tensor | None,
) -> Tensor:
    """Scores of all classes in class order, ``[batch, N]`` (equations 3 and 4), from ``features`` ``[batch, D]``."""
    base_scores = torch.nn.functional.linear(features, weight, bias)
    few_scores = torch.nn.functional.linear(features, composed_weight, composed_bias)
    return base_scores.index_copy(1, members[:, 0], few_scores)


def alpha_head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    members: Tensor,
    z: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    gamma: float,
    rule: str = "clamp",
    projected_gradient: bool = False,
) -> Tensor:
    """The whole head, ``features`` ``[batch, D]`` to scores ``[batch, N]``: sub-modules, rule, equations 1 to 4.

    Example:
        >>> weight, members = torch.eye(3), torch.tensor([[2, 0]])
        >>> z, w1, b1 = torch.zeros(1, 4), torch.zeros(1, 5, 4), torch.zeros(1, 5)
        >>> w2, b2 = torch.zeros(1, 2, 5), torch.tensor([[0.5, 0.25]])
        >>> alpha_head(torch.ones(1, 3), weight, None, members, z, w1, b1, w2, b2, gamma=0.7)
        tensor([[1.0000, 1.0000, 0.7500]])
    """
    raw = raw_outputs(preactivations(z, w1, b1), w2, b2)
    alpha = coefficients(raw, gamma, rule, projected_gradient)
    composed_weight, composed_bias = compose(alpha, weight, bias, members, rule)
    return scores(features, weight, bias, members, composed_weight, composed_bias)


def mix_logits(logits: Tensor, members: Tensor, alpha: Tensor, bias: Tensor | None = None, rule: str = "clamp") -> Tensor:
    """Scores from the original classifier's ``logits`` ``[batch, N]``, without composing a classifier.

    Equations 1 to 4 rearranged: ``x U_f + t_f = sum_k alpha_fk (x V_fk + p_fk)``. Under ``"l1"``, where only the few class's
    own bias counts, neighbours' logits enter less their ``bias``.
    """
    mixed = logits[:, members]
    if rule == "l1" and bias is not None:
        neighbour_bias = bias[members].clone()
        neighbour_bias[:, 0] = 0
        mixed = mixed - neighbour_bias
    return logits.index_copy(1, members[:, 0], torch.einsum("fk,bfk->bf", alpha, mixed))
