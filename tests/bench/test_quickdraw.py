"""The long-tailed problems of the benchmarks: counts, splits, files and the bookkeeping of the study of defaults."""

from __future__ import annotations

import dataclasses
import json
import os

import defaults
import numpy as np
import pytest
import quickdraw
import torch
from quickdraw import PARTS, Problem, Settings
from rich.console import Console

from alphaext import class_counts, split_classes


def made_up_problem(seed: int = 0) -> Problem:
    """Six classes, the last two few, as points around six centres."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([120, 110, 40, 30, 6, 5])
    centres = 2 * torch.eye(6, 8)
    labels = {"train": torch.arange(6).repeat_interleave(counts)}
    labels["val"] = labels["test"] = torch.arange(6).repeat(7)
    features = {part: centres[labels[part]] + torch.randn(len(labels[part]), 8, generator=generator) for part in PARTS}
    classifiers = {}
    for scale, name in ((1.0, "joint"), (2.0, "crt")):
        linear = torch.nn.Linear(8, 6)
        linear.weight.data, linear.bias.data = scale * centres.clone(), torch.zeros(6)
        classifiers[name] = linear.requires_grad_(False)
    return Problem("quickdraw", seed, list("abcdef"), counts, features, labels, classifiers, 1.5)


def test_counts_are_those_of_the_long_tail():
    counts = quickdraw.long_tailed_counts(345)
    assert counts == [int(80 * (5 / 80) ** (i / 344)) for i in range(345)]
    assert (counts[0], counts[172], counts[344]) == (80, 20, 5)
    split = split_classes(counts)
    assert [len(ids) for ids in (split.few, split.medium, split.many)] == [172, 173, 0]


@pytest.mark.parametrize("arguments", [(1, 80, 5), (10, 5, 80), (10, 80, 0)])
def test_counts_refuse_what_is_no_tail(arguments):
    with pytest.raises(ValueError, match="must be"):
        quickdraw.long_tailed_counts(*arguments)


def test_split_keeps_parts_apart_and_counts_as_prescribed():
    labels = torch.arange(345).repeat(100)
    counts = quickdraw.long_tailed_counts(345)
    parts = quickdraw.split_images(labels, counts, 20, 10, torch.Generator().manual_seed(3))
    everything = torch.cat([parts[part] for part in PARTS])
    assert len(everything.unique()) == len(everything)
    per_class = {part: class_counts(labels[parts[part]], 345) for part in PARTS}
    assert bool((per_class["test"] == 20).all())
    assert per_class["train"].sort(descending=True).values.tolist() == counts
    # What is left after test and training, at most ten.
    assert torch.equal(per_class["val"], (80 - per_class["train"]).clamp(max=10))
    assert bool((per_class["val"][split_classes(per_class["train"]).few] == 10).all())
    assert len(parts["val"]) == 3371


def test_split_is_drawn_by_the_seed_and_validation_takes_from_no_other_part():
    labels = torch.arange(6).repeat(30)
    counts = quickdraw.long_tailed_counts(6, 20, 3)

    def split(seed: int, val: int) -> dict[str, torch.Tensor]:
        return quickdraw.split_images(labels, counts, 5, val, torch.Generator().manual_seed(seed))

    first, again, more, other = split(0, 2), split(0, 2), split(0, 5), split(1, 2)
    assert all(torch.equal(first[part], again[part]) for part in PARTS)
    assert torch.equal(first["train"], more["train"]) and torch.equal(first["test"], more["test"])
    assert not torch.equal(class_counts(labels[first["train"]], 6), class_counts(labels[other["train"]], 6))
    assert not torch.equal(first["test"].sort().values, other["test"].sort().values)


def test_split_refuses_too_few_images():
    with pytest.raises(ValueError, match=r"class \d must have 5 test and 6 training images, but has 10 in all"):
        quickdraw.split_images(torch.arange(2).repeat(10), [6, 1], 5, 1, torch.Generator())


def test_retrained_classifier_sees_classes_alike():
    # Two classes at one point: by frequency the common one would win, balanced they are equal.
    features, labels = torch.ones(330, 4), torch.cat([torch.zeros(300), torch.ones(30)]).long()
    settings = Settings(crt_lr=0.02)
    linear = quickdraw.retrain_classifier(features, labels, 2, 0, settings)
    share = linear(features[:1]).softmax(dim=1)[0, 1]
    assert 0.4 < float(share) < 0.6
    assert torch.equal(linear.weight, quickdraw.retrain_classifier(features, labels, 2, 0, settings).weight)


def test_augmented_images_are_the_same_drawing_and_reproducible():
    image = torch.zeros(40, 1, 28, 28)
    image[:, :, 10:18, 10:18] = 1.0
    moved = quickdraw.augment(image, torch.Generator().manual_seed(0))
    assert torch.equal(moved, quickdraw.augment(image, torch.Generator().manual_seed(0)))
    assert moved.shape == image.shape and len(moved.flatten(1).unique(dim=0)) == 40
    # Scaled by 15% either way, and never out of the picture.
    area = moved.sum(dim=(1, 2, 3)) / 64
    assert float(area.min()) > 0.7 and float(area.max()) < 1.45


def test_a_tiny_problem_is_made_and_reproducible():
    settings = Settings(test_per_class=3, val_per_class=2, most=12, fewest=4, epochs=1, batch_size=8, crt_epochs=1)
    images, labels = torch.rand(100, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(5).repeat(20)
    epochs = []
    problem, again = (
        quickdraw.quickdraw_problem(images, labels, list("abcde"), 1, settings, lambda: epochs.append(1)) for _ in range(2)
    )
    assert len(epochs) == 2
    assert {part: list(problem.features[part].shape) for part in PARTS} == {
        "train": [sum(quickdraw.long_tailed_counts(5, 12, 4)), 192],
        "val": [10, 192],
        "test": [15, 192],
    }
    for part in PARTS:
        assert torch.equal(problem.features[part], again.features[part])
    for name in quickdraw.CLASSIFIERS:
        assert torch.equal(problem.classifiers[name].weight, again.classifiers[name].weight)


def test_file_gives_back_what_was_saved(tmp_path):
    problem = made_up_problem()
    path = tmp_path / "new" / "file.npz"
    quickdraw.save_problem(problem, path)
    loaded = quickdraw.load_problem(path)
    assert (loaded.name, loaded.seed, loaded.class_names, loaded.seconds) == ("quickdraw", 0, list("abcdef"), 1.5)
    assert defaults.fingerprint(loaded) == defaults.fingerprint(problem)
    assert torch.equal(loaded.counts, problem.counts)
    assert loaded.accuracy("crt", "test") == problem.accuracy("crt", "test")
    assert os.listdir(path.parent) == ["file.npz"]
    with np.load(path, allow_pickle=False) as arrays:
        assert "Quick, Draw!" in str(arrays["description"])


def test_file_of_other_settings_or_no_such_file_is_refused(tmp_path):
    path = tmp_path / "file.npz"
    quickdraw.save_problem(made_up_problem(), path, dataclasses.replace(Settings(), epochs=1))
    with pytest.raises(ValueError, match="other settings"):
        quickdraw.load_problem(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a file of"):
        quickdraw.load_problem(path)
    np.savez(path, x=np.zeros(3))
    with pytest.raises(ValueError, match="is not a file of"):
        quickdraw.load_problem(path)


def test_interrupted_writing_leaves_no_file(tmp_path, monkeypatch):
    def fail(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(KeyboardInterrupt):
        quickdraw.save_problem(made_up_problem(), tmp_path / "file.npz")
    assert os.listdir(tmp_path) == []


def test_seeds_that_are_there_are_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(quickdraw, "quickdraw_problem", lambda *_, **__: pytest.fail("trained"))
    for seed in (0, 1):
        quickdraw.save_problem(made_up_problem(seed), quickdraw.problem_path(tmp_path, seed))
    problems = quickdraw.make_all([1, 0, 1], tmp_path, None, Console(quiet=True))
    assert [problem.seed for problem in problems] == [1, 0]
    with pytest.raises(ValueError, match="ALPHAEXT_DATA"):
        quickdraw.make_all([0, 2], tmp_path, None, Console(quiet=True))


def test_grid_has_each_combination_once():
    grid = defaults.make_grid(["clamp", "l1"], ["identity"], [False, True], [0.5, 0.7], [0.1, 0.3], 2)
    assert len(grid) == len(set(grid)) == 2 * 2 * 2 + 2
    assert {(c.gamma, c.projected_gradient) for c in grid if c.rule == "l1"} == {(None, False)}


def test_study_resumes_and_writes_whole_rows(tmp_path, monkeypatch):
    for seed in (0, 1):
        quickdraw.save_problem(made_up_problem(seed), quickdraw.problem_path(tmp_path, seed))
    monkeypatch.setattr(defaults, "TOP_K", 3)
    arguments = ["--output", str(tmp_path / "out"), "--cache", str(tmp_path), "--problems", "quickdraw", "--seeds", "0", "1"]
    arguments += [
        "--classifiers",
        "crt",
        "--rules",
        "clamp",
        "l1",
        "--inits",
        "identity",
        "--projected",
        "no",
        "--lrs",
        "0.1",
        "--epochs",
        "2",
    ]
    trained = []
    train_all = defaults.train_all

    def counted(problem, classifier, configs):
        for config, result in train_all(problem, classifier, configs):
            trained.append(config)
            yield config, result

    monkeypatch.setattr(defaults, "train_all", counted)
    assert defaults.main([*arguments, "--gammas", "0.7"]) == 0
    assert len(trained) == 4
    assert defaults.main([*arguments, "--gammas", "0.7", "0.9"]) == 0
    assert len(trained) == 6
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 6
    for row in rows:
        assert row["num_few"] == 2 and 0 <= row["selected_epoch"] <= 2 and not row["diverged"]
        for part in PARTS[1:]:
            assert all(0 <= row[f"{part}_{split}_{state}"] <= 1 for split in quickdraw.SPLITS for state in defaults.STATES)
            assert row[f"{part}_all_before"] == made_up_problem(row["seed"]).accuracy("crt", part)["all"]
        # The selected epoch is the best on validation images, of which the last one is among the candidates.
        assert row["val_all_selected"] >= row["val_all_last"]
    text = (tmp_path / "out.md").read_text()
    assert text.count("| clamp | identity | no |") == 3 and text.count("| l1 | identity |") == 2
    assert "Quick, Draw!" in text

    changed = made_up_problem(0)
    changed.features["val"] += 1
    quickdraw.save_problem(changed, quickdraw.problem_path(tmp_path, 0))
    assert defaults.main([*arguments, "--gammas", "0.5"]) == 1
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 6


def test_choice_reads_validation_images_only():
    def group(gamma: float, val: float, test: float, seeds: int = 2, diverged: bool = False) -> defaults.Group:
        row = {"val_all_selected": val, "test_all_selected": test, "diverged": diverged}
        return defaults.Config("clamp", "identity", False, gamma, 0.1, 80), [dict(row) for _ in range(seeds)]

    best = group(0.7, 0.6, 0.1)
    worse = [group(0.5, 0.5, 0.9), group(0.3, 0.9, 0.9, seeds=1), group(0.9, 0.9, 0.9, diverged=True), group(0.6, 0.6, 0.9)]
    assert defaults.choose([*worse, best]) == [best]


def test_digits_need_no_files():
    problem = quickdraw.digits_problem(0)
    assert {part: len(problem.labels[part]) for part in PARTS} == {"train": 550, "val": 200, "test": 400}
    assert problem.accuracy("crt", "val")["few"] > 0.5
