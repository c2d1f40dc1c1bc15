"""The first layer of the sub-modules: how it starts, and how SGD moves its outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import head as ops


def first_layer_scale(z: Tensor, networks: int) -> Tensor:
    """What SGD's step on a first layer's outputs is multiplied by: ``[F]``, or ``[F, F]`` with one network.

    As docs/reference/exactness.md shows, SGD moves w1 along z and b1 along 1, so it moves w1 z + b1 along z.z' + 1.
    """
    wide = z.detach().double()
    scale = wide @ wide.t() + 1 if networks == 1 else wide.square().sum(dim=1) + 1
    return scale.to(ops.accumulate_dtype(z.dtype))


def initial_first_layer(networks: int, hidden: int, z: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    w1 = torch.empty(networks, hidden, z.shape[1], dtype=z.dtype, device="cpu")
    b1 = torch.empty(networks, hidden, dtype=z.dtype, device="cpu")
    ops.initial_first_layer(w1, b1, seed)
    return w1, b1


def move_first_layer(w1: Tensor, b1: Tensor, z: Tensor, moved: Tensor, decay: float) -> None:
    """Make ``w1``, ``b1`` what SGD makes of them while it moves their outputs by ``moved`` ``[F, H]`` (float64).

    Every step adds a multiple u of (z, 1) to a row of (w1, b1), which moves its output by (|z|^2 + 1) u. With one network the
    Gram matrix takes the place of |z|^2 + 1; where it is singular, every solution u gives the same weights.
    """
    scale = first_layer_scale(z.double(), len(w1))
    if scale.dim() == 2:
        u = torch.linalg.lstsq(scale.cpu(), moved.cpu(), driver="gelsd").solution.to(moved.device)
        b1.mul_(decay).add_(u.sum(dim=0).to(b1.dtype))
        w1[0].addmm_(u.t().to(w1.dtype), z.to(w1.dtype), beta=decay)
        return
    u = moved / scale.unsqueeze(1)
    b1.mul_(decay).add_(u.to(b1.dtype))
    w1.baddbmm_(u.to(w1.dtype).unsqueeze(2), z.to(w1.dtype).unsqueeze(1), beta=decay)
