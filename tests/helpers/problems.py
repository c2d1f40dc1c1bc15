"""Random Alpha Net problems for the tests: one place that knows which tensors go together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alphaext import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Relative to the largest value of a result. The reference runs in float64 on the very same (already rounded) inputs, so what
# differs is: float64 and float32, the order of sums of up to some hundred terms; float16 and bfloat16, one rounding of the
# result (2^-11 and 2^-8) on top of float32 sums.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.2e-2,
}


@dataclass(frozen=True)
class Problem:
    """The tensors of one call of the head, in the order in which the operators take them."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    members: Tensor
    z: Tensor | None
    w1: Tensor | None
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.input, self.weight, self.bias, self.members, self.z, self.w1, self.b1, self.w2, self.b2)

    def floating(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: x for name, x in named.items() if x is not None and x.is_floating_point()}

    def map(self, function) -> Problem:  # type: ignore[no-untyped-def]
        """The same problem with `function` applied to every floating tensor."""
        return replace(self, **{name: function(x) for name, x in self.floating().items()})

    def requires_grad(self) -> Problem:
        return self.map(lambda x: x.detach().requires_grad_())


def make_problem(
    *,
    batch: int = 5,
    num_classes: int = 11,
    num_few: int = 3,
    top_k: int = 2,
    in_features: int = 7,
    pca_dim: int = 4,
    hidden: int = 6,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    bias: bool = True,
    first_layer: str = "separate",
    shared_second_layer: bool = False,
    from_logits: bool = False,
    seed: int = 0,
) -> Problem:
    """Draw a problem; `first_layer` is "separate", "shared" or "factored" (then `b1` is the pre-activation)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    classes = torch.randperm(num_classes, generator=generator)
    few = classes[:num_few]
    rows = []
    for own in few.tolist():
        others = torch.tensor([c for c in range(num_classes) if c != own])
        rows.append(torch.cat([torch.tensor([own]), others[torch.randperm(len(others), generator=generator)[:top_k]]]))
    members = torch.stack(rows) if rows else torch.empty(0, top_k + 1, dtype=torch.int64)
    inputs = (top_k + 1) * pca_dim
    first, second = (1 if first_layer == "shared" else num_few), (1 if shared_second_layer else num_few)
    factored = first_layer == "factored"
    return Problem(
        input=draw(batch, num_classes if from_logits else in_features),
        weight=None if from_logits else draw(num_classes, in_features),
        bias=draw(num_classes) if bias else None,
        members=members.to(device),
        z=None if factored else draw(num_few, inputs),
        w1=None if factored else draw(first, hidden, inputs) / inputs**0.5,
        b1=draw(first, hidden),
        w2=draw(second, top_k + 1, hidden) / hidden**0.5,
        b2=draw(second, top_k + 1) / 4 + 0.25,
    )


def reference_scores(problem: Problem, **options) -> Tensor:  # type: ignore[no-untyped-def]
    """The head of `problem` by `alphaext.reference`, in the problem's own dtype."""
    p = problem
    pre = p.b1 if p.w1 is None or p.z is None else reference.preactivations(p.z, p.w1, p.b1)
    raw = reference.raw_outputs(pre, p.w2, p.b2)
    rule = options["rule"]
    alpha = reference.coefficients(raw, options["gamma"], rule, options.get("projected_gradient", False))
    if p.weight is None:
        return reference.mix_logits(p.input, p.members, alpha, p.bias, rule)
    composed_weight, composed_bias = reference.compose(alpha, p.weight, p.bias, p.members, rule)
    return reference.scores(p.input, p.weight, p.bias, p.members, composed_weight, composed_bias)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str, factor: float = 1.0) -> None:
    """Compare with the tolerance of `dtype`, relative to the largest expected value.

    Or relative to 0.05 where all are smaller: then terms of order 1 have cancelled, and their rounding has not.
    """
    actual, expected = actual.detach(), expected.detach()
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    tolerance = TOLERANCES[dtype] * factor * max(scale, 0.05)
    torch.testing.assert_close(
        actual.double().cpu(), expected.double().cpu(), rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )
