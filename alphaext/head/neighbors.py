"""Which base classifiers each few class is composed of, and the fixed inputs of the alpha sub-modules.

Everything here is done once per run, on the CPU in float64, so that a choice of neighbours depends neither on the
device the data lives on nor on the number of threads. Results come back on the device of the first argument.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..classes import ClassSplit
from ..utils.checks import check_choice, check_integer, format_ids
from ..utils.seeds import seeded_generator
from ..utils.tensors import TensorLike, as_tensor, check_class_ids, check_integral, check_shape, finite_tensor, first_true
from .choices import METRICS, POOLS

# Where the last direction wanted has a smaller share of the first one's spread than this, products of rows, which square it,
# leave too few digits: then the rows themselves are decomposed, many times slower.
_LEAST_SHARE = 1e-4


def nearest_classes(
    class_means: TensorLike,
    targets: TensorLike,
    candidates: TensorLike,
    top_k: int,
    *,
    metric: str = "euclidean",
    seed: int = 0,
) -> Tensor:
    """Return the ``top_k`` candidate classes nearest to each target class.

    Nearest by the distance between class means (Euclidean in paper section 4.2), nearest first; of equally near classes
    the one of lower id comes first. A class is never its own neighbour, also where it is among the candidates (the pool
    "all" of the paper's appendix D).

    Args:
        class_means: floating point [N, D], as ``class_means`` returns them.
        targets: class ids [F] whose neighbours are wanted, distinct, in any order: the few classes.
        candidates: class ids to choose from, distinct, in any order: the base classes.
        top_k: K, neighbours per target, at least 1 and at most the candidates there are.
        metric: ``"euclidean"``, the paper's choice; ``"cosine"``, one minus the cosine of the angle between the means; or
            ``"random"``, the control that tells whether nearness matters: candidates drawn without looking at the means,
            in the order drawn.
        seed: of ``"random"``. What a target draws depends on the seed, its own id and the candidates alone: not on the
            other targets, nor on ``top_k``, which only says how many of its draws are taken.

    Returns:
        int64 [F, K] on the device of ``class_means``, row i for ``targets[i]``.

    Raises:
        TypeError: means that are not floating point, ids, ``top_k`` or ``seed`` that are not integers.
        ValueError: no targets, no candidates, ``top_k`` below 1 or above the number of candidates, ids out of range or
            repeated, NaN or infinity, an unknown metric, or with ``"cosine"`` a class whose mean is zero.

    Example:
        >>> nearest_classes(torch.tensor([[0.0], [9.0], [2.0], [1.0]]), targets=[3], candidates=[0, 1, 2], top_k=2)
        tensor([[0, 2]])
    """
    means = finite_tensor(class_means, "class_means", ("N", "D"))
    top_k = check_integer(top_k, "top_k", minimum=1)
    seed = check_integer(seed, "seed", minimum=0, maximum=2**63 - 1)
    check_choice(metric, "metric", METRICS)
    target_ids = check_class_ids(targets, means.shape[0], "targets").cpu()
    # Ascending ids let a stable sort by distance break ties by id.
    candidate_ids = check_class_ids(candidates, means.shape[0], "candidates").cpu().sort().values
    if target_ids.numel() == 0:
        raise ValueError("targets is empty: there are no few classes to find neighbours for")
    if candidate_ids.numel() == 0:
        raise ValueError("candidates is empty: there are no base classes to choose neighbours from")
    is_self = target_ids[:, None] == candidate_ids[None, :]
    available = candidate_ids.numel() - int(is_self.any(dim=1).any())
    if top_k > available:
        raise ValueError(
            f"top_k must be at most the number of candidate classes (the class itself not counted), "
            f"got top_k={top_k} and {available} candidates"
        )

    if metric == "random":
        chosen = []
        for own in target_ids.tolist():
            others = candidate_ids[candidate_ids != own]
            chosen.append(others[torch.randperm(len(others), generator=seeded_generator(seed, own), device="cpu")[:top_k]])
        return torch.stack(chosen).to(means.device)
    points, _ = _points(means, metric, torch.cat([target_ids, candidate_ids]))
    # Direct differences: |a|^2 + |b|^2 - 2ab cancels, and would order two copies of one mean by rounding errors.
    distances = torch.cdist(points[target_ids], points[candidate_ids], compute_mode="donot_use_mm_for_euclid_dist").masked_fill(
        is_self, math.inf
    )
    order = torch.sort(distances, dim=1, stable=True).indices[:, :top_k]
    return candidate_ids[order].to(means.device)


def neighbor_distances(class_means: TensorLike, members: TensorLike, *, metric: str = "euclidean") -> Tensor:
    """Return how far each few class lies from the classes it is composed of.

    The smallest of a row is the distance to the closest neighbour, against which the paper's figure 3b shows what a class
    gains.

    Args:
        class_means: floating point [N, D], as ``class_means`` returns them.
        members: class ids [F, K+1], column 0 the few class, as ``build_members`` returns them (also those drawn at random).
        metric: ``"euclidean"``, as in the paper, or ``"cosine"``: one minus the cosine of the angle between the means.

    Returns:
        [F, K] on the device of ``class_means``, in their dtype but at least float32, in the order of ``members``.

    Raises:
        TypeError, ValueError: as ``nearest_classes`` and ``check_members``.

    Example:
        >>> neighbor_distances(torch.tensor([[0.0], [9.0], [2.0], [1.0]]), [[3, 0, 1]])
        tensor([[1., 8.]])
    """
    means = finite_tensor(class_means, "class_means", ("N", "D"))
    check_choice(metric, "metric", METRICS[:2])
    ids = check_members(members, means.shape[0]).cpu()
    points, scale = _points(means, metric, ids.flatten())
    own = points[ids[:, 0]]
    distances = torch.stack([torch.linalg.vector_norm(points[ids[:, k]] - own, dim=1) for k in range(1, ids.shape[1])], dim=1)
    # Between unit vectors |a - b|^2 = 2 (1 - cos), without the cancellation of 1 - cos.
    distances = distances.square() / 2 if metric == "cosine" else distances * scale
    return distances.to(means.device, means.dtype if means.dtype.itemsize >= 4 else torch.float32)


def _points(means: Tensor, metric: str, used: Tensor) -> tuple[Tensor, float]:
    """The means in float64 on the CPU such that the Euclidean distance orders them by ``metric``, and their scale.

    Dividing by a power of two changes no order and no tie, and keeps squares from overflowing. ``used`` names the classes whose
    points matter.
    """
    points = means.to("cpu", torch.float64)
    if metric == "euclidean":
        largest = float(points.abs().max()) if points.numel() else 0.0
        if largest == 0.0:
            return points, 1.0
        scale = 2.0 ** (math.frexp(largest)[1] - 1)
        return points / scale, scale
    largest_of_row = torch.linalg.vector_norm(points, math.inf, dim=1, keepdim=True) if points.shape[1] else points.sum(1, True)
    zero = used[largest_of_row[used, 0] == 0].unique()
    if len(zero):
        raise ValueError(
            f"class_means must not be zero with metric='cosine', for zero has no direction; it is for class "
            f"{format_ids(zero.tolist())}"
        )
    points = points / torch.exp2(torch.frexp(largest_of_row).exponent.double() - 1)
    return points / torch.linalg.vector_norm(points, dim=1, keepdim=True), 1.0


def pool_classes(split: ClassSplit, pool: str) -> Tensor:
    """Return the classes that neighbours are chosen from, int64, ascending.

    Args:
        split: which classes are few, medium and many.
        pool: ``"base"``, medium and many (the paper's choice); ``"many"``; or ``"all"``, few classes too (its appendix D). A
            class without samples is in none.

    Raises:
        ValueError: an unknown pool.

    Example:
        >>> pool_classes(ClassSplit(few=[2], medium=[1], many=[0]), "base")
        tensor([0, 1])
    """
    check_choice(pool, "pool", POOLS)
    if pool == "all":
        return torch.cat([split.few, split.base]).sort().values
    return split.many if pool == "many" else split.base


def pool_size(split: ClassSplit, pool: str) -> int:
    """How many neighbours a few class can have at most: the classes of the pool but itself.

    Example:
        >>> pool_size(ClassSplit(few=[2], medium=[1], many=[0]), "all")
        2
    """
    return len(pool_classes(split, pool)) - (pool == "all")


def build_members(
    class_means: TensorLike,
    few: TensorLike,
    base: TensorLike,
    top_k: int = 5,
    *,
    metric: str = "euclidean",
    seed: int = 0,
) -> Tensor:
    """Return the classes that each few class is composed of: itself, then its nearest base classes.

    Args:
        class_means: floating point [N, D], as ``class_means`` returns them.
        few: class ids [F] of the few classes, distinct.
        base: class ids of the base classes, distinct.
        top_k: K, neighbours per few class. Default 5, paper section 4.2.
        metric: ``"euclidean"`` (default, paper section 4.2), ``"cosine"`` or ``"random"``; see ``nearest_classes``.
        seed: of ``"random"``.

    Returns:
        int64 [F, K+1] on the device of ``class_means``: column 0 is ``few``, then the neighbours, nearest first.

    Raises:
        TypeError, ValueError: as ``nearest_classes``; ``few`` are its targets and ``base`` its candidates.

    Example:
        >>> build_members(torch.tensor([[0.0], [9.0], [2.0], [1.0]]), few=[3], base=[0, 1, 2], top_k=2)
        tensor([[3, 0, 2]])
    """
    means = as_tensor(class_means, "class_means")
    neighbors = nearest_classes(means, few, base, top_k, metric=metric, seed=seed)
    own = check_class_ids(few, means.shape[0], "few").to(neighbors.device)
    return torch.cat([own[:, None], neighbors], dim=1)


def check_members(members: TensorLike, num_classes: int) -> Tensor:
    """Return ``members`` as int64 after checking that each few class can be composed of them.

    Args:
        members: class ids [F, K+1] with F and K at least 1, column 0 the few class itself, as from ``build_members``.
        num_classes: N.

    Returns:
        int64 [F, K+1] on the device of ``members``.

    Raises:
        TypeError: ids that are not integers.
        ValueError: another shape, an id outside ``0 .. N - 1``, a class twice in a row, or two rows for one few class;
            the message shows the row.

    Example:
        >>> check_members([[3, 0, 2]], num_classes=4)
        tensor([[3, 0, 2]])
    """
    num_classes = check_integer(num_classes, "num_classes", minimum=1)
    ids = as_tensor(members, "members").detach()
    check_shape(ids, "members", ("F", "K+1"))
    if ids.shape[0] < 1:
        raise ValueError("members must have at least one row [F, K+1], got none: there are no few classes to compose")
    if ids.shape[1] < 2:
        raise ValueError(
            f"members must have at least two columns [F, K+1] (the few class and one neighbour), got {list(ids.shape)}"
        )
    check_integral(ids, "members")
    ids = ids.to(torch.int64)
    in_order = ids.sort(dim=1).values
    faults = {
        f"be class ids in 0..{num_classes - 1}": ((ids < 0) | (ids >= num_classes)).any(dim=1),
        "name each class once in a row": (in_order[:, 1:] == in_order[:, :-1]).any(dim=1),
    }
    for wanted, is_wrong in faults.items():
        if (row := first_true(is_wrong)) is not None:
            raise ValueError(f"members must {wanted}, got {ids[row].tolist()} in row {row}")
    own, counts = torch.unique(ids[:, 0], return_counts=True)
    if bool((counts > 1).any()):
        few_class = int(own[counts > 1][0])
        rows = torch.nonzero(ids[:, 0] == few_class)[:, 0].tolist()
        raise ValueError(
            f"members must have one row for each few class (column 0), got class {few_class} in rows "
            f"{format_ids(rows)}: row {rows[1]} is {ids[rows[1]].tolist()}"
        )
    return ids


def reduce_classifiers(weight: TensorLike, pca_dim: int | None = 500) -> Tensor:
    """Reduce the rows of a classifier by principal component analysis.

    The analysis is fitted on all N rows (in float64, with scikit-learn's signs) and only feeds the alpha sub-modules: the
    composed classifiers keep their full width.

    Args:
        weight: floating point [N, D], one row per class.
        pca_dim: components to keep, at most. Default 500, the paper's choice for ImageNet-LT (section 4.1); it takes
            300 for Places-LT. ``None`` returns the rows unchanged.

    Returns:
        [N, P] with P = min(pca_dim, N, D), in the dtype and on the device of ``weight``, without gradient.

    Raises:
        TypeError: weights that are not floating point, a ``pca_dim`` that is not an integer.
        ValueError: ``pca_dim`` below 1, fewer than two rows, NaN or infinity.

    Example:
        >>> reduce_classifiers(torch.tensor([[1.0, 1.0], [3.0, 3.0]]), pca_dim=1).abs()
        tensor([[1.4142],
                [1.4142]])
    """
    rows = finite_tensor(weight, "weight", ("N", "D"))
    if pca_dim is None:
        return rows
    pca_dim = check_integer(pca_dim, "pca_dim", minimum=1)
    if rows.shape[0] < 2 or rows.shape[1] < 1:
        raise ValueError(f"weight must have at least two rows and one column for a PCA, got {list(rows.shape)}")
    components = min(pca_dim, rows.shape[0], rows.shape[1])
    wide = rows.to("cpu", torch.float64).numpy()
    centered = wide - wide.mean(axis=0)
    return torch.from_numpy(centered @ principal_axes(centered, components).T).to(device=rows.device, dtype=rows.dtype)


def principal_axes(centered: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
    """The directions in which rows ``[n, D]`` around 0 differ most, most important first, ``[count, D]``.

    Of the two signs the one whose largest entry is positive, so that it does not depend on the library.
    """
    few_rows = centered.shape[0] < centered.shape[1]
    squares, vectors = np.linalg.eigh(centered @ centered.T if few_rows else centered.T @ centered)
    squares, vectors = squares[::-1][:count], vectors[:, ::-1][:, :count]
    if squares[-1] > _LEAST_SHARE**2 * squares[0]:
        axes = vectors.T @ centered if few_rows else vectors.T
        axes = axes / np.linalg.norm(axes, axis=1, keepdims=True)
    else:
        axes = np.linalg.svd(centered, full_matrices=False)[2][:count]
    signs = np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1))
    result: npt.NDArray[np.float64] = axes * signs
    return result


def submodule_inputs(reduced: TensorLike, members: TensorLike) -> Tensor:
    """Return the fixed input of each alpha sub-module: the reduced classifiers of its members, end to end.

    Paper section 3.2: "a flattened concatenated vector" of the few class's own classifier and its neighbours'.

    Args:
        reduced: floating point [N, P], as ``reduce_classifiers`` returns them.
        members: class ids [F, K+1], as ``build_members`` returns them.

    Returns:
        [F, (K+1) * P], in the dtype and on the device of ``reduced``.

    Raises:
        TypeError, ValueError: as ``check_members``; ``reduced`` not [N, P] floating point, NaN or infinity in it.

    Example:
        >>> submodule_inputs(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [[1, 0]])
        tensor([[3., 4., 1., 2.]])
    """
    rows = finite_tensor(reduced, "reduced", ("N", "P"))
    ids = check_members(members, rows.shape[0]).to(rows.device)
    return rows[ids].flatten(start_dim=1)


def residual_directions(
    weight: TensorLike, class_means: TensorLike, count: int, empty: TensorLike = ()
) -> tuple[Tensor, Tensor]:
    """Return directions along which a classifier's rows may move, beside what they are composed of.

    They are principal directions of the class means, in which classes differ, most important first, and before them the
    constant alone. Along the principal ones the bias moves too, so that a mean feature's score does not. All have the length
    of the classifier's average row: a learned amount of 1 is as large as a whole row.

    Args:
        weight: floating point [N, D], the classifier.
        class_means: floating point [N, D], as ``class_means`` returns them.
        count: principal directions, at least 1; at most min(N - 1, D) there are.
        empty: ids of classes without samples, whose means do not count.

    Returns:
        The directions [R, D] and what each adds to the bias [R], with R up to count + 1, in the dtype and on the device of
        ``weight``. Without a bias leave out the second.

    Raises:
        TypeError, ValueError: shapes that do not fit, values that are not finite, ``count`` below 1.

    Example:
        >>> directions, bias = residual_directions(torch.eye(2), torch.tensor([[0.0, 2.0], [0.0, 4.0]]), count=1)
        >>> directions.abs(), bias.abs()
        (tensor([[0., 0.],
                [0., 1.]]), tensor([1., 3.]))
    """
    rows = finite_tensor(weight, "weight", ("N", "D"))
    means = finite_tensor(class_means, "class_means", ("N", "D"))
    if rows.shape != means.shape:
        raise ValueError(f"class_means must have the shape of weight, {list(rows.shape)}, got {list(means.shape)}")
    seen = torch.ones(len(means), dtype=torch.bool, device="cpu")
    seen[check_class_ids(empty, len(means), "empty").cpu()] = False
    wide = means.cpu().double()[seen]
    count = min(check_integer(count, "count", minimum=1), len(wide) - 1, means.shape[1])
    center = wide.mean(dim=0)
    length = float(rows.cpu().double().norm(dim=1).mean())
    principal = length * torch.from_numpy(principal_axes((wide - center).numpy(), count))
    directions = torch.cat([principal.new_zeros(1, means.shape[1]), principal])
    bias = torch.cat([principal.new_full((1,), length), -(principal @ center)])
    return directions.to(rows), bias.to(rows)
