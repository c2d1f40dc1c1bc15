"""Rows for classes that a classifier has never seen: the old rows stay, the new classes are recognised."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from alphaext import add_classes
from alphaext.checkpoints import save_linear
from alphaext.commands.add_classes import AddClasses
from alphaext.commands.results import read_classifier
from alphaext.features import write_features

OLD, NEW, WIDTH = 6, 2, 16


def problem(samples: int = 3, seed: int = 0):
    """A classifier of six classes by their means, features of them, and of two more classes for training and for a test."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(OLD + NEW, WIDTH, generator=generator)

    def draw(classes, count):
        labels = torch.tensor(classes).repeat_interleave(count)
        return centres[labels] + torch.randn(len(labels), WIDTH, generator=generator), labels

    linear = nn.Linear(WIDTH, OLD)
    linear.weight.data.copy_(centres[:OLD] / 4)
    linear.bias.data.copy_(-centres[:OLD].square().sum(dim=1) / 8)
    old, new = draw(list(range(OLD)), 30), draw(list(range(OLD, OLD + NEW)), samples)
    return linear, old, new, draw(list(range(OLD + NEW)), 20)


def test_new_classes_are_recognised_and_old_rows_stay():
    linear, old, new, (features, labels) = problem()
    made = add_classes(linear, *old, *new)
    assert torch.equal(made.linear.weight[:OLD], linear.weight) and torch.equal(made.linear.bias[:OLD], linear.bias)
    right = made.linear(features).argmax(dim=1) == labels
    before = linear(features).argmax(dim=1) == labels
    assert right[labels >= OLD].float().mean() > 0.7
    assert right[labels < OLD].float().mean() > before[labels < OLD].float().mean() - 0.1
    assert made.split.few.tolist() == [OLD, OLD + 1] and made.head.members[:, 0].tolist() == [OLD, OLD + 1]
    again = add_classes(linear, *old, *new)
    assert torch.equal(again.linear.weight, made.linear.weight) and torch.equal(again.linear.bias, made.linear.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_one_sample_numpy_labels_and_classes_without_samples(bias):
    linear, (features, labels), new, _ = problem(samples=1)
    if not bias:
        linear.bias = None
    kept = labels != 2
    made = add_classes(linear, features[kept].numpy(), labels[kept].numpy(), new[0].numpy(), new[1].tolist(), epochs=2)
    assert made.split.empty.tolist() == [2] and 2 not in made.head.members
    assert (made.linear.bias is None) != bias and made.linear.out_features == OLD + NEW
    assert torch.equal(made.linear.weight[:OLD], linear.weight)


def test_without_training_a_row_is_its_neighbours_mean():
    linear, old, new, _ = problem()
    made = add_classes(linear, *old, *new, epochs=0)
    means = torch.stack([old[0][old[1] == c].mean(dim=0) for c in range(OLD)])
    for own in (OLD, OLD + 1):
        near = (means - new[0][new[1] == own].mean(dim=0)).norm(dim=1).argsort()[:5]
        assert torch.allclose(made.linear.weight[own], linear.weight[near].mean(dim=0), atol=1e-6)
        assert torch.allclose(made.linear.bias[own], linear.bias[near].mean(), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new_labels": [6, 6, 6, 8, 8, 8]}, "from 6, the number of classes, on, .* there is no 7"),
        ({"new_labels": [5, 5, 5, 6, 6, 6]}, "from 6, the number of classes, on, .* got 5"),
        ({"new_labels": [6]}, "one entry for each row"),
        ({"new_features": torch.zeros(0, WIDTH), "new_labels": []}, "there is no 6"),
        ({"new_features": torch.zeros(6, 3)}, r"new_features must have shape \[n, 16\], got \[6, 3\]"),
        ({"labels": torch.full((180,), 6)}, r"labels must be in 0..5, got 6"),
        ({"features": torch.zeros(0, WIDTH), "labels": []}, "labels must have samples of the classifier's classes"),
    ],
)
def test_errors(change, message):
    linear, (features, labels), (new_features, new_labels), _ = problem()
    given = {"features": features, "labels": labels, "new_features": new_features, "new_labels": new_labels} | change
    with pytest.raises(ValueError, match=message):
        add_classes(linear, **given)


def test_the_command(tmp_path):
    linear, old, (new_features, new_labels), _ = problem()
    write_features(tmp_path / "train", *old, num_classes=OLD, class_names=list("abcdef"))
    (tmp_path / "new").mkdir()
    write_features(tmp_path / "new" / "train", new_features, new_labels - OLD, num_classes=NEW, class_names=["g", "h"])
    save_linear(linear, tmp_path / "linear.pth")
    command = AddClasses(
        features=tmp_path, classifier=tmp_path / "linear.pth", new_features=tmp_path / "new", output=tmp_path / "out",
        device="cpu", progress=False,
    )  # fmt: skip
    result = command.run()
    assert result["class_names"] == list("abcdefgh") and sorted(result["neighbors"]) == ["6", "7"]
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    written = read_classifier(tmp_path / "out", OLD + NEW)
    expected = add_classes(linear, *old, new_features, new_labels).linear
    assert torch.equal(written.weight, expected.weight) and torch.equal(written.weight[:OLD], linear.weight)
    with pytest.raises(ValueError, match="output holds results already"):
        command.run()
