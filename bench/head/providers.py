"""The peers of the benchmark: one problem, one set-up for all, each in its best form.

Each provider is a module with ``forward(features) -> scores`` and the same trainable parameters in some layout: the two-layer
networks of all few classes. The classifier is frozen in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from alphaext import AlphaNet


@dataclass(frozen=True)
class Size:
    """Sizes of a published problem. Tensors of these sizes are drawn at random."""

    name: str
    num_classes: int
    num_few: int
    pca_dim: int
    few_samples: int
    top_k: int = 5
    in_features: int = 2048
    batch: int = 64


SIZES = {
    "imagenet-lt": Size("imagenet-lt", num_classes=1000, num_few=136, pca_dim=500, few_samples=1643),
    "places-lt": Size("places-lt", num_classes=365, num_few=71, pca_dim=300, few_samples=804),
}


def make_small() -> None:
    """From here on all sizes are tiny ones."""
    for name, size in SIZES.items():
        SIZES[name] = replace(size, num_classes=40, num_few=7, pca_dim=6, few_samples=30, in_features=16, batch=8)


@dataclass(frozen=True)
class Problem:
    size: Size
    weight: Tensor
    bias: Tensor
    members: Tensor
    z: Tensor
    features: Tensor
    labels: Tensor

    def logits(self) -> Tensor:
        return functional.linear(self.features, self.weight, self.bias)


def make_problem(size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    classes = torch.randperm(size.num_classes, generator=generator)
    few, base = classes[: size.num_few], classes[size.num_few :]
    neighbours = torch.stack([base[torch.randperm(len(base), generator=generator)[: size.top_k]] for _ in range(size.num_few)])
    inputs = (size.top_k + 1) * size.pca_dim
    return Problem(
        size=size,
        weight=draw(size.num_classes, size.in_features, scale=size.in_features**-0.5),
        bias=draw(size.num_classes, scale=0.1),
        members=torch.cat([few.unsqueeze(1), neighbours], dim=1).to(device),
        z=draw(size.num_few, inputs, scale=0.05),
        features=draw(size.batch, size.in_features),
        labels=torch.randint(size.num_classes, (size.batch,), generator=generator).to(device),
    )


class PaperLoop(nn.Module):
    """The paper's form: a Python loop over one ``nn.Sequential`` a class, then the composition of equations 1 to 4."""

    def __init__(self, problem: Problem, gamma: float = 0.7) -> None:
        super().__init__()
        size, inputs = problem.size, problem.z.shape[1]
        device, dtype = problem.z.device, problem.z.dtype
        self.problem, self.gamma = problem, gamma
        self.submodules = nn.ModuleList(
            nn.Sequential(
                nn.Linear(inputs, size.pca_dim, device=device, dtype=dtype),
                nn.ReLU(),
                nn.Linear(size.pca_dim, size.top_k + 1, device=device, dtype=dtype),
            )
            for _ in range(size.num_few)
        )
        self.members_weight, self.members_bias = problem.weight[problem.members], problem.bias[problem.members]

    def alphas(self) -> Tensor:
        z = self.problem.z
        raw = torch.stack([submodule(z[f]) for f, submodule in enumerate(self.submodules)])
        return torch.cat([raw[:, :1].clamp(2**-14, self.gamma), raw[:, 1:]], dim=1)

    def forward(self, features: Tensor) -> Tensor:
        alpha = self.alphas()
        composed_weight = torch.einsum("fk,fkd->fd", alpha, self.members_weight)
        composed_bias = (alpha * self.members_bias).sum(dim=1)
        few = self.problem.members[:, 0]
        weight = self.problem.weight.index_copy(0, few, composed_weight)
        bias = self.problem.bias.index_copy(0, few, composed_bias)
        return functional.linear(features, weight, bias)


class Batched(PaperLoop):
    """All sub-modules as two ``baddbmm``; composition as in the paper's form."""

    def __init__(self, problem: Problem, gamma: float = 0.7) -> None:
        super().__init__(problem, gamma)
        firsts, seconds = [m[0] for m in self.submodules], [m[2] for m in self.submodules]
        self.w1 = nn.Parameter(torch.stack([layer.weight.detach() for layer in firsts]))
        self.b1 = nn.Parameter(torch.stack([layer.bias.detach() for layer in firsts]))
        self.w2 = nn.Parameter(torch.stack([layer.weight.detach() for layer in seconds]))
        self.b2 = nn.Parameter(torch.stack([layer.bias.detach() for layer in seconds]))
        del self.submodules

    def alphas(self) -> Tensor:
        hidden = torch.baddbmm(self.b1.unsqueeze(2), self.w1, self.problem.z.unsqueeze(2)).relu()
        raw = torch.baddbmm(self.b2.unsqueeze(2), self.w2, hidden).squeeze(2)
        return torch.cat([raw[:, :1].clamp(2**-14, self.gamma), raw[:, 1:]], dim=1)


class FromLogits(nn.Module):
    """A head fed with cached logits of the original classifier instead of features."""

    def __init__(self, head: AlphaNet) -> None:
        super().__init__()
        self.head = head

    def forward(self, logits: Tensor) -> Tensor:
        return self.head.mix_logits(logits)


def _alphaext(problem: Problem, first_layer: str) -> AlphaNet:
    return AlphaNet(
        problem.weight,
        problem.bias,
        problem.members,
        problem.z,
        gamma=0.7,
        rule="clamp",
        init="default",
        first_layer=first_layer,
        seed=0,
    )


# Name -> (module, whether it reads cached logits). The names are those of the tables.
PROVIDERS: dict[str, tuple[Callable[[Problem], nn.Module], bool]] = {
    "paper loop": (PaperLoop, False),
    "batched baddbmm": (Batched, False),
    "batched + torch.compile": (lambda problem: torch.compile(Batched(problem), fullgraph=True), False),
    "alphaext dense": (lambda problem: _alphaext(problem, "dense"), False),
    "alphaext factored": (lambda problem: _alphaext(problem, "factored"), False),
    "alphaext factored, cached logits": (lambda problem: FromLogits(_alphaext(problem, "factored")), True),
}

MODES = ("forward", "forward+backward", "sgd step")


def make_step(module: nn.Module, problem: Problem, cached_logits: bool, mode: str) -> Callable[[], None]:
    """The function to time: the same for every provider."""
    inputs = problem.logits() if cached_logits else problem.features
    if mode == "forward":

        def forward() -> None:
            with torch.no_grad():
                module(inputs)

        return forward
    parameters = [p for p in module.parameters() if p.requires_grad]
    # The fused update reads and writes each parameter once: the best that torch.optim offers, to every provider.
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, fused=True)

    def backward() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(module(inputs), problem.labels).backward()

    def step() -> None:
        backward()
        optimizer.step()

    return backward if mode == "forward+backward" else step
