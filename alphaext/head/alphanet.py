"""AlphaNet: the drop-in replacement for a model's last linear layer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..ops import head as ops
from ..utils.checks import check_choice, check_integer, check_kind, check_number
from ..utils.linear import check_classifier, check_fits, linear_parameters, make_linear
from ..utils.tensors import TensorLike, as_tensor, check_floating, check_same_device, check_shape
from .choices import FIRST_LAYERS, INITS, LEARNED_COEFFICIENTS
from .composition import check_directions, choose_directions, choose_members, closed_form_alphas
from .extra_state import EXTRA_STATE, read_extra_state
from .first_layer import first_layer_scale, initial_first_layer, move_first_layer
from .neighbors import check_members, reduce_classifiers, submodule_inputs
from .outputs import clamped_outputs, identity_outputs


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
            and which did best in trials (docs/reference/defaults.md); the paper takes 0.7 on ImageNet-LT.
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

    Sizes are attributes: ``in_features`` D, ``out_features`` N, ``num_few`` F, ``top_k`` K and ``num_directions`` R; ``shared``
    says whether one network serves several few classes.

    All tensors share the dtype and device of ``weight``. The attribute ``few_bias``, 0 at first, is a constant on all few
    scores (chosen by :func:`alphaext.fit` with ``few_bias=True``); it is part of the scores, of ``fold()`` and of the state. So
    is ``keeps_original``: where it is True, the head is the original classifier, whatever was learned (``fit`` sets it where
    nothing that it learned is better on validation samples).

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
        self.gamma = check_number(gamma, "gamma", above=0, maximum=1)
        ops.rule_number(rule)
        check_choice(init, "init", INITS)
        check_choice(first_layer, "first_layer", FIRST_LAYERS)
        check_choice(coefficients, "coefficients", LEARNED_COEFFICIENTS)
        for name, value in (("weight", weight), ("members", members)):
            check_kind(value, Tensor, name, what="a tensor")
        check_same_device(weight=weight, bias=bias, members=members)
        check_classifier(weight, bias)
        members = check_members(members, len(weight))
        num_few, num_members = members.shape
        if num_few == len(weight):
            raise ValueError(f"members makes all {num_few} classes few; at least one must be a base class")
        if coefficients == "direct":
            needless = {
                "z": z is not None,
                "hidden_dim": hidden_dim not in (None, 0),
                "shared": bool(shared),
                "init": init != "identity",
                "first_layer": first_layer != "factored",
            }
            for name, is_given in needless.items():
                if is_given:
                    raise ValueError(f"coefficients='direct' has no sub-modules, to which {name} could apply")
            z, hidden_dim = weight.new_zeros(num_few, 0), 0
        else:
            z = check_fits(z, "z", weight, (num_few, "(K+1)*P"))
            if z.shape[1] == 0 or z.shape[1] % num_members:
                raise ValueError(f"z must have a multiple of K+1 = {num_members} columns, got {z.shape[1]}")
            hidden_dim = z.shape[1] // num_members if hidden_dim is None else check_integer(hidden_dim, "hidden_dim", minimum=1)
        check_directions(directions, direction_bias, weight, bias, coefficients, rule)
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), device="cpu"))

        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.members: Tensor = nn.Buffer(members.clone())
        self.z: Tensor = nn.Buffer(z.detach().clone())
        self.directions: Tensor | None = None if directions is None else nn.Buffer(directions.detach().clone())
        self.direction_bias: Tensor | None = None if direction_bias is None else nn.Buffer(direction_bias.detach().clone())
        self.residual = None if directions is None else nn.Parameter(weight.new_zeros(num_few, len(directions)))
        self.out_features, self.in_features = weight.shape
        self.num_few, self.top_k = num_few, num_members - 1
        self.num_directions = 0 if directions is None else len(directions)
        self.rule, self.coefficients, self.first_layer = rule, coefficients, first_layer
        self.projected_gradient = bool(projected_gradient)
        self.few_bias, self.first_layer_decay, self.keeps_original = 0.0, 1.0, False
        self.seed = check_integer(seed, "seed", minimum=0, maximum=2**63 - 1)
        networks = 1 if shared else num_few
        self.shared = networks == 1 and num_few > 1
        self._init_first_layer(networks, hidden_dim)
        self._init_second_layer(networks, hidden_dim, init)

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
        tau: float = 1.0,
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
            tau: with ``coefficients="closed-form"``, which are set by ``class_counts`` and not learned: an own mean of ``tau``
                samples counts as much as its neighbours (:meth:`closed_form`).
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
        residual = check_integer(residual, "residual", minimum=0)
        members, empty = choose_members(
            len(weight),
            class_counts=class_counts,
            class_means=class_means,
            few_classes=few_classes,
            members=members,
            top_k=top_k,
            pool=pool,
            metric=metric,
            neighbor_seed=neighbor_seed,
            few_below=few_below,
            many_above=many_above,
            residual=residual,
        )
        members = members.to(weight.device)
        if residual:
            if options.get("directions") is not None:
                raise ValueError("residual and directions both say where few rows may move; give one of them")
            options |= choose_directions(weight, bias, class_means, residual, empty)
        if options.get("coefficients") == "closed-form":
            if class_counts is None:
                raise ValueError("class_counts must be given for coefficients='closed-form', which go by them")
            del options["coefficients"]
            return cls.closed_form(weight, bias, members, class_counts, tau=tau, **options)
        if options.get("coefficients") == "direct":
            return cls(weight, bias, members, None, **options)
        return cls(weight, bias, members, submodule_inputs(reduce_classifiers(weight, pca_dim), members), **options)

    @classmethod
    def closed_form(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        members: Tensor,
        class_counts: TensorLike,
        *,
        tau: float = 1.0,
        **options: Any,
    ) -> AlphaNet:
        """Make a head whose coefficients the numbers of samples say: ``n / (n + tau)`` its own, equal ones of the neighbours.

        Nothing is left to train. It is a head with ``coefficients="direct"``, which :func:`alphaext.fit` can go on from. Where
        rows are linear in class means it is the composition of means (docs/reference/discriminant.md).

        Args:
            weight: ``[N, D]``, the trained classifier.
            bias: ``[N]``, or None.
            members: ``[F, K+1]`` int64 class ids, as for :class:`AlphaNet`.
            class_counts: ``[N]`` integers, training samples of each class.
            tau: at least 0; so many samples count as much as all neighbours.
            options: others of :class:`AlphaNet`; the rule is ``"clamp"``, with ``gamma`` 1.

        Example:
            >>> head = AlphaNet.closed_form(torch.eye(4), None, torch.tensor([[3, 0, 1]]), [90, 80, 70, 6], tau=2.0)
            >>> head.alphas()
            tensor([[0.7500, 0.1250, 0.1250]])
        """
        tau = check_number(tau, "tau", minimum=0)
        if options.get("rule", "clamp") != "clamp" or options.get("gamma", 1.0) != 1:
            raise ValueError(
                "closed-form coefficients need rule='clamp' and gamma=1, got "
                f"{options.get('rule', 'clamp')!r} and {options.get('gamma', 1.0)!r}"
            )
        head = cls(weight, bias, members, None, coefficients="direct", **options)
        counts = as_tensor(class_counts, "class_counts").to(head.members.device)
        check_shape(counts, "class_counts", (len(weight),))
        with torch.no_grad():
            head.b2.copy_(closed_form_alphas(counts[head.few_classes], head.top_k, tau))
        return head

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
            stored = read_extra_state(state["_extra_state"])
            options: dict[str, Any] = {"coefficients": stored["coefficients"]}
            if options["coefficients"] == "direct":
                options |= {"z": None, **{name: state.get(name) for name in ("directions", "direction_bias")}}
            else:
                networks, _, hidden_dim = state["w2"].shape
                options |= {
                    "z": state["z"],
                    "first_layer": stored["first_layer"],
                    "hidden_dim": hidden_dim,
                    "shared": networks == 1 and len(state["members"]) > 1,
                }
            head = cls(state["weight"], state.get("bias"), state["members"], seed=0, **options)
            head.load_state_dict(state)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise ValueError(f"state must be the state_dict of an AlphaNet: {type(error).__name__}: {error}") from error
        return head

    def _init_first_layer(self, networks: int, hidden_dim: int) -> None:
        z = self._wide_inputs()
        if self.first_layer == "dense":
            self.w1, self.b1 = (
                nn.Parameter(start.to(self.z)) for start in initial_first_layer(networks, hidden_dim, z, self.seed)
            )
            return
        start = self._initial_preactivation(networks, hidden_dim) if hidden_dim else z.new_zeros(self.num_few, 0)
        self.preactivation = nn.Parameter(start.to(self.z))
        self.gradient_scale: Tensor = nn.Buffer(first_layer_scale(self.z, networks))

    def _init_second_layer(self, networks: int, hidden_dim: int, init: str) -> None:
        start = identity_outputs(self.rule, self.gamma, self.top_k, self.z.dtype)
        w2, b2 = start.new_zeros(networks, len(start), hidden_dim), start.repeat(networks, 1)
        if init == "default":
            bound, generator = 1 / math.sqrt(hidden_dim), torch.Generator("cpu").manual_seed(self.seed)
            for network in range(networks):
                w2[network].uniform_(-bound, bound, generator=generator)
                b2[network].uniform_(-bound, bound, generator=generator)
        self.w2 = nn.Parameter(w2.to(self.z.device))
        self.b2 = nn.Parameter(b2.to(self.z.device))

    def _wide_inputs(self) -> Tensor:
        return self.z.detach().to(device="cpu", dtype=ops.accumulate_dtype(self.z.dtype)).contiguous()

    def _initial_preactivation(self, networks: int, hidden_dim: int) -> Tensor:
        # The weights are used row by row as they are drawn: they are never held.
        return ops.initial_preactivation(self._wide_inputs(), hidden_dim, networks == 1, self.seed)

    def _apply(self, fn: Any, recurse: bool = True) -> AlphaNet:
        # A squared norm easily overflows float16, so the scale moves with the head but never gets narrower than float32.
        scale = self._buffers.get("gradient_scale")
        super()._apply(fn, recurse)
        if scale is not None:
            self.gradient_scale = scale.to(device=self.z.device, dtype=ops.accumulate_dtype(self.z.dtype))
        return self

    @property
    def few_classes(self) -> Tensor:
        """Ids of the few classes, ``[F]`` int64."""
        return self.members[:, 0]

    def forward(self, features: Tensor) -> Tensor:
        """Scores of all classes, ``[..., N]`` in class order, from ``features`` ``[..., D]`` (equations 3 and 4)."""
        return self._scores(features, "features", self.weight)

    def _scores(self, input: Tensor, name: str, weight: Tensor | None) -> Tensor:
        """Scores from features, or without ``weight`` from logits."""
        width = self.out_features if weight is None else self.in_features
        self._check_input(input, name, width)
        flat = input.reshape(-1, width)
        if self.keeps_original:
            original = flat if weight is None else nn.functional.linear(flat, weight, self.bias)
            return original.view(*input.shape[:-1], self.out_features)
        z, w1, b1 = self._first_layer_arguments()
        scores = ops.alpha_head(
            flat,
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
            b1_scale=self.gradient_scale if w1 is None else None,
        )
        if self.residual is not None or self.few_bias:
            scores = scores.index_add(1, self.few_classes, self._added_to_few(flat, scores))
        return scores.view(*input.shape[:-1], self.out_features)

    def _added_to_few(self, features: Tensor, scores: Tensor) -> Tensor:
        """What residual and constant add to the few scores, ``[batch, F]``."""
        constant = scores.new_full((len(features), self.num_few), self.few_bias)
        if self.residual is None or self.directions is None:
            return constant
        bias = None if self.direction_bias is None else self.residual @ self.direction_bias
        return constant + nn.functional.linear(features, self.residual @ self.directions, bias).to(constant.dtype)

    def identity_outputs(self) -> Tensor:
        """The outputs ``[K+1 (+ R)]`` that make every few row the original one, or with ``gamma`` below 1 the nearest to it.

        Where ``init="identity"`` starts, and what ``regularize`` of :func:`alphaext.fit` draws the outputs to.
        """
        outputs = identity_outputs(self.rule, self.gamma, self.top_k, self.z.dtype)
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
        if self.residual is not None:
            raise ValueError("a head with a residual needs features: its scores are no mix of the original logits alone")
        return self._scores(logits, "logits", None)

    def alphas(self) -> Tensor:
        """The coefficients alpha, ``[F, K+1]`` in float32 (float64 for a float64 head): column 0 the few class's own."""
        alpha = self.evaluate_networks()[2]
        if self.keeps_original:
            alpha = torch.zeros_like(alpha).index_fill_(1, self.members.new_zeros(1), 1)
        return alpha

    def clamped(self) -> Tensor:
        """``[F]`` bool: classes whose own coefficient is held by the clamp, so that its gradient is blocked.

        Under ``"l1"``, which has no clamp, none is.
        """
        return clamped_outputs(self.evaluate_networks()[1], self.rule, self.gamma)

    @torch.no_grad()
    def materialize_first_layer(self) -> tuple[Tensor, Tensor]:
        """The first layer's weights ``w1`` ``[F, H, (K+1) P]`` and biases ``b1`` ``[F, H]`` (``[1, ...]`` shared).

        A factored head holds only what its first layer puts out, but remembers the seed of its start. Under SGD every step
        moves ``w1`` along the fixed input ``z``, so how far the output has moved tells the weights: these are, to rounding, the
        ones that training a dense head of the same seed would have produced (docs/reference/exactness.md). A dense head
        returns its own.

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
        networks, _, hidden_dim = self.w2.shape
        z = self._wide_inputs()
        w1, b1 = initial_first_layer(networks, hidden_dim, z, self.seed)
        start = self._initial_preactivation(networks, hidden_dim).double()
        now = self.preactivation.detach().cpu().double()
        move_first_layer(w1, b1, z, now - self.first_layer_decay * start, self.first_layer_decay)
        return w1.to(self.z), b1.to(self.z)

    @torch.no_grad()
    def move_first_layer_outputs(self, moved: Tensor, decay: float) -> None:
        """Change a dense first layer the way SGD would have to move its outputs by ``moved`` ``[F, H]``."""
        move_first_layer(self.w1, self.b1, self.z, moved.to(self.z.device), decay)

    @torch.no_grad()
    def composed(self) -> tuple[Tensor, Tensor | None]:
        """The composed few rows: weight ``[F, D]`` and bias ``[F]``, or None without (equations 1 and 2)."""
        if self.keeps_original:
            return self.weight[self.few_classes], None if self.bias is None else self.bias[self.few_classes]
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
        original: Tensor | None = self.bias
        if original is None and bias is not None:
            original = self.weight.new_zeros(self.out_features)
        linear = make_linear(self.weight, original)
        linear.weight[self.few_classes] = weight
        if bias is not None:
            linear.bias[self.few_classes] = bias
        linear.requires_grad_(self.weight.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        network = "coefficients='direct'" if self.coefficients == "direct" else f"hidden_dim={self.w2.shape[2]}"
        unusual = {
            f"num_directions={self.num_directions}": self.num_directions,
            f"few_bias={self.few_bias:g}": self.few_bias,
            "bias=False": self.bias is None,
            "shared=True": self.shared,
            f"first_layer={self.first_layer!r}": self.first_layer != "factored",
            "projected_gradient=False": not self.projected_gradient,
            "keeps_original=True": self.keeps_original,
        }
        usual = f"in_features={self.in_features}, out_features={self.out_features}, num_few={self.num_few}, top_k={self.top_k}"
        parts = [usual, f"gamma={self.gamma:g}", f"rule={self.rule!r}", network]
        return ", ".join(parts + [text for text, applies in unusual.items() if applies])

    def get_extra_state(self) -> Tensor:
        """What the tensors do not say, as JSON in a uint8 tensor: so a state_dict holds tensors only."""
        text = json.dumps({name: getattr(self, name) for name in EXTRA_STATE})
        return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take from a state_dict what its tensors do not say."""
        stored = read_extra_state(state)
        for name in ("first_layer", "coefficients"):
            if stored[name] != getattr(self, name):
                raise ValueError(f"the state is of a head with {name}={stored[name]!r}, this one has {getattr(self, name)!r}")
        for name, value in stored.items():
            setattr(self, name, value)

    def _first_layer_arguments(self) -> tuple[Tensor | None, Tensor | None, Tensor]:
        if self.first_layer == "dense":
            return self.z, self.w1, self.b1
        return None, None, self.preactivation

    @torch.no_grad()
    def evaluate_networks(self) -> tuple[Tensor, Tensor, Tensor]:
        """The first layer's outputs ``[F, H]`` before the ReLU, the outputs ``[F, K+1]``, and the coefficients ``[F, K+1]``."""
        arguments = (self.members, *self._first_layer_arguments(), self.w2, self.b2)
        return ops.evaluate(*arguments, num_classes=self.out_features, gamma=self.gamma, rule=self.rule)

    def _check_input(self, x: Tensor, name: str, width: int) -> None:
        check_kind(x, Tensor, name, what="a tensor")
        if x.dim() < 1 or x.shape[-1] != width:
            raise ValueError(f"{name} must have shape [..., {width}], got {list(x.shape)}")
        if x.device != self.weight.device:
            raise ValueError(f"{name} must be on the head's device, {self.weight.device}, got {x.device}")
        check_floating(x, name)
        if x.dtype != self.weight.dtype and not ops.autocast_enabled(x.device.type):
            raise TypeError(f"{name} must have the head's dtype, {self.weight.dtype}, got {x.dtype}")
