"""The operators of the head.

``alphaext::head`` computes, in one call, all two-layer sub-modules, the coefficient rule, the composition and the concatenation
of few and base scores in class order; ``alphaext::head_backward`` is its gradient. Schemas and kernels are registered by
``alphaext._C``; this module adds what the stable ABI cannot: autograd, fake kernels for ``torch.compile``, the autocast rule
and batching for ``torch.func.vmap``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..utils.checks import check_choice
from . import extension  # noqa: F401  (registers the operators)

# The numbers of csrc/kernels/rules.h.
RULE_NUMBERS = {"softmax": 0, "clamp": 1, "l1": 2}

# Arguments of `head` that can have a gradient, by position; bit i of `wanted` asks for the i-th of them (csrc/ops/head.cpp).
_DIFFERENTIABLE = (0, 1, 2, 4, 5, 6, 7, 8)
_NUM_ARGUMENTS = 12


def alpha_head(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    members: Tensor,
    z: Tensor | None,
    w1: Tensor | None,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    gamma: float,
    rule: str = "clamp",
    projected_gradient: bool = False,
    b1_scale: Tensor | None = None,
) -> Tensor:
    """The fused Alpha Net head: features (or logits) to scores of all classes, in class order.

    Computes what :func:`alphaext.reference.alpha_head` states, by compiled kernels, with gradients for every floating argument
    (once: asking for second derivatives raises). Sums are accumulated in float32, or float64 for float64 arguments.

    Args:
        input: ``[batch, D]`` features; or ``[batch, N]`` logits of the original classifier when ``weight`` is None.
        weight: ``[N, D]``, the original classifier, or None.
        bias: ``[N]`` or None. When ``input`` holds logits, only the rule ``"l1"`` uses it.
        members: ``[F, K+1]`` int64 class ids, column 0 the few class itself. On a CPU, ids out of range are an error; on a GPU,
            where looking would stall the stream, they give NaN in that class's column.
        z: ``[F, I]``, each sub-module's fixed input, or None without ``w1``.
        w1: ``[F, H, I]``, or ``[1, H, I]`` shared by all classes, or None: then ``b1`` is the pre-activation itself.
        b1: ``[F, H]``, or ``[1, H]`` with a shared ``w1``.
        w2: ``[F, K+1, H]`` or ``[1, K+1, H]``.
        b2: ``[F, K+1]`` or ``[1, K+1]``.
        gamma: upper end of the interval ``(0, gamma]`` of ``alpha_0``, itself in ``(0, 1]``; the paper uses 0.7.
        rule: ``"clamp"``, ``"softmax"`` or ``"l1"``; see :func:`alphaext.reference.coefficients`.
        projected_gradient: let a clamped coefficient's gradient through when descent would move it back inside.
        b1_scale: ``[F]`` or ``[F, F]``, multiplies the gradient of ``b1``: with it a factored first layer follows, under SGD,
            the dense one exactly. None leaves the gradient as it is.

    All floating tensors share one dtype (float32, float64, float16 or bfloat16) and one device, and may have any strides.

    Returns:
        ``[batch, N]`` scores in the dtype of ``input``.

    Raises:
        ValueError: for an unknown rule.
        RuntimeError: for shapes, dtypes, devices or values that disagree; the message names the argument and the value.

    Example:
        >>> logits, members = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2, 0]])
        >>> b1, w2, b2 = torch.zeros(1, 4), torch.zeros(1, 2, 4), torch.tensor([[0.5, 0.25]])
        >>> alpha_head(logits, None, None, members, None, None, b1, w2, b2, gamma=0.7)
        tensor([[1.0000, 2.0000, 1.7500]])
    """
    return _differentiable_head(
        (input, weight, bias, members, z, w1, b1, w2, b2, gamma, rule_number(rule), projected_gradient), b1_scale
    )


def rule_number(rule: str) -> int:
    """The number that the kernels know a coefficient rule by."""
    check_choice(rule, "rule", sorted(RULE_NUMBERS))
    return RULE_NUMBERS[rule]


def scale_gradient(value: Tensor, scale: Tensor) -> Tensor:
    """``value``, whose gradient is multiplied by ``scale`` as that of ``b1`` is by ``b1_scale`` of :func:`alpha_head`."""
    return _ScaleGradient.apply(value, scale)


def evaluate(
    members: Tensor,
    z: Tensor | None,
    w1: Tensor | None,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    num_classes: int,
    gamma: float,
    rule: str = "clamp",
) -> tuple[Tensor, Tensor, Tensor]:
    """What the sub-modules compute, which no sample has a part in; without gradients. Arguments as of :func:`alpha_head`.

    Returns:
        The first layer's outputs before the ReLU ``[F, H]``, the outputs ``[F, K+1]``, and the coefficients ``[F, K+1]``, in
        float32 or wider.

    Example:
        >>> b1, w2, b2 = torch.zeros(1, 4), torch.zeros(1, 2, 4), torch.tensor([[0.9, 0.25]])
        >>> evaluate(torch.tensor([[2, 0]]), None, None, b1, w2, b2, num_classes=3, gamma=0.7)[2]
        tensor([[0.7000, 0.2500]])
    """
    # The operator returns it beside the scores, of no samples here.
    nothing = w2.new_empty(0, num_classes)
    _, preactivation, raw, alpha, _ = torch.ops.alphaext.head(
        nothing, None, None, members, z, w1, b1, w2, b2, gamma, rule_number(rule), False
    )
    return preactivation, raw, alpha


def initial_first_layer(w1: Tensor, b1: Tensor, seed: int, first_network: int = 0) -> None:
    """Draw the first layers' weights in place, uniformly, as ``nn.Linear`` does: a function of the seed and the network.

    Args:
        w1: ``[n, H, I]`` on the CPU, float32 or float64, written.
        b1: ``[n, H]``, written.
        seed: of the draws.
        first_network: which network the first of these is.
    """
    torch.ops.alphaext.initial_first_layer(w1, b1, seed, first_network)


def initial_preactivation(z: Tensor, hidden: int, shared: bool, seed: int) -> Tensor:
    """``w1 z + b1`` ``[F, H]`` of the weights that :func:`initial_first_layer` draws, which are not written down.

    Args:
        z: ``[F, I]`` on the CPU, float32 or float64.
        hidden: H.
        shared: one network for all classes.
        seed: of the draws.
    """
    return torch.ops.alphaext.initial_preactivation(z, hidden, shared, seed)


# ---- Autograd ----------------------------------------------------------------------------------------------------------


def _differentiable_head(arguments: tuple[Any, ...], b1_scale: Tensor | None) -> Tensor:
    """Scores, by the autograd function that fits: torch.func's transforms need another form than plain autograd."""
    if autocast_enabled(arguments[0].device.type):
        # Here and not below autograd, so that the backward sees what the forward computed with.
        arguments = _widened(arguments)
    if torch._C._are_functorch_transforms_active():
        if b1_scale is not None:
            b1 = _ScaleGradient.apply(arguments[6], b1_scale)
            arguments = (*arguments[:6], b1, *arguments[7:])
        return AlphaHeadTransformable.apply(*arguments)[0]
    return AlphaHead.apply(b1_scale, *arguments)


def _call_kernel(op: Any, *arguments: Any) -> Any:
    """Call an operator from inside an autograd function, past its own autograd registration.

    That registration would find nothing to do there, but costs as much again as a small head.
    """
    if torch.compiler.is_compiling():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    wide = gradient.to(scale.dtype)
    if scale.dim() == 1:
        return (scale.unsqueeze(1) * wide).to(gradient.dtype)
    if not autocast_enabled(gradient.device.type):
        return (scale @ wide).to(gradient.dtype)
    with torch.autocast(gradient.device.type, enabled=False):
        return (scale @ wide).to(gradient.dtype)


def _gradients(
    needs: tuple[bool, ...], grad_scores: Tensor, saved: tuple[Tensor, ...], options: tuple[Any, ...]
) -> list[Tensor | None]:
    """Gradients of the arguments of ``alphaext::head``, None for those that need none."""
    gradients: list[Tensor | None] = [None] * _NUM_ARGUMENTS
    # Without w1 nothing reads z, so it has no gradient.
    unread = (4,) if saved[5] is None else ()
    wanted = sum(1 << bit for bit, i in enumerate(_DIFFERENTIABLE) if needs[i] and i not in unread)
    if torch.is_grad_enabled():  # by create_graph=True and torch.func only: the gradient is to have a graph itself
        results = AlphaHeadBackward.apply(grad_scores, *saved, *options, wanted)
    else:
        results = _call_kernel(torch.ops.alphaext.head_backward.default, grad_scores, *saved, *options, wanted)
    for bit, i in enumerate(_DIFFERENTIABLE):
        if wanted >> bit & 1:
            gradients[i] = results[bit]
    return gradients


class AlphaHead(torch.autograd.Function):
    """``alphaext::head`` as an autograd function; :func:`alpha_head` is its friendly face.

    ``b1_scale`` (None, ``[F]`` or ``[F, F]``) multiplies the gradient of ``b1``: for the factored first layer, whose update is
    that of the weights behind it (docs/reference/exactness.md).
    """

    @staticmethod
    def forward(ctx: Any, b1_scale: Tensor | None, *arguments: Any) -> Tensor:
        scores, *for_backward = _call_kernel(torch.ops.alphaext.head.default, *arguments)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(b1_scale, *arguments[:9], *for_backward)
        ctx.options = arguments[9:]
        return scores

    @staticmethod
    def backward(ctx: Any, grad_scores: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_scores is None:
            return (None,) * (1 + _NUM_ARGUMENTS)
        b1_scale, *saved = ctx.saved_tensors
        gradients = _gradients(ctx.needs_input_grad[1:], grad_scores, tuple(saved), ctx.options)
        if b1_scale is not None and gradients[6] is not None:
            gradients[6] = _scaled(gradients[6], b1_scale)
        return (None, *gradients)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Only the scores have a gradient: the rest is what the backward reads.
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:9], *output[1:])
    ctx.options = inputs[9:]


def _backward(ctx: Any, grad_scores: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_scores is None:
        return (None,) * _NUM_ARGUMENTS
    return tuple(_gradients(ctx.needs_input_grad, grad_scores, ctx.saved_tensors, ctx.options))


class AlphaHeadTransformable(torch.autograd.Function):
    """:class:`AlphaHead` in the form that torch.func's transforms need, which costs plain autograd several times more."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return torch.ops.alphaext.head(*arguments)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _vmap_by_loop(AlphaHeadTransformable.apply)(info, in_dims, *inputs)


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "alphaext: the fused head can be differentiated once only; for second derivatives use alphaext.reference.alpha_head"
    )


class AlphaHeadBackward(torch.autograd.Function):
    """``alphaext::head_backward`` as an autograd function, whose own derivative is refused instead of silently missing."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.alphaext.head_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = staticmethod(_no_second_derivative)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _vmap_by_loop(AlphaHeadBackward.apply)(info, in_dims, *inputs)


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by ``scale``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, scale: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _scaled(gradient, ctx.saved_tensors[0]), None


# ---- Batching ----------------------------------------------------------------------------------------------------------


def _vmap_by_loop(op: Callable[..., Any]) -> Callable[..., Any]:
    """Batch an operator by calling it once a sample and stacking the results."""

    def batched(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        if info.batch_size == 0:
            raise ValueError("alphaext: vmap over no samples has no result; the batch must have at least one")
        results = []
        for sample in range(info.batch_size):
            arguments = [x if dim is None else x.select(dim, sample) for x, dim in zip(inputs, in_dims, strict=True)]
            results.append(op(*arguments))
        return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])

    return batched


# ---- Fake kernels: shapes and dtypes only ------------------------------------------------------------------------------


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of numbers of this dtype are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _head_fake(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    members: Tensor,
    z: Tensor | None,
    w1: Tensor | None,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: float,
    rule: int,
    projected_gradient: bool,
) -> tuple[Tensor, ...]:
    _check_devices({"weight": weight, "bias": bias, "members": members, "z": z, "w1": w1, "b1": b1, "w2": w2, "b2": b2}, input)
    batch, num_classes = input.shape[0], input.shape[1] if weight is None else weight.shape[0]
    wide = accumulate_dtype(input.dtype)
    num_few, num_members = members.shape
    return (
        input.new_empty(batch, num_classes),
        input.new_empty(num_few, w2.shape[2], dtype=wide),
        input.new_empty(num_few, num_members, dtype=wide),
        input.new_empty(num_few, num_members, dtype=wide),
        input.new_empty((0, 0) if weight is None else (batch, num_classes), dtype=wide),
    )


_OPTIONAL = ("weight", "bias", "z", "w1")


def _check_devices(others: dict[str, Tensor | None], input: Tensor) -> None:
    # One tensor on the meta device sends the whole call here, where nothing is computed.
    for name, x in {"input": input, **others}.items():
        if x is None and name not in _OPTIONAL:
            raise RuntimeError(f"alphaext: {name} must be a tensor, got None")
        if x is not None and x.device != input.device:
            raise RuntimeError(f"alphaext: {name} must be on the device of input, {input.device}, got {x.device}")


def _head_backward_fake(grad_scores: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    wanted = arguments[-1]
    input = arguments[0]
    names = ("weight", "bias", "members", "z", "w1", "b1", "w2", "b2", "preactivation", "raw", "alpha", "logits")
    _check_devices({"grad_scores": grad_scores, **dict(zip(names, arguments[1:13], strict=True))}, input)
    return tuple(input.new_empty(arguments[i].shape if wanted >> bit & 1 else (0,)) for bit, i in enumerate(_DIFFERENTIABLE))


# ---- Autocast ----------------------------------------------------------------------------------------------------------


def _widened(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with all floating tensors in the widest dtype among them."""
    dtype = arguments[0].dtype
    floating = [isinstance(x, Tensor) and x.is_floating_point() for x in arguments]
    for x, is_floating in zip(arguments, floating, strict=True):
        if is_floating:
            dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.to(dtype) if is_floating else x for x, is_floating in zip(arguments, floating, strict=True))


def autocast_enabled(device_type: str) -> bool:
    # Not every device has autocast, "meta" for one. torch.compile in torch 2.11 cannot trace the question whether it has.
    return device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)


def _without_autocast(operator: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return operator(*arguments)

    return call


def _widened_head(*arguments: Any) -> Any:
    """The head in the widest dtype among its floating arguments, which is what autocast makes of it.

    It is bound by reading its weights, so casting them down at every step would cost more than it saves. A backward under
    autocast stays in the dtype of the forward.
    """
    return torch.ops.alphaext.head(*_widened(arguments))


# ---- What each operator has besides its kernels ------------------------------------------------------------------------

_library = torch.library.Library("alphaext", "FRAGMENT")
# Direct callers of the operators get the same gradients as callers of alpha_head, and the same refusal of second ones.
for _name, _operator, _under_autocast, _fake, _gradient, _setup in (
    ("head", torch.ops.alphaext.head, _widened_head, _head_fake, _backward, _setup_context),
    ("head_backward", torch.ops.alphaext.head_backward, torch.ops.alphaext.head_backward, _head_backward_fake,
     _no_second_derivative, None),
):  # fmt: skip
    torch.library.register_fake(f"alphaext::{_name}", _fake)
    torch.library.register_autograd(f"alphaext::{_name}", _gradient, setup_context=_setup)
    torch.library.register_vmap(f"alphaext::{_name}", _vmap_by_loop(_operator))
    for _device_type in ("cpu", "cuda"):
        _library.impl(_name, _without_autocast(_under_autocast, _device_type), f"Autocast{_device_type.upper()}")
