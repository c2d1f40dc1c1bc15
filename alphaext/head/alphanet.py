"""AlphaNet: the drop-in replacement for a model's last linear layer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..classes import ClassSplit, split_classes
from ..ops import head as ops
from ..utils.checks import check_choice, check_gamma, check_integer
from ..utils.linear import check_classifier, check_dtype, linear_parameters
from ..utils.tensors import as_tensor, check_class_ids, check_finite, check_same_device, check_shape
from .choices import COEFFICIENTS, FIRST_LAYERS, INITS
from .first_layer import _wide, first_layer_scale, initial_first_layer, move_first_layer
from .neighbors import build_members, check_members, pool_classes, reduce_classifiers, residual_directions, submodule_inputs

# Where softmax saturates its gradient vanishes, so "identity" starts no closer to 1 than this.
_LARGEST_SOFTMAX_START = 0.99


class AlphaNet(nn.Module):
    """A classifier whose few-class rows are learned combinations of themselves and of strong base rows.

    A drop-in for the linear layer it was made from: features ``[..., D]`` to scores ``[..., N]`` in class order (paper,
    equations 1 to 4). The original classifier is frozen; what is learned is one two-layer network per few class, which maps
    the class's members (itself and its ``K`` nearest base classes) to the coefficients ``alpha``. Usually made with
    :meth:`from_linear`.

    Args:
        weight: ``[N, D]``, the trained classifier.
        bias: ``[N]``, or None for a classifier without bias.
        members: ``[F, K+1]`` int64 class ids: column 0 the few class, then its neighbours, nearest first.
        z: ``[F, (K+1) P]``, each sub-module's fixed input (:func:`alphaext.head.submodule_inputs`); None with
            ``coefficients="direct"``, which needs none.
        coefficients: ``"mlp"`` (default), as in the paper: a sub-module's outputs. ``"direct"``: the outputs are themselves the
            parameters, without a network, which is the same function with far fewer numbers to learn.
        directions: ``[R, D]``, with ``coefficients="direct"`` and ``rule="clamp"``: directions along which each few row may
            move besides, by learned amounts that start at 0, so that ``U_f = sum_k alpha_fk V_fk + sum_r rho_fr directions_r``
            (:func:`alphaext.head.residual_directions`).
        direction_bias: ``[R]``, what each direction adds to the bias; with ``bias``, and only then.
        hidden_dim: hidden units ``H`` of a sub-module; default ``P``, as in the paper (500 on ImageNet-LT).
        gamma: ``alpha_0`` is kept in ``(0, gamma]``; in ``(0, 1]``. Default 1, with which the start is the original classifier
            and which did best in trials (docs/defaults.md); the paper takes 0.7 on ImageNet-LT.
        rule: ``"clamp"``, ``"softmax"`` or ``"l1"``; see :func:`alphaext.reference.coefficients`.
        init: ``"identity"`` starts at ``alpha_0 = gamma`` with equal neighbours, near the original classifier (under
            ``"softmax"`` at most 0.99; under ``"l1"``, which fixes ``alpha_0 = 1``, with equal neighbours). ``"default"`` is
            PyTorch's ``U(+-1/sqrt(fan_in))`` for every layer.
        shared: one network for all few classes (paper, appendix A) instead of one each.
        first_layer: ``"factored"`` (default) holds only the first layer's output, which, its input being fixed, is all that
            training with SGD sees: the same training at a tiny fraction of the memory and time. Exact for SGD with momentum,
            Nesterov, dampening and weight decay; not for optimisers that work element by element (Adam), nor for a gradient of
            ``z``. ``"dense"`` holds the first layer's weights.
        projected_gradient: let the gradient of a clamped coefficient through when descent would move it back inside (default);
            without it, as in the paper, a class that leaves the interval under ``"clamp"`` never returns.
        seed: of the initial weights; None draws one from PyTorch's default generator. Dense and factored heads of the same
            seed start the same.

    All tensors share the dtype and device of ``weight``. The attribute ``few_bias``, 0 at first, is a constant on all few
    scores (chosen by :func:`alphaext.fit` with ``few_bias=True``); it is part of the scores, of ``fold()`` and of the state.

    Raises:
        ValueError, TypeError: for values, shapes, dtypes or devices that do not fit; the message names the argument.

    Example:
        >>> members = torch.tensor([[3, 0, 1]])
        >>> z = submodule_inputs(torch.eye(4), members)
        >>> head = AlphaNet(torch.eye(4), None, members, z, gamma=0.5, seed=0)
        >>> head(torch.eye(4)[3:]).detach()
        tensor([[0.0000, 0.0000, 0.0000, 0.5000]])
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        members: Tensor,
        z: Tensor | None,
        *,
        coefficients: str = "mlp",
        directions: Tensor | None = None,
        direction_bias: Tensor | None = None,
        hidden_dim: int | None = None,
        gamma: float = 1.0,
        rule: str = "clamp",
        init: str = "identity",
        shared: bool = False,
        first_layer: str = "factored",
        projected_gradient: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        gamma = check_gamma(gamma)
        ops.rule_number(rule)
        check_choice(init, "init", INITS)
        check_choice(first_layer, "first_layer", FIRST_LAYERS)
        check_choice(coefficients, "coefficients", COEFFICIENTS)
        if coefficients == "direct":
            surplus = {"z": z is not None, "hidden_dim": hidden_dim not in (None, 0), "shared": bool(shared)}
            surplus |= {"init": init != "identity", "first_layer": first_layer != "factored"}
            given = [name for name, differs in surplus.items() if differs]
            if given:
                raise ValueError(f"coefficients='direct' has no sub-modules, to which {given[0]} could apply")
            if isinstance(weight, Tensor) and isinstance(members, Tensor):
                z = weight.new_zeros(len(members) if members.dim() > 0 else 0, 0)
        for name, value in (("weight", weight), ("members", members), ("z", z)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        assert z is not None
        check_same_device(weight=weight, bias=bias, members=members, z=z)
        check_classifier(weight, bias)
        members = check_members(members, weight.shape[0])
        num_few, num_members = members.shape
        if num_few == weight.shape[0]:
            raise ValueError(f"members makes all {num_few} classes few; at least one must be a base class")
        if coefficients == "mlp":
            check_shape(z, "z", (num_few, "(K+1)*P"))
            if z.shape[1] == 0 or z.shape[1] % num_members:
                raise ValueError(f"z must have a multiple of K+1 = {num_members} columns, got {z.shape[1]}")
            check_dtype(z, "z", weight)
            check_finite(z, "z")
            if hidden_dim is None:
                hidden_dim = z.shape[1] // num_members
            hidden_dim = check_integer(hidden_dim, "hidden_dim", minimum=1)
        else:
            hidden_dim = 0
        _check_directions(directions, direction_bias, weight, bias, coefficients, rule)
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        seed = check_integer(seed, "seed", minimum=0, maximum=2**63 - 1)

        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.members: Tensor
        self.z: Tensor
        self.register_buffer("members", members.clone())
        self.register_buffer("z", z.detach().clone())
        self.gamma = gamma
        self.rule = rule
        self.coefficients = coefficients
        self.first_layer = first_layer
        self.projected_gradient = bool(projected_gradient)
        self.few_bias = 0.0
        self.directions: Tensor | None
        self.direction_bias: Tensor | None
        self.register_buffer("directions", None if directions is None else directions.detach().clone())
        self.register_buffer("direction_bias", None if direction_bias is None else direction_bias.detach().clone())
        self.residual = None if directions is None else nn.Parameter(weight.new_zeros(num_few, len(directions)))

        networks = 1 if shared else num_few
        self.seed: int | None = seed
        self.first_layer_decay = 1.0
        self._init_first_layer(networks, hidden_dim, seed)
        self._init_second_layer(networks, hidden_dim, init, torch.Generator("cpu").manual_seed(seed))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        class_counts: Tensor | None = None,
        class_means: Tensor | None = None,
        few_classes: Tensor | None = None,
        members: Tensor | None = None,
        top_k: int = 5,
        pool: str = "base",
        metric: str = "euclidean",
        neighbor_seed: int = 0,
        few_below: int = 20,
        many_above: int = 100,
        pca_dim: int | None = 500,
        residual: int = 0,
        **options: Any,
    ) -> AlphaNet:
        """Make the head for a trained linear layer.

        Few classes are found by ``class_counts`` (fewer than ``few_below`` training samples) or named by ``few_classes``;
        their neighbours are the ``top_k`` base classes with the nearest class means. Or ``members`` says it all.

        Args:
            linear: a module with ``weight`` ``[N, D]`` and ``bias`` ``[N]`` or None, such as ``nn.Linear``.
            class_counts: ``[N]`` integers, training samples of each class.
            class_means: ``[N, D]``, mean training feature of each class (:func:`alphaext.class_means`).
            few_classes: ids of the few classes, instead of ``class_counts``.
            members: ``[F, K+1]`` int64 class ids, instead of all of the above (but ``class_means``, where there is a residual).
            top_k: neighbours ``K`` of each few class; the paper uses 5.
            pool: the classes that neighbours are chosen from: ``"base"`` (medium and many), as in the paper, ``"many"``, or
                ``"all"``, few classes too (paper, appendix D).
            metric: what makes a class near: ``"euclidean"``, as in the paper, or ``"cosine"``; ``"random"`` draws neighbours
                instead, as a control (:func:`alphaext.head.nearest_classes`).
            neighbor_seed: of ``"random"``, apart from ``seed``, so that weights can vary over fixed neighbours.
            few_below: a class with fewer training samples is few; the paper uses 20.
            many_above: a class with more training samples is many; the paper uses 100.
            pca_dim: the sub-modules read classifiers reduced by PCA to ``min(pca_dim, N, D)``; the paper uses 500 on
                ImageNet-LT and 300 on Places-LT. None feeds the full rows.
            residual: along how many principal directions of the class means each few row may move besides; 0, as in the
                paper. Needs ``class_means`` and ``coefficients="direct"``.
            options: ``coefficients``, ``hidden_dim``, ``gamma``, ``rule``, ``init``, ``shared``, ``first_layer``,
                ``projected_gradient``, ``seed``; see :class:`AlphaNet`.

        Returns:
            The head, with the dtype and on the device of ``linear``.

        Raises:
            ValueError, TypeError: for anything missing, contradictory or out of range; the message names the argument.

        Example:
            >>> linear = nn.Linear(16, 10)
            >>> head = AlphaNet.from_linear(
            ...     linear, class_counts=[90] * 8 + [5] * 2, class_means=torch.randn(10, 16), top_k=3, seed=0
            ... )
            >>> head
            AlphaNet(in_features=16, out_features=10, num_few=2, top_k=3, gamma=1, rule='clamp', hidden_dim=10)
        """
        weight, bias = linear_parameters(linear)
        num_classes = weight.shape[0]
        if members is not None:
            empty = weight.new_empty(0, dtype=torch.int64)
            surplus = {"class_counts": class_counts, "few_classes": few_classes}
            if not residual:
                surplus["class_means"] = class_means
            given = [name for name, value in surplus.items() if value is not None]
            if given:
                raise ValueError(f"members already names classes and neighbours; do not give {', '.join(given)} as well")
            members = check_members(as_tensor(members, "members").cpu(), num_classes)
        else:
            split = _split(class_counts, few_classes, num_classes, few_below, many_above, pool)
            empty = split.empty
            if class_means is None:
                raise ValueError("class_means must be given to find neighbours (or give members)")
            means = as_tensor(class_means, "class_means")
            check_shape(means, "class_means", (num_classes, "D"))
            neighbor_seed = check_integer(neighbor_seed, "neighbor_seed", minimum=0)
            members = build_members(means.cpu(), split.few, pool_classes(split, pool), top_k, metric=metric, seed=neighbor_seed)
        members = members.to(weight.device)
        residual = check_integer(residual, "residual", minimum=0)
        if residual:
            if class_means is None:
                raise ValueError("class_means must be given for a residual")
            if options.get("directions") is not None:
                raise ValueError("residual and directions both say where few rows may move; give one of them")
            directions, direction_bias = residual_directions(weight, class_means, residual, empty)
            # The first is the constant, of no use without a bias.
            options |= {"directions": directions, "direction_bias": direction_bias}
            if bias is None:
                options |= {"directions": directions[1:], "direction_bias": None}
        if options.get("coefficients") == "direct":
            return cls(weight, bias, members, None, **options)
        reduced = reduce_classifiers(weight, pca_dim)
        return cls(weight, bias, members, submodule_inputs(reduced, members), **options)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> AlphaNet:
        """Make the head that a ``state_dict`` is of, without anything else.

        Args:
            state: what ``state_dict()`` gave, read with ``torch.load(path, weights_only=True)`` for example.

        Raises:
            ValueError: it is not the state of an AlphaNet.

        Example:
            >>> head = AlphaNet.from_linear(nn.Linear(8, 4), members=[[3, 0, 1]], gamma=0.5, seed=0)
            >>> again = AlphaNet.from_state_dict(head.state_dict())
            >>> torch.equal(again.alphas(), head.alphas()), again.gamma
            (True, 0.5)
        """
        try:
            options = json.loads(bytes(state["_extra_state"].cpu().tolist()).decode())
            networks, _, hidden_dim = state["w2"].shape
            weight, bias, members, z = state["weight"], state.get("bias"), state["members"], state["z"]
            layout: dict[str, Any] = {"first_layer": options["first_layer"], "hidden_dim": hidden_dim}
            layout["shared"] = networks == 1 and len(members) > 1
            if options.get("coefficients", "mlp") == "direct":
                layout = {"coefficients": "direct", "directions": state.get("directions")}
                layout["direction_bias"], z = state.get("direction_bias"), None
            head = cls(weight, bias, members, z, seed=0, **layout)
            head.load_state_dict(state)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise ValueError(f"state must be the state_dict of an AlphaNet: {type(error).__name__}: {error}") from error
        return head

    def _init_first_layer(self, networks: int, hidden_dim: int, seed: int) -> None:
        z = self.z.detach().to(device="cpu", dtype=_wide(self.z.dtype)).contiguous()
        if hidden_dim == 0:
            self.preactivation = nn.Parameter(self.z.new_zeros(len(self.z), 0))
            self.register_buffer("gradient_scale", first_layer_scale(self.z, networks))
            return
        if self.first_layer == "dense":
            w1, b1 = initial_first_layer(networks, hidden_dim, z, seed)
            self.w1 = nn.Parameter(w1.to(self.z))
            self.b1 = nn.Parameter(b1.to(self.z))
            return
        # The weights are used row by row as they are drawn: they are never held.
        start = ops.initial_preactivation(z, hidden_dim, networks == 1, seed)
        self.preactivation = nn.Parameter(start.to(self.z))
        self.gradient_scale: Tensor
        self.register_buffer("gradient_scale", first_layer_scale(self.z, networks))

    def _init_second_layer(self, networks: int, hidden_dim: int, init: str, generator: torch.Generator) -> None:
        dtype, device, num_members = self.z.dtype, self.z.device, self.top_k + 1
        w2 = torch.empty(networks, num_members, hidden_dim, dtype=dtype, device="cpu")
        b2 = torch.empty(networks, num_members, dtype=dtype, device="cpu")
        if init == "default":
            bound = 1 / math.sqrt(hidden_dim)
            for network in range(networks):
                w2[network].uniform_(-bound, bound, generator=generator)
                b2[network].uniform_(-bound, bound, generator=generator)
        else:
            w2.zero_()
            b2[:] = _identity_outputs(self.rule, self.gamma, self.top_k, dtype)
        self.w2 = nn.Parameter(w2.to(device))
        self.b2 = nn.Parameter(b2.to(device))

    def _apply(self, fn: Any, recurse: bool = True) -> AlphaNet:
        # A squared norm easily overflows float16, so the scale moves with the head but never gets narrower than float32.
        scale = self._buffers.get("gradient_scale")
        super()._apply(fn, recurse)
        if scale is not None:
            self.gradient_scale = scale.to(device=self.z.device, dtype=_wide(self.z.dtype))
        return self

    @property
    def in_features(self) -> int:
        """Width ``D`` of the features."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Number ``N`` of classes."""
        return self.weight.shape[0]

    @property
    def num_few(self) -> int:
        """Number ``F`` of few classes, whose rows are rebuilt."""
        return self.members.shape[0]

    @property
    def top_k(self) -> int:
        """Number ``K`` of neighbours of each few class."""
        return self.members.shape[1] - 1

    @property
    def few_classes(self) -> Tensor:
        """Ids of the few classes, ``[F]`` int64."""
        return self.members[:, 0]

    @property
    def num_directions(self) -> int:
        """Number ``R`` of directions of the residual; 0 without one."""
        return 0 if self.directions is None else len(self.directions)

    @property
    def shared(self) -> bool:
        """Whether one network serves all few classes."""
        return self.w2.shape[0] == 1 and self.num_few != 1

    def forward(self, features: Tensor) -> Tensor:
        """Scores of all classes, ``[..., N]`` in class order, from ``features`` ``[..., D]`` (equations 3 and 4)."""
        self._check_input(features, "features", self.in_features)
        flat = features.reshape(-1, features.shape[-1])
        scores = self._head(flat, self.weight)
        if self.residual is not None or self.few_bias:
            scores = scores.index_add(1, self.few_classes, self._besides(flat, scores))
        return scores.view(*features.shape[:-1], self.out_features)

    def _besides(self, flat: Tensor, scores: Tensor) -> Tensor:
        """What residual and constant add to the few scores, ``[batch, F]``."""
        added = scores.new_full((len(flat), self.num_few), self.few_bias)
        if self.residual is None or self.directions is None:
            return added
        bias = None if self.direction_bias is None else self.residual @ self.direction_bias
        return added + nn.functional.linear(flat, self.residual @ self.directions, bias).to(added.dtype)

    def identity_outputs(self) -> Tensor:
        """The outputs ``[K+1 (+ R)]`` that make every few row the original one, or with ``gamma`` below 1 the nearest to it.

        Where ``init="identity"`` starts, and what ``regularize`` of :func:`alphaext.fit` draws the outputs to.
        """
        outputs = _identity_outputs(self.rule, self.gamma, self.top_k, self.z.dtype)
        return torch.cat([outputs, outputs.new_zeros(self.num_directions)]).to(self.z.device)

    def outputs(self) -> Tensor:
        """What a few row's coefficients are made of, ``[F, K+1 (+ R)]``, with gradient: outputs, then the residual."""
        if self.coefficients == "direct":
            return self.b2 if self.residual is None else torch.cat([self.b2, self.residual], dim=1)
        z, w1, b1 = self._first_layer_arguments()
        if w1 is None or z is None:  # its gradient is that of the weights behind it, as in the scores
            preactivation = ops.scale_gradient(b1, self.gradient_scale)
        else:
            preactivation = reference.preactivations(z, w1, b1)
        return reference.raw_outputs(preactivation, self.w2, self.b2)

    def mix_logits(self, logits: Tensor) -> Tensor:
        """The same scores from the original classifier's ``logits`` ``[..., N]``, computed once and kept.

        A composed score is a mix of original ones, ``sum_k alpha_fk logits[members_fk]``, so with a frozen backbone and
        classifier a training step needs neither features nor weights.

        Example:
            >>> head = AlphaNet.from_linear(nn.Linear(8, 4), members=[[3, 0, 1]], seed=0)
            >>> features = torch.randn(2, 8)
            >>> logits = nn.functional.linear(features, head.weight, head.bias)
            >>> torch.allclose(head.mix_logits(logits), head(features), atol=1e-6)
            True
        """
        self._check_input(logits, "logits", self.out_features)
        if self.residual is not None:
            raise ValueError("a head with a residual needs features: its scores are no mix of the original logits alone")
        flat = logits.reshape(-1, logits.shape[-1])
        scores = self._head(flat, None)
        if self.few_bias:
            scores = scores.index_add(1, self.few_classes, self._besides(flat, scores))
        return scores.view(logits.shape)

    def alphas(self) -> Tensor:
        """The coefficients alpha, ``[F, K+1]`` in float32 (float64 for a float64 head): column 0 the few class's own."""
        return self._outputs()[1]

    def clamped(self) -> Tensor:
        """``[F]`` bool: classes whose own coefficient is held by the clamp, so that its gradient is blocked.

        Under ``"l1"``, which has no clamp, none is.
        """
        return clamped_outputs(self._outputs()[0], self.rule, self.gamma)

    @torch.no_grad()
    def materialize_first_layer(self) -> tuple[Tensor, Tensor]:
        """The first layer's weights ``w1`` ``[F, H, (K+1) P]`` and biases ``b1`` ``[F, H]`` (``[1, ...]`` shared).

        A factored head holds only what its first layer puts out, but remembers the seed of its start. Under SGD every step
        moves ``w1`` along the fixed input ``z``, so how far the output has moved tells the weights: these are, to rounding, the
        ones that training a dense head of the same seed would have produced (docs/exactness.md). A dense head returns its own.

        Right after :func:`alphaext.fit`, and after SGD of your own without weight decay (with it, multiply
        ``first_layer_decay`` by what it left of the start).

        Example:
            >>> options = dict(members=[[3, 0, 1]], seed=0)
            >>> linear = nn.Linear(8, 4)
            >>> dense = AlphaNet.from_linear(linear, first_layer="dense", **options)
            >>> factored = AlphaNet.from_linear(linear, first_layer="factored", **options)
            >>> torch.allclose(factored.materialize_first_layer()[0], dense.w1)
            True
        """
        if self.coefficients == "direct":
            raise ValueError("a head with coefficients='direct' has no first layer")
        if self.first_layer == "dense":
            return self.w1.detach().clone(), self.b1.detach().clone()
        if self.seed is None:
            raise ValueError("this head's state does not say the seed of its first layer, so its weights cannot be drawn again")
        networks, hidden = self.w2.shape[0], self.w2.shape[2]
        z = self.z.detach().to(device="cpu", dtype=_wide(self.z.dtype)).contiguous()
        w1, b1 = initial_first_layer(networks, hidden, z, self.seed)
        start = ops.initial_preactivation(z, hidden, networks == 1, self.seed)
        now = self.preactivation.detach().cpu().double()
        move_first_layer(w1, b1, z, now - self.first_layer_decay * start.double(), self.first_layer_decay)
        return w1.to(self.z), b1.to(self.z)

    @torch.no_grad()
    def _move_outputs(self, moved: Tensor, decay: float) -> None:
        """Change a dense first layer the way SGD would have to move its outputs by ``moved`` ``[F, H]``."""
        move_first_layer(self.w1, self.b1, self.z, moved.to(self.z.device), decay)

    @torch.no_grad()
    def _preactivations(self) -> Tensor:
        """The first layer's outputs before the ReLU, ``[F, H]`` in float32 or wider."""
        return self._evaluate()[0]

    @torch.no_grad()
    def composed(self) -> tuple[Tensor, Tensor | None]:
        """The composed few rows: weight ``[F, D]`` and bias ``[F]``, or None without (equations 1 and 2)."""
        alpha = self.alphas()
        wide = self.weight.to(alpha.dtype)
        # embedding_bag sums alpha-weighted rows without first gathering all F (K+1) of them.
        weight = nn.functional.embedding_bag(self.members, wide, per_sample_weights=alpha, mode="sum")
        residual = None if self.residual is None else self.residual.to(alpha.dtype)
        if residual is not None and self.directions is not None:
            weight = weight + residual @ self.directions.to(alpha.dtype)
        if self.bias is None and not self.few_bias:
            return weight.to(self.weight.dtype), None
        composed_bias = alpha.new_full((self.num_few,), self.few_bias)
        if self.bias is not None:
            bias = self.bias.to(alpha.dtype)[self.members]
            composed_bias += bias[:, 0] if self.rule == "l1" else (alpha * bias).sum(dim=1)
        if residual is not None and self.direction_bias is not None:
            composed_bias += residual @ self.direction_bias.to(alpha.dtype)
        return weight.to(self.weight.dtype), composed_bias.to(self.weight.dtype)

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """A plain ``nn.Linear`` with the same scores: the original layer, its few rows replaced by the composed ones.

        It has a bias if the original layer has one, or if there is a constant ``few_bias`` on the few scores.

        Example:
            >>> head = AlphaNet.from_linear(nn.Linear(8, 4), members=[[3, 0, 1]], seed=0)
            >>> features = torch.randn(2, 8)
            >>> torch.allclose(head.fold()(features), head(features), atol=1e-6)
            True
        """
        weight, bias = self.composed()
        # On "meta", because initial values that nobody reads would be drawn from the caller's random numbers.
        linear = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.detach().clone())
        linear.weight[self.few_classes] = weight
        if bias is not None:
            old = self.weight.new_zeros(self.out_features) if self.bias is None else self.bias
            linear.bias = nn.Parameter(old.detach().clone())
            linear.bias[self.few_classes] = bias
        linear.requires_grad_(self.weight.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, num_few={self.num_few}, "
            f"top_k={self.top_k}, gamma={self.gamma:g}, rule={self.rule!r}, "
        )
        text += "coefficients='direct'" if self.coefficients == "direct" else f"hidden_dim={self.w2.shape[2]}"
        if self.num_directions:
            text += f", num_directions={self.num_directions}"
        if self.few_bias:
            text += f", few_bias={self.few_bias:g}"
        if self.bias is None:
            text += ", bias=False"
        if self.shared:
            text += ", shared=True"
        if self.first_layer != "factored":
            text += f", first_layer={self.first_layer!r}"
        if not self.projected_gradient:
            text += ", projected_gradient=False"
        return text

    def get_extra_state(self) -> Tensor:
        """What the tensors do not say, as JSON in a uint8 tensor: so a state_dict holds tensors only."""
        options = {
            "gamma": self.gamma,
            "rule": self.rule,
            "first_layer": self.first_layer,
            "projected_gradient": self.projected_gradient,
            "seed": self.seed,
            "first_layer_decay": self.first_layer_decay,
            "coefficients": self.coefficients,
            "few_bias": self.few_bias,
        }
        return torch.tensor(list(json.dumps(options).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take gamma, rule and projected_gradient from a state_dict."""
        options = json.loads(bytes(state.cpu().tolist()).decode())
        ops.rule_number(options["rule"])
        if options["first_layer"] != self.first_layer:
            raise ValueError(
                f"the state is of a head with first_layer={options['first_layer']!r}, this one has {self.first_layer!r}"
            )
        coefficients = options.get("coefficients", "mlp")
        if coefficients != self.coefficients:
            raise ValueError(f"the state is of a head with coefficients={coefficients!r}, this one has {self.coefficients!r}")
        self.gamma = check_gamma(options["gamma"])
        self.rule = options["rule"]
        self.projected_gradient = bool(options["projected_gradient"])
        self.seed = options.get("seed")
        self.first_layer_decay = float(options.get("first_layer_decay", 1.0))
        self.few_bias = float(options.get("few_bias", 0.0))

    def _first_layer_arguments(self) -> tuple[Tensor | None, Tensor | None, Tensor]:
        if self.first_layer == "dense":
            return self.z, self.w1, self.b1
        return None, None, self.preactivation

    def _head(self, input: Tensor, weight: Tensor | None) -> Tensor:
        z, w1, b1 = self._first_layer_arguments()
        return ops.alpha_head(
            input,
            weight,
            self.bias,
            self.members,
            z,
            w1,
            b1,
            self.w2,
            self.b2,
            gamma=self.gamma,
            rule=self.rule,
            projected_gradient=self.projected_gradient,
            b1_scale=None if self.first_layer == "dense" else self.gradient_scale,
        )

    def _outputs(self) -> tuple[Tensor, Tensor]:
        """The sub-modules' raw outputs and alpha."""
        _, raw, alpha = self._evaluate()
        return raw, alpha

    @torch.no_grad()
    def _evaluate(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pre-activations, outputs and coefficients of the sub-modules."""
        arguments = (self.members, *self._first_layer_arguments(), self.w2, self.b2)
        return ops.evaluate(*arguments, num_classes=self.out_features, gamma=self.gamma, rule=self.rule)

    def _check_input(self, x: Tensor, name: str, width: int) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() < 1 or x.shape[-1] != width:
            raise ValueError(f"{name} must have shape [..., {width}], got {list(x.shape)}")
        if x.device != self.weight.device:
            raise ValueError(f"{name} must be on the head's device, {self.weight.device}, got {x.device}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}; convert with .float()")
        if x.dtype != self.weight.dtype and not ops.autocast_enabled(x.device.type):
            raise TypeError(f"{name} must have the head's dtype, {self.weight.dtype}, got {x.dtype}")


def _identity_outputs(rule: str, gamma: float, top_k: int, dtype: torch.dtype) -> Tensor:
    """Raw outputs ``[K+1]`` at which ``alpha_0 = gamma`` and the neighbours are equal."""
    if rule == "l1":
        return torch.full((top_k + 1,), 1 / top_k, dtype=dtype, device="cpu")
    if rule == "clamp":
        outputs = torch.full((top_k + 1,), (1 - gamma) / top_k, dtype=torch.float64, device="cpu").to(dtype)
        outputs[0] = gamma
        if outputs[0].double() > torch.tensor(gamma, dtype=_wide(dtype), device="cpu").double():
            # Rounded up to beyond the clamp, where no gradient passes: take the next number below.
            outputs[0] -= torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(gamma))
        return outputs
    # A few rounding errors below gamma, so that no clamp holds at the start.
    own = min(gamma * (1 - 8 * torch.finfo(_wide(dtype)).eps), _LARGEST_SOFTMAX_START)
    p = torch.full((top_k + 1,), (1 - own) / top_k, dtype=torch.float64, device="cpu")
    p[0] = own
    return p.log().to(dtype)


def clamped_outputs(raw: Tensor, rule: str, gamma: float) -> Tensor:
    """``[F]`` bool: which classes' own coefficient is held by the clamp, from the sub-modules' outputs ``[F, K+1]``."""
    if rule == "l1":
        return torch.zeros(len(raw), dtype=torch.bool, device=raw.device)
    value = raw[:, 0] if rule == "clamp" else raw.softmax(dim=1)[:, 0]
    low = min(reference.ALPHA_FLOOR, gamma) if rule == "clamp" else 0.0
    return (value > gamma) | (value < low)


def _check_directions(
    directions: Tensor | None, direction_bias: Tensor | None, weight: Tensor, bias: Tensor | None, coefficients: str, rule: str
) -> None:
    for name, value in (("directions", directions), ("direction_bias", direction_bias)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if directions is None:
        if direction_bias is not None:
            raise ValueError("direction_bias goes with directions")
        return
    check_shape(directions, "directions", ("R", weight.shape[1]))
    if coefficients != "direct" or rule != "clamp":
        raise ValueError(
            f"a residual needs coefficients='direct' and rule='clamp', got {coefficients!r} and {rule!r}; "
            "residual=0 leaves it out"
        )
    if (bias is None) != (direction_bias is None):
        raise ValueError("direction_bias must be given where the classifier has a bias, and only there")
    for name, value, shape in (
        ("directions", directions, ("R", weight.shape[1])),
        ("direction_bias", direction_bias, (len(directions),)),
    ):
        if value is not None:
            check_same_device(weight=weight, **{name: value})
            check_shape(value, name, shape)
            check_dtype(value, name, weight)
            check_finite(value, name)
    if len(directions) == 0:
        raise ValueError("directions must have at least one row")


def _split(
    class_counts: Tensor | None, few_classes: Tensor | None, num_classes: int, few_below: int, many_above: int, pool: str
) -> ClassSplit:
    if (class_counts is None) == (few_classes is None):
        got = "neither" if class_counts is None else "both"
        raise ValueError(f"give class_counts or few_classes, to say which classes are few (or members); got {got}")
    if few_classes is not None:
        if pool == "many":
            raise ValueError("pool='many' needs class_counts: few_classes does not say which classes are many")
        few = check_class_ids(few_classes, num_classes, "few_classes").cpu()
        is_base = torch.ones(num_classes, dtype=torch.bool, device="cpu")
        is_base[few] = False
        return ClassSplit(few=few, medium=is_base.nonzero().flatten(), many=few.new_empty(0))
    assert class_counts is not None
    counts = as_tensor(class_counts, "class_counts").cpu()
    check_shape(counts, "class_counts", (num_classes,))
    split = split_classes(counts, few_below=few_below, many_above=many_above)
    if len(split.few) == 0:
        raise ValueError(
            f"class_counts has no few class: the smallest has {int(counts[counts > 0].min())} samples, few are those below "
            f"few_below={few_below}"
        )
    return split
