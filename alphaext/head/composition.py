"""What the few rows of a classifier are composed of: from class counts and means to members and directions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..classes import ClassSplit, split_classes
from ..utils.checks import check_integer
from ..utils.linear import check_fits
from ..utils.tensors import as_tensor, check_shape
from .neighbors import build_members, check_members, pool_classes, residual_directions


def choose_members(
    num_classes: int,
    *,
    class_counts: Tensor | None,
    class_means: Tensor | None,
    few_classes: Tensor | None,
    members: Tensor | None,
    top_k: int,
    pool: str,
    metric: str,
    neighbor_seed: int,
    few_below: int,
    many_above: int,
    residual: int,
) -> tuple[Tensor, Tensor]:
    """Members ``[F, K+1]`` and the ids of classes without samples; arguments as of :meth:`AlphaNet.from_linear`."""
    if members is not None:
        surplus = {"class_counts": class_counts, "few_classes": few_classes, "class_means": None if residual else class_means}
        given = [name for name, value in surplus.items() if value is not None]
        if given:
            raise ValueError(f"members already names classes and neighbours; do not give {', '.join(given)} as well")
        members = check_members(as_tensor(members, "members").cpu(), num_classes)
        return members, members.new_empty(0)
    split = _split(class_counts, few_classes, num_classes, few_below, many_above)
    if few_classes is not None and pool == "many":
        raise ValueError("pool='many' needs class_counts: few_classes does not say which classes are many")
    if class_means is None:
        raise ValueError("class_means must be given to find neighbours (or give members)")
    means = as_tensor(class_means, "class_means")
    check_shape(means, "class_means", (num_classes, "D"))
    neighbor_seed = check_integer(neighbor_seed, "neighbor_seed", minimum=0)
    members = build_members(means.cpu(), split.few, pool_classes(split, pool), top_k, metric=metric, seed=neighbor_seed)
    return members, split.empty


def _split(
    class_counts: Tensor | None, few_classes: Tensor | None, num_classes: int, few_below: int, many_above: int
) -> ClassSplit:
    if class_counts is not None and few_classes is None:
        counts = as_tensor(class_counts, "class_counts").cpu()
        check_shape(counts, "class_counts", (num_classes,))
        split = split_classes(counts, few_below=few_below, many_above=many_above)
        if len(split.few) == 0:
            raise ValueError(
                f"class_counts has no few class: the smallest has {int(counts[counts > 0].min())} samples, few are those below "
                f"few_below={few_below}"
            )
        return split
    if few_classes is None or class_counts is not None:
        got = "neither" if class_counts is None else "both"
        raise ValueError(f"give class_counts or few_classes, to say which classes are few (or members); got {got}")
    one_each = torch.ones(num_classes, dtype=torch.int64, device="cpu")
    return ClassSplit.of_few(few_classes, one_each, many_above=1)


def choose_directions(
    weight: Tensor, bias: Tensor | None, class_means: Tensor | None, count: int, empty: Tensor
) -> dict[str, Tensor | None]:
    """The arguments of :class:`AlphaNet` that let its few rows move along ``count`` principal directions of the class means."""
    if class_means is None:
        raise ValueError("class_means must be given for a residual")
    return direction_options(*residual_directions(weight, class_means, count, empty), bias)


def direction_options(directions: Tensor, direction_bias: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
    """Directions as arguments of a head: the first is the constant, of no use without a bias."""
    if bias is None:
        return {"directions": directions[1:], "direction_bias": None}
    return {"directions": directions, "direction_bias": direction_bias}


def check_directions(
    directions: Tensor | None,
    direction_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    coefficients: str,
    rule: str,
) -> None:
    """Check the directions ``[R, D]`` and their biases ``[R]`` that a head is made with; arguments as of :class:`AlphaNet`."""
    if directions is None:
        if direction_bias is not None:
            raise ValueError("direction_bias goes with directions")
        return
    if coefficients != "direct" or rule != "clamp":
        raise ValueError(
            f"a residual needs coefficients='direct' and rule='clamp', got {coefficients!r} and {rule!r}; residual=0 leaves it "
            "out"
        )
    if (bias is None) != (direction_bias is None):
        raise ValueError("direction_bias must be given where the classifier has a bias, and only there")
    check_fits(directions, "directions", weight, ("R", weight.shape[1]))
    if len(directions) == 0:
        raise ValueError("directions must have at least one row")
    if direction_bias is not None:
        check_fits(direction_bias, "direction_bias", weight, (len(directions),))


def closed_form_alphas(counts: Tensor, top_k: int, tau: float) -> Tensor:
    """Coefficients by the number of samples alone: ``alpha_0 = n / (n + tau)``, and ``(1 - alpha_0) / K`` of each neighbour.

    Args:
        counts: ``[F]``, samples of each few class.
        top_k: neighbours ``K``.
        tau: so many samples weigh as much as all neighbours.

    Returns:
        ``[F, K+1]`` float64.

    Example:
        >>> closed_form_alphas(torch.tensor([6]), top_k=2, tau=2.0)
        tensor([[0.7500, 0.1250, 0.1250]], dtype=torch.float64)
    """
    own = counts.double() / (counts.double() + tau)
    return torch.cat([own[:, None], ((1 - own) / top_k)[:, None].expand(-1, top_k)], dim=1)
