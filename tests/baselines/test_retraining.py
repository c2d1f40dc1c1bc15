"""cRT and LWS: they are what torch's SGD makes of them, and go on from a checkpoint to the same bits."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from alphaext import AlphaNet
from alphaext.baselines import retraining
from alphaext.baselines.balanced_sampling import ClassBalancedSampler
from alphaext.baselines.choices import RETRAINING_PRESETS
from alphaext.baselines.retraining import crt, lws
from alphaext.classes import ClassSplit, class_means, split_classes
from alphaext.metrics import split_accuracy
from alphaext.training import cached_logits
from alphaext.training.result import AlphaNetWarning
from alphaext.utils.seeds import seeded_generator

NUM_CLASSES, IN_FEATURES = 8, 12
SIZES = torch.tensor([300, 220, 150, 90, 60, 40, 14, 9])
SPLIT = split_classes(SIZES)
FAST = dict(epochs=3, batch_size=64, lr=0.05, weight_decay=5e-4)


def make_data(sizes: Tensor = SIZES, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Gaussian classes that overlap."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(NUM_CLASSES, IN_FEATURES, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(NUM_CLASSES).repeat_interleave(sizes)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    return (0.7 * centres[labels] + torch.randn(len(labels), IN_FEATURES, generator=generator)).to(dtype), labels


FEATURES, LABELS = make_data()
VALIDATION = dict(zip(("val_features", "val_labels"), make_data(torch.full((8,), 25), seed=5), strict=True))


def make_joint(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    """A classifier trained on the images as they come, which neglects the few classes."""
    features, labels = make_data(dtype=dtype)
    linear = nn.Linear(IN_FEATURES, NUM_CLASSES, bias=bias, dtype=dtype)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.5, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(linear(features), labels).backward()
        optimizer.step()
    return linear


JOINT = make_joint()


def accuracy_of(linear: nn.Linear) -> dict[str, float]:
    logits = linear(VALIDATION["val_features"]).detach()
    return split_accuracy(logits, VALIDATION["val_labels"], SPLIT)


def same(first, second) -> bool:
    parameters = zip(first.linear.parameters(), second.linear.parameters(), strict=True)
    return (
        all(one.equal(two) for one, two in parameters)
        and str(first.table) == str(second.table)
        and first.chosen == second.chosen
    )


# what training does


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.9, 5e-2), (0.0, 0.0)])
def test_crt_is_sgd_on_balanced_samples(bias, momentum, weight_decay):
    """float64 and the same samples: to rounding, what torch's optimiser and autograd do."""
    features, labels = make_data(dtype=torch.float64)
    options = dict(momentum=momentum, weight_decay=weight_decay)
    result = crt(features, labels, epochs=4, batch_size=100, lr=0.3, seed=3, images_per_class=2, bias=bias, **options)
    expected = nn.Linear(IN_FEATURES, NUM_CLASSES, bias=bias)
    generator, bound = seeded_generator(3), 1 / math.sqrt(IN_FEATURES)
    for parameter in expected.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    expected.double()
    sampler = ClassBalancedSampler(labels, NUM_CLASSES, seed=3, images_per_class=2)
    losses, rates = train_by_torch(
        expected, lambda: expected.parameters(), lambda x: expected(x), sampler, features, labels, 4, options
    )
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(getattr(result.linear, name), parameter, rtol=1e-9, atol=1e-11)
    assert [row["loss"] for row in result.table] == pytest.approx(losses, rel=1e-9)
    assert [row["lr"] for row in result.table] == pytest.approx(rates, rel=1e-12)
    assert [row["epoch"] for row in result.table] == [1, 2, 3, 4]
    assert result.chosen == {"epoch": 4} and result.policy == "last" and result.original is None


def train_by_torch(module, parameters, forward, sampler, features, labels, epochs, options):
    optimizer = torch.optim.SGD(parameters(), lr=0.3, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    losses, rates = [], []
    for epoch in range(1, epochs + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        order = sampler.draw(epoch)
        total, steps = 0.0, len(order) // 100  # what fills no batch is left out
        for batch in order[: steps * 100].split(100):
            optimizer.zero_grad()
            loss = functional.cross_entropy(forward(features[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / steps)
        schedule.step()
    return losses, rates


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cache_bytes", [cached_logits.CACHE_BYTES, 0], ids=["logits kept", "logits of a batch"])
def test_lws_is_sgd_on_the_scales(bias, cache_bytes, monkeypatch):
    monkeypatch.setattr(cached_logits, "CACHE_BYTES", cache_bytes)
    monkeypatch.setattr(retraining, "_BLOCK_ELEMENTS", 500)
    features, labels = make_data(dtype=torch.float64)
    linear = make_joint(torch.float64, bias)
    options = dict(momentum=0.9, weight_decay=5e-3)
    result = lws(linear, features, labels, epochs=4, batch_size=100, lr=0.3, seed=3, **options)
    scales = nn.Parameter(torch.ones(NUM_CLASSES, dtype=torch.float64))
    sampler = ClassBalancedSampler(labels, NUM_CLASSES, seed=3)
    scored = lambda x: linear(x).detach() * scales  # noqa: E731
    losses, _ = train_by_torch(None, lambda: [scales], scored, sampler, features, labels, 4, options)
    torch.testing.assert_close(result.scales, scales.detach(), rtol=1e-9, atol=0)
    assert [row["loss"] for row in result.table][1:] == pytest.approx(losses, rel=1e-9)
    # Folded in: the row and the bias.
    torch.testing.assert_close(result.linear(features), linear(features) * scales, rtol=1e-9, atol=1e-9)
    assert result.chosen == {"epoch": 4} and (result.linear.bias is None) == (not bias)


def test_crt_and_lws_lift_the_few_classes():
    joint = accuracy_of(JOINT)
    trained = crt(FEATURES, LABELS, linear=JOINT, epochs=8, batch_size=64, lr=0.05, **VALIDATION)
    scaled = lws(JOINT, FEATURES, LABELS, epochs=8, batch_size=64, lr=0.05, **VALIDATION)
    for result in (trained, scaled):
        assert result.original == joint
        assert result.accuracy["few"] > joint["few"] + 0.1
        assert result.accuracy["all"] > joint["all"]
        assert result.accuracy == accuracy_of(result.linear)
        # And it can carry an Alpha Net.
        head = AlphaNet.from_linear(result.linear, class_counts=SIZES, class_means=class_means(FEATURES, LABELS), seed=0)
        assert head.few_classes.tolist() == [6, 7]
    assert scaled.table[0]["epoch"] == 0 and {name: scaled.table[0][name] for name in joint} == joint


# selection


def test_the_epoch_selected_has_the_layer_of_that_epoch():
    last = {epochs: crt(FEATURES, LABELS, **{**FAST, "epochs": epochs}, select="last", **VALIDATION) for epochs in (1, 3)}
    assert last[3].chosen == {"epoch": 3} and last[3].policy == "last"
    assert last[3].accuracy == accuracy_of(last[3].linear)
    for select, name in (("best_all", "all"), ("best_few", "few")):
        options = dict(min_all=0.0) if select == "best_few" else {}
        result = crt(FEATURES, LABELS, **{**FAST, "epochs": 12}, select=select, **options, **VALIDATION)
        best = max(result.table, key=lambda row: (row[name], -row["epoch"]))
        assert result.chosen == {"epoch": best["epoch"]}
        assert accuracy_of(result.linear) == result.accuracy and result.accuracy[name] == best[name]
    assert result.policy == "best_few with all >= 0.0000"


def test_best_few_takes_the_originals_accuracy_as_its_bound():
    options = dict(**FAST, select="best_few", **VALIDATION)
    assert crt(FEATURES, LABELS, linear=JOINT, **options).policy == f"best_few with all >= {accuracy_of(JOINT)['all']:.4f}"
    with pytest.raises(ValueError, match="needs min_all, or linear"):
        crt(FEATURES, LABELS, **options)
    # The classifier as it was takes part in LWS: where all else is below the bound, it stays.
    result = lws(JOINT, FEATURES, LABELS, **{**FAST, "lr": 1e-6}, **VALIDATION)
    assert result.chosen == {"epoch": 0} and result.linear.weight.equal(JOINT.weight) and result.scales.equal(torch.ones(8))


# determinism


@pytest.mark.parametrize("train", [crt, lws])
def test_same_seed_same_bits_and_another_seed_others(train):
    def run(**options):
        arguments = (FEATURES, LABELS) if train is crt else (JOINT, FEATURES, LABELS)
        return train(*arguments, **FAST, **options, **VALIDATION)

    state = torch.random.get_rng_state()
    first, second, other = run(seed=1), run(seed=1), run(seed=2)
    assert same(first, second) and not same(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert run(images_per_class=4).settings["images_per_class"] == 4


def test_default_device_and_autocast_change_nothing():
    expected = [crt(FEATURES, LABELS, **FAST, **VALIDATION), lws(JOINT, FEATURES, LABELS, **FAST, **VALIDATION)]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        found = [crt(FEATURES, LABELS, **FAST, **VALIDATION), lws(JOINT, FEATURES, LABELS, **FAST, **VALIDATION)]
    assert all(same(*pair) for pair in zip(expected, found, strict=True))


@pytest.mark.filterwarnings("error")
def test_half_precision_memory_map(tmp_path: Path):
    half = FEATURES.half()
    half.numpy().tofile(tmp_path / "features")
    mapped = np.memmap(tmp_path / "features", mode="r", dtype=np.float16, shape=tuple(half.shape))
    result = crt(mapped, LABELS.numpy(), **FAST, **VALIDATION)
    assert same(result, crt(half.float(), LABELS, **FAST, **VALIDATION))
    assert result.linear.weight.dtype == torch.float32
    assert same(lws(JOINT, mapped, LABELS, **FAST), lws(JOINT, half.float(), LABELS, **FAST))


def test_lws_of_a_half_precision_classifier_works_in_float32():
    result = lws(make_joint().half(), FEATURES, LABELS, **FAST)
    assert result.linear.weight.dtype == result.linear.bias.dtype == torch.float16 and result.scales.dtype == torch.float32


def test_devices(device):
    cpu = crt(FEATURES, LABELS, **FAST, **VALIDATION)
    result = crt(FEATURES, LABELS, **FAST, **VALIDATION, device=device)
    assert result.linear.weight.device.type == device
    torch.testing.assert_close(result.linear.weight.cpu(), cpu.linear.weight, rtol=1e-3, atol=1e-4)
    scaled = lws(JOINT, FEATURES.to(device), LABELS.to(device), **FAST, **VALIDATION, device=device)
    assert scaled.linear.weight.device.type == "cpu" and scaled.scales.device.type == "cpu"
    torch.testing.assert_close(scaled.scales, lws(JOINT, FEATURES, LABELS, **FAST, **VALIDATION).scales, rtol=1e-3, atol=1e-4)


# checkpoints


@pytest.mark.parametrize("train", [crt, lws])
@pytest.mark.parametrize("step_of_interruption", [1, 15, 30])
def test_interrupted_and_gone_on(train, step_of_interruption, tmp_path, monkeypatch):
    model = retraining._Classifier if train is crt else retraining._Scales
    arguments = (FEATURES, LABELS) if train is crt else (JOINT, FEATURES, LABELS)
    options = dict(FAST, **VALIDATION, checkpoint=tmp_path / "run.pt", progress=False)
    expected = train(*arguments, **{**options, "checkpoint": None})
    original, steps = model.step, []

    def step(self, *values):
        steps.append(1)
        if len(steps) == step_of_interruption:
            raise KeyboardInterrupt
        return original(self, *values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "step", step)
        train(*arguments, **options)
    per_epoch = len(LABELS) // 64
    assert (tmp_path / "run.pt").exists() == (step_of_interruption > per_epoch)
    done = (len(steps) - 1) // per_epoch
    steps.clear()
    monkeypatch.setattr(model, "step", lambda *values: steps.append(1) or original(*values))
    assert same(train(*arguments, **options), expected)
    assert len(steps) == (3 - done) * per_epoch
    # A training that is finished is not run again.
    steps.clear()
    finished = train(*arguments, **options)
    assert same(finished, expected) and not steps
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


DIFFERENT = {
    "epochs is 4 here and 3 there": dict(epochs=4),
    "batch_size is 32 here and 64 there": dict(batch_size=32),
    "lr is 0.1 here and 0.05 there": dict(lr=0.1),
    "momentum is 0.8": dict(momentum=0.8),
    "weight_decay is 0.0 here": dict(weight_decay=0),
    "images_per_class is 4": dict(images_per_class=4),
    "seed is 1": dict(seed=1),
    "select is 'last'": dict(select="last"),
    "tensors is 1 here and 2 there": dict(bias=False),
    "classifier and data is .* here": dict(features=FEATURES + 1),
    "classifier and data is .* there": dict(val_labels=VALIDATION["val_labels"].flip(0)),
    "classifier and data is '": dict(split=ClassSplit([6], [3, 4, 5, 7], [0, 1, 2])),
    "dtype is 'torch.float64' here and 'torch.float32' there": dict(features=FEATURES.double()),
}


@pytest.mark.parametrize("message", DIFFERENT)
def test_a_checkpoint_of_another_training_is_refused(message, tmp_path):
    options = dict(features=FEATURES, labels=LABELS, **FAST, **VALIDATION, checkpoint=tmp_path / "run.pt")
    crt(**options)
    before = (tmp_path / "run.pt").read_bytes()
    with pytest.raises(ValueError, match=f"belongs to another training: {message}"):
        crt(**{**options, **DIFFERENT[message]})
    assert (tmp_path / "run.pt").read_bytes() == before


def test_checkpoints_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "run.pt"
    crt(FEATURES, LABELS, **FAST, checkpoint=path)
    with pytest.raises(ValueError, match="baseline is 'lws' here and 'crt' there"):
        lws(JOINT, FEATURES, LABELS, **FAST, checkpoint=path)
    for content in (path.read_bytes()[:200], b"no checkpoint"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"run\.pt cannot be read as one of crt's"):
            crt(FEATURES, LABELS, **FAST, checkpoint=path)
    torch.save({"identity": [], "table": []}, path)
    with pytest.raises(ValueError, match="cannot be read as one of crt's: TypeError: identity is a list|KeyError"):
        crt(FEATURES, LABELS, **FAST, checkpoint=path)
    with pytest.raises(ValueError, match="checkpoint must be a file in a directory that exists"):
        crt(FEATURES, LABELS, **FAST, checkpoint=tmp_path / "none" / "run.pt")


def test_lws_tells_classifiers_apart(tmp_path):
    lws(JOINT, FEATURES, LABELS, **FAST, checkpoint=tmp_path / "run.pt")
    other = make_joint()
    other.weight.data[0, 0] += 1e-3
    with pytest.raises(ValueError, match="classifier and data is"):
        lws(other, FEATURES, LABELS, **FAST, checkpoint=tmp_path / "run.pt")


# trouble


@pytest.mark.parametrize("train", [crt, lws])
def test_divergence_names_epoch_and_rate(train, tmp_path):
    arguments = (FEATURES, LABELS) if train is crt else (JOINT, FEATURES, LABELS)
    with pytest.raises(
        FloatingPointError, match=r"the loss is no longer finite in epoch 1 \(lr 1e\+30\); a smaller lr may help"
    ):
        train(*arguments, **{**FAST, "lr": 1e30}, checkpoint=tmp_path / "run.pt")
    assert not list(tmp_path.iterdir())


def test_fewer_samples_than_a_batch_make_one_step():
    result = crt(FEATURES[:50], LABELS[:50] % 2, epochs=2, lr=0.1)
    assert [math.isfinite(row["loss"]) for row in result.table] == [True, True]


def not_finite() -> Tensor:
    features = FEATURES.clone()
    features[100, 3] = torch.nan
    return features


BAD = {
    r"labels must hold every class of 0\.\.8, no samples of class 8": dict(num_classes=9),
    "no samples of class 3": dict(labels=torch.where(LABELS == 3, 2, LABELS)),
    "features must be finite, got nan at index": dict(features=not_finite()),
    r"features must have shape \[n, D\]": dict(features=FEATURES[0]),
    "features must be floating point": dict(features=FEATURES.long()),
    "features and labels must have one entry a sample": dict(labels=LABELS[1:]),
    "epochs must be at least 1, got 0": dict(epochs=0),
    "batch_size must be between 1 and": dict(batch_size=0),
    "lr must be finite and above 0, got 0": dict(lr=0.0),
    "momentum must be finite and at least 0": dict(momentum=-0.1),
    "seed must be between 0 and": dict(seed=-1),
    "images_per_class must be at least 1": dict(images_per_class=0),
    "select must be one of best_all, best_few, last, got 'best'": dict(select="best"),
    "select='best_all' needs val_features and val_labels": dict(val_features=None, val_labels=None, select="best_all"),
    "val_features and val_labels must be given together": dict(val_labels=None),
    "min_all must be a fraction": dict(min_all=0.3),
    "split must be ClassSplit": dict(split=[1]),
    'device must be "cpu"': dict(device="abacus"),
    "checkpoint must be a file": dict(checkpoint="/"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_calls(message):
    options = dict(features=FEATURES, labels=LABELS, **FAST, **VALIDATION)
    with pytest.raises((ValueError, TypeError), match=message):
        crt(**{**options, **BAD[message]})


def test_a_linear_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"linear must have shape \[8, 12\], got \[8, 11\]"):
        crt(FEATURES, LABELS, linear=nn.Linear(11, 8))
    with pytest.raises(ValueError, match=r"features must have shape \[n, 11\]"):
        lws(nn.Linear(11, 8), FEATURES, LABELS)
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.4, got"):
        lws(nn.Linear(12, 5), FEATURES, LABELS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match="got 'cuda': torch sees no GPU"):
        crt(FEATURES, LABELS, device="cuda")


def test_progress_bar_tells_epoch_and_accuracy(capsys):
    crt(FEATURES, LABELS, **FAST, **VALIDATION, progress=True)
    shown = capsys.readouterr().err
    assert "crt" in shown and "epoch 3" in shown and "few" in shown
    lws(JOINT, FEATURES, LABELS, **FAST, progress=False)
    assert capsys.readouterr().err == ""


def test_presets_are_options():
    for preset in RETRAINING_PRESETS.values():
        assert set(preset) == {"crt", "lws"}
        crt(FEATURES, LABELS, **{**preset["crt"], "epochs": 1, "lr": 0.01})
        lws(JOINT, FEATURES, LABELS, **{**preset["lws"], "epochs": 1, "lr": 0.01})


def test_small_data_get_a_floor_of_steps_and_settings_of_their_own():
    found = crt(FEATURES, LABELS, **VALIDATION, linear=JOINT, progress=False)
    steps = len(LABELS) // min(512, len(LABELS))
    assert len(found.table) * steps >= 250 and (len(found.table) - 1) * steps < 250
    tried = found.settings["tried"]
    factor = retraining.short_features_factor(FEATURES)
    expected = itertools.product(retraining.LRS, retraining.WEIGHT_DECAYS)
    assert {(each["lr"], each["weight_decay"]) for each in tried} == {(factor * lr, decay / factor) for lr, decay in expected}
    best = max(tried, key=lambda each: each["score"])
    assert (found.settings["lr"], found.settings["weight_decay"]) == (best["lr"], best["weight_decay"])
    assert found.accuracy["all"] == best["score"]
    chosen = {name: found.settings[name] for name in ("epochs", "lr", "weight_decay")}
    again = crt(FEATURES, LABELS, **VALIDATION, linear=JOINT, progress=False, **chosen)
    assert torch.equal(again.linear.weight, found.linear.weight) and "tried" not in again.settings
    scales = lws(JOINT, FEATURES, LABELS, **VALIDATION, lr=0.1, progress=False)
    assert scales.settings["lr"] == 0.1 and len(scales.settings["tried"]) == 3


def test_short_features_are_trained_on_as_well_as_long_ones():
    assert retraining.short_features_factor(10 * FEATURES) == 1
    long, short = (
        crt(scale * FEATURES, LABELS, val_features=scale * VALIDATION["val_features"], val_labels=VALIDATION["val_labels"])
        for scale in (2, 0.02)
    )
    assert short.settings["lr"] > 500 and short.accuracy["all"] > long.accuracy["all"] - 0.02


@pytest.mark.filterwarnings("ignore:no epoch is chosen")
def test_what_validation_cannot_choose_is_as_published():
    few = torch.isin(VALIDATION["val_labels"], torch.tensor([6, 7]))
    part = {name: values[~few] for name, values in VALIDATION.items()}
    with pytest.warns(AlphaNetWarning, match="no epoch is chosen, and the last one is taken: the validation samples have 0 of"):
        assert crt(FEATURES, LABELS, **part, **FAST, progress=False).chosen == {"epoch": FAST["epochs"]}
    for data in ({}, part, {**VALIDATION, "select": "last"}):
        found = crt(3 * FEATURES, LABELS, **data, epochs=2, progress=False)
        assert (found.settings["lr"], found.settings["weight_decay"]) == (0.2, 5e-4) and "tried" not in found.settings
