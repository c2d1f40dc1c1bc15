"""Training: the factored first layer is the dense one, and `fit` does what it says."""

from __future__ import annotations

import functools
import math

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional

from alphaext import AlphaNet, fit
from alphaext.training import autograd_engine
from alphaext.training import native_engine as engines
from alphaext.training import single as training
from alphaext.utils.tensors import as_tensor

NUM_CLASSES, IN_FEATURES = 8, 12
FEW = [6, 7]


def make_data(per_base: int = 30, per_few: int = 6, seed: int = 0, dtype=torch.float32):
    """Gaussian classes; the two few ones lie near base classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(NUM_CLASSES, IN_FEATURES, generator=torch.Generator().manual_seed(99), dtype=dtype)
    centres[6], centres[7] = centres[6] + centres[0], centres[7] + centres[1]
    labels = torch.cat([torch.full((per_few if c in FEW else per_base,), c) for c in range(NUM_CLASSES)])
    features = centres[labels] + 0.8 * torch.randn(len(labels), IN_FEATURES, generator=generator, dtype=dtype)
    return features, labels


def make_head(dtype=torch.float32, **options) -> AlphaNet:
    torch.manual_seed(3)
    linear = nn.Linear(IN_FEATURES, NUM_CLASSES, dtype=dtype)
    features, labels = make_data(dtype=dtype)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        functional.cross_entropy(linear(features), labels).backward()
        optimizer.step()
    members = torch.tensor([[6, 0, 2, 4], [7, 1, 3, 5]])
    return AlphaNet.from_linear(linear, members=members, seed=1, **options)


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("init", ["identity", "default"])
@pytest.mark.parametrize(
    "options",
    [
        dict(momentum=0.9),
        dict(momentum=0.9, nesterov=True),
        dict(momentum=0.9, weight_decay=5e-3),
        dict(momentum=0.8, dampening=0.3, weight_decay=1e-3),
        dict(),
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_factored_is_dense_over_200_steps(shared, init, options):
    """docs/reference/exactness.md (c): with the same samples, the collapsed first layer follows the dense one to rounding.

    float64; the recursions are the same numbers in another order, so 200 steps stay within 1e-9.
    """
    features, labels = make_data(dtype=torch.float64)
    heads = {
        first_layer: make_head(torch.float64, first_layer=first_layer, shared=shared, init=init, hidden_dim=9)
        for first_layer in ("dense", "factored")
    }
    for head in heads.values():
        optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=0.05, **options)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 60, 0.1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            batch = torch.randint(len(labels), (16,), generator=generator)
            optimizer.zero_grad()
            functional.cross_entropy(head(features[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    dense, factored = heads["dense"], heads["factored"]
    assert (dense.alphas() - make_head(torch.float64, init=init, hidden_dim=9, shared=shared).alphas()).abs().max() > 1e-3
    torch.testing.assert_close(factored.alphas(), dense.alphas(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(factored.w2, dense.w2, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(factored(features), dense(features), rtol=1e-9, atol=1e-9)


def test_fit_improves_few_classes():
    features, labels = make_data()
    val_features, val_labels = make_data(per_few=30, seed=5)
    head = make_head()
    few = labels >= 6
    before = functional.cross_entropy(head(features)[few], labels[few]).item()
    result = fit(head, features, labels, val_features=val_features, val_labels=val_labels, epochs=15, progress=False)
    assert len(result.history) == 16 and result.engine == "native" and result.seconds > 0
    assert result.history[-1]["loss"] < result.history[1]["loss"]
    assert result.after["all"] == max(entry["all"] for entry in result.history)
    assert result.after["all"] >= result.before["all"] and result.after["few"] > result.before["few"]
    assert functional.cross_entropy(head(features)[few], labels[few]).item() < before
    assert result.clamped == int(head.clamped().sum())


def test_fit_is_deterministic():
    def run(seed: int) -> torch.Tensor:
        head = make_head()
        fit(head, *make_data(), epochs=3, seed=seed)
        return head.w2.detach()

    assert run(0).equal(run(0)) and not run(0).equal(run(1))


def test_fit_dense_equals_factored():
    results = []
    for first_layer in ("dense", "factored"):
        head = make_head(torch.float64, first_layer=first_layer)
        fit(head, *make_data(dtype=torch.float64), epochs=10, weight_decay=1e-3, nesterov=True, lr_step=4)
        results.append(head.alphas())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_fit_learns_the_classifier_when_it_asks_for_a_gradient():
    head = make_head()
    head.weight.requires_grad_()
    before = head.weight.detach().clone()
    fit(head, *make_data(), epochs=1)
    assert not head.weight.detach().equal(before)


def test_fit_takes_any_torch_optimizer():
    head = make_head(first_layer="dense")
    before = head.w1.detach().clone()
    fit(head, *make_data(), epochs=2, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    assert not head.w1.equal(before)


def test_fit_takes_optimizers_that_need_a_closure():
    head = make_head(first_layer="dense")
    result = fit(head, *make_data(), epochs=2, optimizer=lambda parameters: torch.optim.LBFGS(parameters, max_iter=3))
    assert result.history[2]["loss"] < result.history[1]["loss"]


def test_factored_refuses_other_optimizers():
    head = make_head(first_layer="factored")
    with pytest.raises(ValueError, match="optimizer must be torch.optim.SGD .* got Adam: .* exact for SGD only"):
        fit(head, *make_data(), optimizer=torch.optim.Adam)


@pytest.mark.parametrize("negative_ratio", [0, 0.5, 1, 2])
def test_samples_of_an_epoch(negative_ratio, monkeypatch):
    """All few samples once, and base samples without repeats, drawn anew each epoch."""
    features, labels = make_data()
    seen: list[list[int]] = []
    head = make_head()
    # Give each sample a logit pattern of its own, so that what the head is fed says which sample it was.
    logits = functional.linear(features, head.weight, head.bias)
    original = AlphaNet.mix_logits

    def spy(self: AlphaNet, batch: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen[-1] += torch.cdist(batch, logits).argmin(dim=1).tolist()
        return original(self, batch)

    monkeypatch.setattr(AlphaNet, "mix_logits", spy)
    few = [i for i, label in enumerate(labels.tolist()) if label in FEW]
    for epoch in range(1, 3):
        seen.append([])
        fit(head, features, labels, epochs=epoch, negative_ratio=negative_ratio, batch_size=7, engine="autograd")
    one, two = seen[0], seen[1][len(seen[0]) :]
    for drawn in (one, two):
        assert len(set(drawn)) == len(drawn) == len(few) + round(negative_ratio * len(few))
        assert set(few) <= set(drawn)
    if negative_ratio:
        assert set(one) != set(two)


def test_more_negatives_than_base_samples_are_drawn_with_replacement():
    with pytest.warns(UserWarning, match="negative_ratio=20 asks for 240 base samples an epoch, but there are 180"):
        fit(make_head(), *make_data(), epochs=1, negative_ratio=20)


def test_learning_rate_schedule():
    result = fit(make_head(), *make_data(), epochs=5, lr=0.1, lr_step=2)
    assert [round(entry["lr"], 6) for entry in result.history] == [0.1, 0.1, 0.1, 0.01, 0.01, 0.001]


def test_selection_policies():
    features, labels = make_data()
    val_features, val_labels = make_data(per_few=30, seed=5)
    data = dict(val_features=val_features, val_labels=val_labels, epochs=8, negative_ratio=0)
    last = fit(make_head(), features, labels, select="last", **data)
    assert last.selected_epoch == 8
    best_all = fit(make_head(), features, labels, select="best_all", **data)
    assert best_all.after["all"] == max(entry["all"] for entry in best_all.history)
    best_few = fit(make_head(), features, labels, select="best_few", min_all=0.5, **data)
    allowed = [entry["few"] for entry in best_few.history if entry["all"] >= 0.5]
    assert best_few.after["few"] == max(allowed) and best_few.after["all"] >= 0.5
    assert best_few.selection == "best_few with all >= 0.5000"
    unreachable = fit(make_head(), features, labels, select="best_few", min_all=1.0, **data)
    assert unreachable.after["all"] == max(entry["all"] for entry in unreachable.history)


ENGINES = {"native": engines.NativeEngine, "autograd": autograd_engine.AutogradEngine}


def after_calls(monkeypatch, engine: str, calls: int, action) -> None:
    """Let ``action()`` happen in place of the engine's epoch number ``calls``."""
    original, seen = ENGINES[engine].train, []

    def train(self, *arguments):
        seen.append(1)
        return action() if len(seen) == calls else original(self, *arguments)

    monkeypatch.setattr(ENGINES[engine], "train", train)


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("first_layer", ["dense", "factored"])
def test_resuming_gives_the_same_bits(tmp_path, monkeypatch, first_layer, engine, shared):
    data = dict(zip(("val_features", "val_labels"), make_data(seed=5), strict=True))
    options = dict(epochs=6, lr_step=2, weight_decay=1e-3, engine=engine, **data)
    make_head = functools.partial(globals()["make_head"], shared=shared)
    monkeypatch.setattr(training, "_SECONDS_BETWEEN_CHECKPOINTS", 0)
    whole = make_head(first_layer=first_layer)
    expected = fit(whole, *make_data(), **options)

    interrupted = make_head(first_layer=first_layer)
    path = tmp_path / "fit.pt"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        after_calls(patch, engine, 4, interrupt)
        fit(interrupted, *make_data(), checkpoint=path, **options)
    assert path.exists() and [p.name for p in tmp_path.iterdir()] == ["fit.pt"]

    resumed = make_head(first_layer=first_layer)
    result = fit(resumed, *make_data(), checkpoint=path, **options)
    assert resumed.w2.equal(whole.w2)
    for one, two in zip(resumed.materialize_first_layer(), whole.materialize_first_layer(), strict=True):
        assert one.equal(two)
    assert str(result.history) == str(expected.history)  # as text, because nan, the loss of epoch 0, equals nothing
    assert result.selected_epoch == expected.selected_epoch

    # A finished training is not trained again; another one does not touch the file.
    again = make_head(first_layer=first_layer)
    fit(again, *make_data(), checkpoint=path, **options)
    assert again.w2.equal(whole.w2)
    with pytest.raises(ValueError, match="belongs to another training: batch_size is 8 here and 64 there"):
        fit(make_head(first_layer=first_layer), *make_data(), checkpoint=path, batch_size=8, **options)


def test_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "fit.pt"
    features, labels = make_data()
    fit(make_head(), features, labels, epochs=2, checkpoint=path)
    other_members = AlphaNet.from_linear(make_head().fold(), members=torch.tensor([[6, 1, 2, 4], [7, 0, 3, 5]]), seed=1)
    for head, data in ((other_members, features), (make_head(), -features), (make_head(pca_dim=4, hidden_dim=8), features)):
        before = head.w2.detach().clone()
        with pytest.raises(ValueError, match="belongs to another training: head, classifier and data is"):
            fit(head, data, labels, epochs=2, checkpoint=path)
        assert head.w2.equal(before)
    with pytest.raises(ValueError, match="has 2 epochs, more than epochs=1"):
        fit(make_head(), features, labels, epochs=1, checkpoint=path)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "another file"])
def test_unreadable_checkpoints(tmp_path, content):
    path = tmp_path / "fit.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"x": 1}, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="cannot be read as one of fit's"):
        fit(make_head(), *make_data(), epochs=1, checkpoint=path)
    assert path.read_bytes() == before


def test_memory_map_is_not_copied(tmp_path):
    features, labels = make_data()
    numpy.save(tmp_path / "features.npy", features.numpy().astype(numpy.float16))
    mapped = numpy.load(tmp_path / "features.npy", mmap_mode="r")
    assert as_tensor(mapped, "features").data_ptr() == mapped.ctypes.data
    one, two = make_head(), make_head()
    fit(one, mapped, labels.numpy(), epochs=2)
    fit(two, features.half(), labels, epochs=2)
    assert one.w2.equal(two.w2)


def test_fit_under_no_grad_and_another_default_device():
    one, two = make_head(), make_head()
    fit(one, *make_data(), epochs=2)
    data = make_data()
    with torch.no_grad(), torch.device("meta"):
        fit(two, *data, epochs=2)
    assert one.w2.equal(two.w2)


@pytest.mark.parametrize("engine", ENGINES)
def test_interruption_leaves_the_best_epoch(monkeypatch, engine):
    head, expected = make_head(), make_head()
    fit(expected, *make_data(), epochs=2, engine=engine)

    def spoil():
        with torch.no_grad():
            head.w2.fill_(math.nan)
        raise KeyboardInterrupt

    after_calls(monkeypatch, engine, 3, spoil)
    with pytest.raises(KeyboardInterrupt):
        fit(head, *make_data(), epochs=5, engine=engine)
    assert head.w2.equal(expected.w2)


@pytest.mark.parametrize("engine", ENGINES)
def test_divergence_in_the_very_last_step_is_seen(engine):
    head = make_head(init="default")
    before = head.w2.detach().clone()
    with pytest.raises(FloatingPointError, match="class [67].* in epoch 1 .*lr 1e\\+38"):
        fit(head, *make_data(), epochs=1, batch_size=10**6, lr=1e38, engine=engine)
    assert head.w2.equal(before)


@pytest.mark.parametrize("engine", ENGINES)
def test_diverging_training_is_an_error(engine):
    head = make_head(init="default")
    with pytest.raises(FloatingPointError, match="training diverged: .* a smaller lr may help"):
        fit(head, *make_data(), epochs=40, lr=1e30, engine=engine)
    assert head.w2.isfinite().all()


FEATURES, LABELS = make_data()
BAD_CALLS = {
    "labels must be in 0..7, got 8 at index 3": dict(labels=torch.tensor([0, 1, 2, 8] + [0] * (len(LABELS) - 4))),
    r"labels has no sample of the few classes 7": dict(labels=LABELS.clamp(max=6)),
    "features must be finite, got nan": dict(features=torch.full_like(FEATURES, math.nan)),
    "features must be floating point, got torch.int64": dict(features=FEATURES.long()),
    r"features must have shape \[n, 12\]": dict(features=FEATURES[:, :5]),
    "one entry a sample": dict(labels=LABELS[:-1]),
    "epochs must be between 0 and \\d+, got -1": dict(epochs=-1),
    "batch_size must be between 1 and \\d+, got 0": dict(batch_size=0),
    "lr must be finite and above 0, got 0": dict(lr=0.0),
    "lr_step must be between 1 and \\d+": dict(lr_step=0),
    "lr_factor must be finite and above 0, got nan": dict(lr_factor=math.nan),
    "seed must be between 0 and": dict(seed=2**70),
    "checkpoint must be a file in a directory that exists": dict(checkpoint="no/such/directory/fit.pt"),
    "val_labels has no sample of a few class": dict(
        select="best_few", val_features=FEATURES[LABELS < 6], val_labels=LABELS[LABELS < 6]
    ),
    "negative_ratio must be finite and at least 0 and at most 1e6, got -1": dict(negative_ratio=-1.0),
    "select must be one of best_all, best_few, last, got 'best'": dict(select="best"),
    "select='best_all' needs val_features": dict(select="best_all"),
    "val_features and val_labels must be given together": dict(val_labels=LABELS),
    "min_all must be a fraction": dict(min_all=0.5),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls(message):
    head = make_head()
    before = head.w2.detach().clone()
    with pytest.raises((ValueError, TypeError), match=message):
        fit(head, **{"features": FEATURES, "labels": LABELS, **BAD_CALLS[message]})
    assert head.w2.equal(before)


def test_not_a_head():
    with pytest.raises(TypeError, match="head must be AlphaNet, got Linear"):
        fit(nn.Linear(12, 8), FEATURES, LABELS)


def test_only_few_samples_need_no_base_unless_asked():
    few = LABELS >= 6
    with pytest.raises(ValueError, match="labels has no sample of a base class, but negative_ratio=1 asks for 12"):
        fit(make_head(), FEATURES[few], LABELS[few])
    fit(make_head(), FEATURES[few], LABELS[few], negative_ratio=0, epochs=1)


def test_a_checkpoint_of_another_seed_is_refused(tmp_path):
    """Its first layer started elsewhere, and could not be had back."""
    linear, members = make_head().fold(), torch.tensor([[6, 0, 2, 4], [7, 1, 3, 5]])
    fit(AlphaNet.from_linear(linear, members=members, seed=1), *make_data(), epochs=2, checkpoint=tmp_path / "fit.pt")
    with pytest.raises(ValueError, match="seed of the head is 2 here and 1 there"):
        fit(AlphaNet.from_linear(linear, members=members, seed=2), *make_data(), epochs=2, checkpoint=tmp_path / "fit.pt")


@pytest.mark.parametrize("content", [torch.ones(3), {"options": [1], "history": []}, {"options": {}, "history": [1]}])
def test_foreign_checkpoints(tmp_path, content):
    torch.save(content, tmp_path / "fit.pt")
    with pytest.raises(ValueError, match="cannot be read as one of fit's"):
        fit(make_head(), *make_data(), epochs=1, checkpoint=tmp_path / "fit.pt")


def test_fit_under_autocast():
    one, two = make_head(), make_head()
    fit(one, *make_data(), epochs=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fit(two, *make_data(), epochs=2)
    assert one.w2.equal(two.w2)


def test_gradient_hooks_are_heeded():
    head = make_head()
    head.w2.register_hook(lambda gradient: gradient * 0)
    before = head.w2.detach().clone()
    result = fit(head, *make_data(), epochs=2)
    assert result.engine == "autograd" and result.engine_reason == "a parameter has a gradient hook"
    assert head.w2.equal(before)


def test_a_start_that_decays_to_nothing_is_trained_on():
    head = make_head()
    for _ in range(2):
        fit(head, *make_data(), epochs=1, lr=0.1, weight_decay=10.0, momentum=0.0, lr_schedule="constant")
    assert head.first_layer_decay == 0 and head.alphas().isfinite().all()


def test_an_epoch_is_drawn_while_the_one_before_is_trained(monkeypatch):
    """Each once, in order, before anybody waits for the results of the one before, and none beyond the last."""
    happened: list[object] = []
    draw, on_host = engines.EpochSampler.draw, engines.on_host
    monkeypatch.setattr(engines.EpochSampler, "used", lambda self, epochs: self.indices.sort().values)
    monkeypatch.setattr(engines.EpochSampler, "draw", lambda self, epoch: happened.append(epoch) or draw(self, epoch))
    monkeypatch.setattr(engines, "on_host", lambda wanted: happened.append("wait") or on_host(wanted))
    features, labels = make_data()
    assert fit(make_head(), features, labels, epochs=3).engine == "native"
    assert happened == [1, 2, "wait", 3, "wait", "wait"]
