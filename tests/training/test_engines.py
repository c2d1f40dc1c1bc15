"""The engines of `fit` against each other, against a plain loop over `alphaext.reference`, and which of them is taken when."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import alphaext
from alphaext import AlphaNet, FitResult, fit, reference
from alphaext.training import cached_logits
from alphaext.training import native_engine as engines
from alphaext.training import single as training
from alphaext.training.options import TrainingOptions
from alphaext.training.sampling import EpochSampler
from alphaext.training.sgd import DecayOfStart, Sgd

# The same numbers, in sums of another order: a step's rounding is handed on, a little larger, to the next. Over the steps of
# most tests here no more than this comes of it; the long trainings state their own.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-4}

NUM_CLASSES, IN_FEATURES = 9, 6


def make_head(
    *,
    dtype: torch.dtype = torch.float64,
    num_classes: int = NUM_CLASSES,
    num_few: int = 3,
    top_k: int = 3,
    in_features: int = IN_FEATURES,
    pca_dim: int = 2,
    bias: bool = True,
    twins: bool = False,
    first_layer: str = "dense",
    seed: int = 0,
    **options,
) -> AlphaNet:
    """The last classes are few; `twins`: the first two of them see the same input."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    few = torch.arange(num_classes - num_few, num_classes)
    neighbours = [torch.randperm(num_classes - 1, generator=generator)[:top_k] for _ in few]
    members = torch.stack([torch.cat([own[None], n + (n >= own)]) for own, n in zip(few, neighbours, strict=True)])
    z = draw(num_few, (top_k + 1) * pca_dim)
    if twins:
        z[1] = z[0]
    weight, offsets = draw(num_classes, in_features).to(dtype), draw(num_classes).to(dtype) / 4
    return AlphaNet(weight, offsets if bias else None, members, z.to(dtype), first_layer=first_layer, seed=seed, **options)


def make_data(dtype=torch.float64, num_classes=NUM_CLASSES, num_few=3, in_features=IN_FEATURES, per_base=10, per_few=4, seed=1):
    """Samples that scatter around the rows of `make_head`'s classifier."""
    generator = torch.Generator().manual_seed(seed)
    counts = [per_base] * (num_classes - num_few) + [per_few] * num_few
    labels = torch.arange(num_classes).repeat_interleave(torch.tensor(counts))
    centres = torch.randn(num_classes, in_features, generator=torch.Generator().manual_seed(77), dtype=torch.float64)
    noise = torch.randn(len(labels), in_features, generator=generator, dtype=torch.float64)
    return (centres[labels] / 2 + noise / 2).to(dtype), labels


def validation(dtype=torch.float64, **sizes) -> dict[str, Tensor]:
    return dict(zip(("val_features", "val_labels"), make_data(dtype, seed=2, per_few=7, **sizes), strict=True))


def trained(head: AlphaNet) -> dict[str, Tensor]:
    """All that a training leaves behind."""
    w1, b1 = head.materialize_first_layer()
    return {"alphas": head.alphas(), "w2": head.w2.detach(), "b2": head.b2.detach(), "w1": w1, "b1": b1}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name].double(), value.double(), rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same_history(actual: FitResult, expected: FitResult, tolerance: float) -> None:
    assert len(actual.history) == len(expected.history) and actual.selected_epoch == expected.selected_epoch
    for one, two in zip(actual.history, expected.history, strict=True):
        assert one == pytest.approx(two, rel=tolerance, abs=tolerance, nan_ok=True)
    for one, two in ((actual.metrics_before, expected.metrics_before), (actual.metrics_after, expected.metrics_after)):
        assert one == pytest.approx(two, rel=tolerance, abs=tolerance, nan_ok=True)


def train_by_reference(head: AlphaNet, features: Tensor, labels: Tensor, options: TrainingOptions) -> tuple[dict, list[float]]:
    """Train the dense ``head`` as the paper says it, with nothing of the package but its reference and its samples.

    Returns what is left and each epoch's mean loss.
    """
    w1, b1, w2, b2 = (p.detach().clone().requires_grad_() for p in (head.w1, head.b1, head.w2, head.b2))
    sampler = EpochSampler(labels, head.few_classes, head.out_features, options)
    optimizer = torch.optim.SGD(
        [w1, b1, w2, b2],
        lr=options.lr,
        momentum=options.momentum,
        dampening=options.dampening,
        weight_decay=options.weight_decay,
        nesterov=options.nesterov,
    )
    losses = []
    for epoch in range(1, options.epochs + 1):
        optimizer.param_groups[0]["lr"] = options.lr * options.lr_multiplier(epoch)
        indices, total = sampler.indices[sampler.draw(epoch)], 0.0
        for batch in indices.split(options.batch_size):
            optimizer.zero_grad()
            scores = reference.alpha_head(
                features[batch], head.weight, head.bias, head.members, head.z, w1, b1, w2, b2,
                gamma=head.gamma, rule=head.rule, projected_gradient=head.projected_gradient,
            )  # fmt: skip
            loss = functional.cross_entropy(scores, labels[batch])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        losses.append(total / len(indices))
    raw = reference.raw_outputs(reference.preactivations(head.z, w1, b1), w2, b2)
    alphas = reference.coefficients(raw, head.gamma, head.rule)
    left = {"alphas": alphas, "w2": w2, "b2": b2, "w1": w1, "b1": b1}
    return {name: value.detach() for name, value in left.items()}, losses


HEADS = st.fixed_dictionaries(
    {
        "rule": st.sampled_from(reference.RULES),
        "gamma": st.sampled_from([0.3, 0.7, 1.0]),
        "projected_gradient": st.booleans(),
        "shared": st.booleans(),
        "init": st.sampled_from(["identity", "default"]),
        "hidden_dim": st.integers(1, 40),
        "top_k": st.integers(1, 7),
        "num_few": st.integers(1, 4),
        "bias": st.booleans(),
    }
)
MOMENTA = [
    {"momentum": 0.0},
    {"momentum": 0.0, "dampening": 0.5},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.8, "dampening": 0.3},
]
SCHEDULES = [
    {"lr_schedule": "constant"},
    {"lr_schedule": "step", "lr_step": 1, "lr_factor": 0.5},
    {"lr_schedule": "multistep", "lr_milestones": (2, 3)},
    {"lr_schedule": "cosine"},
]
TRAININGS = st.builds(
    lambda momentum, schedule, **others: {**momentum, **schedule, **others},
    st.sampled_from(MOMENTA),
    st.sampled_from(SCHEDULES),
    epochs=st.integers(0, 4),
    batch_size=st.sampled_from([1, 5, 7, 16, 64]),
    lr=st.sampled_from([0.02, 0.05]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    negative_ratio=st.sampled_from([0, 0.5, 1, 3]),
    negative_sampling=st.sampled_from(["uniform", "class_balanced"]),
    seed=st.integers(0, 2**63 - 1),
)


def check_against_reference(options: dict, how: dict, first_layer: str) -> None:
    """docs/reference/exactness.md: the same samples, and to rounding the same training, weights of the first layer included."""
    sizes = {"num_few": options["num_few"]}
    features, labels = make_data(**sizes)
    expected, losses = train_by_reference(make_head(**options), features, labels, TrainingOptions(**how))
    results = []
    for engine in ("native", "autograd"):
        head = make_head(**options, first_layer=first_layer)
        results.append(
            fit(head, features, labels, **validation(**sizes), **how, select="last", keep_original=False, engine=engine)
        )
        assert results[-1].engine == engine and results[-1].selected_epoch == how["epochs"]
        assert_same(trained(head), expected, TOLERANCES[torch.float64])
        assert [entry["loss"] for entry in results[-1].history[1:]] == pytest.approx(losses, rel=TOLERANCES[torch.float64])
    assert_same_history(*results, TOLERANCES[torch.float64])


@settings(max_examples=60, deadline=None)
@given(options=HEADS, how=TRAININGS, first_layer=st.sampled_from(["dense", "factored"]))
def test_engines_are_the_dense_reference(options, how, first_layer):
    check_against_reference(options, how, first_layer)


@pytest.mark.parametrize("projected_gradient", [False, True], ids=["blocked", "projected"])
@pytest.mark.parametrize("init", ["identity", "default"])
@pytest.mark.parametrize("rule", reference.RULES)
def test_every_start_and_rule_is_the_dense_reference(rule, init, projected_gradient):
    """The start "identity" of "clamp" sits on the clamp, where the gradient passes."""
    for shared, first_layer, top_k in ((False, "factored", 5), (True, "dense", 2)):
        options = {"rule": rule, "init": init, "projected_gradient": projected_gradient, "shared": shared, "top_k": top_k}
        how = {"epochs": 4, "batch_size": 7, "lr": 0.05, "weight_decay": 0.01, "lr_step": 2}
        check_against_reference({**options, "num_few": 3, "hidden_dim": 17, "gamma": 0.7}, how, first_layer)


# Fixed examples: in float32 a score beside another, or a coefficient beside its clamp, may fall on either side.
@settings(max_examples=60, deadline=None, derandomize=True)
@given(options=HEADS, how=TRAININGS, first_layer=st.sampled_from(["dense", "factored"]))
def test_engines_agree_in_float32(options, how, first_layer):
    dtype, sizes = torch.float32, {"num_few": options["num_few"]}
    heads = [make_head(**options, first_layer=first_layer, dtype=dtype) for _ in range(2)]
    results = [
        fit(
            head,
            *make_data(dtype, **sizes),
            **validation(dtype, **sizes),
            **how,
            select="last",
            keep_original=False,
            engine=engine,
        )
        for head, engine in zip(heads, ("native", "autograd"), strict=True)
    ]
    assert_same(*map(trained, heads), TOLERANCES[dtype])
    assert_same_history(*results, TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("epochs", "options"),
    [(1000, {"rule": "clamp"}), (250, {"rule": "softmax", "shared": True})],
    ids=["4000 steps, clamp, separate", "1000 steps, softmax, shared"],
)
def test_long_trainings_are_those_of_the_dense_reference(epochs, options):
    """Two trainings that differ in a last bit part where a coefficient or a hidden unit sits beside its kink.

    On these problems none does: the three stay within 1e-9 through thousands of steps with Nesterov momentum.
    """
    features, labels = make_data(num_few=2)
    options = {"num_few": 2, "hidden_dim": 10, "init": "default", **options}
    how = {"epochs": epochs, "batch_size": 4, "lr": 0.02, "lr_step": 400, "weight_decay": 1e-3, "nesterov": True}
    expected, losses = train_by_reference(make_head(**options), features, labels, TrainingOptions(**how))
    assert 2 * int((labels >= 7).sum()) == 4 * how["batch_size"], "four steps an epoch"
    start = make_head(**options).alphas()
    assert (expected["alphas"] - start).abs().max() > 0.05, "it has learned something"
    for engine in ("native", "autograd"):
        head = make_head(**options, first_layer="factored")
        result = fit(head, features, labels, **how, engine=engine, progress=False)
        assert len(result.history) == epochs + 1
        assert_same(trained(head), expected, 1e-9)
        assert [entry["loss"] for entry in result.history[1:]] == pytest.approx(losses, rel=1e-9)


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_300_steps_at_the_size_of_places_lt(shared):
    """365 classes, 71 few ones with 804 images, K = 5, P = H = 300: native and autograd, in float64, to 1e-9."""
    sizes = {"num_classes": 365, "num_few": 71, "in_features": 16}
    features, labels = make_data(**sizes, per_base=12, per_few=11)
    extra = torch.arange(294, 365)[:23]
    features, labels = torch.cat([features, features[-23:]]), torch.cat([labels, extra])
    results, heads = [], []
    for engine in ("native", "autograd"):
        heads.append(make_head(**sizes, top_k=5, pca_dim=300, hidden_dim=300, first_layer="factored", shared=shared))
        data = (features, labels)
        # The scale of 1,800 inputs is some 1,800 times the gradient: the learning rate makes up for it.
        results.append(
            fit(
                heads[-1],
                *data,
                **validation(**sizes),
                epochs=12,
                lr=0.01,
                lr_step=4,
                engine=engine,
                select="last",
                keep_original=False,
            )
        )
    assert sum(labels >= 294) == 804 and -(-2 * 804 // 64) * 12 == 312
    assert results[0].history[-1]["loss"] < results[0].history[1]["loss"]
    for name in ("w2", "b2", "preactivation"):
        torch.testing.assert_close(getattr(heads[0], name), getattr(heads[1], name), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(heads[0].alphas(), heads[1].alphas(), rtol=1e-9, atol=1e-9)
    assert_same_history(*results, 1e-9)


# ---- Which engine ----


class OwnHead(AlphaNet):
    pass


def frozen(head: AlphaNet) -> AlphaNet:
    head.b2.requires_grad_(False)
    return head


def learning(head: AlphaNet) -> AlphaNet:
    head.bias.requires_grad_()
    return head


def two_groups(parameters: list[nn.Parameter]) -> torch.optim.SGD:
    groups = [{"params": parameters[:-2]}, {"params": parameters[-2:], "lr": 0.2}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.02)


class OwnSgd(torch.optim.SGD):
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.1, momentum=0.9, weight_decay=0.02)


def own_class(head: AlphaNet) -> AlphaNet:
    head.__class__ = OwnHead
    return head


NOT_NATIVE = {
    "the optimizer is Adam, not a fresh torch.optim.SGD with one group": (lambda head: head, torch.optim.Adam),
    "the optimizer is SGD, not a fresh torch.optim.SGD with one group of parameters": (lambda head: head, two_groups),
    "the optimizer is OwnSgd, not a fresh torch.optim.SGD": (lambda head: head, OwnSgd),
    "the classifier is trained too": (learning, None),
    "the head is torch.float16, not float32 or float64": (AlphaNet.half, None),
    "the head is torch.bfloat16, not float32 or float64": (AlphaNet.bfloat16, None),
    "the head is a OwnHead, which may compute something else than AlphaNet": (own_class, None),
    "b2 does not ask for a gradient": (frozen, None),
}


@pytest.mark.parametrize("trains_there", [True, False])
def test_a_gpu_that_cannot_train_leaves_it_to_the_cpu(monkeypatch, trains_there):
    gpu = torch.device("cuda", 0)
    head = SimpleNamespace(weight=SimpleNamespace(is_cuda=True, device=gpu))
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
    monkeypatch.setattr(torch.ops.alphaext, "trains_on", lambda tensor: trains_there)
    assert engines.native_device(head) == (gpu if trains_there else torch.device("cpu"))


@pytest.mark.parametrize("reason", NOT_NATIVE)
def test_autograd_is_taken_where_native_is_not_exact(reason):
    change, optimizer = NOT_NATIVE[reason]
    data = make_data(torch.float32)
    head = change(make_head(dtype=torch.float32))
    before = head.w2.detach().clone()
    with pytest.raises(ValueError, match=f"engine='native' cannot train this exactly: {reason}.*; use engine='autograd'"):
        fit(head, *data, epochs=1, optimizer=optimizer, engine="native")
    assert head.w2.equal(before)
    result = fit(head, *data, epochs=1, optimizer=optimizer)
    assert result.engine == "autograd" and reason in result.engine_reason
    assert not head.w2.equal(before)
    asked = fit(head, *data, epochs=1, optimizer=optimizer, engine="autograd")
    assert asked.engine == "autograd" and asked.engine_reason == ""


def test_native_is_the_default_and_needs_no_reason():
    for engine in ("auto", "native"):
        result = fit(make_head(), *make_data(), epochs=1, engine=engine)
        assert result.engine == "native" and result.engine_reason == ""
    assert fit(make_head(), *make_data(), epochs=1, engine="autograd").engine_reason == ""
    with pytest.raises(ValueError, match="engine must be one of auto, native, autograd, got 'fast'"):
        fit(make_head(), *make_data(), epochs=1, engine="fast")


def test_plain_sgd_from_a_factory_stays_native_with_its_numbers():
    numbers = {"lr": 0.03, "momentum": 0.8, "dampening": 0.2, "weight_decay": 0.01}
    by_factory, by_options = make_head(), make_head()
    one = fit(by_factory, *make_data(), epochs=3, lr_step=2, optimizer=lambda p: torch.optim.SGD(p, **numbers))
    two = fit(by_options, *make_data(), epochs=3, lr_step=2, **numbers)
    assert one.engine == two.engine == "native"
    assert all(a.equal(b) for a, b in zip(trained(by_factory).values(), trained(by_options).values(), strict=True))
    assert [entry["lr"] for entry in one.history] == [entry["lr"] for entry in two.history]


@pytest.mark.parametrize("first_layer", ["dense", "factored"])
def test_an_optimizer_of_some_parameters_trains_those_alone(first_layer):
    head = make_head(first_layer=first_layer, init="default")
    before = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    fit(head, *make_data(), epochs=2, optimizer=lambda parameters: torch.optim.SGD(parameters[-1:], lr=0.1))
    changed = [name for name, parameter in head.named_parameters() if not parameter.equal(before[name])]
    assert changed == ["b2"]


def test_checkpoint_of_another_engine_is_refused(tmp_path):
    path, data = tmp_path / "fit.pt", make_data()
    for engine, other in itertools.permutations(("native", "autograd")):
        path.unlink(missing_ok=True)
        fit(make_head(), *data, epochs=2, checkpoint=path, engine=engine)
        written = path.read_bytes()
        with pytest.raises(ValueError, match=f"belongs to another training: engine is '{other}' here and '{engine}' there"):
            fit(make_head(), *data, epochs=4, checkpoint=path, engine=other)
        assert path.read_bytes() == written


# ---- What must change nothing ----


@pytest.mark.parametrize("options", [{}, {"rule": "l1", "shared": True, "first_layer": "factored"}], ids=["clamp", "l1"])
@pytest.mark.parametrize("how", [{}, {"negative_ratio": 20}, {"negative_ratio": 0}], ids=["1", "20", "0"])
@pytest.mark.filterwarnings("ignore:negative_ratio=20 asks for")
def test_a_cache_that_is_too_small_changes_nothing(monkeypatch, options, how):
    """Logits of base samples are then made anew each epoch, in other blocks, where so narrow a product may round otherwise."""
    data, how = make_data(), {"epochs": 3, "batch_size": 7, "select": "last", **validation(), **how}
    cached, anew = make_head(**options), make_head(**options)
    expected = fit(cached, *data, **how)
    monkeypatch.setattr(cached_logits, "CACHE_BYTES", 0)
    result = fit(anew, *data, **how)
    assert result.engine == expected.engine == "native"
    assert_same(trained(anew), trained(cached), 1e-13)
    assert_same_history(result, expected, 1e-12)


def test_threads_change_no_bit():
    heads = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            heads.append(make_head(dtype=torch.float32))
            fit(heads[-1], *make_data(torch.float32), epochs=2)
        finally:
            torch.set_num_threads(1)
    assert all(a.equal(b) for a, b in zip(*(trained(head).values() for head in heads), strict=True))


def train_in_this_process() -> dict[str, Tensor]:
    """A training in each dtype, with the kernels of this process's instruction set."""
    left = {}
    for dtype, shared in itertools.product(TOLERANCES, (False, True)):
        head = make_head(dtype=dtype, shared=shared, hidden_dim=19, top_k=5, init="default", first_layer="factored")
        result = fit(head, *make_data(dtype), **validation(dtype), epochs=4, lr=0.05, weight_decay=1e-3, select="last")
        values = {**trained(head), "losses": torch.tensor([entry["loss"] for entry in result.history[1:]])}
        left.update({f"{dtype} {shared} {name}": value for name, value in values.items()})
    return left


def test_instruction_sets_agree(tmp_path):
    expected, code = train_in_this_process(), "import sys, alphaext, torch, test_engines as t; torch.set_num_threads(1)\n"
    code += "torch.save(t.train_in_this_process() | {'simd': alphaext.build_info()['simd']}, sys.argv[1])"
    others = [simd for simd in ("default", "avx2") if simd != alphaext.build_info()["simd"]]
    for simd in others:
        path = tmp_path / f"{simd}.pt"
        places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "ALPHAEXT_SIMD": simd, "PYTHONPATH": os.pathsep.join(filter(None, places))}
        subprocess.run([sys.executable, "-c", code, path], check=True, env=environment, cwd=tmp_path)
        actual = torch.load(path)
        if actual.pop("simd") != simd:
            continue  # the processor lacks it, and another was taken
        for dtype, tolerance in TOLERANCES.items():
            names = [name for name in expected if name.startswith(str(dtype))]
            assert_same(actual, {name: expected[name] for name in names}, tolerance)


# ---- The first layer after training ----


@pytest.mark.parametrize("sgd", [{**momentum, "weight_decay": decay} for momentum in MOMENTA for decay in (0.0, 0.05)], ids=str)
def test_decay_of_the_start_is_that_of_sgd(sgd):
    """A parameter whose gradient is 0 is all start."""
    parameter = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=1, **sgd)
    decay = DecayOfStart(Sgd.of(optimizer))
    for lr, steps in ((0.3, 1), (0.3, 12), (0.07, 5), (1.1, 3)):
        optimizer.param_groups[0]["lr"] = lr
        for _ in range(steps):
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        decay.advance(lr, steps)
        assert decay.factor == pytest.approx(parameter.item(), rel=1e-12, abs=1e-14)
    assert decay.steps == 21 and (decay.factor == 1) == (sgd["weight_decay"] == 0)


FIRST_LAYERS = pytest.mark.parametrize(
    "options",
    [{}, {"shared": True}, {"shared": True, "twins": True}, {"num_few": 1}],
    ids=["separate", "shared", "twins", "one class"],
)
HOW = {"epochs": 3, "batch_size": 7, "lr": 0.05, "lr_step": 2, "weight_decay": 0.02, "nesterov": True}


def dense_after(options: dict, how: dict) -> dict[str, Tensor]:
    data = make_data(num_few=options.get("num_few", 3))
    return train_by_reference(make_head(**options, init="default"), *data, TrainingOptions(**how))[0]


@FIRST_LAYERS
@pytest.mark.parametrize("first_layer", ["dense", "factored"])
def test_first_layer_after_training_is_the_dense_one(options, first_layer):
    """With `twins` the Gram matrix of a shared network is singular: many steps give these outputs, but one first layer."""
    head = make_head(**options, init="default", first_layer=first_layer)
    start = head.materialize_first_layer()[0]
    fit(head, *make_data(num_few=head.num_few), **HOW)
    assert (head.materialize_first_layer()[0] - start).abs().max() > 1e-3
    assert_same(trained(head), dense_after(options, HOW), 1e-10)


@FIRST_LAYERS
def test_first_layer_survives_a_state_dict(options):
    head = make_head(**options, init="default", first_layer="factored")
    fit(head, *make_data(num_few=head.num_few), **HOW)
    # A head of another seed takes over the seed with the rest.
    loaded = make_head(**options, init="default", first_layer="factored")
    other = AlphaNet(head.weight, head.bias, head.members, head.z, seed=99, shared=head.shared, first_layer="factored")
    for copy in (loaded, other):
        copy.load_state_dict(head.state_dict())
        assert_same(trained(copy), trained(head), 0)
    # In the state is the decay too: training on goes on from it.
    for one in (head, loaded):
        fit(one, *make_data(num_few=head.num_few), **HOW)
    assert_same(trained(loaded), trained(head), 0)


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_first_layer_after_two_trainings(shared):
    heads = [
        make_head(shared=shared, init="default", first_layer=first_layer) for first_layer in ("dense", "dense", "factored")
    ]
    for head, engine in zip(heads, ("autograd", "native", "native"), strict=True):
        for seed in (0, 1):
            fit(head, *make_data(), **HOW, seed=seed, engine=engine)
    for head in heads[1:]:
        assert_same(trained(head), trained(heads[0]), 1e-10)


@pytest.mark.parametrize("optimizer", [two_groups, OwnSgd], ids=["two groups", "subclass"])
def test_first_layer_after_any_sgd_with_weight_decay(optimizer):
    heads = [make_head(init="default", first_layer=first_layer) for first_layer in ("dense", "factored")]
    for head in heads:
        assert fit(head, *make_data(), epochs=3, lr_step=2, optimizer=optimizer).engine == "autograd"
    assert_same(*map(trained, reversed(heads)), 1e-10)


@pytest.mark.parametrize("engine", ["native", "autograd"])
@pytest.mark.parametrize("first_layer", ["dense", "factored"])
def test_first_layer_is_that_of_the_selected_epoch(first_layer, engine):
    head = make_head(init="default", first_layer=first_layer)
    result = fit(head, *make_data(), **validation(), **{**HOW, "epochs": 20, "lr": 0.2}, engine=engine)
    assert 0 < result.selected_epoch < 20
    assert_same(trained(head), dense_after({}, {**HOW, "epochs": result.selected_epoch, "lr": 0.2}), 1e-9)


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
def test_first_layer_after_a_loop_of_ones_own(shared, weight_decay):
    """With weight decay, whose share of the start the head cannot know, the user says it."""
    features, labels = make_data()
    heads = [make_head(shared=shared, init="default", first_layer=first_layer) for first_layer in ("dense", "factored")]
    for head in heads:
        optimizer = torch.optim.SGD(
            [p for p in head.parameters() if p.requires_grad], lr=0.05, momentum=0.9, weight_decay=weight_decay
        )
        decay = DecayOfStart(Sgd.of(optimizer))
        for step in range(30):
            optimizer.zero_grad()
            functional.cross_entropy(head(features[step::30]), labels[step::30]).backward()
            optimizer.step()
        decay.advance(0.05, 30)
    heads[1].first_layer_decay *= decay.factor
    assert_same(trained(heads[1]), trained(heads[0]), 1e-10)


@pytest.mark.parametrize("first_layer", ["dense", "factored"])
def test_going_on_with_the_interrupted_head_itself(tmp_path, monkeypatch, first_layer):
    """The head that an interruption left at its best epoch, and not a fresh one, is handed to the resumed training."""
    options = {"init": "default", "first_layer": first_layer}
    head, path = make_head(**options), tmp_path / "fit.pt"
    monkeypatch.setattr(training, "_SECONDS_BETWEEN_CHECKPOINTS", 0)
    original, calls = engines.NativeEngine.train, []

    def train(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engines.NativeEngine, "train", train)
        fit(head, *make_data(), **HOW, checkpoint=path)
    fit(head, *make_data(), **HOW, checkpoint=path)
    assert_same(trained(head), dense_after({}, HOW), 1e-10)


# ---- Options ----


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda options: options["lr_schedule"])
@pytest.mark.parametrize("epochs", [1, 7])
def test_schedules_are_torchs(schedule, epochs):
    options = TrainingOptions(epochs=epochs, lr=0.3, **schedule)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedulers = torch.optim.lr_scheduler
    scheduler = {
        "constant": lambda: schedulers.LambdaLR(optimizer, lambda epoch: 1.0),
        "step": lambda: schedulers.StepLR(optimizer, options.lr_step, options.lr_factor),
        "multistep": lambda: schedulers.MultiStepLR(optimizer, list(options.lr_milestones), options.lr_factor),
        "cosine": lambda: schedulers.CosineAnnealingLR(optimizer, epochs),
    }[options.lr_schedule]()
    expected = []
    for _ in range(epochs):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rates = [options.lr * options.lr_multiplier(epoch) for epoch in range(1, epochs + 1)]
    assert rates == pytest.approx(expected, rel=1e-12)
    for engine in ("native", "autograd"):
        result = fit(make_head(), *make_data(), epochs=epochs, lr=0.3, **schedule, engine=engine)
        assert [entry["lr"] for entry in result.history] == [rates[0], *rates]


BAD_OPTIONS = {
    "epochs must be between 0 and \\d+, got -3": {"epochs": -3},
    "epochs must be an integer, got 2.5": {"epochs": 2.5},
    "batch_size must be between 1 and \\d+, got 0": {"batch_size": 0},
    "seed must be between 0 and 9223372036854775807, got -1": {"seed": -1},
    "lr_step must be between 1 and \\d+, got 0": {"lr_step": 0},
    "lr must be finite and above 0, got 0": {"lr": 0},
    "lr must be finite and above 0, got inf": {"lr": math.inf},
    "lr must be a number, finite and above 0, got '0.1'": {"lr": "0.1"},
    "lr must be a number, finite and above 0, got True": {"lr": True},
    "lr_factor must be finite and above 0, got -0.1": {"lr_factor": -0.1},
    "momentum must be finite and at least 0, got -0.9": {"momentum": -0.9},
    "dampening must be finite and at least 0, got nan": {"dampening": math.nan},
    "weight_decay must be finite and at least 0, got -1e-05": {"weight_decay": -1e-5},
    "negative_ratio must be finite and at least 0 and at most 1e6, got inf": {"negative_ratio": math.inf},
    "nesterov needs a momentum above 0 and no dampening, got momentum=0 and dampening=0": {"nesterov": True, "momentum": 0},
    "nesterov needs .* got momentum=0.9 and dampening=0.1": {"nesterov": True, "dampening": 0.1},
    "lr_schedule must be one of constant, step, multistep, cosine, got 'linear'": {"lr_schedule": "linear"},
    "negative_sampling must be one of uniform, class_balanced, got 'hard'": {"negative_sampling": "hard"},
    "lr_milestones must be a list of epochs, got 5": {"lr_milestones": 5, "lr_schedule": "multistep"},
    "lr_milestones must be a list of epochs, got '57'": {"lr_milestones": "57", "lr_schedule": "multistep"},
    "lr_milestones must be an integer, got 2.5": {"lr_milestones": [2.5], "lr_schedule": "multistep"},
    "lr_milestones must be at least 1, got 0": {"lr_milestones": [0, 5], "lr_schedule": "multistep"},
    r"lr_milestones must increase, got \[5, 5\]": {"lr_milestones": [5, 5], "lr_schedule": "multistep"},
    r"lr_milestones go with lr_schedule='multistep', got \[5\] with 'step'": {"lr_milestones": [5]},
    r"lr_milestones go with lr_schedule='multistep', got \[\] with 'multistep'": {"lr_schedule": "multistep"},
    "select must be one of best_all, best_few, last, got 'first'": {"select": "first"},
    r"min_all must be a fraction in \[0, 1\], with select='best_few'; got 1.5 with 'best_few'": {
        "select": "best_few",
        "min_all": 1.5,
    },
    "min_all must be a fraction .* got nan with 'best_few'": {"select": "best_few", "min_all": math.nan},
    "min_all must be a fraction .* got 0.5 with 'last'": {"select": "last", "min_all": 0.5},
    "min_all must be a fraction .* got '0.5' with 'best_few'": {"select": "best_few", "min_all": "0.5"},
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_bad_options_name_argument_and_value(message):
    with pytest.raises((ValueError, TypeError), match=message):
        TrainingOptions(**BAD_OPTIONS[message])
    with pytest.raises((ValueError, TypeError), match=message):
        fit(make_head(), *make_data(), **BAD_OPTIONS[message])


def test_milestones_may_be_a_list():
    options = [TrainingOptions(lr_schedule="multistep", lr_milestones=milestones) for milestones in ([2, 5], (2, 5))]
    assert options[0] == options[1] and options[0].identity() == options[1].identity()


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adam(p),
        lambda p: torch.optim.SGD(p, lr=0.1, maximize=True),
        lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)),
        two_groups,
        OwnSgd,
    ],
)
def test_only_plain_sgd_has_sgds_numbers(optimizer):
    assert Sgd.of(optimizer([nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))])) is None


def test_divergence_names_a_class_that_did_it():
    """One class's coefficients, finite themselves, overflow its scores; the others are sound, and not the ones to blame."""
    head = make_head(dtype=torch.float32)
    features, labels = make_data(torch.float32)
    with torch.no_grad():
        head.b2[1] = 3e38
    before = head.w2.detach().clone()
    with pytest.raises(FloatingPointError, match="class 7, step 1 of 1 is no longer finite in epoch 1"):
        fit(head, features, labels, epochs=1, engine="native")
    assert head.w2.equal(before)


@pytest.mark.large
def test_more_than_two_to_the_31_member_logits():
    """Rows beyond 2^31 numbers are found: an array of that size is asked for, but only its last rows are ever touched."""
    num_few, members, tiles, columns, batch = 2, 3, 1, 600, 4
    rows = 2**31 // columns + 1000
    member_logits = torch.empty(rows, columns)
    assert member_logits.numel() > 2**31
    last = torch.randn(8, columns, generator=torch.Generator().manual_seed(0))
    member_logits[-8:] = last
    order = torch.tensor([5, 0, 7, 3, 1])

    def train(logits: torch.Tensor, order: torch.Tensor) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        state = torch.randn(num_few, tiles, 2 + 2 * members, 16, generator=generator)
        b2, b2_momentum = torch.zeros(num_few, members), torch.zeros(num_few, members)
        raw, alpha = torch.empty(num_few, members), torch.empty(num_few, members)
        few = torch.full((len(logits),), -1, dtype=torch.int32)
        few[-8:] = torch.tensor([0, 1, -1, 0, -1, 1, 0, -1], dtype=torch.int32)
        constants = [torch.zeros(len(logits)), torch.zeros(len(logits))]
        columns_of = torch.tensor([[0, 599, 7], [300, 1, 598]], dtype=torch.int32)
        result = torch.ops.alphaext.train_epoch(
            state, b2, b2_momentum, raw, alpha, order, logits, *constants, few, columns_of, torch.ones(num_few),
            batch, 0.7, 1, True, 0.1, 0.9, 0.0, 0.0, False, True,
        )  # fmt: skip
        return [result, state, b2, alpha]

    for large, small in zip(train(member_logits, order + rows - 8), train(last, order), strict=True):
        assert large.equal(small)
