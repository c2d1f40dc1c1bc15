"""Linear layers: their parameters, checked, and layers made of given ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .modules import evaluating
from .seeds import noise
from .tensors import check_finite, check_same_device, check_shape, finite_tensor


def check_classifier(weight: Tensor, bias: Tensor | None) -> None:
    finite_tensor(weight, "weight", ("N", "D"))
    if bias is not None:
        check_fits(bias, "bias", weight, (len(weight),))


def check_fits(tensor: Tensor | None, name: str, weight: Tensor, shape: Sequence[int | str]) -> Tensor:
    """Return ``tensor`` after checking its shape, that it is finite, and that it has the dtype and device of ``weight``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    check_same_device(weight=weight, **{name: tensor})
    check_shape(tensor, name, shape)
    if tensor.dtype != weight.dtype:
        raise TypeError(f"{name} must have the dtype of weight, {weight.dtype}, got {tensor.dtype}")
    check_finite(tensor, name)
    return tensor


def linear_parameters(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight ``[N, D]`` and bias ``[N]`` or None of a linear layer, checked."""
    weight, bias = (_trainable(getattr(linear, name, None)) for name in ("weight", "bias"))
    if not isinstance(weight, Tensor):
        raise TypeError(f"linear must have a weight [num_classes, in_features], such as nn.Linear; got {type(linear).__name__}")
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"linear.bias must be a tensor or None, got {type(bias).__name__}")
    if weight.dim() != 2 or not _computes_rows(linear, weight, bias):
        raise ValueError(
            "linear must have one row a class, weight [num_classes, in_features], and score features by it, x W' + b; "
            f"{type(linear).__name__} with weight {list(weight.shape)} does something else (a convolution, perhaps, or a "
            "normalised, scaled or transposed layer)"
        )
    check_classifier(weight, bias)
    return weight.detach(), None if bias is None else bias.detach()


@torch.no_grad()
def _trainable(value: Any) -> Any:
    """A copy of a tensor that was made in torch.inference_mode, where none can be trained on; all else as it is."""
    return (
        value.clone() if isinstance(value, Tensor) and value.is_inference() and not torch.is_inference_mode_enabled() else value
    )


def _computes_rows(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a module's scores are products with the rows of its weight; tried on two samples where it is no nn.Linear."""
    forward = getattr(type(linear), "forward", None)
    if forward in (None, nn.Linear.forward, nn.Module.forward) or not bool(weight.isfinite().all()):
        return True
    x = noise(2, weight.shape[1]).to(weight)
    try:
        with evaluating(linear), torch.autocast(weight.device.type, enabled=False):
            scores, expected = linear(x).float(), nn.functional.linear(x, weight, bias).float()
            return torch.allclose(scores, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
        return False


def wide(tensor: Tensor) -> Tensor:
    """The same in float32 where it is narrower, which no sum should be kept in."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A plain linear layer of these numbers, copied."""
    # On "meta", because initial values that nobody reads would be drawn from the caller's random numbers.
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear
