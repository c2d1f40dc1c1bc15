"""The native engine's operators: many runs side by side on the CPU, and everything on a GPU against the CPU."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch
from emulated_gpu import DIRECTORY as EMULATED
from emulated_gpu import GPU
from torch import Tensor

import alphaext  # noqa: F401  (registers the operators)

TILE, BLOCK, TOP = 16, 64, 5  # as in csrc/kernels/training_params.h
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # of some steps' rounding, in another order of sums

# gamma, rule, projected_gradient, lr, momentum, dampening, weight_decay, nesterov, first_step
OPTIONS = [
    (0.7, 0, False, 0.1, 0.9, 0.0, 0.0, False, True),
    (0.5, 0, True, 0.05, 0.9, 0.0, 0.01, True, False),
    (0.7, 1, False, 0.1, 0.0, 0.0, 0.0, False, True),
    (0.4, 1, True, 0.05, 0.8, 0.3, 0.02, False, True),
    (0.9, 2, False, 0.1, 0.9, 0.0, 0.0, False, True),
]


@dataclass
class Runs:
    """The arguments of ``train_epoch_many``, in their order."""

    state: Tensor
    b2: Tensor
    b2_momentum: Tensor
    raw: Tensor
    alpha: Tensor
    order: Tensor
    member_logits: Tensor
    base_logsumexp: Tensor
    label_logit: Tensor
    few_of_label: Tensor
    member_columns: Tensor
    gradient_scale: Tensor
    batch: int
    settings: Tensor
    penalty: Tensor | None = None
    few_offset: Tensor | None = None

    def arguments(self) -> list[Tensor | int | None]:
        return [getattr(self, field.name) for field in fields(self)]

    def copy(self, device: str = "cpu") -> Runs:
        moved = [a.clone().to(device) if isinstance(a, Tensor) else a for a in self.arguments()]
        return Runs(*moved)

    def trained(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("state", "b2", "b2_momentum", "raw", "alpha")}

    def train(self) -> Tensor:
        return torch.ops.alphaext.train_epoch_many(*self.arguments())

    def train_alone(self, run: int) -> Tensor:
        """The same for one run through ``train_epoch``."""
        gamma, rule, projected, lr, momentum, dampening, decay, nesterov, first, samples = self.settings[run].tolist()
        stacked = [getattr(self, field.name) for field in fields(self)][:12]
        shared = () if self.member_logits.dim() == 3 else (6, 7, 8, 9)
        tensors = [t if i in shared else t[run] for i, t in enumerate(stacked)]
        tensors[5] = tensors[5][: int(samples)]
        optional = [None if t is None else t[run] for t in (self.penalty, self.few_offset)]
        return torch.ops.alphaext.train_epoch(
            *tensors, self.batch, gamma, int(rule), bool(projected), lr, momentum, dampening, decay, bool(nesterov),
            bool(first), *optional,
        )  # fmt: skip


def make_runs(
    options=OPTIONS, *, num_few=5, members=4, tiles=3, batch=8, samples=21, rows=30, columns=12, shared=False,
    separate_logits=False, penalized=False, dtype=torch.float64,
) -> Runs:  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    count, networks, classes = len(options), 1 if shared else num_few, num_few if shared else 1
    leading = (count,) if separate_logits else ()

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    def index(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    gram = draw(count, num_few, num_few, scale=0.1) + torch.eye(num_few, dtype=dtype)
    return Runs(
        state=draw(count, networks, tiles, 2 * classes + 2 * members, TILE, scale=0.3),
        b2=draw(count, networks, members, scale=0.3),
        b2_momentum=draw(count, networks, members, scale=0.1),
        raw=torch.zeros(count, num_few, members, dtype=dtype),
        alpha=torch.zeros(count, num_few, members, dtype=dtype),
        order=index(rows, count, samples),
        member_logits=draw(*leading, rows, columns),
        base_logsumexp=draw(*leading, rows),
        label_logit=draw(*leading, rows),
        few_of_label=(index(num_few + 1, *leading, rows) - 1).to(torch.int32),
        member_columns=index(columns, count, num_few, members).to(torch.int32),
        gradient_scale=gram if shared else draw(count, num_few).abs() + 1,
        batch=batch,
        settings=torch.tensor([[float(value) for value in row] + [float(samples)] for row in options], dtype=torch.float64),
        penalty=draw(count, 2, members, scale=0.3).abs() if penalized else None,
        few_offset=draw(count, num_few) if penalized else None,
    )


def make_validation(runs: int, samples: int, dtype=torch.float64, num_few=6, members=4, base=9, columns=11) -> list:
    """The arguments of ``validate_many``."""
    generator = torch.Generator().manual_seed(samples)
    classes = num_few + base

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(classes, (samples,), generator=generator)
    few_classes = torch.randperm(classes, generator=generator)[:num_few].sort().values
    few_of_class = torch.full((classes,), -1)
    few_of_class[few_classes] = torch.arange(num_few)
    base_classes = (few_of_class < 0).nonzero().flatten()
    ids = torch.stack([base_classes[torch.randperm(base, generator=generator)[:TOP]] for _ in range(samples)])
    return [
        draw(runs, num_few, members),
        torch.randint(columns, (runs, num_few, members), generator=generator).to(torch.int32),
        few_classes.to(torch.int32),
        draw(-(-samples // BLOCK), columns, BLOCK),
        draw(samples),
        draw(samples, TOP).sort(dim=1, descending=True).values,
        ids.to(torch.int32),
        labels,
        few_of_class[labels].to(torch.int32),
        classes,
    ]


def assert_same(actual: Runs, expected: Runs) -> None:
    for name, value in expected.trained().items():
        assert actual.trained()[name].equal(value), name


def assert_trained_alike(actual: Runs, result: Tensor, expected: Runs, expected_result: Tensor, dtype: torch.dtype) -> None:
    assert result[:, 1:].cpu().equal(expected_result[:, 1:])
    torch.testing.assert_close(result[:, 0].cpu(), expected_result[:, 0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for name, value in expected.trained().items():
        got = actual.trained()[name].cpu()
        torch.testing.assert_close(got, value, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], msg=lambda m, n=name: f"{n}: {m}")


# ---- On the CPU ----------------------------------------------------------------------------------------------------

SHAPES = [
    *({}, {"shared": True}, {"separate_logits": True}, {"members": 6, "batch": 64}, {"samples": 0}),
    *({"penalized": True}, {"penalized": True, "shared": True}, {"penalized": True, "tiles": 0, "members": 40}),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_runs_are_each_run_alone(shape, dtype):
    many = make_runs(dtype=dtype, **shape)
    if many.order.shape[1]:
        many.settings[:, 9] = torch.tensor([21, 20, 0, 8, 1])
    alone = many.copy()
    result = many.train()
    for run in range(len(OPTIONS)):
        assert alone.train_alone(run).equal(result[run])
    assert_same(many, alone)
    assert result.shape == (len(OPTIONS), 3) and bool((result[:, 1:] == -1).all())


def test_a_run_that_fails_leaves_the_others_alone():
    runs = make_runs()
    expected = runs.copy()
    expected.train()
    runs.b2[1, 2, 0] = torch.nan
    result = runs.train()
    assert result[1, 1:].tolist() == [0, 2] and result[[0, 2, 3, 4], 1].tolist() == [-1] * 4
    for run in (0, 2, 3, 4):
        assert runs.state[run].equal(expected.state[run])


def test_no_runs():
    runs = make_runs()
    none = Runs(*[a[:0] if isinstance(a, Tensor) and i not in (6, 7, 8, 9) else a for i, a in enumerate(runs.arguments())])
    assert none.train().shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": torch.zeros(5, 9, dtype=torch.float64)}, r"settings must have shape \[5, 10\]"),
        ({"settings": torch.zeros(5, 10, dtype=torch.float64)}, r"gamma must be in \(0, 1\], got 0 for run 0"),
        ({"order": torch.full((5, 21), 30)}, "order must be in"),
        ({"order": torch.zeros(4, 21, dtype=torch.int64)}, r"order must have shape \[5, n\]"),
        ({"b2": torch.zeros(5, 4, 4, dtype=torch.float64)}, "b2 must have shape"),
        ({"member_columns": torch.full((5, 5, 4), 12, dtype=torch.int32)}, "member_columns must be in"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"penalty": torch.zeros(5, 2, 3, dtype=torch.float64)}, r"penalty must have shape \[5, 2, 4\]"),
        ({"few_offset": torch.zeros(5, 4, dtype=torch.float64)}, r"few_offset must have shape \[5, 5\]"),
        ({"few_offset": torch.zeros(5, 5)}, "few_offset must have the dtype of state, float64, got float32"),
    ],
)
def test_bad_arguments(change, message):
    runs = make_runs()
    before = runs.copy()
    with pytest.raises(RuntimeError, match=message):
        replace(runs, **change).train()
    assert_same(runs, before)


@pytest.mark.parametrize(
    ("column", "value", "message"), [(1, 3, "rule must"), (9, 22, "samples must"), (9, 1.5, "samples must")]
)
def test_bad_settings_of_one_run(column, value, message):
    runs = make_runs()
    before = runs.copy()
    runs.settings[4, column] = value
    with pytest.raises(RuntimeError, match=f"{message}.* for run 4"):
        runs.train()
    assert_same(runs, before)


@pytest.mark.parametrize("samples", [0, 1, 64, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_validating_many_is_validating_each(samples, dtype):
    if samples == 0:
        arguments = make_validation(3, 1, dtype)
        arguments[3:9] = [a[:0] for a in arguments[3:9]]
    else:
        arguments = make_validation(3, samples, dtype)
    hits = torch.ops.alphaext.validate_many(*arguments)
    assert hits.shape == (3, 2, 15)
    for run in range(3):
        alone = torch.ops.alphaext.validate(arguments[0][run], arguments[1][run], *arguments[2:])
        assert hits[run].equal(alone)
    assert samples < 64 or 0 < int(hits[:, 0].sum()) < int(hits[:, 1].sum()) < 3 * samples


# ---- On a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, {"tiles": 32, "num_few": 140}, {"batch": 300, "samples": 1000}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gpu_trains_as_the_cpu_does(shape, dtype):
    runs = make_runs(dtype=dtype, **shape)
    on_gpu = runs.copy(GPU)
    result = on_gpu.train()
    assert_trained_alike(on_gpu, result, runs, runs.train(), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True])
def test_gpu_trains_alone_as_among_many(shared):
    many = make_runs(dtype=torch.float32, shared=shared, num_few=70).copy(GPU)
    alone = many.copy(GPU)
    result = many.train()
    for run in range(len(OPTIONS)):
        assert alone.train_alone(run).equal(result[run])
    assert_same(many, alone)


@pytest.mark.gpu
def test_gpu_repeats_to_the_bit():
    """Also with more runs than the card trains at once."""
    start = make_runs(OPTIONS * (1 if EMULATED else 60), dtype=torch.float32, members=6, tiles=32, num_few=40).copy(GPU)
    first = start.copy(GPU)
    result = first.train()
    for _ in range(3):
        again = start.copy(GPU)
        assert again.train().equal(result)
        assert_same(again, first)


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True])
def test_gpu_without_room_for_the_state(shared, monkeypatch):
    """A state too large for shared memory is trained in global memory."""
    monkeypatch.setenv("SHIM_SHARED", "16384")  # an emulated GPU has less of it, since it takes longer
    tiles, num_few = (60, 20) if EMULATED else (3000, 300)
    runs = make_runs(OPTIONS[:3], tiles=tiles, shared=shared, num_few=num_few if shared else 3, samples=9)
    runs.state *= 0.02
    on_gpu = runs.copy(GPU)
    result = on_gpu.train()
    assert_trained_alike(on_gpu, result, runs, runs.train(), torch.float64)


@pytest.mark.gpu
def test_gpu_ends_a_run_that_fails():
    runs = make_runs()
    runs.b2[1, 2, 0] = torch.nan
    runs.settings[3, 3] = 1e300
    on_gpu = runs.copy(GPU)
    result, expected = on_gpu.train().cpu(), runs.train()
    assert result[:, 1].equal(expected[:, 1]) and result[1, 2] == 2
    for run in (0, 2, 4):
        torch.testing.assert_close(on_gpu.state[run].cpu(), runs.state[run], rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
def test_gpu_ends_a_run_with_indices_out_of_range():
    runs = make_runs(OPTIONS[:2]).copy(GPU)
    runs.order[1, 10] = 1 << 40
    assert runs.train()[:, 1].tolist() == [-1, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [1, 64, 5000])
def test_gpu_validates_as_the_cpu_does(samples, dtype):
    arguments = make_validation(3, samples, dtype)
    on_gpu = [a.to(GPU) if isinstance(a, Tensor) else a for a in arguments]
    hits, expected = torch.ops.alphaext.validate_many(*on_gpu).cpu(), torch.ops.alphaext.validate_many(*arguments)
    # A score within rounding of another may stand on either side of it.
    assert int((hits - expected).abs().sum()) <= (samples // 1000 if dtype == torch.float32 else 0)
    alone = torch.ops.alphaext.validate(on_gpu[0][1], on_gpu[1][1], *on_gpu[2:])
    assert alone.cpu().equal(hits[1])


@pytest.mark.gpu(real=True)
def test_gpu_epoch_in_a_graph():
    start = make_runs(dtype=torch.float32).copy(GPU)
    expected = start.copy(GPU)
    expected.train()
    runs = start.copy(GPU)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = runs.train()
    for name, value in start.trained().items():
        runs.trained()[name].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    assert bool((result[:, 1] == -1).all())
    assert_same(runs, expected)
