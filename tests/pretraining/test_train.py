"""Joint training: it learns, goes on to the same bits, does not depend on workers, and says what is wrong."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_processes
from sklearn.datasets import load_digits
from torch import nn

pytest.importorskip("torchvision")

from alphaext.data.images import ArrayImages, ImageReadError
from alphaext.data.transforms import small_test_transform, small_train_transform
from alphaext.models.zoo import SmallConvNet, make_model
from alphaext.pretraining import run as joint_run
from alphaext.pretraining.epochs import EpochBatches, default_workers, epoch_order
from alphaext.pretraining.options import SAMPLINGS, JointOptions
from alphaext.pretraining.train import train_model
from alphaext.utils.processes import Group
from alphaext.utils.seeds import derived_seed

TRAIN = small_train_transform(8, channels=1, flip=False)
TEST = small_test_transform(8, channels=1)


def digits(begin: int, end: int) -> ArrayImages:
    data = load_digits()
    pixels = (data.images[begin:end] * 15.9).astype(np.uint8)
    return ArrayImages(pixels, torch.from_numpy(data.target[begin:end].astype(np.int64)), "digits", num_classes=10)


IMAGES, VALIDATION = digits(0, 100), digits(100, 140)


class BrokenImages(ArrayImages):
    """One of the images cannot be read."""

    def load(self, index):
        if index == 7:
            raise ImageReadError.of(self.name(index), "truncated")
        return super().load(index)


class Dropped(nn.Module):
    """A model that draws while it is trained."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5))
        self.fc = nn.Linear(16, 10)

    def forward(self, batch):
        return self.fc(self.body(batch))


def model(seed: int = 0, num_classes: int = 10) -> nn.Module:
    return make_model("small", num_classes, in_channels=1, seed=seed)


def dropped(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Dropped()


def train(network, folder, images=IMAGES, **options):
    settings_ = {
        "transform": TRAIN,
        "epochs": 2,
        "batch_size": 32,
        "lr": 0.05,
        "workers": 0,
        "device": "cpu",
        "progress": False,
    }
    return train_model(network, images, folder, **{**settings_, **options})


def weights(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def numbers(result):
    """The history as text: in a list of numbers, NaN would differ from itself."""
    return json.dumps(result if isinstance(result, list) else result.history)


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


VALIDATED = {"val_images": VALIDATION, "val_transform": TEST}


# --- learning


def test_it_learns_and_leaves_a_plain_state_dict(tmp_path):
    network = model()
    before = torch.get_rng_state()
    result = train(network, tmp_path / "run", digits(0, 300), epochs=5, val_images=digits(300, 400), val_transform=TEST)
    assert torch.equal(before, torch.get_rng_state())
    assert result.metrics["all"] > 0.7 and result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert result.selection == "best_all" and result.resumed_from == 0 and result.images_per_second > 0
    best = max(entry["all"] for entry in result.history)
    assert result.metrics["all"] == best == result.history[result.selected_epoch - 1]["all"]
    assert next(entry["epoch"] for entry in result.history if entry["all"] == best) == result.selected_epoch
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "history.json", "model.pth", "training.pt"]
    saved = torch.load(result.model_path, weights_only=True)
    assert same(saved, weights(network)) and not network.training
    assert all(tensor.is_contiguous() for tensor in saved.values())
    fresh = SmallConvNet(10, in_channels=1)
    fresh.load_state_dict(saved)
    fresh.eval()
    held_out = digits(300, 400)
    inputs = torch.stack([TEST(held_out.load(index)) for index in range(len(held_out))])
    hits = (fresh(inputs).argmax(1) == held_out.labels).double().mean()
    assert float(hits) == pytest.approx(best)
    summary = json.loads((tmp_path / "run/history.json").read_text())
    assert summary["selected_epoch"] == result.selected_epoch and len(summary["history"]) == 5


def test_without_validation_the_last_epoch_is_taken(tmp_path):
    result = train(model(), tmp_path)
    assert (result.selection, result.selected_epoch, result.metrics) == ("last", 2, None)
    assert [sorted(entry) for entry in result.history] == [["epoch", "loss", "lr"]] * 2


def test_the_metrics_split_the_classes_by_training_images(tmp_path):
    counts = [9, 9, 5] + [2] * 7
    chosen = torch.cat([(IMAGES.labels == c).nonzero()[:n, 0] for c, n in enumerate(counts)])
    result = train(model(), tmp_path, IMAGES.subset(chosen), few_below=5, many_above=8, batch_size=16, **VALIDATED)
    assert len(result.metrics) == 16
    parts = {"few": range(3, 10), "medium": [2], "many": [0, 1], "all": range(10)}
    sizes = {name: int(torch.isin(VALIDATION.labels, torch.tensor(list(ids))).sum()) for name, ids in parts.items()}
    hits = {name: round(result.metrics[name] * size, 6) for name, size in sizes.items()}
    assert hits["all"] == pytest.approx(hits["few"] + hits["medium"] + hits["many"])
    assert all(hit == pytest.approx(round(hit)) for hit in hits.values())


def test_classes_without_training_images_are_few(tmp_path):
    result = train(model(), tmp_path, IMAGES.subset((IMAGES.labels < 9).nonzero()[:, 0]), many_above=200, **VALIDATED)
    assert not math.isnan(result.metrics["few"]) and math.isnan(result.metrics["many"])
    assert json.loads((tmp_path / "history.json").read_text())["history"][0]["many"] is None


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw", "lr": 3e-3},
        {"sampling": "class_balanced"},
        {"sampling": "square_root", "label_smoothing": 0.1},
        {"precision": "bfloat16"},
        {"warmup_epochs": 1, "schedule": "step", "lr_step": 1, "nesterov": True},
        {"drop_last": False, "channels_last": False, "schedule": "constant"},
    ],
)
def test_ways_to_train(tmp_path, options):
    result = train(model(), tmp_path, epochs=3, **options, **VALIDATED)
    assert result.history[-1]["loss"] < result.history[0]["loss"] < 4
    assert all(math.isfinite(entry["loss"]) for entry in result.history)


def test_frozen_parameters_stay(tmp_path):
    network = model()
    network.backbone.requires_grad_(False)
    before = weights(network)
    train(network, tmp_path, epochs=1)
    after = weights(network)
    assert not torch.equal(before["fc.weight"], after["fc.weight"])
    assert torch.equal(before["backbone.0.weight"], after["backbone.0.weight"])


def test_auxiliary_classifiers_are_trained(tmp_path):
    class Auxiliary(Dropped):
        def __init__(self):
            super().__init__()
            self.aside = nn.Linear(16, 10)

        def forward(self, batch):
            features = self.body(batch)
            if not self.training:
                return self.fc(features)
            from torchvision.models.googlenet import GoogLeNetOutputs

            return GoogLeNetOutputs(self.fc(features), self.aside(features), None)

    network = Auxiliary()
    before = weights(network)
    train(network, tmp_path, epochs=1)
    assert not torch.equal(before["aside.weight"], network.aside.weight)


# --- the same bits


def test_the_same_call_makes_the_same_bits(tmp_path):
    first, second, other = dropped(), dropped(), dropped()
    one, two = train(first, tmp_path / "a"), train(second, tmp_path / "b")
    train(other, tmp_path / "c", seed=1)
    assert numbers(one) == numbers(two) and same(weights(first), weights(second))
    assert not same(weights(first), weights(other))


def test_workers_do_not_matter(tmp_path):
    first, second = model(), model()
    one = train(first, tmp_path / "a", **VALIDATED)
    two = train(second, tmp_path / "b", workers=2, **VALIDATED)
    assert numbers(one) == numbers(two) and same(weights(first), weights(second))


class Stop(BaseException):
    """What a kill is to a process."""


def stop_after(monkeypatch, epochs):
    """Break off as soon as the file of so many epochs is written."""
    real = joint_run.JointRun._save

    def save(self):
        real(self)
        if len(self.history) == epochs:
            raise Stop

    monkeypatch.setattr(joint_run.JointRun, "_save", save)


@pytest.mark.parametrize("make", [model, dropped])
@pytest.mark.parametrize(
    "options",
    [
        VALIDATED,
        {},
        {"optimizer": "adamw", "lr": 1e-3},
        {"precision": "bfloat16", "warmup_epochs": 1, "sampling": "class_balanced"},
    ],
)
def test_going_on_is_as_if_nothing_had_happened(tmp_path, monkeypatch, make, options):
    straight = make()
    expected = train(straight, tmp_path / "straight", epochs=4, **options)
    broken = make()
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 2)
        train(broken, tmp_path / "broken", epochs=4, **options)
    assert not (tmp_path / "broken/model.pth").exists()
    again = make()
    result = train(again, tmp_path / "broken", epochs=4, **options)
    assert result.resumed_from == 2
    assert numbers(result) == numbers(expected) and result.selected_epoch == expected.selected_epoch
    assert same(weights(again), weights(straight))
    straight_files, files = (torch.load(tmp_path / name / "training.pt", weights_only=True) for name in ("straight", "broken"))
    assert same(straight_files["model"], files["model"])
    momentum, momentum_again = (state["optimizer"]["state"] for state in (straight_files, files))
    assert all(
        torch.equal(a, b) for key in momentum for a, b in zip(momentum[key].values(), momentum_again[key].values(), strict=True)
    )


def test_the_best_epoch_survives_an_interruption(tmp_path, monkeypatch):
    scores = iter([0.5, 0.2, 0.5])
    monkeypatch.setattr(joint_run.JointRun, "_validate", lambda *_: torch.zeros(2, 10, dtype=torch.int64))
    monkeypatch.setattr(joint_run.SplitMetrics, "of", lambda self, hits: {"few": 0.0, "all": next(scores)})
    first = model()
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 2)
        train(first, tmp_path, epochs=3, **VALIDATED)
    best = weights(first)
    assert same(torch.load(tmp_path / "training.pt", weights_only=True)["selected"], best)
    second = model()
    result = train(second, tmp_path, epochs=3, **VALIDATED)
    assert result.selected_epoch == 1 and same(weights(second), best)
    assert same(torch.load(tmp_path / "model.pth", weights_only=True), best)


def test_a_finished_training_is_not_trained_again(tmp_path):
    first, second = model(), model()
    done = train(first, tmp_path, **VALIDATED)
    (tmp_path / "model.pth").unlink()
    result = train(second, tmp_path, **VALIDATED)
    assert (result.resumed_from, math.isnan(result.images_per_second)) == (2, True)
    assert numbers(result) == numbers(done) and result.metrics.keys() == done.metrics.keys()
    assert same(weights(first), weights(second)) and (tmp_path / "model.pth").exists()


def test_ctrl_c_keeps_the_last_epoch(tmp_path):
    class Interrupted(ArrayImages):
        seen = 0

        def load(self, index):
            self.seen += 1
            if self.seen == 150:
                raise KeyboardInterrupt
            return super().load(index)

    images = Interrupted(IMAGES.pixels, IMAGES.labels, "digits")
    network = dropped()
    with pytest.raises(KeyboardInterrupt):
        train(network, tmp_path, images, epochs=3, drop_last=False)
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    assert len(state["history"]) == 1 and same(state["model"], weights(network))
    expected = train(dropped(), tmp_path / "straight", epochs=3, drop_last=False)
    assert train(dropped(), tmp_path, epochs=3, drop_last=False).history == expected.history


# --- what the folder holds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.1}, "lr is 0.1 here and 0.05 there"),
        ({"epochs": 3}, "epochs is 3 here and 2 there"),
        ({"seed": 1}, "seed is 1 here and 0 there"),
        ({"sampling": "square_root"}, "sampling is 'square_root' here and 'instance' there"),
        ({"select": "last"}, "select is 'last' here and 'best_all' there"),
        ({"transform": TEST}, "the transform of images is"),
        ({"val_images": digits(100, 130)}, "the fingerprint of val_images is"),
    ],
)
def test_another_configuration_is_not_gone_on_from(tmp_path, change, message):
    train(model(), tmp_path, **VALIDATED)
    with pytest.raises(ValueError, match=f"training.pt belongs to another training: {message}"):
        train(model(), tmp_path, **{**VALIDATED, **change})


def test_another_model_or_data_set_is_not_gone_on_from(tmp_path):
    train(model(), tmp_path, epochs=1)
    with pytest.raises(ValueError, match="the model's class is 'Dropped' here and 'SmallConvNet' there"):
        train(dropped(), tmp_path, epochs=1)
    with pytest.raises(ValueError, match="digest of the model's parameters and buffers is"):
        train(model(num_classes=11), tmp_path, epochs=1)
    with pytest.raises(
        ValueError, match="digest of the model's weights before training is .* hand in the model as it was then"
    ):
        train(model(seed=1), tmp_path, epochs=1)
    with pytest.raises(ValueError, match="the fingerprint of images is"):
        train(model(), tmp_path, digits(0, 90), epochs=1)


@pytest.mark.parametrize("content", [b"", b"not a file of torch", None])
def test_a_file_that_is_no_training(tmp_path, content):
    if content is None:
        torch.save({"identity": {}}, tmp_path / "training.pt")
    else:
        (tmp_path / "training.pt").write_bytes(content)
    with pytest.raises(ValueError, match="training.pt cannot be read as the file of a training"):
        train(model(), tmp_path)


def test_a_pickle_is_not_run(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "evil"),))

    (tmp_path / "training.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match="cannot be read"):
        train(model(), tmp_path)
    assert not (tmp_path / "evil").exists()


def test_folders_that_will_not_do(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output_folder must be a folder, got the file"):
        train(model(), tmp_path / "file")
    with pytest.raises(ValueError, match="output_folder must be in a folder that exists"):
        train(model(), tmp_path / "a/b")
    (tmp_path / "model.pth").touch()
    with pytest.raises(ValueError, match="holds a model.pth but no training.pt"):
        train(model(), tmp_path)
    assert (tmp_path / "model.pth").stat().st_size == 0


def test_two_trainings_in_one_folder(tmp_path):
    errors = []

    class Nested(ArrayImages):
        def load(self, index):
            if not errors and index == 3:
                with pytest.raises(ValueError, match="another process is writing a training into") as caught:
                    train(model(), tmp_path)
                errors.append(caught.value)
            return super().load(index)

    train(model(), tmp_path, Nested(IMAGES.pixels, IMAGES.labels, "digits"), epochs=1)
    assert len(errors) == 1


def test_a_failed_write_leaves_the_last_file(tmp_path, monkeypatch):
    real = torch.save

    def save(state, file):
        if len(state["history"]) == 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        real(state, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left"):
        train(model(), tmp_path)
    assert len(torch.load(tmp_path / "training.pt", weights_only=True)["history"]) == 1
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))


# --- what goes wrong in training


def test_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    real = joint_run.JointRun._loss
    calls = []

    def loss(self, output, labels):
        calls.append(None)
        return real(self, output, labels) * (math.nan if len(calls) == 6 else 1)

    monkeypatch.setattr(joint_run.JointRun, "_loss", loss)
    network = model()
    with pytest.raises(FloatingPointError, match=r"loss is nan in epoch 2, step 3 of 3 \(lr 0.025\); a smaller lr"):
        train(network, tmp_path)
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    assert len(state["history"]) == 1 and same(state["model"], weights(network))


def test_a_learning_rate_that_is_too_large(tmp_path):
    with pytest.raises(FloatingPointError, match=r"training diverged: .* in epoch 1, step \d of 3 \(lr 1e\+30\)"):
        train(dropped(), tmp_path, lr=1e30)
    assert not (tmp_path / "training.pt").exists()


def test_weights_that_only_the_last_step_ruins(tmp_path):
    with pytest.raises(FloatingPointError, match=r"is no longer finite after epoch 1, step 1 \(lr 1e\+300\)"):
        train(dropped(), tmp_path, lr=1e300, batch_size=100)
    assert not (tmp_path / "training.pt").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read(tmp_path, workers):
    images = BrokenImages(IMAGES.pixels, IMAGES.labels, "digits")
    with pytest.raises(ImageReadError, match=r"^cannot read image 'digits\[7\]': truncated$") as caught:
        train(model(), tmp_path, images, workers=workers)
    assert caught.value.name == "digits[7]"
    broken = BrokenImages(VALIDATION.pixels, VALIDATION.labels, "val")
    with pytest.raises(ImageReadError, match=r"'val\[7\]'"):
        train(model(), tmp_path, val_images=broken, val_transform=TEST, workers=workers)


# --- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be between 1 and"),
        ({"epochs": 2.0}, TypeError, "epochs must be an integer"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"batch_size": 1}, ValueError, "batch_size must be at least 2 .* normalises"),
        ({"lr": 0.0}, ValueError, "lr must be finite and above 0, got 0.0"),
        ({"lr": "0.1"}, TypeError, "lr must be a number"),
        ({"momentum": -1}, ValueError, "momentum must be finite and at least 0"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay must be"),
        ({"schedule": "linear"}, ValueError, "schedule must be one of cosine, step, constant, got 'linear'"),
        ({"optimizer": "lars"}, ValueError, "optimizer must be one of sgd, adamw"),
        ({"sampling": "uniform"}, ValueError, "sampling must be one of instance, class_balanced, square_root"),
        ({"select": "best_few"}, ValueError, "select must be one of best_all, last"),
        ({"select": "best_all"}, ValueError, "select='best_all' needs val_images"),
        ({"precision": "float64"}, ValueError, "precision must be one of float32, bfloat16, got 'float64'"),
        ({"warmup_epochs": 2}, ValueError, "warmup_epochs must be less than epochs=2, got 2"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing must be finite and at least 0 and below 1"),
        ({"nesterov": True, "momentum": 0.0}, ValueError, "nesterov needs"),
        ({"nesterov": 1}, TypeError, "nesterov must be True or False"),
        ({"few_below": 200}, ValueError, "few_below must be at most many_above"),
        ({"workers": -1}, ValueError, "workers must be at least 0"),
        ({"device": "tpu"}, ValueError, "device must be"),
        ({"sync_batch_norm": True}, ValueError, "sync_batch_norm needs GPUs, got it on cpu"),
        ({"transform": lambda image: image}, TypeError, "transform must be ImageTransform"),
        ({"val_images": VALIDATION}, ValueError, "val_images and val_transform must be given together"),
        ({"val_images": VALIDATION, "val_transform": TRAIN}, ValueError, "val_transform must not be random"),
        ({"val_images": [], "val_transform": TEST}, TypeError, "val_images must be LabelledImages"),
        ({"transform": small_test_transform(8, channels=3)}, ValueError, r"SmallConvNet, cannot take images \[1, 3, 8, 8\]"),
        (
            {"val_images": VALIDATION, "val_transform": small_test_transform(8)},
            ValueError,
            r"cannot take images \[1, 3, 8, 8\]",
        ),
    ],
)
def test_bad_options(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        train(model(), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_bad_models_and_images(tmp_path):
    def refuse(error, message, network, images=IMAGES, **options):
        with pytest.raises(error, match=message):
            train(network, tmp_path / "run", images, **options)
        assert not (tmp_path / "run").exists()

    refuse(TypeError, "model must be Module, got str", "resnet18")
    refuse(ValueError, "must have parameters that require gradients", model().requires_grad_(False))
    refuse(ValueError, r"images must have labels of the model's 9 classes, in 0..8, got 9", model(num_classes=9))
    refuse(
        ValueError, "val_images must have labels of the model's 9", model(num_classes=9), IMAGES.subset([0, 1, 2]), **VALIDATED
    )
    refuse(TypeError, "images must be LabelledImages, got list; open_images makes them", model(), [])
    refuse(ValueError, "images must not be empty", model(), IMAGES.subset(torch.zeros(0, dtype=torch.int64)))
    refuse(ValueError, "images must be at least two", model(), IMAGES.subset([0]))
    refuse(ValueError, r"must return logits \[n, N\] of n images, got \[1, 1, 8, 8\] of one image", nn.Conv2d(1, 1, 1))


def test_progress_is_shown_when_asked_for(tmp_path, capsys):
    train(model(), tmp_path, progress=True, **VALIDATED)
    shown = capsys.readouterr().err
    assert "epoch 2/2" in shown and "images/s" in shown and "loss" in shown


# --- learning rates


def test_the_cosine_of_the_epoch():
    options = JointOptions(epochs=90, lr=0.2)
    rates = [options.learning_rate(epoch, step, 226) for epoch in (1, 46, 90) for step in (0, 225)]
    assert rates[0] == rates[1] == 0.2 and rates[2] == pytest.approx(0.1)
    assert 0 < rates[5] < 1e-4


def test_warm_up_rises_step_by_step_to_where_the_schedule_begins():
    options = JointOptions(epochs=10, lr=1.0, warmup_epochs=2)
    rates = [options.learning_rate(epoch, step, 5) for epoch in (1, 2) for step in range(5)]
    assert rates == pytest.approx([0.1 * k for k in range(1, 11)])
    assert options.learning_rate(3, 0, 5) == 1.0 > options.learning_rate(4, 0, 5)


def test_steps():
    options = JointOptions(epochs=90, lr=0.2, schedule="step", warmup_epochs=0)
    assert [options.learning_rate(epoch, 0, 1) for epoch in (1, 30, 31, 90)] == pytest.approx([0.2, 0.2, 0.02, 0.002])


# --- what an epoch has


LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=60).map(torch.tensor)


@settings(max_examples=60, deadline=None)
@given(labels=LABELS, sampling=st.sampled_from(SAMPLINGS), seed=st.integers(0, 2**63 - 1), epoch=st.integers(1, 100))
def test_the_order_of_an_epoch(labels, sampling, seed, epoch):
    before = torch.get_rng_state()
    order = epoch_order(labels, sampling, seed, epoch)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(order, epoch_order(labels, sampling, seed, epoch))
    assert len(order) == len(labels)
    counts = torch.bincount(labels)
    seen = torch.bincount(labels[order], minlength=len(counts)).double()
    shares = {"instance": counts.double(), "class_balanced": (counts > 0).double(), "square_root": counts.double().sqrt()}[
        sampling
    ]
    assert bool(((seen - len(labels) * shares / shares.sum()).abs() < 1 + 1e-9).all())
    times = torch.bincount(order, minlength=len(labels))
    for label in labels.unique().tolist():
        own = times[labels == label]
        assert int(own.max() - own.min()) <= 1  # the images of a class take turns


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(2, 70),
    per_process=st.integers(1, 9),
    processes=st.integers(1, 4),
    drop=st.booleans(),
    epoch=st.integers(1, 3),
)
def test_processes_share_the_batches(samples, per_process, processes, drop, epoch):
    labels = torch.arange(samples) % 3
    size = per_process * processes

    def batches(rank, count):
        made = EpochBatches(labels, "instance", size, 5, Group(rank, count, rank, torch.device("cpu")), drop)
        made.epoch = epoch
        return made

    shares = [list(batches(rank, processes)) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1 and len(shares[0]) == len(batches(0, processes))
    alone = list(batches(0, 1))
    full = samples // size
    for step in range(len(shares[0])):
        together = sorted(item for share in shares for item in share[step])
        assert len({len(share[step]) for share in shares}) == 1
        if step < full:
            assert together == sorted(alone[step]) and len(together) == size
        else:
            assert set(together) <= set(alone[step]) and len(together) >= 2 * processes
    rest = (samples - full * size) // processes
    assert len(shares[0]) == full + (rest >= 2 and not (drop and full > 0))


def test_augmentation_differs_by_place_and_epoch():
    batches = EpochBatches(torch.zeros(8, dtype=torch.int64), "instance", 4, 0, Group(0, 1, 0, torch.device("cpu")))
    first = [seed for batch in batches for _, seed in batch]
    batches.epoch = 2
    second = [seed for batch in batches for _, seed in batch]
    assert len(set(first + second)) == 16
    assert all(0 <= seed < 2**63 for seed in first)
    assert derived_seed(0, "a") != derived_seed(0, "b")


def test_default_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_workers() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "many")
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE must be an integer, got 'many'"):
        default_workers()


# --- several processes


def _train_together(folder, kind, options):
    network = {"model": model, "dropped": dropped}[kind]()
    result = train(network, folder, **options)
    return result.history, weights(network), result.resumed_from


def test_two_processes_train_as_one(tmp_path):
    """Without batch normalisation and dropout the gradients are the same up to rounding."""
    options = {"epochs": 2, "drop_last": False, "batch_size": 64, "transform": TRAIN, **VALIDATED}
    network = dropped()
    network.body[3] = nn.Identity()
    expected = train(network, tmp_path / "one", **options)

    def together(folder):
        other = dropped()
        other.body[3] = nn.Identity()
        return train(other, folder, **options).history, weights(other)

    (history, first), (other_history, second) = run_processes(2, together, tmp_path / "two")
    assert numbers(history) == numbers(other_history) and same(first, second)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5)
    assert [entry["loss"] for entry in history] == pytest.approx([entry["loss"] for entry in expected.history], rel=1e-4)
    # At most one of the 40 validation images is that near to a tie.
    assert [entry["all"] for entry in history] == pytest.approx([entry["all"] for entry in expected.history], abs=0.03)
    assert same(first, torch.load(tmp_path / "two/model.pth", weights_only=True))


def test_two_processes_with_batch_normalisation_learn_and_go_on(tmp_path, monkeypatch):
    options = {"epochs": 4, **VALIDATED}
    (history, first, _), (_, second, _) = run_processes(2, _train_together, tmp_path / "straight", "model", options)
    assert same(first, second) and history[-1]["loss"] < history[0]["loss"]
    assert all(math.isfinite(entry["loss"]) for entry in history)

    def stop(folder):
        stop_after(monkeypatch, 2)
        try:
            train(model(), folder, **options)
        except BaseException as error:
            return type(error).__name__

    assert "Stop" in run_processes(2, stop, tmp_path / "broken")
    results = run_processes(2, _train_together, tmp_path / "broken", "model", options)
    assert [resumed for _, _, resumed in results] == [2, 2]
    assert numbers(results[0][0]) == numbers(history) and same(results[0][1], first) and same(results[1][1], first)


def test_what_is_validated_is_what_is_saved(tmp_path, monkeypatch):
    """Each process has seen other images: its own statistics of batch normalisation are not the model's."""
    real = joint_run.JointRun._validate
    seen = []

    def validate(self, *place):
        seen.append([buffer.tolist() for buffer in self.model.buffers()])
        return real(self, *place)

    monkeypatch.setattr(joint_run.JointRun, "_validate", validate)

    def together():
        # One of the two has no image to validate with.
        train(model(), tmp_path, epochs=1, val_images=VALIDATION.subset([0]), val_transform=TEST)
        return seen

    first, second = run_processes(2, together)
    assert first == second
    saved = torch.load(tmp_path / "model.pth", weights_only=True)
    assert first[0] == [saved[name].tolist() for name, _ in model().named_buffers()]


def test_synchronised_batch_normalisations_share_all_with_the_models_own():
    network = model()
    own = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    parameters, names = list(network.parameters()), list(network.state_dict())
    with joint_run._synchronized_batch_norms(network, True):
        synchronised = [module for module in network.modules() if isinstance(module, nn.SyncBatchNorm)]
        assert len(synchronised) == len(own) == 4
        assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))
        assert all(a.running_mean is b.running_mean for a, b in zip(own, synchronised, strict=True))
        assert list(network.state_dict()) == names
    assert [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)] == own
    with joint_run._synchronized_batch_norms(network, False):
        assert not any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())


def test_an_error_of_one_process_stops_both(tmp_path):
    def together(folder):
        images = BrokenImages(IMAGES.pixels, IMAGES.labels, "digits")
        train(model(), folder, images, epochs=1, drop_last=False)

    kinds = [type(error).__name__ for error in run_processes(2, together, tmp_path)]
    assert "ImageReadError" in kinds and "NoneType" not in kinds
    errors = run_processes(2, lambda: train(model(), tmp_path / "run", batch_size=33))
    assert all("batch_size must be a multiple of the 2 processes" in str(error) for error in errors)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.pth").touch()
    first, second = run_processes(2, lambda: train(model(), tmp_path / "other"))
    assert isinstance(first, ValueError) and "process 0 of 2 failed: ValueError: output_folder" in str(second)


def test_a_killed_training_does_not_hold_its_folder(tmp_path):
    """Its workers live on for a moment, and must not keep the lock."""
    context = torch.multiprocessing.get_context("fork")

    class Slow(ArrayImages):
        def load(self, index):
            time.sleep(0.05)
            return super().load(index)

    images = Slow(IMAGES.pixels, IMAGES.labels, "digits")
    process = context.Process(target=lambda: train(model(), tmp_path, images, workers=1))
    process.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / ".lock").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert threading.active_count() >= 1
    result = train(model(), tmp_path, epochs=1)
    assert result.resumed_from == 0
